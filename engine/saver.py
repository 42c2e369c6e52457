"""什么时候存检查点，存不下怎么办。"""

import sys
import time
from collections.abc import Callable
from typing import Any

from config import UserError
from engine.checkpoint import write
from engine.progress import Progress
from engine.run_folder import RunFolder
from settings.defaults import save_interval
from settings.say import say_above_bar


class Saver:
    """按时间保存。存不下时训练照常进行，下次再试。

    Args:
        folder: 存在哪里；几个进程时，只有第 0 个写。
        every: 隔多少秒；None 表示一分钟，但写得慢的磁盘会自动少存，保存占用的时间不超过 2%。
        progress: 记下保存用去的时间。
    Fields:
        step: 存下的检查点走到了第几步；还没有存过，是 None。
    """

    def __init__(self, folder: RunFolder, every: float | None, progress: Progress):
        self.folder, self.every, self.progress = folder, every, progress
        self.step = progress.step or None
        self.last, self.cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """该存了没有；别的进程听第 0 个的。"""
        return self.folder.writes and time.monotonic() - self.last >= self.interval

    @property
    def interval(self) -> float:
        """隔多少秒保存一次。"""
        return save_interval(self.every, self.cost)

    def save(
        self, make: Callable[[], dict[str, Any]], must: bool = False, leaving: bool = False
    ) -> None:
        """保存 make() 给出的检查点。

        Args:
            make: 收集状态；全体进程都要调用。
            must: 真时，存不下就抛出 UserError；否则只说一声。
            leaving: 存不存得下都要走了。
        """
        started = time.monotonic()
        checkpoint = make()
        if self.folder.writes:
            try:
                write(self.folder.path, checkpoint)
                self.step = self.progress.step
            except UserError as error:
                if must and self.step is None:
                    raise
                kept = f"第 {self.step} 步的检查点还在"
                if must:
                    again = f"腾出空间后接着练：{self.folder.how_to_resume}"
                    raise UserError(f"{error}；{kept}，{again}") from error
                then = "" if leaving else "；训练接着进行，下次再存"
                say_above_bar(f"（{error}。{kept}{then}）", file=sys.stderr)
        self.last = time.monotonic()
        self.cost = self.last - started
        self.progress.saving_seconds += self.cost

    def save_best(self, make: Callable[[], dict[str, Any]]) -> None:
        """留出的文字上最好的，另存一份，代替以前最好的；存不下只说一声。"""
        started = time.monotonic()
        checkpoint = make()
        if self.folder.writes:
            try:
                write(self.folder.best, checkpoint, keep_previous=False)
            except UserError as error:
                say_above_bar(f"（{error}。训练接着进行）", file=sys.stderr)
        self.progress.saving_seconds += time.monotonic() - started

    def forget_best(self) -> None:
        """另存的那一份不要了。"""
        if self.folder.writes:
            self.folder.best.unlink(missing_ok=True)
