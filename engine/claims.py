"""检查点里的内容，一样一样核对：不只看类型，也看值；张量的形状与类型，建模型之前就看。

    plain               只留下字典、列表、数、文字与张量；多得离谱的不收
    check_contents      每一项的值
    check_parameters    参数的名字、形状与类型，与配置的相同
    room_for_context    上下文那么长，内存够不够

文件这一层（大小、校验和、夹带的程序）在 archive.py；优化器的状态由 optimizer.py 自己核对。
"""

import math
import os
import reprlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from config import Config
from engine.archive import Lie
from engine.progress import Progress
from engine.unpickle import Claim, too_big
from model import Transformer
from settings.flags import is_text
from settings.say import brief

FORMAT = 2
NAMES = {"pretrain": "预训练", "sft": "微调"}
MOST_VALUES = 2 * 10**5  # 一个检查点里至多多少个值；一百层的模型，连同优化器，一万多个
DEEPEST = 12  # 字典与列表至多套几层；真的检查点里至多四层


# ---------- 1. 只留下普通的东西 ----------


def plain(value: Any, room: list[int] | None = None, depth: int = 0) -> Any:
    """抄一份，只有普通的字典、列表与值；`Claim` 换成它的张量。

    同一个列表可以在 data.pkl 里出现许多次，一层套一层，几百字节便是上亿个值：数着抄，多了就停。

    Args:
        room: 还能有几个值。
    Raises:
        Lie: 有别的东西，太多，套得太深，或者不是文字的文字。
    """
    room = room or [MOST_VALUES]
    room[0] -= 1
    if room[0] < 0 or depth > DEEPEST:
        raise Lie("里面的东西太多，或者套得太深")
    if isinstance(value, Claim):
        return value.tensor
    if isinstance(value, dict):
        pairs = [(plain(k, room, depth + 1), v) for k, v in value.items()]
        return {k: plain(v, room, depth + 1) for k, v in pairs}
    if isinstance(value, list | tuple):
        return [plain(v, room, depth + 1) for v in value]
    if type(value) is str and not is_text(value):
        raise Lie("有一段文字不是 UTF-8")
    if type(value) is int and too_big(value):
        raise Lie("有一个大得离谱的数")
    if value is not None and type(value) not in (bool, int, float, str):
        raise Lie(f"里面有检查点用不到的 {type(value).__name__}")
    return value


# ---------- 2. 每一项的值 ----------


def is_count(value: Any) -> bool:
    """数出来的：不是负数。"""
    return type(value) is int and 0 <= value < 2**53


def is_time(value: Any) -> bool:
    """秒数。"""
    return type(value) is float and 0 <= value < math.inf


def is_loss(value: Any) -> bool:
    """损失：还没有检验过是 inf，发散了是 NaN。"""
    return type(value) is float and not value < 0


def is_short(value: Any) -> bool:
    """一小段话，印得出来。"""
    return type(value) is str and len(value) <= 300


def is_tensor(value: Any, dtype: torch.dtype, dims: int) -> bool:
    """几维的、什么类型的张量。"""
    return isinstance(value, Tensor) and value.dtype == dtype and value.dim() == dims


def is_dict(value: Any, key: Callable, inside: Callable, most: int = 1000) -> bool:
    """字典，键与值各自都对。"""
    return (
        isinstance(value, dict)
        and len(value) <= most
        and all(key(k) and inside(v) for k, v in value.items())
    )


def is_setting(value: Any) -> bool:
    """config 里的一个值：还不知道是哪个字段的。"""
    return value is None or type(value) in (bool, int, float, str)


def is_optimizer(value: Any) -> bool:
    """一个优化器的状态：各参数的几个张量；学习率等取自配置，param_groups 用不到。"""
    return isinstance(value, dict) and is_dict(
        value.get("state"),
        is_count,
        lambda state: is_dict(state, is_short, lambda x: isinstance(x, Tensor)),
        MOST_VALUES,
    )


PROGRESS = {name: {"int": is_count, "float": is_loss}[type(value).__name__]
            for name, value in vars(Progress()).items()}  # fmt: skip
PROGRESS |= {"seconds": is_time, "saving_seconds": is_time}
SCALER = {"scale": lambda v: type(v) is float and 0 < v < math.inf,
          "growth_factor": lambda v: type(v) is float and 1 < v < 1000,
          "backoff_factor": lambda v: type(v) is float and 0 < v < 1,
          "growth_interval": lambda v: is_count(v) and v > 0,
          "_growth_tracker": is_count}  # fmt: skip


def check_contents(checkpoint: dict[str, Any]) -> None:
    """每一项的值；格式已经看过了。

    Raises:
        Lie: 有一项不对，是哪一项。
    """
    for name, holds in CONTENTS.items():
        if name not in checkpoint or not holds(checkpoint[name]):
            raise Lie(f"{name} 不对")
    progress, scaler = checkpoint["progress"], checkpoint["scaler"]
    for where, table, values in (("progress", PROGRESS, progress), ("scaler", SCALER, scaler)):
        for name, holds in table.items():
            if values and not holds(values.get(name)):
                raise Lie(f"{where} 里的 {name} 是 {reprlib.repr(values.get(name))}，不对")
    for name, value in checkpoint["model"].items():
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise Lie(f"参数 {brief(name, 60)} 是 {what}，只能是 float32 的张量")
    check_shared_row(checkpoint["shared_row"], checkpoint["model"].get("embedding.weight"))


CONTENTS: dict[str, Callable[[Any], bool]] = {
    "stage": lambda v: type(v) is str and v in NAMES,
    "config": lambda v: is_dict(v, is_short, is_setting),
    "tokenizer": is_short,
    "model": lambda v: is_dict(v, is_short, lambda _: True, MOST_VALUES),
    "progress": lambda v: is_dict(v, is_short, is_setting) and v != {},
    "max_steps": is_count,
    "data": lambda v: is_dict(v, is_short, lambda x: is_short(x) or is_count(x)),
    "versions": lambda v: is_dict(v, is_short, is_short),
    "device": is_short,
    "optimizers": lambda v: (
        isinstance(v, list) and len(v) in (0, 2) and all(map(is_optimizer, v))
    ),
    "scaler": lambda v: is_dict(v, is_short, is_setting),
    "rng": lambda v: v == {} or (
        isinstance(v, dict)
        and is_tensor(v.get("cpu"), torch.uint8, 1)
        and isinstance(v.get("cuda"), list)
        and all(is_tensor(x, torch.uint8, 1) for x in v["cuda"])
    ),
    "shared_row": lambda v: v is None or isinstance(v, dict),
}  # fmt: skip


def check_shared_row(saved: dict[str, Any] | None, table: Any) -> None:
    """合用一行的：编号都在词表里、不重复，第几列、偏置与它们对得上。Raises Lie。"""
    if saved is None:
        return
    kinds = {"rows": torch.int64, "column": torch.int64, "bias": torch.float32,
             "members": torch.int64}  # fmt: skip
    if not isinstance(table, Tensor) or not all(
        is_tensor(saved.get(name), dtype, 1) and len(saved[name]) for name, dtype in kinds.items()
    ):
        raise Lie("shared_row 不对")
    rows, column, bias, members = (saved[name] for name in kinds)
    R, V = len(rows), len(table)
    every = torch.cat([rows, members[1:]])  # 代表的那一个，两处都有
    expected, weight = torch.empty(V, dtype=torch.int64), torch.zeros(R)
    weight[-1] = math.log(len(members))
    good = len(every) == V == len(column) and len(bias) == R and members[0] == rows[-1]
    if good and bool(torch.equal(every.sort().values, torch.arange(V))):
        expected[rows] = torch.arange(R)
        expected[members] = R - 1
        good = torch.equal(column, expected) and torch.allclose(bias, weight)
        if good:
            return
    raise Lie("shared_row 的编号不对")


# ---------- 3. 参数与配置 ----------


def check_parameters(state: dict[str, Tensor], config: Config) -> None:
    """参数的名字、形状与配置的相同；只在 "meta" 上建一个没有内容的模型，不占内存。

    Raises:
        ValueError: 哪里不同。
    """
    n_layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if n_layers != config.n_layers:  # 先看层数：写着一亿层的，空的也不要去建
        raise ValueError(f"参数有 {n_layers} 层，配置是 {config.n_layers} 层")
    routers = [x for name, x in state.items() if name.endswith(".router.weight")]
    if config.n_experts != (len(routers[0]) if routers and routers[0].dim() else 0):
        raise ValueError(f"专家不是 {config.n_experts} 位")
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    for name in sorted(expected.keys() | state.keys()):
        mine, theirs = (
            "没有" if name not in x else f"形状是 {list(x[name].shape)}" for x in (expected, state)
        )
        if mine != theirs:
            raise ValueError(f"{brief(name, 60)} {brief(theirs)}，照配置应当{brief(mine)}")


def room_for_context(config: Config) -> str | None:
    """上下文那么长，位置编码与缓存（fp32）要多少内存；这台机器没有那么多，说一句。"""
    head = config.dim // config.n_heads
    tables = 3 * 4 * config.max_len * head  # 余弦、正弦，算它们时的中间结果
    cache = 2 * 4 * config.max_len * head * config.n_kv_heads * config.n_layers
    if tables + cache <= (most := memory_of_machine()):
        return None
    return (
        f"max_len {config.max_len} 的缓存要 {(tables + cache) / 1e9:.1f} GB，"
        f"这台机器只有 {most / 1e9:.1f} GB"
    )


def memory_of_machine() -> float:
    """内存有多少字节；ulimit -v 限得更小的，照它。不知道的是无穷大。"""
    try:
        import resource  # Windows 没有

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ImportError, AttributeError, ValueError, OSError):
        return math.inf
    return most if limit == resource.RLIM_INFINITY else min(most, limit)
