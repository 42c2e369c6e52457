"""管道里送来的话：一行一句；不是 UTF-8 的不猜，也不换成别的字。"""

import codecs
from collections.abc import Iterable, Iterator
from contextlib import suppress

from config import UserError

MARKS = {  # UTF-32 小端的开头两个字节与 UTF-16 的相同，所以先看它
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def piped_lines(stream: Iterable[bytes]) -> Iterator[str]:
    """字节 -> 一行行文字，不带行尾；来一行给一行，开头的 BOM 略过。

    Args:
        stream: 按行给出字节，例如 sys.stdin.buffer。
    Raises:
        UserError: 不是 UTF-8；说出是哪一行，怎样转换。
    """
    for number, line in enumerate(stream, start=1):
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
