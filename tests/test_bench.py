"""测速：参赛的「我们」就是 pre_train.py 的那几步；数字、表格与命令行都对。"""

import json
import multiprocessing
import subprocess
import sys

import pytest
import torch
from forked import CONTEXT
from jobs import job
from scripts import REPO, metrics
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS, Config, UserError
from dataset import IGNORE
from engine import device as training
from model import Transformer
from tools.bench.__main__ import main
from tools.bench.contestants import trainer
from tools.bench.flops import training_flops
from tools.bench.growth import exponent
from tools.bench.measuring import Contestant, Row, rates, take_turns, to_markdown
from tools.bench.options import Options
from tools.bench.ours import Ours
from tools.bench.trainer import settings


@pytest.fixture
def here(builtin_config, builtin_pretrain):
    """用整场测试备好的语料。"""
    folder = builtin_config.data_dir
    return {"data_dir": folder, "device": "cpu", "dtype": "float32", "compile": False}


def bench(*args):
    """像用户那样运行 tools.bench。"""
    return subprocess.run(
        [sys.executable, "-m", "tools.bench", *args], cwd=REPO, capture_output=True,
        encoding="utf-8", timeout=600, check=False,
    )  # fmt: skip


def check_few_rows(made) -> None:
    """检验只看几行。"""
    held_out = made.loop.exam.batches if hasattr(made, "loop") else getattr(made, "val", None)
    if held_out is not None:
        held_out.n_rows = 64


def test_our_contestant_trains_as_the_script_does(trained, here):
    """否则测的是另一个程序：前三步的损失与 pre_train.py 记下的相同。"""
    expected = metrics(trained[0] / "out/tiny", "pretrain")[1:4]
    config = settings("tiny", **here, batch_size=2, seq_len=128)
    ours = Ours(config)
    before = 0
    for row in expected:
        assert ours.step(row["lr"] / config.lr) == row["tokens"] - before
        before = row["tokens"]
        assert ours.loss == pytest.approx(row["train_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["ours", "qwen3 eager"])
def test_experts_compete_too(kind, here):
    """专家混合也能上场；我们的那一方，负载在每一步之后交给下一步。"""
    shape = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 32}
    experts = {"n_experts": 4, "n_active": 2, "router_scale": 1.0}
    made = trainer(
        kind, "tiny", **here, **shape, **experts, batch_size=8, seq_len=64, max_len=128, lr=0.01
    )
    for _ in range(6):
        made.step(1.0)
    check_few_rows(made)
    assert made.val_loss() < 9.6
    if kind == "ours":
        load = made.model.blocks[0].feed_forward.load
        assert load.sum() == pytest.approx(1) and load.std() > 0
    else:
        assert type(made.model).__name__ == "Qwen3MoeForCausalLM"


@pytest.mark.parametrize("kind", ["ours", "ours, whole vocabulary", "qwen3 eager", "original"])
def test_every_contestant_learns_and_counts_only_targets(kind, here):
    """对照也要真的在学，否则赢了不算；补齐的、没有目标的不能算进速度。"""
    shape = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 64}
    made = trainer(
        kind, "tiny", **here, **shape, batch_size=16, seq_len=64, grad_accum=1, max_len=128, lr=0.01
    )  # CPU 上分成两小批
    counted = [made.step(1.0) for _ in range(8)]
    check_few_rows(made)
    if kind.startswith("ours"):
        assert min(counted) > 0.9 * 16 * 64 and max(counted) <= 16 * 64  # 行尾空着的不算
        assert made.val_loss() < 9.5
    elif kind == "qwen3 eager":
        assert set(counted) == {16 * 63}  # 每行的最后一个没有目标
        assert made.val_loss() < 9.5
    else:
        assert 0 < max(counted) < 4 * 128  # 一行一篇，补齐的不算
        ids, targets = made.next_batch()
        assert made.loss_of(ids, targets).item() < 9.5
        assert (targets == IGNORE).any()


@pytest.mark.parametrize(("kind", "lent"), [("qwen3 eager", 0), ("qwen3 eager, tuned", 1)])
def test_a_yardstick_is_a_plain_loop_unless_it_is_lent_our_settings(monkeypatch, here, kind, lent):
    """普通的循环没有我们的内存设置；借给它的那一方单列一行。"""
    called = []
    monkeypatch.setattr(training, "keep_freed_memory", lambda: called.append(1))
    monkeypatch.setattr(training, "add_in_fixed_order", lambda: called.append("不该借"))
    shape = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 64}
    trainer(kind, "tiny", **here, **shape, batch_size=2, seq_len=32, max_len=32)
    assert called == [1] * lent


def test_a_failed_compiler_is_not_measured_as_compiled(monkeypatch, here):
    """编译失败时训练会改用不编译的，接着练；测速却不能把它写在「编译」那一行。"""

    def failing(fn, device):
        def call(*args):
            device.compile = False
            return fn(*args)

        return call

    monkeypatch.setattr("engine.stepper.compile_if_possible", failing)
    monkeypatch.setattr("engine.device.shutil.which", lambda name: "/usr/bin/" + name)
    shape = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 64}
    with pytest.raises(UserError, match=r"torch\.compile 失败"):
        trainer("ours", "tiny", **here | {"compile": True}, **shape, seq_len=32)


def test_flops_follow_the_matrices_of_the_model():
    """公式里的参数个数，与模型真有的矩阵一致；专家只算挑中的几位。

    注意力的那一项与 PyTorch 自己数的相同，由 tests/test_laboratory.py 核对。
    """
    for preset in PRESETS:
        config = Config(**PRESETS[preset])
        with torch.device("meta"):
            model = Transformer(config)
        matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
        stacks = sum(p.numel() for p in model.parameters() if p.ndim == 3)
        matrices += stacks * config.n_active // (config.n_experts or 1)
        attention = 12 * config.n_layers * config.seq_len * config.dim
        assert training_flops(config, config.vocab_size) == 6 * matrices + attention


def test_flops_of_one_block_are_what_pytorch_counts():
    """注意力占大头的一层：每个词元与一行里的 T 个都算，因果也好、分段也好，省不了一半。"""
    config = Config(
        dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, seq_len=256, max_len=256,
        vocab_size=64,
    )  # fmt: skip
    ids = torch.randint(64, (1, config.seq_len))
    for segments in (None, torch.arange(config.seq_len)[None] // 100):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            Transformer(config)(ids, None, segments).sum().backward()
        counted = counter.get_total_flops() / ids.numel()
        assert training_flops(config, config.vocab_size) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("gpu", [False, True])
def test_contestants_take_turns(monkeypatch, gpu):
    """有显卡时几方一起备好，没有时一个一个地来；结果一样。"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    # 不必等它们导入 torch；真的那一种见下一个测试。
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: CONTEXT)
    players = {name: Contestant(job, n) for name, n in (("a", 3), ("b", 5))}
    found = take_turns(players, 2)
    assert [len(r) for r, _ in found["a"]] == [3, 3]
    assert all(rate > 0 for rate in rates(found["b"]))
    assert players["a"].peak_memory() > 1e6
    for player in players.values():
        player.leave()


def test_an_error_of_a_contestant_is_named():
    with pytest.raises(ValueError, match="坏了"):
        Contestant(job, 1, fail=True).work()


def test_the_table_says_what_was_not_measured():
    rows = [Row("甲", [1234.5, 1000.0, 2000.0], "词元/秒", "≥ 1"), Row("乙", [], "倍", "≥ 2")]
    table = to_markdown(
        {"train": {"machine": {"处理器": "x"}, "command": "c", "rows": [vars(r) for r in rows]}}
    )
    assert "| 甲 | 1,234（1,000–2,000）词元/秒 | ≥ 1 |" in table
    assert "| 乙 | 没有测量 | ≥ 2 |" in table
    missing = "train wide、train deep、decode wide、decode deep、memory wide、memory deep。"
    assert f"## 显卡上没有测量的\n\n{missing}" in table
    names = missing.removesuffix("。").split("、")
    on_gpu = {f"{n}（x）": {"machine": {"显卡": "x"}, "command": "c", "rows": []} for n in names}
    assert "没有测量" not in to_markdown(on_gpu)
    del on_gpu["train deep（x）"]
    assert "## 显卡上没有测量的\n\ntrain deep。" in to_markdown(on_gpu)


def test_exponent_is_the_slope_on_log_axes():
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["nonsense"], "没有 nonsense 这一节"), (["--preset", "huge"], "preset 只能是"),
     (["--repeats", "0"], "必须是正数"), (["--jsn", "x"], "最接近的是 --json"),
     (["--seconds", "nan"], "必须是正数"), (["--json", "x.md"], "以 .json 结尾")],
)  # fmt: skip
def test_mistakes_are_one_sentence(flags, said):
    with pytest.raises(UserError, match=said):
        main(flags)


def test_the_command_that_repeats_a_section_is_noted():
    assert Options().command("data", "") == "python -m tools.bench data"
    changed = Options(preset="auto", repeats=3, seconds=2.0, json="x.json")
    expected = "python -m tools.bench train --preset wide --repeats 3 --seconds 2.0"
    assert changed.command("train", "wide") == expected


def test_a_broken_result_file_is_named_and_kept(tmp_path):
    path = tmp_path / "b.json"
    path.write_text("{")
    with pytest.raises(UserError, match="不是以前的测速结果"):
        main(["scale", "--json", str(path)])
    assert path.read_text() == "{"


@pytest.mark.slow
def test_the_command_writes_its_table_and_keeps_the_other_sections(tmp_path):
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"train（CPU）": {"machine": {}, "command": "旧的", "rows": []}}))
    result = bench("memory", "--preset", "tiny", "--json", str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "旧的" in table
    assert "tiny：训练，ours" in table
