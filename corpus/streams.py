"""读字节的几层：磁盘上的文件，解压出来的内容，先给开头再接着读的。"""

import errno
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from config import UserError
from corpus.find import stamp_of
from corpus.log import Unusable

BLOCK = 1 << 18  # 一次从磁盘读多少字节
# 文字很少压得到二十分之一；解出这么多之后，还压得这么小的，不是文字。
BOMB_RATIO, BOMB_SIZE = 100, 32 << 20


class Steady(io.RawIOBase):
    """磁盘上的文件，只读到打开时的大小：一边读一边还在长的，也有读完的时候。

    一块一块地读，记下每一块的散列：再读到的、最后算整个文件的散列时读到的，都要与头一次的相同，
    所以整个文件的散列，就是用掉的那些字节的散列。
    """

    def __init__(self, path: Path):
        self.path, self.raw = path, path.open("rb", buffering=0)
        self.stamp = stamp_of(os.fstat(self.raw.fileno()))
        self.size, self.at = self.stamp[0], 0
        self.sums: dict[int, bytes] = {}
        self.number, self.block = -1, b""  # 手里的是第几块

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = (0, self.at, self.size)[whence] + offset
        if at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(self.path))
        self.at = at
        return at

    def readinto(self, buffer) -> int | None:
        number, offset = divmod(min(self.at, self.size), BLOCK)
        if number != self.number:
            self.block, self.number = self._read(number), number
        piece = self.block[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        self.at += len(piece)
        return len(piece)

    def _read(self, number: int) -> bytes:
        """第 number 块。Raises UserError：与头一次读到的不同。"""
        self.raw.seek(number * BLOCK)
        data, room = b"", min(BLOCK, self.size - number * BLOCK)
        while room > len(data) and (more := self.raw.read(room - len(data))):
            data += more
        found = hashlib.sha256(data).digest()
        if self.sums.setdefault(number, found) != found:
            raise UserError(f"{self.path} 在读的时候变了；请等它写完，再运行一次")
        return data

    def hashed(self) -> tuple[list[int], str]:
        """(打开时的 find.stamp, 整个文件的 SHA-256)。Raises UserError：用过的字节变了。"""
        whole = hashlib.sha256()
        for number in range(-(-self.size // BLOCK)):
            whole.update(self._read(number))
        return self.stamp, whole.hexdigest()

    def release(self) -> None:
        """用完了，真的关上；close 只说不再读：套在外面的各层丢掉时都会叫它，散列那时还没有算。"""
        self.close()
        self.raw.close()


class Broken(Exception):
    """压缩或打包的数据坏了，或者断在中间。"""


def cut_off(error: Broken) -> Unusable:
    """坏了的、断了的，记作一条坏行。"""
    return Unusable(f"{error}，多半是下载中断了；请接着下载")


# 各种解压的库遇到坏数据时抛出的；bz2 与 zstd 抛出的是没有 errno 的 OSError。
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
          tarfile.TarError)  # fmt: skip


@contextmanager
def named_damage(what: str) -> Iterator[None]:
    """把解压时的各种异常换成 Broken；磁盘的错误照常抛出。"""
    try:
        yield
    except (*DAMAGE, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise Broken(f"{what} 压缩数据不完整（{error}）") from error


class Unpacked(io.RawIOBase):
    """解压出来的内容。解出的比压缩的大得不像文字，就停下来。

    Args:
        inner: 解压的那一个，有 read1 或 read。
        what: 是什么压缩的，说给人看。
        consumed: 到现在为止用掉了多少压缩的字节。
    """

    def __init__(self, inner, what: str, name: str, consumed: Callable[[], int]):
        self.what, self.name, self.consumed = what, name, consumed
        # read1 有多少给多少：断在中间的，断之前的也拿得到。
        self.read_some = getattr(inner, "read1", inner.read)
        self.produced = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with named_damage(self.what):
            data = self.read_some(len(buffer))
        buffer[: len(data)] = data
        self.produced += len(data)
        check_ratio(self.name, self.produced, self.consumed())
        return len(data)


def check_ratio(name: str, produced: int, packed: int) -> None:
    """解压出的与压缩的相比，像不像文字。Raises UserError：压得太小，不像。"""
    if produced > BOMB_SIZE and produced > BOMB_RATIO * packed:
        raise UserError(
            f"{name} 解压出来有 {produced >> 20} MB 以上，是压缩的 "
            f"{produced // max(1, packed)} 倍：这样压得小的不是文字；确实要用，请先自己解压"
        )


class Joined(io.RawIOBase):
    """先给出已经读进来的开头，再接着读。"""

    def __init__(self, head: bytes, rest):
        self.head, self.rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        if not self.head:
            return self.rest.readinto(buffer)
        n = min(len(buffer), len(self.head))
        buffer[:n], self.head = self.head[:n], self.head[n:]
        return n
