"""一步里的几个动作：分成小批，是不是有限的数，几个进程时的倍数。"""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from losses import SMALL, batch_of, small_model

from dataset import IGNORE
from engine import stepper as stepper_module
from engine.device import Device
from engine.stepper import Stepper
from loss import Loss


@pytest.fixture
def stepper(tokenizer) -> Stepper:
    """一个进程，处理器上，fp32。"""
    return Stepper("pretrain", SMALL, Device(SMALL), tokenizer)


@pytest.mark.parametrize(
    ("losses", "norm", "finite"),
    [([1.0, 2.0], 3.0, True), ([1.0, math.nan], 3.0, False), ([1.0, 2.0], math.inf, False),
     ([1.0, -math.inf], 1.0, False), ([1.0], math.nan, False)],
)  # fmt: skip
def test_an_update_needs_a_finite_loss_and_a_finite_gradient(stepper, losses, norm, finite):
    assert stepper.finite([torch.tensor(x) for x in losses], torch.tensor(norm)) == finite
    if finite:
        assert (stepper.step_loss, stepper.norm) == (3.0, 3.0)


def test_a_step_is_cut_into_batches_that_hold_every_row_once(stepper):
    """五小批合起来正是这一步的那几行；目标数是整个大批的。"""
    stepper.config = SimpleNamespace(batch_size=2, grad_accum=5, seed=7)
    stepper.rows_per_step = 10
    stepper.train = SimpleNamespace(n_rows=23, get=lambda rows: batch_of(len(rows), seed=rows[0]))
    last_of, seen = [], []

    def accumulate(last: bool):
        last_of.append(last)
        return nullcontext()

    stepper._parallel = SimpleNamespace(accumulate=accumulate)
    for step in range(3):
        found = list(stepper.batches(step))
        assert stepper.n_targets == sum(int((b.targets != IGNORE).sum()) for b in found)
        assert [len(rows) for rows in stepper.micro_rows] == [2] * 5
        seen += [row for rows in stepper.micro_rows for row in rows]
    assert sorted(seen[:23]) != seen[:23]  # 打乱了
    assert len(set(seen[:20])) == 20  # 一遍之内，没有哪行用了两次
    assert last_of == ([False] * 4 + [True]) * 3  # 只有最后一个小批之后才通信


@pytest.mark.parametrize(("size", "kind"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_what_is_fitted_is_what_will_be_trained(stepper, monkeypatch, size, kind):
    """试放得下几行时，合用一行、编译都已经定了；参数分开放的不合用。"""
    stepper.config = replace(SMALL, parallel=kind)
    stepper.world.size = size
    stepper.train = SimpleNamespace(tokens=np.arange(200, dtype=np.uint16))
    stepper.device.compile = True
    loss, seen = Loss(small_model()), []
    monkeypatch.setattr(stepper_module, "compile_if_possible", lambda fn, device: "compiled")
    monkeypatch.setattr(
        stepper_module, "Parallel", lambda loss, *_: SimpleNamespace(loss=loss, sharded=None)
    )
    stepper.fit = lambda loss: seen.append((loss.forward, loss.shared_row is not None))
    assert stepper.parallel(loss) is loss
    assert seen == [("compiled", kind == "ddp")]
    assert stepper.shared is loss.shared_row


def test_the_gradient_is_a_sum_over_processes(stepper):
    """DDP 求的是平均：每个进程先乘上进程数，平均出来就是和。"""
    x = torch.ones((), requires_grad=True)
    stepper.world.size = 4
    stepper.backward(2 * x)
    assert x.grad == 8
