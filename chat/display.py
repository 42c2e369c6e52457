"""把概率画在终端里：深色浅色的底都看得清，没有颜色也读得懂。

    candidates       最可能的几个词元，画成横条
    compared         动手改之前与之后，最可能的几个
    surprise         写出来的每个词元有多意外

「意外」是 −log2(概率)，单位比特：概率 1/2 是 1 比特，1/4 是 2 比特。
"""

import math
import sys
from collections.abc import Iterable

from rich.bar import Bar
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from torch import Tensor

from settings.say import clean
from tokenizer import Tokenizer

HEIGHTS = "▁▂▃▄▅▆▇█"  # 意外不到 1 比特、不到 2 比特……，最后是 7 比特以上
COLOURS = ["green"] + ["default"] * 3 + ["magenta"] * 3 + ["bold red"]  # 与上面一一对应


class CleanConsole(Console):
    """同 rich 的 Console，但画的字里若有控制终端的，写成看得见的样子；颜色是 rich 自己的。"""

    def render(self, renderable: RenderableType, options=None) -> Iterable[Segment]:
        """把要画的东西变成一段段文字；表格里的格子也经过这里。"""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=clean(segment.text))


def terminal(file=None) -> Console:
    """默认画在标准错误上：管道里接着的程序读到的只有回答。"""
    return CleanConsole(file=file or sys.stderr, highlight=False)


def bits(p: float) -> float:
    """概率 -> 意外（比特）。"""
    return -math.log2(max(p, 1e-30))


def percent(p: float) -> str:
    """概率写成百分数；不是零就不写成零。"""
    return f"{p:.1%}" if p >= 0.001 or p == 0 else "<0.1%"


def candidates(
    tokenizer: Tokenizer,
    probs: Tensor,
    k: int,
    drawn: int | None = None,
    lottery: Tensor | None = None,
) -> Table:
    """最可能的 k 个，一行一个；选中的 drawn 若不在其中，补在最后。

    Args:
        probs: 模型给的概率 (V,)，横条的长短。
        drawn: 选中的编号，前面标上箭头。
        lottery: 经过温度、top-k 等调整，真正拿来抽签的概率 (V,)；给了就多写一列。
    """
    shown = probs.topk(min(k, probs.numel())).indices.tolist()
    if drawn is not None and drawn not in shown:
        shown.append(drawn)
    table = Table.grid(padding=(0, 1))
    for token in shown:
        p, style = probs[token].item(), "bold" if token == drawn else ""
        cells = [
            Text("→" if token == drawn else " ", style),
            Text(clean(tokenizer.label(token)), style),
            Bar(1, 0, p, width=30),
            Text(percent(p), style, justify="right"),
        ]
        if lottery is not None:
            q = lottery[token].item()
            cells.append(Text(f"抽签时 {percent(q)}" if q else "不参加抽签", "dim"))
        table.add_row(*cells)
    return table


def compared(tokenizer: Tokenizer, before: Tensor, after: Tensor, k: int) -> Table:
    """动手之后最可能的 k 个，连同之前各是多少；两样都是概率 (V,)。"""
    table = Table.grid(padding=(0, 1))
    for token in after.topk(min(k, after.numel())).indices.tolist():
        was, now = before[token].item(), after[token].item()
        words = f"{percent(was)} → {percent(now)}（{bits(was) - bits(now):+.1f} 比特）"
        table.add_row(Text(clean(tokenizer.label(token))), Bar(1, 0, now, width=24), Text(words))
    return table


def surprise(tokenizer: Tokenizer, ids: list[int], probs: list[float], width: int) -> Group:
    """一串词元，每个按概率上色，下面的小条越高越意外；太长就折行。

    Args:
        ids: 编号。
        probs: 每个词元的概率，与 ids 一样长。
        width: 一行多宽（半角字符）。
    """
    lines, text, marks = [], Text(), ""
    for token, p in zip(ids, probs, strict=True):
        name = clean(tokenizer.label(token)).removeprefix("##")
        if text and text.cell_len + cell_len(name) > width:
            lines, text, marks = [*lines, text, Text(marks)], Text(), ""
        level = min(7, int(bits(p)))
        text.append(name, COLOURS[level])
        marks += HEIGHTS[level] * max(1, cell_len(name))
    legend = Text()
    for level, words in [(0, "▁ 概率超过一半  "), (1, "▂▃▄ 6% 以上  "), (4, "▅▆▇ 0.8% 以上  "),
                         (7, "█ 更小：很意外")]:  # fmt: skip
        legend.append(words, COLOURS[level])
    return Group(*lines, text, Text(marks), legend)
