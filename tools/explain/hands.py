"""动手改：换一个词元，关掉几个零件，搬一个向量；看猜测变了多少。

read_hands   命令行写的 -> Hands
Hands        动了什么；examine 看一遍，连同动手之前的猜测；answers 各接着写什么
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from chat.hands import last_vector, one_token, parts
from config import UserError
from generate import Sampling, Speaker
from microscope import find_part, patched, without
from tools.explain.facts import examine, rounded


@dataclass
class Hands:
    """动了什么。"""

    ids: list[int]  # 换过词元的
    original: list[int]  # 没有换的，一样长
    off: list[str]  # 关掉的零件，写法见 `microscope.without`
    patch: tuple[int, int, Tensor] | None  # 第几层之后，第几个位置（从 0 数起），换成哪个向量
    words: str  # 一句话：动了什么；什么也没动是空的

    @contextmanager
    def on(self, speaker: Speaker) -> Iterator[None]:
        """其间，关掉的关着，搬来的在那里。"""
        with ExitStack() as stack:
            stack.enter_context(without(speaker.model, self.off))
            if self.patch:
                stack.enter_context(patched(speaker.model, *self.patch))
            yield

    def examine(self, speaker: Speaker, dropped: int = 0) -> dict:
        """动手之后看一遍，同 `facts.examine`；before 里另有动手之前，同样的词元各是多少概率。"""
        former = speaker.read(self.original)
        with self.on(speaker):
            facts = examine(speaker, self.ids, dropped)
            probs = speaker.read(self.ids)
        if not self.words:
            return facts
        targets = torch.tensor([*self.ids[1:], probs[-1].argmax()])[:, None].to(probs.device)
        next_p, target_p = (former.gather(1, t) for t in (probs.topk(10).indices, targets))
        shown = [[rounded(p) for p in row] for row in next_p.tolist()]
        before = {"next_p": shown, "target_p": [rounded(p) for p in target_p[:, 0].tolist()]}
        return facts | {"changed": self.words, "before": before}

    def answers(self, speaker: Speaker, start: int, most: int) -> list[str] | None:
        """从第 start 个词元起，动手之前与之后各接着写什么；没有动手或没有开头，是 None。"""
        if not self.words or start < 1:
            return None
        greedy = Sampling(temp=0, penalty=1, max=most)
        before = list(speaker.generate(self.original[:start], greedy))
        with self.on(speaker):
            after = list(speaker.generate(self.ids[:start], greedy))
        return [speaker.tokenizer.decode(new) for new in (before, after)]


def read_hands(
    speaker: Speaker, ids: list[int], at: int, silent: str, replace: str, patch: str
) -> Hands:
    """命令行写的三样 -> `Hands`。

    Args:
        at: 看第几个位置的猜测，从 0 数起；搬来的向量放在那里。
        silent: 关掉的零件，逗号或空格隔开，例如 "2.1 3.attention"。
        replace: "3=虎"：第 3 个词元换成「虎」，从 1 数起。
        patch: "2=另一段文字"：它最后一个词元在第 2 层之后的向量。
    Raises:
        UserError: 看不懂，没有这个零件，没有这一层，换上去的不是一个词元。
    """
    off = parts(silent)
    for name in off:
        find_part(speaker.model, name)
    words = [f"关掉了 {'、'.join(off)}"] if off else []
    new, moved = list(ids), None
    if replace:
        place, text = numbered("replace", replace, "3=虎")
        if not 1 <= place <= len(ids):
            raise UserError(f"--replace 的第 {place} 个不在 1 与词元数 {len(ids)} 之间")
        new[place - 1] = one_token(speaker, text)
        words.append(f"第 {place} 个词元换成了「{speaker.tokenizer.label(new[place - 1])}」")
    if patch:
        layer, text = numbered("patch", patch, "2=另一段文字")
        moved = layer, at, last_vector(speaker, text, layer)
        words.append(f"第 {at + 1} 个位置在第 {layer} 层之后的向量，换成了「{text}」最后一个词元的")
    return Hands(new, list(ids), off, moved, "；".join(words))


def numbered(name: str, value: str, example: str) -> tuple[int, str]:
    """ "3=虎" -> (3, "虎")。Raises UserError。"""
    found = re.fullmatch("(\\d{1,6})=(.+)", value, re.DOTALL)
    if not found:
        raise UserError(f"--{name} 要写成 {example} 的样子，得到的是 {value[:40]!r}")
    return int(found[1]), found[2]
