"""测速：我们与别人并排，一次跑完，在你自己的机器上。

    python -m tools.bench                            全部，CPU 上近一个小时
    python -m tools.bench train decode               只测其中几节
    python -m tools.bench train --preset tiny        只测一种大小
    python -m tools.bench --json docs/benchmarks.json
    python -m tools.bench gpu                        借到显卡的八分钟（见 gpu/__init__.py）
    python -m tools.bench peers                      与别人练同样久，谁错得少（见 peers/）

结果写进 --json 指的文件，旁边同名的 .md 是给人看的表；只测几节时，其余各节保留原来的。
参赛的各方见 contestants.py，对照的实现见 yardsticks.py。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import time
from dataclasses import asdict
from pathlib import Path

import torch

from settings.flags import read_options
from settings.say import say
from tools.bench.chores import bench_data
from tools.bench.decoding import bench_decode
from tools.bench.gpu.running import bench_gpu
from tools.bench.growth import bench_memory, bench_scale
from tools.bench.measuring import machine
from tools.bench.neighbour import bench_neighbour
from tools.bench.options import SECTIONS, Options
from tools.bench.peers.racing import bench_peers
from tools.bench.results import read_results, write_results
from tools.bench.training import bench_race, bench_train

MEASURES = {
    "train": bench_train,
    "time-to-loss": bench_race,
    "decode": bench_decode,
    "data": bench_data,
    "memory": bench_memory,
    "scale": bench_scale,
    "neighbour": bench_neighbour,
}


def main(argv: list[str] | None = None) -> None:
    """读命令行，一节一节地测，每测完一节就写盘。"""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["gpu"], ["peers"]):
        {"gpu": bench_gpu, "peers": bench_peers}[argv[0]](argv[1:])
        return
    usage = f"用法：python -m tools.bench [{' | '.join(SECTIONS)}] [--参数 值 …]"
    options = read_options(Options, argv, usage)
    path = Path(options.json)
    done = read_results(path)
    about = machine()
    place = about.get("显卡", "CPU")
    for section in options.sections or SECTIONS:
        for preset in presets_of(section, options.preset):
            name = f"{section} {preset}（{place}）".replace(" （", "（")
            say(f"== {name}", flush=True)
            start = time.monotonic()
            rows = MEASURES[section](options, preset)
            for row in rows:
                say(f"  {row.what}：{row.shown()}" + (f"    目标 {row.goal}" * bool(row.goal)))
            say(f"  （用了 {(time.monotonic() - start) / 60:.1f} 分钟）", flush=True)
            command = options.command(section, preset)
            done[name] = {"machine": about, "command": command, "rows": [*map(asdict, rows)]}
            write_results(path, done)
    say(f"写好 {path} 与 {path.with_suffix('.md')}")


def presets_of(section: str, wanted: str) -> list[str]:
    """这一节要测哪几种大小；与大小无关的是 [""]。"""
    if section in ("data", "scale"):
        return [""]
    if wanted != "auto":
        return [wanted]
    if section == "neighbour":
        return ["tiny"]
    if torch.cuda.is_available():
        return ["wide", "deep"] if section in ("train", "decode", "memory") else ["wide"]
    return {"time-to-loss": ["tiny"], "decode": ["wide"]}.get(section, ["tiny", "wide"])


if __name__ == "__main__":
    run_script(main)
