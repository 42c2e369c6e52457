"""生成：矩阵的几种存法，编译与不编译，比 transformers 的 generate。"""

from collections.abc import Iterator

from generate import Sampling
from tools.bench import contestants
from tools.bench.contestants import PROMPT
from tools.bench.gpu.stage import Stage, skipped
from tools.bench.measuring import Row

STORED = ("bf16", "int8", "none")


def measure(stage: Stage) -> Iterator[Row]:
    """`wide`，贪心写一段；每一种都与 generate 比。"""
    n = 16 if stage.rehearse else 256
    theirs: list[float] = []
    what = "transformers 的 generate，bf16"
    yield from stage.attempt(what, generated(stage, what, n, theirs))
    for compiled in (True, False):
        for quantize in STORED:
            what = f"--quantize {quantize}，{'编译' if compiled else '不编译'}"
            if compiled and not stage.compile:
                yield skipped(f"wide：{what}", "不编译")
                continue
            yield from stage.attempt(what, spoken(stage, what, n, compiled, quantize, theirs))


def shape(stage: Stage) -> dict:
    """演习时极小的形状；精度与编译由各方自己定。"""
    return {k: v for k, v in stage.changes().items() if k not in ("dtype", "compile")}


def half(stage: Stage) -> str:
    """半精度；演习时没有。"""
    return "float32" if stage.rehearse else "bfloat16"


def generated(stage: Stage, what: str, n: int, theirs: list[float]) -> Iterator[Row]:
    """它的速度，添在 theirs 里。"""
    work = contestants.decode_qwen3("wide", n, half(stage), **shape(stage))
    theirs += [stage.speed(lambda: len(work())) for _ in range(stage.repeats)]
    yield Row(f"wide：{what}", theirs, "词元/秒")


def spoken(
    stage: Stage, what: str, n: int, compiled: bool, quantize: str, theirs: list[float]
) -> Iterator[Row]:
    """我们的速度，是它的几倍。"""
    made = contestants.speaker("wide", half(stage), compiled, quantize, **shape(stage))
    sampling = Sampling(temp=0, penalty=1, max=n)

    def work() -> int:
        return len(list(made.generate(PROMPT, sampling)))

    speed = [stage.speed(work) for _ in range(stage.repeats)]
    yield Row(f"wide：{what}", speed, "词元/秒")
    if theirs:
        goal = "≥ 2.5 倍" if what == "--quantize bf16，编译" else ""
        faster = [a / b for a, b in zip(speed, theirs, strict=True)]
        yield Row(f"wide：{what}，比 generate", faster, "倍", goal)
