"""读数据：各种各样的原始文件 -> 一条条解析好的值。

认得的摆法（看内容而不看扩展名；怎样辨认见 sniff.py，怎样剥开压缩与打包见 unpack.py）：

    一行一条 JSON，或者别的摆法的 JSON     json_rows.py
    纯文本，WikiExtractor 的 <doc>         prose.py
    有表头的 CSV 与 TSV，parquet           在这里

每一条值是什么、怎样变成文档或对话，见 shapes.py 与 conversations.py。坏行不会悄悄丢掉，见 log.py。
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import UserError
from corpus.find import find_files, stamp
from corpus.json_rows import read_jsonl, read_lines, read_values
from corpus.log import ReadLog, Unusable
from corpus.prose import FEW, MAX_DOCUMENT, SHORTEST, read_prose, read_wiki
from corpus.sniff import Kind, recognise
from corpus.unpack import Broken, Part, open_parts

__all__ = ["ReadLog", "read_rows"]

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 一格也可以是一整篇


def read_rows(source: str | Path, log: ReadLog) -> Iterator[tuple[str, Any]]:
    """逐条给出 (在哪里, 解析好的 JSON 值或一段纯文本)；几个文件依次读。

    Raises:
        UserError: 不是数据，或者读的时候文件变了。
    """
    for path in find_files(str(source), log):
        before = stamp(path)
        try:
            for part in open_parts(path, log):
                kind = recognise(part)
                log.begin(part.name, kind.name)
                yield from rows_of(part, kind, log)
        except Broken as error:
            log.refuse("末尾", Unusable(f"{error}，多半是下载中断了；请接着下载"))
        check_unchanged(path, before)


def check_unchanged(path: Path, before: list[int]) -> None:
    """文件还是读之前的那一个。Raises UserError：变了，或者不见了。"""
    try:
        now = stamp(path)
    except FileNotFoundError:
        raise UserError(f"{path} 在读的时候不见了；请检查它是不是被挪走或删掉了") from None
    if now != before:
        raise UserError(
            f"{path} 在读的时候变了（{before[0]:,} → {now[0]:,} 字节）；请等它写完，再运行一次"
        )


def rows_of(part: Part, kind: Kind, log: ReadLog) -> Iterator[tuple[str, Any]]:
    """一份内容里的每一条。"""
    if kind.name == "jsonl":
        return read_jsonl(part.stream, log)
    if kind.name == "json":
        return read_values(part.stream, log)
    if kind.name == "wikiextractor":
        return read_wiki(part.stream, log)
    if kind.name == "parquet":
        return read_parquet(part)
    if kind.name in ("csv", "tsv"):
        return read_table(part, kind.layout, log)
    size = MAX_DOCUMENT
    if kind.layout == "sentence":  # 小文件也要切成几篇，才留得出检验的
        n_characters = len(part.head.decode("utf-8", "replace"))
        size = min(size, max(SHORTEST, n_characters // FEW))
    return read_prose(part.stream, kind.layout, log, size)


def read_table(part: Part, comma: str, log: ReadLog) -> Iterator[tuple[str, dict[str, str]]]:
    """有表头的 CSV 或 TSV；一格里可以有换行。"""
    lines = read_lines(part.stream, log)
    rows = csv.reader((line for _, line in lines), delimiter=comma)
    try:
        names = [name.strip() for name in next(rows, [])]
        for cells in rows:
            where = f"第 {rows.line_num} 行"
            if not cells:
                continue
            if len(cells) != len(names):
                why = Unusable("格数与表头不同", f"表头 {len(names)} 格，这一行 {len(cells)} 格")
                log.refuse(where, why)
                continue
            yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{part.name} 第 {rows.line_num} 行不是合法的 CSV（{error}）") from error


def read_parquet(part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
    """parquet；一次取几百条，不整个装进内存。"""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{part.name} 是 parquet，读它要 pyarrow；请先运行 pip install pyarrow"
        ) from None
    if not part.on_disk:
        raise UserError(f"{part.name} 是包里的 parquet，要跳着读；请先把包解开")
    number = 0
    try:
        table = parquet.ParquetFile(part.stream)
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"第 {number} 条", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"{part.name} 第 {number} 条之后读不出（{reason}）；请重新下载") from error
