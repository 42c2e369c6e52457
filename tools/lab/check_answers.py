"""微调之后，问几十个从没见过的成语：回答的样子对不对？

    python -m tools.lab.check_answers                                     默认的 out/tiny/sft.pt
    python -m tools.lab.check_answers --checkpoint out/wide/sft.pt --n 200

只看样子（问意思答释义，问出处答书名，按意思找成语答成语），不看对错：这些成语模型没有见过。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import re
from dataclasses import dataclass
from pathlib import Path

from config import Config, UserError, option
from corpus import idioms
from corpus.log import ReadLog
from corpus.split import is_held_out
from engine.device import Device
from engine.speed import load_for_chat
from generate import Sampling, Speaker
from settings.flags import read_options
from settings.say import say
from tools.lab.prose import evenly

QUESTIONS = {  # 种类: (问法, 回答应有的样子)
    "意思": ("{word}是什么意思？", r"(?!出自|例如)[^《》]{3,}。"),
    "出处": ("{word}出自哪里？", r"出自[^《]*《[^》]+》.*"),
    "找成语": ("哪个成语的意思是：{explanation}", r"[一-鿿，]{3,15}。"),
}


@dataclass
class Options:
    """命令行参数。"""

    checkpoint: str = option("out/tiny/sft.pt", "微调后的检查点")
    n: int = option(50, "问多少个成语", "个")
    show: int = option(5, "打印前几个的回答", "个")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        return [] if self.n >= 1 else [f"--n 必须是正数，得到的是 {self.n}"]


def main(argv: list[str] | None = None) -> None:
    """逐个提问，数一数样子对的有多少。"""
    usage = "用法：python -m tools.lab.check_answers [--参数 值 …]"
    options = read_options(Options, sys.argv[1:] if argv is None else argv, usage)
    speaker = load_for_chat(Path(options.checkpoint), Device(Config(compile=False)))
    if speaker.stage != "sft":
        raise UserError(f"{options.checkpoint} 还没有微调过；请先运行 python sft_train.py")
    entries = unseen_entries(options.n, speaker.config.val_fraction)
    right = count_right(speaker, entries, options.show)
    for kind, count in right.items():
        say(f"问{kind}：{len(entries)} 个没见过的成语，{count} 个回答的样子对")


def unseen_entries(n: int, fraction: float) -> list[dict]:
    """n 个留作检验的词条，均匀地取自整部词典。"""
    entries = idioms.read_entries(idioms.dictionary_file(), ReadLog("builtin"))
    unseen = [e for e in entries if is_held_out(e["explanation"], fraction)]
    return evenly(unseen, n)


def count_right(speaker: Speaker, entries: list[dict], show: int = 0) -> dict[str, int]:
    """每种问题有几个回答的样子对；打印前 show 个词条的回答。"""
    tokenizer, right = speaker.tokenizer, dict.fromkeys(QUESTIONS, 0)
    for number, entry in enumerate(entries):
        for kind, (question, form) in QUESTIONS.items():
            asked = question.format(**entry)
            ids = tokenizer.question_ids(asked)
            greedy = Sampling(temp=0, penalty=1.1, max=150)
            answer = tokenizer.decode(speaker.generate(ids, greedy))
            fits = re.fullmatch(form, answer, re.S) is not None
            right[kind] += fits
            if number < show:
                say(f"{'✓' if fits else '✗'} {asked}\n    {answer}")
    return right


if __name__ == "__main__":
    run_script(main)
