"""纯文本：怎样分篇。

cut             一段长文，在句末切成几段
read_prose      纯文本 -> 一篇篇：空行隔开的、一行一篇的、没有分行的、写着结尾标记的
read_wiki       WikiExtractor 的 <doc …>…</doc>
"""

import html
import re
from collections.abc import Iterator
from typing import BinaryIO

from corpus.json_rows import NOT_UTF8, read_lines
from corpus.log import ReadLog, Unusable

MAX_DOCUMENT = 1 << 12  # 纯文本一篇最长多少字；再长的在句末分成几篇
FEW = 20  # 没有分篇的小文件，切成大约这么多篇
SHORTEST = 50  # 切出来的，至少这么多字
PIECE = 1 << 16  # 一行太长时，一次读多少字节
SENTENCE_END = re.compile(r"[。！？!?…；]+[”’」』）)]*|[.;](?=\s)|\n")


def cut(text: str, size: int) -> list[str]:
    """在句末切开，每段不超过 size 字；一句比 size 还长的，只好从中间切。接起来与原文一字不差。"""
    pieces, start = [], 0
    while len(text) - start > size:
        limit = start + size
        ends = [m.end() for m in SENTENCE_END.finditer(text, start + size // 2, limit + 9)]
        end = max((end for end in ends if end <= limit), default=limit)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def cut_one(text: str) -> list[str]:
    """只有一篇：在句末切成大约 FEW 篇，好留出一点来检验；只有一句的，切不开。"""
    pieces = [piece.strip() for piece in cut(text, max(SHORTEST, len(text) // FEW))]
    return [piece for piece in pieces if piece]


# ---------- 纯文本 ----------


def read_pieces(stream: BinaryIO, log: ReadLog) -> Iterator[tuple[int, str]]:
    """逐行给出 (行号, 文字)；太长的行分几次给，不会撑爆内存。不是 UTF-8 的行记为坏行。"""
    number, held = 1, b""
    while block := stream.readline(PIECE):
        held += block
        ends = block.endswith(b"\n")
        try:
            text, held = held.decode("utf-8").removeprefix("\ufeff"), b""
        except UnicodeDecodeError as error:
            if not ends and error.start >= len(held) - 3:  # 切在一个字的中间
                text, held = (
                    held[: error.start].decode("utf-8").removeprefix("\ufeff"),
                    held[error.start :],
                )
            else:
                log.refuse(f"第 {number} 行", Unusable(NOT_UTF8.format(error.start)))
                while block and not block.endswith(b"\n"):
                    block = stream.readline(PIECE)
                number, held = number + 1, b""
                continue
        lines = [text]
        if "\r" in text:  # Windows 的，或者老式 Mac 的
            lines = text.replace("\r\n", "\n").replace("\r", "\n").splitlines(keepends=True)
        for line in lines:
            yield number, line
        number += ends
    if held:
        log.refuse(f"第 {number} 行", Unusable("最后一个字不完整，多半是下载中断了；请接着下载"))


def read_prose(
    stream: BinaryIO, layout: str, log: ReadLog, size: int = MAX_DOCUMENT
) -> Iterator[tuple[str, str]]:
    """纯文本 -> (在哪里, 一篇)。

    Args:
        layout: 怎样分篇，见 sniff.py 的 `Kind`；"whole" 是整个文件一篇。
        size: 一篇最长多少字；再长的在句末分成几篇。
    """
    marker = "" if layout in ("blank", "line", "sentence", "whole") else layout
    held, start, made, long = "", 1, 0, 0

    def give(document: str) -> Iterator[tuple[str, str]]:
        nonlocal made, long
        pieces = [piece for piece in cut(document, size) if piece.strip()]
        made, long = made + len(pieces), long + (len(pieces) > 1)
        yield from ((f"第 {start} 行", piece) for piece in pieces)

    for number, piece in read_pieces(stream, log):
        if not held.strip():
            held, start = "", number
        held += piece
        done: list[str] = []
        if marker:
            *done, held = held.split(marker)
        elif piece.endswith("\n") and ends_a_document(piece, layout):
            done, held = [held], ""
        if len(held) > 2 * size:
            long += 1
            *pieces, held = cut(held, size)
            done += pieces
        for document in done:
            yield from give(document)
    yield from give(held)
    say_how(layout, made, long, size, log)


def ends_a_document(line: str, layout: str) -> bool:
    """一篇到这一行为止。"""
    return layout == "line" or (layout == "blank" and not line.strip())


def say_how(layout: str, made: int, long: int, size: int, log: ReadLog) -> None:
    """怎样分的篇；平常的（空行隔开）不必说。"""
    if layout == "line":
        log.note(f"{log.place} 没有空行，每行都是完整的句子：一行一篇，共 {made:,} 篇")
    elif layout == "sentence" and made > 1:
        log.note(f"{log.place} 没有空行：在句末分成 {made:,} 篇，每篇至多 {size:,} 字")
    elif layout not in ("blank", "sentence", "whole"):
        log.note(f"{log.place} 用 {layout} 隔开：共 {made:,} 篇")
    if long and layout != "sentence":
        log.note(f"{log.place} 有的太长，在句末分成几篇，每篇至多 {size:,} 字")


# ---------- WikiExtractor ----------


def read_wiki(stream: BinaryIO, log: ReadLog) -> Iterator[tuple[str, dict[str, str]]]:
    """<doc id="…" url="…" title="…"> 到 </doc> 之间是一篇；给出 (在哪里, 各字段)。"""
    fields: dict[str, str] | None = None
    lines: list[str] = []
    start = 1
    for number, line in read_lines(stream, log):
        where = f"第 {start} 行"
        if opening := re.match(r"<doc\s(.*)>\s*$", line):
            if fields is not None:
                log.refuse(where, Unusable("<doc> 没有写完"))
            pairs = re.findall(r'(\w+)="([^"]*)"', opening[1])
            fields, lines, start = {k: html.unescape(v) for k, v in pairs}, [], number
        elif line.strip() == "</doc>" and fields is not None:
            yield where, fields | {"text": "".join(lines).strip()}
            fields = None
        elif fields is not None:
            lines.append(line.replace("\r\n", "\n"))
        elif line.strip():
            log.refuse(f"第 {number} 行", Unusable("<doc> 外面的文字"))
    if fields is not None:
        log.refuse(f"第 {start} 行", Unusable("<doc> 没有写完，不完整，多半是下载中断了"))
