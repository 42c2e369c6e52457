"""问什么，怎样打分：DPO 与 GRPO 共用。

    Question       一个问题：问法、种类、成语、词典的回答
    ask            一批词条 -> 一批问题
    training_entries / tools.lab.check_answers.unseen_entries   练的与没见过的成语
    rules          一个回答守了哪几条规矩
    score          守了几成

问法与「样子对」的规矩取自 tools.lab.check_answers；那里用最稳的写法，几乎总是对，已经没有可练的，
所以这里另加几条，而且按模型自己的概率抽签（温度 1）。词典自己的回答，每一类都有 97% 以上合格。
"""

import random
import re
from dataclasses import dataclass
from functools import cache

from config import UserError
from corpus import idioms
from corpus.log import ReadLog
from corpus.split import is_held_out
from examples.common import Messages
from tools.lab.check_answers import QUESTIONS

PAIRS = ("“”", "‘’", "《》", "（）")
LOOP = re.compile(r"(.{2,})\1\1|(.)\2\2")  # 两个字以上的一段连说三遍，或一个字连写三遍


@dataclass
class Question:
    """一个问题，与词典给它的回答。"""

    text: str
    kind: str  # "意思"、"出处" 或 "找成语"
    word: str
    answer: str

    @property
    def messages(self) -> Messages:
        """transformers 的写法。"""
        return [{"role": "user", "content": self.text}]


# ---------- 1. 问什么 ----------


@cache
def dictionary() -> list[dict[str, str]]:
    """整部词典。"""
    return list(idioms.read_entries(idioms.dictionary_file(), ReadLog("builtin")))


def training_entries(n: int, fraction: float, seed: int) -> list[dict[str, str]]:
    """随机的 n 个训练过的词条；与 unseen_entries 给出的没有重叠。

    Args:
        fraction: 训练时留出了多少，即导出时记下的 val_fraction。
    """
    seen = [e for e in dictionary() if not is_held_out(e["explanation"], fraction)]
    return random.Random(seed).sample(seen, min(n, len(seen)))


def ask(entries: list[dict[str, str]]) -> list[Question]:
    """每个词条问三类问题；词典没有写书名的，不问出处。Raises UserError：一个词条也没有。"""
    if not entries:
        raise UserError("词典里没有一个留出的成语可考：训练时的 --val_fraction 太小")
    asked = []
    for entry in entries:
        answers = {
            "意思": entry["explanation"],
            "出处": f"出自{entry['derivation']}" if "》" in entry["derivation"] else "",
            "找成语": f"{entry['word']}。",
        }
        asked += [
            Question(QUESTIONS[kind][0].format(**entry), kind, entry["word"], answer)
            for kind, answer in answers.items()
            if answer
        ]
    return asked


# ---------- 2. 怎样打分 ----------


def rules(kind: str, word: str, answer: str) -> dict[str, bool]:
    """一个回答守了哪几条规矩；没有写完的，末尾缺句号，自然不守。

    Args:
        kind: 问题的种类。
        word: 问的是哪个成语。
        answer: 模型的回答。
    """
    kept = {"样子对": re.fullmatch(QUESTIONS[kind][1], answer, re.S) is not None}
    if kind == "意思":
        kept["六到六十个字"] = 6 <= len(answer) <= 60
        kept["不用成语解释它自己"] = word not in answer
    if kind == "出处":
        quoted = "".join(re.findall(r"“([^“”]+)”", answer))
        characters = set(re.findall("[一-鿿]", word))  # “百尺竿头，更进一步”的逗号不算
        kept["引文里有成语的两个字"] = sum(c in quoted for c in characters) >= 2
        kept["有始有终"] = answer.endswith(("。", "”"))
    kept["括号引号成对"] = all(answer.count(a) == answer.count(b) for a, b in PAIRS)
    kept["不反复"] = LOOP.search(answer) is None
    return kept


def score(kind: str, word: str, answer: str) -> float:
    """守了几成规矩，0 到 1；全守了才算合格。"""
    kept = rules(kind, word, answer).values()
    return sum(kept) / len(kept)


def is_real(question: Question, answer: str) -> bool:
    """问的是找成语，答的是词典里真有的。不计分：看看没有奖励的事，练了以后变好还是变坏。"""
    return question.kind == "找成语" and answer.removesuffix("。") in words()


@cache
def words() -> set[str]:
    """词典里的全部成语。"""
    return {entry["word"] for entry in dictionary()}
