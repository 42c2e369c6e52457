"""网页的密码：浏览器自己会问（HTTP Basic），答对之前，什么也看不到。"""

import base64
import binascii
import hmac
import time
from hashlib import sha256
from typing import Any

PAUSE = 1.0  # 秒：一个地址猜错一次，这么久之内再猜什么都不看
MOST = 10_000  # 最多记住几个猜错的地址


class Password:
    """名字与密码。"""

    def __init__(self, name: str, password: str):
        self.right = sha256(f"{name}:{password}".encode()).digest()
        self.wrong: dict[str, float] = {}  # 哪个地址，到什么时候为止不看

    def check(self, given: bytes | None, client: Any) -> tuple | None:
        """对了返回 None；不对，返回状态码、一句话与响应头。

        猜错之后的一秒里，猜对了也不答：不然同时发一千个请求，就能一秒猜一千次。
        """
        ask = (b"www-authenticate", b'Basic realm="mini-llm", charset="UTF-8"')
        if given is None:
            return 401, "要密码", ask
        who, now = str(client[0]) if client else "", time.monotonic()
        if now < self.wrong.get(who, 0):
            return 429, "刚才猜错了，请等一秒再试", (b"retry-after", b"1")
        if hmac.compare_digest(sha256(decoded(given)).digest(), self.right):
            self.wrong.pop(who, None)
            return None
        if len(self.wrong) >= MOST:
            self.wrong = {w: until for w, until in self.wrong.items() if now < until}
        self.wrong[who] = now + PAUSE
        return 401, "名字或密码不对", ask


def decoded(given: bytes) -> bytes:
    """`Basic …` 里的「名字:密码」；不像就是空的。"""
    kind, _, code = given.partition(b" ")
    try:
        return base64.b64decode(code.strip(), validate=True) if kind.lower() == b"basic" else b""
    except binascii.Error:
        return b""
