"""写成网页：数据填进 page.html，不联网也打得开。"""

import json
from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.html")


def page(facts: dict, at: int) -> str:
    """一张自成一体的网页：样式、程序、数据都在里面。

    Args:
        facts: `examine` 的结果。
        at: 打开时选中的位置，从 0 数起。
    """
    data = json.dumps(facts | {"at": at}, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # 文字里若有 </script>，不能让它结束了程序
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", data)
