"""fp16 的放大：一个 GradScaler 管两个优化器。处理器上不用 fp16，放大、缩回、跳过却是同一套代码。

倍数是 2 的幂，fp32 里乘它、除它都没有舍入：于是放大的与没有放大的，该逐位相同。
"""

import copy
import io
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from losses import SMALL, batch_of, small_model

from engine.device import Device
from engine.stepper import Stepper
from loss import Loss
from optimizer import build_optimizer, learning_rate

CONFIG = replace(SMALL, batch_size=2, grad_accum=2, max_steps=6, grad_clip=0.5)


class Moment(NamedTuple):
    """一步走完时的样子。"""

    norm: float
    clipped: float  # 截短之后，梯度有多长
    updated: bool
    scale: float
    model: dict
    optimizers: list


class Practice:
    """照 pre_train.py 的循环走；每一步记一个 `Moment`。

    Args:
        scaler: None：不放大。
        spoil: {第几步: (哪几个参数的梯度坏了, 坏成什么)}。
    """

    def __init__(self, tokenizer, scaler=None, spoil=None):
        self.run = run = Stepper("pretrain", CONFIG, Device(CONFIG), tokenizer)
        run.device.scaler = scaler or run.device.scaler
        self.spoil, self.moments = spoil or {}, []
        train = SimpleNamespace(
            n_rows=7, get=lambda rows: batch_of(len(rows), seed=rows[0]),
            tokens=np.arange(200, dtype=np.uint16),
        )  # fmt: skip
        run.plan(train, {"train_tokens": 56})
        self.model = small_model()
        self.loss = run.parallel(Loss(self.model))
        self.optimizer = run.optimizer(build_optimizer, CONFIG.lr)

    def states(self) -> dict:
        """存进检查点的三样。"""
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizers": copy.deepcopy(self.optimizer.state_dict()),
            "scaler": self.run.device.scaler.state_dict(),
        }

    def load(self, states: dict) -> None:
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizers"])
        self.run.device.scaler.load_state_dict(states["scaler"])

    def walk(self, first: int = 0, last: int = CONFIG.max_steps) -> list[Moment]:
        run, optimizer = self.run, self.optimizer
        run.first_step, run.n_steps = first, last
        for step in run.steps():
            if self.moments:  # 倍数要到两步之间才调整
                self.moments[-1] = self.moments[-1]._replace(scale=self.scale)
            optimizer.set_lr(learning_rate(step, CONFIG.max_steps, CONFIG.warmup, CONFIG.decay))
            losses = []
            for batch in run.batches(step):
                part = self.loss(batch) / run.n_targets
                run.backward(part)
                losses.append(part.detach())
            names, value = self.spoil.get(step, ((), 0.0))
            for name in names:
                self.model.get_parameter(name).grad.view(-1)[3] = value
            norm = run.clip(optimizer, CONFIG.grad_clip)
            grads = torch.stack([p.grad.norm() for p in self.model.parameters()])
            if updated := run.finite(losses, norm):
                run.update(optimizer)
            optimizer.zero_grad()
            states = self.states()
            moment = (norm.item(), grads.norm().item(), updated, 0.0)
            self.moments.append(Moment(*moment, states["model"], states["optimizers"]))
        self.moments[-1] = self.moments[-1]._replace(scale=self.scale)
        return self.moments

    @property
    def scale(self) -> float:
        return self.run.device.scaler.get_scale()


def scaler(**options) -> torch.amp.GradScaler:
    """放大 1024 倍；连着三步没有溢出就加倍。"""
    named = {"init_scale": 1024.0, "growth_interval": 3, "enabled": True} | options
    return torch.amp.GradScaler("cpu", **named)


def same(a, b) -> None:
    torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_without_overflows_it_is_as_if_nothing_were_scaled(tokenizer):
    """截短看见的是缩回之后的梯度：长度、截短、更新，都与不放大的逐位相同。"""
    plain, scaled = (Practice(tokenizer, s).walk() for s in (None, scaler()))
    assert [m.scale for m in scaled] == [1024, 1024, 2048, 2048, 2048, 4096]
    assert all(m.norm > CONFIG.grad_clip > 0.999 * m.clipped for m in plain)
    for a, b in zip(plain, scaled, strict=True):
        assert (a.norm, a.clipped, a.updated) == (b.norm, b.clipped, True)
        same(a.model, b.model)
        same(a.optimizers, b.optimizers)


MUON, ADAMW = "blocks.1.attention.key.weight", "embedding.weight"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("spoiled", [[MUON], [ADAMW], ["blocks.0.attention_norm.weight"],
                                     [MUON, ADAMW]], ids=str)  # fmt: skip
def test_an_overflow_in_either_part_stops_both(tokenizer, spoiled, value):
    """一处溢出，两个优化器都不动，动量也不动；倍数减半，下一步照走，就像没有放大的跳过了这一步。"""
    spoil = {2: (spoiled, value)}
    found = Practice(tokenizer, scaler(growth_interval=100), spoil).walk()
    assert [m.updated for m in found] == [True, True, False, True, True, True]
    assert [m.scale for m in found] == [1024, 1024, 512, 512, 512, 512]
    same(found[2].model, found[1].model)
    for before, after in zip(found[1].optimizers, found[2].optimizers, strict=True):
        same(after["state"], before["state"])
    moved = {name for name, x in found[3].model.items() if not x.equal(found[2].model[name])}
    assert moved == set(dict(small_model().named_parameters()))

    plain = Practice(tokenizer, None, spoil).walk()
    assert [m.updated for m in plain] == [m.updated for m in found]
    same(plain[-1].model, found[-1].model)
    same(plain[-1].optimizers, found[-1].optimizers)


def test_an_overflow_starts_the_counting_anew(tokenizer):
    """连着三步才加倍：第二步溢出了，便要再走三步。"""
    found = Practice(tokenizer, scaler(), {1: ([MUON], float("inf"))}).walk()
    assert [m.scale for m in found] == [1024, 512, 512, 512, 1024, 1024]


def test_a_scale_that_is_too_large_finds_its_size(tokenizer):
    """真的溢出，不是注入的：倍数大得 fp32 也装不下，减到装得下为止，一步也没有走歪。"""
    huge = scaler(init_scale=2.0**127, backoff_factor=2.0**-40)
    found = Practice(tokenizer, huge).walk()
    assert [m.updated for m in found] == [False, True, True, True, True, True]
    assert [m.scale for m in found][:2] == [2.0**87] * 2
    before = small_model().state_dict()
    shared = Practice(tokenizer).model.state_dict()  # 没用到的词元合用一行之后
    same(found[0].model, before | {"embedding.weight": shared["embedding.weight"]})


def test_stored_and_restored_it_goes_on_bitwise(tokenizer):
    """倍数与数到第几步都存得下：断在溢出之后、加倍之前，接着走与不中断的逐位相同。"""
    spoil = {1: ([ADAMW], float("inf"))}
    whole = Practice(tokenizer, scaler(), spoil).walk()
    first = Practice(tokenizer, scaler(), spoil)
    first.walk(last=3)
    file = io.BytesIO()
    torch.save(first.states(), file)
    file.seek(0)
    second = Practice(tokenizer, scaler(init_scale=2.0))
    second.load(torch.load(file))
    resumed = second.walk(first=3)
    for a, b in zip(whole[3:], resumed, strict=True):
        assert a[:4] == b[:4]
        same(a.model, b.model)
        same(a.optimizers, b.optimizers)
    assert [m.scale for m in resumed] == [512, 1024, 1024]
