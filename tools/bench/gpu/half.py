"""fp16 练得动吗；杀掉再接着练；`--batch_size auto` 在两个脚本里试出来的放得下吗。"""

import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tools.bench.gpu.stage import SMALL, Stage, stepping
from tools.bench.measuring import Row
from tools.bench.ours import Ours
from tools.bench.trainer import compiled_or_error

REPO = Path(__file__).resolve().parents[3]
N_STEPS = 30  # fp16 练几步；接着练的，一共走几步
LIMIT = 100  # 一个脚本至多走多少秒


def measure(stage: Stage) -> Iterator[Row]:
    """三件事。"""
    yield from stage.attempt("fp16", trains(stage))
    with tempfile.TemporaryDirectory() as folder:
        yield from stage.attempt("杀掉，接着练", killed(stage, Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        yield from stage.attempt("batch_size auto", automatic(stage, Path(folder)))


# ---------- 1. fp16 ----------


def trains(stage: Stage) -> Iterator[Row]:
    """`wide` 用 fp16 练几步：损失有限的有几步，溢出的有几步，速度。"""
    made = Ours(stage.config("wide", dtype="float16"))
    with compiled_or_error(made.device):
        made.warm_up()
    scaler, losses, scales = made.device.scaler, [], []
    for _ in range(N_STEPS):
        made.step(0.5)
        losses.append(made.loss)
        scales.append(scaler.get_scale())
    halved = sum(b < a for a, b in itertools.pairwise(scales))
    finite = sum(map(math.isfinite, losses))
    what = f"wide，{str(made.device.dtype)[6:]}"
    yield Row(f"{what}：{N_STEPS} 步里，损失是有限的数的", [finite], "步", f"= {N_STEPS}")
    yield Row(f"{what}：第一步的损失", losses[:1], "奈特")
    yield Row(f"{what}：最后一步的损失", losses[-1:], "奈特")
    yield Row(f"{what}：梯度溢出、没有更新、倍数减半的", [halved], "步")
    yield Row(f"{what}：放大的倍数，最后是", [scales[-1]], "倍")
    speed = [stage.speed(stepping(made)) for _ in range(stage.repeats)]
    yield Row(f"{what}：训练", speed, "词元/秒")
    made.leave()


# ---------- 2. 杀掉，接着练；batch_size auto ----------


def flags(stage: Stage, folder: Path, preset: str, **changes) -> list[str]:
    """训练脚本的参数：数据用已经备好的，检查点写在 folder 里。"""
    given = stage.changes(preset=preset, out_dir=str(folder), eval_tokens=512, **changes)
    given |= {"data": "builtin", "data_dir": str(Path(stage.data_dir).resolve())}
    return [f"--{name}={value}" for name, value in given.items()]


def start(script: str, *flags: str) -> subprocess.Popen:
    """运行一个训练脚本，输出接成一条管道。"""
    return subprocess.Popen(
        [sys.executable, str(REPO / script), *flags], cwd=REPO, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip


def finished(process: subprocess.Popen) -> tuple[int, str]:
    """等它走完，太久就杀掉；返回退出码与它说的话。"""
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        said += f"\n（{LIMIT} 秒还没有走完，杀掉了）"
    return process.returncode, said


def steps_of(folder: Path) -> list[int]:
    """记录里走过的各步；记录的最后一行也许只写了一半。"""
    path = folder / "pretrain" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def killed(stage: Stage, folder: Path) -> Iterator[Row]:
    """fp16 的一次训练，走到一半忽然杀掉（SIGKILL），再接着练完。"""
    given = flags(stage, folder, "tiny", dtype="float16", compile=False, max_steps=10**6,
                  save_every=0.2, eval_every=10**6)  # fmt: skip
    process = start("pre_train.py", *given)
    until = time.monotonic() + LIMIT
    while max(steps_of(folder), default=0) < N_STEPS and time.monotonic() < until:
        if process.poll() is not None:
            break
        time.sleep(0.05)
    time.sleep(0.5)  # 至少存过一次
    process.kill()
    _, said = finished(process)
    stage.log("杀掉之前", said)
    reached = max(steps_of(folder), default=0)
    target = reached + N_STEPS
    again = [flag for flag in given if flag.startswith(("--out_dir", "--data_dir"))]
    process = start("pre_train.py", "--resume", f"--max_steps={target}", "--allow_changes", *again)
    code, said = finished(process)
    stage.log("接着练", said)
    steps = steps_of(folder)
    yield Row("杀掉之前走到", [reached], "步")
    yield Row(f"接着练走到（退出码 {code}）", steps[-1:], "步", f"= {target}")
    whole = steps == sorted(set(steps)) and steps[-1:] == [target]
    yield Row("接着练的记录没有重复、没有倒退的（1 是）", [int(whole)], "", "= 1")


def automatic(stage: Stage, folder: Path) -> Iterator[Row]:
    """两个脚本各用 `--batch_size auto`：一步的行数多到放不下，试出来的走得完几步。"""
    rows = 4 if stage.rehearse else 64  # 乘以预设的 32 行：一步 2048 行，一次放不下
    for script, name in (("pre_train.py", "max_steps"), ("sft_train.py", "sft_max_steps")):
        given = flags(stage, folder, "wide", batch_size="auto", grad_accum=rows, **{name: 2})
        if script == "sft_train.py":
            given = ["--sft_data=builtin", f"--init_from={folder}/pretrain.pt", *sft_flags(given)]
        code, said = finished(start(script, *given))
        stage.log(f"{script} --batch_size auto", said)
        told = [line.strip() for line in said.splitlines() if "batch_size=auto" in line]
        yield Row(f"{script}：{'；'.join(told) or '没有说试出了多少'}；退出码", [code], "", "= 0")


def sft_flags(given: list[str]) -> list[str]:
    """微调的形状与语料取自检查点，不许再写。"""
    shape = {name for name in SMALL if name not in ("device", "dtype", "seq_len")}
    return [flag for flag in given if flag[2:].partition("=")[0] not in {*shape, "data"}]
