"""画廊：同样的二十句话，各答一次，一字不改，也不挑。

    python -m tools.lab.gallery                                        默认的检查点，印出来
    python -m tools.lab.gallery --checkpoint out/small/sft.pt --out gallery.md

种子固定，同样的机器与版本，谁跑都一样；只预训练过的检查点，接着同样的话往下写。练了多久、读了多少，取自检查点自己的记录。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config import Config, option
from engine.checkpoint import NAMES, read
from engine.device import Device
from engine.speed import load_for_chat
from generate import CALM, Sampling, Speaker
from settings.files import write_text
from settings.flags import read_options
from settings.resolve import default_checkpoint
from settings.say import say
from tools.lab.answers import Reply, reply

PROMPTS = (
    "你好", "你是谁？", "怎样保持健康？", "天空为什么是蓝色的？", "请介绍一下北京。",
    "写一首关于春天的诗。", "一年有几个季节？", "怎样学好英语？", "我最近总是睡不着，怎么办？",
    "给我推荐一本书。", "什么是人工智能？", "怎么做西红柿炒鸡蛋？", "把“今天天气很好”翻译成英文。",
    "三加五等于几？", "列出三种水果。", "和同事吵架了，心里很难受。", "什么是合同？",
    "感冒了要注意什么？", "守株待兔是什么意思？", "请用一句话形容大海。",
)  # fmt: skip


@dataclass
class Options:
    """命令行参数。"""

    checkpoint: str | None = option(None, "哪个检查点；默认是微调写下的那一个")
    out: str | None = option(None, "写进哪个 Markdown 文件；不写就印出来")
    max: int = option(150, "一次最多写多少", "词元")
    seed: int = option(1, "随机种子")
    device: str = option("auto", "设备", choices=("auto", "cuda", "mps", "cpu"))

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        return Sampling(max=self.max, seed=self.seed).problems()


def replies(speaker: Speaker, options: Options) -> list[Reply]:
    """二十句话，各答一次。"""
    given = {"max": options.max, "seed": options.seed}
    sampling = Sampling(**CALM.get(speaker.stage, {}) | given)
    return [reply(speaker, speaker.prompt(text), text, sampling) for text in PROMPTS]


def cost(checkpoint: dict) -> str:
    """练了多久，读了多少，练到多好。"""
    progress, config = checkpoint["progress"], checkpoint["config"]
    return (
        f"{NAMES[checkpoint['stage']]} {progress['step']} 步，"
        f"{progress['tokens'] / 1e6:.1f} M 词元，{progress['seconds'] / 60:.1f} 分钟"
        f"（{checkpoint['device']}），"
        f"检验 {progress['val_bpc']:.3f} 比特每字；预设 {config['preset']}"
    )


def page(speaker: Speaker, checkpoints: list[dict], options: Options) -> Iterator[str]:
    """一页 Markdown，一行一行。

    Args:
        checkpoints: 它的各个阶段的检查点，先后照练的次序。
    """
    n_params = sum(p.numel() for p in speaker.model.parameters())
    yield f"{n_params / 1e6:.1f} M 参数。"
    for checkpoint in checkpoints:
        yield f"- {cost(checkpoint)}"
    yield ""
    yield f"种子 {options.seed}，每句只答一次，原样照录；"
    yield f"写满 {options.max} 个词元的、开始反复而停下的，末尾是省略号。"
    yield ""
    for one in replies(speaker, options):
        text = one.text.strip().replace("\n", "  \n> ") or "（一个字也没写）"
        yield f"**{one.question}**\n\n> {text}{'' if one.ended else '……'}\n"


def main(argv: list[str] | None = None) -> None:
    """读检查点，答二十句，印出来或写进文件。"""
    usage = "用法：python -m tools.lab.gallery [--参数 值 …]"
    options = read_options(Options, sys.argv[1:] if argv is None else argv, usage)
    path = Path(options.checkpoint or default_checkpoint("sft"))
    speaker = load_for_chat(path, Device(Config(device=options.device, compile=False)))
    text = "\n".join(page(speaker, [read(path, mmap=True)], options))
    if options.out:
        write_text(Path(options.out), text)
    say(f"写好 {options.out}" if options.out else text)


if __name__ == "__main__":
    run_script(main)
