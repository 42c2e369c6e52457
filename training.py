"""两个训练脚本必须做得一模一样的事；训练的故事本身在 pre_train.py 与 sft_train.py 里。

    Device          用哪个设备、哪种精度，能不能编译
    loss_sum        一批数据的损失之和
    SharedRow       语料里从没出现过的词元合用一行，词表那一层少算几倍
    evaluate        在留出的文档上检验
    Stop            Ctrl-C 与 kill：做完这一步，存好了再走
    skip_step       损失或梯度不是有限的数：这一步不更新
    memory_advice   内存不够：该改哪个，能省多少
    Metrics         逐步的记录与损失曲线

参数怎样更新见 optimizer.py，检查点见 checkpoint.py，几个进程怎样合作见 distributed.py。
本文件不认识分词之前的文字，也不决定训练的次序。
"""

import ctypes
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import Folder, Progress, write
from config import Config, UserError, is_out_of_memory
from dataset import IGNORE, Batch, row_order, used_ids
from distributed import World
from model import Transformer

# ---------- 1. 设备与精度 ----------


class Device:
    """这次运行用的设备、精度与编译与否；`notes` 是该告诉用户的话。

    Args:
        config: 用到 device、dtype、compile、parallel。
        world: 多个进程时，每个进程用自己的那块显卡。
    Raises:
        UserError: 指定的设备不存在，或不支持指定的精度。
    """

    def __init__(self, config: Config, world: World | None = None):
        self.notes: list[str] = []
        self.world = world or World()
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = config.device
        if name == "auto":
            name = next((d for d, there in available.items() if there), "cpu")
        if not available.get(name, True):
            raise UserError(f"这台机器上没有 {name}；请去掉 --device，或改成 --device cpu")
        self.torch = self._my_own(name) if self.world.launched else torch.device(name)
        if name == "cpu":
            keep_freed_memory()
            add_in_fixed_order()
        self.dtype = self._choose_dtype(config.dtype)
        self.compile = config.compile and self._can_compile()
        if self.compile and self.world.size > 1 and config.parallel == "fsdp":
            self.compile = False
            self.notes.append("--parallel fsdp 时不编译")
        # fp16 的梯度太小会变成 0：先放大损失，更新前再缩回去。
        self.scaler = torch.amp.GradScaler(name, enabled=self.dtype == torch.float16)

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
        kind = self.torch.type
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
            self.notes.append("这个处理器没有 bf16 指令，改用 float32：结果一样，慢一些")
        return torch.float16 if kind == "cuda" else torch.float32

    def _can_compile(self) -> bool:
        if self.torch.type == "mps":
            return False  # Inductor 的 MPS 后端还在试验阶段
        if self.torch.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
            self.notes.append(
                "没有找到 C++ 编译器，跳过 torch.compile：结果相近，通常慢一些，也多用些内存"
            )
            return False
        return True

    def autocast(self):
        """半精度的作用范围：矩阵乘法用半精度，参数与累加仍是 fp32。"""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.torch.type, self.dtype)

    def describe(self) -> str:
        """例如「cpu · float32 · torch.compile」。"""
        name = torch.cuda.get_device_name() if self.torch.type == "cuda" else self.torch.type
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
    trim_threshold, mmap_max = -1, -4  # malloc.h 里的 M_TRIM_THRESHOLD 与 M_MMAP_MAX
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def add_in_fixed_order() -> None:
    """同样的命令，每次得到逐位相同的结果。

    浮点数相加，次序不同，末位就不同。编译过的代码求词嵌入的梯度时，几个线程谁先到谁先加；
    这里改用次序固定的算法，慢不到百分之几。
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # 没有谁读未写过的内存，不必先填


def cpu_has_bf16() -> bool:
    """处理器有没有 bf16 的矩阵指令；没有时 PyTorch 只能模拟，比 fp32 慢上百倍。"""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ---------- 2. 损失与检验 ----------


class SharedRow(NamedTuple):
    """语料里从没出现过的词元合用词嵌入的一行：算的仍是整张词表的 softmax，重复的部分只算一次。

    没出现过的词元从来不是答案，每一步受到的推力一模一样；起点相同，便一直相同。n 个相同的打分

        n · exp(s) = exp(s + ln n)

    于是只算其中一个，加上 ln n。内置语料只用到词表的四分之一，词表那一层的运算也就只剩四分之一。

    Fields:
        rows: 要算打分的 R 个编号 (R,)，最后一个代表所有合用的。
        column: 每个编号的打分在第几列 (V,)，取值 0 … R-1。
        bias: 加在各列上的数 (R,)：最后一列是 ln n，其余是 0。
        members: 合用一行的 n 个编号 (n,)。
    """

    rows: Tensor
    column: Tensor
    bias: Tensor
    members: Tensor

    @torch.no_grad()
    def spread(self, table: Tensor) -> None:
        """把代表的那一行抄给其余的：训练只更新它，词嵌入 (V, C) 于是与逐个训练的一样。"""
        table[self.members] = table[self.rows[-1]].clone()

    def spread_state(self, table: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """优化器里那一行的状态也照抄：以后不合用了（例如改用 FSDP），也接得上。"""
        for state in optimizer.state.get(table, {}).values():
            if state.shape == table.shape:
                self.spread(state)


@torch.no_grad()
def share_row(model: Transformer, tokens: np.ndarray, newborn: bool) -> SharedRow | None:
    """找出可以合用一行的词元；语料用到了一大半的词表时不值得，返回 None。

    Args:
        tokens: 训练要用的全部编号，一维 uint16。
        newborn: 模型刚出生，没出现过的词元可以从同一个起点出发；否则（微调）只合并起点已经相同的，
            预训练时见过的词元各有各的行。
    """
    weight = model.embedding.weight
    unused = torch.from_numpy(~used_ids(tokens, len(weight))).to(weight.device)
    if not newborn:
        unused &= (weight == weight[-1]).all(dim=1)  # 末尾是补齐词表用的，哪份语料里都没有
    order = unused.int().argsort(stable=True)  # 单独一行的在前
    n_rows = -(-(len(weight) - int(unused.sum()) + 1) // 128) * 128  # 128 的倍数，GPU 算得快
    if n_rows > len(weight) // 2:
        return None
    bias = torch.zeros(n_rows, device=weight.device)
    bias[-1] = math.log(len(weight) - n_rows + 1)
    column = torch.empty_like(order)
    column[order] = torch.arange(len(weight), device=weight.device).clamp(max=n_rows - 1)
    shared = SharedRow(order[:n_rows], column, bias, order[n_rows - 1 :])
    shared.spread(weight)
    return shared


def shared_before(checkpoint: dict, device: Device) -> SharedRow | None:
    """接着练时，合用的与上次的相同；上次没有合用的（例如 FSDP），这次也不合用。"""
    saved = checkpoint["shared_row"]
    return saved and SharedRow(**{k: v.to(device.torch) for k, v in saved.items()})


def loss_sum(model: Transformer, batch: Batch, shared: SharedRow | None = None) -> Tensor:
    """这一批所有目标的负对数概率之和，单位奈特；平均由调用者除以目标的总数得到。

    Args:
        shared: 给了就用它省去重复的打分，结果相同；目标须是训练语料里出现过的词元。
    """
    targets = batch.targets
    if shared is None:
        logits = model(batch.ids, batch.positions, batch.segments)  # (B, T, V)
    else:
        x = model.hidden(batch.ids, batch.positions, batch.segments)  # (B, T, C)
        table = model.embedding.weight[shared.rows]  # (R, C)
        # 代表的那一行收到 n 份推力之和，只留它自己的一份（exp(-ln n) = 1/n），与逐个训练时一样。
        own = torch.exp(-shared.bias)[:, None]
        table = own * table + (1 - own) * table.detach()
        logits = F.linear(x, table, shared.bias)  # (B, T, R)
        targets = torch.where(targets == IGNORE, IGNORE, shared.column[targets.clamp(min=0)])
    return F.cross_entropy(
        logits.view(-1, logits.size(-1)).float(),  # (B·T, V)
        targets.reshape(-1),
        ignore_index=IGNORE,
        reduction="sum",
    )


def compile_if_possible(fn, device: Device):
    """用 torch.compile 加速 fn；编译器中途失败（例如缺少 Python 头文件）就说一声，改用原来的。"""
    if not device.compile:
        return fn
    from torch._dynamo.exc import ShortenTraceback  # 导入要一两秒，聊天时不必等

    compiled = torch.compile(fn, dynamic=False)

    def call(*args):
        """编译过的 fn；编译失败过一次，以后都用原来的。"""
        if device.compile:
            try:
                return compiled(*args)
            except ShortenTraceback as error:
                device.compile = False
                reason = str(error).strip().splitlines()[0][:100]
                print(f"（torch.compile 失败，改为不编译：结果相近，通常慢一些。原因：{reason}）")
        return fn(*args)

    return call


@torch.no_grad()
def evaluate(loss_fn, model, batches, batch_size: int, max_tokens: int, device: Device) -> float:
    """留出数据上每个目标的平均损失（奈特）；几个进程分着做，合起来算。

    只够检验一部分时，用的是打乱之后的开头若干行：每次都是同样的行，而且不偏向文件的前一段。
    """
    n_rows = min(batches.n_rows, -(-max_tokens // batches.seq_len))
    rows = row_order(batches.n_rows, seed=0, epoch=0)[:n_rows].tolist()
    total, count = 0.0, 0
    for first in range(0, n_rows, batch_size * device.world.size):
        mine = first + batch_size * device.world.rank
        wanted = rows[mine : min(mine + batch_size, n_rows)]
        # 最后一批用重复的行凑满：形状不变，编译过的代码才能沿用；凑数的行不算。
        batch = batches.get(wanted + rows[:1] * (batch_size - len(wanted)))
        batch.targets[len(wanted) :] = IGNORE
        count += int((batch.targets != IGNORE).sum())
        with device.autocast():
            total += loss_fn(model, batch.to(device.torch)).item()
    total, count = device.world.sum(total, count)
    return total / count


# ---------- 3. 出了意外 ----------


class Lasting:
    """标准输出或标准错误的替身：收到中断的信号之后，另一头没人读了也不要紧，先把检查点存好。

    例如 ``python pre_train.py 2>&1 | tee log`` 时按 Ctrl-C，tee 会先走。
    """

    def __init__(self, stream):
        self.stream, self.lasting = stream, False

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def _try(self, action, *args):
        try:
            return action(*args)
        except BrokenPipeError:
            if not self.lasting:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text: str):
        """写；没人读就算了。"""
        return self._try(self.stream.write, text)

    def flush(self):
        """送出去；没人读就算了。"""
        return self._try(self.stream.flush)


class Stop:
    """Ctrl-C、kill 与断线：第一次只记下来，做完这一步、存好了再走；第二次立刻退出。

    从走完第一步起才生效：在那之前没有什么要存，照平常那样立刻中断。
    `signal` 是收到的信号，0 表示没有。
    """

    SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

    def __init__(self, world: World):
        self.world, self.signal, self.watching = world, 0, False
        sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)

    def watch(self) -> None:
        """从现在起留心信号；nohup 等事先要求忽略的，仍然忽略。"""
        if self.watching:
            return
        self.watching = True
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._caught)

    def _caught(self, number: int, frame) -> None:
        self.signal = number
        # torchrun 会把同一个 Ctrl-C 再转发一次，不能当成第二次；它自己等 30 秒，再不走就杀掉。
        again = signal.SIG_IGN if self.world.launched else signal.SIG_DFL
        for known in self.SIGNALS:
            signal.signal(known, again)
        if number == getattr(signal, "SIGHUP", None):  # 终端没了，再往上面写会出错
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Lasting):
                stream.lasting = True
        if self.world.rank == 0:  # 信号随时会来，这时只有 os.write 是安全的
            again = "" if self.world.launched else "；再按一次，立刻退出"
            with suppress(OSError):
                os.write(2, f"\n（做完这一步就保存并退出{again}）\n".encode())

    def leave(self, folder: Folder, progress: Progress, max_steps: int, saved: bool) -> NoReturn:
        """说清停在哪里、怎样接着练，然后退出；退出码是 128 加信号，与系统的约定相同。"""
        where = f"已经存进 {folder.path}" if saved else f"没有存下，{folder.path} 是早先的"
        print(
            f"停在第 {progress.step} 步，共 {max_steps} 步；{where}。\n"
            f"接着练：{folder.how_to_resume}"
        )
        self.world.disconnect()
        sys.exit(128 + (self.signal or signal.SIGTERM))


def skip_step(
    progress: Progress, loss: float, batches: list[list[int]], losses: list[float], epoch: int,
    device: Device,
) -> dict:  # fmt: skip
    """损失或梯度不是有限的数：这一步不更新，记下是哪些数据。

    Args:
        loss: 整个大批的损失；有限，便是梯度的错。
        batches: 我的各个小批用的行。
        losses: 各小批的损失。
        epoch: 正在读第几遍，从 0 数。
    Returns:
        写进记录的几项。
    """
    scaler = device.scaler
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    bad = [rows for rows, x in zip(batches, losses, strict=True) if not math.isfinite(x)]
    # 几个进程各有各的行：出错的也许是别的进程的那几行。
    everyone = device.world.gather((list(itertools.chain(*bad)), list(itertools.chain(*batches))))
    rows = sorted(itertools.chain(*(mine for mine, _ in everyone)))
    rows = rows or sorted(itertools.chain(*(mine for _, mine in everyone)))
    # fp16 的梯度偶尔溢出是正常的：scaler 会把放大的倍数减半，不必说。
    if not (scaler.is_enabled() and math.isfinite(loss)):
        what = "梯度" if math.isfinite(loss) else "损失"
        shown = "、".join(map(str, rows[:8])) + ("……" if len(rows) > 8 else "")
        tqdm.write(
            f"（第 {progress.step + 1} 步的{what}不是有限的数，没有更新；"
            f"用的数据：第 {epoch + 1} 遍，词元切成等长的行之后的第 {shown} 行，从 0 数）"
        )
    return {"skipped_rows": rows}


def too_many_skipped(progress: Progress, scaler: torch.amp.GradScaler) -> bool:
    """接连几步都不是有限的数，就不会自己好了；fp16 开头要试好几次才知道放大多少倍合适。"""
    return progress.skipped_in_a_row >= (20 if scaler.is_enabled() else 3)


def diverged(state: dict, folder: Folder, progress: Progress, lr_flag: str, lr: float) -> UserError:
    """训练发散了：另存此刻的状态，不碰好的检查点；说清该改哪个。"""
    broken = folder.path.with_name(f"{folder.path.stem}.diverged.pt")
    where = f"出事时的状态存在 {broken}，供查看"
    if folder.world.rank == 0:
        try:
            write(broken, state, keep_previous=False)
        except UserError as error:
            where = str(error)
    folder.world.gather(None)  # 等第 0 个写完
    todo = (
        f"学习率现在是 {lr:g}，请从上一个检查点起改小它："
        f"{folder.how_to_resume} --allow_changes {lr_flag} {lr / 3:.2g} "
    )
    return UserError(
        f"接连 {progress.skipped_in_a_row} 步的损失或梯度不是有限的数，停在第 {progress.step} 步；"
        f"{where}。{todo}；也可以减小 --grad_clip，或检查上面说的那几行数据"
    )


@contextmanager
def memory_advice(config: Config, model: Transformer, size: int):
    """这里面如果内存不够，换成一句话：哪个设置占了多少，改成多少能省多少。

    Args:
        size: 这个进程一次前向的行数。
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, model, size) from error


def out_of_memory(config: Config, model: Transformer, size: int) -> UserError:
    """内存不够时该说的话；大小是估计的，见 `memory_needed`。"""
    fixed, per_row = memory_needed(config, model)
    rows, gb = config.batch_size * config.grad_accum, 1 / 1e9
    sentence = (
        f"内存不够：参数、梯度与优化器约占 {fixed * gb:.1f} GB，"
        f"一次前向的 {size} 行约占 {size * per_row * gb:.1f} GB（估计）。"
    )
    smaller = [n for n in range(1, size // 2 + 1) if rows % n == 0]
    if smaller:
        same = f"--batch_size {smaller[-1]} --grad_accum {rows // smaller[-1]}"
        saved = (size - smaller[-1]) * per_row * gb
        sentence += f"请加上 {same}，约省 {saved:.1f} GB，结果相同"
    if not config.resume:  # 接着练时，长度与预设都不能改
        saved = size * per_row / 2 * gb
        sentence += (
            f"；或者 --seq_len {max(1, config.seq_len // 2)}，约省 {saved:.1f} GB，"
            f"但模型学不到那么长；或者换一个小些的 --preset"
        )
    return UserError(sentence)


def memory_needed(config: Config, model: Transformer) -> tuple[int, int]:
    """估计训练要多少内存，单位字节：(与批次无关的, 每行的)。

    与批次无关的：参数、梯度，加上优化器的状态——Muon 管的矩阵一份，AdamW 管的两份。
    每行的：各层留给反向用的中间结果，加上整张词表的打分、概率与梯度。系数是在 CPU 上量出来的
    （fp32，不编译，与实际相差两三成，见 docs/lab-notes.md）；半精度与编译过的用得少些。
    """
    n_parameters = sum(p.numel() for p in model.parameters())
    n_matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    fixed = 4 * (2 * n_parameters + n_matrices + 2 * (n_parameters - n_matrices))
    per_layer = 4 * (16 * config.dim + 6 * config.hidden_dim)
    per_token = config.n_layers * per_layer + 16 * config.vocab_size
    return fixed, config.seq_len * per_token


def fit_batch(rows: int, attempt: Callable[[int], None]) -> int:
    """找出放得下的最大的小批：从整个大批起，逐个试它的约数。

    Args:
        rows: 一个大批归这个进程的行数；小批乘以累积的次数始终等于它，结果因此不变。
        attempt: 用这么多行走一次前向与反向；放不下就抛出内存不够的异常。
    Raises:
        UserError: 一行也放不下。
    """
    for size in (n for n in range(rows, 0, -1) if rows % n == 0):
        try:
            attempt(size)
            return size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
    raise UserError("一行也放不下；请减小 --seq_len，或换一个小些的 --preset")


def auto_batch(config: Config, model: Transformer, device: Device) -> None:
    """``batch_size=auto``：在显卡上试出放得下的小批，就地改写 batch_size 与 grad_accum。

    试的时候先占住优化器将来要用的显存，再多留一成余地；不编译，编译过的只会更省。
    """
    rows = config.batch_size * config.grad_accum
    if device.torch.type != "cuda":
        print(f"（batch_size=auto 只在显卡上试；这里用预设的 {config.batch_size}）")
        return
    optimizer_bytes = memory_needed(config, model)[0] - 8 * sum(
        p.numel() for p in model.parameters()
    )
    total = torch.cuda.get_device_properties(device.torch).total_memory

    def attempt(size: int) -> None:
        torch.cuda.empty_cache()
        reserved = torch.empty(
            int(optimizer_bytes + total * 0.1), dtype=torch.uint8, device=device.torch
        )
        shape = (size, config.seq_len)
        ids = torch.zeros(shape, dtype=torch.long, device=device.torch)
        segments = ids if config.isolate_documents else None
        try:
            with device.autocast():
                loss = loss_sum(model, Batch(ids, ids, None, segments))
            loss.backward()
        finally:
            model.zero_grad(set_to_none=True)
            del reserved

    share = rows // device.world.size
    sizes = device.world.gather(fit_batch(share, attempt))
    config.batch_size = min(sizes)
    config.grad_accum = rows // config.batch_size
    torch.cuda.empty_cache()
    print(
        f"（batch_size=auto：一次前向 {config.batch_size} 行，累积成每步 {rows} 行，"
        f"结果与这样的划分无关）"
    )


# ---------- 4. 记录 ----------


class Metrics:
    """训练的记录：每行一个 JSON 对象写进 metrics.jsonl，结束时画成 loss.png。

    Args:
        folder: 放在哪里。
        world: 只有第 0 个进程写。
        progress: 接着练时，保留到这一步为止的记录；之后的会重新走一遍。
    """

    def __init__(self, folder: Path, world: World, progress: Progress):
        self.path = folder / "metrics.jsonl"
        self.picture = folder / "loss.png"
        self.start = time.monotonic() - progress.seconds
        self.file: BinaryIO | None = None
        self.unwritten = b""
        self.rows: list[dict] = []
        if world.rank > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if progress.step:
            self.rows = [r for r in read_metrics(self.path) if r["step"] <= progress.step]
        part = self.path.with_name("metrics.jsonl.part")
        with part.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        os.replace(part, self.path)
        self.file = self.path.open("ab", buffering=0)

    def write(self, **row) -> None:
        """记一行；浮点数保留六位有效数字，另记从开始起的秒数。磁盘满时先留在内存里。"""
        row["seconds"] = self.seconds()
        for name, value in row.items():
            if isinstance(value, float):  # JSON 里没有无穷大
                row[name] = float(f"{value:.6g}") if math.isfinite(value) else None
        self.rows.append(row)
        if self.file is None:
            return
        self.unwritten += (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self._write()

    def _write(self) -> None:
        with suppress(OSError):
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def sync(self) -> None:
        """让写过的记录落盘：先于检查点，接着练时它之前的记录便一行不缺。"""
        if self.file is not None:
            self._write()
            with suppress(OSError):
                os.fsync(self.file.fileno())

    def seconds(self) -> float:
        """从开始到现在的秒数，不含中断的时候。"""
        return time.monotonic() - self.start

    def draw(self) -> None:
        """画训练与检验的损失曲线。"""
        if self.file is None:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for name, style in (("train_loss", "-"), ("val_loss", "o-")):
            points = [(r["tokens"], r[name]) for r in self.rows if r.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1)
        axes.set(xlabel="tokens", ylabel="loss (nats / token)")
        axes.grid(alpha=0.3)
        axes.legend()
        try:
            figure.savefig(self.picture, dpi=120)
        except OSError as error:
            print(f"（画不了 {self.picture}（{error.strerror}），不影响检查点）")
        plt.close(figure)


def read_metrics(path: Path) -> list[dict]:
    """读回记录；断电时写了一半的最后一行不要。"""
    rows = []
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as f:
        for line in f:
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                row["step"] + 0
                rows.append(row)
    return rows


def bits_per_character(loss: float, card: dict) -> float:
    """每个词元的损失（奈特）-> 原文每个字的比特数：分词器不同的模型也能比。"""
    return loss / math.log(2) * card["val_targets"] / card["val_characters"]


def repeat_flags(config: Config, origins: dict[str, str]) -> str:
    """下一个命令也要带上的参数：文件在哪里，用什么设备。"""
    names = ("preset", "data_dir", "out_dir", "device", "dtype")
    default = Config()
    given = [
        n
        for n in names
        if origins[n] == "命令行"
        or (origins[n] == "检查点" and getattr(config, n) != getattr(default, n))
    ]
    flags = "".join(f" --{n} {shlex.quote(getattr(config, n))}" for n in given)
    return flags if config.compile else flags + " --no-compile"
