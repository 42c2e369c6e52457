"""测速：我们与别人并排，一次跑完，在你自己的机器上。

    python -m tools.bench                            全部，CPU 上近一个小时
    python -m tools.bench train decode               只测其中几节
    python -m tools.bench train --preset tiny        只测一种大小
    python -m tools.bench --json docs/benchmarks.json

结果写进 --json 指的文件，旁边同名的 .md 是给人看的表；只测几节时，其余各节保留原来的。
参赛的各方见 tools/contestants.py，对照的实现见 tools/yardsticks.py。
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from config import PRESETS, Config, UserError, option
from corpus import idioms
from corpus.readers import ReadLog
from engine.device import Device
from engine.shared_row import tie_unused_rows
from model import Transformer
from settings.flags import help_text, parse_flags, run_script
from tools.bench import contestants
from tools.bench.measuring import (
    Contestant,
    Row,
    machine,
    matmul_peak,
    rates,
    ratios,
    readable,
    take_turns,
    to_markdown,
)


@dataclass
class Options:
    """命令行参数。"""

    preset: str = option(
        "auto", "哪种大小；auto：CPU 上 tiny 与 wide，显卡上 wide 与 deep",
        choices=("auto", *PRESETS),
    )  # fmt: skip
    json: str = option("out/bench.json", "结果写在哪里")
    repeats: int = option(5, "每一方上场几次", "次")
    seconds: float = option(8.0, "训练的每一方每次上场至少多久", "秒")
    race: float = option(300.0, "比谁先到：对照练多久", "秒")


# ---------- 1. 训练 ----------

TWINS = {"tiny-moe": "tiny", "moe": "wide"}  # 每个词元用到的参数一样多的稠密模型
TRAINERS = ["ours", "ours, whole vocabulary", "qwen3 compiled", "qwen3 eager", "original"]
TUNED = ["qwen3 compiled, tuned", "qwen3 eager, tuned"]  # 借给它我们在 CPU 上的内存设置


def trainers(device: Device) -> list[str]:
    """这台机器上能比的各方：没有编译器就没有编译过的，不在 CPU 上就没有可借的设置。"""
    names = TRAINERS + TUNED * (device.place.type == "cpu")
    return [n for n in names if device.compile or "compiled" not in n]


def training_flops(config: Config, n_rows: int) -> float:
    """训练一个词元的浮点运算：前向 2 × 参数，反向再两倍；注意力另算，因果的只算一半。

    Args:
        config: 形状。
        n_rows: 打分的词元数，词表里合用一行的只算一次。
    """
    head_dim = config.dim // config.n_heads
    attention = 2 * config.dim * config.n_heads * head_dim  # q 与 out
    attention += 2 * config.dim * config.n_kv_heads * head_dim  # k 与 v
    feed_forward = 3 * config.dim * config.active_width() + config.dim * config.n_experts
    matrices = config.n_layers * (attention + feed_forward)
    matrices += config.dim * n_rows
    return 6 * matrices + 6 * config.n_layers * config.seq_len * config.dim


def bench_train(options: Options, preset: str) -> list[Row]:
    """每秒多少词元，与两种对照相比；矩阵乘法用到了峰值的几成。"""
    config = contestants.settings(preset)
    device = Device(config)
    names = trainers(device)
    if config.n_experts:
        names.remove("original")  # 最初那个项目没有专家混合
    players = {n: Contestant(contestants.train, n, preset, options.seconds) for n in names}
    if twin := TWINS.get(preset):
        players["twin"] = Contestant(contestants.train, "ours", twin, options.seconds)
    dtype = str(device.dtype)[6:]
    players["peak"] = Contestant(matmul_peak, dtype)
    found = take_turns(players, options.repeats)
    for player in players.values():
        player.leave()
    speed = {n: rates(found[n]) for n in names}
    ours = speed["ours"]
    theirs = "Qwen3MoeForCausalLM" if twin else "Qwen3ForCausalLM"
    rows = [Row(f"{preset}，{dtype}：我们", ours, "词元/秒")]
    against = [
        ("qwen3 compiled", f"编译过的 {theirs}", "" if twin else 1.2),
        ("qwen3 eager", f"不编译的 {theirs}", "" if twin else 1.8),
        ("qwen3 compiled, tuned", f"编译过的、借给它我们的内存设置的 {theirs}", ""),
        ("qwen3 eager, tuned", f"不编译的、借给它我们的内存设置的 {theirs}", ""),
        ("original", f"最初的做法：fp32、补齐到 {config.max_len}、不编译", 10),
    ]
    for name, what, goal in against:
        if name in speed:
            rows.append(Row(f"{preset}：{what}", speed[name], "词元/秒"))
            rows.append(
                Row(
                    f"{preset}：我们比{what}", ratios(ours, speed[name]), "倍",
                    f"≥ {goal} 倍" if goal else "",
                )
            )  # fmt: skip
    whole = speed["ours, whole vocabulary"]
    rows.append(Row(f"{preset}：我们，整张词表逐个打分", whole, "词元/秒"))
    if "qwen3 compiled" in speed:
        what = f"{preset}：我们，整张词表，比编译过的 {theirs}"
        rows.append(Row(what, ratios(whole, speed["qwen3 compiled"]), "倍"))
    if twin:
        dense = rates(found["twin"])
        rows.append(Row(f"{twin}（不分专家，每个词元用到的参数一样多）：我们", dense, "词元/秒"))
        rows.append(Row(f"{preset}：我们比不分专家的 {twin}", ratios(ours, dense), "倍"))
        return rows + utilisation(config, preset, speed, [r for r, _ in found["peak"]])
    lengths = np.minimum(np.diff(contestants.corpus(config).starts["train"]) - 1, config.max_len)
    filled = lengths.mean() / config.max_len * 100
    rows.append(Row(f"{preset}：最初的做法里，真有词元的格子（其余是补齐的）", [filled], "%"))
    return rows + utilisation(config, preset, speed, [r for r, _ in found["peak"]])


def utilisation(config: Config, preset: str, speed: dict, peak: list[float]) -> list[Row]:
    """每个词元要多少运算，用到了实测峰值的几成（更新参数的运算不算在内）。"""
    tokens = contestants.corpus(config).tokens["train"]
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


def bench_start() -> list[Row]:
    """从敲下命令到第一步开始：数据已经备好，不编译，其余都是默认。"""
    seconds = []
    script = Path(__file__).parent.parent / "pre_train.py"
    contestants.corpus(contestants.settings("tiny"))
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            os.symlink(Path("data").resolve(), Path(folder) / "data")
            command = [sys.executable, "-u", str(script), "--preset", "tiny", "--data", "builtin",
                       "--no-compile", "--max_steps", "1", "--eval_tokens", "256"]  # fmt: skip
            start = time.perf_counter()
            run = subprocess.Popen(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                encoding="utf-8",
            )  # fmt: skip
            for line in run.stdout:
                if "ln V" in line:  # 紧接着就是第一步
                    seconds.append(time.perf_counter() - start)
            run.wait()
    return [Row("从敲下命令到第一步开始（数据已备好，不编译）", seconds, "秒", "≤ 4 秒")]


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
    player = Contestant(contestants.race, kind, preset, seconds, lr)
    result, _ = player.work()
    player.leave()
    return result


# ---------- 3. 生成 ----------


def bench_decode(options: Options, preset: str) -> list[Row]:
    """一次一个词元，贪心写 256 个。"""
    n = 256
    compiled = Device(Config()).compile and preset not in TWINS  # 专家混合逐个生成时不编译
    half = "float32" if Device(Config()).dtype == torch.float32 else "bfloat16"
    ours = {
        "fp32，不编译": ("float32", False, "none"),
        "bf16，不编译": (half, False, "bf16"),
        "int8，不编译": (half, False, "int8"),
    }
    if compiled:
        ours |= {
            "fp32，编译": ("float32", True, "none"),
            "bf16，编译": (half, True, "bf16"),
            "int8，编译": (half, True, "int8"),
        }
    players = {k: Contestant(contestants.decode, preset, n, *v) for k, v in ours.items()}
    for dtype in ("float32", "bfloat16"):
        players[f"generate {dtype}"] = Contestant(contestants.decode_qwen3, preset, n, dtype)
    players["没有缓存，补齐"] = Contestant(contestants.decode_original, preset, 8, True)
    players["没有缓存，不补齐"] = Contestant(contestants.decode_original, preset, n, False)
    found = take_turns(players, options.repeats)
    for player in players.values():
        player.leave()
    speed = {name: rates(found[name]) for name in players}
    rows = [Row(f"{preset}：{name}", values, "词元/秒") for name, values in speed.items()]
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
    return rows + bench_first_token(options, preset)


def bench_first_token(options: Options, preset: str) -> list[Row]:
    """256 个词元的开头之后，第一个词元要等多久。"""
    players = {
        "first": Contestant(contestants.first_token, preset, 256, False),
        "forward": Contestant(contestants.first_token, preset, 256, True),
    }
    found = take_turns(players, options.repeats * 4)
    for player in players.values():
        player.leave()
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
    player = Contestant(contestants.int8_loss, str(checkpoint))
    (before, after), _ = player.work()
    player.leave()
    return [
        Row(f"{checkpoint}：留出的词条开头 4096 个词元的损失，fp32", [before], "奈特"),
        Row(f"{checkpoint}：同上，int8", [after], "奈特"),
        Row(f"{checkpoint}：{what}", [(after / before - 1) * 100], "%", "≤ 0.5%"),
    ]


# ---------- 4. 数据 ----------


def bench_data(options: Options) -> list[Row]:
    """备数据：一个 300 MB 的 JSONL，以及它的四分之一（内存应当一样）。"""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        speed, memory = {}, {}
        for megabytes in (75, 300):
            source = Path(folder) / f"{megabytes}.jsonl"
            write_jsonl(source, megabytes)
            player = Contestant(contestants.tokenise, str(source), f"{folder}/{megabytes}")
            speed[megabytes] = rates(take_turns({"x": player}, 3)["x"])
            memory[megabytes] = player.peak_memory() / 1e9
            player.leave()
        slow = Contestant(contestants.tokenise_one_by_one, str(source), 4000)
        theirs = rates(take_turns({"x": slow}, 3)["x"])
        slow.leave()
    rows.append(Row("300 MB JSONL：我们", speed[300], "词元/秒", "≥ 1,200,000"))
    rows.append(Row("transformers 的分词器，逐篇（开头四千篇）", theirs, "词元/秒"))
    rows.append(Row("我们比它", ratios(speed[300], theirs), "倍"))
    rows.append(Row("300 MB 时的内存峰值", [memory[300]], "GB", "≤ 1 GB"))
    rows.append(Row("75 MB 时的内存峰值", [memory[75]], "GB", "与上一行相同"))
    return rows + bench_start()


def write_jsonl(path: Path, megabytes: int) -> None:
    """内置语料的词条随机拼成长短不一的文章，写满 megabytes MB。"""
    log = ReadLog("builtin")
    entries = [r.content for r in idioms.read_documents(idioms.dictionary_file(), log)]
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as f:
        while f.tell() < megabytes * 1e6:
            chosen = rng.integers(len(entries), size=rng.integers(1, 13))
            text = "\n".join(entries[i] for i in chosen)
            f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


# ---------- 5. 规模 ----------

SCALES = {  # 名字: (字段, 四个值)；其余取 tiny 的
    "层数": ("n_layers", (2, 4, 8, 16)),
    "宽度": ("dim", (96, 192, 384, 768)),
    "长度": ("seq_len", (128, 256, 512, 1024)),
    "词表": ("vocab_size", (2656, 5312, 10624, 21248)),
}


def bench_scale(options: Options) -> list[Row]:
    """层数、宽度、长度、词表各加倍，每个词元的时间与内存怎样增长：指数，与公式算出的指数。"""
    empty = Contestant(contestants.nothing)
    itself = empty.peak_memory()
    empty.leave()
    rows = []
    for name, (field, values) in SCALES.items():
        times, memory, formula = [], [], []
        for value in values:
            shape = {field: value, "max_len": 1024, "batch_size": 8}
            if field == "dim":
                shape |= {
                    "hidden_dim": value * 3,
                    "n_heads": value // 32,
                    "n_kv_heads": value // 32,
                }
            if field == "seq_len":
                shape["batch_size"] = 2048 // value
            player = Contestant(contestants.forward_backward, **shape)
            found = take_turns({"x": player}, options.repeats)["x"]
            times.append(1e6 / statistics.median(rates(found)))
            memory.append((player.peak_memory() - itself) / 1e6)
            player.leave()
            config = Config(**{**PRESETS["tiny"], **shape})
            formula.append(training_flops(config, config.vocab_size) / 1e6)
        for what, measured, unit in (
            ("时间", times, "微秒"),
            ("内存峰值，除去程序自己的", memory, "MB"),
        ):
            points = "，".join(f"{v}: {readable(m)}" for v, m in zip(values, measured, strict=True))
            per = "每个词元的" if what == "时间" else ""
            said = f"{name}，{per}{what}（{unit}；{points}）：指数"
            rows.append(Row(said, [exponent(values, measured)], ""))
        rows.append(Row(f"{name}，公式 training_flops 的指数", [exponent(values, formula)], ""))
    return rows


def exponent(x, y) -> float:
    """y 随 x 的几次方增长：双对数坐标上的斜率。"""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def bench_memory(options: Options, preset: str) -> list[Row]:
    """训练与聊天的内存峰值。"""
    rows = []
    for name in trainers(Device(contestants.settings(preset))):
        player = Contestant(contestants.train, name, preset, 0.1)
        player.work()  # 第一步之后才有优化器的状态
        player.work()
        rows.append(Row(f"{preset}：训练，{name}", [player.peak_memory() / 1e9], "GB"))
        player.leave()
    if torch.cuda.is_available():  # CPU 上的峰值出在编译的时候，推不出每行多少
        rows += bench_card(preset)
    for quantize in ("none", "bf16", "int8"):
        player = Contestant(contestants.decode, preset, 32, "float32", False, quantize)
        player.work()
        what = f"{preset}：生成，--quantize {quantize}"
        rows.append(Row(what, [player.peak_memory() / 1e9], "GB"))
        player.leave()
    return rows


def bench_card(preset: str, card: float = 24e9) -> list[Row]:
    """由两种行数的内存峰值，估计 24 GB 放得下一次多少行（留一成给别的）。"""
    rows = contestants.settings(preset).batch_size
    peaks = []
    for n in (rows, rows // 2):
        player = Contestant(contestants.train, "ours", preset, 0.1, batch_size=n, grad_accum=1)
        player.work()
        player.work()
        peaks.append(player.peak_memory())
        player.leave()
    per_row = (peaks[0] - peaks[1]) / (rows - rows // 2)
    fixed = peaks[0] - rows * per_row
    return [
        Row(f"{preset}：训练，每多一行多用", [per_row / 1e9], "GB"),
        Row(f"{preset}：由此估计，24 GB 放得下一次", [(card * 0.9 - fixed) // per_row], "行"),
    ]


# ---------- 6. 一次跑完 ----------

SECTIONS = ("train", "time-to-loss", "decode", "data", "memory", "scale")


def presets_of(section: str, wanted: str) -> list[str]:
    """这一节要测哪几种大小；与大小无关的是 [""]。"""
    if section in ("data", "scale"):
        return [""]
    if wanted != "auto":
        return [wanted]
    if torch.cuda.is_available():
        return ["wide", "deep"] if section in ("train", "decode", "memory") else ["wide"]
    return {"time-to-loss": ["tiny"], "decode": ["wide"]}.get(section, ["tiny", "wide"])


def measure(section: str, options: Options, preset: str) -> list[Row]:
    """一节的全部结果。"""
    if section == "decode":
        return bench_decode(options, preset) + bench_int8_loss()
    by_preset = {"train": bench_train, "time-to-loss": bench_race, "memory": bench_memory}
    if section in by_preset:
        return by_preset[section](options, preset)
    return {"data": bench_data, "scale": bench_scale}[section](options)


def read_results(path: Path) -> dict:
    """以前测的各节；现在就确认写得进去，不必等测完才知道。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as f:
        f.seek(0)
        text = f.read()
    try:
        done = json.loads(text or "{}")
        to_markdown(done)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} 不是以前的测速结果；请换一个 --json，或删掉它") from None
    return done


def main() -> None:
    """读命令行，一节一节地测，每测完一节就写盘。"""
    if "--help" in sys.argv or "-h" in sys.argv:
        usage = f"用法：python -m tools.bench [{' | '.join(SECTIONS)}] [--参数 值 …]"
        print(help_text(Options, usage))
        return
    problems: list[str] = []
    rest = sys.argv[1:]
    wanted = []
    while rest and not rest[0].startswith("--"):
        wanted.append(rest.pop(0))
    problems += [f"没有 {w} 这一节；可选：{'、'.join(SECTIONS)}"
                 for w in wanted if w not in SECTIONS]  # fmt: skip
    given = parse_flags(Options, rest, problems)
    options = Options(**given)
    if options.preset not in ("auto", *PRESETS):
        problems.append(f"preset 只能是 auto、{'、'.join(PRESETS)}，得到的是 {options.preset!r}")
    if not all(0 < x < 1e6 for x in (options.repeats, options.seconds, options.race)):
        problems.append("repeats、seconds、race 都必须是正数，不超过一百万")
    if Path(options.json).suffix != ".json":
        problems.append(f"--json 的文件名要以 .json 结尾，得到的是 {options.json!r}")
    if problems:
        raise UserError("；".join(problems))
    path = Path(options.json)
    done = read_results(path)
    about = machine()
    place = about.get("显卡", "CPU")
    for section in wanted or SECTIONS:
        for preset in presets_of(section, options.preset):
            name = f"{section} {preset}（{place}）".replace(" （", "（")
            print(f"== {name}", flush=True)
            start = time.monotonic()
            rows = measure(section, options, preset)
            for row in rows:
                print(f"  {row.what}：{row.shown()}" + (f"    目标 {row.goal}" * bool(row.goal)))
            print(f"  （用了 {(time.monotonic() - start) / 60:.1f} 分钟）", flush=True)
            flags = [f"--preset {preset}"] * bool(preset)
            flags += [f"--{n} {v}" for n, v in given.items() if n not in ("preset", "json")]
            command = " ".join(["python -m tools.bench", section, *flags])
            done[name] = {"machine": about, "command": command, "rows": [*map(asdict, rows)]}
            path.write_text(json.dumps(done, ensure_ascii=False, indent=1), encoding="utf-8")
            path.with_suffix(".md").write_text(to_markdown(done), encoding="utf-8")
    print(f"写好 {path} 与 {path.with_suffix('.md')}")


if __name__ == "__main__":
    run_script(main)
