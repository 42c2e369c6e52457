"""词元文件旁边的卡片：来历、账目与各种校验和。写的时候封好，读的时候先验封条，再看每一项。

    seal      一张卡片 -> 写进文件的字节，末尾是前面全部字节的 SHA-256
    unseal    反过来；改动过一个比特，或者有一项不像话，就不认

别处（检验、体检、接着练）用到卡片上的数，都不再检查：要拦的在这里拦下。
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus.checked import BLOCK, Damaged
from dataset import SIDES

LARGEST = 1 << 28  # 卡片最多多少字节：几十 GB 的词元文件，也只有几 MB
COUNT_LIMIT = 1 << 53  # 数到这么多的，不是真的

# ---------- 1. 封条 ----------


def seal(card: dict[str, Any]) -> bytes:
    """写进文件的字节：JSON，末尾一项 checksum 是它之前全部字节的 SHA-256。"""
    text = json.dumps(card, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace")
    body = text.removesuffix(b"\n}")
    return body + _ending(body)


def _ending(body: bytes) -> bytes:
    return b',\n  "checksum": "%s"\n}' % hashlib.sha256(body).hexdigest().encode()


def unseal(path: Path) -> dict[str, Any]:
    """读一张卡片。

    Raises:
        OSError: 没有，或者读不了。
        Damaged: 不是完好的卡片，并说明哪里不对。
    """
    if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST):
        raise Damaged(f"{path} 不是卡片")
    data = path.read_bytes()
    body = data[: -len(_ending(b""))]
    if data[len(body) :] != _ending(body):
        raise Damaged(f"{path} 与写下时不同，或者是旧程序写的")
    try:
        card = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} 解析不了（{error}）") from error
    check(card, path)
    return card


# ---------- 2. 每一项 ----------

Check = Callable[[Any], bool]


def is_text(x: Any) -> bool:
    """是文字。"""
    return isinstance(x, str)


def is_name(x: Any) -> bool:
    """是印得出来的文字，一行。"""
    return is_text(x) and x.isprintable()


def is_count(x: Any) -> bool:
    """是一个数得出来的数。"""
    return type(x) is int and 0 <= x < COUNT_LIMIT


def is_share(x: Any) -> bool:
    """是 0 到 1 之间的数；NaN 不是。"""
    return type(x) in (int, float) and 0 <= x <= 1


def is_sum(x: Any) -> bool:
    """是一个 SHA-256。"""
    return is_text(x) and len(x) == 64 and set(x) <= set("0123456789abcdef")


def is_flag(x: Any) -> bool:
    """是真或假。"""
    return isinstance(x, bool)


def list_of(one: Check) -> Check:
    """一列，每个都 one。"""
    return lambda x: isinstance(x, list) and all(map(one, x))


def is_counter(x: Any) -> bool:
    """{名字: 个数}。"""
    return isinstance(x, dict) and all(map(is_count, x.values()))


def is_file(x: Any) -> bool:
    """读过的一个文件：名字、认作什么、多少条。"""
    return (
        isinstance(x, dict) and set(x) == {"name", "kind", "rows"}
        and is_text(x["name"]) and is_text(x["kind"]) and is_count(x["rows"])
    )  # fmt: skip


def is_ranked(x: Any) -> bool:
    """[文字, 个数]。"""
    return isinstance(x, list) and len(x) == 2 and is_text(x[0]) and is_count(x[1])


def is_ranked_character(x: Any) -> bool:
    """[一个字, 个数]；字写得出来，不是半个。"""
    return is_ranked(x) and len(x[0]) == 1 and not "\ud800" <= x[0] <= "\udfff"


def is_stamp(x: Any) -> bool:
    """find.stamp 的四个数。"""
    return isinstance(x, list) and len(x) == 4 and all(type(n) is int for n in x)


SCHEMA: dict[str, Check] = {
    "format": is_count, "source": is_text, "stage": is_text, "size": is_count,
    "tokenizer": is_text, "val_fraction": is_share, "keep_reasoning": is_flag, "code": is_text,
    "stamps": list_of(is_stamp), "sha256": is_sum, "kind": is_name, "files": list_of(is_file),
    "rows": is_count, "used": is_count, "changed": is_counter, "refused": is_counter,
    "bad_rows": is_count, "unused_fields": is_counter, "notes": list_of(is_text),
    "unk_rate": is_share, "characters": is_count, "lost_characters": is_count,
    "lost_top": list_of(is_ranked_character), "duplicates": is_count,
    "openings": list_of(is_ranked), "checksum": is_sum,
}  # fmt: skip
OF_A_SIDE: dict[str, Check] = {
    "documents": is_count, "tokens": is_count, "targets": is_count, "characters": is_count,
    "lost": is_count, "sha256": is_sum, "blocks": list_of(is_sum), "starts_sha256": is_sum,
}  # fmt: skip


def check(card: Any, path: Path) -> None:
    """每一项都在，类型与大小都对，互相说得通。Raises Damaged。"""
    wanted = SCHEMA | {f"{side}_{n}": c for side in SIDES for n, c in OF_A_SIDE.items()}
    if not isinstance(card, dict) or set(card) != set(wanted):
        raise Damaged(f"{path} 缺了几项，或者多了几项")
    wrong = [name for name, is_right in wanted.items() if not is_right(card[name])]
    wrong = wrong or [problem for side in SIDES if (problem := _odd(card, side))]
    if wrong or card["lost_characters"] > card["characters"]:
        raise Damaged(f"{path} 里的 {'、'.join(wrong[:5]) or 'lost_characters'} 不对")


def _odd(card: dict, side: str) -> str:
    """一边的几项哪里说不通；都说得通是空的。字数是除数，不能是零。"""
    n = {name: card[f"{side}_{name}"] for name in OF_A_SIDE}
    if not 1 <= n["documents"] <= n["tokens"] or n["targets"] > n["tokens"]:
        return f"{side}_tokens"
    if not 0 <= n["lost"] <= n["characters"] or not n["characters"]:
        return f"{side}_characters"
    if len(n["blocks"]) != -(-2 * n["tokens"] // BLOCK):
        return f"{side}_blocks"
    return ""
