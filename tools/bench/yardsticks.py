"""对照：别人是怎样做的。tools.bench 拿我们的与它们比，谁都可以装来核对。

PlainContestant  普通的程序的进程：没有我们的环境变量
Plain            最普通的训练循环；Qwen3 与 Original 都照它走一步
Qwen3            transformers 的 Qwen3，同样的形状
Original         最初那个项目的做法，模型是 OriginalManner，语料是 padded_rows
"""

import os
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from config import Config
from corpus.token_file import TokenFile
from dataset import IGNORE, PretrainBatches, rows_of_step
from engine import device as training
from engine.device import Device
from settings import threads
from tools.bench.measuring import Contestant
from tools.bench.trainer import Trainer
from tools.huggingface.shapes import qwen3


class PlainContestant(Contestant):
    """普通的程序：线程照库自己的默认等，不照我们的（settings/threads.py）。"""

    def launch(self) -> None:
        """启动；用户自己定了怎样等的，照他的。"""
        usual = {threads.VARIABLE: threads.USUAL} if threads.changed else {}
        with mock.patch.dict(os.environ, usual):  # 子进程启动时抄走
            super().launch()


def plain_device(config: Config, lend_memory: bool = False) -> Device:
    """对照用的设备：没有我们在 CPU 上的两处设置（留住内存、相加的次序固定），普通的循环就是这样。

    Args:
        lend_memory: 真时借给它前一处，它便看得出快了多少。
    """
    skipped = ["add_in_fixed_order"] + ["keep_freed_memory"] * (not lend_memory)
    with mock.patch.multiple(training, **dict.fromkeys(skipped, lambda: None)):
        return Device(config)


class Plain(Trainer):
    """最普通的训练循环：AdamW，每步 rows_per_step 行，损失对要猜的词元求平均。"""

    def make_optimizers(self):
        """只有 AdamW。"""
        return [torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, fused=True)]

    def step(self, factor: float) -> int:
        """走一步；factor 是学习率的倍数。"""
        (optimizer,) = self.optimizers
        optimizer.param_groups[0]["lr"] = self.config.lr * factor
        total = 0
        for _ in range(self.config.grad_accum):
            ids, targets = (x.to(self.device.place) for x in self.next_batch())
            with self.device.autocast():
                loss = self.loss_of(ids, targets)
            (loss / self.config.grad_accum).backward()
            total += int((targets != IGNORE).sum())
        loss.item()
        clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total


class Qwen3(Plain):
    """transformers 的 Qwen3，同样的形状；损失用它自带的（labels），语料首尾相接。"""

    def __init__(self, config: Config, compiled: bool, device: Device):
        super().__init__(config, device)
        self.train, self.val = (
            PretrainBatches(self.data.tokens[side], config.seq_len) for side in ("train", "val")
        )
        self.model = qwen3(config).to(self.device.place)
        self.call = torch.compile(self.model) if compiled else self.model
        self.optimizers = self.make_optimizers()

    def next_batch(self):
        """编号；目标由它自己右移，所以每行的最后一个词元没有目标。"""
        size = self.config.batch_size
        batch = self.train.get(rows_of_step(self.n, size, self.train.n_rows, self.config.seed))
        self.n += 1
        targets = batch.ids.clone()
        targets[:, 0] = IGNORE
        return batch.ids, targets

    def loss_of(self, ids, targets):
        """它自带的损失。"""
        return self.call(input_ids=ids, labels=targets, use_cache=False).loss

    def evaluate_fn(self, batch):
        """同样的留出词条上的损失之和。"""
        logits = self.call(input_ids=batch.ids, use_cache=False).logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch.targets.flatten(),
            ignore_index=IGNORE, reduction="sum",
        )  # fmt: skip


class Original(Plain):
    """最初那个项目的做法：fp32，不编译，一行一篇，补齐到 max_len（tiny 512，wide 1024）。"""

    def __init__(self, config: Config):
        config.dtype, config.grad_accum = "float32", 1  # 补齐的一步太久，只做其中一小批
        super().__init__(config, plain_device(config))
        self.model = OriginalManner(config).to(self.device.place)
        rows = max(1, config.batch_size * config.seq_len // config.max_len)
        self.rows = padded_rows(self.data, config.max_len, rows)
        self.optimizers = self.make_optimizers()

    def next_batch(self):
        """补齐的几行。"""
        return next(self.rows)

    def loss_of(self, ids, targets):
        """要猜的词元的平均损失。"""
        logits = self.model(ids)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


class OriginalManner(nn.Module):
    """PyTorch 自带的 Transformer 层，位置是学出来的；层数、宽度、头数与我们的相同。

    前馈有两个矩阵而不是三个，中间宽度乘 1.5，前馈的参数便一样多；整个模型多出一成。
    """

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position = nn.Embedding(config.max_len, config.dim)
        layer = nn.TransformerEncoderLayer(
            config.dim, config.n_heads, config.hidden_dim * 3 // 2, dropout=0.0,
            activation="gelu", batch_first=True, norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(
            layer, config.n_layers, nn.LayerNorm(config.dim), enable_nested_tensor=False
        )
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)"""
        T = ids.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(T, ids.device)
        x = self.embedding(ids) + self.position(torch.arange(T, device=ids.device))
        return F.linear(self.layers(x, mask, is_causal=True), self.embedding.weight)


def padded_rows(data: TokenFile, length: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """一行一篇，补齐到 length；无穷无尽地给出 (编号, 目标)，各 (rows, length)。"""
    tokens, starts = data.tokens["train"], data.starts["train"]
    order = np.random.default_rng(0).permutation(len(starts) - 1)
    at = 0
    while True:
        ids = np.zeros((rows, length), np.int64)
        targets = np.full((rows, length), IGNORE, np.int64)
        for r in range(rows):
            n = order[at % len(order)]
            document = tokens[starts[n] : starts[n + 1]][: length + 1].astype(np.int64)
            ids[r, : len(document) - 1] = document[:-1]
            targets[r, : len(document) - 1] = document[1:]
            at += 1
        yield torch.from_numpy(ids), torch.from_numpy(targets)
