"""tools.inspect：数都对得上，训练不收的这里也不收，样本标出的就是训练时学的。"""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text
from scripts import run

from corpus.log import ReadLog, Refused
from tools.inspect.facts import BUCKETS, histogram, of_refusal
from tools.inspect.screen import fold, middle_left_out, percent, plain, spoken

ROWS = [{"text": f"第 {i} 篇说的是春天里的第 {i} 朵花。"} for i in range(40)]
TURNS = [("user", "你好"), ("assistant", "好！"), ("user", "几点了？"), ("assistant", "三点。")]
CHAT = {"conversations": [{"role": role, "content": text} for role, text in TURNS]}


def write(path, rows) -> str:
    """一行一条；返回文件名。"""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path.name


def look(folder, *args, code=0):
    """看一遍，不估计时间；返回 (JSON, 一屏, 标准错误)。"""
    words = ("--json", "report.json", "--no-time", "--preset", "tiny", *args)
    out, err = run(folder, "tools.inspect", *words, code=code)
    return json.loads((folder / "report.json").read_bytes()), out, err


def chats(n: int) -> list[dict]:
    """n 段互不相同的一问一答。"""
    return [
        {"conversations": [{"role": "user", "content": f"第 {i} 问"},
                           {"role": "assistant", "content": f"第 {i} 答"}]}
        for i in range(n)
    ]  # fmt: skip


# ---------- 数 ----------


def test_every_number_adds_up(tmp_path):
    rows = [row | {"url": "x"} for row in ROWS[:30]] + ROWS[30:]
    rows += [ROWS[0], {"text": "写不出的𠀀𠀀字，另有一个𠀁。"}]
    report, out, _ = look(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert (report["kind"], report["rows"], report["stage"]) == ("jsonl", 42, "pretrain")
    changed, refused = report["changed"], report["refused"]
    assert report["used"] + sum(changed.values()) + sum(refused.values()) == 42
    assert report["unused_fields"] == {"url": 30}
    assert (report["lost_characters"], report["lost_top"]) == (3, [["𠀀", 2], ["𠀁", 1]])
    assert report["characters"] == sum(len(row["text"]) for row in rows)
    assert report["train_documents"] + report["val_documents"] == 42
    assert min(report["train_documents"], report["val_documents"]) > 0
    assert report["duplicates"] == 1
    cells = report["lengths"]["histogram"]
    assert sum(cell["documents"] for cell in cells) == 42
    assert report["error"] is None and report["time"] is None
    for words in ("url（30）", "3（", "𠀀（2）", "42 篇"):
        assert words in out


def test_samples_are_whole_documents(tmp_path):
    report, out, _ = look(tmp_path, write(tmp_path / "a.jsonl", ROWS))
    texts = [f"<|im_start|>{row['text']}<|im_end|>" for row in ROWS]
    samples = report["samples"]
    assert len(samples) == 3
    for sample in samples:
        assert sample["text"] in texts and sample["supervised"] == [sample["text"]]
        assert sample["text"] in out and not sample["cut"]
    assert len({sample["text"] for sample in samples}) == 3


def test_a_letter_that_cannot_be_written_is_shown(tmp_path):
    report, _, _ = look(tmp_path, write(tmp_path / "a.jsonl", [{"text": "春𠀀天"}, *ROWS]))
    assert any("[UNK]" in s["text"] for s in report["samples"])


def test_a_document_longer_than_a_row_is_not_lost(tmp_path):
    rows = [{"text": "一二三四五六七八九十" * 4}, *ROWS]
    report, out, _ = look(tmp_path, write(tmp_path / "a.jsonl", rows), "--seq_len", "32")
    assert (report["seq_len"], report["cut"], report["skipped"]) == (32, 1, 0)
    assert "1 篇（2.4%），断开接到下一行，不会丢掉" in out


def test_several_files_are_one_corpus(tmp_path):
    names = [write(tmp_path / "a.jsonl", ROWS[:25]), write(tmp_path / "b.jsonl", ROWS[25:])]
    report, out, _ = look(tmp_path, *names)
    assert [file["rows"] for file in report["files"]] == [25, 15]
    assert report["rows"] == 40
    assert "a.jsonl（jsonl）（25）、b.jsonl（jsonl）（15）" in out.replace("\n", "")


# ---------- 对话 ----------


def test_exactly_what_is_learned_is_marked(tmp_path):
    name = write(tmp_path / "chat.jsonl", [CHAT, *chats(30)])
    report, out, _ = look(tmp_path, name, "--stage", "sft")
    sample = next(s for s in report["samples"] if "几点了" in s["text"])
    asked = "<|im_start|><|user|>{}<|im_end|><|im_start|><|assistant|>{}<|im_end|>"
    assert sample["text"] == asked.format("你好", "好！") + asked.format("几点了？", "三点。")
    assert sample["supervised"] == ["好！<|im_end|>", "三点。<|im_end|>"]
    shown = out.replace("\n", "")
    assert "【好！<|im_end|>】" in shown and "【三点。<|im_end|>】" in shown
    learned = sum(report[f"{side}_targets"] for side in ("train", "val"))
    assert f"要学的 {learned:,}" in out


def test_what_is_cut_off_is_not_marked(tmp_path):
    long = {"conversations": [*CHAT["conversations"], {"role": "user", "content": "再说" * 20},
                              {"role": "assistant", "content": "不说了。"}]}  # fmt: skip
    name = write(tmp_path / "chat.jsonl", [long, *chats(30)])
    report, out, _ = look(tmp_path, name, "--stage", "sft", "--seq_len", "32")
    sample = next(s for s in report["samples"] if "几点了" in s["text"])
    assert sample["cut"] and "不说了。" in sample["text"]
    assert sample["supervised"] == ["好！<|im_end|>", "三点。<|im_end|>"]
    assert (report["cut"], report["skipped"]) == (1, 0)
    assert "末尾截掉" in out and "（第 33 个词元以后的截掉）" in out and "不说了" not in out


def test_what_has_no_room_for_an_answer_is_refused_as_in_training(tmp_path):
    rows = [
        {"instruction": f"{i} 问" + "长" * 40, "output": "答"} for i in range(30)
    ]  # 答在一行之外
    name = write(tmp_path / "chat.jsonl", rows)
    report, _, err = look(tmp_path, name, "--stage", "sft", "--seq_len", "16", code=2)
    assert "seq_len" in report["error"] and report["error"] in err
    assert report["rows"] == 30 and report["lengths"] is None


# ---------- 不收的 ----------


def test_refused_with_the_same_sentence_as_in_training(tmp_path):
    name = write(tmp_path / "a.jsonl", [*ROWS, *([{"body": "没有 text"}] * 9)])
    report, out, err = look(tmp_path, name, code=2)
    _, said = run(tmp_path, "pre_train.py", "--data", name, code=2)
    sentence = said[said.index("错误：") :]
    assert err.endswith(sentence) and f"错误：{report['error']}\n" == sentence
    assert report["rows"] == report["used"] + sum(report["refused"].values()) == 49
    assert sum(report["refused"].values()) == 9
    assert report["samples"] is None and report["characters"] is None
    assert "不用 9" in out


def test_what_was_counted_before_refusing_is_kept():
    log = ReadLog("a.txt")
    log.begin("a.txt", "text")
    log.use()
    error = Refused("大半写不出", log)
    error.totals = {"characters": 9, "lost_characters": 6, "别的": 1}
    found = of_refusal(error)
    assert (found["kind"], found["rows"], found["error"]) == ("text", 1, "大半写不出")
    assert (found["characters"], found["lost_characters"]) == (9, 6) and "别的" not in found


def test_a_missing_file_is_one_sentence(tmp_path):
    report, _, err = look(tmp_path, "没有.jsonl", code=2)
    _, said = run(tmp_path, "pre_train.py", "--data", "没有.jsonl", code=2)
    assert f"错误：{report['error']}" in said and report["error"] in err
    assert report["rows"] is None


def test_mistakes_on_the_command_line(tmp_path):
    for args, words in [
        ((), "请先写数据文件"),
        (("a.jsonl", "--preset", "huge"), "huge"),
        (("a.jsonl", "--stage", "dpo"), "pretrain"),
        (("a.jsonl", "--seq_len", "0"), "seq_len"),
        (("a.jsonl", "--json", " "), "--json"),
    ]:
        _, err = run(tmp_path, "tools.inspect", *args, code=2)
        assert words in err and err.count("\n") <= 3
    assert list(tmp_path.iterdir()) == []


def test_help(tmp_path):
    out, _ = run(tmp_path, "tools.inspect", "--help")
    assert "python -m tools.inspect" in out
    assert all(f"--{name}" in out for name in ("stage", "json", "keep_reasoning", "no-time"))


# ---------- 写在哪里 ----------


def test_only_json_on_standard_output(tmp_path):
    name = write(tmp_path / "a.jsonl", ROWS)
    out, err = run(tmp_path, "tools.inspect", name, "--json", "-", "--no-time")
    assert json.loads(out)["rows"] == 40
    assert "数据体检" in err
    out, err = run(tmp_path, "tools.inspect", "没有.jsonl", "--json", "-", code=2)
    assert json.loads(out)["error"] in err


def test_no_other_file_is_overwritten(tmp_path):
    name = write(tmp_path / "a.jsonl", ROWS)
    before = (tmp_path / name).read_bytes()
    _, err = run(tmp_path, "tools.inspect", name, "--json", name, "--no-time", code=2)
    assert "不是以前的体检结果" in err and (tmp_path / name).read_bytes() == before
    for _ in range(2):  # 以前的体检结果可以
        look(tmp_path, name)


def test_training_uses_what_was_prepared(tmp_path):
    name = write(tmp_path / "a.jsonl", ROWS)
    look(tmp_path, name)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.bin")}
    args = ("--data", name, "--preset", "tiny", "--no-compile", "--max_steps", "1")
    run(tmp_path, "pre_train.py", *args, "--batch_size", "1", "--seq_len", "32")
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.bin")}


# ---------- 一屏 ----------


@pytest.mark.parametrize("width", [60, 80])
def test_it_fits_a_screen(tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    long = [
        {"text": f"{i}：" + "风吹草低见牛羊。" * 2 ** (i % 10), "a" * 300: 1} for i in range(60)
    ]
    _, out, _ = look(tmp_path, write(tmp_path / "a.jsonl", long))
    lines = out.splitlines()
    assert len(lines) <= 40 and max(map(cell_len, lines)) <= width
    assert " …… " in out


def test_what_the_data_says_cannot_reach_the_terminal(tmp_path):
    rows = [{"text": f"{i}\x1b[31m红\x1b[0m\u202e", "\x1b[2J": i} for i in range(9)]
    _, out, _ = look(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert "\x1b" not in out and "\u202e" not in out and "U+001B" in out


def test_a_field_name_that_is_no_text(tmp_path):
    """JSON 写得出不成对的代理字符；字段名里有它，数的时候写成转义。"""
    rows = "".join(f'{{"text": "春天 {i}", "\\ud800": 1}}\n' for i in range(9))
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    report, _, _ = look(tmp_path, "a.jsonl")
    assert report["unused_fields"] == {"\\ud800": 9}


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=60))
def test_the_histogram_holds_everyone(counts):
    cells = histogram(np.array(counts))
    assert 1 <= len(cells) <= BUCKETS
    assert (cells[0]["from"], cells[-1]["to"]) == (min(counts), max(counts))
    for cell in cells:
        assert cell["documents"] == sum(cell["from"] <= n <= cell["to"] for n in counts)
    for before, after in pairwise(cells):
        assert after["from"] == before["to"] + 1


@given(st.text(max_size=200), st.integers(4, 40))
def test_folding_loses_nothing(text, width):
    text = plain(text)
    lines = fold(Text(text), width)
    assert "".join(line.plain for line in lines) == Text(text).plain
    assert all(cell_len(line.plain) <= width for line in lines)


@given(st.lists(st.tuples(st.text(max_size=50), st.booleans()), max_size=5), st.integers(8, 60))
def test_only_the_middle_is_left_out(pieces, room):
    text = plain("".join(piece for piece, _ in pieces))
    shown = "".join(piece for piece, _ in middle_left_out(pieces, room))
    if cell_len(text) <= room:
        assert shown == text
    else:
        head, tail = re.split(" …… (?!.* …… )", shown, maxsplit=1)
        assert text.startswith(head) and text.endswith(tail)
        assert cell_len(shown) <= room + cell_len(" …… ")


def test_numbers_for_people():
    shares = (0, 0.00001, 0.0012, 0.5, 0.99999, 1)
    assert [percent(x) for x in shares] == ["0%", "<0.01%", "0.12%", "50.0%", "99.9%", "100%"]
    seconds = (0.2, 59, 90, 3600, 86400 * 30)
    assert [spoken(s) for s in seconds] == ["1 秒", "59 秒", "1.5 分钟", "1.0 小时", "30 天"]


# ---------- 要多久 ----------


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_how_long_the_default_run_takes(tmp_path, stage):
    name = write(tmp_path / "a.jsonl", {"pretrain": ROWS, "sft": chats(40)}[stage])
    args = ("--json", "report.json", "--preset", "tiny", "--stage", stage)
    out, _ = run(tmp_path, "tools.inspect", name, *args)
    found = json.loads((tmp_path / "report.json").read_bytes())["time"]
    assert found["steps"] == 20  # 这么少的数据，训练不会走预设的步数
    assert 0 < found["seconds_per_step"] < 60
    assert found["seconds"] == pytest.approx(found["steps"] * found["seconds_per_step"])
    assert f"{found['steps']:,} 步" in out
    assert not (tmp_path / "out").exists()  # 只是试走，什么也不留下
