"""规模：各样加倍，时间与内存怎样增长；训练与聊天的内存峰值。"""

import statistics

import numpy as np
import torch

from chat.numbers import measured
from config import PRESETS, Config
from engine.device import Device
from tools.bench import contestants
from tools.bench.flops import training_flops
from tools.bench.measuring import Contestant, Row, rates, take_turns
from tools.bench.options import Options
from tools.bench.trainer import settings
from tools.bench.training import trainers

SCALES = {  # 名字: (字段, 四个值)；其余取 tiny 的
    "层数": ("n_layers", (2, 4, 8, 16)),
    "宽度": ("dim", (96, 192, 384, 768)),
    "长度": ("seq_len", (128, 256, 512, 1024)),
    "词表": ("vocab_size", (2656, 5312, 10624, 21248)),
}


def bench_scale(options: Options, preset: str) -> list[Row]:
    """层数、宽度、长度、词表各加倍，每个词元的时间与内存怎样增长：指数，与公式算出的指数。"""
    itself = peak_memory(contestants.nothing)
    rows = []
    for name, (field, values) in SCALES.items():
        times, memory, formula = [], [], []
        for value in values:
            shape = scaled(field, value)
            with Contestant(contestants.forward_backward, **shape) as player:
                found = take_turns({"x": player}, options.repeats)["x"]
                times.append(1e6 / statistics.median(rates(found)))
                memory.append((player.peak_memory() - itself) / 1e6)
            config = Config(**{**PRESETS["tiny"], **shape})
            formula.append(training_flops(config, config.vocab_size) / 1e6)
        for what, found, unit in (
            ("每个词元的时间", times, "微秒"),
            ("内存峰值，除去程序自己的", memory, "MB"),
        ):
            points = "，".join(f"{v}: {measured(m)}" for v, m in zip(values, found, strict=True))
            said = f"{name}，{what}（{unit}；{points}）：指数"
            rows.append(Row(said, [exponent(values, found)], ""))
        rows.append(Row(f"{name}，公式 training_flops 的指数", [exponent(values, formula)], ""))
    return rows


def scaled(field: str, value: int) -> dict[str, int]:
    """把 tiny 的一样换成 value；宽度变了，跟着它的也变；长度变了，一次的词元不变。"""
    shape = {field: value, "max_len": 1024, "batch_size": 8}
    if field == "dim":
        n_heads = value // 32
        shape |= {"hidden_dim": value * 3, "n_heads": n_heads, "n_kv_heads": n_heads}
    if field == "seq_len":
        shape["batch_size"] = 2048 // value
    return shape


def exponent(x, y) -> float:
    """y 随 x 的几次方增长：双对数坐标上的斜率。"""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def bench_memory(options: Options, preset: str) -> list[Row]:
    """训练与聊天的内存峰值。"""
    rows = []
    for name in trainers(Device(settings(preset))):
        used = training_memory(name, preset)
        rows.append(Row(f"{preset}：训练，{name}", [used / 1e9], "GB"))
    if torch.cuda.is_available():  # CPU 上的峰值出在编译的时候，推不出每行多少
        rows += bench_card(preset)
    for quantize in ("none", "bf16", "int8"):
        used = peak_memory(contestants.decode, preset, 32, "float32", False, quantize, times=1)
        rows.append(Row(f"{preset}：生成，--quantize {quantize}", [used / 1e9], "GB"))
    return rows


def peak_memory(*job, times: int = 0, **kwargs) -> float:
    """干 times 份活，用过的最多内存，字节。"""
    with Contestant(*job, **kwargs) as player:
        for _ in range(times):
            player.work()
        return player.peak_memory()


def training_memory(kind: str, preset: str, **changes) -> float:
    """训练两小段用过的最多内存，字节：第一步之后才有优化器的状态。"""
    return peak_memory(contestants.train, kind, preset, 0.1, times=2, **changes)


def bench_card(preset: str, card: float = 24e9) -> list[Row]:
    """由两种行数的内存峰值，估计 24 GB 放得下一次多少行（留一成给别的）。"""
    rows = settings(preset).batch_size
    peaks = [training_memory("ours", preset, batch_size=n, grad_accum=1) for n in (rows, rows // 2)]
    per_row = (peaks[0] - peaks[1]) / (rows - rows // 2)
    fixed = peaks[0] - rows * per_row
    return [
        Row(f"{preset}：训练，每多一行多用", [per_row / 1e9], "GB"),
        Row(f"{preset}：由此估计，24 GB 放得下一次", [(card * 0.9 - fixed) // per_row], "行"),
    ]
