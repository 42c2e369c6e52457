"""专家混合：前馈层分成许多位专家，每个词元只交给其中几位。

    route              路由器的打分 -> 挑哪几位，各占多少
    mix_by_hand        逐位专家算的，看得懂的一份；mix_grouped 是快的一份
    MixtureOfExperts   代替 model.py 里 FeedForward 的一层
    Routing            训练时收集各层的负载均衡损失

图例：N 词元数（B × T），C 宽度，E 专家数，A 每个词元交给几位，I 专家的中间宽度。
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config

# ---------- 1. 挑几位专家，把它们的输出加起来 ----------


def route(scores: Tensor, n_active: int) -> tuple[Tensor, Tensor, Tensor]:
    """路由器的打分 (N, E) -> 概率 (N, E)、挑中的几位的权重 (N, A) 与编号 (N, A)，从大到小。"""
    probs = scores.float().softmax(-1)
    weights, chosen = probs.topk(n_active, dim=-1)
    return probs, weights / weights.sum(-1, keepdim=True), chosen


def mix_by_hand(
    x: Tensor, weights: Tensor, chosen: Tensor, expert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """专家混合，看得懂的一份：逐位专家，取出交给它的词元，算好，乘上权重，加回各自的位置。

    Args:
        x: (N, C)。
        weights, chosen: 每个词元交给哪几位，各占多少 (N, A)。
        expert: 第 e 位专家算几行，(e, (n, C)) -> (n, C)。
    Returns:
        (N, C)，fp32。
    """
    y = torch.zeros_like(x, dtype=torch.float32)
    for e in chosen.unique().tolist():
        token, place = torch.where(chosen == e)
        y = y.index_add(0, token, expert(e, x[token]) * weights[token, place, None])
    return y


def mix_grouped(
    x: Tensor, weights: Tensor, chosen: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """专家混合，快的一份：词元按专家排好队，各位专家的矩阵乘法一次做完。

    Args:
        x: (N, C)，精度就是乘法的精度。
        weights, chosen: 每个词元交给哪几位，各占多少 (N, A)。
        gate, up: 各位专家的矩阵 (E, I, C)。
        down: (E, C, I)。
    Returns:
        (N, C)，fp32。
    """
    N, A = chosen.shape
    order = chosen.flatten().argsort(stable=True)  # 第 n 个词元的第 a 位专家，原来排在 n·A + a
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(N * A, device=x.device))
    ends = F.one_hot(chosen.flatten(), len(gate)).sum(0).cumsum(0).int()  # 每位专家排到哪里 (E,)

    def multiply(rows: Tensor, matrices: Tensor) -> Tensor:
        """排给第 e 位专家的那些行，乘第 e 个矩阵。"""
        return F.grouped_mm(rows, matrices.type_as(rows).mT, offs=ends)

    queue = x[:, None].expand(-1, A, -1).reshape(N * A, -1)[order]  # (N·A, C)
    queue = multiply(F.silu(multiply(queue, gate)) * multiply(queue, up), down)
    return (queue[place].view(N, A, -1) * weights[..., None]).sum(1)


def has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """能不能用 `F.grouped_mm`：NVIDIA 显卡上只认 bf16，苹果的芯片上没有。"""
    return device.type in ("cpu", "meta") or (device.type == "cuda" and dtype == torch.bfloat16)


# ---------- 2. 一层 ----------


class Routing:
    """训练时随前向一路走下去，收集各层的负载均衡损失。

    Args:
        counted: 哪些词元算数，布尔 (B, T)；不算损失的（补齐用的、微调时的提问）不算。
    """

    def __init__(self, counted: Tensor):
        self.counted = counted.flatten()  # (N,)
        self.penalty: Tensor | None = None  # 各层之和，已乘系数，对算数的词元求和；稠密模型没有


class MixtureOfExperts(nn.Module):
    """专家混合：路由器给每个词元挑几位专家，把它们的输出加权相加（arXiv 1701.06538）。

    参数多了几倍，每个词元的运算却不变。挑中的几位，权重之和为 1；没有谁的词元会被丢掉。

    没有约束的话，少数几位专家越用越好、越好越用，其余的学不到东西。所以训练时加上负载均衡损失
    E · Σ f_i · P_i：f_i 是交给第 i 位的份额，P_i 是路由器给它的平均概率；都均匀时是 1，越集中越大
    （Switch Transformers，arXiv 2101.03961）。f 要在整个大批上数，而不是在每个小批上，专家才分得了
    工（arXiv 2501.11873）；这里用的是上一步整个大批的 f，于是怎样累积、几个进程，结果都一样。

    概率已经是零的专家，均衡损失也救不回来。所以宽的模型，路由器的初值与学习率都小
    （router_scale；学习率由 optimizer.py 照它缩小）：开头几步，别的层还在乱走，
    它不急着偏心（测量见 docs/lab-notes.md）。
    """

    def __init__(self, config: Config):
        super().__init__()
        E, C, I = config.n_experts, config.dim, config.hidden_dim  # noqa: E741
        self.n_active, self.balance_coef = config.n_active, config.balance_coef
        self.router_scale = config.router_scale  # 路由器的初值与学习率，是别的矩阵的几倍
        self.router = nn.Linear(C, E, bias=False)
        # 起点与稠密的前馈一样：按输入宽度缩放，最后一个投影是零，什么也不往残差流里加。
        self.gate = nn.Parameter(torch.randn(E, I, C) * C**-0.5)
        self.up = nn.Parameter(torch.randn(E, I, C) * C**-0.5)
        self.down = nn.Parameter(torch.zeros(E, C, I))
        self.register_buffer("load", torch.full((E,), 1 / E))  # 上一步的 f
        self.register_buffer("tally", torch.zeros(2, E), persistent=False)  # 这一步的 f 与 P 之和

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        rows = x.view(-1, x.size(-1))  # (N, C)
        # 打分在 autocast 之下是半精度的，专家的乘法也用这个精度。
        scores = self.router(x).flatten(0, -2)  # (N, E)
        probs, weights, chosen = route(scores, self.n_active)
        if routing is not None:
            self.balance(probs, chosen, routing)
        # 只有一个词元时（逐个生成），不必排队；"meta" 上的没有内容，不知道挑中的是谁。
        alone = len(rows) == 1 and not rows.is_meta
        if has_grouped_mm(x.device, scores.dtype) and not alone:
            rows = rows.type_as(scores)
            y = mix_grouped(rows, weights, chosen, self.gate, self.up, self.down)
        else:
            y = mix_by_hand(rows, weights, chosen, self.expert)
        return y.view(x.shape).type_as(x)

    def start_from_nothing(self) -> None:
        """专家的最后一个投影生来就是零；路由器再小几倍，它对各位专家也就几乎一视同仁。"""
        self.router.weight.data.mul_(self.router_scale)

    def expert(self, e: int, rows: Tensor) -> Tensor:
        """第 e 位专家，就是一个窄的 SwiGLU：(n, C) -> (n, C)。"""
        hidden = F.silu(F.linear(rows, self.gate[e])) * F.linear(rows, self.up[e])  # (n, I)
        return F.linear(hidden, self.down[e])

    def balance(self, probs: Tensor, chosen: Tensor, routing: Routing) -> None:
        """记下这些词元的去向，负载均衡损失加进 routing；参数同 `route` 的返回。"""
        counted = routing.counted[:, None]
        sent = F.one_hot(chosen, probs.size(1)).sum(1)  # (N, A, E) -> (N, E)
        with torch.no_grad():
            self.tally += torch.stack([(sent * counted).sum(0), (probs * counted).sum(0)])
        penalty = self.balance_coef * probs.size(1) * (self.load * probs * counted).sum()
        routing.penalty = penalty if routing.penalty is None else routing.penalty + penalty
