"""动手改一改的图：逐个关掉每个头，照抄还在不在；搬一个向量，从第几层起，答案跟着走。"""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from chat import display
from generate import Speaker
from microscope import look, patched, without
from tools.draw.svg import BLUE, GREY, ORANGE
from tools.draw.trained import Trained

HERE = "守株待兔：比喻墨守成规。同“守株待", "兔"  # 一段文字，与照抄前文该写的
THERE = "画蛇添足：比喻多此一举。同“画蛇添", "足"  # 从这一段里搬


def hands(trained: Trained) -> Figure:
    """左：关掉每个头之后，照抄的概率；右：换上另一段的向量，两个答案各是多少。"""
    speaker = trained.speaker()
    (text, answer), (other, moved) = HERE, THERE
    ids, others = speaker.prompt(text), speaker.prompt(other)
    mine, theirs = (speaker.tokenizer.encode(word)[0] for word in (answer, moved))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 1.25))
    grid = knocked_out(speaker, ids, mine)
    whole = speaker.read(ids)[-1, mine].item()
    left.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (layer, head), p in np.ndenumerate(grid):
        ink = "white" if p > 0.6 else "black"
        left.text(head, layer, display.percent(float(p)), ha="center", va="center", color=ink)
    n_layers, n_heads = grid.shape
    left.set(
        xticks=range(n_heads), xticklabels=[f"头 {h + 1}" for h in range(n_heads)],
        yticks=range(n_layers), yticklabels=[f"第 {i + 1} 层" for i in range(n_layers)],
    )  # fmt: skip
    left.tick_params(length=0)
    left.set_title(f"关掉这个头，「{answer}」还有多少（原来 {display.percent(whole)}）", loc="left")
    probs = carried_over(speaker, ids, others)  # (L, V)
    places = range(1, len(probs) + 1)
    for token, word, colour, mark in ((mine, answer, BLUE, "o"), (theirs, moved, ORANGE, "s")):
        right.plot(places, probs[:, token] * 100, color=colour, marker=mark, label=f"「{word}」")
    right.axhline(whole * 100, color=GREY, linewidth=1)
    right.annotate(f"没有动手时的「{answer}」", (1, whole * 100), va="bottom", color="#555")
    right.set(xticks=places, xlabel="换的是第几层之后的向量", ylabel="概率（%）", ylim=(0, None))
    right.set_title(f"最后一个位置，换上「…{other[-6:]}」的向量", loc="left")
    right.legend(frameon=False)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.9, bottom=0.13, wspace=0.16)
    return figure


def knocked_out(speaker: Speaker, ids: list[int], token: int) -> np.ndarray:
    """逐个关掉每个头，token 是下一个词元的概率，(L, H)。"""
    config = speaker.config
    grid = np.zeros((config.n_layers, config.n_heads))
    for layer, head in np.ndindex(*grid.shape):
        with without(speaker.model, [f"{layer + 1}.{head + 1}"]):
            grid[layer, head] = speaker.read(ids)[-1, token].item()
    return grid


def carried_over(speaker: Speaker, ids: list[int], others: list[int]) -> np.ndarray:
    """最后一个位置，逐层换上 others 最后一个位置同一层的向量，猜测的概率，(L, V)。"""
    vectors = look(speaker.model, others).residual[:, -1]
    rows = []
    for layer in range(1, speaker.config.n_layers + 1):
        with patched(speaker.model, layer, len(ids) - 1, vectors[layer]):
            rows.append(speaker.read(ids)[-1].cpu().numpy())
    return np.stack(rows)
