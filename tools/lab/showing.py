"""把实验的结果给人看。

new_picture                   一张空的图
seed_curves, seed_points      几个种子的训练损失，几个种子的检验损失
distribution                  下一个词元的概率
spread, mean_and_spread       种子之间的起伏
finish                        写成 SVG，打印三句话：这一次的数说明了什么
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from settings.say import say
from tools.draw.svg import SVG, quiet_about_fonts
from tools.lab.laboratory import LabOptions

# 色盲也分得开的颜色（Okabe 与 Ito 的一套），再用线型与记号分一遍：黑白打印也看得清。
STYLES = [
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
]


# ---------- 1. 图 ----------


def new_picture(title: str, n_rows: int, n_columns: int, size: tuple[float, float]):
    """一张空的图，里面 n_rows × n_columns 个小图；返回 (figure, 二维的 axes)。"""
    matplotlib.use("Agg")
    matplotlib.rcParams.update(SVG | {
        "font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 11,
        "lines.markersize": 4,
    })  # fmt: skip
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=size, layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=13)
    return figure, axes


def smooth(values: Sequence[float], window: int) -> list[float]:
    """每一点与它前面的 window - 1 点平均：曲线少些毛刺；点数不变。"""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def seed_curves(axes, curves: dict[str, list[list[float]]], steps: int) -> None:
    """几种模型的训练损失，每个种子一条；steps 是每条练多少步。"""
    for (name, seeds), style in zip(curves.items(), STYLES, strict=False):
        for number, curve in enumerate(seeds):
            axes.plot(
                range(1, len(curve) + 1), smooth(curve, 10), **style, alpha=0.8, linewidth=1,
                markevery=max(1, steps // 8), label=name if number == 0 else None,
            )  # fmt: skip
    axes.set(xlabel="步", title="训练损失（十步平均，每个种子一条）")
    early = [curve[len(curve) // 8] for seeds in curves.values() for curve in seeds]
    if all(map(math.isfinite, early)):
        axes.set_ylim(top=max(early) + 0.2)  # 开头人人都从 ln V 降下来，不画，好看清后面


def seed_points(axes, values: dict[str, list[float]]) -> None:
    """几种模型的检验损失：每个种子一点，横线是平均。"""
    for x, (losses, style) in enumerate(zip(values.values(), STYLES, strict=False)):
        dots = {"color": style["color"], "marker": style["marker"], "linestyle": ""}
        axes.plot([x] * len(losses), losses, **dots)
        axes.hlines(mean(losses), x - 0.25, x + 0.25, color=style["color"], linewidth=2)
    axes.set_xticks(range(len(values)), [name.replace("，", "\n") for name in values])
    axes.set_xlim(-0.5, len(values) - 0.5)


def distribution(axis, names: Sequence[str], heights: list[float], top: float, color: str) -> None:
    """几个词元的概率；top：几个小图里最高的，画得一样高才好比。"""
    axis.bar(range(len(names)), heights, color=color)
    axis.set_xticks(range(len(names)), names, fontsize=9)
    axis.set(ylim=(0, min(1, 1.15 * top)), ylabel="概率")
    axis.grid(axis="x", visible=False)


# ---------- 2. 话 ----------


def spread(values: list[float]) -> float:
    """种子之间的起伏：样本标准差；只有一个种子，或有练坏了的，说不出来，记作 0。"""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0


def mean_and_spread(values: list[float]) -> str:
    """例如「4.740 ± 0.010」；只有一个种子时没有后一半。"""
    return f"{mean(values):.3f}" + (f" ± {spread(values):.3f}" if len(values) > 1 else "")


def finish(figure, sentences: list[str], options: LabOptions, program: str) -> None:
    """写成 SVG（同样的数写出同样的文件）；打印三句话，都由这一次的数得出；再说图在哪里。"""
    assert len(sentences) == 3, "不多不少三句"
    path = Path(options.out) / f"{program}.svg"
    with quiet_about_fonts():
        figure.savefig(path, metadata={"Date": None})
    say("\n这一次看到的：")
    for number, sentence in enumerate(sentences, start=1):
        say(f"  {number}. {sentence}")
    say(f"图：{path}")
