"""有 NVIDIA 显卡，PyTorch 却用不上：找出为什么，说出怎样修好。

why_no_cuda   一句话；没有显卡的，是空的
find_cards    不靠 PyTorch，看有没有显卡
driver_cuda   驱动支持 CUDA 几

只在用不上显卡时才来看，不到三分之一秒；看不出来就不说，从不因此出错。
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from settings.resolve import compiled_for
from settings.say import brief

ROOT = Path("/")
NAMELESS = "NVIDIA 显卡"
SMI_SECONDS = 0.25  # nvidia-smi 至多等这么久：驱动坏了，它会一直不回来
LEAST_DRIVER = {12: 525, 13: 580}  # CUDA 的大版本 -> 驱动的版本，取自 NVIDIA 的 CUDA Compatibility


def why_no_cuda() -> str:
    """有显卡，为什么用不上，怎样修好；没有显卡，是空的。"""
    if torch.cuda.is_available():
        return _card_left_out()
    cards = find_cards()
    if not cards:
        return ""
    return f"有 {brief(cards[0])}，PyTorch 却用不上：{_reason(len(cards))}"


# ---------- 1. 为什么，怎样修 ----------


def _reason(n_cards: int) -> str:
    """先看 PyTorch，再看驱动，最后看是不是藏起来了：前面的没有修好，修后面的没有用。"""
    if torch.version.cuda is None:
        return f"装的 PyTorch（{torch.__version__}）不带 CUDA；{_install_with_cuda()}"
    driver, built = driver_cuda(), int(torch.version.cuda.partition(".")[0])
    if driver is None:
        return _without_driver()
    if 0 < driver < built:
        least = f"（至少 {LEAST_DRIVER[built]}）" if built in LEAST_DRIVER else ""
        return (
            f"驱动只支持到 CUDA {driver}，装的 PyTorch（{torch.__version__}）要 CUDA {built}；"
            f"请更新显卡的驱动{least}，或者照 PyTorch 官网的安装页改装给 CUDA {driver} 编译的"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hides_all(hidden, n_cards):
        undo = {"win32": "Remove-Item Env:CUDA_VISIBLE_DEVICES（PowerShell）"}.get(
            sys.platform, "unset CUDA_VISIBLE_DEVICES"
        )
        return f"环境变量 CUDA_VISIBLE_DEVICES 是「{brief(hidden)}」，一块也不让看见；请运行 {undo}"
    said = f"（PyTorch 说：{told}）" if (told := _what_torch_says()) else ""
    return f"没有认出原因{said}；请运行 nvidia-smi，它也出错的话，重新开机或重装显卡的驱动"


def _install_with_cuda() -> str:
    """换成带 CUDA 的 PyTorch 的命令。Windows 上，pip 默认装到的是 CPU 版。"""
    version = torch.__version__.partition("+")[0]
    first = "请先运行 pip uninstall -y torch，"
    if sys.platform != "win32":
        return f"{first}再运行 pip install torch=={version}"
    return (
        f"{first}再到 PyTorch 官网的安装页选 Windows、Pip、CUDA，照它给的那一行装，例如 "
        f"pip install torch=={version} --index-url 那一行末尾的网址（不写网址，装到的又是 CPU 版）"
    )


def _without_driver() -> str:
    """有显卡，却没有驱动的库（libcuda）。"""
    if any(os.path.exists(ROOT / mark) for mark in (".dockerenv", "run/.containerenv")):
        return (
            "这个容器里没有它的驱动；请在启动容器的命令里加上 --gpus all"
            "（主机上要装 NVIDIA Container Toolkit）"
        )
    if "microsoft" in _text(ROOT / "proc/version").lower():
        return (
            "WSL 里没有它的驱动；请在 Windows 里更新显卡的驱动（WSL 里不要装），"
            "再运行 wsl --shutdown，重新打开"
        )
    ubuntu = "" if sys.platform == "win32" else "（Ubuntu：sudo ubuntu-drivers install）"
    return f"没有装好它的驱动；请装上{ubuntu}，再重新开机"


def _card_left_out() -> str:
    """看得见显卡，但这份 PyTorch 里没有给它编译的代码：一用就出错。"""
    with suppress(RuntimeError):
        built, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability()
        if not compiled_for(capability, built):
            mine = "sm_{}{}".format(*capability)
            return (
                f"有 {brief(torch.cuda.get_device_name())}（{mine}），PyTorch 却用不上："
                f"装的（{torch.__version__}）只给 {' '.join(built)} 编译过；请照 PyTorch "
                "官网的安装页改装给别的 CUDA 编译的：旧的显卡选最小的版本，新的选最大的；"
                "都不行，就换一个 PyTorch 的版本"
            )
    return ""


def hides_all(visible: str, n_cards: int) -> bool:
    """CUDA_VISIBLE_DEVICES 是 visible，是不是一块显卡也看不见；第一个不认得的往后都不算。"""
    first = visible.split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):  # 写的是显卡的编号，对不对不知道
        return False
    return not (first.isdecimal() and int(first) < n_cards)


def _what_torch_says() -> str:
    """PyTorch 自己说的原因（英文）。"""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError, OSError) as error:
        return brief(error)
    return ""


# ---------- 2. 不靠 PyTorch，看有没有显卡 ----------


def find_cards() -> list[str]:
    """每块 NVIDIA 显卡的名字；不知道名字的，只说是显卡。"""
    return _from_driver() or _from_smi() or _from_system()


def _from_driver() -> list[str]:
    """Linux 的驱动写出的，最快。"""
    found = _matching("proc/driver/nvidia/gpus/*/information")
    names = (re.search(r"^Model:\s*(\S.*)$", _text(path), re.M) for path in found)
    return [match[1] if match else NAMELESS for match in names]


def _from_smi() -> list[str]:
    """nvidia-smi 说的；没有、出错、太久、说的不像，都是没有。"""
    windows = Path(os.environ.get("SYSTEMROOT", "C:\\Windows")) / "System32"
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=str(windows))
    if smi is None:
        return []
    command = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, **quiet)
    except (OSError, ValueError):
        return []
    try:
        out, _ = process.communicate(timeout=SMI_SECONDS)
    except (subprocess.TimeoutExpired, OSError):
        process.kill()  # 不等它死：驱动坏了，它可能杀不掉
        process.stdout.close()
        return []
    if process.returncode:
        return []
    lines = out.decode("utf-8", "replace").splitlines()
    return [m[1] for m in (re.fullmatch(r"(\S.*), \d+(\.\d+)+\s*", line) for line in lines) if m]


def _from_system() -> list[str]:
    """没有驱动也看得见的：总线上的显卡，设备文件，Windows 的驱动留下的库。"""
    on_bus = [
        NAMELESS
        for device in _matching("sys/bus/pci/devices/*")
        if _text(device / "vendor").strip() == "0x10de"
        and _text(device / "class").startswith("0x03")
    ]
    if on_bus:
        return on_bus
    library = Path(os.environ.get("SYSTEMROOT", "C:\\Windows")) / "System32" / "nvcuda.dll"
    there = os.path.exists(library if sys.platform == "win32" else ROOT / "dev/nvidia0")
    return [NAMELESS] * there


def driver_cuda() -> int | None:
    """驱动支持 CUDA 几（大版本）；问不出来是 0，没有它的库是 None。"""
    version = ctypes.c_int(0)
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value // 1000


def _matching(pattern: str) -> list[Path]:
    """ROOT 之下合 pattern 的；看不了是空的。"""
    with suppress(OSError):
        return sorted(ROOT.glob(pattern))
    return []


def _text(path: Path) -> str:
    """一个小文件的内容；读不了是空的。"""
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
