"""公开的数据集各有各的写法：照它们的样子编几条，读出来的要是原意；读不了的，说得出是什么。"""

import gzip
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from corpus import streams
from corpus.conversations import read_conversations
from corpus.log import ReadLog
from corpus.shapes import read_documents
from corpus.split import choose, hash_of
from corpus.verdicts import verdict

Q, A, Q2, A2 = "问甲", "答甲", "问乙", "答乙"
ASK, REPLY = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
BAD = {"role": "assistant", "content": "坏的"}
ONE, TWO = [("user", Q), ("assistant", A)], [("user", Q), ("assistant", A), ("user", Q2),
                                             ("assistant", A2)]  # fmt: skip


def dump(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def read(path: Path, text: str, reader) -> tuple[list, ReadLog]:
    path.write_text(text, encoding="utf-8")
    log = ReadLog(str(path))
    contents = [record.content for record in reader(path, log)]
    log.check()
    assert log.rows == log.used + log.changed.total() + log.refused.total()
    return contents, log


# ---------- 1. 对话 ----------

CONVERSATIONS = {
    "firefly": ({"kind": "问答", "input": Q, "target": A}, ONE),
    "r1_distill": ({"input": Q, "content": A, "reasoning_content": "想"}, ONE),
    "baike2018qa": ({"qid": "1", "category": "育儿", "title": Q, "desc": "", "answer": A}, ONE),
    "medical": ({"department": "内科", "title": "题", "ask": Q, "answer": A}, ONE),
    "openorca": ({"system_prompt": "短", "question": Q, "response": A}, [("system", "短"), *ONE]),
    "zhihu_kol": ({"INSTRUCTION": Q, "RESPONSE": A, "SOURCE": "知乎"}, ONE),
    "sharegpt_cn": ({"conversation": [{"human": Q, "assistant": A}, {"human": Q2,
                                                                     "assistant": A2}]}, TWO),
    "xtuner": ({"conversation": [{"system": "短", "input": Q, "output": A}]},
               [("system", "短"), *ONE]),
    "swift_history": ({"query": Q2, "response": A2, "history": [[Q, A]]}, TWO),
    "history_by_name": ({"instruction": Q2, "output": A2,
                         "history": [{"answer": A, "question": Q}]}, TWO),
    "history_as_text": ({"instruction": Q2, "output": A2, "history": dump([[Q, A]])}, TWO),
    "minimind_dpo": ({"chosen": [ASK, REPLY], "rejected": [ASK, BAD]}, ONE),
    "trl_preference": ({"prompt": [ASK], "chosen": [REPLY], "rejected": [BAD]}, ONE),
    "trl_as_text": ({"prompt": dump([ASK]), "chosen": dump([REPLY]), "rejected": dump([BAD])}, ONE),
    "hh_rlhf": ({"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": "\n\nHuman: x"}, ONE),
    "ultrafeedback": ({"prompt": Q, "chosen": [ASK, REPLY], "rejected": [ASK, BAD],
                       "score_rejected": 2.0}, ONE),
    "short_chosen": ({"prompt": Q, "chosen": "No", "rejected": "Yes"},
                     [("user", Q), ("assistant", "No")]),
    "kto_good": ({"prompt": Q, "completion": A, "label": True}, ONE),
    "metrics": ({"instruction": Q, "output": A, "train_loss": 0.0, "tag": "0"}, ONE),
    "data_of_turns": ({"data": [ASK, REPLY]}, ONE),
    "nan_input": (f'{{"instruction": "{Q}", "input": NaN, "output": "{A}"}}', ONE),
    "empty_system": ({"system": [], "instruction": Q, "output": A}, ONE),
    "role_with_space": ({"messages": [ASK, REPLY | {"role": "Assistant "}]}, ONE),
    "tool_use": ({"messages": [ASK, {"role": "assistant", "content": [
        {"type": "tool_use", "name": "查"}]}, {"role": "tool", "content": [{"晴": 1}]}, REPLY]},
        [("user", Q), ("assistant", dump({"type": "tool_use", "name": "查"})),
         ("tool", dump([{"晴": 1}])), ("assistant", A)]),
    "function_call": ({"conversations": [
        {"from": "human", "value": Q}, {"from": "function_call", "value": {"name": "查"}},
        {"from": "observation", "value": {"晴": 1}}, {"from": "gpt", "value": A}]},
        [("user", Q), ("assistant", dump({"name": "查"})), ("tool", dump({"晴": 1})),
         ("assistant", A)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_of_public_data_sets(tmp_path, name):
    row, expected = CONVERSATIONS[name]
    line = row if isinstance(row, str) else dump(row)
    contents, _ = read(tmp_path / "x.jsonl", f"{line}\n" * 3, read_conversations)
    assert contents == [expected] * 3
    contents, _ = read(tmp_path / "x.json", f"[{line},\n{line}]", read_conversations)
    assert contents == [expected] * 2  # {"chosen": […], "rejected": […]} 是一条，不是两列


@pytest.mark.parametrize("field, value", [
    ("kto_tag", False), ("label", "undesirable"), ("weight", "0.0"), ("loss_weight", 0),
    ("labels", 0), ("isChosen", False), ("is_rejected", True), ("correct", False),
    ("是否采纳", "否"), ("feedback", "dislike"), ("rating", "thumbs_down"), ("deleted", True),
    ("reward", -1), ("accepted", "no"), ("bad", 1),
])  # fmt: skip
def test_what_is_marked_is_not_learned(tmp_path, field, value):
    """标着不该学的，整条不用；写在一轮上的，那一轮不用。都说出是哪个字段。"""
    good = {"instruction": Q2, "output": A2}
    text = "".join(
        dump(row) + "\n" for row in (good, good, good | {"output": "坏的", field: value})
    )
    contents, log = read(tmp_path / "x.jsonl", text, read_conversations)
    assert len(contents) == 2 and "坏的" not in str(contents)
    assert field in str(log.refused) and log.bad == 0
    turns = {"messages": [ASK, REPLY, {"role": "user", "content": Q2}, BAD | {field: value}]}
    contents, log = read(tmp_path / "y.jsonl", dump(turns) + "\n", read_conversations)
    assert contents == [[*ONE, ("user", Q2)]] and log.changed


@pytest.mark.parametrize("field, value", [
    ("score_rejected", 2), ("train_loss", 0.0), ("tag", "0"), ("chosen", "No"), ("rejected", "Yes"),
    ("stage", 0), ("badge", 1), ("label", "体育"),
])  # fmt: skip
def test_other_things_are_no_verdict(field, value):
    assert verdict(field, value) is None


def test_reasoning_is_written_once(tmp_path):
    """正文里已经有 <think> 的不再写；写在整段外面的也学；只有思考没有回答的，不是回答。"""
    thought = {"reasoning_content": "想"}
    rows = [
        {"messages": [ASK, REPLY | thought | {"content": f"<think>想</think>{A}"}]},
        {"messages": [ASK, REPLY], **thought},
        {"messages": [ASK, REPLY | thought | {"content": ""}]},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(dump(row) + "\n" for row in rows), encoding="utf-8")
    log = ReadLog(str(path))
    kept = [r.content[-1][1] for r in read_conversations(path, log, keep_reasoning=True)]
    assert kept == [f"<think>想</think>{A}", f"<think>\n想\n</think>\n\n{A}"]
    assert log.refused.total() == 1


# ---------- 2. 文档与摆法 ----------

TEXTS = [f"第{i}篇的正文。" for i in range(6)]
ROWS = [{"text": text} for text in TEXTS]
DOCUMENTS = {
    "authors_before_data": dump({"authors": [{"text": "作者甲"}], "data": ROWS}),
    "hf_viewer": dump({"features": [{"name": "text"}], "rows": [{"row": row} for row in ROWS]}),
    "comments_inside": "".join(json.dumps({"id": 0, "comments": [{"text": "评论"}]} | row,
                                          ensure_ascii=False, indent=1) for row in ROWS),
    "columns": dump({"text": TEXTS, "label": [0] * 6}),
    "trailing_commas": "".join(dump(row) + ",\n" for row in ROWS),
    "comma_before_the_end": "[" + "".join(dump(row) + ",\n" for row in ROWS) + "]",
    "twice_encoded": "".join(dump(dump(row)) + "\n" for row in ROWS),
    "capitals": "".join(dump({"Text": text}) + "\n" for text in TEXTS),
    "squad_context": dump([{"paragraphs": [{"context": t, "qas": []}]} for t in TEXTS]),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_of_public_data_sets(tmp_path, name):
    assert read(tmp_path / "x.json", DOCUMENTS[name], read_documents)[0] == TEXTS


def test_a_folder_of_small_files_is_one_document_each(tmp_path):
    """THUCNews 那样，一个文件一篇：不切碎，也不印几千句话；空文件与断了的链接略过。"""
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text("标题\n第一段。\n第二段。", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "dataset_info.json").write_text("{}")
    log = ReadLog(str(tmp_path))
    assert len(list(read_documents(tmp_path, log))) == 40
    said = "\n".join(log.report())
    assert "empty.txt" in said and "gone.txt" in said and len(said) < 3000


@pytest.mark.parametrize("text, said", [
    ("今天天气很好,我们去公园\n明天下雨,我们在家\n", "第一行被当作表头"),
    ("text,text\n甲,乙\n", "两列都叫 text"),
])  # fmt: skip
def test_tables_without_a_usable_header_are_named(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path / "x.csv", text, read_documents)


def test_nothing_but_commas_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="找不到"):
        list(read_documents(" , ", ReadLog(",")))


def test_utf16_without_a_mark_is_named(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("今天天气很好，我们去公园。\n".encode("utf-16-le") * 50)
    with pytest.raises(UserError, match="UTF-16LE"):
        list(read_documents(path, ReadLog("x")))


@pytest.mark.parametrize(
    "text", ["甲说的一句话。\n乙说的一句话。\n", "没有分行" * 30 + "。然后" * 30]
)
def test_a_small_text_is_the_same_inside_an_archive(tmp_path, text):
    """只装着一个文件的包，与那个文件读出来的一样，哪怕它小得要切开。"""
    plain = tmp_path / "a.txt"
    plain.write_text(text, encoding="utf-8")
    expected = [r.content for r in read_documents(plain, ReadLog("a"))]
    assert len(expected) > 1
    for name in ("a.zip", "a.tar"):
        if name.endswith("zip"):
            with zipfile.ZipFile(tmp_path / name, "w") as archive:
                archive.write(plain, "a.txt")
        else:
            with tarfile.open(tmp_path / name, "w") as archive:
                archive.add(plain, "a.txt")
        path = tmp_path / name
        assert [r.content for r in read_documents(path, ReadLog("b"))] == expected


# ---------- 3. 故意改坏代码时，没有测试发觉的 ----------


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.zip"])
def test_what_unpacks_to_far_too_much_is_no_text(tmp_path, monkeypatch, name):
    """解压炸弹，小的：真的 2 GB 的在 test_traps.py，平时不跑。"""
    monkeypatch.setattr(streams, "BOMB_SIZE", 1 << 20)
    data, path = (dump({"text": "同一行"}) + "\n").encode() * 200_000, tmp_path / name
    if name.endswith("zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.jsonl", data)
    else:
        path.write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match="不是文字"):
        list(read_documents(path, ReadLog("x")))


def test_fields_beside_wrapped_rows_are_counted(tmp_path):
    line = dump({"page": 1, "data": ROWS[:2]}) + "\n"
    documents, log = read(tmp_path / "x.jsonl", line * 3, read_documents)
    assert len(documents) == 6 and log.unused == {"page": 3}


def test_two_greetings_do_not_hold_out_half():
    """一半以「你好」开头，一半以「在吗」：改看全文，留出的仍接近想要的。"""
    n = 100
    keys = np.array([hash_of(("你好", "在吗")[i % 2]) for i in range(n)], np.uint64)
    whole = np.array([hash_of(f"第 {i} 段") for i in range(n)], np.uint64)
    assert choose(keys, whole, whole, 0.1).sum() == pytest.approx(10, abs=2)
