"""一步里显卡闲了多久：前向、反向、截短、更新，各发多少内核，各占多久，处理器等了几次。"""

import time
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from engine.device import Device
from tools.bench.gpu.stage import Stage
from tools.bench.gpu.trace import FORWARD, MARK, WHOLE, Share, read_shares, read_trace
from tools.bench.measuring import Row
from tools.bench.ours import Newborn
from tools.bench.trainer import compiled_or_error

N_STEPS = 5  # 剖析几步；之前先走同样几步编译，再计时几步
FETCH, BACKWARD, CLIP, WAIT, UPDATE = "fetch", "backward", "clip", "wait", "update"
SAID = {FETCH: "取一批", FORWARD: "前向与其余", BACKWARD: "反向", CLIP: "截短", WAIT: "等显卡",
        UPDATE: "更新"}  # fmt: skip


def part(name: str):
    """这一段的记号；kineto 只认 ASCII，别的一律记作 unknown。"""
    return record_function(MARK + name)


class Watched(Newborn):
    """pre_train.py 的循环，每个动作都做了记号；走完几步就结束。

    Args:
        stage: 怎样测。
        config, device: 同 `Stepper`。
    """

    def __init__(self, stage: Stage, config, device: Device):
        super().__init__(config, device, whole_vocabulary=False)
        self.how, self.trace = stage, Path(stage.folder) / "trace.json.gz"

    def steps(self, exam) -> Iterator[int]:
        """编译，不剖析地计时，再剖析；后两段走的步数相同。"""
        yield from self.some(0)
        start = self.how.clock()
        yield from self.some(N_STEPS)
        self.seconds = self.how.clock() - start
        activities = [ProfilerActivity.CPU]
        if self.device.place.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as found, record_function(WHOLE):
            yield from self.some(2 * N_STEPS)
            self.how.finish()
        found.export_chrome_trace(str(self.trace))
        self.table = found.key_averages().table(
            sort_by="self_device_time_total" if self.device.place.type == "cuda"
            else "self_cpu_time_total", row_limit=40,
        )  # fmt: skip

    def some(self, first: int) -> Iterator[int]:
        """从第 first 步起走几步。"""
        for step in range(first, first + N_STEPS):
            yield step
            self.between_steps()

    def batches(self, step: int):
        """取一批。"""
        found = super().batches(step)
        while True:
            with part(FETCH):
                batch = next(found, None)
            if batch is None:
                return
            yield batch

    def backward(self, *args):
        """反向。"""
        with part(BACKWARD):
            return super().backward(*args)

    def clip(self, *args):
        """截短。"""
        with part(CLIP):
            return super().clip(*args)

    def finite(self, *args):
        """等显卡：一步里只该在这里等。"""
        with part(WAIT):
            return super().finite(*args)

    def update(self, *args):
        """更新。"""
        with part(UPDATE):
            return super().update(*args)


def measure(stage: Stage) -> Iterator[Row]:
    """`wide` 的几步。"""
    config = stage.config("wide")
    device = Device(config)
    loop = Watched(stage, config, device)
    start = time.perf_counter()
    with compiled_or_error(device):
        loop.walk()
    stage.log("一步的剖析", loop.table)
    shares, whole, busy = read_shares(read_trace(loop.trace))
    plain = loop.seconds * 1e3 / N_STEPS
    yield Row("wide：备好、编译、剖析，一共", [time.perf_counter() - start], "秒")
    yield Row("wide：一步，不剖析", [plain], "毫秒")
    yield Row("wide：一步，剖析着", [whole / N_STEPS], "毫秒")
    n_launched = sum(s.launched for s in shares.values())
    on_card = [busy / N_STEPS] if n_launched else []  # 没有显卡，就没有测量
    yield Row("wide：一步里显卡忙着", on_card, "毫秒")
    yield Row(
        "wide：一步里显卡闲着（不剖析的一步减去忙着的）", [plain - x for x in on_card], "毫秒"
    )
    for name, said in SAID.items():
        share = shares.get(name, Share())
        yield Row(f"wide：{said}，处理器", [share.host / N_STEPS], "毫秒")
        values = (share.busy, share.launched, share.waits)
        units = (("显卡", "毫秒"), ("发出的内核与拷贝", "个"), ("停下来等显卡", "次"))
        for (what, unit), value in zip(units, values, strict=True):
            found = [value / N_STEPS] if n_launched else []
            yield Row(f"wide：{said}，{what}", found, unit)
