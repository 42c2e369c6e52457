"""注意力交给哪个算子：没有显卡也查得出，每种显卡上、每种用法，都不会退到写出 T × S 权重表的那一份。

PyTorch 的 CPU 版能算假的「显卡」张量的形状，但不知道显卡上会挑哪个算子；挑选的规矩照 2.13 的
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp 抄在 `chosen` 里。
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import model as model_module
from config import PRESETS, Config
from generate import KVCache
from model import Transformer, attend, needs_own_heads

CARDS = {
    "V100": (7, 0), "T4、2080 Ti": (7, 5), "A100": (8, 0), "3090": (8, 6), "4090": (8, 9),
    "H100": (9, 0), "5090": (12, 0),
}  # fmt: skip
T = 24  # 一行的词元数


class Call(NamedTuple):
    """交给 F.scaled_dot_product_attention 的是什么。"""

    dtype: torch.dtype
    q: tuple[int, ...]
    k: tuple[int, ...]
    mask: tuple[int, ...] | None
    causal: bool
    gqa: bool


class Recorder(TorchFunctionMode):
    """记下每一次注意力的调用。"""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            mask = kwargs.get("attn_mask")
            assert k.shape == v.shape
            assert {x.stride(-1) for x in (q, k, v)} == {1}  # 各个融合算子都要
            assert mask is None or (mask.dtype == torch.bool and mask.stride(-1) == 1)
            shape = None if mask is None else tuple(mask.shape)
            causal, gqa = (kwargs.get(name, False) for name in ("is_causal", "enable_gqa"))
            self.calls.append(Call(q.dtype, tuple(q.shape), tuple(k.shape), shape, causal, gqa))
        return function(*args, **kwargs)


def chosen(card: tuple[int, int], call: Call) -> str:
    """这样的调用，在这样的显卡上会挑哪个算子（Hopper 上优先的 cuDNN 不计：没有它也要是融合的）。"""
    half = call.dtype in (torch.float16, torch.bfloat16)
    if call.mask is None and half and card >= (8, 0) and (call.gqa or call.q[1] == call.k[1]):
        return "flash"
    width = 8 if half and card >= (7, 0) else 4
    fits = call.dtype != torch.bfloat16 or card >= (8, 0)
    if fits and call.q[1] == call.k[1] and call.q[3] % width == 0:
        return "memory-efficient"
    return "math"


@pytest.fixture
def calls_of(monkeypatch):
    """没有内容的模型（只留两层）走一遍，怎样调用注意力：(预设, 用法, 精度) -> 几次 `Call`。

    形状由 "meta" 设备算出；只有 `needs_own_heads` 看到的是假的显卡上的查询。
    """

    def on_a_card(q, mask):
        with FakeTensorMode():
            return needs_own_heads(torch.empty(1, dtype=q.dtype, device="cuda"), mask)

    monkeypatch.setattr(model_module, "needs_own_heads", on_a_card)

    def run(preset: str, case: str, dtype: torch.dtype) -> list[Call]:
        config = Config(**PRESETS[preset] | {"n_layers": 2, "n_experts": 0})
        with torch.no_grad(), torch.device("meta"), Recorder() as recorder:
            model = Transformer(config).to(dtype)
            ids = torch.zeros(1 if case in ("prefill", "decode") else 2, T, dtype=torch.long)
            if case == "dense":
                model(ids)
            elif case == "segments":
                model(ids, torch.zeros_like(ids), torch.zeros_like(ids))
            else:
                cache = KVCache(config, ids.device, dtype)
                new = ids if case == "prefill" else ids[:, :1]
                model(new, torch.arange(new.size(1)), cache=cache)
        return recorder.calls

    return run


CASES = ("dense", "segments", "prefill", "decode")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("preset", ["tiny", "small", "wide", "deep"])
@pytest.mark.parametrize("case", CASES)
def test_every_use_has_a_fused_kernel_on_every_card(calls_of, preset, case, dtype):
    kind = getattr(torch, dtype)
    calls = calls_of(preset, case, kind)
    assert len(calls) == 2
    for name, card in CARDS.items():
        if kind == torch.bfloat16 and card < (8, 0):
            continue  # 没有 bf16 指令，Device 不会选它
        flash = case == "dense" and kind != torch.float32 and card >= (8, 0)
        expected = "flash" if flash else "memory-efficient"
        assert {chosen(card, call) for call in calls} == {expected}, name


def test_what_the_kernels_are_given(calls_of):
    """wide 的八个查询头共用两个键值头：有 mask 的、不是 bf16 的，键值抄成八份。"""
    bf16, fp32 = torch.bfloat16, torch.float32
    full = PRESETS["wide"]["max_len"]
    q, own, shared = (2, 8, T, 64), (2, 8, T, 64), (2, 2, T, 64)
    assert {
        (case, dtype): calls_of("wide", case, dtype)[0][1:]
        for case in CASES
        for dtype in (bf16, fp32)
    } == {
        ("dense", bf16): (q, shared, None, True, True),
        ("dense", fp32): (q, own, None, True, False),
        ("segments", bf16): (q, own, (2, 1, T, T), False, False),
        ("segments", fp32): (q, own, (2, 1, T, T), False, False),
        ("prefill", bf16): ((1, 8, T, 64), (1, 8, full, 64), (1, 1, T, full), False, False),
        ("prefill", fp32): ((1, 8, T, 64), (1, 8, full, 64), (1, 1, T, full), False, False),
        # 一个新词元：同组的四个头当作四行，不必抄
        ("decode", bf16): ((1, 2, 4, 64), (1, 2, full, 64), (1, 1, 1, full), False, False),
        ("decode", fp32): ((1, 2, 4, 64), (1, 2, full, 64), (1, 1, 1, full), False, False),
    }


@pytest.mark.parametrize("card", CARDS)
def test_shared_heads_under_a_mask_would_fall_to_the_slow_path(card):
    """不抄的后果：这正是要避开的。"""
    q, k = (2, 8, T, 64), (2, 2, T, 64)
    grouped = Call(torch.float16, q, k, (2, 1, T, T), causal=False, gqa=True)
    assert chosen(CARDS[card], grouped) == "math"
    old = Call(torch.float16, q, k, None, causal=True, gqa=True)
    assert (chosen(CARDS[card], old) == "math") == (CARDS[card] < (8, 0))


def heads(seed: int = 0):
    """查询 (2, 6, 9, 8)，键与值 (2, 2, 9, 8)，分段的 mask (2, 1, 9, 9)。"""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, 9, 8, generator=g, requires_grad=True) for n in (6, 2, 2))
    segments = torch.randint(3, (2, 9), generator=g).sort().values
    mask = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
    return (q, k, v), mask


@pytest.mark.parametrize("masked", [True, False])
def test_copied_heads_give_the_same_answer_and_gradient(monkeypatch, masked):
    """抄成每个查询头一份，得到的与共用一份的相同；梯度由几份加回一份。"""
    inputs, mask = heads()
    args = (mask, False) if masked else (None, True)
    push = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(1))

    def run(function):
        y = function(*inputs, *args)
        return y.detach(), *torch.autograd.grad(y, inputs, push)

    shared = run(attend)
    asked = []

    def always(*args):
        asked.append(args)
        return True

    monkeypatch.setattr(model_module, "needs_own_heads", always)
    own = run(attend)
    assert len(asked) == 1
    torch.testing.assert_close(own, shared, atol=1e-5, rtol=1e-5)
    compiled = run(torch.compile(attend, fullgraph=True, backend="eager"))  # 没有断开
    torch.testing.assert_close(compiled, own, atol=0, rtol=0)


def test_on_the_processor_nothing_is_copied():
    (q, *_), mask = heads()
    for dtype in (torch.float32, torch.bfloat16):
        assert not needs_own_heads(q.to(dtype), mask)
        assert not needs_own_heads(q.to(dtype), None)
