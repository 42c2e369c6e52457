"""显卡用不上时，说得出为什么、怎样修好；没有显卡的，一个字也不说。

机器是搭出来的：/proc、/sys、/dev 写在临时目录里，nvidia-smi 是一个脚本，驱动与 PyTorch 说的是假的。
"""

import subprocess
import sys
import time
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import LITTLE, QUICK, run

from config import Config, UserError
from engine import doctor
from engine.device import Device
from engine.distributed import World
from settings import resolve

posix = pytest.mark.skipif(sys.platform == "win32", reason="假的 nvidia-smi 是 sh 写的")
RTX = "NVIDIA GeForce RTX 3090"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """一台没有显卡、没有驱动、没有变量的机器；返回怎样往上面添东西。"""
    root, path = tmp_path / "root", tmp_path / "bin"
    path.mkdir()
    monkeypatch.setattr(doctor, "ROOT", root)
    monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(
        doctor.shutil,
        "which",
        lambda name, path=None, w=doctor.shutil.which: (
            None if name == "nvidia-smi" and not (tmp_path / "bin/nvidia-smi").exists() else w(name)
        ),
    )

    def put(file: str, text: str = "") -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")

    def smi(script: str) -> None:
        (path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (path / "nvidia-smi").chmod(0o755)

    def torch_of(cuda: str | None, driver: int | None) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(doctor, "driver_cuda", lambda: driver)

    torch_of(None, None)
    return types.SimpleNamespace(put=put, smi=smi, torch=torch_of, env=monkeypatch.setenv)


def with_card(machine, n: int = 1) -> None:
    """插上 n 块显卡，驱动已经认出来。"""
    for i in range(n):
        machine.put(f"proc/driver/nvidia/gpus/{i}/information", f"Model: \t {RTX}\nIRQ: 9\n")


# ---------- 1. 有没有显卡 ----------


def test_without_a_card_nothing_is_said(machine):
    machine.put("sys/bus/pci/devices/0/vendor", "0x8086\n")
    machine.put("sys/bus/pci/devices/0/class", "0x030000\n")
    assert doctor.why_no_cuda() == ""
    assert Device(Config()).unused_card == ""


@pytest.mark.parametrize(
    ("file", "text"),
    [("dev/nvidia0", ""), ("proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: X\n")],
)
def test_a_card_is_found_without_nvidia_smi(machine, file, text):
    machine.put(file, text)
    assert doctor.find_cards() == (["X"] if text else [doctor.NAMELESS])


def test_a_card_without_any_driver_is_seen_on_the_bus(machine):
    """开源的 nouveau 驱动着的；它的声卡（0x0403）不算。"""
    for number, kind in ((0, "0x030000"), (1, "0x040300"), (2, "0x030200")):
        machine.put(f"sys/bus/pci/devices/{number}/vendor", "0x10de\n")
        machine.put(f"sys/bus/pci/devices/{number}/class", kind + "\n")
    assert doctor.find_cards() == [doctor.NAMELESS] * 2


@posix
def test_nvidia_smi_names_the_cards(machine):
    machine.smi(f'echo "{RTX}, 550.54.14"; echo "Tesla V100-SXM2, 32GB, 535.0"')
    assert doctor.find_cards() == [RTX, "Tesla V100-SXM2, 32GB"]


@posix
@pytest.mark.parametrize(
    "script",
    ["sleep 20", "trap '' TERM; sleep 20 & wait", f'echo "{RTX}, 550.54.14"; exit 9',
     "echo NVIDIA-SMI has failed because it could not communicate with the driver",
     "head -c 300000 /dev/zero", r"printf '\377\376\n\n, \n'", "exec /nowhere/at/all"],
)  # fmt: skip
def test_whatever_nvidia_smi_does_it_is_over_at_once(machine, script):
    """卡住的、出错的、说胡话的：都当作没有，也不等。"""
    machine.smi(script)
    started = time.monotonic()
    assert doctor.why_no_cuda() == ""
    assert time.monotonic() - started < 5  # 真的是 0.25 秒；机器忙时宽一些，远不到它要的二十秒


@posix
def test_a_hanging_nvidia_smi_hides_no_card(machine):
    machine.smi("sleep 20")
    machine.put("dev/nvidia0")
    assert "不带 CUDA" in doctor.why_no_cuda()


@posix
@settings(max_examples=20, deadline=None)
@given(said=st.binary(max_size=200))
def test_any_bytes_of_nvidia_smi(said):
    """名字里的转义序列到不了终端，什么字节也不会出错。"""
    with pytest.MonkeyPatch.context() as patch:
        real = subprocess.Popen
        patch.setattr(doctor.shutil, "which", lambda *_, **__: "/bin/cat")
        command = [
            sys.executable,
            "-S",
            "-c",
            f"import sys; sys.stdout.buffer.write({said + b', 550.1' + b''!r})",
        ]
        patch.setattr(doctor.subprocess, "Popen", lambda _, **how: real(command, **how))
        patch.setattr(doctor, "SMI_SECONDS", 10)
        names = doctor._from_smi()
    assert all(isinstance(name, str) and name for name in names)


# ---------- 2. 为什么用不上 ----------


@pytest.mark.parametrize(
    ("system", "command"),
    [("linux", "再运行 pip install torch=="), ("win32", "Windows、Pip、CUDA")],
)
def test_a_cpu_build_says_how_to_install_the_other(machine, monkeypatch, system, command):
    with_card(machine)
    monkeypatch.setattr(sys, "platform", system)
    said = doctor.why_no_cuda()
    assert RTX in said and torch.__version__ in said
    assert "pip uninstall -y torch" in said and command in said
    assert "\n" not in said and "://" not in said


def test_a_driver_older_than_the_build(machine):
    with_card(machine)
    machine.torch(cuda="13.0", driver=12)
    said = doctor.why_no_cuda()
    assert "只支持到 CUDA 12" in said and "要 CUDA 13" in said and "至少 580" in said


def test_a_new_enough_driver_is_not_blamed(machine):
    """同一个大版本之内，小的版本不要紧；问不出来的也不乱猜。"""
    with_card(machine)
    for driver in (13, 14, 0):
        machine.torch(cuda="13.2", driver=driver)
        said = doctor.why_no_cuda()
        assert "驱动只支持" not in said and "没有认出原因" in said
        assert "PyTorch 说：" in said  # 真的问过它


@pytest.mark.parametrize(("value", "hides"), [
    ("", True), ("-1", True), ("2", True), ("none", True), ("-1,0", True), (" ", True),
    ("0", False), ("1,0", False), ("0,-1", False), ("GPU-8932f937", False), ("MIG-1", False),
])  # fmt: skip
def test_a_variable_that_hides_every_card(machine, value, hides):
    with_card(machine, 2)
    machine.torch(cuda="13.0", driver=13)
    machine.env("CUDA_VISIBLE_DEVICES", value)
    said = doctor.why_no_cuda()
    assert ("unset CUDA_VISIBLE_DEVICES" in said) == hides
    assert ("没有认出原因" in said) != hides


@pytest.mark.parametrize(("file", "text", "advice"), [
    (".dockerenv", "", "--gpus all"),
    ("run/.containerenv", "", "--gpus all"),
    ("proc/version", "Linux version 6.6-microsoft-standard-WSL2", "wsl --shutdown"),
    ("proc/version", "Linux version 6.12", "ubuntu-drivers install"),
])  # fmt: skip
def test_a_card_without_its_library(machine, file, text, advice):
    """设备在，libcuda 不在：容器里、WSL 里、没有装驱动，各有各的修法。"""
    machine.put("dev/nvidia0")
    machine.put(file, text)
    machine.torch(cuda="13.0", driver=None)
    assert advice in doctor.why_no_cuda()


def test_the_real_driver_is_asked_without_an_error():
    assert doctor.driver_cuda() is None or doctor.driver_cuda() >= 0


@pytest.mark.parametrize(("capability", "built", "fits"), [
    ((6, 1), ["sm_75", "sm_80", "sm_90"], False),
    ((8, 6), ["sm_75", "sm_80", "sm_90"], True),
    ((8, 6), ["sm_89", "sm_90"], False),
    ((12, 0), ["sm_75", "sm_90"], False),
    ((12, 0), ["sm_75", "sm_90", "compute_90"], True),
    ((9, 0), ["sm_90a"], True),
    ((10, 3), ["sm_100a"], False),
    ((10, 3), ["sm_100"], True),
    ((9, 0), ["gfx942"], True),
    ((7, 5), ["compute_80"], False),
])  # fmt: skip
def test_which_cards_a_build_can_run_on(capability, built, fits):
    assert resolve.compiled_for(capability, built) == fits


def test_a_card_too_old_for_the_build_is_not_used(machine, monkeypatch):
    """看得见，一用就出错的：不当作有，预设也不选大的，并说出为什么。"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce GTX 1080")
    assert not resolve.has_cuda()
    assert resolve.preset_for("auto") == "tiny"
    device = Device(Config())
    assert device.place.type == "cpu"
    assert "GTX 1080" in device.unused_card and "sm_61" in device.unused_card
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    assert resolve.has_cuda() and doctor.why_no_cuda() == ""


# ---------- 3. 在哪里说 ----------


def test_whoever_asks_for_the_cpu_hears_nothing(machine):
    with_card(machine)
    device = Device(Config(device="cpu"))
    assert device.unused_card == "" and not any("显卡" in note for note in device.notes)


def test_whoever_asks_for_cuda_hears_why_not(machine):
    with_card(machine)
    with pytest.raises(UserError, match=r"用不上 cuda：有 NVIDIA GeForce RTX 3090.*不带 CUDA"):
        Device(Config(device="cuda"))


def test_of_several_processes_one_speaks(machine):
    with_card(machine)
    world = World()
    world.rank = 1
    assert Device(Config(), world).unused_card == ""
    world.rank = 0
    assert Device(Config(), world).unused_card


@posix
def test_training_and_chat_say_it_once(machine, tmp_path):
    """从头走一遍：假的 nvidia-smi，真的训练，真的聊天，真的工具。"""
    machine.smi(f'echo "{RTX}, 550.54.14"')
    folder = tmp_path / "work"
    folder.mkdir()
    out, err = run(folder, "pre_train.py", *QUICK, *LITTLE, "--max_steps", "1")
    assert (out + err).count(f"有 {RTX}，PyTorch 却用不上") == 1
    assert "preset=tiny" in out and "这次用 CPU" in out
    out, err = run(folder, "pre_chat.py", "--prompt", "你好", "--max", "3")
    assert RTX not in out and err.count(RTX) == 1
    out, err = run(folder, "tools.explain", "你好")
    assert err.count(RTX) == 1
    rows = (f'{{"text": "第{i}次守株待兔。"}}\n' for i in range(200))
    (folder / "a.jsonl").write_text("".join(rows), encoding="utf-8")
    out, err = run(folder, "tools.inspect", "a.jsonl", "--preset", "tiny")
    assert err.count(RTX) == 1
    out, err = run(folder, "pre_chat.py", "--prompt", "你好", "--max", "3", "--device", "cpu")
    assert RTX not in out + err
    out, err = run(folder, "pre_train.py", "--device", "cuda", "--overwrite", code=2)
    assert "用不上 cuda" in err and RTX in err and "pip install torch==" in err
