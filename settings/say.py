"""说给人看的话，都从这里出去：别处来的字里若有控制终端的，写成看得见的样子。

clean           一段文字 -> 控制不了终端的文字
say             同 print，但先 clean
say_above_bar   同 say，进度条还在走时用
brief           别处来的一个值，缩成一行，不太长
indented        一句话里嵌进来的字若有换行，后面几行都缩进：冒充不了程序另说的一句

检查点里的字段、下载来的列表、一行数据、模型写的、用户说的，都可能含有转义序列：清屏、改窗口的标题、
把字倒过来显示。程序自己的颜色与进度条不从这里走（rich 与 tqdm 各管各的），交给它们的文字先 clean。
"""

import re
from typing import IO

# C0 与 C1 的控制字符（换行与制表除外），改变文字方向的，以及另外两种换行。
CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F),
            *range(0x2066, 0x206A)]  # fmt: skip
VISIBLE = {code: repr(chr(code))[1:-1] for code in CONTROLS if chr(code) not in "\n\t"}


def clean(text: object) -> str:
    r"""控制终端的字符写成看得见的样子，例如 ESC 写成 \x1b；其余的原样。"""
    return str(text).translate(VISIBLE)


def brief(value: object, most: int = 160) -> str:
    """别处来的一个值，说给人看：一行，至多 most 个字，控制不了终端。"""
    try:
        text = str(value)[: 4 * most]
    except (RecursionError, ValueError):  # 嵌套得很深的，几千位的整数，写不出来
        text = type(value).__name__
    line = clean(" ".join(text.split()))
    return line if len(line) <= most else f"{line[:most]}……"


def indented(text: object) -> str:
    """第二行起至少缩进两格；已经缩进的不动。"""
    return re.sub(r"\n(?! )", "\n  ", str(text))


def say(*parts: object, end: str = "\n", file: IO[str] | None = None, flush: bool = False) -> None:
    """同 print：几样东西用空格隔开，默认写到标准输出。"""
    print(*map(clean, parts), end=end, file=file, flush=flush)


def say_above_bar(text: object, file: IO[str] | None = None) -> None:
    """印在进度条之上，不打断它。"""
    from tqdm import tqdm  # 用到才导入：包还没有装时，也要说得出话

    tqdm.write(clean(text), file=file)
