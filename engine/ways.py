"""``--plan`` 的后一半：练到多好，怎样放进一个晚上。

expected_loss   照记录（recorded.py）估的损失，或者为什么估不了
ways            三种走法，各是一条照抄就行的命令，要多久，练到多好
"""

import math
import shlex
from bisect import bisect_right
from dataclasses import fields, replace
from typing import NamedTuple

from config import HOW_LONG, PRESETS, Config
from engine.recorded import Expected, expected
from settings.defaults import eval_interval, fewer_steps, total_steps
from settings.resolve import Origin, load_config
from settings.stored import HARMLESS, LOCAL, ROUNDING

EVENING = 3600  # 秒：一个晚上留给它多久
SIZES = (("tiny", "small", "wide", "deep"), ("tiny-moe", "moe"))  # 嫌慢换左边的，嫌小换右边的
STEPS = {"pretrain": "max_steps", "sft": "sft_max_steps"}
# 改了也不影响损失的（只差一点舍入、种子的运气），以及步数：它正是线的横坐标。
FREE = HARMLESS | ROUNDING | LOCAL | {"seed", "keep_reasoning", "sft_lr", "eval_tokens"} | {
    name for group in HOW_LONG for name in group
}  # fmt: skip


class Way(NamedTuple):
    """一种走法。"""

    command: str
    seconds: float | None  # 从敲下命令到走完；没有量过是 None
    loss: Expected | str  # 估不了的，为什么
    note: str = ""


# ---------- 1. 练到多好 ----------


def expected_loss(run, n_steps: int) -> Expected | str:
    """这一次训练改走 n_steps 步，损失该是多少；估不了的，为什么。"""
    config = run.config
    if run.stage != "pretrain" or not run.from_scratch:
        return "没有可比的记录：记下的都是从头的预训练"
    if config.data != "builtin":
        return "没有可比的记录：记下的都是内置词典上的，换了语料，损失不能比"
    usual = load_config("pretrain", ["--preset", config.preset])[0]
    usual = replace(usual, **PRESETS[config.preset])  # config.py 里改过的，也算改了
    names = [f.name for f in fields(Config) if f.name not in FREE]
    changed = [name for name in names if getattr(config, name) != getattr(usual, name)]
    if run.rows_per_step != usual.batch_size * usual.grad_accum:
        changed.append("batch_size × grad_accum")
    if changed:
        return f"没有可比的记录：改了 {'、'.join(changed)}"
    return of_preset(config.preset, n_steps * run.rows_per_step * config.seq_len)


def of_preset(preset: str, tokens: int) -> Expected | str:
    """一套预设在内置词典上读 tokens 个词元。"""
    unknown = f"没有可比的记录：{preset} 没有练过差不多 {tokens / 1e6:.2g} M 个词元的"
    return expected(preset, tokens) or unknown


# ---------- 2. 放进一个晚上 ----------


def ways(run, startup: float) -> list[Way]:
    """三种走法：少走些步；换一套大小（换不了的，换一个步数）；一步不少，随时停下、接着走。

    Args:
        run: 量过了的训练，用到它的 pace。
        startup: 备数据与编译要的秒数，怎样走都要。
    """
    steps = range(run.first_step + 1, run.n_steps + 1)
    total = startup + seconds_of(run, run.n_steps)
    if long := total > EVENING:
        fits = bisect_right(steps, EVENING - startup, key=lambda n: seconds_of(run, n))
        fewer, instead = max(1, fits), max(1, fits // 2)
        nights = math.ceil(total / EVENING)
        note = f"一步不少，分 {nights} 个晚上：到点按 Ctrl-C，下一晚加上 --resume 接着走"
    else:
        fewer, instead = max(1, len(steps) // 2), 2 * len(steps)
        note = "一步不少：中途要用机器就按 Ctrl-C，回头加上 --resume 接着走"
    other = other_size(run, startup, smaller=long)
    return [
        with_steps(run, startup, run.first_step + fewer),
        other or with_steps(run, startup, run.first_step + instead),
        Way(typed(run), total, expected_loss(run, run.n_steps), note),
    ]


def with_steps(run, startup: float, n_steps: int) -> Way:
    """改走到第 n_steps 步为止。"""
    allow = "" if not run.resumed or run.config.allow_changes else " --allow_changes"
    name = STEPS[run.stage]
    command = typed(run, next({*group} for group in HOW_LONG if name in group))
    command += f"{allow} --max_steps {n_steps}"
    return Way(command, startup + seconds_of(run, n_steps), expected_loss(run, n_steps))


def seconds_of(run, n_steps: int) -> float:
    """走到第 n_steps 步为止，连同检验与保存，要多久。"""
    return run.pace.to(n_steps, eval_interval(run.config, n_steps)).remaining()


def other_size(run, startup: float, smaller: bool) -> Way | None:
    """小一号或大一号的预设，照它自己的步数；没有那一号，或者形状由检查点定了的，是 None。

    用时照运算量折算，只用于处理器：显卡上小的模型喂不饱它，折算不准。
    """
    config = run.config
    row = next(row for row in SIZES if config.preset in row)
    at = row.index(config.preset) + (-1 if smaller else 1)
    if run.resumed or not run.from_scratch or not 0 <= at < len(row):
        return None
    other = replace(config, **{"max_steps": None, "epochs": None} | PRESETS[row[at]])
    n_tokens = run.card["train_tokens"]
    n_rows = -(-n_tokens // other.seq_len)
    n_steps = total_steps(other, run.stage, n_rows, n_tokens)
    tokens = fewer_steps(other, n_steps, n_rows) * other.batch_size * other.seq_len
    tokens *= other.grad_accum
    seconds = None
    if run.device.place.type == "cpu":
        n_scored = len(run.shared.rows) if run.shared else config.vocab_size
        more = work(other, n_scored) / work(config, n_scored)
        per_token = run.pace.step_seconds / (run.rows_per_step * config.seq_len)
        seconds = startup + more * (per_token * tokens + run.pace.checking)
    loss = expected_loss(run, run.n_steps)
    if config.data == "builtin":
        loss = of_preset(row[at], tokens)
    command = typed(run, {"preset", *HOW_LONG[0], *PRESETS[row[at]]})  # 走它自己的步数
    return Way(f"{command} --preset {row[at]}", seconds, loss)


def work(config: Config, n_scored: int) -> int:
    """一个词元要多少次乘加：各层的矩阵与注意力，再给 n_scored 个词元打分；只用来比。"""
    dim, kv = config.dim, config.dim * config.n_kv_heads // config.n_heads
    layer = 2 * dim * (dim + kv) + 3 * dim * config.active_width() + 2 * dim * config.seq_len
    return config.n_layers * layer + dim * n_scored


def typed(run, without: set[str] = frozenset()) -> str:
    """这一次的命令，照用户写的；--plan 与 without 里的不写。"""
    command = run.folder.script
    for name, origin in run.origins.items():
        if name in {"plan", *without} or origin not in (Origin.FLAG, Origin.TRIED):
            continue
        value = "auto" if origin is Origin.TRIED else getattr(run.config, name)
        if isinstance(value, bool):
            command += f" --{name}" if value else f" --no-{name}"
        else:
            command += f" --{name} {shlex.quote(str(value))}"
    return command
