"""从前的一步：2026-11-28 重做 `Stepper` 与 `Muon` 之前的样子（4169ff5），留在这里好比较。

FormerMuon   同样的 Muon，逐个参数发小算子
Former       每个小批的损失、梯度的长度、合用的一行，各等一次显卡；下一批要等这一步走完才取
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from config import Config
from dataset import IGNORE, pretrain_batches, rows_of_step
from engine.device import Device, compile_if_possible
from engine.shared_row import tie_unused_rows
from loss import Loss
from model import Transformer
from optimizer import build_optimizer
from tokenizer import Tokenizer
from tools.bench.trainer import Trainer


class FormerMuon(torch.optim.Optimizer):
    """从前的 Muon：每个矩阵四个小算子，正交化时才叠在一起；参数同 optimizer.Muon。"""

    def __init__(self, matrices, lr: float, momentum: float, weight_decay: float, dtype):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """按已经算好的梯度更新一次。"""
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                same_shape[p.shape].append(p)
            for shape, params in same_shape.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state["momentum"], group["momentum"]))
                size = 0.2 * max(shape[-2:]) ** 0.5
                matrices = torch.stack(updates).view(-1, *shape[-2:])
                updates = orthogonalize(matrices, self.dtype).view(-1, *shape)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * size)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """从前的牛顿–舒尔茨迭代：先换成 dtype，再归一。"""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class FormerOptimizer:
    """从前的两个优化器，用法同 optimizer.MuonAdamW。"""

    def __init__(self, model: Transformer, config: Config, lr: float, dtype: torch.dtype):
        matrices = [p for p in model.blocks.parameters() if p.ndim >= 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        muon = FormerMuon(matrices, lr, config.muon_momentum, config.weight_decay, dtype)
        adamw = torch.optim.AdamW(
            rest, lr * config.embed_lr_scale, betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=0.0, fused=True,
        )  # fmt: skip
        self.parts = muon, adamw
        self.groups = [*muon.param_groups, *adamw.param_groups]
        self.highest = [group["lr"] for group in self.groups]

    def set_lr(self, factor: float) -> None:
        """每组参数的学习率 = 它的最高值 × factor。"""
        for group, highest in zip(self.groups, self.highest, strict=True):
            group["lr"] = highest * factor

    def step(self) -> None:
        """两部分各更新一次。"""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """梯度清空。"""
        for part in self.parts:
            part.zero_grad()


class Former(Trainer):
    """从前的一步，稠密模型、bf16 或 fp32；与从前的 pre_train.py 逐步相同（有测试核对）。

    Args:
        config: 用到的同 `Ours`。
        build: 造优化器；换成现在的 build_optimizer，便看得出两处各快了多少。
    """

    def __init__(self, config: Config, build=FormerOptimizer):
        super().__init__(config, Device(config))
        self.train = pretrain_batches(self.data, "train", config, Tokenizer())
        self.model = Transformer(config).to(self.device.place)
        self.compute_loss: nn.Module = Loss(self.model)
        self.compute_loss.shared_row = self.shared = tie_unused_rows(
            self.model, self.train.tokens, newborn=True
        )
        if self.device.compile:
            self.compute_loss.forward = compile_if_possible(self.compute_loss.forward, self.device)
        self.build = build
        self.start_over()

    def make_optimizers(self):
        """造优化器。"""
        return self.build(self.model, self.config, self.config.lr, self.device.dtype)

    def step(self, factor: float) -> int:
        """走一步；factor 是学习率的倍数。"""
        config, optimizer = self.config, self.optimizers
        optimizer.set_lr(factor)
        rows = rows_of_step(self.n, self.rows_per_step, self.train.n_rows, config.seed)
        n = math.ceil(len(rows) / config.batch_size)
        batches = [self.train.get(rows[i::n]) for i in range(n)]
        n_targets = sum(int((b.targets != IGNORE).sum()) for b in batches)
        losses = []
        for batch in batches:
            batch = batch.to(self.device.place)
            with self.device.autocast():
                part = self.compute_loss(batch) / n_targets
            part.backward()
            losses.append(part.detach())
        norm = clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.loss = sum(x.item() for x in losses)  # 每个小批等一次
        if math.isfinite(self.loss) and math.isfinite(norm.item()):
            optimizer.step()
            self.spread()
        optimizer.zero_grad()
        self.n += 1
        return n_targets

    @torch.no_grad()
    def spread(self) -> None:
        """代表的那一行抄给其余的；拿显卡上的一个数作下标，又等一次。"""
        if self.shared:
            table = self.model.embedding.weight
            table[self.shared.members] = table[self.shared.rows[-1]].clone()


def former_but_new_optimizer(config: Config) -> Former:
    """从前的循环，现在的优化器。"""
    return Former(config, build_optimizer)
