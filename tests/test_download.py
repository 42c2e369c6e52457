"""download.py 从头到尾：真的 ModelScope 客户端，对着本机上的一个小服务器，不碰外面的网络。

前一半像用户那样，在一个空目录里运行 python download.py …；服务器回答的正是客户端
会问的三种请求：文件列表（repo/tree）、文件（repo，像真的服务器那样转到存储地址）和内容。
后一半在测试的进程里，服务器什么都做得出来：骗人、装死、没完没了。
"""

import contextlib
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
import urllib3
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter

import download
from config import UserError
from corpus import hub as hub_module
from corpus import wire
from settings.say import clean

pytest.importorskip("modelscope_hub", reason="没有安装 modelscope_hub")

from modelscope_hub import _download as client
from modelscope_hub import _legacy_api as tree

SCRIPT = Path(__file__).resolve().parent.parent / "download.py"
WIKI = "wiki_zh_texts_filtered.json"
DATASETS = {"wiki": "ngxc11/mini-llm-dataset", "sft": "gongjy/minimind_dataset"}
LINE = json.dumps({"text": "守株待兔，是一个成语。"}).encode() + b"\n"
CONTENT = (LINE * 20_000)[:1_024_000]  # 约 1 MB：不止一次读取，又不费时间
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """服务器：self.server 上的 files 是它公布的，ranges 记下每次取内容时的 Range。"""

    def do_GET(self):
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        repo = f"/api/v1/datasets/{self.server.dataset}/repo"
        if url.path == repo + "/tree" and query["PageNumber"] == "1":
            self.reply(200, {"Code": 200, "Data": {"Files": self.server.files}})
        elif url.path == repo:
            self.send_response(302)
            self.send_header("Location", "/storage/" + query["FilePath"])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif url.path.startswith("/storage/"):
            self.send_content()
        else:
            self.reply(404, {"Code": 10010205001, "Message": "数据集不存在"})

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_content(self):
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(SIZE - start))
        if asked:
            span = f"bytes {start}-{SIZE - 1}/{SIZE}"
            self.send_header("Content-Range", span)
        self.end_headers()
        if self.server.trouble and not asked:  # 只在第一次出事：给一半，然后断开或停住
            self.wfile.write(CONTENT[: SIZE // 2])
            if self.server.trouble == "stall":
                self.server.release.wait(30)
            self.close_connection = True
        else:
            self.wfile.write(CONTENT[start:])

    def log_message(self, *args):
        pass


def published(path, size=SIZE, sha256=SHA256):
    return {"Path": path, "Name": path, "Type": "blob", "Size": size, "Sha256": sha256}


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.dataset = DATASETS["wiki"]
    server.files = [published(WIKI)]
    server.ranges, server.trouble, server.release = [], None, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def start(where, endpoint, *args):
    """在 where 里运行 download.py；家目录和缓存也都在 where 里。"""
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env = {k: v for k, v in env.items() if not k.startswith("MODELSCOPE")}
    env |= {
        "MODELSCOPE_ENDPOINT": endpoint,
        "MODELSCOPE_CACHE": str(where / "cache"),
        "MODELSCOPE_HOME": str(where / "home"),
        "HOME": str(where / "home"),
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, str(SCRIPT), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=where, env=env, **pipes)


def run(where, endpoint, *args, code):
    """运行到底，核对退出码，返回 (stdout, stderr)。"""
    process = start(where, endpoint, *args)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    if code == 2:  # 只有一句话，不夹着别的
        lines = [line for line in re.split(r"[\r\n]", err) if line.strip() and "%|" not in line]
        assert len(lines) == 1 and lines[0].startswith("错误："), err
    return out, err


@pytest.fixture(scope="module")
def no_network(tmp_path_factory):
    """地址，与一次连不上的下载：客户端重试要好几秒，在旁边等着，到最后才看。"""
    with socket.socket() as s, ThreadPoolExecutor(1) as pool:
        s.bind(("127.0.0.1", 0))  # 占着，但不听：那里没有人应答
        endpoint = f"http://127.0.0.1:{s.getsockname()[1]}"
        began, where = time.monotonic(), tmp_path_factory.mktemp("no_network")

        def attempt():
            return run(where, endpoint, "wiki", code=2), time.monotonic() - began

        yield endpoint, pool.submit(attempt)


@pytest.mark.usefixtures("no_network")  # 现在就开始
def test_whole_download_then_nothing_is_fetched_again(hub, tmp_path):
    out, err = run(tmp_path, hub.url, "wiki", code=0)
    assert (tmp_path / "data" / WIKI).read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "data").iterdir()] == [WIKI]
    assert "1.02 MB" in out and "磁盘剩余" in out
    assert out.splitlines()[-1].strip() == f"python pre_train.py --data data/{WIKI}"
    assert f"{WIKI}:   0%|" in err  # 进度条

    again, _ = run(tmp_path, hub.url, "wiki", code=0)
    assert "不必再下载" in again and again.splitlines()[-1] == out.splitlines()[-1]
    assert hub.ranges == [None]


def test_broken_connection_is_resumed_within_the_run(hub, tmp_path):
    hub.trouble = "break"
    run(tmp_path, hub.url, "wiki", code=0)
    first, resumed = hub.ranges
    assert first is None and SIZE // 2 - 2**15 < int(resumed[6:-1]) <= SIZE // 2
    assert (tmp_path / "data" / WIKI).read_bytes() == CONTENT


@pytest.mark.skipif(os.name == "nt", reason="Windows 没有可以发给子进程的 SIGINT")
def test_ctrl_c_keeps_what_was_downloaded(hub, tmp_path):
    hub.trouble = "stall"
    # 后台任务会忽略 SIGINT，并传给子进程；先恢复默认，发出的 Ctrl-C 才有效。
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(tmp_path, hub.url, "wiki")
    finally:
        signal.signal(signal.SIGINT, before)
    data, deadline = tmp_path / "data", time.monotonic() + 30
    while not data.exists() or sum(p.stat().st_size for p in data.iterdir()) < SIZE // 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "接着下载" in err and "Traceback" not in err
    assert not (data / WIKI).exists()

    out, _ = run(tmp_path, hub.url, "wiki", code=0)
    resumed_at = int(re.fullmatch(r"bytes=(\d+)-", hub.ranges[-1])[1])
    assert len(hub.ranges) == 2 and resumed_at >= SIZE // 4
    assert "上次已经下载" in out
    assert (data / WIKI).read_bytes() == CONTENT


def test_unknown_file_lists_what_exists(hub, tmp_path):
    hub.dataset = DATASETS["sft"]
    hub.files = [published("sft_t2t_mini.jsonl"), published("dpo.jsonl", size=55_000_000)]
    _, err = run(tmp_path, hub.url, "sft", "--file", "sft_mini.jsonl", code=2)
    assert "没有文件 sft_mini.jsonl，最接近的是 sft_t2t_mini.jsonl" in err
    assert "dpo.jsonl（55 MB）" in err
    assert hub.ranges == []


def test_chosen_file_of_the_sft_dataset(hub, tmp_path):
    hub.dataset, hub.files = DATASETS["sft"], [published("a.jsonl", sha256=None)]
    out, _ = run(tmp_path, hub.url, "sft", "--file", "a.jsonl", "--data_dir", "my data", code=0)
    assert (tmp_path / "my data" / "a.jsonl").read_bytes() == CONTENT
    assert "没有公布 sha256，只核对了大小；看开头像是 jsonl" in out
    assert out.splitlines()[-1].strip() == "python sft_train.py --sft_data 'my data/a.jsonl'"


def test_missing_dataset(hub, tmp_path):
    hub.dataset = "somebody/else"
    _, err = run(tmp_path, hub.url, "wiki", code=2)
    assert f"没有数据集 {DATASETS['wiki']}" in err


def test_file_larger_than_the_disk_is_refused_beforehand(hub, tmp_path):
    hub.files = [published(WIKI, size=10**18)]
    _, err = run(tmp_path, hub.url, "wiki", code=2)
    assert "磁盘空间不够" in err and "1000000000.0 GB" in err and "--data_dir" in err
    assert hub.ranges == []


def test_corrupted_download_is_not_left_as_finished(hub, tmp_path):
    hub.files = [published(WIKI, sha256="0" * 64)]
    _, err = run(tmp_path, hub.url, "wiki", code=2)
    assert "sha256 不符，已经删除" in err
    assert list((tmp_path / "data").iterdir()) == []


def test_a_different_file_of_the_user_is_never_overwritten(hub, tmp_path):
    (tmp_path / "data").mkdir()
    mine = tmp_path / "data" / WIKI
    mine.write_bytes(CONTENT[::-1])  # 大小相同，内容不同
    _, err = run(tmp_path, hub.url, "wiki", code=2)
    assert "与公布的文件不同" in err and "移走" in err
    assert mine.read_bytes() == CONTENT[::-1] and hub.ranges == []


def test_no_network_is_reported_within_seconds(no_network):
    endpoint, future = no_network
    (_, err), seconds = future.result()
    assert f"连不上 {endpoint}" in err
    assert seconds < 20


# ---------- 2. 骗人的、没完没了的、装死的服务器 ----------
# 从这里起在测试的进程里：会话是真的，网线换成一个函数，它什么都答得出来。

MB = 1 << 20


class Endless(io.RawIOBase):
    """没有尽头的内容；数着被读走了多少。"""

    def __init__(self, block=b"0" * 65536):
        self.block, self.taken = block, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        n = min(len(buffer), len(self.block))
        buffer[:n] = self.block[:n]
        self.taken += n
        return n


class Wires:
    """网线的另一头：answer(网址, 头) -> (状态, 头, 内容)。"""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def send(self, adapter, request):
        self.asked.append((request.url, dict(request.headers)))
        status, headers, body = self.answer(request.url, request.headers)
        body = io.BytesIO(body) if isinstance(body, bytes) else io.BufferedReader(body)
        raw = urllib3.HTTPResponse(body, headers, status, preload_content=False)
        return adapter.build_response(request, raw)


def connect(patch, where, answer) -> Wires:
    """把网线换成 answer；客户端照旧，只是不必真的等着重试。家目录与缓存都在 where 里。"""
    made = Wires(answer)
    patch.setattr(HTTPAdapter, "send", lambda adapter, request, **_: made.send(adapter, request))
    patch.setattr(client, "DOWNLOAD_RETRY_MAX_DELAY_SECONDS", 0)
    patch.setattr(client, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
    patch.setattr(tree, "REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS", 0)
    patch.setenv("MODELSCOPE_HOME", str(where / "home"))
    patch.setenv("MODELSCOPE_CACHE", str(where / "cache"))
    return made


def listing(*files):
    return json.dumps({"Code": 200, "Data": {"Files": list(files)}}).encode()


def of(tree, content=None):
    """列表答 tree，内容答 content；写成字节的，就是 200 与它的长度。"""

    def whole(answer):
        return (200, {"Content-Length": str(len(answer))}, answer)

    def answer(url, headers):
        if "internalAcceleration" in url:  # 客户端问问自己是不是在云上
            return (404, {}, b"")
        given = tree if "/repo/tree" in url else content
        given = given(url, headers) if callable(given) else given
        return whole(given) if isinstance(given, bytes) else given

    return answer


@pytest.fixture
def wires(monkeypatch, tmp_path_factory, tmp_path):
    """wires(answer) 接上网线，返回它；当前目录是空的。"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://hub")
    home = tmp_path_factory.mktemp("home")
    return lambda answer: connect(monkeypatch, home, answer)


def attempt(name=WIKI):
    return download.download(DATASETS["wiki"], name, Path("data"))


def refused(name=WIKI) -> str:
    """不下载，一句话，只有一行，也没有控制字符；返回那句话。"""
    with pytest.raises(UserError) as error:
        attempt(name)
    said = str(error.value)
    assert "\n" not in said and clean(said) == said
    return said


def left() -> list[str]:
    """data/ 里剩下什么。"""
    return sorted(p.name for p in Path("data").iterdir()) if Path("data").exists() else []


UNKNOWN = published(WIKI, size=0, sha256=None)
PAGE = b"<html>hello, log in</html>"


def test_a_web_page_is_not_data(wires):
    """没有公布大小与 sha256 的，从前 26 字节的网页也「下载完成……只核对了大小」。"""
    wires(of(listing(UNKNOWN), PAGE))
    assert "是网页（HTML），不是数据" in refused()
    assert left() == []


@pytest.mark.parametrize(
    ("size", "sum_", "said"),
    [(SIZE, SHA256, "大小与 sha256 无误"), (0, SHA256, "下载完成，sha256 无误"),
     (SIZE, None, "没有公布 sha256，只核对了大小；看开头像是 jsonl"),
     (0, None, "也没有公布大小，内容对不对无从核对；看开头像是 jsonl")],
)  # fmt: skip
def test_it_says_what_was_checked(wires, capsys, size, sum_, said):
    wires(of(listing(published(WIKI, size, sum_)), CONTENT))
    assert attempt().read_bytes() == CONTENT
    assert said in capsys.readouterr().out
    attempt()
    again = capsys.readouterr().out
    assert ("文件完整" in again) == (sum_ is not None)
    assert ("无从核对" in again) == (size == 0 and sum_ is None)


def test_an_endless_body_stops_where_the_disk_would_be_full(wires, monkeypatch):
    """没有公布大小的，磁盘上总要留下一些。"""
    body = Endless()
    wires(of(listing(UNKNOWN), lambda *_: (200, {}, body)))
    free = shutil.disk_usage(".")._replace(free=download.RESERVE + 5 * MB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert "没有公布大小，收到 5242880 字节还没有完" in refused()
    assert body.taken < 7 * MB and left() == []


def test_a_full_disk_is_not_tried_again(wires, monkeypatch):
    """写到一半没有地方了：收到的留着，腾出空间再来。超出配额的，客户端也要重试，说的也是磁盘。"""
    for number in (errno.ENOSPC, errno.EDQUOT):
        made = wires(of(listing(published(WIKI)), CONTENT))

        def full(path, mode="r", number=number):
            raise OSError(number, "no room", str(path))

        monkeypatch.setattr(client, "open", full, raising=False)
        said = refused()
        assert "写不进 data" in said and "no room" in said and "腾出空间" in said
        if number == errno.ENOSPC:
            assert len([url for url, _ in made.asked if "FilePath" in url]) == 1
    assert WIKI not in left()


@pytest.mark.parametrize("announce", [False, True])
def test_a_body_longer_than_published_stops_at_once(wires, announce):
    body = Endless()
    headers = {"Content-Length": str(10**15)} if announce else {}
    wires(of(listing(published(WIKI)), lambda *_: (200, headers, body)))
    said = "比公布的 1024000 字节还多" if announce else "与公布的大小或 sha256 不符，已经删除"
    assert said in refused()
    assert body.taken < 2 * SIZE + MB and left() == []  # 客户端再试一次


def test_a_body_that_breaks_off_keeps_what_came(wires):
    """还没有完就断了：一句话，收到的留着，下次接着。"""

    def body(url, headers):
        if "Range" in headers:
            return (503, {}, b"")
        return (200, {"Content-Length": str(SIZE)}, CONTENT[:100_000])

    made = wires(of(listing(published(WIKI)), body))
    assert "再次运行同一条命令" in refused()
    assert len(made.asked) <= 2 + client.DOWNLOAD_RETRY_TIMES + 1
    assert left() == [WIKI + ".incomplete"]

    def rest(url, headers):
        start = int(headers["Range"][6:-1])
        span = {"Content-Range": f"bytes {start}-{SIZE - 1}/{SIZE}"}
        return (206, span, CONTENT[start:])

    wires(of(listing(published(WIKI)), rest))
    assert attempt().read_bytes() == CONTENT


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "1000"}])
def test_a_whole_body_that_is_too_short_is_refused(wires, headers):
    wires(of(listing(published(WIKI)), lambda *_: (200, headers, CONTENT[:1000])))
    assert "与公布的大小或 sha256 不符" in refused() and left() == []


def test_two_halves_of_different_files_are_not_joined(wires):
    """没有公布 sha256 的：上次留下的不接；同一次里断了，ETag 变了的也不接。"""
    Path("data").mkdir()
    Path("data", WIKI + ".incomplete").write_bytes(b"X" * 1000)
    later = ['"a"']

    def body(url, headers):
        if "Range" not in headers:
            return (200, {"ETag": '"a"', "Content-Length": str(SIZE)}, CONTENT[:100_000])
        start = int(headers["Range"][6:-1])
        span = {"Content-Range": f"bytes {start}-{SIZE - 1}/{SIZE}", "ETag": later[0]}
        return (206, span, CONTENT[start:])

    wires(of(listing(published(WIKI, sha256=None)), body))
    assert attempt().read_bytes() == CONTENT
    Path("data", WIKI).unlink()
    later[0] = '"b"'
    assert "服务器上的文件换了" in refused() and left() == []


@pytest.mark.parametrize(
    ("headers", "body"),
    [({"Content-Range": "bytes 5-9/10"}, b"12345"), ({}, CONTENT), ({"Content-Range": "x"}, b"")],
)
def test_a_part_that_was_not_asked_for_is_not_joined(wires, headers, body):
    wires(of(listing(published(WIKI)), lambda *_: (206, headers, body)))
    assert "再次运行" in refused()
    assert left() == []


def test_compressed_content_cannot_be_compared(wires):
    gz = gzip.compress(CONTENT)
    wires(of(listing(published(WIKI)), lambda *_: (200, {"Content-Encoding": "gzip"}, gz)))
    assert "另外压缩过" in refused()


# ---------- 3. 列表 ----------

BOMB = gzip.compress(b" " * (60 * MB))
NOT_A_LISTING = "的回答看不懂，不是文件的列表"
LISTINGS = {
    "网页": (PAGE, NOT_A_LISTING),
    "空的": (b"", NOT_A_LISTING),
    "别的编码": ("[]".encode("utf-16"), NOT_A_LISTING),
    "嵌套": (b"[" * 10**6, NOT_A_LISTING),
    "整数太长": (b'{"Data":' + b"9" * 5000 + b"}", NOT_A_LISTING),
    "数组": (b"[]", NOT_A_LISTING),
    "数": (b"1", NOT_A_LISTING),
    "列表里是数": (b'{"Data":{"Files":[1]}}', NOT_A_LISTING),
    "没有文件": (listing(), "没有列出任何文件"),
    "出错": (b'{"Code":500,"Message":"\\u001b[2Jno\\nway"}', "没有列出任何文件"),
    "出错的话": (lambda *_: (400, {}, b'{"Message":"\\u001b[2Jno\\nway"}'), "（\\x1b[2Jno way）"),
    "话太长": (lambda *_: (400, {}, b'{"Message":"' + b"x" * 10**6 + b'"}'), "……）"),
    "话不是话": (lambda *_: (400, {}, b'{"Message":[[]]}'), NOT_A_LISTING),
    "名字太长": (listing(published("x" * 10**6)), "没有列出任何文件"),
    "名字是列表": (listing(published([])), "没有列出任何文件"),
    "日期太远": (listing(published(WIKI) | {"CommittedDate": 10**17}), ""),
    "大小是字": (listing(published(WIKI, size="1 MB")), NOT_A_LISTING),
    "大小是负的": (listing(published(WIKI, size=-1)), "的大小写着 -1，看不懂"),
    "大小是 NaN": (listing(published(WIKI, size=float("nan"))), NOT_A_LISTING),
    "大小没有边": (listing(published(WIKI, size=float("inf"))), NOT_A_LISTING),
    "大小太大": (listing(published(WIKI, size=10**30)), "看不懂"),
    "大小是列表": (listing(published(WIKI, size=[[]])), NOT_A_LISTING),
    "和不是和": (listing(published(WIKI, sha256="zz")), "的 sha256 写着 zz，看不懂"),
    "和是数": (listing(published(WIKI, sha256=7)), "的 sha256 写着 7，看不懂"),
    "炸弹": (lambda *_: (200, {"Content-Encoding": "gzip"}, BOMB), "8 MB 还没有完"),
    "坏的压缩": (lambda *_: (200, {"Content-Encoding": "gzip"}, b"x" * 99), "连不上"),
    "没完没了": (lambda *_: (200, {}, Endless()), "8 MB 还没有完"),
    "没有权限": (lambda *_: (403, {}, b""), "HTTP 403"),
    "出错没完": (lambda *_: (403, {}, Endless()), ""),
    "转来转去": (lambda *_: (302, {"Location": "/x/repo/tree"}, b""), "转来转去"),
    "转到文件": (lambda *_: (302, {"Location": "file:///etc/passwd"}, b""), "只能是 http 或"),
    "转到坏的": (lambda *_: (302, {"Location": "http://[::1"}, b""), "只能是 http 或"),
    "转的坏了": (lambda *_: (301, {"Content-Length": "0", "Location": "0"}, PAGE), "连不上"),
    "转的没完": (lambda *_: (302, {"Location": "/x"}, Endless()), "8 MB 还没有完"),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_a_bad_listing_is_one_sentence(kind, wires):
    tree, said = LISTINGS[kind]
    wires(of(tree, b""))
    tracemalloc.start()
    assert said in refused()
    assert tracemalloc.get_traced_memory()[1] < 100 * MB
    tracemalloc.stop()
    assert left() == []


BAD_NAMES = ["../x", "/tmp/x", "a/../../x", "..", "a//b", "C:\\x", "a\0b", "a\x1b[2J", "\ud800",
             "a\nb"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_the_server_cannot_choose_where_to_write(name, wires):
    """写着 ../ 的、有控制字符的，当作没有列出；列表里的文字也不送到终端去。"""
    wires(of(listing(published(name), published("good.jsonl")), b""))
    with pytest.raises(UserError, match="没有文件"):
        attempt(name)
    assert name not in refused("good").replace("good.jsonl", "")
    assert left() == []


def test_an_endless_listing_ends(wires):
    """一页又一页：数得着，也停得下。"""
    count = itertools.count()

    def page(*_):
        return listing(*[published(f"f{next(count)}", size=0, sha256=None) for _ in range(200)])

    made = wires(of(page, b""))
    assert "200 次还没有完" in refused() and len(made.asked) == wire.REQUESTS


def test_a_file_on_the_second_page_is_found(wires):
    first = listing(*[published(f"f{n}") for n in range(200)])
    wires(of(lambda url, _: first if "PageNumber=1&" in url else listing(published(WIKI)), CONTENT))
    assert attempt().read_bytes() == CONTENT


@pytest.mark.parametrize("address", ["ftp://x", "http://[", "file:///etc", "a b"])
def test_a_bad_address_is_named(wires, monkeypatch, address):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
    assert "MODELSCOPE_ENDPOINT 是" in refused()


def test_https_is_not_left_and_nothing_secret_is_sent(wires, monkeypatch, tmp_path):
    """内容存在别的主机上，可以转过去；但不可以从 https 转到 http，也不把登录的带到别的主机去。"""
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "my-token")
    (tmp_path / "netrc").write_text("default login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "https://hub")

    def move(where):
        return lambda url, _: (
            CONTENT if "storage" in url else (302, {"Location": where, "Set-Cookie": "a=b"}, b"")
        )

    made = wires(of(listing(published(WIKI)), move("https://storage/x?sign=1")))
    attempt()
    assert made.asked[-1][0] == "https://storage/x?sign=1"
    assert not {"Authorization", "Cookie"} & {*made.asked[-1][1]}
    assert "secret" not in str(made.asked) and "Basic" not in str(made.asked)
    shutil.rmtree("data")
    wires(of(listing(published(WIKI)), move("http://storage/x")))
    assert "转到了 'http://storage/x'，只能是 https 的网址" in refused()


# ---------- 4. 装死的 ----------


def drip(pieces, seconds):
    """一点一点地给。"""
    for piece in pieces:
        time.sleep(seconds)
        yield piece


class Slow(io.RawIOBase):
    def __init__(self, pieces, seconds):
        self.pieces = drip(pieces, seconds)

    def readable(self):
        return True

    def readinto(self, buffer):
        piece = next(self.pieces, b"")
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("where", ["tree", "content"])
def test_one_byte_at_a_time_does_not_hold_it_for_ever(wires, monkeypatch, where):
    monkeypatch.setattr(wire, "PATIENCE", 0.5)

    def slow(*_):
        return 200, {}, Slow([b"x"] * 1000, 0.01)

    wires(of(slow if where == "tree" else listing(published(WIKI)), slow))
    began = time.monotonic()
    said = refused()
    assert "停住了" in said and "再次运行同一条命令会接着下载" in said
    assert time.monotonic() - began < 3


def test_slow_but_steady_is_fine(wires, monkeypatch):
    """慢，但一直有：等得比 PATIENCE 久也下得完。"""
    monkeypatch.setattr(wire, "PATIENCE", 0.3)
    pieces = [CONTENT[n : n + 16_000] for n in range(0, SIZE, 16_000)]

    def body(*_):
        return 200, {"Content-Length": str(SIZE)}, Slow(pieces, 0.0125)

    wires(of(listing(published(WIKI)), body))
    assert attempt().read_bytes() == CONTENT


def test_the_listing_has_a_time_of_its_own(wires, monkeypatch):
    monkeypatch.setattr(hub_module, "SECONDS", 0.3)
    wires(of(lambda *_: (200, {}, Slow([b" " * 4000] * 1000, 0.05)), b""))
    assert "太慢，规定的时间里没有答完" in refused()


@pytest.mark.skipif(os.name == "nt", reason="Windows 没有 SIGTERM")
def test_sigterm_is_obeyed_while_waiting(hub, tmp_path):
    hub.trouble = "stall"
    process = start(tmp_path, hub.url, "wiki")
    while not hub.ranges:
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=5)
    assert process.returncode == 143 and "Traceback" not in err


# ---------- 5. 已经在那里的 ----------


@pytest.mark.skipif(os.name == "nt", reason="Windows 没有管道文件")
@pytest.mark.parametrize("name", [WIKI, WIKI + ".incomplete"])
@pytest.mark.parametrize("what", ["link", "fifo", "folder", "hard"])
def test_what_is_not_a_plain_file_is_left_alone(wires, name, what):
    """从前 .incomplete 是链接的，写到它指的那里去；是管道的，一直等。"""
    Path("data").mkdir()
    place, mine = Path("data", name), Path("mine")
    mine.write_bytes(b"mine")
    if what == "link":
        place.symlink_to("../mine" if name != WIKI else "../nothing")
    elif what == "hard":
        os.link(mine, place)
    else:
        (os.mkfifo if what == "fifo" else os.mkdir)(place)
    wires(of(listing(published(WIKI)), CONTENT))
    assert "先把它移走" in refused()
    assert mine.read_bytes() == b"mine" and os.path.lexists(place)


def test_a_partial_file_longer_than_published_is_begun_again(wires, capsys):
    Path("data").mkdir()
    Path("data", WIKI + ".incomplete").write_bytes(CONTENT + b"more")
    made = wires(of(listing(published(WIKI)), CONTENT))
    assert attempt().read_bytes() == CONTENT
    assert "比公布的还长" in capsys.readouterr().out
    assert "Range" not in made.asked[-1][1]


def test_two_downloads_do_not_write_the_same_file(wires, monkeypatch, tmp_path_factory):
    """客户端有锁；轮不到的不会一直等。"""
    monkeypatch.setattr(wire, "PATIENCE", 0.5)
    wires(of(listing(published(WIKI)), CONTENT))
    api, _ = hub_module.client()
    lock = api.downloader._lock_path(DATASETS["wiki"], "dataset", file_path=WIKI)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        assert "多半有另一个程序正在下载它" in refused()
    time.sleep(0.3)  # 那个线程这才拿到锁，它已经什么也收不到
    assert left() == []


def test_a_link_to_the_users_own_file_is_used(wires, tmp_path):
    """数据放在别的盘上，这里是个链接：核对它，不动它。"""
    Path("data").mkdir()
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    Path("data", WIKI).symlink_to(tmp_path / "elsewhere")
    made = wires(of(listing(published(WIKI)), b""))
    assert attempt() == Path("data", WIKI) and len(made.asked) == 1


# ---------- 6. 随便什么 ----------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([WIKI, "../x", "a/b", SHA256, SIZE, 0, -1, 10**30, "tree", "\x1b]0;x"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip
field = st.sampled_from(["Path", "Name", "Type", "Size", "Sha256", "Extra"])
entries = st.dictionaries(field, json_values, max_size=6).map(
    lambda found: {"Path": WIKI, **found}
) | json_values  # fmt: skip
bodies = st.one_of(
    st.lists(entries, max_size=4).map(lambda found: listing(*found)),
    st.tuples(json_values, json_values).map(
        lambda two: json.dumps({"Code": two[0], "Data": two[1], "Message": two[1]}).encode()
    ),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=60),
    st.tuples(st.integers(0, 120), st.binary(max_size=3)).map(
        lambda cut: listing(published(WIKI))[: cut[0]] + cut[1]
    ),
)  # fmt: skip
header_values = st.sampled_from(
    ["", "0", "10", str(SIZE), "-1", "9" * 30, "x", "gzip", "identity", "bytes 0-9/10",
     f"bytes 0-{SIZE - 1}/{SIZE}", "bytes 10-19/20", "bytes */5", '"tag"', "chunked", "/x",
     "http://other/x", "file:///etc/passwd", "https://[", "//", "\xff\xfe"]
)  # fmt: skip
some_headers = st.dictionaries(
    st.sampled_from(["Content-Length", "Content-Encoding", "Content-Range", "ETag", "Location",
                     "Transfer-Encoding", "Set-Cookie"]),
    header_values, max_size=3,
)  # fmt: skip
contents = st.sampled_from([CONTENT, CONTENT[:100], CONTENT + b"x", PAGE, b"", b"\0" * 99])
statuses = st.sampled_from([200, 200, 200, 206, 206, 204, 301, 302, 400, 404, 416, 429, 500, 999])
# 公布了什么：相符的、不符的、没有的
sums = st.sampled_from([SHA256, None, "0" * 64, hashlib.sha256(PAGE).hexdigest()])
sizes = st.sampled_from([SIZE, 0, len(PAGE), 100])


def tried(answer, size=None, sum_=None) -> None:
    """下载一次：要么成了，内容与公布的相符；要么一句话。别的目录里什么也没有。"""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        connect(patch, Path(folder, "own"), answer)
        patch.setenv("MODELSCOPE_ENDPOINT", "http://hub")
        data, silence = Path(folder, "in", "data"), io.StringIO()
        try:
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                path = download.download("a/b", WIKI, data)
            content = path.read_bytes()
            assert path == data / WIKI and (not size or len(content) == size)
            assert sum_ is None or hashlib.sha256(content).hexdigest() == sum_
        except UserError as error:
            said = str(error)
            assert "\n" not in said and clean(said) == said and len(said) < 3000
            assert not (data / WIKI).exists()
        found = [p for p in Path(folder, "in").rglob("*") if p.is_file()]
        assert all(p.name in (WIKI, WIKI + ".incomplete") and p.parent == data for p in found)
        assert "\x1b]" not in silence.getvalue()


@settings(max_examples=settings().max_examples * 2)
@given(bodies, statuses, some_headers)
def test_any_listing_is_understood_or_refused(body, status, headers):
    tried(of(lambda *_: (status, headers, body), CONTENT))


@given(sizes, sums, st.lists(st.tuples(statuses, some_headers, contents), min_size=1, max_size=4))
def test_any_answer_is_checked_or_refused(size, sum_, answers):
    """几次回答各不相同；成了的，一定与公布的相符。"""
    turn = itertools.cycle(answers)
    tried(of(listing(published(WIKI, size, sum_)), lambda *_: next(turn)), size, sum_)
