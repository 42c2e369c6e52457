"""练之前与之后各量一遍：合格率，对词典的真回答的损失，离原来的模型有多远。

log_probabilities   每个回答的对数概率
Exam                一份考卷：问没见过的成语，量合格率、损失与 KL
TellProgress        训练途中，把 trl 的记录写成一行中文
still_a_model       练坏了，说一声
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from config import UserError
from dataset import IGNORE
from examples.align.questions import Question, is_real, rules
from examples.common import write_answers
from settings.say import say
from tokenizer import Tokenizer

BATCH = 32  # 一次算几个回答


@torch.inference_mode()
def log_probabilities(
    model: PreTrainedModel, questions: list[Question], answers: list[str]
) -> tuple[Tensor, Tensor]:
    """每个回答（连同它的 <|im_end|>）的对数概率。

    Args:
        questions: N 个问题。
        answers: N 个回答。
    Returns:
        对数概率之和 (N,)，单位奈特；词元数 (N,)。
    """
    tokenizer, model = Tokenizer(), model.eval()
    sums, counts = [], []
    for first in range(0, len(questions), BATCH):
        rows, targets = [], []
        for q, answer in zip(questions[first:][:BATCH], answers[first:][:BATCH], strict=True):
            prompt = tokenizer.question_ids(q.text)
            reply = [*tokenizer.encode(answer), tokenizer.eos_id]
            rows.append(torch.tensor(prompt + reply))
            targets.append(torch.tensor([IGNORE] * (len(prompt) - 1) + reply + [IGNORE]))
        ids = pad_sequence(rows, batch_first=True)  # (B, T)，补在右边：因果，不影响前面的
        wanted = pad_sequence(targets, batch_first=True, padding_value=IGNORE)
        logits = model(input_ids=ids).logits  # (B, T, V)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), wanted, ignore_index=IGNORE, reduction="none"
        )
        sums.append(-losses.sum(1))
        counts.append((wanted != IGNORE).sum(1))
    return torch.cat(sums), torch.cat(counts)


@dataclass
class Exam:
    """一份考卷：每个问题抽签回答一次，题目与随机数每次都一样。

    Args:
        questions: 没见过的成语的问题。
        reference: 练之前的模型，与它比相差多少。
        seed: 抽签的随机种子。
    """

    questions: list[Question]
    reference: PreTrainedModel
    seed: int

    def take(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """考一遍，打印成绩，返回各题的回答。"""
        set_seed(self.seed)
        prompts = [q.messages for q in self.questions]
        answers = list(write_answers(model, tokenizer, prompts, temperature=1.0))
        kept = [rules(q.kind, q.word, a) for q, a in zip(self.questions, answers, strict=True)]
        passed = torch.tensor([float(all(k.values())) for k in kept])
        scores = torch.tensor([sum(k.values()) / len(k) for k in kept])
        broken = Counter(rule for k in kept for rule, held in k.items() if not held)
        say(
            f"  {len(answers)} 个回答（温度 1）：平均分 {with_error(scores)}，"
            f"合格 {with_error(passed)}，其中"
            + "，".join(f"{kind} {rate:.0%}" for kind, rate in self._by_kind(passed).items())
            + "\n  没守的规矩："
            + "，".join(f"{rule} {n}" for rule, n in broken.most_common())
        )
        self._compare(model, answers)
        return answers

    def _by_kind(self, values: Tensor) -> dict[str, Tensor]:
        """每一类问题的平均。"""
        kinds = [q.kind for q in self.questions]
        return {
            kind: values[torch.tensor([k == kind for k in kinds])].mean()
            for kind in dict.fromkeys(kinds)
        }

    def _compare(self, model: PreTrainedModel, answers: list[str]) -> None:
        """走捷径的迹象：真回答的损失涨了没有，离原来多远，是不是总答同样的几句。"""
        real, n_tokens = log_probabilities(
            model, self.questions, [q.answer for q in self.questions]
        )
        now, _ = log_probabilities(model, self.questions, answers)
        before, _ = log_probabilities(self.reference, self.questions, answers)
        say(
            f"  词典的真回答：每词元 {-real.sum() / n_tokens.sum():.3f} 奈特；"
            f"与原来的模型相差（KL）每个回答 {(now - before).mean():.2f} 奈特；"
            f"不同的回答占 {len(set(answers)) / len(answers):.0%}，"
            f"平均 {sum(map(len, answers)) / len(answers):.1f} 个字；"
            f"找成语答的真有 {sum(map(is_real, self.questions, answers))} 个"
        )


def with_error(values: Tensor) -> str:
    """平均值 ± 标准误，写成百分数。"""
    return f"{values.mean():.1%} ± {values.std() / len(values) ** 0.5:.1%}"


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """留一份练之前的模型，不再改动。"""
    return deepcopy(model).eval().requires_grad_(False)


class TellProgress(TrainerCallback):
    """把 trl 的记录写成一行中文。

    Args:
        names: {记录里的名字: 中文}。
    """

    def __init__(self, names: dict[str, str]):
        self.names = names

    def on_log(self, args, state, control, logs=None, **_) -> None:
        """trl 每隔 logging_steps 步叫它一次。"""
        values = [f"{name} {float(logs[k]):.3f}" for k, name in self.names.items() if k in logs]
        if values and "train_runtime" not in logs:  # 最后还有一份总的
            say(f"第 {state.global_step} / {state.max_steps} 步 · " + "，".join(values))


def tell_progress(trainer: Trainer, names: dict[str, str]) -> Trainer:
    """让 trl 的训练器用 `TellProgress` 报告，代替它自己的那一大串。"""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TellProgress(names))
    return trainer


@contextmanager
def still_a_model(lr: float) -> Iterator[None]:
    """在其中训练与考试。Raises UserError：练坏了，打分里有 NaN，抽不了签。"""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(f"练坏了：打分里有 NaN 或无穷大；请把 --lr {lr} 调小") from error


def trl_settings(target: Path, lr: float, seed: int, n_steps: int) -> dict:
    """两个 trl 的训练器都要的设置：在 CPU 上，fp32，不存中间的，不联网，不向别处报告。

    升温的第一步学习率是 0：一共没有几步的，不升温。
    """
    return dict(
        output_dir=str(target), learning_rate=lr, seed=seed, lr_scheduler_type="linear",
        warmup_steps=min(3, n_steps // 10), max_grad_norm=1.0,
        use_cpu=True, bf16=False, activation_checkpointing=False, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_steps=5, logging_first_step=True,
    )  # fmt: skip
