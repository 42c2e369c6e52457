"""练几小时、练到几点：到点正好收尾，学习率降到 0，机器快慢也不怕；背书了，最好的另存着。"""

import math
import random
import re
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from scripts import LITTLE, QUICK, metrics, run

import engine.run
from config import Config, UserError
from corpus import token_file
from engine import checks, deadline, words
from engine.checkpoint import read
from engine.deadline import UNKNOWN, Deadline
from engine.progress import Pace, Progress, out_of
from optimizer import learning_rate
from settings.clock import moment
from settings.defaults import eval_interval
from settings.resolve import load_config

SMALL = [*QUICK, *LITTLE]


# ---------- 假的钟 ----------


class Clock:
    """不走，只由测试拨。"""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(deadline.time, "monotonic", lambda: self.now)


def walk(clock: Clock, hours: float, step_seconds, checkpoint=None, until=math.inf):
    """照 Run.steps 的次序走：每步 step_seconds(第几步) 秒，检验 5 秒，最后一次 50 秒，保存 1 秒。

    Returns:
        (走完的步数，每步的学习率，定下的步数换了几次，检查点)
    """
    config = Config(hours=hours)
    end = Deadline(config, clock.now, checkpoint)
    n_steps, step = end.n_steps, checkpoint["progress"]["step"] if checkpoint else 0
    began, used = clock.now, end.used
    saver = SimpleNamespace(interval=60.0, cost=1.0)
    pace = Pace(range(step, n_steps), eval_interval(config, n_steps), (8, 80), saver, True)
    rates, changed, saved_at = [], 0, clock.now
    while step < n_steps and step < until:
        rates.append(learning_rate(step, n_steps, 0.03, 0.9))
        planned = end.plan(pace, n_steps)
        clock.now += (seconds := step_seconds(step))
        changed += planned != n_steps
        n_steps = pace.n_steps = planned
        pace.eval_every = eval_interval(config, planned)
        pace.stepped(seconds)
        step += 1
        if clock.now - saved_at >= saver.interval:
            clock.now += saver.cost
            saved_at = clock.now
        if step == n_steps or step % pace.eval_every == 0:
            clock.now += (seconds := 50.0 if step == n_steps else 5.0)
            if step < n_steps:
                pace.checked(seconds)
    progress = {"step": step, "seconds": used + clock.now - began}
    saved = {"config": {"hours": hours, "until": None}, "max_steps": n_steps, "progress": progress}
    return step, rates, changed, saved


def shaky(step: int) -> float:
    """每步一秒，上下两成。"""
    return random.Random(step).uniform(0.8, 1.2)


@pytest.mark.parametrize(
    "step_seconds",
    [
        lambda step: 1.0,
        shaky,
        lambda step: 60.0 if step == 0 else 1.0,  # 头一步要编译
        lambda step: 1.0 if step < 1500 else 2.0,  # 旁边又开了一个程序
        lambda step: 2.0 if step < 500 else 1.0,
        lambda step: 20.0,  # 一步就很慢
    ],
)
def test_it_ends_on_time_and_the_learning_rate_comes_down_to_zero(monkeypatch, step_seconds):
    clock = Clock(monkeypatch)
    began = clock.now
    n_steps, rates, changed, _ = walk(clock, 1.0, step_seconds)
    spent = clock.now - began
    assert 3600 * 0.98 <= spent <= 3600 + step_seconds(n_steps)
    assert rates[-1] <= 2 / (0.9 * n_steps)
    assert max(rates) > 0.9
    assert changed <= 0.03 * n_steps + 5  # 不是每步都在改


def test_an_even_machine_keeps_its_plan(monkeypatch):
    n_steps, rates, changed, _ = walk(Clock(monkeypatch), 1.0, lambda step: 1.0)
    assert changed <= 5
    usual = [learning_rate(step, n_steps, 0.03, 0.9) for step in range(n_steps)]
    assert max(abs(a - b) for a, b in zip(rates[200:], usual[200:], strict=True)) < 0.02


def test_what_was_interrupted_goes_on_where_it_was(monkeypatch):
    clock = Clock(monkeypatch)
    whole = walk(clock, 1.0, lambda step: 1.0)
    first = walk(clock, 1.0, lambda step: 1.0, until=1000)
    clock.now += 7 * 3600  # 睡了一觉：中断的时候不算
    second = walk(clock, 1.0, lambda step: 1.0, checkpoint=first[3])
    assert abs(second[0] - whole[0]) <= 0.01 * whole[0]
    joined = first[1] + second[1]
    n = min(len(joined), len(whole[1]))
    assert max(abs(a - b) for a, b in zip(joined[:n], whole[1][:n], strict=True)) < 0.02
    assert second[1][0] == pytest.approx(first[1][-1], abs=0.002)  # 头一步就接着，不从头升


def test_time_that_is_up_is_said_and_more_time_can_be_given(monkeypatch):
    clock = Clock(monkeypatch)
    saved = walk(clock, 1.0, lambda step: 1.0, until=100)[3]
    saved["progress"]["seconds"] = 3700.0
    with pytest.raises(UserError, match=r"已经练满 1 小时.*--allow_changes"):
        Deadline(Config(hours=1.0), clock.now, saved)
    more = Deadline(Config(hours=2.0), clock.now, saved)
    assert more.n_steps == UNKNOWN and more.left() == pytest.approx(3500)
    saved["max_steps"] = saved["progress"]["step"]  # 走完了的，没有什么要说
    Deadline(Config(hours=1.0), clock.now, saved)


def test_time_for_only_a_few_steps_is_said_once(monkeypatch, capsys):
    """照一百万步的升温走三步，什么也没学：不能只说「完成」。"""
    clock = Clock(monkeypatch)
    walk(clock, 65 / 3600, lambda step: 1.0)
    assert capsys.readouterr().out.count("学不到什么") == 1
    walk(clock, 0.1, lambda step: 1.0)
    assert "学不到什么" not in capsys.readouterr().out
    walk(clock, 0.04, lambda step: 1.0 if step < 5 else 90.0)  # 先定了几十步，后来慢了
    assert capsys.readouterr().out.count("学不到什么") == 1


def test_time_that_is_gone_before_the_rate_came_down_is_said(monkeypatch, capsys):
    """合上盖子、把钟拨快：到点了，学习率还高着，不能只说「完成」。"""
    walk(Clock(monkeypatch), 1.0, lambda step: 9000.0 if step == 1000 else 1.0)
    said = capsys.readouterr().out
    assert re.search(r"已经到点，比定好的少走 2\d\d\d 步，学习率没有降到 0", said)
    assert "--resume --allow_changes" in said and said.count("到点") == 1


def test_a_total_not_yet_known_is_no_total():
    assert out_of(10**6) == "，共 1000000 步" and str(UNKNOWN) not in out_of(UNKNOWN)


def test_a_plan_of_millions_of_steps_is_kept(monkeypatch):
    """快的显卡一夜走几百万步：也是定下的，不能每步都改。"""
    end = Deadline(Config(hours=1.0), Clock(monkeypatch).now)
    pace = Pace(range(0, 10**6), 10**5, (1, 10), SimpleNamespace(interval=60.0, cost=1.0), True)
    for _ in range(3):
        pace.stepped(0.001)
    planned = end.plan(pace, UNKNOWN)
    assert 3 * 10**6 < planned < 3.6 * 10**6
    monkeypatch.setattr(Deadline, "AIM", 0.98)  # 重新定，就会是别的数
    assert end.plan(pace, planned) == planned


# ---------- 几点 ----------

NOW = datetime(2026, 11, 29, 22, 15, 30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("23:00", datetime(2026, 11, 29, 23)),
        ("7:05", datetime(2026, 11, 30, 7, 5)),
        (" 22：15 ", datetime(2026, 11, 30, 22, 15)),  # 全角的冒号；已经过了，是明天的
        ("2026-12-01 07:30", datetime(2026, 12, 1, 7, 30)),
        ("24:00", None), ("12:60", None), ("晚上", None), ("2026-13-01 07:30", None), ("", None),
        ("0206-11-30 07:30", None), ("9999-12-31 07:30", None),
    ],
)  # fmt: skip
def test_a_time_is_the_next_one(text, expected):
    assert moment(text, NOW) == expected


def test_a_time_without_its_date_in_a_changed_checkpoint_is_understood(monkeypatch):
    monkeypatch.setattr(deadline.time, "time", lambda: NOW.timestamp())
    monkeypatch.setattr(deadline, "datetime", SimpleNamespace(now=lambda: NOW))
    assert Deadline(Config(until="23:00"), 0.0).left() == pytest.approx(44.5 * 60)


def test_one_way_to_say_how_long():
    config, _ = load_config("pretrain", ["--preset", "tiny", "--hours", "1.5"])
    assert (config.hours, config.max_steps, config.epochs) == (1.5, None, None)
    assert load_config("sft", ["--until", "23:00"])[0].until.endswith(" 23:00")
    for flags, sentence in (
        (["--hours", "1", "--max_steps", "5"], "max_steps 与 hours 只能指定一个"),
        (["--hours", "1", "--until", "23:00"], "hours 与 until 只能指定一个"),
        (["--hours", "0"], "hours 必须是正数"),
        (["--hours", "nan"], "hours"),
        (["--until", "九点"], "until 要写成 23:00 或"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_config("pretrain", flags)


def test_a_real_run_stops_by_the_clock_and_leaves_a_finished_checkpoint(
    little, tmp_path, monkeypatch
):
    """从走头一步算起，四秒。"""
    (tmp_path / "data").symlink_to(little / "data")
    looked: list[float] = []

    def left(end: Deadline) -> float:
        looked.append(time.monotonic())
        return 4.0 if not looked[1:] else looked[1] + 4 - looked[-1]

    monkeypatch.setattr(Deadline, "left", left)
    monkeypatch.setattr(deadline, "LATER", 0)
    out, _ = run(tmp_path, "pre_train.py", "--hours", "0.003", *SMALL, "--eval_every", "1000")
    assert "练 0.003 小时，每步" in out and "完成，用时" in out
    saved = read(tmp_path / "out/tiny/pretrain.pt")
    rows = metrics(tmp_path / "out/tiny", "pretrain")
    assert saved["max_steps"] == saved["progress"]["step"] == rows[-1]["step"] < UNKNOWN
    assert [row["n_steps"] for row in rows if "n_steps" in row][-1] == rows[-1]["step"]
    assert rows[-1]["lr"] < 0.2 * max(row.get("lr", 0) for row in rows)
    out, _ = run(tmp_path, "pre_train.py", "--resume")  # 已经练满了：没有什么要做
    assert "完成" in out
    _, err = run(tmp_path, "pre_train.py", "--resume", "--hours", "0.004", code=2)
    assert "hours（0.003 → 0.004）" in err and "--allow_changes" in err
    flags = ["--resume", "--hours", "0.004", "--allow_changes"]
    looked.clear()
    run(tmp_path, "pre_train.py", *flags)
    assert read(tmp_path / "out/tiny/pretrain.pt")["progress"]["step"] > rows[-1]["step"]


@pytest.mark.parametrize(
    "n_rows, said",
    [(4000, "约走 1000 步，读 2 遍"), (100, "约走 1000 步，读 80 遍：20 遍以上多半是在背书")],
)
def test_how_often_the_corpus_will_be_read_is_said_at_the_start(n_rows, said):
    run = SimpleNamespace(pace=SimpleNamespace(timed=50), deadline=object(), n_steps=1000,
                          rows_per_step=8, train=SimpleNamespace(n_rows=n_rows))  # fmt: skip
    text = words.remaining(run)
    assert said in text and ("背书" in text) == ("背书" in said)


def test_making_the_token_file_is_not_training_time(little, tmp_path, monkeypatch):
    """头一回分词比 --hours 还久，也照样练满那么久。"""
    (tmp_path / "data").symlink_to(little / "data")
    real, starts = token_file.tokenize_corpus, []

    def slowly(*args, **named):
        time.sleep(2.5)
        return real(*args, **named)

    class Noted(Deadline):
        def __init__(self, config, began, checkpoint=None):
            starts.append(time.monotonic() - began)
            super().__init__(config, began, checkpoint)

    monkeypatch.setattr(token_file, "tokenize_corpus", slowly)
    monkeypatch.setattr(engine.run, "Deadline", Noted)
    run(tmp_path, "pre_train.py", "--hours", "0.0006", *SMALL)  # 两秒
    assert starts[0] < 0.5 and metrics(tmp_path / "out/tiny", "pretrain")[-1]["step"] > 0


def test_planning_by_the_clock_gives_the_other_ways_their_own_length(little, tmp_path):
    """换一套大小、换一个步数，走的都不是这几个小时：命令里便不能再写它。"""
    (tmp_path / "data").symlink_to(little / "data")
    out, _ = run(tmp_path, "pre_train.py", "--plan", "--hours", "0.01", *SMALL)
    fewer, other, mine = [line for line in out.splitlines() if "  python pre_train.py" in line][-3:]
    assert "--max_steps" in fewer and "--hours" not in fewer
    assert "--preset small" in other and "--hours" not in other
    assert "--hours 0.01" in mine


def test_a_past_time_is_refused(little, tmp_path):
    (tmp_path / "data").symlink_to(little / "data")
    _, err = run(tmp_path, "pre_train.py", "--until", "2020-01-01 07:30", *SMALL, code=2)
    assert err.splitlines()[-1].startswith("错误：已经过了 2020-01-01 07:30；请用 --until")


# ---------- 背书 ----------


class Saved:
    """记下做过什么的 Saver。"""

    def __init__(self, best: Path):
        self.best, self.steps = best, []

    def save_best(self, make):
        self.kept = make()
        self.steps.append(self.kept["progress"]["step"])
        self.best.touch()

    def forget_best(self):
        self.best.unlink(missing_ok=True)


def course(tmp_path, losses: list[float], n_rows: int = 20, last=9.0) -> SimpleNamespace:
    """每十步检验一次，依次是这些损失，练完了照平时的量法是 last；每步一行，一遍 n_rows 行。"""
    folder = SimpleNamespace(best=tmp_path / "pretrain.best.pt")
    run = SimpleNamespace(
        progress=Progress(), rows_per_step=1, train=SimpleNamespace(n_rows=n_rows),
        n_steps=10 * len(losses) + 10, config=Config(),
        metrics=SimpleNamespace(rows=[]), folder=folder, saver=Saved(folder.best),
    )  # fmt: skip
    run.state = lambda: {"progress": run.progress.state_dict()}
    for n, loss in enumerate(losses, 1):
        run.progress.step = 10 * n
        run.progress.checked(loss, loss, everything=False)
        run.metrics.rows += [{"step": 10 * n - 5}, {"step": 10 * n, "val_loss": loss}]
        checks.keep_best(run)
        checks.warn(run)
    with patch.object(checks, "read", lambda path, mmap: run.saver.kept):
        checks.settle(run, SimpleNamespace(measure=lambda max_tokens: (last, last)))
    return run


def test_the_best_moment_is_kept_and_three_rises_are_said_once(tmp_path, capsys):
    run = course(tmp_path, [5.0, 4.0, 3.5, 3.0, 3.1, 3.2, 3.3, 3.4])
    assert run.saver.steps == [10, 20, 30, 40]
    said = capsys.readouterr().out + capsys.readouterr().err
    assert said.count("检验损失连着升了三次：最低是 3.000，在第 40 步；语料已经读了 3.5 遍") == 1
    assert f"另存在 {run.folder.best}" in said
    assert run.folder.best.exists()
    assert "最好的不是最后的，是第 40 步" in said


def test_a_run_that_only_gets_better_keeps_no_second_copy(tmp_path, capsys):
    run = course(tmp_path, [5.0, 4.0, 3.5, 3.0, 2.9], last=2.8)
    assert run.saver.steps == [10, 20, 30, 40, 50] and not run.folder.best.exists()
    assert capsys.readouterr().out == ""


def test_a_last_step_better_than_the_best_check_keeps_no_second_copy(tmp_path, capsys):
    """平时的检验里，最好的不是末一次的；可是再走几步，最后的比它还好。"""
    run = course(tmp_path, [5.0, 4.0, 3.5, 3.0, 3.1], last=2.9)
    assert not run.folder.best.exists() and capsys.readouterr().out == ""


def test_the_best_moment_of_the_first_reading_is_kept_too(tmp_path, capsys):
    """微调常常这样：头一遍没有读完就最好了，后来越背越差。"""
    run = course(tmp_path, [5.0, 3.0, 3.1, 3.2, 3.3])
    assert run.saver.steps == [10, 20] and run.folder.best.exists()
    assert f"另存在 {run.folder.best}；可以就停" in capsys.readouterr().out


def test_what_is_read_once_is_never_kept_twice(tmp_path):
    run = course(tmp_path, [5.0, 3.0, 3.1], n_rows=1000)
    assert run.saver.steps == [] and not run.folder.best.exists()


def test_a_plan_cut_back_to_one_reading_leaves_no_second_copy(tmp_path, capsys):
    """练到几点的，起先以为读得到第二遍，存了一份；后来机器慢了，一遍都没有读完。"""
    (tmp_path / "pretrain.best.pt").touch()
    run = course(tmp_path, [5.0, 4.0], n_rows=1000, last=3.0)
    assert not run.folder.best.exists() and capsys.readouterr().out == ""


def test_the_last_check_of_all_the_data_is_not_compared_with_the_usual_ones(tmp_path, capsys):
    """练完了又多练：末了的那一次多看了十倍的数据，高一些不是变差。"""
    run = course(tmp_path, [5.0, 3.0, 3.1])
    run.metrics.rows += [{"step": 40, "val_loss": 9.9, "val_everything": True}]
    run.metrics.rows += [{"step": 50, "val_loss": 3.2}]
    checks.warn(run)
    assert "连着升了三次" not in capsys.readouterr().out
    run.metrics.rows += [{"step": 60, "val_loss": 3.3}]
    checks.warn(run)
    assert "连着升了三次" in capsys.readouterr().out


def test_rises_within_the_first_reading_are_not_called_memorising(tmp_path, capsys):
    course(tmp_path, [3.0, 3.1, 3.2, 3.3], n_rows=1000)
    said = capsys.readouterr().out
    assert "多半是学习率太大" in said and "背书" not in said


def test_a_corpus_read_too_often_leaves_its_best_checkpoint(tmp_path):
    """真的脚本：四十段没有道理可讲的字，只能背。"""
    rng = random.Random(1)
    text = ["".join(chr(rng.randrange(0x4E00, 0x4F00)) for _ in range(30)) for _ in range(40)]
    (tmp_path / "few.txt").write_text("\n\n".join(text), encoding="utf-8")
    flags = ["--data", "few.txt", "--max_steps", "120", "--eval_every", "10"]
    flags += ["--val_fraction", "0.2"]
    shape = ["--dim", "64", "--n_layers", "2", "--n_heads", "2", "--n_kv_heads", "1"]
    out, _ = run(tmp_path, "pre_train.py", "--preset", "tiny", *flags, *shape, "--no-compile",
                 "--dtype", "float32", "--decay", "0", "--batch_size", "2")  # fmt: skip
    best = read(tmp_path / "out/tiny/pretrain.best.pt")
    rows = metrics(tmp_path / "out/tiny", "pretrain")
    checked = {r["step"]: r["val_loss"] for r in rows[:-1] if r.get("val_loss")}
    assert best["progress"]["step"] == min(checked, key=checked.get)
    assert "它多半是在背书" in out and "最好的不是最后的" in out
    run(tmp_path, "pre_chat.py", "--checkpoint", "out/tiny/pretrain.best.pt", "--prompt", "第3天")
    (tmp_path / "out/tiny/pretrain.pt").unlink()
    (tmp_path / "out/tiny/pretrain.previous.pt").unlink()
    _, err = run(tmp_path, "pre_train.py", "--data", "few.txt", code=2)  # 不悄悄删掉
    assert "pretrain.pt 已经有了" in err
