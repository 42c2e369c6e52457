"""聊天：前文按整轮忘掉，命令不合法不生效，打印的就是生成的，该停的时候停。"""

import ast
import io
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pre_chat
import sft_chat
from chat import inputs, repl
from chat.inputs import Remembered, as_text
from chat.piped import LONGEST, piped_lines
from chat.repl import HELP, Chat, ChatOptions, obey
from config import UserError
from generate import CHARACTERS_PER_TOKEN, Choice, Sampling, Speaker
from sft_chat import ask, trim
from tokenizer import Tokenizer
from tools.lab.laboratory import prompt_ids


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
    options = ChatOptions(penalty=1.3)  # 已经罚了的，建议罚得更重
    stream(fake_speaker(tokenizer, ids), [1], options)
    assert "/penalty 1.5 " in capsys.readouterr().err


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


class Endless(io.BytesIO):
    """没完没了、没有换行的一行；记下读走了多少。"""

    read_so_far = 0

    def readline(self, size=-1):
        assert 0 < size < 2**25, "不设上限地读"
        self.read_so_far += size
        return b"x" * size


def test_an_endless_line_is_refused_not_swallowed():
    """从前整行读进内存才看：几个 GB 没有换行的文件，占几个 GB。"""
    stream = Endless()
    with pytest.raises(UserError, match="第 1 行超过了 16 MB"):
        next(piped_lines(stream))
    assert stream.read_so_far < 2**25
    long = b"x" * (LONGEST - 1)
    assert [len(line) for line in piped_lines(io.BytesIO(long + b"\nab"))] == [LONGEST - 1, 2]


def test_a_text_too_long_never_reaches_the_tokenizer(tokenizer, monkeypatch, capsys):
    """每一处输入都一样：先数字，再分词。"""
    speaker = fake_speaker(tokenizer, tokenizer.encode("好"), max_len=10)
    speaker.encode = lambda text: Speaker.encode(speaker, text)
    speaker.prompt = lambda text: Speaker.prompt(speaker, text)
    speaker.stage = "sft"
    given_to_tokenizer = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda t: given_to_tokenizer.append(t) or encode(t))
    most = CHARACTERS_PER_TOKEN * 10
    long = "字" * (most + 1)
    lines = [long, f"/system {long}", f"/next {long}", "你好", f"/tool {long}"]
    talk(monkeypatch, speaker, lines)
    talk(monkeypatch, speaker, [long], script=pre_chat)
    assert max(map(len, given_to_tokenizer)) <= most
    assert capsys.readouterr().err.count(f"这段文字有 {most + 1} 个字") >= 4
    with pytest.raises(UserError, match="个字"):
        prompt_ids(tokenizer, long, False, 10)


REPO = Path(__file__).resolve().parent.parent
TOKENISE = {  # 谁可以直接分词，为什么
    "tokenizer.py": "分词器自己",
    "generate.py": "Speaker.encode：先数字，再分词",
    "corpus/encode.py": "数据：一篇一篇，读数据时已经限制了大小",
    "examples/align/measure.py": "内置词典里的题",
    "examples/evaluate/make_task.py": "内置词典里的词条",
    "examples/lora/train.py": "数据与内置词典里的问答",
    "tools/draw/of_tokens.py": "自己写的例子",
    "tools/draw/of_hands.py": "自己写的例子",
    "tools/gguf/words.py": "词表里一个个的字",
    "tools/lab/laboratory.py": "prompt_ids：先数字",
    "tools/lab/check_answers.py": "内置词典里的题",
    "tools/lab/talks.py": "一段段对话，读数据时已经限制了大小",
    "tools/lab/answers.py": "模型自己写的回答",
    "tools/lab/prose.py": "每篇只取开头的三百个字",
    "tools/bench/peers/others.py": "同上；练的每篇也先截短",
}


def test_nobody_else_tokenises_what_people_write():
    found = set()
    for path in REPO.rglob("*.py"):
        name = path.relative_to(REPO).as_posix()
        if name.partition("/")[0] in ("tests", ".venv"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value).rpartition(".")[2].lower()
                tokenises = "tokenizer" in owner or owner in ("backend", "translator")
                if (node.attr.startswith("encode") and tokenises) or node.attr == "question_ids":
                    found.add(name)
    assert found == set(TOKENISE)


# ---------- 输入过的话记在哪里 ----------


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    """输入过的话记在这里。"""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/mini-llm/chat_history"


def test_what_was_typed_is_for_its_owner_only(state):
    old = os.umask(0)  # 最宽的 umask 下也一样
    try:
        remembered = Remembered()
        remembered.begin()
        remembered.add("你好")
    finally:
        os.umask(old)
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.parent.stat().st_mode) == 0o700
    state.chmod(0o644)  # 从前宽的，收紧
    again = Remembered()
    again.begin()
    assert again.said == ["你好"] and stat.S_IMODE(state.stat().st_mode) == 0o600


@given(st.lists(st.text(max_size=30).map(as_text), max_size=8))
def test_what_was_typed_comes_back(tmp_path_factory, texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        first, second = Remembered(), Remembered()
        first.begin(), second.begin()
        for i, text in enumerate(texts):  # 两个聊天同时开着
            (first, second)[i % 2].add(text)
        again = Remembered()
        again.begin()
        assert again.said == [text for text in texts if text][::-1]


def test_forget_forgets(state, capsys, monkeypatch):
    remembered = Remembered()
    remembered.begin()
    remembered.add("秘密")
    monkeypatch.setattr(repl, "Remembered", lambda old: remembered)
    monkeypatch.setattr(repl, "read_inputs", lambda history: iter(["/forget"]))
    run(ChatOptions(checkpoint="x/sft.pt"), None, None, None)
    assert state.read_bytes() == b"" and remembered.said == []
    assert f"{state} 已清空" in capsys.readouterr().err
    remembered.add("又一句")
    assert "又一句" in state.read_text("utf-8")
    state.unlink()
    assert "都忘掉了" in Remembered().forget() and not state.exists()


def test_the_history_does_not_grow_for_ever(state, monkeypatch):
    monkeypatch.setattr(inputs, "MOST", 3)
    monkeypatch.setattr(inputs, "LONGEST", 40)
    remembered = Remembered()
    remembered.begin()
    for i in range(20):
        remembered.add(f"第 {i} 句" + "长" * 50 * (i == 19))
    assert len(state.read_bytes().splitlines()) == 19  # 太长的一句不记
    again = Remembered()
    again.begin()
    assert again.said == ["第 18 句", "第 17 句", "第 16 句"]
    assert len(state.read_bytes().splitlines()) == 3
    state.write_bytes(b"x" * 10**6 + b'\n[1]\n"\xff"\n' + b"[" * 9000 + b'\n"\\ud800"\n"z"\n"half')
    again.begin()
    assert again.said[0] == "z" and state.stat().st_size < 200


def test_what_is_not_ours_is_not_written(state, tmp_path):
    """符号链接、硬链接、管道、目录：不写，也不卡住。"""
    target = tmp_path / "重要"
    state.parent.mkdir(parents=True)
    for make in (
        lambda: state.symlink_to(target),
        lambda: os.link(target, state),
        lambda: os.mkfifo(state),
        lambda: state.mkdir(),
    ):
        target.write_text("别动")
        make()
        with pytest.raises(OSError):
            Remembered().begin()
        assert Remembered().forget().startswith("（清不了")
        assert target.read_text() == "别动"
        state.rmdir() if state.is_dir() else state.unlink()


def test_without_a_home_it_is_remembered_until_the_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", "写成相对的不算数")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inputs.state_folder() == tmp_path / ".local/state/mini-llm"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert inputs.state_folder() == tmp_path / "Library/Application Support/mini-llm"
    monkeypatch.setattr(sys, "platform", "linux")

    def nowhere():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", nowhere)
    old = tmp_path / "chat_history"
    old.write_text("从前的")
    assert typed(monkeypatch, Remembered(old), ["你好", "再见"]) == ["你好", "再见"]
    said = capsys.readouterr().err
    assert "不知道主目录在哪里" in said and "输入过的话只记到离开为止" in said
    assert f"{old} 是从前记下的输入" in said


def typed(monkeypatch, remembered, lines, keys="") -> list[str]:
    """在（假的）终端上输入这些话，读到的各行。"""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        keyboard.send_text("".join(f"{line}\r" for line in lines) + keys + "\x04")
        return list(repl.read_inputs(remembered))


def test_the_arrow_finds_what_was_typed_and_forgets_what_was_forgotten(state, monkeypatch):
    assert typed(monkeypatch, Remembered(), ["守株", "待兔"]) == ["守株", "待兔"]
    up = "\x1b[A"
    assert typed(monkeypatch, Remembered(), [up + up]) == ["守株"]  # 下一次也翻得到
    remembered = Remembered()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        lines = repl.read_inputs(remembered)
        keyboard.send_text("/forget\r")
        assert next(lines) == "/forget"
        remembered.forget()
        keyboard.send_text(f"{up}{up}新\r\x04")
        assert list(lines) == ["新"]
    assert state.read_text("utf-8") == '"新"\n'


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


def test_the_opening_line_says_how_the_matrices_are_stored(monkeypatch, capsys):
    """精度默认由聊天自己挑；挑了什么，终端里开头就说。"""
    asked = []

    def load(path, device, quantize):
        asked.append(quantize)
        return SimpleNamespace(stage="sft")

    monkeypatch.setattr(repl, "load_for_chat", load)
    monkeypatch.setattr(repl, "stored_as", lambda speaker: "int8")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    repl.start("sft", ["--device", "cpu"])
    repl.start("sft", ["--device", "cpu", "--quantize", "none"])
    assert asked == ["auto", "none"]
    assert "矩阵存成 int8" in capsys.readouterr().out.splitlines()[0]
