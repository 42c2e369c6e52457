"""参数怎样更新：学习率的曲线，Muon 与 AdamW。

learning_rate     学习率曲线：升温、平稳、下降
Muon              给矩阵用的优化器
build_optimizers  哪些参数归 Muon，哪些归 AdamW
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from config import Config
from engine.device import Device
from engine.distributed import is_sharded, shard_like
from experts import MixtureOfExperts
from model import Transformer

# ---------- 1. 学习率 ----------


def learning_rate(step: int, max_steps: int, warmup: float, decay: float) -> float:
    """第 step 步（从 0 数）的学习率是最高值的几倍：升温 -> 平稳 -> 下降到 0。

    平稳段让训练随时可以延长，最后一段的下降换来大部分的好处（WSD，arXiv 2404.06395）。
    """
    rising = (step + 1) / max(1, warmup * max_steps)  # 1. 从 0 线性升到 1
    falling = (max_steps - step) / max(1, decay * max_steps)  # 3. 最后线性降到 0
    return min(1.0, rising, falling)  # 2. 中间保持 1


def total_steps(max_steps: int | None, epochs: float, n_rows: int, rows_per_step: int) -> int:
    """这次训练共多少步：指定了步数就用它，否则由遍数算出。"""
    return max_steps or max(1, math.ceil(epochs * n_rows / rows_per_step))


# ---------- 2. Muon ----------


class Muon(torch.optim.Optimizer):
    """给矩阵用的优化器：把动量正交化，使每个方向上的更新一样大（Muon，arXiv 2502.16982）。

    与 `torch.optim.Muon` 的算法相同（测试里逐步比对），不同处有二：同形状的矩阵叠在一起算，
    少发几十次小的矩阵乘法；精度可选，因为没有 bf16 指令的 CPU 上，bf16 会慢上百倍。

    Args:
        matrices: 二维参数；三维的是叠在一起的许多个（各位专家的），各算各的。
        lr: 学习率，已换算成与 AdamW 相当的大小（每个元素的更新约为 0.2 lr）。
        momentum: 更新是最近约 1 / (1 - momentum) 步梯度的平均。
        weight_decay: 解耦的权重衰减。
        dtype: 正交化时的精度。
        pace: 步子与别的不同的参数：{参数: 几倍}。
    """

    def __init__(
        self,
        matrices,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
        pace: dict[Tensor, float] | None = None,
    ):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype, self.pace = dtype, pace or {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """按已经算好的梯度更新一次。"""
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for shape, params in same_shape.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov
                # 模型分开放时（FSDP），正交化要先把矩阵凑齐；结果各取各的。
                updates = [u.full_tensor() if is_sharded(u) else u for u in updates]
                size = 0.2 * max(shape[-2:]) ** 0.5  # 使更新的均方根与 AdamW 的相当
                matrices = torch.stack(updates).view(-1, *shape[-2:])
                updates = orthogonalize(matrices, self.dtype).view(-1, *shape)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    step = group["lr"] * size * self.pace.get(p, 1.0)
                    p.add_(shard_like(update, p), alpha=-step)


def orthogonalize(matrices: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """把每个矩阵的奇异值都推到 1 附近，方向不变：牛顿–舒尔茨迭代，不用做奇异值分解。

    Args:
        matrices: (N, 行, 列)。
        dtype: 计算的精度；bfloat16 就够。
        steps: 迭代次数。
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Keller Jordan 选的系数：在 0 附近升得最快
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # 让较小的一边在前，乘积的矩阵更小
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b·gram + c·gram²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a·x + polynomial·x
    return (x.mT if tall else x).to(matrices.dtype)


# ---------- 3. 分工 ----------


def build_optimizers(model: Transformer, config: Config, device: Device, lr: float):
    """各层的矩阵归 Muon；词嵌入与归一化的增益归 AdamW，它们没有「方向」可以正交化。

    专家混合的路由器也归 Muon，学习率另乘 router_scale：走得太急，几步之内就有专家再也轮不到。
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    dtype = torch.bfloat16 if device.dtype == torch.bfloat16 else torch.float32
    experts = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    pace = {m.router.weight: config.router_scale for m in experts}
    muon = Muon(matrices, lr, config.muon_momentum, config.weight_decay, dtype, pace)
    adamw = torch.optim.AdamW(
        rest,
        lr * config.embed_lr_scale,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=0.0,
        fused=device.place.type != "mps",
    )
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["max_lr"] = group["lr"]
    return muon, adamw


def set_learning_rate(optimizers, factor: float) -> None:
    """每组参数的学习率 = 它的最高值 × factor。"""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["max_lr"] * factor
