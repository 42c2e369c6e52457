"""聊天：前文按整轮忘掉，命令不合法不生效，打印的就是生成的，该停的时候停。"""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat import repl
from chat.repl import HELP, Chat, ChatOptions, obey
from config import UserError
from generate import Choice, Sampling
from sft_chat import trim


@given(
    st.lists(st.integers(1, 40), min_size=0, max_size=12), st.integers(1, 40), st.integers(1, 90)
)
def test_history_is_trimmed_by_whole_turns(pairs, question, limit):
    turns = [[n] * length for n in pairs for length in (n, n)] + [[0] * question]
    kept = trim(turns, limit)
    assert kept == turns[len(turns) - len(kept) :]  # 留下的是末尾，次序不变
    assert len(kept) % 2 == 1  # 从一句提问开始，以最后的提问结束
    assert sum(map(len, kept)) <= limit or len(kept) == 1
    if len(kept) < len(turns):  # 没有多忘
        longer = turns[len(turns) - len(kept) - 2 :]
        assert sum(map(len, longer)) > limit


def test_commands_change_the_sampling():
    options = ChatOptions()
    for command, name, value in [
        ("/temp 0.5", "temp", 0.5), ("/top_k 5", "top_k", 5), ("/top_p 0.3", "top_p", 0.3),
        ("/min_p 0.1", "min_p", 0.1), ("/penalty 1.5", "penalty", 1.5), ("/max 9", "max", 9),
        ("/seed 4", "seed", 4),
    ]:  # fmt: skip
        assert obey(command, options) == f"{name} 改为 {value}"
        assert getattr(options, name) == value
        assert obey(f"/{name}", options) == f"{name} 现在是 {value}"


@pytest.mark.parametrize(
    "command", ["/temp", "/temp -1", "/temp x", "/top_p 0", "/max 1.5", "/max 0", "/", "/胡闹 1"]
)
def test_bad_commands_change_nothing_and_answer_one_line(command):
    options = ChatOptions()
    assert "\n" not in obey(command, options)
    assert options == ChatOptions()


def test_the_bars_are_switched_on_and_off():
    options = ChatOptions()
    for command, k in [("/probs", 5), ("/probs 3", 3), ("/probs 51", 3), ("/probs 0", 0)]:
        obey(command, options)
        assert options.probs == k


@given(st.text(max_size=30))
def test_no_command_is_a_traceback(text):
    options = ChatOptions()
    assert obey("/" + text, options)
    assert not options.problems()


def test_help_names_every_command():
    assert obey("/help", ChatOptions()) == HELP
    for name in ("help", "reset", "temp", "top_k", "top_p", "min_p", "penalty", "max", "seed",
                 "quit", "probs", "why", "next"):  # fmt: skip
        assert f"/{name}" in HELP


def fake_speaker(tokenizer, ids, max_len=1000):
    """照着 ids 念的模型。"""

    def choices(prompt, options):
        for token in ids:
            if token is None:
                raise KeyboardInterrupt
            yield Choice(token, None, None)

    config = SimpleNamespace(max_len=max_len, out_dir=".")
    return SimpleNamespace(tokenizer=tokenizer, config=config, choices=choices)


def stream(speaker, ids, options):
    """一场聊天里写一次。"""
    return Chat(options, speaker).stream(ids)


def run(options, speaker, answer, reset):
    """从头到尾的一场聊天。"""
    Chat(options, speaker).run(answer, reset)


def test_what_is_printed_is_what_was_generated(tokenizer, capsys):
    text = "“守株待兔”说的是 hello world，3.14……\n不劳而获。"
    ids = tokenizer.encode(text)
    assert stream(fake_speaker(tokenizer, ids), [1], ChatOptions()) == ids
    assert capsys.readouterr().out == text + "\n"


def test_a_loop_is_stopped_with_a_notice(tokenizer, capsys):
    ids = tokenizer.encode("一个和尚" * 50)
    assert len(stream(fake_speaker(tokenizer, ids), [1], ChatOptions())) < 40
    assert "开始重复" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_said(tokenizer, capsys):
    ids = tokenizer.encode("守株待兔")
    assert stream(fake_speaker(tokenizer, [*ids, None, *ids]), [1], ChatOptions()) == ids
    assert "已停止" in capsys.readouterr().err


def test_a_full_context_is_said(tokenizer, capsys):
    stream(fake_speaker(tokenizer, [3, 4, 5], max_len=4), [1], ChatOptions())
    assert "4 个词元的上下文" in capsys.readouterr().err


def test_why_it_stopped_is_said(tokenizer, capsys):
    stream(fake_speaker(tokenizer, [3, 4, 5]), [1], ChatOptions(max=3))
    assert "3 个词元，/max 可以调" in capsys.readouterr().err
    stream(fake_speaker(tokenizer, []), [1], ChatOptions())
    assert "一个字也没写" in capsys.readouterr().err
    stream(fake_speaker(tokenizer, [3]), [1], ChatOptions())
    assert capsys.readouterr().err == ""


def test_what_cannot_be_answered_ends_a_script_but_not_a_chat(tokenizer, monkeypatch, capsys):
    def answer(text):
        if text != "再见":
            raise UserError("太长了")

    with pytest.raises(UserError, match="太长了"):
        run(ChatOptions(prompt="你好"), None, answer, None)
    with pytest.raises(UserError, match="--prompt 是空的"):
        run(ChatOptions(prompt=" "), None, answer, None)
    monkeypatch.setattr(repl, "read_inputs", lambda history: iter(["你好", "再见"]))
    run(ChatOptions(checkpoint="x/sft.pt"), None, answer, None)
    assert capsys.readouterr().err == "（太长了）\n"


def test_words_after_a_command_do_not_hide_it(monkeypatch, capsys):
    lines = ["/reset 吧", "／RESET", "/quit 了", "x"]  # 全角的斜线是中文输入法打的
    monkeypatch.setattr(repl, "read_inputs", lambda history: iter(lines))
    answered, resets = [], []
    run(ChatOptions(checkpoint="x/sft.pt"), None, answered.append, lambda: resets.append(1))
    assert (answered, resets) == ([], [1, 1])


def test_quit_reset_and_commands_are_not_answered(tokenizer, monkeypatch, capsys):
    lines = ["你好", "/temp 0", "/reset", "再见", "/quit", "没人听"]
    monkeypatch.setattr(repl, "read_inputs", lambda history: iter(lines))
    answered, resets = [], []
    options = ChatOptions(checkpoint="x/sft.pt")
    run(options, fake_speaker(tokenizer, []), answered.append, lambda: resets.append(1))
    assert answered == ["你好", "再见"]
    assert resets == [1]
    assert options.temp == 0.0


def test_default_sampling_is_reasonable():
    assert Sampling().problems() == []
