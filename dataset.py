"""数据：原始文件 -> 磁盘上的词元文件 -> 一批批训练数据。

    prepare           读一遍、分词一遍，写成词元文件；内容没变就直接用上次的
    PretrainBatches   文档首尾相接，切成等长的行
    SFTBatches        几段对话拼成一行，互相看不见，只在助手的话上算损失

词元文件是 uint16 的一维数组（两万多个编号，16 位足够），旁边有一张 JSON 卡片写明来历。
训练与检验按文档分开：每篇由自己的键散列决定去哪边，重复的文档因此总在同一边。
"""

import glob
import hashlib
import inspect
import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import idioms
import readers
import tokenizer as tokenizer_module
from config import Config, UserError
from readers import ReadLog, Record
from tokenizer import Tokenizer

FORMAT = 2  # 词元文件的格式变了就加一，旧文件会自动重做
CHUNK = 2048  # 一次最多分词多少篇
CHUNK_CHARACTERS = 1 << 20  # 一次最多分词多少字：分词时一个字要占一百多字节
IGNORE = -100  # 不算损失的目标
SIDES = ("train", "val")


class TokenFile(NamedTuple):
    """准备好的数据。tokens[side] 是首尾相接的编号，starts[side] 是每篇的起点，末尾多一个总长。"""

    card: dict
    tokens: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]


# ---------- 1. 词元文件 ----------


def prepare(
    source: str, stage: str, tokenizer: Tokenizer, config: Config, wait: bool = False
) -> TokenFile:
    """把数据变成词元文件；来源、分词器、划分都没变时，用上次的。

    Args:
        source: "builtin" 或文件路径。
        stage: "pretrain" 读成文档，"sft" 读成对话。
        wait: 真时自己不做，等同一台机器上的第 0 个进程做好。
    Raises:
        UserError: 数据不能用，并说明该怎么办。
    """
    path = idioms.dictionary_file() if source == "builtin" else Path(source)
    if source != "builtin":
        readers.check_source(path)
    identity = {
        "format": FORMAT,
        "source": source,
        "stage": stage,
        "size": path.stat().st_size,
        "tokenizer": tokenizer.fingerprint(),
        "val_fraction": config.val_fraction,
        "code": code_fingerprint(),
    }
    name = hashlib.sha256(os.fsencode(f"{path.resolve()} {stage}")).hexdigest()[:8]
    stem = path.stem[:40]  # 系统允许的文件名有长度限制，后面还要接别的
    base = Path(config.data_dir) / "cache" / f"{stem}-{stage}-{name}"
    if (ready := _load(base, identity, path)) is not None:
        print(f"数据：沿用 {base}.*（{_summary(ready.card)}）")
        return ready
    while wait:
        time.sleep(0.2)
        if (ready := _load(base, identity, path)) is not None:
            return ready
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with only_one(Path(f"{base}.lock")):
            if (ready := _load(base, identity, path)) is None:  # 等的时候也许别人做好了
                try:
                    _build(base, identity, path, tokenizer)
                finally:
                    for part in base.parent.glob(f"{glob.escape(base.name)}.*.part"):
                        part.unlink()
    except OSError as error:
        raise UserError(
            f"准备数据时读写失败（{error.strerror}：{error.filename or base.parent}）；"
            f"请检查权限与剩余的空间"
        ) from error
    ready = ready or _load(base, identity, path)
    assert ready is not None, f"刚写好的词元文件读不回来：{base}"
    print(f"数据：写好 {base}.*（{_summary(ready.card)}）")
    return ready


@contextmanager
def only_one(lock_file: Path) -> Iterator[None]:
    """同时只有一个程序做这件事，别的等着；程序死了，系统会替它松手。"""
    lock = filelock.FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print("（另一个程序正在准备这份数据，等它做完……）")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def code_fingerprint() -> str:
    """决定词元文件内容的那些代码的指纹：改了其中任何一处，词元文件就要重做。"""
    pieces = (idioms, readers, tokenizer_module, encode_documents, encode_conversations)
    return hashlib.sha256("".join(map(inspect.getsource, pieces)).encode()).hexdigest()[:16]


def _summary(card: dict) -> str:
    return (
        f"{card['train_documents']} 篇训练，{card['val_documents']} 篇检验，"
        f"{card['train_tokens'] / 1e6:.2f} M 训练词元，[UNK] {card['unk_rate']:.2%}"
    )


def _load(base: Path, identity: dict, path: Path) -> TokenFile | None:
    """读回词元文件；没有、不完整或来源变了，返回 None。"""
    try:
        card = json.loads(Path(f"{base}.json").read_text(encoding="utf-8"))
        if any(card[key] != value for key, value in identity.items()):
            return None
        # 修改时间没变就相信内容没变；变了（例如只是复制过）再比散列。
        if card["mtime"] != path.stat().st_mtime_ns and card["sha256"] != readers.sha256(path):
            return None
        tokens = {s: _map(f"{base}.{s}.bin", np.uint16, card[f"{s}_tokens"]) for s in SIDES}
        starts = {s: _map(f"{base}.{s}.idx", np.int64, card[f"{s}_documents"] + 1) for s in SIDES}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # 缺文件、长度不对或卡片残缺：重做一遍即可
    return TokenFile(card, tokens, starts)


def _map(path: str, dtype: type, length: int) -> np.ndarray:
    if os.path.getsize(path) != length * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} 的长度与卡片不符")
    return np.memmap(path, dtype, mode="r")


def _build(base: Path, identity: dict, path: Path, tokenizer: Tokenizer) -> None:
    """分词并写盘。先写临时文件，最后才写卡片：中途断电，下次只是重做。"""
    Path(f"{base}.json").unlink(missing_ok=True)
    module = idioms if identity["source"] == "builtin" else readers
    log = ReadLog(identity["source"])
    read, encode = {
        "pretrain": (module.read_documents, encode_documents),
        "sft": (module.read_conversations, encode_conversations),
    }[identity["stage"]]
    records = read(path, log)

    starts = {side: array("q", [0]) for side in SIDES}  # 64 位整数，一千万篇也只有 80 MB
    n_targets, characters = dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0)
    unknown = 0
    digests = {side: hashlib.sha256() for side in SIDES}  # 接着练时，据此确认数据没有变
    parts = {side: Path(f"{base}.{side}.part") for side in SIDES}
    size = path.stat().st_size
    with ExitStack() as stack:
        outputs = {side: stack.enter_context(part.open("wb")) for side, part in parts.items()}
        bar = stack.enter_context(tqdm(total=size, desc="分词", unit="B", unit_scale=True))
        for chunk in chunks(records):
            for record, (ids, targets, text) in zip(chunk, encode(chunk, tokenizer), strict=True):
                side = "val" if is_held_out(record.key, identity["val_fraction"]) else "train"
                outputs[side].write(ids.tobytes())
                digests[side].update(ids.tobytes())
                starts[side].append(starts[side][-1] + len(ids))
                n_targets[side] += targets
                characters[side] += len(text)
                unknown += int((ids == tokenizer.unk_id).sum())
            if log.file and not log.file.closed:
                bar.update(log.file.tell() - bar.n)
        bar.update(size - bar.n)
    log.check()
    for line in log.report():
        print(line)
    for side, name in (("train", "训练"), ("val", "检验")):
        if len(starts[side]) == 1:
            raise UserError(
                f"{identity['source']} 的 {log.rows} 条数据碰巧没有一条分到{name}那边；"
                f"请增加数据，或换一个 --val_fraction（现在是 {identity['val_fraction']}）"
            )

    # 一律改名，不在原处改写：正在用旧文件训练的程序，手里的还是旧的那一份。
    for side, part in parts.items():
        os.replace(part, f"{base}.{side}.bin")
        np.frombuffer(starts[side], np.int64).tofile(part)
        os.replace(part, f"{base}.{side}.idx")
    total = starts["train"][-1] + starts["val"][-1]
    card = identity | {"mtime": path.stat().st_mtime_ns, "sha256": readers.sha256(path)}
    card |= {"bad_rows": log.bad, "rows": log.rows, "unk_rate": unknown / total}
    for side in SIDES:
        card[f"{side}_documents"] = len(starts[side]) - 1
        card[f"{side}_tokens"] = starts[side][-1]
        card[f"{side}_targets"] = n_targets[side]  # 要猜的词元数，与它们写出的字数：
        card[f"{side}_characters"] = characters[side]  # 由此换算每个字的比特数
        digests[side].update(starts[side])
        card[f"{side}_sha256"] = digests[side].hexdigest()
    part = Path(f"{base}.json.part")
    part.write_text(json.dumps(card, ensure_ascii=False, indent=2), encoding="utf-8")
    os.replace(part, f"{base}.json")


def chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """把数据分成一块一块，每块的篇数与字数都有上限；内存因此与文件大小无关。"""
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        text = record.content
        size += len(text) if isinstance(text, str) else sum(len(turn) for _, turn in text)
        if len(chunk) >= CHUNK or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def is_held_out(key: str | None, fraction: float) -> bool:
    """这个键归检验还是训练：只由键的散列决定，与顺序、机器、Python 版本无关。"""
    if key is None:
        return False
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"mini-llm").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


Encoded = tuple[np.ndarray, int, str]  # (编号, 要猜的词元数, 要猜的文字)


def encode_documents(chunk: list[Record], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """逐篇编码；每个词元都要猜，包括结束标记。"""
    texts = [record.content for record in chunk]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        document = tokenizer.document_ids(ids)
        yield document, len(document), text


def encode_conversations(chunk: list[Record], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """逐段编码；只猜助手的话和它的结束标记。"""
    encoded = iter(tokenizer.encode_batch([text for r in chunk for _, text in r.content]))
    for record in chunk:
        turns = [tokenizer.turn_ids(role, next(encoded).tolist()) for role, _ in record.content]
        answers = [i for i, (role, _) in enumerate(record.content) if role == "assistant"]
        targets = sum(len(turns[i]) - 2 for i in answers)  # 去掉 <|im_start|> 与角色
        text = "".join(record.content[i][1] for i in answers)
        yield np.array([i for turn in turns for i in turn], np.uint16), targets, text


# ---------- 2. 批 ----------


class Batch(NamedTuple):
    """一批训练数据，形状都是 (B, T)；不分段时 positions 与 segments 为 None。"""

    ids: Tensor
    targets: Tensor  # 右移一位的编号；IGNORE 处不算损失
    positions: Tensor | None = None
    segments: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """搬到设备上；从锁页内存搬，不必等它搬完。"""
        if device.type == "cuda":
            return Batch(
                *(x if x is None else x.pin_memory().to(device, non_blocking=True) for x in self)
            )
        return Batch(*(x if x is None else x.to(device) for x in self))


def slices(tokens: np.ndarray, size: int = 1 << 24) -> Iterator[tuple[int, np.ndarray]]:
    """一块一块地给出 (起点, 编号)：词元文件可能比内存还大。"""
    for start in range(0, len(tokens), size):
        yield start, tokens[start : start + size]


def used_ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """哪些编号出现过：布尔 (V,)。"""
    used = np.zeros(vocab_size, bool)
    for _, piece in slices(tokens):
        used[piece] = True
    return used


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


class SFTBatches:
    """几段对话拼成一行，互相看不见，位置各自从 0 数起；损失只算助手的话与它的 <|im_end|>。

    太长的对话从末尾截断，数目记在 cut 里；截断后一句回答也不剩的不用，数目记在 skipped 里。

    Args:
        tokens: 一维 uint16 编号。
        starts: 每段对话的起点，末尾多一个总长。
        seq_len: 每行的长度 T。
        seed: 决定哪几段拼在一起。
    """

    def __init__(
        self, tokens: np.ndarray, starts: np.ndarray, seq_len: int, tokenizer: Tokenizer, seed: int
    ):
        self.tokens, self.starts, self.seq_len = tokens, starts, seq_len
        self.tokenizer = tokenizer
        # 一段 n 个词元的对话占 n - 1 格：最后一个词元只作目标。
        self.lengths = np.minimum(np.diff(starts) - 1, seq_len)
        # 第一个助手标记在截断之前，才有话可学。
        assistant = tokenizer.role_ids["assistant"]
        marks = np.concatenate([at + np.flatnonzero(t == assistant) for at, t in slices(tokens)])
        first = np.searchsorted(marks, starts[:-1])
        offset = np.append(marks, len(tokens))[first] - starts[:-1]
        usable = np.flatnonzero(offset < self.lengths)
        self.skipped = len(self.lengths) - len(usable)
        self.cut = int((np.diff(starts)[usable] - 1 > seq_len).sum())
        if not len(usable):
            raise UserError(f"没有一段对话在 {seq_len} 个词元之内出现助手的话；请调大 --seq_len")
        self.rows = pack(self.lengths, usable, seq_len, np.random.default_rng(seed))
        self.n_rows = len(self.rows)

    def _conversation(self, index: int) -> np.ndarray:
        """第 index 段对话的编号，截到 T + 1 个。"""
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index] + 1].astype(np.int64)

    def _supervised(self, index: int) -> np.ndarray:
        """每个目标要不要学：在助手那一轮里，角色标记之后，直到 <|im_end|>（含）。"""
        ids = self._conversation(index)
        turn = np.cumsum(ids == self.tokenizer.bos_id) - 1  # 每个词元属于第几轮
        roles = ids[np.minimum(np.flatnonzero(ids == self.tokenizer.bos_id) + 1, len(ids) - 1)]
        by_assistant = (roles == self.tokenizer.role_ids["assistant"])[turn]
        marks = (ids == self.tokenizer.bos_id) | (ids == self.tokenizer.role_ids["assistant"])
        return (by_assistant & ~marks)[1:]

    def get(self, rows: Iterable[int]) -> Batch:
        """取出这几行。行尾放不下一段的空格子自成一段，不算损失。"""
        shape = (len(rows := list(rows)), self.seq_len)
        ids, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        positions, segments = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        for r, row in enumerate(rows):
            at = 0
            for segment, index in enumerate(self.rows[row]):
                conversation, n = self._conversation(index), self.lengths[index]
                here = slice(at, at + n)
                ids[r, here] = conversation[:-1]
                targets[r, here] = np.where(self._supervised(index), conversation[1:], IGNORE)
                positions[r, here], segments[r, here] = np.arange(n), segment
                at += n
        return Batch(*map(torch.from_numpy, (ids, targets, positions, segments)))


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


@lru_cache(maxsize=2)
def row_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """第 epoch 遍读各行的次序：只取决于 (seed, epoch)。"""
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def rows_of_step(step: int, rows_per_step: int, n_rows: int, seed: int) -> list[int]:
    """第 step 步（从 0 数）用哪几行；一遍读完接着下一遍，每行每遍恰好一次。"""
    turns = range(step * rows_per_step, (step + 1) * rows_per_step)
    return [int(row_order(n_rows, seed, turn // n_rows)[turn % n_rows]) for turn in turns]
