"""实验：温度、top-k、top-p 对同一个分布各做了什么？

    python -m tools.lab.try_sampling                                       用默认的检查点，几秒钟
    python -m tools.lab.try_sampling --prompt 守株待兔： --checkpoint out/tiny/pretrain.pt

取一个训练好的模型在一处真实的「下一个词元」的概率，画六份：原样，三种温度，只留 top-k，只留 top-p。
温度把打分除以 T 再取 softmax：小于 1 更尖，大于 1 更平，谁先谁后不变；top-k 与 top-p
（nucleus sampling，arXiv 1904.09751）砍掉尾巴，剩下的按比例放大。用的就是聊天时的
generate.probabilities，重复惩罚关掉。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

from dataclasses import dataclass

import torch
from torch import Tensor

from config import option
from generate import Sampling
from settings.say import say
from tools.draw.lottery import distributions, left_out, n_alive
from tools.explain.speaker import load_speaker
from tools.lab.laboratory import LabOptions, numbers_in, prompt_ids, read_lab_options
from tools.lab.showing import STYLES, distribution, finish, new_picture

SHOWN = 16  # 每个小图画最可能的几个词元


@dataclass
class Options(LabOptions):
    """命令行参数。"""

    checkpoint: str | None = option(None, "用哪个检查点；默认是训练脚本写下的，微调过的优先")
    prompt: str = option("画蛇添足是什么意思？", "在哪句话之后取分布；微调过的模型当作提问")
    temps: str = option("0.3,0.6,1.5", "三种温度，用逗号隔开")
    top_k: int = option(5, "top-k 留几个", "个")
    top_p: float = option(0.8, "top-p 留到概率之和够多少")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        if len(numbers_in(self.temps)) != 3:
            wrong = f"--temps 要的是三个数，例如 0.3,0.6,1.5，得到的是 {self.temps!r}"
            return [*super().problems(), wrong]
        ways = self.ways().values()
        return super().problems() or [p for way in ways for p in way.problems()]

    def ways(self) -> dict[str, Sampling]:
        """六种取法：名字 -> 参数；不写的都是「不限」。"""
        free = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "penalty": 1.0}
        chosen = {"原样（温度 1）": Sampling(**free)}
        chosen |= {f"温度 {t:g}": Sampling(**free | {"temp": t}) for t in numbers_in(self.temps)}
        chosen[f"top-k = {self.top_k}"] = Sampling(**free | {"top_k": self.top_k})
        chosen[f"top-p = {self.top_p:g}"] = Sampling(**free | {"top_p": self.top_p})
        return chosen


def entropy(probs: Tensor) -> float:
    """熵（比特）：平均要问几个是非题，才知道抽到的是哪一个。"""
    kept = probs[probs > 0].double()
    return -(kept * kept.log2()).sum().item()


def draw(drawn_from: dict[str, Tensor], tokens: list[str], order: Tensor, prompt: str):
    """六个小图，横轴是同样的词元，按原样的概率从大到小。"""
    figure, axes = new_picture(f"「{prompt}」之后的下一个词元", 2, 3, (12, 6.2))
    color, top = STYLES[0]["color"], max(p.max().item() for p in drawn_from.values())
    for axis, (name, probs) in zip(axes.flat, drawn_from.items(), strict=True):
        heights = probs[order].tolist()
        distribution(axis, tokens, heights, top, color)
        for x, height in enumerate(heights):
            if height == 0:
                axis.annotate("×", (x, 0), ha="center", va="bottom", color="#D55E00")
        axis.set_title(f"{name}：{n_alive(probs)} 个候选，{entropy(probs):.2f} 比特", fontsize=10)
        rest = f"没画出的共 {left_out(probs, order):.1%}"
        axis.annotate(rest, (0.98, 0.9), xycoords="axes fraction", ha="right")
    figure.supxlabel(f"最可能的 {len(tokens)} 个词元（× 是概率为零的）", fontsize=10)
    return figure


def describe(name: str, probs: Tensor) -> str:
    """例如「温度 0.3」剩 8 个候选、1.2 比特。"""
    return f"「{name}」{n_alive(probs)} 个候选、{entropy(probs):.2f} 比特"


def sentences(drawn_from: dict[str, Tensor], order: Tensor, favourite: str) -> list[str]:
    """三句话。order：画出的词元；favourite：原样最可能的那个。"""
    (_, raw), *temps, top_k, top_p = drawn_from.items()
    same = all(int(probs.argmax()) == int(order[0]) for probs in drawn_from.values())
    lost = [f"{name}有 {n} 个小到成了 0" for name, probs in temps
            if (n := n_alive(raw) - n_alive(probs))]  # fmt: skip
    kept = {name: raw[probs > 0].sum().item() for name, probs in (top_k, top_p)}
    tail = {name: left_out(probs, order) for name, probs in (top_k, top_p)}
    return [
        f"温度改的是尖与平：原样 {entropy(raw):.2f} 比特，"
        + "，".join(f"{name} {entropy(probs):.2f} 比特" for name, probs in temps)
        + f"；候选{'，'.join(lost) or '一个也没有少'}。",
        f"{describe(*top_k)}，留下的原来占 {kept[top_k[0]]:.1%}；"
        f"{describe(*top_p)}，留下的原来占 {kept[top_p[0]]:.1%}；"
        f"六种取法里最可能的{'都' if same else '不都'}是「{favourite}」。",
        f"原样抽签，有 {1 - raw[order].sum():.1%} 的机会抽到第 {len(order)} 名之后的"
        f"（一共 {n_alive(raw)} 个候选），"
        + "，".join(f"{name} 之后 {share:.1%}" for name, share in tail.items())
        + "。",
    ]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """读一个检查点，算一处的分布，画六份，说三句话。"""
    options = read_lab_options(Options, "try_sampling", argv)
    speaker = load_speaker(options.checkpoint, "cpu")
    tokenizer, limit = speaker.tokenizer, speaker.config.max_len
    ids = prompt_ids(tokenizer, options.prompt, speaker.stage == "sft", limit)
    logits = speaker.model(torch.tensor([ids]))[0, -1]
    drawn_from = distributions(logits, options.ways(), speaker.banned)
    raw = next(iter(drawn_from.values()))
    order = raw.argsort(descending=True)[:SHOWN]
    tokens = [tokenizer.decode([i]) or "结束" for i in order.tolist()]
    say(f"{speaker.stage} 阶段的模型，在「{options.prompt}」之后：")
    for name, probs in drawn_from.items():
        best = "，".join(f"{t} {probs[i]:.1%}" for t, i in zip(tokens[:5], order, strict=False))
        say(f"  {describe(name, probs)}：{best}")
    figure = draw(drawn_from, tokens, order, options.prompt)
    finish(figure, sentences(drawn_from, order, tokens[0]), options, "try_sampling")


if __name__ == "__main__":
    run_script(main)
