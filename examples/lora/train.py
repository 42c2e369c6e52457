"""LoRA：只练百分之几的参数，教会一个练好的模型自己的问答（arXiv 2106.09685）。

    python -m tools.export out/tiny/sft.pt out/tiny/hf                       带出去
    python -m examples.lora.train out/tiny/hf out/lora/hf                    教它当茶馆的伙计
    python -m examples.lora.train out/tiny/hf out/lora/hf --data my.jsonl    或者教它自己的问答
    python -m tools.import_hf out/lora/hf out/lora/sft.pt                    带回来
    python sft_chat.py --checkpoint out/lora/sft.pt

原来的矩阵 W 不动，旁边加一条窄路：W 变成 W + B·A，A 是 (r, 输入)，B 是 (输出, r)，只练 A 与 B；
B 从零开始，所以一开始什么也没有变。练完把 B·A 加进 W，模型又是原来的样子，不多一个参数。
数据、编号、要猜的目标都与 sft_train.py 相同；窄路由 peft 来加。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}examples{os.sep}")[0]

from settings.script import run_script

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import PreTrainedModel

from config import Config, UserError, option
from corpus.conversations import read_conversations
from corpus.log import ReadLog
from corpus.split import choose, hash_of
from dataset import IGNORE, SFTBatches, rows_of_step
from examples.common import (
    Folders,
    Messages,
    answer_loss,
    check_installed,
    held_out_loss,
    load_folder,
    read_arguments,
    save_folder,
    sft_batches,
    write_answers,
)
from optimizer import learning_rate
from settings.say import say
from tokenizer import Tokenizer

SHOWN = ["你是谁？", "画蛇添足是什么意思？"]  # 本来会答的，练之前与之后各问一遍
ASKED = 200  # 自己的问答，每次检验至多各问多少段


@dataclass
class Options(Folders):
    """命令行参数。"""

    data: str = option(
        str(Path(__file__).with_name("teahouse.jsonl")), "自己的问答，sft_train.py 认得的文件"
    )
    rank: int = option(16, "窄路有多窄：A 的行数 r")
    lr: float = option(1e-2, "AdamW 的最高学习率")
    epochs: int = option(50, "把自己的问答读几遍", "遍")
    rows: int = option(4, "每步读几行自己的问答", "行")
    replay: bool = option(True, "每步陪着读一行词典的问答，免得忘掉")
    val_fraction: float = option(0.2, "自己的问答里，留出多少不练，只用来检验")
    eval_tokens: int = option(16384, "每次检验最多用多少词元", "词元")
    data_dir: str = option("data", "词元文件放在哪里")
    seed: int = option(42, "随机种子")
    overwrite: bool = option(False, "结果的文件夹里已有一个模型时，换掉它")

    def problems(self) -> list[str]:
        """同 `Folders.problems`，加上 data。"""
        mine = "--data 要的是自己的问答；例如 --data my.jsonl；内置的词典本来就陪着读（--replay）"
        return super().problems() + ([mine] if self.data == "builtin" else [])


def main() -> None:
    """读模型与问答，加上窄路，训练，合并；之前与之后各检验一遍。"""
    # ---------- 1. 模型，自己的问答，还有不该忘掉的词典 ----------
    source, target, options = read_arguments(Options, "examples.lora.train")
    check_installed("lora", "peft")
    model, tokenizer, noted = load_folder(source)
    seq_len = min(256, noted.max_len)
    common = Config(seq_len=seq_len, data_dir=options.data_dir, val_fraction=noted.val_fraction)
    mine = replace(common, val_fraction=options.val_fraction)
    own = sft_batches(options.data, mine, options.seed)
    tell_what_is_left_out(own, seq_len)
    dictionary = sft_batches("builtin", common, options.seed)  # 留出的成语，与它训练时的相同
    learned, held_out = questions_and_answers(options.data, options.val_fraction, seq_len)
    max_tokens = max([96, *(len(Tokenizer().encode(a)) + 1 for a in learned[1] + held_out[1])])

    def answers(asked: list[Messages]) -> Iterator[str]:
        """最可能的回答，容得下自己的问答里最长的。"""
        return write_answers(model, tokenizer, asked, max_tokens=max_tokens)

    def check() -> None:
        """自己的问答学到了多少，举一反三了多少，词典忘掉了多少。"""
        exact = [
            sum(map(str.__eq__, answers(asked), expected))
            for asked, expected in (learned, held_out)
        ]
        losses = [
            held_out_loss(model, part["val"], options.eval_tokens) for part in (own, dictionary)
        ]
        say(
            f"  自己的问答：练的 {len(learned[0])} 个问法，答得一字不差的 {exact[0]} 个；"
            f"留出的 {len(held_out[0])} 个，{exact[1]} 个，损失 {losses[0]:.3f}\n"
            f"  词典：留出的成语，损失 {losses[1]:.3f}"
        )
        shown = [[{"role": "user", "content": text}] for text in SHOWN]
        shown += learned[0][:3] + held_out[0][:3]
        for prompt, reply in zip(shown, answers(shown), strict=True):
            say(f"    问：{prompt[-1]['content']}  答：{reply}")

    say("练之前：")
    check()

    # ---------- 2. 加上窄路，只练它 ----------
    torch.manual_seed(options.seed)
    adapted = add_lora(model, options.rank)
    trained, total = adapted.get_nb_trainable_parameters()
    say(f"加上 r = {options.rank} 的窄路：练 {trained:,} 个参数，占全部的 {trained / total:.1%}")
    train(adapted, own["train"], dictionary["train"] if options.replay else None, options)

    # ---------- 3. 合并，再看一遍，保存 ----------
    model = deepcopy(adapted).merge_and_unload()  # 合并了就没有窄路，它还要另存
    say("练之后：")
    check()
    save_folder(model, tokenizer, target, adapter=adapted)


def add_lora(model: PreTrainedModel, rank: int):
    """在每个线性层旁边加一条窄路；返回 peft 的模型，只有窄路会收到梯度。

    alpha = 2r：窄路的输出再乘 alpha / r = 2，换一个 r 不必另找学习率。
    """
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )


def train(model, own: SFTBatches, old: SFTBatches | None, options: Options) -> None:
    """一步一步地练；每步几行自己的问答，再加一行词典的（old 为 None 就不加）。

    Raises:
        UserError: 损失或梯度不再是有限的数；参数还没有被它改坏。
    """
    n_steps = math.ceil(options.epochs * own.n_rows / options.rows)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, n_steps, warmup=0.1, decay=0.9)
    )
    model.train()
    bar = tqdm(range(n_steps), unit="步")
    for step in bar:
        parts = [own.get(rows_of_step(step, options.rows, own.n_rows, options.seed))]
        if old is not None:
            parts.append(old.get(rows_of_step(step, 1, old.n_rows, options.seed)))
        n_targets = sum(int((batch.targets != IGNORE).sum()) for batch in parts)
        loss = sum(answer_loss(model, batch) for batch in parts) / n_targets
        loss.backward()
        norm = clip_grad_norm_(weights, 1.0)
        if not (loss + norm).isfinite():
            bar.close()
            raise UserError(
                f"第 {step + 1} 步的损失是 {loss.item()}，梯度的范数是 {norm.item()}，练不下去了；"
                f"请把 --lr {options.lr} 调小"
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"损失 {loss.item():.3f}")


Asked = tuple[list[Messages], list[str]]  # 各段对话最后一答之前的各轮，与那一答


def questions_and_answers(source: str, fraction: float, seq_len: int) -> tuple[Asked, Asked]:
    """自己的问答里，练的与留出的；划分与 `tokenize_corpus` 的相同。

    每边至多 ASKED 段，均匀地取；一行放不下的不要：练的时候它没有末尾。
    """
    tokenizer = Tokenizer()
    sides = [], []
    records = list(read_conversations(source, ReadLog(source)))
    texts = [
        (r.key, r.finer, "\0".join(text for turn in r.content for text in turn)) for r in records
    ]
    hashes = (np.array(list(map(hash_of, keys)), np.uint64) for keys in zip(*texts, strict=True))
    held_out = choose(*hashes, fraction)
    if held_out is None:  # 只有一段，留不出来
        held_out = [False] * len(records)
    for record, side in zip(records, held_out, strict=True):
        turns = record.content
        last = max(i for i, (role, _) in enumerate(turns) if role == "assistant")
        sides[int(side)].append(turns[: last + 1])
    chosen: tuple[Asked, Asked] = ([], []), ([], [])
    for side, (asked, expected) in zip(sides, chosen, strict=True):
        for turns in side[:: max(1, len(side) // ASKED)][:ASKED]:
            ids = [tokenizer.encode(text) for _, text in turns]
            if sum(len(tokenizer.turn_ids("user", i)) for i in ids) <= seq_len + 1:
                asked.append([{"role": role, "content": text} for role, text in turns[:-1]])
                expected.append(tokenizer.decode(ids[-1]))  # 大写变小写，与它写得出的一样
    return chosen


def tell_what_is_left_out(own: dict[str, SFTBatches], seq_len: int) -> None:
    """自己的问答里，有多少太长，没有用或没有用全。"""
    skipped, cut = (sum(getattr(b, n) for b in own.values()) for n in ("skipped", "cut"))
    if skipped:
        say(f"（{skipped} 段对话在 {seq_len} 个词元之内没有助手的话，不用）")
    if cut:
        say(f"（{cut} 段对话超过 {seq_len} 个词元，末尾截掉了）")


if __name__ == "__main__":
    run_script(main)
