"""损失与检验：累积不改变结果，每个目标恰好算一次，一行不多、一行不少。"""

import math
from dataclasses import replace

import pytest
import torch
from losses import SMALL, batch_of, loss_of, small_model

from config import Config
from dataset import IGNORE, Batch
from engine.device import Device, compile_if_possible
from loss import Loss, bits_per_character, evaluate


@pytest.fixture
def model():
    return small_model()


def test_uneven_masks_accumulated_equal_one_large_batch(model):
    """一半小批几乎全要学，一半几乎不要学：累积的梯度仍与一大批的相同。"""
    parts = [batch_of(2, supervised=s, seed=i) for i, s in enumerate((1.0, 0.1, 0.6))]
    whole = Batch(torch.cat([p.ids for p in parts]), torch.cat([p.targets for p in parts]))
    count = int((whole.targets != IGNORE).sum())
    loss = loss_of(model, whole) / count
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0.0
    for part in parts:
        piece = loss_of(model, part) / count
        piece.backward()
        total += piece.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, q, atol=1e-6, rtol=1e-5)


def test_loss_is_the_mean_negative_log_probability_of_the_counted_targets(model):
    batch = batch_of(2, supervised=0.5)
    logprobs = model(batch.ids).log_softmax(-1)
    expected = -sum(
        logprobs[b, t, batch.targets[b, t]].item()
        for b in range(2)
        for t in range(8)
        if batch.targets[b, t] != IGNORE
    )
    assert loss_of(model, batch).item() == pytest.approx(expected, rel=1e-5)


class Rows:
    """假的数据：第 r 行由 r 决定。"""

    n_rows, seq_len = 5, 8

    def get(self, rows):
        batches = [batch_of(1, seed=row) for row in rows]
        return Batch(*(torch.cat(parts) for parts in zip(*(b[:2] for b in batches), strict=True)))


def test_bits_per_character_is_independent_of_the_tokenizer():
    """每个词元 3 比特、一个词元两个字：每个字 1.5 比特。"""
    card = {"val_targets": 100, "val_characters": 200, "val_lost": 0}
    assert bits_per_character(3 * math.log(2), card) == pytest.approx(1.5)


def test_evaluation_counts_every_row_once_whatever_the_batch_size(model):
    results = [evaluate(Loss(model), Rows(), size, 1000, Device(SMALL)) for size in (1, 5, 3)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0] == pytest.approx(results[2], rel=1e-6)  # 5 行分两批，最后一批凑数


def test_a_partial_evaluation_uses_the_same_rows_every_time_from_all_over_the_file(model):
    seen = []

    class Recording(Rows):
        n_rows = 100

        def get(self, rows):
            seen.append(rows)
            return super().get(rows)

    for _ in range(2):
        evaluate(Loss(model), Recording(), 10, 10 * 8, Device(SMALL))
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 10
    assert max(seen[0]) > 50


def test_bf16_autocast_trains_to_nearly_the_same_gradients(model):
    """没有 bf16 指令的机器也能核对那条路：同样的一批，半精度的梯度与 fp32 的方向一致。"""
    batch = batch_of(2)
    loss_of(model, batch).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with Device(replace(SMALL, dtype="bfloat16")).autocast():
        loss_of(model, batch).backward()
    rounded = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99


@pytest.mark.gpu
def test_compiled_bf16_loss_on_the_gpu_is_close_to_fp32(model):
    batch = batch_of(4)
    expected = loss_of(model, batch).item()
    device = Device(Config(device="cuda"))
    fn = compile_if_possible(Loss(model.cuda()), device)
    with device.autocast():
        found = fn(batch.to(device.place)).item()
    assert found == pytest.approx(expected, rel=0.02)


def test_bits_per_character_do_not_depend_on_how_text_is_cut():
    """ln 2 奈特是一个比特；同样的文字切成两倍多的词元，每个词元少错一半，每个字的比特数不变。"""
    card = {"val_targets": 10, "val_characters": 20, "val_lost": 0}
    whole = bits_per_character(math.log(2), card)
    assert whole == pytest.approx(0.5)
    cut = bits_per_character(math.log(2) / 2, card | {"val_targets": 20})
    assert cut == pytest.approx(whole)


def test_bits_per_character_never_flatter_lost_text():
    """一个 [UNK] 顶替一长串写不出的字，猜中它一点也不难；每字比特数却只会变大，不会变小。"""
    card = {"val_targets": 10, "val_characters": 20, "val_lost": 0}
    costs = [bits_per_character(0.0, card | {"val_lost": n}) for n in (0, 1, 20)]
    assert costs == pytest.approx([0, math.log2(0x110000) / 20, math.log2(0x110000)])
