"""随时可以中断：真的脚本，真的 kill -9、Ctrl-C 与磁盘写满；接着练完，与没有中断过的逐位相同。"""

import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
from scripts import (
    LITTLE,
    LITTLE_STEPS,
    QUICK,
    REPO,
    TWO_THREADS,
    Running,
    assert_same_run,
    last_step,
    metrics,
    run,
    run_apart,
)

from engine.checkpoint import read


def test_pretraining_survives_two_kills_a_full_disk_and_a_ctrl_c(little, tmp_path):
    (tmp_path / "data").symlink_to(little / "data")
    out = tmp_path / "out/tiny"
    part = out / "pretrain.pt.part"
    first = ["--max_steps", str(LITTLE_STEPS["pre_train.py"]), "--save_every", "0"]

    def goes_on(script, steps: int) -> bool:
        """从现在起再走几步。"""
        start = last_step(out, "pretrain")
        return script.until(lambda: last_step(out, "pretrain") >= start + steps)

    script = Running(tmp_path, "pre_train.py", *first, *QUICK, *LITTLE)  # 正在写检查点的时候
    assert script.until(lambda: part.exists() and last_step(out, "pretrain") >= 1)
    assert script.end(signal.SIGKILL) == -signal.SIGKILL

    script = Running(tmp_path, "pre_train.py", "--resume")  # 正在算一步的时候
    assert goes_on(script, 1) and script.until(lambda: not part.exists())
    assert script.end(signal.SIGKILL) == -signal.SIGKILL

    script = Running(tmp_path, "pre_train.py", "--resume")
    assert script.until(lambda: "开始训练" in script.text())
    unlimited = resource.prlimit(script.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(script.process.pid, resource.RLIMIT_FSIZE, (1 << 20, unlimited[1]))
    assert script.until(lambda: "训练接着进行，下次再存" in script.text())
    resource.prlimit(script.process.pid, resource.RLIMIT_FSIZE, unlimited)
    assert goes_on(script, 2)  # 走完一步，Ctrl-C 才会先保存；记录写在保存之前，所以等两步
    assert script.end(signal.SIGINT) == 130
    assert "接着练：python pre_train.py --out_dir out/tiny --resume" in script.text()
    assert "Traceback" not in script.text()

    run(tmp_path, "pre_train.py", "--resume")
    assert_same_run(little / "out/tiny", out, "pretrain")
    assert not part.exists()


def test_fine_tuning_survives_a_kill(little, tmp_path):
    (tmp_path / "data").symlink_to(little / "data")
    out = tmp_path / "out/tiny"
    first = ["--max_steps", str(LITTLE_STEPS["sft_train.py"]), "--save_every", "0", *QUICK]
    first += ["--init_from", str(little / "out/tiny/pretrain.pt")]

    script = Running(tmp_path, "sft_train.py", *first)
    assert script.until(lambda: last_step(out, "sft") >= 1)
    assert script.end(signal.SIGKILL) == -signal.SIGKILL

    run(tmp_path, "sft_train.py", "--resume")  # 预训练的检查点不在这里，也不需要
    assert_same_run(little / "out/tiny", out, "sft")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pre_train.py", "sft_train.py"])
def test_running_out_of_memory_names_the_knobs_and_loses_nothing(trained, tmp_path, script):
    (tmp_path / "data").symlink_to(trained[0] / "data")
    greedy = [*QUICK, "--batch_size", "2048", "--grad_accum", "1"]
    if script == "sft_train.py":
        greedy += ["--init_from", str(trained[0] / "out/tiny/pretrain.pt")]
    program = Running(tmp_path, script, *greedy)
    resource.prlimit(program.process.pid, resource.RLIMIT_AS, (6 << 30, 6 << 30))
    assert program.process.wait(170) == 2
    last = program.text().splitlines()[-1]
    assert "请加上 --batch_size 1024 --grad_accum 2，约省" in last
    assert "Traceback" not in program.text()
    (saved,) = (tmp_path / "out/tiny").glob("*.pt")  # 第 0 步的
    assert read(saved, mmap=True)["progress"]["step"] == 0


def test_numbers_going_wrong_stop_before_the_update_and_keep_the_good_checkpoint(trained, tmp_path):
    (tmp_path / "data").symlink_to(trained[0] / "data")
    _, err = run(tmp_path, "pre_train.py", "--max_steps", "9", "--lr", "1e9", *QUICK, code=2)
    assert "接连 3 步的损失或梯度不是有限的数" in err
    assert "--lr 3.3e+08" in err
    out = tmp_path / "out/tiny"
    assert (out / "pretrain.diverged.pt").exists()
    rows = metrics(out, "pretrain")
    assert [bool(r.get("skipped_rows")) for r in rows[-3:]] == [True] * 3
    assert rows[-1]["train_loss"] is None or rows[-1]["grad_norm"] is None


# ---------- 二十次随机的 kill -9 ----------

# 累积四次，每三步检验，每一步都保存：什么时候死，都可能正好撞上其中一件。
SHAPE = ["--dim", "32", "--n_layers", "1", "--n_heads", "2", "--n_kv_heads", "1",
         "--hidden_dim", "48"]  # fmt: skip
MANY = ["--no-compile", "--eval_tokens", "2048", "--batch_size", "2", "--grad_accum", "4",
        "--seq_len", "64", "--eval_every", "3", "--save_every", "0", "--max_steps",
        "300"]  # fmt: skip
KILLS = 10


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pre_train.py", "sft_train.py"])
def test_many_kills_at_random_moments_change_nothing(trained, tmp_path, script):
    stage = {"pre_train.py": "pretrain", "sft_train.py": "sft"}[script]
    (tmp_path / "data").symlink_to(trained[0] / "data")
    flags = [*MANY, *SHAPE]
    if stage == "sft":  # 形状取自预训练的检查点
        run(tmp_path, "pre_train.py", *flags, "--max_steps", "3", "--out_dir", "out/start")
        flags = [*MANY, "--init_from", "out/start/pretrain.pt"]
    whole = tmp_path / "out/whole"
    run(tmp_path, script, *flags, "--out_dir", str(whole))
    out = tmp_path / "out/killed"
    rng = random.Random(42)
    moments: list[str] = []
    while len(moments) < KILLS:
        more = ["--resume"] if (out / f"{stage}.pt").exists() else flags
        program = Running(tmp_path, script, *more, "--out_dir", str(out))
        before = last_step(out, stage)
        # 十次里有两次死在启动与备数据时，其余死在训练中随便哪一处。
        if len(moments) % 5 == 0:
            time.sleep(rng.uniform(0.5, 4))
        else:
            program.until(lambda before=before: last_step(out, stage) > before)
            time.sleep(rng.uniform(0, 2))
        part = (out / f"{stage}.pt.part").exists()
        if program.end(signal.SIGKILL) == 0:
            break
        step = last_step(out, stage)
        moments.append(f"第 {step} 步" + ("，正在保存" if part else ""))
    print(f"\n{script}：杀了 {len(moments)} 次：{'；'.join(moments)}")
    assert len(moments) == KILLS
    run(tmp_path, script, "--resume", "--out_dir", str(out))
    assert_same_run(whole, out, stage)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="没有 C++ 编译器")
@pytest.mark.parametrize("script", ["pre_train.py", "sft_train.py"])
def test_a_compiled_run_on_two_threads_ends_the_same(trained, tmp_path, script):
    """编译过、几个线程一起算：同样的命令结果相同，被杀掉再接着练也相同。"""
    stage = {"pre_train.py": "pretrain", "sft_train.py": "sft"}[script]
    (tmp_path / "data").symlink_to(trained[0] / "data")
    flags = [*QUICK[1:], "--max_steps", "8", "--eval_every", "4", "--save_every", "0"]
    if stage == "sft":
        flags += ["--init_from", str(trained[0] / "out/tiny/pretrain.pt")]
    env = {**TWO_THREADS, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    whole, again, killed = (tmp_path / "out" / name for name in ("whole", "again", "killed"))
    for out in (whole, again):
        text, _ = run_apart(tmp_path, script, *flags, "--out_dir", str(out), env=env)
        assert "torch.compile" in text and "失败" not in text
    assert_same_run(whole, again, stage)
    program = Running(tmp_path, script, *flags, "--out_dir", str(killed), env=env)
    assert program.until(lambda: last_step(killed, stage) >= 3, seconds=120)
    assert program.end(signal.SIGKILL) == -signal.SIGKILL
    run_apart(tmp_path, script, "--resume", "--out_dir", str(killed), env=env)
    assert_same_run(whole, killed, stage)


@pytest.mark.slow
def test_kills_while_preparing_data_leave_the_same_tokens(tmp_path):
    """备数据时被杀，下次重做；得到的词元与没有被杀过的相同，也没有残留。"""
    source = tmp_path / "text.jsonl"
    with source.open("w", encoding="utf-8") as f:
        for i in range(60000):
            f.write(json.dumps({"text": f"第{i}篇。" + "天地玄黄，宇宙洪荒。" * 10}) + "\n")
    flags = [*MANY, *SHAPE, "--max_steps", "1", "--data", str(source)]
    run(tmp_path, "pre_train.py", *flags, "--data_dir", "whole", "--out_dir", "out/whole")
    rng = random.Random(42)
    for i in range(4):
        program = Running(tmp_path, "pre_train.py", *flags, "--data_dir", "killed")
        cache = tmp_path / "killed/cache"
        program.until(lambda cache=cache: any(cache.glob("*.part")))
        time.sleep(rng.uniform(0, 2))
        assert program.end(signal.SIGKILL) == -signal.SIGKILL, f"第 {i} 次没来得及杀"
    run(tmp_path, "pre_train.py", *flags, "--data_dir", "killed", "--out_dir", "out/killed")
    names = [sorted(os.listdir(tmp_path / d / "cache")) for d in ("whole", "killed")]
    assert names[0] == names[1]
    for name in names[0]:
        contents = [(tmp_path / d / "cache" / name).read_bytes() for d in ("whole", "killed")]
        assert contents[0] == contents[1], name


def test_the_slow_tests_are_named_in_the_documentation():
    text = (REPO / "docs/reliability.md").read_text(encoding="utf-8")
    assert "python -m pytest -m slow" in text
