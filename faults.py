"""训练途中出了意外：叫停、发散、内存不够，都不丢东西，并且说清接下来怎么办。

    Stop            Ctrl-C 与 kill：做完这一步，存好了再走
    skip_step       损失或梯度不是有限的数：这一步不更新
    diverged        接连几步都不是：另存现场，结束
    memory_advice   内存不够：该改哪个，能省多少
    auto_batch      在显卡上试出放得下的小批

断电与磁盘坏了靠检查点，见 checkpoint.py。
"""

import itertools
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch
from tqdm import tqdm

from checkpoint import Folder, Progress, Saver, write
from config import Config, UserError, is_out_of_memory
from dataset import Batch
from distributed import World
from experts import take_load
from model import Transformer
from training import Device, loss_sum

# ---------- 1. 叫停 ----------


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

    def leave(self, saver: Saver, progress: Progress, max_steps: int) -> NoReturn:
        """说清停在哪里、怎样接着练，然后退出；退出码是 128 加信号，与系统的约定相同。"""
        folder = saver.folder
        saved = saver.step == progress.step
        where = "已经存进" if saved else f"没有存下，走到第 {saver.step} 步的检查点还在"
        print(
            f"停在第 {progress.step} 步，共 {max_steps} 步；{where} {folder.path}。\n"
            f"接着练：{folder.how_to_resume}"
        )
        self.world.disconnect()
        sys.exit(128 + (self.signal or signal.SIGTERM))


# ---------- 2. 不是有限的数 ----------


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


# ---------- 3. 内存不够 ----------


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
    n_matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim >= 2)
    fixed = 4 * (2 * n_parameters + n_matrices + 2 * (n_parameters - n_matrices))
    per_layer = 4 * (16 * config.dim + 6 * config.active_width())
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
        """用 size 行假的数据走一次前向与反向。"""
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
    take_load(model, device.world)  # 试的时候数下的专家的负载，不算
    torch.cuda.empty_cache()
    print(
        f"（batch_size=auto：一次前向 {config.batch_size} 行，累积成每步 {rows} 行，"
        f"结果与这样的划分无关）"
    )
