"""一条条数据 -> 一篇篇文档，或一段段对话：认得各种项目的写法。

文档        字符串，或有 text / content（可另有 title）的对象
minimind    正文里写着 <|im_start|>…<|im_end|> 或 <s>…</s>，每一对里是一篇
对话        {"conversations": [{"role", "content"}, …]}，或 instruction/input/output
"""

import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from corpus.readers import JSON_TEXT, ReadLog, read_rows

Conversation = list[tuple[str, str]]  # [(角色, 正文), …]


class Record(NamedTuple):
    """一条数据：划分训练与检验时用的键，以及内容。键相同的总在同一边。"""

    key: str | None  # None：总用来训练
    content: Any  # 文档是 str，对话是 Conversation


def read_documents(path: Path, log: ReadLog) -> Iterator[Record]:
    """预训练数据：逐篇给出文档，键就是文档本身。"""
    for where, row in read_rows(path, log):
        try:
            documents = split_markers(well_formed(document_text(row)))
        except ValueError as error:
            log.add(where, str(error))
            continue
        if not documents:
            log.blank += 1
        for document in documents:
            yield Record(document, document)


def document_text(row: Any) -> str:
    """一条数据里的正文。Raises ValueError：没有正文，并说出有什么。"""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"要的是字符串或对象，得到的是 {type(row).__name__}")
    text = row.get("text") if row.get("text") is not None else row.get("content")
    if not isinstance(text, str):
        raise ValueError(f"没有写着文字的 text 或 content 字段（有的是：{_keys(row)}）")
    title = row.get("title")
    if isinstance(title, str) and title and not text.lstrip().startswith(title):
        return f"{title}\n{text}"  # wiki2019zh 的正文已经以标题开头，不再重复
    return text


def _keys(row: dict) -> str:
    """有哪些字段，写给人看：只写前几个，太长的截短，看不见的字符转义。"""
    names = [reprlib.repr(name)[1:-1] for name in row]
    return "、".join(names[:8]) + "……" * (len(names) > 8) or "什么也没有"


def well_formed(text: str) -> str:
    """原样返回；JSON 的转义能写出不成对的代理字符，它们不是文字。Raises ValueError。"""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("含有不成对的代理字符（\\ud800–\\udfff）") from None
    return text


def split_markers(text: str) -> list[str]:
    """按文件格式里的首尾标记分成若干篇；没有标记就是一篇。首尾空白不要。"""
    if text.lstrip().startswith("<|im_start|>"):
        pieces = re.split(r"<\|im_start\|>|<\|im_end\|>", text)
    elif text.lstrip().startswith("<s>"):
        pieces = re.split(r"</?s>", text)
    else:
        pieces = [text]
    return [piece.strip() for piece in pieces if piece.strip()]


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "tool": "tool", "function": "tool"}  # fmt: skip


def read_conversations(path: Path, log: ReadLog) -> Iterator[Record]:
    """微调数据：逐段给出对话；键是第一句提问，同一个问题不会既训练又检验。"""
    for where, row in read_rows(path, log):
        try:
            conversation = conversation_turns(row, log.notes)
        except ValueError as error:
            log.add(where, str(error))
            continue
        question = next((text for role, text in conversation if role == "user"), "")
        yield Record(question or conversation[0][1], conversation)


def conversation_turns(row: Any, notes: Counter[str]) -> Conversation:
    """一条数据里的各轮发言。Raises ValueError：不成对话，并说出为什么。"""
    if not isinstance(row, dict):
        raise ValueError(f"要的是对象，得到的是 {type(row).__name__}")
    if isinstance(row.get("instruction"), str):
        if not isinstance(row.get("input"), str | None):
            raise ValueError("input 不是文字")
        question = "\n".join(filter(None, [row["instruction"], row.get("input")]))
        messages = [("user", question), ("assistant", row.get("output"))]
        if isinstance(row.get("system"), str) and row["system"]:
            messages.insert(0, ("system", row["system"]))
    else:
        rows = row.get("conversations") or row.get("messages")
        if not isinstance(rows, list):
            raise ValueError(f"没有 conversations 或 instruction 字段（有的是：{_keys(row)}）")
        messages = [_message(message, notes) for message in rows]
    conversation = [(role, well_formed(text)) for role, text in messages if isinstance(text, str)]
    if len(conversation) < len(messages):
        raise ValueError("有一轮发言没有文字")
    if not any(role == "assistant" and text.strip() for role, text in conversation):
        raise ValueError("没有一句助手的回答，无从学起")
    return conversation


def _message(message: Any, notes: Counter[str]) -> tuple[str, str]:
    """一轮发言 -> (角色, 正文)。工具的说明与调用写成 JSON 文字；思考过程略去并计数。"""
    if not isinstance(message, dict):
        raise ValueError(f"一轮发言应该是对象，得到的是 {type(message).__name__}")
    name = message.get("role") or message.get("from")
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"不认识的角色 {reprlib.repr(name)}（认识：{'、'.join(ROLES)}）")
    text = message.get("content") if "content" in message else message.get("value")
    extras = [message.get(field) for field in ("tools", "tool_calls")]
    try:
        extras = [e if isinstance(e, str) else JSON_TEXT.encode(e) for e in extras if e]
    except RecursionError:
        raise ValueError("工具的说明或调用嵌套得太深") from None
    if isinstance(text, str) or (text is None and (extras or ROLES[name] == "tool")):
        text = "\n".join(filter(None, [text, *extras]))
    if message.get("reasoning_content"):
        notes["发言的思考过程（reasoning_content），只学回答"] += 1
    return ROLES[name], text
