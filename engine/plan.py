"""``--plan``：照真的训练备好一切，走十来步，说出要多久、占多少、练到多好；什么也不写下。

    rehearse      走几步，检验一次，说出估的；Run.steps 用它代替真的循环
    Estimate      估出来的几样；练到多好与三种走法在 ways.py，怎样说在 words.py
    peak_memory   内存；saved_size：检查点有多大

不写，是因为 `RunFolder.writes` 是假的：锁、检查点、记录都听它的。参数照样更新，只在内存里。
"""

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from engine import words
from engine.recorded import Expected
from engine.ways import Way, expected_loss, ways
from settings.say import say

TIMED, FEWEST = 10, 3  # 量几步，头一步（要编译）除外；慢的，至少量几步
LONG = 60  # 量满这么多秒就够了


class Estimate(NamedTuple):
    """估出来的几样；时间是秒，大小是字节。"""

    steps: int  # 还要走几步
    step_seconds: float
    checking: float  # 检验一共要的
    remaining: float  # 走完这些步，连同检验与保存
    startup: float  # 这一次备数据、编译用去的
    tokens: int  # 这些步读的
    epochs: float
    memory: int | None  # 到现在为止的最大值；量不了是 None
    checkpoint: int
    token_files: int
    free: int  # 输出目录所在的盘还剩多少
    loss: Expected | str  # 估不了的，为什么
    ways: list[Way]

    @property
    def total(self) -> float:
        """从敲下命令到走完。"""
        return self.startup + self.remaining


def rehearse(run, exam) -> Iterator[int]:
    """给出步数，如同真的训练；走够了，检验一次，说出估的。步数不够的，从头再走。"""
    steps, timed = range(run.first_step, run.n_steps), 0.0
    if not steps:
        say("已经走完了，没有什么要估的")
        return
    say(f"走 {1 + TIMED} 步，量一量……")
    for i in range(1 + TIMED):
        before = time.monotonic()
        yield steps[i % len(steps)]
        run.between_steps()
        seconds = time.monotonic() - before
        run.pace.stepped(seconds)
        timed += seconds if i else 0.0
        if i >= FEWEST and run.world.gather(timed > LONG)[0]:  # 各进程要走得一样多
            break
    check(run, exam, 1)  # 头一次要编译
    startup = time.monotonic() - run.began - timed - run.pace.step_seconds
    before = time.monotonic()
    check(run, exam, run.config.eval_tokens)
    run.pace.measured.append(time.monotonic() - before)
    run.pace.step = run.first_step
    if run.deadline:
        run.n_steps = run.pace.n_steps = run.deadline.plan(run.pace, run.n_steps)
    state = run.state()  # 分开放的模型，要全体进程一起收
    if run.world.rank == 0:
        say(words.plan(estimate(run, startup, state)))


def check(run, exam, max_tokens: int) -> None:
    """检验一次，不说结果：看它用多久。"""
    exam.measure(max_tokens)
    exam.measure_old(max_tokens)
    with run._parallel.gathered():
        exam.write()


def estimate(run, startup: float, state: dict) -> Estimate:
    """量完了：算出各样。"""
    pace, card, n = run.pace, run.card, run.n_steps - run.first_step
    return Estimate(
        steps=n, step_seconds=pace.step_seconds, checking=pace.checking,
        remaining=pace.remaining(), startup=startup,
        tokens=n * run.rows_per_step * run.config.seq_len,
        epochs=n * run.rows_per_step / run.train.n_rows,
        memory=peak_memory(run.device.place), checkpoint=saved_size(state),
        token_files=sum(2 * card[f"{s}_tokens"] + 8 * card[f"{s}_documents"]
                        for s in ("train", "val")),
        free=free_space(run.folder.root), loss=expected_loss(run, run.n_steps),
        ways=ways(run, startup),
    )  # fmt: skip


def peak_memory(place: torch.device) -> int | None:
    """显卡上是 PyTorch 向它要过的最多的显存，否则是这个进程占过的最多的内存，字节。"""
    if place.type == "cuda":
        return torch.cuda.max_memory_reserved(place)
    try:  # 不用 ru_maxrss：Linux 上它会把父进程的也算进来
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(x.split()[1]) << 10 for x in status.splitlines() if x[:6] == "VmHWM:")
    except (OSError, StopIteration):
        pass
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Counter:
    """只数写了多少字节的文件。"""

    size = 0

    def write(self, data) -> int:
        """数下来。"""
        self.size += (n := memoryview(data).nbytes)
        return n

    def flush(self) -> None:
        """没有什么要送的。"""


def saved_size(state: dict) -> int:
    """检查点存下来有多少字节：真的写一遍，写进一个只数数的文件里。"""
    counter = Counter()
    torch.save(state, counter)
    return counter.size


def free_space(folder: Path) -> int:
    """一个目录所在的盘还剩多少字节；目录还没有的，看它该在哪里。"""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free
