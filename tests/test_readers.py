"""读数据：各种来源的文件都认得，坏数据一条不少地报告，再大的文件也只占一点内存。"""

import gzip
import io
import json
import random
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from config import UserError
from corpus import json_text
from corpus.conversations import read_conversations
from corpus.log import ReadLog
from corpus.shapes import read_documents, split_markers

TEXTS = ["第一篇：守株待兔。", "第二篇，\n分两行。", "第三篇"]


def dump(row) -> str:
    return json.dumps(row, ensure_ascii=False)


def jsonl(rows) -> str:
    return "".join(dump(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, reader: Callable = read_documents) -> tuple[list, ReadLog]:
    """读完并检查，像 dataset.prepare 那样；返回内容的列表与记录。"""
    log = ReadLog(str(path))
    contents = [record.content for record in reader(path, log)]
    log.check()
    return contents, log


def good_rows(n: int) -> list[dict]:
    return [{"text": f"第 {i} 篇文档，写得很好。"} for i in range(n)]


def test_a_wrong_file_is_refused_without_reading_it_all(tmp_path):
    """拿错了文件：开头一千条全是坏行就停下，不必读完几个 GB。"""
    path = write(tmp_path / "x.jsonl", jsonl([{"body": "文"}] * 5000))
    log = ReadLog(str(path))
    with pytest.raises(UserError, match="1000 / 1000 条坏行"):
        list(read_documents(path, log))


def test_utf16_is_named(tmp_path):
    path = write(tmp_path / "x.txt", "守株待兔".encode("utf-16"))
    with pytest.raises(UserError, match="iconv -f UTF-16 -t UTF-8"):
        read(path)


# ---------- 1. 文档：每一种格式 ----------

WIKI_ROW = {"id": "13", "url": "https://zh.wikipedia.org/wiki?curid=13", "title": "数学"}
DOCUMENTS = {
    "jsonl_strings": (jsonl(TEXTS), TEXTS),
    "jsonl_text": (jsonl({"text": t} for t in TEXTS), TEXTS),
    "jsonl_content": (jsonl({"content": t} for t in TEXTS), TEXTS),
    "jsonl_null_text": (jsonl({"text": None, "content": t} for t in TEXTS), TEXTS),
    "jsonl_title": (
        jsonl({"title": f"题{i}", "text": t} for i, t in enumerate(TEXTS)),
        [f"题{i}\n{t}" for i, t in enumerate(TEXTS)],
    ),
    "jsonl_title_content": (jsonl([{"title": "题", "content": "文"}]), ["题\n文"]),
    "jsonl_empty_title": (
        jsonl([{"title": "", "text": "文"}, {"title": None, "text": "章"}]),
        ["文", "章"],
    ),
    "jsonl_blank_lines": ("\n" + dump({"text": "文"}) + "\n\n\n" + dump("章"), ["文", "章"]),
    "jsonl_windows_line_ends": (jsonl({"text": t} for t in TEXTS).replace("\n", "\r\n"), TEXTS),
    "jsonl_escapes": ('{"text": "\\u5b88\\u682a\\ud83d\\ude00\\n"}\n', ["守株\U0001f600"]),
    "jsonl_other_fields": (jsonl([{"text": "文", "meta": {"n": 1e308}, "tags": []}]), ["文"]),
    "array_strings": (dump(TEXTS), TEXTS),
    "array_objects": (dump([{"text": t} for t in TEXTS]), TEXTS),
    "array_content_title": (dump([{"title": "题", "content": "文"}]), ["题\n文"]),
    "array_indented": (json.dumps([{"text": t} for t in TEXTS], indent=2), TEXTS),
    "array_mixed": (dump([{"text": "文"}, "章", {"content": "篇", "n": 0.5}]), ["文", "章", "篇"]),
    "wiki2019zh": (
        jsonl([WIKI_ROW | {"text": "数学\n\n数学是研究数量的学科。"}]),
        ["数学\n\n数学是研究数量的学科。"],  # 正文已经以标题开头，不写两遍
    ),
    "minimind_im": (
        jsonl([{"text": "<|im_start|>甲。<|im_end|> <|im_start|>乙<|im_end|>"}, {"text": "丙"}]),
        ["甲。", "乙", "丙"],
    ),
    "minimind_s": (jsonl([{"text": "<s>甲。</s> <s>乙\n丁</s>"}]), ["甲。", "乙\n丁"]),
    "minimind_array": (dump([{"text": "<s>甲</s><s>乙</s>"}]), ["甲", "乙"]),
}
TEXT_FILES = {
    "paragraphs": ("第一段，\n第二行。\n\n\n第二段\n", ["第一段，\n第二行。", "第二段"]),
    "no_newline_at_end": ("只有一行", ["只有一行"]),
    "starts_with_bracket": ("[1] 参考文献\n\n正文", ["[1] 参考文献", "正文"]),
    "starts_with_quote": ('"你好，"他说。\n\n正文', ['"你好，"他说。', "正文"]),
    "markers": ("<s>甲</s>\n<s>乙</s>\n", ["甲", "乙"]),
}


@pytest.mark.parametrize("wrap", ["plain", "gzip", "bom", "gzip_bom"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_formats(tmp_path, name, wrap):
    """下载来的文件，不论哪种写法、压没压缩、有没有 BOM，读出来的文档都一字不差。"""
    content, expected = DOCUMENTS[name]
    data = b"\xef\xbb\xbf" * wrap.endswith("bom") + content.encode()
    data = gzip.compress(data) if wrap.startswith("gzip") else data
    path = write(tmp_path / ("data.json" + ".gz" * wrap.startswith("gzip")), data)
    documents, log = read(path)
    assert documents == expected
    assert (log.refused, log.changed, log.notes) == ({}, {}, [])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt", ".json.gz", ".txt.gz", ""])
@pytest.mark.parametrize("name", ["jsonl_text", "jsonl_strings", "array_objects", "array_strings"])
def test_content_counts_not_the_name(tmp_path, name, suffix):
    """格式看内容：JSON 存成了 .txt，不该把引号和大括号当成文章来学。"""
    content, expected = DOCUMENTS[name]
    data = gzip.compress(content.encode()) if suffix.endswith(".gz") else content
    assert read(write(tmp_path / f"data{suffix}", data))[0] == expected


@pytest.mark.parametrize("wrap", ["plain", "gzip", "bom"])
@pytest.mark.parametrize("name", TEXT_FILES)
def test_text_formats(tmp_path, name, wrap):
    """纯文本空行分篇；即使以 [ 或引号开头，也还是纯文本。"""
    content, expected = TEXT_FILES[name]
    data = b"\xef\xbb\xbf" * (wrap == "bom") + content.encode()
    data = gzip.compress(data) if wrap == "gzip" else data
    assert read(write(tmp_path / "data.txt", data))[0] == expected


def test_long_text_without_blank_lines_is_cut_at_line_ends(tmp_path):
    """一部没有空行的长篇小说不该成为一篇：那样就分不出检验的文档。一个字也不能少。"""
    lines = [f"第 {i} 行，" + "字" * 50 for i in range(1000)]
    documents, _ = read(write(tmp_path / "novel.txt", "\n".join(lines)))
    assert len(documents) > 5
    assert "\n".join(documents).split("\n") == lines


@pytest.mark.parametrize("first", ["null", "123", "oops", '{"text": "没写完', "# 注释"])
def test_jsonl_with_a_bad_first_line_is_still_jsonl(tmp_path, first):
    """第一行坏了，不该把整个 .jsonl 当纯文本，让模型去学大括号。"""
    path = write(tmp_path / "data.jsonl", first + "\n" + jsonl(good_rows(200)))
    documents, log = read(path)
    assert documents == [row["text"] for row in good_rows(200)]
    assert log.bad == 1


@given(st.lists(st.text("甲乙丙。<s>|im_startend/", min_size=1), max_size=5))
def test_markers_split_only_where_the_format_uses_them(pieces):
    """开头没有标记的正文原样一篇；首尾标记配成对的，恰好分成那几篇。"""
    clean = [p.strip() for p in pieces if p.strip() and "<" not in p]
    marked = "".join(f"<|im_start|>{p}<|im_end|>" for p in clean)
    assert split_markers(marked) == clean
    assert split_markers("文章里提到 <|im_end|> 和 <s>") == ["文章里提到 <|im_end|> 和 <s>"]


def test_key_is_the_document(tmp_path):
    """键相同才会分到同一边：重复的文档，哪怕空白不同、写法不同，键都相同。"""
    rows = ["同一篇", {"text": " 同一篇\n"}, {"content": "<s>同一篇</s>"}, "另一篇"]
    path = write(tmp_path / "data.jsonl", jsonl(rows))
    keys = [record.key for record in read_documents(path, ReadLog(str(path)))]
    assert keys[0] == keys[1]
    assert keys[3] != keys[0]


# ---------- 2. 对话：每一种格式 ----------


def turn(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


HELLO = [("user", "你好"), ("assistant", "你好！")]
CALL = [{"name": "天气", "arguments": {"城市": "北京"}}]
CONVERSATIONS = {
    "one_turn": ({"conversations": [turn("user", "你好"), turn("assistant", "你好！")]}, HELLO),
    "many_turns": (
        {"conversations": [turn("user", "一"), turn("assistant", "二"),
                           turn("user", "三"), turn("assistant", "四")]},
        [("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四")],
    ),
    "system": (
        {"conversations": [turn("system", "简短。"), turn("user", "你好"),
                           turn("assistant", "你好！")]},
        [("system", "简短。"), *HELLO],
    ),
    "null_fields": (
        {"conversations": [
            turn("user", "你好", reasoning_content=None, tools=None, tool_calls=None),
            turn("assistant", "你好！", reasoning_content=None, tools=None, tool_calls=None)]},
        HELLO,
    ),
    "empty_fields": (
        {"conversations": [turn("user", "你好", tools="", tool_calls=[]),
                           turn("assistant", "你好！", reasoning_content="", tool_calls="")]},
        HELLO,
    ),
    "reasoning": (
        {"conversations": [turn("user", "你好"),
                           turn("assistant", "你好！", reasoning_content="对方在打招呼")]},
        HELLO,  # 思考过程不学，但要报告
    ),
    "tools": (
        {"conversations": [
            turn("system", "", tools=dump(CALL)), turn("user", "北京天气"),
            turn("assistant", None, tool_calls=CALL), turn("tool", "晴"),
            turn("assistant", "晴。")]},
        [("system", dump(CALL)), ("user", "北京天气"), ("assistant", dump(CALL)),
         ("tool", "晴"), ("assistant", "晴。")],
    ),
    "tool_calls_text": (
        {"conversations": [turn("user", "问"), turn("assistant", "查一下", tool_calls="[天气]")]},
        [("user", "问"), ("assistant", "查一下\n[天气]")],
    ),
    "instruction": ({"instruction": "你好", "input": "", "output": "你好！"}, HELLO),
    "instruction_null_input": ({"instruction": "你好", "input": None, "output": "你好！"}, HELLO),
    "instruction_no_input": ({"instruction": "你好", "output": "你好！"}, HELLO),
    "instruction_input": (
        {"instruction": "翻译", "input": "苹果", "output": "apple"},
        [("user", "翻译\n苹果"), ("assistant", "apple")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["jsonl", "array", "jsonl_gzip"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_formats(tmp_path, name, layout):
    """新旧各种写法的对话，角色与文字都要读对；读错一轮，学到的就是答非所问。"""
    row, expected = CONVERSATIONS[name]
    content = dump([row] * 3) if layout == "array" else jsonl([row] * 3)
    data = gzip.compress(content.encode()) if layout.endswith("gzip") else content
    conversations, log = read(write(tmp_path / "sft.jsonl", data), read_conversations)
    assert conversations == [expected] * 3
    assert log.bad == 0


def test_dropped_reasoning_is_reported(tmp_path):
    """没有照原样使用的内容也要说：不然用户以为思考过程也学了。"""
    row, _ = CONVERSATIONS["reasoning"]
    _, log = read(write(tmp_path / "sft.jsonl", jsonl([row] * 7)), read_conversations)
    assert any("7" in line and "reasoning_content" in line for line in log.report())


@pytest.mark.parametrize("row, reason", [
    ({"conversations": [turn("user", "你好")]}, "助手"),
    ({"conversations": []}, "conversations"),
    ({"conversations": "你好"}, "conversations"),
    ({"conversations": ["你好"]}, "对象"),
    ({"conversations": [turn("user", "问"), turn("assistant", None)]}, "助手"),
    ({"conversations": [turn("user", None), turn("assistant", "答")]}, "第 1 轮（user）"),
    ({"conversations": None}, "conversations 是 null"),
    ({"conversations": [turn("user", "问"), turn("assistant", "  ")]}, "助手"),
    ({"conversations": [turn("critic", "问"), turn("assistant", "答")]}, "critic"),
    ({"conversations": [{"content": "问"}, turn("assistant", "答")]}, "角色"),
    ({"conversations": [turn("user", True), turn("assistant", "答")]}, "content 是true"),
    ({"instruction": "问", "output": None}, "output 是 null"),
    ({"instruction": "问"}, "没有写着回答的 output"),
    ({"text": "这是预训练的数据"}, "conversations"),
    ("你好", "对象"),
    (None, "对象"),
])  # fmt: skip
def test_bad_conversations_are_counted_with_the_reason(tmp_path, row, reason):
    """一条坏对话不该让程序崩溃，也不该混进训练；报告里写着第几行、为什么。"""
    good, _ = CONVERSATIONS["one_turn"]
    path = write(tmp_path / "sft.jsonl", jsonl([good] * 150 + [row] + [good] * 150))
    conversations, log = read(path, read_conversations)
    assert conversations == [HELLO] * 300
    assert log.refused.total() == 1
    said = "\n".join(log.report())
    assert "第 151 行" in said
    assert reason in said


# ---------- 3. 坏数据 ----------


@pytest.mark.parametrize("content", [
    b"", b"\n \r\n", b"\xef\xbb\xbf", b"[]", b"[ ]\n", gzip.compress(b"", mtime=0), b'""\n""\n',
])  # fmt: skip
def test_empty_file_is_one_sentence(tmp_path, content):
    """下载失败留下的空文件：说出是哪个文件，现在该做什么。"""
    path = write(tmp_path / "data.json", content)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "请" in str(error.value)


def test_directory_and_missing_file_are_one_sentence(tmp_path):
    """写成了目录，或者写错了路径。"""
    for path, word in ((tmp_path, "目录"), (tmp_path / "nothing.json", "找不到")):
        with pytest.raises(UserError, match=word) as error:
            read(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("name, text", [
    ("short.txt", "你好"),
    ("long.txt", "你好，世界。\n\n" * 20_000),
    ("data.jsonl", jsonl({"text": "今天天气很好"} for _ in range(50))),
    ("data.json", dump([{"text": "今天天气很好"}] * 50)),
])  # fmt: skip
@pytest.mark.parametrize("zipped", [False, True])
def test_gbk_file_says_how_to_convert(tmp_path, name, text, zipped):
    """老的中文文件常是 GBK；要说不是 UTF-8，并给出转换的命令，而不是训练出乱码。"""
    data = gzip.compress(text.encode("gbk")) if zipped else text.encode("gbk")
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match="UTF-8") as error:
        read(path)
    assert str(path) in str(error.value)
    assert "iconv" in str(error.value)


@pytest.mark.parametrize("at", [0, 5, 5000])
def test_one_line_in_another_encoding_is_one_bad_row(tmp_path, at):
    """几千行里混进一行 GBK，是一条坏行，不是整个文件都不能用；在开头还是中间都一样。"""
    lines = jsonl(good_rows(6000)).encode().splitlines(keepends=True)
    lines.insert(at, dump({"text": "今天天气很好"}).encode("gbk") + b"\n")
    documents, log = read(write(tmp_path / "data.jsonl", b"".join(lines)))
    assert len(documents) == 6000
    assert log.bad == 1
    assert f"第 {at + 1} 行" in log.examples[0]


def test_missing_key_names_the_line_and_the_keys_there_are(tmp_path):
    """字段名不同（例如 body）：说出文件、行号、有哪些字段，用户才知道怎么改。"""
    path = write(tmp_path / "data.jsonl", jsonl([{"body": "文"}, {"body": "章"}]))
    with pytest.raises(UserError) as error:
        read(path)
    for word in (str(path), "第 1 行", "第 2 行", "body", "text"):
        assert word in str(error.value)


@pytest.mark.parametrize("bad, total, passes", [(1, 100, True), (2, 100, False), (3, 300, True),
                                                (4, 300, False), (1, 50, False)])  # fmt: skip
@pytest.mark.parametrize("layout", ["jsonl", "array"])
def test_one_percent_is_the_limit(tmp_path, bad, total, passes, layout):
    """不超过 1% 就接着训练并报告，超过就停下：文件、条数、例子都要写明。"""
    rows = [{"body": "没有正文"}] * bad + good_rows(total - bad)
    random.Random(0).shuffle(rows)
    path = write(tmp_path / "data.json", dump(rows) if layout == "array" else jsonl(rows))
    first_bad = rows.index({"body": "没有正文"}) + 1
    if passes:
        documents, log = read(path)
        assert len(documents) == total - bad
        report = "\n".join(log.report())
    else:
        with pytest.raises(UserError) as error:
            read(path)
        report = str(error.value)
    for word in (str(path), f"第 {first_bad} ", f"{bad} ", str(total)):
        assert word in report


@pytest.mark.parametrize("cut", range(1, 13))
def test_truncated_last_line_says_so(tmp_path, cut):
    """下载断了：切在哪个字节上都要说「不完整」，切在一个汉字中间也不该说是编码错了。"""
    data = jsonl(good_rows(200)).encode()[:-1]
    path = write(tmp_path / "data.jsonl", data[:-cut])
    documents, log = read(path)
    assert documents == [row["text"] for row in good_rows(199)]
    assert log.bad == 1
    assert "第 200 行" in log.examples[0]
    assert "不完整" in log.examples[0]


def test_truncated_only_line_is_an_error(tmp_path):
    """只有一行又没写完，就没有能用的数据。"""
    with pytest.raises(UserError, match="不完整"):
        read(write(tmp_path / "data.jsonl", '{"text": "守株待'))


@pytest.mark.parametrize("cut", range(1, 13))
def test_truncated_array_says_so(tmp_path, cut):
    """大数组没有下载完：前面的照用，并说出是没写完，而不是一段英文的解析错误。"""
    path = write(tmp_path / "data.json", dump(good_rows(200)).encode()[:-cut])
    documents, log = read(path)
    assert documents == [row["text"] for row in good_rows(200 if cut == 1 else 199)]
    assert log.bad == 1
    assert "没有写完" in log.examples[0]


@pytest.mark.parametrize("broken", ['{"text": oops}', '{"text": "坏"', ",", '{"text": "\\udc00"}'])
def test_array_broken_in_the_middle_does_not_lose_the_rest(tmp_path, broken):
    """数组中间坏一处：要么跳过它读完其余，要么停下；只用前一小半接着训练，用户不会知道。"""
    rows = [dump(row) for row in good_rows(1000)]
    path = write(tmp_path / "data.json", "[" + ",".join([*rows[:200], broken, *rows[200:]]) + "]")
    try:
        documents, _ = read(path)
    except UserError as error:
        assert str(path) in str(error)
        assert "第 20" in str(error)
    else:
        assert len(documents) == 1000


def test_truncated_gzip(tmp_path):
    """压缩文件没下载完：小的说已损坏；大的用读得到的部分，并说明末尾缺了。"""
    noise = random.Random(0)
    rows = [{"text": "".join(chr(noise.randrange(0x4E00, 0x9FA5)) for _ in range(300))}
            for _ in range(500)]  # fmt: skip
    data = gzip.compress(jsonl(rows).encode())
    with pytest.raises(UserError, match="gzip"):
        read(write(tmp_path / "small.jsonl.gz", data[:1000]))
    documents, log = read(write(tmp_path / "large.jsonl.gz", data[:-1000]))
    assert documents == [row["text"] for row in rows[: len(documents)]]
    assert len(documents) > 450
    assert "gzip" in log.examples[0]


@pytest.mark.parametrize("at", [20, 30_000, -6])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_damaged_gzip_is_not_a_traceback(tmp_path, at, kind):
    """压缩数据里坏了几个字节：一句话说清，而不是 zlib 的报错。"""
    rows = good_rows(20_000)
    data = bytearray(gzip.compress((dump(rows) if kind == "json" else jsonl(rows)).encode()))
    for i in range(at, min(at + 40, 0) if at < 0 else at + 40):
        data[i] ^= 0xFF
    path = write(tmp_path / f"data.{kind}.gz", bytes(data))
    try:
        _, log = read(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert log.bad


@pytest.mark.parametrize("escape", ["\\ud800", "\\udfff", "前\\ud83d后"])
def test_lone_surrogates_are_bad_rows(tmp_path, escape):
    """JSON 里半个表情符号不是文字：算一条坏行，不该让程序崩溃，也不该悄悄改成问号。"""
    rows = [dump(row) for row in good_rows(200)]
    rows.insert(100, f'{{"text": "{escape}"}}')
    documents, log = read(write(tmp_path / "data.jsonl", "\n".join(rows) + "\n"))
    assert documents == [row["text"] for row in good_rows(200)]
    assert log.bad == 1
    assert "第 101 " in log.examples[0]


@pytest.mark.parametrize("escape", ["\\ud800", "\\udfff", "\\ud800\\u0041"])
def test_lone_surrogate_in_an_array_is_one_bad_row(tmp_path, escape):
    """大数组里的也一样：不能改成别的字，也不能因为这一条就不要后面的。"""
    rows = [dump(row) for row in good_rows(200)]
    rows.insert(100, f'{{"text": "{escape}"}}')
    documents, log = read(write(tmp_path / "data.json", "[" + ",".join(rows) + "]"))
    assert documents == [row["text"] for row in good_rows(200)]
    assert log.bad == 1
    assert "第 101 条" in log.examples[0]


def test_lone_surrogates_in_conversations_are_bad_rows(tmp_path):
    """微调数据也一样。"""
    good, _ = CONVERSATIONS["one_turn"]
    bad = '{"instruction": "问", "output": "答\\ud83d"}\n'
    path = write(tmp_path / "sft.jsonl", jsonl([good] * 150) + bad)
    conversations, log = read(path, read_conversations)
    assert len(conversations) == 150
    assert log.bad == 1


def test_overlong_line_is_one_bad_row(tmp_path, monkeypatch):
    """没有换行的几个 GB 不该撑爆内存；跳过那一行，后面的行号与内容都不受影响。"""
    monkeypatch.setattr(json_text, "MAX_LINE", 1000)
    rows = [dump(row) for row in good_rows(150)]
    lines = [*rows[:100], dump({"text": "长" * 1000}), *rows[100:], "坏"]
    documents, log = read_without_check(write(tmp_path / "data.jsonl", "\n".join(lines)))
    assert documents == [row["text"] for row in good_rows(150)]
    assert ["第 101 行" in log.examples[0], "第 152 行" in log.examples[1]] == [True, True]


def read_without_check(path: Path) -> tuple[list, ReadLog]:
    log = ReadLog(str(path))
    return [record.content for record in read_documents(path, log)], log


def test_empty_documents_are_reported(tmp_path):
    """空白的文档跳过，但要说有多少：什么都不会悄悄丢掉。"""
    rows = [{"text": ""}, {"text": " \n"}, *good_rows(10)]
    documents, log = read(write(tmp_path / "data.jsonl", jsonl(rows)))
    assert len(documents) == 10
    assert any("2" in line and "空白" in line for line in log.report())


@given(st.lists(st.sampled_from(["好", "坏", "空", "断"]), min_size=1, max_size=30))
@example(["坏"] * 30)
def test_every_row_is_used_or_counted(tmp_path_factory, kinds):
    """读出的、坏的、空白的加起来，恰好是文件里的行数。"""
    lines = {"好": dump({"text": "文"}), "坏": '{"x": 1}', "空": '{"text": " "}', "断": '{"tex'}
    path = tmp_path_factory.mktemp("rows") / "data.jsonl"
    write(path, '{"text": "文"}\n' + "\n".join(lines[kind] for kind in kinds) + "\n")
    documents, log = read_without_check(path)
    assert len(documents) == 1 + kinds.count("好")
    assert log.bad == kinds.count("坏") + kinds.count("断")
    assert log.rows == 1 + len(kinds)
    assert log.refused["空白文档"] == kinds.count("空")


# ---------- 4. 大文件 ----------


@pytest.mark.parametrize("layout", ["array", "jsonl"])
def test_big_files_are_streamed(tmp_path, layout):
    """30 MB 的文件只占几 MB 内存，读第一篇时也不必等整个文件读完；2 GB 时同理。"""
    row = dump({"text": "守株待兔。" * 400})  # 6 KB
    path, n = tmp_path / "big.json", 5000
    with path.open("w", encoding="utf-8") as f:
        open_, between, close = {"array": ("[", ",", "]"), "jsonl": ("", "\n", "\n")}[layout]
        f.write(open_ + row)
        f.writelines(between + row for _ in range(n - 1))
        f.write(close)
    assert path.stat().st_size > 29e6

    log, count = ReadLog(str(path)), 0
    tracemalloc.start()
    try:
        documents = read_documents(path, log)
        next(documents)
        assert log.file.tell() < 1e6
        count = 1 + sum(1 for _ in documents)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == n
    assert peak < 3e6


# ---------- 5. 读代码的人找到的 ----------


def paragraphs(texts) -> str:
    return "\n\n".join(texts) + "\n"


def tar_of(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data := text.encode())
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_a_tar_of_the_current_folder_is_read(tmp_path):
    """tar cf x.tar . 里的名字都以 ./ 开头。"""
    path = write(tmp_path / "x.tar", tar_of({"./a.txt": paragraphs(TEXTS), "./.hidden": "不要"}))
    documents, log = read(path)
    assert documents == TEXTS
    assert ".hidden" in "".join(log.notes)


def test_a_damaged_header_inside_a_tar_is_not_the_end_of_it(tmp_path):
    """tarfile 遇到坏了的头，只当作到了末尾：后面的几个文件就不声不响地没有了。"""
    data = bytearray(tar_of({f"{i}.txt": paragraphs(TEXTS) for i in range(3)}))
    second = data.index(b"1.txt")
    data[second + 148] ^= 0xFF  # 校验和
    with pytest.raises(UserError, match="tar"):
        read(write(tmp_path / "x.tar", bytes(data)))


def test_many_comments_at_the_top_are_a_text(tmp_path):
    text = "<!-- 注 -->\n" * 60 + "正文"
    assert read(write(tmp_path / "x.md", text))[1].kind == "text"


def test_a_glob_of_everything_reads_each_file_once(tmp_path):
    write_in(tmp_path / "g" / "a.txt", paragraphs(TEXTS))
    write_in(tmp_path / "g" / "sub" / "b.txt", paragraphs(TEXTS))
    assert len(read(f"{tmp_path}/g/**")[0]) == 2 * len(TEXTS)


def test_linked_folders_are_read_once(tmp_path):
    """数据放在别的盘上，目录里是一个链接；绕回来的链接不会走个没完。"""
    write_in(tmp_path / "far" / "a.txt", paragraphs(TEXTS))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wiki").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "data")
    assert read(tmp_path / "data")[0] == TEXTS


def write_in(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("text, said", [
    ('id,text\n1,甲乙\n2,"丁戊己\n3,庚\n4,子\n', "引号没有关上"),
    ("text,text,note\n甲,乙,丙\n", "两列都叫 text"),
])  # fmt: skip
def test_broken_tables_are_not_swallowed(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read(write(tmp_path / "x.csv", text))


def test_wrappers_one_after_another(tmp_path):
    """两个包着数据的对象接在一起；前后别的项都数得到。"""
    one = json.dumps({"version": "1", "data": good_rows(20), "end": 1}, indent=1)
    documents, log = read(write(tmp_path / "x.json", one + "\n" + one))
    assert len(documents) == 40
    assert log.unused == {"version": 2, "end": 2}


@pytest.mark.parametrize("row, expected", [
    ({"instruction": "三", "output": "四", "history": [{"answer": "二", "question": "一"}]},
     ["一", "二", "三", "四"]),
    ({"instruction": "一", "output": "二", "history": "[]", "tools": "[]"}, ["一", "二"]),
    ({"conversations": "", "instruction": "一", "output": "二"}, ["一", "二"]),
    ({"conversations": [turn("user", "一"), turn("assistant", [
        {"type": "reasoning", "text": "想"}, {"type": "text", "text": "二"}])]}, ["一", "二"]),
])  # fmt: skip
def test_what_is_meant_is_what_is_read(tmp_path, row, expected):
    conversations, _ = read(write(tmp_path / "x.jsonl", jsonl([row] * 3)), read_conversations)
    assert [[text for _, text in c] for c in conversations] == [expected] * 3


def test_a_list_with_one_bad_turn_names_the_turn(tmp_path):
    row = [turn("user", "一"), {"content": "二"}, turn("assistant", "三")]
    with pytest.raises(UserError, match="第 2 轮"):
        read(write(tmp_path / "x.jsonl", jsonl([row] * 3)), read_conversations)


def test_one_damaged_member_does_not_take_the_others_along(tmp_path):
    """zip 里坏了一个文件，别的照读。"""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in "abc":
            archive.writestr(f"{name}.jsonl", jsonl(good_rows(200)))
    data = bytearray(buffer.getvalue())
    data[data.index(b"b.jsonl") + 3000] ^= 0xFF
    documents, log = read(write(tmp_path / "x.zip", bytes(data)))
    assert len(documents) >= 400
    assert log.bad


def test_paragraphs_are_as_long_as_is_said(tmp_path):
    text = paragraphs("一二三四五六七八九。" * 700 for _ in range(3))
    documents, log = read(write(tmp_path / "x.txt", text))
    assert max(map(len, documents)) <= 4096
    assert sum(map(len, documents)) == 21_000
    assert "4,096" in "".join(log.notes)


@pytest.mark.parametrize("text", ["GGUF 是一种文件格式。\n\n别的。", "<s>旧价</s>新价\n\n别的。"])
def test_texts_that_only_look_like_something_else(tmp_path, text):
    assert read(write(tmp_path / "x.txt", text))[0] == text.split("\n\n")


def test_a_parquet_that_cannot_be_decoded_is_one_sentence(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="没有 pyarrow")
    from pyarrow import parquet

    broken = pyarrow.array([b"\xff\xfe\xfd"] * 3).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="读不出"):
        read(tmp_path / "x.parquet")
