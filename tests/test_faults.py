"""训练途中出了意外：叫得停，不更新坏的一步，内存不够说得清。"""

import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from scripts import REPO, listen_to_ctrl_c

from config import Config, UserError
from engine.device import Device
from engine.distributed import World
from engine.guard import skip_step, too_many_skipped
from engine.memory import fit_batch, memory_needed, out_of_memory
from engine.progress import Progress
from engine.run_folder import RunFolder
from engine.saver import Saver
from engine.stop import Stop
from model import Transformer
from settings.resolve import load_config

SMALL = Config(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, max_len=16, seq_len=8,
    device="cpu", dtype="float32", compile=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_streams(monkeypatch):
    """Stop 会换掉标准输出与标准错误，用完恢复。"""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)


def test_after_a_signal_a_reader_that_left_does_not_matter(tmp_path):
    """``2>&1 | tee log`` 时按 Ctrl-C，tee 先走了：照样做完、存好，退出码仍是 130。"""
    saved = tmp_path / "saved"
    program = (
        "import os, signal, sys; from settings.flags import run_script\n"
        "from engine.distributed import World; from engine.stop import Stop\n"
        "def main():\n"
        "    stop = Stop(World()); stop.watch(); print('开始', flush=True); sys.stdin.readline()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('没人读了', flush=True); print('x', file=sys.stderr, flush=True)\n"
        f"    open({str(saved)!r}, 'w').close(); sys.exit(128 + stop.signal)\n"
        "run_script(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPO, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=listen_to_ctrl_c,
    )  # fmt: skip
    assert process.stdout.readline().decode().strip() == "开始"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(30) == 130
    assert saved.exists()


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(capfd):
    before = {number: signal.getsignal(number) for number in Stop.SIGNALS}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nohup 一类：事先要求忽略的
        stop = Stop(World())
        with pytest.raises(KeyboardInterrupt):  # 第一步之前，照平常那样中断
            os.kill(os.getpid(), signal.SIGINT)
        stop.watch()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert "做完这一步就保存" in capfd.readouterr().err
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # 再来一次，立刻退出
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_leaving_says_how_to_resume_with_the_code_of_the_signal(tmp_path, capsys, number, code):
    config, origins = load_config("pretrain", ["--out_dir", str(tmp_path / "我的 模型")])
    folder = RunFolder("pretrain", config, origins, World())
    stop = Stop(World())
    stop.signal = number
    progress = Progress(step=3)
    saver = Saver(folder, None, progress)
    with pytest.raises(SystemExit) as left:
        stop.leave(saver, progress, 10)
    assert left.value.code == code
    said = capsys.readouterr().out
    assert "停在第 3 步，共 10 步；已经存进" in said
    command = said.splitlines()[-1].removeprefix("接着练：python pre_train.py ")
    again, _ = load_config("pretrain", shlex.split(command))  # 照着粘贴就能用
    assert (again.out_dir, again.resume) == (config.out_dir, True)
    progress.step = 5  # 这一次没存下
    with pytest.raises(SystemExit):
        stop.leave(saver, progress, 10)
    assert "没有存下，走到第 3 步的检查点还在" in capsys.readouterr().out


def test_a_skipped_step_names_its_data(capsys):
    device = Device(SMALL)
    progress = Progress(step=10)
    nan = float("nan")
    notes = skip_step(progress, nan, [[1, 2], [3, 4]], [0.5, nan], 2, device)
    assert notes == {"skipped_rows": [3, 4]}  # 第二个小批的错
    assert "第 11 步的损失不是有限的数" in (said := capsys.readouterr().out)
    assert "第 3 遍，词元切成等长的行之后的第 3、4 行" in said
    assert skip_step(progress, 1.0, [[1, 2]], [1.0], 2, device) == {"skipped_rows": [1, 2]}
    assert "梯度" in capsys.readouterr().out
    assert not too_many_skipped(progress, device.scaler)
    # 错在别的进程的行里：我的损失是好的，记下的却是它的行。
    device.world.gather = lambda mine: [mine, ([7, 8], [7, 8])]
    assert skip_step(progress, nan, [[1]], [1.0], 2, device) == {"skipped_rows": [7, 8]}
    assert too_many_skipped(progress, device.scaler)
    assert progress.skipped == 3
    device = Device(SMALL)
    device.scaler = torch.amp.GradScaler("cpu", enabled=True)
    capsys.readouterr()
    skip_step(progress, 1.0, [[1]], [1.0], 2, device)  # fp16 溢出是常事，不必说
    assert capsys.readouterr().out == ""
    assert not too_many_skipped(progress, device.scaler)


def test_out_of_memory_names_the_knobs_and_how_much_they_save():
    model = Transformer(SMALL)
    config = replace(SMALL, batch_size=4, grad_accum=1, seq_len=128)
    fixed, per_row = memory_needed(config, model)
    said = str(out_of_memory(config, model, 4))
    assert re.search(r"--batch_size 2 --grad_accum 2，约省 \d.*--seq_len 64", said)
    # 几个进程分着读，一次前向只有两行；接着练时长度不能改。
    text = str(out_of_memory(replace(config, resume=True), model, 2))
    assert "--batch_size 1 --grad_accum 4" in text
    assert "--seq_len" not in text
    assert "--batch_size" not in str(out_of_memory(config, model, 1))
    assert memory_needed(replace(config, seq_len=256), model) == (fixed, 2 * per_row)


@pytest.mark.parametrize(("fits", "expected"), [(100, 12), (11, 6), (5, 4), (1, 1)])
def test_auto_batch_is_the_largest_divisor_that_fits(fits, expected):
    tried = []

    def attempt(size):
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fit_batch(12, attempt) == expected
    assert tried == [n for n in (12, 6, 4, 3, 2, 1) if n >= expected]


def test_auto_batch_says_when_not_even_one_row_fits_and_hides_no_other_error():
    def never(size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def bug(size):
        raise RuntimeError("shape mismatch")

    with pytest.raises(UserError, match="一行也放不下"):
        fit_batch(4, never)
    with pytest.raises(RuntimeError, match="shape"):
        fit_batch(4, bug)
