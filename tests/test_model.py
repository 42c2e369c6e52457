"""模型：与外面的实现一致，因果、缓存、分段都严格成立。"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import model as model_module
from config import PRESETS, Config
from generate import KVCache
from model import RotaryEmbedding, Transformer, attend, attend_by_hand
from tools.huggingface.shapes import qwen3

# 小到一眨眼就算完；四个查询头共用两个键值头，才考得到分组。
SMALL = Config(
    dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=48, max_len=32, vocab_size=97
)
SHAPES = {
    "dense": SMALL,
    "experts": replace(SMALL, hidden_dim=24, n_experts=4, n_active=2, router_scale=1.0),
}


@pytest.fixture(params=SHAPES)
def shape(request):
    """稠密的与专家混合的，同样的要求。"""
    return SHAPES[request.param]


@pytest.fixture
def equal(shape):
    """逐位相同；专家混合的，交给同一位专家的行数变了，矩阵乘法的舍入也会变，差一点点。"""
    tolerance = 1e-5 if shape.n_experts else 0
    return partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance)


@pytest.fixture
def small(shape):
    """一个小模型；零初始化的投影换成随机数，否则各层什么也不做，考不出对错。"""
    torch.manual_seed(0)
    model = Transformer(shape).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def ids_like(batch, length, seed=1):
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("preset", "millions"), [("small", 8.45), ("wide", 36.6), ("deep", 88.0)])
def test_parameter_counts(preset, millions):
    config = Config(**PRESETS[preset])
    with torch.device("meta"):
        count = sum(p.numel() for p in Transformer(config).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("preset", ["tiny", "wide"])
def test_untrained_loss_is_ln_vocabulary(preset):
    """每个词元给自己打的分约是 0.02 × 宽度；tiny 的可以不计，wide 的要算上。"""
    torch.manual_seed(0)
    config = Config(**PRESETS[preset])
    ids = torch.randint(config.vocab_size, (2, 64))
    logits = Transformer(config)(ids)[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    expected = math.log(config.vocab_size + math.exp(0.02 * config.dim))
    assert loss.item() == pytest.approx(expected, abs=0.15)
    assert (expected - math.log(config.vocab_size) < 0.01) == (preset == "tiny")


def test_same_logits_as_qwen3_of_transformers(small, shape):
    """外面的标准答案：同样的权重装进 transformers 的 Qwen3，打分相同。"""
    theirs = qwen3(shape, small.state_dict()).eval()
    ids = ids_like(2, 20)
    torch.testing.assert_close(small(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_compiled_bf16_attention_on_cpu_is_the_one_by_hand(monkeypatch, kind, causal):
    """编译 bf16 时换一条路：结果与融合算子相同；fp32 仍走融合算子，那样更快。"""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, generator=g).to(getattr(torch, kind)) for h in (4, 2, 2))
    mask = None if causal else torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    fused = attend(q, k, v, mask, causal)
    used = []

    def spy(*args):
        used.append(True)
        return attend_by_hand(*args)

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(model_module, "attend_by_hand", spy)
    torch.testing.assert_close(attend(q, k, v, mask, causal), fused, atol=0.03, rtol=0)
    assert bool(used) == (kind == "bfloat16")


def test_attention_by_hand_equals_the_fast_one():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, generator=g)
    k, v = torch.randn(2, 2, 2, 9, 8, generator=g)
    mask = torch.rand(2, 1, 9, 9, generator=g) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)  # 每个位置至少看得见自己
    for chosen, causal in ((None, False), (None, True), (mask, False)):
        by_hand, weights = attend_by_hand(q, k, v, chosen, causal)
        torch.testing.assert_close(attend(q, k, v, chosen, causal), by_hand)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
        if causal:
            assert (weights.triu(1) == 0).all()


def test_one_new_token_whatever_layout_the_kernel_returns(monkeypatch):
    """显卡上的融合算子返回的内存次序与 CPU 的不同，不能直接当作别的形状看。"""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 1, 8, generator=g)
    k, v = torch.randn(2, 1, 2, 9, 8, generator=g)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    expected = attend(q, k, v, mask, False)
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        model_module.F,
        "scaled_dot_product_attention",
        lambda *a, **b: real(*a, **b).transpose(1, 2).contiguous().transpose(1, 2),
    )
    torch.testing.assert_close(attend(q, k, v, mask, False), expected)


def test_whole_model_by_hand_equals_the_fast_one(small, monkeypatch):
    fast = small(ids_like(2, 16))
    monkeypatch.setattr(model_module, "attend", lambda *args: attend_by_hand(*args)[0])
    torch.testing.assert_close(small(ids_like(2, 16)), fast, atol=1e-5, rtol=1e-5)


def test_the_future_does_not_change_the_past(small, equal):
    ids = ids_like(1, 16)
    changed = ids.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 97
    before, after = small(ids), small(changed)
    equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(-1).min() > 0


def test_cached_logits_equal_uncached_at_every_step(small):
    ids = ids_like(2, 24)
    whole = small(ids)
    cache = KVCache(SMALL, torch.device("cpu"), torch.float32, batch=2)
    start = 0
    for length in (5, 1, 1, 4, 1, 7, 1, 1, 1, 1, 1):  # 整段、单个、缓存里已有前文时的整段
        end = start + length
        for visible in (32, end):  # 看全部格子，或只看写过的，结果一样
            cache.visible = visible
            logits = small(ids[:, start:end], torch.arange(start, end), cache=cache)
            torch.testing.assert_close(logits, whole[:, start:end], atol=2e-5, rtol=1e-4)
        start = end
    assert start == 24


def test_segments_do_not_see_each_other(small, equal):
    """拼在一行的两段对话：改动一段，另一段的打分一位都不变，并且等于它单独算。"""
    a, b = ids_like(1, 7, seed=1), ids_like(1, 9, seed=2)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    segments = torch.tensor([[0] * 7 + [1] * 9])
    packed = small(torch.cat([a, b], dim=1), positions, segments)
    changed = small(torch.cat([(a + 1) % 97, b], dim=1), positions, segments)
    equal(packed[:, 7:], changed[:, 7:])
    torch.testing.assert_close(packed[:, :7], small(a), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 7:], small(b), atol=1e-5, rtol=1e-5)


def test_rotation_depends_on_relative_positions_only():
    rotary = RotaryEmbedding(8, 32, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        turned = (
            RotaryEmbedding.rotate(x, *rotary(torch.tensor([p]))) for x, p in ((q, i), (k, j))
        )
        return (next(turned) * next(turned)).sum().item()

    assert score(3, 1) == pytest.approx(score(20, 18), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_too_long_input_is_named(small):
    with pytest.raises(ValueError, match="词元数 33 超过模型的最大长度 32"):
        small(ids_like(1, 33))


def test_gradients_reach_every_parameter(small):
    small(ids_like(2, 8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())
