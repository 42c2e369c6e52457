"""实验：矮胖与瘦高，哪一种好？

    python -m tools.lab.try_shapes                      默认设置约二十分钟
    python -m tools.lab.try_shapes --seeds 5 --steps 400

「层数多的更好」常常是因为层数多的参数也多。这里比四种形状，训练同样的词元：

    矮胖               4 层，宽 128
    瘦高，参数相同     16 层，宽 64：各层的参数与矮胖的相差不到 1%
    瘦高，运算量相同   19 层，宽 64：训练一个词元的浮点运算与矮胖的相差不到 1%
    瘦高，宽度相同     8 层，宽 128，前馈窄到三分之一：连词嵌入在内，参数与矮胖的相差不到 1%

前两种「相同」不是一回事：词表那一层的运算与宽度成正比，瘦高的省下一半，可以多叠几层。
它们的词嵌入也只有一半宽，没有算在「参数相同」里（arXiv 2001.08361 的做法）。究竟是层数多了不好，
还是词嵌入窄了不好？第三种词嵌入一样宽，分得开这两样（代价是前馈窄了）。

公平起见：每个种子决定初始化与语料的次序，几种形状在同一个种子下读同样的词元；每种形状用第一个种子
把学习率都试一遍，取最好的。学习率是按留出的词条挑的，几种形状都占同样的便宜。
头宽都是 32，每两个查询头共用一个键值头。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import math
from dataclasses import dataclass
from statistics import mean

from config import Config, option
from model import Transformer
from settings.say import say
from tools.bench.flops import training_flops
from tools.lab.laboratory import DataOptions, Laboratory, Record, numbers_in, open_lab
from tools.lab.showing import (
    STYLES,
    finish,
    mean_and_spread,
    new_picture,
    seed_curves,
    seed_points,
    spread,
)

SHAPES = {
    "矮胖": dict(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=384),
    "瘦高，参数相同": dict(dim=64, n_layers=16, n_heads=2, n_kv_heads=1, hidden_dim=192),
    "瘦高，运算量相同": dict(dim=64, n_layers=19, n_heads=2, n_kv_heads=1, hidden_dim=196),
    "瘦高，宽度相同": dict(dim=128, n_layers=8, n_heads=4, n_kv_heads=2, hidden_dim=128),
}
WIDE, TALL, TALL_FLOPS, TALL_WIDTH = SHAPES
SEQ_LEN = 128


@dataclass
class Options(DataOptions):
    """命令行参数。"""

    seeds: int = option(3, "每种形状练几个种子", "个")
    steps: int = option(150, "每次练多少步", "步")
    lrs: str = option("0.01,0.02,0.04", "试哪几个最高学习率，用逗号隔开")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        wanted = f"--lrs 要的是用逗号隔开的几个正数，例如 0.01,0.02，得到的是 {self.lrs!r}"
        return super().problems() + ([] if self.rates() else [wanted])

    def rates(self) -> list[float]:
        """要试的学习率；写得不对是空的。"""
        rates = numbers_in(self.lrs)
        return rates if all(0 < rate < 10 for rate in rates) else []

    def base(self) -> Config:
        """实验台用的：矮胖的形状。"""
        return self.shape(WIDE, batch_size=16, max_steps=self.steps)

    def shape(self, name: str, **changes) -> Config:
        """一种形状的配置。"""
        return self.tiny(**SHAPES[name], seq_len=SEQ_LEN, **changes)

    def plan(self) -> str:
        """要做什么，多久。"""
        total = len(SHAPES) * (len(self.rates()) + self.seeds - 1)
        return f"共练 {total} 次，每次 {self.steps} 步；默认设置约二十分钟（两个核）。"


# ---------- 1. 数一数 ----------


def block_parameters(model: Transformer) -> int:
    """各层的参数，不含词嵌入。"""
    return sum(p.numel() for p in model.blocks.parameters())


# ---------- 2. 练 ----------


@dataclass
class Result:
    """一种形状的全部记录。"""

    tried: dict[float, float]  # 学习率: 第一个种子的检验损失；坏了的是无穷大
    lr: float  # 取用的学习率
    losses: list[float]  # 取用的学习率下的检验损失，每个种子一个
    curves: list[list[float]]  # 同上，训练损失，每个种子一条


def study(lab: Laboratory, name: str, options: Options) -> Result:
    """第一个种子把学习率都试一遍，挑出最好的；别的种子用挑出来的。"""
    shape = options.shape(name)

    def run(lr: float, seed: int) -> Record:
        return lab.train(lab.build(seed, shape), f"{name}，{lr:g}，种子 {seed}", lr, seed)

    first = {lr: run(lr, 1) for lr in options.rates()}
    lr = min(first, key=lambda rate: first[rate].held_out)
    runs = [first[lr], *(run(lr, seed) for seed in range(2, options.seeds + 1))]
    tried = {rate: found.held_out for rate, found in first.items()}
    return Result(tried, lr, [r.held_out for r in runs], [r.losses for r in runs])


# ---------- 3. 画与说 ----------


def draw(results: dict[str, Result], options: Options):
    """左：挑学习率；中：训练损失；右：每个种子的检验损失。"""
    figure, ((rates, curves, points),) = new_picture(
        "矮胖与瘦高：同样的词元，同样的参数或同样的运算量", 1, 3, (12, 4.4)
    )
    for (name, result), style in zip(results.items(), STYLES, strict=True):
        rates.plot(result.tried.keys(), result.tried.values(), **style, label=name)
    rates.set(xscale="log", xlabel="最高学习率", ylabel="奈特 / 词元")
    rates.set_title("第一个种子的检验损失")
    rates.set_xticks(list(results[WIDE].tried), [f"{lr:g}" for lr in results[WIDE].tried])
    rates.minorticks_off()
    rates.legend(fontsize=9)
    seed_curves(curves, {name: result.curves for name, result in results.items()}, options.steps)
    seed_points(points, {name: result.losses for name, result in results.items()})
    points.set_title("检验损失：点是种子，横线是平均")
    return figure


def compare(wide: Result, tall: Result, equal: str) -> str:
    """一句话：两种形状差多少，这个差别比种子的起伏大不大。"""
    difference = mean(tall.losses) - mean(wide.losses)
    noise = max(spread(wide.losses), spread(tall.losses))
    if not math.isfinite(difference):
        verdict = "有的种子练坏了，没法比；请试小些的学习率"
    elif len(wide.losses) < 2:
        verdict = "只有一个种子，不知道起伏多大，不能下结论"
    elif abs(difference) > 2 * noise:
        verdict = f"超过种子起伏的两倍：{'矮胖' if difference > 0 else '瘦高'}的好"
    else:
        verdict = "不到种子起伏的两倍：分不出高下"
    return (
        f"{equal}时，矮胖 {mean_and_spread(wide.losses)}，瘦高 {mean_and_spread(tall.losses)} "
        f"奈特每词元，相差 {abs(difference):.3f}，{verdict}。"
    )


def describe_rates(results: dict[str, Result]) -> str:
    """各取用了哪个学习率；取在试过的边上的，最好的也许还在外面。"""
    chosen = "，".join(f"「{name}」{r.lr:g}" for name, r in results.items())
    edge = [n for n, r in results.items() if r.lr in (min(r.tried), max(r.tried))]
    if edge and len(results[WIDE].tried) > 1:
        chosen += f"（{'、'.join(f'「{n}」' for n in edge)}取在试过的边上，也许还有更好的）"
    return chosen


def describe_costs(lab: Laboratory, options: Options) -> None:
    """打印几种形状的参数与运算量。"""
    n_rows = lab.rows_scored()
    for name in SHAPES:
        config = options.shape(name)
        n, flops = block_parameters(lab.build(0, config)), training_flops(config, n_rows)
        embedding = config.dim * config.vocab_size
        say(
            f"  {name}：各层参数 {n / 1e6:.3f} M，词嵌入 {embedding / 1e6:.2f} M，"
            f"训练一个词元 {flops / 1e6:.2f} MFLOP"
        )


def main(argv: list[str] | None = None) -> None:
    """几种形状各练几个学习率、几个种子；画图，说三句话。"""
    options, lab = open_lab(Options, "try_shapes", argv)
    describe_costs(lab, options)
    results = {name: study(lab, name, options) for name in SHAPES}
    tokens = options.steps * lab.config.batch_size * SEQ_LEN
    say(
        f"每次读 {tokens / 1e6:.2f} M 词元，{options.seeds} 个种子；"
        f"试过 {len(options.rates())} 个学习率，取用的是{describe_rates(results)}。"
    )
    said = [
        compare(results[WIDE], results[TALL], "各层参数相同"),
        compare(results[WIDE], results[TALL_FLOPS], "训练的运算量相同"),
        compare(results[WIDE], results[TALL_WIDTH], "宽度与全部参数都相同"),
    ]
    finish(draw(results, options), said, options, "try_shapes")


if __name__ == "__main__":
    run_script(main)
