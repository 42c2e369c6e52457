"""读剖析的记录（Chrome trace）：每一段发了多少内核，显卡忙了多久，处理器等了几次。

内核在显卡上什么时候做，与处理器走到哪里无关；所以它算在「发出它的那一刻」所在的那一段里。
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ON_CARD = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
MARK = "part:"  # 每一段的记号
WHOLE = "part:whole"  # 量的全程
FORWARD = "forward"  # 不在别的段里的


@dataclass
class Share:
    """一段里的。"""

    launched: int = 0  # 发出的内核与拷贝，个
    busy: float = 0.0  # 它们在显卡上的时间，毫秒
    waits: int = 0  # 处理器停下来等显卡，次
    host: float = 0.0  # 处理器走过这一段，毫秒


def read_trace(path: Path) -> list[dict]:
    """torch.profiler 导出的 .json.gz。"""
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return json.load(f)["traceEvents"]


def read_shares(events: Iterable[dict]) -> tuple[dict[str, Share], float, float]:
    """每一段的几个数。

    Args:
        events: 记录里的各项；时刻的单位是微秒。
    Returns:
        ({段: Share}, 全程多少毫秒, 其中显卡忙着多少毫秒)
    """
    events = [e for e in events if e.get("ph") == "X"]
    marks = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events
             if e["cat"] == "user_annotation" and e["name"].startswith(MARK)]  # fmt: skip
    ((_, begin, end),) = (m for m in marks if m[0] == WHOLE)
    marks = [(name.removeprefix(MARK), a, b) for name, a, b in marks if name != WHOLE]
    marks.sort(key=lambda m: m[2] - m[1])  # 一段套着一段的，算在里面的那一段

    def part_of(moment: float) -> str:
        return next((name for name, a, b in marks if a <= moment <= b), FORWARD)

    shares: dict[str, Share] = defaultdict(Share)
    called = {e["args"]["correlation"]: e["ts"] for e in events
              if e["cat"] in CALLS and "correlation" in e.get("args", {})}  # fmt: skip
    on_card = []
    for e in events:
        if e["cat"] in ON_CARD:
            at = called.get(e["args"].get("correlation"), e["ts"])
            if begin <= at <= end:
                share = shares[part_of(at)]
                share.launched, share.busy = share.launched + 1, share.busy + e["dur"] / 1e3
                on_card.append((e["ts"], e["ts"] + e["dur"]))
        elif e["cat"] in CALLS and "Synchronize" in e["name"] and begin <= e["ts"] <= end:
            shares[part_of(e["ts"])].waits += 1
    for name, a, b in marks:
        shares[name].host += (b - a) / 1e3
    shares[FORWARD].host = (end - begin) / 1e3 - sum(s.host for s in shares.values())
    return dict(shares), (end - begin) / 1e3, covered(on_card) / 1e3


def covered(spans: list[tuple[float, float]]) -> float:
    """几段时间合起来盖住多久；重叠的只算一次。"""
    total, until = 0.0, float("-inf")
    for a, b in sorted(spans):
        total += max(0.0, b - max(a, until))
        until = max(until, b)
    return total
