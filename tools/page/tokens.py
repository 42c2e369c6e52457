"""分词器 -> 网页里的分词器要的表。"""

from functools import lru_cache
from itertools import groupby
from typing import Any

from tokenizer import BERT_VOCAB_SIZE, CONTROL_TOKENS, Tokenizer

# 看到哪里：其余的字，两个私用区（第十五、十六平面）的都会去掉，别的没有写法，与左右相连。
LOOKED_AT = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))
PRIVATE = [[0xF0000, 0xFFFFD], [0x100000, 0x10FFFD]]


def tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """词表，以及哪些字会去掉、当作空白、单独成词。"""
    names = [tokenizer.backend.id_to_token(i) for i in range(tokenizer.vocab_size)]
    return {
        "vocab": names, "n_bert": BERT_VOCAB_SIZE, "n_control": len(CONTROL_TOKENS),
        "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "unk_id": tokenizer.unk_id,
        "roles": tokenizer.role_ids, "banned": tokenizer.never_sampled(), "kinds": kinds(tokenizer),
    }  # fmt: skip


@lru_cache(maxsize=1)
def kinds(tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """每个字放在两个 a 之间，看规范化与切分之后变成什么；连着的合成 [第一个, 最后一个]。"""
    normalize = tokenizer.backend.normalizer.normalize_str
    split = tokenizer.backend.pre_tokenizer.pre_tokenize_str

    def kind(code: int) -> str:
        text = normalize(f"a{chr(code)}a")
        if text == "aa":
            return "gone"
        return {1: "joined", 2: "space", 3: "alone"}[len(split(text))]

    found: dict[str, list[list[int]]] = {"gone": [], "space": [], "alone": [], "joined": []}
    for codes in LOOKED_AT:
        for name, run in groupby(codes, key=kind):
            first, *rest = run
            found[name].append([first, rest[-1] if rest else first])
    del found["joined"]
    found["gone"] += PRIVATE
    return found
