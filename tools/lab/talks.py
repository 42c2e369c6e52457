"""留出的对话：从检查点自己的词元文件里，或者一个文件里，读成一轮一轮的。

held_out, in_file   两个来处
choose              从中抽几段
before              一轮之前的全部，轮到助手开口
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from config import UserError
from corpus.conversations import read_conversations
from corpus.log import ReadLog
from corpus.token_file import tokenize_corpus
from generate import Speaker
from settings.places import outside
from settings.say import say
from tokenizer import Tokenizer


class Turn(NamedTuple):
    """一轮发言。"""

    role: str
    text: str
    ids: list[int]


Talk = list[Turn]


def held_out(speaker: Speaker, data_dir: str, source: str | None = None) -> Iterator[Talk]:
    """它微调时留出的对话：从词元文件里读回来。

    Args:
        source: 它微调用的对话在哪里；None：照检查点里记着的。
    Raises:
        UserError: 检查点里记着的在项目与现在的目录之外：不照办。
    """
    tokenizer, config = speaker.tokenizer, speaker.config
    if source is None and outside(config.sft_data):
        where = shlex.quote(config.sft_data)
        raise UserError(
            f"检查点里记着的对话 {where} 在项目与现在的目录之外，没有读；"
            f"若确实是你的数据，请写明 --sft_data {where}"
        )
    config = replace(config, data_dir=data_dir, sft_data=source or config.sft_data)
    with redirect_stdout(sys.stderr):
        data = tokenize_corpus(config.sft_data, "sft", tokenizer, config)
    names = {number: role for role, number in tokenizer.role_ids.items()}
    tokens, starts = data.tokens["val"], data.starts["val"]
    for start, end in pairwise(starts):
        ids = tokens[start:end]
        begins = [*np.flatnonzero(ids == tokenizer.bos_id).tolist(), len(ids)]
        turns = [ids[a:b].tolist() for a, b in pairwise(begins)]
        yield [Turn(names[t[1]], tokenizer.decode(t[2:-1]), t[2:-1]) for t in turns]


def in_file(tokenizer: Tokenizer, path: str) -> Iterator[Talk]:
    """一个文件里的全部对话；不能用的说出来。"""
    log = ReadLog(path)
    for record in read_conversations(path, log):
        yield [Turn(role, text, tokenizer.encode(text)) for role, text in record.content]
    if log.refused:
        say(f"（{path} 里有 {log.refused.total()} 段不能用）")


def choose(talks: Sequence[Talk], n: int, fewest: int, seed: int) -> list[Talk]:
    """先有人问、后有助手答的，从中抽 n 段。Raises UserError：不到 fewest 段。"""
    spoken = [[turn.role for turn in talk if turn.role != "system"] for talk in talks]
    good = [t for t, roles in zip(talks, spoken, strict=True) if roles[:2] == ["user", "assistant"]]
    if len(good) < fewest:
        raise UserError(f"先问后答的对话只有 {len(good)} 段，至少要 {fewest} 段")
    chosen = np.random.default_rng(seed).permutation(len(good))[:n]
    return [good[i] for i in sorted(chosen)]


def first_answer(talk: Talk) -> int:
    """助手头一次开口，是第几轮（从 0 数）。"""
    return next(n for n, turn in enumerate(talk) if turn.role == "assistant")


def before(talk: Talk, n: int, speaker: Speaker) -> list[int]:
    """前 n 轮，以及助手发言的开头。"""
    tokenizer = speaker.tokenizer
    turns = [i for turn in talk[:n] for i in tokenizer.turn_ids(turn.role, turn.ids)]
    return turns + tokenizer.reply_prefix()
