"""不是有限的数：跳过这一步，说出是哪些数据；接连几步就停下。"""

import math

import pytest
import torch

from config import Config
from engine.device import Device
from engine.guard import skip_step, too_many_skipped
from engine.progress import Progress
from engine.stepper import Stepper

SMALL = Config(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, max_len=16, seq_len=8,
    device="cpu", dtype="float32", compile=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "norm", "good"),
    [([1.0, 2.0], 3.0, True), ([1.0, math.nan], 3.0, False), ([1.0, math.inf], 3.0, False),
     ([1.0, 2.0], math.nan, False), ([1.0, 2.0], math.inf, False)],
)  # fmt: skip
def test_a_bad_loss_or_a_bad_gradient_is_not_used(tokenizer, losses, norm, good):
    """损失好好的，梯度也可能坏了：有一个不是有限的数，就不能更新。"""
    step = Stepper("pretrain", SMALL, Device(SMALL), tokenizer)
    assert step.finite([torch.tensor(x) for x in losses], torch.tensor(norm)) == good


def test_a_skipped_step_names_its_data(capsys):
    device = Device(SMALL)
    progress = Progress(step=10)
    nan = float("nan")
    notes = skip_step(progress, nan, [[1, 2], [3, 4]], [0.5, nan], 2, device)
    assert notes == {"skipped_rows": [3, 4]}  # 第二个小批的错
    assert "第 11 步的损失不是有限的数" in (said := capsys.readouterr().out)
    assert "第 3 遍，词元切成等长的行之后的第 3、4 行" in said
    assert skip_step(progress, 1.0, [[1, 2]], [1.0], 2, device) == {"skipped_rows": [1, 2]}
    assert "梯度" in capsys.readouterr().out
    assert not too_many_skipped(progress, device.scaler)
    # 错在别的进程的行里：我的损失是好的，记下的却是它的行。
    device.world.gather = lambda mine: [mine, ([7, 8], [7, 8])]
    assert skip_step(progress, nan, [[1]], [1.0], 2, device) == {"skipped_rows": [7, 8]}
    assert too_many_skipped(progress, device.scaler)
    assert progress.skipped == 3
    device = Device(SMALL)
    device.scaler = torch.amp.GradScaler("cpu", enabled=True)
    capsys.readouterr()
    skip_step(progress, 1.0, [[1]], [1.0], 2, device)  # fp16 溢出是常事，不必说
    assert capsys.readouterr().out == ""
    assert not too_many_skipped(progress, device.scaler)
