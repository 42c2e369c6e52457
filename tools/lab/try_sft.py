"""实验：微调之后，多了什么，忘了什么？

    python -m tools.lab.try_sft                         默认的 out/tiny 里的两个检查点，约两分钟
    python -m tools.lab.try_sft --preset wide --n 50

同样的话，问只预训练过的与又微调过的：各写出什么，下一个词元的概率怎样分布；再在留出的两种文字上
各量一遍损失：词典的正文（预训练读的那种），问答里的回答（微调学的那种）。都是两个模型没有见过的词条。
只预训练过的模型从没见过提问的格式，答不上来不是它笨：看的正是微调补上了什么。

损失 L（奈特每词元）写成 exp(-L)，就是给真正的下一个词元的概率，取几何平均。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import PRESETS, Config, option
from corpus.token_file import tokenize_corpus
from dataset import DocumentBatches, SFTBatches
from engine.device import Device
from engine.speed import load_for_chat
from generate import Sampling, Speaker
from loss import Loss, evaluate
from settings.say import say
from tools.lab.check_answers import QUESTIONS, count_right, unseen_entries
from tools.lab.laboratory import DataOptions, prompt_ids, read_lab_options
from tools.lab.showing import STYLES, distribution, finish, new_picture

STAGES = {"pretrain": "只预训练", "sft": "又微调"}
PROMPTS = {  # 话: 当作提问，还是当作一篇文档的开头
    "画蛇添足是什么意思？": True,
    "守株待兔出自哪里？": True,
    "你好": True,
    "守株待兔：": False,
}


@dataclass
class Options(DataOptions):
    """命令行参数。"""

    preset: str = option("tiny", "比 out/预设名 里的两个检查点", choices=tuple(PRESETS))
    n: int = option(20, "数一数多少个没见过的成语，回答的样子对不对", "个")
    prompt: str = option("画蛇添足是什么意思？", "画下一个词元的分布时，问的是哪一句")


# ---------- 1. 测量 ----------


@dataclass
class Result:
    """一个模型的全部记录。"""

    texts: dict[str, str]  # 每句话之后写出的
    next_probs: Tensor  # 提问之后，下一个词元的概率 (V,)
    losses: dict[str, float]  # 词典的正文、问答里的回答：检验损失
    right: dict[str, int]  # 每种问题，回答的样子对的个数
    asked: int  # 每种问题问了几个成语


def held_out(options: Options, config: Config, speaker: Speaker) -> dict:
    """留出的两种文字，各切成行；划分与训练这个模型时的相同。"""
    config.val_fraction, config.seq_len = speaker.config.val_fraction, speaker.config.seq_len
    tokenizer = speaker.tokenizer
    text = tokenize_corpus("builtin", "pretrain", tokenizer, config)
    data = tokenize_corpus("builtin", "sft", tokenizer, config)
    T = config.seq_len
    return {
        "词典的正文": DocumentBatches(text.tokens["val"], text.starts["val"], T, 0),
        "问答里的回答": SFTBatches(data.tokens["val"], data.starts["val"], T, tokenizer, 0),
    }


@torch.inference_mode()
def study(speaker: Speaker, device: Device, texts: dict, options: Options) -> Result:
    """问几句话，量两种损失，数一数样子对的回答。"""
    tokenizer, model = speaker.tokenizer, speaker.model
    greedy, written = Sampling(temp=0, max=60), {}
    for prompt, as_question in PROMPTS.items():
        ids = prompt_ids(tokenizer, prompt, as_question, speaker.config.max_len)
        written[prompt] = tokenizer.decode(speaker.generate(ids, greedy))
    ids = prompt_ids(tokenizer, options.prompt, True, speaker.config.max_len)
    logits = model(torch.tensor([ids], device=device.place))[0, -1]
    losses = {
        name: evaluate(Loss(model), rows, 8, options.eval_tokens, device)
        for name, rows in texts.items()
    }
    entries = unseen_entries(options.n, speaker.config.val_fraction)
    right = count_right(speaker, entries)
    return Result(written, logits.softmax(0).cpu(), losses, right, len(entries))


# ---------- 2. 画与说 ----------


def draw(results: dict[str, Result], tokens: dict[int, str], options: Options):
    """上：同一个提问之后的分布；下：给两种文字的概率，样子对的回答。"""
    figure, (distributions, (given, right)) = new_picture(
        "微调之后，多了什么，忘了什么", 2, 2, (11, 7)
    )
    top = max(r.next_probs.max().item() for r in results.values())
    for axis, (stage, result), style in zip(distributions, results.items(), STYLES, strict=False):
        heights = [result.next_probs[i].item() for i in tokens]
        distribution(axis, list(tokens.values()), heights, top, style["color"])
        axis.set_title(f"{STAGES[stage]}：问「{options.prompt}」，下一个词元", fontsize=10)
    given_by = {s: [math.exp(-loss) for loss in r.losses.values()] for s, r in results.items()}
    right_by = {s: [n / r.asked for n in r.right.values()] for s, r in results.items()}
    draw_pairs(given, given_by, list(results["sft"].losses))
    given.set(title="给真正的下一个词元的概率（几何平均）", ylabel="概率")
    given.legend(fontsize=9)
    draw_pairs(right, right_by, [f"问{kind}" for kind in QUESTIONS])
    asked = results["sft"].asked
    right.set(title=f"{asked} 个没见过的成语：回答的样子对的", ylabel="比例", ylim=(0, 1.1))
    return figure


def draw_pairs(axis, bars: dict[str, list[float]], names: list[str]) -> None:
    """成对的柱子：微调前的实心，微调后的画斜线。"""
    for (stage, heights), style, shift in zip(bars.items(), STYLES, (-0.2, 0.2), strict=False):
        at = [x + shift for x in range(len(heights))]
        hatch = "" if stage == "pretrain" else "///"
        drawn = axis.bar(
            at, heights, 0.38, color=style["color"], hatch=hatch, edgecolor="white",
            label=STAGES[stage],
        )  # fmt: skip
        axis.bar_label(drawn, fmt=lambda height: f"{height:.1%}", fontsize=9)
    axis.set_xticks(range(len(names)), names)
    axis.grid(axis="x", visible=False)


def sentences(results: dict[str, Result]) -> list[str]:
    """三句话。"""
    before, after = results["pretrain"], results["sft"]
    counts = [f"问{k} {before.right[k]} → {after.right[k]}" for k in QUESTIONS]
    text, answers = before.losses
    changes = {}
    for name in (text, answers):
        old, new = before.losses[name], after.losses[name]
        changes[name] = (
            f"损失 {old:.3f} → {new:.3f}（给真正的下一个词元的概率 {math.exp(-old):.2%} → "
            f"{math.exp(-new):.2%}）"
        )
    lost = after.losses[text] - before.losses[text]
    verdict = f"忘了一些：高了 {lost:.3f}" if lost > 0 else f"没有忘：低了 {-lost:.3f}"
    return [
        f"没见过的 {before.asked} 个成语，回答的样子对的，微调前 → 后：{'，'.join(counts)}。",
        f"{answers}：{changes[answers]}。",
        f"{text}：{changes[text]}，{verdict}。",
    ]


def main(argv: list[str] | None = None) -> None:
    """两个检查点各问一遍，画图，说三句话。"""
    options = read_lab_options(Options, "try_sft", argv)
    config = options.tiny()
    device = Device(config)
    speakers = {
        stage: load_for_chat(Path(f"out/{options.preset}/{stage}.pt"), device) for stage in STAGES
    }
    for speaker in speakers.values():
        if speaker.config.data != "builtin":
            say(f"（这个检查点读的是 {speaker.config.data}，这里量的却是内置的词典）")
    texts = held_out(options, config, speakers["sft"])
    say(f"两个检查点各写 {len(PROMPTS)} 段，各答 {3 * options.n} 问；默认设置约两分钟（两个核）。")
    results = {}
    for stage, speaker in speakers.items():
        results[stage] = study(speaker, device, texts, options)
    for prompt in PROMPTS:
        say(f"\n{prompt}")
        for stage, result in results.items():
            say(f"  {STAGES[stage]}：{result.texts[prompt]!r}")
    likely = torch.cat([r.next_probs.topk(6).indices for r in results.values()]).tolist()
    tokens = {i: speakers["sft"].tokenizer.decode([i]) or "结束" for i in likely}
    finish(draw(results, tokens, options), sentences(results), options, "try_sft")


if __name__ == "__main__":
    run_script(main)
