"""ModelScope 的官方客户端，与它从服务器得来的：列表不轻信，出的错说成一句话。

    client        客户端（听 MODELSCOPE_ENDPOINT 的）
    list_files    数据集 -> {文件名: Remote}
    fetch_file    下载一个文件
    plain_errors  客户端与网络的异常 -> UserError

列表是别人写的：多长、几页、多久都有上限（corpus/wire.py）；写不成文件名的，不列。
"""

import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError
from corpus.wire import Limits, watched
from settings.say import brief, clean

LISTING = 8 << 20  # 列表至多多少字节；真的不到 0.1 MB
SECONDS = 120.0  # 列表至多等多久
LARGEST = 2**62  # 一个文件至多多少字节：再大的，哪个文件系统也装不下
ADDRESS = r"https?://(\[[0-9a-f:.]+\]|[^\s/:@\[\]]+)(:\d{1,5})?(/\S*)?"


class Remote(NamedTuple):
    """列表里的一个文件。"""

    path: str
    size: int | None  # 字节；没有公布的是 None
    sha256: str | None  # 小写的十六进制；没有公布的是 None


def client():
    """官方的客户端，与它要去的网址。Raises UserError：环境变量里写的不是网址。"""
    # 几路同时下载的各写各的文件，名字另起；一路就够快，也只有一个名字要看住。
    os.environ["MODELSCOPE_DOWNLOAD_PARALLEL_WORKERS"] = "1"
    from modelscope_hub import HubApi, HubConfig  # 用到才导入，--help 不必等它

    for name in ("modelscope_hub", "urllib3"):  # 它们的日志里有服务器写的字，出了事我们自己说
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    written = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
    if not re.fullmatch(ADDRESS, HubConfig.normalize_endpoint(written), re.IGNORECASE):
        raise UserError(f"MODELSCOPE_ENDPOINT 是 {written!r}，应是 https:// 开头的网址；请改正")
    config = HubConfig()
    return HubApi(config), config.endpoint


def list_files(api, endpoint: str, dataset: str) -> dict[str, Any]:
    """数据集 -> {文件名: 客户端读出来的一项}；目录与写不成文件名的不算。

    Raises:
        UserError: 连不上，没有这个数据集，或者回答的不是列表。
    """
    limits = Limits(LISTING, f"{endpoint} 列出的文件有 {LISTING >> 20} MB 还没有完，"
                    "不像文件的列表；请稍后再试", False, SECONDS)  # fmt: skip
    missing = f"{endpoint} 上没有数据集 {dataset}，或者它不公开；请到网页上确认它还在"
    try:
        with plain_errors(endpoint, missing):
            found = watched(lambda: api.list_repo_files(dataset, "dataset"), endpoint, limits)
    except UserError:
        raise
    # 客户端照着好的列表去读，读坏的什么都抛得出来；这里不写磁盘，OSError 也只能来自一个坏的日期。
    except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError,
            OSError) as error:  # fmt: skip
        raise not_a_listing(endpoint) from error
    return {i.path: i for i in found if i.type != "tree" and is_file_name(i.path)}


def not_a_listing(endpoint: str) -> UserError:
    return UserError(
        f"{endpoint} 的回答看不懂，不是文件的列表（也许是网页）；多半要先登录网络或代理，请稍后再试"
    )


def fetch_file(api, endpoint: str, dataset: str, file: Remote, folder: Path, limits: Limits):
    """下载到 folder/file.path；断点续传、重试、进度条、大小与 sha256 的核对都由客户端做。"""
    published = {"file_size": file.size, "expected_sha256": file.sha256}
    missing = "服务器不给这个文件（HTTP 404）；请到网页上确认它还在、并且公开"
    with plain_errors(endpoint, missing):
        watched(
            lambda: api.download_file(dataset, "dataset", file.path, local_dir=folder, **published),
            endpoint,
            limits,
        )


@contextmanager
def plain_errors(endpoint: str, missing: str):
    """把客户端与网络的异常换成 UserError；磁盘的错、程序自己的错照常抛出。"""
    import requests
    from modelscope_hub import errors
    from urllib3.exceptions import HTTPError

    # 顺序要紧：NetworkError 和 RequestException 也是 OSError，具体的必须排在前面。
    try:
        yield
    except errors.NotExistError as error:
        raise UserError(missing) from error
    except errors.FileIntegrityError as error:
        raise UserError(
            "下载到的内容与公布的大小或 sha256 不符，已经删除；请稍后再次运行同一条命令"
        ) from error
    except requests.JSONDecodeError as error:
        raise not_a_listing(endpoint) from error
    except (errors.NetworkError, requests.RequestException, HTTPError) as error:
        cause = error.__cause__
        network = errors.HubError | requests.RequestException
        if isinstance(cause, OSError) and not isinstance(cause, network):
            raise cause from None  # 客户端也重试写磁盘的错（例如超出配额），再当作网络的错抛出
        raise UserError(
            f"连不上 {endpoint}，或者连接中途断开；请检查网络与代理，再次运行同一条命令会接着下载"
        ) from error
    except errors.HubError as error:
        raise UserError(
            f"{endpoint} 没有完成请求（{brief(error.message, 60)}）；请稍后再次运行同一条命令"
        ) from error


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


def remote(path: str, info: Any) -> Remote:
    """客户端读出来的一项 -> `Remote`。大小写着 0 的，与没有写一样：它也用来表示不知道。

    Raises:
        UserError: 写的大小或 sha256 看不懂。
    """
    size, sha256 = info.size, info.sha256
    if not 0 <= size <= LARGEST:
        raise UserError(
            f"列表里 {path} 的大小写着 {brief(size, 60)}，看不懂；不下载，请到网页上核对"
        )
    if sha256 and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-fA-F]{64}", sha256)):
        raise UserError(
            f"列表里 {path} 的 sha256 写着 {brief(sha256, 60)}，看不懂；不下载，请到网页上核对"
        )
    return Remote(path, size or None, sha256.lower() if sha256 else None)
