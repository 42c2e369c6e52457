"""两个训练脚本必须做得一模一样的事；训练的故事本身在 pre_train.py 与 sft_train.py 里。

    Device          用哪个设备、哪种精度，能不能编译
    loss_sum        一批数据的损失之和
    SharedRow       语料里从没出现过的词元合用一行，词表那一层少算几倍
    evaluate        在留出的文档上检验
    Metrics         逐步的记录与损失曲线

参数怎样更新见 optimizer.py，出了意外怎么办见 faults.py，检查点见 checkpoint.py，
几个进程怎样合作见 distributed.py。
本文件不认识分词之前的文字，也不决定训练的次序。
"""

import ctypes
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import Progress
from config import Config, UserError
from dataset import IGNORE, Batch, row_order, used_ids
from distributed import World
from experts import Routing
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
        if self.compile and config.n_experts and self.dtype != torch.bfloat16:
            self.compile = False  # F.grouped_mm 编译时只认 bf16
            self.notes.append("专家混合只在 bfloat16 时编译，这里不编译")
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
            self.notes.append("这个处理器没有 bf16 指令，改用 float32：结果相近，慢一些")
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
    torch.set_deterministic_debug_mode("warn")  # 另一个同义的函数要导入编译器，多花一秒多
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


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """打分 (B, T, V) 给答案 (B, T) 的负对数概率之和，单位奈特；答案是 IGNORE 的不算。"""
    return F.cross_entropy(
        logits.view(-1, logits.size(-1)).float(),  # (B·T, V)
        targets.reshape(-1),
        ignore_index=IGNORE,
        reduction="sum",
    )


def loss_sum(
    model: Transformer,
    batch: Batch,
    shared: SharedRow | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """这一批所有目标的负对数概率之和，单位奈特；平均由调用者除以目标的总数得到。

    专家混合的负载均衡损失不在这个数里，只在它的梯度里：这样，记下来的总是语言的损失。

    Args:
        shared: 给了就用它省去重复的打分，结果相同；目标须是训练语料里出现过的词元。
        criterion: 怎样给打分评判；给了 shared 时，打分是 (B, T, R)，答案是其中的第几列。
    """
    targets = batch.targets
    routing = Routing(targets != IGNORE)
    x = model.hidden(batch.ids, batch.positions, batch.segments, routing=routing)  # (B, T, C)
    if shared is None:
        logits = model.score(x)  # (B, T, V)
    else:
        table = model.embedding.weight[shared.rows]  # (R, C)
        # 代表的那一行收到 n 份推力之和，只留它自己的一份（exp(-ln n) = 1/n），与逐个训练时一样。
        own = torch.exp(-shared.bias)[:, None]
        table = own * table + (1 - own) * table.detach()
        # 偏置加在 fp32 上：bf16 在 10 附近一格是 0.06，装不下 ln n。
        logits = F.linear(x, table).float() + shared.bias  # (B, T, R)
        targets = torch.where(targets == IGNORE, IGNORE, shared.column[targets.clamp(min=0)])
    loss = criterion(logits, targets)
    if routing.penalty is None:
        return loss
    return loss + (routing.penalty - routing.penalty.detach())  # 加的是 0，梯度却在


def compile_if_possible(fn, device: Device, **options):
    """用 torch.compile 加速 fn；编译器中途失败（例如缺少 Python 头文件）就说一声，改用原来的。

    Args:
        options: 交给编译器的选项。
    """
    if not device.compile:
        return fn
    # 导入要一两秒，聊天时不必等
    from torch._dynamo.exc import ShortenTraceback, TorchRuntimeError

    compiled = torch.compile(fn, dynamic=False, options=options or None)

    def call(*args):
        """编译过的 fn；编译失败过一次，以后都用原来的。"""
        if device.compile:
            try:
                return compiled(*args)
            except (ShortenTraceback, TorchRuntimeError) as error:
                device.compile = False
                reason = str(error).strip().splitlines()[0][:100]
                print(
                    f"（torch.compile 失败，改为不编译：结果相近，通常慢一些。原因：{reason}）",
                    file=sys.stderr,
                )
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


# ---------- 3. 记录 ----------


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
            if not self.rows:
                print(f"（{self.path} 不见了，记录从第 {progress.step + 1} 步写起）")
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
