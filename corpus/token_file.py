"""词元文件：原始文件读一遍、分词一遍，写到磁盘上；内容没变就直接用上次的。

    tokenize_corpus   原始文件 -> 词元文件
    is_held_out       一篇文档归训练还是检验

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
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
from tqdm import tqdm

import tokenizer as tokenizer_module
from config import Config, UserError
from corpus import idioms, readers, shapes
from corpus.readers import ReadLog
from corpus.shapes import Record
from dataset import SIDES
from tokenizer import Tokenizer


class TokenFile(NamedTuple):
    """准备好的数据。tokens[side] 是首尾相接的编号，starts[side] 是每篇的起点，末尾多一个总长。"""

    card: dict
    tokens: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]


FORMAT = 2  # 词元文件的格式变了就加一，旧文件会自动重做
CHUNK = 2048  # 一次最多分词多少篇
CHUNK_CHARACTERS = 1 << 20  # 一次最多分词多少字：分词时一个字要占一百多字节


def tokenize_corpus(
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
    ready = _make(base, identity, path, tokenizer)
    print(f"数据：写好 {base}.*（{_summary(ready.card)}）")
    return ready


def _make(base: Path, identity: dict, path: Path, tokenizer: Tokenizer) -> TokenFile:
    """做好词元文件；别的程序正在做，就等它做好。"""
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
    pieces = (idioms, readers, shapes, tokenizer_module, encode_documents, encode_conversations)
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


class _SideWriter:
    """写一边（训练或检验）的词元文件：编号追加在后面，顺便数清。"""

    def __init__(self, base: Path, side: str):
        self.base, self.side = base, side
        self.part = Path(f"{base}.{side}.part")
        self.file = self.part.open("wb")
        self.starts = array("q", [0])  # 64 位整数，一千万篇也只有 80 MB
        self.targets = self.characters = 0
        self.digest = hashlib.sha256()  # 接着练时，据此确认数据没有变

    def add(self, ids: np.ndarray, n_targets: int, text: str) -> None:
        """一篇的编号 (uint16)，其中要猜的有几个，写出的是哪些字。"""
        self.file.write(ids.tobytes())
        self.digest.update(ids.tobytes())
        self.starts.append(self.starts[-1] + len(ids))
        self.targets += n_targets
        self.characters += len(text)

    def finish(self) -> dict:
        """改成正式的名字，返回写进卡片的几项。

        不在原处改写：正在用旧文件训练的程序，手里的还是旧的那一份。
        """
        os.replace(self.part, f"{self.base}.{self.side}.bin")
        np.frombuffer(self.starts, np.int64).tofile(self.part)
        os.replace(self.part, f"{self.base}.{self.side}.idx")
        self.digest.update(self.starts)
        counted = {
            "documents": len(self.starts) - 1,
            "tokens": self.starts[-1],
            "targets": self.targets,  # 要猜的词元数，与它们写出的字数：
            "characters": self.characters,  # 由此换算每个字的比特数
            "sha256": self.digest.hexdigest(),
        }
        return {f"{self.side}_{name}": value for name, value in counted.items()}


def _build(base: Path, identity: dict, path: Path, tokenizer: Tokenizer) -> None:
    """分词并写盘。先写临时文件，最后才写卡片：中途断电，下次只是重做。"""
    Path(f"{base}.json").unlink(missing_ok=True)
    module = idioms if identity["source"] == "builtin" else shapes
    log = ReadLog(identity["source"])
    read, encode = {
        "pretrain": (module.read_documents, encode_documents),
        "sft": (module.read_conversations, encode_conversations),
    }[identity["stage"]]
    sides, unknown, size = {}, 0, path.stat().st_size
    with ExitStack() as stack:
        for side in SIDES:
            sides[side] = _SideWriter(base, side)
            stack.enter_context(sides[side].file)
        bar = stack.enter_context(tqdm(total=size, desc="分词", unit="B", unit_scale=True))
        for chunk in chunks(read(path, log)):
            for record, (ids, targets, text) in zip(chunk, encode(chunk, tokenizer), strict=True):
                side = "val" if is_held_out(record.key, identity["val_fraction"]) else "train"
                sides[side].add(ids, targets, text)
                unknown += int((ids == tokenizer.unk_id).sum())
            if log.file and not log.file.closed:
                bar.update(log.file.tell() - bar.n)
        bar.update(size - bar.n)
    log.check()
    for line in log.report():
        print(line)
    for side, name in (("train", "训练"), ("val", "检验")):
        if len(sides[side].starts) == 1:
            raise UserError(
                f"{identity['source']} 的 {log.rows} 条数据碰巧没有一条分到{name}那边；"
                f"请增加数据，或换一个 --val_fraction（现在是 {identity['val_fraction']}）"
            )
    total = sum(writer.starts[-1] for writer in sides.values())
    card = identity | {"mtime": path.stat().st_mtime_ns, "sha256": readers.sha256(path)}
    card |= {"bad_rows": log.bad, "rows": log.rows, "unk_rate": unknown / total}
    for writer in sides.values():
        card |= writer.finish()
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
