"""显微镜里看到的，就是模型真的算出来的：逐项与直接计算比较。"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config import PRESETS, Config
from microscope import anatomy, hooks, leave_one_out, logit_lens, look
from model import AttentionContext, Transformer, attend_by_hand

SHAPE = Config(
    dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=48, max_len=24, vocab_size=21248
)
EXPERTS = replace(SHAPE, hidden_dim=24, n_experts=5, n_active=2, router_scale=1.0)
IDS = [5, 9, 9, 300, 7, 2, 21000]


@pytest.fixture(scope="module", params=[SHAPE, EXPERTS], ids=["dense", "experts"])
def shape(request) -> Config:
    """稠密的与专家混合的。"""
    return request.param


@pytest.fixture(scope="module")
def model(shape) -> Transformer:
    """没训练过，但每层都真的做事的小模型（出厂时残差支路是零）。"""
    torch.manual_seed(0)
    model = Transformer(shape).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def view(model):
    """看一遍。"""
    return look(model, IDS)


def forward(model, ids, positions=None):
    """普通的前向，(T, V)。"""
    positions = None if positions is None else torch.tensor([positions])
    with torch.no_grad():
        return model(torch.tensor([ids]), positions)[0]


def test_probabilities_are_the_softmax_of_the_models_logits(model, view):
    assert torch.equal(view.logits, forward(model, IDS))
    assert torch.allclose(view.logits.softmax(-1).sum(-1), torch.ones(len(IDS)))


def test_the_attention_shown_is_the_attention_used(model, view):
    """手算每一层：投影、归一、旋转、内积、softmax；再用它把值加起来，就是那一层的输出。"""
    positions = torch.arange(len(IDS))
    cos, sin = model.rotary(positions)
    x = view.residual[:1]
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            a, T = block.attention, len(IDS)
            y = block.attention_norm(x)
            q, k, v = (
                project(y).view(1, T, -1, a.head_dim).transpose(1, 2)
                for project in (a.query, a.key, a.value)
            )
            q, k = (
                model.rotary.rotate(norm(z), cos, sin)
                for norm, z in ((a.query_norm, q), (a.key_norm, k))
            )
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            scores = (q @ k.mT / a.head_dim**0.5).masked_fill(~torch.ones(T, T).tril().bool(), -1e9)
            weights = scores.softmax(-1)
            assert torch.allclose(view.attention[layer], weights[0], atol=1e-6)
            mixed = a.out((view.attention[layer] @ v[0]).transpose(0, 1).reshape(1, T, -1))
            assert torch.allclose(mixed.norm(dim=-1)[0], view.writes[layer, 0], rtol=1e-4)
            x = x + mixed
            more = block.feed_forward(block.feed_forward_norm(x))
            assert torch.allclose(more.norm(dim=-1)[0], view.writes[layer, 1], rtol=1e-3)
            x = x + more
            assert torch.allclose(x[0], view.residual[layer + 1], rtol=1e-3, atol=1e-3)


def test_attention_sums_to_one_and_never_looks_ahead(view):
    assert torch.allclose(view.attention.sum(-1), torch.ones(view.attention.shape[:3]))
    assert torch.equal(view.attention, view.attention.tril())


def test_the_first_row_is_the_embedding_and_the_last_lens_row_is_the_output(model, view):
    assert torch.equal(view.residual[0], model.embedding.weight[IDS])
    lens = logit_lens(model, view.residual)
    assert lens.shape == (SHAPE.n_layers + 1, len(IDS), SHAPE.vocab_size)
    assert torch.equal(lens[-1], view.logits)
    assert not torch.allclose(lens[-2], view.logits, atol=1e-2)


def test_the_lens_shows_a_model_that_really_stops_there(model, view, shape):
    """把后面的层拿掉，输出就是透镜里的那一行。"""
    shorter = Transformer(replace(shape, n_layers=2))
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.2.")}
    shorter.load_state_dict(kept)
    lens = logit_lens(model, view.residual)
    assert torch.allclose(lens[2], forward(shorter, IDS), atol=1e-4)


def test_leaving_one_out_is_reading_without_it(model):
    """每一格都与真的少一个词元、其余留在原位的一次前向相同。"""
    targets = [3, 1, 4, 1, 5, 9, 2]
    found = leave_one_out(model, IDS, targets)
    n = len(IDS)
    for i in range(n):
        places = [p for p in range(n) if p != i]
        logp = forward(model, [IDS[p] for p in places], places).log_softmax(-1)
        for t in range(n):
            if t < i or (i == 0 and t == 0):
                assert found[i, t].isnan()
            else:
                assert found[i, t] == pytest.approx(logp[t - 1, targets[t]].item(), abs=1e-4)


@given(st.integers(1, 40))
def test_how_many_at_once_does_not_change_the_result(model, most):
    targets = [3, 1, 4, 1, 5, 9, 2]
    whole = leave_one_out(model, IDS, targets)
    assert torch.allclose(leave_one_out(model, IDS, targets, most), whole, 1e-4, equal_nan=True)


def test_one_token_alone(model):
    view = look(model, [5])
    assert view.attention.shape == (3, 4, 1, 1) and (view.attention == 1).all()
    assert leave_one_out(model, [5], [7]).isnan().all()


def test_the_hooks_are_gone_afterwards(model):
    before = forward(model, IDS)
    with pytest.raises(RuntimeError, match="坏了"), hooks(model):
        raise RuntimeError("坏了")
    look(model, IDS)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(forward(model, IDS), before)


@pytest.mark.parametrize("preset", ["tiny", "small", "wide", "deep"])
def test_parameters_and_operations_add_up(preset):
    """逐项相加等于整个模型；矩阵乘法是 2 × 行 × 入 × 出，注意力是 2 × 2 × H × T × T × D。"""
    config, T = Config(**PRESETS[preset]), 10
    parts = {part.name: part for part in anatomy(config, T)}
    times = {name: config.n_layers if name.startswith("blocks") else 1 for name in parts}
    with torch.device("meta"):
        whole = Transformer(config)
    params = sum(p.numel() for p in whole.parameters())
    assert sum(times[n] * part.params for n, part in parts.items()) == params
    C, hidden = config.dim, config.hidden_dim
    kv = C // config.n_heads * config.n_kv_heads
    expected = {
        "query": C * C, "key": C * kv, "value": C * kv, "out": C * C,
        "gate": C * hidden, "up": C * hidden, "down": C * hidden,
    }  # fmt: skip
    for name, part in parts.items():
        if (last := name.rpartition(".")[2]) in expected:
            assert part.flops == 2 * T * expected[last] == 2 * T * part.params, name
    assert parts["blocks.0.attention"].flops == 2 * 2 * T * T * C
    assert parts["score"].flops == 2 * T * C * config.vocab_size
    assert parts["score"].shape == (T, config.vocab_size)
    assert parts["blocks.0.attention.query_norm"].shape == (config.n_heads, T, C // config.n_heads)
    assert len(parts) == 15


def test_every_part_of_the_model_is_in_the_table(model, shape):
    """模型里添了新零件，表里也要有。"""
    names = {part.name for part in anatomy(shape, 3)}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            assert name.replace("blocks.1.", "blocks.0.").replace("blocks.2.", "blocks.0.") in names


def test_the_experts_shown_are_the_experts_used(model, view, shape):
    """路由器的打分手算一遍：显示的几位就是概率最大的几位，用它们拼出的就是那一层的输出。"""
    if not shape.n_experts:
        assert view.experts is None
        return
    assert view.experts.shape == (3, len(IDS), 5)
    assert ((view.experts > 0).sum(-1) == 2).all()
    with torch.no_grad():
        for n, block in enumerate(model.blocks):
            layer = block.feed_forward
            places = torch.arange(len(IDS))
            context = AttentionContext(*model.rotary(places), None, True, places, None)
            before = view.residual[n][None]
            middle = before + block.attention(block.attention_norm(before), context)
            x = block.feed_forward_norm(middle)[0]
            best = (x @ layer.router.weight.T).topk(2).indices
            assert (view.experts[n].gather(1, best) > 0).all()
            every = torch.stack([layer.expert(e, x) for e in range(5)], dim=1)  # (T, E, C)
            mixed = (every * view.experts[n][..., None]).sum(1)
            assert torch.allclose(mixed.norm(dim=-1), view.writes[n, 1], rtol=1e-3)


@pytest.mark.parametrize("preset", ["tiny-moe", "moe"])
def test_the_operations_of_experts_are_those_of_the_chosen_few(preset):
    """参数是全体的，运算只有挑中的几位的。"""
    config, T = Config(**PRESETS[preset]), 10
    for n in (1, T):
        parts = {part.name: part for part in anatomy(config, n)}
        layer, router = (parts[f"blocks.0.feed_forward{x}"] for x in ("", ".router"))
        one = 3 * config.dim * config.hidden_dim
        assert layer.params == config.n_experts * one
        assert layer.flops == 2 * n * config.n_active * one
        assert router.flops == 2 * n * router.params == 2 * n * config.dim * config.n_experts
    assert layer.shape == (T, config.dim) and router.shape == (T, config.n_experts)
    with torch.device("meta"):
        whole = sum(p.numel() for p in Transformer(config).parameters())
    times = {name: config.n_layers if name.startswith("blocks") else 1 for name in parts}
    assert sum(times[n] * part.params for n, part in parts.items()) == whole


def test_padding_the_attention_values_with_zeros_does_not_matter(model, view):
    """权重只由查询与键决定：显微镜里用零代替值来算，得到的是同样的权重。"""
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    zeros = attend_by_hand(q, k, torch.zeros_like(v), None, True)[1]
    assert torch.equal(zeros, attend_by_hand(q, k, v, None, True)[1])
