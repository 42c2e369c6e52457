"""哪个房间不许用哪个房间：读每个文件的 import，一条条核对。"""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
READABLE = ["config", "tokenizer", "model", "experts", "dataset", "loss", "optimizer", "generate",
            "microscope"]  # fmt: skip
SCRIPTS = ["pre_train", "sft_train", "pre_chat", "sft_chat", "download"]
ROOMS = ["settings", "engine", "corpus", "chat", "tools"]

# 谁：不许用谁。可读的文件要什么，由用它的人交给它（一个精度、一个函数）。
NEVER = {
    **{name: ["engine", "chat", "corpus", "tools"] for name in READABLE},
    "settings": ["engine", "chat", "corpus", "tools"],
    "corpus": ["engine", "chat", "tools"],
    "engine": ["loss", "optimizer", "chat", "tools", *SCRIPTS],
    "chat": ["corpus", "engine.run", "tools"],
}


def modules(place: str) -> list[Path]:
    """一个文件，或者一个房间里的全部文件。"""
    file = REPO / f"{place}.py"
    return [file] if file.exists() else sorted((REPO / place).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """一个文件用到的模块；``from a import b`` 的 b 也许是模块，所以 a 与 a.b 都算。"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} 用了相对的 import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_top_holds_what_a_student_reads_or_types():
    assert {path.stem for path in REPO.glob("*.py")} == {*READABLE, *SCRIPTS}


@pytest.mark.parametrize("place", NEVER)
def test_nobody_reaches_into_a_room_that_is_not_theirs(place):
    for path in modules(place):
        for used in imports(path):
            broken = [room for room in NEVER[place] if f"{used}.".startswith(f"{room}.")]
            assert not broken, f"{path.relative_to(REPO)} 用了 {used}"


def test_no_tool_takes_from_the_entrance_of_another():
    for path in modules("tools"):
        mine = ".".join(path.relative_to(REPO).parts[:2])
        for used in imports(path):
            elsewhere = used.startswith("tools.") and not used.startswith(f"{mine}.")
            assert not (elsewhere and "__main__" in used), f"{path} 用了 {used}"


def test_there_is_no_circle():
    """从任何一个文件出发，顺着 import 走，回不到自己。"""
    names = {}
    for place in (*READABLE, *SCRIPTS, *ROOMS):
        for path in modules(place):
            parts = path.relative_to(REPO).with_suffix("").parts
            names[".".join(parts).removesuffix(".__init__")] = path
    edges = {name: {m for m in imports(path) if m in names} for name, path in names.items()}

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, [*way, name])
            done.add(name)

    done: set[str] = set()
    for name in names:
        visit(name, [])
