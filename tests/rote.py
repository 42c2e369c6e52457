"""背书：让一个小模型把几段话背下来。要看真的回答、而且知道该答什么的测试用它。"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import Progress, capture, write
from config import Config, load_config
from dataset import IGNORE
from model import Transformer
from tokenizer import Tokenizer
from training import Device

SHAPE = ["--preset", "tiny", "--dim", "64", "--n_layers", "2", "--n_heads", "2", "--n_kv_heads",
         "1", "--hidden_dim", "128", "--max_len", "128", "--seq_len", "128", "--device", "cpu",
         "--dtype", "float32", "--no-compile"]  # fmt: skip


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """几段编号 -> (编号, 目标)，各 (B, T)，补齐的不算损失。"""
    T = max(map(len, rows)) - 1
    ids, targets = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), IGNORE)
    for r, row in enumerate(rows):
        ids[r, : len(row) - 1] = torch.tensor(row[:-1])
        targets[r, : len(row) - 1] = torch.tensor(row[1:])
    return ids, targets


def learn_by_rote(
    rows: list[list[int]], path: Path, stage: str, tokenizer: Tokenizer
) -> tuple[Transformer, Config]:
    """背下这几段编号，写成检查点。"""
    torch.manual_seed(0)
    config, _ = load_config("pretrain", SHAPE)
    model, (ids, targets) = Transformer(config), padded(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(200):
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        if loss.item() < 0.01 * targets.ne(IGNORE).sum().item() ** 0:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(_, loss.item())
    card = {"train_sha256": "", "val_sha256": ""}
    progress = Progress(step=1, val_loss=loss.item(), val_bpc=1.0)
    snapshot = capture(
        stage, config, tokenizer, model, [], Device(config), progress, None, 1, (1, 1), card
    )
    write(path, snapshot)
    return model.eval(), config
