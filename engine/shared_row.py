"""词表那一层少算几倍：语料里从没出现过的词元，合用词嵌入的一行。

    SharedRow         哪些词元合用一行，打分与答案怎样换算
    tie_unused_rows   找出可以合用的

训练的循环不认识它：打分时由 loss.py 的 `Loss` 用上，
更新之后与存盘之前由优化器的钩子补齐（`follow`）。
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import IGNORE, used_ids
from model import Transformer


@dataclass(frozen=True, eq=False)
class SharedRow:
    """语料里从没出现过的词元合用词嵌入的一行：算的仍是整张词表的 softmax，重复的部分只算一次。

    没出现过的词元从来不是答案，每一步受到的推力一模一样；起点相同，便一直相同。n 个相同的打分

        n · exp(s) = exp(s + ln n)

    于是只算其中一个，加上 ln n。内置语料只用到词表的四分之一，词表那一层的运算也就只剩四分之一。

    Fields:
        rows: 要算打分的 R 个编号 (R,)，最后一个代表所有合用的。
        column: 每个编号的打分在第几列 (V,)，取值 0 … R-1。
        bias: 加在各列上的数 (R,)：最后一列是 ln n，其余是 0。
        members: 合用一行的 n 个编号 (n,)。
    """

    rows: Tensor
    column: Tensor
    bias: Tensor
    members: Tensor

    def score(self, x: Tensor, table: Tensor) -> Tensor:
        """向量 (B, T, C) -> 打分 (B, T, R)，fp32；table 是词嵌入 (V, C)。"""
        table = table[self.rows]  # (R, C)
        # 代表的那一行收到 n 份推力之和，只留它自己的一份（exp(-ln n) = 1/n），与逐个训练时一样。
        own = torch.exp(-self.bias)[:, None]
        table = own * table + (1 - own) * table.detach()
        # 偏置加在 fp32 上：bf16 在 10 附近一格是 0.06，装不下 ln n。
        return F.linear(x, table).float() + self.bias

    def columns(self, targets: Tensor) -> Tensor:
        """答案 (B, T) -> 它的打分在第几列 (B, T)；IGNORE 不变。"""
        return torch.where(targets == IGNORE, IGNORE, self.column[targets.clamp(min=0)])

    @torch.no_grad()
    def spread(self, table: Tensor) -> None:
        """把代表的那一行抄给其余的：训练只更新它，词嵌入 (V, C) 于是与逐个训练的一样。"""
        # 写成 rows[-1:]：用单独的一个编号去取，处理器要先等设备把它交出来。
        table[self.members] = table[self.rows[-1:]]

    def spread_state(self, table: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """优化器里那一行的状态也照抄：以后不合用了（例如改用 FSDP），也接得上。"""
        for state in optimizer.state.get(table, {}).values():
            if state.shape == table.shape:
                self.spread(state)

    def follow(self, optimizer: torch.optim.Optimizer, table: Tensor) -> None:
        """每次更新词嵌入之后抄一遍；取优化器的状态之前，状态也抄一遍。没有更新的步子，不必抄。

        Args:
            optimizer: 管着词嵌入的那一个。
            table: 词嵌入 (V, C)。
        """
        optimizer.register_step_post_hook(lambda *_: self.spread(table))
        optimizer.register_state_dict_pre_hook(lambda owner: self.spread_state(table, owner))

    def state_dict(self) -> dict[str, Tensor]:
        """四个张量。"""
        return {name: getattr(self, name) for name in ("rows", "column", "bias", "members")}

    @classmethod
    def from_state_dict(
        cls, saved: dict[str, Tensor] | None, place: torch.device
    ) -> "SharedRow | None":
        """接着练时，合用的与上次的相同；上次没有合用的（例如 FSDP），这次也不合用。"""
        return saved and cls(**{name: x.to(place) for name, x in saved.items()})


@torch.no_grad()
def tie_unused_rows(model: Transformer, tokens: np.ndarray, newborn: bool) -> SharedRow | None:
    """找出可以合用一行的词元；省不下四分之一的打分就不值得，返回 None。

    Args:
        model: 合用的各行会就地改成相同的。
        tokens: 训练要用的全部编号，一维 uint16。
        newborn: 模型刚出生，没出现过的词元可以从同一个起点出发；否则（微调、增量预训练）
            只合并起点已经相同的，从前见过的词元各有各的行。
    """
    weight = model.embedding.weight
    unused = torch.from_numpy(~used_ids(tokens, len(weight))).to(weight.device)
    if not newborn:
        unused &= (weight == weight[-1]).all(dim=1)  # 末尾是补齐词表用的，哪份语料里都没有
    order = unused.int().argsort(stable=True)  # 单独一行的在前
    n_rows = -(-(len(weight) - int(unused.sum()) + 1) // 128) * 128  # 128 的倍数，GPU 算得快
    if n_rows > len(weight) * 3 // 4:
        return None
    bias = torch.zeros(n_rows, device=weight.device)
    bias[-1] = math.log(len(weight) - n_rows + 1)
    column = torch.empty_like(order)
    column[order] = torch.arange(len(weight), device=weight.device).clamp(max=n_rows - 1)
    shared = SharedRow(order[:n_rows], column, bias, order[n_rows - 1 :])
    shared.spread(weight)
    return shared
