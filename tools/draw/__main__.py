"""画 docs/lessons 里的九张图：每张由一个函数画，数都来自这个仓库的代码与训练的记录。

    python -m tools.draw attention                  画一张，写在 out/lessons/lesson-3.svg
    python -m tools.draw all                        九张都画
    python -m tools.draw all --folder docs/pictures 重画课文里的那九张（默认的 tiny 练完之后）

    predictor 下一个词元的概率      tokenizer 切成词元          attention 注意力的权重
    residual 残差流与中途的猜测     loop 学习率与梯度的长度     pretraining 损失怎样降下来
    sft 学哪些词元                  sampling 温度与 top-p       hands 关掉一个头，搬一个向量

tokenizer 与 sft 不需要训练过的模型；其余的要先运行 python pre_train.py。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import difflib
from dataclasses import dataclass
from pathlib import Path

from config import option
from settings.flags import read_options, word
from settings.say import say
from tools.draw.pictures import PICTURES, draw
from tools.draw.trained import Trained

USAGE = f"用法：python -m tools.draw 图名 [--参数 值 …]\n图名：{'、'.join(PICTURES)}；all 是全部"


@dataclass
class Options:
    """命令行参数。"""

    name: str = word("图", f"请先写要画哪一张：{'、'.join(PICTURES)}，或者 all")
    checkpoint: str = option("out/tiny/pretrain.pt", "预训练的检查点；旁边要有训练的记录")
    folder: str = option("out/lessons", "图写到哪里")

    def problems(self) -> list[str]:
        """没有这张图，就说最接近的。"""
        if self.name in (None, "all", *PICTURES):
            return []
        near = difflib.get_close_matches(self.name, PICTURES, n=1, cutoff=0.0)[0]
        return [f"没有叫 {self.name} 的图；最接近的是 {near}"]


def main(argv: list[str] | None = None) -> None:
    """读命令行，画一张或九张。"""
    options = read_options(Options, sys.argv[1:] if argv is None else argv, USAGE)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES if options.name == "all" else [options.name]:
        path = draw(name, Trained(Path(options.checkpoint)), folder)
        say(f"{name}：{path}（用浏览器打开）")


if __name__ == "__main__":
    run_script(main)
