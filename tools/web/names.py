"""这个网页叫什么：只有写着这些名字（Host）的请求才答。

localhost 与 IP 地址总是答的，端口不限：别的网站可以把自己的域名指到这里来，却不能让浏览器
把 localhost 或一个 IP 写成自己的。经过 ssh -L、容器、VS Code 转发来的，写的正是它们。
"""

import ipaddress
import re
import socket
from dataclasses import dataclass

WILDCARDS = ("0.0.0.0", "::")
NAME = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([1-9]\d{0,4}))?")  # 都是小写的


@dataclass(frozen=True)
class Names:
    """这个网页叫什么。

    Args:
        host, port: 在哪里等。
        given: 用户另外许可的名字，例如反向代理的域名；可以带端口。
    """

    host: str
    port: int
    given: tuple[str, ...] = ()

    def has(self, host: str) -> bool:
        """host 是不是它的名字。"""
        parts = NAME.fullmatch(host)
        return parts is not None and (is_fixed(parts[1]) or host in self.own())

    def own(self) -> set[str]:
        """localhost 与 IP 之外的名字；端口是 80 时，浏览器不写端口。"""
        given = {name.lower() for name in self.given}
        here = (socket.gethostname() if self.host in WILDCARDS else self.host).lower()
        names = given | {f"{name}:{self.port}" for name in (*given, here)}
        return names | {here} if self.port == 80 else names

    def origins(self, host: str) -> set[str]:
        """自己的网页会写的 Origin；用户许可的名字前面可能有一个 https 的代理，Host 也未必照转。"""
        given = {name.lower() for name in self.given}
        return {f"http://{host}"} | {
            f"{way}://{name}" for way in ("http", "https") for name in given
        }

    def advice(self, url: str) -> str:
        """url 若是一个转发到这里的地址，怎样才打得开；不像地址的，什么也不说。"""
        name = re.sub("^https?://", "", url)
        if not NAME.fullmatch(name):
            return ""
        return f"。{name} 若是你自己转发到这里的，请在启动时加上 --allow_host {name}"


def is_fixed(name: str) -> bool:
    """localhost，或者一个 IP：不经过 DNS，谁也改不了它指到哪里。"""
    try:
        return name == "localhost" or bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def bracket(host: str) -> str:
    """IPv6 的地址写在方括号里。"""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
