"""词元文件的核对，换一双眼睛再看：逐字节的改动、落盘的次序、封条对得上的假卡片。

test_cache.py 改的是卡片上的一项一项与文件里的一个个比特；这里改的是任意的字节。
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from invented import TOKENIZER, documents, documents_like, jsonl, prepare, write
from scripts import run

from config import Config, UserError
from corpus import card as cards
from corpus import checked, find, streams, token_file
from corpus.checked import BlockSums, Tokens
from corpus.streams import Steady
from dataset import SIDES, used_ids
from loss import bits_per_character

N = settings().max_examples
MANY = settings(max_examples=2 * N, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ["json", "train.bin", "train.idx", "val.bin", "val.idx"]


class Stored:
    """一份写好的词元文件，和它的样本；`put` 换掉几个文件。"""

    def __init__(self, folder: Path):
        self.source, self.data = write(folder / "s.jsonl", documents_like(40, 3)), folder / "data"
        self.first = prepare(self.source, data_dir=self.data)
        base = str(next(self.data.glob("cache/*.json"))).removesuffix(".json")
        self.paths = {name: Path(f"{base}.{name}") for name in NAMES}
        self.kept = {name: path.read_bytes() for name, path in self.paths.items()}
        self.card = json.loads(self.kept["json"])
        del self.card["checksum"]

    def put(self, **changed: bytes) -> None:
        """照原样放好，只换掉这几个（点写成下划线）。"""
        for name, content in (self.kept | changed).items():
            if name in self.paths:
                self.paths[name].write_bytes(changed.get(name.replace(".", "_"), content))

    def open(self):
        """只读，不重做：(数据或 None, 哪里坏了)。"""
        base = Path(str(self.paths["json"]).removesuffix(".json"))
        identity = {
            n: self.card[n]
            for n in (
                "format",
                "stage",
                "size",
                "tokenizer",
                "val_fraction",
                "keep_reasoning",
                "code",
            )
        }
        return token_file._find(base, identity, [self.source], TOKENIZER)  # fmt: skip

    def same(self, data) -> bool:
        """一个字节也没有变。"""
        return all(
            np.asarray(data.tokens[side]).tobytes() == self.kept[f"{side}.bin"]
            and np.asarray(data.starts[side]).tobytes() == self.kept[f"{side}.idx"]
            for side in SIDES
        )


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Stored:
    return Stored(tmp_path_factory.mktemp("stored"))


# ---------- 1. 任意的字节 ----------


@st.composite
def edits(draw, longest: int) -> Callable[[bytes], bytes]:
    """一处改动：一个比特，盖住、换掉、去掉、插入、复制一段，截短，接上别的。"""
    at, n = draw(st.integers(0, longest)), draw(st.integers(0, 40))
    new = draw(st.binary(max_size=12) | st.sampled_from(
        [b"", b"0", b"-", b"null", b"1e999", b"NaN", b"9" * 5000, b"[" * 3000, b'"\\ud800"',
         b'{"a":' * 2000, b"\0" * 8, b"\xff" * 8, b"\n", b"}", b"\xe6\x96\x87"]))  # fmt: skip
    how = draw(st.sampled_from(["bit", "over", "replace", "insert", "double", "cut", "end"]))
    return {
        "bit": lambda x: (
            x[: at % len(x)] + bytes([x[at % len(x)] ^ 1 << n % 8]) + x[at % len(x) + 1 :]
        ),
        "over": lambda x: (x[: at % len(x)] + new + x[at % len(x) + len(new) :])[: len(x)],
        "replace": lambda x: x[:at] + new + x[at + n :],
        "insert": lambda x: x[:at] + new + x[at:],
        "double": lambda x: x[: at + n] + x[at:],
        "cut": lambda x: x[:at],
        "end": lambda x: x + new,
    }[how]


@MANY
@given(edits(3000), st.booleans())
def test_any_edit_of_the_card(stored, edit, sealed):
    """卡片改动任意一段：不认，或者认了也还是原来的词元、用得起来；封条重新算过的也一样。"""
    body = stored.kept["json"][: -len(cards._ending(b""))]
    content = edit(body) + cards._ending(edit(body)) if sealed else edit(stored.kept["json"])
    stored.put(json=content)
    data, problem = stored.open()
    if data is None:
        return
    assert sealed or content == stored.kept["json"]
    assert stored.same(data), problem
    bits_per_character(5.0, data.card)
    token_file._summary(data.card).encode()


@MANY
@given(st.sampled_from(NAMES[1:]), edits(900), st.booleans())
@example("val.idx", lambda data: b"", True)
@example("val.idx", lambda data: data[:-1], True)
def test_any_edit_of_tokens_or_starts(stored, name, edit, matching):
    """词元、起点改动任意一段：不认；校验和也跟着改的，认得的一定是能用的。"""
    content = edit(stored.kept[name])
    key, side = name.replace(".", "_"), name.split(".")[0]
    if not matching:
        stored.put(**{key: content})
        data, problem = stored.open()
        assert (data is None) == (content != stored.kept[name])
        assert data is not None or str(stored.paths[name]) in problem
        return
    sums = BlockSums()
    sums.update(content)
    new = ({f"{side}_blocks": sums.finish()} if name.endswith("bin") else
           {f"{side}_starts_sha256": hashlib.sha256(content).hexdigest()})  # fmt: skip
    stored.put(json=cards.seal(stored.card | new), **{key: content})
    data, _ = stored.open()
    if data is None:
        return
    starts = data.starts[side]
    assert starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] == len(data.tokens[side])
    used_ids(data.tokens[side], TOKENIZER.vocab_size)


def test_a_sum_of_nothing_is_not_the_sum_of_a_short_file(stored):
    """卡片上的校验和是空串的，起点的长短也不对：曾是回溯。"""
    nothing = hashlib.sha256(b"").hexdigest()
    for content in (b"", b"12345"):
        stored.put(json=cards.seal(stored.card | {"val_starts_sha256": nothing}), val_idx=content)
        data, problem = stored.open()
        assert data is None and "val.idx" in problem


EVIL = "\ud800\x1b[2J\n错误：假的"
FORGED = {
    "words": {"notes": [EVIL], "openings": [[EVIL, 3]], "unused_fields": {EVIL: 3},
              "changed": {EVIL: 1}, "refused": {EVIL: 1},
              "files": [{"name": EVIL, "kind": EVIL, "rows": 1}] * 2},
    "control": {"lost_top": [["\x1b", 2], ["\u202e", 1]], "lost_characters": 3},
    "long_lost": {"lost_top": [["几个字", 2]], "lost_characters": 2},
    "half_lost": {"lost_top": [["\ud800", 2]], "lost_characters": 2},
    "no_lost": {"lost_top": [["", 2]], "lost_characters": 2},
    "kind": {"kind": EVIL},
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_inspecting_with_a_forged_card(stored, tmp_path, name):
    """封条对得上的假卡片，体检照样说得出话，控制不了终端，冒充不了另一句。"""
    stored.put(json=cards.seal(stored.card | FORGED[name]))
    out, _ = run(tmp_path, "tools.inspect", str(stored.source), "--data_dir", str(stored.data),
                 "--no-time")  # fmt: skip
    assert "\x1b" not in out and "\n错误" not in out
    stored.put()


# ---------- 2. 编号 ----------

IDS = np.random.default_rng(0).integers(0, 21000, 40 * 32 + 7).astype(np.uint16)


FEW = IDS[:135]  # 五块：几次改动总有碰到读过的


@settings(MANY, max_examples=N)
@given(st.lists(st.tuples(
    st.sampled_from(["read", "read", "break", "mend", "touch", "cut"]),
    st.integers(0, len(FEW) - 1), st.integers(1, 60)), max_size=12))  # fmt: skip
def test_whatever_happens_to_the_file_no_wrong_token_gets_out(tmp_path, story):
    """读、坏、修好、截短，怎样交替都行：给出的总是写下的，否则是一句话；修好了便又读得到。"""
    with mock.patch.object(checked, "BLOCK", 64):
        sums = BlockSums()
        sums.update(FEW.tobytes())
        path = tmp_path / "a"
        path.write_bytes(FEW.tobytes())
        tokens = Tokens(path, sums.finish(), len(FEW), 21248)
        clock, now = 10**18, bytearray(FEW.tobytes())
        for what, at, n in story:
            if what == "read":
                first, last = at * 2 // 64 * 64, -(-min(at + n, len(FEW)) * 2 // 64) * 64
                sound = now[first:last] == FEW.tobytes()[first:last]
                try:
                    assert np.array_equal(tokens[at : at + n], FEW[at : at + n]) and sound
                except UserError as error:
                    assert not sound and str(path) in str(error)
                continue
            if what == "break":
                now[2 * at : 2 * at + n] = bytes(b ^ 5 for b in now[2 * at : 2 * at + n])
            elif what == "mend":
                now[:] = FEW.tobytes()
            elif what == "cut":
                del now[2 * at :]
            path.write_bytes(now)
            clock += 10**7
            os.utime(path, ns=(clock, clock))


def test_every_block_of_a_read_is_checked(tmp_path):
    """从任意一块读到任意一块，其中任意一块坏了：读不成；坏的在外面，读得成。"""
    with mock.patch.object(checked, "BLOCK", 64):
        sums = BlockSums()
        sums.update(FEW.tobytes())
        for bad in range(5):
            content = bytearray(FEW.tobytes())
            content[64 * bad + 3] ^= 1
            (tmp_path / "a").write_bytes(content)
            for first, last in combinations(range(6), 2):
                where = slice(32 * first, 32 * last)
                tokens = Tokens(tmp_path / "a", sums.finish(), len(FEW), 21248)
                if first <= bad < last:
                    with pytest.raises(UserError, match="坏了"):
                        tokens[where]
                else:
                    assert np.array_equal(tokens[where], FEW[where])


# ---------- 3. 落盘 ----------


def test_everything_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    """先落盘再改名，卡片在最后；每次改名之后，目录也落盘。"""
    steps, names = [], {}
    sync, replace = os.fsync, os.replace

    def fsync(file):
        stat = os.fstat(file)
        steps.append(("sync", stat.st_ino, stat.st_size))
        sync(file)

    def rename(a, b):
        stat = os.stat(a)
        steps.append(("name", stat.st_ino, stat.st_size))
        names[stat.st_ino] = Path(b).name.split(".", 1)[1]
        replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    assert not prepare(write(tmp_path / "s.jsonl", documents_like(40, 1)), data_dir=tmp_path).error
    folder = (tmp_path / "cache").stat().st_ino
    named = [i for i, step in enumerate(steps) if step[0] == "name"]
    assert [names[steps[i][1]] for i in named] == [
        "train.bin", "train.idx", "val.bin", "val.idx", "json"]  # fmt: skip
    for i in named:
        assert steps[i - 1] == ("sync", *steps[i][1:])  # 整个文件，不是写了一半的
        assert steps[i + 1][:2] == ("sync", folder)


@pytest.mark.parametrize("name", ["all", "train", "val", "json"])
def test_a_link_in_the_place_of_a_part_is_not_followed(tmp_path, name):
    """别人在临时文件的名字上放一个链接：不顺着它盖掉别处的文件。"""
    path = write(tmp_path / "s.jsonl", documents_like(40, 1))
    assert not prepare(path, data_dir=tmp_path).error
    base = str(next(tmp_path.glob("cache/*.json"))).removesuffix(".json")
    os.unlink(f"{base}.json")
    victim = write(tmp_path / "victim", "别人的")
    os.symlink(victim, f"{base}.{name}.part")
    assert not prepare(path, data_dir=tmp_path).error
    assert victim.read_text() == "别人的" and not list(tmp_path.glob("cache/*.part"))
    assert not any(p.is_symlink() for p in tmp_path.glob("cache/*"))


# ---------- 4. 来源 ----------

OLD = documents_like(60, 1)
NEW = [text.replace("其", "甲") for text in OLD]


def test_a_source_written_twice_must_read_the_same_twice(tmp_path, monkeypatch):
    """--data a,a：头一遍读完、第二遍读之前换了内容，大小与时间都看不出，也不能把两份都当成一份。"""
    path, real, calls = write(tmp_path / "s.jsonl", OLD), Steady.hashed, []
    monkeypatch.setattr(find, "stamp_of", lambda s: [s.st_size, 1, 1, 1])
    monkeypatch.setattr(streams, "stamp_of", lambda s: [s.st_size, 1, 1, 1])

    def hashed(self):
        found = real(self)
        calls.append(found)
        if len(calls) == 1:
            write(path, NEW)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Steady, "hashed", hashed)
        assert "变了" in prepare(f"{path},{path}", data_dir=tmp_path).error
    assert sorted(set(documents(prepare(path, data_dir=tmp_path).file))) == sorted(NEW)


def test_the_clock_may_tick_between_the_read_and_the_card(tmp_path, monkeypatch):
    """读完之后、记下时间之前的改动，与来源同在一格里：看上去一样，时间却已经走到下一格。"""
    for module in (find, streams):
        monkeypatch.setattr(module, "stamp_of", lambda s: [s.st_size, 10**18, 10**18, 7])
    now = [10**18 + 10**9]
    monkeypatch.setattr(find.time, "time_ns", lambda: now[0])
    path, real = write(tmp_path / "s.jsonl", OLD), token_file.Writer.held_out

    def held_out(self, fraction):
        write(path, NEW)
        now[0] += 10**12
        return real(self, fraction)

    with monkeypatch.context() as patch:
        patch.setattr(token_file.Writer, "held_out", held_out)
        prepare(path, data_dir=tmp_path)
    assert sorted(documents(prepare(path, data_dir=tmp_path).file)) == sorted(NEW)


@settings(MANY, max_examples=max(20, N // 4))
@given(st.lists(st.sampled_from(["seek", "read"]), max_size=8), st.data())
def test_any_way_of_reading_gives_the_hash_of_the_file(tmp_path, story, data):
    """跳着读、倒着读，读到的与文件相同；散列总是整个文件的。读过之后改动任何一处，都认得出。"""
    content = bytes(range(256)) * 9
    path = tmp_path / "a"
    path.write_bytes(content)
    with mock.patch.object(streams, "BLOCK", 64):
        file = Steady(path)
        try:
            at, seen = 0, set()
            for what in story:
                n = data.draw(st.integers(0, len(content) + 9))
                if what == "seek":
                    at = file.seek(n)
                    continue
                piece = file.read(n)
                assert piece == content[at : at + n][: len(piece)]
                seen |= {i // 64 for i in range(at, at + len(piece))}
                at += len(piece)
            assert file.hashed() == (find.stamp(path), hashlib.sha256(content).hexdigest())
            place = data.draw(st.integers(0, len(content) - 1))
            with path.open("r+b") as f:
                f.seek(place)
                f.write(bytes([content[place] ^ 1]))
            with pytest.raises(UserError, match="变了"):
                file.hashed()
        finally:
            file.release()


def test_two_readers_of_one_cache(stored):
    """正在用的一份，别的程序重做了：手里的还是完整的一份，不混。"""
    stored.put()
    config = Config(data_dir=str(stored.data))
    with contextlib.redirect_stdout(io.StringIO()):
        mine = token_file.tokenize_corpus(str(stored.source), "pretrain", TOKENIZER, config)
        stored.paths["json"].unlink()
        content = stored.source.read_bytes()
        write(stored.source, jsonl(NEW))
        theirs = token_file.tokenize_corpus(str(stored.source), "pretrain", TOKENIZER, config)
    assert stored.same(mine) and not stored.same(theirs)
    stored.source.write_bytes(content)
