"""不需要训练过的模型的两张图：切成词元，学哪些词元。"""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from corpus.idioms import GREETINGS, ask_about, dictionary_file, read_entries
from corpus.log import ReadLog
from corpus.shapes import Record
from corpus.token_file import encode_conversations
from dataset import IGNORE, SFTBatches
from tokenizer import Tokenizer
from tools.draw.svg import BLUE, GREEN, GREY, ORANGE, SOFT
from tools.draw.trained import Trained

# ---------- 1. 分词器 ----------


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


# ---------- 2. 微调 ----------


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
    pieces = [encoded.ids for encoded in encode_conversations(chunk, translator)]
    starts = np.cumsum([0, *map(len, pieces)])
    batches = SFTBatches(np.concatenate(pieces), starts, 128, translator, seed=0)
    return batches.get([0])


def short(translator: Tokenizer, token: int) -> str:
    """控制词元写短些，格子里才放得下。"""
    names = {"<|im_start|>": "始", "<|im_end|>": "终", "<|user|>": "用户", "<|assistant|>": "助手"}
    name = translator.label(token)
    return f"〈{names[name]}〉" if name in names else name
