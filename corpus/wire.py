"""官方的客户端去下载，这里看着：收到的每一块都数，超出的、停住的、转错地方的，当即停下。

    Limits      至多收多少、问几次、等多久
    watched     运行一件要联网的事，守着这些上限
    Useless     收到的接不上，也不该留着

客户端 modelscope_hub 自己会重试、续传、核对，但列表多长都读进内存，大小没有公布就一直写，
从 https 转到 http 也跟着去。它的请求都经过 requests 的 HTTPAdapter.send，门就设在那里。
它在另一个线程里跑，主线程只等：DNS、握手、一个字节一个字节地挤，都拖不住 Ctrl-C 与 SIGTERM。
"""

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from config import UserError

BLOCK = 1 << 14  # 一次至多读多少字节：压缩得再狠，解开也只有十几 MB
SMALL = 1 << 20  # 不是内容的（转到别处、出错）至多多少字节
REQUESTS = 200  # 一件事至多问几次
HOPS = 5  # 至多接连转几次
PATIENCE = 60.0  # 秒：光是等，就等了这么久
SLOWEST = 1024  # 这么久里，平均每秒至少来这么多字节


class Limits(NamedTuple):
    """一件事的上限。"""

    most: int  # 字节。列表：几次回答加起来；文件：存到多长
    too_long: str  # 超出了说什么
    is_file: bool
    seconds: float | None = None  # 总共至多等多久；None 不限，只要不停住
    same_tag: bool = False  # 断了再连，ETag 要与先前的相同：没有别的可以核对


class Refused(BaseException):
    """看门的不让过。不是 Exception：客户端遇到 Exception 会重试。"""


class Useless(UserError):
    """收到的不是要的，留着也接不上。"""


def watched(call: Callable[[], Any], host: str, limits: Limits) -> Any:
    """在另一个线程里运行 call，返回它的结果；它抛出的，在这里抛出。

    Raises:
        UserError: 停住了，转到了不该去的地方，或者超出上限（`Useless`）。
    """
    guard, outcome = Guard(host, limits), {}

    def work() -> None:
        try:
            outcome["result"] = call()
        except BaseException as error:
            outcome["error"] = error
        finally:
            guard.done.set()

    with guard.at_the_door():
        threading.Thread(target=work, daemon=True).start()
        try:
            guard.wait()
        finally:
            guard.closed = True  # 此后它什么也收不到，不再动磁盘
            guard.done.wait(0.5)
    if guard.error is not None:
        raise guard.error
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


class Guard:
    """守着一件事：`send` 在干活的线程里，`wait` 在主线程里。"""

    def __init__(self, host: str, limits: Limits):
        self.host, self.limits = host, limits
        self.received = self.requests = self.hops = 0
        self.tag: str | None = None
        self.error: UserError | None = None
        self.closed, self.done = False, threading.Event()

    def refuse(self, error: UserError) -> None:
        """停下；主线程说 error。"""
        self.error, self.closed = self.error or error, True
        raise Refused

    @contextmanager
    def at_the_door(self):
        """这期间 requests 的每次请求都经过 `send`。干活的还没有停下，门就留着。"""
        from requests.adapters import HTTPAdapter

        original = HTTPAdapter.send

        def send(adapter, request, *args, **more):
            return self.send(request, lambda: original(adapter, request, *args, **more))

        HTTPAdapter.send = send
        try:
            yield
        finally:
            if self.done.is_set():
                HTTPAdapter.send = original

    # ---------- 干活的线程 ----------

    def send(self, request, original: Callable):
        """发出一次请求，看看回答，数着它的内容。"""
        self.requests += 1
        if self.closed:
            raise Refused
        if self.requests > REQUESTS:
            self.refuse(Useless(f"问了 {self.host} {REQUESTS} 次还没有完，不再问；请稍后再试"))
        if request.headers.get("Authorization", "").startswith("Basic "):
            del request.headers["Authorization"]  # 来自 .netrc；客户端自己的是 Bearer
        response = original()
        try:
            self.check_redirect(response)
            self.count(response.raw, self.room(request, response))
        except Refused:
            response.close()
            raise
        return response

    def check_redirect(self, response) -> None:
        """内容本来就存在别的主机上；不可以转的是别的协议，和从 https 到 http。"""
        self.hops = self.hops + 1 if response.is_redirect else 0
        if not response.is_redirect:
            return
        if self.hops > HOPS:
            self.refuse(UserError(f"{self.host} 转来转去超过 {HOPS} 次，没有内容；请稍后再试"))
        try:
            found = urljoin(response.url, response.headers["Location"])
            good = bool(urlsplit(found).hostname)
        except ValueError:
            found, good = response.headers["Location"], False
        allowed = ("https",) if urlsplit(response.url).scheme == "https" else ("http", "https")
        if not good or urlsplit(found).scheme not in allowed:
            self.refuse(UserError(
                f"{self.host} 把下载转到了 {found[:200]!r}，只能是 {' 或 '.join(allowed)} 的网址；"
                "不下载，请检查代理，或稍后再试"
            ))  # fmt: skip

    def room(self, request, response) -> int:
        """这一次回答的内容至多多少字节。"""
        status, headers, limits = response.status_code, response.headers, self.limits
        if not limits.is_file:
            return limits.most - self.received
        if status not in (200, 206):
            return SMALL
        if headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            self.refuse(UserError(
                "服务器给的是另外压缩过的内容，没法与公布的核对，不下载；请稍后再试"
            ))  # fmt: skip
        if limits.same_tag and status == 206 and self.tag not in (None, headers.get("ETag")):
            self.refuse(Useless("下到一半，服务器上的文件换了，两半接不上，已经删除；请再次运行"))
        self.tag = headers.get("ETag")
        start = request.headers.get("Range", "")[6:].rstrip("-") if status == 206 else ""
        room = limits.most - (int(start) if start.isdecimal() else 0)
        length = headers.get("Content-Length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > room):
            self.refuse(Useless(limits.too_long))  # 还没有收，先看它说的大小
        return room

    def count(self, raw, room: int) -> None:
        """数着 raw（urllib3 的回答）读出来的，解开压缩之后的；超出 room 就停下。"""
        left = room

        def counted(block: bytes) -> bytes:
            nonlocal left
            self.received, left = self.received + len(block), left - len(block)
            if self.closed:
                raise Refused
            if left < 0:
                self.refuse(Useless(self.limits.too_long))
            return block

        def reading(read: Callable) -> Callable:
            def guarded(amt: int | None = None, *args, **more) -> bytes:
                return counted(read(min(amt or BLOCK, BLOCK), *args, **more) or b"")

            return guarded

        chunks = raw.read_chunked
        raw.read1 = reading(getattr(raw, "read1", raw.read))  # urllib3 1.26 没有 read1
        raw.read = reading(raw.read)
        raw.read_chunked = lambda amt=None, *a, **more: map(
            counted, chunks(min(amt or BLOCK, BLOCK), *a, **more)
        )

    # ---------- 主线程 ----------

    def wait(self) -> None:
        """等到做完或停下。只数真的在等的时间：Ctrl-Z 停过的不算。"""
        before, waited, total, seen = time.monotonic(), 0.0, 0.0, 0
        while not self.done.wait(min(0.1, PATIENCE)) and self.error is None:
            now = time.monotonic()
            step, before = min(now - before, 0.5), now
            waited, total = waited + step, total + step
            if self.limits.seconds is not None and total > self.limits.seconds:
                self.error = UserError(
                    f"{self.host} 太慢，规定的时间里没有答完；请稍后再次运行同一条命令"
                )
            if waited < PATIENCE:
                continue
            if self.received - seen < PATIENCE * SLOWEST:
                self.error = self.stalled(self.received - seen)
            waited, seen = 0.0, self.received

    def stalled(self, received: int) -> UserError:
        """等了 PATIENCE 秒，几乎什么也没有来。"""
        if not self.requests:  # 客户端有自己的锁，同一个文件一次只让一个程序下载
            return UserError(
                f"等了 {PATIENCE:.0f} 秒，还没有轮到：多半有另一个程序正在下载它；请等它结束再运行"
            )
        return UserError(
            f"{self.host} 停住了：等了 {PATIENCE:.0f} 秒，只来了 {received} 字节；"
            "请检查网络，再次运行同一条命令会接着下载"
        )
