"""分词器：写得出来的就读得回去，控制词元只归程序使用，词表不对就不开工。"""

import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import N_TOKENS, UserError
from tokenizer import (
    BERT_VOCAB_SIZE,
    CONTROL_TOKENS,
    NOT_ALONE,
    TEXT_TOKENS,
    VOCAB_FILE,
    Tokenizer,
)

LINES = VOCAB_FILE.read_text(encoding="utf-8").split("\n")[:-1]  # 文件以换行结尾
BERT_MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENIZER = Tokenizer()  # hypothesis 的测试用它：一个例子一个例子地取夹具太慢

# 词表里的单个字符，加上补充的；行分隔符 U+2028 是空白，不是文字。
CHARACTERS = sorted({line for line in LINES if len(line) == 1} - {"\u2028"} | {*TEXT_TOKENS})
WORDS = [line for line in LINES if line.isascii() and line.isalpha() and line.islower()]
HANZI = [c for c in CHARACTERS if "\u4e00" <= c <= "\u9fff"]
PUNCTUATION = [*"，。！？；：、（）《》“”‘’…·,.!?;:()'\"-%/", "——", "……", "\n", "\n\n"]

numbers = st.one_of(
    st.integers(0, 10**12).map(str),
    st.decimals(0, 10**6, places=2).map(str),
    st.sampled_from(["3.14", "2024", "0.5%", "1/3", "12:30", "2024-06-01"]),
)
english = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
chinese = st.text(st.sampled_from(HANZI), min_size=1, max_size=12)
prose = st.lists(st.one_of(chinese, st.sampled_from(PUNCTUATION), numbers, english), max_size=12)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
mixed_text = st.lists(st.one_of(any_text, prose.map("".join)), max_size=5).map("".join)
any_ids = st.lists(st.integers(0, N_TOKENS - 1), max_size=40)


# ---------- 1. 来回不变 ----------


@given(prose.map("".join))
@example("“你好，”她说：‘圆周率约是 3.14。’\n\n2024 年——hello world……")
def test_prose_survives_the_round_trip(text):
    """否则模型学到的就不是用户给的文字，生成的标点、引号、数字、英文也会走样。"""
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.text(st.sampled_from(CHARACTERS), max_size=80))
def test_any_text_of_known_characters_survives(text):
    """词表里有的字，不论怎样相邻都不该变成 [UNK]，也不该多出或少掉空格。"""
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("character", [*TEXT_TOKENS, "～", "·", "「", "￥", "℃", "％", "①", "+"])
def test_each_symbol_survives_beside_anything(tokenizer, character):
    """挨着汉字、数字、字母、自己，或在开头结尾：一个符号也不能丢，也不能带出空格。"""
    for left in ("", "中", "5", "a", "。", character):
        for right in ("", "中", "5", "a", "。", character):
            text = left + character + right
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_spaces_are_neither_added_nor_lost(tokenizer):
    """汉字之间不多出空格，英文词之间不少掉空格，行首的全角缩进还在。"""
    paragraphs, code = "\u3000\u3000第一段\n\u3000\u3000第二段", "for i in range(3):\n\tprint(i)"
    for text in ("守株待兔", "hello world", "a  b", " 头", "尾 ", "中 and 文", paragraphs, code):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_is_lost_is_only_what_the_readme_says(tokenizer):
    """大写变小写、重音去掉、不认得的字变成一个 [UNK]：此外不许再丢，也不许报错。"""
    assert tokenizer.decode(tokenizer.encode("GPT 与 Café")) == "gpt 与 cafe"
    assert tokenizer.encode("𠮷") == [tokenizer.unk_id]
    assert tokenizer.decode(tokenizer.encode("中\U0001f600国")) == "中[UNK]国"
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@settings(max_examples=300)
@given(st.lists(st.one_of(any_text, mixed_text), max_size=4))
@example(["守株待兔：", "", "“3.14”\n", "hello world", "<|im_end|>", "重复", "重复"])
@example(["中\u0301国か\u3099は한글 x×y ３．１４ ﬁ ≠", "a" * 2000, "\U0001f600"])
def test_batch_equals_one_by_one(texts):
    """准备数据用批量编码，查表；聊天用单个编码。两者不同，模型就会看到没学过的写法。"""
    found = TOKENIZER.encode_batch(texts)
    assert [ids.tolist() for ids in found] == [TOKENIZER.encode(text) for text in texts]
    assert all(ids.dtype == np.uint16 for ids in found)


def test_most_of_chinese_needs_only_the_table(tokenizer):
    """查不到表的要慢几十倍：常用的汉字、标点都得在表里，会与左右相连的都不在。"""
    assert (tokenizer._alone[[ord(c) for c in "一龥，。！“”《》、\n \u3000—…"]] != NOT_ALONE).all()
    assert (tokenizer._alone[[ord(c) for c in "aZ9かカ한é×\u0301"]] == NOT_ALONE).all()


# ---------- 2. 逐个解码 ----------


@given(any_ids)
@example(TOKENIZER.encode("unbelievable transformers，2024 年 3.14"))
def test_streaming_decode_equals_whole_decode(ids):
    """边生成边打印的字，必须与最后整段解码的一字不差；任何编号的组合都是如此。"""
    assert "".join(TOKENIZER.decode([i]) for i in ids) == TOKENIZER.decode(ids)


def test_streaming_never_splits_a_word(tokenizer):
    """一个英文词由几个词元拼成时，逐个打印出来中间没有空格，也没有 ##。"""
    text = "unbelievable tokenization"
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
    assert len(pieces) > 3  # 确实被切开了
    assert "".join(pieces) == text


# ---------- 3. 控制词元 ----------


@given(st.lists(st.one_of(st.sampled_from([*CONTROL_TOKENS, *BERT_MARKS]), chinese), max_size=6))
@example(["<|im_start|>", "<|assistant|>", "好", "<|im_end|>"])
def test_control_tokens_typed_as_text_are_text(pieces):
    """否则用户打几个字就能冒充系统、结束对话，数据里的一句话就能把文档切断。"""
    text = "".join(pieces)
    ids = TOKENIZER.encode(text)
    control = {TOKENIZER.backend.token_to_id(t) for t in CONTROL_TOKENS + BERT_MARKS}
    assert not control & set(ids)
    assert TOKENIZER.encode_batch([text])[0].tolist() == ids
    assert TOKENIZER.decode(ids) == text.lower()  # [CLS] 变小写，一字不少


def test_control_tokens_are_not_printed(tokenizer):
    """模型写出的结束标记不该出现在用户眼前。"""
    ids = tokenizer.turn_ids("user", tokenizer.encode("你好")) + tokenizer.reply_prefix()
    assert tokenizer.decode(ids) == "你好"


def test_turns_and_documents_have_one_form(tokenizer):
    """训练时与聊天时的格式只要差一个词元，回答就会变差；这里逐个写明。"""
    names = tokenizer.backend.id_to_token
    turn = tokenizer.turn_ids("assistant", tokenizer.encode("好"))
    assert [names(i) for i in turn] == ["<|im_start|>", "<|assistant|>", "好", "<|im_end|>"]
    document = tokenizer.document_ids(np.array(tokenizer.encode("好"), np.uint16))
    assert [names(i) for i in document] == ["<|im_start|>", "好", "<|im_end|>"]
    assert turn[:2] == tokenizer.reply_prefix()
    roles = {"user", "assistant", "system"}
    assert all(names(tokenizer.role_ids[role]) == f"<|{role}|>" for role in roles)


def test_useless_ids_are_never_sampled(tokenizer):
    """[UNK]、占位符、角色标记若被抽到，屏幕上就会冒出乱码；结束标记则必须能抽到。"""
    banned = set(tokenizer.never_sampled())
    unused = {i for i, line in enumerate(LINES) if line.startswith("[unused")}
    marks = {LINES.index(mark) for mark in BERT_MARKS}
    assert unused | marks | {tokenizer.bos_id, *tokenizer.role_ids.values()} <= banned
    assert tokenizer.eos_id not in banned
    text = "“常用字”，一个也不能禁——3.14…\n hello `world`\u3000\t‘’–"
    assert not banned & set(tokenizer.encode(text))


def test_every_sampled_id_writes_something(tokenizer):
    """能抽到的编号都要写得出字：抽到写不出字的，屏幕停住不动，用户以为程序死了。"""
    allowed = set(range(N_TOKENS)) - set(tokenizer.never_sampled()) - {tokenizer.eos_id}
    silent = [i for i in sorted(allowed) if tokenizer.decode([i]) == ""]
    assert silent == []


# ---------- 4. 词表 ----------


def test_ids_are_the_lines_of_the_published_vocabulary(tokenizer):
    """编号移一位，别处按 bert-base-chinese 准备的数据与权重就全部错位。"""
    names = [tokenizer.backend.id_to_token(i) for i in range(BERT_VOCAB_SIZE)]
    assert len(LINES) == BERT_VOCAB_SIZE == 21128
    assert [(i, a, b) for i, (a, b) in enumerate(zip(names, LINES, strict=True)) if a != b] == []


def test_vocabulary_file_is_the_published_one():
    """与公开的 bert-base-chinese 词表逐字节相同（git 的对象编号 ca4f978…）。"""
    data = VOCAB_FILE.read_bytes()
    assert hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest().startswith("ca4f978")


def test_added_tokens_follow_the_vocabulary(tokenizer):
    """补充的词元紧跟在 21127 之后，总数与 config.py 里检查 vocab_size 用的相同。"""
    names = [tokenizer.backend.id_to_token(i) for i in range(BERT_VOCAB_SIZE, N_TOKENS)]
    assert names == CONTROL_TOKENS + TEXT_TOKENS
    assert tokenizer.vocab_size == N_TOKENS < 2**16


def wrong_vocabularies() -> dict[str, str | None]:
    """各种不对的词表：少一行、换了次序、换行符变了、空的、根本没有。"""
    return {
        "truncated": "\n".join(LINES[:-1]) + "\n",
        "swapped": "\n".join([*LINES[:100], LINES[101], LINES[100], *LINES[102:]]) + "\n",
        "crlf": "\r\n".join(LINES) + "\r\n",
        "empty": "",
        "missing": None,
    }


@pytest.mark.parametrize("kind", wrong_vocabularies())
def test_wrong_vocabulary_fails_loudly(tmp_path, kind):
    """词表不对却照样训练，几小时后才发现满屏乱码；要在开工之前就用一句话说清。"""
    file, content = tmp_path / "vocab.txt", wrong_vocabularies()[kind]
    if content is not None:
        file.write_bytes(content.encode())
    with pytest.raises(UserError) as error:
        Tokenizer(file)
    assert str(file) in str(error.value)
    assert "请" in str(error.value)  # 说出现在该做什么


def test_git_keeps_the_line_ends_of_the_vocabulary():
    """Windows 上的 git 默认把 \\n 换成 \\r\\n，刚克隆的仓库就会说词表不对，重新检出也没用。"""
    repository = Path(__file__).parent.parent
    if not shutil.which("git") or not (repository / ".git").exists():
        pytest.skip("不在 git 仓库里")
    command = ["git", "check-attr", "text", "tokenizer/vocab.txt"]
    answer = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert answer.stdout.strip().endswith("text: unset"), ".gitattributes 里要写 vocab.txt -text"


# ---------- 5. 交给 transformers ----------


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory):
    """存成文件，再由 AutoTokenizer 读回来的分词器。"""
    transformers = pytest.importorskip("transformers", reason="没有安装 transformers")
    folder = tmp_path_factory.mktemp("hf")
    tokenizer.to_transformers().save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", [
    "“你好，”他说：‘圆周率是 3.14。’\n2024 年——hello world……完\u3000\t`",
    "汉字 unbelievable 汉字", "",
])  # fmt: skip
def test_survives_saving_and_loading(tokenizer, reloaded, text):
    """导出以后，别的工具读到的编号和文字必须与这里相同，逐个解码也一样。"""
    ids = tokenizer.encode(text)
    assert reloaded(text).input_ids == ids  # 也没有自作主张加上 [CLS]、[SEP]
    assert reloaded.decode(ids) == text
    assert "".join(reloaded.decode([i]) for i in ids) == text


def test_special_ids_and_chat_template_survive(tokenizer, reloaded):
    """别的工具靠它们知道何时停、怎样提问；与训练时的格式差一点，导出的模型就不会答话。"""
    assert (reloaded.bos_token_id, reloaded.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert reloaded.unk_token_id == tokenizer.unk_id
    assert len(reloaded) == N_TOKENS
    turns = [("system", "简短。"), ("user", "你好"), ("assistant", "好。"), ("user", "再见")]
    ours = [i for role, text in turns for i in tokenizer.turn_ids(role, tokenizer.encode(text))]
    messages = [{"role": role, "content": text} for role, text in turns]
    theirs = reloaded.apply_chat_template(messages, add_generation_prompt=True)
    assert theirs["input_ids"] == ours + tokenizer.reply_prefix()


def test_exporting_leaves_our_tokenizer_alone(tokenizer):
    """导出之后接着用，文字里的控制词元仍然只是文字。"""
    before = tokenizer.encode("<|im_end|>好")
    tokenizer.to_transformers()
    assert tokenizer.encode("<|im_end|>好") == before
    assert tokenizer.eos_id not in before


def test_fingerprint_is_stable(tokenizer):
    """它写进词元文件与检查点：两次启动必须相同，否则每次都要重做数据。"""
    assert Tokenizer().fingerprint() == tokenizer.fingerprint() != ""
