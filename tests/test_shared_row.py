"""没用到的词元合用一行：损失与梯度还是整张词表的，优化器、检查点、fp16、跳过的步子都不知道有这回事。"""

import numpy as np
import pytest
import torch
from losses import SMALL, batch_of, loss_of, small_model

from dataset import Batch
from engine.shared_row import SharedRow, tie_unused_rows
from loss import Loss
from optimizer import build_optimizer


@pytest.fixture
def model():
    return small_model()


def shared_of(model, newborn=True):
    """语料只用到编号 0–199 的词表；batch_of 也只用这些。"""
    return tie_unused_rows(model, np.arange(200, dtype=np.uint16), newborn)


def test_sharing_a_row_gives_the_loss_and_the_gradients_of_the_whole_softmax(model):
    shared = shared_of(model)
    assert len(shared.rows) == 256  # 200 个用到的，加上代表的一行，补到 128 的倍数
    batch = batch_of(4, supervised=0.5)
    losses, gradients = [], []
    for way in (None, shared):
        loss = loss_of(model, batch, way)
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    table, compact = (g.pop("embedding.weight") for g in gradients)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
    alone = shared.rows[:-1]
    torch.testing.assert_close(compact[alone], table[alone], atol=1e-4, rtol=1e-3)
    # 合用的每个词元受到同样的推力，代表的那一行收到的也是这么多。
    pushes = table[shared.members]
    torch.testing.assert_close(
        pushes, compact[shared.rows[-1]].expand_as(pushes), atol=1e-7, rtol=1e-4
    )


def test_sharing_a_row_is_exact_in_half_precision_too(model):
    """ln n 约等于 10，bf16 在那里一格是 0.06：加在半精度的打分上，概率就差几个百分点。"""
    shared, losses = shared_of(model), []
    with torch.autocast("cpu", torch.bfloat16):
        for way in (None, shared):
            batch = batch_of(4)
            losses.append(loss_of(model, batch, way).item() / batch.targets.numel())
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_training_with_a_shared_row_ends_where_training_every_row_ends(model, scale):
    """代表的那一行走的，正是每个合用的词元自己会走的路；小到与 AdamW 的 eps 相当的推力也一样。"""
    shared = shared_of(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ends = []
    for way in (None, shared):
        model.load_state_dict(start)
        optimizer = build_optimizer(model, SMALL, 0.01)
        if way:
            way.follow(optimizer.adamw, model.embedding.weight)
        for step in range(5):
            (scale * loss_of(model, batch_of(4, seed=step), way)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-4, rtol=1e-3)
    assert (ends[1]["embedding.weight"] - start["embedding.weight"]).abs().mean() > 5e-4


def test_fine_tuning_shares_only_the_rows_that_are_already_equal(model):
    assert shared_of(model, newborn=False) is None  # 每一行都不同，没有可以合用的
    pretrained = tie_unused_rows(model, np.arange(1000, dtype=np.uint16), newborn=True)
    before = model.embedding.weight.detach().clone()
    shared = shared_of(model, newborn=False)
    assert set(shared.members.tolist()) <= set(pretrained.members.tolist())
    assert {*range(1000)} <= set(shared.rows.tolist())  # 预训练见过的，各有各的行
    assert torch.equal(model.embedding.weight, before)


def test_a_corpus_of_a_hundred_thousand_articles_still_saves_half_the_scoring(model):
    """十一万篇的真语料只用到 11,009 个词元，比半张词表多一点；从前半张是界线，就白算了。"""
    shared = tie_unused_rows(model, np.arange(11009, dtype=np.uint16), newborn=True)
    assert len(shared.rows) == 11136


@pytest.mark.parametrize("n_used", [16000, 20000])
def test_a_corpus_that_uses_most_of_the_vocabulary_shares_nothing(model, n_used):
    before = model.embedding.weight.detach().clone()
    assert tie_unused_rows(model, np.arange(n_used, dtype=np.uint16), newborn=True) is None
    assert torch.equal(model.embedding.weight, before)


# ---------- 搭在优化器上 ----------


def practice(model, shared, steps: int = 3, scaler=None, spoil: int = -1):
    """走几步；第 spoil 步的梯度是无穷大。返回优化器。"""
    loss = Loss(model)
    loss.shared_row = shared
    optimizer = build_optimizer(model, SMALL, 0.01)
    shared.follow(optimizer.adamw, model.embedding.weight)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for step in range(steps):
        scaler.scale(loss(batch_of(4, seed=step))).backward()
        if step == spoil:
            model.norm.weight.grad.fill_(float("inf"))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return optimizer


def all_equal(rows) -> bool:
    """每一行都与第一行相同。"""
    return bool((rows == rows[0]).all())


def test_the_row_is_spread_after_every_update_and_moves(model):
    shared = shared_of(model)
    before = model.embedding.weight[shared.members[0]].detach().clone()
    practice(model, shared)
    rows = model.embedding.weight.detach()[shared.members]
    assert all_equal(rows)
    assert not torch.equal(rows[0], before)


def test_its_state_is_spread_before_it_is_saved(model):
    """词嵌入的每一行，优化器都要有状态：以后不合用了（例如改用 FSDP），也接得上。"""
    shared = shared_of(model)
    optimizer = practice(model, shared)
    alone = optimizer.adamw.state[model.embedding.weight]["exp_avg"][shared.members].clone()
    assert not all_equal(alone)  # 没有存的时候，只有代表的那一行在动
    _, adamw = optimizer.state_dict()
    index = next(i for i, p in enumerate(adamw["param_groups"][0]["params"]) if p == 0)
    for name in ("exp_avg", "exp_avg_sq"):
        rows = adamw["state"][index][name][shared.members]
        assert all_equal(rows) and rows.abs().sum() > 0


def test_a_step_that_overflows_in_fp16_changes_nothing(model):
    """两部分合成一个优化器：一处溢出，矩阵与词嵌入都不动，放大的倍数减半；下一步照常。"""
    shared = shared_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    practice(model, shared, steps=1, scaler=scaler, spoil=0)
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    practice(model, shared, steps=1, scaler=scaler)
    assert not any(torch.equal(p, start[n]) for n, p in model.named_parameters() if "norm" not in n)
    assert all_equal(model.embedding.weight.detach()[shared.members])


def test_the_scaler_does_not_change_where_training_ends(model):
    """倍数是 2 的幂：放大再缩回，每一位都一样。"""
    start, ends = {k: v.clone() for k, v in model.state_dict().items()}, []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)):
        model.load_state_dict(start)
        practice(model, shared_of(model), scaler=scaler)
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in start)


def test_going_on_with_a_shared_row_is_bitwise_the_same(model):
    """六步 = 三步，存，取，再三步：参数与优化器的状态逐位相同。"""
    shared = shared_of(model)
    loss, start = Loss(model), {k: v.clone() for k, v in model.state_dict().items()}
    loss.shared_row = shared

    def walk(optimizer, steps):
        for step in steps:
            loss(batch_of(4, seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def ready(shared):
        optimizer = build_optimizer(model, SMALL, 0.01)
        shared.follow(optimizer.adamw, model.embedding.weight)
        return optimizer

    walk(one := ready(shared), range(6))
    whole = {k: v.clone() for k, v in model.state_dict().items()}, one.state_dict()
    model.load_state_dict(start)
    walk(first := ready(shared), range(3))
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    state, row = first.state_dict(), shared.state_dict()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_state_dict(saved)
    again = SharedRow.from_state_dict(row, torch.device("cpu"))
    loss.shared_row = again
    (second := ready(again)).load_state_dict(state)
    walk(second, range(3, 6))
    assert all(torch.equal(v, whole[0][k]) for k, v in model.state_dict().items())
    for mine, theirs in zip(second.state_dict(), whole[1], strict=True):
        for index, entry in mine["state"].items():
            assert all(torch.equal(x, theirs["state"][index][name]) for name, x in entry.items())


def test_evaluation_uses_the_whole_vocabulary(model):
    """检验时答案可以是训练语料里从没出现过的词元。"""
    shared, loss = shared_of(model), Loss(model)
    loss.shared_row = shared
    ids = torch.randint(200, (2, 8))
    batch = Batch(ids, torch.full((2, 8), int(shared.members[3])))
    assert loss.eval()(batch).item() == pytest.approx(loss_of(model, batch).item(), rel=1e-6)
    n = len(shared.members)  # 合用的那一列是 n 个加起来的：拿来检验，每个词元少算 ln n
    short = 16 * np.log(n)
    assert loss.train()(batch).item() == pytest.approx(loss_of(model, batch).item() - short, 1e-3)
