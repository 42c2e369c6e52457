"""词表：WordPiece -> llama.cpp 的写法，编号一个不动。

llama.cpp 认得 WordPiece（`tokenizer.ggml.model` 是 bert），本是给 BERT 这样只读不写的模型用的：
一个单词先在前面添上 ▁，再从头一截一截取词表里最长的。所以词首的 01 写成 ▁01，词中的 ##4 写成 4。

它解码时把 ▁ 印成空格。所以不与左右相连的（汉字、标点、空格、换行……）都写成原样的「整字」：
先在原文里找它们，剩下的才去切单词，印出来的也就是原样。字母、数字、假名等仍要靠 ▁ 分清词首与词中，
只好多印一个空格：词表里的文字不许重复，4 与 ##4 又都该印成 4，不能都对。这里要的是编号对。
"""

from typing import NamedTuple

from config import N_TOKENS
from tokenizer import CONTROL_TOKENS, Tokenizer

START = "▁"
NORMAL, CONTROL, WHOLE, UNUSED = 1, 3, 4, 5  # gguf.TokenType；WHOLE 在那里叫 USER_DEFINED


class Word(NamedTuple):
    """词表里的一项。"""

    text: str
    kind: int


def words(tokenizer: Tokenizer) -> list[Word]:
    """每个编号怎样写。文字各不相同：有两项相同的词表，llama.cpp 不收。"""
    vocab = tokenizer.backend.get_vocab()
    names = sorted(vocab, key=vocab.get)
    control = {vocab[token] for token in CONTROL_TOKENS}
    unused = {*tokenizer.never_sampled()} - control
    whole = standing_alone(tokenizer)
    found = []
    for i, name in enumerate(names):
        rest = name.removeprefix("##") if len(name) > 2 else name
        if i in control:
            found.append(Word(name, CONTROL))
        elif i == tokenizer.unk_id:  # 印出来是 [UNK]；文字里写着的，方括号先成了整字，切不出它
            found.append(Word(name, NORMAL))
        elif i in unused:  # 照原样写，[PAD] 会被当成停止的记号，文字里写着的也会被当真
            found.append(Word(START + name, UNUSED))
        elif i in whole:
            found.append(Word(name, WHOLE))
        elif rest == name:  # 词首
            found.append(Word(START + name, NORMAL))
        else:  # 词中；##中 这样的从来切不出来，留着 ##，才不与整字的「中」相同
            found.append(Word(name if vocab.get(rest) in whole else rest, NORMAL))
    assert len(found) == len({word.text for word in found}) == N_TOKENS
    return found


def standing_alone(tokenizer: Tokenizer) -> set[int]:
    """哪些编号是不与左右相连的一个字：夹在字母中间、连写两遍，还是它自己。"""
    vocab = tokenizer.backend.get_vocab()
    characters = [token for token in vocab if len(token) == 1]
    a = vocab["a"]
    tried = tokenizer.backend.encode_batch_fast([f"a{c}{c}a" for c in characters])
    return {
        vocab[c]
        for c, encoding in zip(characters, tried, strict=True)
        if encoding.ids == [a, vocab[c], vocab[c], a]
    }
