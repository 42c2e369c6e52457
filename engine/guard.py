"""损失或梯度不是有限的数：这一步不更新；接连几步都不是，就另存现场，结束。"""

import itertools
import math

import torch

from config import UserError
from engine.checkpoint import write
from engine.device import Device
from engine.progress import Progress
from engine.run_folder import RunFolder
from settings.say import say_above_bar


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
        say_above_bar(
            f"（第 {progress.step + 1} 步的{what}不是有限的数，没有更新；"
            f"用的数据：第 {epoch + 1} 遍，词元切成等长的行之后的第 {shown} 行，从 0 数）"
        )
    return {"skipped_rows": rows}


def too_many_skipped(progress: Progress, scaler: torch.amp.GradScaler) -> bool:
    """接连几步都不是有限的数，就不会自己好了；fp16 开头要试好几次才知道放大多少倍合适。"""
    return progress.skipped_in_a_row >= (20 if scaler.is_enabled() else 3)


def diverged(
    state: dict, folder: RunFolder, progress: Progress, lr_flag: str, lr: float
) -> UserError:
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
