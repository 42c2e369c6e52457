"""JSON 的两种读法：一行一条，或者一个值接一个值。

read_jsonl    一行一条：坏了一行，别的行照读
read_values   大数组、几个数组接在一起、一个对象占好几行、{"data": […]}：边读边给
"""

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from config import UserError
from corpus import json_text
from corpus.fields import KNOWN, OF_A_ROW, PARTS, TURNS, WRAPPERS
from corpus.json_text import BLANK, BadValue, Text
from corpus.log import ReadLog, Unusable
from corpus.sniff import JSON, is_message, is_message_list

NOT_UTF8 = "不是 UTF-8（第 {} 字节）；可以先用 iconv -f GB18030 -t UTF-8 转换编码"
CUT_LINE = "最后一行不完整，多半是下载中断了；请接着下载，或删掉这一行"
CUT_ARRAY = "数组没有写完，不完整，多半是下载中断了；请接着下载"

BETWEEN = re.compile("[ \t\n\r\ufeff,]*")  # 行尾多一个逗号的，是去掉了方括号的数组

Rows = Iterator[tuple[str, Any]]  # (在哪里, 解析好的值)


# ---------- 1. 一行一条 ----------


def read_lines(stream: BinaryIO, log: ReadLog) -> Iterator[tuple[int, str]]:
    """逐行给出 (行号, 文字)，行号从 1 起；过长或不是 UTF-8 的行记为坏行。"""
    number = 0
    while line := stream.readline(json_text.MAX_LINE):
        number += 1
        where, complete = f"第 {number} 行", line.endswith(b"\n")
        if len(line) == json_text.MAX_LINE and not complete:
            log.refuse(where, Unusable(f"长于 {json_text.MAX_LINE >> 20} MB，是不是少了换行？"))
            while line and not line.endswith(b"\n"):
                line = stream.readline(json_text.MAX_LINE)
            continue
        try:
            text = line.decode("utf-8").removeprefix("\ufeff")  # 接起来的文件，中间也会有 BOM
        except UnicodeDecodeError as error:
            cut = not complete and error.start >= len(line) - 3  # 文件断在一个字的中间
            log.refuse(where, Unusable(CUT_LINE if cut else NOT_UTF8.format(error.start)))
            continue
        yield number, text


def read_jsonl(stream: BinaryIO, log: ReadLog) -> Rows:
    """逐行解析；一行里接着写了几个值的，每个一条；一行是一个数组的，里面每个一条。"""
    for number, line in read_lines(stream, log):
        if not line.strip():
            continue
        where = f"第 {number} 行"
        try:
            values = [JSON.decode(line)]
        except RecursionError:
            log.refuse(where, Unusable("不是合法的 JSON", "嵌套得太深"))
            continue
        except ValueError as error:
            values = several_values(line) if str(error).startswith("Extra data") else []
            if not values:
                log.refuse(where, bad_line(line, error))
        for value in values:
            if isinstance(value, list):
                yield from one_by_one(value, where, log)
            elif isinstance(value, dict) and (name := wrapper_in(value)):
                log.leave(other for other in value if other != name)
                yield from one_by_one(value[name], where, log)
            elif isinstance(value, str) and value.startswith("{"):  # 转了两次的 JSON
                yield where, twice_encoded(value)
            else:
                yield where, row_in(value)


def one_by_one(value: Any, where: str, log: ReadLog) -> Rows:
    """一个数组里的每一个，里面还有数组的也拆开；一段对话不拆，是它自己。"""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if not isinstance(value, list) or is_message_list(value):
            yield where, row_in(value)
        elif value:
            waiting += reversed(value)
        else:
            log.refuse(where, Unusable("空的数组", broken=False))


def twice_encoded(text: str) -> Any:
    """一段文字里写着一个对象，就是那个对象；不是的，原样。"""
    try:
        return JSON.decode(text)
    except (ValueError, RecursionError):
        return text


def row_in(value: Any) -> Any:
    """一条数据若写成 {"row": {…}}，是里面的那一条。"""
    if not isinstance(value, dict) or not OF_A_ROW.isdisjoint(value):
        return value
    return value["row"] if isinstance(value.get("row"), dict) else value


def rows_of_columns(value: Any) -> list[Any]:
    """整个文件是一个对象，里面几列一样长的（{"text": […], "label": […]}）：拆成一条条。

    一行、一个数组里的一个是这样的，不拆：那是一条数据，例如 {"chosen": […], "rejected": […]}。
    """
    if not isinstance(value, dict):
        return [value]
    columns = {name: x for name, x in value.items() if isinstance(x, list)}
    lengths = {len(x) for x in columns.values()}
    single = OF_A_ROW.isdisjoint(columns) or any(name in columns for name in (*TURNS, "role"))
    if single or len(columns) < 2 or len(columns) < len(value) or len(lengths) != 1:
        return [value]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def wrapper_in(row: dict) -> str:
    """一个对象若是包着几条数据的，那一项的名字；不是的，是空的。"""
    if not KNOWN.isdisjoint(row):
        return ""
    for name in WRAPPERS:
        rows = row.get(name)
        if isinstance(rows, list) and rows and isinstance(rows[0], dict | list):
            return "" if is_message(rows[0]) else name
    return ""


def bad_line(line: str, error: ValueError) -> Unusable:
    """一行解析不了，为什么。"""
    if not line.endswith("\n"):
        return Unusable(CUT_LINE)
    if re.match(r"\s*[\[{]\s*'", line):
        return Unusable("不是 JSON，像是 Python 的写法（单引号）；请用 json.dumps 写出来")
    if not isinstance(error, json.JSONDecodeError):
        return Unusable("不是合法的 JSON", "有一个整数太长")  # Python 不肯把几千位的变成整数
    return Unusable("不是合法的 JSON", f"第 {error.pos + 1} 个字起")


def several_values(line: str) -> list[Any]:
    """一行里首尾相接的几个值；接不下去的，一个也不要。"""
    values, at = [], 0
    try:
        while (at := BETWEEN.match(line, at).end()) < len(line):
            value, at = JSON.raw_decode(line, at)
            if not isinstance(value, dict | list | str):  # 01 不是 0 与 1 两条
                return []
            values.append(value)
    except (ValueError, RecursionError):
        return []
    return values


# ---------- 2. 一个值接一个值 ----------


def read_values(stream: BinaryIO, log: ReadLog) -> Rows:
    """一个值接一个值，给出每一条。

    断在末尾，少的只是最后一条，算一条坏行；中间出错，后面的全读不到，不能继续。

    Raises:
        UserError: 中间有一处不是 JSON。
    """
    text, number = Text(stream), 0
    try:
        for row in values_of(text, log):
            number += 1
            yield from one_by_one(row, f"第 {number} 条", log)
    except UnicodeDecodeError as error:
        position = text.n_bytes - len(error.object) + error.start
        raise UserError(f"{log.place} 第 {number} 条之后{NOT_UTF8.format(position)}") from error
    except BadValue as error:
        closed = text.text.rstrip().endswith("]") and "Unterminated" not in str(error)
        if not error.at_end or closed:
            raise UserError(
                f"{log.place} 第 {number} 条之后不是合法的 JSON（{error}）；请先修好那一条"
            ) from error
        log.refuse(f"第 {number} 条之后", Unusable(CUT_ARRAY))


def values_of(text: Text, log: ReadLog) -> Iterator[Any]:
    """最外层的数组与包着数据的对象拆开，别的值原样。"""
    while character := text.next_character():
        if character == ",":  # 去掉了方括号的数组
            text.at += 1
        elif character == "[" and not a_conversation_follows(text):
            yield from items(text)
        elif character == "{" and enter_wrapper(text, log):
            yield from items(text, opened=True)
            leave_wrapper(text, log)
        else:
            yield from rows_of_columns(text.value())


def items(text: Text, opened: bool = False) -> Iterator[Any]:
    """一个数组里的每一个，读到它的右括号为止；opened：左括号已经读过了。"""
    text.at += not opened
    if text.next_character() == "]":
        text.at += 1
        return
    while True:
        if not text.next_character():
            raise BadValue("数组没有写完", at_end=True)
        yield text.value()
        character = text.next_character()
        text.at += 1
        if character == "]":
            return
        if character != ",":
            text.at -= 1
            raise BadValue("少了 , 或 ]", at_end=not character)
        if text.next_character() == "]":  # 最后一条后面多一个逗号
            text.at += 1
            return


def a_conversation_follows(text: Text) -> bool:
    """接下来的数组是一段对话（里面第一个就是发言），而不是许多条。"""
    text.look_ahead()
    opening = re.compile(r"\[\s*(?=\{)").match(text.text, text.at)
    if not opening:
        return False
    try:
        return is_message(JSON.raw_decode(text.text, opening.end())[0])
    except (ValueError, RecursionError):  # 第一句话就很长
        return bool(re.compile(r'\{\s*"(role|from)"\s*:').match(text.text, opening.end()))


def enter_wrapper(text: Text, log: ReadLog) -> bool:
    """接下来的对象若是包着全部数据的，走到那个数组的左括号之后，返回真。

    先找常用的名字；没有，才是头一个装着一条条数据的数组。自己就是一条的，不是。
    """
    text.look_ahead()
    whole, at, names = text.text, text.at + 1, []
    found = None  # (数组从哪里起，它之前有哪些名字)
    try:
        while True:
            at = BLANK.match(whole, at).end()
            name, at = JSON.raw_decode(whole, at)
            at = BLANK.match(whole, at).end()
            if not isinstance(name, str) or whole[at : at + 1] != ":" or name in OF_A_ROW:
                return False
            at = BLANK.match(whole, at + 1).end()
            if whole[at : at + 1] == "[" and holds_rows(name, whole, at + 1):
                if name in WRAPPERS or found is None:
                    found = at + 1, names.copy()
                if name in WRAPPERS:
                    break
            _, at = JSON.raw_decode(whole, at)
            names.append(name)
            at = BLANK.match(whole, at).end()
            if whole[at : at + 1] != ",":
                break
            at += 1
    except (ValueError, RecursionError):  # 数组太长，眼前看不全：就是它
        pass
    if found is None:
        return False
    text.at, before = found
    log.leave(before)
    return True


def holds_rows(name: str, whole: str, at: int) -> bool:
    """名叫 name 的数组里（从 at 起）是一条条数据，而不是一段对话或一篇的几节。"""
    at = BLANK.match(whole, at).end()
    try:
        first = JSON.raw_decode(whole, at)[0]
    except (ValueError, RecursionError):
        first = None
    if is_message(first):
        return False
    if name in WRAPPERS:
        return True
    known = isinstance(first, dict) and not OF_A_ROW.isdisjoint(first)
    return known and name not in (*PARTS, "history", "tools")


def leave_wrapper(text: Text, log: ReadLog) -> None:
    """数组之后，对象里剩下的：没有用，记下名字。"""
    while (character := text.next_character()) == ",":
        text.at += 1
        if text.next_character() == "}":
            break
        log.leave([str(text.value())])
        if text.next_character() != ":":
            raise BadValue("少了 :", at_end=False)
        text.at += 1
        text.next_character()
        text.value()
    if character != "}" and text.next_character() != "}":
        raise BadValue("对象没有写完", at_end=not character)
    text.at += 1
