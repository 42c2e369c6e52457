"""一个最小的模型，一批假的数据，它的损失：几份测试共用。"""

import torch

from config import Config
from dataset import IGNORE, Batch
from loss import Loss
from model import Transformer

# 词表必须装得下分词器，其余尽量小。
SMALL = Config(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, max_len=16, seq_len=8,
    device="cpu", dtype="float32", compile=False, lr=0.01, muon_momentum=0.9,
    residual_lr_scale=1.0, sft_lr=0.002, out_dir="out/x",
)  # fmt: skip


def batch_of(rows, length=8, supervised=1.0, seed=0):
    """随机的几行，编号小于 200；supervised 是有目标的比例。"""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(200, (rows, length), generator=g)
    targets = torch.randint(200, (rows, length), generator=g)
    targets[torch.rand(rows, length, generator=g) >= supervised] = IGNORE
    return Batch(ids, targets)


def small_model():
    """参数全是随机数的小模型：没有一条支路是零。"""
    torch.manual_seed(0)
    model = Transformer(SMALL)
    for p in model.blocks.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def loss_of(model, batch, shared=None):
    """这一批的损失之和；给了 shared，就合用一行。"""
    loss = Loss(model)
    loss.shared_row = shared
    return loss(batch)
