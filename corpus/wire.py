"""取一个网址：停住了认得出，转到哪里自己看，随时停得下来。

    session      不带任何凭据的 requests 会话
    get          一个网址 -> Answer；它的内容一块一块地来
    Dropped      连不上或中途断了：可以再试

联网的事都在另一个线程里，主线程只等它送来的：DNS、握手、一个字节一个字节地挤，都拖不住主线程，
Ctrl-C 与 SIGTERM 也就随时有效。官方的客户端 modelscope_hub 做不到，也没有地方可以接上：
列表整个读进内存，大小没有公布就一直写，沿着链接写到别处。
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from http.cookiejar import DefaultCookiePolicy
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from config import UserError

BLOCK = 1 << 14  # 一次读多少字节：小到慢的线路也不时有消息，大到快的不费时间
HOPS = 5  # 至多转几次
TIMEOUT = (10, 60)  # 秒：连上，以及一个字节也没有来
PATIENCE = 60.0  # 秒：光是等，就等了这么久
SLOWEST = 1024  # 这么久里，平均每秒至少来这么多字节


class Dropped(Exception):
    """连不上，或者中途断了；可以再试。"""


class Stopped(Exception):
    """主线程不要了。"""


class Answer(NamedTuple):
    """服务器的回答。"""

    status: int
    headers: Mapping[str, str]  # 名字不分大小写
    blocks: Iterator[bytes]  # 内容，至多一次 BLOCK 字节


def session():
    """不带登录、cookie 与 .netrc 的会话：要的都是公开的，转到别处时也就没有东西会泄露。"""
    import requests  # 用到才导入，--help 不必等它

    made = requests.Session()
    made.auth = lambda request: request
    made.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    made.headers.update({"User-Agent": "mini-llm", "Accept-Encoding": "identity"})
    return made


@contextmanager
def get(session, url: str, headers: dict[str, str], decode=False, within: float | None = None):
    """取 url，给出 `Answer`；离开时不再收。

    Args:
        decode: 真时解开 Content-Encoding 的压缩；假时原样。
        within: 全部内容要在几秒之内到齐；None 不限，只要不停住。
    Raises:
        Dropped: 连不上，或者断了（读 `Answer.blocks` 时也会）。
        UserError: 停住了，或者转到了不该去的地方。
    """
    worker = Worker(session, url, headers, decode)
    waiting = Waiting(urlsplit(url).netloc, within)
    threading.Thread(target=worker.run, daemon=True).start()
    try:
        status, found = waiting.take(worker.out)
        yield Answer(status, found, iter(lambda: waiting.take(worker.out), b""))
    finally:
        worker.stop.set()


class Worker:
    """在另一个线程里取：先送出 (状态, 头)，再一块块内容，最后是空的；出了错，送出那个异常。"""

    def __init__(self, session, url: str, headers: dict[str, str], decode: bool):
        self.session, self.url, self.headers, self.decode = session, url, headers, decode
        self.out, self.stop = queue.Queue(8), threading.Event()

    def run(self) -> None:
        """取到底，或者到主线程说停；出了什么错，都由主线程去说。"""
        with contextlib.suppress(Stopped):
            self.put(self.receive())

    def receive(self) -> bytes | Exception:
        """一路送出去；返回最后要送的：空的，或者出的错。"""
        import requests
        import urllib3

        try:
            with follow(self.session, self.url, self.headers) as response:
                self.put((response.status_code, response.headers))
                while block := response.raw.read(BLOCK, decode_content=self.decode):
                    self.put(block)
            return b""
        except (
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            HTTPException,
            OSError,
        ) as e:
            return Dropped(type(e).__name__)
        except UserError as error:
            return error
        except ValueError as error:  # 写得不对的地址与头
            return Dropped(type(error).__name__)
        except Stopped:
            raise
        except Exception as error:  # 程序自己的错，照常抛出
            return error

    def put(self, item) -> None:
        """主线程来不及收就等。Raises Stopped：它不要了。"""
        while not self.stop.is_set():
            with contextlib.suppress(queue.Full):
                return self.out.put(item, timeout=0.2)
        raise Stopped


class Waiting:
    """主线程这一边：只数真的在等的时间，Ctrl-Z 停过、磁盘慢，都不算。"""

    def __init__(self, host: str, within: float | None):
        self.host, self.received, self.waited = host, 0, 0.0
        self.deadline = None if within is None else time.monotonic() + within

    def take(self, out: queue.Queue):
        """下一样。"""
        while True:
            before = time.monotonic()
            try:
                item = out.get(timeout=min(0.2, PATIENCE))
            except queue.Empty:
                item = None
            now = time.monotonic()
            self.waited += min(now - before, 0.5)
            if isinstance(item, bytes):
                self.received += len(item)
            self.check(now)
            if isinstance(item, Exception):
                raise item
            if item is not None:
                return item

    def check(self, now: float) -> None:
        """Raises UserError：太慢了。"""
        if self.waited >= PATIENCE:
            if self.received < PATIENCE * SLOWEST:
                raise UserError(
                    f"{self.host} 停住了：等了 {PATIENCE:.0f} 秒，只来了 {self.received} 字节；"
                    "请检查网络，再次运行同一条命令会接着下载"
                )
            self.waited, self.received = 0.0, 0
        if self.deadline is not None and now > self.deadline:
            raise UserError(f"{self.host} 太慢，规定的时间里没有答完；请稍后再次运行同一条命令")


def follow(session, url: str, headers: dict[str, str]):
    """取 url，跟着转，返回最后的 `requests.Response`。

    内容本来就存在别的主机上，所以可以转到别的主机；不可以从 https 转到 http，也不可以转到别的协议。
    """
    seen = url
    for _ in range(HOPS + 1):
        check_address(seen, url)
        response = session.get(
            seen, headers=headers, stream=True, allow_redirects=False, timeout=TIMEOUT
        )
        target = session.get_redirect_target(response)
        if target is None:
            return response
        response.close()
        seen = urljoin(seen, target)
    raise UserError(f"{urlsplit(url).netloc} 转来转去超过 {HOPS} 次，没有内容；请稍后再试")


def check_address(found: str, asked: str) -> None:
    """转到的地方去得。Raises UserError：去不得。"""
    parts, first = urlsplit(found), urlsplit(asked)
    safe = ("https",) if first.scheme == "https" else ("http", "https")
    if parts.scheme not in safe or not parts.hostname:
        raise UserError(
            f"{first.netloc} 把下载转到了 {found[:200]!r}，只能是 {' 或 '.join(safe)} 的网址；"
            "不下载，请检查代理，或稍后再试"
        )
