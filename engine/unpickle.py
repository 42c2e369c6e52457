"""检查点里的 data.pkl：它说的字典、列表与张量。

    unpack      data.pkl -> 它说的
    Program     一条一条执行

`torch.load` 相信它说的大小，认得的东西也比检查点用到的多（例如 `bytearray(10**11)`）；这里只认
`torch.save` 写检查点时用的那几样，别的一概不收；张量的每个数都要在文件里找得到。
"""

import math
import pickletools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.archive import Lie

MOST_OPCODES = 10**6  # data.pkl 里至多多少条指令：一百层的模型，连同优化器，十万多条
DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
ORDERED_DICT, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
FUNCTIONS = {ORDERED_DICT: ORDERED_DICT, REBUILD: REBUILD} | {
    f"torch {name}": dtype for name, dtype in DTYPES.items()
}


class Claim(NamedTuple):
    """data.pkl 里说的一个张量；数在文件里，已经对过。"""

    tensor: Tensor


class Storage(NamedTuple):
    """data.pkl 里说的一块存储：文件里的字节，uint8 (n,)，以及它们是什么数。"""

    raw: Tensor
    dtype: torch.dtype


def unpack(members: dict[str, Tensor]) -> Any:
    """data.pkl -> 它说的；其中的张量是 `Claim`，与 members 合用内存。

    Raises:
        Lie: 有不认识的东西，或者张量说的与文件里的对不上。
        Exception: data.pkl 坏了；各处抛出的异常种类繁多，没有共同的基类。
    """
    found = [name for name in members if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise Lie("不是 torch.save 写的")
    prefix = found[0].removesuffix("data.pkl")
    order = members.get(f"{prefix}byteorder")
    if order is not None and bytes(order.numpy()) != sys.byteorder.encode():
        raise Lie("是字节次序相反的机器写的")
    return Program(members, prefix).run(members[found[0]].numpy().tobytes())


class Program:
    """data.pkl 是一段小程序（pickle）。一条一条自己执行，只做 torch.save 写检查点时用到的。

    不交给 pickle：几百字节的程序能让它几年也算不完（一层套一层的元组当字典的键，散列一次要走遍
    2^60 个），套得深的还会让整个进程崩溃。
    """

    def __init__(self, members: dict[str, Tensor], prefix: str):
        self.members, self.prefix = members, prefix
        # 几个张量可以合用一块存储（合用的一行就是），但合起来不能比文件大几倍。
        self.room = 2 * sum(map(len, members.values()))
        self.stack: list[Any] = []
        self.marks: list[int] = []

    def run(self, program: bytes) -> Any:
        """执行，返回它留下的。"""
        stack, memo = self.stack, {}
        for n, (opcode, value, _) in enumerate(pickletools.genops(program)):
            if n > MOST_OPCODES:
                raise Lie("里面的东西太多")
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    return stack.pop()
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    if type(value) is int and too_big(value):
                        raise Lie("里面有大得离谱的数")
                    stack.append(value)
                case "GLOBAL":
                    if value not in FUNCTIONS:
                        raise Lie(f"里面有检查点用不到的 {value.replace(' ', '.')}"[:100])
                    stack.append(FUNCTIONS[value])
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case "MARK":
                    self.marks.append(len(stack))
                case name if name in CONSTANTS:
                    stack.append(CONSTANTS[name]())
                case name if name in ACTIONS:
                    ACTIONS[name](self)
                case name:
                    raise Lie(f"里面有检查点用不到的 {name}")

    # ---------- 一条条指令 ----------

    def since_mark(self) -> list[Any]:
        """上一个 MARK 之后的几样。"""
        return self.take(len(self.stack) - self.marks.pop())

    def take(self, n: int) -> list[Any]:
        """末尾的 n 样。"""
        if not 0 <= n <= len(self.stack):
            raise Lie("里面的指令不成对")
        at = len(self.stack) - n
        taken = self.stack[at:]
        del self.stack[at:]
        return taken

    def extend(self, values: list[Any]) -> None:
        """接在列表后面。"""
        if type(self.stack[-1]) is not list:
            raise Lie("里面的指令用错了地方")
        self.stack[-1].extend(values)

    def update(self, pairs: list[Any]) -> None:
        """一对一对，放进字典；键只能是文字与整数。"""
        keys, values = pairs[::2], pairs[1::2]
        if type(self.stack[-1]) is not dict or any(type(k) not in (str, int) for k in keys):
            raise Lie("里面的指令用错了地方")
        self.stack[-1].update(zip(keys, values, strict=True))

    def call(self) -> None:
        """叫一个函数；只有两个。"""
        function, args = self.take(2)
        if function is ORDERED_DICT and args == ():
            self.stack.append({})
        elif function is REBUILD and type(args) is tuple:
            self.stack.append(self.tensor(*args))
        else:
            raise Lie("里面的指令用错了地方")

    def build(self) -> None:
        """旧的检查点里，OrderedDict 另带着 _metadata：用不到，不要。"""
        target, _ = self.take(2)
        if type(target) is not dict:
            raise Lie("里面的指令用错了地方")
        self.stack.append(target)

    def storage(self, pid: Any) -> Storage:
        """一块存储：("storage", 类型, 第几块, 在什么设备上, 几个数)。"""
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype) or type(key) is not str or type(count) is not int:
            raise Lie("有一块存储说得不清不楚")
        raw = self.members.get(f"{self.prefix}data/{key}")
        if raw is None or count * dtype.itemsize != len(raw):
            raise Lie(f"第 {key[:20]} 块存储说有 {count} 个数，文件里不是这么多")
        return Storage(raw, dtype)

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Claim:
        """一块存储的一段，排成 shape；只认连续的。"""
        if type(storage) is not Storage or {type(shape), type(stride)} != {tuple}:
            raise Lie("有一个张量说得不清不楚")
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


CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
ACTIONS: dict[str, Callable[[Program], None]] = {
    "TUPLE": lambda p: p.stack.append(tuple(p.since_mark())),
    "TUPLE1": lambda p: p.stack.append(tuple(p.take(1))),
    "TUPLE2": lambda p: p.stack.append(tuple(p.take(2))),
    "TUPLE3": lambda p: p.stack.append(tuple(p.take(3))),
    "APPEND": lambda p: p.extend(p.take(1)),
    "APPENDS": lambda p: p.extend(p.since_mark()),
    "SETITEM": lambda p: p.update(p.take(2)),
    "SETITEMS": lambda p: p.update(p.since_mark()),
    "REDUCE": Program.call,
    "BUILD": Program.build,
    "BINPERSID": lambda p: p.stack.append(p.storage(*p.take(1))),
}


def too_big(value: int) -> bool:
    """整数装不进 64 位。"""
    return not -(2**63) <= value < 2**63
