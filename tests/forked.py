"""真的进程，可以杀掉、发信号，却不必每次等两秒导入 torch。

从一个专管分身的进程（multiprocessing 的 forkserver）里分出来：它导入好了程序要用的一切，自己却
什么也不做，所以分出来的与刚启动的一样。要在启动之前就定下的（torchrun、线程数），仍用 subprocess。
"""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pre_train", "sft_train", "forked"])


def live(folder: str, script: str, argv: list[str], log: str, env: dict[str, str]) -> None:
    """在分出来的进程里：目录、输出、信号都像从命令行启动的，然后运行。"""
    os.setsid()
    os.chdir(folder)
    os.environ.update(env)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (
        open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    sys.argv = [script, *argv]
    start(script)


def start(script: str) -> None:
    """运行一个脚本（路径），或一个模块（名字），就像写在 python 后面那样。"""
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


class Forked:
    """分出来的一个进程；用法同 subprocess.Popen。"""

    def __init__(self, folder, script: str, argv, log: Path, env: dict[str, str] | None = None):
        here = Path(__file__).resolve().parent
        paths = os.pathsep.join(map(str, (here, here.parent)))
        job = (str(folder), script, list(argv), str(log), env or {})
        self.process = CONTEXT.Process(target=live, args=job, daemon=True)
        with mock.patch.dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1"):
            self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """退出码；还没有结束是 None。"""
        return self.process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """等它结束，返回退出码。"""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"{seconds} 秒还没有结束"
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """发一个信号。"""
        if self.poll() is None:
            os.kill(self.pid, number)
