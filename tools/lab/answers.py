"""回答得怎样：不用裁判，只用留出的对话量一量。

    python -m tools.lab.answers                        默认的检查点，它自己留出的对话
    python -m tools.lab.answers --data 留出的.jsonl    一个文件里的对话，整个都用

    多意外      真的回答，每个字多少奈特；头一轮、第二轮……各是多少
    认得出      真的回答混在九个答别的问题的中间，它给谁的概率最高；全凭瞎猜是 10%
    写得怎样    让它自己答：写得完，不反复，是中文，与提问说的是一件事；多轮的，再看第三轮

「认得出」有两种算法：每个词元的平均概率；或者再除以不看提问时的（提问让它变得更可能的，才算）：
前一种看回答顺不顺，后一种看它对不对题。都只看开头的 128 个词元。
每个数后面的 ± 是一个标准误差：换一批对话，多半还在这个范围里。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import Config, UserError, option
from engine.device import Device
from engine.speed import load_for_chat
from generate import CALM, Sampling, Speaker, is_looping
from settings.files import write_text
from settings.flags import read_options
from settings.resolve import default_checkpoint
from settings.say import say
from sft_chat import fit
from tools.lab.talks import Talk, before, choose, first_answer, held_out, in_file

OTHERS = 9  # 真的回答混在几个别的中间
HEAD = 128  # 认的时候，只看回答的开头这么多个词元：长短不同的，才好比
ROWS = 10  # 一次算几行
TURNS = 3  # 多轮的，问到第几轮
CHINESE = 0.6  # 汉字占到这么多，就算中文
WORD = re.compile(r"[A-Za-z]+|[^\W\d_]")  # 一个英文的词算一个，别的一个字算一个
A_WORD = re.compile(r"(?=([一-鿿]{2}))")  # 相邻的两个汉字
COMMON = 0.05  # 这么多的提问里都有的两个字（「什么」「如何」），说明不了什么


@dataclass
class Options:
    """命令行参数。"""

    checkpoint: str | None = option(None, "哪个检查点；默认是微调写下的那一个")
    data: str | None = option(None, "对话的文件，整个都用；默认是它微调时留出的那些")
    sft_data: str | None = option(None, "它微调用的对话在哪里；默认照检查点里记着的")
    data_dir: str = option("data", "词元文件放在哪里")
    n: int = option(150, "至多用多少段对话", "段")
    max: int = option(CALM["sft"]["max"], "自己答的，一次最多写多少", "词元")
    temp: float = option(CALM["sft"]["temp"], "自己答的，温度")
    penalty: float = option(CALM["sft"]["penalty"], "自己答的，重复惩罚")
    seed: int = option(1, "抽哪些对话、怎样混、怎样写，都由它决定")
    show: int = option(5, "印出前几个回答", "个")
    json: str | None = option(None, "结果与全部回答另写成 JSON，写在哪里")
    device: str = option("auto", "设备", choices=("auto", "cuda", "mps", "cpu"))

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        wrong = [f"--{n} 要是正数" for n in ("max", "seed") if getattr(self, n) < 1]
        if self.n <= OTHERS:
            wrong.append(f"--n 至少是 {OTHERS + 1}：真的回答要混在 {OTHERS} 个别的中间")
        return wrong or self.sampling(self.seed).problems()

    def sampling(self, seed: int) -> Sampling:
        """怎样写。"""
        return Sampling(temp=self.temp, penalty=self.penalty, max=self.max, seed=seed)


# ---------- 1. 真的回答有多意外 ----------


class Given(NamedTuple):
    """在 context 之后说出 answer。"""

    context: list[int]
    answer: list[int]  # 连同结束标记


@torch.inference_mode()
def surprise(speaker: Speaker, given: Sequence[Given]) -> list[float]:
    """各个回答的负对数概率之和（奈特）。装不进上下文的，只算装得下的部分。"""
    limit, found = speaker.config.max_len, [0.0] * len(given)
    order = sorted(range(len(given)), key=lambda i: len(given[i].context) + len(given[i].answer))
    for at in range(0, len(order), ROWS):  # 差不多长的一起算
        some = [given[i] for i in order[at : at + ROWS]]
        rows = [(context + answer)[:limit] for context, answer in some]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, line in zip(ids, rows, strict=True):
            row[: len(line)] = torch.tensor(line)
        hidden = speaker.model.hidden(ids.to(speaker.banned.device))
        for i, row, (context, _), states in zip(order[at:], rows, some, hidden, strict=False):
            scores = speaker.head(states[len(context) - 1 : len(row) - 1]).float()
            targets = torch.tensor(row[len(context) :], device=scores.device)
            found[i] = torch.nn.functional.cross_entropy(scores, targets, reduction="sum").item()
    return found


def per_character(
    speaker: Speaker, talks: list[Talk]
) -> tuple[dict[str, list[tuple[float, int]]], int]:
    """每个字多少奈特：({第几轮: [(奈特, 多少字), …]}，装不进上下文、没有算的有几轮)。

    一段对话只算一个样本：它的几轮不是互相独立的。"全部" 是各轮的合计。
    """
    where, given, too_long = [], [], 0
    for number, talk in enumerate(talks):
        answers = [n for n, turn in enumerate(talk) if turn.role == "assistant" and turn.text]
        for nth, n in enumerate(answers, start=1):
            one = Given(before(talk, n, speaker), [*talk[n].ids, speaker.tokenizer.eos_id])
            if len(one.context) + len(one.answer) <= speaker.config.max_len:
                where.append((number, nth, len(talk[n].text)))
                given.append(one)
            else:
                too_long += 1
    found: dict = {"全部": {}}
    for (number, nth, n), nats in zip(where, surprise(speaker, given), strict=True):
        for name in ("全部", f"第 {nth} 轮" if nth < 4 else "第 4 轮起"):
            sums = found.setdefault(name, {}).setdefault(number, [0.0, 0])
            sums[0] += nats
            sums[1] += n
    return {k: [tuple(v) for v in sums.values()] for k, sums in sorted(found.items())}, too_long


# ---------- 2. 认不认得出 ----------


def ranks(speaker: Speaker, talks: list[Talk], seed: int) -> dict[str, list[int]]:
    """每一问，真的回答排在第几（1 是最前）：{算法: [名次, …]}。"""
    rng, eos = np.random.default_rng(seed), speaker.tokenizer.eos_id
    head = min(HEAD, speaker.config.max_len // 2)
    room = speaker.config.max_len - head
    first = [first_answer(talk) for talk in talks]
    answers = [[*talk[n].ids, eos][:head] for talk, n in zip(talks, first, strict=True)]
    alone = surprise(speaker, [Given(speaker.tokenizer.reply_prefix(), a) for a in answers])
    mixed = []
    for i in range(len(talks)):
        others = rng.choice(len(talks) - 1, OTHERS, replace=False)
        mixed.append([i, *(int(j) + (j >= i) for j in others)])
    contexts = [before(talk, n, speaker)[-room:] for talk, n in zip(talks, first, strict=True)]
    given = [Given(contexts[i], answers[j]) for i, row in enumerate(mixed) for j in row]
    nats = np.array(surprise(speaker, given)).reshape(len(talks), OTHERS + 1)
    lengths = np.array([[len(answers[j]) for j in row] for row in mixed])
    gained = np.array([[alone[j] for j in row] for row in mixed]) - nats
    scores = {"平均概率": -nats / lengths, "提问添的": gained / lengths}
    return {name: (1 + (s[:, 1:] >= s[:, :1]).sum(1)).tolist() for name, s in scores.items()}


# ---------- 3. 自己答 ----------


@dataclass
class Reply:
    """自己答的一次。"""

    question: str
    text: str
    ended: bool  # 写完了，不是写满了
    loops: bool
    chinese: bool = field(init=False)

    def __post_init__(self):
        words = WORD.findall(self.text)
        han = sum("一" <= word <= "鿿" for word in words)
        self.chinese = bool(words) and han >= CHINESE * len(words)


def reply(speaker: Speaker, ids: list[int], question: str, sampling: Sampling) -> Reply:
    """在 ids 之后写一个回答，照聊天时那样：反复了就停。"""
    new: list[int] = []
    for choice in speaker.choices(ids, sampling):
        if choice.token == speaker.tokenizer.eos_id:
            return Reply(question, speaker.tokenizer.decode(new), True, False)
        new.append(choice.token)
        if is_looping(new, speaker.tokenizer):
            return Reply(question, speaker.tokenizer.decode(new), False, True)
    return Reply(question, speaker.tokenizer.decode(new), False, False)


def replies(speaker: Speaker, talks: list[Talk], options: Options) -> list[Reply]:
    """每段对话的头一问，各答一次；太长的提问不答。"""
    found = []
    for number, talk in enumerate(talks):
        n = first_answer(talk)
        ids = before(talk, n, speaker)
        if len(ids) <= speaker.config.max_len * 3 // 4:
            sampling = options.sampling(options.seed + number)
            found.append(reply(speaker, ids, talk[n - 1].text, sampling))
    return found


def third_replies(speaker: Speaker, talks: list[Talk], options: Options) -> tuple[list[Reply], int]:
    """多轮的：照原来的三问问下去，前两次答的是它自己的；与聊天时一样，前文太长就忘掉早的。

    Returns:
        (各段的第三次回答，提问是三问合起来；有一问太长、没有问的几段)
    """
    tokenizer, found, too_long = speaker.tokenizer, [], 0
    for number, talk in enumerate(talks):
        asked = [turn for turn in talk if turn.role == "user"][:TURNS]
        if len(asked) < TURNS:
            continue
        question = "".join(turn.text for turn in asked)
        begin = talk[: talk.index(asked[0])]
        system = [i for turn in begin for i in tokenizer.turn_ids(turn.role, turn.ids)]
        turns: list[list[int]] = []
        try:
            for turn in asked:
                kept, ids = fit(speaker, turns, tokenizer.turn_ids("user", turn.ids), system)
                one = reply(speaker, ids, question, options.sampling(options.seed + number))
                if one.text:  # 一个字也没答的提问不留着
                    turns = [*kept, tokenizer.turn_ids("assistant", tokenizer.encode(one.text))]
        except UserError:
            too_long += 1
        else:
            found.append(one)
    return found, too_long


def on_the_subject(written: list[Reply]) -> tuple[list[bool], list[bool]]:
    """回答里有没有提问里的词（相邻的两个汉字，到处都有的除外）；以及配上下一个提问，有没有。"""
    asked = [set(A_WORD.findall(r.question)) for r in written]
    often = Counter(word for words in asked for word in words)
    common = {word for word, n in often.items() if n > max(1, COMMON * len(asked))}
    said = [set(A_WORD.findall(r.text)) for r in written]
    own = [bool((a - common) & s) for a, s in zip(asked, said, strict=True)]
    other = [bool((a - common) & s) for a, s in zip(asked[1:] + asked[:1], said, strict=True)]
    return own, other


# ---------- 4. 说 ----------


def ratio(pairs: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """总和之比，与它的标准误差；只有一个样本的，看不出误差，是 None。"""
    x, y = np.array(pairs, float).T
    r, n = x.sum() / y.sum(), len(x)
    if n == 1:
        return float(r), None
    return float(r), math.sqrt(((x - r * y) ** 2).sum() * n / (n - 1)) / float(y.sum())


def plus_minus(value: float, error: float | None, form: str = ".3f") -> str:
    """写成「4.991 ± 0.054」；没有误差的，只写数。"""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def share(holds: Sequence[bool]) -> tuple[float, float]:
    """占几成，与它的标准误差（全对全错时也不是零：Agresti–Coull）。"""
    n = len(holds)
    p = (sum(holds) + 2) / (n + 4)
    return sum(holds) / n, math.sqrt(p * (1 - p) / (n + 4))


def measure(speaker: Speaker, talks: list[Talk], options: Options) -> dict:
    """全部的数：{名字: (值, 标准误差)}，写出的回答，装不进上下文、没有量的有几个。"""
    by_turn, too_long = per_character(speaker, talks)
    found = {f"多意外（{k}）": ratio(v) for k, v in by_turn.items() if v}
    for name, places in ranks(speaker, talks, options.seed).items():
        found[f"认得出（{name}）"] = share([place == 1 for place in places])
    written = replies(speaker, talks, options)
    third, not_asked = third_replies(speaker, talks, options)
    for which, some in (("", written), (f"，第 {TURNS} 轮（{len(third)} 段）", third)):
        if some:
            own, other = on_the_subject(some)
            found |= {
                f"写得完{which}": share([r.ended for r in some]),
                f"不反复{which}": share([not r.loops for r in some]),
                f"是中文{which}": share([r.chinese for r in some]),
                f"与提问有共同的词{which}": share(own),
            }
            if len(some) > 1:  # 只有一个的，没有别的提问可配
                found[f"配错了提问，也有共同的词{which}"] = share(other)
    left_out = {
        "轮回答的多意外": too_long,
        "个提问的回答": len(talks) - len(written),
        f"段对话的第 {TURNS} 轮": not_asked,
    }
    return {"numbers": found, "replies": written + third, "left_out": left_out}


def sentences(found: dict) -> Iterator[str]:
    """量到的，一行一个数；没有量的，说有几个。"""
    for name, (value, error) in found["numbers"].items():
        if name.startswith("多意外"):
            yield f"  {name}：每个字 {plus_minus(value, error)} 奈特"
        else:
            yield f"  {name}：{plus_minus(value, error, '.1%')}"
    if some := "，".join(f"{n} {what}" for what, n in found["left_out"].items() if n):
        yield f"  （装不进上下文，没有量：{some}）"


def main(argv: list[str] | None = None) -> None:
    """读检查点与对话，量，说。"""
    usage = "用法：python -m tools.lab.answers [--参数 值 …]"
    options = read_options(Options, sys.argv[1:] if argv is None else argv, usage)
    path = Path(options.checkpoint or default_checkpoint("sft"))
    speaker = load_for_chat(path, Device(Config(device=options.device, compile=False)))
    source = (
        in_file(speaker.tokenizer, options.data)
        if options.data
        else held_out(speaker, options.data_dir, options.sft_data)
    )
    talks = choose(list(source), options.n, OTHERS + 1, options.seed)
    say(f"{path}，{len(talks)} 段对话：")
    found = measure(speaker, talks, options)
    for sentence in sentences(found):
        say(sentence)
    for one in found["replies"][: options.show]:
        say(f"问：{one.question}\n答：{one.text}\n")
    if options.json:
        report = {"checkpoint": str(path), "conversations": len(talks)} | found
        report["replies"] = [vars(r) for r in found["replies"]]
        write_text(Path(options.json), json.dumps(report, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    run_script(main)
