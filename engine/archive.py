"""检查点是一个文件：它自称有什么，先与真有的字节对一对，对得上才分配。

    open_archive    一个 zip 文件里的各块，位置与校验和都核对过
    unpack          其中的 data.pkl -> 字典、列表与张量

`torch.load` 相信文件写的大小：几 KB 的文件说自己有几 GB 的张量，它就去分配几 GB；它认得的东西
也比检查点用到的多（例如 `bytearray(10**11)`）。所以这里自己读，只认 `torch.save` 写检查点时用的那
几样，别的一概不收；张量的每个数都要在文件里找得到。
"""

import io
import math
import mmap
import os
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from config import UserError
from settings.files import open_regular

MOST_MEMBERS = 10**5  # 一个检查点里至多多少块：一百层的模型，连同优化器，三千多块
MOST_OPCODES = 10**6  # data.pkl 里至多多少条指令：同上，十万多条
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
    if count_members(file, size) > MOST_MEMBERS:
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


def count_members(file: BinaryIO, size: int) -> int:
    """文件末尾写着有几块：先看它，再去读目录。"""
    tail = 22 + 20 + 56  # zip 的结尾；块多或者文件大，前面另有两段 zip64 的
    file.seek(max(0, size - tail))
    end = file.read(tail)
    if len(end) < 22 or end[-22:-18] != b"PK\x05\x06":
        raise Lie("末尾不全")
    (count,) = struct.unpack("<H", end[-12:-10])
    if count == 0xFFFF and end[:4] == b"PK\x06\x06":
        (count,) = struct.unpack("<Q", end[32:40])
    return count


# ---------- 2. data.pkl：里面是什么 ----------

# torch.save 写检查点时用到的指令；旧的检查点里 OrderedDict 带着 _metadata，才有 BUILD。
OPCODES = {"PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
           "LONG1", "BINFLOAT", "BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE",
           "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT",
           "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD",
           "BINPERSID"}  # fmt: skip
DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


class Claim(NamedTuple):
    """data.pkl 里说的一个张量；数在文件里，已经对过。"""

    tensor: Tensor


class Inert:
    """data.pkl 里叫得到的一个函数；别的状态装不进去（BUILD）。"""

    __slots__ = ("function",)

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state) -> None:
        pass


class PlainDict(dict):
    """代替 OrderedDict；它另带的 _metadata 用不到，不要。"""

    __slots__ = ()

    def __setstate__(self, state) -> None:
        pass


def unpack(members: dict[str, Tensor]) -> Any:
    """data.pkl -> 它说的；其中的张量是 `Claim`，与 members 合用内存。

    Raises:
        Lie: 有不认识的东西，或者张量说的与文件里的对不上。
        Exception: data.pkl 坏了；pickle 抛出的异常种类繁多，没有共同的基类。
    """
    found = [name for name in members if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise Lie("不是 torch.save 写的")
    prefix = found[0].removesuffix("data.pkl")
    order = members.get(f"{prefix}byteorder")
    if order is not None and bytes(order.numpy()) != sys.byteorder.encode():
        raise Lie("是字节次序相反的机器写的")
    program = members[found[0]].numpy().tobytes()
    check_program(program)
    return Unpickler(program, members, prefix).load()


def check_program(program: bytes) -> None:
    """pickle 是一段小程序：先看一遍，只有认识的指令，才去运行。"""
    for n, (opcode, value, _) in enumerate(pickletools.genops(program)):
        if opcode.name not in OPCODES:
            raise Lie(f"里面有检查点用不到的 {opcode.name}")
        if n > MOST_OPCODES:
            raise Lie("里面的东西太多")
        # 编号多大，pickle 就备多大的一张表；整数太长，比较起来也慢。
        name, most = opcode.name, {"LONG_BINPUT": n, "LONG1": 2**63 - 1}
        if name in most and not -(2**63) <= value <= most[name]:
            raise Lie("里面有大得离谱的数")


def too_big(value: int) -> bool:
    """整数装不进 64 位。"""
    return not -(2**63) <= value < 2**63


class Unpickler(pickle.Unpickler):
    """只叫得到三样：OrderedDict、张量、张量的存储；字节都取自 members。"""

    def __init__(self, program: bytes, members: dict[str, Tensor], prefix: str):
        super().__init__(io.BytesIO(program))
        self.members, self.prefix = members, prefix
        # 几个张量可以合用一块存储（合用的一行就是），但合起来不能比文件大几倍。
        self.room = 2 * sum(map(len, members.values()))

    def find_class(self, module: str, name: str) -> Any:
        """data.pkl 里写的名字 -> 函数或类型。Raises Lie：检查点用不到的。"""
        if (module, name) == ("collections", "OrderedDict"):
            return PlainDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return Inert(self.tensor)
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise Lie(f"里面有检查点用不到的 {module}.{name}"[:100])

    def persistent_load(self, pid: Any) -> tuple[Tensor, torch.dtype]:
        """一块存储：("storage", 类型, 第几块, 在什么设备上, 几个数)。"""
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype) or type(key) is not str or type(count) is not int:
            raise Lie("有一块存储说得不清不楚")
        raw = self.members.get(f"{self.prefix}data/{key}")
        if raw is None or count * dtype.itemsize != len(raw):
            raise Lie(f"第 {key[:20]} 块存储说有 {count} 个数，文件里不是这么多")
        return raw, dtype

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Claim:
        """一块存储的一段，排成 shape；只认连续的。"""
        raw, dtype = storage
        numbers = [offset, *shape, *stride]
        if any(type(n) is not int or not 0 <= n < 2**48 for n in numbers) or len(shape) > 8:
            raise Lie("有一个张量的形状不对")
        n, step = math.prod(shape), 1
        for size, mine in zip(reversed(shape), reversed(stride), strict=True):
            if n and size > 1 and mine != step:
                raise Lie("有一个张量不是连续的")
            step *= size
        self.room -= n * dtype.itemsize
        if (offset + n) * dtype.itemsize > len(raw) or self.room < 0:
            raise Lie(f"有一个张量说有 {n} 个数，文件里没有这么多")
        part = raw[offset * dtype.itemsize : (offset + n) * dtype.itemsize]
        return Claim(part.view(dtype).view(shape))
