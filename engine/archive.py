"""检查点是一个文件：它自称有什么，先与真有的字节对一对，对得上才分配。

    open_archive    一个 zip 文件里的各块，位置与校验和都核对过

`torch.load` 相信文件写的大小：几 KB 的文件说自己有几 GB 的张量，它就去分配几 GB，所以这里自己读。
各块里的 data.pkl 是什么，见 unpickle.py。
"""

import mmap
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from config import UserError
from settings.files import open_regular

MOST_MEMBERS = 10**5  # 一个检查点里至多多少块：一百层的模型，连同优化器，三千多块
DIRECTORY = 128 * MOST_MEMBERS  # zip 的目录至多多少字节：torch 写的，一块 77 字节上下
BLOCK = 1 << 20


class Damaged(UserError):
    """检查点不完整，或者内容变了。"""


class Lie(ValueError):
    """文件自称的，与它真有的对不上；说的是哪里。"""


# ---------- 1. zip：各块在哪里 ----------


def open_file(path: Path) -> BinaryIO:
    """打开一个普通的文件；管道、设备等没有尽头的，不读。Raises UserError, OSError。"""
    if (descriptor := open_regular(path)) is None:
        raise UserError(f"{path} 不是普通的文件（是管道、设备或目录）；请写出检查点的文件名")
    return os.fdopen(descriptor, "rb")


def open_archive(path: Path, mapped: bool) -> dict[str, Tensor]:
    """一个检查点里的各块：{名字: 它的字节，uint8 (n,)}。

    Args:
        mapped: 真时内容留在磁盘上，用到哪里才读哪里。
    Raises:
        Lie: 不是 `torch.save` 写的那种 zip，或者有一块的校验和不符。
        UserError, OSError: 打不开。
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        places = find_members(file, size)
        if not mapped:
            return {name: load_member(file, name, *place) for name, place in places.items()}
        for name, (start, n, crc) in places.items():
            file.seek(start)
            found, left = 0, n
            while left and (block := file.read(min(BLOCK, left))):
                found, left = zlib.crc32(block, found), left - len(block)
            if left or found != crc:
                raise Lie(f"{name} 的校验和不符")
        # 写时复制：改了也不会写回文件。
        whole = torch.frombuffer(
            mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8
        )
        return {name: whole[start : start + n] for name, (start, n, _) in places.items()}


def load_member(file: BinaryIO, name: str, start: int, n: int, crc: int) -> Tensor:
    """把一块读进内存，只读一遍，边读边核对。"""
    content = torch.empty(n, dtype=torch.uint8)
    if n:
        room = content.numpy()
        file.seek(start)
        if file.readinto(room) != n or zlib.crc32(room) != crc:
            raise Lie(f"{name} 的校验和不符")
    return content


def find_members(file: BinaryIO, size: int) -> dict[str, tuple[int, int, int]]:
    """各块的 (从第几个字节起, 几个字节, CRC-32)。

    没有压缩、互不重叠，所以加起来不会比文件大：压缩过的几 KB 能展开成几 GB。
    """
    if size_of_directory(file, size) > DIRECTORY:
        raise Lie("里面的块太多")
    places: dict[str, tuple[int, int, int]] = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    for member in sorted(members, key=lambda m: m.header_offset):
        name, n = member.filename, member.file_size
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != n:
            raise Lie("有一块是压缩过的")
        if name in places:
            raise Lie("有两块的名字相同")
        file.seek(member.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise Lie("有一块不在它说的地方")
        start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + n > size:
            raise Lie("有一块比文件还大")
        places[name] = (start, n, member.CRC)
    ends = [0, *(start + n for start, n, _ in places.values())]
    starts = sorted(m.header_offset for m in members)
    if any(start < end for start, end in zip(starts, ends, strict=False)):
        raise Lie("有两块重叠")
    return places


def size_of_directory(file: BinaryIO, size: int) -> int:
    """文件末尾写着目录有几个字节：先看它，再去读目录。写着几块的那一项，zipfile 不看，信不得。"""
    tail = 22 + 20 + 56  # zip 的结尾；块多或者文件大，前面另有两段 zip64 的
    file.seek(max(0, size - tail))
    end = file.read(tail)
    if len(end) < 22 or end[-22:-18] != b"PK\x05\x06":
        raise Lie("末尾不全")
    if end[-42:-38] != b"PK\x06\x07":
        return struct.unpack("<L", end[-10:-6])[0]
    (start,) = struct.unpack("<Q", end[-34:-26])  # 有 zip64 的，听它的；它就在前面
    if end[:4] != b"PK\x06\x06" or start != size - tail:
        raise Lie("末尾不全")
    return struct.unpack("<Q", end[40:48])[0]
