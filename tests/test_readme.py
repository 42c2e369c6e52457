"""README（两种语言）与 docs/ 里的各页说的都是真的。

写着的命令都能被程序看懂，提到的文件、模块、链接、参数都在；课文另有 test_lessons.py。
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import download
from chat.repl import ChatOptions
from config import Config
from settings.flags import parse_flags
from settings.resolve import load_config

REPO = Path(__file__).resolve().parent.parent
README, ENGLISH = REPO / "README.md", REPO / "README_en.md"
PAGES = [README, ENGLISH, *sorted((REPO / "docs").glob("*.md"))]
ROOMS = ("settings", "engine", "corpus", "chat", "tools", "examples")
MAP_ROW = re.compile(r"^\| `(\w+\.py)` \|", re.M)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def read(page: Path) -> str:
    """UTF-8 的全文。"""
    return page.read_text(encoding="utf-8")


def bash_lines(text: str) -> list[str]:
    """代码块里的命令，一行一条，去掉注释。"""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def python_commands(text: str) -> list[str]:
    """代码块里、正文的反引号里，由 python 或 torchrun 运行的命令，不含这个词；省略号当作 1。"""
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    parts = [part.strip() for c in bash_lines(text) + inline for part in re.split(r"&&|\|", c)]
    start = re.compile(r"^(python|torchrun( --[\w-]+(=\S+)?)*) (?=[\w./-]+\.py\b|-m )")
    return [start.sub("", p).replace("…", "1") for p in parts if start.match(p)]


def option_names(source: str) -> set[str]:
    """一个文件里用 `option` 写成的字段名，也就是它的命令行参数。"""
    return set(re.findall(r"^    (\w+): [^=\n]+ = option\(", source, re.M))


def options_of(tool: str) -> type:
    """tools 里的一个程序用来读命令行的类。"""
    for place in (
        f"tools.{tool}.options", f"tools.{tool}.__main__", f"tools.huggingface.{tool}",
        f"tools.{tool}",
    ):  # fmt: skip
        path = REPO / (place.replace(".", "/") + ".py")
        if path.is_file() and hasattr(module := importlib.import_module(place), "Options"):
            return module.Options
    raise AssertionError(f"找不到 tools.{tool} 的 Options")


# 别的程序的参数：torchrun，pytest 与 hypothesis，transformers serve，llama.cpp，lm_eval，docker。
FOREIGN = {
    *("nproc_per_node", "nnodes", "max_restarts", "rdzv_backend", "rdzv_endpoint", "rdzv_id"),
    *("hypothesis_profile", "hypothesis_show_statistics", "host", "port", "continuous_batching"),
    *("model", "model_args", "include_path", "tasks", "apply_chat_template", "gpus"),
    "n_ctx",
}
SOURCES = [path for room in ROOMS for path in (REPO / room).rglob("*.py")]
KNOWN = FOREIGN | {"help", "file", *Config.__dataclass_fields__, *ChatOptions.__dataclass_fields__}
KNOWN = KNOWN.union(*(option_names(read(path)) for path in SOURCES))
COMMANDS = sorted({(page.stem, c) for page in PAGES for c in python_commands(read(page))})


def test_readme_is_short_and_tells_how_to_start():
    text = read(README)
    assert len(text.splitlines()) <= 180
    assert len(read(ENGLISH).splitlines()) <= 200  # 另有中文输出的解释
    assert "pip install -r requirements.txt && python pre_train.py\n" in text
    assert "pip install -r requirements-dev.txt && python -m pytest\n" in text


def test_the_map_names_every_file_at_the_top():
    names = MAP_ROW.findall(read(README))
    assert sorted(names) == sorted(path.name for path in REPO.glob("*.py"))
    assert len(names) == 14


def test_both_languages_say_the_same():
    ours, theirs = read(README), read(ENGLISH)
    for pattern in (r"```text\n.*?```", r"^#+ ", r"(?<=\]\()(?!README)[^)#]+"):
        found = [re.findall(pattern, text, re.M | re.S) for text in (ours, theirs)]
        assert found[0] == found[1], pattern
    assert bash_lines(ours) == bash_lines(theirs)
    assert MAP_ROW.findall(ours) == MAP_ROW.findall(theirs)
    assert "(README_en.md)" in ours and "(README.md)" in theirs


def test_readme_leads_to_every_page():
    links = re.findall(r"\]\(([^)#]+)\)", read(README))
    for page in PAGES[2:]:
        assert f"docs/{page.name}" in links, f"README 没有指向 docs/{page.name}"


def test_every_room_and_its_files_are_on_the_layout():
    text = read(REPO / "docs" / "layout.md")
    for room in ROOMS:
        assert f"`{room}/`" in text
    for room in ("settings", "engine", "corpus", "chat"):
        for path in (REPO / room).glob("[!_]*.py"):
            assert f"`{path.stem}`" in text, f"docs/layout.md 没有 {room}/{path.name}"


def test_there_are_commands_to_check():
    assert len([c for page, c in COMMANDS if page == "README"]) >= 12
    assert len(COMMANDS) >= 60


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_is_understood(page, command):
    script, *args = shlex.split(command)
    if script == "-m":
        module = args.pop(0)
        check_module(module, args)
        return
    assert (REPO / script).is_file()
    problems: list[str] = []
    if "--help" in args:
        return
    if script in ("pre_train.py", "sft_train.py"):
        load_config({"pre_train.py": "pretrain", "sft_train.py": "sft"}[script], args)
    elif script in ("pre_chat.py", "sft_chat.py"):
        parse_flags(ChatOptions, args, problems)
    elif script == "download.py":
        assert args[0] in download.SOURCES
    else:
        assert (script, args) == ("tests/test_lessons.py", [])
    assert not problems


def check_module(module: str, args: list[str]) -> None:
    """``python -m 模块 …``：模块在，参数也都有；位置参数写在最前面。"""
    room, _, tool = module.partition(".")
    if module == "llama_cpp.server":  # 别人的程序，它的参数在 FOREIGN 里
        return
    if module == "pytest":
        assert all((REPO / a).is_file() for a in args if a.startswith("tests/"))
        return
    if tool and not tool.isascii():  # 「tools.名字」：说的是哪一个都行
        return
    subjects = []
    while args and not args[0].startswith("--"):
        subjects.append(args.pop(0))
    if room == "tools":
        problems: list[str] = []
        if (tool, subjects[:1]) == ("bench", ["gpu"]):  # 自己的命令行
            gpu = importlib.import_module("tools.bench.gpu.running")
            parse_flags(gpu.Options, args, problems)
            assert not problems and set(subjects[1:]) <= {"list", *gpu.PARTS}
            return
        if (tool, subjects) == ("bench", ["peers"]):
            peers = importlib.import_module("tools.bench.peers.racing")
            parse_flags(peers.Options, args, problems)
            assert not problems
            return
        parse_flags(options_of(tool), args, problems)
        assert not problems
        if tool == "bench":
            sections = importlib.import_module("tools.bench.__main__").SECTIONS
            assert set(subjects) <= set(sections)
    else:  # 示例的包不一定装了，只读源码，不导入
        assert room == "examples"
        known = option_names(read(REPO / (module.replace(".", "/") + ".py")))
        known |= set(Config.__dataclass_fields__) if tool.startswith("distill") else set()
        named = {a.removeprefix("--").partition("=")[0] for a in args if a.startswith("--")}
        assert named <= known


@each_page
def test_every_file_it_names_exists(page):
    for name in re.findall(r"`([\w./-]+\.(?:py|md|txt|jsonl)|[\w./-]+/)`", read(page)):
        made = name.startswith(("out/", "data/")) or name == "metrics.jsonl"  # 运行之后才有
        assert made or (REPO / name).exists(), name


@each_page
def test_every_module_it_names_exists(page):
    owners = "|".join([*ROOMS, *(path.stem for path in REPO.glob("*.py"))])
    attribute = r"\.(?!(?:py|json|png)\b)\w+"
    name_in_code = re.compile(rf"`(?:python -m )?((?:{owners})(?:{attribute})+)", re.A)
    for name in name_in_code.findall(read(page)):
        path, parts = REPO, name.split(".")
        while parts and (path / parts[0]).is_dir():
            path /= parts.pop(0)
        if parts:
            source = path / f"{parts.pop(0)}.py"
            assert source.is_file(), name
            assert all(re.search(rf"\b{part}\b", read(source)) for part in parts), name


@each_page
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", read(page)):
        assert link.startswith("http") or (page.parent / link).exists(), link


@each_page
def test_every_flag_it_names_exists(page):
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", read(page)):
        name = flag.replace("-", "_")
        assert name in KNOWN or name.removeprefix("no_") in KNOWN, flag


@each_page
def test_every_test_it_names_exists(page):
    """攻击过什么的那张表，一行至少一个测试。"""
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", text := read(page)):
        assert f"\ndef {name}(" in read(REPO / file), f"{page.name}：{file} 里没有 {name}"
    if page.stem == "reliability":
        table = text.partition("| 攻击了什么 | 以前 |")[2].partition("\n\n")[0]
        rows = [row for row in table.splitlines()[2:] if not row.startswith("| **")]
        assert len(rows) >= 50 and all("::test_" in row for row in rows)
