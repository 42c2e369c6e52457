"""词元文件与起点：读到哪一块，先核对哪一块。

    Tokens        一边的编号，在磁盘上；没有核对过的，一个也拿不到
    read_starts   每篇的起点，整个读进来，整个核对
    BlockSums     各块的校验和，写的时候用；写在卡片上（corpus/card.py）

不用内存映射，一段一段地读：文件中途被截短，映射会让系统直接杀掉进程，读只是读不够。
"""

import hashlib
import os
import threading
import weakref
from collections.abc import Callable
from operator import index
from pathlib import Path

import numpy as np

from config import UserError
from settings.files import open_regular

BLOCK = 1 << 20  # 一块多少字节
AT_ONCE = 512 << 20  # 不比这大的，开始之前整个核对（四分之一秒）；更大的，读到哪块核对哪块
LOCK = threading.Lock()


class Damaged(ValueError):
    """词元文件、起点或卡片坏了：读不成，或者与校验和不符。"""


class Tokens:
    """一边的编号：像一维只读的 uint16 数组那样切片，用到哪一块，先核对哪一块。

    核对的与交出去的是同一次读到的字节。核对过的块再读时只看文件变没变（大小、时间）：变了，全部重新
    核对。

    Args:
        path: 词元文件。
        sums: 各块的 SHA-256。
        size: 有多少个编号。
        vocab_size: 编号都要小于它。
        on_damage: 训练到一半才读到坏的一块时调用；返回该怎样重做，写进报错里。
    Raises:
        Damaged: 文件的长短不对。
    """

    dtype = np.dtype(np.uint16)
    ndim = 1

    def __init__(
        self, path: str | Path, sums: list[str], size: int, vocab_size: int,
        on_damage: Callable[[], str] = lambda: "请重做它",
    ):  # fmt: skip
        self.path, self.sums, self.size, self.vocab_size = path, sums, size, vocab_size
        self.n_bytes, self.on_damage = size * self.dtype.itemsize, on_damage
        self.file = open_file(path)
        weakref.finalize(self, os.close, self.file)
        self.stamp = stamp_of(self.file)
        self.checked = bytearray(len(sums))
        if self.stamp[0] != self.n_bytes:
            raise Damaged(f"{path} 的长短与卡片不符")

    def __len__(self) -> int:
        return self.size

    @property
    def shape(self) -> tuple[int]:
        """(词元数,)。"""
        return (self.size,)

    def __getitem__(self, where):
        if not isinstance(where, slice):
            if np.ndim(where):  # 一列编号
                return np.asarray(self)[where]
            at = range(self.size)[index(where)]
            return self[at : at + 1][0]
        start, stop, step = where.indices(self.size)
        if step != 1:
            return np.asarray(self)[where]
        try:
            data = self._read(start * 2, max(start, stop) * 2)
        except (Damaged, OSError) as error:
            raise UserError(
                f"词元文件坏了：{error}。没有用它练，检查点没有受影响；{self.on_damage()}"
            ) from error
        return np.frombuffer(data, self.dtype)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=bool(copy))

    def __iter__(self):
        return iter(np.asarray(self))

    def check_all(self) -> None:
        """整个核对一遍，一次一块，不占内存。Raises Damaged。"""
        for number in range(len(self.sums)):
            self._read(number * BLOCK, min((number + 1) * BLOCK, self.n_bytes))

    def _read(self, start: int, stop: int) -> bytes | memoryview:
        """文件的 [start, stop) 字节，核对过的。Raises Damaged。"""
        if start == stop:
            return b""
        first, last = start // BLOCK, -(-stop // BLOCK)
        if all(self.checked[first:last]):
            data = self._at(start, stop)
            if (now := stamp_of(self.file)) == self.stamp:
                return data
            self.stamp, self.checked = now, bytearray(len(self.sums))  # 有人动过它
        begin = first * BLOCK
        whole = memoryview(self._at(begin, min(last * BLOCK, self.n_bytes)))
        for number in range(first, last):
            self._check(number, whole[number * BLOCK - begin :][:BLOCK])
        return whole[start - begin : stop - begin]

    def _at(self, start: int, stop: int) -> bytes:
        """文件的 [start, stop) 字节，没有核对。Raises Damaged：没有那么多。"""
        data = read_at(self.file, stop - start, start)
        if len(data) != stop - start:
            raise Damaged(f"{self.path} 只到第 {start + len(data):,} 字节，被截短了")
        return data

    def _check(self, number: int, block: memoryview) -> None:
        if hashlib.sha256(block).hexdigest() != self.sums[number]:
            raise Damaged(
                f"{self.path} 第 {number * BLOCK:,} 字节起的一块与写下时不同"
                f"（磁盘坏了，或者有别的程序改了它）"
            )
        if np.frombuffer(block, self.dtype).max() >= self.vocab_size:
            raise Damaged(f"{self.path} 里有词表之外的编号")
        self.checked[number] = 1


def open_file(path: str | Path) -> int:
    """打开一个文件来读，返回描述符。Raises Damaged：没有，或者是管道、设备之类，读不完。"""
    if not os.path.isfile(path) or (file := open_regular(path)) is None:
        raise Damaged(f"{path} 不见了，或者不是普通的文件")
    return file


def stamp_of(file: int) -> tuple[int, int, int]:
    """打开着的文件的大小与两个时间：都没有变，内容就没有变。"""
    s = os.fstat(file)
    return s.st_size, s.st_mtime_ns, s.st_ctime_ns


def read_at(file: int, size: int, at: int) -> bytes:
    """从 at 起的 size 个字节；没有那么多，就有多少给多少。"""
    pieces, left = [], size
    while left:
        if hasattr(os, "pread"):
            piece = os.pread(file, left, at + size - left)
        else:  # Windows
            with LOCK:
                os.lseek(file, at + size - left, os.SEEK_SET)
                piece = os.read(file, left)
        if not piece:
            break
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_starts(path: str | Path, expected: str, n_documents: int, n_tokens: int) -> np.ndarray:
    """每篇的起点，末尾是词元的总数，int64 (n_documents + 1,)。

    Raises:
        Damaged: 与校验和 expected 不符，或者不是从 0 起、一篇比一篇靠后、到 n_tokens 为止。
    """
    size, file = 8 * (n_documents + 1), open_file(path)
    try:
        data = read_at(file, size, 0) if os.fstat(file).st_size == size else b""
    finally:
        os.close(file)
    if len(data) != size or hashlib.sha256(data).hexdigest() != expected:
        raise Damaged(f"{path} 与写下时不同")
    starts = np.frombuffer(data, np.int64)
    if starts[0] != 0 or starts[-1] != n_tokens or (starts[1:] <= starts[:-1]).any():
        raise Damaged(f"{path} 里的起点不对")
    return starts


class BlockSums:
    """一边写，一边算各块的 SHA-256。"""

    def __init__(self):
        self.done: list[str] = []
        self.now, self.room = hashlib.sha256(), BLOCK

    def update(self, data: bytes) -> None:
        """接着写的一段。"""
        rest = memoryview(data)
        while rest:
            piece, rest = rest[: self.room], rest[self.room :]
            self.now.update(piece)
            self.room -= len(piece)
            if not self.room:
                self.done.append(self.now.hexdigest())
                self.now, self.room = hashlib.sha256(), BLOCK

    def finish(self) -> list[str]:
        """各块的校验和；末尾不满的一块也算。"""
        return self.done + [self.now.hexdigest()] * (self.room < BLOCK)
