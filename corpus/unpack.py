"""打开一个文件，一层层剥开，直到露出里面的内容：压缩的解开，打成包的依次取出。

    open_parts    一个文件 -> 里面的一份份内容

看内容而不看扩展名；只有包里的，才看名字挑出像数据的。
"""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from config import UserError
from corpus.find import PACKED, looks_like_data
from corpus.log import ReadLog

HEAD = 1 << 18  # 看开头多少字节，来辨认是什么
BUFFER = 1 << 18
NESTED = 3  # 压缩与打包至多套几层
# 文字很少压得到二十分之一；解出这么多之后，还压得这么小的，不是文字。
BOMB_RATIO, BOMB_SIZE = 100, 32 << 20


class Part(NamedTuple):
    """一份内容。"""

    name: str  # 说给人看的：文件名，包里的写成「包 里的 名字」
    suffix: str  # 去掉 .gz 之类以后的扩展名
    head: bytes  # 开头至多 HEAD 个字节
    stream: BinaryIO  # 从头读起
    on_disk: bool  # 没有压缩也没有打包，可以跳着读


class Steady(io.RawIOBase):
    """磁盘上的文件，只读到打开时的大小：一边读一边还在长的，也有读完的时候。"""

    def __init__(self, path: Path):
        self.raw = path.open("rb", buffering=0)
        self.size = os.fstat(self.raw.fileno()).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.raw.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.raw.seek(self.size + offset) if whence == 2 else self.raw.seek(offset, whence)

    def readinto(self, buffer) -> int | None:
        room = max(0, self.size - self.raw.tell())
        return self.raw.readinto(memoryview(buffer)[:room])

    def close(self) -> None:
        self.raw.close()
        super().close()


class Broken(Exception):
    """压缩或打包的数据坏了，或者断在中间。"""


# 各种解压的库遇到坏数据时抛出的；bz2 与 zstd 抛出的是没有 errno 的 OSError。
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
          tarfile.TarError)  # fmt: skip


@contextmanager
def named_damage(what: str) -> Iterator[None]:
    """把解压时的各种异常换成 Broken；磁盘的错误照常抛出。"""
    try:
        yield
    except DAMAGE as error:
        raise Broken(f"{what} 压缩数据不完整（{error}）") from error
    except OSError as error:
        if error.errno is not None:
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


def open_parts(path: Path, log: ReadLog) -> Iterator[Part]:
    """一个文件 -> 里面的一份份内容，用完一份再要下一份。

    Raises:
        UserError: 读不了，或者是不认得的压缩。
        Broken: 压缩或打包的数据坏了。
    """
    if os.path.exists(path) and not os.path.isfile(path):  # 例如 /dev/zero，永远读不完
        raise UserError(f"{path} 不是普通的文件；请先把数据存成文件")
    try:
        raw = Steady(path)
    except OSError as error:
        raise UserError(f"读不了 {path}（{error.strerror or error}）；请检查权限") from error
    log.file = raw
    try:
        yield from _unwrap(str(path), path.name, raw, raw.tell, 0, log)
    finally:
        log.done, log.file = log.done + raw.size, None
        raw.close()


def _unwrap(name: str, file: str, raw, consumed, depth: int, log: ReadLog) -> Iterator[Part]:
    """剥开一层：不是压缩的，就是一份内容；是的，剥开再看。"""
    head = _start_of(raw)
    on_disk = isinstance(raw, Steady)
    rest = Joined(head, raw)
    if on_disk:
        raw.seek(0)
        rest = raw
    stream = io.BufferedReader(rest, BUFFER)
    what = packing(head)
    if what is None:
        yield Part(name, os.path.splitext(file)[1].lower(), head, stream, on_disk)
        return
    if depth == NESTED:
        raise UserError(f"{name} 压缩或打包套了 {NESTED} 层以上；请先自己解开")
    if what == "zip":
        yield from _zip_members(name, stream, on_disk, depth, log)
    elif what == "tar":
        yield from _tar_members(name, stream, consumed, depth, log)
    else:
        inner = Unpacked(_decompressor(what, stream, name), what, name, consumed)
        stem, suffix = os.path.splitext(file)
        file = stem if suffix.lower() in PACKED else file
        yield from _unwrap(name, file, inner, consumed, depth + 1, log)


def _start_of(raw) -> bytes:
    """开头至多 HEAD 个字节；一次读不满就再读。断在其中的，先给出断之前的。"""
    head = b""
    try:
        while len(head) < HEAD and (more := raw.read(HEAD - len(head))):
            head += more
    except Broken:
        if not head:
            raise
    return head


def packing(head: bytes) -> str | None:
    """看开头，是什么压缩或打包的；都不是，是 None。"""
    magic = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd",
             b"\x5d\0\0": "lzma", b"PK\x03\x04": "zip", b"PK\x05\x06": "zip"}  # fmt: skip
    if head[257:262] == b"ustar":
        return "tar"
    return next((what for start, what in magic.items() if head.startswith(start)), None)


def _decompressor(what: str, stream: BinaryIO, name: str):
    if what == "gzip":
        return gzip.GzipFile(fileobj=stream)
    if what == "bz2":
        return bz2.BZ2File(stream)
    if what in ("xz", "lzma"):
        return lzma.LZMAFile(stream)
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{name} 是 zstd 压缩的；请先运行 zstd -d {name}，或者 pip install pyarrow 再来"
        ) from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream), "zstd")


def _wanted(member: str, left: list[str]) -> bool:
    """包里的一个要不要；不要的记在 left 里。"""
    if any(piece.startswith((".", "__MACOSX")) for piece in member.split("/")):
        return False
    if not looks_like_data(member):
        left.append(member)
        return False
    return True


def _say_left(name: str, taken: int, left: list[str], log: ReadLog) -> None:
    names = "、".join(left[:5]) + "……" * (len(left) > 5)
    if left:
        log.note(f"{name} 里有 {len(left)} 个文件看名字不是数据，没有读：{names}")
    if not taken:
        raise UserError(f"{name} 是一个包，里面没有数据文件（有的是：{names or '什么也没有'}）")


def _zip_members(name: str, stream, on_disk: bool, depth: int, log: ReadLog) -> Iterator[Part]:
    if not on_disk:
        raise UserError(f"{name} 里还套着一个 zip；请先运行 unzip 解开")
    left: list[str] = []
    taken = 0
    with named_damage("zip"):
        archive = zipfile.ZipFile(stream)
    check_not_a_document(name, archive.namelist())
    for info in archive.infolist():
        if info.is_dir() or not _wanted(info.filename, left):
            continue
        if info.flag_bits & 1:
            raise UserError(f"{name} 有密码；请先运行 unzip 解开")
        taken += 1
        check_ratio(name, info.file_size, info.compress_size)  # 它解不出比写着的更多
        with named_damage("zip"):
            member = archive.open(info)
        size = info.compress_size
        inner = Unpacked(member, "zip", name, lambda size=size: size)
        shown = f"{name} 里的 {info.filename}"
        yield from _unwrap(shown, info.filename, inner, inner.consumed, depth + 1, log)
    _say_left(name, taken, left, log)


def _tar_members(name: str, stream, consumed, depth: int, log: ReadLog) -> Iterator[Part]:
    left: list[str] = []
    taken = 0
    with named_damage("tar"):
        archive = tarfile.open(fileobj=stream, mode="r|")  # noqa: SIM115
    while True:
        with named_damage("tar"):
            info = archive.next()
        if info is None:
            break
        archive.members = []  # 不必记住走过的
        if not info.isfile() or not _wanted(info.name, left):
            continue
        taken += 1
        inner = Unpacked(archive.extractfile(info), "tar", name, consumed)
        yield from _unwrap(f"{name} 里的 {info.name}", info.name, inner, consumed, depth + 1, log)
    _say_left(name, taken, left, log)


def check_not_a_document(name: str, members: list[str]) -> None:
    """这些文件其实也是 zip，却不是数据的包。Raises UserError：是哪一种，怎样变成文字。"""
    kinds = {
        "word/document.xml": "Word 文档；请先运行 pandoc -t plain -o 文字.txt",
        "xl/workbook.xml": "Excel 表格；请先另存为 CSV（UTF-8）",
        "ppt/presentation.xml": "PowerPoint 演示文稿；请先另存为文字",
        "META-INF/container.xml": "EPUB 电子书；请先运行 pandoc -t plain -o 文字.txt",
    }
    for member, kind in kinds.items():
        if member in members:
            raise UserError(f"{name} 是 {kind}")
    if any(member.endswith("data.pkl") for member in members):
        raise UserError(f"{name} 是 PyTorch 的检查点，不是数据；请检查路径")
