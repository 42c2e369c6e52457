"""检查点：训练的全部状态。写得不会坏，坏了认得出。

    write / read       一个文件，断电时要么是旧的，要么是新的；读的时候逐块核对
    capture / restore  各部分的状态 <-> 检查点
    load               读出模型，给聊天与微调用
    summary            一句话说明来历

什么时候存、存在哪个目录，见 saver.py 与 run_folder.py。
"""

from settings.script import is_out_of_memory

import errno
import math
import os
import platform
import shlex
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import HOW_LONG, PER_PRESET, PRESETS, Config, UserError
from engine.archive import Damaged, Lie, open_archive
from engine.claims import (
    FORMAT,
    NAMES,
    check_contents,
    check_parameters,
    plain,
    room_for_context,
)
from engine.distributed import whole
from engine.progress import UNKNOWN
from engine.unpickle import unpack
from model import Transformer
from settings.check import check_types, check_values
from settings.files import new_file, sync_folder
from settings.say import brief
from tokenizer import Tokenizer

SCRIPTS = {"pretrain": "pre_train.py", "sft": "sft_train.py"}

# 检查点的各部分，以及没有它时记下的。
PARTS: dict[str, Any] = {"model": {}, "optimizers": [], "scaler": {}, "shared_row": None,
                         "progress": {}, "rng": {}}  # fmt: skip


def write(path: Path, checkpoint: dict[str, Any], keep_previous: bool = True) -> None:
    """写检查点，原有的一个改名留着。任何时刻断电，磁盘上都至少有一个完好的。

    Args:
        keep_previous: 假时直接换掉原有的。
    Raises:
        UserError: 写不进去；原有的不受影响。
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(part) as f:  # 别人放在那里的链接，不顺着它写
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())  # 先确定内容到了磁盘上，再改名
        if keep_previous and path.exists():
            previous = previous_of(path)
            try:  # 旧的多一个名字，原来的名字一刻也不空着
                previous.unlink(missing_ok=True)
                os.link(path, previous)
            except OSError:  # 有的文件系统不能一个文件两个名字
                os.replace(path, previous)
        os.replace(part, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # 写到一半磁盘满了，torch 报的是 RuntimeError
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "写到一半写不下去，多半是磁盘满了"
        raise UserError(f"写不了检查点 {path}（{reason}）；请腾出空间或检查权限") from error


def previous_of(path: Path) -> Path:
    """前一个检查点的路径：pretrain.pt -> pretrain.previous.pt。"""
    return path.with_name(f"{path.stem}.previous.pt")


def read(path: Path, mmap: bool = False) -> dict[str, Any]:
    """读检查点，核对它完好，里面的值都说得通，并且是这个程序认识的。

    检查点是一个 zip 文件，每一块都有 CRC-32，这里逐块核对（PyTorch 自己不核对，翻转一个比特也
    照读不误）。文件里夹带的程序不会运行，它说的大小也不能比文件大，见 archive.py 与 claims.py。

    Args:
        mmap: 真时用到哪块才读哪块，适合只要参数、马上就放手的。
    Raises:
        Damaged: 不完整，内容变了，或者有不可能的值。
        UserError: 没有权限，内存不够，或者是更新的程序写的。
    """
    try:
        checkpoint = plain(unpack(open_archive(path, mmap)))
    except (UserError, Lie, OSError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) or getattr(error, "errno", 0) == errno.ENOMEM:
            raise no_room(path) from error
        if isinstance(error, UserError):
            raise
        if isinstance(error, OSError) and error.errno != errno.EIO:
            reason = error.strerror or type(error).__name__
            raise UserError(f"读不了 {path}（{reason}）；请检查路径与权限") from error
        why = str(error) if isinstance(error, Lie) else type(error).__name__
        raise Damaged(f"{path} 不是完好的检查点（{why}）") from error
    except Exception as error:  # 坏文件引起的异常种类繁多，没有共同的基类
        raise Damaged(f"{path} 不是完好的检查点（{type(error).__name__}）") from error
    if not isinstance(checkpoint, dict) or type(checkpoint.get("format")) is not int:
        raise Damaged(f"{path} 不是 mini-llm 的检查点")
    if (found := checkpoint["format"]) != FORMAT:
        todo = "是更新的程序写的，请更新程序" if found > FORMAT else "是旧程序写的，请重新训练"
        raise UserError(f"{path} {todo}（它的格式是 {found}，这个程序认识的是 {FORMAT}）")
    try:
        check_contents(checkpoint)
    except Lie as lie:
        raise Damaged(f"{path} 不是完好的检查点（{lie}）") from lie
    return checkpoint


def no_room(path: Path) -> UserError:
    """装不下一个检查点时说的话。"""
    return UserError(f"内存不够，装不下 {path}；请关掉别的程序，或放宽限制（ulimit -v）")


def capture(
    parts: dict[str, Any], *, stage: str, config: Config, tokenizer: Tokenizer, device: str,
    max_steps: int, data: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """训练的全部状态，就是各部分的状态之和，加上几样说明；模型分开放时，要全体进程一起调用。

    Args:
        parts: {名字: 有 state_dict 的一部分}，名字见 `PARTS`；没有的写空的。
        device: 在什么设备上练的，`Device.describe()`。
        max_steps: 全程的步数；学习率的曲线由它和 config 决定。
        data: 语料的身份（engine/corpora.py），以及读到了第几遍的第几行。
    """
    states = {
        name: whole(parts[name].state_dict()) if parts.get(name) is not None else empty
        for name, empty in PARTS.items()
    }
    return {
        "format": FORMAT,
        "stage": stage,
        "config": asdict(config),
        "tokenizer": tokenizer.fingerprint(),
        "versions": versions(),
        "device": device,
        "max_steps": max_steps,
        "data": data,
        **states,
    }


def restore(checkpoint: dict[str, Any], parts: dict[str, Any], path: Path) -> None:
    """各部分取回自己的状态；上次不是 fp16 的，没有 scaler 的，不动。

    Raises:
        Damaged: 里面的状态与这个程序对不上。
    """
    try:
        for name, part in parts.items():
            if checkpoint[name] or name != "scaler":
                part.load_state_dict(checkpoint[name])
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):  # 状态没有错，由训练的外壳说该改小哪个设置
            raise
        raise Damaged(f"{path} 里优化器或随机数的状态不对（{brief(error)}）") from error


def versions() -> dict[str, str]:
    """会影响结果末位的：软件的版本，处理器的线程与指令集。"""
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "线程": str(torch.get_num_threads()),
            "指令集": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


def imported(checkpoint: dict[str, Any]) -> bool:
    """是 tools.import_hf 写的：只有参数，没有优化器、随机数等训练的状态。"""
    return not checkpoint["optimizers"]


def summary(checkpoint: dict[str, Any]) -> str:
    """一句话说明来历，例如「微调 150 步，检验 5.245 比特每字」。"""
    stage, progress = NAMES[checkpoint["stage"]], checkpoint["progress"]
    if imported(checkpoint):
        return f"{stage}过，导入的"
    step, bpc = progress["step"], progress["val_bpc"]
    result = f"检验 {bpc:.3f} 比特每字"
    if step < checkpoint["max_steps"]:
        result = f"最近一次{result}" if math.isfinite(bpc) else "还没有检验过"
        total = f"/{n}" if (n := checkpoint["max_steps"]) < UNKNOWN else ""
        return f"{stage}只练了 {step}{total} 步，{result}"
    return f"{stage} {step} 步，{result}"


def load(path: Path, tokenizer: Tokenizer) -> tuple[Transformer, Config, dict[str, Any]]:
    """读检查点，建好模型（在 CPU 上）。形状取自检查点，一个参数都不许对不上。

    Returns:
        (model, config, checkpoint)
    Raises:
        UserError: 文件不存在、已损坏，或与这个程序、这个分词器不配。
    """
    if path.is_dir():
        found = "、".join(sorted(map(str, path.glob("*.pt")))) or "它里面没有检查点"
        raise UserError(f"{path} 是目录；请写出检查点的文件名：{found}")
    if not path.exists():
        raise UserError(f"找不到检查点 {path}；{what_to_do_without(path)}")
    try:
        checkpoint = read(path, mmap=True)
    except Damaged as error:
        previous = previous_of(path)
        todo = f"前一个是 {previous}，可以改用它" if previous.is_file() else "请重新训练"
        raise Damaged(f"{error}；{todo}") from error
    config = config_of(checkpoint, path, tokenizer)
    return build_model(config, checkpoint, path), config, checkpoint


# 早先的检查点没有记下这几项，那时用的是这些值。
NOT_RECORDED = {"muon_momentum": 0.95, "adam_beta1": 0.9, "adam_beta2": 0.95,
                "n_experts": 0, "n_active": 0, "muon_heads": False,
                "muon_beta2": 0.0, "residual_lr_scale": 1.0, "whole_documents": False}  # fmt: skip


def config_of(checkpoint: dict, path: Path, tokenizer: Tokenizer) -> Config:
    """检查点里的配置。Raises UserError：分词器不同，或者有不可能的值。"""
    if checkpoint["tokenizer"] != tokenizer.fingerprint():
        raise UserError(f"{path} 是用另一个分词器训练的；请换回当时的 tokenizer.py，或重新训练")
    names = {f.name for f in fields(Config)}
    saved = NOT_RECORDED | {k: v for k, v in checkpoint["config"].items() if v is not None}
    if saved["n_experts"]:  # 没有专家的，没有路由器
        saved = {"router_scale": 1.0} | saved
    config = Config(**{k: v for k, v in saved.items() if k in names})
    problems: list[str] = []
    wrong = check_types(config, problems)
    optional = {"router_scale", *(name for group in HOW_LONG for name in group)}
    problems += [f"缺少 {n}" for n in sorted(PER_PRESET - optional) if getattr(config, n) is None]
    if not problems:
        check_values(config, problems, wrong)
    if problems:
        more = f" 等 {len(problems)} 处" if len(problems) > 5 else ""
        raise UserError(f"{path} 里的配置不对：{brief('；'.join(problems[:5]), 400)}{more}")
    return config


def build_model(config: Config, checkpoint: dict, path: Path) -> Transformer:
    """照配置建模型，装上检查点里的参数；对得上，才去分配内存。

    Raises:
        UserError: 对不上，或者内存不够。
    """
    state = checkpoint["model"]
    try:
        check_parameters(state, config)
        if sentence := room_for_context(config):
            raise UserError(f"{path} 用不了：{sentence}")
        model = Transformer(config)
        model.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        if is_out_of_memory(error):
            raise no_room(path) from error
        raise UserError(f"{path} 的参数与它的配置对不上（{brief(error)}）") from error
    return model


def what_to_do_without(path: Path) -> str:
    """缺了这个检查点，下一步该做什么：先训练，还是指定已有的另一个。"""
    if (previous := previous_of(path)).is_file():
        return f"前一个还在：{previous}，可以指定它"
    if path.name not in ("pretrain.pt", "sft.pt"):  # 训练脚本写不出这个名字：多半是打错了
        found = "、".join(sorted(map(str, Path("out").glob("*/*.pt")))) or "还没有检查点"
        return f"请检查路径，out 里现有的：{found}"
    others = "、".join(sorted(map(str, Path("out").glob(f"*/{path.name}"))))
    usual = path.parent in [Path("out") / preset for preset in PRESETS]
    here = "" if usual else f" --out_dir {shlex.quote(str(path.parent))}"
    if path.name == "sft.pt":
        return (
            f"现有的是 {others}，请用 --checkpoint 指定"
            if others
            else (f"请先运行 python sft_train.py{here}（之前还要 python pre_train.py{here}）")
        )
    if others:
        return f"现有的是 {others}，请用 --checkpoint（微调时用 --init_from）指定"
    return f"请先运行 python pre_train.py{here}"
