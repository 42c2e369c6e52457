"""测量：参赛者各住一个进程，轮流上场；结果是中位数与最小–最大，连同这台机器的说明。

Contestant       一个参赛者的进程
take_turns       几个参赛者轮流干活，各干几遍；compete 干完就离开
Row, to_markdown 一行结果，一张表
machine          机器、版本、提交
matmul_peak      这台机器做矩阵乘法最快有多快
"""

import io
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from chat.numbers import measured
from config import UserError
from engine.device import cpu_has_bf16

# ---------- 1. 参赛者 ----------


class Contestant:
    """一个参赛者，住在自己的进程里：内存各算各的，谁的设置也影响不到别人。

    Args:
        build: 返回「干一份活」的函数；活的结果是干了多少（数）、写出的编号（列表）或一个字典。
        args: build 的参数。
    """

    def __init__(self, build: Callable, *args, **kwargs):
        self.job = (build, args, kwargs)
        self.process = self.limit = None

    def launch(self) -> None:
        """启动，不等它备好。"""
        if self.process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_live, args=(theirs, *self.job), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def start(self) -> None:
        """启动，等它备好。"""
        self.launch()
        if not self.ready:
            self._receive()
            self.ready = True

    def work(self, limit: float | None = None):
        """干一份活；返回 (结果, 秒)。

        Args:
            limit: 连同备好，至多等多少秒；到了就杀掉它。
        """
        self.limit = limit
        self.start()
        self.pipe.send("work")
        return self._receive()

    def peak_memory(self) -> float:
        """到现在为止用过的最多内存，字节；有 CUDA 时是显存。"""
        self.start()
        self.pipe.send("memory")
        return self._receive()

    def leave(self) -> None:
        """让它自己结束；不肯就杀掉。"""
        if self.process is None:
            return
        self.pipe.close()
        self.process.join(10)
        self.process.kill()
        self.process.join()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.leave()

    def _receive(self):
        try:
            if self.limit is not None and not self.pipe.poll(self.limit):
                self.process.kill()
                raise UserError(f"等了 {self.limit:.0f} 秒还没有做完，不等了")
            answer = self.pipe.recv()
        except EOFError:
            raise UserError("测速的一个进程中途死了：多半是内存不够") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _live(pipe, build, args, kwargs) -> None:
    """参赛者进程里的一生：备好，然后等一声干一份。它说的话不打印，只在出错时给出。"""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            job = build(*args, **kwargs)
            pipe.send("ready")
            while True:
                if pipe.recv() == "memory":
                    pipe.send(_peak())
                    continue
                start = time.perf_counter()
                result = job()
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()  # 显卡做完了才算做完
                pipe.send((result, time.perf_counter() - start))
    except (KeyboardInterrupt, EOFError, ConnectionError):
        pass  # 主进程走了
    except Exception as error:
        pipe.send(UserError(f"{build.__name__}{args}：{error}\n{said.getvalue()[-2000:]}"))


def _peak() -> float:
    """用过显卡就是显存；否则是这个进程自己的内存（ru_maxrss 会把父进程的也算进来，不能用）。"""
    if torch.cuda.is_available() and (used := torch.cuda.max_memory_allocated()):
        return used
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return math.nan  # 不是 Linux
    return next(int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("VmHWM"))


def take_turns(contestants: dict[str, Contestant], repeats: int) -> dict[str, list]:
    """每一轮大家各干一份，共 repeats 轮；返回 {名字: [(结果, 秒), …]}。

    轮流上场：机器一时忙、一时闲，各方受的影响相同，每一轮的比值因此可信。
    """
    if torch.cuda.is_available():  # 一起备，编译的等待只有一次；CPU 上一起走第一步，内存放不下
        for contestant in contestants.values():
            contestant.launch()
    for contestant in contestants.values():
        contestant.start()  # 都备好了才开始：别人正在编译时测的不算数
    for contestant in contestants.values():
        contestant.work()  # 热身
    results: dict[str, list] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            results[name].append(contestant.work())
    return results


def compete(contestants: dict[str, Contestant], repeats: int) -> dict[str, list]:
    """同 `take_turns`，干完就离开。"""
    found = take_turns(contestants, repeats)
    for contestant in contestants.values():
        contestant.leave()
    return found


def rates(found: list) -> list[float]:
    """每一份活的速度：干了多少 / 秒。"""
    return [(len(r) if isinstance(r, list) else r) / seconds for r, seconds in found]


# ---------- 2. 结果 ----------

ON_GPU = ("train", "decode", "memory")  # 显卡上也该测的几节


@dataclass
class Row:
    """一行结果：测什么、几次的值、单位、目标。"""

    what: str
    values: list[float]  # 空的是没有测量
    unit: str
    goal: str = ""

    def shown(self) -> str:
        """中位数（最小–最大）。"""
        if not self.values:
            return "没有测量"
        middle = measured(statistics.median(self.values))
        if len(self.values) == 1:
            return f"{middle} {self.unit}"
        return f"{middle}（{measured(min(self.values))}–{measured(max(self.values))}）{self.unit}"


def ratios(a: list[float], b: list[float]) -> list[float]:
    """逐轮的 a / b。"""
    return [x / y for x, y in zip(a, b, strict=True)]


def to_markdown(sections: dict[str, dict]) -> str:
    """几节结果写成一份 Markdown。"""
    lines = [
        "# 测速",
        "",
        "本文件由 `python -m tools.bench` 写出，不要手改。数是几轮的中位数，括号里是最小–最大。",
        "训练与生成的几方轮流上场，「倍」是逐轮相比；备数据与比谁先到的几方先后进行。"
        "比的是同一次运行里的几方；换一台机器，绝对的数会变。",
    ]
    for name, section in sections.items():
        about = section["machine"]
        lines += ["", f"## {name}", ""]
        lines += ["；".join(f"{k} {v}" for k, v in about.items()) + "。", ""]
        lines += [f"`{section['command']}`", ""]
        lines += ["| 测什么 | 结果 | 目标 |", "|---|---|---|"]
        for row in section["rows"]:
            row = Row(**row)
            lines.append(f"| {row.what} | {row.shown()} | {row.goal} |")
    on_gpu = {name for name, section in sections.items() if "显卡" in section["machine"]}
    wanted = [f"{section} {preset}" for section in ON_GPU for preset in ("wide", "deep")]
    if missing := [name for name in wanted if not any(n.startswith(name) for n in on_gpu)]:
        lines += ["", "## 显卡上没有测量的", ""]
        lines += [f"{'、'.join(missing)}。在有显卡的机器上运行 `python -m tools.bench` 会测。"]
    return "\n".join(lines) + "\n"


# ---------- 3. 机器 ----------


def machine() -> dict[str, str]:
    """这次测量是在什么上面做的。"""
    import transformers

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines()
                 if x.startswith("model name")]  # fmt: skip
        name = found[0] if found else name
    about = {
        "处理器": f"{name}，{os.cpu_count()} 核，{'有' if cpu_has_bf16() else '没有'} bf16 指令",
        "PyTorch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "提交": commit(),
        "日期": date.today().isoformat(),
    }
    if torch.cuda.is_available():
        about = {"显卡": torch.cuda.get_device_name(), **about}
    return about


def commit() -> str:
    """现在的提交；有没提交的代码就加上「+」。"""

    def git(*args: str) -> str:
        try:
            found = subprocess.run(["git", *args], capture_output=True, text=True, check=False)
        except OSError:  # 没有装 git
            return ""
        return found.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "未知") + (
        "+" if git("status", "-s", "--", "*.py") else ""
    )


def matmul_peak(dtype: str) -> Callable[[], float]:
    """一份活：几种形状的矩阵乘法各做几遍，返回最快的一种每秒多少次浮点运算（乘 1 秒）。"""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [(n, n, n) for n in ((4096, 8192) if place == "cuda" else (1024, 2048))]
    sizes += [(4096, 512, 512), (4096, 512, 1664)]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=place).to(getattr(torch, dtype))

    triples = [(random(m, k), random(k, n), random(m, n)) for m, k, n in sizes]

    def seconds(a, b, out) -> float:
        if place == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, b, out=out)  # 写在分配好的地方：不计向系统要内存的时间
        if place == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def work() -> float:
        return max(
            2 * a.size(0) * a.size(1) * b.size(1) / min(seconds(a, b, out) for _ in range(4))
            for a, b, out in triples
        )

    work()
    return work
