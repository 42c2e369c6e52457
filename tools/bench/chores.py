"""训练之前的事：备数据要多久，从敲下命令到第一步要多久。"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from corpus import idioms
from corpus.log import ReadLog
from tools.bench import contestants
from tools.bench.measuring import Contestant, Row, rates, ratios, take_turns
from tools.bench.options import Options
from tools.bench.trainer import corpus, settings

REPO = Path(__file__).resolve().parents[2]


def bench_data(options: Options, preset: str) -> list[Row]:
    """备数据：一个 300 MB 的 JSONL，以及它的四分之一（内存应当一样）。"""
    with tempfile.TemporaryDirectory() as folder:
        speed, memory = {}, {}
        for megabytes in (75, 300):
            source = Path(folder) / f"{megabytes}.jsonl"
            write_jsonl(source, megabytes)
            job = (contestants.tokenise, str(source), f"{folder}/{megabytes}")
            with Contestant(*job) as player:
                speed[megabytes] = rates(take_turns({"x": player}, 3)["x"])
                memory[megabytes] = player.peak_memory() / 1e9
        with Contestant(contestants.tokenise_one_by_one, str(source), 4000) as slow:
            theirs = rates(take_turns({"x": slow}, 3)["x"])
    return [
        Row("300 MB JSONL：我们", speed[300], "词元/秒", "≥ 1,200,000"),
        Row("transformers 的分词器，逐篇（开头四千篇）", theirs, "词元/秒"),
        Row("我们比它", ratios(speed[300], theirs), "倍"),
        Row("300 MB 时的内存峰值", [memory[300]], "GB", "≤ 1 GB"),
        Row("75 MB 时的内存峰值", [memory[75]], "GB", "与上一行相同"),
        *bench_start(),
    ]


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


def bench_start() -> list[Row]:
    """从敲下命令到第一步开始：数据已经备好，不编译，其余都是默认。"""
    seconds = []
    corpus(settings("tiny"))
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            os.symlink(Path("data").resolve(), Path(folder) / "data")
            flags = "--preset tiny --data builtin --no-compile --max_steps 1 --eval_tokens 256"
            command = [sys.executable, "-u", str(REPO / "pre_train.py"), *flags.split()]
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
