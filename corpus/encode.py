"""一篇篇文档、一段段对话 -> 编号，并且数清要猜的词元、它们写出的字与写不出的字。"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from corpus.shapes import Record
from tokenizer import Tokenizer

CHUNK = 2048  # 一次最多分词多少篇
CHUNK_CHARACTERS = 1 << 20  # 一次最多分词多少字：分词时一个字要占一百多字节


class Encoded(NamedTuple):
    """一篇的编号，以及其中有多少要猜、有多少字写不出。"""

    ids: np.ndarray  # uint16
    targets: int  # 要猜的词元数
    characters: int  # 它们写出多少字
    lost: int  # 这些字里写不出的
    read: int  # 全文多少字（对话里还有不用猜的）
    missing: str  # 全文里写不出的字


def encode_documents(chunk: list[Record], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """逐篇编码；每个词元都要猜，包括结束标记。"""
    texts = [record.content for record in chunk]
    for text, (ids, lost) in zip(texts, tokenizer.encode_and_lose(texts), strict=True):
        document = tokenizer.document_ids(ids)
        yield Encoded(document, len(document), len(text), len(lost), len(text), lost)


def encode_conversations(chunk: list[Record], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """逐段编码；只猜助手的话和它的结束标记。"""
    encoded = iter(tokenizer.encode_and_lose([text for r in chunk for _, text in r.content]))
    for record in chunk:
        turns, targets, characters, lost, missing = [], 0, 0, 0, ""
        for role, text in record.content:
            ids, gone = next(encoded)
            turn = tokenizer.turn_ids(role, ids.tolist())
            turns += turn
            missing += gone
            if role == "assistant":
                targets += len(turn) - 2  # 去掉 <|im_start|> 与角色
                characters, lost = characters + len(text), lost + len(gone)
        read = sum(len(text) for _, text in record.content)
        yield Encoded(np.array(turns, np.uint16), targets, characters, lost, read, missing)


def chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """把数据分成一块一块，每块的篇数与字数都有上限；内存因此与文件大小无关。"""
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        text = record.content
        size += len(text) if isinstance(text, str) else sum(len(turn) for _, turn in text)
        if len(chunk) >= CHUNK or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
