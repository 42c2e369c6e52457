"""一个晚上：预训练几小时，微调几小时，然后量一量，把画廊写好。

    python -m tools.lab.night --data 语料 --sft_data 对话 --hours 6 --sft_hours 1
    python -m tools.lab.night … --held_out 留出的.jsonl --talks 留出的对话.jsonl

走的就是两个训练脚本，它们的别的参数写在 -- 之后（例如 -- --batch_size auto），照 config.py 里的名字
分给两个阶段：--lr 是预训练的，--sft_lr 是微调的，两个阶段都有的两个都给。中断了，再运行同样的一条，
从停下的地方接着；练完了的不重做。读了许多遍、末了在背书的，用留出的数据上最好的那一刻：从
pretrain.best.pt 微调，量的、写画廊的是 sft.best.pt。要改的（例如显存不够，换小的 batch_size）
也写上：与直接接着练一样，会影响结果的，加上 -- --allow_changes 才改。结果是输出目录里的 night.md：
用了多久，没学过的文字上多少比特，回答得怎样，二十句话各答了什么。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from config import BOTH_STAGES, PRESETS, Config, UserError, option
from corpus.find import find_files
from engine.checkpoint import read
from engine.device import Device
from engine.speed import load_for_chat
from settings.files import write_text
from settings.flags import read_options
from settings.resolve import load_config
from settings.say import say
from tokenizer import Tokenizer
from tools.lab import answers, gallery, prose
from tools.lab.answers import plus_minus, ratio
from tools.lab.talks import Talk, choose, held_out, in_file

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Options:
    """命令行参数；两个训练脚本的别的参数，写在 -- 之后。"""

    preset: str = option("wide", "预设", choices=tuple(PRESETS))
    data: str = option("auto", "预训练的语料")
    sft_data: str = option("auto", "微调的对话")
    hours: float = option(6.0, "预训练几小时", "小时")
    sft_hours: float = option(1.0, "微调几小时", "小时")
    replay: float = option(0.1, "微调时，预训练的文字占几成")
    held_out: str | None = option(None, "没有学过的文字，一行一篇；不写就不量")
    talks: str | None = option(None, "没有学过的对话；不写就用它自己留出的")
    data_dir: str = option("data", "词元文件放在哪里")
    out_dir: str | None = option(None, "放在哪里；默认 out/预设名-night")
    n: int = option(150, "量回答时，至多用多少段对话", "段")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        hours = [n for n in ("hours", "sft_hours") if not 0 < getattr(self, n) <= 10**4]
        wrong = [f"--{n} 要是正数，不超过 10^4" for n in hours]
        return wrong + answers.Options(n=self.n).problems()


# 由这个程序定的，不能再写在 -- 之后
OURS = {f.name for f in fields(Options)} | {"init_from", "replay_data", "replay_stage", "resume",
                                            "overwrite", "plan"}  # fmt: skip


def meant_for(stage: str, flags: list[str]) -> list[str]:
    """写在 -- 之后的，哪些给这个阶段：两个阶段各有一份的，照 config.py 里的名字分。

    Raises:
        UserError: 有由这个程序定的。
    """
    kept, keep = [], True
    for word in flags:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_").removeprefix("no_")
            if name in OURS:
                raise UserError(f"--{name} 不能写在 -- 之后：写在之前，或者由这个程序来定")
            for_sft = name.startswith("sft_") or name == "keep_reasoning"
            keep = name not in BOTH_STAGES if stage == "sft" else not for_sft
        kept += [word] * keep
    return kept


def check_start(folder: Path, hours: float) -> None:
    """微调已经开始，预训练便不能再改。Raises UserError：它的起点不是现在要练的这一个。"""
    start, learned = folder / "pretrain.pt", None
    if not (folder / "sft.pt").exists():
        return
    if start.exists():
        try:
            learned = read(start, mmap=True)["config"].get("hours")
        except UserError:
            return  # 坏了的，训练脚本会说，也会用前一个
    if learned != hours:
        raise UserError(
            f"{folder} 里的微调，起点不是预训练 {hours:g} 小时的；请用 --out_dir 换一个目录，"
            f"或者删掉那里的 sft*.pt，微调便从头来"
        )


def finish(command: list[str]) -> int:
    """运行一个脚本，等它收尾，返回它的退出码。

    Ctrl-C 终端也给了它，kill 由我们转给它：它做完这一步、存好才走，这里只管等。
    """
    with subprocess.Popen(command) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            while True:
                with suppress(KeyboardInterrupt):
                    return child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def train(script: str, stage: str, folder: Path, flags: list[str]) -> None:
    """练一个阶段；已经有的，接着它，练完了的一步也不多走。

    Raises:
        SystemExit: 没有练完：中断了，或者出了错；它自己已经说了为什么。
    """
    command = [sys.executable, str(ROOT / script), *flags]
    if (folder / f"{stage}.pt").exists():
        command.append("--resume")
    if code := finish(command):
        raise SystemExit(code)


def result(folder: Path, stage: str) -> Path:
    """一个阶段的结果：另存着最好的一刻（最后的比它差，才留着），就用它。"""
    best = folder / f"{stage}.best.pt"
    return best if best.exists() else folder / f"{stage}.pt"


def drawn(source: Iterable[Talk], options: Options) -> list[Talk]:
    """从中抽几段来量。Raises UserError：太少。"""
    return choose(list(source), options.n, answers.OTHERS + 1, answers.Options().seed)


def report(options: Options, folder: Path, texts: list[prose.Text], talks: list[Talk]) -> str:
    """量一量，写成一页；texts 与 talks 没有就是空的。"""
    device = Device(Config(compile=False))
    stages = [result(folder, stage) for stage in ("pretrain", "sft")]
    lines = [f"# {options.preset}，一个晚上", ""]
    for path in stages if texts else []:
        measured = prose.bits(texts, prose.bits_of(load_for_chat(path, device)))
        found = plus_minus(*ratio([pair[1:] for pair in measured]))
        lines.append(f"- {path.name}：没有学过的文字，每个字 {found} 比特")
    speaker, asked = load_for_chat(stages[-1], device), answers.Options(n=options.n)
    try:
        ours = held_out(speaker, options.data_dir, speaker.config.sft_data)
        found = answers.measure(speaker, talks or drawn(ours, options), asked)
        lines += [f"-{sentence[1:]}" for sentence in answers.sentences(found)]
    except UserError as error:  # 已经练了几个小时，别的照样写
        lines.append(f"- 回答没有量：{error}；请用 --talks 写明没有学过的对话")
    checkpoints = [read(path, mmap=True) for path in stages]
    return "\n".join([*lines, "", *gallery.page(speaker, checkpoints, gallery.Options())])


def main(argv: list[str] | None = None) -> None:
    """预训练，微调，量，写。"""
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    usage = "用法：python -m tools.lab.night [--参数 值 …] [-- 训练脚本的别的参数]"
    options, more = read_options(Options, argv[:at], usage), argv[at + 1 :]
    folder = Path(options.out_dir or f"out/{options.preset}-night")
    both = ["--preset", options.preset, "--data_dir", options.data_dir, "--out_dir", str(folder)]
    first = [*both, "--data", options.data, "--hours", str(options.hours)]
    first += meant_for("pretrain", more)
    then = [*both, "--sft_data", options.sft_data, "--hours", str(options.sft_hours)]
    then += ["--replay", str(options.replay), *meant_for("sft", more)]
    # 几个小时之后才用到的，现在就打开看看
    learns, _ = load_config("pretrain", first)
    load_config("sft", then)
    check_start(folder, options.hours)
    for path in {options.data, options.sft_data} - {"auto", "builtin"}:
        find_files(path)
    texts = prose.read_texts(options.held_out) if options.held_out else []
    talks = drawn(in_file(Tokenizer(), options.talks), options) if options.talks else []
    train("pre_train.py", "pretrain", folder, first)
    start = result(folder, "pretrain")
    then += ["--init_from", str(start)]
    if options.data != "auto" or read(start, mmap=True)["config"]["data"] == learns.data:
        then += ["--replay_data", learns.data]  # 练到半途才下载的不是它学过的，不写
    train("sft_train.py", "sft", folder, then)
    path = folder / "night.md"
    write_text(path, report(options, folder, texts, talks))
    say(f"写好 {path}")


if __name__ == "__main__":
    run_script(main)
