"""网页的服务器：uvicorn，外面一层门锁，等得有限，收尾时什么也不留下。"""

import os

import fastapi
import gradio as gr
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from settings.say import say
from tools.web.crowd import Crowd
from tools.web.forms import Forms
from tools.web.lock import Lock
from tools.web.names import Names, bracket
from tools.web.page import CHINESE, CSS
from tools.web.password import Password

CONNECTIONS = 512  # 一共几条连接；一位访客的浏览器用到六条
HEADER = 10.0  # 秒：一个请求的开头要在这之内送完


class Protocol(H11Protocol):
    """uvicorn 的，加上两个限度：连上不说话、话说一半的，等够了就挂断；太多了，先挂断闲着最久的。"""

    deadline = None
    since = 0.0  # 最后一次有动静，loop.time()

    def connection_made(self, transport) -> None:
        """接通了。"""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            idle = [other for other in self.connections if other.idle() and other is not self]
            longest = min(idle, key=lambda other: other.since, default=self)
            self.connections.discard(longest)  # 挂断要到下一轮才生效
            longest.transport.abort()
        self.wait()

    def data_received(self, data: bytes) -> None:
        """来了一些字节：要么一个请求的开头完整了，要么还在等它。"""
        super().data_received(data)
        self.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """断了。"""
        super().connection_lost(exc)
        self.forget()

    def idle(self) -> bool:
        """没有请求在答。"""
        return self.cycle is None or self.cycle.response_complete

    def wait(self) -> None:
        """没有请求在答，就限时等下一个的开头。"""
        self.since = self.loop.time()
        if not self.idle():
            self.forget()
        elif self.deadline is None:
            self.deadline = self.loop.call_later(HEADER, self.transport.abort)

    def forget(self) -> None:
        """不等了。"""
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


class Server(uvicorn.Server):
    """开好了，说一声。"""

    async def startup(self, sockets=None) -> None:
        """真的能连上了，才说。"""
        await super().startup(sockets)
        if self.started:
            config = self.config
            say(
                f"网页开在 http://{bracket(config.host)}:{config.port}，按 Ctrl-C 关掉。",
                flush=True,
            )


def locked(demo: gr.Blocks, names: Names, password: Password | None = None) -> Lock:
    """整个网页，外面上了锁。"""
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # 每答一次，它要统计记着的每一次
    demo.queue(default_concurrency_limit=8)  # 几位访客同时用；一共几件在等，由 Crowd 管
    fonts = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app, demo, "/", ssr_mode=False, footer_links=[], run_history=False, show_error=False,
        enable_monitoring=False, css=CSS, js=CHINESE,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
    return Lock(app, names, Forms(demo.config), Crowd(demo._queue), password)


def serve(app: Lock, host: str, port: int) -> None:
    """一直等到 Ctrl-C 或 SIGTERM。"""
    config = uvicorn.Config(
        app, host, port, http=Protocol, ws="none", log_level="critical", proxy_headers=False,
        server_header=False, date_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=1,
    )  # fmt: skip
    Server(config).run()
