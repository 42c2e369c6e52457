"""聊天时动手改：关掉的真的关着，写出来的就是关着时写的，恢复之后一点不剩；数与直接算的相同。"""

import itertools
import re
from dataclasses import replace

import pytest
import torch

import pre_chat
import sft_chat
from chat import repl
from chat.display import bits, compared, percent
from chat.repl import ChatOptions
from config import N_TOKENS, Config
from engine.device import Device
from engine.speed import speed_up
from generate import Sampling, make_speaker, next_logits
from microscope import look, patched, without
from model import Transformer

SHAPE = Config(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=32, max_len=80,
               vocab_size=N_TOKENS)  # fmt: skip
EXPERTS = replace(SHAPE, n_experts=5, n_active=2, router_scale=1.0)
GREEDY = Sampling(temp=0, penalty=1.3, max=12)


def speaker_of(config, tokenizer, stage="sft"):
    """没训练过、但每层都真的做事的小模型。"""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return make_speaker(model, config, tokenizer, stage)


@pytest.fixture(params=[SHAPE, EXPERTS], ids=["dense", "experts"])
def speaker(request, tokenizer):
    return speaker_of(request.param, tokenizer)


@pytest.fixture
def talk(monkeypatch, capsys):
    """一场聊天，返回 (说出来的各行, 提示的各行)。"""

    def chat(speaker, *lines, script=sft_chat):
        options = ChatOptions(**vars(GREEDY), checkpoint="x/sft.pt")
        monkeypatch.setattr(repl, "start", lambda stage, argv: (options, speaker))
        monkeypatch.setattr(repl, "read_inputs", lambda history: iter(lines))
        script.main([])
        said = capsys.readouterr()
        return said.out.split("\n"), said.err.split("\n")

    return chat


def answer(speaker, text="你好"):
    """直接写出来的回答。"""
    return list(speaker.generate(speaker.prompt(text), GREEDY))


def test_what_is_off_stays_off_until_it_is_restored(speaker, talk, tokenizer):
    off = ["1.2", "2.attention"] + (["2.expert3"] if speaker.config.n_experts else [])
    with without(speaker.model, off):
        changed = tokenizer.decode(answer(speaker))
    plain = tokenizer.decode(answer(speaker))
    assert changed != plain
    out, err = talk(
        speaker, "你好", "/without " + " ".join(off), "/reset", "你好", "/with", "/reset", "你好"
    )
    assert [line for line in out if line] == [plain, changed, plain]
    assert f"（关着：{'、'.join(off)}；/with 恢复）" in err and "（都开着）" in err
    assert tokenizer.decode(answer(speaker)) == plain


def test_how_much_the_answer_surprises_with_a_part_off(speaker, talk):
    new = answer(speaker)
    ids = speaker.prompt("你好")

    def mean(off):
        with without(speaker.model, off):
            probs = speaker.read([*ids, *new])[len(ids) - 1 : -1]
        return sum(bits(row[t].item()) for row, t in zip(probs, new, strict=True)) / len(new)

    _, err = talk(speaker, "你好", "/without 1.1", "/without 1.1 2.2", "/with 1.1")
    found = [tuple(map(float, re.findall(r"\d+\.\d", line))) for line in err if "平均" in line]
    steps = [mean(off) for off in ([], ["1.1"], ["1.1", "2.2"], ["2.2"])]
    wanted = [pytest.approx(pair, abs=0.051) for pair in itertools.pairwise(steps)]
    assert found == wanted


def test_replacing_a_token_only_looks(speaker, talk, tokenizer):
    """换一个词元：后面的意外照换过的算；回答本身没有变。"""
    new, ids, tiger = answer(speaker), speaker.prompt("你好"), tokenizer.encode("虎")
    other = [*new[:2], *tiger, *new[3:]]

    def mean(row):
        probs = speaker.read([*ids, *row])[len(ids) - 1 : -1]
        chosen = [bits(p[t].item()) for p, t in zip(probs, row, strict=True)][3:]
        return sum(chosen) / len(chosen)

    _, err = talk(speaker, "你好", "/replace 3 虎", "/why")
    line = next(line for line in err if "它后面的" in line)
    found = [float(x) for x in re.findall(r"\d+\.\d", line)]
    assert found == pytest.approx([mean(new), mean(other)], abs=0.051)
    assert f"第 3 个「{tokenizer.label(new[2])}」换成「虎」：" in err
    assert tokenizer.decode(new[:5]).replace(" ", "") in "".join(err[err.index(line) + 1 :])


def test_carrying_a_vector_over(speaker, talk, tokenizer):
    ids = speaker.prompt("你好")
    vector = look(speaker.model, speaker.prompt("再见")).residual[1, -1]
    before = speaker.read(ids)[-1]
    with patched(speaker.model, 1, len(ids) - 1, vector):
        after = speaker.read(ids)[-1]
    _, err = talk(speaker, "你好", "/patch 1 再见")
    best = after.argmax().item()
    wanted = f"{percent(before[best].item())} → {percent(after[best].item())}"
    first = next(line for line in err if wanted in line)
    assert first.startswith(tokenizer.label(best))
    assert len(list(compared(tokenizer, before, after, 7).columns[0].cells)) == 7


def test_parts_of_a_squeezed_model(tokenizer):
    """int8 的模型也关得掉，恢复之后逐位相同；编译好的那一步，关着时不用。"""
    for config in (SHAPE, EXPERTS):
        speaker = speed_up(
            speaker_of(config, tokenizer), Device(Config(device="cpu", compile=False)), "int8"
        )
        chat = repl.Chat(ChatOptions(**vars(GREEDY)), speaker)
        ids, before = speaker.prompt("你好"), answer(speaker)
        speaker.step = compiled = lambda *args: next_logits(*args)
        plain = speaker.read(ids)
        names = ["1.1", "2.feed_forward"] + (["1.expert2"] if config.n_experts else [])
        for name in names:
            chat.hands.off = [name]
            with chat.hands.on():
                assert speaker.step is next_logits
                assert not torch.equal(speaker.read(ids), plain), name
        assert torch.equal(speaker.read(ids), plain) and speaker.step is compiled
        assert answer(speaker) == before


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["/without 9.1"], "模型有 2 层"), (["/without 头"], "看不懂「头」"),
        (["/without 1.1 9.9"], "模型有 2 层"), (["/with 1.1"], "1.1 没有关着；关着的是 无"),
        (["/replace 1 虎"], "还没有回答"), (["/patch 1 再见"], "还没有回答"),
        (["你好", "/replace 虎"], "要写成 /replace 3 虎 的样子"),
        (["你好", "/replace 99 虎"], "没有第 99 个"), (["你好", "/replace 1 老虎"], "是 2 个词元"),
        (["你好", "/patch 再见"], "要写成 /patch 2"), (["你好", "/patch 3 再见"], "没有第 3 层"),
        (["你好", "/patch 1 " + "长" * 99], "这句话有"), (["你好", "/patch 1"], "要写成 /patch 2"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_change_nothing(speaker, talk, tokenizer, lines, sentence):
    out, err = talk(speaker, *lines, "/without", "/reset", "你好")
    assert sum(sentence in line for line in err) == 1
    assert "（都开着）" in err
    assert out[-2 if out[-1] == "" else -1] == tokenizer.decode(answer(speaker))


def test_a_pretrained_model_has_hands_too(tokenizer, talk):
    speaker = speaker_of(SHAPE, tokenizer, "pretrain")
    with without(speaker.model, ["2.1"]):
        changed = tokenizer.decode(answer(speaker))
    out, _ = talk(speaker, "/without 2.1", "你好", script=pre_chat)
    assert out[0] == "你好" + changed
