"""一份没有学过的文字，每个字要多少比特：总的，各个来源的。

    python -m tools.lab.prose --data 留出的.jsonl --checkpoint out/small/pretrain.pt

每篇只取开头的 300 个字，各自独立地读：前面什么也没有，所以比训练时的「检验」难一些，
却是别人的模型、别的分词器也能照样做的一道题（``python -m tools.bench peers`` 就用它比）。
除以原文的全部字数；词表写不出的字，每个另记 20.1 比特（怎样算，见 loss.py）。
每一行若有 source 字段，也按来源分开说。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from config import Config, UserError, option
from corpus.log import ReadLog
from corpus.readers import read_rows
from engine.device import Device
from engine.speed import load_for_chat
from generate import Speaker
from loss import BITS_OF_A_LOST_CHARACTER
from settings.flags import read_options
from settings.resolve import default_checkpoint
from settings.say import say
from tools.lab.answers import Given, plus_minus, ratio, surprise

LONGEST = 300  # 每篇取开头的几个字


@dataclass
class Options:
    """命令行参数。"""

    data: str | None = option(None, "没有学过的文字：一行一篇，{text, source}，或者别的认得的格式")
    checkpoint: str | None = option(None, "哪个检查点；默认是预训练写下的那一个")
    n: int = option(0, "至多用多少篇，均匀地取；0：全部", "篇")
    device: str = option("auto", "设备", choices=("auto", "cuda", "mps", "cpu"))

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        wrong = [] if self.data else ["请用 --data 写明没有学过的文字在哪个文件里"]
        return wrong + ["--n 不能是负数"] * (self.n < 0)


class Text(NamedTuple):
    """一篇的开头。"""

    text: str
    source: str  # 没有写的是空的


def read_texts(path: str, n: int = 0) -> list[Text]:
    """一个文件里的文字，每篇只留开头；n 大于 0 时，均匀地取 n 篇。Raises UserError：一篇也没有。"""
    found, n_empty = [], 0
    for _, row in read_rows(path, ReadLog(path)):
        text = row.get("text") if isinstance(row, dict) else row
        if isinstance(text, str) and text.strip():
            source = row.get("source", "") if isinstance(row, dict) else ""
            found.append(Text(text[:LONGEST], str(source)))
        else:
            n_empty += 1
    if not found:
        raise UserError(f'{path} 里没有文字；要的是一行一篇，{{"text": …}}')
    if n_empty:
        say(f"（{path} 里有 {n_empty} 行没有文字，没有用）")
    return evenly(found, n) if n else found


def evenly(found: Sequence, n: int) -> list:
    """从头到尾均匀地取 n 个；没有那么多，全都要。"""
    n = min(n, len(found))
    return [found[i * len(found) // n] for i in range(n)]


def bits(texts: Sequence[Text], measure: Callable[[list[str]], list[float]]) -> Iterator[tuple]:
    """逐篇给出 (来源, 比特, 字数)。

    Args:
        measure: 几篇的原文 -> 各篇的比特，写不出的字也要算在内。
    """
    measured = measure([one.text for one in texts])
    for one, found in zip(texts, measured, strict=True):
        yield one.source, found, len(one.text)


def bits_of(speaker: Speaker) -> Callable[[list[str]], list[float]]:
    """用我们的模型量：每个词元的损失，加上写不出的字。"""
    tokenizer = speaker.tokenizer

    def measure(texts: list[str]) -> list[float]:
        encoded = tokenizer.encode_and_lose(texts)
        longest, limit = max(len(ids) for ids, _ in encoded), speaker.config.max_len - 1
        if longest > limit:  # 只算装得下的，却除以全部的字数，会显得好
            raise UserError(
                f"有一篇的开头是 {longest} 个词元，这个模型的上下文只装得下 {limit} 个；"
                f"请换一个 max_len 大些的"
            )
        given = [Given([tokenizer.bos_id], ids.tolist()) for ids, _ in encoded]
        nats = surprise(speaker, given)
        lost = [BITS_OF_A_LOST_CHARACTER * len(gone) for _, gone in encoded]
        return [n / math.log(2) + more for n, more in zip(nats, lost, strict=True)]

    return measure


def by_source(measured: Sequence[tuple]) -> dict[str, list[tuple[float, int]]]:
    """{来源: [(比特, 字数), …]}，字数多的在前；头一个是全部的。"""
    groups = defaultdict(list)
    for source, found, n in measured:
        groups[source].append((found, n))
    ordered = sorted(groups, key=lambda name: -sum(n for _, n in groups[name]))
    whole = {"全部": [pair for pairs in groups.values() for pair in pairs]}
    return whole | ({name: groups[name] for name in ordered} if len(groups) > 1 else {})


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """读检查点与文字，量，说。"""
    usage = "用法：python -m tools.lab.prose --data 文件 [--参数 值 …]"
    options = read_options(Options, sys.argv[1:] if argv is None else argv, usage)
    path = Path(options.checkpoint or default_checkpoint("pretrain"))
    texts = read_texts(options.data, options.n)
    speaker = load_for_chat(path, Device(Config(device=options.device, compile=False)))
    n = sum(len(one.text) for one in texts)
    say(f"{path}，{len(texts)} 篇的开头，共 {n:,} 个字：")
    for name, pairs in by_source(list(bits(texts, bits_of(speaker)))).items():
        said = f"{name}（{len(pairs)} 篇）" if name != "全部" else name
        say(f"  {said}：每个字 {plus_minus(*ratio(pairs))} 比特")


if __name__ == "__main__":
    run_script(main)
