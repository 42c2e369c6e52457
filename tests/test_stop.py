"""叫停：Ctrl-C 与 kill，做完这一步、存好了再走，并且说清怎样接着练。"""

import os
import shlex
import signal
import subprocess
import sys

import pytest
from scripts import REPO, listen_to_ctrl_c

from engine.distributed import World
from engine.progress import Progress
from engine.run_folder import RunFolder
from engine.saver import Saver
from engine.stop import Stop
from settings.resolve import load_config


@pytest.fixture(autouse=True)
def own_streams(monkeypatch):
    """Stop 会换掉标准输出与标准错误，用完恢复。"""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)


def test_after_a_signal_a_reader_that_left_does_not_matter(tmp_path):
    """``2>&1 | tee log`` 时按 Ctrl-C，tee 先走了：照样做完、存好，退出码仍是 130。"""
    saved = tmp_path / "saved"
    program = (
        "import os, signal, sys; from settings.script import run_script\n"
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
