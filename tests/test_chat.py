"""聊天：前文按整轮忘掉，命令不合法不生效，打印的就是生成的，该停的时候停。"""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pre_chat
import sft_chat
from chat import repl
from chat.repl import HELP, Chat, ChatOptions, obey
from config import UserError
from generate import Choice, Sampling
from sft_chat import ask, trim
from tokenizer import Tokenizer


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
                 "quit", "probs", "why", "next", "system", "tool", "forget"):  # fmt: skip
        assert f"/{name}" in HELP


def fake_speaker(tokenizer, ids, max_len=1000):
    """照着 ids 念的模型。"""

    def choices(prompt, options):
        for token in ids:
            if token is None:
                raise KeyboardInterrupt
            yield Choice(token, None, None)

    config = SimpleNamespace(max_len=max_len, out_dir=".")
    return SimpleNamespace(
        tokenizer=tokenizer, config=config, choices=choices, encode=tokenizer.encode
    )


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


# ---------- 管道里送来的 ----------

QUESTION = "守株待兔是什么意思？"


def piped(monkeypatch, data: bytes) -> list[str]:
    """管道里送来这些字节，读到的各行；标准输入像 run_script 摆弄过的那样。"""
    pipe = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="replace")
    monkeypatch.setattr(sys, "stdin", pipe)
    return list(repl.read_inputs(Path("x")))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_piped_lines_may_end_in_any_way(monkeypatch, end):
    text = end.join(["/temp 0", QUESTION, "", "兔" * 100_000, "没有换行的末尾"])
    assert piped(monkeypatch, text.encode()) == text.split(end)
    assert piped(monkeypatch, b"") == []


def test_a_mark_at_the_beginning_does_not_hide_the_command(monkeypatch):
    """Windows 的记事本在开头写 BOM；几个文件接起来，中间也有。"""
    data = b"".join(text.encode("utf-8-sig") for text in ("/temp 0\n", f"{QUESTION}\n"))
    assert piped(monkeypatch, data) == ["/temp 0", QUESTION]


@pytest.mark.parametrize(
    "encoding, command",
    [
        ("gbk", "iconv -f GB18030 -t UTF-8"), ("utf-16", "iconv -f UTF-16 -t UTF-8"),
        ("utf-16-le", "iconv -f UTF-16LE -t UTF-8"), ("utf-16-be", "iconv -f UTF-16BE -t UTF-8"),
        ("utf-32", "iconv -f UTF-32 -t UTF-8"), ("utf-32-le", "iconv -f UTF-32LE -t UTF-8"),
        ("utf-32-be", "iconv -f UTF-32BE -t UTF-8"),
    ],
)  # fmt: skip
def test_another_encoding_is_refused_not_guessed(monkeypatch, encoding, command):
    """从前读不懂的字节悄悄没了，答的是另一个问题。"""
    with pytest.raises(UserError, match="第 1 行不是 UTF-8"):
        piped(monkeypatch, f"{QUESTION}\n".encode(encoding))
    for text in (f"Hello, {QUESTION}", f"/next {QUESTION}\r\n"):
        with pytest.raises(UserError, match=command) as error:
            piped(monkeypatch, text.encode(encoding))
        assert "第 1 行不是 UTF-8" in str(error.value)
        assert "\n" not in str(error.value)


def test_what_came_before_the_unreadable_line_is_answered(tokenizer, monkeypatch):
    data = f"{QUESTION}\n".encode() + f"{QUESTION}\n".encode("gbk")
    pipe = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="replace")
    monkeypatch.setattr(sys, "stdin", pipe)
    answered = []
    with pytest.raises(UserError, match="第 2 行"):
        run(ChatOptions(checkpoint="x/sft.pt"), None, answered.append, None)
    assert answered == [QUESTION]


# ---------- 系统的话与工具的答复 ----------


def talk(monkeypatch, speaker, lines, script=sft_chat):
    """照着 lines 聊一场；返回每次交给模型的 [(角色, 文字), …]，最后的开头不算。"""
    asked, choices = [], speaker.choices

    def recorded(ids, options):
        asked.append(ids)
        return choices(ids, options)

    speaker.choices = recorded
    options = ChatOptions(checkpoint="x/sft.pt")
    monkeypatch.setattr(repl, "start", lambda stage, argv: (options, speaker))
    monkeypatch.setattr(repl, "read_inputs", lambda history: iter(lines))
    script.main([])
    tokenizer = speaker.tokenizer
    names = {number: role for role, number in tokenizer.role_ids.items()}
    found = []
    for ids in asked:
        starts = [i for i, token in enumerate(ids) if token == tokenizer.bos_id]
        turns = [ids[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert turns.pop() == tokenizer.reply_prefix()
        found.append([(names[turn[1]], tokenizer.decode(turn)) for turn in turns])
    return found


CALL = '<tool_call>{"name": "weather", "city": "北京"}</tool_call>'


def test_a_tool_answers_and_the_model_goes_on(tokenizer, monkeypatch, capsys):
    """调用是文字，原样印出来；工具的答复接在它后面。"""
    speaker = fake_speaker(tokenizer, tokenizer.encode(CALL))
    asked = talk(monkeypatch, speaker, ["天气？", "/tool 晴，20 度", "那就好"])
    assert capsys.readouterr().out.startswith(f"{CALL}\n{CALL}\n")
    before = [("user", "天气？"), ("assistant", CALL)]
    assert asked == [
        before[:1],
        [*before, ("tool", "晴，20 度")],
        [*before, ("tool", "晴，20 度"), ("assistant", CALL), ("user", "那就好")],
    ]


def test_a_system_turn_begins_a_new_conversation(tokenizer, monkeypatch, capsys):
    speaker = fake_speaker(tokenizer, tokenizer.encode("好"))
    lines = ["/system", "你好", "/system 请简短", "你好", "再见", "/SYSTEM", "/reset", "你好"]
    asked = talk(monkeypatch, speaker, lines)
    assert asked == [
        [("user", "你好")],
        [("system", "请简短"), ("user", "你好")],
        [("system", "请简短"), ("user", "你好"), ("assistant", "好"), ("user", "再见")],
        [("user", "你好")],  # /reset 连它也忘掉
    ]
    said = capsys.readouterr().err
    assert said == "（没有 system）\n" + "（system 是「请简短」）\n" * 2 + "（已忘掉前文）\n"


def test_what_cannot_be_said_in_these_roles_is_one_sentence(tokenizer, monkeypatch, capsys):
    speaker = fake_speaker(tokenizer, tokenizer.encode("好"), max_len=40)
    lines = ["/tool 晴", "你好", "/tool", "/system " + "话" * 20, "/tool " + "晴" * 40]
    assert talk(monkeypatch, speaker, lines) == [[("user", "你好")]]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert "等它写出调用" in said[0] and "等它写出调用" in said[1]
    assert "这段话有 23 个词元，最多 20 个" in said[2]
    assert "最多 28 个" in said[3]


def test_a_pretrained_model_knows_no_roles(tokenizer, monkeypatch, capsys):
    speaker = fake_speaker(tokenizer, tokenizer.encode("好"))
    talk(monkeypatch, speaker, ["/system 请简短", "/tool 晴"], script=pre_chat)
    said = capsys.readouterr()
    assert said.out == ""
    first, second = said.err.splitlines()
    assert first.startswith("（/system 要在 sft_chat.py 里用")
    assert second.startswith("（/tool 要在 sft_chat.py 里用")


roles = st.lists(st.tuples(st.sampled_from(["user", "tool"]), st.integers(1, 12)), max_size=8)


@given(roles, st.integers(0, 20))
def test_forgetting_keeps_the_system_and_never_splits_a_call(sizes, n):
    """系统的话总在最前面；工具的答复紧跟着它的调用，调用紧跟着它的提问。"""
    tokenizer = Tokenizer()
    speaker = SimpleNamespace(
        tokenizer=tokenizer, config=SimpleNamespace(max_len=90), encode=tokenizer.encode
    )
    system = tokenizer.turn_ids("system", [700] * n) if n else []
    turns, whole = [], []
    for number, (role, size) in enumerate(sizes):
        if role == "tool" and not turns:
            continue
        try:
            turns, ids = ask(speaker, turns, "字" * size, role, system)
        except UserError:
            break
        reply = tokenizer.turn_ids("assistant", [1000 + number])
        whole += [*tokenizer.turn_ids(role, tokenizer.encode("字" * size)), *reply]
        turns = [*turns, reply]
        rest = ids[len(system) : -2]
        assert ids[: len(system)] == system
        assert rest[1] == tokenizer.role_ids["user"]  # 从一句提问开始
        assert whole[: -len(reply)][-len(rest) :] == rest  # 中间什么也不少
        assert len(ids) <= 90 * 3 // 4
