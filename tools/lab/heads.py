"""实验：哪个头管照抄？

    python -m tools.lab.heads                      练三个种子的 tiny，约半小时
    python -m tools.lab.heads --checkpoints out/tiny/pretrain.pt        用练好的，几秒钟

一个词在前文里出现过，又出现一次，接着写什么？照抄上次接在它后面的，多半不错：「守株待兔：……守株」之后
就是「待」。有的头专做这件事：它看着「上次出现之后的那一个」，把它搬过来
（induction head，In-context Learning and Induction Heads，arXiv 2209.11895）。

每次关掉一个头（microscope.py 的 without），在留出的词条上量损失升了多少：能照抄的词元（它与前一个，
这样一对在同一条的前文里有过）与其余的，分开量。挑头用单数的行，报数用双数的行：
同一批行上最大的那个，总有几分是碰巧，报的数不能沾挑的光。
再看每个头在能照抄的地方，把多少注意力放在那一个上。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, mean

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config, UserError, option
from dataset import IGNORE, Batch
from engine.checkpoint import load
from microscope import attention_weights, hooks, n_heads, without
from model import Transformer
from settings.say import say
from tools.lab.laboratory import DataOptions, Laboratory, open_lab
from tools.lab.showing import STYLES, finish, mean_and_spread, new_picture


@dataclass
class Options(DataOptions):
    """命令行参数。"""

    seeds: int = option(3, "练几个种子", "个")
    steps: int = option(1000, "每次练多少步", "步")
    lr: float = option(0.02, "最高学习率")
    checkpoints: str = option("", "不练，用这些预训练的检查点（逗号隔开），每个当作一个种子")
    eval_tokens: int = option(4096, "每关一个头，量多少词元，一半用来挑，一半用来报", "词元")

    def base(self) -> Config:
        """实验台用的：tiny 原样。"""
        return self.tiny(max_steps=self.steps)

    def paths(self) -> list[Path]:
        """写了的检查点。"""
        return [Path(name.strip()) for name in self.checkpoints.split(",") if name.strip()]

    def plan(self) -> str:
        """要做什么，多久。"""
        if paths := self.paths():
            return f"{len(paths)} 个检查点，逐个关掉每个头。"
        return (
            f"练 {self.seeds} 个 tiny，每个 {self.steps} 步，再逐个关掉每个头；"
            "默认设置约半小时（两个核）。"
        )


# ---------- 1. 能照抄的 ----------


def happened_before(batch: Batch) -> Tensor:
    """位置 t 与 s < t：眼前的词元相同，接着的也相同，同在一段；布尔 (B, T, T)。"""
    same = batch.ids[:, :, None] == batch.ids[:, None, :]
    same &= batch.targets[:, :, None] == batch.targets[:, None, :]
    same &= batch.segments[:, :, None] == batch.segments[:, None, :]
    return same.tril(-1)


def two_kinds(batch: Batch) -> tuple[Tensor, Tensor]:
    """能照抄的位置，与其余的里随意取的、至多三倍那么多；各是布尔 (B, T)。"""
    real = batch.targets != IGNORE
    can_copy = happened_before(batch).any(-1) & real
    others = (~can_copy & real).flatten().nonzero()[:, 0]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
    fresh = torch.zeros_like(can_copy)
    fresh.view(-1)[others[order[: 3 * int(can_copy.sum())].to(others.device)]] = True
    return can_copy, fresh


@torch.no_grad()
def losses(model: Transformer, batch: Batch, kinds: tuple[Tensor, Tensor]) -> Tensor:
    """两种位置各自的平均损失（奈特），(2,)；只给要看的位置打分，省下大半的时间。"""
    x = model.hidden(batch.ids, batch.positions, batch.segments)  # (B, T, C)
    return torch.stack([F.cross_entropy(model.score(x[k]), batch.targets[k]) for k in kinds]).cpu()


@torch.no_grad()
def attention_to_the_next(model: Transformer, batch: Batch) -> Tensor:
    """在能照抄的地方，每个头平均把多少注意力放在「上次出现之后的那一个」上，(L, H)。

    「哈哈哈」里，那一个就是自己，人人都看着自己，不算。
    """
    total, count = 0, 0
    for row in range(len(batch.ids)):
        one = Batch(*(part[row : row + 1] for part in batch))
        before = happened_before(one)[0] & (one.targets[0] != IGNORE)[:, None]  # (T, T)
        there = F.pad(before, (1, 0))[:, :-1].tril(-1)  # s 之后的一个
        with hooks(model) as seen:
            model.hidden(one.ids, one.positions, one.segments)
        weights = torch.stack([attention_weights(b.attention, seen) for b in model.blocks])
        total += (weights * there).sum(-1)[..., there.any(-1)].sum(-1)
        count += there.any(-1).sum()
    return total / count


# ---------- 2. 逐个关掉 ----------


@dataclass
class Result:
    """一个模型：关掉每个头，两种词元的损失各升多少；挑哪个头，在另一半的行上挑。"""

    chosen: tuple[int, int]  # 另一半上，能照抄的比其余的多升得最多的：第几层第几头，从 0 数起
    copied: float  # 都开着时，能照抄的词元的损失（奈特）
    fresh: float  # 其余的
    worse_copied: Tensor  # 关掉各个头，升多少 (L, H)
    worse_fresh: Tensor
    looks: Tensor  # 各个头看着那一个的注意力 (L, H)
    seconds: float  # 每关一个头用多少秒
    n: tuple[int, int]  # 两种词元各有几个


def knock_out(lab: Laboratory, model: Transformer, eval_tokens: int) -> Result:
    """每次关掉一个头，量一遍：单数的行用来挑，双数的行用来报。"""
    n_rows = min(lab.val_rows.n_rows, max(2, eval_tokens // lab.config.seq_len))
    picking, telling = (lab.val_rows.get(range(first, n_rows, 2)).to(lab.device.place)
                        for first in (0, 1))  # fmt: skip
    model.eval()
    start = time.perf_counter()
    _, guessed, _ = worse_without(model, picking, eval_tokens)
    whole, worse, n = worse_without(model, telling, eval_tokens)
    seconds = (time.perf_counter() - start) / worse[0].numel()
    chosen = divmod((guessed[0] - guessed[1]).argmax().item(), worse.size(2))
    looks = attention_to_the_next(model, telling).cpu()
    return Result(chosen, *whole.tolist(), *worse, looks, seconds, n)


def worse_without(model: Transformer, batch: Batch, eval_tokens: int):
    """都开着时两种词元的损失 (2,)，关掉每个头之后各升多少 (2, L, H)，两种词元各几个。"""
    kinds = two_kinds(batch)
    n = int(kinds[0].sum()), int(kinds[1].sum())
    if not all(n):
        raise UserError(f"量的词元太少，没有能照抄的；请把 --eval_tokens {eval_tokens} 调大")
    whole = losses(model, batch, kinds)
    worse = torch.zeros(2, len(model.blocks), n_heads(model))
    for layer, head in itertools.product(*map(range, worse.shape[1:])):
        with without(model, [f"{layer + 1}.{head + 1}"]):
            worse[:, layer, head] = losses(model, batch, kinds) - whole
    return whole, worse, n


def models(lab: Laboratory, options: Options):
    """逐个给出练好的模型。"""
    for path in options.paths():
        model, config, checkpoint = load(path, lab.tokenizer)
        if checkpoint["stage"] != "pretrain" or config.max_len < lab.config.seq_len:
            raise UserError(f"{path} 不是预训练的检查点，或者上下文太短；请换一个")
        yield model.to(lab.device.place)
    for seed in range(1, options.seeds + 1) if not options.paths() else ():
        model = lab.build(seed)
        run = lab.train(model, f"种子 {seed}", options.lr, seed)
        if run.died:
            raise UserError(f"第 {run.died} 步练坏了；请把 --lr {options.lr:g} 调小")
        yield model


# ---------- 3. 画与说 ----------


def draw(results: list[Result]):
    """左：每个头，两种词元各升多少；中：看着那一个的注意力与升多少；右：逐层的平均。"""
    figure, ((both, looks, layers),) = new_picture("逐个关掉每个头：谁管照抄", 1, 3, (13, 4.4))
    styles = itertools.cycle(STYLES)
    for number, (result, style) in enumerate(zip(results, styles, strict=False), start=1):
        dots = {"color": style["color"], "marker": style["marker"], "linestyle": ""}
        x, y = result.worse_fresh.flatten(), result.worse_copied.flatten()
        both.plot(x, y, **dots, label=f"种子 {number}")
        looks.plot(result.looks.flatten() * 100, y, **dots)
        layer, head = result.chosen
        for axis, at in ((both, result.worse_fresh), (looks, result.looks * 100)):
            place = at[layer, head].item(), result.worse_copied[layer, head].item()
            axis.annotate(f" {layer + 1}.{head + 1}", place, va="center")
        places = range(1, len(result.worse_copied) + 1)
        layers.plot(places, result.worse_copied.mean(1), **style)
        layers.plot(places, result.worse_fresh.mean(1), color=style["color"], alpha=0.4)
        layers.set_xticks(places)
    for axis in (both, looks):
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set_ylabel("能照抄的，损失升多少（奈特）")
    both.set(xlabel="其余的，损失升多少（奈特）", title="每点是一个头")
    both.legend(fontsize=9)
    looks.set(xlabel="看着「上次出现之后的那一个」的注意力（%）", title="看着那一个的，才管照抄吗")
    layers.set(xlabel="第几层", title="一层里的平均：深色能照抄的，浅色其余的")
    return figure


def sentences(results: list[Result]) -> list[str]:
    """三句话。"""
    names = "、".join(f"{r.chosen[0] + 1}.{r.chosen[1] + 1}" for r in results)
    top = [r.worse_copied[r.chosen].item() for r in results]
    beside = [r.worse_fresh[r.chosen].item() for r in results]
    others = [(r.worse_copied.sum().item() - t) / (r.worse_copied.numel() - 1)
              for r, t in zip(results, top, strict=True)]  # fmt: skip
    looked = [r.looks[r.chosen].item() for r in results]
    most = [r.looks.max().item() for r in results]
    same = sum(r.looks[r.chosen] == r.looks.max() for r in results)
    related = [
        correlation(r.looks.flatten().tolist(), r.worse_copied.flatten().tolist()) for r in results
    ]
    return [
        f"照抄最靠它的头（各个种子）：{names}。关掉它，能照抄的词元损失升 {mean_and_spread(top)} "
        f"奈特，其余的升 {mean_and_spread(beside)}；关掉别的头，能照抄的平均升 "
        f"{mean_and_spread(others)}。",
        f"它把 {mean(looked):.0%} 的注意力放在「上次出现之后的那一个」上（最高的头 {mean(most):.0%}"
        f"，{len(results)} 个种子里有 {same} 个就是它）；各个头的这份注意力与关掉它的损害，"
        f"相关系数 {mean_and_spread(related)}。",
        f"都开着时，能照抄的损失 {mean_and_spread([r.copied for r in results])}，其余的 "
        f"{mean_and_spread([r.fresh for r in results])}（{results[0].n[0]} 与 {results[0].n[1]} 个"
        f"词元）；每关一个头用 {mean(r.seconds for r in results):.2f} 秒。",
    ]


def main(argv: list[str] | None = None) -> None:
    """几个种子，逐个关掉每个头，画图，说三句话。"""
    options, lab = open_lab(Options, "heads", argv)
    results = []
    for model in models(lab, options):
        results.append(result := knock_out(lab, model, options.eval_tokens))
        layer, head = result.chosen
        say(
            f"  第 {len(results)} 个：关掉 {layer + 1}.{head + 1}，能照抄的升 "
            f"{result.worse_copied[layer, head]:.3f}，"
            f"其余的升 {result.worse_fresh[layer, head]:.3f}"
        )
    finish(draw(results), sentences(results), options, "heads")


if __name__ == "__main__":
    run_script(main)
