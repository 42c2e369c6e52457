"""训练走到了哪里，还要走多久。

rereads, out_of           会不会读到第二遍；一共几步，说给人看
Progress, RandomNumbers   步数、用时、检验的结果，以及随机数：它们自己存，自己取回
Pace                      走得多快，还要多久：编译不算，检验与保存算在内
Bar                       进度条；多快、还要多久，听 Pace 的
"""

import copy
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

# 练到几点的，速度还没有量到（头两步）时，当作一共要走这么多步：学习率因此从很小起。
# 真的训练走不到这么多：--max_steps 至多十亿，每秒一千步也要走三十年。
UNKNOWN = 10**12


def rereads(run) -> bool:
    """照现在的步数，会不会读到第二遍。"""
    return run.n_steps * run.rows_per_step > run.train.n_rows


def out_of(n_steps: int) -> str:
    """一共几步，接在「走了几步」后面说。"""
    return f"，共 {n_steps} 步" if n_steps < UNKNOWN else "，一共几步还没有定"


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


class Pace:
    """走得多快，还要多久：一步用多久取最近几步的中位数，编译的那一步再慢也不算。

    Args:
        steps: 要走的各步。
        eval_every: 隔几步检验一次。
        checks: 平时的一次检验、最后的一次，词元数各是一步的几倍。
        saver: 用到 interval（隔多少秒保存一次）与 cost（上一次用了多少秒）。
        compiled: 检验已经编译过了；没有的，头一次不算。
    """

    ENOUGH = 50  # 量了这么多步，就说还要多久；一共没有它的两倍，走了一半就说
    FEWEST = 10  # 一半还不到这么多步的，转眼就完，不说
    FORWARD = 0.5  # 同样多的词元，检验用的时间是训练的几倍；只用到量着它之前

    def __init__(
        self, steps: range, eval_every: int, checks: tuple[float, float], saver, compiled: bool
    ):
        self.step, self.n_steps, self.eval_every = steps.start, steps.stop, eval_every
        self.usual, self.last = checks
        self.saver, self.to_skip = saver, 0 if compiled else 1
        half = len(steps) // 2
        self.say_after = min(self.ENOUGH, half) if half >= self.FEWEST else None
        self.timed = -1  # 头一步要编译，不算
        self.recent: deque[float] = deque(maxlen=self.ENOUGH)
        self.measured: deque[float] = deque(maxlen=3)

    @classmethod
    def of(cls, run, exam) -> "Pace":
        """这一次训练的，从现在数起。"""
        config, held_out = run.config, exam.batches.n_rows * exam.batches.seq_len
        per_step = run.rows_per_step * config.seq_len
        usual, last = (min(n * config.eval_tokens, held_out) / per_step for n in (1, 10))
        if rereads(run):  # 末了还要与最好的比（checks.py）
            last += usual
        compiled = run.newborn or not run.device.compile  # 刚出生的，第 0 步检验过
        return cls(
            range(run.first_step, run.n_steps), run.eval_every, (usual, last), run.saver, compiled
        )

    def stepped(self, seconds: float) -> bool:
        """走完一步，用了这么久；返回该不该说还要多久了，一次训练只有一回。"""
        self.step, self.timed = self.step + 1, self.timed + 1
        if self.timed:
            self.recent.append(seconds)
        return self.timed == self.say_after

    def checked(self, seconds: float) -> None:
        """平时的一次检验，用了这么久。"""
        if self.to_skip:
            self.to_skip -= 1
        else:
            self.measured.append(seconds)

    @property
    def step_seconds(self) -> float | None:
        """一步用多久；还没有量到是 None。"""
        return statistics.median(self.recent) if self.recent else None

    @property
    def check_seconds(self) -> float:
        """平时的一次检验用多久。"""
        if self.measured:
            return statistics.median(self.measured)
        return self.FORWARD * self.usual * self.step_seconds

    @property
    def checking(self) -> float:
        """余下的检验一共要多久。"""
        n = (self.n_steps - 1) // self.eval_every - self.step // self.eval_every
        last = self.last / self.usual if self.step < self.n_steps else 0
        return (max(0, n) + last) * self.check_seconds

    def to(self, n_steps: int, eval_every: int) -> "Pace":
        """一样的速度，改走到第 n_steps 步为止。"""
        other = copy.copy(self)
        other.n_steps, other.eval_every = n_steps, eval_every
        return other

    def remaining(self) -> float | None:
        """还要多少秒；还没有量到是 None。"""
        if self.step_seconds is None:
            return None
        seconds = (self.n_steps - self.step) * self.step_seconds + self.checking
        n_saves = seconds / max(self.saver.interval, self.step_seconds, 1e-9)
        return seconds + n_saves * self.saver.cost

    def rate(self) -> float:
        """每秒几步，检验与保存摊在里面；还没有量到是 0，进度条写成问号。"""
        left = self.remaining()
        return (self.n_steps - self.step) / left if left else 0.0


class Bar(tqdm):
    """进度条；它自己的算法把编译的一分钟也算进速度里，所以改听 `Pace` 的。"""

    def __init__(self, pace: Pace, total: int, **options):
        self.pace = pace
        super().__init__(total=total if total < UNKNOWN else None, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """画进度条用的各项。"""
        return super().format_dict | {"rate": self.pace.rate()}
