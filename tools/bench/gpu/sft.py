"""微调走各条注意力的路，每秒读多少词元，比预训练慢多少。

微调的一行里有几段对话，互相看不见，要布尔的遮罩；走哪个算子，见 attention。
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from unittest import mock

import model
from tools.bench.gpu.attention import NO_FLEX, OLD, flexible, grouped, no_cudnn, repeated
from tools.bench.gpu.stage import Stage, skipped, stepping, warmed
from tools.bench.measuring import Row, ratios
from tools.bench.ours import Ours

OLD_CARDS = f"{OLD}，不许 cuDNN"  # 3090、4090 上就是这样
WAYS: dict[str, Callable | None] = {
    "我们的": None,
    OLD: grouped,
    OLD_CARDS: grouped,
    "复制键值": repeated,
    "FlexAttention": flexible,
}


def measure(stage: Stage) -> Iterator[Row]:
    """`wide`：预训练（不隔开），然后微调的几条路。"""
    base: list[float] = []
    yield from stage.attempt("预训练", one(stage, "预训练", "pretrain", None, base, base))
    for name, way in WAYS.items():
        what = f"微调，注意力：{name}"
        if stage.rehearse and way is flexible:
            yield skipped(f"wide，{what}", NO_FLEX)
            continue
        with no_cudnn() if name == OLD_CARDS else nullcontext():
            yield from stage.attempt(what, one(stage, what, "sft", way, [], base))


def one(
    stage: Stage,
    what: str,
    script: str,
    way: Callable | None,
    found: list[float],
    base: list[float],
) -> Iterator[Row]:
    """一条路：速度，显存，比预训练的速度。

    Args:
        script: "pretrain" 或 "sft"。
        way: 代替 model.attend 的；None 是不换。
        found: 量到的速度添在这里。
        base: 预训练的速度，词元/秒。
    """
    with mock.patch.object(model, "attend", way or model.attend):
        made = warmed(Ours(stage.config("wide"), stage=script))
        work = stepping(made)
        found += [stage.speed(work) for _ in range(stage.repeats)]
        memory = stage.measure_memory(f"wide，{what}", work)
        made.leave()
    yield Row(f"wide，{what}", found, "词元/秒")
    yield memory
    if script == "sft" and len(base) == len(found):
        goal = "≥ 0.8 倍" if way is None else ""
        yield Row(f"wide，{what}，比预训练", ratios(found, base), "倍", goal)
