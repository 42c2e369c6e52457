"""账目：字段、划分、容器、丢的字。随便什么数据，下面几条总成立。"""

import bz2
import gzip
import io
import itertools
import json
import lzma
import math
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from invented import (
    TOKENIZER,
    Outcome,
    answer,
    check_accounts,
    conversations,
    documents,
    documents_like,
    dump,
    jsonl,
    prepare,
    question,
    turn,
    write,
)

from dataset import SIDES
from loss import bits_per_character

FEW = settings(max_examples=25)
WORST = math.log2(0x110000)  # 一个写不出的字，猜它是哪一个要多少比特


def prepare_rows(rows: list, stage: str = "pretrain", name: str = "a.jsonl", **more) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return prepare(write(Path(folder) / name, rows), stage, **more)


# ---------- 1. 字段 ----------

# 读数据的人可能认得的字段；别的名字都是「一无所知」的。
KNOWN = {
    "text", "content", "title", "desc", "description", "summary", "abstract", "sections", "body",
    "paragraphs", "conversations", "conversation", "messages", "dialog", "dialogue", "data",
    "instruction", "input", "output", "history", "system", "tools", "functions", "chosen",
    "rejected", "label", "weight", "loss", "loss_mask", "mask", "train", "kto_tag", "prompt",
    "completion", "response", "question", "answer", "query", "context", "role", "from", "value",
    "tool_calls", "reasoning_content", "reasoning", "thinking",
}  # fmt: skip
ROWS = {
    "text": lambda i: ("pretrain", {"text": f"其{i}。井台绕过药铺。"}),
    "title": lambda i: ("pretrain", {"title": f"其{i}", "content": "井台绕过药铺。"}),
    "alpaca": lambda i: ("sft", {"instruction": question(i), "input": "", "output": answer(i)}),
    "messages": lambda i: (
        "sft", {"messages": [turn("user", question(i)), turn("assistant", answer(i))]}),
    "history": lambda i: ("sft", {"instruction": question(i), "output": answer(i),
                                  "history": [[question(i + 50), answer(i + 50)]]}),
}  # fmt: skip
names = st.one_of(
    st.sampled_from(
        [
            "id",
            "url",
            "source",
            "lang",
            "meta",
            "score",
            "category",
            "news_id",
            "keywords",
            "timestamp",
            "answer2",
            "Text",
            " text",
            "text ",
            "输出",
            "",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
).filter(lambda name: name in ("Text", " text", "text ") or name.strip().lower() not in KNOWN)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 10**12), st.floats(allow_nan=False),
              st.text("渡口蓑衣。abc", max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("甲乙ab", max_size=3),
                                                                inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@given(st.sampled_from(sorted(ROWS)), names, values, st.integers(1, 4))
@example("text", "id", None, 1)
@example("alpaca", "score", "", 2)
@example("messages", "meta", {}, 3)
@settings(max_examples=60)
def test_any_field_is_used_or_counted(kind, name, value, n):
    """不管叫什么、是什么值，多出来的字段不是用上了，就是数出来了；别的照旧读。"""
    made = [ROWS[kind](i) for i in range(6)]
    stage, rows = made[0][0], [row for _, row in made]
    before = prepare_rows(rows, stage)
    assert before.card["unused_fields"] == {}
    marked = [row | {name: value} if i < n else row for i, row in enumerate(rows)]
    after = prepare_rows(marked, stage)
    check_accounts(after.card)
    if any(before.card[f"{side}_sha256"] != after.card[f"{side}_sha256"] for side in SIDES):
        assert isinstance(value, str | int | float | list | dict), "没有值，却改变了读出来的"
        assert seen_in(value, after), "读出来的变了，却没有这个字段的值"
        return
    assert sum(after.card["unused_fields"].values()) == n, after.card["unused_fields"]
    if name.isalnum():
        assert after.card["unused_fields"] == {name: n}
        assert name in after.out


def seen_in(value, outcome: Outcome) -> bool:
    text = "".join(documents(outcome.file)) + "".join(
        t for turns in conversations(outcome.file) for _, t in turns
    )
    leaves = [value] if not isinstance(value, list | dict) else list(value)
    return all(str(leaf).lower() in text for leaf in leaves)


@given(st.lists(st.sampled_from(["name", "annotation", "id", "mood", "时间"]), min_size=1,
                max_size=3, unique=True), st.integers(1, 4))  # fmt: skip
@FEW
def test_fields_of_a_turn_are_counted_too(fields, n):
    """一轮发言里多出来的字段也一样。"""
    rows = [{"messages": [turn("user", question(i)), turn("assistant", answer(i))]}
            for i in range(6)]  # fmt: skip
    for row in rows[:n]:
        row["messages"][1] |= dict.fromkeys(fields, "北边")
    outcome = prepare_rows(rows, "sft")
    check_accounts(outcome.card)
    counted = outcome.card["unused_fields"]
    for field in fields:
        assert [count for name, count in counted.items() if field in name] == [n], counted
        assert field in outcome.out


def test_a_field_of_two_turns_is_one_row():
    """说的是「多少条」：一条里两轮都有，还是一条。"""
    rows = [{"messages": [turn("user", question(i), mood="喜"), turn("assistant", answer(i),
                                                                   mood="喜")]}
            for i in range(6)]  # fmt: skip
    counted = prepare_rows(rows, "sft").card["unused_fields"]
    assert [n for name, n in counted.items() if "mood" in name] == [6]


def test_thousands_of_field_names_do_not_flood_the_screen():
    """每条的字段名都不同（拿编号当字段名的）：数得清，印出来的还是几行。"""
    rows = [{"text": t, f"id_{i}": 1} for i, t in enumerate(documents_like(3000, 1))]
    outcome = prepare_rows(rows)
    assert len(outcome.out) < 5000
    assert len(dump(outcome.card)) < 200_000


def test_an_ugly_field_name_is_shown_safely():
    """字段名里有控制字符、半个代理字符、几万个字：不弄乱屏幕，卡片也写得出。"""
    for name in ("\x1b[2J", "\ud800", "名" * 50_000, "换\n行"):
        lines = [json.dumps({"text": t, name: 1}) + "\n" for t in documents_like(5)]
        outcome = prepare_rows("".join(lines))
        assert sum(outcome.card["unused_fields"].values()) == 5
        assert "\x1b[2J" not in outcome.out
        assert len(outcome.out) < 5000


# ---------- 2. 划分 ----------

fractions = st.floats(0.01, 0.4)
corpora = st.lists(st.text("天地玄黄宇宙洪荒，。", min_size=1, max_size=6), min_size=2, max_size=30)


@given(corpora, fractions)
@example(["天", "地"], 0.03)
@example(["天"] * 29 + ["地"], 0.4)
@settings(max_examples=40)
def test_any_split_is_non_empty_and_disjoint(texts, fraction):
    """只要有两篇不同的，两边就都不空；同一篇不在两边；一篇也不丢。"""
    assume(len(set(texts)) >= 2)
    outcome = prepare_rows(texts, val_fraction=fraction)
    check_accounts(outcome.card)
    train, val = (documents(outcome.file, side) for side in SIDES)
    assert train and val
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(texts)
    assert outcome.card["duplicates"] == len(texts) - len(set(texts))


turns_text = st.text("渡口蓑衣井台。", min_size=1, max_size=3)
talks = st.lists(st.lists(st.tuples(turns_text, turns_text), min_size=1, max_size=3), min_size=2,
                 max_size=25)  # fmt: skip


@given(talks, fractions)
@example([[("渡", "口")], [("渡", "衣")], [("井", "口")]], 0.4)
@example([[("渡", "口"), ("井", "台")], [("渡", "口"), ("井", "口")]], 0.03)
@settings(max_examples=40)
def test_any_split_of_conversations_is_non_empty_and_disjoint(talks, fraction):
    """同一段对话、只有一问的同一个问题，不会既训练又检验。"""
    keys = {talk[0][0] if len(talk) == 1 else dump(talk) for talk in talks}
    assume(len(keys) >= 2)
    rows = [{"messages": [turn(role, text) for pair in talk
                          for role, text in zip(("user", "assistant"), pair, strict=True)]}
            for talk in talks]  # fmt: skip
    outcome = prepare_rows(rows, "sft", val_fraction=fraction)
    train, val = ([tuple(c) for c in conversations(outcome.file, side)] for side in SIDES)
    assert train and val and len(train) + len(val) == len(talks)
    assert not set(train) & set(val)
    asked = [{c[0] for c in part if len(c) == 2} for part in (train, val)]
    assert not asked[0] & asked[1]


@given(st.integers(200, 500), fractions, st.integers(0, 10**6))
@example(200, 0.01, 0)
@example(200, 0.4, 0)
@example(201, 0.0125, 1)
@settings(max_examples=40)
def test_the_share_is_close_to_what_was_asked(n, fraction, seed):
    """两百篇起，检验的一边与要求的相差不超过两成。"""
    outcome = prepare_rows(documents_like(n, 1, seed), val_fraction=fraction)
    share = outcome.card["val_documents"] / n / fraction
    assert 0.8 - 1e-9 <= share <= 1.2 + 1e-9


@pytest.mark.parametrize("fraction", [0.01, 0.03, 0.1, 0.4])
@pytest.mark.parametrize("greeting", [[], [turn("user", "在吗"), turn("assistant", "在。")],
                                      [turn("system", "说短句。")]])  # fmt: skip
def test_the_share_of_conversations_too(fraction, greeting):
    """开头都相同的对话也一样。"""
    rows = [{"messages": [*greeting, turn("user", question(i)), turn("assistant", answer(i))]}
            for i in range(300)]  # fmt: skip
    outcome = prepare_rows(rows, "sft", val_fraction=fraction)
    share = outcome.card["val_documents"] / 300 / fraction
    assert 0.8 - 1e-9 <= share <= 1.2 + 1e-9


def test_one_document_twice_cannot_be_split():
    """只有一篇（抄了许多遍也是一篇）：一句话，说出不同的有几篇。"""
    for rows in (["只此一篇。"], ["只此一篇。"] * 50):
        outcome = prepare_rows(rows)
        assert outcome.file is None
        assert "a.jsonl" in outcome.error and re.search("一|1", outcome.error)


def test_the_split_does_not_depend_on_order_or_container():
    """换个次序，检验的还是那几篇。"""
    texts = documents_like(300, 1)
    val = set(documents(prepare_rows(texts).file, "val"))
    random.Random(1).shuffle(texts)
    assert set(documents(prepare_rows(texts).file, "val")) == val


# ---------- 3. 容器 ----------


def packed(folder: Path, name: str, content: bytes, kind: str) -> Path:
    """同一个文件，装在 kind 里；返回新的路径。"""
    path = folder / f"{name}.{kind}"
    if kind == "directory":
        return write(folder / "directory" / name, content).parent
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
    elif kind.startswith("tar"):
        with tarfile.open(path, "w:" + kind.partition(".")[2]) as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    elif kind == "zst":
        pyarrow = pytest.importorskip("pyarrow", reason="没有 pyarrow，写不出 zstd")
        with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
            out.write(content)
    else:
        write(path, {"gz": gzip, "bz2": bz2, "xz": lzma}[kind].compress(content))
    return path


CONTAINERS = ["gz", "bz2", "xz", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "zst", "directory"]
line_texts = st.lists(st.text("天地玄黄宇宙洪荒，。", min_size=1, max_size=20), min_size=2,
                      max_size=12, unique=True)  # fmt: skip


def written(texts: list[str], layout: str) -> str | bytes:
    if layout == "array.json":
        return dump([{"text": t} for t in texts])
    if layout == "plain.txt":
        return "\n\n".join(texts)
    return jsonl({"text": t} for t in texts)


@pytest.mark.parametrize("kind", CONTAINERS)
@given(line_texts, st.sampled_from(["rows.jsonl", "array.json", "plain.txt", "no_ending"]))
@settings(max_examples=5)
def test_any_container_gives_the_same_token_file(kind, texts, layout):
    """装在哪种压缩包里都一样：词元文件与文件本身的一字不差。"""
    content = written(texts, layout)
    content = content.encode() if isinstance(content, str) else content
    with tempfile.TemporaryDirectory() as folder:
        plain = prepare(write(Path(folder) / "plain" / layout, content))
        other = prepare(packed(Path(folder), layout, content, kind))
    for key in ("train_sha256", "val_sha256", "rows", "used", "characters", "kind"):
        if key != "kind":
            assert plain.card[key] == other.card[key], key


@pytest.mark.parametrize("kind", CONTAINERS)
def test_conversations_in_any_container(tmp_path, kind):
    rows = [{"messages": [turn("user", question(i)), turn("assistant", answer(i))]}
            for i in range(30)]  # fmt: skip
    content = jsonl(rows).encode()
    plain = prepare(write(tmp_path / "p" / "a.jsonl", content), "sft")
    other = prepare(packed(tmp_path, "a.jsonl", content, kind), "sft")
    for side in SIDES:
        assert plain.card[f"{side}_sha256"] == other.card[f"{side}_sha256"]


@pytest.mark.parametrize("kind", CONTAINERS[:-1])
def test_the_name_does_not_matter(tmp_path, kind):
    """扩展名丢了、写错了：看内容。"""
    content = jsonl(documents_like(30)).encode()
    plain = prepare(write(tmp_path / "p" / "a.jsonl", content))
    path = packed(tmp_path, "a.jsonl", content, kind)
    for name in ("nameless", "wrong.txt", "wrong.jsonl"):
        shutil.copy(path, tmp_path / name)
        other = prepare(tmp_path / name)
        assert plain.card["train_sha256"] == other.card["train_sha256"]


def test_a_stream_of_two_members_is_read_whole(tmp_path):
    """两段压缩数据接在一起（cat a.gz b.gz）：两段都读。"""
    texts = documents_like(40)
    halves = [jsonl(texts[:20]).encode(), jsonl(texts[20:]).encode()]
    for name, module in (("gz", gzip), ("bz2", bz2), ("xz", lzma)):
        path = write(tmp_path / f"a.jsonl.{name}", b"".join(map(module.compress, halves)))
        assert sorted(documents(prepare(path).file)) == sorted(texts)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="没有 zstd 命令")
def test_zstd_written_by_the_command(tmp_path):
    """命令行的 zstd 写的（没有总长）、两段接在一起的，也读得出来。"""
    pytest.importorskip("pyarrow", reason="没有 pyarrow")
    texts = documents_like(40)
    frames = [subprocess.run(["zstd", "-c"], input=jsonl(part).encode(), capture_output=True,
                             check=True).stdout for part in (texts[:20], texts[20:])]  # fmt: skip
    path = write(tmp_path / "a.jsonl.zst", b"".join(frames))
    outcome = prepare(path)
    assert sorted(documents(outcome.file)) == sorted(texts)


@given(line_texts)
@settings(max_examples=8)
def test_parquet_gives_the_same_token_file(texts):
    """表里的一行就是 JSONL 的一行。"""
    pyarrow = pytest.importorskip("pyarrow", reason="没有 pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="没有 pyarrow")
    rows = [{"text": text} for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        plain = prepare(write(Path(folder) / "a.jsonl", rows))
        parquet.write_table(pyarrow.Table.from_pylist(rows), Path(folder) / "a.parquet",
                            row_group_size=3)  # fmt: skip
        other = prepare(Path(folder) / "a.parquet")
    for side in SIDES:
        assert plain.card[f"{side}_sha256"] == other.card[f"{side}_sha256"]


def test_parquet_of_conversations(tmp_path):
    """嵌套的列（一轮轮发言）也一样。"""
    pyarrow = pytest.importorskip("pyarrow", reason="没有 pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="没有 pyarrow")
    rows = [{"messages": [turn("user", question(i)), turn("assistant", answer(i))], "id": i}
            for i in range(30)]  # fmt: skip
    plain = prepare(write(tmp_path / "a.jsonl", rows), "sft")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    other = prepare(tmp_path / "a.parquet", "sft")
    assert plain.card["train_sha256"] == other.card["train_sha256"]
    assert plain.card["unused_fields"] == other.card["unused_fields"]


def test_without_pyarrow_it_is_named(tmp_path, monkeypatch):
    """没有装 pyarrow：说出缺的是它。"""
    pyarrow = pytest.importorskip("pyarrow", reason="没有 pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="没有 pyarrow")
    parquet.write_table(pyarrow.table({"text": documents_like(9)}), tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    outcome = prepare(tmp_path / "a.parquet")
    assert outcome.file is None
    assert "pyarrow" in outcome.error and "pip install" in outcome.error
    assert "a.parquet" in outcome.error


@given(line_texts, st.data())
@FEW
def test_several_files_are_their_concatenation(texts, data):
    """切成几个文件，用目录、通配符、逗号，都与接起来的一个文件相同。"""
    cut = data.draw(st.lists(st.integers(1, len(texts) - 1), max_size=3).map(sorted))
    edges = [0, *cut, len(texts)]
    shares = [texts[a:b] for a, b in itertools.pairwise(edges) if a < b]
    with tempfile.TemporaryDirectory() as folder:
        whole = prepare(write(Path(folder) / "whole.jsonl", texts))
        paths = [write(Path(folder) / "d" / f"{i}.jsonl", s) for i, s in enumerate(shares)]
        others = [prepare(source) for source in
                  (f"{folder}/d", f"{folder}/d/*.jsonl", ",".join(map(str, paths)))]  # fmt: skip
    for other in others:
        for key in ("train_sha256", "val_sha256", "rows", "used", "duplicates", "characters"):
            assert whole.card[key] == other.card[key], key


# ---------- 4. 丢的字 ----------

PADDING = documents_like(60, 3, seed=5)  # 都写得出来的字，免得丢的超过一半


def kept(text: str) -> int:
    """真正写出来的字有多少：不是 [UNK] 的词元盖住的。"""
    encoding = TOKENIZER.backend.encode(text, add_special_tokens=False)
    covered = {at for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
               if number != TOKENIZER.unk_id for at in range(start, end)}  # fmt: skip
    return len(covered)


odd_text = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("好天地。，abAé1 \n\t\u3000🦊𠮷ก\u0301\u200d\ufe0f\x00\r\u00a0"),
    ),
    min_size=1,
    max_size=40,
).filter(lambda text: text.strip())


@given(st.lists(odd_text, min_size=1, max_size=3))
@example(["🦊" * 20])
@example(["a🦊b 一𠮷𠮷二"])
@example(["e\u0301 ที่\u200d"])
@example(["甲\r\n乙\u00a0丙\x00"])
@example(["x" * 1500 + "🦊"])
@example(["Ⅷ ﬁ ½ İ ß"])
@settings(max_examples=60)
def test_lost_and_kept_add_up(texts):
    """写出来的与丢掉的，加起来正好是全部的字。"""
    outcome = prepare_rows([*texts, *PADDING])
    used = [text.strip().replace("\r\n", "\n") for text in [*texts, *PADDING]]
    card = outcome.card
    assert card["characters"] == sum(map(len, used))
    assert card["lost_characters"] + sum(map(kept, used)) == card["characters"]
    for name, total in (("characters", "characters"), ("lost", "lost_characters")):
        assert card[f"train_{name}"] + card[f"val_{name}"] == card[total]


@given(st.lists(odd_text, min_size=1, max_size=2))
@settings(max_examples=20)
def test_lost_and_kept_add_up_in_conversations(texts):
    """对话里，要猜的文字也一样。"""
    rows = [{"instruction": question(i), "output": t} for i, t in enumerate([*texts, *PADDING])]
    outcome = prepare_rows(rows, "sft")
    check_accounts(outcome.card)
    card = outcome.card
    lost = sum(len(t) - kept(t) for t in [*texts, *PADDING])
    assert card["train_lost"] + card["val_lost"] == lost
    assert card["train_characters"] + card["val_characters"] == sum(map(len, [*texts, *PADDING]))


def whole(card: dict) -> dict:
    """把两边合起来当作检验的那一边：换了字的那一份，划分也换了，合起来才能比。"""
    names = ("targets", "characters", "lost")
    return {f"val_{name}": card[f"train_{name}"] + card[f"val_{name}"] for name in names}


@given(st.lists(st.text("天地玄黄，。abc12 ", min_size=4, max_size=30).filter(str.strip),
                min_size=2, max_size=5, unique_by=str.strip),
       st.floats(0, math.log(21248)), st.data())  # fmt: skip
@example(["天地玄黄" * 5, "地玄黄天" * 5], 0.0, None)
@settings(max_examples=50)
def test_bits_are_never_better_for_lost_text(texts, loss, data):
    """把一些字换成写不出的：每个词元的损失不变（至多乱猜那么大），每字的比特数只会更多。"""
    texts = [text.strip() for text in texts]
    worse = []
    for text in texts:
        n = 2 if data is None else data.draw(st.integers(0, len(text) // 3))
        places = range(n) if data is None else data.draw(
            st.sets(st.integers(0, len(text) - 1), min_size=n, max_size=n))  # fmt: skip
        worse.append("".join("🦊" if i in places else c for i, c in enumerate(text)))
    assume(len(set(worse)) == len(worse))
    before, after = (whole(prepare_rows([*t, *PADDING]).card) for t in (texts, worse))
    assert before["val_characters"] == after["val_characters"]
    assert bits_per_character(loss, after) >= bits_per_character(loss, before) - 1e-9
    if worse != texts:
        assert bits_per_character(0.0, after) > 0


@given(st.floats(0, 12), st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0, 1))
def test_what_a_lost_character_costs(loss, targets, characters, share):
    """[UNK] 有它自己的损失，另外每藏住一个字再加 log2(0x110000) 比特；除以全部的字。"""
    lost = int(share * characters)
    card = {"val_targets": targets, "val_characters": characters, "val_lost": lost}
    bits = (loss / math.log(2) * targets + lost * WORST) / characters
    assert bits_per_character(loss, card) == pytest.approx(bits)


def test_a_corpus_of_emoji_never_looks_learned():
    """四成是表情的语料，损失练到 0 也不会是 0 比特。"""
    texts = [text[:30] + "🦊🍜" * 10 for text in documents_like(40, 3)]
    card = prepare_rows(texts).card
    assert bits_per_character(0.0, card) == pytest.approx(WORST * 0.4, rel=0.01)
