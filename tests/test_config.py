"""配置：改过的值必须算数，写错的值必须在加载任何东西之前、一次全部说清。"""

from settings.script import run_script

import io
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from config import PRESETS, Config, UserError
from settings import resolve
from settings.flags import field_types, help_text, parse_flags
from settings.resolve import Origin, describe, load_config


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(resolve, "has_cuda", lambda: False)


def test_auto_preset_follows_the_machine(monkeypatch):
    assert load_config("pretrain", [])[0].preset == "tiny"
    monkeypatch.setattr(resolve, "has_cuda", lambda: True)
    config, origins = load_config("pretrain", [])
    assert (config.preset, config.dim, config.n_layers) == ("wide", 512, 8)
    assert origins["preset"] is Origin.AUTO
    assert origins["dim"] is Origin.PRESET


def test_flag_beats_edited_default_beats_preset():
    edited = Config(preset="deep", lr=0.005, n_layers=3)  # 用户在 config.py 里改的
    config, origins = load_config("pretrain", ["--lr", "3e-4"], edited)
    assert (config.lr, origins["lr"]) == (3e-4, Origin.FLAG)
    assert (config.n_layers, origins["n_layers"]) == (3, Origin.EDITED)
    assert (config.dim, origins["dim"]) == (512, Origin.PRESET)


def test_every_field_is_a_flag_and_in_the_help():
    text = help_text(Config, "用法")
    samples = {int: "8", float: "0.25", str: "x"}
    for name, kind in field_types(Config).items():
        assert re.search(rf"--{name}\b", text)
        problems: list[str] = []
        argv = [f"--no-{name}"] if kind is bool else [f"--{name}", samples[kind]]
        given = parse_flags(Config, argv, problems)
        expected = False if kind is bool else kind(samples[kind])
        assert not problems
        assert given == {name: expected}
    assert all(f.metadata["help"] for f in fields(Config))


@pytest.mark.parametrize("argv", [["--lr=3e-4"], ["--lr", "3e-4"]])
def test_both_spellings_of_a_flag(argv):
    assert load_config("pretrain", argv)[0].lr == 3e-4


def test_negative_number_is_a_value_not_a_flag():
    with pytest.raises(UserError, match="lr 必须是正数，得到的是 -1"):
        load_config("pretrain", ["--lr", "-1"])


def test_hyphens_and_underscores_are_the_same():
    assert load_config("pretrain", ["--max-steps", "7"])[0].max_steps == 7


def test_all_problems_are_reported_together():
    with pytest.raises(UserError) as caught:
        load_config("pretrain", ["--lerning_rate", "1", "--lr", "abc", "extra", "--seed"])
    text = str(caught.value)
    for part in ("--lerning_rate", "--lr 要的是数，得到的是 'abc'", "'extra'", "--seed 后面"):
        assert part in text


def test_unknown_flag_names_the_nearest():
    with pytest.raises(UserError, match="没有参数 --max_step；最接近的是 --max_steps"):
        load_config("pretrain", ["--max_step", "5"])


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--n_heads", "5"], "n_heads（5）必须整除 dim（192）"),
        (["--n_kv_heads", "2"], "n_kv_heads（2）必须整除 n_heads（3）"),
        (["--dim", "12", "--n_heads", "4"], "必须是偶数"),
        (["--seq_len", "1024"], "seq_len（1024）不能超过 max_len（512）"),
        (["--vocab_size", "70000"], "uint16"),
        (["--vocab_size", "100"], "vocab_size（100）"),
        (["--preset", "huge"], "preset 只能是 auto、tiny、small、wide、deep"),
        (["--max_steps", "5", "--epochs", "2"], "max_steps 与 epochs 只能指定一个"),
        (["--warmup", "0.8", "--decay", "0.8"], "之和不能超过 1"),
        (["--lr", "nan"], "lr 必须是正数"),
        (["--muon_momentum", "1"], "muon_momentum 不能小于 0，要小于 1，得到的是 1.0"),
        (["--adam_beta2", "nan"], "adam_beta2 不能小于 0，要小于 1，得到的是 nan"),
        (["--val_fraction", "0"], "val_fraction"),
        (["--n_layers", "2.5"], "--n_layers 要的是整数"),
    ],
)
def test_impossible_values_are_named(argv, part):
    with pytest.raises(UserError) as caught:
        load_config("pretrain", argv)
    assert part in str(caught.value)


def test_two_impossible_combinations_come_in_one_report():
    with pytest.raises(UserError) as caught:
        load_config("pretrain", ["--n_heads", "5", "--seq_len", "4096"])
    assert "n_heads" in str(caught.value)
    assert "seq_len" in str(caught.value)


def test_every_kind_of_problem_comes_in_one_report():
    """写错的名字、变不成数的值、出界的值、不相容的组合，一次说全；出界的值不再牵出别的话。"""
    with pytest.raises(UserError) as caught:
        load_config(
            "pretrain",
            ["--lerning_rate", "1", "--n_layers", "x", "--lr", "-1", "--n_heads", "5"],
            Config(warmup="很快", dtype="int8"),
        )
    text = str(caught.value)
    for part in ("--lerning_rate", "n_layers 要的是整数", "lr 必须是正数", "必须整除 dim",
                 "warmup 要的是 float，得到的是 '很快'", "dtype 只能是"):  # fmt: skip
        assert text.count(part) == 1
    assert "sft_lr" not in text


def test_flags_of_the_other_stage_are_not_silently_ignored():
    with pytest.raises(UserError, match="--sft_lr 只用于微调"):
        load_config("pretrain", ["--init_from", "a.pt", "--sft_lr", "1"])
    config, _ = load_config("sft", ["--data", "chat.jsonl", "--prompt", "你好？"])
    assert (config.sft_data, config.sft_prompt) == ("chat.jsonl", "你好？")
    assert config.data == "builtin"


def test_arguments_that_are_not_utf8_are_named():
    """别的编码的终端送来的字节，Python 读成不成对的代理字符。"""
    with pytest.raises(UserError, match="--data 要的是 UTF-8 编码的文字"):
        load_config("pretrain", ["--data", "\udcb5\udca5.txt"])


def test_wrong_type_edited_into_the_class_is_named():
    with pytest.raises(UserError, match="lr 要的是 float，得到的是 '3e-4'"):
        load_config("pretrain", [], Config(lr="3e-4"))
    assert load_config("pretrain", [], Config(lr=1))[0].lr == 1.0  # 整数当小数用是可以的


def test_epochs_replace_the_preset_steps():
    config, _ = load_config("pretrain", ["--epochs", "2"])
    assert (config.epochs, config.max_steps) == (2.0, None)
    assert config.sft_max_steps == PRESETS["tiny"]["sft_max_steps"]


def test_steps_on_the_command_line_beat_edited_epochs():
    config, _ = load_config("pretrain", ["--max_steps", "5"], Config(epochs=3.0))
    assert (config.max_steps, config.epochs) == (5, None)


def test_asking_for_the_cpu_gives_the_cpu_preset(monkeypatch):
    monkeypatch.setattr(resolve, "has_cuda", lambda: True)
    assert load_config("pretrain", ["--device", "cpu"])[0].preset == "tiny"


def test_help_names_the_value_of_every_preset():
    assert "tiny 192、small 256、wide 512、deep 512" in help_text(Config, "用法")


def test_out_of_memory_and_full_disks_are_one_line(capsys):
    for error in (
        RuntimeError("CUDA out of memory. Tried"),
        MemoryError(),
        OSError(28, "No space left", "x.bin"),
    ):

        def fail(error=error):
            raise error

        with pytest.raises(SystemExit) as caught:
            run_script(fail)
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_closed_streams_and_broken_pipes_are_not_tracebacks(tmp_path):
    """输入输出一开始就关着，或者接在后面的程序先走了。"""
    script = tmp_path / "s.py"
    script.write_text(
        "import sys\nfrom settings.script import run_script\n"
        "run_script(lambda: [print(i, sys.stdin.isatty()) for i in range(99999)])\n"
    )
    root = Path(__file__).resolve().parent.parent
    for shell, code in (
        ("$0 $1 <&- >&-", 0),
        ("$0 $1 | head -1 >/dev/null; exit ${PIPESTATUS[0]}", 141),
    ):
        result = subprocess.run(
            ["bash", "-c", shell, sys.executable, script],
            env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (code, b"")


def test_standard_input_that_was_read_before_can_still_be_used(monkeypatch):
    """例如 python -m pdb pre_chat.py：调试器先从它读过命令。"""
    lines = io.TextIOWrapper(io.BytesIO("c\n守株\n".encode()), encoding="utf-8")
    assert lines.readline() == "c\n"
    monkeypatch.setattr("sys.stdin", lines)
    found = []
    run_script(lambda: found.append(sys.stdin.readline()))
    assert found == ["守株\n"]


def test_sft_learning_rate_is_a_fifth_of_lr():
    assert load_config("sft", [], Config(lr=0.01))[0].sft_lr == pytest.approx(0.002)


def test_on_the_sft_command_line_lr_and_steps_mean_this_run():
    config, origins = load_config("sft", ["--lr", "1e-3", "--max_steps", "7"])
    assert (config.sft_lr, config.sft_max_steps) == (1e-3, 7)
    assert config.max_steps == PRESETS["tiny"]["max_steps"]
    assert origins["sft_lr"] is Origin.FLAG


def test_downloaded_wiki_is_used_when_it_is_there(tmp_path):
    args = ["--data_dir", str(tmp_path)]
    assert load_config("pretrain", args)[0].data == "builtin"
    wiki = tmp_path / "wiki_zh_texts_filtered.json"
    wiki.write_text("[]")
    assert load_config("pretrain", args)[0].data == str(wiki)


def test_description_shows_every_value_once_with_its_origin():
    config, origins = load_config("pretrain", ["--lr", "0.5"])
    text = describe(config, origins)
    assert "[命令行] lr=0.5" in text
    for f in fields(Config):
        if getattr(config, f.name) is not None:
            assert text.count(f" {f.name}={getattr(config, f.name)}") == 1


def test_presets_are_valid_and_name_real_fields():
    for name in PRESETS:
        load_config("pretrain", ["--preset", name])
        assert set(PRESETS[name]) <= {f.name for f in fields(Config)}


def test_loading_leaves_the_class_alone():
    load_config("pretrain", ["--lr", "0.5"])
    assert replace(Config()) == Config()
    assert Config().lr is None
