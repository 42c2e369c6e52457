"""默认的训练在这台机器上要多久：真的走几步，乘以步数。

走的就是 pre_train.py、sft_train.py 的循环，一行没有另写；只是不编译，也没有检查点与检验。
"""

from settings.script import is_out_of_memory

import io
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch

import pre_train
import sft_train
from config import Config
from engine.device import Device
from engine.stepper import Stepper
from model import Transformer
from settings.defaults import fewer_steps
from settings.say import say
from tokenizer import Tokenizer

SECONDS = 4.0  # 至多走多久，头两步除外
STEPS = 3


class Trial(Stepper):
    """走几步就停，记下每步多久；一大批太慢的，只取其中几行，按行数放大。"""

    def __init__(self, stage: str, config: Config, tokenizer: Tokenizer):
        super().__init__(stage, config, Device(config), tokenizer)
        self.seconds: list[float] = []  # 整整一步的秒数

    def model(self) -> Transformer:
        """刚出生的模型：学没学过，一样快。"""
        torch.manual_seed(self.config.seed)
        return Transformer(self.config).to(self.device.place)

    def steps(self, exam) -> Iterator[int]:
        """先走一行的两步：头一步要分配内存，不算；第二步看出一行要多久，往后放得下几行。"""
        whole = self.rows_per_step
        self.rows_per_step = 1
        for _ in range(2):
            started = time.perf_counter()
            yield 0
            self.between_steps()
        of_one = time.perf_counter() - started
        self.rows_per_step = min(whole, max(1, int(SECONDS / STEPS / of_one)))
        deadline = time.perf_counter() + SECONDS
        while len(self.seconds) < STEPS and (not self.seconds or time.perf_counter() < deadline):
            started = time.perf_counter()
            yield 0
            self.between_steps()
            ended = time.perf_counter()
            rows = (self.clipping - started) * whole / self.rows_per_step
            self.seconds.append(rows + ended - self.clipping)

    def clip(self, optimizer, limit: float):
        """在此之前的随行数增长，从此以后的一步一次。"""
        self.clipping = time.perf_counter()
        return super().clip(optimizer, limit)


def time_of_default_run(
    stage: str, config: Config, tokenizer: Tokenizer, preset_steps: bool
) -> dict[str, Any]:
    """照 config 训练要多久。

    Args:
        preset_steps: 步数是预设的：数据少时，训练会少走几步。

    Returns:
        {"steps", "seconds_per_step", "seconds", "device", "compile"}；内存不够，走不了一步的，
        两个秒数是 None。compile 是训练时还会编译，比这里快。
    """
    trial = Trial(stage, replace(config, compile=False), tokenizer)
    if trial.device.unused_card:
        say(f"（{trial.device.unused_card}）", file=sys.stderr)
    script = {"pretrain": pre_train, "sft": sft_train}[stage]
    try:
        with redirect_stdout(io.StringIO()):  # 数据的事已经说过了
            script.main(run=trial)
        each = statistics.median(trial.seconds)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        each = None
    n_steps = trial.n_steps
    if preset_steps:
        n_steps = fewer_steps(config, n_steps, trial.train.n_rows)
    return {
        "steps": n_steps, "seconds_per_step": each, "seconds": each and each * n_steps,
        "device": trial.device.place.type, "compile": Device(config).compile,
    }  # fmt: skip
