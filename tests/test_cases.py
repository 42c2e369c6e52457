"""人们手里的数据真正的样子：每一种都读得对，或者一句话说清；一样也不在无声中丢掉。

每一种（`CASES`）有一份编出来的样本，和一个只看文件就能说出「该读出什么」的函数；环境变量
MINI_LLM_CASES 指着一个装着同名文件的目录时，同样的检查也在那些文件上做一遍。
"""

import bz2
import csv
import io
import json
import lzma
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from invented import (
    TOKENIZER,
    Outcome,
    answer,
    check_accounts,
    check_sentence,
    conversations,
    documents,
    documents_like,
    dump,
    jsonl,
    pieces,
    prepare,
    question,
    seen,
    sentence,
    squeezed,
    taught,
    turn,
    write,
)

from dataset import SIDES

# ---------- 1. 每一种：样本怎样编，该读出什么 ----------


@dataclass
class Case:
    """一种数据。

    Fields:
        make: 编一份样本，返回它的内容。
        expected: 路径 -> 该读出的文档或对话；None 是不看这个，只看 check。
        refused: 拒绝时的话里要有的（正则）；None 是不许拒绝。
        said: 读成时印出来的话里要有的（正则）。
        check: 另外还要看的。
    """

    stage: str
    make: Callable[[], str | bytes | list]
    expected: Callable[[Path], list] | None = None
    refused: str | None = None
    said: str | None = None
    check: Callable[[Path, Outcome], None] | None = None


def judge(case: Case, path: Path) -> None:
    outcome = prepare(path, case.stage)
    if outcome.file is None:
        assert case.refused, f"不该拒绝：{outcome.error}"
        check_sentence(outcome.error, path)
        assert re.search(case.refused, outcome.error), outcome.error
        return
    assert case.expected or case.check, f"该拒绝（{case.refused}），却读成了：{outcome.card}"
    check_accounts(outcome.card)
    if case.expected:
        compare(case.expected(path), outcome)
    if case.said:
        assert re.search(case.said, outcome.out), outcome.out
    if case.check:
        case.check(path, outcome)


def compare(expected: list, outcome: Outcome) -> None:
    """读出来的恰好是该读出的；次序因分成两边而不同，空白不计较。"""
    if isinstance(expected[0], str):
        found, wanted = documents(outcome.file), [seen(text) for text in expected]
        assert sorted(map(squeezed, found)) == sorted(map(squeezed, wanted))
    else:
        wanted = [[(role, squeezed(seen(text))) for role, text in turns] for turns in expected]
        found = conversations(outcome.file)
        found = [[(role, squeezed(text)) for role, text in turns] for turns in found]
        assert sorted(found) == sorted(wanted)


def rows(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def row_texts(path: Path) -> list[str]:
    return [row["text"] for row in rows(path)]


def concatenated(text: str) -> list:
    """一个接一个写着的 JSON 值。"""
    decoder, values, at = json.JSONDecoder(), [], 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    return values


# -- 预训练


def paragraphs(path: Path) -> list[str]:
    return [p for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]


def check_lines_became_documents(path: Path, outcome: Outcome) -> None:
    """没有空行的文字：在行尾或句末分成许多篇，一句不少，也没有一句被切断。"""
    found = documents(outcome.file)
    assert len(found) >= 20
    assert all(text.rstrip().endswith("。") for text in found)
    whole = "".join(path.read_text(encoding="utf-8").split())
    assert sorted(squeezed("".join(found)).split("。")) == sorted(whole.split("。"))


def check_doc_tags(path: Path, outcome: Outcome) -> None:
    """一个 <doc> 一篇，标签不学。"""
    text = path.read_text(encoding="utf-8")
    inside = re.findall(r"<doc [^>]*>\n(.*?)</doc>", text, re.S)
    compare(inside, outcome)


def wiki_extractor() -> str:
    noise = random_of(3)
    pages = []
    for i in range(1, 41):
        body = "\n\n".join(sentence(noise) + sentence(noise) for _ in range(2))
        pages.append(f'<doc id="{i}" url="https://zh.example.org/wiki?curid={i}" title="词条{i}">\n'
                     f"词条{i}\n\n{body}\n</doc>\n")  # fmt: skip
    return "\n".join(pages)


def random_of(seed: int):
    import random

    return random.Random(seed)


def csv_of(header: list[str], table: list[list]) -> str:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([header, *table])
    return lines.getvalue()


def csv_rows(path: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def corpus_rows(n: int = 60, seed: int = 1) -> str:
    return jsonl({"text": text} for text in documents_like(n, 3, seed))


def zipped(content: bytes, name: str = "语料/corpus.jsonl") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return data.getvalue()


def tarred(content: bytes, mode: str = "w", name: str = "corpus/part0.jsonl") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def unpacked(path: Path) -> bytes:
    """压缩文件里的内容；打成包的，几个文件接起来。"""
    data = path.read_bytes()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return b"".join(map(archive.read, archive.namelist()))
    if ".tar" in path.name:
        with tarfile.open(path) as archive:
            return b"".join(archive.extractfile(m).read() for m in archive if m.isfile())
    return (bz2 if path.suffix == ".bz2" else lzma).decompress(data)


def unpacked_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in unpacked(path).decode().splitlines()]


def parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="没有 pyarrow")
    writer = pytest.importorskip("pyarrow.parquet", reason="没有 pyarrow")
    data = io.BytesIO()
    table = pyarrow.table({"text": documents_like(60, 3, 1), "id": list(range(60))})
    writer.write_table(table, data)
    return data.getvalue()


def parquet_texts(path: Path) -> list[str]:
    parquet = pytest.importorskip("pyarrow.parquet", reason="没有 pyarrow")
    return parquet.read_table(path)["text"].to_pylist()


def lfs_pointer() -> str:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{'cd34' * 16}\nsize 987654321\n"


def infobox() -> str:
    return "{{Infobox 人物\n| 姓名 = 老魏\n}}\n\n" + "\n\n".join(documents_like(40, 3, 5)) + "\n"


def emoji_lines() -> str:
    noise = random_of(7)
    return "\n\n".join(sentence(noise) + "".join(noise.choices("🦊🍜🚲🌧🎻🧭", k=30))
                       for _ in range(200))  # fmt: skip


def thai_lines() -> str:
    noise = random_of(8)
    words = ["แมว", "ตลาดน้ำ", "เรือ", "ภูเขา", "เดิน", "กลางคืน", "ช้ามาก"]
    return "\n\n".join("".join(noise.choices(words, k=12)) for _ in range(200))


# -- 微调


def qa(i: int) -> list[dict]:
    return [turn("user", question(i)), turn("assistant", answer(i))]


ROLES = {"human": "user", "gpt": "assistant"}


def pairs(messages: list[dict]) -> list[tuple[str, str]]:
    """一轮轮发言 -> [(角色, 正文), …]；正文是列表的，取文字的几段。"""
    found = []
    for message in messages:
        role, text = message.get("role", message.get("from")), message.get("content")
        text = message["value"] if text is None else text
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        found.append((ROLES.get(role, role), text))
    return found


def chats(path: Path) -> list:
    """conversations 或 messages，前面也许有 system。"""
    found = []
    for row in rows(path):
        system = [("system", row["system"])] if row.get("system") else []
        found.append([*system, *pairs(row.get("conversations") or row["messages"])])
    return found


def alpaca(row: dict, answer_field: str = "output") -> list[tuple[str, str]]:
    system = [("system", row["system"])] if row.get("system") else []
    earlier = [(role, text) for pair in row.get("history", [])
               for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
    asked = "\n".join(filter(None, [row["instruction"], row.get("input")]))
    return [*system, *earlier, ("user", asked), ("assistant", row[answer_field])]


def alpacas(path: Path) -> list:
    return [alpaca(row) for row in rows(path)]


def check_split_is_fair(path: Path, outcome: Outcome) -> None:
    """划分跟着整段对话走：检验的一边不空，也不因为开头相同就拿走一大半。"""
    n = sum(outcome.card[f"{side}_documents"] for side in SIDES)
    assert 1 <= outcome.card["val_documents"] <= max(1, 0.1 * n)


def check_rejected_is_nowhere(path: Path, outcome: Outcome) -> None:
    found = conversations(outcome.file)
    for row in rows(path):
        assert not any(row["rejected"] in text for turns in found for _, text in turns)


def check_every_answer(path: Path, outcome: Outcome) -> None:
    """空白的提问也罢，回答都在。"""
    found = [turns[-1] for turns in conversations(outcome.file)]
    assert sorted(found) == sorted(("assistant", row["output"]) for row in rows(path))
    check_split_is_fair(path, outcome)


def check_tools(path: Path, outcome: Outcome) -> None:
    """工具的说明在系统的话里，其余不变。"""
    originals = {dump(pairs(row["messages"])): row["tools"] for row in rows(path)}
    found = conversations(outcome.file)
    assert len(found) == len(rows(path))
    for turns in found:
        tools = originals[dump([t for t in turns if t[0] != "system"])]
        assert turns[0][0] == "system"
        assert all(squeezed(dump(tool)) in squeezed(turns[0][1]) for tool in tools)


def check_no_blank_answer(path: Path, outcome: Outcome) -> None:
    """空的回答不教，也不悄悄丢掉。"""
    card = outcome.card
    assert all(text.strip() for turns in conversations(outcome.file) for _, text in turns)
    blank = sum(not t["content"].strip() for row in rows(path) for t in row["conversations"])
    assert sum(card["changed"].values()) + sum(card["refused"].values()) >= blank > 0
    assert re.search("空|没有文字", outcome.out), outcome.out


def check_dolly(path: Path, outcome: Outcome) -> None:
    """context 在提问里，response 是回答，category 没有用，说了。"""
    wanted = {row["response"]: row for row in rows(path)}
    found = conversations(outcome.file)
    assert len(found) == len(wanted)
    for turns in found:
        row = wanted[turns[-1][1]]
        asked = "".join(text for _, text in turns[:-1])
        assert row["instruction"] in asked and row["context"] in asked
    assert outcome.card["unused_fields"].get("category") == len(wanted)
    assert "category" in outcome.out


def conversation_strings(path: Path) -> list:
    return [pairs(json.loads(row["conversations"])) for row in rows(path)]


def check_parts_are_counted(path: Path, outcome: Outcome) -> None:
    """不是文字的几段（图片、声音）没有用，要数出来。"""
    kinds = {part["type"] for row in rows(path) for m in row["messages"] for part in m["content"]}
    for kind in kinds - {"text"}:
        assert kind in outcome.out, outcome.out


def parts_of(i: int) -> dict:
    """一问一答，正文是几段；每三条有一条带着图片。"""
    asked = [{"type": "text", "text": question(i)}]
    if i % 3 == 0:
        asked.append({"type": "image_url", "image_url": {"url": f"https://example.org/{i}.png"}})
    return {"messages": [turn("user", asked),
                         turn("assistant", [{"type": "text", "text": answer(i)}])]}  # fmt: skip


CASES = {
    # 预训练
    "p_one_doc_per_line.txt": Case(
        "pretrain", lambda: "".join(t + "\n" for t in documents_like(50, 2)),
        said="行|句", check=check_lines_became_documents),
    "p_small_8docs.txt": Case("pretrain", lambda: "\n\n".join(documents_like(8)), paragraphs),
    "p_small_20docs.jsonl": Case("pretrain", lambda: corpus_rows(20), row_texts),
    "p_corpus.csv": Case(
        "pretrain", lambda: csv_of(["id", "text"], [[i, t] for i, t in
                                                    enumerate(documents_like(60, 3))]),
        lambda path: [row["text"] for row in csv_rows(path)], refused="(?i)csv"),
    "p_corpus.parquet": Case("pretrain", parquet, parquet_texts, refused="(?i)parquet.*pyarrow"),
    "p_corpus.zip": Case("pretrain", lambda: zipped(corpus_rows().encode()), unpacked_texts),
    "p_corpus.jsonl.xz": Case("pretrain", lambda: lzma.compress(corpus_rows().encode()),
                              unpacked_texts),
    "p_corpus.jsonl.bz2": Case("pretrain", lambda: bz2.compress(corpus_rows().encode()),
                               unpacked_texts),
    "p_corpus.tar": Case("pretrain", lambda: tarred(corpus_rows().encode()), unpacked_texts),
    "p_corpus.tar.gz": Case("pretrain", lambda: tarred(corpus_rows().encode(), "w:gz"),
                            unpacked_texts),
    "p_wikiextractor_wiki_00": Case("pretrain", wiki_extractor, check=check_doc_tags),
    "p_text_list.jsonl": Case(
        "pretrain", lambda: [{"text": documents_like(3, 1, i)} for i in range(40)],
        lambda path: ["\n".join(texts) for texts in row_texts(path)], refused="列表|数组|list"),
    "p_pretty_printed.json": Case(
        "pretrain", lambda: "\n".join(dump({"text": t}, indent=2) for t in documents_like(80)),
        lambda path: [row["text"] for row in concatenated(path.read_text(encoding="utf-8"))]),
    "p_wrapped_data_indent.json": Case(
        "pretrain", lambda: dump({"data": [{"text": t} for t in documents_like(40)]}, indent=1),
        lambda path: [r["text"] for r in json.loads(path.read_text(encoding="utf-8"))["data"]]),
    "p_cat_arrays.json": Case(
        "pretrain", lambda: "".join(dump([{"text": t} for t in documents_like(30, 2, seed)])
                                    for seed in range(3)),
        lambda path: [row["text"] for array in concatenated(path.read_text(encoding="utf-8"))
                      for row in array]),
    "p_cat_noeol.jsonl": Case(
        "pretrain", lambda: "".join(corpus_rows(40, seed)[:-1] for seed in range(4)),
        lambda path: [row["text"] for row in concatenated(path.read_text(encoding="utf-8"))]),
    "p_lfs_pointer.txt": Case("pretrain", lfs_pointer, refused="Git LFS.*指针"),
    "p_lfs_pointer.jsonl": Case("pretrain", lfs_pointer, refused="Git LFS.*指针"),
    "p_wikitext_template.txt": Case("pretrain", infobox, paragraphs),
    "p_emoji.txt": Case("pretrain", emoji_lines, refused=r"\d+(\.\d+)? ?%"),
    "p_thai.txt": Case("pretrain", thai_lines, refused=r"\d+(\.\d+)? ?%"),
    # 微调
    "s_small_20.jsonl": Case(
        "sft", lambda: [{"instruction": question(i), "input": "", "output": answer(i)}
                        for i in range(20)], alpacas),
    "s_greeting_all.jsonl": Case(
        "sft", lambda: [{"conversations": [turn("user", "早上好。"), turn("assistant", "早，请"),
                                           *qa(i)]} for i in range(80)],
        chats, check=check_split_is_fair),
    "s_same_first_question.jsonl": Case(
        "sft", lambda: [{"conversations": [turn("user", "在吗"), turn("assistant", f"在，{i}号。"),
                                           *qa(i)]} for i in range(80)],
        chats, check=check_split_is_fair),
    "s_blank_question.jsonl": Case(
        "sft", lambda: [{"instruction": "", "input": "", "output": answer(i)} for i in range(50)],
        check=check_every_answer),
    "s_alpaca_history.jsonl": Case(
        "sft", lambda: [{"instruction": question(i), "input": "", "output": answer(i),
                         "system": "你是石匠。", "history": [[question(500 + i), answer(500 + i)],
                                                     [question(900 + i), answer(900 + i)]]}
                        for i in range(40)], alpacas),
    "s_top_system.jsonl": Case(
        "sft", lambda: [{"system": "你守着渡口。", "conversations": [
            {"from": "human", "value": question(i)}, {"from": "gpt", "value": answer(i)}]}
            for i in range(40)], chats),
    "s_top_tools.jsonl": Case(
        "sft", lambda: [{"tools": [{"type": "function", "function": {
            "name": "ask_ferry", "parameters": {"type": "object"}}}], "messages": qa(i)}
            for i in range(40)], check=check_tools),
    "s_dpo_alpaca.jsonl": Case(
        "sft", lambda: [{"instruction": question(i), "input": "", "chosen": answer(i),
                         "rejected": "不想回答你"} for i in range(40)],
        lambda path: [alpaca(row, "chosen") for row in rows(path)], refused="rejected",
        said="chosen", check=check_rejected_is_nowhere),
    "s_content_parts.jsonl": Case("sft", lambda: [parts_of(i) for i in range(40)], chats,
                                  check=check_parts_are_counted),
    "s_dolly.jsonl": Case(
        "sft", lambda: [{"instruction": question(i), "response": answer(i), "category": "qa",
                         "context": sentence(random_of(i)) if i % 2 else ""} for i in range(40)],
        refused="context.*response|response.*context", check=check_dolly),
    "s_blank_turn.jsonl": Case(
        "sft", lambda: [{"conversations": [*qa(i), turn("user", question(i + 300)),
                                           turn("assistant", "")]} for i in range(40)],
        refused="空|没有文字", check=check_no_blank_answer),
    "s_line_arrays_nanochat.jsonl": Case(
        "sft", lambda: [qa(i) for i in range(40)], lambda path: list(map(pairs, rows(path)))),
    "s_array_of_arrays.json": Case(
        "sft", lambda: dump([qa(i) for i in range(40)]),
        lambda path: list(map(pairs, json.loads(path.read_text(encoding="utf-8"))))),
    "s_conv_as_string.jsonl": Case(
        "sft", lambda: [{"conversations": dump(qa(i))} for i in range(40)],
        conversation_strings, refused="conversations.*(字符串|一段文字)"),
    "s_long_context.jsonl": Case(
        "sft", lambda: [{"instruction": "".join(documents_like(1, 20, i)) + question(i),
                         "input": "", "output": answer(i)} for i in range(40)], alpacas),
    "s.csv": Case(
        "sft", lambda: csv_of(["question", "answer"], [[question(i), answer(i)]
                                                       for i in range(40)]),
        lambda path: [[("user", r["question"]), ("assistant", r["answer"])]
                      for r in csv_rows(path)], refused="(?i)csv"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_kind_is_read_or_named(tmp_path, name):
    """读得对，或者一句话说出是什么；每一行都有着落。"""
    judge(CASES[name], write(tmp_path / name, CASES[name].make()))


@pytest.mark.parametrize("name", CASES)
def test_every_kind_in_real_files(name):
    """同样的检查，在环境变量 MINI_LLM_CASES 指着的目录里的文件上再做一遍。"""
    if "MINI_LLM_CASES" not in os.environ:
        pytest.skip("没有设环境变量 MINI_LLM_CASES（装着这些文件的目录）")
    path = Path(os.environ["MINI_LLM_CASES"]) / name
    if not path.exists():
        pytest.skip(f"{path.parent} 里没有 {name}")
    judge(CASES[name], path)


# ---------- 2. 同一种的别的样子：预训练 ----------

TEXTS = documents_like(40, 3, seed=11)


def same_documents(path: Path, texts: list[str] = TEXTS) -> Outcome:
    """读出来的恰好是这些文档。"""
    outcome = prepare(path)
    check_accounts(outcome.card)
    compare(texts, outcome)
    return outcome


LAYOUTS = {
    "array_lines.jsonl": "".join(dump(TEXTS[i : i + 4]) + "\n" for i in range(0, 40, 4)),
    "object_array_lines.jsonl": "".join(
        dump([{"text": t} for t in TEXTS[i : i + 4]]) + "\n" for i in range(0, 40, 4)),
    "indented_array.json": dump([{"text": t} for t in TEXTS], indent=4),
    "indented_strings.json": dump(TEXTS, indent=2),
    "indented_objects.jsonl": "\n".join(dump({"text": t}, indent=4) for t in TEXTS) + "\n",
    "indented_objects_commas.json": "[\n" + ",\n".join(dump({"text": t}, indent=4)
                                                       for t in TEXTS) + "\n]\n",
    "no_newline_at_all.jsonl": "".join(dump({"text": t}) for t in TEXTS),
    "spaces_between.jsonl": "  ".join(dump({"text": t}) for t in TEXTS),
    "cat_strings.json": "".join(dump(TEXTS[i : i + 10]) for i in range(0, 40, 10)),
    "cat_with_newlines.json": "\n".join(dump(TEXTS[i : i + 10]) for i in range(0, 40, 10)),
    "cat_indented.json": "\n".join(dump(TEXTS[i : i + 10], indent=1) for i in range(0, 40, 10)),
    "wrapped_one_line.json": dump({"data": [{"text": t} for t in TEXTS]}),
    "wrapped_strings.json": dump({"data": TEXTS}),
    "wrapped_with_more.json": dump({"version": "1.0", "data": [{"text": t} for t in TEXTS]}),
    "wrapped_lines.jsonl": "".join(dump({"data": [{"text": t} for t in TEXTS[i : i + 10]]}) + "\n"
                                   for i in range(0, 40, 10)),
    "wrapped_after.json": dump({"data": [{"text": t} for t in TEXTS], "total": 40}, indent=2),
    "crlf.jsonl": "\r\n".join(dump({"text": t}) for t in TEXTS) + "\r\n",
    "bom.jsonl": "\ufeff" + jsonl(TEXTS),
    "bom.csv": "\ufeff" + csv_of(["text"], [[t] for t in TEXTS]),
    "crlf.csv": csv_of(["text", "id"], [[t, i] for i, t in enumerate(TEXTS)]).replace("\n", "\r\n"),
    "upper.CSV": csv_of(["id", "content"], [[i, t] for i, t in enumerate(TEXTS)]),
    "quoted.csv": "id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(TEXTS)),
    "tabs.tsv": "id\ttext\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(TEXTS)),
    "semicolons.csv": "id;text\n" + "".join(f"{i};{t}\n" for i, t in enumerate(TEXTS)),
    "endoftext.txt": "<|endoftext|>".join(TEXTS),
    "endoftext_lines.txt": "".join(f"{t}\n<|endoftext|>\n" for t in TEXTS),
    "endoftext_first.txt": "".join(f"<|endoftext|>{t}" for t in TEXTS),
    "end_of_text.txt": "".join(f"{t}<|end_of_text|>\n" for t in TEXTS),
    "eos.txt": "".join(f"{t}</s>\n" for t in TEXTS),
    "doc_tags.txt": "".join(f'<doc id="1">\n{t}\n</doc>\n' for t in TEXTS),
    "windows.txt": "\r\n\r\n".join(TEXTS) + "\r\n",
    "mixed.jsonl": jsonl(t if i % 2 else {"text": t} for i, t in enumerate(TEXTS)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    """同样的四十篇，各种排法：读出来都是这四十篇，一篇不多，一篇不少。"""
    same_documents(write(tmp_path / name, LAYOUTS[name]))


def test_csv_with_lines_inside_quotes(tmp_path):
    """引号里的换行、逗号、成对的引号，都是正文。"""
    texts = [f'{t}\n他说："走，{t}"' for t in TEXTS]
    table = csv_of(["title", "text"], [["", t] for t in texts])
    same_documents(write(tmp_path / "a.csv", table), texts)


def test_csv_without_a_text_column_names_the_columns(tmp_path):
    """没有一列是正文：说出有哪些列，而不是把逗号也学进去。"""
    table = csv_of(["number", "weather"], [[i, "晴"] for i in range(30)])
    path = write(tmp_path / "a.csv", table)
    outcome = prepare(path)
    assert outcome.file is None
    check_sentence(outcome.error, path)
    assert "weather" in outcome.error


def test_a_text_with_commas_is_not_a_table(tmp_path):
    """一篇篇散文里有逗号，不是 csv。"""
    texts = [f"{i}, 他来了, 又走了。{t}" for i, t in enumerate(TEXTS)]
    same_documents(write(tmp_path / "a.txt", "\n\n".join(texts)), texts)


def test_a_blank_text_does_not_hide_the_content(tmp_path):
    """text 空着、正文在 content 里：读 content，或者说出它没有用上。"""
    outcome = prepare(write(tmp_path / "a.jsonl", [{"text": "", "content": t} for t in TEXTS]))
    if outcome.file is None:
        assert "content" in outcome.error, outcome.error
    else:
        compare(TEXTS, outcome)


def test_a_column_of_texts_is_not_one_document(tmp_path):
    """整份是 {"text": [一篇, 一篇, …]}（列而不是行）：各是一篇，或者说是接起来的。"""
    outcome = prepare(write(tmp_path / "a.json", dump({"text": TEXTS})))
    if sorted(documents(outcome.file)) != sorted(map(seen, TEXTS)):
        assert outcome.card["changed"], outcome.out


def test_dialogue_in_ascii_quotes_is_a_text(tmp_path):
    """小说里一行是 "走吧。"：不是 JSON。"""
    lines = [line for t in TEXTS for line in ('"走吧。"', t)]
    outcome = prepare(write(tmp_path / "a.txt", "\n".join(lines)))
    check_accounts(outcome.card)
    found = squeezed("".join(documents(outcome.file)))
    assert len(found) == len(squeezed("".join(lines)))


@pytest.mark.parametrize("value", [["甲。", "乙。"], [{"type": "text", "text": "甲。"}]])
def test_lists_under_text_are_joined_or_named(tmp_path, value):
    """正文是列表：接起来，或者说出是列表；不说「没有 text（有的是：text）」。"""
    path = write(tmp_path / "a.jsonl", [{"text": [*value, t]} for t in TEXTS])
    outcome = prepare(path)
    if outcome.file is None:
        assert re.search("列表|数组|list", outcome.error), outcome.error
    else:
        assert all("甲。" in text for text in documents(outcome.file))


@pytest.mark.parametrize("field, value", [
    ("desc", "一句提要，别处没有"), ("summary", "一句提要，别处没有"),
    ("sections", [{"heading": "缘起", "text": "一句提要，别处没有"}]),
    ("sections", ["一句提要，别处没有"]), ("paragraphs", ["一句提要，别处没有"]),
])  # fmt: skip
def test_text_beside_the_text_is_used_or_counted(tmp_path, field, value):
    """正文之外还有文字：用上，或者数出来。"""
    rows_ = [{"title": f"题{i}", "content": t, field: value} for i, t in enumerate(TEXTS)]
    outcome = prepare(write(tmp_path / "a.jsonl", rows_))
    check_accounts(outcome.card)
    used = sum("一句提要，别处没有" in text for text in documents(outcome.file))
    assert used == len(TEXTS) or outcome.card["unused_fields"].get(field) == len(TEXTS)
    if not used:
        assert field in outcome.out


def test_unused_fields_are_named_with_their_counts(tmp_path):
    """说出每个没有用上的字段各有多少条。"""
    rows_ = [{"text": t, "source": "甲", **({"score": 3} if i % 4 == 0 else {})}
             for i, t in enumerate(TEXTS)]  # fmt: skip
    outcome = prepare(write(tmp_path / "a.jsonl", rows_))
    assert outcome.card["unused_fields"] == {"source": 40, "score": 10}
    for words in ("40", "source", "10", "score"):
        assert words in outcome.out
    outcome = prepare(write(tmp_path / "b.jsonl", TEXTS))
    assert outcome.card["unused_fields"] == {}


@pytest.mark.parametrize("start", ["{{Infobox", "{注：此处有缺文}", "{% raw %}", "{\\bf 粗体}",
                                   "[编者按]", "[1] 注释", '{"你好"，他说。', '["走吧"，他说。',
                                   '"走吧。"', "[[文件:图.png]]", "{", "{}", "123",
                                   "null"])  # fmt: skip
def test_a_text_may_begin_like_json(tmp_path, start):
    """纯文本的第一段像 JSON 的开头：还是纯文本，一段不少。"""
    texts = [f"{start}{TEXTS[0]}" if start[0] == "[" else f"{start}", *TEXTS]
    same_documents(write(tmp_path / "a.txt", "\n\n".join(texts)), texts)


def test_end_marks_inside_json_rows(tmp_path):
    """一行 JSON 里用 <|endoftext|> 隔开的，也是几篇；记号不学。"""
    rows_ = [{"text": "<|endoftext|>".join(TEXTS[i : i + 4])} for i in range(0, 40, 4)]
    same_documents(write(tmp_path / "a.jsonl", rows_))


# ---------- 3. 几个文件 ----------


@pytest.fixture
def parts(tmp_path) -> Path:
    """一个目录，三个文件，各有各的写法。"""
    folder = tmp_path / "parts"
    write(folder / "a.jsonl", TEXTS[:15])
    write(folder / "b.json", dump([{"text": t} for t in TEXTS[15:30]]))
    write(folder / "c.txt", "\n\n".join(TEXTS[30:]))
    return folder


@pytest.mark.parametrize("source", ["{0}", "{0}/", "{0}/*", "{0}/[abc].*",
                                    "{0}/a.jsonl,{0}/b.json,{0}/c.txt",
                                    "{0}/a.jsonl, {0}/b.json, {0}/c.txt",
                                    "{0}/c.txt,{0}/*.json*"])  # fmt: skip
def test_several_files_are_one_corpus(parts, source):
    """目录、通配符、逗号隔开的几个：合成一份，每个文件读出多少都说了。"""
    outcome = prepare(source.format(parts))
    check_accounts(outcome.card)
    assert outcome.card["rows"] == len(TEXTS)
    compare(TEXTS, outcome)
    for name, count in (("a.jsonl", "15"), ("b.json", "15"), ("c.txt", "10")):
        assert any(name in line and count in line for line in outcome.out.splitlines()), outcome.out


def test_files_of_a_directory_come_in_the_order_of_their_names(tmp_path):
    """次序是定的：名字的次序，不是磁盘上的次序。"""
    for i in (2, 0, 1):
        write(tmp_path / "d" / f"{i}.jsonl", TEXTS[i * 10 : i * 10 + 10])
    train = documents(prepare(tmp_path / "d").file, "train")
    assert train == [text for text in TEXTS if text in set(train)]


def test_a_directory_of_conversations(tmp_path):
    write(tmp_path / "d" / "a.jsonl", [{"messages": qa(i)} for i in range(20)])
    write(tmp_path / "d" / "b.json", dump([qa(i) for i in range(20, 40)]))
    outcome = prepare(tmp_path / "d", "sft")
    compare([pairs(qa(i)) for i in range(40)], outcome)


@pytest.mark.parametrize("source", ["{0}/nothing.jsonl", "{0}/a.jsonl,{0}/nothing.jsonl",
                                    "{0}/nothing*.jsonl", "{0}/empty"])  # fmt: skip
def test_missing_ones_are_named(parts, source):
    """少一个文件、一个也不匹配、目录是空的：说出是哪个。"""
    (parts / "empty").mkdir()
    outcome = prepare(source.format(parts))
    assert outcome.file is None
    assert "nothing" in outcome.error or "empty" in outcome.error
    check_sentence(outcome.error, re.search(r"nothing[^,]*|empty", source)[0])


@pytest.mark.parametrize("name, content, word", [
    ("x.jsonl", lfs_pointer(), "LFS"), ("x.pdf", b"%PDF-1.7\n\x00\xff", "PDF"),
    ("x.jsonl", "[{", None), ("x.txt", "守株待兔".encode("gbk") * 9, "UTF-8"),
])  # fmt: skip
def test_one_bad_file_among_several_is_named(parts, name, content, word):
    """几个文件里有一个不能用：说出是哪一个、是什么，不悄悄略过。"""
    write(parts / name, content)
    outcome = prepare(parts)
    text = outcome.error or outcome.out
    assert name in text
    assert word is None or word.lower() in text.lower()


@pytest.mark.parametrize("name", [".DS_Store", ".gitattributes", "._a.jsonl"])
def test_hidden_files_are_not_data(parts, name):
    """系统留下的隐藏文件不是数据。"""
    write(parts / name, b"\x00\x05\x16\x07 Mac OS X")
    compare(TEXTS, prepare(parts))


def test_the_cache_inside_the_folder_is_not_data(parts):
    """--data data 时，词元文件就在 data/cache 里：第二次不能把它们也当成语料。"""
    first = prepare(parts, data_dir=parts)
    again = prepare(parts, data_dir=parts)
    other = prepare(parts, data_dir=parts, val_fraction=0.2)
    assert "沿用" in again.out
    for outcome in (first, again, other):
        compare(TEXTS, outcome)


def test_a_file_added_to_the_folder_is_read(parts):
    """目录里多了、少了、换了一个文件，就重做。"""
    compare(TEXTS, prepare(parts, data_dir=parts.parent))
    write(parts / "d.jsonl", more := documents_like(5, 3, seed=77))
    compare(TEXTS + more, prepare(parts, data_dir=parts.parent))
    (parts / "b.json").unlink()
    compare(TEXTS[:15] + TEXTS[30:] + more, prepare(parts, data_dir=parts.parent))


def test_a_file_whose_name_has_a_comma_or_bracket(tmp_path):
    """名字里有逗号、方括号的文件，写它的全名就是它。"""
    for name in ("甲,乙.jsonl", "a[1].jsonl", "what?.jsonl"):
        compare(TEXTS, prepare(write(tmp_path / name, TEXTS)))


def test_an_archive_of_several_files(tmp_path):
    """zip 与 tar 里的几个文件，与目录里的一样；目录、隐藏文件、链接不是数据。"""
    members = {"d/a.jsonl": jsonl(TEXTS[:20]), "d/b.txt": "\n\n".join(TEXTS[20:]),
               "__MACOSX/d/._a.jsonl": "\x00\x05", "d/.DS_Store": "\x00\x01Bud1"}  # fmt: skip
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("d") if hasattr(archive, "mkdir") else archive.writestr("d/", "")
        for name, content in members.items():
            archive.writestr(name, content)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("d/link.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    for name in ("a.zip", "a.tar.gz"):
        compare(TEXTS, prepare(tmp_path / name))


# ---------- 4. 同一种的别的样子：微调 ----------


def same_conversations(tmp_path, made: list, expected: list, name: str = "a.jsonl") -> Outcome:
    outcome = prepare(write(tmp_path / name, made), "sft")
    check_accounts(outcome.card)
    compare(expected, outcome)
    return outcome


PLAIN = [pairs(qa(i)) for i in range(30)]
SHAPES = {
    "messages": lambda i: {"messages": qa(i)},
    "sharegpt": lambda i: {"conversations": [{"from": "human", "value": question(i)},
                                             {"from": "gpt", "value": answer(i)}]},
    "array": lambda i: qa(i),
    "sharegpt_array": lambda i: [{"from": "human", "value": question(i)},
                                 {"from": "gpt", "value": answer(i)}],
    "string": lambda i: {"conversations": dump(qa(i))},
    "messages_string": lambda i: {"messages": dump(qa(i))},
    "columns": lambda i: {"conversations": {"role": ["user", "assistant"],
                                            "content": [question(i), answer(i)]}},
    "messages_columns": lambda i: {"messages": {"role": ["user", "assistant"],
                                                "content": [question(i), answer(i)]}},
    "from_columns": lambda i: {"conversations": {"from": ["human", "gpt"],
                                                 "value": [question(i), answer(i)]}},
    "alpaca_null": lambda i: {"instruction": question(i), "input": None, "output": answer(i),
                              "history": [], "system": ""},
    "alpaca_null_history": lambda i: {"instruction": question(i), "output": answer(i),
                                      "history": None, "system": None, "tools": None},
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_a_conversation(tmp_path, name):
    """同样的三十段，各种写法，意思是确定的：读出来都一样。"""
    same_conversations(tmp_path, [SHAPES[name](i) for i in range(30)], PLAIN)


def test_the_same_questions_answered_differently(tmp_path):
    """二十段对话问的都一样、答的不同：整段是键，留得出检验的。"""
    made = [[turn("user", "你是谁？"), turn("assistant", answer(i)), turn("user", "你会什么？"),
             turn("assistant", answer(i + 50))] for i in range(20)]  # fmt: skip
    same_conversations(tmp_path, [{"messages": row} for row in made], list(map(pairs, made)))


def test_history_becomes_earlier_turns_in_order(tmp_path):
    """history 的几问几答在前，次序不变；有的有、有的没有也行。"""
    made, expected = [], []
    for i in range(30):
        earlier = [[question(100 * k + i), answer(100 * k + i)] for k in range(1, i % 4 + 1)]
        row = {"instruction": question(i), "input": "", "output": answer(i), "history": earlier}
        made.append(row), expected.append(alpaca(row))
    same_conversations(tmp_path, made, expected)


@pytest.mark.parametrize("history", ["一段文字", [["只有问"]], {"a": 1}, [["问", 3, "答"]], 7])
def test_a_history_that_is_none_is_named(tmp_path, history):
    """history 不成一问一答：那一条不用，说出是 history；不当它没有。"""
    made = [{"instruction": question(i), "output": answer(i)} for i in range(300)]
    made[17]["history"] = history
    outcome = prepare(write(tmp_path / "a.jsonl", made), "sft")
    check_accounts(outcome.card)
    if outcome.card["unused_fields"] != {"history": 1}:
        assert sum(outcome.card["refused"].values()) == 1
    assert "history" in outcome.out


def test_system_everywhere_it_can_stand(tmp_path):
    """系统的话写在顶上、写成一轮、两处都写：哪一句也不丢。"""
    top, inside = "你守着渡口。", "说短句。"
    made = [{"system": top, "messages": qa(0)}, {"system": "", "messages": qa(1)},
            {"messages": [turn("system", inside), *qa(2)]},
            {"system": top, "messages": [turn("system", inside), *qa(3)]}]  # fmt: skip
    made += [{"messages": qa(i)} for i in range(4, 30)]
    found = {turns[-1][1]: turns for turns in
             conversations(prepare(write(tmp_path / "a.jsonl", made), "sft").file)}  # fmt: skip
    systems = [[t for r, t in found[answer(i)] if r == "system"] for i in range(4)]
    assert systems[:3] == [[top], [], [inside]]
    assert top in "\n".join(systems[3]) and inside in "\n".join(systems[3])
    assert found[answer(0)][0] == ("system", top)


def test_tools_at_the_top_join_the_system_turn(tmp_path):
    """顶上的 tools 与 system 都在最前面，JSON 或写成文字的 JSON 都行；没有工具的不变。"""
    tools = [{"type": "function", "function": {"name": "ask_ferry", "parameters": {}}}]
    made = [{"messages": qa(i), "system": "你守着渡口。", "tools": dump(tools) if i % 2 else tools}
            for i in range(30)]  # fmt: skip
    made.append({"messages": qa(30), "tools": []})
    for turns in conversations(prepare(write(tmp_path / "a.jsonl", made), "sft").file):
        first = "".join(text for role, text in turns if role == "system")
        if turns[-1][1] == answer(30):
            assert first == ""
        else:
            assert "你守着渡口。" in first
            assert all(squeezed(dump(tool)) in squeezed(first) for tool in tools)
        assert [role for role, _ in turns].count("system") <= 1


CALL = [{"name": "ask_ferry", "arguments": {"hour": 7}}]


def test_tool_calls_and_answers_are_kept_as_text(tmp_path):
    """调用、工具的回答、最后的回答，都在，次序不变。"""
    made = []
    for i in range(30):
        calls = [{"type": "function", "function": CALL[0]}] if i % 2 else CALL
        asking = [turn("user", question(i)), turn("assistant", "", tool_calls=calls)]
        made.append({"messages": [*asking, turn("tool", f"第{i}班"), turn("assistant", answer(i))]})
    outcome = prepare(write(tmp_path / "a.jsonl", made), "sft")
    for turns in conversations(outcome.file):
        assert [role for role, _ in turns] == ["user", "assistant", "tool", "assistant"]
        assert "ask_ferry" in turns[1][1] and "hour" in turns[1][1]
        assert re.fullmatch(r"第\d+班", turns[2][1])
    assert outcome.card["unused_fields"] == {}


BAD = "这一句教不得"
BAD_LESSONS = {
    "chosen_rejected": {"instruction": "问法", "chosen": "好答", "rejected": BAD},
    "prompt_chosen_rejected": {"prompt": "问法", "chosen": "好答", "rejected": BAD},
    "question_chosen_rejected": {"question": "问法", "chosen": "好答", "rejected": BAD},
    "message_lists": {"chosen": [turn("user", "问法"), turn("assistant", "好答")],
                      "rejected": [turn("user", "问法"), turn("assistant", BAD)]},
    "prompt_and_message_lists": {"prompt": "问法", "chosen": [turn("assistant", "好答")],
                                 "rejected": [turn("assistant", BAD)]},
    "conversation_and_messages": {
        "conversations": [{"from": "human", "value": "问法"}],
        "chosen": {"from": "gpt", "value": "好答"}, "rejected": {"from": "gpt", "value": BAD}},
    "pair_in_output": {"instruction": "问法", "input": "", "output": ["好答", BAD]},
    "output_and_rejected": {"instruction": "问法", "output": "好答", "rejected": BAD},
    "label_false": {"instruction": "问法", "output": BAD, "label": False},
    "label_false_prompt": {"prompt": "问法", "completion": BAD, "label": False},
    "label_false_messages": {"messages": [turn("user", "问法"), turn("assistant", BAD)],
                             "label": False},
    "kto_tag": {"messages": [turn("user", "问法"), turn("assistant", BAD)], "kto_tag": False},
    "row_weight": {"instruction": "问法", "output": BAD, "weight": 0},
    "row_weight_float": {"messages": [turn("user", "问法"), turn("assistant", BAD)],
                         "weight": 0.0},
    "row_loss": {"messages": [turn("user", "问法"), turn("assistant", BAD)], "loss": False},
    "turn_weight": {"messages": [turn("user", "问法"), turn("assistant", BAD, weight=0),
                                 turn("user", "再问"), turn("assistant", "好答", weight=1)]},
    "turn_loss": {"messages": [turn("user", "问法"), turn("assistant", BAD, loss=False),
                               turn("user", "再问"), turn("assistant", "好答", loss=True)]},
    "turn_train": {"messages": [turn("user", "问法"), turn("assistant", BAD, train=False),
                                turn("user", "再问"), turn("assistant", "好答")]},
    "turn_loss_mask": {"messages": [turn("user", "问法"), turn("assistant", BAD, loss_mask=0),
                                    turn("user", "再问"), turn("assistant", "好答")]},
    "row_weight_text": {"instruction": "问法", "output": BAD, "weight": "0"},
    "row_label_text": {"instruction": "问法", "output": BAD, "label": "rejected"},
    "turn_loss_weight": {"messages": [turn("user", "问法"), turn("assistant", BAD, loss_weight=0),
                                      turn("user", "再问"), turn("assistant", "好答")]},
    "turn_train_on_turn": {"messages": [turn("user", "问法"),
                                        turn("assistant", BAD, train_on_turn=False),
                                        turn("user", "再问"), turn("assistant", "好答")]},
    "turn_last": {"messages": [turn("user", "问法"), turn("assistant", "好答"),
                               turn("user", "再问"), turn("assistant", BAD, weight=0)]},
    "turn_value_loss": {"conversations": [{"from": "human", "value": "问法"},
                                          {"from": "gpt", "value": BAD, "loss": False},
                                          {"from": "human", "value": "再问"},
                                          {"from": "gpt", "value": "好答"}]},
}  # fmt: skip


@pytest.mark.parametrize("whole", [False, True], ids=["one_row", "every_row"])
@pytest.mark.parametrize("name", BAD_LESSONS)
def test_what_was_rejected_is_never_taught(tmp_path, name, whole):
    """标着「不要学」的回答：换成好的、不算损失、或者拒绝那一条，总之不学，而且说了。"""
    row = BAD_LESSONS[name]
    good = [{"messages": qa(i)} for i in range(0 if whole else 300)]
    made = [
        json.loads(dump(row).replace("问法", question(400 + i))) for i in range(30 if whole else 1)
    ]
    path = write(tmp_path / "a.jsonl", good + made)
    outcome = prepare(path, "sft")
    if outcome.file is None:
        check_sentence(outcome.error, path)
        assert re.search(
            "chosen|rejected|label|kto_tag|weight|loss|train|output|列表", outcome.error
        )
        return
    check_accounts(outcome.card)
    learned = taught(outcome.file)
    assert BAD not in learned
    assert outcome.card["used"] <= len(good)  # 没有照原样用
    assert all(answer(i) in learned for i in range(len(good)))
    if "好答" in dump(row) and not outcome.card["refused"]:
        assert learned.count("好答") == len(made)


@pytest.mark.parametrize("row", [
    {"instruction": "问法", "output": "好答", "label": True},
    {"instruction": "问法", "output": "好答", "weight": 1},
    {"messages": [turn("user", "问法"), turn("assistant", "好答", weight=1, loss=True)]},
])  # fmt: skip
def test_what_was_accepted_is_taught(tmp_path, row):
    """标着「要学」的，照学。"""
    made = [json.loads(dump(row).replace("问法", question(i))) for i in range(30)]
    learned = taught(prepare(write(tmp_path / "a.jsonl", made), "sft").file)
    assert learned.count("好答") == 30


def test_numbers_as_answers(tmp_path):
    """「一加一？」「2」：数字就是那几个字，或者说出是哪一轮、哪个字段、什么类型。"""
    made = [{"instruction": f"{i}加一？", "output": i + 1} for i in range(30)]
    path = write(tmp_path / "a.jsonl", made)
    outcome = prepare(path, "sft")
    if outcome.file is None:
        assert "output" in outcome.error and re.search("int|数", outcome.error)
    else:
        compare([[("user", f"{i}加一？"), ("assistant", str(i + 1))] for i in range(30)], outcome)


ODD_ROWS = {
    "number_turn": {"messages": [turn("user", "问"), turn("assistant", 42)]},
    "object_turn": {"messages": [turn("user", "问"), turn("assistant", {"text": "答"})]},
    "null_turn": {"messages": [turn("user", "问"), turn("assistant", None)]},
    "missing_turn": {"messages": [turn("user", "问"), {"role": "assistant"}]},
    "bool_turn": {"messages": [turn("user", "问"), turn("assistant", True)]},
    "strings": {"conversations": ["问", "答"]},
    "string_not_json": {"conversations": "问答"},
    "columns_uneven": {"conversations": {"role": ["user", "assistant"], "content": ["问"]}},
    "columns_other": {"conversations": {"a": 1}},
    "empty": {"conversations": []},
    "images_only": {"messages": [turn("user", [{"type": "image_url", "image_url": "x"}]),
                                 turn("assistant", "答")]},
    "unknown_role": {"messages": [turn("user", "问"), turn("critic", "答")]},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_ROWS)
def test_odd_rows_are_read_or_named(tmp_path, name):
    """意思不确定的：说出哪一轮、哪个字段、什么类型；决不说「没有 X（有的是：X）」。"""
    path = write(tmp_path / "a.jsonl", [ODD_ROWS[name], *({"messages": qa(i)} for i in range(300))])
    outcome = prepare(path, "sft")
    check_accounts(outcome.card)
    assert outcome.card["rows"] == 301
    for text in [outcome.out, *outcome.card["refused"]]:
        assert not re.search(
            r"没有[^（\n]*(conversations|messages|text)[^（\n]*（有的是：\1）", text
        )
    if outcome.card["used"] == 301:  # 照原样读了：至少回答要在
        assert "assistant" in {role for turns in conversations(outcome.file) for role, _ in turns}
    elif outcome.card["refused"]:
        assert "第 1 行" in outcome.out, outcome.out


def test_every_row_an_object_that_says_nothing_new(tmp_path):
    """整份都是同一种读不了的：拒绝时说出字段与类型。"""
    path = write(tmp_path / "a.jsonl", [{"conversations": "问答"}] * 30)
    outcome = prepare(path, "sft")
    assert outcome.file is None
    assert "（有的是：conversations）" not in outcome.error
    assert re.search("conversations.*(字符串|文字)|str", outcome.error)


@pytest.mark.parametrize("blank", ["", " ", "\n", "\u3000"])
@pytest.mark.parametrize("place", ["last", "first"])
def test_blank_answers_are_not_taught(tmp_path, blank, place):
    """空的回答不教模型闭嘴：那一条不用，或者去掉那几轮，都要数出来。"""
    made = [{"messages": qa(i)} for i in range(300)]
    empty = [turn("user", question(800)), turn("assistant", blank)]
    made.append({"messages": [*empty, *qa(801)] if place == "first" else [*qa(801), *empty]})
    outcome = prepare(write(tmp_path / "a.jsonl", made), "sft")
    check_accounts(outcome.card)
    assert outcome.card["used"] == 300
    assert sum(outcome.card["changed"].values()) + sum(outcome.card["refused"].values()) == 1
    for turns in conversations(outcome.file):
        assert all(text.strip() for role, text in turns if role == "assistant")


def test_a_blank_turn_that_calls_a_tool_is_not_blank(tmp_path):
    """没有文字、却调用了工具的一轮，不是空的。"""
    made = [{"messages": [turn("user", question(i)), turn("assistant", "", tool_calls=CALL),
                          turn("tool", "七点"), turn("assistant", answer(i))]}
            for i in range(30)]  # fmt: skip
    outcome = prepare(write(tmp_path / "a.jsonl", made), "sft")
    assert outcome.card["refused"] == {}
    assert len(conversations(outcome.file)[0]) == 4


THOUGHT = "先想渡口在北边"


def reasoned(n: int = 30) -> list[dict]:
    return [{"messages": [turn("user", question(i)),
                          turn("assistant", answer(i), reasoning_content=f"{THOUGHT}{i}。")]}
            for i in range(n)]  # fmt: skip


def test_reasoning_is_left_out_and_said(tmp_path):
    outcome = same_conversations(tmp_path, reasoned(), PLAIN)
    assert "30" in outcome.out and "keep_reasoning" in outcome.out


def test_reasoning_is_kept_when_asked_for(tmp_path):
    """--keep_reasoning：思考在两个记号之间，然后是回答；算学过的。"""
    made = reasoned() + [{"messages": qa(i)} for i in range(30, 40)]
    outcome = prepare(write(tmp_path / "a.jsonl", made), "sft", keep_reasoning=True)
    check_accounts(outcome.card)
    learned = taught(outcome.file)
    for i in range(30):
        assert re.search(f"{THOUGHT}{i}。.+{re.escape(answer(i))}", learned, re.S)
    assert learned.count(THOUGHT) == 30
    for turns in conversations(outcome.file):  # 没有思考的，不多出空的记号
        if THOUGHT not in turns[-1][1]:
            assert turns[-1][1] in {answer(i) for i in range(30, 40)}


def test_the_template_writes_reasoning_the_same_way(tmp_path):
    """导出的对话模板写思考，与训练时写的编号相同。"""
    pytest.importorskip("transformers", reason="没有 transformers")
    made = reasoned(10) + [{"messages": qa(i)} for i in range(10, 15)]
    file = prepare(write(tmp_path / "a.jsonl", made), "sft", keep_reasoning=True).file
    template = TOKENIZER.to_transformers()
    wanted = [template.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
              for row in made]  # fmt: skip
    found = [piece.tolist() for side in SIDES for piece in pieces(file, side)]
    assert sorted(found) == sorted(wanted)


def test_the_template_writes_tools_the_same_way(tmp_path):
    """读出来的工具、调用、工具的回答，作为文字再交给导出的模板，编号相同。"""
    pytest.importorskip("transformers", reason="没有 transformers")
    made = [{"messages": [turn("system", "", tools=dump(CALL)), turn("user", question(i)),
                          turn("assistant", "", tool_calls=dump(CALL)), turn("tool", f"第{i}班"),
                          turn("assistant", answer(i))]} for i in range(10)]  # fmt: skip
    file = prepare(write(tmp_path / "a.jsonl", made), "sft").file
    template = TOKENIZER.to_transformers()
    found = [piece.tolist() for side in SIDES for piece in pieces(file, side)]
    again = [template.apply_chat_template([turn(role, text) for role, text in turns],
                                          tokenize=True, return_dict=False)
             for turns in conversations(file)]  # fmt: skip
    assert found == again


def test_keeping_reasoning_or_not_are_two_token_files(tmp_path):
    """换了 --keep_reasoning，不能沿用上一次的。"""
    path = write(tmp_path / "a.jsonl", reasoned())
    for keep in (False, True, False):
        outcome = prepare(path, "sft", data_dir=tmp_path, keep_reasoning=keep)
        assert (THOUGHT in taught(outcome.file)) == keep


# ---------- 5. 丢的字 ----------


def mixed(n_lost: int, n: int = 100) -> list[str]:
    """每篇一百个字，其中 n_lost 个写不出来，一个个隔开。"""
    noise = random_of(13)
    texts = []
    for i in range(n):
        letters = [*f"其{i}。", *("".join(sentence(noise) for _ in range(8)))][:100]
        for at in noise.sample(range(5, 100), n_lost):
            letters[at] = "🦊"
        texts.append("".join(letters))
    return texts


@pytest.mark.parametrize("n_lost, warned", [(0, False), (3, True), (30, True)])
def test_lost_characters_are_reported(tmp_path, n_lost, warned):
    """丢了多少字，写在 [UNK] 的旁边；超过百分之一，另有一句提醒。"""
    outcome = prepare(write(tmp_path / "a.jsonl", mixed(n_lost)))
    assert (outcome.card["lost_characters"], outcome.card["characters"]) == (100 * n_lost, 10_000)
    assert f"{n_lost}" in outcome.out
    assert bool(re.search("写不出|词表里没有|丢", outcome.out)) >= warned


def test_more_than_half_lost_is_refused_with_the_share(tmp_path):
    path = write(tmp_path / "a.jsonl", mixed(60))
    outcome = prepare(path)
    assert outcome.file is None
    check_sentence(outcome.error, path)
    assert re.search(r"60(\.0+)? ?%", outcome.error), outcome.error


def test_one_run_of_unknown_characters_is_not_one_character(tmp_path):
    """一串二十个表情是一个 [UNK]，却是二十个字。"""
    texts = [f"{text}{'🦊' * 20}" for text in TEXTS]
    outcome = prepare(write(tmp_path / "a.jsonl", texts))
    assert outcome.card["lost_characters"] == 20 * len(texts)


def test_lost_answers_are_counted(tmp_path):
    """对话里也一样；回答里的，记在要猜的那一份里。"""
    made = [{"instruction": question(i), "output": answer(i) + "🦊" * 5} for i in range(40)]
    card = prepare(write(tmp_path / "a.jsonl", made), "sft").card
    assert card["train_lost"] + card["val_lost"] == 5 * 40
    assert card["lost_characters"] >= 5 * 40


# ---------- 6. 从头到尾 ----------


def test_a_question_in_another_encoding_is_not_answered(little):
    """管道里送来 GBK：一句话说是编码不对，不去回答剩下的几个字节。"""
    from forked import start
    from scripts import like_a_new_process, location

    class Raw(str):
        def encode(self, *_):
            return "渡口几点开船？\n".encode("gbk")

    argv = ["sft_chat.py", "--no-compile", "--max", "5"]
    with like_a_new_process(little, argv, Raw()) as said:
        try:
            start(location("sft_chat.py"))
        except SystemExit as leaving:
            assert leaving.code in (0, 2, None)
    out, err = (text.buffer.getvalue().decode() for text in said)
    assert re.search("UTF-8|编码", out + err)
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["p_small_8docs.txt", "p_small_20docs.jsonl"])
def test_the_smallest_corpora_train(tmp_path, name):
    """八篇、二十篇：README 的做法走得通，练得完，有检验的损失。"""
    from scripts import LITTLE, QUICK, run

    write(tmp_path / name, CASES[name].make())
    args = ["--data", name, "--out_dir", "out/mine", "--epochs", "4", *QUICK, *LITTLE]
    out, _ = run(tmp_path, "pre_train.py", *args)
    assert "检验损失" in out
    assert (tmp_path / "out/mine/pretrain.pt").exists()


def test_a_small_conversation_corpus_trains(little, tmp_path):
    from scripts import QUICK, run

    folder = tmp_path / "copy"
    shutil.copytree(little, folder, symlinks=True)
    write(folder / "mine.jsonl", CASES["s_small_20.jsonl"].make())
    (folder / "out").rename(folder / "old")
    checkpoint = next((folder / "old").rglob("pretrain.pt"))
    out, _ = run(folder, "sft_train.py", "--sft_data", "mine.jsonl", "--init_from",
                 str(checkpoint), "--out_dir", "out/mine", "--sft_epochs", "4", *QUICK)  # fmt: skip
    assert "检验损失" in out


def test_questions_longer_than_a_row_are_one_sentence(little, tmp_path):
    """提问比 seq_len 还长：限度与长度都说出来，不叫人去做接着又被拒绝的事。"""
    from scripts import QUICK, run

    folder = tmp_path / "copy"
    shutil.copytree(little, folder, symlinks=True)
    write(folder / "mine.jsonl", CASES["s_long_context.jsonl"].make())
    checkpoint = next((folder / "out").rglob("pretrain.pt"))
    _, err = run(folder, "sft_train.py", "--sft_data", "mine.jsonl", "--init_from",
                 str(checkpoint), "--out_dir", "out/mine", *QUICK, code=2)  # fmt: skip
    lengths = [len(TOKENIZER.encode(row["instruction"])) for row in rows(folder / "mine.jsonl")]
    named = [int(number) for number in re.findall(r"(?<![\d.])\d+(?![\d.%])", err)]
    assert 128 in named, err
    assert any(min(lengths) <= number <= max(lengths) + 60 for number in named), err
