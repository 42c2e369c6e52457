"""各部分共用的：形状、计时、显存、出了错怎么办。"""

from settings.script import is_out_of_memory

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from config import Config
from settings.say import brief
from tools.bench.measuring import Row
from tools.bench.trainer import Trainer, compiled_or_error, settings

# 演习：每样东西都在，都极小
SMALL = dict(
    device="cpu", dtype="float32", dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32,
    seq_len=32, max_len=128,
)  # fmt: skip
SMALL_STEP = dict(batch_size=4, grad_accum=1)


@dataclass(frozen=True)
class Stage:
    """这一次怎样测；每一部分都拿到它，也跟着它去自己的进程。

    Fields:
        folder: 原始记录写在哪里。
        seconds: 每一次计时至少多久，秒。
        repeats: 轮流上场的几方，各几次。
        rehearse: 演习：CPU，极小的形状。
        compile: 编译不编译。
        data_dir: 词元文件在哪里。
        checkpoint: `puzzle` 用的检查点；空的就当场练一个。
    """

    folder: str
    seconds: float = 1.0
    repeats: int = 3
    rehearse: bool = False
    compile: bool = True
    data_dir: str = "data"
    checkpoint: str = ""

    def changes(self, **changes) -> dict:
        """不同于预设的设置；演习时，形状换成极小的。"""
        changes = {"data_dir": self.data_dir, "compile": self.compile} | changes
        return SMALL_STEP | changes | SMALL if self.rehearse else changes

    def config(self, preset: str, **changes) -> Config:
        """一种大小的设置；写明了怎样分成小批的，就照写的分。"""
        changes = self.changes(**changes)
        config = settings(preset, **changes)
        for name in SMALL_STEP.keys() & changes:
            setattr(config, name, changes[name])
        config.sft_data = "builtin"
        return config

    def log(self, title: str, text: str) -> None:
        """原始记录：剖析的表、出错的回溯，一段一段地添在同一个文件里；太长的只留结尾。"""
        with (Path(self.folder) / "log.txt").open("a", encoding="utf-8") as f:
            f.write(f"===== {title}\n{text.rstrip()[-30_000:]}\n\n")

    # ---------- 计时 ----------

    def speed(self, work: Callable[[], int], share: float = 1.0) -> float:
        """反复干活，至少 seconds × share 秒：每秒干了多少。"""
        total, start = 0, self.clock()
        while time.perf_counter() - start < self.seconds * share or not total:
            total += work()
        return total / (self.clock() - start)

    def take_turns(self, works: dict[str, Callable[[], int]]) -> dict[str, list[float]]:
        """几方都备好了，轮流计时，各 repeats 次。"""
        found: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.repeats):
            for name, work in works.items():
                found[name].append(self.speed(work))
        return found

    def clock(self) -> float:
        """显卡做完了手里的活之后的时刻，秒。"""
        self.finish()
        return time.perf_counter()

    def finish(self) -> None:
        """等显卡做完手里的活。"""
        if torch.cuda.is_available() and not self.rehearse:
            torch.cuda.synchronize()

    def measure_memory(self, what: str, work: Callable[[], object]) -> Row:
        """干一份活，显存的峰值。"""
        if self.rehearse:
            work()
            return Row(f"{what}：显存的峰值", [], "GB")
        torch.cuda.reset_peak_memory_stats()
        work()
        return Row(f"{what}：显存的峰值", [torch.cuda.max_memory_allocated() / 1e9], "GB")

    # ---------- 出了错 ----------

    def attempt(self, what: str, rows: Iterator[Row]) -> Iterator[Row]:
        """测其中一项；出了错，写成一行，接着测下一项。用过的显存与编译的结果随后都放掉。"""
        try:
            yield from rows
        except Exception as error:
            self.log(what, traceback.format_exc())
            reason = "显存不够" if is_out_of_memory(error) else brief(error, 120)
            yield Row(f"{what}（没有做完：{type(error).__name__}，{reason}）", [], "")
        finally:
            self.clean()

    def clean(self) -> None:
        """上一项的显存与编译的结果都放掉，下一项才从头开始。"""
        if self.compile:
            torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available() and not self.rehearse:
            torch.cuda.empty_cache()


def skipped(what: str, why: str) -> Row:
    """在这里测它没有意义。"""
    return Row(f"{what}（略过：{why}）", [], "")


def warmed(made: Trainer) -> Trainer:
    """走过几步、编译好了的一方。"""
    with compiled_or_error(made.device):
        made.warm_up()
        for _ in range(3):
            made.step(0.1)
    return made


def stepping(made: Trainer) -> Callable[[], int]:
    """一份活：走一步，返回读了多少词元（算损失的与不算的都在内）。"""
    tokens = made.rows_per_step * made.config.seq_len

    def work() -> int:
        made.step(0.1)
        return tokens

    return work
