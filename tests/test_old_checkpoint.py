"""搬进房间之前的程序写下的检查点：接着练、聊、导出、看进去，都还行。

tests/data/8904b51.pt.xz 是提交 8904b51 的 pre_train.py 练到一半被 kill -9 时留下的（tiny 预设，
维数改成 4，两层；内置语料，fp32，一个线程，全程 10 步）；同名的 .jsonl 是那个程序接着练完的记录。
"""

import json
import lzma
import shutil
from pathlib import Path

import pytest
import torch
from scripts import run

from engine.checkpoint import load, read
from loss import BITS_OF_A_LOST_CHARACTER
from microscope import look

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def old(builtin_config, builtin_pretrain, builtin_sft, tmp_path_factory) -> Path:
    """一个工作目录，out/old 里是那时的检查点与记录。"""
    folder = tmp_path_factory.mktemp("old")
    (folder / "data").symlink_to(builtin_config.data_dir)
    out = folder / "out/old"
    (out / "pretrain").mkdir(parents=True)
    (out / "pretrain.pt").write_bytes(lzma.decompress((DATA / "8904b51.pt.xz").read_bytes()))
    shutil.copy(DATA / "8904b51.jsonl", out / "pretrain/metrics.jsonl")
    return folder


def test_it_is_read_and_looked_into(old, tokenizer):
    model, config, checkpoint = load(old / "out/old/pretrain.pt", tokenizer)
    assert (config.dim, config.n_layers, config.router_scale) == (4, 2, 1.0)  # 那时稠密的也写着
    assert 0 < checkpoint["progress"]["step"] < checkpoint["max_steps"] == 10
    view = look(model, tokenizer.encode("守株待兔："))
    torch.testing.assert_close(view.attention.sum(-1), torch.ones_like(view.attention[..., 0]))
    out, _ = run(old, "tools.explain", "守株待兔：", "--checkpoint", "out/old/pretrain.pt")
    assert "残差流里的向量有多长" in out


def test_it_chats_and_leaves(old):
    flags = ("--checkpoint", "out/old/pretrain.pt", "--prompt", "守株待兔：", "--max", "5")
    assert run(old, "pre_chat.py", *flags)[0].startswith("守株待兔：")
    run(old, "tools.export", "out/old/pretrain.pt", "hf")
    assert json.loads((old / "hf/config.json").read_text(encoding="utf-8"))["hidden_size"] == 4
    run(old, "sft_train.py", "--init_from", "out/old/pretrain.pt", "--out_dir", "out/sft",
        "--preset", "tiny", "--max_steps", "1", "--no-compile", "--eval_tokens", "256",
        "--batch_size", "2")  # fmt: skip
    assert read(old / "out/sft/sft.pt")["config"]["dim"] == 4


def test_it_goes_on_to_where_the_old_program_ended(old, builtin_pretrain):
    """接着练完，每一步的损失、学习率、梯度与那时的程序接着练的相同；换一台机器，差在末位。"""
    where, card = old / "out/old", builtin_pretrain.card
    begun = read(where / "pretrain.pt")["progress"]["step"]
    expected = [json.loads(line) for line in (DATA / "8904b51.jsonl").open(encoding="utf-8")]
    run(old, "pre_train.py", "--out_dir", "out/old", "--resume")
    found = [json.loads(x) for x in (where / "pretrain/metrics.jsonl").open(encoding="utf-8")]
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for mine, theirs in zip(found[begun + 1 :], expected[begun + 1 :], strict=True):
        for name in ("tokens", "train_loss", "lr", "grad_norm", "val_loss"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=2e-3), (name, mine)
        if "val_bpc" in theirs:  # 那时写不出的字不记账
            lost = BITS_OF_A_LOST_CHARACTER * card["val_lost"] / card["val_characters"]
            assert mine["val_bpc"] == pytest.approx(theirs["val_bpc"] + lost, rel=2e-3)
    assert read(where / "pretrain.pt")["progress"]["step"] == 10
