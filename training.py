"""两个训练脚本必须做得一模一样的事；训练的故事本身在 pre_train.py 与 sft_train.py 里。

    Device        用哪个设备、哪种精度，能不能编译
    loss_sum      一批数据的损失之和
    SharedRow     语料里从没出现过的词元合用一行，词表那一层少算几倍
    evaluate      在留出的文档上检验
    save / load   检查点
    Metrics       逐步的记录与损失曲线

参数怎样更新见 optimizer.py。本文件不认识分词之前的文字，也不决定训练的次序。
"""

import ctypes
import json
import math
import os
import platform
import shlex
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import PER_PRESET, SHAPE, Config, UserError
from dataset import IGNORE, Batch, row_order, used_ids
from model import Transformer
from tokenizer import Tokenizer

# ---------- 1. 设备与精度 ----------


class Device:
    """这次运行用的设备、精度与编译与否；`notes` 是该告诉用户的话。

    Args:
        config: 用到 device、dtype、compile。
    Raises:
        UserError: 指定的设备不存在，或不支持指定的精度。
    """

    def __init__(self, config: Config):
        self.notes: list[str] = []
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = config.device
        if name == "auto":
            name = next((d for d, there in available.items() if there), "cpu")
        if not available.get(name, True):
            raise UserError(f"这台机器上没有 {name}；请去掉 --device，或改成 --device cpu")
        self.torch = torch.device(name)
        if name == "cpu":
            keep_freed_memory()
        self.dtype = self._choose_dtype(config.dtype)
        self.compile = config.compile and self._can_compile()
        # fp16 的梯度太小会变成 0：先放大损失，更新前再缩回去。
        self.scaler = torch.amp.GradScaler(name, enabled=self.dtype == torch.float16)

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
        return f"{name} · {str(self.dtype)[6:]} · {'torch.compile' if self.compile else '不编译'}"


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
    def spread(self, model: Transformer) -> None:
        """训练只更新代表的那一行；抄给其余的，整张词嵌入便与逐个训练的一样。"""
        weight = model.embedding.weight
        weight[self.members] = weight[self.rows[-1]].clone()


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
    shared.spread(model)
    return shared


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
    """留出数据上每个目标的平均损失（奈特）。

    只够检验一部分时，用的是打乱之后的开头若干行：每次都是同样的行，而且不偏向文件的前一段。
    """
    n_rows = min(batches.n_rows, -(-max_tokens // batches.seq_len))
    rows = row_order(batches.n_rows, seed=0, epoch=0)[:n_rows].tolist()
    total, count = 0.0, 0
    for first in range(0, n_rows, batch_size):
        wanted = rows[first : first + batch_size]
        # 最后一批用重复的行凑满：形状不变，编译过的代码才能沿用；凑数的行不算。
        batch = batches.get(wanted + wanted[:1] * (batch_size - len(wanted)))
        batch.targets[len(wanted) :] = IGNORE
        count += int((batch.targets != IGNORE).sum())
        with device.autocast():
            total += loss_fn(model, batch.to(device.torch)).item()
    return total / count


# ---------- 3. 检查点 ----------

FORMAT = 1


def save(path: Path, model: Transformer, config: Config, tokenizer: Tokenizer, **facts) -> None:
    """写检查点：先写临时文件并落盘，再改名；断电时要么是旧的，要么是新的。

    Args:
        facts: 一并记下的事实，例如 stage、step、tokens、val_loss。
    Raises:
        UserError: 磁盘写不进去。
    """
    checkpoint = {
        "format": FORMAT,
        "config": asdict(config),
        "tokenizer": tokenizer.fingerprint(),
        "model": {name: p.detach().cpu() for name, p in model.state_dict().items()},
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        **facts,
    }
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # 写到一半磁盘满了，torch 报的是 RuntimeError
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"写不了检查点 {path}（{reason}）；请腾出空间或检查权限") from error


def load(path: Path, tokenizer: Tokenizer) -> tuple[Transformer, Config, dict[str, Any]]:
    """读检查点，建好模型（在 CPU 上）。形状取自检查点，一个参数都不许对不上。

    Returns:
        (model, config, checkpoint)
    Raises:
        UserError: 文件不存在、已损坏，或与这个程序、这个分词器不配。
    """
    if not path.is_file():
        raise UserError(f"找不到检查点 {path}；{what_to_do_without(path)}")
    try:
        with path.open("rb"):  # 没有权限不等于文件坏了
            pass
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = checkpoint["format"]
    except PermissionError as error:
        raise UserError(f"读不了 {path}（{error.strerror}）；请检查权限") from error
    except Exception as error:  # torch.load 对坏文件抛出的异常种类繁多，没有共同的基类
        raise UserError(f"{path} 不是完好的检查点（{type(error).__name__}）；请重新训练") from error
    if found != FORMAT:
        raise UserError(f"{path} 的格式是 {found}，这个程序只认识 {FORMAT}；请更新程序或重新训练")
    if checkpoint["tokenizer"] != tokenizer.fingerprint():
        raise UserError(f"{path} 是用另一个分词器训练的；请换回当时的 tokenizer.py，或重新训练")
    names = {f.name for f in fields(Config)}
    config = Config(**{k: v for k, v in checkpoint["config"].items() if k in names})
    model = Transformer(config)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path} 的参数与它的配置对不上（{reason}）") from error
    return model, config, checkpoint


def what_to_do_without(path: Path) -> str:
    """缺了这个检查点，下一步该做什么：先训练，还是指定已有的另一个。"""
    others = "、".join(sorted(map(str, Path("out").glob(f"*/{path.name}"))))
    if path.name == "sft.pt":
        return (
            f"现有的是 {others}，请用 --checkpoint 指定"
            if others
            else ("请先运行 python sft_train.py（之前还要 python pre_train.py）")
        )
    if others:
        return f"现有的是 {others}，请用 --checkpoint（微调时用 --init_from）指定"
    return "请先运行 python pre_train.py"


def inherit(config: Config, origins: dict[str, str], source: Config, path: str) -> None:
    """微调时，形状取自预训练的检查点；明确指定过、又不相同的，一次报告。

    Args:
        config: 会被就地改成与检查点一致。
        source: 检查点里的配置。
    Raises:
        UserError: 列出对不上的字段。
    """
    if config.preset != source.preset:
        raise UserError(f"{path} 是 {source.preset} 预设的；请加上 --preset {source.preset}")
    conflicts = []
    # 两个阶段读的是同一部词典时，留出的必须是同样的成语；自己的对话，留多少由自己定。
    held_out = ("val_fraction",) if config.sft_data == source.data else ()
    for name in (*SHAPE, *held_out):
        mine, theirs = getattr(config, name), getattr(source, name)
        explicit = origins[name] == "命令行" or (
            origins[name] == "config.py" and name in PER_PRESET
        )
        if mine != theirs and explicit:
            conflicts.append(f"{name} 指定为 {mine}，检查点里是 {theirs}")
        setattr(config, name, theirs)
        origins[name] = "检查点"
    if conflicts:
        raise UserError(f"与 {path} 不符：{'；'.join(conflicts)}；请去掉这些设置")
    if origins["sft_lr"] == "自动":
        config.sft_lr = source.lr / 5
    if origins["seq_len"].startswith("预设"):
        config.seq_len = min(config.seq_len, config.max_len)
    if config.seq_len > config.max_len:
        raise UserError(f"seq_len（{config.seq_len}）超过了 {path} 的 max_len（{config.max_len}）")


# ---------- 4. 记录 ----------


class Metrics:
    """训练的记录：每行一个 JSON 对象写进 metrics.jsonl，结束时画成 loss.png。"""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.picture = folder / "loss.png"
        self.file = self.path.open("w", encoding="utf-8")
        self.rows: list[dict] = []
        self.start = time.monotonic()

    def write(self, **row) -> None:
        """记一行；浮点数保留六位有效数字，另记从开始起的秒数。"""
        row["seconds"] = time.monotonic() - self.start
        for name, value in row.items():
            if isinstance(value, float):  # JSON 里没有无穷大
                row[name] = float(f"{value:.6g}") if math.isfinite(value) else None
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def minutes(self) -> float:
        """从开始到现在的分钟数。"""
        return (time.monotonic() - self.start) / 60

    def draw(self) -> None:
        """画训练与检验的损失曲线。"""
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
        figure.savefig(self.picture, dpi=120)
        plt.close(figure)


def bits_per_character(loss: float, card: dict) -> float:
    """每个词元的损失（奈特）-> 原文每个字的比特数：分词器不同的模型也能比。"""
    return loss / math.log(2) * card["val_targets"] / card["val_characters"]


def repeat_flags(config: Config, origins: dict[str, str]) -> str:
    """下一个命令也要带上的参数：文件在哪里，用什么设备。"""
    names = ("preset", "data_dir", "out_dir", "device", "dtype")
    given = [n for n in names if origins[n] == "命令行"]
    flags = "".join(f" --{n} {shlex.quote(getattr(config, n))}" for n in given)
    return flags if config.compile else flags + " --no-compile"
