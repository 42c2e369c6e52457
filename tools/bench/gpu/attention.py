"""每种注意力走的是哪个算子，多快，占多少显存。

PyTorch 按形状、遮罩与精度挑算子：FlashAttention 不收遮罩，memory-efficient 不收分组的键值，cuDNN 的
要 Hopper 以上；都不收，就退到 math：fp32，在内存里写出 T × T 的表。挑了谁，从剖析的记录里读出来。

图例：B 批次，T 词元数，S 看得见的键的个数，H 头数，K 键值头数，D 头宽。
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import model
from tools.bench.gpu.stage import Stage, skipped
from tools.bench.measuring import Row

# ---------- 1. 几种做法，参数都同 model.attend ----------


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """从前的：分组交给 enable_gqa。"""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
    )


@contextmanager
def no_cudnn() -> Iterator[None]:
    """其间不许用 cuDNN：Hopper 以前的卡（3090、4090）上就是这样。

    是全局的开关：编译时也有效，另一个线程里也有效。
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def grouped_without_cudnn(*args) -> Tensor:
    """从前的，不许用 cuDNN。"""
    with no_cudnn():
        return grouped(*args)


def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """键与值先复制给同组的各个头，不用 enable_gqa：memory-efficient 便收了。"""
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def flexible(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """FlexAttention（arXiv 2412.05496）：看不见的块整个跳过；要编译才快。"""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, i, j):
        return i >= j if mask is None else mask[b % mask.size(0), 0, i, j]

    block = create_block_mask(visible, q.size(0), None, q.size(2), k.size(2), q.device.type)
    return flex_attention(q, k, v, block_mask=block, enable_gqa=q.size(1) != k.size(1))


NO_FLEX = "CPU 上的 FlexAttention 没有反向"
OURS, OLD = "我们的", "从前的（enable_gqa）"
WAYS: dict[str, Callable[..., Tensor]] = {
    OURS: lambda *args: model.attend(*args),  # 用到时才取：`sft` 会换掉它
    OLD: grouped,
    "从前的，不许 cuDNN": grouped_without_cudnn,
    "复制键值": repeated,
}


# ---------- 2. 几种情形 ----------


class Case(NamedTuple):
    """一种情形：形状，遮罩，训练时要不要反向，比哪几种做法。"""

    name: str
    shape: tuple[int, int, int, int, int, int]  # B, H, K, T, S, D
    mask: Callable[[], Tensor] | None
    train: bool
    ways: list[str]


def cases(stage: Stage) -> list[Case]:
    """`wide` 的六种情形：稠密的因果、分组的因果、隔开的文档、隔开的对话、读开头、写一个词元。"""
    config = stage.config("wide")
    B, T, S = config.batch_size, config.seq_len, config.max_len
    H, K, D = config.n_heads, config.n_kv_heads, config.dim // config.n_heads
    place = "cpu" if stage.rehearse else "cuda"

    def separate(length: int) -> Tensor:
        """每 length 个词元一段，各段互相看不见：(B, 1, T, T)。"""
        segments = (torch.arange(T, device=place) // length).expand(B, T)
        return (segments[:, None, :, None] == segments[:, None, None, :]).tril()

    def written(new: int) -> Tensor:
        """缓存有 S 格，写到最后的 new 个：(1, 1, new, S)。"""
        positions = torch.arange(S // 2 - new, S // 2, device=place)
        return torch.arange(S, device=place) <= positions.view(1, 1, new, 1)

    everything = list(WAYS)
    return [
        Case("因果，不分组", (B, H, H, T, T, D), None, True, [OURS]),
        Case("因果，分组", (B, H, K, T, T, D), None, True, [OURS]),
        Case("隔开的文档", (B, H, K, T, T, D), lambda: separate(T // 4), True, everything),
        Case("隔开的对话", (B, H, K, T, T, D), lambda: separate(T // 8), True, everything),
        Case("读开头", (1, H, K, S // 4, S, D), lambda: written(S // 4), False, everything),
        Case("写一个词元", (1, H, K, 1, S, D), lambda: written(1), False, [OURS, OLD]),
    ]


# ---------- 3. 量 ----------


def measure(stage: Stage) -> Iterator[Row]:
    """每种精度、每种情形、每种做法。"""
    dtypes = (torch.float32,) if stage.rehearse else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for case in cases(stage):
            for way in case.ways:
                what = f"{str(dtype)[6:]}，{case.name}，{way}"
                yield from stage.attempt(what, one(stage, what, case, WAYS[way], dtype))
    case = cases(stage)[2]
    what = f"{str(dtypes[0])[6:]}，{case.name}，FlexAttention"
    if stage.rehearse:
        yield skipped(what, NO_FLEX)
        return
    way = torch.compile(flexible, dynamic=False) if stage.compile else flexible
    yield from stage.attempt(what, one(stage, what, case, way, dtypes[0]))


def one(
    stage: Stage, what: str, case: Case, way: Callable[..., Tensor], dtype: torch.dtype
) -> Iterator[Row]:
    """一种情形的一种做法：走的是哪个算子，多少毫秒，占多少显存；训练的连同反向。"""
    B, H, K, T, S, D = case.shape
    place = "cpu" if stage.rehearse else "cuda"
    shapes = ((B, H, T, D), (B, K, S, D), (B, K, S, D))
    q, k, v = (torch.randn(s, device=place, dtype=dtype, requires_grad=case.train) for s in shapes)
    mask = case.mask and case.mask()
    causal = mask is None

    def work() -> int:
        y = way(q, k, v, mask, causal)
        if case.train:
            y.backward(torch.ones_like(y))
        return 1

    with torch.set_grad_enabled(case.train):
        work()
        stage.finish()
        if not stage.rehearse:
            held = torch.cuda.memory_allocated() / 1e9
        peak = stage.measure_memory(what, work)
        chosen, table = who_ran(work)
        stage.log(f"注意力：{what}", table)
        speed = stage.speed(work, share=0.1)
    yield Row(f"{what}：{chosen}", [1e3 / speed], "毫秒")
    if peak.values:
        yield Row(f"{what}：多占的显存", [(peak.values[0] - held) * 1e3], "MB")


def who_ran(work: Callable[[], object]) -> tuple[str, str]:
    """干一份活，走的是哪个算子；连同最费时的内核的表。"""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = found.key_averages()
    prefix = "aten::_scaled_dot_product_"
    names = {e.key.removeprefix(prefix).replace("_attention", "")
             for e in events if e.key.startswith(prefix) and "backward" not in e.key}  # fmt: skip
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return "、".join(sorted(names)) or "别的算子", events.table(sort_by=order, row_limit=8)
