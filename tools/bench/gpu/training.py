"""训练：从前与现在，编译过的 Qwen3，deep 的两种分法，照推断该快些的几种改法。"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

from engine import stepper
from model import FeedForward
from optimizer import learning_rate
from tools.bench.gpu.former import Former, former_but_new_optimizer
from tools.bench.gpu.stage import Stage, skipped, stepping, warmed
from tools.bench.measuring import Row, ratios
from tools.bench.ours import Ours
from tools.bench.trainer import Trainer, compiled_or_error
from tools.bench.yardsticks import Qwen3, plain_device

# ---------- 1. 从前与现在；编译过的 Qwen3 ----------


def against_former(stage: Stage) -> Iterator[Row]:
    """`wide`：从前的一步，从前的一步配现在的优化器，现在的一步。"""
    makers = {
        "从前的一步": lambda: Former(stage.config("wide")),
        "从前的循环，现在的优化器": lambda: former_but_new_optimizer(stage.config("wide")),
        "现在的一步": lambda: Ours(stage.config("wide")),
    }
    yield from side_by_side(stage, "wide", makers, [
        ("现在的一步", "从前的一步", "> 1 倍"),
        ("从前的循环，现在的优化器", "从前的一步", ""),
    ])  # fmt: skip


def against_qwen3(stage: Stage) -> Iterator[Row]:
    """`wide`：编译过的 Qwen3 先独自编译好，再编译我们的，然后轮流上场。"""
    config = stage.config("wide")
    theirs = "编译过的 Qwen3" if stage.compile else "不编译的 Qwen3"
    makers = {
        theirs: lambda: Qwen3(config, stage.compile, plain_device(config)),
        "我们": lambda: Ours(stage.config("wide")),
    }
    yield from side_by_side(stage, "wide", makers, [("我们", theirs, "≥ 1.2 倍")])


def side_by_side(
    stage: Stage,
    preset: str,
    makers: dict[str, Callable[[], Trainer]],
    pairs: list[tuple[str, str, str]],
) -> Iterator[Row]:
    """几方一个一个地编译好，再轮流上场；pairs：谁比谁，目标是几倍。"""
    works, goals = {}, {"我们": "≥ 1,100,000（H100）", "现在的一步": "≥ 1,100,000（H100）"}
    for name, make in makers.items():
        works[name] = stepping(warmed(make()))
    speed = stage.take_turns(works)
    for name, values in speed.items():
        yield Row(f"{preset}：{name}", values, "词元/秒", goals.get(name, ""))
    for a, b, goal in pairs:
        yield Row(f"{preset}：{a}，比{b}", ratios(speed[a], speed[b]), "倍", goal)


# ---------- 2. deep 的两种分法 ----------


def deep_both_ways(stage: Stage) -> Iterator[Row]:
    """`deep`：一步 32 行，分两小批与不分。"""
    for rows, times in ((32, 1), (16, 2)) if not stage.rehearse else ((4, 1), (2, 2)):
        what = f"deep：{rows} 行 × {times} 次"
        yield from stage.attempt(what, one_split(stage, what, rows, times))


def one_split(stage: Stage, what: str, rows: int, times: int) -> Iterator[Row]:
    """一种分法：速度与显存。"""
    made = Ours(stage.config("deep", batch_size=rows, grad_accum=times))
    warmed(made)
    work = stepping(made)
    yield Row(what, [stage.speed(work) for _ in range(stage.repeats)], "词元/秒", "≥ 400,000")
    yield stage.measure_memory(what, work)
    made.leave()


# ---------- 3. 几种改法：只在这里改，模型的文件一个字也不动 ----------


def bf16_stream(made: Ours) -> None:
    """词嵌入给出半精度的：残差流从头到尾都是半精度。"""
    dtype = made.device.dtype
    made.model.embedding.register_forward_hook(lambda module, args, x: x.to(dtype))


def gate_and_up_together(layer: FeedForward, x: torch.Tensor, routing=None) -> torch.Tensor:
    """门与升两个矩阵首尾相接，一次乘完；代替 FeedForward.forward。"""
    both = torch.cat([layer.gate.weight, layer.up.weight])
    gate, up = F.linear(x, both).chunk(2, dim=-1)
    return layer.down(F.silu(gate) * up)


N_LOSS = 100  # 练几步比损失；演习时走几步意思一下


def options(stage: Stage) -> Iterator[Row]:
    """原样，与照推断该快些的两种：残差流用 bf16，门与升合成一次。"""
    together = mock.patch.object(FeedForward, "forward", gate_and_up_together)
    yield from stage.attempt("原样", one_option(stage, "原样"))
    what = "残差流用 bf16"
    yield from stage.attempt(what, one_option(stage, what, change=bf16_stream))
    what = "门与升合成一次"
    yield from stage.attempt(what, one_option(stage, what, patches=[together]))


def autotune(stage: Stage) -> Iterator[Row]:
    """max-autotune：编译器把每个矩阵乘法的几种写法都试一遍。"""
    what = "max-autotune"
    if not stage.compile:
        yield skipped(what, "不编译")
        return
    tuned = partial(stepper.compile_if_possible, max_autotune=True, coordinate_descent_tuning=True)
    patch = mock.patch.object(stepper, "compile_if_possible", tuned)
    yield from stage.attempt(what, one_option(stage, what, patches=[patch]))


def one_option(
    stage: Stage, what: str, change: Callable[[Ours], None] = lambda made: None, patches=()
) -> Iterator[Row]:
    """一种改法：从同样的种子练 N_LOSS 步的损失，速度，显存。

    Args:
        change: 编译之前改造好的一方。
        patches: 从造到测完都要换着的。
    """
    steps = 4 if stage.rehearse else N_LOSS
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        made = Ours(stage.config("wide"))
        change(made)
        with compiled_or_error(made.device):
            made.warm_up()  # 之后又是刚出生的
        losses = []
        for step in range(steps):
            made.step(learning_rate(step, steps, made.config.warmup, made.config.decay))
            losses.append(made.loss)
        last = losses[-max(1, steps // 5) :]
        loss = sum(last) / len(last)
        yield Row(f"wide，{what}：走 {steps} 步，最后五分之一的损失 {loss:.5f}", [loss], "奈特")
        work = stepping(made)
        speed = [stage.speed(work) for _ in range(stage.repeats)]
        yield Row(f"wide，{what}", speed, "词元/秒")
        yield stage.measure_memory(f"wide，{what}", work)
        made.leave()
