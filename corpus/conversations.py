"""一条条数据 -> 一段段对话：认得各种项目的写法，拿不准的说出是哪一轮、哪个字段。

对话        {"conversations": [{"role", "content"}, …]}；也可以一行就是一个数组，或者存成一段文字
一问一答    instruction/input/output，question/answer，prompt/response……；history 是前几轮
好与坏      chosen 是回答，rejected 绝不学；标着 label: false、weight: 0 的也不学

字段与角色的名字见 fields.py。
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus.fields import (
    ANSWER,
    CALLS,
    CONTEXT,
    DETAIL,
    QUESTION,
    SYSTEM,
    TEXT,
    TITLE,
    TURNS,
)
from corpus.log import ReadLog, Unusable, shown
from corpus.readers import read_rows
from corpus.shapes import Conversation, Fields, Record, type_name
from corpus.sniff import is_message_list
from corpus.turns import (
    JSON_TEXT,
    Reading,
    as_json,
    from_json,
    pair_of,
    plain_text,
    thoughts,
    turns_of,
)
from corpus.verdicts import verdicts


def read_conversations(
    source: str | Path, log: ReadLog, keep_reasoning: bool = False
) -> Iterator[Record]:
    """微调数据：逐段给出对话。

    键是头一句提问，同一个问题的几种回答、接着问下去的几段，都在同一边；以寒暄开头的太多时，
    改看 finer：全文（只有一问的，仍是那一问）。

    Args:
        keep_reasoning: 真时，思考过程写在回答之前。
    """
    for where, row in read_rows(source, log):
        reading = Reading(keep_reasoning)
        try:
            conversation = conversation_turns(row, reading)
        except Unusable as error:
            log.refuse(where, error)
            continue
        log.leave(reading.unused)
        log.use(reading.changes)
        whole = "\n".join(f"{role} {text}" for role, text in conversation)
        asked = [text for role, text in conversation if role == "user" and text.strip()]
        yield Record(
            asked[0] if asked else whole, conversation, asked[0] if len(asked) == 1 else whole
        )


def conversation_turns(row: Any, reading: Reading) -> Conversation:
    """一条数据里的各轮发言。Raises Unusable：不成对话，或者不该学，并说出为什么。"""
    if is_message_list(row):
        row = {TURNS[0]: row}
    if not isinstance(row, dict):
        todo = "；纯文本只能用来预训练" if isinstance(row, str) else ""
        raise Unusable("要的是写着对话的对象", f"得到的是{type_name(row)}{todo}")
    fields = Fields(row)
    check_wanted(fields)
    name, turns = fields.first(TURNS)
    if not name and is_message_list(row.get("data")):
        name, turns = "data", fields.get("data")
    if turns in ([], {}) or (isinstance(turns, str) and not turns.strip()):
        answered = any(fields.row.get(other) for other in QUESTION)
        name = "" if answered else name  # 表格里空着的一格
    if not name and isinstance(row.get("role"), list):  # 一列角色，一列正文
        name, turns = "role", {n: fields.get(n) for n in ("role", "content")}
    read = question_and_answer(fields, reading) if not name else turns_of(turns, name, reading)
    if name and read[-1][0] == "assistant":  # 思考写在整段对话的外面
        read[-1] = ("assistant", thoughts(fields, reading) + read[-1][1])
    conversation = better_answer(fields, read, reading)
    conversation = with_system(fields, conversation)
    reading.unused += fields.unused()
    return without_blanks(conversation, reading)


# ---------- 1. 该不该学 ----------


def check_wanted(fields: Fields) -> None:
    """标着不该学的一条。Raises Unusable。"""
    marks = verdicts(fields.row)
    fields.taken |= marks.keys()
    for name, learn in marks.items():
        if not learn:
            value = JSON_TEXT.encode(fields.row[name])
            raise Unusable(f"{shown(name)} 说不该学", value, broken=False)


def better_answer(fields: Fields, turns: Conversation, reading: Reading) -> Conversation:
    """chosen 是最后的回答；rejected 从来不学。"""
    name, rejected = fields.first(("rejected",))
    if name and rejected not in ("", [], {}):
        reading.changes.append("以 chosen 为回答，rejected（不好的回答）没有学")
    chosen = fields.get("chosen")
    if chosen is None or isinstance(chosen, bool):
        if name and (not turns or turns[-1][0] != "assistant"):
            raise Unusable("只有 rejected（不好的回答），没有 chosen", broken=False)
        return turns
    if isinstance(chosen, str) and chosen.startswith("\n\nHuman:"):  # hh-rlhf
        pieces = re.split(r"\n\n(Human|Assistant):", chosen)[1:]
        chosen = [{"role": r, "content": t.strip()} for r, t in batched(pieces)]
    answers = turns_of([chosen] if isinstance(chosen, dict) else chosen, "chosen", reading)
    if any(role == "user" for role, _ in answers):  # chosen 里是整段对话
        return answers
    while turns and turns[-1][0] == "assistant":
        turns = turns[:-1]
    return [*turns, *answers]


def batched(items: list) -> Iterator[tuple]:
    """两个两个地给。"""
    return zip(items[::2], items[1::2], strict=True)


# ---------- 2. 一问一答 ----------


def question_and_answer(fields: Fields, reading: Reading) -> Conversation:
    """instruction/input/output 之类，连同 history；有 chosen 的，可以没有 output。"""
    asked, question = fields.first(QUESTION)
    chosen = fields.row.get("chosen")
    if not asked and (isinstance(chosen, list) or as_text(chosen).startswith("\n\nHuman:")):
        return []  # 提问也在 chosen 里
    a_text = any(name in fields.row for name in TEXT)
    if not asked and not a_text and fields.row.get("answer") is not None:
        asked, question = fields.first(TITLE)  # 问答社区：标题是问题，desc 是补充
        question = "\n".join(filter(None, [as_text(question), fields.words((DETAIL,))]))
    added, context = fields.first(CONTEXT)
    if not asked:
        asked, question, added, context = added, context, "", None
    answered, answer = fields.first(ANSWER)
    if not answered and chosen is None:
        answered, answer = fields.first(("content",)) if asked else ("", None)
    if not asked:
        raise fields.missing((*TURNS, *QUESTION), " conversations 或 instruction 字段")
    if not answered and chosen is None:
        if "rejected" in fields.row:
            raise Unusable("只有 rejected（不好的回答），没有 chosen", broken=False)
        raise fields.missing(ANSWER, "写着回答的 output 之类的字段")
    turns = history_of(fields.get("history"), reading)
    turns += turns_of(question, asked, reading, "user")
    if added and (more := plain_text(context, added)):
        turns[-1] = (turns[-1][0], "\n".join(filter(None, [turns[-1][1], more])))
    if not answered:
        return turns
    answers = turns_of(answer, answered, reading, "assistant")
    if (thought := thoughts(fields, reading)) and answers:
        answers[0] = (answers[0][0], thought + answers[0][1])
    if answers and answers[0][0] == "user":  # 回答里是整段对话
        reading.changes.append(f"{answered} 里是整段对话，{asked} 没有用")
        return answers
    return turns + answers


def as_text(value: Any) -> str:
    """文字原样，别的是空的。"""
    return value if isinstance(value, str) else ""


def history_of(history: Any, reading: Reading) -> Conversation:
    """前几轮：[[问, 答], …]，或者一列发言。Raises Unusable。"""
    if isinstance(history, str) and history.strip():
        history = from_json(history, "history")
    if not history or isinstance(history, str):
        return []
    if not isinstance(history, list):
        raise Unusable("history 不是列表", f"是{type_name(history)}")
    if is_message_list(history):
        return turns_of(history, "history", reading)
    turns: Conversation = []
    for pair in history:
        if isinstance(pair, dict) and (turn := pair_of(pair, reading)):
            turns += turn
            continue
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unusable("history 里不是一问一答的两项", f"是{type_name(pair)}")
        question, answer = (plain_text(text, "history 里的一项") for text in pair)
        turns += [("user", question), ("assistant", answer)]
    return turns


# ---------- 3. 整段 ----------


def with_system(fields: Fields, turns: Conversation) -> Conversation:
    """写在对话外面的 system 与 tools，归到开头的 system 一轮。"""
    system = fields.first(SYSTEM)[1]
    outside = [plain_text(system, "system") if system else ""]
    outside += [as_json(fields.get(name), name) for name in CALLS[:2]]
    outside = [text for text in outside if text.strip()]
    if not outside:
        return turns
    if turns and turns[0][0] == "system":
        inside, turns = turns[0][1], turns[1:]
        outside = [inside if inside.strip() else "", *(x for x in outside if x != inside)]
    return [("system", "\n".join(filter(None, outside))), *turns]


def without_blanks(turns: Conversation, reading: Reading) -> Conversation:
    """末尾的空回答，连同它的提问去掉；中间有空回答的、一句回答也没有的，不能用。"""
    blank = [i for i, (role, text) in enumerate(turns) if role == "assistant" and not text.strip()]
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
    if len(blank) == len(answers):
        raise Unusable("没有一句助手的回答，无从学起", broken=False)
    if not blank:
        return turns
    if blank[0] < max(i for i in answers if i not in blank):
        raise Unusable("中间有一轮助手的话是空的", f"第 {blank[0] + 1} 轮", broken=False)
    reading.changes.append("末尾的空回答没有用")
    end = blank[0]
    while end and turns[end - 1][0] != "assistant":
        end -= 1
    return turns[:end]
