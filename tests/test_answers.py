"""量回答、量文字、与别人比：量的正是它说的那样，算得出的数都与手算的相同。"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import LITTLE, QUICK, run
from torch import nn

from config import Config, UserError
from engine.checkpoint import read, write
from generate import Sampling, make_speaker
from model import Transformer
from tokenizer import Tokenizer
from tools.bench.peers import others, racing
from tools.lab import answers, gallery, night, prose, talks
from tools.lab.answers import (
    Given,
    Reply,
    on_the_subject,
    plus_minus,
    ranks,
    ratio,
    share,
    surprise,
)
from tools.lab.prose import by_source, evenly, read_texts
from tools.lab.talks import Turn, before, choose, held_out, in_file

TOKENIZER = Tokenizer()
VOCAB = 21248


@pytest.fixture(scope="module")
def speaker():
    """说话没有道理的小模型：考的是量法，不是它。"""
    torch.manual_seed(0)
    config = Config(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, max_len=64,
                    n_experts=0, n_active=0, residual_lr_scale=1.0)  # fmt: skip
    model = Transformer(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return make_speaker(model, config, TOKENIZER, "sft")


def talk(*texts: str) -> list[Turn]:
    """一问一答，轮着来。"""
    roles = ("user", "assistant") * len(texts)
    return [Turn(r, t, TOKENIZER.encode(t)) for r, t in zip(roles, texts, strict=False)]


# ---------- 多意外 ----------


def test_surprise_is_the_sum_over_the_answer_alone(speaker):
    given = [
        Given(TOKENIZER.question_ids(q), [*TOKENIZER.encode(a), TOKENIZER.eos_id])
        for q, a in (("你好？", "你好。"), ("一", "二三四五六"), ("问得长一些吗？", "是"))
    ]
    for one, found in zip(given, surprise(speaker, given), strict=True):
        logits = speaker.model(torch.tensor([one.context + one.answer]))[0].log_softmax(-1)
        at = range(len(one.context) - 1, len(one.context) + len(one.answer) - 1)
        by_hand = -sum(logits[i, t].item() for i, t in zip(at, one.answer, strict=True))
        assert found == pytest.approx(by_hand, rel=1e-4)


def test_each_turn_is_counted_once_and_what_does_not_fit_is_left_out(speaker):
    talks = [talk("一", "二三", "四", "五"), talk("六", "七"), talk("八", "九" * 80)]
    found, too_long = answers.per_character(speaker, talks)
    assert [n for _, n in found["第 1 轮"]] == [2, 1]  # 第三段装不进 64 个词元
    assert too_long == 1
    assert [n for _, n in found["第 2 轮"]] == [1]
    assert sum(nats for nats, _ in found["全部"]) == pytest.approx(
        sum(nats for name in ("第 1 轮", "第 2 轮") for nats, _ in found[name])
    )


def test_the_later_turns_of_one_conversation_are_one_sample(speaker):
    """同一段的几轮不是互相独立的：分开算，误差就显得小。"""
    found, _ = answers.per_character(speaker, [talk(*"一二三四五六七八九十甲乙")])
    assert list(found) == ["全部", "第 1 轮", "第 2 轮", "第 3 轮", "第 4 轮起"]
    assert [n for _, n in found["第 4 轮起"]] == [3]
    assert [n for _, n in found["全部"]] == [6]


def test_the_error_of_a_ratio_and_of_a_share():
    rng = np.random.default_rng(0)
    ratios, claimed = [], []
    for _ in range(400):
        n = rng.integers(5, 50, 100)
        value, error = ratio([(x, int(y)) for x, y in zip(2 * n + rng.normal(0, 5, 100), n,
                                                          strict=True)])  # fmt: skip
        ratios.append(value)
        claimed.append(error)
    assert np.mean(ratios) == pytest.approx(2, abs=0.01)
    assert np.mean(claimed) == pytest.approx(np.std(ratios), rel=0.15)
    assert share([True] * 3 + [False])[0] == 0.75
    assert 0 < share([True] * 150)[1] < 0.02  # 全对，也不是一点误差没有
    assert ratio([(6.0, 3)]) == (2.0, None)  # 只有一个样本：看不出误差，不是没有误差
    assert (plus_minus(2.0, None), plus_minus(2.0, 0.5)) == ("2.000", "2.000 ± 0.500")


# ---------- 认得出 ----------


def test_a_model_that_knows_the_answers_recognises_them(speaker, monkeypatch):
    talks = [talk(f"问{c}", f"{c}" * 6) for c in "一二三四五六七八九十百千"]

    def knows(_, given):
        """提问里的字，回答里也有的，更可能。"""
        return [(1.0 if set(g.context) & set(g.answer[:1]) else 3.0) * len(g.answer) for g in given]

    monkeypatch.setattr(answers, "surprise", knows)
    assert set(ranks(speaker, talks, 1)["平均概率"]) == {1}
    assert set(ranks(speaker, talks, 1)["提问添的"]) == {1}

    def fluent(_, given):
        """只看顺不顺，不看提问。"""
        return [float(g.answer[0] % 97) * len(g.answer) for g in given]

    monkeypatch.setattr(answers, "surprise", fluent)
    found = ranks(speaker, talks, 1)
    assert len(set(found["平均概率"])) > 3
    assert set(found["提问添的"]) == {10}  # 提问什么也没有添：都一样，不算认出


def test_chance_is_one_in_ten(speaker, monkeypatch):
    rng = np.random.default_rng(3)
    monkeypatch.setattr(answers, "surprise", lambda _, given: rng.random(len(given)).tolist())
    talks = [talk(f"第{n}问", f"第{n}答") for n in range(600)]
    for places in ranks(speaker, talks, 1).values():
        assert sum(place == 1 for place in places) / 600 == pytest.approx(0.1, abs=0.04)


# ---------- 自己答 ----------


def test_what_a_reply_is_called():
    assert Reply("", "今天天气很好", True, False).chinese
    assert Reply("", "用 Python 写：你好世界，一二三四五六", True, False).chinese
    assert Reply("", "boolean块可以直接与非boolean变量进行比较。", True, False).chinese
    assert not Reply("", "ありがとうございます", True, False).chinese
    assert not Reply("", "Hello world", True, False).chinese
    assert not Reply("", "", True, False).chinese and not Reply("", "123。", True, False).chinese


def test_words_shared_with_the_question_and_with_another():
    written = [
        Reply("北京烤鸭怎么做", "烤鸭要挂炉", True, False),
        Reply("怎么养猫", "养花要浇水", True, False),
        Reply("怎么浇水", "浇水不要多", True, False),
        Reply("怎么种树", "怎么都行", True, False),  # 「怎么」到处都有，不算
    ]
    own, other = on_the_subject(written)
    assert own == [True, False, True, False]
    assert other == [False, True, False, False]  # 第二个答的是第三个问的


def test_a_reply_that_goes_round_is_stopped(speaker, monkeypatch):
    ids = TOKENIZER.encode("要多喝水。")
    choices = [SimpleNamespace(token=i) for i in ids * 20]
    monkeypatch.setattr(type(speaker), "choices", lambda *_: iter(choices))
    one = answers.reply(speaker, [1], "问", Sampling())
    assert one.loops and not one.ended and len(one.text) < 30
    choices[3].token = TOKENIZER.eos_id
    one = answers.reply(speaker, [1], "问", Sampling())
    assert (one.text, one.ended, one.loops) == ("要多喝", True, False)


def test_the_third_turn_follows_its_own_two_answers(speaker, monkeypatch):
    asked = []

    def echo(_, ids, question, sampling):
        asked.append(TOKENIZER.decode(ids))
        return Reply(question, f"答{len(asked)}", True, False)

    monkeypatch.setattr(answers, "reply", echo)
    talks = [talk("甲？", "乙", "丙？", "丁", "戊？", "己"), talk("只有一问？", "答")]
    (one,), _ = answers.third_replies(speaker, talks, answers.Options())
    assert asked == ["甲？", "甲？答1丙？", "甲？答1丙？答2戊？"]
    assert (one.question, one.text) == ("甲？丙？戊？", "答3")
    told = [Turn("system", "你是店员", TOKENIZER.encode("你是店员")), *talks[0]]
    answers.third_replies(speaker, [told], answers.Options())
    assert asked[3] == "你是店员甲？"  # 开头的那一段，三问之前都有


def test_long_answers_of_its_own_make_it_forget_not_drop_out(speaker, monkeypatch):
    """话多的模型，写满了上下文的那几段也要量：与聊天时一样，忘掉最早的一轮。"""
    asked = []

    def talkative(_, ids, question, sampling):
        asked.append(TOKENIZER.decode(ids))
        return Reply(question, "长" * 30, True, False)

    monkeypatch.setattr(answers, "reply", talkative)
    talks = [
        talk("甲？", "乙", "丙？", "丁", "戊？", "己"),
        talk("甲？", "乙", "三" * 80, "丁", "戊", "己"),
    ]
    found, too_long = answers.third_replies(speaker, talks, answers.Options())
    assert asked[:3] == ["甲？", "甲？" + "长" * 30 + "丙？", "丙？" + "长" * 30 + "戊？"]
    assert (len(found), too_long) == (1, 1)  # 一问就太长的，数出来


def test_what_does_not_fit_is_said_not_silently_left_out(speaker, monkeypatch):
    """两轮回答、一个提问装不进 64 个词元；全都装不进，也不出错。"""
    monkeypatch.setattr(answers, "reply", lambda *_: Reply("问", "答", True, False))
    talks = [talk(f"第{n}问", f"第{n}答") for n in range(8)]
    talks += [talk("一", "二" * 80), talk("三" * 80, "四")]
    found = answers.measure(speaker, talks, answers.Options())
    *_, last = answers.sentences(found)
    assert last == "  （装不进上下文，没有量：2 轮回答的多意外，1 个提问的回答）"
    talks = [talk(f"第{n}问", "答") for n in range(9)] + [talk("一", "二", "三", "四", "五", "六")]
    numbers = answers.measure(speaker, talks, answers.Options())["numbers"]
    third = [name for name in numbers if "第 3 轮（1 段）" in name]
    assert third and not any("配错" in name for name in third)  # 只有一个，没有别的提问可配
    found = answers.measure(speaker, [talk("问", "长" * 80)] * 10, answers.Options())
    assert not any(name.startswith("多意外") for name in found["numbers"])


def test_conversations_named_by_a_stranger_are_not_read(speaker, monkeypatch, tmp_path):
    """检查点里记着的路径在外面：不照办，说怎样才算答应。"""
    theirs = SimpleNamespace(tokenizer=TOKENIZER, config=Config(sft_data="/etc/passwd"))
    monkeypatch.setattr(talks, "tokenize_corpus", lambda *_: pytest.fail("读了"))
    with pytest.raises(UserError, match=r"/etc/passwd 在项目.*--sft_data /etc/passwd"):
        next(held_out(theirs, "data"))


def test_the_program_measures_its_own_held_out_conversations_and_a_file(little, tmp_path):
    (tmp_path / "data").symlink_to(little / "data")
    checkpoint = str(little / "out/tiny/sft.pt")
    flags = ["--checkpoint", checkpoint, "--n", "12", "--max", "8", "--show", "2"]
    out, _ = run(tmp_path, "tools.lab.answers", *flags, "--json", "a.json")
    assert "12 段对话" in out and out.count("问：") == 2
    report = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    numbers = report["numbers"]
    assert numbers["多意外（全部）"][0] > 1 and len(report["replies"]) >= 12
    for name in ("写得完", "不反复", "是中文", "认得出（平均概率）", "认得出（提问添的）"):
        assert 0 <= numbers[name][0] <= 1 and numbers[name][1] > 0
    rows = [{"instruction": f"第{n}问？", "output": f"第{n}答。"} for n in range(11)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "my.jsonl").write_text(lines, encoding="utf-8")
    again = [*flags, "--data", "my.jsonl"]
    out, _ = run(tmp_path, "tools.lab.answers", *again)
    assert "11 段对话" in out
    assert run(tmp_path, "tools.lab.answers", *again)[0] == out  # 同样的种子，一字不差
    (tmp_path / "my.jsonl").write_text("\n".join(lines.split("\n")[:5]), encoding="utf-8")
    _, err = run(tmp_path, "tools.lab.answers", *again, code=2)
    assert "先问后答的对话只有 5 段，至少要 10 段" in err
    _, err = run(tmp_path, "tools.lab.answers", "--n", "9", code=2)
    assert "--n 至少是 10" in err


def test_turns_come_back_from_the_token_file_as_they_went_in(little, speaker):
    config = Config(sft_data="builtin", val_fraction=0.03)
    there = SimpleNamespace(tokenizer=TOKENIZER, config=config)
    first = next(held_out(there, str(little / "data")))
    assert [turn.role for turn in first][:2] == ["user", "assistant"]
    assert all(TOKENIZER.encode(turn.text) == turn.ids for turn in first)
    assert before(first, 1, there) == TOKENIZER.question_ids(first[0].text)


def test_choosing_is_the_same_for_the_same_seed(tmp_path, speaker):
    talks = [talk(f"第{n}问", f"第{n}答") for n in range(30)] + [talk("没有答")]
    assert choose(talks, 10, 10, 1) == choose(talks, 10, 10, 1) != choose(talks, 10, 10, 2)
    assert len(choose(talks, 99, 10, 1)) == 30
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "问", "output": "答"}\n{"x": 1}\n', encoding="utf-8")
    assert [[t.text for t in one] for one in in_file(TOKENIZER, str(path))] == [["问", "答"]]


# ---------- 文字 ----------


def test_bits_count_every_character_even_lost_ones(speaker):
    (plain,), (lost,) = (prose.bits_of(speaker)([text]) for text in ("天气很好", "天气很好\u200b"))
    assert lost == pytest.approx(plain + math.log2(0x110000), rel=1e-6)


def test_a_text_longer_than_the_context_is_refused(speaker):
    """只算装得下的，却除以全部的字数，会显得好。"""
    with pytest.raises(UserError, match="装得下 63 个"):
        prose.bits_of(speaker)(["".join(chr(0x4E00 + n) for n in range(64))])


def test_texts_are_read_cut_and_grouped(tmp_path, capsys):
    rows = [{"text": "长" * 500, "source": "甲"}, {"text": "短", "source": "乙"}, {"text": " "}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    texts = read_texts(str(path))
    assert "1 行没有文字" in capsys.readouterr().out
    assert [(len(t.text), t.source) for t in texts] == [(300, "甲"), (1, "乙")]
    assert len(read_texts(str(path), 1)) == 1
    grouped = by_source([("乙", 3.0, 1), ("甲", 600.0, 300)])
    assert list(grouped) == ["全部", "甲", "乙"] and len(grouped["全部"]) == 2
    path.write_text('{"x": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="没有文字"):
        read_texts(str(path))


def test_a_part_is_taken_evenly_from_the_whole():
    """文件常常按来源排好：不能只取前面的。"""
    assert evenly(range(150), 100)[-1] == 148 and len(evenly(range(150), 100)) == 100
    assert evenly(range(10), 3) == [0, 3, 6] and evenly("ab", 5) == ["a", "b"]


def test_the_prose_program(little, tmp_path):
    rows = [{"text": f"第{n}篇，天气很好。", "source": "甲乙"[n % 2]} for n in range(6)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "held.jsonl").write_text(lines, encoding="utf-8")
    checkpoint = ["--checkpoint", str(little / "out/tiny/pretrain.pt")]
    out, _ = run(tmp_path, "tools.lab.prose", "--data", "held.jsonl", *checkpoint)
    assert "6 篇的开头" in out and "甲（3 篇）" in out and "比特" in out
    _, err = run(tmp_path, "tools.lab.prose", *checkpoint, code=2)
    assert "--data" in err


# ---------- 别人 ----------


class Flat(others.Peer):
    """对谁都一视同仁的一方。"""

    def __init__(self):
        self.tokenizer, self.module = TOKENIZER, nn.Linear(1, 1)
        self.device = SimpleNamespace(place=torch.device("cpu"))

    def logits(self, ids):
        return torch.zeros(1, ids.size(1), VOCAB)


def test_an_even_handed_peer_needs_the_bits_of_the_vocabulary():
    found = Flat().bits(["天气很好", "天气很好\u200b"])
    assert found[0] == pytest.approx(4 * math.log2(VOCAB))
    assert found[1] == pytest.approx(found[0] + math.log2(0x110000))


def test_their_code_must_be_there(tmp_path):
    options = racing.Options(data="a", held_out="b", nanogpt=str(tmp_path), minimind="不在")
    nano, mini = options.problems()  # 都在开始练之前说
    assert f"找不到 {tmp_path / 'model.py'}" in nano and "model_minimind.py" in mini
    (tmp_path / "model.py").write_text("ANSWER = 42\n")
    assert others.their_module(tmp_path / "model.py").ANSWER == 42


def test_rows_of_the_padded_way_are_cut_and_filled():
    peer = others.MiniMind.__new__(others.MiniMind)
    peer.tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    peer.encode = lambda text: ([1, *range(10, 10 + len(text))], 0)
    with pytest.raises(UserError, match="语料只有 2 篇，一批要 3 篇"):
        next(peer.rows(["短", "长"], 3, seed=0))
    ids, targets = next(peer.rows(["短", "长" * 400], 2, seed=0))
    for row, target in zip(ids.tolist(), targets.tolist(), strict=True):
        n = sum(t >= 0 for t in target)
        assert row[:n] == target[:n] and row[0] == 1 and row[n - 1] == 2
        assert n in (3, others.MiniMind.LENGTH) and set(row[n:]) <= {0}


def test_peers_of_our_own_learn_and_are_measured(little, tmp_path):
    """Qwen3 真的练几秒；我们的走真的脚本。"""
    rows = [{"text": f"第{n}天，天气{'晴雨阴'[n % 3]}，读了{n % 7}页书。"} for n in range(60)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name in ("corpus.jsonl", "held.jsonl"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    options = racing.Options(data=str(tmp_path / "corpus.jsonl"), minutes=0.05,
                             held_out=str(tmp_path / "held.jsonl"),
                             data_dir=str(tmp_path / "data"))  # fmt: skip
    config = racing.settings_of(options)
    config.dim, config.n_layers, config.n_heads, config.n_kv_heads = 32, 1, 2, 1
    config.hidden_dim, config.compile, config.dtype = 48, False, "float32"
    peer = others.PlainQwen3(config, 0.03)
    texts = read_texts(options.held_out)
    before_ = racing.exam(texts, peer.bits)["bits"]
    steps, tokens = peer.train(5.0)
    assert steps > 1 and tokens <= steps * config.batch_size * config.seq_len
    assert racing.exam(texts, peer.bits)["bits"] < before_ - 0.3
    assert [name for name, _ in racing.turns(options)] == [
        "ours", "qwen3, lr 0.001", "qwen3, lr 0.002", "qwen3, lr 0.004",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "value"), [("rates", "快"), ("size", "256"), ("size", "0x4"), ("minutes", "0")]
)
def test_a_race_that_could_not_be_run_does_not_start(flag, value):
    options = racing.Options(data="a", held_out="b", **{flag: value})
    if flag == "minutes":
        options.minutes = 0.0
    (problem,) = options.problems()
    assert f"--{flag}" in problem


def test_results_of_other_settings_are_not_shown_as_these(little, tmp_path):
    (tmp_path / "peers.json").write_text('{"settings": {"preset": "wide"}}', encoding="utf-8")
    flags = ["--data", "a.jsonl", "--held_out", "b.jsonl", "--json", "peers.json"]
    _, err = run(tmp_path, "tools.bench", "peers", *flags, code=2)
    assert "照别的设置练的（preset 是 wide）" in err and "--json" in err
    _, err = run(tmp_path, "tools.bench", "peers", code=2)
    assert "--data" in err and "--held_out" in err


# ---------- 画廊，一个晚上 ----------


def test_the_gallery_answers_everything_once_and_the_same_again(little, tmp_path):
    flags = ["--checkpoint", str(little / "out/tiny/sft.pt"), "--max", "5", "--out", "g.md"]
    run(tmp_path, "tools.lab.gallery", *flags)
    text = (tmp_path / "g.md").read_text(encoding="utf-8")
    assert all(f"**{prompt}**" in text for prompt in gallery.PROMPTS)
    assert len(set(gallery.PROMPTS)) == 20 and "微调 12 步" in text
    run(tmp_path, "tools.lab.gallery", *flags)
    assert (tmp_path / "g.md").read_text(encoding="utf-8") == text
    flags[1] = str(little / "out/tiny/pretrain.pt")  # 只预训练过的，接着写
    out, _ = run(tmp_path, "tools.lab.gallery", *flags[:4])
    assert "预训练 24 步" in out


def test_a_night_trains_twice_measures_and_goes_on_where_it_was(little, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(little / "data")
    monkeypatch.setattr(gallery.Options, "max", 5)
    asked = []

    folder = tmp_path / "out/tiny-night"

    def quickly(command):
        """真的脚本，但只走两步，记成练满了那么多小时的。"""
        asked.append(command[1:])
        if "--resume" in command:
            return real(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        at = command.index("--hours")
        short = [*command[:at], "--max_steps", "2", *command[at + 2 :]]
        child = real(short, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert child.wait() == 0
        path = folder / ("pretrain.pt" if "pre_train" in command[1] else "sft.pt")
        checkpoint = read(path)
        steps = {"max_steps": None, "sft_max_steps": None}
        checkpoint["config"] |= {"hours": float(command[at + 1]), **steps}
        write(path, checkpoint)
        return child

    real = subprocess.Popen  # 程序是另外载入的一份，换得了的是它用的标准库
    monkeypatch.setattr(subprocess, "Popen", quickly)
    held = '{"text": "天气很好。"}\n{"text": "读书。"}\n'
    (tmp_path / "held.jsonl").write_text(held, encoding="utf-8")
    flags = ["--preset", "tiny", "--data", "builtin", "--sft_data", "builtin", "--n", "10",
             "--held_out", "held.jsonl", "--", *QUICK, *LITTLE]  # fmt: skip
    run(tmp_path, "tools.lab.night", *flags)
    page = (tmp_path / "out/tiny-night/night.md").read_text(encoding="utf-8")
    parts = (
        "pretrain.pt：没有学过的文字",
        "多意外（全部）",
        "预训练 2 步",
        "微调 2 步",
        "**你好**",
    )
    assert [part for part in parts if part not in page] == []
    assert "--replay" in asked[1] and "--replay_data" in asked[1]

    page_of_before = (tmp_path / "out/tiny-night/night.md").stat().st_mtime_ns
    run(tmp_path, "tools.lab.night", *flags)  # 再来一次：两个都练完了，一步也不多走，只再量一遍
    assert (tmp_path / "out/tiny-night/night.md").stat().st_mtime_ns > page_of_before
    assert all("--resume" in command for command in asked[2:]) and len(asked) == 4
    assert asked[3][asked[3].index("--init_from") + 1].endswith("pretrain.pt")

    def interrupted(command):
        """微调到一半，按了 Ctrl-C。"""
        asked.append(command[1:])
        code = 130 if "sft_train" in command[1] else 0
        return contextlib.nullcontext(SimpleNamespace(wait=lambda: code))

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    run(tmp_path, "tools.lab.night", *flags, "--batch_size", "4", code=130)
    for command in asked[4:]:  # 写在 -- 之后的，接着练时也作数
        assert "--resume" in command and "--batch_size" in command

    def memorised(command):
        """两个阶段都背了书：最好的一刻另存着，最后的比它差。"""
        child, stage = quickly(command), "pretrain" if "pre_train" in command[1] else "sft"
        child.wait()
        shutil.copy(folder / f"{stage}.pt", folder / f"{stage}.best.pt")
        return child

    for path in folder.glob("sft*.pt"):
        path.unlink()
    asked.clear()
    monkeypatch.setattr(subprocess, "Popen", memorised)
    run(tmp_path, "tools.lab.night", *flags)
    assert asked[1][asked[1].index("--init_from") + 1].endswith("pretrain.best.pt")
    page = (folder / "night.md").read_text(encoding="utf-8")
    assert re.findall(r"^- (.*)：没有学过的文字", page, re.M) == ["pretrain.best.pt", "sft.best.pt"]


def test_a_night_gives_each_stage_what_is_meant_for_it():
    """微调的命令行上 --lr 就是 --sft_lr：原样给两个，微调便用了预训练的学习率。"""
    more = ["--lr", "0.02", "--sft-lr=0.003", "--batch_size", "auto", "--no-compile",
            "--sft_prompt", "你好", "--no-keep_reasoning", "--prompt", "天气"]  # fmt: skip
    both = ["--batch_size", "auto", "--no-compile"]
    assert night.meant_for("pretrain", more) == ["--lr", "0.02", *both, "--prompt", "天气"]
    assert night.meant_for("sft", more) == [
        "--sft-lr=0.003", *both, "--sft_prompt", "你好", "--no-keep_reasoning",
    ]  # fmt: skip
    for flag in ("--hours", "--out-dir=x", "--replay_stage", "--plan"):
        with pytest.raises(UserError, match="不能写在 -- 之后"):
            night.meant_for("pretrain", ["--lr", "0.02", flag])


def test_a_night_does_not_put_an_old_fine_tuning_on_a_new_start(tmp_path, monkeypatch):
    """预训练改得长些，微调却是从先前的练起的：写出的就不是一个晚上的事。"""
    monkeypatch.setattr(night, "read", lambda path, mmap: {"config": {"hours": 6.0}})
    (tmp_path / "pretrain.pt").touch()
    night.check_start(tmp_path, 8.0)  # 还没有微调过
    (tmp_path / "sft.pt").touch()
    night.check_start(tmp_path, 6.0)
    with pytest.raises(UserError, match=r"不是预训练 8 小时的；请用 --out_dir"):
        night.check_start(tmp_path, 8.0)
    monkeypatch.setattr(night, "read", lambda path, mmap: {"config": {}})  # 从前写的，没有这一项
    with pytest.raises(UserError, match="不是预训练 6 小时的"):
        night.check_start(tmp_path, 6.0)
    monkeypatch.undo()
    night.check_start(tmp_path, 6.0)  # 空的文件：由训练脚本去说，去用前一个
    (tmp_path / "pretrain.pt").unlink()
    with pytest.raises(UserError, match="sft"):
        night.check_start(tmp_path, 6.0)


def test_a_night_with_too_few_conversations_still_writes_the_rest(little, monkeypatch):
    """练了几个小时，不能因为留出的对话不够，连文章的数也不写。"""
    monkeypatch.setattr(night, "held_out", lambda *_: iter([]))
    monkeypatch.setattr(night.gallery, "page", lambda *_: ["画廊"])
    options = night.Options(preset="tiny", data_dir=str(little / "data"))
    page = night.report(options, little / "out/tiny", [prose.Text("天气很好。", "")], [])
    assert "没有学过的文字，每个字" in page and "画廊" in page
    assert re.search("- 回答没有量：.*只有 0 段.*--talks", page)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_night_waits_until_the_script_has_saved(tmp_path, number):
    """Ctrl-C 终端给了两个程序，kill 只给了外面的：都要等里面的存好。"""
    script = (
        "import pathlib, os, signal, sys, time\n"
        "def stop(number, frame):\n"
        "    time.sleep(0.6)  # 做完这一步，存好\n"
        "    pathlib.Path('saved').touch()\n"
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path('ready.part').write_text(str(os.getpid()))\n"
        "os.rename('ready.part', 'ready')\n"
        "time.sleep(60)\n"
    )

    def press():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        if number == signal.SIGINT:
            os.kill(int((tmp_path / "ready").read_text()), number)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=press)
    thread.start()
    with contextlib.chdir(tmp_path):
        code = night.finish([sys.executable, "-c", script])
    thread.join()
    assert code == 128 + number and (tmp_path / "saved").exists()


def test_a_night_opens_at_once_what_it_needs_hours_later(little, tmp_path, monkeypatch):
    """一夜练完了，才说文件不在，就白等了。"""
    (tmp_path / "data").symlink_to(little / "data")
    monkeypatch.setattr(subprocess, "Popen", lambda command: pytest.fail("不该开始练"))
    (tmp_path / "few.jsonl").write_text('{"text": "好"}\n', encoding="utf-8")
    for flags in (
        ["--sft_data", "gone.jsonl"],
        ["--data", "gone.json"],
        ["--held_out", "gone.jsonl"],
        ["--talks", "gone.jsonl"],
        ["--talks", "few.jsonl"],
        ["--n", "5"],
        ["--replay", "1"],
        ["--sft_hours", "20000"],
        ["--", "--sft_lr", "-1"],
    ):
        _, err = run(tmp_path, "tools.lab.night", "--preset", "tiny", *flags, code=2)
        assert err.startswith("错误：")
