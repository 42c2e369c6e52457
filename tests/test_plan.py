"""估一估：``--plan`` 说的对得上真的训练，什么也不写下；还要多久，编译不算在内。"""

import hashlib
import io
import math
import re
import shlex
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import LITTLE, QUICK, Running, run, run_two

from config import Config
from engine import recorded, ways, words
from engine.plan import Counter, free_space
from engine.progress import UNKNOWN, Bar, Pace
from engine.recorded import Recorded, expected, fit, leave_one_out
from settings.resolve import load_config

SMALL = [*QUICK, *LITTLE]
MOE = ["--preset", "tiny-moe", "--n_experts", "4", "--n_active", "2", "--hidden_dim", "16"]


# ---------- 走得多快 ----------


def pace(n_steps=1000, first=0, eval_every=100, cost=0.0, compiled=True) -> Pace:
    """检验平时用 8 步的词元，最后 80 步的；一分钟保存一次。"""
    saver = SimpleNamespace(interval=60.0, cost=cost)
    return Pace(range(first, n_steps), eval_every, (8, 80), saver, compiled)


def test_the_minute_of_compiling_is_in_neither_the_rate_nor_the_rest():
    slow, quick = pace(), pace()
    for one, compiling in ((slow, 60.0), (quick, 0.5)):
        one.stepped(compiling)
        assert (one.remaining(), one.rate()) == (None, 0)  # 只走过编译的那一步：还不知道
        one.stepped(0.5)
    assert slow.step_seconds == 0.5
    assert slow.remaining() == quick.remaining() and slow.rate() == quick.rate()
    for seconds in [0.5] * 9 + [30.0]:  # 中途又编译了一次，或者机器忙了一下
        slow.stepped(seconds)
    assert slow.step_seconds == 0.5


def test_what_is_left_is_steps_checks_and_saves():
    one = pace(cost=3.0)
    for _ in range(51):
        one.stepped(0.5)
    one.checked(2.0)
    steps, checks = 949 * 0.5, (9 + 10) * 2.0  # 九次平时的，最后一次抵十次
    assert one.checking == checks
    assert one.remaining() == pytest.approx((steps + checks) * (1 + 3 / 60))
    assert one.rate() == pytest.approx(949 / one.remaining())
    one.saver.interval = 0.0  # 步步都存
    assert one.remaining() == pytest.approx((steps + checks) * (1 + 3 / 0.5))


def test_a_check_is_guessed_from_the_steps_until_it_was_measured_without_compiling():
    one = pace(compiled=False)
    for _ in range(3):
        one.stepped(0.5)
    assert one.check_seconds == Pace.FORWARD * 8 * 0.5
    one.checked(60.0)  # 接着练的：头一次检验里有编译
    assert one.check_seconds == Pace.FORWARD * 8 * 0.5
    one.checked(3.0)
    assert one.check_seconds == 3.0


@pytest.mark.parametrize(
    ("first", "n_steps", "said_at"),
    [(0, 1000, 51), (0, 60, 31), (40, 100, 71), (990, 1000, None), (0, 1, None), (5, 5, None)],
)
def test_it_is_said_once(first, n_steps, said_at):
    one = pace(n_steps, first)
    said = [one.step for _ in range(first, n_steps) if one.stepped(0.5)]
    assert said == ([said_at] if said_at else [])
    assert one.rate() >= 0  # 走完了，也不除以零


def test_words_for_how_long():
    assert [words.duration(s) for s in (0.2, 40, 720, 7200)] == [
        "约 1 秒", "约 40 秒", "约 12 分钟", "约 2.0 小时",
    ]  # fmt: skip


def test_the_bar_listens_to_the_pace():
    one, text = pace(100, eval_every=1000), io.StringIO()
    bar = Bar(one, total=100, unit="步", file=text, mininterval=0, ncols=120)
    assert "?步/s" in text.getvalue()  # 还没有量到
    for _ in range(11):
        one.stepped(0.5)
        bar.update()
    # 余下的 89 步，最后一次检验抵四十步
    assert text.getvalue().endswith("11/100 [00:00<01:04,  1.38步/s]")
    bar.close()


def test_the_bar_shows_no_total_until_there_is_one():
    text = io.StringIO()
    bar = Bar(pace(UNKNOWN), total=UNKNOWN, unit="步", file=text, mininterval=0, ncols=120)
    bar.update()
    assert str(UNKNOWN) not in text.getvalue() and "1步" in text.getvalue()
    bar.total = 100
    bar.update()
    assert "2/100" in text.getvalue()
    bar.close()


def test_a_real_run_says_it_once(little, tmp_path):
    (tmp_path / "data").symlink_to(little / "data")
    out, _ = run(tmp_path, "pre_train.py", "--max_steps", "24", *SMALL)
    assert len(re.findall(r"照前 12 步的速度，还要约 \d+ 秒", out)) == 1
    assert out.count("还要约") == 1


# ---------- --plan ----------


def snapshot(folder: Path) -> dict:
    """目录里的一切：每个文件的内容与时间，每个目录。"""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (path.stat().st_mtime_ns, content)
    return found


@pytest.fixture
def place(little, tmp_path, monkeypatch) -> Path:
    """有备好的数据的目录；临时文件放在它的旁边。"""
    shutil.copytree(little / "data", tmp_path / "here/data")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "here"


def plan(place, script, *args) -> tuple[str, SimpleNamespace]:
    """运行一次 --plan：目录里一个字节也没有变；返回说的话与估的各样。"""
    found = []
    say = words.plan
    before = snapshot(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "plan", lambda x: found.append(x) or say(x))
        out, _ = run(place, script, "--plan", *args)
    assert snapshot(place) == before
    (estimate,) = found
    for part in ("用时", "词元", "内存", "磁盘", "损失", "三种走法"):
        assert re.search(rf"^ *{part}|{part}，命令", out, re.M), part
    stage = {"pre_train.py": "pretrain", "sft_train.py": "sft"}[script]
    assert len(estimate.ways) == 3
    for way in estimate.ways:  # 照抄就行
        python, name, *argv = shlex.split(way.command)
        assert (python, name) == ("python", script)
        assert not load_config(stage, argv)[0].plan
        assert way.seconds > 0
    return out, estimate


def test_a_plan_of_pretraining_agrees_with_the_run_it_foretells(place):
    flags = ["--max_steps", "24", *SMALL, "--out_dir", "out/new"]
    out, found = plan(place, "pre_train.py", *flags)
    assert found.tokens == 24 * 2 * 128 and found.steps == 24
    assert found.checking > 0 and found.step_seconds > 0
    assert found.remaining == pytest.approx(24 * found.step_seconds + found.checking, rel=0.01)
    assert "没训练过的模型" in out and "接下来" not in out
    run(place, "pre_train.py", *flags)
    real = (place / "out/new/pretrain.pt").stat().st_size
    assert found.checkpoint == pytest.approx(real, rel=0.001)
    cache = sum(p.stat().st_size for p in (place / "data/cache").glob("idiom-pretrain-*.*[nx]"))
    assert found.token_files == pytest.approx(cache, rel=0.001)
    # 已经练过的目录：不问 --overwrite，也不动它；没有多走，参数仍是那一次的
    plan(place, "pre_train.py", *flags)
    with_existing, resumed = plan(place, "pre_train.py", "--out_dir", "out/new", "--resume",
                                  "--max_steps", "40", "--allow_changes")  # fmt: skip
    assert "已经走完 24 步，共 40 步" in with_existing
    assert resumed.steps == 16 and resumed.tokens == 16 * 2 * 128
    assert all("--resume" in way.command for way in resumed.ways)
    assert "--allow_changes --max_steps 32" in resumed.ways[0].command


def test_a_plan_of_fine_tuning(place, little):
    shutil.copytree(little / "out", place / "out")
    out, found = plan(place, "sft_train.py", "--max_steps", "12", *QUICK, "--overwrite")
    assert found.tokens == 12 * 2 * 128
    assert found.checkpoint == pytest.approx((place / "out/tiny/sft.pt").stat().st_size, rel=0.001)
    assert "没有可比的记录：记下的都是从头的预训练" in out


def test_a_plan_of_experts(place):
    _, found = plan(place, "pre_train.py", "--max_steps", "1", *SMALL, *MOE)  # 一步也估得出
    assert found.steps == 1 and found.step_seconds > 0


def test_a_corpus_that_is_not_prepared_leaves_nothing_behind(tmp_path, place):
    shutil.rmtree(place / "data")
    rows = "".join(
        f'{{"text": "第 {i} 篇，说的是{chr(0x4E00 + i)}字怎样写。"}}\n' for i in range(400)
    )
    (place / "my.jsonl").write_text(rows, encoding="utf-8")
    out, found = plan(place, "pre_train.py", "--data", "my.jsonl", "--max_steps", "20", *SMALL)
    assert "做在临时目录里，打开就删" in out and "换了语料，损失不能比" in out
    assert found.token_files > 0 and not list((tmp_path / "tmp").iterdir())


def test_a_finished_run_has_nothing_to_plan(place, little):
    shutil.copytree(little / "out", place / "out")
    before = snapshot(place)
    out, _ = run(place, "pre_train.py", "--plan", "--resume")
    assert "已经走完了，没有什么要估的" in out and snapshot(place) == before


def test_ctrl_c_while_planning(place):
    before = snapshot(place / "data")
    program = Running(place, "pre_train.py", "--plan", "--grad_accum", "512", *SMALL)
    assert program.until(lambda: "没训练过的模型" in program.text())
    assert program.end(signal.SIGINT) == 130
    assert "已中断" in program.text() and "Traceback" not in program.text()
    assert snapshot(place / "data") == before
    assert {path.name for path in place.iterdir()} == {"data", "log"}


def test_two_processes_plan_and_only_the_first_speaks(place):
    said = run_two(place, "pre_train.py", "--plan", "--max_steps", "24", *SMALL)
    assert said.count("估一估") == 1
    assert (place / "log1").read_text(encoding="utf-8") == ""
    assert not (place / "out").exists()


def test_a_counting_file_counts():
    counter = Counter()
    assert counter.write(b"abc") == 3 and counter.write(memoryview(b"de")) == 2
    assert counter.size == 5


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_space(tmp_path / "a/b/c") > 0


# ---------- 三种走法 ----------


def invented(seconds: float, *argv: str, stage="pretrain", resumed=False, **more):
    """一次想出来的训练，一步要这么多秒，共 1000 步。"""
    config, origins = load_config(stage, ["--plan", "--max_steps", "1000", *argv])
    one = pace()
    for _ in range(3):
        one.stepped(seconds)
    one.step = 0
    one.checked(0.0)
    fields = dict(
        config=config, origins=origins, pace=one, stage=stage, resumed=resumed, first_step=0,
        n_steps=1000, from_scratch=stage == "pretrain", shared=None,
        rows_per_step=config.batch_size * config.grad_accum,
        card={"train_tokens": 2_400_000}, folder=SimpleNamespace(script="python x.py"),
        device=SimpleNamespace(place=SimpleNamespace(type="cpu")),
    )  # fmt: skip
    return SimpleNamespace(**fields | more)


def test_a_long_run_is_cut_to_an_hour_or_made_smaller_or_split():
    less, smaller, split = ways.ways(invented(10, "--preset", "wide", "--lr", "0.02"), 100)
    assert less.command.endswith("--preset wide --lr 0.02 --max_steps 350")
    assert less.seconds == 3600
    assert smaller.command == "python x.py --preset small"  # 学习率随预设
    assert smaller.seconds < 3600
    assert "--max_steps 1000" in split.command and "分 3 个晚上" in split.note


def test_a_short_run_may_be_halved_or_be_larger():
    half, larger, whole = ways.ways(invented(0.2, "--dim", "96", "--data_dir", "d e"), 100)
    assert "--dim 96 --data_dir 'd e' --max_steps 500" in half.command
    assert larger.command == "python x.py --data_dir 'd e' --preset small"
    assert larger.seconds > whole.seconds == 300
    gpu = SimpleNamespace(place=SimpleNamespace(type="cuda"))
    assert ways.ways(invented(0.2, device=gpu), 1)[1].seconds is None  # 显卡上折算不准


@pytest.mark.parametrize("seconds", [0.2, 20])
def test_a_shape_that_is_fixed_gets_another_number_of_steps(seconds):
    for run_ in (invented(seconds, stage="sft"), invented(seconds, "--resume", resumed=True)):
        found = ways.ways(run_, 10)
        assert all("--preset" not in way.command for way in found)
        assert len({way.command for way in found}) == 3


def test_the_loss_is_told_only_where_there_are_runs_like_it():
    good = invented(1, "--preset", "tiny", "--seed", "3", "--batch_size", "4", "--grad_accum", "2",
                    "--eval_tokens", "9999")  # fmt: skip
    assert abs(ways.expected_loss(good, 1000).loss - 3.65) < 0.1
    for argv, why in [
        (["--data", "my.txt"], "换了语料"), (["--lr", "0.1"], "改了 lr"),
        (["--batch_size", "4"], "改了 batch_size × grad_accum"),
        (["--dim", "96"], "改了 dim"), (["--preset", "moe"], "moe 没有练过"),
    ]:  # fmt: skip
        assert why in ways.expected_loss(invented(1, *argv), 1000)
    assert "没有练过差不多" in ways.expected_loss(good, 10**6)


# ---------- 记录与线 ----------


def test_the_line_is_found_again():
    runs = tuple(
        Recorded(preset, tokens, amount * tokens**-0.12, "")
        for preset, amount in (("tiny", 20.0), ("wide", 30.0))
        for tokens in (10**5, 10**6, 10**7)
    )
    line = fit(runs)
    assert line.power == pytest.approx(0.12)
    assert line.loss("wide", 3e6) == pytest.approx(30 * 3e6**-0.12)
    assert max(map(abs, leave_one_out(runs))) < 1e-9
    assert expected("wide", 10**9, runs) is None and expected("moe", 10**6, runs) is None
    worse = (*runs[:-1], runs[-1]._replace(loss=runs[-1].loss * 1.1))
    assert expected("tiny", 10**6, worse).error > 0.1


def test_every_record_says_where_it_is_from():
    assert {run_.source for run_ in recorded.RUNS} == set(recorded.SOURCES)
    for run_ in recorded.RUNS:
        Config(preset=run_.preset)
        assert 2 < run_.loss < 6 and run_.tokens > 0
    for text in recorded.SOURCES.values():
        assert re.search(r"20\d\d-\d\d-\d\d", text)


def test_the_line_is_as_good_as_it_claims():
    """轮流不看的，二十次里至多一两次落在说的误差之外。"""
    missed = leave_one_out(recorded.RUNS)
    error = expected("tiny", 2_048_000).error / expected("tiny", 2_048_000).loss
    assert error == pytest.approx(2 * math.sqrt(sum(x * x for x in missed) / len(missed)))
    assert sum(abs(x) > error for x in missed) <= 0.1 * len(missed)
