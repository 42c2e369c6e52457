"""画成 SVG 的约定：图里的文字仍是文字，能选中，用读者自己的字体；同样的数画出同样的字节。"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SVG = {  # matplotlib 的设置
    "svg.fonttype": "none",
    "svg.hashsalt": "mini-llm",
    # 看图的人的机器挑第一个有的；画图的机器不必有。
    "font.family": [
        "Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC",
        "WenQuanYi Micro Hei", "Noto Sans CJK JP", "sans-serif",
    ],
    "axes.unicode_minus": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip


BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#d9772b", "#3c8d5a", "#9aa0a6"  # 课里的图用的颜色
SOFT = {BLUE: "#d7e6f6", ORANGE: "#fbe3cf", GREEN: "#d5ecdd", GREY: "#eceef0"}  # 各自的浅色


@contextmanager
def quiet_about_fonts() -> Iterator[None]:
    """画图的机器上缺哪种字体，matplotlib 不必说：它只是量不准字的宽度，图照样是对的。"""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield
