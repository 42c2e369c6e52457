"""聊天时动手改：关掉几个零件再问，换一个词元，搬一个向量，看它的猜测与回答变成怎样。

Hands         /without /with /replace /patch 各做什么
parts         几个零件的名字
one_token     恰好一个词元的文字
last_vector   从另一段文字里搬来的向量
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chat import display
from chat.inputs import notify
from config import UserError
from generate import Speaker, next_logits
from microscope import check_layer, find_part, look, patched, without

Last = tuple[list[int], list[int]] | None  # 刚才的开头，与接着写的
SHOWN = 10  # 画最可能的几个


@dataclass
class Hands:
    """关掉的零件一直关着，直到 /with；换词元与搬向量只看一眼，不留下。"""

    speaker: Speaker
    off: list[str] = field(default_factory=list)

    @contextmanager
    def on(self) -> Iterator[None]:
        """其间，关掉的关着。"""
        if not self.off:
            yield
            return
        step = self.speaker.step
        self.speaker.step = next_logits  # 编译好的代码看不见后来挂上的钩子
        try:
            with without(self.speaker.model, self.off):
                yield
        finally:
            self.speaker.step = step

    def commands(self, last: Callable[[], Last]) -> dict[str, Callable[[str], None]]:
        """{命令: 做什么}，得到的是后面的字；last() 是刚才的回答。"""
        return {
            "/without": lambda rest: self.switch_off(rest, last()),
            "/with": lambda rest: self.restore(rest, last()),
            "/replace": lambda rest: self.replace(rest, answered(last())),
            "/patch": lambda rest: self.patch(rest, answered(last())),
        }

    def switch_off(self, names: str, last: Last) -> None:
        """/without：再关掉几个；不写名字，就说出现在关着的。"""
        more = parts(names)
        for name in more:
            find_part(self.speaker.model, name)
        before = list(self.off)
        self.off = list(dict.fromkeys([*self.off, *more]))
        self.tell(before, last)

    def restore(self, names: str, last: Last) -> None:
        """/with：恢复几个；不写名字，就全恢复。"""
        back = parts(names)
        for name in back:
            if name not in self.off:
                raise UserError(f"{name} 没有关着；关着的是 {'、'.join(self.off) or '无'}")
        before = list(self.off)
        self.off = [name for name in self.off if back and name not in back]
        self.tell(before, last)

    def tell(self, before: list[str], last: Last) -> None:
        """说出关着什么；有刚才的回答，再说它变得多意外了。"""
        notify(f"（关着：{'、'.join(self.off)}；/with 恢复）" if self.off else "（都开着）")
        if last and last[1] and before != self.off:
            was, after = (Hands(self.speaker, off).surprise(*last) for off in (before, self.off))
            notify(f"（刚才的回答，平均每个词元意外 {was:.1f} → {after:.1f} 比特；再问一遍看看）")

    def replace(self, words: str, last: tuple[list[int], list[int]]) -> None:
        """/replace 3 虎：刚才的回答，第 3 个词元若是「虎」，后面的各有多意外。"""
        ids, new = last
        place, text = numbered(words, "/replace 3 虎")
        if not 1 <= place <= len(new):
            raise UserError(f"刚才的回答有 {len(new)} 个词元，从 1 数起，没有第 {place} 个")
        token = one_token(self.speaker, text)
        label = self.speaker.tokenizer.label
        other = [*new[: place - 1], token, *new[place:]]
        console = display.terminal()
        notify(f"第 {place} 个「{label(new[place - 1])}」换成「{label(token)}」：")
        chosen = self.chances(ids, other)
        console.print(display.surprise(self.speaker.tokenizer, other, chosen, console.width - 2))
        if place < len(new):
            was, now = self.chances(ids, new)[place:], chosen[place:]
            notify(f"它后面的，平均每个词元意外 {mean_bits(was):.1f} → {mean_bits(now):.1f} 比特。")

    def patch(self, words: str, last: tuple[list[int], list[int]]) -> None:
        """/patch 2 另一句话：回答的头一个词元，换上另一句话在第 2 层之后的向量，猜测怎样变。"""
        ids, _ = last
        layer, text = numbered(words, "/patch 2 另一句话")
        vector = last_vector(self.speaker, text, layer)
        with self.on():
            before = self.speaker.read(ids)[-1]
            with patched(self.speaker.model, layer, len(ids) - 1, vector):
                after = self.speaker.read(ids)[-1]
        notify(f"（第 {layer} 层之后，换成了「{text}」读完时的向量；百分数是换之前与换之后）")
        console = display.terminal()
        console.print(display.compared(self.speaker.tokenizer, before, after, SHOWN))

    @torch.inference_mode()
    def chances(self, ids: list[int], new: list[int]) -> list[float]:
        """ids 之后写 new，每个词元的概率。"""
        with self.on():
            probs: Tensor = self.speaker.read([*ids, *new])[len(ids) - 1 : -1]  # (n, V)
        return [row[token].item() for row, token in zip(probs, new, strict=True)]

    def surprise(self, ids: list[int], new: list[int]) -> float:
        """平均每个词元多少比特。"""
        return mean_bits(self.chances(ids, new))


def parts(names: str) -> list[str]:
    """几个零件的名字，用逗号或空格隔开。"""
    return [name for name in re.split("[,，\\s]+", names) if name]


def one_token(speaker: Speaker, text: str) -> int:
    """恰好一个词元的文字 -> 编号。Raises UserError。"""
    ids = speaker.encode(text)
    if len(ids) != 1:
        raise UserError(f"「{text[:40]}」是 {len(ids)} 个词元；换上去的要正好是一个")
    return ids[0]


def last_vector(speaker: Speaker, text: str, layer: int) -> Tensor:
    """一段文字（微调过的当作一句提问）的最后一个词元，读到第 layer 层之后的向量 (C,)。

    Raises:
        UserError: 没有这一层，文字太长。
    """
    check_layer(speaker.model, layer)
    ids = speaker.prompt(text)
    if len(ids) > (limit := speaker.config.max_len):
        raise UserError(f"这句话有 {len(ids)} 个词元，最多 {limit} 个；请说短一些")
    return look(speaker.model, ids).residual[layer, -1]


def mean_bits(chances: list[float]) -> float:
    """平均意外多少比特。"""
    return sum(map(display.bits, chances)) / len(chances)


def answered(last: Last) -> tuple[list[int], list[int]]:
    """刚才的回答；还没有，就请先说一句。Raises UserError。"""
    if not last or not last[1]:
        raise UserError("还没有回答；先说一句话，再动手改")
    return last


def numbered(words: str, example: str) -> tuple[int, str]:
    """ "3 虎" -> (3, "虎")。Raises UserError。"""
    number, *rest = words.split(maxsplit=1) or [""]
    if not number.isdecimal() or len(number) > 6 or not rest:
        raise UserError(f"要写成 {example} 的样子")
    return int(number), rest[0].strip()
