"""DPO：给它看成对的回答，一个好、一个差，让它更愿意写好的那个（arXiv 2305.18290）。

    python -m tools.export out/tiny/sft.pt out/tiny/hf            带出去
    python -m examples.align.dpo out/tiny/hf out/dpo/hf           半小时
    python -m tools.import_hf out/dpo/hf out/dpo/sft.pt           带回来
    python sft_chat.py --checkpoint out/dpo/sft.pt

好的是词典的回答，差的是模型自己抽签写的、不合格的：问的都是训练过的成语。损失是
-ln σ(β·(好的涨了多少 - 差的涨了多少))，「涨」是比练之前的模型，对数概率多了多少；
只看差距的话，两个一起跌也行，所以再加上好的回答的负对数概率，就是微调的损失。
成绩在没见过的成语上量：有多少对更偏向好的，抽签的回答有多少合格。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}examples{os.sep}")[0]

from settings.script import run_script

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config import UserError, option
from examples.align.measure import (
    Exam,
    frozen_copy,
    log_probabilities,
    still_a_model,
    tell_progress,
    trl_settings,
)
from examples.align.questions import Question, ask, score, training_entries
from examples.common import (
    Folders,
    check_installed,
    load_folder,
    read_arguments,
    save_folder,
    write_answers,
)
from settings.say import say
from tools.lab.check_answers import unseen_entries


@dataclass
class Options(Folders):
    """命令行参数。"""

    may_be_zero = ("seed", "sft_weight")

    n_train: int = option(1500, "问多少个训练过的成语；答得不合格的才用", "个")
    n_test: int = option(300, "用多少个没见过的成语来考", "个")
    lr: float = option(5e-4, "AdamW 的最高学习率")
    beta: float = option(0.1, "离原来的模型多远算远：越大越不敢动")
    sft_weight: float = option(1.0, "微调的损失占多大的分量", "倍")
    batch_size: int = option(16, "每步几对", "对")
    epochs: int = option(1, "把这些对读几遍", "遍")
    seed: int = option(42, "随机种子")
    overwrite: bool = option(False, "结果的文件夹里已有一个模型时，换掉它")


@dataclass
class Pair:
    """一个问题，好的与差的回答。"""

    question: Question
    chosen: str
    rejected: str


def main() -> None:
    """造出一对对回答，考一次，练，再考一次。"""
    # ---------- 1. 模型与一对对回答 ----------
    source, target, options = read_arguments(Options, "examples.align.dpo")
    check_installed("align", "datasets", "trl")
    model, tokenizer, noted = load_folder(source)
    reference = frozen_copy(model)
    torch.manual_seed(options.seed)
    practice = ask(training_entries(options.n_train, noted.val_fraction, options.seed))
    known = make_pairs(model, tokenizer, practice)
    questions = ask(unseen_entries(options.n_test, noted.val_fraction))
    unseen = make_pairs(model, tokenizer, questions)
    if not known or not unseen:
        raise UserError("抽签的回答全都合格，没有差的可比；请加大 --n_train 与 --n_test")
    say(f"{len(known)} 对用来练，{len(unseen)} 对没见过的成语用来考，例如：")
    for pair in known[:3]:
        say(f"  问：{pair.question.text}\n    好：{pair.chosen}\n    差：{pair.rejected}")
    exam = Exam(questions, reference, options.seed)

    def check() -> None:
        """没见过的成语：更偏向哪一个，抽签写得怎样。"""
        tell_preference(model, reference, unseen)
        exam.take(model, tokenizer)

    say("练之前：")
    check()

    # ---------- 2. 训练，再考一次，保存 ----------
    with still_a_model(options.lr):
        make_trainer(model, reference, tokenizer, known, options, target).train()
        say("练之后：")
        check()
    save_folder(model, tokenizer, target)


def make_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> list[Pair]:
    """好的是词典的回答，差的是模型自己抽签写的；好的须合格，差的须不合格，否则不成一对。"""
    written = write_answers(model, tokenizer, [q.messages for q in questions], temperature=1.0)
    return [
        Pair(q, q.answer, text)
        for q, text in zip(questions, written, strict=True)
        if score(q.kind, q.word, q.answer) == 1 and score(q.kind, q.word, text) < 1
    ]


def tell_preference(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> None:
    """有多少对更偏向好的那个：照模型自己的对数概率，以及与练之前相比谁涨得多。"""
    questions = [pair.question for pair in pairs]
    gaps = []
    for judge in (model, reference):
        good, _ = log_probabilities(judge, questions, [pair.chosen for pair in pairs])
        bad, _ = log_probabilities(judge, questions, [pair.rejected for pair in pairs])
        gaps.append(good - bad)
    now, before = gaps
    say(
        f"  好的概率更大的占 {(now > 0).float().mean():.1%}；"
        f"与练之前相比，好的涨得更多的占 {(now - before > 0).float().mean():.1%}，"
        f"平均多涨 {(now - before).mean():.2f} 奈特"
    )


def make_trainer(model, reference, tokenizer, pairs: list[Pair], options: Options, target):
    """交给 trl 的 DPOTrainer；它就地改动 model。"""
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    n_steps = options.epochs * math.ceil(len(pairs) / options.batch_size)
    rows = [
        {
            "prompt": pair.question.messages,
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    ]
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(
            **trl_settings(target, options.lr, options.seed, n_steps), beta=options.beta,
            loss_type=["sigmoid", "sft"], loss_weights=[1.0, options.sft_weight],
            num_train_epochs=options.epochs, per_device_train_batch_size=options.batch_size,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    return tell_progress(trainer, {"loss": "损失", "rewards/accuracies": "偏向好的"})


if __name__ == "__main__":
    run_script(main)
