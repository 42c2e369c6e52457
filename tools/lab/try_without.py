"""实验：没有位置编码、没有因果遮罩、没有注意力，各损失了什么？

    python -m tools.lab.try_without                     默认设置约四分钟
    python -m tools.lab.try_without --steps 1000 --prompt 守株待兔：

四个模型从同样的参数出发，读同样的语料，只换掉一样零件：

    完整        model.py 原样
    没有位置    每个词元的位置都是 0，旋转等于没有（NoPE，arXiv 2305.19466）；因果遮罩还在
    没有因果    训练时看得见后文：要猜的下一个词元就摆在眼前
    没有注意力  每个词元只看自己，前文传不过来

生成时用的是同样换过零件的模型，每个词元都从头算一遍。检验也做两遍：一遍照训练时那样，整行一起看；
一遍照生成时那样，后文还不存在，只问最后一个位置。看得见后文的模型，两遍相差得远。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, UserError, option
from model import Attention, AttentionContext, RotaryEmbedding, Transformer
from settings.say import say
from tools.lab.laboratory import DataOptions, Laboratory, Record, open_lab, prompt_ids
from tools.lab.showing import STYLES, finish, new_picture, smooth

WHOLE, NO_ROPE, NOT_CAUSAL, NO_ATTENTION = VARIANTS = (
    "完整", "没有位置", "没有因果", "没有注意力"
)  # fmt: skip


@dataclass
class Options(DataOptions):
    """命令行参数。"""

    steps: int = option(300, "每种练多少步", "步")
    lr: float = option(0.02, "最高学习率，四种相同")
    seed: int = option(1, "随机种子：初始化与语料的次序")
    prompt: str = option("画蛇添足：", "练完之后，让它们从这句话往下写")

    def base(self) -> Config:
        """矮胖的一种。"""
        return self.tiny(
            dim=128, n_layers=4, n_heads=2, n_kv_heads=1, hidden_dim=384, seq_len=128,
            batch_size=16, max_steps=self.steps,
        )  # fmt: skip

    def plan(self) -> str:
        """要做什么，多久。"""
        return f"四种模型，各练 {self.steps} 步；默认设置约四分钟（两个核）。"


# ---------- 1. 改装 ----------


class NoRotation(RotaryEmbedding):
    """人人都站在第 0 个位置：转角都是零。"""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """位置 (B, T) 或 (T,) -> 余弦全是 1，正弦全是 0，形状照旧。"""
        return super().forward(torch.zeros_like(positions))


class SeesBothWays(Attention):
    """看得见后文的注意力，仍只在同一段之内。

    遮罩 (…, T, T) 的下三角原是「同段的前文」；补上对称的一半，就是「同段的前文与后文」。
    """

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        mask = None if context.mask is None else context.mask | context.mask.mT
        return super().forward(x, context._replace(mask=mask, causal=False))


class NoAttention(nn.Module):
    """什么也不从前文取。"""

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C)，全是零。"""
        return torch.zeros_like(x)


def take_out(model: Transformer, name: str) -> Transformer:
    """就地换掉一样零件；其余的参数一个也不动。"""
    if name == NO_ROPE:
        model.rotary.__class__ = NoRotation
    for block in model.blocks:
        if name == NOT_CAUSAL:
            block.attention.__class__ = SeesBothWays
        elif name == NO_ATTENTION:
            block.attention = NoAttention()
    return model


# ---------- 2. 练与检验 ----------


@dataclass
class Result:
    """一种模型的全部记录。"""

    run: Record
    alone: float  # 照生成时那样检验的损失（奈特每词元）
    text: str


@torch.no_grad()
def loss_without_future(lab: Laboratory, model: Transformer) -> float:
    """照生成时那样检验：把留出的行截断在各处，只问最后一个位置。"""
    # 一行要算 seq_len / 8 遍，行数少取些；最后一行可能不满，不用。
    n_rows = max(1, min(lab.config.eval_tokens // lab.config.seq_len // 4, lab.val_rows.n_rows - 1))
    batch = lab.val_rows.get(range(n_rows)).to(lab.device.place)
    losses = []
    for end in range(8, lab.config.seq_len + 1, 8):
        inputs = (x[:, :end] for x in (batch.ids, batch.positions, batch.segments))
        logits = model.score(model.hidden(*inputs)[:, -1])  # (B, V)
        losses.append(F.cross_entropy(logits, batch.targets[:, end - 1]).item())
    return mean(losses)


def study(lab: Laboratory, name: str, options: Options) -> Result:
    """换掉一样零件，训练，检验，写一段。"""
    model = take_out(lab.build(options.seed), name)
    run = lab.train(model, name, options.lr, options.seed)
    if run.died:
        raise UserError(f"「{name}」第 {run.died} 步就练坏了；请用小些的 --lr")
    result = Result(run, loss_without_future(lab, model), lab.write(model, options.prompt))
    say(
        f"  {name}：检验损失 {run.held_out:.3f}，不给后文时 {result.alone:.3f}\n"
        f"    {options.prompt}{result.text}"
    )
    return result


# ---------- 3. 画与说 ----------


def draw(results: dict[str, Result], frequency: float, options: Options):
    """左：训练损失；右：两种检验的损失。"""
    figure, ((curves, bars),) = new_picture("少一样零件，损失会怎样", 1, 2, (11, 4.4))
    for x, ((name, result), style) in enumerate(zip(results.items(), STYLES, strict=True)):
        curve = smooth(result.run.losses, 10)
        curves.plot(
            range(1, len(curve) + 1), curve, **style, label=name,
            markevery=max(1, options.steps // 10),
        )  # fmt: skip
        color = style["color"]
        whole = bars.bar(x - 0.2, result.run.held_out, 0.38, color=color)
        alone = bars.bar(x + 0.2, result.alone, 0.38, color="white", edgecolor=color, hatch="///")
        for bar in (whole, alone):
            bars.bar_label(bar, fmt="%.2f", fontsize=9)
    curves.axhline(frequency, color="gray", linewidth=1)
    curves.annotate(
        "只会按词频猜", (options.steps, frequency), ha="right", va="bottom", color="gray"
    )
    curves.set(xlabel="步", ylabel="奈特 / 词元", title="训练损失（十步平均）", ylim=(0, None))
    curves.legend(fontsize=9)
    bars.set_xticks(range(len(results)), list(results))
    bars.set(title="检验损失：实心的整行一起看，斜线的照生成时那样不给后文")
    bars.grid(axis="x", visible=False)
    return figure


def sentences(results: dict[str, Result], frequency: float) -> list[str]:
    """三句话。"""
    loss = {name: r.run.held_out for name, r in results.items()}
    whole, cheat = results[WHOLE], results[NOT_CAUSAL]
    worse = {name: loss[name] - loss[WHOLE] for name in (NO_ROPE, NO_ATTENTION)}
    says = {n: f"{'高' if d > 0 else '低'} {abs(d):.3f}" for n, d in worse.items()}
    known = ""
    if loss[WHOLE] < frequency:
        part = (frequency - loss[NO_ATTENTION]) / (frequency - loss[WHOLE])
        known = (
            f"；从只会按词频猜（{frequency:.3f}）降到完整的，这段路只凭前一个词元就走了 {part:.0%}"
        )
    return [
        f"{NOT_CAUSAL}：检验损失 {loss[NOT_CAUSAL]:.3f}（完整的 {loss[WHOLE]:.3f}），后文一拿走就是"
        f" {cheat.alone:.3f}（完整的 {whole.alone:.3f}）；它写出的是{shorten(cheat.text)}，"
        f"完整的写出的是{shorten(whole.text)}。",
        f"{NO_ROPE}：检验损失 {loss[NO_ROPE]:.3f}，比完整的{says[NO_ROPE]}；"
        f"它写出的是{shorten(results[NO_ROPE].text)}。",
        f"{NO_ATTENTION}：检验损失 {loss[NO_ATTENTION]:.3f}，比完整的{says[NO_ATTENTION]}{known}。",
    ]


def shorten(text: str, length: int = 20) -> str:
    """给人看的一小段，放在引号里。"""
    text = text.replace("\n", " ")
    return f"「{text[:length]}{'…' if len(text) > length else ''}」" if text else "空的"


def main(argv: list[str] | None = None) -> None:
    """四种模型各练一遍，各写一段，画图，说三句话。"""
    options, lab = open_lab(Options, "try_without", argv)
    prompt_ids(lab.tokenizer, options.prompt, False, lab.config.max_len)  # 不能用的，现在就说
    results = {name: study(lab, name, options) for name in VARIANTS}
    frequency = lab.frequency_loss()
    figure = draw(results, frequency, options)
    finish(figure, sentences(results, frequency), options, "try_without")


if __name__ == "__main__":
    run_script(main)
