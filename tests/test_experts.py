"""专家混合：快的一份等于看得懂的一份，均衡损失等于它的定义，训练、接着练与聊天都走得通。"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import loss_of
from scripts import QUICK, Running, assert_same_run, last_step, metrics, run, run_two

from config import PRESETS, Config, UserError
from dataset import IGNORE, Batch
from engine.device import Device, compile_if_possible
from engine.distributed import World
from engine.expert_load import ExpertLoad, expert_loads, rebalance
from engine.shared_row import tie_unused_rows
from experts import MixtureOfExperts, Routing, has_grouped_mm, mix_by_hand, mix_grouped, route
from loss import Loss, evaluate
from model import FeedForward, Transformer
from settings.resolve import load_config
from tools.bench.ours import Ours

SMALL = Config(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, n_experts=5, n_active=2,
    router_scale=1.0,
    max_len=32, vocab_size=97, device="cpu", dtype="float32", compile=False,
)  # fmt: skip
NAMES = ("train_loss", "val_loss", "balance_loss")


def layer_of(seed: int = 0, **changes) -> MixtureOfExperts:
    """参数随机的一层。"""
    torch.manual_seed(seed)
    layer = MixtureOfExperts(replace(SMALL, **changes))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer


def model_of(seed: int = 0, **changes) -> Transformer:
    """每层都真的做事的小模型。"""
    torch.manual_seed(seed)
    model = Transformer(replace(SMALL, **changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def batch_of(rows: int, seed: int = 0) -> Batch:
    """随机的一批，一部分位置不算损失。"""
    g = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(97, (2, rows, 12), generator=g)
    targets[torch.rand(rows, 12, generator=g) < 0.3] = IGNORE
    return Batch(ids, targets)


# ---------- 两份算法 ----------


@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 8).flatmap(
        lambda e: st.tuples(st.just(e), st.integers(1, e))
    ),
)  # fmt: skip
def test_the_fast_one_equals_the_one_by_hand(seed, n, experts):
    """输出与每个梯度都相同；有的专家一个词元也没有，也一样。"""
    layer = layer_of(seed, n_experts=experts[0], n_active=experts[1])
    results = []
    for fast in (True, False):
        x = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        layer.zero_grad()
        _, weights, chosen = route(layer.router(x), experts[1])
        if fast:
            y = mix_grouped(x, weights, chosen, layer.gate, layer.up, layer.down)
        else:
            y = mix_by_hand(x, weights, chosen, layer.expert)
        y.square().sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]
        results.append([y, x.grad, *(g.clone() for g in grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_every_token_goes_to_its_likeliest_experts_and_none_is_dropped():
    """从定义直接算：概率最大的几位各算一遍，权重是它们的概率除以概率之和。"""
    layer = layer_of()
    x = torch.randn(1, 7, 16)
    y = layer(x)[0]
    for t in range(7):
        p = layer.router(x[0, t]).softmax(-1)
        best = sorted(range(5), key=lambda e: -p[e])[:2]
        expected = sum(p[e] / p[best].sum() * layer.expert(e, x[0, t][None])[0] for e in best)
        torch.testing.assert_close(y[t], expected, rtol=1e-4, atol=1e-5)


def test_one_expert_that_takes_everything_is_the_dense_layer():
    layer = layer_of(n_experts=1, n_active=1)
    dense = FeedForward(SMALL)
    for name in ("gate", "up", "down"):
        getattr(dense, name).weight.data.copy_(getattr(layer, name)[0])
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


def test_one_token_alone_is_the_same_as_in_a_crowd():
    """逐个生成时走另一条路，结果相同；训练时哪怕一行一个词元，梯度也在。"""
    layer = layer_of()
    x = torch.randn(1, 6, 16)
    whole = layer(x)
    for t in range(6):
        torch.testing.assert_close(layer(x[:, t : t + 1]), whole[:, t : t + 1])


@pytest.mark.parametrize(
    ("device", "dtype", "there"),
    [("cpu", "float32", True), ("cpu", "bfloat16", True), ("cuda", "bfloat16", True),
     ("cuda", "float16", False), ("cuda", "float32", False), ("mps", "float32", False),
     ("mps", "bfloat16", False), ("meta", "bfloat16", True)],
)  # fmt: skip
def test_where_the_fast_one_is_used(device, dtype, there):
    assert has_grouped_mm(torch.device(device), getattr(torch, dtype)) == there


@pytest.mark.parametrize("autocast", [False, True])
def test_which_way_a_layer_takes(monkeypatch, autocast):
    """没有 grouped_mm 的设备走看得懂的一份；autocast 之下，专家的乘法也是半精度的。"""
    layer, x = layer_of(), torch.randn(2, 6, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fast = layer(x)
        monkeypatch.setattr("experts.has_grouped_mm", lambda *_: False)
        monkeypatch.setattr("experts.mix_grouped", None)
        slow = layer(x)
    assert fast.dtype == slow.dtype == torch.float32
    tolerance = 0.3 if autocast else 1e-5
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    assert not torch.equal(fast, fast.bfloat16().float())  # 相加仍是 fp32


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [1, 37, 512])
def test_the_fast_one_on_a_gpu(n_tokens):
    """长短不齐的队，前向与每个矩阵的梯度，都与逐位算的（fp32）相近；没有谁去的专家，梯度是零。"""
    layer = layer_of(hidden_dim=32).cuda()
    weights_of = ("gate", "up", "down")
    x = torch.randn(n_tokens, 16, device="cuda")
    _, weights, chosen = route(layer.router(x), 2)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        layer.zero_grad()
        rows = x.to(dtype).requires_grad_()
        if dtype == torch.bfloat16:
            stacks = (getattr(layer, name) for name in weights_of)
            y = mix_grouped(rows, weights.detach(), chosen, *stacks)
        else:
            y = mix_by_hand(rows, weights.detach(), chosen, layer.expert)
        y.square().sum().backward()
        grads = [getattr(layer, name).grad for name in weights_of]
        found.append([t.float() for t in (y, rows.grad, *grads)])
    for fast, slow in zip(*found, strict=True):
        assert (fast - slow).norm() <= 0.02 * slow.norm()
    idle = [e for e in range(SMALL.n_experts) if e not in chosen]
    assert not any(grad[idle].any() for grad in found[0][2:])


@pytest.mark.parametrize(("moe", "dense"), [("tiny-moe", "tiny"), ("moe", "wide")])
def test_the_presets_have_the_active_parameters_of_their_dense_twins(moe, dense):
    """每个词元用到的参数，只多一个路由器；总数多好几倍。"""
    shapes = [Config(**PRESETS[name]) for name in (moe, dense)]
    with torch.device("meta"):
        counts = [sum(p.numel() for p in Transformer(c).parameters()) for c in shapes]
    c = shapes[0]
    idle = c.n_layers * 3 * c.dim * c.hidden_dim * (c.n_experts - c.n_active)
    routers = c.n_layers * c.dim * c.n_experts
    assert counts[0] - idle - routers == counts[1]
    assert c.active_width() == shapes[1].active_width() == shapes[1].hidden_dim
    assert counts[0] > 1.6 * counts[1]


# ---------- 均衡 ----------


def penalty_gradient(
    model: Transformer, parts: list[Batch], load: ExpertLoad
) -> list[torch.Tensor]:
    """几个小批累积起来，只由负载均衡损失来的梯度（与系数为零的之差）。"""
    grads = []
    for coefficient in (0.5, 0.0):
        model.zero_grad()
        for block in model.blocks:
            block.feed_forward.balance_coef = coefficient
        rebalance(model, load)
        for batch in parts:
            loss_of(model, batch).backward()
        grads.append([b.feed_forward.router.weight.grad.clone() for b in model.blocks])
    return [a - b for a, b in zip(*grads, strict=True)]


def test_the_penalty_is_the_one_of_the_paper():
    """E · Σ f_i · P_i，乘系数与词元数；f 是给定的，P 由这一批算出，补齐的不算。"""
    model, batch = model_of(), batch_of(3)
    f = torch.tensor([[0.5, 0.3, 0.1, 0.1, 0.0], [0.2] * 5])
    rebalance(model, ExpertLoad(f, 0.0))
    routing = Routing(batch.targets != IGNORE)
    inputs = {}
    handles = [
        b.feed_forward.router.register_forward_hook(
            lambda m, i, o, layer=n: inputs.__setitem__(layer, o)
        )
        for n, b in enumerate(model.blocks)
    ]
    model.hidden(batch.ids, routing=routing)
    for handle in handles:
        handle.remove()
    counted = batch.targets != IGNORE
    expected = sum(
        0.01 * 5 * (f[n] * inputs[n].softmax(-1)[counted].sum(0)).sum() for n in range(2)
    )
    torch.testing.assert_close(routing.penalty, expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_that_of_the_language_alone_but_the_gradient_is_not():
    model, batch = model_of(), batch_of(3)
    logits = model(batch.ids)
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    torch.testing.assert_close(loss_of(model, batch), expected)
    uneven = ExpertLoad(torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1]] * 2), 0.0)
    assert all(g.abs().max() > 1e-3 for g in penalty_gradient(model, [batch], uneven))
    even = ExpertLoad(torch.full((2, 5), 0.2), 0.0)  # 已经均匀：概率之和恒为 1，没有可推的
    assert all(g.abs().max() < 1e-4 for g in penalty_gradient(model, [batch], even))


def test_pushing_against_the_load_evens_it():
    """只按均衡损失走几步：原来最忙的那位，份额变小。"""
    model, batch = model_of(), batch_of(8)
    routers = [b.feed_forward.router.weight for b in model.blocks]
    seen = []
    for _ in range(60):
        loss_of(model, batch)
        load = expert_loads(model, World())
        seen.append(load)
        for p, g in zip(routers, penalty_gradient(model, [batch], load), strict=True):
            p.data -= 0.02 * g
        expert_loads(model, World())
    first, last = seen[0].share.max(1).values, seen[-1].share.max(1).values
    assert (last < first).all()
    assert seen[-1].balance_loss < seen[0].balance_loss


@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_how_a_batch_is_divided_changes_neither_load_nor_gradient(sizes):
    """负载在整个大批上数：怎样分成小批都一样。"""
    model, batch = model_of(), batch_of(sum(sizes))
    parts = [Batch(*pair) for pair in zip(batch.ids.split(sizes), batch.targets.split(sizes),
                                          strict=True)]  # fmt: skip
    f = ExpertLoad(torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1]] * 2), 0.0)
    expert_loads(model, World())
    whole = penalty_gradient(model, [batch], f)
    load = expert_loads(model, World())
    pieces = penalty_gradient(model, parts, f)
    again = expert_loads(model, World())
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(load.share, again.share)
    assert load.balance_loss == pytest.approx(again.balance_loss, rel=1e-4)


def test_the_load_counts_every_choice_once():
    """没有词元被丢掉：算数的词元 × 挑几位 = 各位专家接到的之和。"""
    model, batch = model_of(), batch_of(4)
    loss_of(model, batch)
    counted = int((batch.targets != IGNORE).sum())
    for block in model.blocks:
        sent, probs = block.feed_forward.tally
        assert sent.sum() == 2 * counted
        assert probs.sum() == pytest.approx(counted, rel=1e-5)
    load = expert_loads(model, World())
    torch.testing.assert_close(load.share.sum(1), torch.ones(2))
    assert all((b.feed_forward.tally == 0).all() for b in model.blocks)


def test_what_is_said_about_a_load():
    load = ExpertLoad(torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4]), 1.5)
    assert load.entropy() == [pytest.approx(0.5, abs=1e-4), 1.0]
    assert load.rounded() == [[2, 2, 0, 0], [1, 1, 1, 1]]
    assert load.row() == {"balance_loss": 1.5, "load_entropy": load.entropy()}
    assert str(load) == "专家最闲、最忙的是公平份额的 0.00、2.00 倍"
    assert expert_loads(Transformer(replace(SMALL, n_experts=0, n_active=0)), World()) is None


def test_balanced_is_one():
    """完全均衡时损失是 1，全挤在一位时是 E。"""
    model = model_of(n_active=1)
    for block in model.blocks:
        block.feed_forward.router.weight.data.zero_()
        block.feed_forward.tally.copy_(torch.full((2, 5), 7.0))
    assert expert_loads(model, World()).balance_loss == pytest.approx(1)
    for block in model.blocks:
        block.feed_forward.tally.copy_(torch.tensor([[9.0, 0, 0, 0, 0]] * 2))
    assert expert_loads(model, World()).balance_loss == pytest.approx(5)


def test_words_never_seen_share_a_row_with_experts_too():
    """词表的合用一行与专家混合一起用，损失与每个梯度仍与不合用的相同。"""
    model = model_of(vocab_size=512)
    batch = batch_of(3)
    way = tie_unused_rows(model, np.arange(97, dtype=np.uint16), newborn=True)
    results = []
    for shared in (None, way):
        model.zero_grad()
        loss = loss_of(model, batch, shared)
        loss.backward()
        results.append([loss.detach(), *(b.feed_forward.gate.grad.clone() for b in model.blocks)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# ---------- 配置与设备 ----------


@pytest.mark.gpu
def test_compiled_experts_on_a_gpu_learn_as_the_readable_ones_do(capfd):
    """同样的几步：编译过的、bf16 的，与 fp32 逐位专家算的，损失相近，负载也相近。"""
    losses, shares = {}, {}
    for dtype in ("bfloat16", "float32"):
        config = replace(SMALL, device="cuda", dtype=dtype, compile=True)
        device = Device(config)
        model = model_of().cuda()
        batch = batch_of(4).to(device.place)
        fn = compile_if_possible(Loss(model), device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        losses[dtype] = []
        for _ in range(5):
            with device.autocast():
                loss = fn(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[dtype].append(loss.item())
            rebalance(model, load := expert_loads(model, World()))
        shares[dtype] = load.share
        assert device.compile == (dtype == "bfloat16")
    assert losses["bfloat16"][-1] < losses["bfloat16"][0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    torch.testing.assert_close(*shares.values(), rtol=0, atol=0.05)
    assert "失败" not in capfd.readouterr().err


@pytest.mark.gpu
def test_compiled_evaluation_on_a_gpu_is_the_eager_one(builtin_config, builtin_pretrain):
    """编译过的、不编译的、fp32 逐位算的，检验出同一个数：docs/lab-notes.md 里有一次差了 0.06。"""
    flags = ["--preset=tiny-moe", "--data=builtin", "--device=cuda", "--dtype=bfloat16"]
    flags += ["--n_experts=8", "--n_active=2", "--hidden_dim=288"]  # 那一次的形状
    config, _ = load_config("pretrain", [*flags, f"--data_dir={builtin_config.data_dir}"])
    trainer = Ours(config)
    for _ in range(150):
        trainer.step(1.0)
    exam, plain = trainer.loop.exam, Loss(trainer.model).eval()
    losses = [
        evaluate(loss.eval(), exam.batches, config.batch_size, 40960, trainer.device)
        for loss in (exam.loss, plain)
    ]
    assert trainer.device.compile
    trainer.device.dtype = torch.float32
    by_hand = evaluate(plain, exam.batches, 8, 40960, trainer.device)
    assert losses == pytest.approx([by_hand] * 2, abs=0.01)


def test_experts_compile_only_in_bf16(monkeypatch):
    monkeypatch.setattr("engine.device.cpu_has_bf16", lambda: True)
    monkeypatch.setattr("engine.device.shutil.which", lambda _: "g++")
    compiled = {}
    for dtype in ("float32", "bfloat16"):
        device = Device(replace(SMALL, dtype=dtype, compile=True))
        compiled[dtype] = device.compile
        assert any("专家混合" in note for note in device.notes) != device.compile
    assert compiled == {"float32": False, "bfloat16": True}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--n_active", "17"], r"n_active（17）至少是 2（.*），至多是 n_experts（16）"),
        (["--n_active", "0"], r"n_active（0）至少是 2"),
        (["--n_active", "1"], r"只交给一位，权重总是 1，路由器学不到谁合适"),
        (["--n_experts", "1", "--n_active", "1"], r"n_active（1）至少是 2"),
        (["--hidden_dim", "300"], r"hidden_dim（300）须是 8 的倍数"),
        (["--dim", "180", "--n_heads", "3"], r"dim（180）与 hidden_dim（144）须是 8 的倍数"),
        (["--n_experts", "-1"], "n_experts 不能是负数"),
        (["--balance_coef", "-0.1"], "balance_coef 不能是负数"),
        (["--n_experts", "0"], "不分专家就都是 0"),
    ],
)
def test_impossible_experts_are_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config("pretrain", ["--preset", "tiny-moe", *flags])


# ---------- 从头到尾 ----------

# 比预设再小一圈，省时间：十六位专家挑四位不变。
MOE = ["--preset", "tiny-moe", "--dim", "64", "--n_layers", "2", "--hidden_dim", "96",
       "--n_heads", "2", *QUICK]  # fmt: skip


@pytest.fixture(scope="module")
def moe(trained, tmp_path_factory):
    """真的脚本练出来的一个小的专家混合：预训练六步，微调三步。"""
    folder = tmp_path_factory.mktemp("moe")
    (folder / "data").symlink_to(trained[0] / "data")
    texts = [
        run(folder, script, *MOE, "--max_steps", str(n), "--eval_every", "2")[0]
        for script, n in (("pre_train.py", 6), ("sft_train.py", 3))
    ]
    return folder, texts


def test_the_whole_way(moe):
    """训练、微调、聊天、压缩、看进去，都走得通，并且说得出专家的负载。"""
    folder, texts = moe
    assert all("专家最闲、最忙的是公平份额的" in text for text in texts)
    for stage, n in (("pretrain", 6), ("sft", 3)):
        rows = metrics(folder / "out/tiny-moe", stage)
        assert len(rows) == n + 1
        assert all(0.5 < r["balance_loss"] < 16 and len(r["load_entropy"]) == 2 for r in rows[1:])
        for r in rows:
            if "val_load" in r:
                assert [sum(x) for x in r["val_load"]] == [pytest.approx(16, abs=0.01)] * 2
        assert rows[0]["val_loss"] > rows[-1]["val_loss"]
    best = ("--checkpoint", "out/tiny-moe/pretrain.pt", "--temp", "0", "--max", "12")
    plain, _ = run(folder, "pre_chat.py", "--prompt", "守株待兔：", *best)
    packed, _ = run(folder, "pre_chat.py", "--prompt", "守株待兔：", *best, "--quantize", "int8")
    assert plain.startswith("守株待兔：") and packed.startswith("守株待兔：")
    _, said = run(folder, "sft_chat.py", "--checkpoint", "out/tiny-moe/sft.pt", "--max", "5",
                  stdin="你好\n/why\n")  # fmt: skip
    assert "平均每个词元意外" in said
    out, _ = run(folder, "tools.explain", "守株待兔", "--checkpoint", "out/tiny-moe/sft.pt")
    assert "交给了哪几位专家" in out


def test_a_kill_and_a_resume_change_nothing(moe, tmp_path):
    """负载也在检查点里：接着练的与没有中断过的逐位相同。"""
    (tmp_path / "data").symlink_to(moe[0] / "data")
    out = tmp_path / "out/tiny-moe"
    flags = [*MOE, "--max_steps", "6", "--eval_every", "2", "--save_every", "0"]
    script = Running(tmp_path, "pre_train.py", *flags)
    assert script.until(lambda: last_step(out, "pretrain") >= 3)
    script.end(9)
    run(tmp_path, "pre_train.py", "--preset", "tiny-moe", "--resume")
    assert_same_run(moe[0] / "out/tiny-moe", out, "pretrain")


def test_finetuning_uses_its_own_coefficient(moe, tmp_path):
    """微调的均衡系数是这一次指定的，不是预训练时的：换一个大的，练出来就不同。"""
    start = str(moe[0] / "out/tiny-moe/pretrain.pt")
    (tmp_path / "data").symlink_to(moe[0] / "data")
    run(tmp_path, "sft_train.py", *MOE, "--max_steps", "3", "--eval_every", "2",
        "--init_from", start, "--balance_coef", "100")  # fmt: skip
    ours, theirs = (
        torch.load(f / "out/tiny-moe/sft.pt", weights_only=True) for f in (tmp_path, moe[0])
    )
    assert ours["config"]["balance_coef"] == 100
    assert not torch.equal(*(c["model"]["blocks.0.feed_forward.gate"] for c in (ours, theirs)))


def test_a_checkpoint_that_lies_about_its_experts(moe, tmp_path):
    path = moe[0] / "out/tiny-moe/pretrain.pt"
    checkpoint = torch.load(path, weights_only=True)
    for lie in ({"n_experts": 10**8, "n_active": 2}, {"n_experts": 0, "n_active": 0}):
        torch.save(checkpoint | {"config": checkpoint["config"] | lie}, tmp_path / "lie.pt")
        _, err = run(tmp_path, "pre_chat.py", "--checkpoint", "lie.pt", "--prompt", "你", code=2)
        assert "与它的配置对不上" in err and str(lie["n_experts"]) in err and err.count("\n") == 1


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_several_processes_give_the_losses_of_one(moe, tmp_path, parallel):
    """负载在全体进程上数：损失与均衡损失都与一个进程的相同。"""
    (tmp_path / "data").symlink_to(moe[0] / "data")
    flags = [*MOE, "--max_steps", "6", "--eval_every", "2", "--parallel", parallel]
    run_two(tmp_path, "pre_train.py", *flags)
    pairs = zip(*(metrics(f / "out/tiny-moe", "pretrain") for f in (moe[0], tmp_path)), strict=True)
    gaps = [abs(a[n] - b[n]) for a, b in pairs for n in NAMES if n in a]
    print(f"\n{parallel}：与一个进程最多差 {max(gaps):.1e}")
    assert len(gaps) > 10 and max(gaps) < 5e-3  # 挑谁是跳变的，舍入的差别会被放大
