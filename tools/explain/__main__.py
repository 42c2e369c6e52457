"""看进模型里去：一段文字从编号到「下一个词元」，每一步发生了什么。

    python -m tools.explain "守株待兔："                    印在终端里，并写出 out/explain.html
    python -m tools.explain "你好" --checkpoint out/tiny/sft.pt --write 20 --html a.html
    python -m tools.explain "守株待兔：" --without 2.1      动手改：关掉第 2 层第 1 头，猜测变了多少

网页自成一体，不联网，用浏览器打开即可。每个数都来自模型自己的前向（见 microscope.py）。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import time
from dataclasses import dataclass
from pathlib import Path

from chat import display
from config import UserError, option
from generate import Sampling
from settings.flags import read_options, word
from settings.say import say
from tools.explain.hands import read_hands
from tools.explain.page import page
from tools.explain.report import report
from tools.explain.speaker import load_speaker

USAGE = '用法：python -m tools.explain "文字" [--参数 值 …]'


@dataclass
class Options:
    """命令行参数。"""

    text: str = word("要看的文字", '请先写要看的文字，例如：python -m tools.explain "守株待兔："')
    checkpoint: str | None = option(None, "检查点；默认是训练脚本写下的，微调过的优先")
    html: str = option("out/explain.html", "网页写到哪里")
    write: int = option(0, "先让模型接着写多少个词元（总选最可能的），再一起看", "词元")
    at: int | None = option(None, "看第几个词元之后的猜测，从 1 数起；默认最后一个")
    most: int = option(64, "最多看多少个词元：时间与内存随它的平方增长", "词元")
    without: str = option(
        "",
        "关掉几个零件，逗号隔开：2.1（第 2 层第 1 头）、2.attention、2.feed_forward、2.expert3",
    )
    replace: str = option("", "换一个词元，例如 3=虎：第 3 个换成「虎」")
    patch: str = option(
        "", "搬一个向量，例如 '2=另一段文字'：它最后一个词元在第 2 层之后的，换到 --at 那里"
    )
    device: str = option("auto", "设备", choices=("auto", "cuda", "mps", "cpu"))

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        found = []
        if self.write < 0:
            found.append(f"--write 不能是负数，得到的是 {self.write}")
        if self.most < 1:
            found.append(f"--most 至少是 1，得到的是 {self.most}")
        if not self.html.strip():
            found.append("--html 是空的；请写上网页的路径")
        return found


def main(argv: list[str] | None = None) -> None:
    """读命令行，看一遍，印出来，写成网页。"""
    options = read_options(Options, sys.argv[1:] if argv is None else argv, USAGE)
    speaker = load_speaker(options.checkpoint, options.device)
    ids = speaker.prompt(options.text)
    if len(ids) > speaker.config.max_len:
        limit = speaker.config.max_len
        raise UserError(f"这段文字有 {len(ids)} 个词元，模型最多看 {limit} 个；请短一些")
    n_given = len(ids)
    greedy = Sampling(temp=0, penalty=1, max=options.write)
    ids += speaker.generate(ids, greedy) if options.write else []
    dropped = max(0, len(ids) - options.most)
    if dropped:
        say(
            f"（共 {len(ids)} 个词元，只把最后 {options.most} 个送进模型，数因此与读全文时不同；"
            f"想看全文用 --most {len(ids)}）"
        )
    ids = ids[dropped:]
    at = len(ids) if options.at is None else options.at
    if not 1 <= at <= len(ids):
        raise UserError(f"--at 要在 1 与词元数 {len(ids)} 之间，得到的是 {at}")
    started = time.perf_counter()
    hands = read_hands(speaker, ids, at - 1, options.without, options.replace, options.patch)
    facts = hands.examine(speaker, dropped)
    if options.write:
        facts["answers"] = hands.answers(speaker, n_given - dropped, options.write)
    seconds = time.perf_counter() - started
    report(facts, at - 1, display.terminal(sys.stdout))
    path = Path(options.html)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(facts, at - 1), encoding="utf-8")
    say(f"\n看一遍用了 {seconds:.2f} 秒。网页：{path}（用浏览器打开）")


if __name__ == "__main__":
    run_script(main)
