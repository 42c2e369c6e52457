"""数据：词元文件该重做时重做、该沿用时沿用；每个词元恰好用一次；只学该学的词元。"""

import gzip
import hashlib
import json
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import dataset
from config import PRESETS, Config, UserError
from corpus import encode, idioms, token_file
from corpus.split import is_held_out
from corpus.token_file import TokenFile, tokenize_corpus
from dataset import (
    IGNORE,
    SIDES,
    DocumentBatches,
    PretrainBatches,
    SFTBatches,
    pack,
    pretrain_batches,
    rows_of_step,
)
from model import Transformer
from tokenizer import Tokenizer

TOKENIZER = Tokenizer()  # hypothesis 的测试用它：一个例子一个例子地取夹具太慢
name_of = TOKENIZER.backend.id_to_token


def texts_of(n: int, seed: int = 0) -> list[str]:
    """n 篇各不相同的短文。"""
    noise = random.Random(seed)
    return [f"第{i}篇：" + "".join(noise.choices("天地玄黄宇宙洪荒，。", k=20)) for i in range(n)]


def write_rows(path: Path, rows: list) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def documents_of(file: TokenFile, side: str, tokenizer: Tokenizer) -> list[str]:
    """一边的全部文档，解码成文字。"""
    pieces = np.split(file.tokens[side], file.starts[side][1:-1])
    return [tokenizer.decode(piece.tolist()) for piece in pieces]


class Workplace:
    """一个来源文件和一份配置；`prepare` 准备它，`stamp` 看词元文件有没有重写过。"""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.source = folder / "source.jsonl"
        self.config = Config(data_dir=str(folder / "data"), val_fraction=0.1)

    def prepare(self, stage: str = "pretrain") -> TokenFile:
        return tokenize_corpus(str(self.source), stage, self.tokenizer, self.config)

    def files(self, ending: str) -> list[Path]:
        return sorted((self.folder / "data").rglob(f"*{ending}"))

    def stamp(self) -> list:
        return [(f, f.stat().st_ino, f.stat().st_mtime_ns) for f in self.files(".bin")]


@pytest.fixture
def work(tmp_path, tokenizer) -> Workplace:
    workplace = Workplace(tmp_path, tokenizer)
    write_rows(workplace.source, texts_of(200))
    return workplace


# ---------- 1. 词元文件 ----------


def test_token_file_holds_every_document_in_order(work, tokenizer):
    """写进去的每一篇都原样读得回来，首尾标记齐全，一篇不多一篇不少。"""
    file = work.prepare()
    train, val = (documents_of(file, side, tokenizer) for side in SIDES)
    texts = texts_of(200)
    assert sorted(train + val) == sorted(texts)
    assert [t for t in texts if t in set(train)] == train  # 次序不变
    for side in SIDES:
        tokens, starts = np.asarray(file.tokens[side]), file.starts[side]
        assert tokens.dtype == np.uint16
        assert (tokens[starts[:-1]] == tokenizer.bos_id).all()
        assert (tokens[starts[1:] - 1] == tokenizer.eos_id).all()
        assert (tokens == tokenizer.bos_id).sum() == len(starts) - 1


def test_card_says_what_the_file_is(work, tokenizer, capsys):
    """卡片上的来源、散列、篇数、词元数、字数、[UNK] 率都要与实际相符；[UNK] 率还要印出来。"""
    texts = [*texts_of(200), "𠮷𠮷" + "好" * 96]  # 词表里没有的字，正好占这一篇的百分之二
    file, path = (write_rows(work.source, texts), work.prepare())[1], work.source
    card = json.loads(work.files(".json")[0].read_text(encoding="utf-8"))
    assert card == file.card
    assert card["source"] == str(path)
    assert card["size"] == path.stat().st_size
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["tokenizer"] == tokenizer.fingerprint()
    total = 0
    for side in SIDES:
        documents = documents_of(file, side, tokenizer)
        characters = sum(len(text.replace("[UNK]", "𠮷")) for text in documents)
        assert card[f"{side}_documents"] == len(documents)
        assert card[f"{side}_tokens"] == len(file.tokens[side])
        assert card[f"{side}_characters"] == characters
        total += len(file.tokens[side])
    assert card["unk_rate"] == 2 / total
    assert f"[UNK] {2 / total:.2%}" in capsys.readouterr().out


def test_nothing_changed_means_nothing_is_redone(work, capsys):
    """第二次启动不该再等几分钟；只改了修改时间（例如复制过）、随机种子也不该重做。"""
    first = work.prepare()
    before = work.stamp()
    capsys.readouterr()
    work.config.seed += 1
    again = work.prepare()
    assert "沿用" in capsys.readouterr().out
    os.utime(work.source, (1, 1))
    work.prepare()
    assert work.stamp() == before
    for side in SIDES:
        assert np.array_equal(first.tokens[side], again.tokens[side])
        assert np.array_equal(first.starts[side], again.starts[side])


class OtherTokenizer(Tokenizer):
    """词表换过的分词器。"""

    def fingerprint(self) -> str:
        return "other"


@pytest.mark.parametrize("change", ["longer", "same_size", "val_fraction", "tokenizer", "code"])
def test_anything_changed_means_it_is_redone(work, tokenizer, monkeypatch, change):
    """否则用户改了数据或设置，训练的却还是旧的，而且看不出来。"""
    work.prepare()
    before, texts = work.stamp(), texts_of(200)
    if change == "longer":
        write_rows(work.source, texts := texts_of(201))
    elif change == "same_size":
        write_rows(work.source, texts := ["地" + text[1:] for text in texts])
    elif change == "val_fraction":
        work.config.val_fraction = 0.3
    elif change == "code":
        monkeypatch.setattr(token_file, "code_fingerprint", lambda: "other")
    else:
        work.tokenizer = OtherTokenizer()
    file = work.prepare()
    assert work.stamp() != before
    train, val = (documents_of(file, side, tokenizer) for side in SIDES)
    assert sorted(train + val) == sorted(texts)
    if change == "val_fraction":
        assert 0.2 < len(val) / 200 < 0.4
    after = work.stamp()
    work.prepare()
    assert work.stamp() == after  # 重做一次就够


@pytest.mark.parametrize("damage", ["bin", "idx", "no_bin", "no_idx", "no_card", "", "{", "[]",
                                    "null", "{}", '{"format": 1}', "half"])  # fmt: skip
def test_damaged_files_are_redone(work, tokenizer, damage):
    """写到一半断了电、磁盘满过、手快删了一个文件：重做一遍，而不是报错或用坏的数据。"""
    work.prepare()
    bin_, idx, card = (work.files(ending)[-1] for ending in (".bin", ".idx", ".json"))
    if damage in ("bin", "idx"):
        file = {"bin": bin_, "idx": idx}[damage]
        os.truncate(file, file.stat().st_size - 2)
    elif damage.startswith("no_"):
        {"no_bin": bin_, "no_idx": idx, "no_card": card}[damage].unlink()
    elif damage == "half":
        card.write_bytes(card.read_bytes()[: card.stat().st_size // 2])
    else:
        card.write_text(damage)
    file = work.prepare()
    found = documents_of(file, "train", tokenizer) + documents_of(file, "val", tokenizer)
    assert sorted(found) == sorted(texts_of(200))


def test_interrupted_preparation_leaves_nothing_half_done(work, tokenizer, monkeypatch):
    """准备到一半按了 Ctrl-C：下次要从头做，不能把前一半当成全部，也不能混用新旧两份。"""
    work.prepare()
    write_rows(work.source, texts := texts_of(300, seed=1))
    calls, as_usual = [], token_file.encode_documents

    def interrupted(chunk, tokenizer):
        calls.append(chunk)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return as_usual(chunk, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(token_file, "encode_documents", interrupted)
        patch.setattr(encode, "CHUNK", 100)
        with pytest.raises(KeyboardInterrupt):
            work.prepare()
    assert len(calls) == 2
    file = work.prepare()
    found = documents_of(file, "train", tokenizer) + documents_of(file, "val", tokenizer)
    assert sorted(found) == sorted(texts)
    assert work.files(".part") == []


def test_two_sources_and_two_stages_do_not_mix(work, tokenizer):
    """同名不同目录的文件、同一个文件的两种用途，各有各的词元文件。"""
    other = Workplace(work.folder / "other", tokenizer)
    other.folder.mkdir()
    other.config = work.config
    write_rows(other.source, texts_of(150, seed=9))
    rows = [{"instruction": t, "output": "好"} | {"text": t} for t in texts_of(200)]
    write_rows(work.source, rows)
    counts = [sum(f.card[f"{side}_documents"] for side in SIDES)
              for f in (work.prepare(), other.prepare(), work.prepare("sft"))]  # fmt: skip
    before = work.stamp()
    work.prepare(), other.prepare(), work.prepare("sft")
    assert counts == [200, 150, 200]
    assert work.stamp() == before


def test_a_run_keeps_the_data_it_started_with(work):
    """训练到一半，另一个程序用别的划分重做了词元文件：正在训练的，手里的还是原来那一份。"""
    file = work.prepare()
    kept = {side: (np.array(file.tokens[side]), file.starts[side].copy()) for side in SIDES}
    work.config.val_fraction = 0.3
    assert len(work.prepare().tokens["val"]) > len(file.tokens["val"])
    for side in SIDES:
        assert np.array_equal(file.tokens[side], kept[side][0])
        assert np.array_equal(file.starts[side], kept[side][1])


def test_gzip_gives_the_same_tokens(work):
    """压缩与否，学到的一样。"""
    plain = work.prepare()
    data = work.source.read_bytes()
    work.source = work.folder / "source.jsonl.gz"
    work.source.write_bytes(gzip.compress(data))
    packed = work.prepare()
    assert all(np.array_equal(plain.tokens[side], packed.tokens[side]) for side in SIDES)


def test_control_tokens_in_data_are_text(work, tokenizer):
    """网页里写着 <|im_end|> 的文章，不该在那里被切断；对话里写着的，不该多出一轮。"""
    text = "他写道：<|im_end|><|im_start|><|assistant|>好"
    rows = [f"{i}{text}" for i in range(100)]
    write_rows(work.source, [{"text": row, "instruction": row, "output": row} for row in rows])
    file, sft = work.prepare(), work.prepare("sft")
    assert sorted(t for side in SIDES for t in documents_of(file, side, tokenizer)) == sorted(rows)
    for control, per_document, per_conversation in (
        (tokenizer.bos_id, 1, 2), (tokenizer.eos_id, 1, 2),
        (tokenizer.role_ids["assistant"], 0, 1),
    ):  # fmt: skip
        count = sum((np.asarray(file.tokens[side]) == control).sum() for side in SIDES)
        assert count == 100 * per_document
        assert (
            sum((np.asarray(sft.tokens[s]) == control).sum() for s in SIDES)
            == 100 * per_conversation
        )


def test_bad_rows_are_reported_and_the_run_goes_on(work, capsys):
    """不超过 1%：跳过，印出文件与行号，卡片上也记着。"""
    rows = texts_of(300)
    write_rows(work.source, [*rows[:40], {"body": "没有正文"}, *rows[40:]])
    file = work.prepare()
    out = capsys.readouterr().out
    assert f"{work.source} 第 41 行" in out
    assert "跳过 1 条坏行" in out
    assert (file.card["bad_rows"], file.card["rows"]) == (1, 301)
    assert sum(file.card[f"{side}_documents"] for side in SIDES) == 300


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_too_many_bad_rows_stop_and_leave_nothing_to_reuse(work, stage):
    """超过 1% 就停；修好以后再运行，要用修好的数据。"""
    good = [{"text": t, "instruction": t, "output": "好"} for t in texts_of(100)]
    write_rows(work.source, [*good, {"body": 1}, {"body": 2}])
    for _ in range(2):  # 第二次也不能蒙混过去
        with pytest.raises(UserError, match="第 101 行") as error:
            work.prepare(stage)
        assert str(work.source) in str(error.value)
    write_rows(work.source, good)
    assert sum(work.prepare(stage).card[f"{side}_documents"] for side in SIDES) == 100


def test_wrong_stage_says_what_is_missing(work):
    """把预训练的文件拿来微调：说出缺的是哪个字段。"""
    write_rows(work.source, [{"text": t} for t in texts_of(100)])
    with pytest.raises(UserError, match="conversations"):
        work.prepare("sft")


def test_too_few_documents_say_what_to_do(work):
    """只有一篇，留不出检验的：一句话，而不是训练到检验时才出错。"""
    write_rows(work.source, ["只有一篇"])
    with pytest.raises(UserError, match="请增加数据"):
        work.prepare()


def test_unwritable_data_dir_is_one_sentence(work):
    """data_dir 写不进去：说出是哪里。"""
    (work.folder / "file").write_text("")
    work.config.data_dir = str(work.folder / "file")
    with pytest.raises(UserError, match=r"读写失败.*file"):
        work.prepare()


class MeteredTokenizer(Tokenizer):
    """记下每次一起分词的有多少字；不真的分词，省时间。"""

    def encode_and_lose(self, texts):
        self.most = max(getattr(self, "most", 0), sum(map(len, texts)))
        return [(np.array([self.bos_id - 20], np.uint16), "")] * len(texts)


def test_memory_is_bounded_for_long_documents(work):
    """一起分词的字数要有上限：每个汉字约占 165 字节，两千篇长文一起就是几十 GB。"""
    write_rows(work.source, [f"{i}" + "a" * 200_000 for i in range(60)])  # 1200 万字
    work.tokenizer = MeteredTokenizer()
    work.prepare()
    assert work.tokenizer.most <= 4_000_000  # 约 700 MB


# ---------- 2. 训练与检验分开 ----------


def test_duplicates_are_on_one_side(work, tokenizer):
    """同一篇若两边都有，检验的分数就是背书的分数。"""
    texts = texts_of(300)
    rows = [*texts, *({"text": f"{t}\n"} for t in texts), *({"content": t} for t in texts)]
    random.Random(0).shuffle(rows)
    write_rows(work.source, rows)
    file = work.prepare()
    train, val = (Counter(documents_of(file, side, tokenizer)) for side in SIDES)
    assert not set(train) & set(val)
    assert set(train) | set(val) == set(texts)
    assert set((train + val).values()) == {3}  # 重复的也都留着，只是在同一边


def test_same_question_is_on_one_side(work, tokenizer):
    """同一个问题的几种回答也在同一边。"""
    rows = [{"instruction": t, "output": f"{t}{i}"} for t in texts_of(200) for i in range(2)]
    write_rows(work.source, rows)
    file = work.prepare("sft")
    train, val = ({d[: d.index("：") + 21] for d in documents_of(file, side, tokenizer)}
                  for side in SIDES)  # fmt: skip
    assert len(train) + len(val) == len(train | val) == 200


def test_split_depends_on_nothing_but_the_document(work, tokenizer):
    """换个次序、换个文件名、多加几篇，原来检验的仍然只用来检验。"""
    texts = texts_of(300)
    write_rows(work.source, texts)
    val = set(documents_of(work.prepare(), "val", tokenizer))
    write_rows(work.source, texts[::-1] + texts_of(100, seed=5))
    work.config.seed = 7
    again = set(documents_of(work.prepare(), "val", tokenizer))
    assert again & set(texts) == val
    assert 10 < len(val) < 60  # 约十分之一


@given(st.text(), st.floats(0.01, 0.49))
@example("守株待兔", 0.03)
@settings(max_examples=30)
def test_a_larger_fraction_only_adds(key, fraction):
    """调大 val_fraction，原来检验的仍在检验那边。"""
    if is_held_out(key, fraction):
        assert is_held_out(key, min(0.5, fraction * 1.5))


# ---------- 3. 预训练的批 ----------


@given(st.integers(1, 300), st.integers(1, 40))
@example(1, 8)
@example(17, 8)
@example(16, 8)
def test_each_token_is_a_target_exactly_once(n, seq_len):
    """全部行接起来，输入是第 0、1、2……个词元，目标正好晚一个；末行不满处不算，也不漏。"""
    tokens = (np.arange(n) % 21000 + 5).astype(np.uint16)
    batches = PretrainBatches(tokens, seq_len)
    ids, targets, positions, segments = batches.get(range(batches.n_rows))
    assert positions is None and segments is None
    assert ids.shape == targets.shape == (batches.n_rows, seq_len)
    valid = (targets != IGNORE).flatten()
    assert targets.flatten()[valid].tolist() == tokens[1:].tolist()
    assert ids.flatten()[valid].tolist() == tokens[:-1].tolist()
    assert valid[: n - 1].all() and not valid[n - 1 :].any()  # 只有最末尾是空的
    assert batches.n_rows == 1 or valid[-seq_len:].any()  # 没有空行
    assert ids.min() >= 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 20))
@example([9], 4)
def test_isolated_documents_use_the_same_tokens(values, seq_len):
    """互相看不见的只是别的文档：词元与目标不变，每篇（或一行里剩下的半篇）位置从 0 数起。"""
    begin, tokens = 5, np.array(values, np.uint16)
    plain = PretrainBatches(tokens, seq_len)
    batches = PretrainBatches(tokens, seq_len, document_start=begin)
    rows = range(batches.n_rows)
    assert batches.n_rows == plain.n_rows
    assert torch.equal(batches.get(rows).ids, plain.get(rows).ids)
    assert torch.equal(batches.get(rows).targets, plain.get(rows).targets)
    ids, _, positions, segments = (x.tolist() for x in batches.get(rows))
    for row, places, parts in zip(ids, positions, segments, strict=True):
        for i in range(1, seq_len):
            new = row[i] == begin
            assert places[i] == (0 if new else places[i - 1] + 1)
            assert (parts[i] == parts[i - 1]) == (not new)
        assert places[0] == 0
        assert parts == sorted(parts)  # 段号不会用第二次


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 20), st.integers(0, 9))
@example([1], 4, 0)
@example([5, 1], 5, 0)
@example([41, 3], 20, 0)
def test_whole_documents_lose_no_token_and_are_not_cut(lengths, seq_len, seed):
    """每个词元恰好作一次目标，前文与原来的一样，直到这篇的开头；只有比一行还长的才切开。"""
    starts = np.cumsum([0, *lengths])
    tokens = (np.arange(starts[-1]) + 5).astype(np.uint16)  # 各不相同
    batches = DocumentBatches(tokens, starts, seq_len, seed)
    ids, targets, positions, segments = (x.numpy() for x in batches.get(range(batches.n_rows)))
    real = targets != IGNORE
    assert sorted(targets[real]) == tokens[1:].tolist()
    assert (targets[real] == ids[real] + 1).all()
    assert (real == (segments >= 0)).all()
    document = np.searchsorted(starts, ids - 5, side="right") - 1  # 每个词元属于哪一篇
    place = ids - 5 - starts[document]  # 是这篇的第几个
    assert (positions[real] == (place % seq_len)[real]).all()
    for row in range(batches.n_rows):
        parts = segments[row][real[row]]
        assert (np.diff(parts) >= 0).all()
        for part in set(parts.tolist()):
            here = segments[row] == part
            assert len(set(document[row][here])) == 1
            left = lengths[document[row][here][0]] - place[row][here][0]
            last = document[row][here][0] == len(lengths) - 1
            assert here.sum() == min(seq_len, left - last)
    if max(lengths) <= seq_len and sum(lengths) > 1:  # 挤得下就不多占：至少一半是满的
        assert batches.n_rows <= 2 * -(-(sum(lengths) - 1) // seq_len)


def test_the_configuration_decides_how_rows_are_made():
    """首尾相接的，切开但互相看不见的，整篇的：三种写法各得一种。"""
    tokens = np.array([TOKENIZER.bos_id, *TOKENIZER.encode("一二三")] * 4, np.uint16)
    data = SimpleNamespace(tokens={"val": tokens}, starts={"val": np.arange(0, 17, 4)})
    made = {
        (isolated, whole): pretrain_batches(
            data, "val", Config(seq_len=6, isolate_documents=isolated, whole_documents=whole),
            TOKENIZER,
        )
        for isolated in (False, True) for whole in (False, True)
    }  # fmt: skip
    assert [type(x) for x in made.values()] == [PretrainBatches] * 3 + [DocumentBatches]
    assert made[False, True].get([0]).segments is None
    assert made[True, False].get([0]).segments is not None


def test_another_seed_trains_on_other_rows_but_is_examined_on_the_same():
    """检验常只取开头若干行：种子不同的几次要比得，取的就得是同样的几篇。"""
    starts = np.cumsum([0, *np.random.default_rng(0).integers(2, 12, 60)])
    tokens = (np.arange(starts[-1]) + 5).astype(np.uint16)
    data = SimpleNamespace(tokens=dict.fromkeys(SIDES, tokens), starts=dict.fromkeys(SIDES, starts))

    def rows(side: str, seed: int) -> list:
        config = Config(seq_len=16, isolate_documents=True, whole_documents=True, seed=seed)
        return pretrain_batches(data, side, config, TOKENIZER).rows

    assert rows("val", 1) == rows("val", 2)
    assert rows("train", 1) != rows("train", 2)


def test_packing_never_changes_between_versions():
    """检查点里只存步数：几篇拼成一行的算法若变了，续训会重读一些，漏掉另一些。"""
    lengths = np.random.default_rng(3).integers(1, 9, 12)
    rows = pack(lengths, np.arange(12), 16, np.random.default_rng(42))
    assert rows == [[10, 2, 4, 9, 1, 8], [5, 7, 11], [0, 6, 3]]


def test_one_epoch_of_steps_is_every_token_once():
    """按步取，也是每个词元一遍恰好一次：包括最后不满的一行和跨过一遍结尾的一步。"""
    tokens = np.arange(1, 1000).astype(np.uint16)  # 各不相同
    batches = PretrainBatches(tokens, 16)
    assert batches.n_rows == 63
    seen, epochs, per_step = Counter(), 4, 9  # 63 = 7 步 × 9 行
    for step in range(epochs * 7):
        targets = batches.get(rows_of_step(step, per_step, batches.n_rows, seed=1)).targets
        seen.update(targets[targets != IGNORE].tolist())
        if (step + 1) % 7 == 0:
            assert seen == Counter(dict.fromkeys(tokens[1:].tolist(), (step + 1) // 7))


@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 2**63 - 1))
@example(5, 25, 42)
def test_order_is_a_pure_function_of_seed_and_step(n_rows, per_step, seed):
    """断点续训靠它：从任何一步开始都是同一个次序；每遍每行恰好一次。"""
    steps = [rows_of_step(step, per_step, n_rows, seed) for step in range(12)]
    dataset.row_order.cache_clear()
    for step in random.Random(seed).sample(range(12), 12):
        assert rows_of_step(step, per_step, n_rows, seed) == steps[step]
    rows = [row for step in steps for row in step]
    for epoch in range(len(rows) // n_rows):
        assert sorted(rows[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))
    assert all(len(step) == per_step for step in steps)


def test_each_epoch_and_each_seed_has_its_own_order():
    """每遍都重新打乱；换个种子又是另一个次序；行数再多也不是原样的次序。"""
    orders = [tuple(rows_of_step(epoch, 100, 100, seed)) for epoch in range(5) for seed in (0, 1)]
    assert len({*orders, tuple(range(100))}) == 11


def test_order_never_changes_between_versions():
    """检查点里只存步数：次序的算法若变了，续训会重读一些行、漏掉另一些。"""
    assert rows_of_step(0, 8, 8, seed=42) == list(np.random.default_rng([42, 0]).permutation(8))
    assert rows_of_step(1, 8, 8, seed=42) == list(np.random.default_rng([42, 1]).permutation(8))


# ---------- 4. 微调的批 ----------

Turns = list[tuple[str, list[int]]]


def sft_batches(conversations: list[Turns], seq_len: int, seed: int = 0, **rest) -> SFTBatches:
    """把几段对话（角色与编号）直接做成批，不经过文件。"""
    pieces = [[i for role, ids in turns for i in TOKENIZER.turn_ids(role, ids)]
              for turns in conversations]  # fmt: skip
    starts = np.cumsum([0, *map(len, pieces)])
    tokens = np.array([i for piece in pieces for i in piece], np.uint16)
    return SFTBatches(tokens, starts, seq_len, TOKENIZER, seed, **rest)


def test_supervised_tokens_one_by_one():
    """多轮对话里逐个写明：只学助手说的话和它的 <|im_end|>，提问、角色、开头标记都不学。"""
    texts = [("system", "简短。"), ("user", "你好"), ("assistant", "好！"),
             ("user", "再"), ("assistant", "见")]  # fmt: skip
    batches = sft_batches([[(role, TOKENIZER.encode(text)) for role, text in texts]], seq_len=24)
    ids, targets, positions, segments = (x[0].tolist() for x in batches.get([0]))
    assert batches.n_rows == 1
    expected = [  # (看到的, 要猜的)
        ("<|im_start|>", None), ("<|system|>", None), ("简", None), ("短", None), ("。", None),
        ("<|im_end|>", None), ("<|im_start|>", None), ("<|user|>", None), ("你", None),
        ("好", None), ("<|im_end|>", None), ("<|im_start|>", None), ("<|assistant|>", "好"),
        ("好", "！"), ("！", "<|im_end|>"), ("<|im_end|>", None), ("<|im_start|>", None),
        ("<|user|>", None), ("再", None), ("<|im_end|>", None), ("<|im_start|>", None),
        ("<|assistant|>", "见"), ("见", "<|im_end|>"),
    ]  # fmt: skip
    n = len(expected)
    assert [name_of(i) for i in ids[:n]] == [seen for seen, _ in expected]
    assert [None if t == IGNORE else name_of(t) for t in targets[:n]] == [t for _, t in expected]
    assert targets[n:] == [IGNORE] * (24 - n)
    assert positions[:n] == list(range(n))
    assert segments == [0] * n + [-1] * (24 - n)


def test_tool_results_are_read_not_learned():
    """工具给出的结果是看的，不是学着编的；助手的调用要学。"""
    texts = [("user", "天气"), ("assistant", "查"), ("tool", "晴"), ("assistant", "晴。")]
    batches = sft_batches([[(role, TOKENIZER.encode(text)) for role, text in texts]], seq_len=32)
    targets = batches.get([0]).targets
    learned = [name_of(t) for t in targets[targets != IGNORE].tolist()]
    assert learned == ["查", "<|im_end|>", "晴", "。", "<|im_end|>"]


def test_positions_restart_and_segments_differ():
    """同一行里的两段对话各从位置 0 数起，各有各的段号。"""
    batches = sft_batches([[("user", [700]), ("assistant", [701])]] * 2, seq_len=15)
    assert batches.n_rows == 1
    batch = batches.get([0])
    assert batch.positions[0].tolist() == [*range(7), *range(7), 0]
    first, second, pad = batch.segments[0].tolist()[0::7]
    assert batch.segments[0].tolist() == [first] * 7 + [second] * 7 + [pad]
    assert len({first, second, pad}) == 3


words = st.lists(st.integers(670, 21127), max_size=8)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), words),
                 min_size=1, max_size=6)  # fmt: skip


def expected_slots(conversation: Turns, seq_len: int) -> list[tuple[int, int]]:
    """照规则笨拙地写一遍：每格 (看到的, 要猜的或 IGNORE)，截到 seq_len 格。"""
    ids, learned = [], []
    for role, words in conversation:
        ids += TOKENIZER.turn_ids(role, words)
        learned += [False, False] + [role == "assistant"] * (len(words) + 1)
    targets = [t if learn else IGNORE for t, learn in zip(ids, learned, strict=True)]
    return list(zip(ids[:-1], targets[1:], strict=True))[:seq_len]


@given(st.lists(turns, min_size=1, max_size=6), st.integers(2, 40), st.integers(0, 9))
@example([[("user", [700] * 8), ("assistant", [701])]], 12, 0)
@example([[("assistant", [])]], 2, 0)
def test_any_conversations_become_exactly_their_slots(conversations, seq_len, seed):
    """任意的对话、任意的行长：每段恰好出现一次，截在末尾，只学该学的，每行都有东西可学。"""
    slots = [expected_slots(c, seq_len) for c in conversations]
    usable = [s for s in slots if any(target != IGNORE for _, target in s)]
    if not usable:
        with pytest.raises(UserError, match="seq_len"):
            sft_batches(conversations, seq_len, seed)
        return
    batches = sft_batches(conversations, seq_len, seed)
    assert batches.skipped == len(slots) - len(usable)
    found = []
    batch = batches.get(range(batches.n_rows))
    for ids, targets, positions, segments in zip(*(x.tolist() for x in batch), strict=True):
        assert any(t != IGNORE for t in targets)
        n = sum(s >= 0 for s in segments)
        assert segments[n:] == [-1] * (seq_len - n)
        assert set(targets[n:]) <= {IGNORE}
        assert segments[:n] == sorted(segments[:n])
        for segment in sorted(set(segments[:n])):
            here = [i for i in range(n) if segments[i] == segment]
            found.append([(ids[i], targets[i]) for i in here])
            assert [positions[i] for i in here] == list(range(len(here)))
    assert sorted(found) == sorted(usable)


def test_too_long_conversations_are_cut_at_the_end():
    """太长的对话保留开头：问题还在，学的是回答的前一段；轮不到回答的整段不用，并且计数。"""
    long_answer = [("user", [700, 701]), ("assistant", list(range(1000, 1100)))]
    long_question = [("user", list(range(2000, 2100))), ("assistant", [702])]
    batches = sft_batches([long_answer, long_question], seq_len=16)
    batch = batches.get(range(batches.n_rows))
    assert (batches.n_rows, batches.cut, batches.skipped) == (1, 1, 1)
    assert batch.ids[0].tolist()[2:4] == [700, 701]
    targets = batch.targets[0].tolist()
    assert targets == [IGNORE] * 6 + list(range(1000, 1010))
    with pytest.raises(UserError, match="seq_len"):
        sft_batches([long_question], seq_len=16)


LONG = [  # 到助手开口为止：100 + 5 与 200 + 5 个词元
    [("user", [2000] * 100), ("assistant", [702])],
    [("user", [2000] * 200), ("assistant", [702])],
]


@pytest.mark.parametrize(
    "max_len, side, advice",
    [
        (512, "train", "请加上 --seq_len 512（模型最多看这么多），用得上 2 段"),
        (150, "val", "请加上 --seq_len 150（模型最多看这么多），用得上 1 段"),
        (64, "train", "而模型最多看 64 个，调大 seq_len 也没有用；请缩短提问，或换一个"),
        (64, "train", "预训练时加上 --max_len 256 --seq_len 256，微调时加上 --seq_len 256"),
        (64, "val", "请缩短提问，或调大 --val_fraction 多留出几段，或换一个"),
        (None, "train", "；请缩短提问"),
    ],
)  # fmt: skip
def test_why_nothing_fits_and_what_really_helps(max_len, side, advice):
    """从前总是叫人调大 --seq_len，调大了又说超过 max_len，再调大 max_len 又说去掉它。"""
    with pytest.raises(UserError) as error:
        sft_batches(LONG, 32, max_len=max_len, side=side)
    said = str(error.value)
    assert said.startswith(
        {"train": "训练的", "val": "留出的"}[side]
        + " 2 段对话，没有一段在 32 个词元（seq_len）之内轮到助手说话："
        "到那里最短的要 105 个词元，最长的 205 个"
    )
    assert advice in said


@given(st.integers(1, 60), st.integers(2, 80))
def test_the_advice_is_the_least_that_helps(question, seq_len):
    """说的长度恰好够用：少一个也不行。"""
    conversation = [[("user", [700] * question), ("assistant", [701])]]
    needed = question + 5
    if seq_len >= needed:
        assert sft_batches(conversation, seq_len).n_rows == 1
        return
    with pytest.raises(UserError, match=f"最短的要 {needed} 个词元"):
        sft_batches(conversation, seq_len)


def test_a_conversation_without_an_answer_has_nothing_to_learn():
    with pytest.raises(UserError, match="训练的对话里没有一句助手的话"):
        sft_batches([[("user", [700])]], 32, max_len=64)


def test_packed_conversations_do_not_see_each_other():
    """换掉同一行里的一段对话，另一段的打分一位不变；并且与它独占一行时相同。"""
    torch.manual_seed(0)
    config = Config(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, max_len=32)
    model = Transformer(config).requires_grad_(False)
    for parameter in model.parameters():  # 刚出生的支路都是零，看不出谁看得见谁
        torch.nn.init.normal_(parameter, std=0.3)
    a = [("user", [700, 701]), ("assistant", [702, 703])]
    b, c = ([("user", [w]), ("assistant", [w, w + 1])] for w in (800, 900))

    def scores(*conversations: Turns) -> dict[int, torch.Tensor]:
        """{每段的第一个提问词: 这一段的打分}"""
        batches = sft_batches(list(conversations), seq_len=20)
        assert batches.n_rows == 1
        batch = batches.get([0])
        logits = model(batch.ids, batch.positions, batch.segments)[0]
        parts = [batch.segments[0] == s for s in range(len(conversations))]
        return {int(batch.ids[0][part][2]): logits[part] for part in parts}

    with_b, with_c = scores(a, b), scores(a, c)
    assert torch.equal(with_b[700], with_c[700])
    torch.testing.assert_close(with_b[700], scores(a)[700])
    torch.testing.assert_close(with_b[800], scores(b)[800])
    assert not torch.allclose(with_b[800], with_c[900])  # 换掉的确实变了


# ---------- 5. 装箱 ----------


@given(st.lists(st.integers(1, 64), min_size=1, max_size=300), st.integers(64, 100),
       st.integers(0, 2**32 - 1))  # fmt: skip
@settings(max_examples=200)
def test_pack_uses_each_item_once_and_never_overflows(lengths, capacity, seed):
    """漏一段就少学一段，多一段就学两遍，超出一格就盖掉别人的词元。"""
    lengths = np.array(lengths)
    items = np.flatnonzero(np.arange(len(lengths)) % 7 != 6)  # 不是每一段都用
    assume(len(items))
    rows = pack(lengths, items, capacity, np.random.default_rng(seed))
    assert sorted(i for row in rows for i in row) == items.tolist()
    assert all(row and lengths[row].sum() <= capacity for row in rows)
    loads = sorted(int(lengths[row].sum()) for row in rows)
    assert len(rows) == 1 or loads[0] + loads[1] > capacity  # 没有两行能并成一行
    assert rows == pack(lengths, items, capacity, np.random.default_rng(seed))  # 可重现


def test_pack_differs_by_seed_and_is_shuffled():
    """从长到短装，但行的次序要打乱，否则一步里全是长的。"""
    lengths = np.arange(1, 65).repeat(4)
    items = np.arange(len(lengths))
    rows = [pack(lengths, items, 64, np.random.default_rng(seed)) for seed in (0, 1)]
    assert rows[0] != rows[1]
    firsts = [max(lengths[row]) for row in rows[0]]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


# ---------- 6. 内置语料 ----------


def questions_and_answers(file: TokenFile, side: str, tokenizer: Tokenizer):
    """每段对话的第一句提问与最后一句回答，编号的字节串；比解码十万段快得多。"""
    tokens, starts = np.asarray(file.tokens[side]), file.starts[side]
    first_end = np.flatnonzero(tokens == tokenizer.eos_id)
    first_end = first_end[np.searchsorted(first_end, starts[:-1])]
    last_start = np.flatnonzero(tokens == tokenizer.bos_id)
    last_start = last_start[np.searchsorted(last_start, starts[1:]) - 1]
    questions = {tokens[s + 2 : e].tobytes() for s, e in zip(starts[:-1], first_end, strict=True)}
    answers = {tokens[s + 2 : e - 1].tobytes()
               for s, e in zip(last_start, starts[1:], strict=True)}  # fmt: skip
    return questions, answers


def as_bytes(texts: list[str], tokenizer: Tokenizer) -> list[bytes]:
    return [ids.tobytes() for ids in tokenizer.encode_batch(texts)]


@pytest.fixture(scope="module")
def held_out_words(builtin_pretrain, tokenizer) -> list[str]:
    """预训练里留出检验的成语；含有 [UNK] 的认不出是哪个，不算。"""
    words = [d.split("：")[0] for d in documents_of(builtin_pretrain, "val", tokenizer)]
    return [word for word in words if "[UNK]" not in word]


def test_held_out_idioms_are_not_pretrained(builtin_pretrain, tokenizer, held_out_words):
    """每条成语只在一边，加起来一条不少；留出的约占百分之三。"""
    trained = {d.split("：")[0] for d in documents_of(builtin_pretrain, "train", tokenizer)}
    assert not trained & set(held_out_words)
    card = builtin_pretrain.card
    assert card["train_documents"] + card["val_documents"] == 30895
    assert 0.025 < card["val_documents"] / 30895 < 0.035
    assert len(held_out_words) > 800


def test_held_out_idioms_are_not_fine_tuned(builtin_sft, tokenizer, held_out_words):
    """预训练里留出的成语，微调里一个问题、一个答案都不许出现；不然检验的就是记性。"""
    train_questions, train_answers = questions_and_answers(builtin_sft, "train", tokenizer)
    val_questions, val_answers = questions_and_answers(builtin_sft, "val", tokenizer)
    templates = idioms.MEANING + idioms.ORIGIN + idioms.EXAMPLE
    asked = as_bytes([t.format(w) for w in held_out_words for t in templates], tokenizer)
    named = as_bytes([f"{w}。" for w in held_out_words], tokenizer)
    assert not train_questions & set(asked)
    # 诚至金开的释义就是「精诚所至，金石为开。」：别条的释义、例句恰好是一条成语，实测 3 条
    assert len(train_answers & set(named)) <= 3
    assert len(set(named) & val_answers) > 500  # 问法认对了：检验那边有（连问的在中间，不算）
    assert len(val_questions & set(asked)) > len(held_out_words)


def test_greetings_are_fine_tuned(builtin_sft, tokenizer):
    """用户的第一句话多半是你好；这几句不能碰巧被留出去检验。"""
    questions, answers = questions_and_answers(builtin_sft, "train", tokenizer)
    first = ["你好", "谢谢", "再见", "你是谁？", "你叫什么名字？", "你会什么？"]
    assert set(as_bytes(first, tokenizer)) <= questions
    replies = [answer for question, answer in idioms.GREETINGS if question in first]
    assert set(as_bytes(replies, tokenizer)) <= answers


def test_unknown_rate_of_the_builtin_corpus(builtin_pretrain, builtin_sft):
    """补上标点之后，认不得的字不到千分之八（不补是百分之二点三）。"""
    assert 0 < builtin_pretrain.card["unk_rate"] < 0.008
    assert 0 < builtin_sft.card["unk_rate"] < 0.008
    assert builtin_pretrain.card["bad_rows"] == builtin_sft.card["bad_rows"] == 0


def test_builtin_corpus_is_reused(builtin_pretrain, builtin_config, tokenizer, capsys):
    """内置语料准备一次就够。"""
    again = tokenize_corpus("builtin", "pretrain", tokenizer, builtin_config)
    assert again.card == builtin_pretrain.card
    assert "沿用" in capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("side", SIDES)
def test_packing_wastes_less_than_three_percent(builtin_sft, tokenizer, preset, side):
    """填充也要花时间算；真实的对话装箱后，至少 97% 的格子是真的。每段都恰好装进一次。"""
    seq_len = PRESETS[preset]["seq_len"]
    tokens, starts = builtin_sft.tokens[side], builtin_sft.starts[side]
    batches = SFTBatches(tokens, starts, seq_len, tokenizer, seed=42)
    packed = sorted(i for row in batches.rows for i in row)
    assert len(packed) == len(set(packed)) == len(starts) - 1 - batches.skipped
    real = np.minimum(np.diff(starts) - 1, seq_len)[packed].sum()
    assert real / (batches.n_rows * seq_len) >= 0.97
    sample = batches.get(range(0, batches.n_rows, max(1, batches.n_rows // 200)))
    assert (sample.segments >= 0).double().mean() >= 0.97
    assert (sample.targets != IGNORE).any(1).all()  # 没有一行无话可学


def test_supervised_tokens_are_as_many_as_the_card_says(builtin_sft, tokenizer):
    """检验的损失除以卡片上的数目：数错了，比特数就错了。"""
    tokens, starts = builtin_sft.tokens["val"], builtin_sft.starts["val"]
    batches = SFTBatches(tokens, starts, int(np.diff(starts).max()), tokenizer, seed=42)
    targets = batches.get(range(batches.n_rows)).targets
    assert int((targets != IGNORE).sum()) == builtin_sft.card["val_targets"]
