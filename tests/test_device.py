"""设备：精度跟着硬件走，没有的说出来，编译不了就用原来的。"""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from losses import loss_of
from scripts import LITTLE, QUICK, run_apart

from config import Config, UserError
from engine import device as device_module
from engine.device import Device, compile_if_possible


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
    monkeypatch.setattr(device_module, "cpu_has_bf16", lambda: bf16)
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
    monkeypatch.setattr(device_module.shutil, "which", lambda name: None)
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


@pytest.mark.parametrize("wanted", [True, False])
def test_a_cache_that_cannot_be_written_is_left(monkeypatch, tmp_path, wanted):
    """它的上一级是个文件，谁也建不成；不编译时也不能留着，PyTorch 造优化器要用到它。"""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    device = Device(Config(device="cpu", compile=wanted))
    assert not device.compile
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    said = [note for note in device.notes if "缓存" in note]
    assert len(said) == wanted
    if wanted:
        assert str(tmp_path / "file" / "cache") in said[0] and "跳过 torch.compile" in said[0]
    assert compile_if_possible(loss_of, device) is loss_of


def test_a_cache_that_can_be_written_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert not any("缓存" in note for note in Device(Config(device="cpu")).notes)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("moment", ["at once", "at the first call"])
def test_a_compiler_that_cannot_write_is_one_sentence(monkeypatch, capsys, moment):
    """默认的缓存若是别人的，编译到一半才知道。"""

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied", "/tmp/torchinductor")

    monkeypatch.setattr(
        torch, "compile", refuse if moment == "at once" else lambda fn, **options: refuse
    )
    device = Device(Config(device="cpu"))
    device.compile = True
    fn = compile_if_possible(lambda x: x + 1, device)
    assert [fn(1), fn(2)] == [2, 3]
    assert capsys.readouterr().err.count("改为不编译") == 1
    assert not device.compile


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--no-compile"]])
def test_training_and_chat_go_on_without_a_cache(tmp_path, flags):
    """真的另起进程：写不了缓存，照样练完，照样聊。"""
    (tmp_path / "file").touch()
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    quick = [flag for flag in QUICK if flag != "--no-compile"] + [*LITTLE, "--max_steps", "2"]
    out, _ = run_apart(tmp_path, "pre_train.py", *quick, *flags, "--device", "cpu", env=env)
    assert out.count("跳过 torch.compile") == (not flags)
    arguments = ["--checkpoint", "out/tiny/pretrain.pt", "--prompt", "你好", "--max", "3"]
    chat = arguments if flags else [*arguments, "--compile"]
    out, err = run_apart(tmp_path, "pre_chat.py", *chat, env=env)
    assert out.startswith("你好")
    assert err.count("跳过 torch.compile") == (not flags)


def test_running_out_of_memory_is_not_a_failed_compilation(monkeypatch):
    """编译时试着跑，显存不够：换小些的批就行，不能从此不编译。"""
    from torch._dynamo.exc import TorchRuntimeError

    def compiled(*args):
        raise TorchRuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch, "compile", lambda fn, **options: compiled)
    device = SimpleNamespace(compile=True)
    with pytest.raises(TorchRuntimeError, match="out of memory"):
        compile_if_possible(lambda x: x, device)(1)
    assert device.compile


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="只有 glibc 会把用完的内存还给系统")
@pytest.mark.parametrize("thread", ["主线程", "别的线程"])
def test_freed_memory_is_kept_in_every_thread(thread):
    """大块用完再要，不必由系统重新逐页给：缺页的次数说得准，与快慢无关。"""
    program = f"""
import resource, threading, torch
from engine.device import keep_freed_memory
keep_freed_memory()

def faults():
    for turn in range(40):
        torch.empty(100 << 20, dtype=torch.uint8).fill_(0)
        if turn == 19:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if {thread == "主线程"}:
    faults()
else:
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = 4096
    assert int(done.stdout) < (100 << 20) / page  # 还了又要，二十回就是二十倍
