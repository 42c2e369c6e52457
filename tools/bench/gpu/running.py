"""八分钟怎样走：命令行，有哪些部分，一部分一部分地走，每得到一行写一次盘。"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from config import UserError, option
from corpus.token_file import tokenize_corpus
from settings.flags import read_options, words
from settings.say import brief, say
from tokenizer import Tokenizer
from tools.bench.gpu import attention, decode, half, profile, puzzle, sft, training
from tools.bench.gpu.stage import Stage
from tools.bench.measuring import Contestant, Row, machine
from tools.bench.results import read_results, write_results

# ---------- 1. 有哪些部分 ----------


class Part(NamedTuple):
    """一部分：测什么，在 H100 上约多少秒（照别的测量估计的，没有测量），怎样测。"""

    about: str
    seconds: int
    measure: Callable[[Stage], Iterator[Row]]


PARTS = {  # 最有用的在前；时间不够，丢的是后面的
    "attention": Part("每种注意力走哪个算子，多快，占多少显存", 25, attention.measure),
    "profile": Part("wide 的一步：显卡闲了多久，发多少内核，等几次", 30, profile.measure),
    "former": Part("从前的一步与现在的", 35, training.against_former),
    "qwen3": Part("编译过的 Qwen3 与我们", 45, training.against_qwen3),
    "deep": Part("deep 的 32 行 × 1 次与 16 行 × 2 次", 85, training.deep_both_ways),
    "options": Part("残差流用 bf16；门与升合成一次", 45, training.options),
    "sft": Part("微调走各条注意力的路，比预训练", 65, sft.measure),
    "half": Part("fp16，杀掉再接着练，batch_size auto", 95, half.measure),
    "decode": Part("生成，比 transformers 的 generate", 45, decode.measure),
    "puzzle": Part("专家混合编译过的检验为什么高 0.06", 60, puzzle.measure),
    "autotune": Part("max-autotune", 80, training.autotune),
}


@dataclass
class Options:
    """命令行参数。"""

    parts: tuple[str, ...] = words("要测的几部分")
    json: str = option("out/bench.json", "结果写在哪里；原始记录写在旁边的文件夹里")
    seconds_total: float = option(480.0, "一共多久；放不下的部分不测，说一声", "秒")
    seconds: float = option(1.0, "每一次计时至少多久", "秒")
    repeats: int = option(3, "轮流上场的几方，各几次", "次")
    checkpoint: str = option("", "puzzle 用的检查点；不给就当场练一个")
    data_dir: str = option("data", "词元文件放在哪里")
    compile: bool = option(True, "编译")
    rehearse: bool = option(False, "演习：在 CPU 上用极小的形状走一遍，数没有意义")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        found = [
            f"没有 {name} 这一部分；可选：{'、'.join(PARTS)}"
            for name in self.parts
            if name not in PARTS and self.parts != ("list",)
        ]
        if not all(0 < x < 1e6 for x in (self.seconds_total, self.seconds, self.repeats)):
            found.append("seconds_total、seconds、repeats 都必须是正数，不超过一百万")
        if Path(self.json).suffix != ".json":
            found.append(f"--json 的文件名要以 .json 结尾，得到的是 {self.json!r}")
        if self.checkpoint and not Path(self.checkpoint).is_file():
            found.append(f"找不到检查点 {self.checkpoint}")
        if not (self.rehearse or torch.cuda.is_available() or self.parts == ("list",)):
            found.append("这一节要 NVIDIA 显卡，这台机器上没有；只想走一遍看看，请加上 --rehearse")
        return found

    def stage(self) -> Stage:
        """交给每一部分的。"""
        folder = Path(self.json).with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        return Stage(
            str(folder), self.seconds, self.repeats, self.rehearse, self.compile, self.data_dir,
            self.checkpoint,
        )  # fmt: skip


# ---------- 2. 走 ----------


def bench_gpu(argv: list[str]) -> None:
    """一部分一部分地测，每得到一行写一次盘；最后说哪几部分没有轮到，把什么带回来。"""
    until = time.monotonic()
    usage = f"用法：python -m tools.bench gpu [list | {' | '.join(PARTS)}] [--参数 值 …]"
    options = read_options(Options, argv, usage)
    if options.parts == ("list",):
        say(listed())
        return
    until += options.seconds_total
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # 剖析的库每次都要说一句
    path, stage = Path(options.json), options.stage()
    done, about, missed = read_results(path), machine(), []
    place = "演习" if options.rehearse else about["显卡"]
    prepare(stage)
    names = options.parts or tuple(PARTS)
    for name, part, player in one_ahead(names, stage):
        left = until - time.monotonic()
        if part.seconds > left:
            missed.append(name)
            continue
        say(f"== gpu {name}：{part.about}（还有 {left:.0f} 秒）", flush=True)
        rows = []
        for row in rows_of(name, player, min(left, 3 * part.seconds)):
            rows.append(asdict(row))
            say(f"  {row.what}：{row.shown()}" + (f"    目标 {row.goal}" * bool(row.goal)))
            command = f"python -m tools.bench gpu {name}"
            done[f"gpu {name}（{place}）"] = {"machine": about, "command": command, "rows": rows}
            write_results(path, done)
    if missed:
        say(f"没有轮到：{'、'.join(missed)}；补测：python -m tools.bench gpu {' '.join(missed)}")
    if len(missed) < len(names):
        say(f"请带回 {path}、{path.with_suffix('.md')}，与原始记录的文件夹 {stage.folder}")


def listed() -> str:
    """有哪些部分。"""
    lines = [f"  {name:<10} 约 {part.seconds:>3} 秒  {part.about}" for name, part in PARTS.items()]
    total = sum(part.seconds for part in PARTS.values())
    return "\n".join([*lines, f"一共约 {total} 秒；秒数是照 H100 估计的，没有测量"])


def prepare(stage: Stage) -> None:
    """词元文件先备好：各部分便不必各备一次。"""
    config, tokenizer = stage.config("tiny"), Tokenizer()
    for script in ("pretrain", "sft"):
        tokenize_corpus("builtin", script, tokenizer, config)


def one_ahead(names: tuple[str, ...], stage: Stage) -> Iterator[tuple[str, Part, Contestant]]:
    """一部分一部分地给出；这一部分开始时，下一部分的进程已在导入 torch，还不碰显卡。"""
    players = [Contestant(perform, name, stage) for name in names]
    with ExitStack() as stack:
        for i, name in enumerate(names):
            for player in players[i : i + 2]:
                launch_deaf(player)
                stack.callback(dismiss, player)
            yield name, PARTS[name], players[i]
            players[i].leave()


def launch_deaf(player: Contestant) -> None:
    """启动；它听不见 Ctrl-C，不会各印各的回溯：由这边来结束它。"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        player.launch()
    finally:
        signal.signal(signal.SIGINT, before)


def dismiss(player: Contestant) -> None:
    """中途走的，不等它做完。"""
    player.process.kill()
    player.leave()


def rows_of(name: str, player: Contestant, limit: float) -> Iterator[Row]:
    """一部分，住在自己的进程里，做完一行交一行；死了、到了时限，也是一行。

    Args:
        limit: 至多多少秒。
    """
    until = time.monotonic() + limit
    try:
        while (row := player.work(max(0.0, until - time.monotonic()))[0]) is not None:
            yield row
    except UserError as error:
        yield Row(f"{name}：这一部分停在这里：{brief(error)}", [], "")


def perform(name: str, stage: Stage) -> Callable[[], Row | None]:
    """一部分的进程里：每干一份活，交出下一行；没有了是 None。"""
    rows = stage.attempt(name, PARTS[name].measure(stage))
    return lambda: next(rows, None)
