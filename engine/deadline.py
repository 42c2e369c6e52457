"""练几小时、练到几点：照量到的速度，定下走几步。

学习率的曲线由步数决定（optimizer.py），所以时间先换成步数：照现在的速度，到点正好走完、检验完、
存好的那么多步。定下之后每步看一眼，差得不多就不改：机器快慢的小起伏，不该让学习率跟着抖。
剩的时间越少，容许差的也越少，所以到点时正好降到 0。
"""

import time
from bisect import bisect_right
from datetime import datetime

from config import Config, UserError
from engine.progress import UNKNOWN, Pace
from settings.clock import moment
from settings.defaults import eval_interval
from settings.say import say_above_bar

FEWEST = 20  # 一共还走不到这么多步，学不到什么，说一声
LATER = 2  # 秒：存好之后还要画图、说再见
CUT = 0.05  # 到点时还差全程的这么多，学习率降得还不够，说一声


class Deadline:
    """练到什么时候。

    Args:
        config: 用到 hours 或 until。
        began: hours 从什么时候算起，`time.monotonic()`。
        checkpoint: 接着练的，上次的检查点。
    Fields:
        n_steps: 上次定下的步数；还没有定过，或者时间改了，是 UNKNOWN。
    Raises:
        UserError: 没有练完，却已经到点了。
    """

    AIM = 0.99  # 定步数时，照剩下时间的这么多来定
    FINE = (0.95, 1.02)  # 定好的要用的时间，在剩下的这么多倍之间，就不改

    def __init__(self, config: Config, began: float, checkpoint: dict | None = None):
        self.config, self.began, self.used, self.n_steps = config, began, 0.0, UNKNOWN
        self.until = config.until and moment(config.until, datetime.now())
        step = 0
        if checkpoint:
            before, progress = checkpoint["config"], checkpoint["progress"]
            self.used, step = progress["seconds"], progress["step"]
            if all(before.get(name) == getattr(config, name) for name in ("hours", "until")):
                self.n_steps = checkpoint["max_steps"]
        if step < self.n_steps and self.left() <= 0:
            raise self.over()

    def left(self) -> float:
        """还剩多少秒。hours 只数练的时候；until 看的是钟，中断的、合上盖子的也算在内。"""
        if self.until:
            return self.until.timestamp() - time.time()
        return self.config.hours * 3600 - self.used - (time.monotonic() - self.began)

    def over(self) -> UserError:
        """还没有开始，就已经到点了。"""
        again = "；接着练的，还要加上 --allow_changes"
        if self.config.until:
            return UserError(f"已经过了 {self.config.until}；请用 --until 换一个时间{again}")
        return UserError(f"已经练满 {self.config.hours:g} 小时；还要练，请加大 --hours{again}")

    def plan(self, pace: Pace, n_steps: int) -> int:
        """一共该走几步；n_steps 是原来定的，还合适就仍是它。正在走的这一步总要走完。"""
        if pace.step_seconds is None:
            return n_steps
        planned = self._fitting(pace, n_steps)
        if planned < FEWEST <= n_steps:  # 头一回定时，或者检验比想的慢、后来改少了
            say_above_bar(f"（{self}：备好之后只够走 {planned} 步，学不到什么；请把时间给足）")
        elif planned == pace.step + 1 and CUT * n_steps < n_steps - planned and n_steps < UNKNOWN:
            say_above_bar(  # 电脑睡着了，钟拨快了，忽然慢了许多
                f"（{self}，已经到点，比定好的少走 {n_steps - planned} 步，学习率没有降到 0；"
                f"要降完，请用 --resume --allow_changes，--hours 或 --until 写得长些）"
            )
        return planned

    def _fitting(self, pace: Pace, n_steps: int) -> int:
        left = self.left() - pace.saver.cost - LATER
        if left <= 0:
            return pace.step + 1

        def needs(n: int) -> float:
            return pace.to(n, eval_interval(self.config, n)).remaining()

        least, most = (share * left for share in self.FINE)
        if n_steps < UNKNOWN and least <= needs(n_steps) <= most:
            return n_steps
        steps = range(pace.step + 1, pace.step + 2 + int(left / pace.step_seconds))
        fits = bisect_right(steps, self.AIM * left, key=needs)
        return pace.step + max(1, fits)

    def __str__(self) -> str:
        if self.config.until:
            return f"练到 {self.config.until}"
        return f"练 {self.config.hours:g} 小时"
