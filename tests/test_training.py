"""训练的公共部分：累积不改变结果，省下的打分不改变结果，检验与记录一行不多、一行不少。"""

import json
import math
from dataclasses import replace

import pytest
import torch
from losses import loss_of

from config import Config, UserError
from dataset import IGNORE, Batch
from engine import device as training
from engine.device import Device, compile_if_possible
from engine.distributed import World
from engine.metrics import Metrics
from engine.progress import Progress
from loss import Loss, evaluate
from model import Transformer
from settings.resolve import Origin, load_config, repeat_flags

# 词表必须装得下分词器，其余尽量小。
SMALL = Config(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, max_len=16, seq_len=8,
    device="cpu", dtype="float32", compile=False, lr=0.01, muon_momentum=0.9, sft_lr=0.002,
    out_dir="out/x",
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Transformer(SMALL)
    for p in model.blocks.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batch_of(rows, length=8, supervised=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(200, (rows, length), generator=g)
    targets = torch.randint(200, (rows, length), generator=g)
    targets[torch.rand(rows, length, generator=g) >= supervised] = IGNORE
    return Batch(ids, targets)


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


def test_uneven_masks_accumulated_equal_one_large_batch(model):
    """一半小批几乎全要学，一半几乎不要学：累积的梯度仍与一大批的相同。"""
    parts = [batch_of(2, supervised=s, seed=i) for i, s in enumerate((1.0, 0.1, 0.6))]
    whole = Batch(torch.cat([p.ids for p in parts]), torch.cat([p.targets for p in parts]))
    count = int((whole.targets != IGNORE).sum())
    loss = loss_of(model, whole) / count
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0.0
    for part in parts:
        piece = loss_of(model, part) / count
        piece.backward()
        total += piece.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, q, atol=1e-6, rtol=1e-5)


def test_loss_is_the_mean_negative_log_probability_of_the_counted_targets(model):
    batch = batch_of(2, supervised=0.5)
    logprobs = model(batch.ids).log_softmax(-1)
    expected = -sum(
        logprobs[b, t, batch.targets[b, t]].item()
        for b in range(2)
        for t in range(8)
        if batch.targets[b, t] != IGNORE
    )
    assert loss_of(model, batch).item() == pytest.approx(expected, rel=1e-5)


class Rows:
    """假的数据：第 r 行由 r 决定。"""

    n_rows, seq_len = 5, 8

    def get(self, rows):
        batches = [batch_of(1, seed=row) for row in rows]
        return Batch(*(torch.cat(parts) for parts in zip(*(b[:2] for b in batches), strict=True)))


def test_evaluation_counts_every_row_once_whatever_the_batch_size(model):
    results = [evaluate(Loss(model), Rows(), size, 1000, Device(SMALL)) for size in (1, 5, 3)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0] == pytest.approx(results[2], rel=1e-6)  # 5 行分两批，最后一批凑数


def test_a_partial_evaluation_uses_the_same_rows_every_time_from_all_over_the_file(model):
    seen = []

    class Recording(Rows):
        n_rows = 100

        def get(self, rows):
            seen.append(rows)
            return super().get(rows)

    for _ in range(2):
        evaluate(Loss(model), Recording(), 10, 10 * 8, Device(SMALL))
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 10
    assert max(seen[0]) > 50


@pytest.mark.parametrize(
    ("device", "capability", "bf16", "expected"),
    [
        ("cuda", (9, 0), False, torch.bfloat16),
        ("cuda", (7, 5), False, torch.float16),
        ("cpu", None, True, torch.bfloat16),
        ("cpu", None, False, torch.float32),
    ],
)
def test_precision_follows_the_hardware(monkeypatch, device, capability, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(training, "cpu_has_bf16", lambda: bf16)
    chosen = Device(Config())
    assert (chosen.place.type, chosen.dtype) == (device, expected)
    assert chosen.scaler.is_enabled() == (expected == torch.float16)
    assert any("float32" in note for note in chosen.notes) == (expected == torch.float32)


def test_missing_devices_and_precisions_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="没有 cuda"):
        Device(Config(device="cuda"))
    with pytest.raises(UserError, match="float16"):
        Device(Config(device="cpu", dtype="float16"))


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch):
    monkeypatch.setattr(training.shutil, "which", lambda name: None)
    device = Device(Config(device="cpu"))
    assert not device.compile
    assert any("编译器" in note for note in device.notes)
    assert compile_if_possible(loss_of, device) is loss_of


def test_a_failing_compiler_falls_back_to_plain_execution(monkeypatch, capsys, tmp_path):
    """有编译器却编译不成（例如缺少头文件）：真的让它失败一次。"""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # 不用上次编译好的
    device = Device(Config(device="cpu"))
    device.compile = True
    # 不用 monkeypatch：它把这一项设回去之后，同一个进程里就再也编译不成了。
    with torch._inductor.config.patch({"cpp.cxx": ("/bin/false",)}):
        found = compile_if_possible(lambda x: (x * 3).sin() + 1, device)(torch.zeros(64))
    assert found.tolist() == [1.0] * 64
    assert "改为不编译" in capsys.readouterr().err
    assert not device.compile


def test_what_the_compiler_refuses_runs_uncompiled(capsys):
    """编译器推不出形状的（这里是只认 bf16 的 grouped_mm）：也改为不编译，不是一页英文。"""
    device = Device(Config(device="cpu"))
    device.compile = True
    ends = torch.tensor([4, 8], dtype=torch.int32)
    rows, matrices = torch.randn(8, 16), torch.randn(2, 16, 16)
    found = compile_if_possible(lambda: torch.nn.functional.grouped_mm(rows, matrices, offs=ends),
                                device)()  # fmt: skip
    torch.testing.assert_close(found[:4], rows[:4] @ matrices[0])
    assert "改为不编译" in capsys.readouterr().err
    assert not device.compile


def test_bf16_autocast_trains_to_nearly_the_same_gradients(model):
    """没有 bf16 指令的机器也能核对那条路：同样的一批，半精度的梯度与 fp32 的方向一致。"""
    batch = batch_of(2)
    loss_of(model, batch).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with Device(replace(SMALL, dtype="bfloat16")).autocast():
        loss_of(model, batch).backward()
    rounded = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99


@pytest.mark.gpu
def test_compiled_bf16_loss_on_the_gpu_is_close_to_fp32(model):
    batch = batch_of(4)
    expected = loss_of(model, batch).item()
    device = Device(Config(device="cuda"))
    fn = compile_if_possible(Loss(model.cuda()), device)
    with device.autocast():
        found = fn(batch.to(device.place)).item()
    assert found == pytest.approx(expected, rel=0.02)


def test_metrics_are_one_json_object_a_line_and_a_picture(tmp_path):
    metrics = Metrics(tmp_path / "pretrain", World(), Progress())
    metrics.write(step=0, tokens=0, val_loss=math.log(21248), val_bpc=14.7)
    for step in (1, 2):
        metrics.write(step=step, tokens=step * 10, train_loss=9.0 / step, lr=0.1, grad_norm=1.0,
                      tokens_per_second=5.0)  # fmt: skip
    metrics.draw()
    metrics.write(step=3, tokens=30, train_loss=3.0, grad_norm=float("inf"))  # fp16 溢出的一步
    rows = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert rows[-1]["grad_norm"] is None
    assert all("seconds" in r for r in rows)
    assert metrics.picture.read_bytes()[:4] == b"\x89PNG"


def test_metrics_go_on_where_the_checkpoint_is(tmp_path):
    """检查点之后多记的、断电时写了一半的，都不要；时间接着数。"""
    metrics = Metrics(tmp_path, World(), Progress())
    for step in range(5):
        metrics.write(step=step, tokens=step)
    with metrics.path.open("a") as f:
        f.write('{"step": 5, "tok')
    again = Metrics(tmp_path, World(), Progress(step=3, seconds=100.0))
    again.write(step=4, tokens=44)
    rows = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [(r["step"], r["tokens"]) for r in rows] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 44)]
    assert rows == again.rows
    assert rows[-1]["seconds"] >= 100
    fresh = Metrics(tmp_path, World(), Progress())
    assert fresh.path.read_text() == ""


def test_metrics_wait_in_memory_while_the_disk_is_full(tmp_path):
    metrics = Metrics(tmp_path, World(), Progress())
    real, full = metrics.file, True

    class Disk:
        def write(self, content):
            if full:
                raise OSError(28, "No space left on device")
            return real.write(content[:7]) if len(content) > 7 else real.write(content)

    metrics.file = Disk()
    metrics.write(step=1, tokens=1)
    metrics.write(step=2, tokens=2)
    full = False
    for step in range(3, 60):  # 一次只写得进几个字节，也一个不丢
        metrics.write(step=step, tokens=step)
    metrics.file = real
    metrics.write(step=60, tokens=60)
    assert [json.loads(x)["step"] for x in metrics.path.open()] == list(range(1, 61))
