"""网页的门锁：别的名字、别的网页、没有密码的、走了的、送错的，都进不去，也拖不住别人。

前一半只有锁，里面是一个记账的假程序；后一半是真的 Gradio，都不经过网络。多试几千个：

    python -m pytest tests/test_web_lock.py --hypothesis-profile=thorough
"""

import asyncio
import base64
import contextlib
import importlib.util
import io
import ipaddress
import json
import re
import threading
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tools.web import lock as lock_module
from tools.web.crowd import GRACE, Crowd
from tools.web.forms import WORDS, BadForm, Forms
from tools.web.lock import Lock
from tools.web.names import Names
from tools.web.password import Password

PORT = 7860
HOST = f"127.0.0.1:{PORT}"
JOIN, DATA, CANCEL = "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/cancel"
JSON = (b"content-type", b"application/json")
SLOW = settings(max_examples=max(20, settings().max_examples // 2))


# ---------- 1. 只有锁 ----------


class Inside:
    """里面的程序：记下放进来的，答一句 ok。"""

    def __init__(self):
        self.seen: list[dict] = []

    async def __call__(self, scope, receive, send):
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        self.seen.append({**scope, "body": body})
        headers = [(b"access-control-allow-origin", b"*"), (b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})


class Queue:
    """Gradio 的队伍，假的。"""

    def __init__(self):
        self.cleaned: list[str] = []
        self.pending_event_ids_session: dict[str, set] = {}
        self.pending_messages_per_session: dict[str, list] = {}
        self.waiting = 0

    def __len__(self):
        return self.waiting

    async def clean_events(self, *, session_hash):
        self.cleaned.append(session_hash)


CONFIG = {
    "components": [
        {"id": 1, "type": "dropdown", "props": {"label": "模型"}},
        {"id": 2, "type": "textbox", "props": {"label": "你说"}},
        {"id": 3, "type": "state", "props": {}},
        {"id": 4, "type": "slider", "props": {"label": "temp", "minimum": 0, "maximum": 2}},
        {"id": 5, "type": "number", "props": {"label": "seed"}},
    ],
    "dependencies": [
        {"id": 7, "inputs": [1, 2, 3, 4, 5], "backend_fn": True},
        {"id": 8, "inputs": [], "backend_fn": False},
    ],
}
GOOD = {"fn_index": 7, "session_hash": "abc", "data": ["a.pt", "你好", None, 0.3, 0]}


def new_lock(names=None, password=None, grace=3.0) -> Lock:
    names = names or Names("127.0.0.1", PORT)
    return Lock(Inside(), names, Forms(CONFIG), Crowd(Queue(), grace), password)


def request(method="GET", path="/", headers=(), query=b"", host=HOST, raw=None, **more) -> dict:
    hosts = [] if host is None else [(b"host", host.encode("latin-1"))]
    return {"type": "http", "method": method, "path": path, "query_string": query,
            "raw_path": path.encode() if raw is None else raw, "root_path": "",
            "server": ("127.0.0.1", PORT), "client": ("127.0.0.1", 5), "scheme": "http",
            "http_version": "1.1", "headers": [*hosts, *headers], **more}  # fmt: skip


async def call(app, scope: dict, *parts: bytes, more: bool = False) -> tuple[int, dict, str]:
    """送一个请求进去；返回状态码、响应头、正文。more：正文没有完。"""
    left = list(parts) or [b""]
    sent: list[dict] = []

    async def receive():
        if not left:
            await asyncio.sleep(60)
        ends = len(left) == 1 and not more
        return {"type": "http.request", "body": left.pop(0), "more_body": not ends}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    body = b"".join(m.get("body", b"") for m in sent[1:]).decode()
    return sent[0]["status"], dict(sent[0]["headers"]), body


def ask(lock, scope, *parts, **more):
    return asyncio.run(call(lock, scope, *parts, **more))


def is_one_sentence(body: str) -> bool:
    """一句中文，一行。"""
    return body.count("\n") == 1 and re.search("[一-鿿]", body) is not None


# 端口不限：ssh -L 8888:localhost:7860，容器的 -p 8888:7860，写的都是另一个端口。
OWN = [HOST, "localhost:7860", "LOCALHOST:7860", "[::1]:7860", "localhost:8888", "localhost",
       "127.0.0.1:8888", "127.0.0.1", "192.168.1.5:7860", "[fe80::1]:80"]  # fmt: skip


@pytest.mark.parametrize("host", OWN)
def test_its_own_names_are_answered(host):
    lock = new_lock()
    status, headers, body = ask(lock, request(host=host))
    assert (status, body) == (200, "ok")
    assert b"access-control-allow-origin" not in headers  # 不许可任何别的网页
    assert headers[b"cross-origin-resource-policy"] == b"same-origin"


OTHERS = ["evil.example", "evil.example:7860", "127.0.0.1:7860.", "", "localhost:",
          "127.0.0.1:7860@evil", "evil/127.0.0.1:7860", "localhost.:7860", " 127.0.0.1:7860",
          "127.0.0.1:07860", "2130706433:7860", "127.1:7860", "[evil.example]:7860", "::1",
          "127.0.0.1.evil.example:7860", "localhost.evil.example", "[::1].evil.example",
          "127.0.0.1:7860\x00", "127.0.0.1:7860,evil", "user@127.0.0.1:7860"]  # fmt: skip


@pytest.mark.parametrize("host", OTHERS)
def test_another_name_is_not_answered(host):
    """DNS rebinding：别的网站把自己的域名指到这里来。"""
    lock = new_lock()
    status, _, body = ask(lock, request(host=host))
    assert status == 421 and is_one_sentence(body)
    assert lock.app.seen == []


def test_a_host_that_is_missing_or_written_twice():
    lock = new_lock()
    for scope in (request(host=None), request(headers=[(b"host", b"evil.example")])):
        assert ask(lock, scope)[0] == 400
    assert lock.app.seen == []


def test_the_names_when_others_can_reach_it(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Desk")
    names = Names("0.0.0.0", PORT, ("demo.example", "B.example:8443"))
    lock = new_lock(names)
    reached = {
        host: ask(lock, request(host=host, server=("192.168.1.5", PORT)))[0]
        for host in ("desk:7860", "192.168.1.5:7860", "demo.example", "demo.example:7860",
                     "b.example:8443", "evil.example:7860", "desk", "desk:7861", "b.example")
    }  # fmt: skip
    assert list(reached.values()) == [200] * 5 + [421] * 4
    # 代理那边是 https 的，它的网页写的来处也是；Host 不照转的代理也不少。
    for host, origin, expected in [
        ("demo.example", b"https://demo.example", 200),
        (HOST, b"https://demo.example", 200),
        (HOST, b"https://b.example:8443", 200),
        (HOST, b"https://127.0.0.1:7860", 403),
        ("demo.example", b"https://evil.example", 403),
    ]:
        assert ask(lock, request(host=host, headers=[(b"origin", origin)]))[0] == expected
    assert ask(new_lock(Names("desk", 80)), request(host="desk"))[0] == 200


def test_those_who_forward_the_page_are_told_what_to_do():
    """端口转发来的，来处要与 Host 相同；用别的名字转发的，告诉他加上什么。"""
    lock = new_lock()
    for host, origin, expected in [
        ("localhost:8888", b"http://localhost:8888", 200),
        ("localhost:8888", b"http://localhost:7860", 403),
        ("127.0.0.1:8888", b"http://localhost:8888", 403),
    ]:
        assert ask(lock, request(host=host, headers=[(b"origin", origin)]))[0] == expected
    for scope, status in [
        (request(host="a-7860.example"), 421),
        (request(headers=[(b"origin", b"https://a-7860.example")]), 403),
    ]:
        found, _, words = ask(lock, scope)
        assert found == status and is_one_sentence(words)
        assert words.endswith("--allow_host a-7860.example\n")
    assert "allow_host" not in ask(lock, request(host="<b>x</b>"))[2]


@given(
    st.text(st.characters(max_codepoint=255), max_size=30)
    | st.sampled_from([*OTHERS, *OWN])
    | st.text("localhst127.:[]0@/", max_size=16)
)
def test_any_other_name(host):
    """能用的只有 localhost 与 IP，连同一个端口。"""
    lock = new_lock()
    status, _, body = ask(lock, request(host=host))
    name = re.sub(r":[1-9]\d{0,4}\Z", "", host.lower(), flags=re.ASCII)
    try:
        bare = name[1:-1] if name[:1] == "[" and name[-1:] == "]" else name
        fixed = ipaddress.ip_address(bare)
        own = fixed.version == 4 or bare != name
    except ValueError:
        own = name == "localhost"
    assert (status == 200) == own == bool(lock.app.seen)
    assert own or is_one_sentence(body)


SITES = [None, b"same-origin", b"none", b"same-site", b"cross-site", b"x"]
ORIGINS = [None, b"http://127.0.0.1:7860", b"http://evil.example", b"null", b"http://127.0.0.1",
           b"https://127.0.0.1:7860", b"http://127.0.0.1:7860.evil", b"http://localhost:7860",
           b"", b"file://", b"http://127.0.0.1:7860, http://evil.example"]  # fmt: skip
REFERERS = [None, b"http://127.0.0.1:7860/", b"http://evil.example/", b"http://127.0.0.1:7860.e/",
            b"about:blank", b"http://127.0.0.1:7860@evil.example/"]  # fmt: skip


def from_headers(origin, referer, site, *more) -> list:
    pairs = [(b"origin", origin), (b"referer", referer), (b"sec-fetch-site", site)]
    return [*((name, value) for name, value in pairs if value is not None), *more]


@given(
    st.sampled_from(ORIGINS) | st.binary(max_size=20),
    st.sampled_from(REFERERS) | st.binary(max_size=20),
    st.sampled_from(SITES) | st.binary(max_size=20),
    st.booleans(),
)
def test_another_page_can_neither_ask_nor_read(origin, referer, site, posts):
    """来处写着别的网页的，一个也不放进去；放进去的也看不见来处，Gradio 就不会许可它。"""
    lock = new_lock()
    headers = from_headers(origin, referer, site, JSON)
    if posts:
        body = json.dumps(GOOD).encode()
        status, *_ = ask(lock, request("POST", JOIN, headers), body)
    else:
        status, *_ = ask(lock, request("GET", "/theme.css", headers))
    own = (origin in ORIGINS[:2]) and site in SITES[:3]
    if posts and origin is None:
        own = own and referer in REFERERS[:2]
    assert status == (200 if own else 403)
    for inside in lock.app.seen:
        assert b"origin" not in dict(inside["headers"])


def test_two_origins_are_refused():
    headers = [(b"origin", ORIGINS[1])] * 2
    assert ask(new_lock(), request(headers=headers))[0] == 400


def test_a_link_elsewhere_may_open_the_page_but_not_in_a_frame():
    lock = new_lock()
    for dest, expected in ((b"document", 200), (b"iframe", 403), (b"image", 403)):
        headers = [(b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate"),
                   (b"sec-fetch-dest", dest)]  # fmt: skip
        assert ask(lock, request(headers=headers))[0] == expected
    assert b"frame-ancestors 'none'" in ask(lock, request())[1][b"content-security-policy"]


CLOSED = ["/gradio_api/upload", "/upload", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd",
          "/gradio_api/proxy=http://evil.example", "/gradio_api/call/x", "/gradio_api/info",
          "/docs", "/openapi.json", "/gradio_api/openapi.json", "/config", "/gradio_api/token",
          "/monitoring", "/gradio_api/runs", "/gradio_api/startup-events", "/login", "/logout",
          "//", "/%2e%2e/config", "/assets/../config", "/assets//x", "/assets/.env", "/assets/",
          "/GRADIO_API/queue/join", "/gradio_api/queue/join/", "/gradio_api//queue/join",
          "/assets/a%2fb", "http://evil.example/", "", "*", "/\\evil", "/theme.css/",
          "/theme.css;x", "/assets/a\nb", "/theme.css\n", "/gradio_api/heartbeat/../x"]  # fmt: skip


@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"]),
    st.sampled_from([*CLOSED, "/", JOIN, "/theme.css", "/assets/index-a.js"])
    | st.text(max_size=20).map("/{}".format)
    | st.text("/.%a2Ee\\;", max_size=12).map("/assets{}".format),
)
def test_only_the_routes_of_the_page_are_open(method, path):
    lock = new_lock()
    body = json.dumps(GOOD).encode() if method == "POST" else b""
    status, _, words = ask(lock, request(method, path, [JSON], raw=path.encode("utf-8")), body)
    open_ = {"GET": r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)(/[\w-][\w.-]*)+",
             "HEAD": "/", "POST": JOIN}  # fmt: skip
    reached = re.fullmatch(open_.get(method, "(?!)"), path, re.ASCII) is not None
    assert (status == 200) == reached == bool(lock.app.seen), (method, path)
    assert reached or is_one_sentence(words) or method == "HEAD"


def test_a_path_written_in_another_way_is_not_the_same_path():
    """%2e、绝对地址、挂在别处的：解开之后像，也不算。"""
    lock = new_lock()
    for more in ({"raw": b"/%74heme.css"}, {"raw": b"http://x/theme.css"}, {"root_path": "/x"}):
        assert ask(lock, request(path="/theme.css", **more))[0] == 404
    assert lock.app.seen == []


def test_what_proxies_and_links_say_is_not_believed():
    lock = new_lock()
    more = [(b"x-forwarded-host", b"evil.example"), (b"forwarded", b"host=evil.example"),
            (b"x-forwarded-proto", b"https")]  # fmt: skip
    assert ask(lock, request(headers=more, query=b"deep_link=x&view=y"))[0] == 200
    (inside,) = lock.app.seen
    assert inside["query_string"] == b""
    assert [name for name, _ in inside["headers"]] == [b"host", b"x-forwarded-proto"]
    lock = new_lock(Names("127.0.0.1", PORT, ("demo.example",)))
    ask(lock, request(headers=[(b"x-forwarded-host", b"demo.example"), *more]))
    (inside,) = lock.app.seen  # 许可的名字照转：Gradio 由它知道自己的网址
    assert inside["headers"][1:] == [(b"x-forwarded-host", b"demo.example"), more[2]]


def test_a_websocket_is_closed():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(new_lock()({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# ---------- 2. 正文 ----------


def post(lock, body: bytes, *headers, path=JOIN, parts=(), **more):
    scope = request("POST", path, [*([] if b"content-type" in dict(headers) else [JSON]), *headers])
    return ask(lock, scope, body, *parts, **more)


def test_a_good_form_is_rewritten_with_only_what_is_known():
    lock = new_lock()
    form = {**GOOD, "oauth_token": "x", "batched": True, "event_data": {"path": "/etc/passwd"}}
    assert post(lock, json.dumps(form).encode())[0] == 200
    (inside,) = lock.app.seen
    found = json.loads(inside["body"])
    assert found == {**GOOD, "event_data": None, "trigger_id": None}
    assert dict(inside["headers"])[b"content-length"] == str(len(inside["body"])).encode()


def test_a_body_that_is_too_long_or_never_ends(monkeypatch):
    """说自己有多长的、一块一块没完没了的、半天不送的：都不等它读完。"""
    lock = new_lock()
    for length in (b"262145", b"9" * 19, b"9" * 5000, b"-1", b"1e9", b""):
        assert post(lock, b"", (b"content-length", length), more=True)[0] == 413
    pieces = [b"x" * 65536] * 10
    assert post(lock, b"{", parts=pieces, more=True)[0] == 413
    monkeypatch.setattr(lock_module, "PATIENCE", 0.05)
    assert post(lock, b"{", more=True)[0] == 408
    assert lock.app.seen == []
    get = request(headers=[(b"content-length", b"5")])
    assert ask(lock, get)[0] == 400
    assert ask(lock, request(headers=[(b"transfer-encoding", b"chunked")]))[0] == 400


def test_a_form_that_a_page_can_send_without_asking_is_refused():
    lock = new_lock()
    for kind in (b"text/plain", b"multipart/form-data", b"", b"application/json-x"):
        assert post(lock, json.dumps(GOOD).encode(), (b"content-type", kind))[0] == 415
    assert (
        post(lock, json.dumps(GOOD).encode(), (b"content-type", b"Application/JSON; x"))[0] == 200
    )


BODIES = [b"", b"null", b"[]", b"{", b'{"data": NaN}', b"[" * 100_000, b'{"a":' * 50_000, b"\xff",
          b"9" * 5000, b'"\\ud800"', b"\xef\xbb\xbf{}"]  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([2**63, -(2**64), 10**300, "字" * (WORDS + 1), "\ud800", "../../etc"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
forms = st.fixed_dictionaries(
    {},
    optional={
        "data": st.lists(values, min_size=5, max_size=5) | values | st.just(GOOD["data"]),
        "fn_index": st.just(7) | values,
        "session_hash": st.just("abc") | values | st.sampled_from(["a" * 41, "", "../x", "a\n"]),
        "event_id": st.just("0" * 32) | values,
        "trigger_id": values,
    },
)


@given(st.sampled_from([JOIN, CANCEL]), st.binary(max_size=50) | st.sampled_from(BODIES))
def test_what_is_no_form_is_one_sentence(path, body):
    lock = new_lock()
    status, _, words = post(lock, body, path=path)
    assert status == 422 and is_one_sentence(words) and lock.app.seen == []


@given(st.sampled_from([JOIN, CANCEL]), forms)
@example(JOIN, GOOD)
@example(JOIN, {**GOOD, "data": ["a", "b", None, float("nan"), 0]})
@example(JOIN, {**GOOD, "data": ["a", "b", [], 1, 0]})
@example(JOIN, {**GOOD, "fn_index": 8})
@example(JOIN, {**GOOD, "fn_index": True})
def test_only_values_that_the_page_can_send_get_in(path, form):
    try:
        found = Forms(CONFIG).read(path, json.dumps(form).encode())
    except BadForm as error:
        assert is_one_sentence(f"{error}\n")
        return
    assert re.fullmatch(r"[A-Za-z0-9]{1,40}", found["session_hash"])
    if path == CANCEL:
        assert set(found) == {"event_id", "session_hash", "fn_index"}
        return
    model, text, state, temp, seed = found["data"]
    assert found["fn_index"] == 7 and state is None
    assert all(x is None or (type(x) is str and len(x) <= WORDS) for x in (model, text))
    assert type(temp) in (int, float) and 0 <= temp <= 2
    assert seed is None or 0 <= seed < 2**63
    json.dumps(found, ensure_ascii=False).encode()


def test_a_new_kind_of_control_must_say_what_it_knows():
    config = {"components": [{"id": 1, "type": "file", "props": {}}],
              "dependencies": [{"id": 1, "inputs": [1], "backend_fn": True}]}  # fmt: skip
    with pytest.raises(NotImplementedError, match="file"):
        Forms(config)


# ---------- 3. 密码 ----------


def basic(text: str) -> tuple[bytes, bytes]:
    return b"authorization", b"Basic " + base64.b64encode(text.encode())


def test_without_the_password_nothing_is_answered():
    lock = new_lock(password=Password("ming", "守株待兔1234"))
    for scope in (request(), request(path="/theme.css"), request(path="/nowhere"),
                  request(path=DATA, query=b"session_hash=abc"),
                  request("POST", JOIN, [JSON])):  # fmt: skip
        status, headers, body = ask(lock, scope)
        assert status == 401 and b"Basic" in headers[b"www-authenticate"] and "要密码" in body
    assert lock.app.seen == []
    assert ask(lock, request(headers=[basic("ming:守株待兔1234")]))[0] == 200
    (inside,) = lock.app.seen
    assert b"authorization" not in dict(inside["headers"])


def test_a_thousand_guesses_at_once_are_one_guess(monkeypatch):
    """猜错之后的一秒，猜对了也不答；别处来的人不受影响。"""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    password = Password("ming", "right-password")
    right, wrong = (basic(f"ming:{x}")[1] for x in ("right-password", "wrong"))
    assert password.check(wrong, ("1.2.3.4", 1))[0] == 401
    assert {password.check(right, ("1.2.3.4", i))[0] for i in range(1000)} == {429}
    assert password.check(right, ("1.2.3.5", 1)) is None
    now[0] += 1.1
    assert password.check(right, ("1.2.3.4", 1)) is None
    for i in range(30_000):  # 记着的地址不会越来越多
        password.check(wrong, (str(i), 1))
        now[0] += 0.001
    assert len(password.wrong) < 15_000


@given(st.binary(max_size=30) | st.text(max_size=9).map(lambda t: basic(t)[1]))
def test_any_other_password_is_wrong(given_):
    assert Password("ming", "right-password").check(given_, None)[0] == 401


# ---------- 4. 走了的人 ----------


def test_those_who_do_not_listen_are_forgotten():
    async def play():
        lock = new_lock(grace=0.1)
        crowd, queue = lock.crowd, lock.crowd.queue
        queue.pending_messages_per_session.update(gone=[1], here=[1])
        assert crowd.join("gone") == crowd.join("here") == ""
        with crowd.listening("here"):
            await asyncio.sleep(0.25)
            assert queue.cleaned == ["gone"] and crowd.knows("here") and not crowd.knows("gone")
            scope = request(path=DATA, query=b"session_hash=gone")
            assert (await call(lock, scope))[0] == 404
        assert crowd.join("here") == ""  # 听完又问：重新算起
        await asyncio.sleep(0.05)
        with crowd.listening("here"):
            await asyncio.sleep(0.2)
        assert queue.cleaned == ["gone"]
        await asyncio.sleep(0.25)
        assert queue.cleaned == ["gone", "here"] and not crowd.visitors
        assert queue.pending_messages_per_session == {}

    asyncio.run(play())


def test_the_queue_is_bounded():
    async def play():
        lock = new_lock()
        body = json.dumps(GOOD).encode()
        lock.crowd.queue.pending_event_ids_session["abc"] = set(range(16))
        assert (await call(lock, request("POST", JOIN, [JSON]), body))[0] == 503
        lock.crowd.queue.pending_event_ids_session.clear()
        lock.crowd.queue.waiting = 256
        status, _, words = await call(lock, request("POST", JOIN, [JSON]), body)
        assert status == 503 and "排队的人太多" in words

    asyncio.run(play())


@pytest.mark.parametrize("query", [b"", b"session_hash=", b"session_hash=a&session_hash=b",
                                   b"session_hash=../x", b"session_hash=never", b"\xff",
                                   b"session_hash=a%00", b"x=1"])  # fmt: skip
def test_only_those_who_joined_can_listen(query):
    assert ask(new_lock(), request(path=DATA, query=query))[0] == 404


# ---------- 5. 真的 Gradio ----------

gradio_missing = importlib.util.find_spec("gradio") is None
needs_gradio = pytest.mark.skipif(gradio_missing, reason="没有安装 requirements-web.txt")
MARKUP = "<img src=x onerror=alert(1)>$$x^2$$"


class Page:
    """真的网页，跑在另一个线程的事件循环里，不经过网络。"""

    def __init__(self, out):
        from tools.web.page import build
        from tools.web.server import locked

        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.lock = locked(build(out, None), Names("127.0.0.1", PORT))
        self.config = self.lock.app.routes[0].app.get_blocks().config
        self.started = asyncio.run_coroutine_threadsafe(self.live(), self.loop)
        while not getattr(self, "ready", False):
            time.sleep(0.01)

    async def live(self):
        """uvicorn 开始与结束时做的事。"""
        self.over = asyncio.Event()
        async with self.lock.app.router.lifespan_context(self.lock.app):
            self.ready = True
            await self.over.wait()

    def close(self):
        self.loop.call_soon_threadsafe(self.over.set)
        self.started.result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)

    def ask(self, scope, *parts):
        work = call(self.lock, scope, *parts)
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def join(self, form):
        return self.ask(request("POST", JOIN, [JSON]), json.dumps(form).encode())

    def listen(self, session) -> dict:
        """听到答完为止；返回最后说的。"""
        work = self.hear(session)
        heard = asyncio.run_coroutine_threadsafe(work, self.loop).result(30)
        return [m for m in heard if m["msg"] not in ("close_stream", "heartbeat")][-1]

    async def hear(self, session):
        left, heard = asyncio.Event(), []
        scope = request(path=DATA, query=f"session_hash={session}".encode())

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            for line in message.get("body", b"").decode().splitlines():
                if line.startswith("data:"):
                    heard.append(json.loads(line[5:]))
                    if heard[-1]["msg"] in ("process_completed", "unexpected_error"):
                        left.set()

        await self.lock(scope, receive, send)
        return heard

    def fn(self, target: str) -> dict:
        """页面上做这件事的那个按钮。"""
        return next(
            d for d in self.config["dependencies"]
            if any(t[1] == target for t in d["targets"]) and d["backend_fn"]
        )  # fmt: skip

    def open(self, session: str) -> list:
        """打开页面；返回第一个下拉框的各个选项。"""
        form = {"fn_index": self.fn("load")["id"], "session_hash": session, "data": []}
        assert self.join(form)[0] == 200
        return self.listen(session)["output"]["data"][0]["choices"]

    def talk(self, session: str, model, text="守株待兔", **values):
        """说一句话；返回听到的。"""
        components = {part["id"]: part for part in self.config["components"]}
        fn = next(d for d in self.config["dependencies"] if len(d["inputs"]) == 11)
        data = []
        for part in (components[i] for i in fn["inputs"]):
            label = part["props"].get("label")
            fixed = {"state": None, "dropdown": model, "textbox": text}
            value = values.get(label, part["props"].get("value"))
            data.append(fixed.get(part["type"], value))
        form = {"fn_index": fn["id"], "session_hash": session, "data": data}
        return self.join(form)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """一个没训练过的小模型的网页；它的文件夹的名字是一段网页。"""
    if gradio_missing:
        pytest.skip("没有安装 requirements-web.txt")
    from rote import learn_by_rote

    from tokenizer import Tokenizer

    out = tmp_path_factory.mktemp("lock")
    (out / MARKUP.replace("/", "")).mkdir()
    learn_by_rote([[101, 5, 6, 102]] * 2, out / MARKUP / "sft.pt", "sft", Tokenizer())
    torch.set_num_threads(1)
    page = Page(out)
    yield page
    page.close()


@contextlib.contextmanager
def no_traceback():
    """其间标准错误里没有回溯。"""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        yield
    assert "Traceback" not in said.getvalue(), said.getvalue()[-3000:]
    assert "网页答不了" not in said.getvalue(), said.getvalue()


def routes_of(app, prefix="") -> set[str]:
    """一个程序里所有的路，连挂在里面的。"""
    found = set()
    for route in getattr(app, "routes", []):
        path = prefix + getattr(route, "path", "").rstrip("/")
        inner = getattr(route, "original_router", getattr(route, "app", None))
        found |= routes_of(inner, path) if hasattr(inner, "routes") else {path or "/"}
    return found


OPEN = {"/", "/assets/{path:path}", "/static/{path:path}", "/theme.css", "/favicon.ico",
        "/manifest.json", "/gradio_api/app_id", "/gradio_api/heartbeat/{session_hash}", DATA, JOIN,
        CANCEL}  # fmt: skip


def test_every_other_route_of_gradio_is_closed(page):
    """装着的这一版 Gradio 有哪些路，一条一条试；新版本多出来的，也是关着的。"""
    routes = routes_of(page.lock.app)
    assert routes > OPEN and len(routes) > 40
    for route in routes - OPEN:
        path = re.sub(r"\{[^}]*\}", "x", route)
        for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS"):
            status, *_ = page.ask(request(method, path, [JSON]), b"{}")
            assert status in (404, 405), (method, path, status)


def test_a_conversation_and_the_names_of_checkpoints(page):
    """真的答；文件夹的名字原样是一项选项，不在网页里。"""
    ((name, path),) = page.open("talk1")
    assert name == path and MARKUP in name
    assert page.talk("talk1", path)[0] == 200
    heard = page.listen("talk1")
    assert heard["success"] and heard["msg"] == "process_completed"
    html = page.ask(request())[2]
    assert "onerror" not in html and "/etc" not in html


def test_a_visitor_opens_only_the_files_that_are_listed(page, tmp_path):
    """没打开过页面的、打开过的，都选不了没有列出的文件：一句话，没有回溯。"""
    page.open("other1")
    with no_traceback():
        for session in ("other1", "other2"):
            for path in ("/etc/passwd", str(tmp_path), "../x.pt", "", "\x00", "/dev/stdin"):
                assert page.talk(session, path)[0] == 200
                last = page.listen(session)
                assert not last["success"] and "请刷新这一页" in last["output"]["error"]
    heard = page.talk("other1", None)[0], page.listen("other1")
    assert heard[0] == 200 and heard[1]["success"]  # 「还没有模型」写在页面上


field_values = st.sampled_from([None, 0, 1, -1, 0.3, 2**62, 1e308, "", "x", "守株待兔", "字" * 9000,
                                "\x00", "$$x$$", [], {}, True])  # fmt: skip


@SLOW
@given(st.data())
def test_whatever_is_sent_the_page_still_answers(page, data):
    """每个按钮，各种值：没有回溯，没有 500；放进去的都有回答。"""
    if not hasattr(page, "model"):
        ((_, page.model),) = page.open("fuzz")
        page.count = 0
        page.lock.crowd.grace = 60  # 机器忙时，两次之间停上几秒，不能算走了
    components = {part["id"]: part for part in page.config["components"]}
    fn = data.draw(st.sampled_from(page.config["dependencies"]))
    likely = {"state": st.none(), "dropdown": st.just(page.model),
              "textbox": st.sampled_from(["守株待兔", "", "a"]) | st.text(max_size=9),
              "slider": st.sampled_from([1, 0.5, 2]),
              "number": st.sampled_from([0, 1, None])}  # fmt: skip
    sent = [data.draw(likely[components[i]["type"]]) for i in fn["inputs"]]
    wrong = st.lists(st.sampled_from(range(len(sent))), max_size=2) if sent else st.just([])
    for i in data.draw(wrong):
        sent[i] = data.draw(field_values)
    page.count += 1
    session = data.draw(st.sampled_from(["fuzz", f"fuzz{page.count}"]))
    with no_traceback():
        form = {"fn_index": fn["id"], "session_hash": session, "data": sent}
        status, _, words = page.join(form)
        assert status in (200, 422), words
        if status == 200:
            last = page.listen(session)
            assert last["msg"] == "process_completed", last
            assert last["success"] or is_one_sentence(f"{last['output']['error']}\n"), last


@pytest.mark.slow
def test_two_hundred_who_left_do_not_delay_the_next(page):
    """从前下一位要等几分钟。"""
    page.lock.crowd.grace = GRACE
    ((_, path),) = page.open("next")
    for i in range(200):
        page.open(f"left{i}")
        assert page.talk(f"left{i}", path, max=500, temp=2)[0] == 200
    begun = time.monotonic()
    assert page.talk("next", path)[0] == 200
    assert page.listen("next")["success"]
    assert time.monotonic() - begun <= 5


# ---------- 6. 命令行 ----------


def test_the_password_is_not_on_the_command_line(monkeypatch, capsys):
    from config import UserError
    from settings.flags import read_options
    from tools.web.__main__ import PASSWORD, Options, choose_password, warn

    for args, words in [
        (["--auth", "ming:secret"], "没有冒号"),
        (["--allow_host", "a.example,http://b"], "allow_host 要是"),
    ]:
        with pytest.raises(UserError, match=words):
            read_options(Options, args, "")
    assert choose_password(None) is None
    choose_password("ming")
    said = re.fullmatch(r"名字 ming，密码 (\S{16})（浏览器会问）\n", capsys.readouterr().out)
    assert said
    monkeypatch.setenv(PASSWORD, "short")
    with pytest.raises(UserError, match="至少 8 个字"):
        choose_password("ming")
    monkeypatch.setenv(PASSWORD, "long-enough")
    chosen = choose_password("ming")
    assert chosen.check(basic("ming:long-enough")[1], None) is None
    assert capsys.readouterr().out == ""  # 自己定的，不再印出来
    warn(Options(host="0.0.0.0"))
    assert "--auth" in capsys.readouterr().err
    warn(Options(host="0.0.0.0", auth="ming"))
    assert "不加密" in capsys.readouterr().err


def test_who_can_reach_it_is_known():
    from tools.web.__main__ import check_port

    assert check_port("127.0.0.1", 7899) and check_port("localhost", 7899)
    assert not check_port("0.0.0.0", 7899)
