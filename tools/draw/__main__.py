"""画 docs/lessons 里的八张图：每张由一个函数画，数都来自这个仓库的代码与训练的记录。

    python -m tools.draw attention                  画一张，写在 out/lessons/lesson-3.svg
    python -m tools.draw all                        八张都画
    python -m tools.draw all --folder docs/pictures 重画课文里的那八张（默认的 tiny 练完之后）

    predictor 下一个词元的概率      tokenizer 切成词元          attention 注意力的权重
    residual 残差流与中途的猜测     loop 学习率与梯度的长度     pretraining 损失怎样降下来
    sft 学哪些词元                  sampling 温度与 top-p

tokenizer 与 sft 不需要训练过的模型；其余的要先运行 python pre_train.py。
"""

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from chat import display
from config import UserError, option
from corpus.idioms import GREETINGS, ask_about, dictionary_file, read_entries
from corpus.readers import ReadLog
from corpus.shapes import Record
from corpus.token_file import encode_conversations, tokenize_corpus
from dataset import IGNORE, SFTBatches
from engine.metrics import read_metrics
from generate import Sampling, Speaker, probabilities
from microscope import logit_lens, look
from optimizer import learning_rate
from settings.flags import help_text, parse_flags, run_script
from tokenizer import Tokenizer
from tools.draw.svg import SVG, quiet_about_fonts
from tools.explain.__main__ import load_speaker

BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#d9772b", "#3c8d5a", "#9aa0a6"
SOFT = {BLUE: "#d7e6f6", ORANGE: "#fbe3cf", GREEN: "#d5ecdd", GREY: "#eceef0"}
STYLE = SVG | {"font.size": 11, "axes.titlesize": 12, "figure.facecolor": "white"}


@dataclass
class Options:
    """命令行参数。"""

    checkpoint: str = option("out/tiny/pretrain.pt", "预训练的检查点；旁边要有训练的记录")
    folder: str = option("out/lessons", "图写到哪里")


@dataclass
class Trained:
    """训练过的模型；用到哪样才读哪样。"""

    path: Path

    def speaker(self) -> Speaker:
        """fp32 的模型。Raises UserError：没有，或者不是预训练的。"""
        speaker = load_speaker(str(self.path), "cpu")
        if speaker.stage != "pretrain":
            raise UserError(
                f"{self.path} 是 {speaker.stage} 阶段的检查点；这些图画的是预训练的模型"
            )
        return speaker

    def metrics(self) -> list[dict]:
        """逐步的记录。Raises UserError：没有。"""
        path = self.path.parent / "pretrain" / "metrics.jsonl"
        rows = read_metrics(path)
        if len(rows) < 3:
            raise UserError(f"找不到训练的记录 {path}；请先运行 python pre_train.py --preset tiny")
        return rows


def main() -> None:
    """读命令行，画一张或八张。"""
    names, options = read_arguments(sys.argv[1:])
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with matplotlib.rc_context(STYLE), quiet_about_fonts():
            figure = PICTURES[name](Trained(Path(options.checkpoint)))
            path = folder / f"lesson-{list(PICTURES).index(name) + 1}.svg"
            figure.savefig(path, metadata={"Date": None})
            plt.close(figure)
        print(f"{name}：{path}（用浏览器打开）")


def read_arguments(argv: list[str]) -> tuple[list[str], Options]:
    """命令行 -> 要画哪几张与各项参数。"""
    usage = (
        f"用法：python -m tools.draw 图名 [--参数 值 …]\n图名：{'、'.join(PICTURES)}；all 是全部"
    )
    if "--help" in argv or "-h" in argv:
        print(help_text(Options, usage))
        raise SystemExit(0)
    if not argv or argv[0].startswith("--"):
        raise UserError(f"请先写要画哪一张：{'、'.join(PICTURES)}，或者 all")
    name, *rest = argv
    problems: list[str] = []
    options = Options(**parse_flags(Options, rest, problems))
    if name != "all" and name not in PICTURES:
        near = difflib.get_close_matches(name, PICTURES, n=1, cutoff=0.0)[0]
        problems.insert(0, f"没有叫 {name} 的图；最接近的是 {near}")
    if problems:
        raise UserError("；".join(problems))
    return list(PICTURES) if name == "all" else [name], options


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
    """
    config = speaker.config
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


# ---------- 2. 分词器 ----------


def tokenizer(trained: Trained) -> Figure:
    """一句混着汉字、字母、数字与表情的话，切成哪些词元，编号是多少。"""
    translator = Tokenizer()
    lines = ["守株待兔：比喻死守经验，不知变通。", "2024年，Mini-LLM 读了3万条成语😀"]
    figure, axes = plt.subplots(len(lines), 1, figsize=(11, 3.1))
    for panel, text in zip(axes, lines, strict=True):
        ids = translator.encode(text)
        for x, token in enumerate(ids):
            name = translator.label(token)
            colour = kind(name)
            cell(panel, x, 0, name, SOFT[colour], below=str(token), edge=colour)
        panel.set(xlim=(-0.1, 17.1), ylim=(1.1, -0.12))
        panel.set_title(f"{text.replace('😀', '☺')}    →    {len(ids)} 个词元", loc="left")
        panel.axis("off")
    kinds = {"汉字": BLUE, "字母与数字（##：接在前一个后面）": GREEN, "标点与空格": GREY,
             "认不出的": ORANGE}  # fmt: skip
    patches = [Patch(facecolor=SOFT[c], edgecolor=c, label=name) for name, c in kinds.items()]
    figure.legend(handles=patches, loc="lower left", ncols=4, frameon=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.1, hspace=0.25)
    return figure


def kind(name: str) -> str:
    """一个词元属于哪一类，用它的颜色表示。"""
    if name == "[UNK]":
        return ORANGE
    if "一" <= name[0] <= "鿿":
        return BLUE
    return GREEN if name.removeprefix("##").isalnum() else GREY


def cell(panel, x, y, text: str, face: str, below: str = "", edge: str = GREY, size=12) -> None:
    """一个词元一格，下面可以再写一行小字。"""
    panel.add_patch(Rectangle((x + 0.04, y), 0.92, 0.7, facecolor=face, edgecolor=edge))
    size = size if len(text) < 5 else size * 0.75
    panel.text(x + 0.5, y + 0.35, text, ha="center", va="center", fontsize=size)
    panel.text(x + 0.5, y + 0.9, below, ha="center", va="center", fontsize=9, color="#555")


# ---------- 3. 注意力 ----------


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


# ---------- 4. 块与残差 ----------


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


# ---------- 5. 训练循环 ----------


def loop(trained: Trained) -> Figure:
    """默认的一次训练：每步的学习率，每步梯度的长度与截短的界线。"""
    rows = [r for r in trained.metrics() if "lr" in r]
    config = trained.speaker().config
    steps = [r["step"] for r in rows]
    n_steps = steps[-1]
    highest = max(r["lr"] for r in rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    left.plot(steps, [r["lr"] for r in rows], color=BLUE, label="记录里的学习率")
    some = range(0, n_steps, max(1, n_steps // 20))
    factors = [learning_rate(s, n_steps, config.warmup, config.decay) for s in some]
    left.plot([s + 1 for s in some], [highest * f for f in factors], "o", color=ORANGE,
              markersize=4, label="learning_rate() 算出的")  # fmt: skip
    left.axvspan(0, config.warmup * n_steps, color=SOFT[ORANGE])
    left.axvspan((1 - config.decay) * n_steps, n_steps, color=SOFT[BLUE], alpha=0.5)
    left.set(title="学习率：升温、平稳、下降", xlabel="步", ylim=(0, highest * 1.1))
    left.legend(frameon=False)
    norms = [r["grad_norm"] for r in rows]
    right.semilogy(steps, norms, color=BLUE, linewidth=0.9, label="梯度的长度")
    right.axhline(config.grad_clip, color=ORANGE, label=f"上限 {config.grad_clip:g}，超过的截短")
    over = sum(n > config.grad_clip for n in norms)
    right.set(title=f"梯度的长度：{len(norms)} 步里 {over} 步被截短", xlabel="步")
    right.legend(frameon=False)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.9, bottom=0.13, wspace=0.16)
    return figure


# ---------- 6. 预训练 ----------


def pretraining(trained: Trained) -> Figure:
    """损失曲线，旁边是几次检验时写出来的文字。"""
    rows = trained.metrics()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.15, 1))
    train = [(r["step"], r["train_loss"]) for r in rows if r.get("train_loss")]
    checks = [r for r in rows if r.get("val_loss")]
    left.plot(*zip(*train, strict=True), color=GREY, linewidth=0.8, label="训练（每步）")
    left.plot([r["step"] for r in checks], [r["val_loss"] for r in checks], "o-", color=BLUE,
              markersize=4, label="检验（没有训练过的文档）")  # fmt: skip
    left.set(xlabel="步", ylabel="损失（奈特每词元）", ylim=(3, 10.3))
    left.grid(alpha=0.25)
    left.legend(frameon=False)
    picked = sorted({round(i * (len(checks) - 1) / 5) for i in range(6)})
    right.axis("off")
    right.set(xlim=(0, 1), ylim=(0, 1))
    for number, i in enumerate(picked):
        row = checks[i]
        left.annotate(str(number + 1), (row["step"], row["val_loss"]), xytext=(0, 8),
                      textcoords="offset points", ha="center", color=ORANGE)  # fmt: skip
        y = 0.99 - number * 0.17
        right.text(0, y, f"{number + 1}", color=ORANGE, va="top")
        right.text(0.04, y, f"第 {row['step']} 步，{row['val_bpc']:.2f} 比特每字", va="top",
                   color="#555", fontsize=10)  # fmt: skip
        sample = row["sample"].split("\n")[0]
        sample = sample[:20] + ("……" if len(sample) > 20 else "")
        right.text(0.04, y - 0.065, f"守株待兔：{sample}", va="top", fontsize=11)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.97, bottom=0.12, wspace=0.06)
    return figure


# ---------- 7. 微调 ----------


def sft(trained: Trained) -> Figure:
    """两段对话拼成的一行：上面是输入，下面是目标；橙色的目标才算损失。"""
    translator = Tokenizer()
    batch, per_line = sft_row(translator), 16
    ids, targets, positions, segments = (x[0].tolist() for x in batch)
    n = sum(s >= 0 for s in segments)
    n_lines = -(-n // per_line)
    figure, panel = plt.subplots(figsize=(11, 0.95 * n_lines + 0.5))
    for i in range(n):
        x, y = i % per_line, i // per_line * 2.1
        face = SOFT[BLUE] if segments[i] else SOFT[GREEN]
        cell(panel, x, y, short(translator, ids[i]), face, edge="white", size=11)
        learned = targets[i] != IGNORE
        name = short(translator, targets[i]) if learned else "·"
        face = SOFT[ORANGE] if learned else "white"
        cell(panel, x, y + 0.72, name, face, edge=ORANGE if learned else "#dddddd", size=11)
        panel.text(x + 0.5, y + 1.62, str(positions[i]), ha="center", va="center", fontsize=8,
                   color="#777")  # fmt: skip
    for line in range(n_lines):
        for dy, word in ((0.35, "输入"), (1.07, "目标"), (1.62, "位置")):
            panel.text(-0.1, line * 2.1 + dy, word, ha="right", va="center", fontsize=9,
                       color="#555")  # fmt: skip
    patches = [
        Patch(facecolor=SOFT[GREEN], label="第一段对话"),
        Patch(facecolor=SOFT[BLUE], label="第二段对话"),
        Patch(facecolor=SOFT[ORANGE], edgecolor=ORANGE, label="要学的目标"),
        Patch(facecolor="white", edgecolor="#dddddd", label="不算损失"),
    ]
    figure.legend(handles=patches, loc="lower center", ncols=4, frameon=False)
    panel.set(xlim=(-0.9, per_line), ylim=(n_lines * 2.1 - 0.2, -0.15))
    panel.axis("off")
    figure.subplots_adjust(left=0.005, right=0.995, top=0.99, bottom=0.4 / figure.get_figheight())
    return figure


def sft_row(translator: Tokenizer):
    """由真的语料与真的数据代码做出一行：一句寒暄，一句「守株待兔是什么意思？」。"""
    entries = read_entries(dictionary_file(), ReadLog("builtin"))
    entry = next(e for e in entries if e["word"] == "守株待兔")
    thanks = next(pair for pair in GREETINGS if pair[0] == "谢谢")
    conversations = [ask_about(entry)[0], list(zip(("user", "assistant"), thanks, strict=True))]
    chunk = [Record(None, conversation) for conversation in conversations]
    pieces = [ids for ids, _, _ in encode_conversations(chunk, translator)]
    starts = np.cumsum([0, *map(len, pieces)])
    batches = SFTBatches(np.concatenate(pieces), starts, 128, translator, seed=0)
    return batches.get([0])


def short(translator: Tokenizer, token: int) -> str:
    """控制词元写短些，格子里才放得下。"""
    names = {"<|im_start|>": "始", "<|im_end|>": "终", "<|user|>": "用户", "<|assistant|>": "助手"}
    name = translator.label(token)
    return f"〈{names[name]}〉" if name in names else name


# ---------- 8. 采样 ----------


def sampling(trained: Trained) -> Figure:
    """同一份打分，四种抽法：拿来抽签的概率各是什么样子。"""
    speaker = trained.speaker()
    text = "守株待兔："
    logits = speaker.read(speaker.prompt(text))[-1].log()  # 概率的对数也是一份打分
    nothing = torch.zeros(0, dtype=torch.long)
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
    for panel, (title, way) in zip(axes.flat, ways.items(), strict=True):
        probs = probabilities(logits, nothing, way, speaker.banned)
        alive, others = int((probs > 0).sum()), 1 - probs[ids].sum().item()
        values = [*probs[ids].tolist(), max(0.0, others)]
        panel.bar(x, values, color=[BLUE] * k + [GREY])
        panel.text(x[-1], values[-1] + 0.01, display.percent(values[-1]), ha="center", fontsize=10)
        panel.text(0, values[0] + 0.01, display.percent(values[0]), ha="center", fontsize=10)
        panel.set_title(f"{title}：{alive} 个有机会", loc="left")
        panel.set(xticks=x, xticklabels=[*names, "其余"], ylim=(0, 0.85), yticks=[])
        panel.tick_params(length=0, labelbottom=True, labelsize=9)
        panel.spines["left"].set_visible(False)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.94, bottom=0.06, hspace=0.28, wspace=0.04)
    return figure


PICTURES: dict[str, Callable[[Trained], Figure]] = {
    f.__name__: f
    for f in (predictor, tokenizer, attention, residual, loop, pretraining, sft, sampling)
}

if __name__ == "__main__":
    run_script(main)
