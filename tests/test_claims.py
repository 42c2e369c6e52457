"""检查点里什么都可能是假的：说的大小、名字、值、路径。要么照常能用，要么一句话拒绝，不占内存。

平时每个测试试一百来个例子；改了读检查点的代码，不妨多试几千个：

    python -m pytest tests/test_claims.py --hypothesis-profile=thorough
"""

import copy
import os
import resource
import socket
import struct
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_checkpoint import SMALL, snapshot

from config import N_TOKENS, Config, UserError
from engine import corpora
from engine.checkpoint import Damaged, build_model, load, read, restore, summary, write
from engine.distributed import World
from engine.progress import Progress, RandomNumbers
from engine.run_folder import RunFolder
from engine.shared_row import SharedRow
from model import Transformer
from optimizer import build_optimizer
from settings.resolve import load_config
from settings.say import indented
from settings.stored import inherit

# 词表不能再小；别的都取最小的，一个检查点几百 KB，读一遍几毫秒。
TINY = replace(SMALL, dim=2, n_layers=1, n_heads=1, hidden_dim=2, vocab_size=N_TOKENS)


@pytest.fixture(scope="module")
def good(tokenizer) -> dict:
    """一个好的检查点，连同合用的一行。"""
    content = snapshot(tokenizer, TINY)
    order = torch.arange(N_TOKENS)
    column = order.clamp(max=99)
    bias = torch.zeros(100)
    bias[-1] = torch.tensor(float(N_TOKENS - 99)).log()
    content["shared_row"] = {"rows": order[:100], "column": column, "bias": bias,
                             "members": order[99:]}  # fmt: skip
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """一个工作目录，out/x 里放检查点。"""
    path = tmp_path_factory.mktemp("claims")
    (path / "out/x").mkdir(parents=True)
    return path


def changed(content: dict, where: tuple, value) -> dict:
    """content 的一份，其中的一处换成 value。"""
    content = copy.deepcopy(content)
    inner = content
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    return content


def refused(path: Path, tokenizer, seconds: float = 30) -> str:
    """读它：一句话拒绝，不占内存，也不久；返回那句话。"""
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        load(path, tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - started < seconds and peak < 100e6
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# ---------- 1. 文件：大小、压缩、重叠，以及不是文件的 ----------


def pack(path: Path, members: list[tuple[str, bytes]], compression=zipfile.ZIP_STORED) -> None:
    """一个 zip 文件。"""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(f"archive/{name}", content)


def program(*pieces: bytes) -> bytes:
    """一段 pickle。"""
    return b"\x80\x02" + b"".join(pieces) + b"."


def tensor(n: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """一段 pickle：第 0 块存储里有 n 个 fp32，排成 shape。"""

    def number(value: int) -> bytes:
        raw = value.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + raw if abs(value) >= 2**63 else b"\x8a\x08" + raw[:8]

    def tuple_of(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    def word(text: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(text)) + text

    storage = b"(" + word(b"storage") + b"ctorch\nFloatStorage\n" + word(b"0") + word(b"cpu")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(n) + b"tQ" + number(offset)
        + tuple_of(shape) + tuple_of(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def in_dict(value: bytes) -> bytes:
    """{"model": value}，看看里面的东西收不收。"""
    return program(b"}X\x05\x00\x00\x00model", value, b"s")


def twice(depth: int) -> bytes:
    """一段 pickle：一层套一层的元组，每一层是里面那层的两份；第 depth 层存在备忘的 depth 号里。"""
    return b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth))


FOUR = b"\x00\x00\x80?" * 4
ONES = ("data/0", FOUR)
PROGRAMS = {
    "一千亿字节": (program(b"cbuiltins\nbytearray\n\x8a\x05\x00\xe8vH\x17\x85R"), "bytearray"),
    "张量比存储大": (in_dict(tensor(4, (40000, 40000), (40000, 1))), "没有这么多"),
    "张量从存储之外开始": (in_dict(tensor(4, (4,), (1,), 1)), "没有这么多"),
    "存储比文件大": (in_dict(tensor(10**9, (10**9,), (1,))), "不是这么多"),
    "步长是零": (in_dict(tensor(4, (10**9, 4), (0, 1))), "不是连续的"),
    "负的形状": (in_dict(tensor(4, (-4,), (1,))), "形状不对"),
    "大得离谱的形状": (in_dict(tensor(4, (2**70,), (1,))), "大得离谱"),
    "编号是 2^31 的备忘": (program(b"Nr\xff\xff\xff\x7f"), "不是 mini-llm 的检查点"),
    "夹带的程序": (program(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R"), "os.system"),
    "改掉一个函数": (program(b"ctorch._utils\n_rebuild_tensor_v2\n}b"), "用错了地方"),
    "散列要算 2^60 次的键": (program(twice(60), b"}h\x3cNs"), "用错了地方"),
    "两层的元组造一个字典": (
        program(twice(60), b"ccollections\nOrderedDict\nh\x3cN\x86\x85\x85R"), "用错了地方"),
    "九十万层的元组当键": (program(b"})", b"\x85" * 9 * 10**5, b"Ns"), "用错了地方"),
    "九十万层的元组当形状": (in_dict(tensor(4, (4,), (1,)).replace(
        b"(\x8a\x08\x04" + bytes(7) + b"t(", b")" + b"\x85" * 9 * 10**5 + b"(")), "形状不对"),
    "弹出没有的": (program(b"\x86"), "不成对"),
    "套了十万层": (program(b"]" * 10**5, b"a" * (10**5 - 1)), "套得太深"),
    "六十万个空列表": (program(b"(", b"]" * 6 * 10**5, b"t"), "太多"),
    "十的四百次方": (in_dict(b"\x8a\xa7" + (10**400).to_bytes(167, "little")), "大得离谱"),
    "没有说完": (b"\x80\x02}", "不是完好的检查点"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_small_file_claims_is_held_against_its_bytes(folder, tokenizer, name):
    """几百字节的文件，说自己有几个 GB。"""
    code, part = PROGRAMS[name]
    path = folder / "small.pt"
    pack(path, [("data.pkl", code), ONES])
    assert part in refused(path, tokenizer)


def test_lists_inside_lists_do_not_multiply(folder, tokenizer):
    """同一个列表出现十次，一层套一层：几百字节，写出来是一百亿个值。"""
    code = b"]q\x00"
    for n in range(10):
        code += b"(" + bytes([ord("h"), n]) * 10 + b"tq" + bytes([n + 1])
    path = folder / "laughs.pt"
    pack(path, [("data.pkl", b"\x80\x02" + code + b".")])
    assert "太多" in refused(path, tokenizer)


def test_many_tensors_in_one_place_do_not_multiply(folder, tokenizer):
    """一万个张量都指着同一块 64 KB：抄出来是 655 MB。"""
    path = folder / "overlap.pt"
    same = tensor(2**14, (2**14,), (1,)) * 10**4
    pack(path, [("data/0", bytes(2**16)), ("data.pkl", in_dict(b"(" + same + b"t"))])
    assert "没有这么多" in refused(path, tokenizer)


def test_a_zip_that_is_not_what_torch_writes_is_refused_before_it_is_read(folder, tokenizer):
    path, code = folder / "odd.pt", program(b"}")
    pack(path, [("data.pkl", code), ("data/0", bytes(50_000_000))], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "压缩过的" in refused(path, tokenizer)
    with pytest.warns(UserWarning, match="Duplicate"):
        pack(path, [("data.pkl", code), ("data.pkl", code)])
    assert "名字相同" in refused(path, tokenizer)
    pack(path, [(f"data/{n:099}", b"") for n in range(100_001)])
    assert "太多" in refused(path, tokenizer)
    raw = bytearray(path.read_bytes())
    raw[-14:-10] = struct.pack("<HH", 1, 1)  # 说只有一块
    path.write_bytes(raw)
    assert "太多" in refused(path, tokenizer)
    pack(path, [("data.pkl", code), ("byteorder", b"big")])
    assert "字节次序" in refused(path, tokenizer)
    pack(path, [("other", code)])
    assert "不是 torch.save 写的" in refused(path, tokenizer)
    pack(path, [("data.pkl", code), ONES])
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 42 : at + 46] = bytes(4)  # 第二块说自己也在开头
    path.write_bytes(raw)
    assert "重叠" in refused(path, tokenizer)
    pack(path, [("data.pkl", code), ONES])
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)  # 说自己有 2 GB
    path.write_bytes(raw)
    assert "比文件还大" in refused(path, tokenizer)


def test_what_is_not_a_file_is_named_and_does_not_hang(folder, tokenizer, tmp_path, monkeypatch):
    pipe, other = tmp_path / "pipe.pt", tmp_path / "socket.pt"
    os.mkfifo(pipe)
    assert "不是普通的文件" in refused(pipe, tokenizer)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.pt")
        assert "读不了" in refused(other, tokenizer)
    assert "不是普通的文件" in refused(Path("/dev/zero"), tokenizer)
    (tmp_path / "out/x").mkdir(parents=True)
    (tmp_path / "out/x/pretrain.pt").symlink_to(pipe)
    config, origins = load_config("pretrain", ["--out_dir", "out/x", "--resume"])
    run = RunFolder("pretrain", config, origins, World())
    with pytest.raises(UserError, match="不是普通的文件"):
        run.begin(config, origins, tokenizer)
    run.close()


# ---------- 2. 值 ----------

F, T = torch.zeros, torch.tensor
VALUES = {  # 哪里: 换成什么
    "stage": ["chat", "", 3, "预训练"],
    "max_steps": [-5, True, 10.0, 2**60],
    "device": [5, "x" * 10**5, "\ud800"],
    "versions": [{"torch": 3}, {1: "x"}, {"torch": "2" * 999}],
    "data": [{"epoch": -1}, {"train_sha256": ["a"]}, {"row": 10**400}],
    "progress/step": [-5, True, 1.0, 10**400, None, float("nan")],
    "progress/tokens": [-1],
    "progress/seconds": [-1.0, float("nan"), float("inf"), 3],
    "progress/val_bpc": [-1.0, "低", None],
    "config/max_len": [3 * 10**7, 2**20 + 1, -1, "长", 1e9],
    "config/dim": [40000, 2**40, 0],
    "config/n_layers": [10**9, 1001, 2],
    "config/hidden_dim": [10**9, 3],
    "config/n_kv_heads": [2],
    "config/n_experts": [8, 10**9],
    "config/lr": [float("nan"), "快", [[1]]],
    "config/data": ["", "长" * 5000, "a\0b"],
    "config/data_dir": ["data\0"],
    "config/replay_data": ["\0"],
    "model/embedding.weight": [F(N_TOKENS, 2).double(), F(N_TOKENS, 2).long(), F(N_TOKENS, 3),
                               F(N_TOKENS, 2, dtype=torch.complex64), F(N_TOKENS, 2).half(), 7],
    "model/norm.weight": [F(3), F(2).bool(), [1.0, 2.0], F(1).expand(2), F(2).to_sparse()],
    "model/blocks.0.attention.key.weight": [F(4, 4), F(2, 2, 1), F(2, 2).to("meta")],
    "rng/cpu": [F(5056), "随机"],
    "rng/cuda": [5, [F(3)]],
    "scaler": [{"scale": 1.0}, {"scale": float("inf")}, {"scale": 0.0}, 5],
    "optimizers": [[{}], [{}, {}], [{"state": []}] * 2, "无"],
    "shared_row": [{}, {"rows": F(3)}, [1]],
    "shared_row/rows": [T([0, 1]), T([N_TOKENS]), T([-1] * 100), F(100)],
    "shared_row/column": [torch.full((N_TOKENS,), 100), T([0])],
    "shared_row/bias": [F(100), F(3), torch.full((100,), float("nan"))],
    "shared_row/members": [T([0] * (N_TOKENS - 99)), torch.empty(0).long()],
}  # fmt: skip


@pytest.mark.parametrize("spot", VALUES)
def test_values_are_checked_not_only_types(folder, tokenizer, good, spot):
    path = folder / "value.pt"
    for value in VALUES[spot]:
        torch.save(changed(good, tuple(spot.split("/")), value), path)
        said = refused(path, tokenizer)
        assert spot.split("/")[-1] in said or "对不上" in said or "检查点" in said, said


def restored(content: dict, path: Path) -> None:
    """像接着练那样，取回优化器等的状态，再走一步。"""
    model = Transformer(Config(**content["config"]))
    optimizer = build_optimizer(model, TINY, 0.01)
    parts = {"optimizers": optimizer, "rng": RandomNumbers(), "progress": Progress(),
             "scaler": torch.amp.GradScaler("cpu", enabled=True)}  # fmt: skip
    restore(content, parts, path)
    SharedRow.from_state_dict(content["shared_row"], torch.device("cpu"))
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    optimizer.step()


MOMENTUM, ADAM = ("optimizers", 0, "state"), ("optimizers", 1, "state")
STATES = [
    ((*MOMENTUM, 0, "momentum"), F(3, 3)),
    ((*MOMENTUM, 0, "momentum"), F(2, 2).long()),
    ((*MOMENTUM, 0), {}),
    ((*MOMENTUM, 0, "more"), F(2, 2)),
    ((*MOMENTUM, 99), {"momentum": F(2, 2)}),
    (MOMENTUM, {0: {"momentum": F(2, 2)}}),
    ((*ADAM, 0, "step"), T(-1.0)),
    ((*ADAM, 0, "step"), T(float("nan"))),
    ((*ADAM, 0, "step"), F(3)),
    ((*ADAM, 0, "exp_avg_sq"), F(2)),
    (("rng", "cpu"), F(5056).byte()),
    (("rng", "cpu"), F(3).byte()),
    (("rng",), {}),
]


@pytest.mark.parametrize("n", range(len(STATES)))
def test_states_that_do_not_fit_are_refused_when_training_goes_on(folder, good, n):
    path = folder / "state.pt"
    write(path, good)
    restored(read(path), path)  # 好的装得回去
    write(path, changed(good, *STATES[n]))
    with pytest.raises(Damaged, match="状态不对") as caught:
        restored(read(path), path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_context_that_needs_more_memory_than_there_is_says_how_much(
    folder, tokenizer, good, monkeypatch
):
    path = folder / "long.pt"
    write(path, changed(good, ("config", "max_len"), 2**20))
    load(path, tokenizer)  # 一个头、两维：放得下
    monkeypatch.setattr("engine.claims.memory_of_machine", lambda: 16e6)
    said = refused(path, tokenizer)
    assert "max_len 1048576 的缓存要" in said and "这台机器只有 0.0 GB" in said


def in_little_memory(room: int, how) -> str:
    """在分出来的进程里，至多再用 room 字节：how() 的异常，没有是空的。"""
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        said = ""
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
            how()
        except BaseException as error:
            said = f"{type(error).__name__}：{error}"
        finally:
            os.write(theirs, said.encode())
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return said


@pytest.mark.skipif(sys.platform != "linux", reason="要 Linux 的 /proc 与 RLIMIT_AS")
def test_too_little_memory_is_called_that(tmp_path, tokenizer):
    """ulimit -v：装不下的时候，不说它坏了，也没有回溯。"""
    path = tmp_path / "big.pt"
    write(path, snapshot(tokenizer, replace(TINY, dim=512, hidden_dim=512, n_heads=8)))
    said = [
        in_little_memory(room * 10**6, lambda how=how: how(path))
        for room in (10, 60, 110, 400)
        for how in (lambda p: load(p, tokenizer), read)
    ]
    assert "" in said and said[0].startswith("UserError：内存不够，装不下")
    assert all(x == "" or x.startswith("UserError：内存不够，装不下") for x in said), said


# ---------- 3. 任意改一个真的检查点 ----------


def deep(depth: int, width: int) -> list:
    """一层套一层，每层是同一个列表的几份：pickle 里只有几百字节。"""
    value: list = [1]
    for _ in range(depth):
        value = [value] * width
    return value


def odd_tensors() -> list:
    """各种各样的张量。"""
    plain = [F(shape, dtype=kind) for shape in ((), (0,), (2,), (2, 2), (N_TOKENS, 2), (1, 1, 2))
             for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16,
                          torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64,
                          torch.float8_e4m3fn)]  # fmt: skip
    nan, inf = (torch.full((2, 2), x) for x in (float("nan"), float("inf")))
    strange = [F(1).expand(10**9), F(9)[::2], F(4, 4).t()[:2], F(2, 2).to("meta"),
               F(2, 2).to_sparse(), torch.nn.Parameter(F(2))]  # fmt: skip
    return [*plain, nan, inf, *strange]


ODD = [*odd_tensors(), deep(500, 1), deep(40, 2), deep(3, 3), b"x", 1j, {1}, frozenset(), (1, 2),
       torch.Size([2]), torch.float32, OrderedDict(a=1), torch.device("cpu"), 10**400, -(10**400),
       "x" * 10**5]  # fmt: skip


class Odd(NamedTuple):
    """ODD 里的第 n 个：hypothesis 想把用到的值都写出来，有的写不完。"""

    n: int


def filled(value):
    """`Odd` 换成它说的那一个。"""
    if isinstance(value, Odd):
        return ODD[value.n]
    if isinstance(value, dict):
        return {k: filled(v) for k, v in value.items()}
    return [filled(v) for v in value] if isinstance(value, list) else value


atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-5, -1, 0, 1, 2, 3 * 10**7, 2**31, 2**53, 2**63])
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["\ud800", "\x1b[2J", "\n", "/etc/passwd", "builtin", "sft"])
    | st.integers(0, len(ODD) - 1).map(Odd)
)
things = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(content, prefix=()) -> list[tuple]:
    """检查点里的每一处。"""
    found = [prefix] if prefix else []
    pairs = content.items() if isinstance(content, dict) else (
        enumerate(content) if isinstance(content, list) else ())  # fmt: skip
    return found + [p for key, inner in pairs for p in places(inner, (*prefix, key))]


def mutate(content: dict, draw, spots: list[tuple]) -> None:
    """就地改一处：换掉、删掉、改名、抄成另一处的，或者动一动张量。"""
    where = draw(st.sampled_from(spots))
    inner, last = content, where[-1]
    try:
        for name in where[:-1]:
            inner = inner[name]
        old = inner[last]
    except (KeyError, IndexError, TypeError):  # 前一次改动把它改没了
        return
    if not isinstance(inner, dict | list):
        return
    how = draw(st.sampled_from(["换掉", "换掉", "删掉", "改名", "抄来", "张量"]))
    if how == "换掉":
        inner[last] = filled(draw(things))
    elif how == "删掉":
        del inner[last]
    elif how == "改名" and isinstance(inner, dict):
        inner[draw(st.text(max_size=5) | st.integers(-1, 99))] = inner.pop(last)
    elif how == "抄来":
        other = content
        try:
            for name in draw(st.sampled_from(spots)):
                other = other[name]
        except (KeyError, IndexError, TypeError):
            return
        inner[last] = copy.deepcopy(other)
    elif (
        isinstance(old, torch.Tensor)
        and old.layout == torch.strided
        and old.dim()
        and 0 < old.numel() < 10**6  # 步长是零的，写成真的要几 GB
    ):
        inner[last] = CHANGES[draw(st.integers(0, len(CHANGES) - 1))](old)


CHANGES = [
    lambda x: x.double(), lambda x: x[:1], lambda x: x.flatten(), lambda x: x.long(),
    lambda x: -x, lambda x: x[None], lambda x: x.roll(1), lambda x: x.to(torch.complex64),
    lambda x: x.flatten()[:1].expand(x.shape), lambda x: torch.full_like(x, 99),
    lambda x: x.half() if x.is_floating_point() else x.bool(),
]  # fmt: skip


def try_everything(path: Path, tokenizer) -> None:
    """聊天、接着练、从它开始：各自要么照常，要么一句话拒绝。"""
    for way in (chat, go_on, start_from):
        started = time.monotonic()
        try:
            way(path, tokenizer)
        except UserError as error:
            said = indented(error).replace("\n  ", "")  # 路径里可以有换行
            assert "\n" not in said and len(said) < 700, said
        assert time.monotonic() - started < 30  # 机器忙时也够；真的每个几毫秒


def chat(path: Path, tokenizer) -> None:
    """读出来，说一句来历，算一次。"""
    model, config, found = load(path, tokenizer)
    assert summary(found) and config.max_len <= 2**20
    model(torch.zeros(1, 1, dtype=torch.long))


def go_on(path: Path, tokenizer) -> None:
    """--resume，取回一切，再走一步。"""
    config, origins = load_config("pretrain", ["--resume", "--out_dir", str(path.parent)])
    run = RunFolder("pretrain", config, origins, World())
    try:
        content = run.begin(config, origins, tokenizer)
        model = build_model(config, content, path)
        optimizer = build_optimizer(model, config, config.lr)
        parts = {"optimizers": optimizer, "rng": RandomNumbers(), "progress": Progress(),
                 "scaler": torch.amp.GradScaler("cpu", enabled=True)}  # fmt: skip
        restore(content, parts, path)
        shared = SharedRow.from_state_dict(content["shared_row"], torch.device("cpu"))
        x = model.hidden(torch.zeros(1, 1, dtype=torch.long))
        y = shared.score(x, model.embedding.weight) if shared else model.score(x)
        y.sum().backward()
        optimizer.step()
        if shared:
            shared.spread(model.embedding.weight)
    finally:
        run.close()


def start_from(path: Path, tokenizer) -> None:
    """--init_from，微调与增量预训练。"""
    for stage in ("sft", "pretrain"):
        config, origins = load_config(stage, ["--init_from", str(path), "--preset", "tiny"])
        _, source, start = load(path, tokenizer)
        inherit(config, origins, source, str(path), stage)
        corpora.check(SimpleNamespace(
            checkpoint=start, folder=SimpleNamespace(path=path), config=config, stage=stage,
            card={"train_sha256": "a" * 64, "val_sha256": "b" * 64, "format": 2}, old_card=None,
        ))  # fmt: skip


@settings(max_examples=settings().max_examples * (3 if settings().max_examples > 100 else 1))
@given(st.data())
def test_any_change_to_a_checkpoint_is_refused_or_harmless(folder, tokenizer, good, data):
    path = folder / "out/x/pretrain.pt"
    content = copy.deepcopy(good)
    spots = places(content)
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        mutate(content, data.draw, spots)
    try:
        torch.save(content, path)
    except Exception:  # 有的东西本来就写不进去
        assume(False)
    try_everything(path, tokenizer)


atom = st.sampled_from([b"N", b"\x88", b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87",
                        b"R", b"b", b"a", b"e", b"s", b"u", b"Q", b"q\x00", b"h\x00", b"h\x05",
                        b"K\x07", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n",
                        b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n",
                        b"r\x00\x00\x00\x7f", b"X\x05\x00\x00\x00model",
                        b"X\x06\x00\x00\x00format", tensor(4, (4,), (1,)),
                        tensor(4, (5,), (1,))]) | st.binary(max_size=3)  # fmt: skip


@settings(max_examples=settings().max_examples * (5 if settings().max_examples > 100 else 1))
@given(st.lists(atom, max_size=25))
def test_any_program_inside_is_refused_in_one_sentence(folder, tokenizer, pieces):
    """data.pkl 里任意的指令。"""
    path = folder / "any.pt"
    pack(path, [ONES, ("data.pkl", program(*pieces))])
    with pytest.raises(UserError) as caught:
        load(path, tokenizer)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
