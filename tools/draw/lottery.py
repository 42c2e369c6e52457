"""同一份打分，几种抽法：拿来抽签的概率各是什么样子。

distributions       几种抽法各自的概率
n_alive, left_out   还有几个有机会；没画出来的一共多少
sampling            课里的图；tools.lab.try_sampling 的图另画，数也从这里来
"""

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from chat import display
from generate import Sampling, probabilities
from tools.draw.svg import BLUE, GREY
from tools.draw.trained import Trained


def distributions(logits: Tensor, ways: dict[str, Sampling], banned: Tensor) -> dict[str, Tensor]:
    """打分 (V,) -> 每种抽法的概率 (V,)；一个字也没写，所以没有谁要受重复惩罚。"""
    nothing = torch.zeros(0, dtype=torch.long)
    return {name: probabilities(logits, nothing, way, banned) for name, way in ways.items()}


def n_alive(probs: Tensor) -> int:
    """还有机会抽中的有几个。"""
    return int((probs > 0).sum())


def left_out(probs: Tensor, shown: Tensor) -> float:
    """shown 之外的，概率一共多少。"""
    return max(0.0, 1 - probs[shown].sum().item())


def sampling(trained: Trained) -> Figure:
    """同一份打分，四种抽法：拿来抽签的概率各是什么样子。"""
    speaker = trained.speaker()
    text = "守株待兔："
    logits = speaker.read(speaker.prompt(text))[-1].log()  # 概率的对数也是一份打分
    ways = {
        "温度 1，不限（模型原来的）": Sampling(temp=1, top_k=0, top_p=1),
        "温度 0.6": Sampling(temp=0.6, top_k=0, top_p=1),
        "温度 1.5": Sampling(temp=1.5, top_k=0, top_p=1),
        "温度 0.6，top-k 50，top-p 0.95（默认）": Sampling(),
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 5.6), sharex=True, sharey=True)
    k = 24
    x = [*range(k), k + 0.7]
    ids = logits.topk(k).indices
    names = [speaker.tokenizer.label(i) for i in ids.tolist()]
    drawn_from = distributions(logits, ways, speaker.banned)
    for panel, (title, probs) in zip(axes.flat, drawn_from.items(), strict=True):
        values = [*probs[ids].tolist(), left_out(probs, ids)]
        panel.bar(x, values, color=[BLUE] * k + [GREY])
        panel.text(x[-1], values[-1] + 0.01, display.percent(values[-1]), ha="center", fontsize=10)
        panel.text(0, values[0] + 0.01, display.percent(values[0]), ha="center", fontsize=10)
        panel.set_title(f"{title}：{n_alive(probs)} 个有机会", loc="left")
        panel.set(xticks=x, xticklabels=[*names, "其余"], ylim=(0, 0.85), yticks=[])
        panel.tick_params(length=0, labelbottom=True, labelsize=9)
        panel.spines["left"].set_visible(False)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.94, bottom=0.06, hspace=0.28, wspace=0.04)
    return figure
