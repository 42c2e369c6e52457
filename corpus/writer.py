"""写词元文件：先写成一份，读完之后再分成训练与检验两边，同时数清各种账。"""

import hashlib
import os
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from corpus import split
from corpus.checked import BlockSums
from corpus.encode import Encoded
from corpus.shapes import Record
from settings.files import new_file, sync_folder

AT_ONCE = 1 << 12  # 分成两边时，一次抄多少篇
N_COMMON, OPENING = 10, 8  # 数最常见的几样；一篇的开头看几个字


class Writer:
    """先把全部的编号写在一个临时文件里，读完了再分成训练与检验两边。"""

    COUNTS = ("length", "targets", "characters", "lost")

    def __init__(self, base: Path):
        self.base, self.part = base, Path(f"{base}.all.part")
        self.file = new_file(self.part)  # 别人放在那里的链接，不顺着它写
        # 每篇几个 64 位整数：一千万篇约半个 GB
        self.counts = {name: array("q") for name in self.COUNTS}
        self.keys, self.finer, self.whole = array("Q"), array("Q"), array("Q")
        self.keyed = array("b")
        self.read = self.unknown = 0
        self.missing: Counter[str] = Counter()
        self.openings: Counter[str] = Counter()

    def add(self, records: list[Record], encoded: list[Encoded], unk_id: int) -> None:
        """几篇，连同它们的编号。"""
        together = np.concatenate([e.ids for e in encoded])
        self.file.write(together.tobytes())
        self.unknown += int(np.count_nonzero(together == unk_id))
        rows = ((len(e.ids), e.targets, e.characters, e.lost) for e in encoded)
        for column, values in zip(self.counts.values(), zip(*rows, strict=True), strict=True):
            column.extend(values)
        keys = [0 if r.key is None else split.hash_of(r.key) for r in records]
        pairs = zip(records, keys, strict=True)
        self.keyed.extend(r.key is not None for r in records)
        self.keys.extend(keys)
        self.finer.extend(key if r.finer is None else split.hash_of(r.finer) for r, key in pairs)
        self.whole.extend(hash_of_all(r, key) for r, key in zip(records, keys, strict=True))
        self.read += sum(e.read for e in encoded)
        self.missing.update("".join(e.missing for e in encoded))
        self.openings.update(map(opening_of, records))
        if len(self.openings) > 1 << 18:  # 只要最常见的，不必都记着
            self.openings = Counter(dict(self.openings.most_common(1 << 14)))

    def totals(self) -> dict:
        """写进卡片的几项，两边合起来的。"""
        n_tokens = sum(self.counts["length"])
        repeated = len(self.whole) - len(np.unique(np.frombuffer(self.whole, np.uint64)))
        return {
            "unk_rate": self.unknown / n_tokens if n_tokens else 0.0,
            "characters": self.read,
            "lost_characters": self.missing.total(),
            "lost_top": self.missing.most_common(N_COMMON),
            "duplicates": repeated,
            "openings": [pair for pair in self.openings.most_common(N_COMMON) if pair[1] > 1],
        }

    def held_out(self, fraction: float) -> np.ndarray | None:
        """哪些留出来检验，布尔 (n,)；分不成两边的是 None。"""
        keyed = np.frombuffer(self.keyed, bool)
        hashes = (self.keys, self.finer, self.whole)
        chosen = split.choose(*(np.frombuffer(x, np.uint64)[keyed] for x in hashes), fraction)
        if chosen is None:
            return None
        held_out = np.zeros(len(keyed), bool)
        held_out[keyed] = chosen
        return held_out

    def write_side(self, side: str, mine: np.ndarray) -> dict:
        """把归这一边的抄出来，改成正式的名字；返回写进卡片的几项。

        不在原处改写：正在用旧文件训练的程序，手里的还是旧的那一份。
        """
        lengths = np.frombuffer(self.counts["length"], np.int64)
        part = Path(f"{self.base}.{side}.part")
        digest, blocks = hashlib.sha256(), BlockSums()
        with new_file(part) as f, self.part.open("rb") as whole:
            for first in range(0, len(lengths), AT_ONCE):
                some = slice(first, first + AT_ONCE)
                piece = np.fromfile(whole, np.uint16, int(lengths[some].sum()))
                kept = piece[np.repeat(mine[some], lengths[some])].tobytes()
                f.write(kept)
                digest.update(kept)
                blocks.update(kept)
        put(part, Path(f"{self.base}.{side}.bin"))
        starts = np.concatenate([[0], np.cumsum(lengths[mine])]).astype(np.int64)
        with new_file(part) as f:
            starts.tofile(f)
        put(part, Path(f"{self.base}.{side}.idx"))
        digest.update(starts)
        targets, characters, lost = (
            int(np.frombuffer(self.counts[name], np.int64)[mine].sum()) for name in self.COUNTS[1:]
        )
        counted = {
            "documents": len(starts) - 1,
            "tokens": int(starts[-1]),
            "targets": targets,  # 要猜的词元数，它们写出的字数，其中写不出的：
            "characters": characters,  # 由此换算每个字的比特数
            "lost": lost,
            "sha256": digest.hexdigest(),  # 接着练时，据此确认数据没有变
            "starts_sha256": hashlib.sha256(starts).hexdigest(),
            "blocks": blocks.finish(),  # 各块的，读到哪块核对哪块
        }
        return {f"{side}_{name}": value for name, value in counted.items()}


def hash_of_all(record: Record, key: int) -> int:
    """全文的散列；键就是全文的，不必再算。"""
    if record.content is record.key:
        return key
    if isinstance(record.content, str):
        return split.hash_of(record.content)
    return split.hash_of("\0".join(text for turn in record.content for text in turn))


def opening_of(record: Record) -> str:
    """一篇的开头几个字；对话是头一句提问的。"""
    text = record.content
    if not isinstance(text, str):
        text = next((words for role, words in text if role == "user"), text[0][1])
    return text[:OPENING].split("\n")[0]


def put(part: Path, path: Path) -> None:
    """写好的 part 改成正式的名字；先落盘再改名：断电之后，要么是旧的，要么是新的。"""
    with part.open("rb+") as f:
        os.fsync(f.fileno())
    os.replace(part, path)
    sync_folder(path.parent)
