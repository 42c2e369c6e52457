"""专家混合的负载：各位专家这一步各忙了多少，交给下一步求均衡。

图例：L 层数，E 专家数。
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dataset import send
from engine.distributed import World
from experts import MixtureOfExperts


class ExpertLoad(NamedTuple):
    """各层各位专家的负载。

    Fields:
        share: 交给每位的份额 f (L, E)，每层之和为 1；公平的是 1/E。
        balance_loss: 负载均衡损失 E · Σ f_i · P_i，各层平均，不乘系数；完全均衡时是 1。
    """

    share: Tensor
    balance_loss: float

    @classmethod
    def of(cls, tally: Sequence[float], shape: Sequence[int]) -> "ExpertLoad":
        """由各位专家数下的 (L, 2, E)：交给它的词元数，与路由器给它的概率之和。"""
        tally = torch.tensor(tally).view(shape)
        share, mean = (tally / tally.sum(-1, keepdim=True).clamp(min=1e-12)).unbind(1)
        return cls(share, (share.size(1) * (share * mean).sum(1)).mean().item())

    def entropy(self) -> list[float]:
        """每层负载的熵，与均匀时的比：1 是人人一样忙，0 是只有一位在忙。"""
        p = self.share.clamp(min=1e-12)
        return [round(x, 4) for x in (-(p * p.log()).sum(1) / math.log(p.size(1))).tolist()]

    def rounded(self) -> list[list[float]]:
        """每层每位的负载是公平份额的几倍。"""
        return [[round(x, 3) for x in row] for row in (self.share * self.share.size(1)).tolist()]

    def row(self) -> dict:
        """写进记录的几项。"""
        return {"balance_loss": self.balance_loss, "load_entropy": self.entropy()}

    def __str__(self) -> str:
        times = self.share * self.share.size(1)
        return f"专家最闲、最忙的是公平份额的 {times.min():.2f}、{times.max():.2f} 倍"


def take_tally(model: nn.Module | None) -> Tensor | None:
    """上一次取走以来，各位专家数下的 (L, 2, E)，还在设备上；取走之后重新数起。稠密模型没有。"""
    experts = mixtures(model)
    if not experts:
        return None
    tally = torch.stack([m.tally for m in experts])
    torch._foreach_zero_([m.tally for m in experts])
    return tally


def expert_loads(model: nn.Module, world: World) -> ExpertLoad | None:
    """上一次取走以来，各位专家的负载，各进程的合起来；稠密模型没有。"""
    tally = take_tally(model)
    if tally is None:
        return None
    _, total, _ = world.read([tally])
    return ExpertLoad.of(total, tally.shape)


def rebalance(model: nn.Module, load: ExpertLoad) -> None:
    """这一步的负载交给各层，下一步的负载均衡损失用它。"""
    loads = [m.load for m in mixtures(model)]
    torch._foreach_copy_(loads, list(send(load.share, loads[0].device)))


def mixtures(model: nn.Module | None) -> list[MixtureOfExperts]:
    """模型里的各层专家混合。"""
    return [m for m in model.modules() if isinstance(m, MixtureOfExperts)] if model else []
