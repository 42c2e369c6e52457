"""本地的网页：聊天、显微镜、一步一步地写、比较两个模型、看训练的过程。

    pip install -r requirements-web.txt
    python -m tools.web                       打开 http://127.0.0.1:7860
    python -m tools.web --host 0.0.0.0        同一个网络里的别人也能打开（没有密码，请当心）

不需要联网。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import socket
import threading
from dataclasses import dataclass
from pathlib import Path

from config import UserError, option
from settings.flags import read_options
from tools.web import actions


@dataclass
class Options:
    """命令行参数。"""

    checkpoint: str | None = option(None, "打开时选中的检查点；默认是找到的第一个，微调过的优先")
    out_dir: str = option("out", "在哪个目录里找检查点与训练的记录")
    host: str = option("127.0.0.1", "在哪个地址上等；0.0.0.0 表示别的机器也能打开")
    port: int = option(7860, "端口")
    open: bool = option(False, "顺便打开浏览器")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        good = 1 <= self.port <= 65535
        return [] if good else [f"port 要在 1 与 65535 之间，得到的是 {self.port}"]


def main(argv: list[str] | None = None) -> None:
    """读命令行，打开网页，一直等到 Ctrl-C。"""
    usage = "用法：python -m tools.web [--参数 值 …]"
    options = read_options(Options, sys.argv[1:] if argv is None else argv, usage)
    if options.checkpoint:
        actions.open_model(options.checkpoint)  # 坏的现在就说
    check_port(options.host, options.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # 不联网；要写在导入之前
    try:
        import gradio as gr
    except ImportError:
        raise UserError("还没有安装 gradio；请先运行 pip install -r requirements-web.txt") from None
    from tools.web.page import CHINESE, CSS, build  # 它们一导入就要 Gradio

    demo = build(Path(options.out_dir), options.checkpoint)
    demo.queue(default_concurrency_limit=8)  # 几位访客同时用
    fonts = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
    demo.launch(
        server_name=options.host, server_port=options.port, inbrowser=options.open, quiet=True,
        prevent_thread_lock=True, ssr_mode=False, share=False, footer_links=[], css=CSS, js=CHINESE,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
    print(f"网页开在 http://{options.host}:{options.port}，按 Ctrl-C 关掉。", flush=True)
    threading.Event().wait()


def check_port(host: str, port: int) -> None:
    """端口用不了，先说清楚。"""
    try:
        family = socket.getaddrinfo(host, port)[0][0]  # IPv4 或 IPv6
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "地址不对"
        raise UserError(f"{host}:{port} 用不了（{why}）；请用 --port 或 --host 换一个") from None


if __name__ == "__main__":
    run_script(main)
