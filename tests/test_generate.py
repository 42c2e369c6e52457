"""生成：采样函数是纯函数，缓存不改变结果，没用的编号永远不会被抽到。"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config, UserError
from generate import (
    Sampling,
    is_looping,
    keep_min_p,
    keep_top_p,
    make_speaker,
    penalize,
    probabilities,
)
from model import Transformer
from tokenizer import Tokenizer

TOKENIZER = Tokenizer()
PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1])
NONE = torch.tensor([], dtype=torch.long)
PLAIN = Sampling(temp=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0)


@pytest.fixture(scope="module", params=[0, 4], ids=["dense", "experts"])
def speaker(request):
    torch.manual_seed(0)
    config = Config(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, max_len=64,
                    n_experts=request.param, n_active=request.param // 2,
                    router_scale=1.0)  # fmt: skip
    model = Transformer(config).eval()
    for p in model.blocks.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return make_speaker(model, config, Tokenizer(), "pretrain")


def test_top_k_keeps_the_k_likeliest():
    logits = PROBS.log()
    kept = {
        k: probabilities(logits, NONE, replace(PLAIN, top_k=k), NONE).tolist() for k in (0, 2, 9)
    }
    assert kept[2] == pytest.approx([0.4 / 0.7, 0.3 / 0.7, 0, 0])
    assert kept[0] == kept[9] == pytest.approx(PROBS.tolist())


def test_top_p_keeps_the_fewest_that_reach_p():
    assert keep_top_p(PROBS, 0.7).tolist() == pytest.approx([0.4, 0.3, 0, 0])
    assert keep_top_p(PROBS, 0.71).tolist() == pytest.approx([0.4, 0.3, 0.2, 0])
    assert keep_top_p(PROBS, 1e-6).tolist() == pytest.approx([0.4, 0, 0, 0])  # 至少一个
    assert keep_top_p(PROBS.flip(0), 0.7).tolist() == pytest.approx([0, 0, 0.3, 0.4])


def test_min_p_is_relative_to_the_likeliest():
    assert keep_min_p(PROBS, 0.5).tolist() == pytest.approx([0.4, 0.3, 0.2, 0])
    assert keep_min_p(PROBS, 0.0).tolist() == PROBS.tolist()


def test_penalty_lowers_what_was_seen_whatever_its_sign():
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalize(logits, torch.tensor([0, 1, 1]), 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]  # 纯函数，不改输入


def test_temperature_one_is_softmax_and_zero_is_argmax():
    logits = torch.tensor([1.0, 3.0, 2.0])
    torch.testing.assert_close(probabilities(logits, NONE, PLAIN, NONE), logits.softmax(0))
    assert probabilities(logits, NONE, replace(PLAIN, temp=0), NONE).tolist() == [0, 1, 0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sampling=st.builds(
        Sampling,
        temp=st.sampled_from([0.0, 0.05, 0.8, 5.0]),
        top_k=st.integers(0, 60),
        top_p=st.floats(0.01, 1),
        min_p=st.floats(0, 1),
        penalty=st.floats(0.5, 3),
    ),
)
def test_probabilities_sum_to_one_and_never_touch_the_banned(seed, sampling):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, generator=g) * 20
    banned, seen = torch.randint(50, (2, 5), generator=g)
    probs = probabilities(logits, seen, sampling, banned)
    assert probs.sum().item() == pytest.approx(1, abs=1e-4)
    assert (probs >= 0).all()
    assert probs[banned].sum() == 0


def test_greedy_output_is_the_same_with_and_without_the_cache(speaker):
    start = [speaker.tokenizer.bos_id, *speaker.tokenizer.encode("守株待兔：")]
    greedy = Sampling(temp=0, penalty=1.0, max=50)
    with_cache = list(speaker.generate(start, greedy))
    assert with_cache == list(speaker.generate(start, greedy, use_cache=False))
    assert len(with_cache) == 50


def test_only_what_it_wrote_itself_is_penalised(speaker, monkeypatch):
    """连提问里的字、前几轮的结束标记也罚的话，「你好」会答成「我好」，聊得越久越停不下来。"""
    import generate

    asked = []
    monkeypatch.setattr(
        generate, "penalize", lambda logits, seen, penalty: asked.append(seen.tolist()) or logits
    )
    written = list(speaker.generate([5, speaker.tokenizer.eos_id, 7], Sampling(temp=0, max=3)))
    assert asked == [[], written[:1], written[:2]]


def test_same_seed_same_text_and_other_seed_other_text(speaker):
    start = [speaker.tokenizer.bos_id]
    hot = Sampling(temp=2.0, top_k=0, top_p=1.0, max=20, seed=7)
    first = list(speaker.generate(start, hot))
    assert first == list(speaker.generate(start, hot))
    assert first != list(speaker.generate(start, replace(hot, seed=8)))


def test_useless_ids_are_never_sampled(speaker):
    wild = Sampling(temp=10.0, top_k=0, top_p=1.0, penalty=1.0, max=60, seed=3)
    never = {*speaker.tokenizer.never_sampled(), *range(speaker.tokenizer.vocab_size, 21248)}
    assert set(speaker.banned.tolist()) == never
    produced = set(speaker.generate([speaker.tokenizer.bos_id], wild))
    assert not produced & (never | {speaker.tokenizer.eos_id})


def test_generation_stops_at_the_end_mark(speaker, monkeypatch):
    """模型一心想写结束标记时，什么也不写。"""
    favourite = torch.zeros(21248)
    favourite[speaker.tokenizer.eos_id] = 100.0
    monkeypatch.setattr(speaker, "head", lambda x: favourite)
    assert list(speaker.generate([1, 2, 3], Sampling())) == []


def test_generation_fills_the_context_and_stops(speaker):
    start = speaker.tokenizer.encode("一" * 60)
    assert len(list(speaker.generate(start, Sampling(temp=0, max=100)))) <= 64 - 60


@pytest.mark.parametrize(
    "text",
    [
        "甲乙丙" * 8,
        "起头的话" + "哦" * 24,
        "保持健康很重要，要多喝水。" * 3,  # 长的，三遍就够
        "床前明月光\n\n\n\n",
        "床前明月光\n \n　\n \n",
        "1. 多喝水。\n2. 多运动。\n3. 多喝水。\n4. 多喝水。\n5. 多喝水。\n",
        "要多喝水。\n好的。\n要多喝水。\n对。\n要多喝水。\n是。\n要多喝水。\n",
    ],
)
def test_going_round_in_circles_is_noticed(text):
    ids = TOKENIZER.encode(text)
    assert is_looping(ids, TOKENIZER)
    assert not is_looping(ids[: len(ids) // 2], TOKENIZER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "哈" * 10,  # 笑得久一点，是正常的
        "".join(chr(0x4E00 + i) for i in range(100)),
        "甲乙丙" * 7 + "丁",
        "白日依山尽，\n黄河入海流。\n\n欲穷千里目，\n更上一层楼。\n\n",
        "副歌在这里\n一段\n副歌在这里\n二段\n副歌在这里\n",  # 唱三遍
        "1.\n2.\n3.\n4.\n5.\n",
        "先写：\n```\na = 1\n```\n再写：\n```\nb = 2\n```\n",  # 两段程序
        '[{\n"a": 1\n},\n{\n"b": 2\n},\n{\n"c": 3\n},\n{\n"d": 4\n},\n',
    ],
)
def test_what_only_looks_like_it_is_not(text):
    assert not is_looping(TOKENIZER.encode(text), TOKENIZER)


@pytest.mark.parametrize(("name", "value"), [("temp", -1), ("top_p", 0), ("max", 0), ("seed", -5)])
def test_unreasonable_sampling_values_are_named(name, value):
    (problem,) = replace(Sampling(), **{name: value}).problems()
    assert problem.startswith(name)
    assert str(value) in problem


def test_a_model_that_has_diverged_is_named(speaker):
    broken = make_speaker(Transformer(speaker.config), speaker.config, Tokenizer(), "pretrain")
    torch.nn.init.constant_(broken.model.embedding.weight, float("nan"))
    with pytest.raises(UserError, match="不是有限的数"):
        list(broken.generate([1, 2], PLAIN))
