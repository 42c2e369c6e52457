"""出一份四选一的卷子：给一个成语，从四句释义里选出它的；交给 lm-eval 去考。

    python -m examples.evaluate.make_task out/evaluate

考的都是留出检验的成语：预训练与微调都没有见过。写出的目录里有：

    questions.jsonl        全部的题
    unshared.jsonl         其中释义与成语没有共同的字的：照抄题目里的字，答不对
    idiom_*.yaml           lm-eval 的任务：两种问法 × 两份题 × 题目对不对得上（对不上的作对照）
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}examples{os.sep}")[0]

from settings.script import run_script

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import yaml

from config import Config, UserError, option
from corpus import idioms
from corpus.log import ReadLog
from corpus.split import is_held_out
from settings.flags import read_options, word
from settings.say import say
from tokenizer import CONTROL_TOKENS, Tokenizer

N_CHOICES = 4
# 释义末尾的「同“某某”」说的是另一条成语，不是意思。
REFERENCE = r"(?:[亦也又]?[同见犹参作]言?“[^”]*”。?)+$"
OPENINGS = r"比喻|形容|原?指|后多?|用[以来]|表示"  # 许多释义都这样开头，不算用词相同
FORMS = {  # 名字: 问法，与训练时的样子相同
    "document": CONTROL_TOKENS[0] + "{}：",  # 预训练：一篇词条的开头
    "chat": idioms.MEANING[0],  # 微调：一句提问，套上模型自己的对话模板（--apply_chat_template）
}
USAGE = "用法：python -m examples.evaluate.make_task 目录 [--参数 值 …]"


@dataclass
class Options:
    """命令行参数。"""

    folder: str = word(
        "目录", "请先写题目放在哪个目录，例如：python -m examples.evaluate.make_task out/evaluate"
    )
    val_fraction: float = option(Config.val_fraction, "训练时留出的比例，须与检查点的相同")
    seed: int = option(0, "决定干扰项与次序")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        if 0 < self.val_fraction < 0.5:
            return []
        return [f"--val_fraction 必须在 0 与 0.5 之间，得到的是 {self.val_fraction}"]


@dataclass
class Question:
    """一道题：choices[answer] 是 word 的释义，其余是别的留出成语的；other 与哪一句都对不上。"""

    word: str
    choices: list[str]
    answer: int
    other: str

    @property
    def right(self) -> str:
        """对的那一句。"""
        return self.choices[self.answer]


def main() -> None:
    """选出能考的成语，出题，写进目录；不看题也能对多少，一并报告。"""
    options = read_options(Options, sys.argv[1:], USAGE)
    folder = Path(options.folder)
    entries, dropped = examinable(options.val_fraction)
    reasons = "；".join(f"{reason} {n}" for reason, n in dropped.items())
    say(f"能考的成语 {len(entries)} 个，去掉 {sum(dropped.values())} 个：{reasons}")
    questions = [ask(word, entries, options.seed) for word in entries]
    unshared = [q for q in questions if not shared(q.word, q.right)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("questions", questions), ("unshared", unshared)):
        write_questions(folder / f"{name}.jsonl", chosen)
        say(f"{name}.jsonl：{len(chosen)} 题；不用模型，{describe(controls(chosen))}")
    for task in tasks(folder):
        path = folder / f"{task['task']}.yaml"
        path.write_text(yaml.safe_dump(task, allow_unicode=True, sort_keys=False), "utf-8")
    say(f"写好 {folder}；怎样考，见 examples/evaluate/README.md")


# ---------- 1. 哪些成语能考 ----------


def examinable(fraction: float) -> tuple[dict[str, str], dict[str, int]]:
    """留出检验的成语里，能拿来考的。

    Args:
        fraction: 训练时留出的比例。
    Returns:
        ({成语: 释义}, {去掉的缘故: 个数})
    """
    entries = list(idioms.read_entries(idioms.dictionary_file(), ReadLog("builtin")))
    held_out = [e for e in entries if is_held_out(e["explanation"], fraction)]
    trained_on = "\n".join(
        "\n".join(e.values()) for e in entries if not is_held_out(e["explanation"], fraction)
    )
    tokenizer = Tokenizer()
    kept: dict[str, str] = {}
    dropped: dict[str, int] = {}
    for entry in held_out:
        word, meaning = entry["word"], re.sub(REFERENCE, "", entry["explanation"])
        reasons = {
            "训练的文字里出现过（多半是「同“某某”」）": word in trained_on,
            "释义在训练的文字里出现过": meaning.rstrip("。") in trained_on,
            "释义用另一个成语来说": not meaning or re.match(r"[亦也又]?[同见犹]|.*“", meaning),
            "释义引了成语里的两个字": pairs(word) & pairs(meaning),
            "有词表里没有的字": tokenizer.unk_id in tokenizer.encode(word + meaning),
            "释义与前面的一条相同": meaning in kept.values(),
        }
        if reason := next((name for name, holds in reasons.items() if holds), None):
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            kept[word] = meaning
    return kept, dropped


def pairs(text: str) -> set[str]:
    """相邻的两个汉字，所有的。"""
    return {text[i : i + 2] for i in range(len(text) - 1) if re.match("[一-鿿]{2}", text[i:])}


def shared(word: str, meaning: str) -> int:
    """成语与释义有几个共同的汉字。"""
    return len(set(re.findall("[一-鿿]", word)) & set(meaning))


# ---------- 2. 出题 ----------


def ask(word: str, entries: dict[str, str], seed: int) -> Question:
    """给一个成语配上三个干扰项：别的成语的释义，长短与对的最接近。

    与对的有相同用词的不用，它也许同样说得通。对的若与成语没有共同的字，干扰项也没有，而且取自同样的
    成语：这样的释义多是「比喻……」，混进别的样子的，不看题目也挑得出来。

    Args:
        word: 考的成语。
        entries: {成语: 释义}，干扰项取自其中。
        seed: 与成语一起决定选哪些、怎样排；同样的种子，题目总是一样。
    Raises:
        UserError: 找不到三个合适的干扰项。
    """
    rng, right = random.Random(f"{seed} {word}"), entries[word]
    literal = bool(shared(word, right))
    words_used = pairs(re.sub(OPENINGS, "|", right)) | pairs(word)
    wrong = [
        meaning
        for other, meaning in entries.items()
        if other != word
        and bool(shared(other, meaning)) == literal
        and (literal or not shared(word, meaning))
        and not words_used & pairs(re.sub(OPENINGS, "|", meaning))
    ]
    if len(wrong) < N_CHOICES - 1:
        raise UserError(f"{len(entries)} 个成语不够给「{word}」出题；请调大 --val_fraction")
    rng.shuffle(wrong)
    wrong.sort(key=lambda meaning: abs(len(meaning) - len(right)))
    choices = [right, *wrong[: N_CHOICES - 1]]
    rng.shuffle(choices)
    other = rng.choice([w for w, meaning in entries.items() if meaning not in choices])
    return Question(word, choices, choices.index(right), other)


def controls(questions: list[Question]) -> dict[str, float]:
    """不用模型的几种选法各能对多少；几个并列时，算作随便选一个。"""
    ways: dict[str, Callable[[str, str], float]] = {
        "总选最长的": lambda word, choice: len(choice),
        "总选最短的": lambda word, choice: -len(choice),
        "总选与成语共同的字最多的": shared,
    }

    def accuracy(score: Callable[[str, str], float]) -> float:
        right = 0.0
        for q in questions:
            scores = [score(q.word, choice) for choice in q.choices]
            best = [i for i, s in enumerate(scores) if s == max(scores)]
            right += (q.answer in best) / len(best)
        return right / len(questions)

    return {name: accuracy(score) for name, score in ways.items()}


def describe(accuracies: dict[str, float]) -> str:
    """几个正确率写成一句。"""
    return "，".join(f"{name} {p:.1%}" for name, p in accuracies.items())


# ---------- 3. 写成 lm-eval 认得的 ----------


def write_questions(path: Path, questions: list[Question]) -> None:
    """一行一题。"""
    lines = (json.dumps(asdict(q), ensure_ascii=False) + "\n" for q in questions)
    path.write_text("".join(lines), encoding="utf-8")


def tasks(folder: Path) -> Iterator[dict]:
    """八份任务。对照的那几份（_swapped）把题目换成别的成语，应当与乱猜一样。"""
    files = {"": "questions", "_unshared": "unshared"}
    fields = {"": "word", "_swapped": "other"}
    for (form, prompt), kind, swap in product(FORMS.items(), files, fields):
        path = (folder / f"{files[kind]}.jsonl").resolve()
        yield {
            "task": f"idiom_{form}{kind}{swap}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": prompt.format("{{" + fields[swap] + "}}"),
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",  # 默认的空格，训练的文字里没有
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in ("acc", "acc_norm")  # 后者先除以字数，再比
            ],
            "metadata": {"version": 1},
        }


if __name__ == "__main__":
    run_script(main)
