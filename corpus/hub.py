"""ModelScope 上的一个数据集：列出它的文件，不轻信。

    address      它在哪里（MODELSCOPE_ENDPOINT 可以改）
    list_files   数据集 -> {文件名: 列表里写的}
    remote       列表里写的 -> Remote：大小与 sha256，看不懂就说
    file_url     一个文件的网址

列表是别人写的：多长、几页、多久都有上限；写不成文件名的，不列。
"""

import json
import os
import re
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from config import UserError
from corpus.wire import Dropped, get
from settings.say import clean

PAGE, PAGES = 200, 50  # 一页几个文件，至多几页
PAGE_BYTES = 4 << 20  # 一页至多多少字节；真的不到 0.1 MB
SECONDS = 120.0  # 一页至多等几秒
LARGEST = 2**62  # 一个文件至多多少字节：再大的，哪个文件系统也装不下


class Remote(NamedTuple):
    """列表里的一个文件。"""

    path: str
    size: int | None  # 字节；没有公布的是 None
    sha256: str | None  # 小写的十六进制；没有公布的是 None


def address() -> str:
    """ModelScope 的网址。Raises UserError：环境变量里写的不是网址。"""
    found = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
    try:
        good = urlsplit(found).scheme in ("http", "https") and urlsplit(found).hostname
    except ValueError:
        good = False
    if not good:
        raise UserError(f"MODELSCOPE_ENDPOINT 是 {found!r}，应是 https:// 开头的网址；请改正")
    return found.rstrip("/")


def file_url(endpoint: str, dataset: str, path: str) -> str:
    """一个文件的网址。"""
    query = urlencode({"Revision": "master", "FilePath": path})
    return f"{endpoint}/api/v1/datasets/{quote(dataset)}/repo?{query}"


def list_files(session, endpoint: str, dataset: str, wanted: str) -> dict[str, dict]:
    """数据集 -> {文件名: 列表里写的}；找到 wanted 就不再翻页。

    Raises:
        UserError: 连不上，没有这个数据集，或者回答的不是列表。
    """
    found: dict[str, dict] = {}
    for number in range(1, PAGES + 1):
        entries = read_page(session, endpoint, dataset, number)
        before = len(found)
        for entry in entries:
            path = entry.get("Path", entry.get("Name"))
            if entry.get("Type") != "tree" and is_file_name(path):
                found.setdefault(path, entry)
        last = len(entries) < PAGE or len(found) == before  # 后一种：翻来翻去都是同一页
        if last or wanted in found:
            return found
    raise UserError(
        f"数据集 {dataset} 列了 {PAGES} 页还没有列完，也没有 {wanted}；请用 --file 指定另一个文件"
    )


def read_page(session, endpoint: str, dataset: str, number: int) -> list[dict]:
    """列表的一页。"""
    query = {"Revision": "master", "Recursive": "True", "PageNumber": number, "PageSize": PAGE}
    url = f"{endpoint}/api/v1/datasets/{quote(dataset)}/repo/tree?{urlencode(query)}"
    text = bytearray()
    try:
        with get(session, url, {}, decode=True, within=SECONDS) as answer:
            if answer.status == 404:
                raise UserError(f"{endpoint} 上没有数据集 {dataset}，或者它不公开；"
                                "请到网页上确认它还在")  # fmt: skip
            for block in answer.blocks:
                text += block
                if len(text) > PAGE_BYTES:
                    raise UserError(f"{endpoint} 列出的文件有 {PAGE_BYTES >> 20} MB 还没有完，"
                                    "不像文件的列表；请稍后再试")  # fmt: skip
    except Dropped as error:
        raise UserError(
            f"连不上 {endpoint}，或者连接中途断开（{error}）；请检查网络与代理，再次运行同一条命令"
        ) from error
    if answer.status != 200:
        raise UserError(f"{endpoint} 没有列出文件（HTTP {answer.status}）；请稍后再试")
    return entries_of(bytes(text), endpoint)


def entries_of(text: bytes, endpoint: str) -> list[dict]:
    """一页的内容 -> 列表里的一项项。Raises UserError：不是列表。"""
    try:
        body = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        html = text[:2000].lstrip().lower().startswith((b"<!doctype html", b"<html"))
        what = "是网页（HTML）" if html else "不是 JSON"
        raise UserError(
            f"{endpoint} 的回答{what}，不是文件的列表；多半要先登录网络或代理，请稍后再试"
        ) from error
    if isinstance(body, dict) and body.get("Code", 200) not in (200, "200", None):
        raise UserError(f"{endpoint} 没有列出文件（{shown(body.get('Message'))}）；请稍后再试")
    data = body.get("Data") if isinstance(body, dict) else None
    entries = data.get("Files") if isinstance(data, dict) else data
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UserError(f"{endpoint} 的回答里没有文件的列表；请稍后再试，或检查代理")
    return entries


def is_file_name(path: Any) -> bool:
    """写得成一个相对的文件名：没有控制字符，不指到别处，不太长。"""
    if not isinstance(path, str) or not 0 < len(path) <= 500 or clean(path) != path:
        return False
    try:
        pieces = path.encode("utf-8").split(b"/")
    except UnicodeEncodeError:
        return False
    bad = {b"", b".", b".."}
    return not bad & {*pieces} and not re.search(r"[\\:\n\t]", path) and max(map(len, pieces)) < 200


def remote(path: str, entry: dict) -> Remote:
    """列表里写的 -> `Remote`。大小写着 0 的，与没有写一样：它也用来表示不知道。

    Raises:
        UserError: 写的大小或 sha256 看不懂。
    """
    size, sha256 = entry.get("Size"), entry.get("Sha256")
    if size is not None and not (type(size) is int and 0 <= size <= LARGEST):
        raise UserError(f"列表里 {path} 的大小写着 {shown(size)}，看不懂；不下载，请到网页上核对")
    if sha256 and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-fA-F]{64}", sha256)):
        raise UserError(
            f"列表里 {path} 的 sha256 写着 {shown(sha256)}，看不懂；不下载，请到网页上核对"
        )
    return Remote(path, size or None, sha256.lower() if sha256 else None)


def shown(value: Any) -> str:
    """服务器写的，说给人看：一行，不太长。"""
    if not isinstance(value, str):  # 嵌套得很深的，连 repr 也写不出来
        simple = value is None or isinstance(value, int | float)
        value = f"{value!r}"[:40] if simple else type(value).__name__
    text = clean(" ".join(value[:400].split()))
    return text if len(text) <= 60 else text[:60] + "……"
