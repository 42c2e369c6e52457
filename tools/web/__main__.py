"""本地的网页：聊天、显微镜、一步一步地写、比较两个模型、看训练的过程。

    pip install -r requirements-web.txt
    python -m tools.web                       打开 http://127.0.0.1:7860
    python -m tools.web --host 0.0.0.0 --auth 名字    同一个网络里知道密码的也能打开

不需要联网。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import contextlib
import ipaddress
import re
import secrets
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config import UserError, option
from settings.flags import read_options
from settings.say import say
from tools.web import actions
from tools.web.names import NAME, Names

PASSWORD = "MINI_LLM_PASSWORD"


@dataclass
class Options:
    """命令行参数。"""

    checkpoint: str | None = option(None, "打开时选中的检查点；默认是找到的第一个，微调过的优先")
    out_dir: str = option("out", "在哪个目录里找检查点与训练的记录")
    host: str = option("127.0.0.1", "在哪个地址上等；0.0.0.0 表示别的机器也能打开")
    port: int = option(7860, "端口")
    auth: str | None = option(
        None, f"要密码才能用，这是名字；密码写在环境变量 {PASSWORD} 里，没有写就当场编一个"
    )
    allow_host: str | None = option(
        None, "还许可哪些名字打开它，逗号隔开，例如反向代理的域名；别的名字一律不答"
    )
    open: bool = option(False, "顺便打开浏览器")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        found = []
        if not 1 <= self.port <= 65535:
            found.append(f"port 要在 1 与 65535 之间，得到的是 {self.port}")
        if self.auth is not None and not re.fullmatch(r"[^:\s]+", self.auth):
            found.append(
                f"auth 只写名字，没有冒号与空白；密码写在环境变量 {PASSWORD} 里（命令行别人看得见）"
            )
        for name in self.names():
            if not NAME.fullmatch(name.lower()):
                found.append(f"allow_host 要是域名或 IP，可以带端口，得到的是 {name!r}")
        return found

    def names(self) -> tuple[str, ...]:
        """另外许可的名字。"""
        return tuple(n.strip() for n in self.allow_host.split(",")) if self.allow_host else ()


def main(argv: list[str] | None = None) -> None:
    """读命令行，打开网页，一直等到 Ctrl-C。"""
    usage = "用法：python -m tools.web [--参数 值 …]"
    options = read_options(Options, sys.argv[1:] if argv is None else argv, usage)
    if options.checkpoint:
        actions.open_model(options.checkpoint)  # 坏的现在就说
    loopback = check_port(options.host, options.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # 不联网；这一项与临时目录都要写在导入之前
    with own_folder():
        open_page(options, loopback)


@contextlib.contextmanager
def own_folder() -> Iterator[None]:
    """Gradio 的临时目录，用完就删。"""
    with tempfile.TemporaryDirectory(prefix="mini-llm-web-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def open_page(options: Options, loopback: bool) -> None:
    """建好整个页面，上锁，等人来。"""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("还没有安装 gradio；请先运行 pip install -r requirements-web.txt") from None
    from tools.web.page import build  # 它一导入就要 Gradio
    from tools.web.server import locked, serve

    password = choose_password(options.auth)
    if not loopback:
        warn(options)
    names = Names(options.host, options.port, options.names())
    demo = build(Path(options.out_dir), options.checkpoint)
    if options.open:
        threading.Timer(1, webbrowser.open, [f"http://127.0.0.1:{options.port}"]).start()
    serve(locked(demo, names, password), options.host, options.port)


def choose_password(name: str | None):
    """要密码的，密码从环境变量来，或者编一个，说一次。"""
    from tools.web.password import Password

    if name is None:
        return None
    given = os.environ.pop(PASSWORD, "")
    if given and len(given) < 8:
        raise UserError(f"环境变量 {PASSWORD} 里的密码太短，容易猜到；至少 8 个字")
    if not given:
        given = secrets.token_urlsafe(12)
        say(f"名字 {name}，密码 {given}（浏览器会问）", flush=True)
    return Password(name, given)


def warn(options: Options) -> None:
    """别的机器也打得开：说清楚。"""
    if options.auth is None:
        words = "谁都能聊天、看检查点的名字与训练的记录。要密码，请加上 --auth 名字"
    else:
        words = "密码与说的话不加密地送去，同一个网络里的人听得到"
    say(f"注意：在 {options.host} 上等，别的机器也打得开，{words}。", file=sys.stderr, flush=True)


def check_port(host: str, port: int) -> bool:
    """端口用不了，先说清楚；返回是不是只有本机打得开。"""
    try:
        family, *_, address = socket.getaddrinfo(host, port)[0]  # IPv4 或 IPv6
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "地址不对"
        raise UserError(f"{host}:{port} 用不了（{why}）；请用 --port 或 --host 换一个") from None
    return ipaddress.ip_address(address[0].partition("%")[0]).is_loopback


if __name__ == "__main__":
    run_script(main)
