"""训练的记录：逐步写进 metrics.jsonl，结束时画成 loss.png。

Metrics        写的一边；接着练时，先读回以前的
read_records   读的一边：像样的行，与不像样的有几行；接着练、网页、画图都用它
"""

import json
import math
import os
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.progress import Progress
from settings.files import new_file
from settings.say import say


class Metrics:
    """训练的记录：每行一个 JSON 对象写进 metrics.jsonl，结束时画成 loss.png。

    Args:
        folder: 放在哪里。
        writes: 写不写；不写的只留在内存里（不是第 0 个进程，或者 ``--plan``）。
        progress: 接着练时，保留到这一步为止的记录；之后的会重新走一遍。
    """

    def __init__(self, folder: Path, writes: bool, progress: Progress):
        self.path = folder / "metrics.jsonl"
        self.picture = folder / "loss.png"
        self.start = time.monotonic() - progress.seconds
        self.file: BinaryIO | None = None
        self.unwritten = b""
        self.rows: list[dict] = []
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        records = read_records(self.path) if progress.step else NOTHING
        n = sum(row["step"] <= progress.step for row in records.rows)  # 之后的会重新走一遍
        self.rows = records.rows[:n]
        part = self.path.with_name("metrics.jsonl.part")
        with new_file(part) as f:  # 别人放在那里的链接，不顺着它写
            f.writelines(records.lines[:n])
        if records.left_out:
            kept = keep_damaged(self.path)
            say(f"（{self.path} {records.complaint()}；原样的一份留在 {kept}）")
        elif progress.step and not self.rows:
            say(f"（{self.path} 不见了，记录从第 {progress.step + 1} 步写起）")
        os.replace(part, self.path)
        self.file = self.path.open("ab", buffering=0)

    def write(self, **row) -> None:
        """记一行；浮点数保留六位有效数字，另记从开始起的秒数。磁盘满时先留在内存里。"""
        row["seconds"] = self.seconds()
        for name, value in row.items():
            if isinstance(value, float):  # JSON 里没有无穷大
                row[name] = float(f"{value:.6g}") if math.isfinite(value) else None
        self.rows.append(row)
        if self.file is None:
            return
        self.unwritten += (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self._write()

    def _write(self) -> None:
        with suppress(OSError):
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def sync(self) -> None:
        """让写过的记录落盘：先于检查点，接着练时它之前的记录便一行不缺。"""
        if self.file is not None:
            self._write()
            with suppress(OSError):
                os.fsync(self.file.fileno())

    def seconds(self) -> float:
        """从开始到现在的秒数，不含中断的时候。"""
        return time.monotonic() - self.start

    def draw(self) -> None:
        """画训练与检验的损失曲线。"""
        if self.file is None:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for name, style in (("train_loss", "-"), ("val_loss", "o-"), ("val_loss_old", "s--")):
            points = [(r["tokens"], r[name]) for r in self.rows if r.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1)
        axes.set(xlabel="tokens", ylabel="loss (nats / token)")
        axes.grid(alpha=0.3)
        axes.legend()
        try:
            with new_file(self.picture) as f:  # 同样，不顺着链接写
                figure.savefig(f, dpi=120, format="png")
        except OSError as error:
            say(f"（画不了 {self.picture}（{error.strerror}），不影响检查点）")
        plt.close(figure)


# ---------- 读 ----------

LONGEST = 1 << 20  # 一行最长多少字节
COUNT_LIMIT = 1 << 53
NUMBERS = ("train_loss", "val_loss", "val_bpc", "val_loss_old", "val_bpc_old", "lr", "grad_norm",
           "tokens_per_second", "seconds")  # fmt: skip


class Records(NamedTuple):
    """读回来的记录。"""

    rows: list[dict]  # 像样的，步数越来越大
    lines: list[bytes]  # 它们在文件里的原样，连同换行
    left_out: int  # 不像样的有几行

    def complaint(self) -> str:
        """有几行不像样；都像样，是空的。"""
        if not self.left_out:
            return ""
        return f"有 {self.left_out} 行不是完好的记录，没有用；用的是其余的 {len(self.rows)} 行"


NOTHING = Records([], [], 0)


def read_records(path: Path) -> Records:
    """读回记录；不像样的行数出来，断电时写了一半的最后一行不要，也不算。

    Raises:
        OSError: 在那里却读不了。
    """
    if not path.is_file():
        return NOTHING if not path.exists() else Records([], [], 1)
    found, left_out = [], 0
    with path.open("rb") as f:
        for line in _lines(f):
            if (row := sound(line)) is not None:
                found.append((row, line if line.endswith(b"\n") else line + b"\n"))
            elif line.endswith(b"\n") or len(line) > LONGEST or not line.startswith(b'{"'):
                left_out += 1
    kept = in_order([row["step"] for row, _ in found])
    rows, lines = [found[i][0] for i in kept], [found[i][1] for i in kept]
    return Records(rows, lines, left_out + len(found) - len(kept))


def read_metrics(path: Path) -> list[dict]:
    """读回记录里像样的行。"""
    return read_records(path).rows


def _lines(f: BinaryIO) -> Iterator[bytes]:
    """一行一行；太长的只给出开头，其余的读过去，不占内存。"""
    while line := f.readline(LONGEST + 1):
        rest = line
        while len(rest) > LONGEST and not rest.endswith(b"\n"):
            rest = f.readline(LONGEST + 1)
        yield line


def sound(line: bytes) -> dict[str, Any] | None:
    """一行记录；步数、词元数不是数得出来的数，要画的不是有限的数，写的不是文字，都是 None。"""
    if len(line) > LONGEST:
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not (row.get("sample") is None or is_text(row["sample"])):
        return None
    counts = (row.get("step"), row.get("tokens"))
    if any(type(n) is not int or not 0 <= n < COUNT_LIMIT for n in counts):
        return None
    numbers = [row[name] for name in NUMBERS if row.get(name) is not None]
    # 不用 isfinite：它遇到几百位的整数会出错
    if any(type(x) not in (int, float) or not -1e39 < x < 1e39 for x in numbers):
        return None
    return row


def is_text(x: Any) -> bool:
    """是文字，而且写得出来：没有不成对的代理字符。"""
    return isinstance(x, str) and not any("\ud800" <= c <= "\udfff" for c in x)


def in_order(steps: list[int]) -> list[int]:
    """留下哪几行，步数才一行比一行大，而且留得最多（最长递增子序列）：一个离谱的步数只丢它自己。"""
    if all(a < b for a, b in pairwise(steps)):
        return list(range(len(steps)))
    ends: list[int] = []  # ends[n]：长为 n + 1 的递增子序列，末尾最小是几
    last: list[int] = []  # 那个末尾是第几行
    before: list[int] = []  # 每一行的前一行
    for i, step in enumerate(steps):
        n = bisect_left(ends, step)
        before.append(last[n - 1] if n else -1)
        ends[n : n + 1], last[n : n + 1] = [step], [i]
    kept, i = [], last[-1]
    while i >= 0:
        kept.append(i)
        i = before[i]
    return kept[::-1]


def keep_damaged(path: Path) -> Path:
    """坏了的记录改名留着，不盖掉以前留下的；返回新的名字。"""
    kept, n = path.with_name("metrics.damaged.jsonl"), 2
    while os.path.lexists(kept):
        kept, n = path.with_name(f"metrics.damaged.{n}.jsonl"), n + 1
    os.replace(path, kept)
    return kept
