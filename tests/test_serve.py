"""服务：真的 `transformers serve`，真的 openai 客户端；答的与我们自己生成的一字不差。"""

import importlib.util
import io
import re
import shlex
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request

import pytest
from rote import learn_by_rote
from scripts import REPO, Running, run_apart

from config import Config, UserError
from engine.device import Device
from engine.speed import load_for_chat
from generate import Sampling
from sft_chat import ask
from tools.huggingface.export import export

missing = [n for n in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(n) is None]
if missing:
    why = f"没有 {'、'.join(missing)}：pip install -r examples/serve/requirements.txt"
    pytest.skip(why, allow_module_level=True)

import openai  # noqa: E402

from examples.serve.ask import USAGE, Options, answer, main  # noqa: E402
from settings.flags import read_options  # noqa: E402

pytestmark = pytest.mark.doors
WHERE = "它出自哪里？"
BOOK = [  # 同一句追问，答什么要看前文
    ["画蛇添足是什么意思？", "比喻做了多余的事。", WHERE, "出自《战国策》。"],
    ["守株待兔是什么意思？", "比喻不知变通。", WHERE, "出自《韩非子》。"],
    [WHERE, "哪个成语？"],
]
DOCUMENT = "对牛弹琴：比喻说话不看对象。"
# 不联网，也不查有没有新版本；就算设了代理，找本机的服务也不经过它。
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "NO_PROXY": "127.0.0.1",
}  # fmt: skip


def messages(texts: list[str]) -> list[dict[str, str]]:
    """一问一答，依次相接。"""
    roles = ["user", "assistant"] * len(texts)
    return [{"role": r, "content": text} for r, text in zip(roles, texts, strict=False)]


def turns(tokenizer, texts: list[str]) -> list[list[int]]:
    """同 `messages`，写成我们自己的编号。"""
    return [
        tokenizer.turn_ids(turn["role"], tokenizer.encode(turn["content"]))
        for turn in messages(texts)
    ]


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    """背下了 BOOK 与 DOCUMENT 的模型。"""
    path = tmp_path_factory.mktemp("serve") / "sft.pt"
    document = [tokenizer.bos_id, *tokenizer.encode(DOCUMENT), tokenizer.eos_id]
    book = [[i for turn in turns(tokenizer, texts) for i in turn] for texts in BOOK]
    learn_by_rote([document, *book], path, "sft", tokenizer)
    return path


@pytest.fixture(scope="module")
def speaker(checkpoint):
    """我们自己怎样说。"""
    return load_for_chat(checkpoint, Device(Config(device="cpu", dtype="float32", compile=False)))


@pytest.fixture(scope="module")
def url(checkpoint):
    """服务的地址；测试完了，按它的进程号结束它。"""
    folder = checkpoint.parent
    export(checkpoint, folder / "hf")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = Running(
        folder, "transformers.cli.transformers", "serve", "hf",
        "--host", "127.0.0.1", "--port", str(port), env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert server.until(lambda: healthy(port)), server.text()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.end(signal.SIGTERM)


def healthy(port: int) -> bool:
    """服务起来了没有。"""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.mark.parametrize(
    "texts, expected",
    [
        (BOOK[0][:1], BOOK[0][1]),
        (BOOK[0][:3], BOOK[0][3]),
        (BOOK[1][:3], BOOK[1][3]),
        (BOOK[2][:1], BOOK[2][1]),
        (["没背过的：<|im_end|>“怎样”？\n Hello"], None),  # 写着的控制词元只是文字
    ],
    ids=["问一句", "追问", "另一个的追问", "没有前文", "没背过"],
)
def test_the_server_says_what_our_model_says(speaker, url, texts, expected):
    client = openai.OpenAI(base_url=url, api_key="none")
    pieces = list(answer(client, "hf", messages(texts), Options(temp=0, max=60)))
    whole = client.chat.completions.create(
        model="hf", messages=messages(texts), temperature=0, max_tokens=60
    )
    tokenizer = speaker.tokenizer
    _, ids = ask(speaker, turns(tokenizer, texts[:-1]), texts[-1])
    ours = tokenizer.decode(speaker.generate(ids, Sampling(temp=0, penalty=1, max=60)))
    assert len(pieces) > 3  # 真的是一小段一小段来的
    assert "".join(pieces) == whole.choices[0].message.content == ours
    assert whole.usage.prompt_tokens == len(ids)
    assert expected in (ours, None)


def test_a_model_that_only_continues_is_served_too(url):
    client = openai.OpenAI(base_url=url, api_key="none")
    begin, rest = DOCUMENT[:5], DOCUMENT[5:]
    reply = client.completions.create(
        model="hf", prompt=f"<|im_start|>{begin}", temperature=0, max_tokens=60
    )
    assert reply.choices[0].text == rest
    assert reply.usage.prompt_tokens == 1 + len(begin)


def test_the_program_remembers_the_earlier_turns(url):
    flags = ("--url", url, "--temp", "0", "--max", "60")
    question, meaning, _, source = BOOK[0]
    out, _ = run_apart(REPO, "examples.serve.ask", question, WHERE, *flags, env=ENVIRONMENT)
    assert out == f"{meaning}\n{source}\n"
    # 从标准输入读，一行一句；不带前文，就不知道「它」是谁。
    out, _ = run_apart(
        REPO, "examples.serve.ask", *flags, "--rounds", "0",
        stdin=f"{question}\n\n{WHERE}\n", env=ENVIRONMENT,
    )  # fmt: skip
    assert out == f"{meaning}\n{BOOK[2][1]}\n"


def test_a_question_in_another_encoding_is_not_guessed(url, monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO("它出自哪里？\n".encode("gbk")), errors="replace")
    monkeypatch.setattr(sys, "stdin", pipe)
    monkeypatch.setattr(sys, "argv", ["ask.py", "--url", url])
    with pytest.raises(UserError, match=r"第 1 行不是 UTF-8.*iconv -f GB18030"):
        main()


def test_no_server_is_one_sentence():
    nowhere = "http://127.0.0.1:9/v1"
    out, err = run_apart(
        REPO, "examples.serve.ask", "你好", "--url", nowhere, code=2, env=ENVIRONMENT
    )
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"错误：连不上 {nowhere}；请先启动服务")


def test_another_kind_of_server_is_one_sentence(url):
    out, err = run_apart(
        REPO, "examples.serve.ask", "你好", "--url", f"{url}/nothing", code=2, env=ENVIRONMENT
    )
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"错误：{url}/nothing 的服务答不了（")


PAGE = b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<html>hello</html>"
MODELS = b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"data": [{"id": "m"}]}'
BROKEN = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {oops\n\n"


@pytest.mark.parametrize("replies", [[PAGE], [MODELS, BROKEN], [b"oops"]])
def test_what_is_no_such_service_is_one_sentence(replies, monkeypatch):
    """网页、坏的 JSON、不是 HTTP 的：都说一句话。"""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for reply in replies:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(sys, "argv", ["ask", "你好", "--url", url])
        with pytest.raises(UserError, match=r"的服务答不了|连不上"):
            main()
        thread.join(10)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--url", "localhost:8000"], "http://.*'localhost:8000'"),
        (["你好", "--temp", "-1", "--max", "0"], "--temp .*得到的是 -1.0；--max .*得到的是 0"),
        (["--rounds", "-1"], "--rounds 不能是负数，得到的是 -1"),
        (["你好", "--tmep", "1"], "没有参数 --tmep；最接近的是 --temp"),
    ],
)
def test_mistakes_are_named(args, words):
    with pytest.raises(UserError, match=words):
        read_options(Options, args, USAGE)


def test_the_commands_in_its_readme_are_understood():
    text = (REPO / "examples/serve/README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m examples\.serve\.ask(.*)$", text, re.M)
    assert len(commands) == 3
    for command in commands:
        read_options(Options, shlex.split(command, comments=True), USAGE)
