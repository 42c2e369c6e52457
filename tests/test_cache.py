"""存下的词元文件不轻信：卡片、词元、起点改动一个比特都认得出；来源边读边变，认得出。

平时每个测试试几百个例子；`--hypothesis-profile=thorough` 时合计一万五千个以上。
"""

import contextlib
import io
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invented import TOKENIZER, documents, documents_like, jsonl, prepare, write
from scripts import LITTLE, QUICK, run

from config import Config, UserError
from corpus import card as cards
from corpus import checked, find, streams, token_file
from corpus.checked import BLOCK, BlockSums, Damaged, Tokens
from corpus.streams import Steady
from dataset import SIDES, DocumentBatches, PretrainBatches, used_ids
from loss import bits_per_character
from tools.inspect import facts

N = settings().max_examples
MANY = settings(
    max_examples=3 * N, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # 每个例子几毫秒
FILES = ["json", "train.bin", "train.idx", "val.bin", "val.idx"]


class Cache:
    """一份小小的词元文件；`put` 换掉其中一个文件，`load` 像训练开始时那样去读。"""

    def __init__(self, folder: Path):
        self.source = write(folder / "s.jsonl", documents_like(40, 1))
        self.config = Config(data_dir=str(folder / "data"))
        self.arguments: tuple = ()
        with pytest.MonkeyPatch.context() as patch:
            real = token_file._find
            patch.setattr(token_file, "_find", lambda *a: real(*self.remember(a)))
            self.prepare()
        base = self.arguments[0]
        self.paths = {name: Path(f"{base}.{name}") for name in FILES}
        self.kept = {name: path.read_bytes() for name, path in self.paths.items()}
        self.card = json.loads(self.kept["json"])

    def remember(self, arguments: tuple) -> tuple:
        self.arguments = arguments
        return arguments

    def prepare(self) -> tuple:
        """像训练开始时那样准备，不行就重做：(数据, 说了什么)。"""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            data = token_file.tokenize_corpus(str(self.source), "pretrain", TOKENIZER, self.config)
        return data, said.getvalue()

    def restore(self) -> None:
        for name, content in self.kept.items():
            if not self.paths[name].is_file() or self.paths[name].read_bytes() != content:
                self.paths[name].write_bytes(content)

    def load(self, **changed: bytes):
        """换掉这几个文件（名字里的点写成下划线），再去读：(数据或 None, 哪里坏了)。"""
        self.restore()
        for name, content in changed.items():
            self.paths[name.replace("_", ".")].write_bytes(content)
        return token_file._find(*self.arguments)

    def intact(self, data) -> bool:
        return all(
            np.asarray(data.tokens[s]).tobytes() == self.kept[f"{s}.bin"]
            and data.starts[s].tobytes() == self.kept[f"{s}.idx"]
            for s in SIDES
        )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


def use(data) -> None:
    """用一遍：训练、检验、体检读卡片与词元的地方。"""
    used_ids(data.tokens["train"], 21248)
    PretrainBatches(data.tokens["train"], 16).get([0, 1])
    bits_per_character(5.0, data.card)
    token_file._summary(data.card)
    facts.lengths(data, None, 512)
    facts.samples(data, None, 512, TOKENIZER)
    json.dumps(facts.of_card(data.card), allow_nan=False)


# ---------- 1. 坏了的：认得出，说一句，重做 ----------


def flipped(data: bytes, at: int) -> bytes:
    return data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]


def swapped(data: bytes, dtype) -> bytes:
    return np.frombuffer(data, dtype)[::-1].tobytes()


DAMAGES: dict[str, Callable[[Cache], dict]] = {
    "bin_bit": lambda c: {"train_bin": flipped(c.kept["train.bin"], 1001)},
    "val_bit": lambda c: {"val_bin": flipped(c.kept["val.bin"], 7)},
    "bin_other": lambda c: {"train_bin": swapped(c.kept["train.bin"], np.uint16)},
    "bin_out_of_range": lambda c: {"train_bin": b"\xff" * len(c.kept["train.bin"])},
    "bin_short": lambda c: {"train_bin": c.kept["train.bin"][:-2]},
    "bin_long": lambda c: {"train_bin": c.kept["train.bin"] + b"\0\0"},
    "idx_bit": lambda c: {"train_idx": flipped(c.kept["train.idx"], 200)},
    "idx_other": lambda c: {"val_idx": swapped(c.kept["val.idx"], np.int64)},
    "card_number": lambda c: {
        "json": c.kept["json"].replace(b'"val_targets": ', b'"val_targets": 1')},
    "card_deep": lambda c: {"json": b"[" * 100_000},
    "card_deep_sealed": lambda c: {"json": resealed(b'{"a": ' + b"[" * 10**5 + b"]" * 10**5)},
    "card_other_sides": lambda c: {"train_bin": c.kept["val.bin"], "train_idx": c.kept["val.idx"]},
}  # fmt: skip


def resealed(body: bytes) -> bytes:
    """封条对得上的假卡片。"""
    return body + cards._ending(body)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_said_and_redone(cache, damage):
    """同样大小的别的内容、翻转一个比特、有毒的卡片：一句话，从原始文件重做，内容一个字节不差。"""
    for name, content in DAMAGES[damage](cache).items():
        cache.paths[name.replace("_", ".")].write_bytes(content)
    data, said = cache.prepare()
    assert "重做一遍" in said and "沿用" not in said, said
    assert "Traceback" not in said and cache.intact(data)
    use(data)
    assert "沿用" in cache.prepare()[1]
    cache.kept = {name: path.read_bytes() for name, path in cache.paths.items()}


@pytest.mark.skipif(os.name == "nt", reason="Windows 没有 mkfifo")
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_the_cache_is_not_waited_for(cache, name):
    """缓存里的一个文件成了管道：不等它，重做。"""
    cache.restore()
    cache.paths[name].unlink()
    os.mkfifo(cache.paths[name])
    data, said = cache.prepare()
    assert "重做一遍" in said and cache.intact(data)
    cache.kept = {name: path.read_bytes() for name, path in cache.paths.items()}


@MANY
@given(st.sampled_from(FILES), st.integers(0, 2**40))
def test_any_flipped_bit_is_noticed(cache, name, at):
    """卡片、词元、起点里任意一个比特：读不成，并说出是哪个文件。"""
    content = cache.kept[name]
    data, problem = cache.load(
        **{name.replace(".", "_"): flipped(content, at % (8 * len(content)))}
    )
    assert data is None
    assert str(cache.paths[name]) in problem


poison = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(),
    st.text(st.characters(exclude_categories=()), max_size=5),
    st.sampled_from([10**30, -1, 10**400, 1e308, float("nan"), "1", "文", [], {}, [[]], {"a": []}]),
    st.recursive(st.integers(), st.lists, max_leaves=9),
    st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=3),
)  # fmt: skip


def check_poisoned(cache: Cache, content: bytes) -> None:
    """要么不认，要么认了也用得起来，而且词元还是原来的。"""
    data, _ = cache.load(json=content)
    if data is not None:
        assert cache.intact(data)
        use(data)


@MANY
@given(st.data(), st.booleans())
def test_a_poisoned_card_is_redone(cache, data, sealed):
    """卡片里的任意几项换成任意的值、去掉、换名字，封条重新算过的也一样：没有回溯。"""
    card = {name: value for name, value in cache.card.items() if name != "checksum"}
    for name in data.draw(st.lists(st.sampled_from(sorted(card)), min_size=1, max_size=3)):
        if data.draw(st.integers(0, 5)) == 0:
            card.pop(name, None)
        else:
            card[name] = data.draw(poison)
    text = json.dumps(card, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace")
    body = text.removesuffix(b"\n}")
    check_poisoned(cache, resealed(body) if sealed else text)


ZEROS = ["val_characters", "train_tokens", "val_targets", "train_documents", "characters", "rows"]


@pytest.mark.parametrize("value", ["0", "-1", "1e400", "NaN", "9" * 1000, "9" * 5000, '"文"',
                                   "[" * 90_000 + "]" * 90_000, "null", "true"],
                         ids=lambda x: x[:6])  # fmt: skip
@pytest.mark.parametrize("name", ZEROS)
def test_a_poisoned_number_is_redone(cache, name, value):
    """每个要拿来算的数换成零、负数、无穷大、几千位的整数、文字、十万层的列表。"""
    body = cache.kept["json"][: -len(cards._ending(b""))]
    old = f'"{name}": {cache.card[name]},'.encode()
    assert old in body
    check_poisoned(cache, resealed(body.replace(old, f'"{name}": {value},'.encode())))


@MANY
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_as_a_card(cache, content, sealed):
    """任意的字节当卡片：不认，不回溯。"""
    data, _ = cache.load(json=resealed(content) if sealed else content)
    assert data is None


@MANY
@given(st.data())
def test_any_index_with_a_matching_sum(cache, data):
    """起点换成任意的数，卡片上的校验和也重新算过：不从 0 起、不是一篇比一篇靠后的，不认。"""
    n = cache.card["val_documents"]
    numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, cache.card["val_tokens"] + 2)
    starts = np.array(data.draw(st.lists(numbers, min_size=n + 1, max_size=n + 1)), np.int64)
    if data.draw(st.booleans()):
        starts.sort()
        starts[0], starts[-1] = 0, cache.card["val_tokens"]
    card = cache.card | {"val_starts_sha256": cards.hashlib.sha256(starts).hexdigest()}
    del card["checksum"]
    found, _ = cache.load(json=cards.seal(card), val_idx=starts.tobytes())
    if found is not None:
        assert starts[0] == 0 and (np.diff(starts) > 0).all()
        assert starts[-1] == cache.card["val_tokens"]
        use(found)


@settings(MANY, max_examples=N)
@given(st.data())
def test_any_tokens_with_matching_sums(cache, data):
    """词元换成任意的编号，校验和也重新算过：词表之外的不认，训练不会越界。"""
    n = cache.card["val_tokens"]
    top = data.draw(st.sampled_from([TOKENIZER.vocab_size - 1, TOKENIZER.vocab_size, 65535]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tokens = rng.integers(0, top + 1, n).astype(np.uint16)
    tokens[data.draw(st.integers(0, n - 1))] = top
    sums = BlockSums()
    sums.update(tokens.tobytes())
    card = cache.card | {"val_blocks": sums.finish()}
    del card["checksum"]
    found, problem = cache.load(json=cards.seal(card), val_bin=tokens.tobytes())
    assert (found is None) == (top >= TOKENIZER.vocab_size)
    assert ("词表之外" in problem) == (found is None)


def test_a_sealed_card_reads_back_the_same(tmp_path, cache):
    """封好再读，每一项都一样；文字里有不成对的代理字符也行。"""
    card = {k: v for k, v in cache.card.items() if k != "checksum"} | {"source": "文\udc80/\ud800"}
    path = tmp_path / "a.json"
    path.write_bytes(cards.seal(card))
    read = cards.unseal(path)
    assert read.pop("checksum") and read == card


# ---------- 2. 大的词元文件：读到哪一块，核对哪一块 ----------


class Big(NamedTuple):
    """几块长的一边。"""

    path: Path
    ids: np.ndarray
    sums: list[str]

    def open(self, **more) -> Tokens:
        return Tokens(self.path, self.sums, len(self.ids), 21248, **more)


@pytest.fixture
def big(tmp_path) -> Big:
    ids = np.random.default_rng(0).integers(0, 21000, 2 * BLOCK + 77).astype(np.uint16)  # 4 块多
    sums = BlockSums()
    noise = random.Random(0)
    data, at = ids.tobytes(), 0
    while at < len(data):  # 怎样断开写的不要紧
        step = noise.randrange(1, 1 << 20)
        sums.update(data[at : at + step])
        at += step
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    return Big(path, ids, sums.finish())


def test_tokens_behave_like_an_array(big):
    """切片、下标、迭代、转成数组，与普通的数组一样。"""
    tokens, ids = big.open(), big.ids
    assert (len(tokens), tokens.size, tokens.dtype, tokens.shape) == (
        len(ids), len(ids), ids.dtype, ids.shape)  # fmt: skip
    half = BLOCK // 2
    for where in (slice(0, 5), slice(half - 3, half + 3), slice(-5, None), slice(7, 3),
                  slice(len(ids), len(ids) + 9), slice(10, 0, -3), slice(None, None, 1000), 0, -1,
                  np.int64(half), np.array([1, 5, -1])):  # fmt: skip
        assert np.array_equal(tokens[where], ids[where]), where
    assert np.array_equal(np.asarray(tokens), ids) and np.array(tokens).flags.writeable
    assert np.array_equal(np.asarray(tokens, np.int64), ids)
    assert np.array_equal(np.fromiter(tokens, np.uint16), ids)
    assert np.array_equal(np.bincount(tokens), np.bincount(ids))
    with pytest.raises(IndexError):
        tokens[len(ids)]


def test_only_the_blocks_that_are_read_are_checked(big):
    """坏的一块读不到；没有坏的照样用。"""
    data = bytearray(big.path.read_bytes())
    data[3 * BLOCK + 5] ^= 1
    big.path.write_bytes(data)
    told = []
    tokens = big.open(on_damage=lambda: told.append(1) or "再来")
    assert np.array_equal(tokens[: BLOCK // 2], big.ids[: BLOCK // 2]) and not told
    for where in (slice(3 * BLOCK // 2, 3 * BLOCK // 2 + 1), slice(0, None)):
        with pytest.raises(UserError, match=r"a\.bin.*检查点没有受影响；再来"):
            tokens[where]
    assert len(told) == 2
    with pytest.raises(Damaged):
        tokens.check_all()


CHANGES: dict[str, Callable[[Path], None]] = {
    "in_place": lambda path: in_place(path, 3),
    "in_place_time_restored": lambda path: (in_place(path, 3), os.utime(path, (1, 1))),
    "truncated": lambda path: os.truncate(path, 100),
    "emptied": lambda path: os.truncate(path, 0),
}


def in_place(path: Path, at: int) -> None:
    with path.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_check_is_noticed(big, change):
    """核对过了才改的、截短的：下一次读就认得出；截短不会让系统杀掉进程。"""
    tokens = big.open()
    tokens.check_all()
    time.sleep(0.02)  # 时间的一格
    CHANGES[change](big.path)
    with pytest.raises(UserError, match=r"a\.bin"):
        PretrainBatches(tokens, 16).get([0, 1])


def test_a_replaced_file_leaves_the_old_one(big):
    """别的程序重做了词元文件：手里的还是原来那一份。"""
    tokens = big.open()
    other = big.path.with_name("b")
    other.write_bytes(bytes(len(big.ids) * 2))
    os.replace(other, big.path)
    assert np.array_equal(np.asarray(tokens), big.ids)


@settings(MANY, max_examples=N)
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), max_size=6),
       st.sets(st.integers(0, 9)))  # fmt: skip
def test_a_wrong_byte_never_gets_out(tmp_path, ranges, bad):
    """任意的几次切片，任意的几块坏了：给出的都是写下的，读到坏的一块就报错。"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checked, "BLOCK", 64)
        ids = np.arange(300, dtype=np.uint16)
        sums = BlockSums()
        sums.room = 64
        sums.update(ids.tobytes())
        content = bytearray(ids.tobytes())
        for block in bad:
            if 64 * block < len(content):
                content[64 * block] ^= 1
        (tmp_path / "a").write_bytes(content)
        tokens = Tokens(tmp_path / "a", sums.finish(), 300, 21248)
        for start, stop in ranges:
            touched = range(start // 32, -(-min(stop, 300) // 32)) if start < min(stop, 300) else ()
            if bad & set(touched):
                with pytest.raises(UserError):
                    tokens[start:stop]
            else:
                assert np.array_equal(tokens[start:stop], ids[start:stop])


# ---------- 3. 训练：坏在中间，停在那一步之前；重做之后接得上 ----------


@pytest.fixture
def training(tmp_path) -> list[str]:
    """tmp_path 里一份小语料，与训练它的参数：词元文件要读到哪块才核对哪块。"""
    write(tmp_path / "s.jsonl", documents_like(60, 2))
    return ["--data", "s.jsonl", *QUICK, *LITTLE, "--preset", "tiny", "--seq_len", "32",
            "--eval_every", "100", "--eval_tokens", "32"]  # fmt: skip


def steps_of(folder: Path) -> list[dict]:
    path = next(folder.glob("out/*/pretrain/metrics.jsonl"))
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    return [{k: r[k] for k in ("step", "tokens", "train_loss")} for r in rows if "lr" in r]


def test_damage_in_the_middle_of_training_stops_before_the_step(tmp_path, training, monkeypatch):
    """练到一半词元文件坏了：一句话，退出码 2；再运行就重做，接着练与没坏过的逐位相同。"""
    run(tmp_path, "pre_train.py", *training, "--max_steps", "4", "--save_every", "0")
    whole = steps_of(tmp_path)
    checkpoint = next(tmp_path.glob("out/*/pretrain.pt"))
    bin_ = next(tmp_path.glob("data/cache/*.train.bin"))
    good = bin_.read_bytes()
    real, calls = DocumentBatches.get, []

    def get(self, rows):
        calls.append(1)
        if len(calls) == 4:  # 一次检验，两步，然后坏了
            time.sleep(0.02)
            bin_.write_bytes(np.random.default_rng(0).permutation(
                np.frombuffer(good, np.uint16)).tobytes())  # fmt: skip
        return real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(DocumentBatches, "get", get)
        _, err = run(tmp_path, "pre_train.py", *training, "--max_steps", "4", "--overwrite",
                     "--save_every", "0", code=2)  # fmt: skip
    assert "train.bin" in err and "再运行一次同样的命令就会重做" in err
    left = checkpoint.read_bytes()
    assert not list(tmp_path.glob("data/cache/*.json"))  # 下一次就重做
    bin_.write_bytes(good)
    out, _ = run(tmp_path, "pre_train.py", *training, "--max_steps", "4", "--resume")
    assert "写好" in out and checkpoint.read_bytes() != left
    assert steps_of(tmp_path) == whole


@pytest.mark.parametrize("lazily", [False, True])
def test_resuming_never_goes_on_with_a_changed_cache(tmp_path, training, monkeypatch, lazily):
    """接着练之前词元文件换成了别的：重做，或者停下；重做之后与没换过的逐位相同。"""
    if lazily:
        monkeypatch.setattr(token_file, "AT_ONCE", 0)
    flags = [*training, "--max_steps", "5", "--save_every", "0"]
    run(tmp_path, "pre_train.py", *flags)
    whole = steps_of(tmp_path)
    real, calls = DocumentBatches.get, []

    def get(self, rows):
        calls.append(1)
        if len(calls) == 5:
            raise UserError("停在这里")
        return real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(DocumentBatches, "get", get)
        run(tmp_path, "pre_train.py", *flags, "--overwrite", code=2)
    before = steps_of(tmp_path)
    bin_ = next(tmp_path.glob("data/cache/*.train.bin"))
    bin_.write_bytes(swapped(bin_.read_bytes(), np.uint16))
    resume = [*training, "--max_steps", "5", "--resume"]
    if lazily:
        _, err = run(tmp_path, "pre_train.py", *resume, code=2)
        assert "词元文件坏了" in err and steps_of(tmp_path) == before
    out, _ = run(tmp_path, "pre_train.py", *resume)
    assert "写好" in out and len(before) < len(whole)
    assert steps_of(tmp_path) == whole


# ---------- 4. 边读边变的来源 ----------

OLD = documents_like(300, 1)
NEW = [text.replace("其", "甲") for text in OLD]


class Meddling(type(TOKENIZER)):
    """头一次分词时，做一件事。"""

    def __init__(self, meddle: Callable[[], None]):
        super().__init__()
        self.meddle, self.done = meddle, False

    def encode_and_lose(self, texts):
        if not self.done:
            self.done = True
            self.meddle()
        return super().encode_and_lose(texts)


def put(path: Path, texts: list[str]) -> None:
    path.write_bytes(jsonl(texts).encode())
    os.utime(path, ns=(10**18, 10**18))


def mapped(path: Path) -> mmap.mmap:
    """可写的内存映射，每一页都已经写过：往后再写，文件的时间不变。"""
    with path.open("r+b") as f:
        view = mmap.mmap(f.fileno(), 0)
    view[:] = view[:]
    return view


def through_a_map(path: Path):
    view = mapped(path)
    return lambda: view.__setitem__(slice(None), jsonl(NEW).encode())


def through_a_map_and_back(path: Path):
    view = mapped(path)
    view[:] = jsonl(NEW).encode()
    return lambda: view.__setitem__(slice(None), jsonl(OLD).encode())


def over_it(path: Path):
    def meddle() -> None:
        put(path.parent / "new", NEW)
        os.replace(path.parent / "new", path)

    return meddle


def another_link(path: Path):
    path.rename(path.parent / "a")
    put(path.parent / "b", NEW)
    path.symlink_to("a")

    def meddle() -> None:
        path.unlink()
        path.symlink_to("b")

    return meddle


MEDDLERS = {
    "map": through_a_map, "map_and_back": through_a_map_and_back, "rename": over_it,
    "link": another_link, "rewrite": lambda path: lambda: put(path, NEW),
    "append": lambda path: lambda: path.open("ab").write(jsonl(NEW[:3]).encode()),
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="内存映射写了不改时间，是 Linux 上的样子")
@pytest.mark.parametrize("how", MEDDLERS)
def test_a_source_that_changes_is_not_believed(tmp_path, how):
    """读的时候变了，时间与大小都看不出的也一样：一句话；下一次用的是新的，不沿用旧的。"""
    path = tmp_path / "s.jsonl"
    put(path, OLD)
    meddle = Meddling(MEDDLERS[how](path))
    outcome = prepare(path, tokenizer=meddle, data_dir=tmp_path / "data")
    now, true = (prepare(path, data_dir=where) for where in (tmp_path / "data", None))
    assert "变了" in outcome.error, outcome
    assert sorted(documents(now.file)) == sorted(documents(true.file))


def test_a_source_changed_back_after_the_read_is_not_believed(tmp_path, monkeypatch):
    """算散列之前换掉、之后换回来：散列只能是读到的那些字节的。"""
    path = tmp_path / "s.jsonl"
    put(path, OLD)
    real = Steady.hashed

    def hashed(self):
        put(path, NEW)
        try:
            return real(self)
        finally:
            put(path, OLD)

    with monkeypatch.context() as patch:
        patch.setattr(Steady, "hashed", hashed)
        assert "变了" in prepare(path, data_dir=tmp_path / "data").error
    assert sorted(documents(prepare(path, data_dir=tmp_path / "data").file)) == sorted(OLD)


def test_a_change_within_one_tick_of_the_clock_is_noticed(tmp_path, monkeypatch):
    """文件系统的时间有一格两秒的：与准备时同在一格里的改动，样子全都相同，也要认出来。"""
    for module in (find, streams):
        monkeypatch.setattr(module, "stamp_of", lambda s: [s.st_size, 10**18, 10**18, 7])
    now = [10**18 + 10**9]
    monkeypatch.setattr(find.time, "time_ns", lambda: now[0])
    path = write(tmp_path / "s.jsonl", OLD)
    first = prepare(path, data_dir=tmp_path / "data")
    assert sorted(documents(first.file)) == sorted(OLD)
    write(path, NEW)
    now[0] += 10**12
    second = prepare(path, data_dir=tmp_path / "data")
    assert sorted(documents(second.file)) == sorted(NEW)


def test_the_hash_is_that_of_the_bytes_read(tmp_path):
    """整个文件的散列与 sha256sum 的相同；读过的一块变了、文件短了，报错。"""
    path = tmp_path / "a"
    path.write_bytes(content := os.urandom(3 * 2**18 + 5))
    file = Steady(path)
    stream = io.BufferedReader(file)
    stream.seek(2**18 - 3)
    assert stream.read(7) == content[2**18 - 3 : 2**18 + 4]
    assert file.seek(-5, 2) == len(content) - 5 and file.read() == content[-5:]
    assert file.hashed() == (find.stamp(path), find.sha256(path))
    with pytest.raises(OSError):
        file.seek(-1)
    in_place(path, 2**18 - 1)
    with pytest.raises(UserError, match="变了"):
        file.hashed()
    file.release()
    file = Steady(path)
    assert file.read(1)
    os.truncate(path, 9)
    with pytest.raises(UserError, match="变了"):
        file.hashed()
    file.release()
