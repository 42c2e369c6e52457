"""像用户那样运行真的脚本，供几份测试共用。

run         在测试的进程里运行：不必每次等 Python 启动、导入 torch
run_apart   另起一个进程：要 torchrun、要看启动时的样子的
Running     另起一个进程，在后台运行：要杀掉它、给它发信号的
run_two     另起两个进程，一起训练
"""

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from forked import Forked, start

REPO = Path(__file__).resolve().parent.parent
# 语料用整场测试已经备好的那一份；从零准备由 .ci/run 里 README 的命令走过。
# fp32：逐位相同之外，几份测试还比不同进程数的损失，bf16 的舍入会把十几步里的差别放大到 0.4。
QUICK = ["--no-compile", "--dtype", "float32", "--eval_tokens", "512", "--batch_size", "2",
         "--seq_len", "128", "--eval_every", "8"]  # fmt: skip
STEPS = {"pre_train.py": 16, "sft_train.py": 10}
# 再小几倍的：杀掉、接着练、几个进程，看的是过程，不是模型。
LITTLE = ["--dim", "32", "--n_layers", "2", "--n_heads", "2", "--n_kv_heads", "1",
          "--hidden_dim", "48"]  # fmt: skip
LITTLE_STEPS = {"pre_train.py": 24, "sft_train.py": 12}
# 一个线程：几个进程挤在两个核上时，多了反而慢；结果也因此到处相同，另起的进程与这个进程也相同。
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TWO_THREADS = {"OMP_NUM_THREADS": "2"}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
TORCH_SEED = 67280421310721  # 刚启动的 torch 用的随机种子
SIGNALS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}  # 刚启动时怎样对待这几个信号


def location(script: str) -> str:
    """一个脚本的路径；tools 里的一个程序（写成 tools.名字），原样。"""
    return str(REPO / script) if script.endswith(".py") else script


def command(script: str) -> list[str]:
    """写在 python 后面的。"""
    return [location(script)] if script.endswith(".py") else ["-m", script]


# ---------- 1. 在这个进程里 ----------


def run(folder, script, *args, stdin="", code=0):
    """在 folder 里运行一个程序，从它的最后一行（run_script）走起；返回 (stdout, stderr)。"""
    with like_a_new_process(folder, [script, *args], stdin) as said:
        try:
            start(location(script))
            left = 0
        except SystemExit as leaving:
            left = leaving.code or 0
    out, err = (text.buffer.getvalue().decode("utf-8") for text in said)
    out, err = (text.replace("\r\n", "\n").replace("\r", "\n") for text in (out, err))
    assert left == code, out + err
    assert "Traceback" not in err
    return out, err


@contextmanager
def like_a_new_process(folder, argv: list[str], stdin: str) -> Iterator[list[io.TextIOWrapper]]:
    """其间一切都像刚启动的进程，之后恢复原样；给出它的标准输出与标准错误。"""
    streams = [
        io.TextIOWrapper(io.BytesIO(x), encoding="utf-8") for x in (stdin.encode(), b"", b"")
    ]
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    threads, deterministic = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.dict(os.environ),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        patch.chdir(folder)
        patch.setattr(sys, "argv", argv)
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)  # 程序会再换成别的（engine/stop.py），这里一并恢复
        patch.setattr(logging.root, "handlers", [])  # pytest 的不在，日志才印在标准错误里
        warnings.showwarning = show_warning
        # 别的测试已经导入过它，runpy 才有话说。
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
        for number, handler in SIGNALS.items():
            signal.signal(number, handler)
        torch.set_num_threads(1)
        torch.manual_seed(TORCH_SEED)
        torch.set_deterministic_debug_mode(0)
        try:
            yield streams[1:]
        finally:
            for stream in streams[1:]:
                stream.flush()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.set_num_threads(threads)
            torch.set_deterministic_debug_mode(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = filling
            if "matplotlib.pyplot" in sys.modules:
                sys.modules["matplotlib.pyplot"].close("all")
                sys.modules["matplotlib"].rcdefaults()


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """像平时那样印在标准错误里；pytest 会收走，程序的输出里就看不到了。"""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


# ---------- 2. 另起一个进程 ----------


def run_apart(folder, script, *args, stdin="", code=0, launcher=(), env=None):
    """同 `run`，但真的另起一个进程；launcher 例如 TORCHRUN。"""
    env = {**ENVIRONMENT, "PYTHONPATH": str(REPO), **(env or {})}
    result = subprocess.run(
        [sys.executable, *launcher, *command(script), *args], env=env,
        cwd=folder, input=stdin, capture_output=True, encoding="utf-8", timeout=170,
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    if not launcher:
        assert "Traceback" not in result.stderr
    return result.stdout, result.stderr


def listen_to_ctrl_c() -> None:
    """在子进程里：测试若在后台运行，SIGINT 是被忽略的，要恢复。"""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """一个在后台运行的脚本，输出写在 folder/log 里。"""

    def __init__(self, folder, script, *args, launcher=(), env=None):
        self.log = Path(folder) / "log"
        self.log.touch()
        if not launcher and not env:
            self.process = Forked(folder, location(script), args, self.log)
            return
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *command(script), *args],
                env={**ENVIRONMENT, "PYTHONPATH": str(REPO), **(env or {})}, cwd=folder,
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, preexec_fn=listen_to_ctrl_c,
            )  # fmt: skip

    def text(self) -> str:
        """到现在为止的输出。"""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, happened: Callable[[], bool], seconds: float = 120) -> bool:
        """等到某件事发生；程序先结束了，返回假。"""
        deadline = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.001)
        return True

    def end(self, number: int) -> int:
        """发一个信号，等它结束，返回退出码。"""
        self.process.send_signal(number)
        return self.process.wait(60)


def run_two(folder, script, *args) -> str:
    """两个进程一起运行一个程序，不经过 torchrun（它自己也要导入好几秒）；返回第 0 个说的话。"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    logs = [Path(folder) / f"log{rank}" for rank in (0, 1)]
    processes = []
    for rank, log in enumerate(logs):
        env = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        processes.append(Forked(folder, location(script), args, log, env))
    codes = [process.wait(120) for process in processes]
    said = [log.read_text(encoding="utf-8") for log in logs]
    assert codes == [0, 0], said
    return said[0]


# ---------- 3. 比较 ----------


def last_step(out: Path, stage: str) -> int:
    """记录里走到了第几步；还没有记录是 -1。"""
    path = out / stage / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def differences(a, b, path="") -> list[str]:
    """两份检查点（或其中一部分）有哪些不同；张量逐位比较。"""
    if isinstance(a, dict):
        names = {*a, *b}
        return [d for n in names for d in differences(a.get(n), b.get(n), f"{path}.{n}")]
    if isinstance(a, list):
        if len(a) != len(b):
            return [path]
        return [
            d
            for i, pair in enumerate(zip(a, b, strict=True))
            for d in differences(*pair, f"{path}.{i}")
        ]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [path]


TIMES = {".progress.seconds", ".progress.saving_seconds", ".config.resume", ".config.save_every",
         ".config.out_dir", ".config.init_from", ".config.data_dir"}  # fmt: skip


def assert_same_run(a: Path, b: Path, stage: str) -> None:
    """两次训练的结果逐位相同：参数、优化器、随机数、记录与样本；用时除外。"""
    found = [torch.load(out / f"{stage}.pt", weights_only=True) for out in (a, b)]
    assert set(differences(*found)) <= TIMES
    records = [metrics(out, stage) for out in (a, b)]
    assert records[0] == records[1]
    assert any("sample" in row for row in records[0])


def metrics(out: Path, stage: str) -> list[dict]:
    """记录，不含每次都不同的用时与速度。"""
    rows = map(json.loads, (out / stage / "metrics.jsonl").open(encoding="utf-8"))
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in rows]
