"""读数据：各种各样的原始文件 -> 一条条解析好的值。

认得的摆法（看内容而不看扩展名；怎样辨认见 sniff.py，怎样剥开压缩与打包见 unpack.py）：

    一行一条 JSON，或者别的摆法的 JSON     json_rows.py
    纯文本，WikiExtractor 的 <doc>         prose.py
    有表头的 CSV 与 TSV，parquet           在这里

每一条值是什么、怎样变成文档或对话，见 shapes.py 与 conversations.py。坏行不会悄悄丢掉，见 log.py。
"""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import UserError
from corpus import json_text
from corpus.fields import KNOWN
from corpus.find import find_files, stamp
from corpus.json_rows import read_jsonl, read_lines, read_values
from corpus.log import ReadLog, Unusable, shown
from corpus.prose import FEW, MAX_DOCUMENT, SHORTEST, read_prose, read_wiki
from corpus.sniff import Empty, Kind, recognise
from corpus.streams import Broken, check_ratio, cut_off
from corpus.unpack import Part, open_parts

csv.field_size_limit(json_text.MAX_LINE)  # 一格也可以是一整篇


def read_rows(source: str | Path, log: ReadLog) -> Iterator[tuple[str, Any]]:
    """逐条给出 (在哪里, 解析好的 JSON 值或一段纯文本)；几个文件依次读。

    Raises:
        UserError: 不是数据，或者读的时候文件变了。
    """
    paths = find_files(str(source), log)
    for path in paths:
        before, first = stamp(path), len(log.files)
        broken = False
        try:
            for part in open_parts(path, log):
                try:
                    kind = recognise(part)
                except Empty:
                    if len(paths) == 1 and part.name == str(path):
                        raise
                    log.note(f"{part.name} 是空的")
                    continue
                several = len(paths) > 1 or len(log.files) > first  # 只有一个的包，就像那个文件
                log.begin(part.name, kind.name)
                try:
                    yield from rows_of(part, kind, log, several)
                except Broken as error:  # zip 里坏了一个，别的还读得到
                    broken = True
                    log.refuse("末尾", cut_off(error))
        except Broken as error:
            if not broken:
                log.refuse("末尾", cut_off(error))
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


OPEN_QUOTE = "有一格的引号没有关上，后面的都被当成了这一格；请检查文件完不完整"


def rows_of(part: Part, kind: Kind, log: ReadLog, several: bool) -> Iterator[tuple[str, Any]]:
    """一份内容里的每一条；several：它只是几份中的一份。"""
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
    layout, size = kind.layout, MAX_DOCUMENT
    n_characters = len(part.head.decode("utf-8", "replace"))
    if several and layout in ("line", "sentence") and n_characters < MAX_DOCUMENT:
        layout = "whole"  # 许多小文件，一个文件一篇
    elif layout == "sentence":  # 只有一个小文件，也要切成几篇，才留得出检验的
        size = min(size, max(SHORTEST, n_characters // FEW))
    return read_prose(part.stream, layout, log, size)


def read_table(part: Part, comma: str, log: ReadLog) -> Iterator[tuple[str, dict[str, str]]]:
    """有表头的 CSV 或 TSV；一格里可以有换行。"""
    lines = read_lines(part.stream, log)
    rows = csv.reader((line for _, line in lines), delimiter=comma, strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        check_names(part, names)
        if KNOWN.isdisjoint(name.lower() for name in names):
            raise UserError(
                f"{part.name} 的第一行被当作表头（{'、'.join(map(shown, names[:5]))[:80]}），"
                f"里面没有认得的字段；请补上表头，例如 text，或者 question 与 answer"
            )
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
        if "unexpected end" in str(error):  # 引号开了没有关
            log.refuse(f"第 {rows.line_num} 行", Unusable(OPEN_QUOTE))
            return
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
    number = produced = 0
    size = part.stream.seek(0, 2)
    batches = parquet_batches(part, parquet)
    while True:
        try:
            if (batch := next(batches, None)) is None:
                return
            produced += batch.nbytes
            rows = batch.to_pylist()
        except UserError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise UserError(
                f"{part.name} 第 {number} 条之后读不出（{reason}）；请重新下载"
            ) from error
        check_ratio(part.name, produced, size)
        for row in rows:
            number += 1
            yield f"第 {number} 条", row


def parquet_batches(part: Part, parquet) -> Iterator[Any]:
    """一批几十条，一批批地给。"""
    table = parquet.ParquetFile(part.stream)
    check_names(part, table.schema_arrow.names)
    yield from table.iter_batches(batch_size=64)


def check_names(part: Part, names: list[str]) -> None:
    """各列的名字不能相同：同名的，只剩得下一列。Raises UserError。"""
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise UserError(f"{part.name} 里有两列都叫 {shown(twice[0])}；请把其中一列改名")
