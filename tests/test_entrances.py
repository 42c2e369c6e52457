"""tools 与 examples 里的程序，写成 python tools/名字.py 也能运行，在哪个目录里都行。"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ENVIRONMENT, REPO

ENTRANCES = [
    path.relative_to(REPO)
    for room in ("tools", "examples")
    for path in sorted((REPO / room).rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
]


def help_of(path: Path, folder: Path) -> None:
    """另起一个进程，当作文件运行：--help 印出用法，别的什么也没有。"""
    env = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, path, "--help"], env=env, cwd=folder, timeout=60,
                            capture_output=True, encoding="utf-8")  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert "用法：" in result.stdout and "参数" in result.stdout


@pytest.mark.parametrize("path", ENTRANCES, ids=str)
def test_the_way_home_is_found_before_anything_else(path):
    """当作文件运行时，Python 先在它自己的目录里找：旁边若有与标准库同名的，标准库也会找错。"""
    body = ast.parse((REPO / path).read_text(encoding="utf-8")).body
    assert [ast.unparse(line) for line in body[1:3]] == ["import os", "import sys"]
    assert isinstance(body[3], ast.If) and ast.unparse(body[3].test) == "not __package__"
    found = {"__file__": str(REPO / path), "__package__": None}
    before = list(sys.path)
    try:
        exec(compile(ast.Module(body[1:4], []), str(path), "exec"), found)
        assert sys.path == [str(REPO), *before[1:]]
    finally:
        sys.path[:] = before


def test_a_tool_runs_as_a_file(tmp_path):
    help_of(REPO / "tools" / "export.py", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", ENTRANCES, ids=str)
def test_every_entrance_runs_as_a_file(path, tmp_path):
    """从别的目录；写成绝对的、相对的路径，或者写成目录。"""
    if path.parts[0] == "examples":
        pytest.importorskip("transformers")
    help_of(REPO / path, tmp_path)
    if path.name == "__main__.py":
        help_of(REPO / path.parent, tmp_path)
    help_of(Path(os.path.relpath(REPO / path, REPO / "tools")), REPO / "tools")
