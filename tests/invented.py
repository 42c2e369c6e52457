"""编出来的小语料，和「准备好之后里面有什么」：几份讲数据的测试共用。

sentence / question / answer   编一句话、一问、一答：字都在词表里，编码再解码不变
prepare                        来源 -> 结局：词元文件，或一句报错；连同印出来的话
documents / conversations      词元文件 -> 里面的文档、对话
taught                         微调时真正要学的文字
"""

import contextlib
import io
import json
import random
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import Config, UserError
from corpus.token_file import TokenFile, tokenize_corpus
from dataset import IGNORE, SIDES, SFTBatches
from tokenizer import Tokenizer

TOKENIZER = Tokenizer()  # hypothesis 的测试也用它：一个例子一个例子地取夹具太慢
NOUNS = ["竹筏", "钟楼", "老魏", "麦田", "井台", "船坞", "石匠", "晚霞", "信差", "药铺", "蓑衣",
         "渡口"]  # fmt: skip
VERBS = ["修补", "听过", "望见", "捎来", "数着", "惦记", "绕过", "忘掉"]


# ---------- 1. 编 ----------


def sentence(noise: random.Random) -> str:
    """一句话，二十来个字，以句号结尾。"""
    a, b, c, d, e = (noise.choice(NOUNS) for _ in range(5))
    v, w = noise.choice(VERBS), noise.choice(VERBS)
    return f"{a}{b}{v}{c}，{d}{w}{e}。"


def documents_like(n: int, sentences: int = 4, seed: int = 0) -> list[str]:
    """n 篇各不相同的短文。"""
    noise = random.Random(seed)
    return [f"其{i}。" + "".join(sentence(noise) for _ in range(sentences)) for i in range(n)]


def question(i: int) -> str:
    return f"第{i}座{NOUNS[i % len(NOUNS)]}在什么地方？"


def answer(i: int) -> str:
    return f"在{NOUNS[i * 7 % len(NOUNS)]}北边{i}里，" + sentence(random.Random(i))


def turn(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


def dump(row, **options) -> str:
    return json.dumps(row, ensure_ascii=False, **options)


def jsonl(rows: Iterable) -> str:
    return "".join(dump(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes | Iterable) -> Path:
    """写一个文件：文字、字节，或一条条数据（写成 JSONL）。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        content = jsonl(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---------- 2. 准备 ----------


class Outcome(NamedTuple):
    """准备一份数据的结局。"""

    file: TokenFile | None  # None：没有成，error 里是那句话
    error: str
    out: str  # 印在屏幕上的

    @property
    def card(self) -> dict:
        assert self.file is not None, self.error
        return self.file.card


def prepare(source, stage: str = "pretrain", tokenizer: Tokenizer = TOKENIZER, data_dir=None,
            **settings) -> Outcome:  # fmt: skip
    """像训练开始时那样准备；每次都从头做起，不沿用上次的（除非给了 data_dir）。"""
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        if data_dir is None:
            data_dir = stack.enter_context(tempfile.TemporaryDirectory())
        config = Config(data_dir=str(data_dir), **settings)
        stack.enter_context(contextlib.redirect_stdout(said))
        try:
            file = tokenize_corpus(str(source), stage, tokenizer, config)
        except UserError as error:
            return Outcome(None, str(error), said.getvalue())
        # 目录一会儿就没了：先把数据读进内存。
        tokens = {side: np.array(file.tokens[side]) for side in SIDES}
        starts = {side: np.array(file.starts[side]) for side in SIDES}
    return Outcome(TokenFile(file.card, tokens, starts), "", said.getvalue())


def pieces(file: TokenFile, side: str) -> list[np.ndarray]:
    return np.split(file.tokens[side], file.starts[side][1:-1])


def documents(file: TokenFile, side: str | None = None) -> list[str]:
    """一边的（没有说哪一边，就是全部的）文档，解码成文字。"""
    sides = SIDES if side is None else [side]
    return [TOKENIZER.decode(piece.tolist()) for s in sides for piece in pieces(file, s)]


def conversations(file: TokenFile, side: str | None = None) -> list[list[tuple[str, str]]]:
    """一边的（或全部的）对话：[(角色, 正文), …]。"""
    roles = {number: role for role, number in TOKENIZER.role_ids.items()}
    found = []
    for s in SIDES if side is None else [side]:
        for piece in pieces(file, s):
            turns = np.split(piece, np.flatnonzero(piece == TOKENIZER.bos_id))[1:]
            assert all(ids[-1] == TOKENIZER.eos_id for ids in turns)
            found.append([(roles[int(ids[1])], TOKENIZER.decode(ids[2:].tolist()))
                          for ids in turns])  # fmt: skip
    return found


def taught(file: TokenFile) -> str:
    """微调时要学的全部文字，一段对话一行。"""
    lines = []
    for side in SIDES:
        longest = int(np.diff(file.starts[side]).max())
        batches = SFTBatches(file.tokens[side], file.starts[side], longest, TOKENIZER, seed=0)
        for targets in batches.get(range(batches.n_rows)).targets.numpy():
            lines.append(TOKENIZER.decode(targets[targets != IGNORE].tolist()))
    return "\n".join(lines)


def seen(text: str) -> str:
    """模型看到的样子：编码再解码。"""
    return TOKENIZER.decode(TOKENIZER.encode(text))


def squeezed(text: str) -> str:
    """去掉全部空白。"""
    return re.sub(r"\s+", "", text)


# ---------- 3. 几条总是成立的 ----------


def check_accounts(card: dict) -> None:
    """每一行恰好在 used、changed、refused 之一；丢的字不多于全部的字；两边都不空。"""
    parts = [card["used"], *card["changed"].values(), *card["refused"].values()]
    assert card["rows"] == sum(parts), card
    assert all(count > 0 for count in parts[1:]), card
    assert all(count > 0 for count in card["unused_fields"].values()), card
    assert 0 <= card["lost_characters"] <= card["characters"]
    for side in SIDES:
        assert card[f"{side}_documents"] > 0
        assert 0 <= card[f"{side}_lost"] <= card[f"{side}_characters"]


def check_sentence(error: str, path) -> None:
    """报错是写给人看的一句话：说出是哪个文件，不是别的程序的英文。"""
    assert Path(path).name in error
    assert re.search("[一-龥]{3}", error), error
    for foreign in ("Traceback", "Error(", "errno", "codec can't", "Expecting", "object at 0x"):
        assert foreign not in error, error
    assert len(error) < 1500, error
