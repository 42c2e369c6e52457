"""网页的门锁，每个请求先过这里，再到 Gradio；它自己不认识 Gradio，只是一层 ASGI。

    Lock      依次看：名字、从哪个网页来的、密码、路、正文；哪一样不对，一句话，到此为止
    ROUTES    这个页面用得到的路；别的（上传、取文件、文档、监视……）都不开

为什么要看名字：别的网站可以让自己的域名指到 127.0.0.1（DNS rebinding），它的网页就成了「同源」的，
能代人聊天、读记录；但浏览器仍会老实写上那个域名。为什么要看来处：别的网页可以往这里发请求，
浏览器也会写明从哪里来。
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterable

from settings.say import say
from tools.web.crowd import Crowd
from tools.web.forms import BadForm, Forms
from tools.web.names import Names
from tools.web.password import Password

BODY = 256 * 1024  # 字节：最长的一段文字，全写成转义，也不到这么多
PATIENCE = 10  # 秒：正文要在这之内送完
SESSION = r"[A-Za-z0-9]{1,40}"  # Gradio 的页面给自己取的代号
FILE = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
ROUTES = [
    ("GET", re.compile("/")),
    ("HEAD", re.compile("/")),
    ("GET", re.compile(rf"/(?:assets|static)(?:/{FILE}){{1,6}}")),
    ("GET", re.compile(r"/theme\.css|/favicon\.ico|/manifest\.json")),
    ("GET", re.compile(rf"/gradio_api/heartbeat/({SESSION})")),
    ("GET", re.compile(r"/gradio_api/queue/data")),
    ("GET", re.compile(r"/gradio_api/app_id")),  # 断了线的页面问它，问得到就自己刷新
    ("POST", re.compile(r"/gradio_api/queue/join")),
    ("POST", re.compile(r"/gradio_api/cancel")),
]
# 别的网站不能把它装进框里，不能当作图片、脚本取走；页面自己也不取外面的东西。
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    b"frame-ancestors 'none'; base-uri 'self'; form-action 'self'",
}


class Refused(Exception):
    """不答：状态码，一句话，另外的响应头。"""

    def __init__(self, status: int, sentence: str, *headers: tuple[bytes, bytes]):
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers


class Lock:
    """一层 ASGI。

    Args:
        app: 里面的程序。
        names: 这个网页叫什么。
        forms: 每个按钮要送来什么。
        crowd: 谁还在听。
        password: 要不要密码。
    """

    def __init__(
        self, app: Callable, names: Names, forms: Forms, crowd: Crowd,
        password: Password | None = None,
    ):  # fmt: skip
        self.app, self.names, self.forms, self.crowd = app, names, forms, crowd
        self.password = password

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """放行，或者一句话。"""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":  # 这个页面不用
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.answer(scope, receive, send)

    async def answer(self, scope: dict, receive: Callable, send: Callable) -> None:
        """一个 HTTP 请求。"""
        begun = False

        async def locked(message: dict) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": guarded(message.get("headers", []))}
            await send(message)

        try:
            session, scope, receive = await self.admit(scope, receive)
            with self.crowd.listening(session):
                await self.app(scope, receive, locked)
        except Refused as why:
            await refuse(why, scope, send)
        except Gone:
            pass
        except Exception as error:  # Gradio 里出了错：不能让一位访客的请求印出一屏回溯
            reason = f"{type(error).__name__}: {error}"[:200]
            say(f"网页答不了 {scope['method']} {scope['path'][:80]}（{reason}）", flush=True)
            if not begun:
                await refuse(Refused(500, "网页出了错，请刷新再试"), scope, send)

    async def admit(self, scope: dict, receive: Callable) -> tuple[str | None, dict, Callable]:
        """依次看每一样；返回谁要听（没有人就是 None），放进去的请求与正文。

        Raises:
            Refused: 哪一样不对。
        """
        headers = scope["headers"]
        check_origin(headers, scope, self.names, self.check_host(headers))
        if self.password:
            wait = self.password.check(one(headers, b"authorization"), scope.get("client"))
            if wait is not None:
                raise Refused(*wait)
        path = check_route(scope)
        session, query = None, b""
        if path == "/gradio_api/queue/data":
            asked = scope["query_string"].decode("latin-1")
            found = re.fullmatch(f"session_hash=({SESSION})", asked)
            session = found and found[1]
            if not session or not self.crowd.knows(session):
                raise Refused(404, "这里没有在等的回答；请刷新这一页")
            query = scope["query_string"]
        if scope["method"] == "POST":
            receive, length = await self.read_form(path, headers, receive)
        else:
            length = 0
            if one(headers, b"content-length") not in (None, b"0") or one(
                headers, b"transfer-encoding"
            ):
                raise Refused(400, "这样的请求不该有正文")
        kept = cleaned(headers, length, self.names)
        inside = {**scope, "query_string": query, "headers": kept}
        return session, inside, receive

    def check_host(self, headers: list) -> str:
        """Host 恰好一个，是这个网页的名字。"""
        found = [value for name, value in headers if name == b"host"]
        if len(found) != 1:
            raise Refused(400, "请求里要恰好有一个 Host")
        host = found[0].decode("latin-1").lower()
        if not self.names.has(host):
            sentence = "这个网页不叫这个名字；请用启动时印出的地址或 IP 打开"
            raise Refused(421, sentence + self.names.advice(host))
        return host

    async def read_form(self, path: str, headers: list, receive: Callable):
        """读完正文，只留认得的几样，重新写好。"""
        kind = (one(headers, b"content-type") or b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # 别的网页不问一声就能发的，都不是这一种
            raise Refused(415, "正文要是 application/json")
        body = await read_body(one(headers, b"content-length"), receive)
        try:
            form = self.forms.read(path, body)
        except BadForm as error:
            raise Refused(422, str(error)) from None
        if path.endswith("/join") and (why := self.crowd.join(form["session_hash"])):
            raise Refused(503, why)
        clean = json.dumps(form, ensure_ascii=False).encode()
        parts: Iterable = iter([{"type": "http.request", "body": clean, "more_body": False}])

        async def again() -> dict:
            return next(parts, None) or await receive()

        return again, len(clean)


class Gone(Exception):
    """对方走了，没有人要听回答。"""


async def read_body(length: bytes | None, receive: Callable) -> bytes:
    """整份正文，不超过 BODY，要在 PATIENCE 秒之内送完。"""
    too_long = Refused(413, f"正文太长，最多 {BODY} 字节；请短一些")
    if length is not None and (not re.fullmatch(rb"\d{1,20}", length) or int(length) > BODY):
        raise too_long

    async def whole() -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            body += message.get("body", b"")
            if len(body) > BODY:
                raise too_long
            if not message.get("more_body"):
                return bytes(body)

    try:
        return await asyncio.wait_for(whole(), PATIENCE)
    except asyncio.TimeoutError:  # Python 3.10 里，它与 TimeoutError 不是一个
        raise Refused(408, f"{PATIENCE} 秒还没有送完，不等了") from None


def one(headers: list, name: bytes) -> bytes | None:
    """一项请求头；没有是 None，有两个就不知道该信哪个。"""
    found = [value for key, value in headers if key == name]
    if len(found) > 1:
        raise Refused(400, f"请求里有两个 {name.decode()}")
    return found[0] if found else None


def check_origin(headers: list, scope: dict, names: Names, host: str) -> None:
    """从自己的网页来的，或者不是网页发的（那样的程序什么都能写，防它的是密码）。"""
    sentence, own = "这个请求是别的网页发来的，不答", names.origins(host)
    origin, referer = one(headers, b"origin"), one(headers, b"referer")
    site = one(headers, b"sec-fetch-site")
    if origin is not None and (said := origin.decode("latin-1").lower()) not in own:
        raise Refused(403, sentence + names.advice(said))
    opening = (  # 别处的链接可以打开这一页：看得见地址栏的，不是装在框里的
        scope["method"] in ("GET", "HEAD") and scope["path"] == "/"
        and one(headers, b"sec-fetch-mode") == b"navigate"
        and one(headers, b"sec-fetch-dest") == b"document"
    )  # fmt: skip
    if site not in (None, b"same-origin", b"none") and not opening:
        raise Refused(403, sentence)
    if origin is None and referer is not None and scope["method"] not in ("GET", "HEAD"):
        found = re.match(r"https?://[^/]*", referer.decode("latin-1").lower())
        if not found or found[0] not in own:
            raise Refused(403, sentence)


def check_route(scope: dict) -> str:
    """路要一字不差：没有 %、//、..，大小写也不变，也不是「GET http://别处/」那样的。"""
    path = scope["path"]
    raw = scope.get("raw_path")
    if (raw is not None and raw != path.encode()) or scope.get("root_path"):
        raise Refused(404, "没有这一页")
    methods = [method for method, route in ROUTES if route.fullmatch(path)]
    if not methods:
        raise Refused(404, "没有这一页")
    if scope["method"] not in methods:
        raise Refused(405, "这一页不能这样用", (b"allow", ", ".join(methods).encode()))
    return path


def cleaned(headers: list, length: int, names: Names) -> list:
    """放进去的请求头：Gradio 会许可 Origin，会信 X-Forwarded-Host；不是自己的名字，都不给。"""
    dropped = (b"origin", b"authorization", b"content-length", b"transfer-encoding", b"forwarded")
    kept = [
        (name, value) for name, value in headers
        if name not in dropped
        and (not name.startswith(b"x-forwarded-")
             or (name == b"x-forwarded-proto" and value in (b"http", b"https"))
             or (name == b"x-forwarded-host" and names.has(value.decode("latin-1").lower())))
    ]  # fmt: skip
    return [*kept, (b"content-length", str(length).encode())] if length else kept


def guarded(headers: Iterable) -> list:
    """送出的响应头：不许可任何别的网页。"""
    kept = [
        (name, value) for name, value in headers
        if not name.lower().startswith(b"access-control-") and name.lower() not in HEADERS
    ]  # fmt: skip
    return [*kept, *HEADERS.items()]


async def refuse(why: Refused, scope: dict, send: Callable) -> None:
    """一句话；页面自己发的请求要的是 JSON，它才会把这句话给人看。"""
    form = scope["method"] == "POST"
    words = json.dumps({"detail": why.sentence}, ensure_ascii=False) if form else why.sentence
    body = f"{words}\n".encode()
    kind = b"application/json" if form else b"text/plain; charset=utf-8"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close"), *why.headers]  # fmt: skip
    start = {"type": "http.response.start", "status": why.status, "headers": guarded(headers)}
    await send(start)
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
