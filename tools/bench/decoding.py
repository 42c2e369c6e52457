"""生成：一次一个词元，每秒写多少；第一个要等多久；int8 坏了多少。"""

from pathlib import Path

import torch

from config import PRESETS, Config
from engine.device import Device
from tools.bench import contestants
from tools.bench.measuring import Contestant, Row, compete, rates, ratios
from tools.bench.options import Options
from tools.bench.trainer import TWINS
from tools.bench.yardsticks import PlainContestant


def bench_decode(options: Options, preset: str) -> list[Row]:
    """一次一个词元，贪心写 256 个。"""
    n = 256
    compiled = Device(Config()).compile and preset not in TWINS  # 专家混合逐个生成时不编译
    half = "float32" if Device(Config()).dtype == torch.float32 else "bfloat16"
    stored = {"fp32": ("float32", "none"), "bf16": (half, "bf16"), "int8": (half, "int8")}
    players = {
        f"{name}，{'编译' if compiling else '不编译'}": Contestant(
            contestants.decode, preset, n, dtype, compiling, quantize
        )
        for compiling in ([False, True] if compiled else [False])
        for name, (dtype, quantize) in stored.items()
    }
    for dtype in ("float32", "bfloat16"):
        players[f"generate {dtype}"] = PlainContestant(contestants.decode_qwen3, preset, n, dtype)
    for name, length, padded in (("补齐", 8, True), ("不补齐", n, False)):
        job = (contestants.decode_original, preset, length, padded)
        players[f"没有缓存，{name}"] = PlainContestant(*job)
    found = compete(players, options.repeats)
    speed = {name: rates(found[name]) for name in players}
    rows = [Row(f"{preset}：{name}", values, "词元/秒") for name, values in speed.items()]
    rows += compare_writers(preset, n, found, speed, compiled)
    return rows + bench_first_token(options, preset) + bench_int8_loss()


def compare_writers(preset: str, n: int, found: dict, speed: dict, compiled: bool) -> list[Row]:
    """我们比别人快几倍；写出的编号与 generate 的有几个相同。"""
    rows = []
    best = "bf16，编译" if compiled else "bf16，不编译"
    int8, fp32 = best.replace("bf16", "int8"), best.replace("bf16", "fp32")
    theirs = {d: found[f"generate {d}"][0][0] for d in ("float32", "bfloat16")}
    pairs = [
        (best, "generate bfloat16", "≥ 2.5 倍"),
        (best, "generate float32", ""),
        (fp32, "generate float32", ""),
        ("bf16，不编译", "generate bfloat16", ""),
        ("fp32，不编译", "generate float32", ""),
        (best, "没有缓存，补齐", "≥ 30 倍"),
        (best, "没有缓存，不补齐", ""),
        (int8, best, "≥ 1.4 倍"),
        ("int8，不编译", "bf16，不编译", "≥ 1.4 倍"),
    ]
    for a, b, goal in pairs:
        rows.append(Row(f"{preset}：{a}，比{b}", ratios(speed[a], speed[b]), "倍", goal))
    for name in (fp32, "fp32，不编译", best):
        dtype = "bfloat16" if name == best else "float32"
        same = sum(a == b for a, b in zip(found[name][0][0], theirs[dtype], strict=False))
        goal = "" if name == best else f"= {n}"
        rows.append(Row(f"{preset}：{name}，与 generate {dtype} 相同的编号", [same], "个", goal))
    return rows


def bench_first_token(options: Options, preset: str) -> list[Row]:
    """256 个词元的开头之后，第一个词元要等多久。"""
    players = {
        "first": Contestant(contestants.first_token, preset, 256, False),
        "forward": Contestant(contestants.first_token, preset, 256, True),
    }
    found = compete(players, options.repeats * 4)
    first, forward = ([s for _, s in found[name]] for name in players)
    return [
        Row(f"{preset}：读完 256 个词元的开头，第一个词元", [s * 1e3 for s in first], "毫秒"),
        Row(f"{preset}：同样长的一次训练前向", [s * 1e3 for s in forward], "毫秒"),
        Row(f"{preset}：前者是后者的", ratios(first, forward), "倍", "≤ 1.5 倍"),
    ]


def bench_int8_loss() -> list[Row]:
    """int8 让留出的词条上的损失涨多少；要有用内置语料训练好的检查点。"""
    what = "int8 使检验损失增加"
    trained = [Path(f"out/{p}/pretrain.pt") for p in PRESETS if p not in TWINS]
    if not (trained := [path for path in trained if path.is_file()]):
        return [Row(f"{what}（要先运行 python pre_train.py）", [], "%", "≤ 0.5%")]
    checkpoint = trained[-1]
    with Contestant(contestants.int8_loss, str(checkpoint)) as player:
        (before, after), _ = player.work()
    return [
        Row(f"{checkpoint}：留出的词条开头 4096 个词元的损失，fp32", [before], "奈特"),
        Row(f"{checkpoint}：同上，int8", [after], "奈特"),
        Row(f"{checkpoint}：{what}", [(after / before - 1) * 100], "%", "≤ 0.5%"),
    ]
