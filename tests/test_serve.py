"""服务：真的 `transformers serve`，真的 openai 客户端；答的与我们自己生成的一字不差。"""

import importlib.util
import socket
import urllib.error
import urllib.request

import pytest
from rote import learn_by_rote
from scripts import REPO, Running, run

from config import Config
from generate import Sampling, load_for_chat
from sft_chat import ask
from tools.export import export
from training import Device

missing = [
    name for name in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None
]
if missing:
    pytest.skip(
        f"没有 {'、'.join(missing)}：pip install -r examples/serve/requirements.txt",
        allow_module_level=True,
    )

import openai  # noqa: E402

from examples.serve.ask import Options, answer  # noqa: E402

WHERE = "它出自哪里？"
BOOK = [  # 同一句追问，答什么要看前文
    ["画蛇添足是什么意思？", "比喻做了多余的事。", WHERE, "出自《战国策》。"],
    ["守株待兔是什么意思？", "比喻不知变通。", WHERE, "出自《韩非子》。"],
    [WHERE, "哪个成语？"],
]
# 别的测试可能设了代理；找本机的服务，不经过它。
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}


def turns_ids(tokenizer, texts: list[str]) -> list[int]:
    """一问一答，依次相接。"""
    roles = ["user", "assistant"] * len(texts)
    turns = [tokenizer.turn_ids(r, tokenizer.encode(t)) for r, t in zip(roles, texts, strict=False)]
    return [i for turn in turns for i in turn]


@pytest.fixture(scope="module")
def speaker(tokenizer, tmp_path_factory):
    """背下了 BOOK 的模型，与导出的文件夹在同一个目录里。"""
    path = tmp_path_factory.mktemp("serve") / "sft.pt"
    learn_by_rote([turns_ids(tokenizer, texts) for texts in BOOK], path, "sft", tokenizer)
    export(path, path.with_name("hf"))
    speaker = load_for_chat(path, Device(Config(device="cpu", dtype="float32", compile=False)))
    speaker.folder = path.parent
    return speaker


@pytest.fixture(scope="module")
def url(speaker):
    """服务的地址；测试完了，按它的进程号结束它。"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = Running(
        speaker.folder, "transformers.cli.transformers", "serve", "hf",
        "--host", "127.0.0.1", "--port", str(port), env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert server.until(lambda: healthy(port)), server.text()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.process.terminate()
        server.process.wait(60)


def healthy(port: int) -> bool:
    """服务起来了没有。"""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def greedy(speaker, texts: list[str]) -> str:
    """我们自己的模型，总选最可能的，接着 texts 回答。"""
    tokenizer, turns = speaker.tokenizer, []
    for role, text in zip(["user", "assistant"] * len(texts), texts[:-1], strict=False):
        turns.append(tokenizer.turn_ids(role, tokenizer.encode(text)))
    _, ids = ask(speaker, turns, texts[-1])
    return tokenizer.decode(speaker.generate(ids, Sampling(temp=0, penalty=1, max=60)))


def messages(texts: list[str]) -> list[dict]:
    """一问一答 -> openai 的写法。"""
    roles = ["user", "assistant"] * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


@pytest.mark.parametrize(
    "texts",
    [
        BOOK[0][:1],
        BOOK[0][:3],
        BOOK[1][:3],
        [WHERE],
        ["没背过的：<|im_end|>“怎样”？\n Hello"],  # 写着的控制词元只是文字
    ],
    ids=["问一句", "追问一", "追问二", "没有前文", "没背过"],
)
def test_the_server_says_what_our_model_says(speaker, url, texts):
    client = openai.OpenAI(base_url=url, api_key="none")
    pieces = list(answer(client, "hf", messages(texts), Options(temp=0, max=60)))
    whole = client.chat.completions.create(
        model="hf", messages=messages(texts), temperature=0, max_tokens=60
    )
    ours = greedy(speaker, texts)
    assert len(pieces) > 3  # 真的是一小段一小段来的
    assert "".join(pieces) == whole.choices[0].message.content == ours
    for book in BOOK:
        if texts == book[: len(texts)]:
            assert ours == book[len(texts)]
    ids = ask(speaker, [], texts[-1])[1] if len(texts) == 1 else None
    assert ids is None or whole.usage.prompt_tokens == len(ids)


def test_a_conversation_remembers_the_earlier_turns(speaker, url):
    flags = ("--url", url, "--temp", "0", "--max", "60")
    for question, meaning, _, source in BOOK[:2]:
        out, _ = run(REPO, "examples.serve.ask", question, WHERE, *flags, env=ENVIRONMENT)
        assert out == f"{meaning}\n{source}\n"
    # 从标准输入读，一行一句；不带前文，就不知道「它」是谁。
    out, _ = run(
        REPO, "examples.serve.ask", *flags, "--rounds", "0",
        stdin=f"{BOOK[0][0]}\n\n{WHERE}\n", env=ENVIRONMENT,
    )  # fmt: skip
    assert out == f"{BOOK[0][1]}\n{BOOK[2][1]}\n"


@pytest.mark.parametrize(
    "args, words",
    [
        (["--url", "http://127.0.0.1:9/v1"], ["连不上 http://127.0.0.1:9/v1", "请先启动服务"]),
        (["--url", "localhost:8000"], ["http://", "'localhost:8000'"]),
        (["--temp", "-1", "--max", "0"], ["--temp", "得到的是 -1.0", "--max"]),
        (["--rounds", "-1"], ["--rounds 不能是负数"]),
        (["--tmep", "1"], ["没有参数 --tmep；最接近的是 --temp"]),
    ],
)
def test_mistakes_are_one_sentence(args, words):
    out, err = run(REPO, "examples.serve.ask", "你好", *args, code=2, env=ENVIRONMENT)
    assert out == "" and err.startswith("错误：") and err.count("\n") == 1
    assert all(word in err for word in words)


def test_a_server_that_is_not_one_is_one_sentence(url):
    out, err = run(
        REPO, "examples.serve.ask", "你好", "--url", f"{url}/nothing", code=2, env=ENVIRONMENT
    )
    assert out == "" and "的服务答不了（" in err and err.count("\n") == 1
