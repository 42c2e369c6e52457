"""每个入口：写成 python tools/名字.py 也能运行；还在导入时出了什么事，都只说一句。"""

import ast
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts import ENVIRONMENT, REPO

ENTRANCES = [
    path.relative_to(REPO)
    for room in ("tools", "examples")
    for path in sorted((REPO / room).rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
]
SCRIPTS = [Path(f"{n}.py") for n in ("pre_train", "sft_train", "pre_chat", "sft_chat", "download")]
INTERRUPTED = (130, "", "\n已中断\n")
FRESH = {name: value for name, value in ENVIRONMENT.items() if name != "GOMP_SPINCOUNT"}


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


# ---------- 还在导入 ----------

# 假的包：不必真的等 torch 一两秒，也说得准信号来的那一刻正在导入。difflib 是读命令行要用的。
# 这时线程怎样等已经定下（settings/threads.py）：torch 一导入，libgomp 就读它。
SLOW = (
    "import os, time\nprint('正在导入', os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
    "time.sleep(60)\n"
)
IN_C = (  # C 写的模块，导入时收到 Ctrl-C，会换成 ImportError
    "import time\ntry:\n    print('正在导入', flush=True)\n    time.sleep(60)\n"
    "except BaseException as e:\n    raise ImportError('numpy') from e\n"
)


def start_with(folder: Path, source: str, path: Path, *args: str, module: bool = False):
    """运行一个入口，torch 与 difflib 换成 source。"""
    for name in ("torch", "difflib"):
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    words = [str(REPO / path)]
    if module:
        name = ".".join(path.with_suffix("").parts).removesuffix(".__main__")
        words = ["-m", name]
    return subprocess.Popen(
        [sys.executable, *words, *args], env={**FRESH, "PYTHONPATH": f"{folder}:{REPO}"},
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def ended(process) -> tuple[int, str, str]:
    """等它结束：退出码，两份输出。"""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("path", [*SCRIPTS, *ENTRANCES], ids=str)
def test_ctrl_c_while_importing_is_one_sentence(path, tmp_path):
    if path.parts[0] == "examples":  # 它们先导入的是各自的包
        assert "from settings.script import run_script" in (REPO / path).read_text("utf-8")
    for module in (False, True)[: 1 + (len(path.parts) > 1)]:
        process = start_with(tmp_path, SLOW, path, module=module)
        assert process.stdout.readline() == "正在导入 1500\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        assert ended(process) == INTERRUPTED


@pytest.mark.parametrize("path", [Path("pre_chat.py"), Path("download.py")], ids=str)
def test_what_goes_wrong_while_importing_is_one_sentence(path, tmp_path):
    process = start_with(tmp_path, SLOW, path)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "", "")
    for source, said in [
        (
            "raise ModuleNotFoundError('x', name='torch')",
            "还没有安装 torch；请先运行 pip install -r",
        ),
        ("raise OSError(24, 'Too many open files', 'x')", "ulimit -n 1024"),
        ("raise ImportError('x.so: failed to map segment from shared object')", "内存不够"),
        ("raise MemoryError", "内存不够"),
    ]:
        code, out, err = ended(start_with(tmp_path, source, path))
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("错误：")
        assert said in err
    code, _, err = ended(start_with(tmp_path, "raise ZeroDivisionError", path))
    assert code == 1 and "Traceback" in err  # 程序自己的错，照常看得到在哪里


def test_ctrl_c_swallowed_by_a_module_in_c_is_still_ctrl_c(tmp_path):
    """main 已经开始，用到才导入的模块把它换成了 ImportError。"""
    (tmp_path / "modelscope_hub.py").write_text(IN_C, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, REPO / "download.py", "wiki"], cwd=tmp_path, stdout=subprocess.PIPE,
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, stderr=subprocess.PIPE,
        encoding="utf-8", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline() == "正在导入\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == INTERRUPTED


def test_ctrl_c_after_the_end_is_one_sentence(tmp_path):
    """main 已经走完，还有线程没有做完：Python 在等它。"""
    script = tmp_path / "a.py"
    script.write_text(
        "from settings.script import run_script\nimport threading, time\n"
        "def main():\n    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    threading.Timer(0.3, lambda: print('等着', flush=True)).start()\n"
        "run_script(main)\n",
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [sys.executable, script], env={**ENVIRONMENT, "PYTHONPATH": str(REPO)}, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline() == "等着\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == INTERRUPTED


def test_a_program_told_to_ignore_ctrl_c_ignores_it(tmp_path):
    """nohup、放在后台的，事先要求忽略；被别的程序导入的，什么也不改。"""
    source = "import signal\nprint(signal.getsignal(2) is signal.default_int_handler, flush=True)\n"
    source += "print(signal.getsignal(2) == signal.SIG_IGN, flush=True)\nraise SystemExit"
    check = subprocess.run(
        [sys.executable, start_with_stub(tmp_path, source)], env={**ENVIRONMENT, "PYTHONPATH":
        f"{tmp_path}:{REPO}"}, capture_output=True, encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert check.stdout == "False\nTrue\n"
    other = tmp_path / "other.py"
    other.write_text("import pre_chat\nprint('到了')", encoding="utf-8")
    (tmp_path / "torch.py").write_text(source.replace("raise SystemExit", ""), encoding="utf-8")
    check = subprocess.run(
        [sys.executable, other], env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{REPO}"},
        capture_output=True, encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert check.stdout.startswith("True\nFalse\n")


def start_with_stub(folder: Path, source: str) -> str:
    (folder / "torch.py").write_text(source, encoding="utf-8")
    return str(REPO / "pre_chat.py")


def with_limit(kind: int, limit: int, path: str, *args: str, folder: Path) -> tuple[int, str, str]:
    """在 ulimit 之下运行。"""
    return ended(
        subprocess.Popen(
            [sys.executable, str(REPO / path), *args], env=ENVIRONMENT, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
        )
    )  # fmt: skip


@pytest.mark.parametrize("path", ["pre_train.py", "sft_chat.py", "tools/explain", "download.py"])
def test_a_limit_too_low_is_one_sentence(path, tmp_path):
    for kind, limits, word in [
        (resource.RLIMIT_NOFILE, (8, 16, 32), "ulimit -n 1024"),
        (resource.RLIMIT_AS, (5 * 10**8, 10**9), "ulimit -v unlimited"),
    ]:
        for limit in limits:
            code, out, err = with_limit(kind, limit, path, folder=tmp_path)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert err.startswith("错误：") and word in err


@pytest.mark.slow
@pytest.mark.parametrize("path", [*SCRIPTS, *ENTRANCES], ids=str)
def test_ctrl_c_at_any_moment_of_the_start_is_one_sentence(path, tmp_path):
    """真的导入一切，在许多时刻各按一次；Python 自己启动的几十毫秒不算。"""
    if path.parts[0] == "examples":
        pytest.importorskip("transformers")
    moments = 24 if path in SCRIPTS else 6
    for moment in range(moments):
        process = subprocess.Popen(
            [sys.executable, REPO / path, "--help"], env=ENVIRONMENT, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        time.sleep(0.1 + moment * 3 / moments)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        code, out, err = ended(process)
        # 已经说完 --help 的，Python 收拾到最后，信号由系统来办：安静地走，shell 看到的也是 130。
        assert (code, out, err) == INTERRUPTED or (code in (0, 130, -2) and "用法：" in out)
        assert err in ("", "\n已中断\n")
