"""这个网页叫什么：只有写着这些名字（Host）的请求才答。"""

import re
import socket
from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
WILDCARDS = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Names:
    """这个网页叫什么。

    Args:
        host, port: 在哪里等。
        given: 用户另外许可的名字，例如反向代理的域名；可以带端口。
        loopback: 本机自己打得开：localhost 之类也是它的名字。
    """

    host: str
    port: int
    given: tuple[str, ...] = ()
    loopback: bool = True

    def own(self) -> set[str]:
        """许可的 Host，都是小写；端口是 80 时，浏览器不写端口。"""
        names = {bracket(self.host), *self.given, *(LOOPBACK if self.loopback else ())}
        if self.host in WILDCARDS:
            names.add(socket.gethostname())
        names = {name.lower() for name in names}
        bare = {name for name in names if self.port == 80 or name in self.proxied()}
        return bare | {n if has_port(n) else f"{n}:{self.port}" for n in names}

    def proxied(self) -> set[str]:
        """前面可能另有一个 https 的代理的那几个名字。"""
        return {name.lower() for name in self.given}


def bracket(host: str) -> str:
    """IPv6 的地址写在方括号里。"""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def has_port(name: str) -> bool:
    """名字里写着端口。"""
    return re.search(r":\d+$", name) is not None and not name.endswith("]")
