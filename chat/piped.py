"""管道里送来的话：一行一句；不是 UTF-8 的不猜，也不换成别的字；没完没了的一行不收。"""

import codecs
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

from config import UserError

MARKS = {  # UTF-32 小端的开头两个字节与 UTF-16 的相同，所以先看它
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
LONGEST = 1 << 24  # 一行最多多少字节：比任何模型看得到的都长得多


def piped_lines(stream: BinaryIO) -> Iterator[str]:
    """字节 -> 一行行文字，不带行尾；来一行给一行，开头的 BOM 略过。

    Args:
        stream: 例如 sys.stdin.buffer。
    Raises:
        UserError: 不是 UTF-8，说出是哪一行，怎样转换；或者一行太长。
    """
    # 一次至多读这么多：没有换行的几个 GB，不能整个读进内存再看有多长。
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), start=1):
        if len(line) > LONGEST:
            raise UserError(
                f"管道里送来的第 {number} 行超过了 {LONGEST >> 20} MB；请一行写一句，"
                "不要把整个文件写成一行"
            )
        try:
            if b"\0" in line:
                raise ValueError
            text = line.decode("utf-8-sig")
        except ValueError:
            raise UserError(
                f"管道里送来的第 {number} 行不是 UTF-8 编码，读不成文字；"
                f"请先转换编码，例如 iconv -f {likely_encoding(line)} -t UTF-8"
            ) from None
        yield from text.rstrip("\r\n").split("\r")  # 换行写成 \n、\r\n 或 \r 的都有


def likely_encoding(line: bytes) -> str:
    """不是 UTF-8 的一行，多半是什么编码；写法是 iconv 认得的。"""
    for mark, name in MARKS.items():
        if line.startswith(mark):
            return name
    if b"\0" not in line:
        return "GB18030"
    for name in ("UTF-32LE", "UTF-32BE"):  # 别的编码几乎不可能碰巧是它
        with suppress(UnicodeDecodeError):
            if line[: len(line) // 4 * 4].decode(name):
                return name
    # 零字节多在换行、空格与字母里：大端的在前，小端的在后。
    return "UTF-16BE" if line[::2].count(0) > line[1::2].count(0) else "UTF-16LE"
