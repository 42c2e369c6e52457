"""让模型占得少、说得快：矩阵存成 bf16 或 int8。

逐个生成时，每写一个词元都要把所有矩阵从内存里读一遍；运算很少，时间大半花在读上，矩阵小了就快。
int8 每行记一个倍数，每个元素的误差约为该行最大值的 1/254。快多少见 docs/benchmarks.md。

    CompactLinear    存得小的矩阵
    compact          把模型里的矩阵都换成它
    CompactExperts   专家混合，各位专家的矩阵都换成它
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experts import MixtureOfExperts, mix_by_hand, route
from model import Transformer

STORED = {"bf16": torch.bfloat16, "int8": torch.int8}


class CompactLinear(nn.Module):
    """没有偏置的线性层：矩阵按 dtype 存，算的时候才换成输入的精度。

    Args:
        weight: 原来的矩阵 (出, 入)。
        dtype: 存成什么；int8 另有每行的倍数 scale (出,)，矩阵 ≈ scale × 整数。
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        scale = None
        if dtype == torch.int8:
            scale = (weight.float().abs().amax(dim=1).clamp(min=1e-8) / 127).bfloat16()
            weight = (weight / scale[:, None].float()).round().clamp(-127, 127)
        self.register_buffer("weight", weight.detach().to(dtype))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., 入) -> (..., 出)，类型不变。"""
        if x.numel() > x.size(-1):  # 许多行（读开头那一段）：运算才是大头
            return F.linear(x, self.dense(x.dtype))
        if self.scale is not None and x.device.type == "cpu":
            # PyTorch 自带的 int8 内积；它自己乘倍数，只认 bf16 的输入。
            row = x.reshape(1, -1).bfloat16()
            y = torch._weight_int8pack_mm(row, self.weight, self.scale)
        elif torch.compiler.is_compiling():
            # 一行：写成逐行的内积，编译后边读边换精度，比矩阵乘法的算子读得快。
            y = (self.weight.float() * x.float()).sum(-1)
            y = y if self.scale is None else y * self.scale.float()
        elif self.scale is None:
            y = F.linear(x.to(self.weight.dtype), self.weight)
        else:
            y = F.linear(x, self.dense(x.dtype))
        return y.view(*x.shape[:-1], -1).type_as(x)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """还原成普通的矩阵 (出, 入)。"""
        if self.scale is None:
            return self.weight.to(dtype)
        return self.weight.to(dtype) * self.scale.to(dtype)[:, None]


def compact(model: Transformer, dtype: torch.dtype) -> CompactLinear:
    """把各层的矩阵换成 `CompactLinear`，返回打分用的那一个（词嵌入表的小号）。

    词嵌入表本身不动：它每次只读一行。
    """
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear) and name != "router":  # 它很小，差一点就挑错人
                setattr(parent, name, CompactLinear(module.weight, dtype))
    return CompactLinear(model.embedding.weight, dtype)


class CompactExperts(nn.Module):
    """专家混合，各位专家的矩阵存得小；逐位算，只有挑中的几位要还原。"""

    def __init__(self, layer: MixtureOfExperts, dtype: torch.dtype):
        super().__init__()
        self.router, self.n_active = layer.router, layer.n_active
        self.gate, self.up, self.down = (
            nn.ModuleList(CompactLinear(matrix, dtype) for matrix in stack)
            for stack in (layer.gate, layer.up, layer.down)
        )

    def forward(self, x: Tensor, routing=None) -> Tensor:
        """(B, T, C) -> (B, T, C)，类型不变。"""
        rows = x.view(-1, x.size(-1))
        _, weights, chosen = route(self.router(rows), self.n_active)
        return mix_by_hand(rows, weights, chosen, self.expert).view(x.shape).type_as(x)

    def expert(self, e: int, rows: Tensor) -> Tensor:
        """第 e 位专家：(n, C) -> (n, C)。"""
        return self.down[e](F.silu(self.gate[e](rows)) * self.up[e](rows))


def compact_experts(model: Transformer, dtype: torch.dtype) -> None:
    """把各层的专家混合换成 `CompactExperts`；稠密模型没有，什么也不做。"""
    for block in model.blocks:
        if isinstance(block.feed_forward, MixtureOfExperts):
            block.feed_forward = CompactExperts(block.feed_forward, dtype)
