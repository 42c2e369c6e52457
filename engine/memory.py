"""内存不够：该改哪个设置、能省多少；在显卡上试出放得下的小批。

out_of_memory   内存不够时该说的话
fit_batch       放得下的最大的小批；fit_compiled：编译过的
auto_batch      ``--batch_size auto``
"""

from settings.script import is_out_of_memory

from collections.abc import Callable

import torch
from torch import nn

from config import Config, UserError
from dataset import Batch
from engine.device import Device
from engine.expert_load import take_tally
from model import Transformer
from settings.say import say


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
    n_matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim >= 2)
    fixed = 4 * (2 * n_parameters + n_matrices + 2 * (n_parameters - n_matrices))
    per_layer = 4 * (16 * config.dim + 6 * config.active_width())
    per_token = config.n_layers * per_layer + 16 * config.vocab_size
    return fixed, config.seq_len * per_token


def fit_batch(rows: int, attempt: Callable[[int], None], most: int | None = None) -> int:
    """找出放得下的最大的小批：从大到小，逐个试一个大批的约数；一行也放不下是 0。

    Args:
        rows: 一个大批归这个进程的行数；小批乘以累积的次数始终等于它，结果因此不变。
        attempt: 用这么多行走一次训练与检验；放不下就抛出内存不够的异常。
        most: 从几行试起；默认是整个大批。
    """
    for size in (n for n in range(most or rows, 0, -1) if rows % n == 0):
        try:
            attempt(size)
            return size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
    return 0


def fit_compiled(rows: int, attempt: Callable[[int], None]) -> int:
    """同 `fit_batch`，attempt 里有编译的：编译一种大小约一分钟，不编译的只要几秒。

    所以先不编译地试；编译过的省内存，再从那两倍试起。白编译的至多一两次，选中的那一次训练接着用。
    """
    with torch.compiler.set_stance("force_eager"):
        size = fit_batch(rows, attempt)
    return fit_batch(rows, attempt, most=min(rows, max(1, 2 * size)))


def walk(loss: nn.Module, batch: Batch, device: Device) -> None:
    """用一小批走一次前向与反向，再检验一次：检验不求梯度，打分却是整张词表的。"""
    try:
        with device.autocast():
            part = loss.train()(batch)
        part.backward()
        with device.autocast(), torch.no_grad():
            loss.eval()(batch)
    finally:
        loss.train().zero_grad(set_to_none=True)


def auto_batch(config: Config, loss: nn.Module, device: Device, train) -> None:
    """``batch_size=auto``：在显卡上试出放得下的小批，就地改写 batch_size 与 grad_accum。

    试的就是要走的路：真的几行数据（分了段的，注意力走别的算子），合用的一行，编译过的损失。
    试的时候先占住优化器将来要用的显存，再多留一成余地。

    Args:
        loss: 损失的模块，已经合用一行、编译，还没有并行。
        train: 训练的一批批，用到 n_rows 与 get。
    Raises:
        UserError: 一行也放不下。
    """
    rows, model = config.batch_size * config.grad_accum, loss.model
    if device.place.type != "cuda":
        say(f"（batch_size=auto 只在显卡上试；这里用预设的 {config.batch_size}）")
        return
    optimizer_bytes = memory_needed(config, model)[0] - 8 * sum(
        p.numel() for p in model.parameters()
    )
    total = torch.cuda.get_device_properties(device.place).total_memory

    def attempt(size: int) -> None:
        """用训练数据的头 size 行走一次。"""
        torch.cuda.empty_cache()
        reserved = torch.empty(
            int(optimizer_bytes + total * 0.1), dtype=torch.uint8, device=device.place
        )
        batch = train.get([i % train.n_rows for i in range(size)])
        walk(loss, batch.to(device.place), device)
        del reserved

    share = rows // device.world.size
    if device.compile and device.world.size == 1:
        say("（batch_size=auto：正在试放得下几行，也要编译，约两三分钟……）")
        size = fit_compiled(share, attempt)
    else:  # 几个进程的，训练时在 DDP 里面编译，在这里编译的用不上
        with torch.compiler.set_stance("force_eager"):
            size = fit_batch(share, attempt)
    sizes = device.world.gather(size)
    if not all(sizes):
        raise UserError("一行也放不下；请减小 --seq_len，或换一个小些的 --preset")
    config.batch_size = min(sizes)
    config.grad_accum = rows // config.batch_size
    take_tally(model)  # 试的时候数下的专家的负载，不算
    torch.cuda.empty_cache()
    say(
        f"（batch_size=auto：一次前向 {config.batch_size} 行，累积成每步 {rows} 行，"
        f"结果与这样的划分无关）"
    )
