"""实验：专家混合，多出来的参数有用吗？

    python -m tools.lab.try_experts                     默认设置约半小时
    python -m tools.lab.try_experts --steps 1000 --seeds 1

两个模型读同样的词元，只有前馈层不同：

    稠密        tiny：一层前馈，宽 576
    专家混合    tiny-moe：十六位专家各宽 144，每个词元交给四位；前馈的参数是四倍，用到的一样多

公平起见：每个种子决定初始化与语料的次序，两个模型在同一个种子下读同样的词元，学习率也相同。

检验损失分成两份来看：答案在同一条的前文里出现过的，可以照抄（词典的出处与例句里，常有成语自己的字）；
没有出现过的，抄不来。照抄是注意力的事，哪一步忽然学会，全凭种子（见 docs/lab-notes.md）；
前馈层好不好，看第二份才看得清。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import time
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F

from config import Config, UserError, option
from dataset import IGNORE, Batch
from model import Transformer
from tools.lab.laboratory import DataOptions, Laboratory, Record, open_lab
from tools.lab.showing import finish, mean_and_spread, new_picture, seed_curves, seed_points

DENSE, EXPERTS = "稠密", "专家混合"
PRESET_OF = {DENSE: "tiny", EXPERTS: "tiny-moe"}


@dataclass
class Options(DataOptions):
    """命令行参数。"""

    seeds: int = option(3, "每个模型练几个种子", "个")
    steps: int = option(250, "每次练多少步", "步")
    lr: float = option(0.02, "最高学习率，两个模型相同")

    def shapes(self) -> dict[str, Config]:
        """两个模型的形状。"""
        return {n: self.tiny(preset=p, max_steps=self.steps) for n, p in PRESET_OF.items()}

    def base(self) -> Config:
        """实验台用的：步数、批次与优化器的各项，两个模型都一样。"""
        return self.shapes()[EXPERTS]

    def plan(self) -> str:
        """要做什么，多久。"""
        total = len(PRESET_OF) * self.seeds
        return f"共练 {total} 次，每次 {self.steps} 步；默认设置约半小时（两个核）。"


# ---------- 1. 练，量 ----------


@dataclass
class Result:
    """一个模型的全部记录，每个种子一份。"""

    n_params: int  # 参数总数
    n_active: int  # 每个词元用到的
    runs: list[Record]
    copied: list[float]  # 答案在前文里出现过的词元，平均损失（奈特）
    fresh: list[float]  # 没出现过的
    seconds: list[float]  # 平均每步多少秒


def already_seen(batch: Batch) -> torch.Tensor:
    """答案在同一条的前文里（连同眼前这一个）出现过没有，布尔 (B, T)。"""
    same = batch.ids[:, None, :] == batch.targets[:, :, None]  # (B, T, T)：答案 t 与前文 s
    same &= batch.segments[:, None, :] == batch.segments[:, :, None]
    return same.tril().any(-1)


@torch.no_grad()
def split_losses(lab: Laboratory, model: Transformer) -> tuple[float, float]:
    """留出词条上，答案出现过的与没出现过的词元，各自的平均损失（奈特）。"""
    c = lab.config
    n_rows = min(lab.val_rows.n_rows, -(-c.eval_tokens // c.seq_len))
    sums, counts = torch.zeros(2), torch.zeros(2)
    for first in range(0, n_rows, c.batch_size):
        rows = range(first, min(first + c.batch_size, n_rows))
        batch = lab.val_rows.get(rows).to(lab.device.place)
        logits = model(batch.ids, batch.positions, batch.segments)  # (B, T, V)
        losses = F.cross_entropy(
            logits.transpose(1, 2), batch.targets, ignore_index=IGNORE, reduction="none"
        )
        seen, real = already_seen(batch), batch.targets != IGNORE
        for i, mask in enumerate((seen & real, ~seen & real)):
            sums[i] += losses[mask].sum().cpu()
            counts[i] += mask.sum().cpu()
    copied, fresh = (sums / counts).tolist()
    return copied, fresh


def study(lab: Laboratory, name: str, shape: Config, options: Options) -> Result:
    """一个模型，几个种子。"""
    found = None
    for seed in range(1, options.seeds + 1):
        model = lab.build(seed, shape)
        if found is None:
            total = sum(p.numel() for p in model.parameters())
            width = shape.hidden_dim * max(1, shape.n_experts) - shape.active_width()
            idle = shape.n_layers * 3 * shape.dim * width  # 没有挑中的专家
            found = Result(total, total - idle, [], [], [], [])
        start = time.perf_counter()
        run = lab.train(model, f"{name}，种子 {seed}", options.lr, seed)
        if run.died:
            raise UserError(f"{name}第 {run.died} 步练坏了；请把 --lr {options.lr:g} 调小")
        found.seconds.append((time.perf_counter() - start) / options.steps)
        copied, fresh = split_losses(lab, model)
        found.runs.append(run)
        found.copied.append(copied)
        found.fresh.append(fresh)
    return found


# ---------- 2. 画与说 ----------


def draw(results: dict[str, Result], options: Options):
    """左：训练损失；中与右：每个种子的检验损失，抄得来的与抄不来的。"""
    figure, ((curves, copied, fresh),) = new_picture(
        "专家混合：同样的词元，每个词元同样多的参数", 1, 3, (12, 4.4)
    )
    losses = {name: [run.losses for run in result.runs] for name, result in results.items()}
    seed_curves(curves, losses, options.steps)
    curves.set_ylabel("奈特 / 词元")
    curves.legend(fontsize=9)
    seed_points(copied, {name: result.copied for name, result in results.items()})
    seed_points(fresh, {name: result.fresh for name, result in results.items()})
    copied.set_title("检验损失：答案在前文里出现过的")
    fresh.set_title("检验损失：没出现过的")
    return figure


def compare(ours: list[float], theirs: list[float]) -> str:
    """同一个种子两两相减：专家混合低多少，几个种子都低吗。"""
    gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
    how = f"{'低' if mean(gaps) > 0 else '高'} {abs(mean(gaps)):.3f}"
    lower = sum(gap > 0 for gap in gaps)
    return (
        f"专家混合 {mean_and_spread(ours)}，稠密 {mean_and_spread(theirs)}，专家混合平均{how}，"
        f"{len(gaps)} 个种子里有 {lower} 个低"
    )


def sentences(results: dict[str, Result]) -> list[str]:
    """三句话。"""
    dense, experts = results[DENSE], results[EXPERTS]
    held_out = {name: [run.held_out for run in r.runs] for name, r in results.items()}
    idlest = min((run.load.share * run.load.share.size(1)).min() for run in experts.runs)
    return [
        f"检验损失（奈特每词元）：{compare(held_out[EXPERTS], held_out[DENSE])}。",
        f"没出现过的词元：{compare(experts.fresh, dense.fresh)}；"
        f"出现过的：{compare(experts.copied, dense.copied)}。",
        f"代价：稠密 {dense.n_params / 1e6:.2f} M 参数，专家混合 {experts.n_params / 1e6:.2f} M"
        f"（每个词元用到 {experts.n_active / 1e6:.2f} M）；"
        f"一步的用时是稠密的 {mean(experts.seconds) / mean(dense.seconds):.2f} 倍；"
        f"最闲的专家，负载是公平份额的 {idlest:.2f} 倍。",
    ]


def main(argv: list[str] | None = None) -> None:
    """两个模型各练几个种子，画图，说三句话。"""
    options, lab = open_lab(Options, "try_experts", argv)
    results = {n: study(lab, n, shape, options) for n, shape in options.shapes().items()}
    finish(draw(results, options), sentences(results), options, "try_experts")


if __name__ == "__main__":
    run_script(main)
