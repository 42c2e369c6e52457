"""终端里画的概率：没有颜色也读得懂，怪字符不会弄乱终端，数字就是模型的数字。"""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chat import display, repl
from chat.display import HEIGHTS, bits, candidates, percent, surprise
from chat.numbers import file_size, magnitude, measured
from chat.repl import Chat, ChatOptions
from config import Config, UserError
from generate import Choice, make_speaker, probabilities
from model import Transformer
from tokenizer import Tokenizer

TOKENIZER = Tokenizer()


def drawn(thing, width=80) -> str:
    """不带颜色画出来的样子。"""
    file = io.StringIO()
    console = display.Console(file=file, width=width, color_system=None)
    console.print(thing)
    return file.getvalue()


def distribution(**named):
    """给几个字指定概率，其余平分剩下的。"""
    probs = torch.zeros(TOKENIZER.vocab_size)
    for character, p in named.items():
        probs[TOKENIZER.encode(character)[0]] = p
    return probs


def test_bars_are_sorted_and_as_long_as_the_probability():
    lines = drawn(candidates(TOKENIZER, distribution(守=0.5, 株=0.25, 兔=0.1), 3)).splitlines()
    assert [line.split()[0] for line in lines] == ["守", "株", "兔"]
    assert [line.count("█") for line in lines] == [15, 7, 3]
    assert "50.0%" in lines[0] and "25.0%" in lines[1]


def test_the_drawn_one_is_always_shown():
    probs = distribution(守=0.5, 株=0.25, 兔=0.0004)
    (drawn_token,) = TOKENIZER.encode("兔")
    lottery = distribution(守=1.0)
    lines = drawn(candidates(TOKENIZER, probs, 1, drawn_token, lottery)).splitlines()
    assert lines[0].strip().startswith("守") and "抽签时 100.0%" in lines[0]
    assert lines[1].startswith("→ 兔") and "<0.1%" in lines[1] and "不参加抽签" in lines[1]


def test_surprise_is_readable_without_colour():
    ids = TOKENIZER.encode("守株待兔")
    text, marks, *_ = drawn(surprise(TOKENIZER, ids, [1.0, 0.3, 0.02, 1e-9], 60)).splitlines()
    assert text == "守株待兔"
    assert marks == "▁▁▂▂▆▆██"  # 一个汉字两格宽


@given(st.floats(0, 1))
def test_the_colour_and_the_bar_say_the_same(p):
    """颜色、高矮与图例说的是同一回事。"""
    group = surprise(TOKENIZER, TOKENIZER.encode("守"), [p], 60)
    text, marks, legend = group.renderables
    colour = text.spans[0].style
    (words,) = [s for s in legend.spans if marks.plain[0] in legend.plain[s.start : s.end]]
    assert words.style == colour
    least = {"green": 0.5, "default": 1 / 16, "magenta": 1 / 128, "bold red": 0}
    assert colour == next(c for c, limit in least.items() if p > limit or limit == 0)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 9), min_size=1, max_size=60),
       st.integers(10, 90))  # fmt: skip
def test_any_tokens_can_be_drawn(ids, width):
    """什么编号都画得出来：没有控制字符，每行小条与上面的字一样宽，标记不会被当作颜色。"""
    shown = drawn(surprise(TOKENIZER, ids, [0.3] * len(ids), width), width=300)
    assert all(c.isprintable() or c == "\n" for c in shown)
    lines = shown.splitlines()[:-1]
    for text, marks in zip(lines[::2], lines[1::2], strict=True):
        assert set(marks) <= set(HEIGHTS)
        assert len(marks) >= display.cell_len(text)


def test_numbers_for_people():
    assert (bits(0.5), bits(0.25), bits(1.0)) == (1, 2, 0)
    assert (percent(0.5), percent(0.0), percent(1e-5)) == ("50.0%", "0.0%", "<0.1%")


@pytest.fixture
def chat():
    """真的（没训练过的）小模型，一场聊天。"""
    torch.manual_seed(0)
    shape = Config(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, max_len=48)
    model = Transformer(shape).eval()
    torch.nn.init.normal_(model.embedding.weight, std=0.5)  # 概率不太平，也不太尖
    speaker = make_speaker(model, shape, TOKENIZER, "sft")
    return Chat(ChatOptions(seed=3, max=6, checkpoint="x/sft.pt"), speaker)


def test_what_the_bars_say_is_what_the_model_says(chat, capsys):
    """画出来的百分数，与直接算模型的 softmax 相同；答案也与不画时相同。"""
    ids = chat.speaker.prompt("守株待兔")
    chat.options.temp, chat.options.top_k = 2.0, 7  # 不是默认的
    plain = chat.stream(ids)
    said = capsys.readouterr().out
    repl.obey("/probs 2", chat.options)
    assert chat.stream(ids) == plain
    out, err = capsys.readouterr()
    assert out == said
    context = torch.tensor([ids + plain])
    probs = chat.speaker.model(context)[0, len(ids) - 1 :].softmax(-1)
    for i, token in enumerate(plain):
        assert f"第 {i + 1} 个：「{TOKENIZER.label(token)}」" in err
        assert f"意外 {bits(probs[i, token].item()):.1f} 比特" in err
        assert percent(probs[i].max().item()) in err
    for i, block in enumerate(err.split("个：")[1:]):  # 最后一列：真正拿来抽签的概率
        logits = chat.speaker.model(context)[0, len(ids) - 1 + i]
        written = torch.tensor(plain[:i], dtype=torch.long)
        lottery = probabilities(logits, written, chat.options, chat.speaker.banned)
        (drawn,) = [line for line in block.splitlines() if line.startswith("→")]
        assert f"抽签时 {percent(lottery[plain[i]].item())}" in drawn


def test_why_reads_the_answer_back(chat, capsys):
    repl_lines = ["/why", "守株待兔", "/why", "/next 守株", "/next", "/next " + "字" * 60]
    repl_lines += ["/reset", "/why"]
    ids = chat.speaker.prompt("守株待兔")
    said: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repl, "read_inputs", lambda history: iter(repl_lines))
        chat.run(lambda text: said.append(chat.stream(chat.speaker.prompt(text))), lambda: None)
    err = capsys.readouterr().err
    assert err.count("还没有回答") == 2  # 一开始，以及 /reset 之后
    (new,) = said
    probs = chat.speaker.model(torch.tensor([ids + new]))[0].softmax(-1)
    chosen = [probs[len(ids) - 1 + i, t].item() for i, t in enumerate(new)]
    assert f"平均每个词元意外 {sum(map(bits, chosen)) / len(chosen):.1f} 比特" in err
    strangest = min(range(len(new)), key=lambda i: chosen[i])
    best = TOKENIZER.label(probs[len(ids) - 1 + strangest].argmax().item())
    first = err.partition("最意外的：\n")[2].splitlines()[0]
    assert first.startswith(f"  第 {strangest + 1} 个「{TOKENIZER.label(new[strangest])}」")
    assert f"它最想写的是「{best}」" in first
    nxt = chat.speaker.model(torch.tensor([chat.speaker.prompt("守株")]))[0, -1].softmax(-1)
    assert percent(nxt.max().item()) in err
    assert "当作一句提问" in err
    assert "请写上一段文字" in err and "最多 48 个" in err


def test_why_counts_the_end_mark(chat, monkeypatch, capsys):
    """写完了也是一次选择：它有多大把握，也要看得见。"""
    eos = TOKENIZER.eos_id
    steps = [Choice(TOKENIZER.encode("守")[0], None, None), Choice(eos, None, None)]
    monkeypatch.setattr(type(chat.speaker), "choices", lambda *_: iter(steps))
    assert chat.stream(chat.speaker.prompt("守株")) == TOKENIZER.encode("守")
    chat.why()
    assert "守<|im_end|>" in capsys.readouterr().err


def test_a_broken_model_is_one_sentence(chat, monkeypatch):
    monkeypatch.setattr(chat.speaker, "head", lambda x: x.new_full((*x.shape[:-1], 9), torch.nan))
    with pytest.raises(UserError, match="不是有限的数"):
        chat.next("守株")


def test_ctrl_c_in_the_middle_of_a_look_does_not_end_the_chat(chat, monkeypatch, capsys):
    def interrupted(self, ids):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(chat.speaker), "read", interrupted)
    monkeypatch.setattr(repl, "read_inputs", lambda history: iter(["/next 守", "/temp"]))
    chat.run(print, print)
    assert "已停止" in (err := capsys.readouterr().err) and "temp 现在是" in err


def test_numbers_keep_the_digits_their_names_promise():
    assert [file_size(n) for n in (999, 1200, 1.6e9)] == ["999 B", "1.2 KB", "1.6 GB"]
    assert [measured(x) for x in (0, 1234.5, 0.12345, math.nan)] == ["0", "1,234", "0.123", "nan"]
    assert [magnitude(x) for x in (3.14, 1234, 2e7)] == ["3.1", "1,200", "10^7"]
