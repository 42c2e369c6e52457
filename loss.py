"""TODO"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import IGNORE, Batch, row_order
from engine.device import Device
from engine.shared_row import SharedRow
from experts import Routing
from model import Transformer


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """打分 (B, T, V) 给答案 (B, T) 的负对数概率之和，单位奈特；答案是 IGNORE 的不算。"""
    return F.cross_entropy(
        logits.view(-1, logits.size(-1)).float(),  # (B·T, V)
        targets.reshape(-1),
        ignore_index=IGNORE,
        reduction="sum",
    )


def loss_sum(
    model: Transformer,
    batch: Batch,
    shared: SharedRow | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """这一批所有目标的负对数概率之和，单位奈特；平均由调用者除以目标的总数得到。

    专家混合的负载均衡损失不在这个数里，只在它的梯度里：这样，记下来的总是语言的损失。

    Args:
        shared: 给了就用它省去重复的打分，结果相同；目标须是训练语料里出现过的词元。
        criterion: 怎样给打分评判；给了 shared 时，打分是 (B, T, R)，答案是其中的第几列。
    """
    targets = batch.targets
    routing = Routing(targets != IGNORE)
    x = model.hidden(batch.ids, batch.positions, batch.segments, routing=routing)  # (B, T, C)
    if shared is None:
        logits = model.score(x)  # (B, T, V)
    else:
        table = model.embedding.weight[shared.rows]  # (R, C)
        # 代表的那一行收到 n 份推力之和，只留它自己的一份（exp(-ln n) = 1/n），与逐个训练时一样。
        own = torch.exp(-shared.bias)[:, None]
        table = own * table + (1 - own) * table.detach()
        # 偏置加在 fp32 上：bf16 在 10 附近一格是 0.06，装不下 ln n。
        logits = F.linear(x, table).float() + shared.bias  # (B, T, R)
        targets = torch.where(targets == IGNORE, IGNORE, shared.column[targets.clamp(min=0)])
    loss = criterion(logits, targets)
    if routing.penalty is None:
        return loss
    return loss + (routing.penalty - routing.penalty.detach())  # 加的是 0，梯度却在


@torch.no_grad()
def evaluate(loss_fn, model, batches, batch_size: int, max_tokens: int, device: Device) -> float:
    """留出数据上每个目标的平均损失（奈特）；几个进程分着做，合起来算。

    只够检验一部分时，用的是打乱之后的开头若干行：每次都是同样的行，而且不偏向文件的前一段。
    """
    n_rows = min(batches.n_rows, -(-max_tokens // batches.seq_len))
    rows = row_order(batches.n_rows, seed=0, epoch=0)[:n_rows].tolist()
    total, count = 0.0, 0
    for first in range(0, n_rows, batch_size * device.world.size):
        mine = first + batch_size * device.world.rank
        wanted = rows[mine : min(mine + batch_size, n_rows)]
        # 最后一批用重复的行凑满：形状不变，编译过的代码才能沿用；凑数的行不算。
        batch = batches.get(wanted + rows[:1] * (batch_size - len(wanted)))
        batch.targets[len(wanted) :] = IGNORE
        count += int((batch.targets != IGNORE).sum())
        with device.autocast():
            total += loss_fn(model, batch.to(device.place)).item()
    total, count = device.world.sum(total, count)
    return total / count


def bits_per_character(loss: float, card: dict) -> float:
    """每个词元的损失（奈特）-> 原文每个字的比特数：分词器不同的模型也能比。"""
    return loss / math.log(2) * card["val_targets"] / card["val_characters"]
