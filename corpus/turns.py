"""一列发言 -> [(角色, 正文), …]：各种写法都读，读不了的说出是第几轮、哪个字段、得到的是什么。"""

import json
import math
import reprlib
from typing import Any

from corpus.fields import (
    ANSWER,
    CALLS,
    CONTEXT,
    QUESTION,
    REASONING,
    ROLE,
    ROLES,
    SYSTEM,
    TURNS,
    WORDS,
)
from corpus.log import Unusable
from corpus.shapes import Conversation, Fields, part_name, type_name, well_formed
from corpus.sniff import is_message_list
from corpus.verdicts import verdicts

JSON_TEXT = json.JSONEncoder(ensure_ascii=False)
THINK = "<think>\n{}\n</think>\n\n"  # 思考过程写在这两个标记之间；tokenizer.py 的对话模板也这样写
MASKED = object()  # 标着不学的一轮


class Reading:
    """读一条：没有照原样用的（changes），没有用到的字段（unused）。"""

    def __init__(self, keep_reasoning: bool = False):
        self.keep_reasoning = keep_reasoning
        self.changes: list[str] = []
        self.unused: list[str] = []


def plain_text(value: Any, name: str) -> str:
    """文字，或者一个数。Raises Unusable：是别的东西。"""
    if isinstance(value, str):
        return well_formed(value)
    if is_number(value):
        return JSON_TEXT.encode(value)
    raise Unusable(f"{name} 不是文字", f"是{type_name(value)}")


def is_number(value: Any) -> bool:
    """一个有限的数；true 与 false 不算，NaN 是「没有」，也不算。"""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def turns_of(value: Any, name: str, reading: Reading, role: str = "assistant") -> Conversation:
    """一个字段里的各轮：一列发言，存成 JSON 文字的也是；只是一段文字的，算 role 的一轮。

    Raises:
        Unusable: 说出是第几轮、哪个字段、得到的是什么。
    """
    if name in (*TURNS, "role"):
        value = from_json(value, name) if isinstance(value, str) else value
        value = from_columns(value, name) if isinstance(value, dict) else value
    elif isinstance(value, str) and value.lstrip().startswith("[{"):  # 存成了文字的一列发言
        parsed = from_json(value, name, strict=False)
        value = parsed if is_message_list(parsed) else value
    if isinstance(value, str) or is_number(value):
        if name in (*TURNS, "role"):
            raise Unusable(f"{name} 不是一列发言", f"是{type_name(value)}")
        reading.changes += [] if isinstance(value, str) else ["数字写成文字"]
        return [(role, plain_text(value, name))]
    if not isinstance(value, list):
        raise Unusable(f"{name} 不是一列发言", f"是{type_name(value)}")
    if not value:
        raise Unusable(f"{name} 是空的", broken=False)
    if name not in (*TURNS, "data") and not is_message_list(value):
        raise Unusable(f"{name} 不是文字", f"是{type_name(value)}")
    turns: Conversation = []
    for number, message in enumerate(value, start=1):
        if isinstance(message, dict) and (pair := pair_of(message, reading)):
            turns += pair  # 一项就是一问一答
            continue
        turn = turn_of(message, f"第 {number} 轮", name, reading)
        if turn is MASKED:
            if any(is_answer(later) for later in value[number:]):
                raise Unusable("中间有一轮标着不该学", f"第 {number} 轮", broken=False)
            reading.changes.append("末尾标着不该学的一轮没有用")
            break
        turns.append(turn)
    return turns


def pair_of(item: dict[str, Any], reading: Reading) -> Conversation:
    """没有角色的一项若是一问一答，它的几轮；不是的，是空的。"""
    fields = Fields(item)
    if fields.first(ROLE)[0]:
        return []
    question = fields.first((*QUESTION, *CONTEXT, "user", "human"))[1]
    answer = fields.first((*ANSWER, "assistant", "bot", "gpt"))[1]
    if not all(isinstance(text, str) or is_number(text) for text in (question, answer)):
        return []
    system = fields.words(SYSTEM)
    reading.unused += fields.unused()
    turns = [("user", plain_text(question, "")), ("assistant", plain_text(answer, ""))]
    return [("system", system), *turns] if system else turns


def is_answer(message: Any) -> bool:
    """一轮发言是不是助手的。"""
    if not isinstance(message, dict):
        return False
    role = Fields(message).first(ROLE)[1]
    return isinstance(role, str) and ROLES.get(role.lower()) == "assistant"


def from_json(text: str, name: str, strict: bool = True) -> Any:
    """存成一段 JSON 文字的对话；不是 JSON 的，strict 假时是 None。Raises Unusable。"""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if not strict:
            return None
        raise Unusable(f"{name} 是文字，又不是 JSON，不是一列发言") from None


def from_columns(columns: dict[str, Any], name: str) -> list[dict]:
    """一列角色、一列正文 -> 一列发言。Raises Unusable：长短不一。"""
    lists = {key: column for key, column in columns.items() if isinstance(column, list)}
    lengths = {len(column) for column in lists.values()}
    if len(lists) < 2 or len(lists) < len(columns) or len(lengths) != 1:
        raise Unusable(f"{name} 不是一列发言", f"是对象，有的是：{Fields(columns).names()}")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def turn_of(message: Any, where: str, name: str, reading: Reading) -> Any:
    """一轮发言 -> (角色, 正文)；标着不学的助手的话，是 MASKED。"""
    if not isinstance(message, dict):
        raise Unusable("一轮发言应该是对象", f"{where}，得到的是{type_name(message)}")
    fields = Fields(message)
    named, role = fields.first(ROLE)
    if not named:
        raise Unusable("一轮发言没有角色", f"{where}，有的是：{fields.names()}")
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        found = reprlib.repr(role)
        raise Unusable("不认识的角色", f"{where}是 {found}；认识 system、user、assistant、tool 等")
    called, role = "call" in role, ROLES[role.strip().lower()]
    marks = verdicts(message)
    fields.taken |= marks.keys()
    if role == "assistant" and not all(marks.values()):
        return MASKED
    written, text = fields.first(WORDS)
    plain = isinstance(text, str) or (isinstance(text, list) and part_of_text(text))
    if (role == "tool" or called) and not plain:  # 工具的调用与回答常是一个对象
        text = as_json(text, written)
    text = message_text(text, written, where, reading)
    extras = [as_json(fields.get(field), field) for field in CALLS]
    calls = [extra for extra in extras if extra]
    if text is None and not calls and role not in ("tool", "system"):
        if role == "user":
            raise Unusable("有一轮没有文字", f"{where}（user）的 content 是 null")
        text = ""
    said = (text or "").strip() or calls
    thought = thoughts(fields, reading) if role == "assistant" and said else ""
    if thought and text and text.lstrip().startswith("<think>"):
        thought = ""  # 正文里已经写着
    reading.unused += [f"{name}.{field}" for field in fields.unused()]
    return role, thought + "\n".join(filter(None, [text, *calls]))


def part_of_text(parts: list) -> bool:
    """一列部分里有没有文字。"""
    return any(isinstance(p, str) or (isinstance(p, dict) and "text" in p) for p in parts)


def message_text(value: Any, name: str, where: str, reading: Reading) -> str | None:
    """一轮的正文：文字、数、或一列部分（文字接起来，图片之类略去并数出来）。Raises Unusable。"""
    if value is None:
        return None
    if isinstance(value, dict) and isinstance(value.get("parts", value.get("text")), str | list):
        value = value.get("parts", value.get("text"))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if is_number(value):
        reading.changes.append("数字写成文字")
        return JSON_TEXT.encode(value)
    if isinstance(value, str):
        return well_formed(value)
    if not isinstance(value, list):
        raise Unusable("有一轮没有文字", f"{where}的 {name} 是{type_name(value)}")
    lines = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(part, dict) and part.get("type") in ("thinking", "reasoning"):
            thought = thoughts(Fields({REASONING[0]: part.get("thinking") or text}), reading)
            lines.insert(0, thought.rstrip("\n") + "\n") if thought else None
        elif isinstance(part, dict) and str(part.get("type")).startswith("tool_"):
            lines.append(as_json(part, name))
        elif isinstance(text, str):
            lines.append(well_formed(text))
        else:
            reading.changes.append(f"略去了不是文字的部分（{part_name(part)}）")
    return "\n".join(lines)


def as_json(value: Any, name: str) -> str:
    """工具的说明与调用写成 JSON 文字；已经是文字的原样，空的是空的。Raises Unusable。"""
    if not value or value in ("[]", "{}", "null"):
        return ""
    try:
        return well_formed(value if isinstance(value, str) else JSON_TEXT.encode(value))
    except (RecursionError, TypeError):
        raise Unusable(f"{name} 写不成 JSON，或者嵌套得太深") from None


def thoughts(fields: Fields, reading: Reading) -> str:
    """思考过程：留着的，连同两个标记；不留的是空的，记一笔。"""
    name = next((name for name in REASONING if fields.row.get(name)), REASONING[0])
    thought = fields.words((name,))
    if thought and not reading.keep_reasoning:
        reading.changes.append(f"{name}（思考过程）没有学（要学就加 --keep_reasoning）")
        return ""
    return THINK.format(well_formed(thought).strip()) if thought else ""
