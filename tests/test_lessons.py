"""课文说的都是真的：引用的代码一行不差，命令看得懂，自查的答案跑得出来。

    python tests/test_lessons.py     代码挪了地方，就地改好课文里的行号；改了内容的，说出来

改不了的只有一种：引用的代码自己变了。那时要重写那一段课文。
"""

import contextlib
import difflib
import importlib.util
import io
import re
import shlex
import sys
from code import InteractiveConsole
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # 直接运行这个文件时

from chat.repl import ChatOptions  # noqa: E402
from config import Config, UserError  # noqa: E402
from generate import make_speaker  # noqa: E402
from model import Transformer  # noqa: E402
from settings.flags import read_options  # noqa: E402
from settings.resolve import load_config  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from tools.draw import __main__ as draw  # noqa: E402
from tools.explain import __main__ as explain  # noqa: E402

FOLDER = REPO / "docs" / "lessons"
LESSONS = sorted(FOLDER.glob("[1-9]-*.md"))
NAMES = ["predictor", "tokenizer", "attention", "block", "loop", "pretraining", "sft", "sampling",
         "hands"]  # fmt: skip
# 引用：一行链接，空一行，一段代码。
QUOTE = re.compile(
    r"^\[[\w./]+ 第 [\d–]+ 行\]\((?P<path>\.\./\.\./[\w./]+)#(?P<anchor>[L\d-]+)\)"
    r"\n\n```python\n(?P<code>.*?)^```$",
    re.M | re.S,
)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
BASH = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
CHECK = re.compile(
    r"^自查.*?\n```python\n(?P<code>.*?)^```\n+<details>\n<summary>答案</summary>\n+"
    r"```text\n(?P<answer>.*?)^```$.*?^</details>$",
    re.M | re.S,
)


class Quote(NamedTuple):
    """课文里的一段引用。"""

    path: Path
    first: int
    last: int
    lines: list[str]
    text: str  # 写着行号的那个链接


def read(path: Path) -> str:
    """UTF-8 的全文。"""
    return path.read_text(encoding="utf-8")


def quotes(lesson: Path) -> list[Quote]:
    """一课里的全部引用。"""
    found = []
    for match in QUOTE.finditer(read(lesson)):
        numbers = [int(n) for n in re.findall(r"\d+", match["anchor"])]
        path = (lesson.parent / match["path"]).resolve()
        link = match[0].partition("\n")[0]
        found.append(Quote(path, numbers[0], numbers[-1], match["code"].splitlines(), link))
    return found


def link(path: Path, first: int, last: int) -> str:
    """引用的链接该怎样写。"""
    name = path.relative_to(REPO).as_posix()
    shown, anchor = (
        (f"{first}–{last}", f"L{first}-L{last}") if last > first else (first, f"L{first}")
    )
    return f"[{name} 第 {shown} 行](../../{name}#{anchor})"


def where(quote: Quote) -> int | None:
    """引用的代码现在从第几行起；有好几处时取离原来最近的，一处也没有是 None。"""
    lines, n = read(quote.path).splitlines(), len(quote.lines)
    starts = [i + 1 for i in range(len(lines) - n + 1) if lines[i : i + n] == quote.lines]
    return min(starts, key=lambda i: abs(i - quote.first), default=None)


def what_changed(quote: Quote) -> str:
    """引用的代码里，现在的文件没有的那几行，各自最像的是哪一行。"""
    lines = read(quote.path).splitlines()
    words = []
    for line in quote.lines:
        if line in lines:
            continue
        near = difflib.get_close_matches(line, lines, n=1, cutoff=0.4)
        now = (
            f"最像的是第 {lines.index(near[0]) + 1} 行 {near[0].strip()!r}" if near else "没有像的"
        )
        words.append(f"  {line.strip()!r} 没有了；{now}")
    return "\n".join(words or ["  每一行都还在，但不再挨在一起"])


def problem(quote: Quote) -> str | None:
    """这段引用哪里不对；都对是 None。"""
    start = where(quote)
    if start is None:
        return f"{quote.text} 引用的代码变了，要重写那一段：\n{what_changed(quote)}"
    right = link(quote.path, start, start + len(quote.lines) - 1)
    if right != quote.text:
        return f"{quote.text} 应为 {right}；运行 python tests/test_lessons.py 就地改好"
    return None


def mend(lesson: Path) -> list[str]:
    """改好一课里过时的行号，返回改不了的。"""
    text, left = read(lesson), []
    for quote in quotes(lesson):
        start = where(quote)
        if start is None:
            left.append(f"{lesson.name}：{problem(quote)}")
            continue
        right = link(quote.path, start, start + len(quote.lines) - 1)
        code = "\n\n```python\n" + "\n".join(quote.lines) + "\n```"
        text = text.replace(quote.text + code, right + code)
    if text != read(lesson):
        lesson.write_text(text, encoding="utf-8")
        print(f"{lesson.name}：改好了行号")
    return left


# ---------- 引用 ----------


def test_there_are_nine_lessons():
    assert [path.stem for path in LESSONS] == [f"{i}-{n}" for i, n in enumerate(NAMES, start=1)]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_quoted_code_is_the_code(lesson):
    assert len(quotes(lesson)) >= 2
    assert not [words for quote in quotes(lesson) if (words := problem(quote))]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_every_block_of_code_is_quoted_or_run(lesson):
    text = read(lesson)
    checked = [q["code"] for q in QUOTE.finditer(text)] + [c["code"] for c in CHECK.finditer(text)]
    assert sorted(PYTHON.findall(text)) == sorted(checked)
    anchored = re.findall(r"\]\(\.\./\.\./[\w./]+#L", text)
    assert len(anchored) == len(quotes(lesson)), "有行号的链接，后面要紧跟着那几行代码"


def test_moved_code_is_mended_and_changed_code_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "REPO", tmp_path)
    (tmp_path / "docs/lessons").mkdir(parents=True)
    source, lesson = tmp_path / "a.py", tmp_path / "docs/lessons/1-a.md"
    source.write_text("x = 1\ny = 2\nz = 3\n", encoding="utf-8")
    text = "[a.py 第 1–2 行](../../a.py#L1-L2)\n\n```python\nx = 1\ny = 2\n```\n"
    lesson.write_text(text, encoding="utf-8")
    assert problem(quotes(lesson)[0]) is None
    source.write_text("\n\nx = 1\ny = 2\nz = 3\n", encoding="utf-8")
    assert "应为 [a.py 第 3–4 行](../../a.py#L3-L4)" in problem(quotes(lesson)[0])
    assert mend(lesson) == []
    assert read(lesson) == text.replace("1–2", "3–4").replace("L1-L2", "L3-L4")
    source.write_text("x = 1\ny = 20\n", encoding="utf-8")
    (left,) = mend(lesson)
    assert "'y = 2' 没有了；最像的是第 2 行 'y = 20'" in left


# ---------- 课文的样子 ----------


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_has_all_its_parts(lesson):
    text, number = read(lesson), LESSONS.index(lesson) + 1
    parts = re.findall(r"^## (.+)$", text, re.M)
    wanted = ["这一课回答什么", "道理", "代码", "图", "练习", "下一课"]
    assert [part for part in parts if part in wanted] == wanted
    pictures = re.findall(r"^!\[.+\]\((.+)\)$", text, re.M)
    assert pictures == [f"../pictures/lesson-{number}.svg"]
    assert f"python -m tools.draw {list(draw.PICTURES)[number - 1]}\n" in text
    assert len(CHECK.findall(text)) == 1
    following = LESSONS[number].name if number < len(LESSONS) else "README.md"
    assert f"]({following})" in text.partition("## 下一课")[2]
    assert 60 <= text.count("\n") <= 170, "太短讲不清，太长读不完"


@pytest.mark.parametrize("page", [*LESSONS, FOLDER / "README.md"], ids=lambda p: p.stem)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", read(page)):
        if not target.startswith("https://"):
            assert (page.parent / target.partition("#")[0]).resolve().exists(), target


def test_the_path_names_every_lesson():
    text = read(FOLDER / "README.md")
    assert re.findall(r"\]\(([1-9]-\w+\.md)\)", text) == [path.name for path in LESSONS]


# ---------- 命令 ----------

COMMANDS = {
    command.strip()
    for page in [*LESSONS, FOLDER / "README.md"]
    for block in BASH.findall(read(page))
    for line in block.splitlines()
    for command in re.split(r"&&|\|", line.partition("  #")[0])
    if command.strip().startswith("python ")
} | {
    command
    for page in [*LESSONS, FOLDER / "README.md"]
    for command in re.findall(r"`(python [^`]+)`", read(page))
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_is_understood(command):
    _, script, *args = shlex.split(command)
    if script == "-m":
        module, *args = args
        if module == "pytest":
            assert (REPO / args[0]).is_file(), args[0]
            return
        assert importlib.util.find_spec(module), module
        if module in (programs := {"tools.draw": draw, "tools.explain": explain}):
            read_options(programs[module].Options, args, "")
        return
    assert (REPO / script).is_file(), script
    stages = {"pre_train.py": "pretrain", "sft_train.py": "sft"}
    if script in stages and "--help" not in args:
        load_config(stages[script], args)
    elif script in ("pre_chat.py", "sft_chat.py"):
        names = [a.removeprefix("--") for a in args if a.startswith("--")]
        assert set(names) <= set(ChatOptions.__dataclass_fields__)


# ---------- 自查 ----------


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_the_answer_is_what_the_code_prints(lesson, monkeypatch):
    """像读者那样一行一行地粘进 python：所以代码里不能有要空一行才结束的缩进块。"""
    monkeypatch.chdir(REPO)
    check = CHECK.search(read(lesson))
    console, out, err = InteractiveConsole(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        unfinished = [console.push(line) for line in check["code"].splitlines()][-1]
    assert not unfinished
    assert err.getvalue() == ""
    assert out.getvalue() == check["answer"]


# ---------- 图 ----------


def test_pictures_are_text_small_and_free_of_the_network():
    for number, name in enumerate(draw.PICTURES, start=1):
        path = REPO / "docs" / "pictures" / f"lesson-{number}.svg"
        text = read(path)
        assert path.stat().st_size < 150_000, name
        assert "<text" in text, "文字要是文字，不是一条条曲线"
        assert not re.search(r'(href|src)="https?://', text)


@pytest.mark.parametrize("name", ["tokenizer", "sft"])
def test_pictures_that_need_no_model_are_redrawn_the_same(name, tmp_path):
    draw.main([name, "--folder", str(tmp_path)])
    number = list(draw.PICTURES).index(name) + 1
    drawn, kept = (read(f / f"lesson-{number}.svg") for f in (tmp_path, REPO / "docs/pictures"))
    words = re.compile(r"<text[^>]*>(.*?)</text>", re.S)
    assert words.findall(drawn) == words.findall(kept)  # 位置随字体与版本略有不同


class Untrained(draw.Trained):
    """没训练过的小模型与编出来的记录：形状与 tiny 不同，画图的代码不能只认 tiny。"""

    def speaker(self):
        torch.manual_seed(0)
        config = Config(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=32, max_len=64)
        config.data, config.data_dir = "builtin", str(self.path)
        model = Transformer(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return make_speaker(model, config, Tokenizer(), "pretrain")

    def metrics(self):
        check = {"val_loss": 9.0, "val_bpc": 13.0, "sample": "比喻\n出处：《无》"}
        steps = [
            {"step": s, "train_loss": 9.0, "lr": 0.01, "grad_norm": 2.0 / s} for s in (1, 2, 3, 4)
        ]
        return [{"step": 0} | check, *steps[:3], steps[3] | check]


@pytest.mark.parametrize("name", draw.PICTURES)
def test_any_model_can_be_drawn(
    name, builtin_config, builtin_pretrain, tmp_path, recwarn, monkeypatch
):
    monkeypatch.chdir(Path(builtin_config.data_dir).parent)  # 外面的词元文件，不会去读
    draw.draw(name, Untrained(Path(builtin_config.data_dir)), tmp_path)
    assert not recwarn.list, [str(w.message) for w in recwarn]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "请先写要画哪一张"),
        (["atention"], "没有叫 atention 的图；最接近的是 attention"),
        (["loop", "--folde", "a"], "最接近的是 --folder"),
        (["loop", "--checkpoint", "none.pt"], "找不到训练的记录"),
        (["sampling", "--checkpoint", "none.pt"], "找不到检查点 none.pt"),
    ],
)
def test_mistakes_are_explained(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)):
        draw.main(argv)


if __name__ == "__main__":
    unmended = [words for lesson in LESSONS for words in mend(lesson)]
    print("\n".join(unmended) or "引用都对")
    sys.exit(1 if unmended else 0)
