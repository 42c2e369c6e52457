"""从头到尾：真的脚本、真的内置语料，走几步。顺序就是读者的顺序。"""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from scripts import QUICK, REPO, run, run_apart


def test_pretraining_says_what_it_does_and_learns(trained):
    folder, text, _ = trained
    assert "ln V = 9.96" in text
    assert "合用词嵌入的一行" in text
    assert "[命令行]" in text
    assert "[预设 tiny]" in text
    rows = [json.loads(x) for x in (folder / "out/tiny/pretrain/metrics.jsonl").open()]
    assert [r["step"] for r in rows] == list(range(17))
    assert rows[0]["val_loss"] == pytest.approx(9.96, abs=0.1)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 1
    wanted = {"step", "tokens", "train_loss", "lr", "grad_norm", "tokens_per_second", "val_loss",
              "val_bpc", "sample", "seconds", "val_everything"}  # fmt: skip
    assert set(rows[-1]) == wanted
    assert 0.95 * 16 * 2 * 128 < rows[-1]["tokens"] <= 16 * 2 * 128  # 行尾空着的不算
    for name in ("pretrain.pt", "pretrain/loss.png", "pretrain/config.json"):
        assert (folder / "out/tiny" / name).stat().st_size > 0


def test_the_commands_printed_at_the_end_are_the_next_ones(trained):
    _, first, second = trained
    assert "python sft_train.py" in first
    assert "python pre_chat.py --checkpoint out/tiny/pretrain.pt" in first
    assert "python sft_chat.py --checkpoint out/tiny/sft.pt" in second
    assert "python -m tools.page out/tiny/sft.pt out/tiny/sft.html" in second


def test_sft_continues_from_pretraining(trained):
    folder, _, text = trained
    assert "起点：out/tiny/pretrain.pt" in text
    assert "[检查点]" in text
    assert "合用词嵌入的一行" in text  # 预训练没见过、微调也没有的，起点仍然相同
    rows = [json.loads(x) for x in (folder / "out/tiny/sft/metrics.jsonl").open()]
    assert [r["step"] for r in rows] == list(range(11))
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < 9.9
    # 都是每个目标的平均：除错了目标的个数，就差得多。
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["val_loss"], abs=1.5)


def test_prepared_data_is_reused(trained):
    _, first, second = trained
    assert "数据：沿用" in first
    assert "数据：沿用" in second


def test_pre_chat_continues_a_text(trained):
    folder, *_ = trained
    args = ["--prompt", "守株待兔：", "--seed", "3", "--max", "20"]
    once, _ = run(folder, "pre_chat.py", *args)
    assert once.startswith("守株待兔：")
    assert len(once) > 6


def test_sft_chat_serves_a_pipe_with_commands(trained):
    folder, *_ = trained
    talk = "你好\n/temp 0\n/temp abc\n/max 5\n/nonsense\n/reset\n画蛇添足是什么意思？\n/quit\n"
    out, err = run_apart(folder, "sft_chat.py", stdin=talk)
    assert out.count("\n") >= 2
    for part in ("temp 改为 0.0", "得到的是 'abc'", "没有命令 /nonsense", "已忘掉前文"):
        assert part in err  # 说明走标准错误，标准输出里只有回答
        assert part not in out


def test_mistakes_are_one_sentence_and_exit_code_2(trained, tmp_path):
    folder, *_ = trained
    for script, args, part in [
        ("pre_train.py", [], "out/tiny/pretrain.pt 已经有了（练了 16 步，共 16 步）"),
        ("sft_train.py", ["--out_dir", "out/none"], "找不到检查点 out/none/pretrain.pt"),
        ("sft_chat.py", ["--checkpoint", "out/tiny/pretrain.pt"], "请改用 python pre_chat.py"),
        ("sft_chat.py", ["--prompt", "兔" * 500], "请说短一些"),
    ]:
        _, err = run(folder, script, *args, code=2)
        assert part in err
        assert err.startswith("错误：")


def test_a_question_longer_than_a_row_is_no_dead_end(trained, tmp_path):
    """照着说的做就练得成；做不成的不叫人去试。"""
    folder, *_ = trained
    for n, name in [(300, "long"), (600, "longer")]:
        rows = [{"instruction": f"{i} " + "话" * n, "output": "好。"} for i in range(40)]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    flags = [*QUICK, "--init_from", str(folder / "out/tiny/pretrain.pt"), "--max_steps", "1",
             "--val_fraction", "0.3"]  # fmt: skip
    _, err = run(tmp_path, "sft_train.py", *flags, "--sft_data", "long.jsonl", code=2)
    assert "最短的要 30" in err and "--seq_len 512" in err
    run(tmp_path, "sft_train.py", *flags, "--sft_data", "long.jsonl", "--seq_len", "512")
    _, err = run(
        tmp_path, "sft_train.py", *flags, "--sft_data", "longer.jsonl", "--overwrite", code=2
    )
    assert "模型最多看 512 个，调大 seq_len 也没有用" in err and "--max_len 1024" in err


def own_the_terminal():
    """在子进程里：终端归它管；测试若在后台运行，SIGINT 是被忽略的，要恢复。"""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(trained):
    """在真的终端里：Ctrl-C 停下回答，程序还在；Ctrl-D 离开，退出码 0。"""
    folder, *_ = trained
    main, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(folder / "state")}
    # 温度极高：每个词元几乎都一样可能，不会重复，也不会自己结束，有时间按 Ctrl-C。
    wild = ["--max", "400", "--temp", "10", "--top_k", "0", "--top_p", "1"]
    process = subprocess.Popen(
        [sys.executable, str(REPO / "pre_chat.py"), *wild],
        cwd=folder, stdin=child, stdout=child, stderr=child, env=env, start_new_session=True,
        preexec_fn=own_the_terminal,
    )  # fmt: skip
    os.close(child)
    seen = ""

    def wait_for(pattern):
        nonlocal seen
        deadline = time.monotonic() + 40
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline, f"没有等到 {pattern}：{seen!r}"
            if select.select([main], [], [], 0.2)[0]:
                text = os.read(main, 65536).decode("utf-8", "replace")
                seen += text
                if "\x1b[6n" in text:  # 行编辑问光标在哪里，终端要回答
                    os.write(main, b"\x1b[1;1R")

    try:
        wait_for("你>")
        for _ in range(10):  # 机器忙时，看到开头之前可能已经写满了：再问一次
            seen = ""
            os.write(main, "一心一意：\r".encode())
            wait_for(r"(?s)一心一意：.*\n.*一心一意：.{3}")  # 先是回显，再是续写
            os.write(main, b"\x03")
            wait_for("已停止|要离开请按")
            answer, stopped, seen = seen.partition("已停止")
            if stopped:
                break
        assert stopped, answer
        wait_for("你>")
        os.write(main, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(main)
