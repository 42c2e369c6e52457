"""把模型带走：一个 HTML 文件，任何浏览器都打得开，不要服务，也不联网。

    python -m tools.page out/tiny/sft.pt model.html
    python -m tools.page out/wide/sft.pt model.html --title "我的第一个模型"

传给朋友，放进手机的飞行模式，或者当作网页发表，都行。里面是模型、分词器与推理的程序（engine.js，
与 model.py 一节一节地对应），点一个词元就看得见它怎样来，还可以动手改。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

from dataclasses import dataclass
from pathlib import Path

from chat.numbers import file_size
from config import UserError, option
from engine.checkpoint import load
from generate import make_speaker
from settings.files import write_text
from settings.flags import read_options, word
from settings.say import say
from tokenizer import Tokenizer
from tools.huggingface.shapes import check_finite
from tools.page.build import page

USAGE = "用法：python -m tools.page 检查点.pt 网页.html [--参数 值 …]"
BOTH = f"要先写检查点与网页的路径；{USAGE}"


@dataclass
class Options:
    """命令行参数。"""

    checkpoint: str = word("检查点", BOTH)
    html: str = word("网页写到哪里", BOTH)
    title: str | None = option(None, "网页的标题；默认是 mini-llm 与预设的名字")
    exact: bool = option(False, "矩阵用 fp32，不压缩：文件四倍大，用来核对")
    overwrite: bool = option(False, "网页已经在了，就换掉它")


def main(argv: list[str] | None = None) -> None:
    """读命令行，做成网页，说怎样打开。"""
    options = read_options(Options, sys.argv[1:] if argv is None else argv, USAGE)
    source, target = Path(options.checkpoint), Path(options.html)
    check_target(source, target, options.overwrite)
    tokenizer = Tokenizer()
    model, config, checkpoint = load(source, tokenizer)
    check_finite(model.state_dict(), source)
    speaker = make_speaker(model.eval(), config, tokenizer, checkpoint["stage"])
    title = options.title or f"mini-llm · {config.preset}"
    whole = page(speaker, checkpoint, title, options.exact)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, whole)
    except OSError as error:
        raise UserError(f"写不了 {target}（{error.strerror}）；请检查路径、权限与空间") from error
    size = file_size(target.stat().st_size)
    say(f"写好 {target}（{size}）：用浏览器打开，或者传给朋友；不联网也能聊")


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """写得到那里，也不会盖掉什么。"""
    if target.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"网页的名字要以 .html 结尾，得到的是 {target}")
    if target.is_dir():
        raise UserError(f"{target} 是目录；请写一个文件的名字")
    if target.exists() and not overwrite:
        raise UserError(f"{target} 已经在了；不要它了：加上 --overwrite；或换一个名字")


if __name__ == "__main__":
    run_script(main)
