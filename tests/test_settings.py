"""设置：值的来历，取决于别的设置的默认值，规矩的表，各个程序读命令行的那一个调用。"""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from config import PRESETS, Config, UserError, option
from engine.checkpoint import config_of
from settings import defaults, resolve
from settings.check import RULES, check_values
from settings.defaults import eval_interval, total_steps
from settings.flags import help_text, read_options, word, words
from settings.resolve import (
    Origin,
    default_checkpoint,
    describe,
    load_config,
    repeat_flags,
)
from settings.stored import adopt, inherit


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(resolve, "has_cuda", lambda: False)


# ---------- 来历 ----------


def test_what_is_printed_about_an_origin():
    """印出来的一个字也不变：[命令行]、[预设 tiny]、[自动]、[auto]、[检查点]、[config.py]。"""
    config, origins = load_config("pretrain", ["--batch_size", "auto", "--seed", "7"])
    origins["dim"] = Origin.CHECKPOINT
    labels = re.findall(r"^  \[(.+?)\] ", describe(config, origins), re.M)
    assert labels[0] == "命令行" and labels[-1] == "config.py"
    assert set(labels) == {"命令行", "自动", "检查点", "预设 tiny", "auto", "config.py"}
    assert origins["batch_size"] is Origin.TRIED
    assert config.batch_size == PRESETS["tiny"]["batch_size"]


# ---------- 取决于别的设置的默认值 ----------


@pytest.mark.parametrize(
    ("stage", "flags", "n_rows", "n_tokens", "steps"),
    [
        ("pretrain", ["--max_steps", "7"], 100, 1000, 7),
        ("pretrain", ["--epochs", "1.5"], 1000, 1000, 188),  # 每步 8 行，不满一步的也算一步
        ("pretrain", ["--preset", "wide"], 3200, 10**8 - 1, 400),  # 四遍
        ("pretrain", ["--preset", "wide"], 3200, 10**8, 100),  # 一遍
        ("pretrain", ["--preset", "deep", "--epochs", "3"], 3200, 10**8, 300),
        ("pretrain", ["--preset", "wide"], 1, 10**8, 20),  # 再少也走二十步
        ("sft", ["--preset", "wide"], 40, 1000, 20),
        ("pretrain", ["--preset", "wide", "--epochs", "1"], 1, 10**8, 1),  # 自己写的照办
        ("sft", [], 9999, 1000, 150),
        ("sft", ["--preset", "wide"], 3200, 10**9, 200),  # 两遍，词元再多也是
        ("sft", ["--epochs", "0.5"], 160, 1000, 10),
    ],
)
def test_total_steps(stage, flags, n_rows, n_tokens, steps):
    config, _ = load_config(stage, flags)
    assert total_steps(config, stage, n_rows, n_tokens) == steps


def test_evaluations_are_ten_and_never_far_apart():
    config = Config()
    assert [eval_interval(config, n) for n in (1, 10, 11, 1000, 10**6)] == [1, 1, 2, 100, 500]
    assert eval_interval(Config(eval_every=3), 1000) == 3


def test_a_slow_disk_is_written_to_less_often():
    waits = [defaults.save_interval(None, cost) for cost in (0.0, 1.0, 10.0)]
    assert waits == [60, 60, 500]
    assert defaults.save_interval(5.0, 10.0) == 5.0


def test_help_reads_the_same_home(monkeypatch):
    """默认值只写在一处：改了那里，--help 跟着变；每一句都在，也只在它自己的那一项里。"""
    text = help_text(Config, "用法")
    for name, sentence in defaults.SENTENCES.items():
        assert re.search(rf"^  --{name}\n .*；{re.escape(sentence)}（默认：", text, re.M)
        assert text.count(sentence) == 1
    assert "默认 4 遍，1 亿词元以上 1 遍" in text and "不超过 2%" in text
    assert set(defaults.AUTOMATIC) <= set(defaults.SENTENCES) <= {f.name for f in fields(Config)}
    monkeypatch.setitem(defaults.SENTENCES, "epochs", "默认九遍")
    assert "默认九遍" in help_text(Config, "用法")


# ---------- 路由器 ----------

MOE = ["--n_experts", "4", "--n_active", "2"]


def test_only_experts_have_a_router_scale():
    for preset, scale, origin in [
        ("tiny", None, Origin.EDITED), ("wide", None, Origin.EDITED),
        ("tiny-moe", 1.0, Origin.PRESET), ("moe", 0.2, Origin.PRESET),
    ]:  # fmt: skip
        config, origins = load_config("pretrain", ["--preset", preset])
        assert (config.router_scale, origins["router_scale"]) == (scale, origin)
    # 用参数分的专家
    for preset, scale in [("tiny", 1.0), ("small", 1.0), ("wide", 0.2), ("deep", 0.2)]:
        config, origins = load_config("pretrain", ["--preset", preset, *MOE])
        assert (config.router_scale, origins["router_scale"]) == (scale, Origin.AUTO)
    dense = ["--preset", "moe", "--n_experts", "0", "--n_active", "0"]
    assert load_config("pretrain", dense)[0].router_scale is None
    given, origins = load_config("pretrain", [*MOE, "--router_scale", "0.5"])
    assert (given.router_scale, origins["router_scale"]) == (0.5, Origin.FLAG)


def test_fine_tuning_learns_of_the_experts_from_the_checkpoint():
    source, _ = load_config("pretrain", MOE)
    config, origins = load_config("sft", [])
    assert config.router_scale is None
    inherit(config, origins, source, "x.pt")
    assert (config.n_experts, config.router_scale) == (4, 1.0)


@pytest.mark.parametrize(
    ("flags", "stored", "expected"),
    [
        ([], None, None),  # 现在的
        ([], 1.0, 1.0),  # 早先的，没有专家也记着
        (MOE, 0.5, 0.5),
        (MOE, None, 1.0),  # 早先的，没有记
    ],
)
def test_a_resumed_run_keeps_the_router_scale_it_began_with(tokenizer, flags, stored, expected):
    source = replace(load_config("pretrain", flags)[0], router_scale=stored)
    checkpoint = {"config": vars(source), "tokenizer": tokenizer.fingerprint()}
    found = config_of(checkpoint, Path("x.pt"), tokenizer)
    assert found.router_scale == expected
    config, origins = load_config("pretrain", ["--resume"])
    adopt(config, origins, found, Path("x.pt"))
    assert replace(config, resume=False) == replace(source, router_scale=expected)


# ---------- 规矩 ----------


def test_every_rule_reads_real_fields_and_can_be_broken():
    names = {f.name for f in fields(Config)}
    for rule in RULES:
        assert {*rule.names} <= names
        assert rule.sentence.format(**dict.fromkeys(rule.names, 1))
    config, _ = load_config("pretrain", [])
    problems: list[str] = []
    check_values(config, problems, set())
    assert problems == []


def test_a_value_out_of_range_is_not_compared_with_others():
    config = replace(load_config("pretrain", [])[0], dim=-1, seq_len=1024, warmup=float("nan"))
    problems: list[str] = []
    wrong = {"max_len"}
    check_values(config, problems, wrong)
    assert problems == ["dim 必须是正数，得到的是 -1", "warmup 必须在 0 与 1 之间，得到的是 nan"]
    assert wrong == {"max_len", "dim", "warmup"}


# ---------- 别的程序的命令行 ----------


@dataclass
class Some:
    """一个程序的参数。"""

    folder: str = word("目录", "请先写目录；{usage}", choices=("a", "b"))
    files: tuple[str, ...] = words("文件")
    speed: float = option(1.0, "多快", "倍")
    kind: str = option("x", "哪一种", choices=("x", "y"))

    def problems(self) -> list[str]:
        """不能用的值。"""
        return [] if self.speed > 0 else [f"--speed 必须是正数，得到的是 {self.speed}"]


def test_options_of_a_program():
    options = read_options(Some, ["a", "p", "--speed", "2", "q"], "用法：some", kind="y")
    assert options == Some("a", ("p", "q"), 2.0, "y")
    assert read_options(Some, ["--kind", "x", "b"], "用法：some", kind="y") == Some("b")


def test_all_problems_of_a_program_come_in_one_report():
    with pytest.raises(UserError) as caught:
        read_options(
            Some, [" ", "\udcff", "--sped", "2", "--speed=-1", "--kind", "z"], "用法：some"
        )
    assert str(caught.value).split("；") == [
        "请先写目录", "用法：some", "文件不是 UTF-8：'\\udcff'", "没有参数 --sped",
        "最接近的是 --speed", "--kind 只能是 x、y，得到的是 'z'",
        "--speed 必须是正数，得到的是 -1.0",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"^目录只能是 a、b，得到的是 'c'$"):
        read_options(Some, ["c"], "用法：some")
    with pytest.raises(UserError, match="没有参数 --folder"):  # 不带名字的，没有名字可写
        read_options(Some, ["a", "--folder", "b"], "用法：some")


def test_help_of_a_program_ends_it(capsys):
    with pytest.raises(SystemExit) as end:
        read_options(Some, ["--nonsense", "-h"], "用法：some")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("用法：some\n\n参数：\n  --speed\n") and "folder" not in out


# ---------- 聊天要的 ----------


def test_where_the_chats_look(monkeypatch):
    assert default_checkpoint("sft") == Path("out/tiny/sft.pt")
    monkeypatch.setattr(resolve, "has_cuda", lambda: True)
    assert default_checkpoint("pretrain") == Path("out/wide/pretrain.pt")
    for edited, path in [
        (dict(preset="deep"), "out/deep/sft.pt"), (dict(device="cpu"), "out/tiny/sft.pt"),
        (dict(out_dir="mine", preset="moe"), "mine/sft.pt"),
    ]:  # fmt: skip
        monkeypatch.setattr(resolve, "Config", lambda edited=edited: Config(**edited))
        assert default_checkpoint("sft") == Path(path)
    monkeypatch.setattr(resolve, "Config", lambda: Config(out_dir=" ", dtype="int8"))
    with pytest.raises(UserError, match="dtype 只能是") as caught:  # 一次说全
        default_checkpoint("sft")
    assert "out_dir 不能是空的" in str(caught.value)


def test_the_next_command_repeats_what_it_needs():
    config, origins = load_config(
        "pretrain", ["--out_dir", "out/my run", "--preset", "tiny", "--lr", "0.1", "--no-compile"]
    )
    assert repeat_flags(config, origins) == " --preset tiny --out_dir 'out/my run' --no-compile"
    assert repeat_flags(*load_config("pretrain", ["--device", "cpu"])) == " --device cpu"
    config, origins = load_config("pretrain", ["--out_dir", "out/x"])
    config.preset, origins["preset"], origins["device"] = (
        "deep", Origin.CHECKPOINT, Origin.CHECKPOINT,
    )  # fmt: skip
    assert repeat_flags(config, origins) == " --preset deep --out_dir out/x"  # 接着练的
