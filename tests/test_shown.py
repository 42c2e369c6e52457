"""说给人看的话：别处来的字控制不了终端；从哪里出去，一处处数过。"""

from settings.script import outcome

import ast
import contextlib
import io
import json
import logging
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripts import ENVIRONMENT, LITTLE, QUICK, REPO, run

import pre_chat
import sft_chat
from chat import display, repl
from chat.repl import ChatOptions
from config import Config, UserError
from generate import Choice
from settings.resolve import Origin, describe
from settings.say import clean, indented, say, say_above_bar
from tokenizer import Tokenizer

# 清屏、改标题、响铃、退格、回到行首、C1 的 CSI、倒着显示、另外两种换行，以及冒充的一句。
POISON = (
    "毒\x1b[2J\x1b]0;改了标题\x07\x08\x7f\r\x9b31m\x85"
    "\u202e倒\u2066\u200f\u061c\u2028另\u2029\x0b\x0c"
)
DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MARKS = "\u061c\u200e\u200f"  # 自己不是上面那几类，也改变方向


def controls(text: str, allowed: str = "\n\t") -> list[str]:
    """其中能控制终端的字；认法与 settings/say.py 的不同，照 Unicode 的类别。"""
    return [
        c
        for c in text
        if c not in allowed
        and (
            unicodedata.category(c) in ("Cc", "Zl", "Zp")
            or unicodedata.bidirectional(c) in DIRECTIONS
            or c in MARKS
        )
    ]


def shown(*texts: str) -> str:
    """印出来的，核对过没有控制字符；进度条的 \\r 除外。"""
    for text in texts:
        assert not controls(text, "\n\t\r"), ascii(text)
    return "".join(texts)


# ---------- 1. 洗 ----------


@given(st.text() | st.lists(st.sampled_from(POISON), max_size=20).map("".join))
@example(POISON)
def test_cleaned_text_controls_nothing(text):
    cleaned = clean(text)
    assert not controls(cleaned)
    assert clean(cleaned) == cleaned
    kept = [c for c in text if not controls(c)]
    assert [c for c in cleaned if c in kept or c in "\n\t"][: len(kept)] or not kept
    if not controls(text):
        assert cleaned == text


def test_every_control_character_is_known():
    """逐个试全部的 Unicode：我们列出的与 Unicode 说的一样多。"""
    assert not controls(clean("".join(map(chr, range(0x110000)))))
    assert clean("守株待兔 a\u3000，\U0001f600\n\t") == "守株待兔 a\u3000，\U0001f600\n\t"


@given(st.text(st.sampled_from("\n 已保存毒"), max_size=12))
def test_a_value_cannot_pretend_to_be_another_sentence(text):
    for line in indented(f"没有参数 {text}").split("\n")[1:]:
        assert line.startswith(" ")


def test_what_is_said_is_clean(capsys):
    say(POISON, 1, end="")
    say_above_bar(POISON)
    say_above_bar(POISON, file=sys.stderr)
    out, err = capsys.readouterr()
    assert "\\x1b[2J" in shown(out, err)


# ---------- 2. 从哪里出去 ----------

LEFT: set[str] = set()
ALLOWED = {
    ("settings/say.py", "print"): "say 自己",
    ("settings/say.py", "tqdm.write"): "say_above_bar 自己",
    ("settings/script.py", "os.write"): "说的是自己的话，或已经洗过的：这时 say 用到的未必导入得了",
    ("engine/stop.py", "os.write"): "在信号处理里只有它安全，说的全是自己的话",
    ("tools/inspect/__main__.py", "stdout.write"): "JSON，控制字符写成 \\u 的样子",
    ("chat/display.py", "Console"): "CleanConsole 自己，画的都洗过",
}


def ways_out(path: Path) -> set[str]:
    """一个文件里，不经过 say 就印出来的几种写法。"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            writes = name == "os.write" and ast.unparse(node.args[0]) in ("1", "2")
            if writes or name in ("print", "tqdm.write", "traceback.print_exc"):
                found.add(name)
            elif name.endswith(("stdout.write", "stderr.write", "__stdout__.write")):
                found.add(name.removeprefix("sys."))
            elif name.rpartition(".")[2] in ("Console", "PrettyPrinter", "pprint"):
                found.add("Console")
        elif isinstance(node, ast.ClassDef) and "Console" in map(ast.unparse, node.bases):
            found.add("Console")
    return found


def test_everything_shown_goes_one_way():
    found = {
        (name, way)
        for path in sorted(REPO.rglob("*.py"))
        if (name := path.relative_to(REPO).as_posix()).partition("/")[0] not in ("tests", ".venv")
        for way in ways_out(path)
    }
    assert {(name, way) for name, way in found if name not in LEFT} == set(ALLOWED)


# ---------- 3. 毒放进每一处 ----------


def poisoned_speaker(poison: str) -> SimpleNamespace:
    """会说话的模型，每个词元写出来都有毒。"""
    tokenizer = Tokenizer()
    tokenizer.label = lambda token: f"{poison}{token}"
    tokenizer.decode = lambda ids: "".join(f"{poison}{i}" for i in ids)
    logits = torch.zeros(tokenizer.vocab_size)
    return SimpleNamespace(
        tokenizer=tokenizer, config=SimpleNamespace(max_len=400), stage="pretrain",
        banned=torch.tensor([0]), encode=tokenizer.encode,
        prompt=lambda text: [tokenizer.bos_id, *tokenizer.encode(text)],
        choices=lambda ids, options: iter([Choice(n, logits, torch.tensor([5])) for n in (7, 9)]),
        read=lambda ids: torch.full((len(ids), tokenizer.vocab_size), 1e-5),
    )  # fmt: skip


def chat_with(script, poison: str, lines: list[str]) -> tuple[str, str]:
    """聊一场，检查点的名字里也有毒；返回两份输出。"""
    options, speaker = ChatOptions(checkpoint=f"{poison}/pretrain.pt"), poisoned_speaker(poison)
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(repl, "start", lambda stage, argv: (options, speaker))
        patch.setattr(repl, "read_inputs", lambda history: iter(lines))
        script.main([])
    return out.getvalue(), err.getvalue()


def test_what_the_model_writes_controls_nothing():
    """模型写的、你写的、画出来的候选与意外。"""
    lines = ["你好" + POISON, "/probs 3", "你好", "/why", "/next 守" + POISON, f"/{POISON}",
             f"/temp {POISON}", f"/system {POISON}", f"/tool {POISON}", "/help"]  # fmt: skip
    for script in (pre_chat, sft_chat):
        out, err = chat_with(script, POISON, lines)
        assert "\\x1b[2J" in shown(out) and "\\x1b[2J" in shown(err)


evil = st.lists(st.sampled_from([*POISON, "\n", "字", "a"]), max_size=9).map("".join) | st.text(
    st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Lo"]), max_size=9
)
FEW = settings(max_examples=settings().max_examples // 4)


@FEW
@given(st.lists(st.tuples(st.sampled_from(["", "/next ", "/temp ", "/tool ", "/", "/system "]),
       evil).map("".join), max_size=4), evil, st.sampled_from([pre_chat, sft_chat]))  # fmt: skip
def test_no_chat_shows_a_control_character(lines, poison, script):
    lines = [line for line in lines if not line.lower().startswith("/forget")]
    assert not controls("".join(chat_with(script, poison, ["/probs 2", *lines, "/why"])))


def test_the_drawn_controls_nothing_even_unwashed():
    """忘了先洗就交给 rich 的，也画不出控制字符；rich 自己的颜色还在。"""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(POISON))
    table.add_column(POISON)
    table.add_row(Text(POISON, "bold red"))
    for colour in (False, True):
        file = io.StringIO()
        system = "standard" if colour else None
        console = display.CleanConsole(file=file, force_terminal=colour, color_system=system)
        console.print(table, Text(POISON, "red"), POISON)
        text = file.getvalue()
        assert ("\x1b[" in text) == colour
        assert not controls(text.replace("\x1b[", "") if colour else text)
        assert "\x1b[2J" not in text


PROGRAMS = ["pre_train.py", "sft_train.py", "pre_chat.py", "sft_chat.py", "download.py",
            "tools.explain", "tools.inspect", "tools.export", "tools.import_hf", "tools.draw",
            "tools.bench", "tools.lab.try_sampling", "tools.lab.try_sft"]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_typed_controls_nothing(program, tmp_path, monkeypatch):
    """命令行上写的毒，在错误里原样说出来的。"""
    for name in ("RANK", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for words in ([f"--{POISON}", "1"], [f"--seed={POISON}", POISON, POISON, POISON],
                  [f"--checkpoint={POISON}", f"--data={POISON}", f"--source={POISON}"],
                  [f"--out_dir={POISON}", f"--out={POISON}", f"--device={POISON}"]):  # fmt: skip
        out, err = run(tmp_path, program, *words, code=2)
        assert shown(out, err)
    monkeypatch.setenv("RANK", POISON)
    assert "第 毒\\x1b" in shown(*run(tmp_path, program, f"--{POISON}", code=2))


def test_poisoned_data_is_shown_harmless(tmp_path):
    """数据：文件名、字段名、值；体检，再真的练一步，连同模型写的样本。"""
    rows = [{"text": f"第 {i} 篇{POISON}", POISON: POISON, "源": POISON} for i in range(9)]
    name = f"{POISON}\n已保存.jsonl"
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), "utf-8")
    bad = [*rows, {POISON: 1, "text": 5}, [POISON]]
    (tmp_path / f"坏{name}").write_text("\n".join(map(json.dumps, bad)) + POISON, "utf-8")
    for program in ("tools.inspect", "pre_train.py"):
        words = [f"坏{name}"] if program == "tools.inspect" else ["--data", f"坏{name}"]
        text = shown(*run(tmp_path, program, *words, code=2))
        assert "坏行" in text and "\n已保存" not in text
    assert shown(*run(tmp_path, "tools.inspect", name, "--no-time", "--val_fraction", "0.3"))
    out, err = run(tmp_path, "tools.inspect", name, "--no-time", "--val_fraction", "0.3",
                   "--json", "-")  # fmt: skip
    assert POISON in json.loads(shown(out))["source"] and shown(err)
    flags = [*LITTLE, *QUICK, "--max_steps", "1", "--val_fraction", "0.3"]
    texts = run(tmp_path, "pre_train.py", "--data", name, "--prompt", POISON, *flags,
                "--out_dir", "毒\x1b[2J\u202e")  # fmt: skip
    assert "\\x1b[2J" in shown(*texts)


def poisoned(value):
    """里面的文字都换成毒；别的原样。"""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return POISON if isinstance(value, str) else value


def test_a_poisoned_checkpoint_is_shown_harmless(little, tmp_path):
    """检查点里的每一项文字，一项一项地换成毒，再一起换：说的都只是一句。"""
    good = torch.load(little / "out/tiny/pretrain.pt", weights_only=True)
    names = [name for name, value in good.items() if poisoned(value) is not value]
    changes = [(name, poisoned(good[name])) for name in names if name != "config"]
    changes += [
        ("config", {**good["config"], key: POISON})
        for key, value in good["config"].items()
        if isinstance(value, str)
    ]
    for name, value in changes:
        torch.save({**good, name: value}, tmp_path / "pretrain.pt")
        for script in ("pre_chat.py", "tools.explain"):
            words = ["守株"] if script == "tools.explain" else ["--prompt", "守株", "--max", "2"]
            said = attempt(tmp_path, script, *words, "--checkpoint", "pretrain.pt")
            assert "Traceback" not in shown(*said)


def attempt(folder, script, *args) -> tuple[str, str]:
    """运行，成不成都行；返回说的话。"""
    for code in (0, 2):
        with contextlib.suppress(AssertionError):
            return run(folder, script, *args, code=code)
    return run(folder, script, *args)


def test_the_settings_are_described_harmless():
    texts = {n: POISON for n, v in asdict(Config()).items() if isinstance(v, str) or v is None}
    config = Config(**texts)
    assert POISON in describe(config, dict.fromkeys(asdict(config), Origin.EDITED))
    assert not controls(clean(describe(config, dict.fromkeys(asdict(config), Origin.EDITED))))


@pytest.mark.parametrize("error", [UserError, OSError, ValueError, RuntimeError, MemoryError])
def test_no_error_controls_the_terminal(error, tmp_path):
    """没有想到的错误、库的警告与日志，也洗过；真的另起一个进程。"""
    script = tmp_path / "a.py"
    script.write_text(
        "from settings.script import run_script\n"
        "import logging, threading, warnings\n"
        f"P = {POISON!r}\n"
        "def main():\n"
        "    warnings.warn(P)\n"
        "    logging.getLogger('x').warning('%s', P)\n"
        f"    from config import UserError\n    raise {error.__name__}(P)\n"
        "run_script(main)\n",
        encoding="utf-8",
    )
    env = {**ENVIRONMENT, "PYTHONPATH": str(REPO)}
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, timeout=60)
    said = shown(result.stdout.decode(), result.stderr.decode())
    assert said.count("\\x1b[2J") >= (2 if error in (OSError, MemoryError) else 3)


def test_an_outcome_is_a_sentence_and_a_code(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    interrupted = ImportError("numpy")
    interrupted.__cause__ = KeyboardInterrupt()
    for error, word, code in [
        (UserError("写错了"), "错误：写错了", 2),
        (KeyboardInterrupt(), "已中断", 130),
        (interrupted, "已中断", 130),
        (OSError(24, "Too many open files", "x"), "ulimit -n", 2),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "内存不够", 2),
        (OSError(12, "Cannot allocate memory"), "内存不够", 2),
        (MemoryError(), "短些的文字", 2),
        (ModuleNotFoundError("no", name="torch.nn"), "还没有安装 torch", 2),
        (PermissionError(13, "Permission denied", "a"), "读写 a 失败", 2),
    ]:
        sentence, got = outcome(error)
        assert word in sentence and got == code, error
    for error in (ValueError("别的"), ModuleNotFoundError("no", name="engine.没有"), KeyError()):
        assert outcome(error) is None
    assert logging.getLogRecordFactory() is logging.LogRecord  # 测试里导入，什么也没有改
    assert warnings.formatwarning.__module__ == "warnings"
