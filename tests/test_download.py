"""download.py 从头到尾：真的 ModelScope 客户端，对着本机上的一个小服务器，不碰外面的网络。

每个测试都像用户那样，在一个空目录里运行 python download.py …；服务器回答的正是客户端
会问的三种请求：文件列表（repo/tree）、文件（repo，像真的服务器那样转到存储地址）和内容。
"""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

pytest.importorskip("modelscope_hub", reason="没有安装 modelscope_hub")

SCRIPT = Path(__file__).resolve().parent.parent / "download.py"
WIKI = "wiki_zh_texts_filtered.json"
DATASETS = {"wiki": "ngxc11/mini-llm-dataset", "sft": "gongjy/minimind_dataset"}
CONTENT = bytes(range(256)) * 4000  # 约 1 MB：不止一次读取，又不费时间
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
    if code == 2:  # 只有一句话，不夹着客户端的英文日志
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
    assert hub.ranges == [None, f"bytes={SIZE // 2}-"]
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
    assert "只核对了大小" in out
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="这个系统没有 /dev/full")
def test_disk_that_fills_up_during_the_download(hub, tmp_path):
    (tmp_path / "data").mkdir()
    # 客户端写到这个名字的文件里；/dev/full 对每次写入都说“没有空间了”。
    (tmp_path / "data" / f"{WIKI}.incomplete").symlink_to("/dev/full")
    _, err = run(tmp_path, hub.url, "wiki", code=2)
    assert "写不进 data" in err and "腾出空间" in err
    assert hub.ranges == [None]  # 没有空间，重试也没有用
    assert not (tmp_path / "data" / WIKI).exists()


def test_corrupted_download_is_not_left_as_finished(hub, tmp_path):
    hub.files = [published(WIKI, sha256="0" * 64)]
    _, err = run(tmp_path, hub.url, "wiki", code=2)
    assert "sha256 不符" in err and DATASETS["wiki"] in err
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
