"""线程怎样等：在导入 torch 之前定下；用户定过的不动；torch 已经在了，什么也不做。"""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from forked import CONTEXT
from jobs import meet, spins
from scripts import ENVIRONMENT, REPO

from config import Config
from engine import speed
from engine.device import Device
from generate import make_speaker
from model import Transformer
from settings import threads
from tools.bench import measuring, neighbour
from tools.bench.measuring import Contestant
from tools.bench.neighbour import Together, bench_neighbour
from tools.bench.options import Options
from tools.bench.yardsticks import PlainContestant

THEIRS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.fixture
def fresh(monkeypatch):
    """像刚启动：用户什么也没有定，torch 还没有导入；之后恢复原样。"""
    monkeypatch.delitem(sys.modules, "torch")
    with mock.patch.dict(os.environ):
        for name in THEIRS:
            os.environ.pop(name, None)
        yield


def test_threads_sleep_soon_by_default(fresh):
    before = dict(os.environ)
    assert threads.wait_briefly()
    assert dict(os.environ) == {**before, "GOMP_SPINCOUNT": "1500"}  # 别的都不动


@pytest.mark.parametrize(
    ("name", "value"),
    [("GOMP_SPINCOUNT", "INFINITY"), ("GOMP_SPINCOUNT", ""), ("OMP_WAIT_POLICY", "ACTIVE")],
)
def test_what_the_user_chose_stays(fresh, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert not threads.wait_briefly()
    assert dict(os.environ) == before


def test_nothing_happens_after_torch(fresh, monkeypatch):
    """这时 libgomp 已经读过了：再改也没有用，只会传给它启动的别的程序。"""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not threads.wait_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="别处的 torch 带的不是 GNU 的 OpenMP")
def test_the_library_itself_says_so():
    """变量写对了没有，问 libgomp 自己；它在载入时印出用的是几。"""
    env = {name: value for name, value in ENVIRONMENT.items() if name not in THEIRS}
    result = subprocess.run(
        [sys.executable, "-c", "import settings.script, torch"], cwd=REPO, capture_output=True,
        env={**env, "OMP_DISPLAY_ENV": "verbose"}, encoding="utf-8", check=True, timeout=60,
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in result.stderr:
        pytest.skip("这个 torch 用的不是 GNU 的 OpenMP")
    assert f"GOMP_SPINCOUNT = '{threads.BRIEFLY}'" in result.stderr


def test_a_yardstick_waits_as_its_library_does(monkeypatch):
    """对照是普通的程序：我们的设置不能传给它；用户自己定的，大家都照他的。"""
    monkeypatch.setenv("GOMP_SPINCOUNT", "1500")
    for changed, seen in ((True, "300000"), (False, "1500")):
        monkeypatch.setattr(threads, "changed", changed)
        with PlainContestant(spins) as player:
            assert player.work()[0] == seen
        assert os.environ["GOMP_SPINCOUNT"] == "1500"  # 只给了它，自己的没有变


def test_neighbours_work_at_the_same_time(monkeypatch, tmp_path):
    """一个干完才轮到另一个的，谁也等不到谁。"""
    monkeypatch.setattr(measuring.multiprocessing, "get_context", lambda kind: CONTEXT)
    both = Together(*(Contestant(meet, str(tmp_path), me) for me in "ab"))
    assert [result for result, _ in both.work()] == ["b", "a"]
    both.leave()


def test_the_row_is_of_the_slower_one(monkeypatch):
    """两个一起，快的那一个也许占了便宜；目标只给我们的。"""
    two = [(90, 1.0), (60, 1.0)]
    found = {"chat": [(300, 1.0)], "chat + ours": [[(120, 1.0), (50, 1.0)]]}

    def compete(players: dict, repeats: int) -> dict:
        return found | {n: [two if "×" in n else (100, 1.0)] for n in players if n not in found}

    monkeypatch.setattr(neighbour, "compete", compete)
    rows = bench_neighbour(Options(), "tiny")
    shown = [(row.values, row.goal) for row in rows]
    training = [([100], ""), ([60], ""), ([0.6], "≥ 0.4 倍")]
    assert shown[:3] == training
    assert shown[3:9] == [(values, "") for values, _ in training * 2]
    assert shown[9:] == [([300], ""), ([120], ""), ([0.4], "≥ 0.3 倍")]


@pytest.mark.parametrize(
    ("asked", "size", "expected"),
    [(None, 10, [1]), (None, 30_000_000, []), ("2", 10, [])],
    ids=["小的", "大的", "用户定了"],
)
def test_a_small_model_speaks_with_one_thread(
    monkeypatch, tokenizer, speaking_config, asked, size, expected
):
    """小的逐个生成，一个线程最快；大的要几个一起读内存；用户定了几个，照用户的。"""
    called = []
    monkeypatch.setattr(torch, "set_num_threads", called.append)
    monkeypatch.setattr(speed, "size_of", lambda speaker: size)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    speaker = make_speaker(Transformer(speaking_config), speaking_config, tokenizer, "pretrain")
    speed.speed_up(speaker, Device(speaking_config))
    assert called == expected


@pytest.fixture
def speaking_config() -> Config:
    return Config(
        dim=16, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=8, n_experts=0, max_len=16,
        device="cpu", dtype="float32", compile=False,
    )  # fmt: skip
