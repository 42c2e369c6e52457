"""写成网页：样式、画法与数据填进 page.html，不联网也打得开。"""

import json
from pathlib import Path

HERE = Path(__file__).parent


def inlined(html: str, **pieces: str) -> str:
    """网页里的 /*名字*/ 换成文件的内容；tools/page 也用它。"""
    for name, text in pieces.items():
        place = f"/*{name}*/"
        assert html.count(place) == 1, f"网页里 {place} 不是恰好一处"
        html = html.replace(place, text)
    return html


def safe_json(value) -> str:
    """写进 <script> 里的 JSON；文字里若有 </script>，不能让它结束了程序。"""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def look_and_draw() -> dict[str, str]:
    """两张网页合用的样式与画法。"""
    return {
        "STYLE": (HERE / "style.css").read_text(encoding="utf-8"),
        "DRAW": (HERE / "draw.js").read_text(encoding="utf-8"),
    }


def page(facts: dict, at: int) -> str:
    """一张自成一体的网页：样式、程序、数据都在里面。

    Args:
        facts: `examine` 的结果。
        at: 打开时选中的位置，从 0 数起。
    """
    html = inlined((HERE / "page.html").read_text(encoding="utf-8"), **look_and_draw())
    return html.replace("/*DATA*/null", safe_json(facts | {"at": at}))
