"""这个仓库自己练完过的训练，与照它们估出来的损失。

RUNS           一张表：练了多少词元，练到多好；每一次都走完了全程，学习率降到了 0
fit            一条线：损失 = A（每套预设一个）·（词元数 + D₀）^−b
leave_one_out  每一次轮流不看，由其余的估它，差多少：线的误差
expected       某套预设读这么多词元，损失该是多少

只收内置词典上的：换了语料，损失就不能比。步数不同的，是另走的全程，不是一次训练的半途：半途的学习率还没有降。
词元数的幂取自 Scaling Laws for Neural Language Models（arXiv 2001.08361）；D₀ 是开头学得慢的一段，
没有它，不到两百步的便高估。再加一个地板（损失 = E + …），拟合得一样好，分不出有没有，所以没有。
"""

import math
from typing import NamedTuple

import numpy as np


class Recorded(NamedTuple):
    """一次练完的训练。"""

    preset: str  # 预设；设置改过的，是「预设，从前」
    tokens: int  # 一共读了多少词元：步数 × 一步的
    loss: float  # 全部留出的词条上，奈特每词元；wide 的后三次只取了 40 960 个词元
    source: str  # 在 SOURCES 里的哪一条


# 名字里有「从前」的，是整篇地装、Muon 调匀之前练的：不用来估现在的预设，只用来定线的斜率。
SOURCES = {
    "整篇": "docs/lab-notes.md「优化器：又试了几样」；2 核 EPYC（Zen 3），float32，一个线程，"
    "eb2930e 加 --residual_lr_scale 0.25，2026-11-28",
    "扫描": "docs/lab-notes.md「tiny 的优化器」；2 核 EPYC（Zen 3），float32，2026-11-24",
    "种子": "docs/lab-notes.md「专家混合」：--seed 42、43、44；同一台，b6b8d3b，2026-11-25",
    "bf16": "docs/lab-notes.md「tiny 预设」；2 核 EPYC（Zen 4），bf16，15ccb64，2026-11-24",
    "H100": "docs/lab-notes.md「第一次上真的显卡」；NVIDIA H100，bf16，9386fec，2026-11-26",
    "蒸馏": "docs/ecosystem.md 里没有老师的两行；同一块，9386fec，2026-11-26",
    "短的": "pre_train.py --max_steps … --seed 42、43 --no-compile --eval_every 1000，"
    "一个线程；2 核 EPYC，bf16，4169ff5，2026-11-28",
}

# fmt: off
RUNS = (
    Recorded("tiny", 100 * 2048, 4.739, "整篇"),
    Recorded("tiny", 300 * 2048, 4.240, "整篇"),
    Recorded("tiny", 1000 * 2048, 3.640, "整篇"),
    Recorded("tiny", 1000 * 2048, 3.660, "整篇"),
    Recorded("tiny", 1000 * 2048, 3.639, "整篇"),
    Recorded("tiny，从前", 50 * 2048, 5.223, "短的"),
    Recorded("tiny，从前", 50 * 2048, 5.255, "短的"),
    Recorded("tiny，从前", 100 * 2048, 4.928, "短的"),
    Recorded("tiny，从前", 100 * 2048, 4.950, "短的"),
    Recorded("tiny，从前", 200 * 2048, 4.617, "短的"),
    Recorded("tiny，从前", 200 * 2048, 4.627, "短的"),
    Recorded("tiny，从前", 200 * 2048, 4.613, "扫描"),
    Recorded("tiny，从前", 400 * 2048, 4.284, "短的"),
    Recorded("tiny，从前", 400 * 2048, 4.295, "短的"),
    Recorded("tiny，从前", 1000 * 2048, 3.720, "种子"),
    Recorded("tiny，从前", 1000 * 2048, 3.845, "种子"),
    Recorded("tiny，从前", 1000 * 2048, 3.777, "种子"),
    Recorded("tiny，从前", 1000 * 2048, 3.744, "bf16"),
    Recorded("tiny，从前", 1000 * 2048, 3.727, "蒸馏"),
    Recorded("tiny，从前", 1000 * 2048, 3.812, "蒸馏"),
    Recorded("tiny，从前", 1000 * 2048, 3.794, "蒸馏"),
    Recorded("tiny，从前", 2000 * 2048, 3.461, "蒸馏"),
    Recorded("tiny，从前", 2000 * 2048, 3.447, "蒸馏"),
    Recorded("tiny，从前", 2000 * 2048, 3.479, "蒸馏"),
    Recorded("tiny-moe，从前", 100 * 2048, 4.916, "短的"),
    Recorded("tiny-moe，从前", 400 * 2048, 4.236, "短的"),
    Recorded("tiny-moe，从前", 1000 * 2048, 3.707, "种子"),
    Recorded("tiny-moe，从前", 1000 * 2048, 3.640, "种子"),
    Recorded("tiny-moe，从前", 1000 * 2048, 3.628, "种子"),
    Recorded("wide", 589 * 16384, 3.245, "H100"),
    Recorded("wide", 589 * 16384, 3.283, "H100"),
    Recorded("wide", 589 * 16384, 3.250, "H100"),
    Recorded("wide", 589 * 16384, 3.229, "H100"),
)
# fmt: on

STARTS = range(0, 400_000, 5_000)  # 试这些 D₀
WIDER = 1.5  # 估得到的范围：这套预设练过的最少的几分之一，到最多的几倍


class Line(NamedTuple):
    """ln 损失 = ln A − b · ln(词元数 + D₀)。"""

    power: float  # b，几套预设相同
    start: float  # D₀，也相同
    amount: dict[str, float]  # ln A，每套预设一个

    def loss(self, preset: str, tokens: float) -> float:
        """读这么多词元之后的损失。"""
        return math.exp(self.amount[preset] - self.power * math.log(tokens + self.start))


class Expected(NamedTuple):
    """估出来的损失，误差，由几次训练估的。"""

    loss: float
    error: float
    n_runs: int


def fit(runs: tuple[Recorded, ...]) -> Line:
    """最小二乘；D₀ 一个个试过去，别的有公式。"""
    presets = sorted({run.preset for run in runs})
    tokens, losses = np.array([run.tokens for run in runs], float), [run.loss for run in runs]
    which = np.array([[run.preset == p for p in presets] for run in runs], float)
    best: tuple[float, Line] | None = None
    for start in STARTS:
        table = np.column_stack([-np.log(tokens + start), which])
        (power, *amount), *_ = np.linalg.lstsq(table, np.log(losses), rcond=None)
        missed = float(np.square(table @ [power, *amount] - np.log(losses)).sum())
        if best is None or missed < best[0]:
            best = missed, Line(float(power), start, dict(zip(presets, amount, strict=True)))
    return best[1]


def leave_one_out(runs: tuple[Recorded, ...]) -> list[float]:
    """每一次轮流不看：估的与真的损失之比的对数。一套预设只有一次的，估不了它，不算。"""
    n_of = {p: sum(r.preset == p for r in runs) for p in {r.preset for r in runs}}
    return [
        math.log(fit((*runs[:i], *runs[i + 1 :])).loss(run.preset, run.tokens) / run.loss)
        for i, run in enumerate(runs)
        if n_of[run.preset] > 1
    ]


def expected(preset: str, tokens: int, runs: tuple[Recorded, ...] = RUNS) -> Expected | None:
    """某套预设从头练、一共读 tokens 个词元，损失该是多少；没有练过差不多长的，是 None。

    误差是 `leave_one_out` 的均方根的两倍：二十次里大约有一次在它之外。
    """
    lengths = [run.tokens for run in runs if run.preset == preset]
    if not lengths or not min(lengths) / WIDER <= tokens <= max(lengths) * WIDER:
        return None
    loss = fit(runs).loss(preset, tokens)
    missed = leave_one_out(runs)
    return Expected(loss, 2 * loss * math.hypot(*missed) / math.sqrt(len(missed)), len(runs))
