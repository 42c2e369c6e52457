"""内存不够：该改哪个、省多少；在显卡上试出放得下的小批。"""

import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from losses import SMALL, batch_of

from config import UserError
from dataset import Batch
from engine import run
from engine.memory import auto_batch, fit_batch, fit_compiled, memory_needed, out_of_memory
from engine.shared_row import tie_unused_rows
from experts import MixtureOfExperts
from loss import Loss
from model import Transformer


def test_out_of_memory_names_the_knobs_and_how_much_they_save():
    model = Transformer(SMALL)
    config = replace(SMALL, batch_size=4, grad_accum=1, seq_len=128)
    fixed, per_row = memory_needed(config, model)
    said = str(out_of_memory(config, model, 4))
    assert re.search(r"--batch_size 2 --grad_accum 2，约省 \d.*--seq_len 64", said)
    # 几个进程分着读，一次前向只有两行；接着练时长度不能改。
    text = str(out_of_memory(replace(config, resume=True), model, 2))
    assert "--batch_size 1 --grad_accum 4" in text
    assert "--seq_len" not in text
    assert "--batch_size" not in str(out_of_memory(config, model, 1))
    assert memory_needed(replace(config, seq_len=256), model) == (fixed, 2 * per_row)


@pytest.mark.parametrize(("fits", "expected"), [(100, 12), (11, 6), (5, 4), (1, 1), (0, 0)])
def test_auto_batch_is_the_largest_divisor_that_fits(fits, expected):
    tried = []

    def attempt(size):
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fit_batch(12, attempt) == expected
    assert tried == [n for n in (12, 6, 4, 3, 2, 1) if n >= expected]


@pytest.mark.parametrize(
    ("plain", "compiled", "tried", "expected"),
    [(100, 100, [16], 16), (5, 10, [8], 8), (5, 5, [8, 4], 4), (5, 3, [8, 4, 2], 2),
     (0, 1, [1], 1), (0, 0, [1], 0)],
)  # fmt: skip
def test_few_sizes_are_compiled(monkeypatch, plain, compiled, tried, expected):
    """先不编译地试，编译过的从那两倍试起：编译一种大小要一分钟。"""
    stances, sizes = [], []

    class Stance(nullcontext):
        def __init__(self, name):
            super().__init__()
            assert name == "force_eager"

        def __enter__(self):
            stances.append(True)

        def __exit__(self, *error):
            stances.pop()

    def attempt(size):
        if not stances:
            sizes.append(size)
        if size > (plain if stances else compiled):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.compiler, "set_stance", Stance)
    assert fit_compiled(16, attempt) == expected
    assert sizes == tried


# ---------- 假的显卡：张量其实在处理器上，放不下是自己说的 ----------


class Look(NamedTuple):
    """不编译时，走到打分的那一刻看见的。"""

    rows: int
    width: int  # 打分有几列
    grad: bool
    segments: bool


class WatchedLoss(Loss):
    """记下走过的路；行数太多就说显存不够。"""

    def __init__(self, model, fits):
        super().__init__(model)
        self.fits, self.seen = fits, []

    def judge(self, batch, logits, targets):
        if not torch.compiler.is_compiling():
            look = (len(batch.ids), logits.size(-1), torch.is_grad_enabled())
            self.seen.append(Look(*look, batch.segments is not None))
            if len(batch.ids) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return super().judge(batch, logits, targets)


class OnCard(Batch):
    """搬到假的显卡上，就是原地不动。"""

    def to(self, device):
        assert device.type == "cuda"
        return Batch(*self)


class FewRows:
    """三行的训练数据，分了段；只认得这三行。"""

    n_rows = 3

    def get(self, rows):
        assert set(rows) <= {0, 1, 2}
        ids, targets, *_ = batch_of(len(rows))
        return OnCard(ids, targets, torch.zeros_like(ids), torch.zeros_like(ids))


@pytest.fixture
def card(monkeypatch):
    """假的显卡，一个进程；`reserved` 是每次占住的字节数。"""
    real, reserved = torch.empty, []

    def empty(*shape, device=None, **named):
        if device is not None and torch.device(device).type == "cuda":
            reserved.append(shape[0])
            return real(0)
        return real(*shape, device=device, **named)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=5000)
    )
    return SimpleNamespace(
        place=torch.device("cuda"), compile=False, autocast=nullcontext, reserved=reserved,
        world=SimpleNamespace(size=1, gather=lambda x: [x], sum=lambda *x: x),
    )  # fmt: skip


TWELVE = replace(SMALL, batch_size=6, grad_accum=2)
MIXED = replace(TWELVE, n_experts=4, n_active=2, router_scale=1.0, balance_coef=0.01)


def test_the_path_that_is_tried_is_the_one_that_will_run(card):
    """分了段的数据，训练时合用一行、求梯度，检验时整张词表、不求梯度；占住的是优化器的与一成。"""
    config = replace(TWELVE)
    loss = WatchedLoss(model := Transformer(config), fits=4)
    loss.shared_row = tie_unused_rows(model, np.arange(200, dtype=np.uint16), newborn=True)
    auto_batch(config, loss, card, FewRows())
    assert (config.batch_size, config.grad_accum) == (4, 3)
    narrow = len(loss.shared_row.rows)
    assert loss.seen == [
        Look(12, narrow, True, True), Look(6, narrow, True, True), Look(4, narrow, True, True),
        Look(4, config.vocab_size, False, True),
    ]  # fmt: skip
    state = memory_needed(config, model)[0] - 8 * sum(p.numel() for p in model.parameters())
    assert card.reserved == [state + 500] * 3


def test_trying_leaves_no_trace(card):
    """梯度、专家的负载、随机数、训练的状态：都与没有试过一样。"""
    config = replace(MIXED)
    loss = WatchedLoss(model := Transformer(config), fits=4)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    numbers = torch.get_rng_state()
    auto_batch(config, loss, card, FewRows())
    assert len(loss.seen) == 4 and loss.training and model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    tallies = [m.tally for m in model.modules() if isinstance(m, MixtureOfExperts)]
    assert len(tallies) == 2 and not any(t.any() for t in tallies)


def test_the_compiled_loss_is_tried_too(card, capsys):
    """编译过的省内存：不编译的放得下 3 行，编译过的 6 行；选中的那一种，训练时不必再编译。"""
    config = replace(TWELVE)
    loss = WatchedLoss(Transformer(config), fits=3)
    compiled = []

    def backend(graph, inputs):
        rows = next(x.size(0) for x in inputs if x.ndim == 2 and not x.is_floating_point())
        compiled.append((rows, torch.is_grad_enabled()))
        return graph.forward

    loss.forward = torch.compile(loss.forward, backend=backend, dynamic=False)
    card.compile = True
    auto_batch(config, loss, card, data := FewRows())
    assert (config.batch_size, config.grad_accum) == (6, 2)
    assert [look.rows for look in loss.seen] == [12, 6, 4, 3, 3]
    assert compiled == [(6, True), (6, False)]
    loss(data.get([0, 1, 2] * 2).to(card.place)).backward()
    assert len(compiled) == 2
    assert "也要编译" in capsys.readouterr().out


def test_several_processes_take_the_smallest_and_compile_nothing_yet(card):
    """编译要在 DDP 里面；有一个进程放不下，全体一起说，没有谁还在等。"""
    config = replace(TWELVE)
    loss = WatchedLoss(Transformer(config), fits=100)
    loss.forward = torch.compile(loss.forward, backend=lambda *_: pytest.fail("编译了"))
    card.compile, card.world.size, card.world.gather = True, 2, lambda mine: [mine, 3]
    auto_batch(config, loss, card, FewRows())
    assert (config.batch_size, config.grad_accum) == (3, 4)
    assert [look.rows for look in loss.seen] == [6, 6]
    card.world.gather = lambda mine: [mine, 0]
    with pytest.raises(UserError, match="一行也放不下"):
        auto_batch(config, loss, card, FewRows())


def test_auto_batch_says_when_not_even_one_row_fits_and_hides_no_other_error(card):
    def bug(size):
        raise RuntimeError("shape mismatch")

    with pytest.raises(UserError, match="一行也放不下"):
        auto_batch(replace(TWELVE), WatchedLoss(Transformer(TWELVE), fits=0), card, FewRows())
    with pytest.raises(RuntimeError, match="shape"):
        fit_batch(4, bug)


def test_a_run_tries_its_own_training_data(monkeypatch):
    given = []
    monkeypatch.setattr(run, "auto_batch", lambda *args: given.append(args))
    mine = run.Run.__new__(run.Run)
    mine.config, mine.device, mine.train = "config", "device", "train"
    for origin in run.Origin:
        mine.origins = {"batch_size": origin}
        mine.fit("loss")
    assert given == [("config", "loss", "device", "train")]
