"""这次运行用的设备：哪一个、什么精度、能不能编译。

Device                显卡、苹果的芯片或处理器
compile_if_possible   torch.compile，编译不了就用原来的
"""

from settings.script import is_out_of_memory

import ctypes
import os
import platform
import shutil
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from config import Config, UserError
from engine.distributed import World
from engine.doctor import why_no_cuda
from settings.resolve import has_cuda
from settings.say import say


class Device:
    """这次运行用的设备、精度与编译与否；`notes` 是该告诉用户的话。

    `unused_card` 是其中的一句：有 NVIDIA 显卡却用不上，为什么，怎样修好；没有这回事是空的。

    Args:
        config: 用到 device、dtype、compile、parallel。
        world: 多个进程时，每个进程用自己的那块显卡。
    Raises:
        UserError: 指定的设备不存在，或不支持指定的精度。
    """

    def __init__(self, config: Config, world: World | None = None):
        self.notes: list[str] = []
        self.world = world or World()
        self.unused_card = ""
        name = self._choose_place(config.device)
        self.place = self._my_own(name) if self.world.launched else torch.device(name)
        if name == "cpu":
            keep_freed_memory()
            add_in_fixed_order()
        self.dtype = self._choose_dtype(config.dtype)
        cache_problem = leave_unwritable_cache()  # 不编译时也要
        self.compile = config.compile and self._can_compile(cache_problem)
        if self.compile and config.n_experts and self.dtype != torch.bfloat16:
            self.compile = False  # F.grouped_mm 编译时只认 bf16
            self.notes.append("专家混合只在 bfloat16 时编译，这里不编译")
        if self.compile and self.world.size > 1 and config.parallel == "fsdp":
            self.compile = False
            self.notes.append("--parallel fsdp 时不编译")
        # fp16 的梯度太小会变成 0：先放大损失，更新前再缩回去。
        self.scaler = torch.amp.GradScaler(name, enabled=self.dtype == torch.float16)

    def _choose_place(self, wanted: str) -> str:
        """auto：有能用的显卡就用它。"""
        available = {"cuda": has_cuda, "mps": torch.backends.mps.is_available}
        if wanted == "auto":
            name = next((d for d, there in available.items() if there()), "cpu")
            if name == "cpu" and self.world.rank == 0 and (reason := why_no_cuda()):
                self.unused_card = f"{reason}。这次用 CPU；本来就要用 CPU，请写 --device cpu"
                self.notes.append(self.unused_card)
            return name
        if wanted in available and not available[wanted]():
            reason = why_no_cuda() if wanted == "cuda" else ""
            raise UserError(
                f"用不上 cuda：{reason}；或改成 --device cpu"
                if reason
                else f"这台机器上没有 {wanted}；请去掉 --device，或改成 --device cpu"
            )
        return wanted

    def _my_own(self, name: str) -> torch.device:
        """torchrun 启动的第 local_rank 个进程，用第 local_rank 块显卡。"""
        if name == "mps" and self.world.size > 1:
            raise UserError("多个进程只能用 NVIDIA 显卡或 CPU；请加上 --device cpu")
        if name != "cuda":
            return torch.device(name)
        if self.world.local_rank >= (n := torch.cuda.device_count()):
            raise UserError(f"这台机器有 {n} 块显卡，启动的进程比显卡多；请用 --nproc_per_node={n}")
        torch.cuda.set_device(self.world.local_rank)
        return torch.device(name, self.world.local_rank)

    def _choose_dtype(self, wanted: str) -> torch.dtype:
        kind = self.place.type
        has_bf16 = {
            "cuda": lambda: torch.cuda.get_device_capability() >= (8, 0),
            "mps": lambda: False,
            "cpu": cpu_has_bf16,
        }[kind]()
        if wanted == "float16" and kind == "cpu":
            raise UserError("CPU 上不能用 float16 训练；请去掉 --dtype，或改成 --dtype float32")
        if wanted != "auto":
            if wanted == "bfloat16" and not has_bf16:
                self.notes.append("这个设备没有 bfloat16 指令，--dtype bfloat16 会非常慢")
            return getattr(torch, wanted)
        if has_bf16:
            return torch.bfloat16
        if kind == "cpu":
            self.notes.append("这个处理器没有 bf16 指令，改用 float32：结果相近，慢一些")
        return torch.float16 if kind == "cuda" else torch.float32

    def _can_compile(self, cache_problem: str) -> bool:
        if self.place.type == "mps":
            return False  # Inductor 的 MPS 后端还在试验阶段
        if cache_problem:
            self.notes.append(f"{cache_problem}，跳过 torch.compile：结果相近，通常慢一些")
            return False
        if self.place.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
            self.notes.append(
                "没有找到 C++ 编译器，跳过 torch.compile：结果相近，通常慢一些，也多用些内存"
            )
            return False
        return True

    def autocast(self):
        """半精度的作用范围：矩阵乘法用半精度，参数与累加仍是 fp32。"""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.place.type, self.dtype)

    def describe(self) -> str:
        """例如「cpu · float32 · torch.compile」。"""
        name = torch.cuda.get_device_name() if self.place.type == "cuda" else self.place.type
        parts = [name, str(self.dtype)[6:], "torch.compile" if self.compile else "不编译"]
        if self.world.size > 1:
            parts.append(f"{self.world.size} 个进程")
        return " · ".join(parts)


def keep_freed_memory() -> None:
    """让 glibc 留着用完的大块内存。

    词表那一层的打分每步要一百多 MB；glibc 默认用完就还给系统，下次再要时系统得逐页清零，
    占去一步的三分之一。不是 glibc 的系统上什么也不做。
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h 里的 M_TRIM_THRESHOLD 等
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(arena_max, 1)  # 别的线程自己的内存区放不下大块，仍会还给系统；都用主线程的这一个


def add_in_fixed_order() -> None:
    """同样的命令，每次得到逐位相同的结果。

    浮点数相加，次序不同，末位就不同。编译过的代码求词嵌入的梯度时，几个线程谁先到谁先加；
    这里改用次序固定的算法，慢不到百分之几。
    """
    torch.set_deterministic_debug_mode("warn")  # 另一个同义的函数要导入编译器，多花一秒多
    torch.utils.deterministic.fill_uninitialized_memory = False  # 没有谁读未写过的内存，不必先填


def leave_unwritable_cache() -> str:
    """编译器的缓存写不了，就不用它了；返回为什么，写得了是空的。

    PyTorch 连造优化器也要导入编译器，编译器一导入就要建好这个目录，所以不编译时也不能留着它。
    """
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        if folder:  # 默认的在临时目录里，总能写；其中一处写不了的，编译时会知道
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        return f"编译器的缓存 {folder}（TORCHINDUCTOR_CACHE_DIR）写不了（{error.strerror}）"
    return ""


def cpu_has_bf16() -> bool:
    """处理器有没有 bf16 的矩阵指令；没有时 PyTorch 只能模拟，比 fp32 慢上百倍。"""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compile_if_possible(fn, device: Device, **options):
    """用 torch.compile 加速 fn；编译器中途失败（例如缺少 Python 头文件）就说一声，改用原来的。

    Args:
        options: 交给编译器的选项。
    """
    if not device.compile:
        return fn
    try:  # 导入要一两秒，聊天时不必等；写不了缓存的，一导入就出错
        from torch._dynamo.exc import ShortenTraceback, TorchRuntimeError

        compiled = torch.compile(fn, dynamic=False, options=options or None)
    except OSError as error:
        give_up_compiling(device, error)
        return fn

    def call(*args):
        """编译过的 fn；编译失败过一次，以后都用原来的。"""
        if device.compile:
            try:
                return compiled(*args)
            except (ShortenTraceback, TorchRuntimeError, OSError) as error:
                if is_out_of_memory(error):  # 不是编译不了：小批小些就行
                    raise
                give_up_compiling(device, error)
        return fn(*args)

    return call


def give_up_compiling(device: Device, error: Exception) -> None:
    """以后不编译了，说一声。"""
    device.compile = False
    reason = str(error).strip().splitlines()[0][:100]
    say(
        f"（torch.compile 失败，改为不编译：结果相近，通常慢一些。原因：{reason}）",
        file=sys.stderr,
    )
