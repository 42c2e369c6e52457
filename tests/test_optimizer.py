"""参数的更新：学习率的曲线，Muon 与官方的一致，每个参数恰好归一个优化器。"""

import itertools
from dataclasses import replace

import pytest
import torch

from config import Config
from model import Transformer
from optimizer import Muon, build_optimizer, learning_rate, orthogonalize

SMALL = Config(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, max_len=16, vocab_size=64,
    device="cpu", dtype="float32", compile=False, muon_momentum=0.9, residual_lr_scale=1.0,
)  # fmt: skip


def test_learning_rate_rises_stays_and_falls():
    curve = [learning_rate(step, 100, 0.1, 0.5) for step in range(100)]
    assert curve[0] == pytest.approx(0.1)
    assert curve[9:51] == [1.0] * 42
    assert all(a > b for a, b in itertools.pairwise(curve[50:]))
    assert 0 < curve[-1] <= 0.02
    assert learning_rate(0, 1, 0.03, 0.5) > 0  # 只有一步也要学得动


@pytest.mark.parametrize("momentum", [0.9, 0.95])
def test_muon_equals_the_one_of_torch_step_by_step(momentum):
    torch.manual_seed(0)
    shapes = [(6, 10), (10, 6), (6, 10), (8, 8)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.02, momentum=momentum, weight_decay=0.1, dtype=torch.bfloat16)
    b = torch.optim.Muon(
        theirs, lr=0.02, momentum=momentum, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, atol=2e-3, rtol=0)  # bf16 的舍入次序不同


def test_each_expert_is_a_matrix_of_its_own():
    """叠在一起的三维参数，与把各位专家的矩阵拆开、各走各的，逐步相同。"""
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 6, 10))
    apart = [torch.nn.Parameter(m.clone()) for m in stack.detach()]
    a, b = (
        Muon(some, lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
        for some in ([stack], apart)
    )
    for _ in range(3):
        stack.grad = torch.randn_like(stack) * torch.tensor([1.0, 100, 0.01])[:, None, None]
        for p, g in zip(apart, stack.grad, strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
        torch.testing.assert_close(stack.detach(), torch.stack([*apart]).detach())


def test_orthogonalized_singular_values_are_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16), (1, 16, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), torch.float32))
        assert values.max() < 1.3
        assert values.min() > 0.2


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_is_enough_whatever_the_size_of_the_gradient(scale, dtype, error):
    """先归一再换精度：没有归一的，fp16 装不下，太小的又成了零。"""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 512) * scale
    exact = orthogonalize(x, torch.float32)
    torch.testing.assert_close(orthogonalize(x, dtype).float(), exact, atol=error, rtol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(4, 64, 192), (2, 192, 576), (3, 48, 48)])
def test_all_steps_at_once_equal_one_step_at_a_time(shape, scale):
    """fp32 先在小矩阵上连乘，fp64 一步步走；奇异值从 1 到 1e-7，最小的 gram 里看不见。"""
    torch.manual_seed(0)
    n, rows, columns = shape
    left = torch.linalg.qr(torch.randn(n, rows, rows, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, columns, rows, dtype=torch.float64))[0].mT
    x = scale * (left * torch.logspace(0, -7, rows, dtype=torch.float64)) @ right
    slowly = orthogonalize(x, torch.float64)
    torch.testing.assert_close(
        orthogonalize(x.float(), torch.float32).double(), slowly, atol=3e-4, rtol=0
    )
    assert not orthogonalize(torch.zeros(shape), torch.float32).any()


def test_every_neuron_takes_the_same_step():
    """高的矩阵（门）按行，矮的（投影回来）按列：前馈层的一个神经元，步子与别的一样大；整个的大小不变。"""
    torch.manual_seed(0)
    tall, wide = (torch.nn.Parameter(torch.zeros(s)) for s in ((40, 16), (16, 40)))
    plain, even = (
        Muon([tall, wide], lr=1.0, momentum=0.0, weight_decay=0.0, dtype=torch.float32, beta2=beta2)
        for beta2 in (0.0, 0.9)
    )
    grads = [torch.randn(40, 16) * torch.linspace(0.1, 3, 40)[:, None], torch.randn(16, 40)]
    steps = []
    for muon in (plain, even):
        for p, g in zip((tall, wide), grads, strict=True):
            p.grad = g.clone()
            p.data.zero_()
        muon.step()
        steps.append((tall.detach().clone(), wide.detach().clone()))
    for before, after in zip(*steps, strict=True):
        torch.testing.assert_close(before.norm(), after.norm())
    for before, after, dim in zip(*steps, (1, 0), strict=True):
        assert before.norm(dim=dim).std() > 0.1 * before.norm(dim=dim).mean()
        torch.testing.assert_close(
            after.norm(dim=dim), after.norm(dim=dim).mean().expand(40), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("heads", [True, False])
def test_even_steps_are_those_of_one_matrix_at_a_time(heads):
    """叠在一起算的，与逐个矩阵照算式走的，几步都相同；按头切开的，一个头是一个矩阵。"""
    torch.manual_seed(0)
    config = replace(SMALL, muon_heads=heads, muon_beta2=0.9, weight_decay=0.0)
    model = Transformer(config)
    attention, feed = model.blocks[0].attention, model.blocks[0].feed_forward
    chosen = {feed.gate.weight: "tall", feed.down.weight: "wide", attention.query.weight: "heads"}
    muon = build_optimizer(model, config, 0.01).muon
    momentum = {p: torch.zeros_like(p) for p in chosen}
    second: dict[tuple, torch.Tensor] = {}
    for _ in range(4):
        for p in muon.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        expected = {}
        for p, kind in chosen.items():
            momentum[p] = 0.9 * momentum[p] + 0.1 * p.grad
            update = 0.1 * p.grad + 0.9 * momentum[p]
            pieces = list(update.split(8)) if kind == "heads" and heads else [update]
            for i, piece in enumerate(pieces):
                tall = piece.size(0) > piece.size(1)
                x = piece.T if tall else piece
                x = orthogonalize(x[None], torch.float32)[0]
                v = second.get((p, i), torch.zeros(x.size(1)))
                second[p, i] = v = 0.9 * v + 0.1 * x.square().mean(0)
                y = x / v.sqrt() * v.mean().sqrt() * 0.2 * max(x.shape) ** 0.5
                pieces[i] = y.T if tall else y
            expected[p] = p.detach() - 0.01 * torch.cat(pieces)
        muon.step()
        for p, value in expected.items():
            torch.testing.assert_close(p.detach(), value)


def test_a_matrix_without_gradient_does_not_move_evenly_either():
    """刚出生时，投影回来的是零，前馈层的梯度也全是零：除以零的大小，不能成了 NaN。"""
    p = torch.nn.Parameter(torch.ones(2, 3))
    muon = Muon([p], lr=1.0, momentum=0.9, weight_decay=0.0, dtype=torch.float32, beta2=0.95)
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        muon.step()
    torch.testing.assert_close(p.detach(), torch.ones(2, 3))


@pytest.mark.parametrize("experts", [0, 4])
def test_what_is_written_to_the_residual_stream_takes_smaller_steps(experts):
    """同样的梯度，注意力与前馈层（或各位专家）的最后一个投影走一半，别的参数不受影响。"""

    def step(scale: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        config = replace(
            SMALL, residual_lr_scale=scale, weight_decay=0.0, n_experts=experts, n_active=2,
            router_scale=1.0,
        )  # fmt: skip
        model = Transformer(config)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        build_optimizer(model, config, 0.01).step()
        return {name: p.detach() - start[name] for name, p in model.named_parameters()}

    whole, half = step(1.0), step(0.5)
    for name, moved in half.items():
        writes = name.startswith("blocks.") and (".out." in name or ".down" in name)
        torch.testing.assert_close(moved, whole[name] * (0.5 if writes else 1.0))
    assert sum(".out." in name or ".down" in name for name in half) == 2 * SMALL.n_layers


def test_every_parameter_has_exactly_one_optimizer():
    model = Transformer(SMALL)
    optimizer = build_optimizer(model, SMALL, 0.01)
    muon, adamw = optimizer.muon, optimizer.adamw
    groups = [p for o in (muon, adamw) for g in o.param_groups for p in g["params"]]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [*map(id, groups)]
    assert sorted(map(id, groups)) == sorted(map(id, model.parameters()))
    matrices = muon.param_groups[0]["params"]
    assert all(p.ndim == 2 for p in matrices)
    assert len(matrices) == 7 * SMALL.n_layers
    assert all(p is not model.embedding.weight for p in matrices)


def test_experts_are_matrices_too():
    """各位专家的矩阵与路由器都归 Muon。"""
    config = replace(SMALL, n_experts=4, n_active=2, router_scale=1.0)
    muon = build_optimizer(model := Transformer(config), config, 0.01).muon
    shapes = [tuple(p.shape) for p in muon.param_groups[0]["params"]]
    assert shapes.count((4, 24, 16)) == 2 * 2 and shapes.count((4, 16, 24)) == 2
    assert sum(p.numel() for p in muon.param_groups[0]["params"]) == sum(
        p.numel() for p in model.blocks.parameters() if p.ndim > 1
    )


def test_a_router_starts_small_and_takes_small_steps():
    """同一份随机数、同样的梯度，路由器的起点与一步都恰好是五分之一；别的参数不受影响。"""

    def start_and_step(router_scale: float) -> dict[str, tuple]:
        torch.manual_seed(0)
        config = replace(
            SMALL, n_experts=4, n_active=2, weight_decay=0.0, router_scale=router_scale
        )
        model = Transformer(config)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        build_optimizer(model, config, 0.01).muon.step()
        return {n: (start[n], p.detach() - start[n]) for n, p in model.named_parameters()}

    whole, fifth = start_and_step(1.0), start_and_step(0.2)
    for name in whole:
        factor = 0.2 if "router" in name else 1.0
        for a, b in zip(fifth[name], whole[name], strict=True):
            torch.testing.assert_close(a, b * factor, rtol=1e-3, atol=1e-6)
    assert any("router" in name and step.abs().max() > 1e-4 for name, (_, step) in fifth.items())
