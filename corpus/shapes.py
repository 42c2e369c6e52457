"""一条条数据 -> 一篇篇文档：认得各种项目的写法。

文档        字符串，或有 text / content 的对象（可另有 title、desc；分成几节的写在 sections 里）
minimind    正文里写着 <|im_start|>…<|im_end|> 或 <s>…</s>，每一对里是一篇

对话的写法见 conversations.py，字段的名字见 fields.py。
"""

import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from corpus.fields import CONTEXT, DETAIL, HEADING, KNOWN, PARTS, TEXT, TITLE
from corpus.log import ReadLog, Unusable, shown
from corpus.prose import cut, cut_one
from corpus.readers import read_rows
from corpus.sniff import document_end

Conversation = list[tuple[str, str]]  # [(角色, 正文), …]
LONGEST = 1 << 16  # 一篇最长多少字；再长的在句末切成几篇


class Record(NamedTuple):
    """一条数据：划分训练与检验时用的键，以及内容。键相同的总在同一边。"""

    key: str | None  # None：总用来训练
    content: Any  # 文档是 str，对话是 Conversation
    finer: str | None = None  # 键相同的太多时，改看它


class Fields:
    """一个对象的各字段；取过哪些都记着，没有取过的最后数出来。"""

    def __init__(self, row: dict[str, Any]):
        if KNOWN.isdisjoint(row):  # 写成 Text、INSTRUCTION 的
            row = {str(name).strip().lower(): value for name, value in row.items()}
        self.row, self.taken = row, set()

    def get(self, name: str) -> Any:
        """一个字段的值；没有的是 None。"""
        self.taken.add(name)
        return self.row.get(name)

    def first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """头一个有值的字段：(名字, 值)；都没有，是 ("", None)。空着的也算看过了。"""
        blank = "", None
        for name in names:
            value = self.row.get(name)
            if value is None or value != value or (isinstance(value, str) and not value.strip()):
                self.taken.add(name)  # 与自己不相等的是 NaN：pandas 用它表示没有
                blank = (name, value) if isinstance(value, str) and not blank[0] else blank
            else:
                self.taken.add(name)
                return name, value
        return blank  # 只有空白的，也比没有强

    def missing(self, names: tuple[str, ...], what: str) -> Unusable:
        """names 里一个有值的也没有，怎样说。"""
        if empty := next((name for name in names if name in self.row), ""):
            return Unusable(f"{empty} 是 null", broken=False)
        return Unusable(f"没有{what}", f"有的是：{self.names()}")

    def words(self, names: tuple[str, ...]) -> str:
        """同 `first`，但只要文字；不是文字的不取，于是会被数出来。"""
        for name in names:
            value = self.row.get(name)
            if value is None or isinstance(value, str):
                self.taken.add(name)
                if value and value.strip():
                    return value
        return ""

    def unused(self) -> list[str]:
        """没有取过的。"""
        return [name for name in self.row if name not in self.taken]

    def names(self) -> str:
        """有哪些字段，写给人看：只写前几个，太长的截短，看不见的字符转义。"""
        names = [reprlib.repr(name)[1:-1] for name in self.row]
        return "、".join(names[:8]) + "……" * (len(names) > 8) or "什么也没有"


def type_name(value: Any) -> str:
    """一个值是什么，写给人看。"""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "文字", int: "数字", float: "数字", list: "列表", dict: "对象"}
    return names.get(type(value), type(value).__name__)


def read_documents(source: str | Path, log: ReadLog) -> Iterator[Record]:
    """预训练数据：逐篇给出文档，键就是文档本身。"""
    only = None  # 头一篇先拿着：要是只有它一篇，就切开
    n = 0
    for where, row in read_rows(source, log):
        for document in documents_of(row, where, log):
            n += 1
            if n == 1:
                only = document
                continue
            if n == 2:
                yield Record(only, only)
            yield Record(document, document)
    if n == 1:
        pieces = cut_one(only)
        if len(pieces) > 1:
            log.note(f"{log.source} 只有一篇：在句末切成 {len(pieces)} 篇，好留出一点来检验")
        yield from (Record(piece, piece) for piece in pieces)


def documents_of(row: Any, where: str, log: ReadLog) -> list[str]:
    """一条数据里的各篇；记好账。"""
    changes: list[str] = []
    fields = Fields(row) if isinstance(row, dict) else None
    try:
        text = well_formed(document_text(fields or row, changes))
        documents = split_markers(text.replace("\r\n", "\n") if "\r" in text else text)
        if not documents:
            raise Unusable("空白文档", broken=False)
    except Unusable as error:
        log.refuse(where, error)
        return []
    if fields and (left := fields.unused()):
        log.leave(left)
    if max(map(len, documents)) > LONGEST:
        changes.append(f"长于 {LONGEST:,} 字，在句末切成几篇")
        pieces = [piece.strip() for document in documents for piece in cut(document, LONGEST)]
        documents = [piece for piece in pieces if piece]
    log.use(changes)
    return documents


def document_text(row: Any, changes: list[str]) -> str:
    """一条数据里的正文。

    Args:
        row: `Fields`，或者不是对象的一个值。
        changes: 没有照原样使用的，记在里面。
    Raises:
        Unusable: 没有正文，并说出有什么。
    """
    if not isinstance(row, Fields):
        if isinstance(row, str | list):
            return joined_text(row, changes)
        raise Unusable("要的是文字或对象", f"得到的是{type_name(row)}")
    name, text = row.first(TEXT)
    if not name:
        name, text = row.first(PARTS)
    if not name:
        raise row.missing((*TEXT, *PARTS), "写着文字的 text 或 content 字段")
    if isinstance(text, list):
        changes.append(f"{name} 是一列，接成一篇")
    text = joined_text(text, changes, name)
    above = [line for line in (row.words(TITLE), row.words((DETAIL,))) if line]
    while above and text.lstrip().startswith(above[-1].strip()):
        above.pop()  # wiki2019zh 的正文已经以标题开头，不再重复
    return "\n".join([*above, text])


def joined_text(value: Any, changes: list[str], name: str = "") -> str:
    """正文：文字，或者一列文字、一列带小标题的节，一段一行地接起来。

    Raises:
        Unusable: 是别的东西。
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Unusable(f"{name} 不是文字", f"是{type_name(value)}")
    lines = []
    for piece in value:
        if isinstance(piece, str):
            lines.append(piece)
            continue
        fields = Fields(piece) if isinstance(piece, dict) else None
        inner = fields.first((*TEXT, *PARTS, *CONTEXT)) if fields else ("", None)
        if not inner[0]:
            changes.append(f"略去了 {name or '列表'} 里不是文字的部分（{part_name(piece)}）")
            continue
        heading = fields.words(HEADING)
        fields.get("type")
        lines += [heading] if heading else []
        lines.append(joined_text(inner[1], changes, inner[0]))
        if left := fields.unused():
            changes.append(f"略去了 {name or '列表'} 里的 {'、'.join(map(shown, left[:5]))}")
    if not lines and value:
        raise Unusable(f"{name or '列表'} 里没有文字", part_name(value[0]))
    return "\n".join(lines)


def part_name(piece: Any) -> str:
    """内容的一个部分是哪一种，例如 image_url。"""
    kind = piece.get("type") if isinstance(piece, dict) else None
    return shown(kind) if isinstance(kind, str) and len(kind) < 30 else type_name(piece)


def well_formed(text: str) -> str:
    """原样返回；JSON 的转义能写出不成对的代理字符，它们不是文字。Raises Unusable。"""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable("含有不成对的代理字符（\\ud800–\\udfff）") from None
    return text


def split_markers(text: str) -> list[str]:
    """按文件格式里的首尾标记分成若干篇；没有标记就是一篇。首尾空白不要。"""
    text = text.strip()
    if text.startswith("<|im_start|>"):
        pieces = re.split(r"<\|im_start\|>|<\|im_end\|>", text)
    elif text.startswith("<s>") and (text.endswith("</s>") or "</s>" not in text):
        pieces = re.split(r"</?s>", text)
    elif end := document_end(text):
        pieces = text.split(end)
    else:
        pieces = [text]
    return [piece.strip() for piece in pieces if piece.strip()]
