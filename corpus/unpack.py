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
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from config import UserError
from corpus.find import PACKED, looks_like_data
from corpus.log import ReadLog, shown
from corpus.streams import Broken, Joined, Steady, Unpacked, check_ratio, cut_off, named_damage

HEAD = 1 << 18  # 看开头多少字节，来辨认是什么
BUFFER = 1 << 18
NESTED = 3  # 压缩与打包至多套几层


class Part(NamedTuple):
    """一份内容。"""

    name: str  # 说给人看的：文件名，包里的写成「包 里的 名字」
    suffix: str  # 去掉 .gz 之类以后的扩展名
    head: bytes  # 开头至多 HEAD 个字节
    stream: BinaryIO  # 从头读起
    on_disk: bool  # 没有压缩也没有打包，可以跳着读


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
        try:
            yield from _unwrap(str(path), path.name, raw, raw.tell, 0, log)
        except Broken:  # 断在中间的，断之前的还是要用
            log.hashed(path, raw.hashed())
            raise
        log.hashed(path, raw.hashed())
    finally:
        log.done, log.file = log.done + raw.size, None
        raw.release()


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
    """包里的一个要不要；不要的记在 left 里，苹果系统自己添的不必说。"""
    pieces = [piece for piece in member.split("/") if piece != "."]
    if "__MACOSX" in pieces or pieces[-1].startswith("._"):
        return False
    if any(piece.startswith(".") for piece in pieces) or not looks_like_data(member):
        left.append(member)
        return False
    return True


def _say_left(name: str, taken: int, left: list[str], log: ReadLog) -> None:
    log.left_out(name, left)
    if not taken:
        there = "、".join(map(shown, left[:5])) or "什么也没有"
        raise UserError(f"{name} 是一个包，里面没有数据文件（有的是：{there}）")


class Member(tarfile.TarInfo):
    """坏了的头要说出来：tarfile 只当作到了末尾。"""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "Member":
        """读下一个头。"""
        try:
            return super().fromtarfile(archive)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError,
                tarfile.EmptyHeaderError) as error:  # fmt: skip
            raise tarfile.ReadError(str(error)) from error


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
        try:
            with named_damage("zip"):
                member = archive.open(info)
        except NotImplementedError as error:
            raise UserError(f"{name} 用的压缩办法解不开（{error}）；请先运行 unzip") from error
        inner = Unpacked(member, "zip", name, lambda size=info.compress_size: size)
        inside = f"{name} 里的 {info.filename}"
        try:
            yield from _unwrap(inside, info.filename, inner, inner.consumed, depth + 1, log)
        except Broken as error:  # 坏了一个，别的还读得到
            log.refuse(f"里的 {info.filename}", cut_off(error))
    _say_left(name, taken, left, log)


def _tar_members(name: str, stream, consumed, depth: int, log: ReadLog) -> Iterator[Part]:
    left: list[str] = []
    taken = 0
    with named_damage("tar"):
        archive = tarfile.open(fileobj=stream, mode="r|", tarinfo=Member)  # noqa: SIM115
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
