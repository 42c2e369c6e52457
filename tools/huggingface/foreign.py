"""读别人写的文件：只认普通的文件，多大先看，JSON 里不许有花样。

opened       一个普通的文件，打开；管道、设备、目录、断了的链接，一句话
read_object  一个 JSON 文件，内容是一个对象
"""

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from config import UserError
from settings.files import open_regular
from settings.say import brief


def opened(path: Path) -> BinaryIO:
    """打开一个普通的文件（链接可以，指到的要是）；不等，也不读。

    Raises:
        UserError: 没有，没有权限，或者是管道、设备、目录。
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        what = "链接断了" if path.is_symlink() and not path.exists() else error.strerror
        raise UserError(f"读不了 {path}（{what}）；请检查路径与权限") from error
    if descriptor is None:
        raise UserError(f"{path} 不是普通的文件（是目录、管道或设备之类）；请换成真的文件")
    return os.fdopen(descriptor, "rb")


def size_of(file: BinaryIO) -> int:
    """打开的文件有多少字节。"""
    return os.fstat(file.fileno()).st_size


def read_bytes(path: Path, most: int) -> bytes:
    """整个读进来。Raises UserError：比 most 字节大。"""
    with opened(path) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise UserError(f"{path} 比 {most >> 20} MB 还大，不像该有的样子；请重新导出")
    return found


def read_object(path: Path, most: int) -> dict[str, Any]:
    """一个不超过 most 字节的 JSON 文件，内容是一个对象。"""
    return parse_object(read_bytes(path, most), f"{path}")


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """JSON -> 对象；名字重复的、嵌套太深的、数太大的，都不要：两个程序会读出两个意思。"""
    try:
        found = json.loads(
            text.decode("utf-8"), object_pairs_hook=without_repeats, parse_float=finite,
            parse_constant=finite,
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        why = f"（{brief(error)}）" if isinstance(error, Odd) else ""
        raise UserError(f"{name} 不是完好的 JSON{why}；请重新导出") from error
    if not isinstance(found, dict):
        raise UserError(f"{name} 里应是一个 JSON 对象；请重新导出")
    return found


class Odd(ValueError):
    """JSON 里的花样。"""


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise Odd(f"{name[:40]} 写了两次")
    return found


def finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise Odd(f"{text[:40]} 不是数")
    return value
