"""内存不够：该改哪个、省多少；在显卡上试出放得下的小批。"""

import re
from dataclasses import replace

import pytest
import torch

from config import Config, UserError
from engine.memory import fit_batch, memory_needed, out_of_memory
from model import Transformer

SMALL = Config(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, max_len=16, seq_len=8,
    device="cpu", dtype="float32", compile=False,
)  # fmt: skip


def test_out_of_memory_names_the_knobs_and_how_much_they_save():
    model = Transformer(SMALL)
    config = replace(SMALL, batch_size=4, grad_accum=1, seq_len=128)
    fixed, per_row = memory_needed(config, model)
    said = str(out_of_memory(config, model, 4))
    assert re.search(r"--batch_size 2 --grad_accum 2，约省 \d.*--seq_len 64", said)
    # 几个进程分着读，一次前向只有两行；接着练时长度不能改。
    text = str(out_of_memory(replace(config, resume=True), model, 2))
    assert "--batch_size 1 --grad_accum 4" in text
    assert "--seq_len" not in text
    assert "--batch_size" not in str(out_of_memory(config, model, 1))
    assert memory_needed(replace(config, seq_len=256), model) == (fixed, 2 * per_row)


@pytest.mark.parametrize(("fits", "expected"), [(100, 12), (11, 6), (5, 4), (1, 1)])
def test_auto_batch_is_the_largest_divisor_that_fits(fits, expected):
    tried = []

    def attempt(size):
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fit_batch(12, attempt) == expected
    assert tried == [n for n in (12, 6, 4, 3, 2, 1) if n >= expected]


def test_auto_batch_says_when_not_even_one_row_fits_and_hides_no_other_error():
    def never(size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def bug(size):
        raise RuntimeError("shape mismatch")

    with pytest.raises(UserError, match="一行也放不下"):
        fit_batch(4, never)
    with pytest.raises(RuntimeError, match="shape"):
        fit_batch(4, bug)
