"""训练走到了哪里：步数、用时、检验的结果，以及随机数。它们自己存，自己取回。"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass
class Progress:
    """训练走到了哪里。"""

    step: int = 0  # 已经走完的步数
    tokens: int = 0  # 已经学过的目标数
    skipped: int = 0  # 因为损失或梯度不是有限的数而没有更新的步数
    skipped_in_a_row: int = 0
    seconds: float = 0.0  # 训练用去的时间，含检验与保存，不含中断的时候
    saving_seconds: float = 0.0  # 其中保存用去的
    val_loss: float = math.inf  # 最近一次检验
    val_bpc: float = math.inf
    best_val_loss: float = math.inf  # 各次检验里最好的，以及它在第几步
    best_step: int = 0

    def checked(self, val_loss: float, val_bpc: float, everything: bool) -> None:
        """记下一次检验的结果；最后那次检验的数据多，不与平时的比高低。"""
        self.val_loss, self.val_bpc = val_loss, val_bpc
        if val_loss < self.best_val_loss and not everything:
            self.best_val_loss, self.best_step = val_loss, self.step

    def state_dict(self) -> dict[str, Any]:
        """各个字段。"""
        return asdict(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """取回各个字段。Raises KeyError：少了哪个。"""
        for name in vars(self):
            setattr(self, name, saved[name])


class RandomNumbers:
    """PyTorch 的随机数走到了哪里：CPU 的一份，每块显卡一份。"""

    def state_dict(self) -> dict[str, Any]:
        """{"cpu": uint8 张量, "cuda": [每块显卡一个]}；没有用过显卡，后者是空的。"""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """从那里接着；显卡比那时少的，多出来的不要。"""
        torch.set_rng_state(saved["cpu"])
        for i, state in enumerate(saved["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)
