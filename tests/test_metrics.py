"""记录：一行一个 JSON，接着练时一行不多、一行不少。"""

import json
import math

from engine.distributed import World
from engine.metrics import Metrics
from engine.progress import Progress


def test_metrics_are_one_json_object_a_line_and_a_picture(tmp_path):
    metrics = Metrics(tmp_path / "pretrain", World(), Progress())
    metrics.write(step=0, tokens=0, val_loss=math.log(21248), val_bpc=14.7)
    for step in (1, 2):
        metrics.write(step=step, tokens=step * 10, train_loss=9.0 / step, lr=0.1, grad_norm=1.0,
                      tokens_per_second=5.0)  # fmt: skip
    metrics.draw()
    metrics.write(step=3, tokens=30, train_loss=3.0, grad_norm=float("inf"))  # fp16 溢出的一步
    rows = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert rows[-1]["grad_norm"] is None
    assert all("seconds" in r for r in rows)
    assert metrics.picture.read_bytes()[:4] == b"\x89PNG"


def test_metrics_go_on_where_the_checkpoint_is(tmp_path):
    """检查点之后多记的、断电时写了一半的，都不要；时间接着数。"""
    metrics = Metrics(tmp_path, World(), Progress())
    for step in range(5):
        metrics.write(step=step, tokens=step)
    with metrics.path.open("a") as f:
        f.write('{"step": 5, "tok')
    again = Metrics(tmp_path, World(), Progress(step=3, seconds=100.0))
    again.write(step=4, tokens=44)
    rows = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [(r["step"], r["tokens"]) for r in rows] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 44)]
    assert rows == again.rows
    assert rows[-1]["seconds"] >= 100
    fresh = Metrics(tmp_path, World(), Progress())
    assert fresh.path.read_text() == ""


def test_metrics_wait_in_memory_while_the_disk_is_full(tmp_path):
    metrics = Metrics(tmp_path, World(), Progress())
    real, full = metrics.file, True

    class Disk:
        def write(self, content):
            if full:
                raise OSError(28, "No space left on device")
            return real.write(content[:7]) if len(content) > 7 else real.write(content)

    metrics.file = Disk()
    metrics.write(step=1, tokens=1)
    metrics.write(step=2, tokens=2)
    full = False
    for step in range(3, 60):  # 一次只写得进几个字节，也一个不丢
        metrics.write(step=step, tokens=step)
    metrics.file = real
    metrics.write(step=60, tokens=60)
    assert [json.loads(x)["step"] for x in metrics.path.open()] == list(range(1, 61))
