"""训练的记录：逐步写进 metrics.jsonl，结束时画成 loss.png。"""

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from engine.distributed import World
from engine.progress import Progress


class Metrics:
    """训练的记录：每行一个 JSON 对象写进 metrics.jsonl，结束时画成 loss.png。

    Args:
        folder: 放在哪里。
        world: 只有第 0 个进程写。
        progress: 接着练时，保留到这一步为止的记录；之后的会重新走一遍。
    """

    def __init__(self, folder: Path, world: World, progress: Progress):
        self.path = folder / "metrics.jsonl"
        self.picture = folder / "loss.png"
        self.start = time.monotonic() - progress.seconds
        self.file: BinaryIO | None = None
        self.unwritten = b""
        self.rows: list[dict] = []
        if world.rank > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if progress.step:
            self.rows = [r for r in read_metrics(self.path) if r["step"] <= progress.step]
            if not self.rows:
                print(f"（{self.path} 不见了，记录从第 {progress.step + 1} 步写起）")
        part = self.path.with_name("metrics.jsonl.part")
        with part.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
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
            figure.savefig(self.picture, dpi=120)
        except OSError as error:
            print(f"（画不了 {self.picture}（{error.strerror}），不影响检查点）")
        plt.close(figure)


def read_metrics(path: Path) -> list[dict]:
    """读回记录；断电时写了一半的最后一行不要。"""
    rows = []
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as f:
        for line in f:
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                row["step"] + 0
                rows.append(row)
    return rows
