"""测速的几份测试里交给另一个进程做的活；单独一个文件，那个进程便不必导入别的。"""

import os
import time
from pathlib import Path


def job(n: int, fail: bool = False):
    """一份活：返回 n 个数；fail：备不好。"""
    if fail:
        raise ValueError("坏了")
    return lambda: list(range(n))


def rows_then(end: str):
    """一份活：交出一行；两行之后，死了（die）、卡住了（hang），或者做完了（stop）。"""
    from tools.bench.measuring import Row

    def rows():
        yield from (Row(str(n), [float(n)], "") for n in range(2))
        if end == "die":
            os._exit(1)
        if end == "hang":
            time.sleep(600)

    found = rows()
    return lambda: next(found, None)


def spins():
    """一份活：这个进程的线程空转多少次才睡，环境变量里写的。"""
    return lambda: os.environ.get("GOMP_SPINCOUNT")


def meet(folder: str, me: str):
    """一份活：两个进程互相等，都来了才做得完；返回等来的是谁。"""

    def work() -> str:
        Path(folder, me).touch()
        for _ in range(1000):
            if others := {path.name for path in Path(folder).iterdir()} - {me}:
                return others.pop()
            time.sleep(0.01)
        raise TimeoutError("等不到")

    return work
