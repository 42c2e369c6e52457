"""看进训练好的模型里去的三张图：猜下一个词元，注意力，残差流。"""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from chat import display
from config import UserError
from corpus.token_file import tokenize_corpus
from generate import Speaker
from microscope import logit_lens, look
from settings.places import outside
from tokenizer import Tokenizer
from tools.draw.svg import BLUE, GREEN, GREY, ORANGE
from tools.draw.trained import Trained

# ---------- 1. 预测器 ----------


def predictor(trained: Trained) -> Figure:
    """三个开头之后的概率；以及几种预测器各要付多少损失。"""
    speaker, rows = trained.speaker(), trained.metrics()
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.7), width_ratios=(1, 1, 1, 1.25))
    for panel, text in zip(axes, ("守株待", "守株待兔：", "守株待兔：比"), strict=False):
        probs = speaker.read(speaker.prompt(text))[-1]
        candidates(panel, speaker.tokenizer, probs, f"{text} ▁", BLUE)
    ladder = {
        "瞎猜": np.log(speaker.config.vocab_size),
        **count_losses(speaker),
        "这个模型": next(r["val_loss"] for r in reversed(rows) if r.get("val_loss")),
    }
    panel = axes[3]
    bars = panel.barh(list(ladder), list(ladder.values()), color=[GREY, GREY, GREY, ORANGE])
    panel.bar_label(bars, fmt="%.2f", padding=3)
    panel.invert_yaxis()
    panel.set(title="检验损失（奈特，越低越好）", xlim=(0, 12.5), xticks=[])
    panel.tick_params(left=False)
    panel.spines[["left", "bottom"]].set_visible(False)
    figure.subplots_adjust(left=0.055, right=0.99, top=0.88, bottom=0.04, wspace=0.42)
    return figure


def count_losses(speaker: Speaker, most: int = 5_000_000, weight: float = 200) -> dict[str, float]:
    """不用神经网络、只数次数的两种预测器，在检验文档上的平均损失（奈特）。

    Args:
        most: 训练语料最多数多少个词元。
        weight: 数前一个词元时，添上 weight 份「只看次数」的猜测，见得少的才不至于是零。
    Raises:
        UserError: 语料在项目之外：检查点里记着的，不照办。
    """
    config = speaker.config
    if outside(config.data) or outside(config.data_dir):
        raise UserError(
            f"检查点里记着的语料 {config.data}（词元文件在 {config.data_dir}）在项目与现在的目录"
            f"之外，没有读；请换一个检查点，例如内置语料练出来的"
        )
    data = tokenize_corpus(config.data, "pretrain", speaker.tokenizer, config)
    train, val = (np.array(data.tokens[side][:most], np.int64) for side in ("train", "val"))
    size = config.vocab_size
    counts = np.bincount(train, minlength=size)
    single = (counts + 1) / (len(train) + size)
    pairs, n_pairs = np.unique(train[:-1] * size + train[1:], return_counts=True)
    wanted = val[:-1] * size + val[1:]
    at = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, n_pairs[at], 0)
    double = (seen + weight * single[val[1:]]) / (counts[val[:-1]] + weight)
    return {
        "只数每个\n出现几次": -np.log(single[val[1:]]).mean(),
        "只看前一个": -np.log(double).mean(),
    }


def candidates(panel, tokenizer: Tokenizer, probs, title: str, colour: str, k: int = 6) -> None:
    """最可能的 k 个词元，画成横条。"""
    values, ids = probs.topk(k)
    names = [tokenizer.label(i) for i in ids.tolist()]
    bars = panel.barh(range(k), values.tolist(), color=colour)
    panel.bar_label(bars, [display.percent(p) for p in values.tolist()], padding=3, fontsize=10)
    panel.set(yticks=range(k), yticklabels=names, title=title, xlim=(0, 1.3), xticks=[])
    panel.invert_yaxis()
    panel.tick_params(left=False)
    panel.spines["bottom"].set_visible(False)


# ---------- 2. 注意力 ----------


def attention(trained: Trained) -> Figure:
    """两个头的权重：一行是一个词元在看谁；右上角看不见。"""
    speaker = trained.speaker()
    ids = speaker.prompt("待兔守株：比喻墨守成规。同“守株待兔”")
    weights = look(speaker.model, ids).attention  # (L, H, T, T)
    names = ["始" if i == speaker.tokenizer.bos_id else speaker.tokenizer.label(i) for i in ids]
    n = len(ids)
    previous = weights[:, :, range(1, n), range(n - 1)].mean(-1)  # 平均有多少放在前一个上
    layer, head = divmod(int(previous.argmax()), weights.size(1))
    chosen = [(layer, head), (0, 0)]
    figure, axes = plt.subplots(1, 3, figsize=(11, 5.3), width_ratios=(1, 1, 0.035))
    future = np.triu(np.ones((n, n)), 1)
    for panel, (layer, head) in zip(axes, chosen, strict=False):
        shown = np.ma.masked_array(weights[layer, head].numpy(), future)
        panel.set_facecolor("#f1f1f1")
        image = panel.imshow(shown, cmap="Blues", vmin=0, vmax=1)
        share = previous[layer, head].item()
        panel.set_title(f"第 {layer + 1} 层 头 {head + 1}：平均 {share:.0%} 放在前一个词元上")
        panel.set(xticks=range(n), yticks=range(n), xticklabels=names, yticklabels=names)
        panel.set(xlabel="被看的（键）", ylabel="在看的（查询）")
        panel.tick_params(length=0)
        panel.text(n * 0.72, n * 0.22, "还没写到\n看不见", ha="center", color="#888")
    figure.colorbar(image, cax=axes[2], label="权重（每行之和为 1）")
    figure.subplots_adjust(left=0.06, right=0.94, top=0.95, bottom=0.1, wspace=0.16)
    return figure


# ---------- 3. 块与残差 ----------


def residual(trained: Trained) -> Figure:
    """「守株待兔：比」的最后一个位置：每层写进多少，读到这一层就停会猜什么。"""
    speaker = trained.speaker()
    text = "守株待兔：比"
    view = look(speaker.model, speaker.prompt(text))
    norms = view.residual[:, -1].norm(dim=-1).tolist()
    probs = logit_lens(speaker.model, view.residual)[:, -1].softmax(-1)  # (L + 1, V)
    layers = ["词嵌入", *(f"第 {i} 层后" for i in range(1, len(norms)))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1, 1.1))
    y = np.arange(len(layers))
    bars = left.barh(y, norms, height=0.38, color=BLUE, label="残差流的长度")
    left.bar_label(bars, fmt="%.1f", padding=3, fontsize=10)
    for kind_of, colour, shift in ((0, ORANGE, 0.28), (1, GREEN, 0.46)):
        written = view.writes[:, kind_of, -1].tolist()
        label = ("注意力写进的", "前馈写进的")[kind_of]
        left.barh(y[1:] + shift, written, height=0.16, color=colour, label=label)
    left.set(yticks=y, yticklabels=layers, xticks=[], xlim=(0, max(norms) * 1.18))
    left.set_title(f"「{text}」最后一个位置上的向量有多长", loc="left")
    left.legend(frameon=False, loc="upper right", fontsize=10)
    target = probs[-1].argmax()
    name = speaker.tokenizer.label(target.item())
    bars = right.barh(y, probs[:, target].tolist(), height=0.5, color=BLUE)
    for i, row in enumerate(probs):
        values, ids = row.topk(2)
        words = "  ".join(
            f"{speaker.tokenizer.label(j)} {display.percent(p)}"
            for j, p in zip(ids.tolist(), values.tolist(), strict=True)
        )
        right.text(row[target].item() + 0.02, i, words, va="center", fontsize=10)
    right.set(yticks=y, yticklabels=layers, xticks=[], xlim=(0, 1.45))
    right.set_title(f"读到这里就停，猜什么（横条是「{name}」的概率）", loc="left")
    for panel in (left, right):
        panel.invert_yaxis()
        panel.tick_params(left=False)
        panel.spines["bottom"].set_visible(False)
    figure.subplots_adjust(left=0.07, right=0.99, top=0.9, bottom=0.03, wspace=0.22)
    return figure
