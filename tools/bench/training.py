"""训练：每秒多少词元，用到峰值的几成；比谁先到同样的损失。"""

import math

import numpy as np

from config import Config
from engine.device import Device
from engine.shared_row import tie_unused_rows
from model import Transformer
from tools.bench import contestants
from tools.bench.flops import training_flops
from tools.bench.measuring import Contestant, Row, compete, matmul_peak, rates, ratios
from tools.bench.options import Options
from tools.bench.trainer import TWINS, corpus, settings
from tools.bench.yardsticks import PlainContestant

# ---------- 1. 每秒多少词元 ----------

TRAINERS = ["ours", "ours, whole vocabulary", "qwen3 compiled", "qwen3 eager", "original"]
TUNED = ["qwen3 compiled, tuned", "qwen3 eager, tuned"]  # 借给它我们在 CPU 上的设置


def trainers(device: Device) -> list[str]:
    """这台机器上能比的各方：没有编译器就没有编译过的，不在 CPU 上就没有可借的设置。"""
    names = TRAINERS + TUNED * (device.place.type == "cpu")
    return [n for n in names if device.compile or "compiled" not in n]


def player(job, kind: str, *args, **changes) -> Contestant:
    """训练的一方；对照是普通的程序，除非借给它我们的设置。"""
    ours = kind.startswith("ours") or kind in TUNED
    return (Contestant if ours else PlainContestant)(job, kind, *args, **changes)


def bench_train(options: Options, preset: str) -> list[Row]:
    """每秒多少词元，与两种对照相比；矩阵乘法用到了峰值的几成。"""
    config = settings(preset)
    device = Device(config)
    names = trainers(device)
    if config.n_experts:
        names.remove("original")  # 最初那个项目没有专家混合
    players = {n: player(contestants.train, n, preset, options.seconds) for n in names}
    if twin := TWINS.get(preset):
        players["twin"] = Contestant(contestants.train, "ours", twin, options.seconds)
    dtype = str(device.dtype)[6:]
    players["peak"] = Contestant(matmul_peak, dtype)
    found = compete(players, options.repeats)
    speed = {n: rates(found[n]) for n in names}
    rows = [Row(f"{preset}，{dtype}：我们", speed["ours"], "词元/秒")]
    rows += compare_trainers(config, preset, speed)
    if twin:
        dense = rates(found["twin"])
        rows.append(Row(f"{twin}（不分专家，每个词元用到的参数一样多）：我们", dense, "词元/秒"))
        rows.append(Row(f"{preset}：我们比不分专家的 {twin}", ratios(speed["ours"], dense), "倍"))
    else:
        lengths = np.diff(corpus(config).starts["train"]) - 1
        filled = np.minimum(lengths, config.max_len).mean() / config.max_len * 100
        what = f"{preset}：最初的做法里，真有词元的格子（其余是补齐的）"
        rows.append(Row(what, [filled], "%"))
    return rows + utilisation(config, preset, speed, [r for r, _ in found["peak"]])


def compare_trainers(config: Config, preset: str, speed: dict[str, list[float]]) -> list[Row]:
    """各种对照的速度，我们比它们快几倍；整张词表逐个打分的我们。"""
    ours, rows = speed["ours"], []
    theirs = "Qwen3MoeForCausalLM" if config.n_experts else "Qwen3ForCausalLM"
    against = [
        ("qwen3 compiled", f"编译过的 {theirs}", "" if config.n_experts else 1.2),
        ("qwen3 eager", f"不编译的 {theirs}", "" if config.n_experts else 1.8),
        ("qwen3 compiled, tuned", f"编译过的、借给它我们的设置的 {theirs}", ""),
        ("qwen3 eager, tuned", f"不编译的、借给它我们的设置的 {theirs}", ""),
        ("original", f"最初的做法：fp32、补齐到 {config.max_len}、不编译", 10),
    ]
    for name, what, goal in against:
        if name in speed:
            rows.append(Row(f"{preset}：{what}", speed[name], "词元/秒"))
            times = f"≥ {goal} 倍" if goal else ""
            rows.append(Row(f"{preset}：我们比{what}", ratios(ours, speed[name]), "倍", times))
    whole = speed["ours, whole vocabulary"]
    rows.append(Row(f"{preset}：我们，整张词表逐个打分", whole, "词元/秒"))
    if "qwen3 compiled" in speed:
        what = f"{preset}：我们，整张词表，比编译过的 {theirs}"
        rows.append(Row(what, ratios(whole, speed["qwen3 compiled"]), "倍"))
    return rows


def utilisation(config: Config, preset: str, speed: dict, peak: list[float]) -> list[Row]:
    """每个词元要多少运算，用到了实测峰值的几成（更新参数的运算不算在内）。"""
    tokens = corpus(config).tokens["train"]
    shared = tie_unused_rows(Transformer(config), tokens, newborn=True)
    n_rows = len(shared.rows) if shared else config.vocab_size
    rows = [Row(f"{preset}：矩阵乘法的实测峰值", [p / 1e9 for p in peak], "GFLOPS")]
    for name, n in (("ours", n_rows), ("ours, whole vocabulary", config.vocab_size)):
        flops = training_flops(config, n)
        what = "我们" if name == "ours" else "我们，整张词表"
        rows.append(Row(f"{preset}：{what}，一个词元的运算", [flops / 1e6], "MFLOP"))
        share = [s * flops / p * 100 for s, p in zip(speed[name], peak, strict=True)]
        goal = "≥ 55%（wide）" if (preset, name) == ("wide", "ours") else ""
        rows.append(Row(f"{preset}：{what}，达到峰值的", share, "%", goal))
    return rows


# ---------- 2. 同样的损失，谁先到 ----------


def bench_race(options: Options, preset: str) -> list[Row]:
    """编译过的 Qwen3 练 race 秒（三个学习率里最好的）达到的检验损失，我们要多久。

    学习率的升降按各自的总时间走，编译与检验不计时；各按自己的方式检验同样的词条（我们的互相看不见）。
    """
    kind = "qwen3 compiled" if Device(Config()).compile else "qwen3 eager"
    rows, best = [], math.inf
    for lr in (5e-4, 1e-3, 3e-3) if preset == "tiny" else (3e-4, 1e-3, 3e-3):
        result = run_once(kind, preset, options.race, lr)
        what = f"{preset}：{kind}，学习率 {lr:g}，{options.race:.0f} 秒后的检验损失"
        rows.append(Row(what, [result["loss"]], "奈特"))
        best = min(best, result["loss"])
    for part in (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0):
        result = run_once("ours", preset, options.race * part, 0.0)
        spent = result["seconds"]
        what = f"{preset}：我们，{spent:.0f} 秒（{result['steps']} 步）后的检验损失"
        rows.append(Row(what, [result["loss"]], "奈特"))
        if result["loss"] <= best:
            what = f"{preset}：达到对照的最好损失，我们用的时间是它的"
            rows.append(Row(what, [spent / options.race], "倍", "≤ 0.5 倍"))
            return rows
    rows.append(Row(f"{preset}：同样久也没有达到对照的最好损失", [], "倍", "≤ 0.5 倍"))
    return rows


def run_once(kind: str, preset: str, seconds: float, lr: float) -> dict:
    """一方从头练到时间用完。"""
    with player(contestants.race, kind, preset, seconds, lr) as made:
        return made.work()[0]
