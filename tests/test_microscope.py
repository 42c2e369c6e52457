"""显微镜里看到的，就是模型真的算出来的：逐项与直接计算比较。"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config import PRESETS, Config, UserError
from microscope import hooks, leave_one_out, logit_lens, look, patched, without
from model import AttentionContext, Transformer, attend_by_hand
from tools.explain.anatomy import anatomy

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


# ---------- 动手改 ----------


def by_hand(model, ids, silent=(), vector=None):
    """不用钩子，一层一层手算；silent 里的零件不说话，vector 是 (层, 位置, 向量)。"""
    T, H = len(ids), SHAPE.n_heads
    context = AttentionContext(*model.rotary(torch.arange(T)), None, True, torch.arange(T), None)
    x = model.embedding(torch.tensor([ids]))
    for n, block in enumerate(model.blocks, start=1):
        a, h = block.attention, block.attention_norm(x)
        q, k, v = (
            p(h).view(1, T, -1, a.head_dim).transpose(1, 2) for p in (a.query, a.key, a.value)
        )
        q = model.rotary.rotate(a.query_norm(q), context.cos, context.sin)
        k = model.rotary.rotate(a.key_norm(k), context.cos, context.sin)
        y, _ = attend_by_hand(q, k, v, None, True)
        heard = torch.tensor([f"{n}.{head + 1}" not in silent for head in range(H)])
        y = a.out((y * heard[:, None, None]).transpose(1, 2).reshape(1, T, -1))
        x = x + y * (f"{n}.attention" not in silent)
        h, f = block.feed_forward_norm(x), block.feed_forward
        if hasattr(f, "router"):
            probs = f.router(h).softmax(-1)
            weights, chosen = probs.topk(f.n_active, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
            y = torch.zeros_like(x)
            for t in range(T):
                for w, e in zip(weights[0, t], chosen[0, t].tolist(), strict=True):
                    if f"{n}.expert{e + 1}" not in silent:
                        y[0, t] += w * f.expert(e, h[0, t])
        else:
            y = f(h)
        x = x + y * (f"{n}.feed_forward" not in silent)
        if vector is not None and vector[0] == n:
            x[:, vector[1]] = vector[2]
    return model.score(model.norm(x))[0]


def parts_of(model):
    """这个模型里能关掉的零件，各一个，连同几个一起关的。"""
    some = [["2.3"], ["1.1", "3.4"], ["2.attention"], ["1.feed_forward"], ["1.attention", "2.1"]]
    return [*some, ["2.expert3"], ["1.expert1", "1.expert2", "3.1"]] if has_experts(model) else some


def has_experts(model):
    return hasattr(model.blocks[0].feed_forward, "router")


@torch.no_grad()
def test_a_part_switched_off_says_nothing(model):
    """与不用钩子、一层层手算的相同；确实变了；离开之后一点不剩。"""
    before = forward(model, IDS)
    for names in parts_of(model):
        with without(model, names):
            got = forward(model, IDS)
        assert torch.allclose(got, by_hand(model, IDS, names), atol=1e-4), names
        assert (got - before).abs().max() > 1e-3, names
        assert torch.equal(forward(model, IDS), before), names


@torch.no_grad()
def test_every_part_off_leaves_the_embedding(model):
    """全关掉，残差流里只剩词嵌入。"""
    all_parts = [f"{n}.{part}" for n in (1, 2, 3) for part in ("attention", "feed_forward")]
    with without(model, all_parts):
        assert torch.equal(look(model, IDS).residual[3], model.embedding(torch.tensor(IDS)))


@torch.no_grad()
def test_a_vector_carried_over(model):
    """搬来的向量接着往上读，前面的位置不受影响；搬自己的等于没有搬。"""
    other = look(model, [8, 8, 300, 4]).residual[2, 3]
    with patched(model, 2, 4, other):
        got = forward(model, IDS)
    assert torch.allclose(got, by_hand(model, IDS, vector=(2, 4, other)), atol=1e-4)
    plain = forward(model, IDS)
    assert torch.equal(got[:4], plain[:4]) and (got[4:] - plain[4:]).abs().max() > 1e-3
    with patched(model, 2, 4, look(model, IDS).residual[2, 4]):
        assert torch.allclose(forward(model, IDS), plain, atol=1e-5)


@torch.no_grad()
def test_a_vector_goes_to_its_position_not_its_place(model):
    """前面去掉了两个词元，位置仍是原来的编号：换的是位置 4，不是第 5 个。"""
    other = torch.full((SHAPE.dim,), 0.5)
    with patched(model, 3, 4, other):
        x = model.hidden(torch.tensor([IDS[2:]]), torch.arange(2, len(IDS))[None])
    assert torch.allclose(x[0, 2], model.norm(other), atol=1e-6)


def test_an_error_inside_still_restores(model):
    before = forward(model, IDS)
    with pytest.raises(ZeroDivisionError), without(model, ["1.2", parts_of(model)[-1][0]]):
        raise ZeroDivisionError
    assert torch.equal(forward(model, IDS), before)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("2.5", "每层有 4 个头"), ("2.0", "每层有 4 个头"), ("4.1", "没有第 4 层"),
        ("0.attention", "没有第 0 层"), ("2", "看不懂"), ("2.ffn", "看不懂"), ("", "看不懂"),
        ("２.1", "看不懂"), ("9" * 9 + ".1", "看不懂"),
    ],
)  # fmt: skip
def test_parts_that_are_not_there(model, name, sentence):
    with pytest.raises(UserError, match=sentence), without(model, [name]):
        pass


def test_experts_that_are_not_there(model):
    sentence = "每层有 5 个专家" if has_experts(model) else "没有专家"
    with pytest.raises(UserError, match=sentence), without(model, ["1.expert6"]):
        pass
    with pytest.raises(UserError, match="没有第 7 层"), patched(model, 7, 0, torch.zeros(32)):
        pass
