"""README 说的都是真的：提到的文件都在，写着的命令都能被程序看懂。"""

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
from tools.explain import __main__ as explain
from tools.huggingface import import_hf
from tools.web import __main__ as web

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    re.sub(r"^(python|torchrun( --[\w-]+(=\S+)?)*) ", "", part.strip())
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    for part in re.split(r"&&|\|", line.partition("#")[0])
    if part.strip().startswith(("python ", "torchrun "))
]

# tools.explain 要看的文字，tools.bench 要测的一节，tools.export 与 tools.import_hf 的两个路径
SUBJECTS = ["画蛇添足是什么意思？", "train", "out/tiny/sft.pt", "out/tiny/hf", "out/mine/sft.pt"]


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 12
    assert "pip install -r requirements.txt && python pre_train.py\n" in README
    assert "pip install -r requirements-dev.txt && python -m pytest\n" in README


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_is_understood(command):
    script, *args = shlex.split(command)
    problems: list[str] = []
    if script == "-m" and args[0].startswith("tools."):
        tool = importlib.import_module(args[0])
        parse_flags(tool.Options, [a for a in args[1:] if a not in SUBJECTS], problems)
        assert not problems
    if script == "-m" or "--help" in args:
        return
    assert (REPO / script).is_file()
    if script in ("pre_train.py", "sft_train.py"):
        load_config({"pre_train.py": "pretrain", "sft_train.py": "sft"}[script], args)
    elif script in ("pre_chat.py", "sft_chat.py"):
        parse_flags(ChatOptions, args, problems)
    else:
        assert script == "download.py"
        assert args[0] in download.SOURCES
    assert not problems


def test_every_file_it_names_exists():
    for name in re.findall(r"`([\w./]+\.(?:py|md|txt)|[\w]+/)`", README):
        if not name.startswith("out/"):  # 运行之后才有
            assert (REPO / name).exists(), name


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 4
    for link in links:
        assert link.startswith("http") or (REPO / link).exists(), link


def test_every_program_is_on_the_map():
    for path in REPO.glob("*.py"):
        assert f"`{path.name}`" in README, f"{path.name} 不在文件地图里"


def test_every_flag_it_names_exists():
    torchrun = {
        "nproc_per_node",
        "nnodes",
        "max_restarts",
        "rdzv_backend",
        "rdzv_endpoint",
        "rdzv_id",
    }
    known = {
        *parse_names(Config),
        *parse_names(ChatOptions),
        "help",
        "no_compile",
        "file",
        *parse_names(explain.Options),
        *parse_names(web.Options),
        *parse_names(import_hf.Options),
    } | torchrun
    for flag in re.findall(r"--([a-z][\w-]*)", README):
        assert flag.replace("-", "_") in known, flag


def parse_names(cls):
    """一个配置类的全部字段名。"""
    return cls.__dataclass_fields__
