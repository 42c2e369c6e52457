"""GRPO：同一个问题答几次，比平均好的多写，比平均差的少写（arXiv 2402.03300）。

    python -m tools.export out/tiny/sft.pt out/tiny/hf            带出去
    python -m examples.align.grpo out/tiny/hf out/grpo/hf         几分钟；也可以从 out/dpo/hf 起
    python -m tools.import_hf out/grpo/hf out/grpo/sft.pt         带回来
    python sft_chat.py --checkpoint out/grpo/sft.pt

没有标准答案，只有打分的规矩（questions.rules）：守了几成规矩就得几成分。
模型只在乎分数，规矩没有写到的它一概不管，所以还要看它是不是走了捷径：离原来的模型多远、
词典的真回答还猜得准不准、是不是总答同样的几句，都在没见过的成语上量。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}examples{os.sep}")[0]

from settings.script import run_script

from dataclasses import dataclass

from config import option
from examples.align.measure import Exam, frozen_copy, still_a_model, tell_progress, trl_settings
from examples.align.questions import Question, ask, score, training_entries
from examples.common import Folders, check_installed, load_folder, read_arguments, save_folder
from settings.say import say
from tokenizer import Tokenizer
from tools.lab.check_answers import unseen_entries


@dataclass
class Options(Folders):
    """命令行参数。"""

    may_be_zero = ("seed", "beta")

    steps: int = option(40, "练几步", "步")
    n_test: int = option(120, "用多少个没见过的成语来考", "个")
    prompts: int = option(4, "每步几个问题", "个")
    tries: int = option(8, "一个问题答几次", "次")
    lr: float = option(5e-4, "AdamW 的最高学习率")
    beta: float = option(0.02, "离原来的模型远了要扣多少分（KL 的系数）")
    max_tokens: int = option(64, "一个回答最多写多少", "词元")
    seed: int = option(42, "随机种子")
    overwrite: bool = option(False, "结果的文件夹里已有一个模型时，换掉它")

    def problems(self) -> list[str]:
        """同 `Folders.problems`，加上 tries。"""
        once = "--tries 至少是 2：同一个问题答几次，才比得出哪次好，得到的是 1"
        return super().problems() + ([once] if self.tries == 1 else [])


def main() -> None:
    """考一次，练，再考一次，把两次的回答并排印几个。"""
    # ---------- 1. 模型与考卷 ----------
    source, target, options = read_arguments(Options, "examples.align.grpo")
    check_installed("align", "datasets", "trl")
    model, tokenizer, noted = load_folder(source)
    unseen = ask(unseen_entries(options.n_test, noted.val_fraction))
    exam = Exam(unseen, frozen_copy(model), options.seed)
    say("练之前：")
    before = exam.take(model, tokenizer)

    # ---------- 2. 训练，再考一次，保存 ----------
    n_known = options.steps * options.prompts
    known = ask(training_entries(n_known, noted.val_fraction, options.seed))
    with still_a_model(options.lr):
        make_trainer(model, tokenizer, known, options, target).train()
        say("练之后：")
        after = exam.take(model, tokenizer)
    for question, old, new in list(zip(unseen, before, after, strict=True))[:9]:
        say(f"  问：{question.text}\n    练之前：{old}\n    练之后：{new}")
    save_folder(model, tokenizer, target)


def reward(completions, kind: list[str], word: list[str], **_) -> list[float]:
    """trl 问它要分数：每个回答一个；kind 与 word 来自数据里同名的列。"""
    return [
        score(k, w, completion[0]["content"])
        for completion, k, w in zip(completions, kind, word, strict=True)
    ]


def make_trainer(model, tokenizer, questions: list[Question], options: Options, target):
    """交给 trl 的 GRPOTrainer；它就地改动 model。"""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": q.messages, "kind": q.kind, "word": q.word} for q in questions]
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(
            **trl_settings(target, options.lr, options.seed, options.steps), beta=options.beta,
            max_steps=options.steps, num_generations=options.tries, temperature=1.0,
            per_device_train_batch_size=options.prompts * options.tries,
            max_completion_length=options.max_tokens,
            generation_kwargs={"suppress_tokens": Tokenizer().never_sampled()},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    return tell_progress(trainer, {"reward": "平均分", "kl": "KL（每词元）", "entropy": "熵"})


if __name__ == "__main__":
    run_script(main)
