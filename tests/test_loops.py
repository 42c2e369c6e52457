"""两个循环：照着用手走几步，与脚本记下的每一步相同。"""

import pytest
import torch
from losses import loss_of
from scripts import STEPS, metrics

from dataset import IGNORE, SIDES, SFTBatches, pretrain_batches, rows_of_step
from engine.checkpoint import load
from engine.shared_row import tie_unused_rows
from model import Transformer
from optimizer import build_optimizer, learning_rate


def first_rows(stage: str, config, tokenizer, builtin_pretrain, builtin_sft):
    """训练的一批批，与刚要开始时的模型。"""
    side = SIDES[0]
    if stage == "pretrain":
        torch.manual_seed(config.seed)
        model = Transformer(config)
        rows = pretrain_batches(builtin_pretrain, side, config, tokenizer)
        tie_unused_rows(model, rows.tokens, newborn=True)  # 没出现过的从同一个起点出发
        return model, rows
    model, _, _ = load(config.init_from, tokenizer)
    data = builtin_sft
    return model, SFTBatches(
        data.tokens[side], data.starts[side], config.seq_len, tokenizer, config.seed
    )


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_every_step_is_the_one_taken_by_hand(
    stage, trained, tokenizer, builtin_pretrain, builtin_sft
):
    """取一批、按目标数求平均、反向、截短、更新：损失、梯度的长度、学习率、目标数都对得上。"""
    folder = trained[0] / "out/tiny"
    _, config, checkpoint = load(folder / f"{stage}.pt", tokenizer)
    config.init_from = folder / "pretrain.pt"
    model, batches = first_rows(stage, config, tokenizer, builtin_pretrain, builtin_sft)
    lr = config.lr if stage == "pretrain" else config.sft_lr
    optimizer = build_optimizer(model, config, lr)
    seen, n_steps = 0, checkpoint["max_steps"]
    assert n_steps == STEPS[{"pretrain": "pre_train.py", "sft": "sft_train.py"}[stage]]
    for step, row in enumerate(metrics(folder, stage)[1:4]):
        factor = learning_rate(step, n_steps, config.warmup, config.decay)
        optimizer.set_lr(factor)
        rows = rows_of_step(step, config.batch_size, batches.n_rows, config.seed)
        batch = batches.get(rows)
        n_targets = int((batch.targets != IGNORE).sum())
        loss = loss_of(model, batch) / n_targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        seen += n_targets
        assert row["tokens"] == seen
        assert row["lr"] == pytest.approx(lr * factor, rel=1e-5)
        assert row["train_loss"] == pytest.approx(loss.item(), rel=5e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
