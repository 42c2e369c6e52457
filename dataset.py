"""数据：磁盘上的词元文件 -> 一批批训练数据。

    PretrainBatches   文档首尾相接，切成等长的行
    PackedBatches     几段拼成一行，互相看不见，一段也不切开；下面两种都是
    DocumentBatches   整篇的文档
    SFTBatches        整段的对话，只在助手的话上算损失
    pretrain_batches  预训练用哪一种，由配置决定；sft_batches：微调的；
                      replayed_batches：微调时回放的
    Replay            新的行里掺一些旧语料的：增量预训练，微调
    rows_of_step      第几步用哪几行：只由种子与步数决定，随时接得上

词元文件是一串编号，由 corpus/token_file.py 从原始文件写成；这里只管怎样把它切成行、拼成批。

图例：B 批次（行数），T 每行的词元数，V 词表大小。
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config, UserError
from settings.lengths import nothing_fits
from tokenizer import Tokenizer

IGNORE = -100  # 不算损失的目标
SIDES = ("train", "val")

# ---------- 1. 一批 ----------


class Batch(NamedTuple):
    """一批训练数据，形状都是 (B, T)；不分段时 positions 与 segments 为 None。"""

    ids: Tensor
    targets: Tensor  # 右移一位的编号；IGNORE 处不算损失
    positions: Tensor | None = None
    segments: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """搬到设备上。"""
        return Batch(*(x if x is None else send(x, device) for x in self))


def send(x: Tensor, device: torch.device) -> Tensor:
    """搬到设备上；往显卡搬，从锁页内存走，不必等它搬完。"""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def slices(tokens: np.ndarray, size: int = 1 << 19) -> Iterator[tuple[int, np.ndarray]]:
    """一块一块地给出 (起点, 编号)：词元文件可能比内存还大。"""
    for start in range(0, len(tokens), size):
        yield start, tokens[start : start + size]


def used_ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """哪些编号出现过：布尔 (V,)。"""
    used = np.zeros(vocab_size, bool)
    for _, piece in slices(tokens):
        used[piece] = True
    return used


# ---------- 2. 预训练的行 ----------


class PretrainBatches:
    """文档首尾相接，切成 T 个词元一行。每个词元每遍恰好用一次，没有填充。

    Args:
        tokens: 一维 uint16 编号。
        seq_len: 每行的长度 T。
        document_start: 文档开头标记的编号；给了它，同一行里的几篇便互相看不见，
            位置各自从 0 数起。短文档因此学得快些，长文档则没有分别。
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, document_start: int | None = None):
        self.tokens, self.seq_len, self.document_start = tokens, seq_len, document_start
        self.n_rows = max(1, -(-(len(tokens) - 1) // seq_len))

    def get(self, rows: Iterable[int]) -> Batch:
        """取出这几行。最后一行可能不满，空出来的目标不算损失。"""
        T = self.seq_len
        pieces = np.full((len(rows := list(rows)), T + 1), -1, np.int64)
        for piece, row in zip(pieces, rows, strict=True):
            found = self.tokens[row * T : row * T + T + 1]
            piece[: len(found)] = found
        ids = torch.from_numpy(pieces)
        targets = ids[:, 1:].clone()
        targets[targets < 0] = IGNORE
        ids = ids[:, :-1].clamp(min=0)
        if self.document_start is None:
            return Batch(ids, targets)
        begins, index = ids == self.document_start, torch.arange(T)
        positions = index - torch.where(begins, index, 0).cummax(1).values
        return Batch(ids, targets, positions, begins.cumsum(1))


# ---------- 3. 几段拼成的行 ----------


class PackedBatches:
    """几段拼成一行，互相看不见，位置各自从 0 数起。一段也不切开：行尾放不下的空着，不算损失。

    Args:
        tokens: 一维 uint16 编号。
        begins: 每段的起点。
        lengths: 每段占几格，不超过 seq_len；它的目标晚一个，所以后面还有一个词元。
        usable: 用得上的是哪几段。
        seq_len: 每行的长度 T。
        seed: 决定哪几段拼在一起。
    """

    def __init__(
        self, tokens: np.ndarray, begins: np.ndarray, lengths: np.ndarray, usable: np.ndarray,
        seq_len: int, seed: int,
    ):  # fmt: skip
        self.tokens, self.begins, self.lengths, self.seq_len = tokens, begins, lengths, seq_len
        self.rows = pack(lengths, usable, seq_len, np.random.default_rng(seed)) or [[]]
        self.n_rows = len(self.rows)

    def targets(self, ids: np.ndarray) -> np.ndarray:
        """一段的编号 (n + 1,) -> 它的目标 (n,)；不学的是 IGNORE。"""
        return ids[1:]

    def get(self, rows: Iterable[int]) -> Batch:
        """取出这几行。行尾的空格子自成一段，不算损失。"""
        shape = (len(rows := list(rows)), self.seq_len)
        ids, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        positions, segments = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        for r, row in enumerate(rows):
            at = 0
            for segment, index in enumerate(self.rows[row]):
                begin, n = self.begins[index], self.lengths[index]
                piece = self.tokens[begin : begin + n + 1].astype(np.int64)
                here = slice(at, at + n)
                ids[r, here], targets[r, here] = piece[:-1], self.targets(piece)
                positions[r, here], segments[r, here] = np.arange(n), segment
                at += n
        return Batch(*map(torch.from_numpy, (ids, targets, positions, segments)))


class DocumentBatches(PackedBatches):
    """整篇的文档；比一行还长的，切成几段。每个词元每遍恰好用一次。

    切开的后半篇看不见前半篇，学它时无从照抄，也不知道在说什么；整篇地装，学得快得多
    （Fewer Truncations，arXiv 2404.10830；测量见 docs/lab-notes.md）。

    Args:
        tokens: 一维 uint16 编号。
        starts: 每篇文档的起点，末尾多一个总长。
        seq_len, seed: 见 `PackedBatches`。
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, seq_len: int, seed: int):
        cells = np.diff(starts)  # 每篇占几格：末一个词元的目标是下一篇的开头
        cells[-1] -= 1  # 最后一篇没有下一篇
        n = -(-cells // seq_len)  # 每篇切成几段
        offsets = (np.arange(n.sum()) - np.repeat(n.cumsum() - n, n)) * seq_len
        begins = np.repeat(starts[:-1], n) + offsets
        lengths = np.minimum(np.repeat(cells, n) - offsets, seq_len)
        super().__init__(tokens, begins, lengths, np.arange(len(begins)), seq_len, seed)


def pretrain_batches(data, side: str, config: Config, tokenizer: Tokenizer):
    """预训练的一批批：首尾相接的，或者整篇的。

    Args:
        data: 词元文件，corpus/token_file.py 的 `TokenFile`。
        side: "train" 或 "val"。
    """
    tokens = data.tokens[side]
    if not config.isolate_documents:
        return PretrainBatches(tokens, config.seq_len)
    if config.whole_documents:
        seed = config.seed if side == "train" else 0  # 换了种子，检验的仍是同样的行
        return DocumentBatches(tokens, data.starts[side], config.seq_len, seed)
    return PretrainBatches(tokens, config.seq_len, tokenizer.bos_id)


class SFTBatches(PackedBatches):
    """整段的对话；损失只算助手的话与它的 <|im_end|>。

    太长的对话从末尾截断，数目记在 cut 里；截断后一句回答也不剩的不用，数目记在 skipped 里。

    Args:
        tokens: 一维 uint16 编号。
        starts: 每段对话的起点，末尾多一个总长。
        seq_len, seed: 见 `PackedBatches`。
        max_len: 模型最多看多少个词元；side: 哪一边。都只用来说清为什么一段也用不上。
    Raises:
        UserError: 一段也用不上：到 seq_len 为止，还没有轮到助手说话。
    """

    def __init__(
        self, tokens: np.ndarray, starts: np.ndarray, seq_len: int, tokenizer: Tokenizer,
        seed: int, max_len: int | None = None, side: str = "train",
    ):  # fmt: skip
        self.tokenizer = tokenizer
        # 一段 n 个词元的对话占 n - 1 格：最后一个词元只作目标。
        lengths = np.minimum(np.diff(starts) - 1, seq_len)
        # 第一个助手标记在截断之前，才有话可学。
        assistant = tokenizer.role_ids["assistant"]
        marks = np.concatenate([at + np.flatnonzero(t == assistant) for at, t in slices(tokens)])
        first = np.searchsorted(marks, starts[:-1])
        offset = np.append(marks, len(tokens))[first] - starts[:-1]
        usable = np.flatnonzero(offset < lengths)
        self.skipped = len(lengths) - len(usable)
        self.cut = int((np.diff(starts)[usable] - 1 > seq_len).sum())
        if not len(usable):
            spoken = offset[offset < np.diff(starts) - 1]
            raise UserError(nothing_fits(spoken + 1, seq_len, max_len, side))
        super().__init__(tokens, starts[:-1], lengths, usable, seq_len, seed)

    def left_out(self) -> list[str]:
        """没有用上的，一件事一句话；都用上了，就是空的。"""
        sentences = []
        if self.skipped:
            sentences.append(f"{self.skipped} 段对话在 {self.seq_len} 个词元之内没有助手的话，不用")
        if self.cut:
            sentences.append(f"{self.cut} 段对话超过 {self.seq_len} 个词元，末尾截掉了")
        return sentences

    def targets(self, ids: np.ndarray) -> np.ndarray:
        """只学助手那一轮里，角色标记之后，直到 <|im_end|>（含）。"""
        turn = np.cumsum(ids == self.tokenizer.bos_id) - 1  # 每个词元属于第几轮
        roles = ids[np.minimum(np.flatnonzero(ids == self.tokenizer.bos_id) + 1, len(ids) - 1)]
        by_assistant = (roles == self.tokenizer.role_ids["assistant"])[turn]
        marks = (ids == self.tokenizer.bos_id) | (ids == self.tokenizer.role_ids["assistant"])
        return np.where((by_assistant & ~marks)[1:], ids[1:], IGNORE)


def sft_batches(data, side: str, config: Config, tokenizer: Tokenizer) -> SFTBatches:
    """微调的一批批；参数同 `pretrain_batches`。"""
    return SFTBatches(
        data.tokens[side], data.starts[side], config.seq_len, tokenizer, config.seed,
        config.max_len, side,
    )  # fmt: skip


def replayed_batches(data, side: str, config: Config, tokenizer: Tokenizer):
    """微调时回放的：学过的对话，或者预训练的文字；文字也整篇地装，与对话一样分段。"""
    if config.replay_stage == "sft":
        return sft_batches(data, side, config, tokenizer)
    whole = replace(config, isolate_documents=True, whole_documents=True)
    return pretrain_batches(data, side, whole, tokenizer)


def pack(
    lengths: np.ndarray, items: np.ndarray, capacity: int, rng: np.random.Generator
) -> list[list[int]]:
    """装箱：从长到短，每段放进放得下它、又剩得最少的那一行（best-fit decreasing）。

    Args:
        lengths: 各段的长度，都不超过 capacity。
        items: 要装的段的编号。
        rng: 同样长的段先后随机，行的先后也随机。
    Returns:
        每行是几段的编号。
    """
    items = rng.permutation(items)
    items = items[np.argsort(-lengths[items], kind="stable")]
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # 剩 n 格的行有哪些
    rooms = 0  # 二进制第 n 位为 1：有剩 n 格的行
    for item in items.tolist():
        n = int(lengths[item])
        fitting = rooms >> n
        if fitting:
            room = n + (fitting & -fitting).bit_length() - 1  # 最低的 1：剩得最少的
            row = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        with_room[room - n].append(row)
        rooms |= 1 << (room - n)
    return [rows[i] for i in rng.permutation(len(rows))]


# ---------- 4. 回放 ----------


class Replay:
    """新的行里掺一些旧语料的，免得学了新的、忘了旧的：增量预训练，或者微调。

    一遍是新的全部行，加上若干旧的行；旧的每遍换一批，全轮过了再从头。行的编号：先是新的 n_new 行，
    再是旧的各行。

    Args:
        new, old: 一批批，见 `pretrain_batches` 与 `sft_batches`；行一样长，都分段或都不分。
        share: 每一遍里，旧的行占几成；0 就是不掺。
        seed: 决定先用旧的哪些行。
    """

    def __init__(self, new, old, share: float, seed: int):
        self.new, self.old, self.seed, self.seq_len = new, old, seed, new.seq_len
        self.n_new = new.n_rows
        # 每一遍里旧的有几行：要掺，就至少一行
        self.n_old = max(round(self.n_new * share / (1 - share)), int(share > 0))
        self.n_rows = self.n_new + self.n_old
        # 只用来数出现过哪些编号，所以每个写一次就够。
        used = used_ids(new.tokens, 1 << 16)
        if self.n_old:
            used |= used_ids(old.tokens, 1 << 16)
        self.tokens = np.flatnonzero(used).astype(np.uint16)

    def swap(self, epoch: int, row: int) -> int:
        """第 epoch 遍里的第 row 行是哪一行：新的是它自己，旧的轮着来。"""
        if row < self.n_new:
            return row
        turn = epoch * self.n_old + row - self.n_new
        n_rows = self.old.n_rows
        return self.n_new + int(row_order(n_rows, self.seed, turn // n_rows)[turn % n_rows])

    def get(self, rows: Iterable[int]) -> Batch:
        """取出这几行，次序照旧。"""
        found = [
            self.new.get([row]) if row < self.n_new else self.old.get([row - self.n_new])
            for row in rows
        ]
        return Batch(*(x[0] if x[0] is None else torch.cat(x) for x in zip(*found, strict=True)))


# ---------- 5. 次序 ----------


@lru_cache(maxsize=4)
def row_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """第 epoch 遍读各行的次序：只取决于 (seed, epoch)。"""
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def rows_of_step(
    step: int,
    rows_per_step: int,
    n_rows: int,
    seed: int,
    swap: Callable[[int, int], int] | None = None,
) -> list[int]:
    """第 step 步（从 0 数）用哪几行；一遍读完接着下一遍，每行每遍恰好一次。

    Args:
        swap: `Replay.swap`，把第几遍的第几行换成别的；不给就是不换。
    """
    turns = range(step * rows_per_step, (step + 1) * rows_per_step)
    places = [(turn // n_rows, turn % n_rows) for turn in turns]
    rows = [(epoch, int(row_order(n_rows, seed, epoch)[place])) for epoch, place in places]
    return [swap(epoch, row) if swap else row for epoch, row in rows]
