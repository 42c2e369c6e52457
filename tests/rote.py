"""背书：让一个小模型把几段话背下来。要看真的回答、又要事先知道该答什么的测试用它。"""

from pathlib import Path

import torch
import torch.nn.functional as F

from dataset import IGNORE
from engine.checkpoint import capture, write
from engine.device import Device
from engine.progress import Progress, RandomNumbers
from model import Transformer
from settings.resolve import load_config
from tokenizer import Tokenizer

SHAPE = ["--preset", "tiny", "--dim", "64", "--n_layers", "2", "--n_heads", "2", "--n_kv_heads",
         "1", "--hidden_dim", "128", "--max_len", "128", "--seq_len", "128", "--device", "cpu",
         "--dtype", "float32", "--no-compile"]  # fmt: skip


def learn_by_rote(
    rows: list[list[int]], path: Path, stage: str, tokenizer: Tokenizer, *flags: str
) -> None:
    """背下这几段编号，写成检查点；几秒钟。flags：另外的设置，例如几位专家。"""
    torch.manual_seed(0)
    config, _ = load_config("pretrain", [*SHAPE, *flags])
    model = Transformer(config)
    T = max(map(len, rows)) - 1
    ids, targets = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), IGNORE)
    for r, row in enumerate(rows):
        ids[r, : len(row) - 1] = torch.tensor(row[:-1])
        targets[r, : len(row) - 1] = torch.tensor(row[1:])

    # 只在出现过的词元里分辨：两万个词元一起算，慢几十倍；其余的打分本来就接近 0。
    used = torch.cat([ids.flatten(), targets[targets != IGNORE]]).unique()
    places = torch.where(targets == IGNORE, IGNORE, torch.searchsorted(used, targets))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(60):
        scores = model.hidden(ids) @ model.embedding.weight[used].T  # (B, T, 用到的词元)
        loss = F.cross_entropy(scores.flatten(0, 1), places.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    progress = Progress(step=60, val_loss=loss.item(), val_bpc=1.0)
    parts = {"model": model, "progress": progress, "rng": RandomNumbers()}
    write(path, capture(
        parts, stage=stage, config=config, tokenizer=tokenizer, max_steps=60,
        device=Device(config).describe(), data={"train_sha256": "", "val_sha256": ""},
    ))  # fmt: skip
