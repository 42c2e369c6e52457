"""印在终端里，一屏：认出了什么，用了多少，长短，样本，要多久。

要学的词元，在终端里加粗并画线；接到文件或管道里、不要颜色时，写在【】里。
"""

import re
import sys
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from chat import display
from tokenizer import VISIBLE
from tools.inspect.facts import TITLE, Sample

STAGES = {"pretrain": ("预训练", "篇"), "sft": ("微调", "段")}
MOST = 5  # 一件事至多列几项
LINES_OF_SAMPLE = 3
LEARNED = "bold underline"
UNIT = re.compile(r"<\|\w+\|>|\[UNK\]|.", re.DOTALL)  # 略去中间时，不从中间断开的


def show(report: dict, samples: list[Sample]) -> None:
    """印出一屏；训练不收的，只印已经知道的。"""
    console = display.terminal(sys.stdout)
    stage, unit = STAGES[report["stage"]]
    lines = [Text(f"{TITLE}：{plain(report['source'])}（{stage}，{report['preset']}）", "bold")]
    for part in (reading, content, shape, openings):
        lines += map(with_bold_label, part(report, unit))
    lines += sample_lines(report, samples, console)
    if report["time"]:
        lines.append(with_bold_label(duration(report["time"])))
    for line in lines:
        for piece in fold(line, console.width):
            console.print(piece, soft_wrap=True)


def with_bold_label(line: str) -> Text:
    """不缩进的一行，冒号之前的加粗，找起来快。"""
    text = Text(line)
    if not line.startswith(" "):
        text.stylize("bold", 0, line.find("：") + 1)
    return text


# 折行时不断开的：一个英文单词、一个数、一个控制词元；标点跟着前面的字走。
UNBROKEN = re.compile(
    r"[（「【“《]*(?:<\|\w+\|>|[!-;=-~]+|.)(?:[，。；：、！？）」】”》]|……)*", re.DOTALL
)


def fold(text: Text, width: int) -> list[Text]:
    """折成几行，每行不超过 width 格。中文没有空格，rich 只在空格处折，会空出大半行。"""
    breaks, used = [], 0
    for found in UNBROKEN.finditer(text.plain):
        cells = cell_len(found[0])
        if used + cells <= width:
            used += cells
            continue
        if used:
            breaks.append(found.start())
        used = 0
        for at, character in enumerate(found[0], found.start()):  # 长过一行的，哪里都能断
            used += cell_len(character)
            if used > width:
                breaks.append(at)
                used = cell_len(character)
    return list(text.divide(breaks))


# ---------- 1. 认出了什么，长短如何 ----------


def reading(report: dict, unit: str) -> Iterator[str]:
    """认出的是什么；每一条照原样用了、改动了，还是没有用。"""
    if report["rows"] is None:
        return
    changed, refused = report["changed"], report["refused"]
    yield (
        f"认出的是 {report['kind']}，共 {report['rows']:,} 条：照原样用 {report['used']:,}，"
        f"改动后用 {sum(changed.values()):,}，不用 {sum(refused.values()):,}"
    )
    if len(files := report["files"]) > 1:
        counts = {f"{f['name']}（{f['kind']}）": f["rows"] for f in files}
        yield f"  文件 {len(files)} 个：" + several(counts, by_count=False)
    for name, counts in (("改动", changed), ("不用", refused),
                         ("没有用的字段", report["unused_fields"])):  # fmt: skip
        if counts:
            yield f"  {name}：" + several(counts)
    notes = report["notes"]
    yield from (f"  {plain(note)}" for note in notes[:MOST])
    if len(notes) > MOST:
        yield f"  ……另有 {len(notes) - MOST} 句"


def content(report: dict, unit: str) -> Iterator[str]:
    """多少篇、多少字、多少词元；写不出的字，重复的。"""
    if report["train_documents"] is None:
        return
    train, val = report["train_documents"], report["val_documents"]
    tokens, targets = (report[f"train_{x}"] + report[f"val_{x}"] for x in ("tokens", "targets"))
    learned = f"，要学的 {targets:,}" if report["stage"] == "sft" else ""
    yield (
        f"{train + val:,} {unit}：训练 {train:,}，检验 {val:,}；"
        f"{report['characters']:,} 字，{tokens:,} 词元{learned}"
    )
    lost = report["lost_characters"]
    share = lost / max(1, report["characters"])
    most = "、".join(f"{alone(c)}（{n:,}）" for c, n in report["lost_top"])
    yield f"词表写不出的字：{lost:,}（{percent(share)}）" + (f"，最多的是 {most}" if lost else "")
    n = report["duplicates"]
    amount = f"{n:,} {unit}（{percent(n / (train + val))}）" if n else "没有"
    yield f"与前面一字不差的：{amount}"


def shape(report: dict, unit: str) -> Iterator[str]:
    """每篇多长：直方图；多少篇长过一行。"""
    if report["lengths"] is None:
        return
    found, seq_len = report["lengths"], report["seq_len"]
    documents = sum(cell["documents"] for cell in found["histogram"])
    yield (
        f"每{unit}多少词元：中位数 {found['median']:,}，九成不超过 {found['p90']:,}，"
        f"最长 {found['longest']:,}"
    )
    most = max(cell["documents"] for cell in found["histogram"])
    for cell in found["histogram"]:
        n = cell["documents"]
        label = f"{cell['from']:,}–{cell['to']:,}"
        yield f"{label:>19} {bar(n / most):<20} {n:,}（{percent(n / documents)}）"
    cut, skipped = report["cut"], report["skipped"]
    then = {"pretrain": "断开接到下一行，不会丢掉", "sft": "末尾截掉"}[report["stage"]]
    amount = f"{cut:,} {unit}（{percent(cut / documents)}），{then}" if cut else "没有"
    yield f"长过一行（seq_len {seq_len}）的：{amount}"
    if skipped:
        yield f"前 {seq_len} 个词元里没有助手的话的：{skipped:,} {unit}，不用"


def openings(report: dict, unit: str) -> Iterator[str]:
    """最常见的开头；卡片上只有出现过不止一次的。"""
    if report["openings"] is not None:
        common = several(dict(report["openings"]), most=10)
        yield "最常见的开头：" + (common or f"没有两{unit}相同的")


def several(counts: dict[str, int], most: int = MOST, by_count: bool = True) -> str:
    """几项与各自的数目写成一行；太多的只列最多的几项。"""
    items = sorted(counts.items(), key=lambda item: -item[1]) if by_count else [*counts.items()]
    text = "、".join(f"{shorten_line(plain(name.strip()))}（{n:,}）" for name, n in items[:most])
    return text + (f"，另有 {len(items) - most} 种" if len(items) > most else "")


def bar(share: float, width: int = 20) -> str:
    """长短正比于 share（0 到 1）的一条；不是零的至少看得见。"""
    eighths = max(int(share > 0), round(share * width * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def percent(share: float) -> str:
    """写成百分数；不是零就不写成零，不是全部就不写成全部。"""
    if share in (0, 1):
        return f"{share:.0%}"
    if share < 0.01:
        return f"{share:.2%}" if share >= 0.0001 else "<0.01%"
    return f"{min(share, 0.999):.1%}"


# ---------- 2. 样本 ----------


def sample_lines(report: dict, samples: list[Sample], console: Console) -> Iterator[Text]:
    """每个样本折成至多几行，太长的略去中间。"""
    if not samples:
        return
    styled = console.is_terminal and console.color_system and not console.no_color
    how = "加粗画线的要学" if styled else "【】里的要学"
    if report["stage"] == "pretrain":
        how = "每个词元都要学"
    yield Text(f"模型看到的样子（{how}）：", "bold")
    for sample in samples:
        note = "，长过一行" if sample.cut and report["stage"] == "pretrain" else ""
        head, end = f"  {sample.tokens:,} 词元{note}：", ""
        if sample.cut_off:
            end = f"……（第 {report['seq_len'] + 1} 个词元以后的截掉）"
        room = console.width * LINES_OF_SAMPLE - cell_len(head + end) - 4
        line = Text(head)
        for text, learned in middle_left_out(sample.pieces, room):
            if learned and report["stage"] == "sft":  # 预训练的全都要学，不必标
                line.append(*((text, LEARNED) if styled else (f"【{text}】",)))
            else:
                line.append(text)
        yield line.append(end)


Pieces = list[tuple[str, bool]]


def middle_left_out(pieces: Pieces, room: int) -> Pieces:
    """看得见的样子；宽过 room 格的，留下头尾，中间写一个省略号。"""
    every = ((unit, m) for text, m in pieces for unit in map(itemgetter(0), UNIT.finditer(text)))
    head = take(every, room)
    if sum(len(unit) for unit, _ in head) == sum(len(text) for text, _ in pieces):
        return joined(head)
    head = take(iter(head), room * 2 // 3)
    backwards = ((u, m) for text, m in reversed(pieces) for u in reversed(UNIT.findall(text)))
    tail = take(backwards, room - room * 2 // 3)[::-1]
    return [*joined(head), (" …… ", False), *joined(tail)]


def take(units: Iterator[tuple[str, bool]], room: int) -> Pieces:
    """从头取，直到放不下。"""
    taken = []
    for unit, learned in units:
        room -= cell_len(plain(unit))
        if room < 0:
            break
        taken.append((unit, learned))
    return taken


def joined(units: Pieces) -> Pieces:
    """连着的、要不要学相同的，合成一截。"""
    groups = groupby(units, key=itemgetter(1))
    return [(plain("".join(u for u, _ in group)), learned) for learned, group in groups]


# ---------- 3. 要多久 ----------


def duration(found: dict) -> str:
    """默认的训练要多久。"""
    steps, each = found["steps"], found["seconds_per_step"]
    if each is None:
        return f"默认的训练共 {steps:,} 步；这台机器的内存放不下一步，请换小些的 --preset"
    faster = "；训练时会编译，还要快些" if found["compile"] else ""
    return (
        f"默认的训练在这里（{found['device']}）约要 {spoken(found['seconds'])}："
        f"{steps:,} 步，每步 {each:.2g} 秒{faster}"
    )


def spoken(seconds: float) -> str:
    """秒数写给人看，只留两位有效的。"""
    for size, name in ((86400, "天"), (3600, "小时"), (60, "分钟")):
        if seconds >= size:
            amount = seconds / size
            return f"{amount:.1f} {name}" if amount < 10 else f"{amount:,.0f} {name}"
    return f"{max(1, seconds):.0f} 秒"


# ---------- 4. 看不见的字 ----------


def plain(text: str) -> str:
    """换行写成符号，别的看不见的字写成编号：一行就是一行，也改不了终端的颜色。"""
    return "".join(c if c.isprintable() else visible(c) for c in text)


def visible(character: str) -> str:
    """一个字给人看的样子。"""
    if character.isprintable():
        return character
    return VISIBLE.get(character, f"U+{ord(character):04X}")


def alone(character: str) -> str:
    """一个字单独写出来：叠在前一个字上的、看不见的，写成编号。"""
    return visible(character) if cell_len(character) else f"U+{ord(character):04X}"


def shorten_line(text: str, room: int = 60) -> str:
    """太长的一项截短，一屏才放得下。"""
    if cell_len(text) <= room:
        return text
    return "".join(c for c, _ in take(((c, False) for c in text), room - 2)) + "……"
