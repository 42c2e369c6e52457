"""实验：二十四层的模型，拆掉残差、拆掉层前的归一，会怎样？

    python -m tools.lab.try_residual                    默认设置约三分钟
    python -m tools.lab.try_residual --layers 48 --steps 60

四种模型，只有每一层怎样接起来不同（f 是注意力或前馈）：

    残差 + 归一    x + f(norm(x))    就是 model.py 的 Block（Pre-LN，arXiv 2002.04745）
    残差           x + f(x)
    归一           f(norm(x))
    都没有         f(x)

看三样东西：每层输出有多大，每层的梯度有多长，损失降不降。

公平起见：同样的种子、语料次序与步数，每种模型试两个学习率，取好的那个；最后打分前的归一与
QK-norm 四种都留着。model.py 让每条残差支路的最后一个投影从零开始，没有残差时那样整个模型
只会输出零；所以这里四种模型的投影都换成同样的、不为零的随机数。加上 --zero_init，就都照 model.py
从零开始：看它救得了哪几种。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chat.numbers import magnitude
from config import Config, option
from model import AttentionContext, Block, Transformer
from tools.lab.laboratory import DataOptions, Laboratory, Record, open_lab
from tools.lab.showing import STYLES, finish, new_picture, smooth

VARIANTS = {  # 名字: (有没有残差, 有没有归一)
    "残差 + 归一": (True, True),
    "只有残差": (True, False),
    "只有归一": (False, True),
    "都没有": (False, False),
}


@dataclass
class Options(DataOptions):
    """命令行参数。"""

    layers: int = option(24, "层数", "层")
    steps: int = option(120, "每种练多少步", "步")
    lr: float = option(0.02, "最高学习率；另试它的五分之一")
    zero_init: bool = option(False, "每条支路的最后一个投影从零开始，与 model.py 相同")
    seed: int = option(1, "随机种子：初始化与语料的次序")

    def base(self) -> Config:
        """细而深。"""
        return self.tiny(
            dim=64, n_layers=self.layers, n_heads=2, n_kv_heads=1, hidden_dim=192, seq_len=128,
            max_steps=self.steps,
        )  # fmt: skip

    def plan(self) -> str:
        """要做什么，多久。"""
        return f"四种 {self.layers} 层的模型，各练 {self.steps} 步；默认设置约三分钟（两个核）。"


# ---------- 1. 改装 ----------


class TornBlock(Block):
    """可以拆掉残差与归一的一层；一样也不拆时，算的与 Block 逐位相同。"""

    def __init__(self, config: Config, layer: int, residual: bool, pre_norm: bool):
        super().__init__(config, layer)
        self.residual = residual
        if not pre_norm:
            self.attention_norm = self.feed_forward_norm = nn.Identity()

    def forward(self, x: Tensor, context: AttentionContext, routing=None) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        y = self.attention(self.attention_norm(x), context)
        x = x + y if self.residual else y
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + y if self.residual else y


def tear(
    model: Transformer, config: Config, residual: bool, pre_norm: bool, seed: int, zero_init: bool
) -> Transformer:
    """把每一层换成 TornBlock；矩阵全部重新取随机数，四种模型取到的相同。"""
    blocks = (TornBlock(config, n, residual, pre_norm) for n in range(config.n_layers))
    model.blocks = nn.ModuleList(blocks).to(model.embedding.weight.device)
    torch.manual_seed(seed)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    if zero_init:
        for block in model.blocks:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.feed_forward.down.weight)
    return model


# ---------- 2. 测量 ----------


class Probe:
    """记下每层的梯度：`gradients[第几步]` 是各层参数梯度的范数，从第一层到最后一层。"""

    def __init__(self, steps: tuple[int, ...]):
        self.steps, self.gradients = steps, {}

    def __call__(self, step: int, model: Transformer) -> None:
        """交给 Laboratory.train 的 watch。"""
        if step in self.steps:
            self.gradients[step] = [
                torch.stack([p.grad.double().norm() for p in block.parameters()]).norm().item()
                for block in model.blocks
            ]


@torch.no_grad()
def output_sizes(lab: Laboratory, model: Transformer) -> list[float]:
    """每层输出的均方根，从第一层到最后一层；平方在 fp64 中算，免得它自己溢出。"""
    sizes = []

    def record(module, inputs, output):
        sizes.append(output.double().square().mean().sqrt().item())

    hooks = [block.register_forward_hook(record) for block in model.blocks]
    batch = lab.train_rows.get(range(lab.config.batch_size)).to(lab.device.place)
    model.hidden(batch.ids, batch.positions, batch.segments)
    for hook in hooks:
        hook.remove()
    return sizes


@dataclass
class Result:
    """一种模型的全部记录。"""

    sizes: list[float]
    gradients: dict[int, list[float]]
    run: Record  # 好的那个学习率
    lr: float
    other: Record
    other_lr: float


def study(lab: Laboratory, name: str, options: Options) -> Result:
    """训练一种模型，两个学习率。"""
    tried = []
    for lr in (options.lr, options.lr / 5):
        model = lab.build(options.seed)
        tear(model, lab.config, *VARIANTS[name], options.seed, options.zero_init)
        sizes = output_sizes(lab, model)
        probe = Probe((0, options.steps - 1))
        run = lab.train(model, f"{name}，学习率 {lr:g}", lr, options.seed, probe)
        tried.append((run.held_out, lr, run, probe.gradients))
        if run.died == 1:  # 第一步就坏了，还没有用到学习率
            break
    best, other = min(tried, key=lambda t: t[0]), max(tried, key=lambda t: t[0])
    return Result(sizes, best[3], best[2], best[1], other[2], other[1])


# ---------- 3. 画与说 ----------

FLOOR, CEILING = 1e-12, 1e12  # 图上画得出的范围；0 画在底边，无穷大与 NaN 画在顶边


def clipped(values: list[float]) -> list[float]:
    """画得出的数；NaN 与无穷大放在顶边。"""
    return [min(max(v, FLOOR), CEILING) if math.isfinite(v) else CEILING for v in values]


def draw(results: dict[str, Result], options: Options):
    """四个小图：输出的大小、练之前与练之后的梯度、损失。"""
    figure, axes = new_picture(
        f"{options.layers} 层：有没有残差，有没有层前的归一", 2, 2, (11, 7.5)
    )
    (size, before), (loss, after) = axes
    layers = range(1, options.layers + 1)
    for (name, result), style in zip(results.items(), STYLES, strict=True):
        by_layer = {size: result.sizes, before: result.gradients.get(0)}
        by_layer[after] = result.gradients.get(options.steps - 1)
        for axis, values in by_layer.items():
            if values:
                axis.plot(layers, clipped(values), **style, label=name, clip_on=False)
        end = "" if not result.run.died else f"（第 {result.run.died} 步坏了）"
        finite = [v for v in result.run.losses if math.isfinite(v)]
        steps, curve = range(1, len(finite) + 1), smooth(finite, 5)
        loss.plot(steps, curve, **style, markevery=max(1, options.steps // 10), label=name + end)
    for axis, title in (
        (size, "练之前：每层输出的均方根"),
        (before, "练之前：每层参数的梯度范数"),
        (after, f"第 {options.steps} 步：每层参数的梯度范数"),
    ):
        axis.set(yscale="log", ylim=(FLOOR, CEILING), xlabel="第几层", title=title)
    note = "底边：0 或更小；顶边：溢出（无穷大或 NaN）"
    before.annotate(note, (0.02, 0.03), xycoords="axes fraction", fontsize=8)
    loss.set(
        xlabel="步", ylabel="奈特 / 词元", title="训练损失（五步平均）", xlim=(0, options.steps + 1)
    )
    loss.legend(fontsize=9)
    size.legend(fontsize=9, loc="upper left")
    return figure


def describe_gradient(name: str, values: list[float]) -> str:
    """例如「只有归一：第 1 层的梯度是第 24 层的 1500 倍」。"""
    first, last = values[0], values[-1]
    if not all(map(math.isfinite, values)):
        return f"「{name}」的梯度已经不是有限的数"
    if 0.0 in (first, last):
        zeros = sum(v == 0 for v in values)
        return f"「{name}」有 {zeros} 层的梯度正好是 0"
    ratio = first / last
    times = f"{magnitude(ratio)} 倍" if ratio >= 1 else f"1/{magnitude(1 / ratio)}"
    return f"「{name}」第 1 层的梯度是第 {len(values)} 层的 {times}"


def describe_size(name: str, values: list[float]) -> str:
    """例如「只有残差：第 9 层起溢出」。"""
    for layer, value in enumerate(values, start=1):
        if not math.isfinite(value):
            return f"「{name}」到第 {layer} 层就溢出"
        if value == 0:
            return f"「{name}」到第 {layer} 层就成了 0"
    return f"「{name}」从 {values[0]:.2g} 到 {values[-1]:.2g}"


def describe_loss(name: str, result: Result) -> str:
    """例如「残差 + 归一：5.02（学习率 0.004；0.02 时是 5.3）」。"""
    run, other = result.run, result.other
    if run.died:
        return f"「{name}」第 {run.died} 步就坏了"
    rest = f"第 {other.died} 步坏了" if other.died else f"是 {other.held_out:.2f}"
    others = f"；{result.other_lr:g} 时{rest}" if other is not run else ""
    return f"「{name}」{run.held_out:.2f}（学习率 {result.lr:g}{others}）"


def sentences(
    results: dict[str, Result], options: Options, know_nothing: float, frequency: float
) -> list[str]:
    """三句话；后两个参数是什么也不会与只会按词频猜的损失。"""
    last = options.steps - 1
    sizes = "，".join(describe_size(n, r.sizes) for n, r in results.items())
    before = "，".join(describe_gradient(n, r.gradients[0]) for n, r in results.items())
    after = [
        describe_gradient(n, r.gradients[last]) for n, r in results.items() if last in r.gradients
    ]
    losses = "，".join(describe_loss(n, r) for n, r in results.items())
    return [
        f"练之前，逐层输出的均方根：{sizes}。",
        f"练之前，{before}；第 {options.steps} 步，{'，'.join(after) or '没有一种活着'}。",
        f"练 {options.steps} 步之后的检验损失（什么也不会是 {know_nothing:.2f}，"
        f"只会按词频猜是 {frequency:.2f}）：{losses}。",
    ]


def main(argv: list[str] | None = None) -> None:
    """四种模型各练一遍，画图，说三句话。"""
    options, lab = open_lab(Options, "try_residual", argv)
    results = {name: study(lab, name, options) for name in VARIANTS}
    know_nothing = math.log(lab.config.vocab_size)
    said = sentences(results, options, know_nothing, lab.frequency_loss())
    finish(draw(results, options), said, options, "try_residual")


if __name__ == "__main__":
    run_script(main)
