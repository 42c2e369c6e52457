"""检查点：训练的全部状态。写得不会坏，坏了认得出，接得上。

    Progress      训练走到了哪里
    write / read  一个文件，断电时要么是旧的，要么是新的；读的时候逐块核对
    load          读出模型，给聊天与微调用
    Folder        一次训练的输出目录：上锁，不盖掉别人的，找到该接着练的那一个
    Saver         什么时候存，存不下怎么办

输出目录里：pretrain.pt 是最新的，pretrain.previous.pt 是它之前的一个。出过事的话，还会有
pretrain.damaged.pt（坏了的）与 pretrain.diverged.pt（发散时的状态），留着供查看。
"""

import math
import os
import platform
import shlex
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from tqdm import tqdm

from config import (
    PER_PRESET,
    PRESETS,
    SHAPE,
    STEPS_OR_EPOCHS,
    Config,
    UserError,
    check_types,
    check_values,
)
from distributed import World, shard_like, whole
from model import Transformer
from tokenizer import Tokenizer

FORMAT = 2
SCRIPTS = {"pretrain": "pre_train.py", "sft": "sft_train.py"}
NAMES = {"pretrain": "预训练", "sft": "微调"}
IMPORTED = "是导入的"


class Damaged(UserError):
    """检查点不完整，或者内容变了。"""


@dataclass
class Progress:
    """训练走到了哪里。"""

    step: int = 0  # 已经走完的步数
    tokens: int = 0  # 已经学过的目标数
    skipped: int = 0  # 因为损失或梯度不是有限的数而没有更新的步数
    skipped_in_a_row: int = 0
    seconds: float = 0.0  # 训练用去的时间，含检验与保存，不含中断的时候
    saving_seconds: float = 0.0  # 其中保存用去的
    val_loss: float = math.inf  # 最近一次检验
    val_bpc: float = math.inf
    best_val_loss: float = math.inf  # 各次检验里最好的，以及它在第几步
    best_step: int = 0

    def checked(self, val_loss: float, val_bpc: float, everything: bool) -> None:
        """记下一次检验的结果；最后那次检验的数据多，不与平时的比高低。"""
        self.val_loss, self.val_bpc = val_loss, val_bpc
        if val_loss < self.best_val_loss and not everything:
            self.best_val_loss, self.best_step = val_loss, self.step


# ---------- 1. 一个文件 ----------


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
        with part.open("wb") as f:
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


def sync_folder(folder: Path) -> None:
    """改名也要落盘。Windows 不能打开目录，也不需要。"""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # 有的网络文件系统不支持；文件本身已经写好了
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, mmap: bool = False) -> dict[str, Any]:
    """读检查点，核对它完好，并且是这个程序认识的。

    检查点是一个 zip 文件，每一块都有 CRC-32。PyTorch 自己不核对它，翻转一个比特也照读不误，
    所以先用 zipfile 核对一遍。`weights_only=True`：文件里夹带的程序不会运行。

    Args:
        mmap: 真时用到哪块才读哪块，适合只要参数、马上就放手的。
    Raises:
        Damaged: 不完整，或者内容变了。
        UserError: 没有权限，或者是更新的程序写的。
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                raise Damaged(f"{path} 不是完好的检查点（{broken} 的校验和不符）")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (PermissionError, FileNotFoundError) as error:
        raise UserError(f"读不了 {path}（{error.strerror}）；请检查路径与权限") from error
    except (Damaged, MemoryError):
        raise
    except Exception as error:  # 坏文件引起的异常种类繁多，没有共同的基类
        raise Damaged(f"{path} 不是完好的检查点（{type(error).__name__}）") from error
    kinds = {"stage": str, "config": dict, "tokenizer": str, "model": dict, "progress": dict,
             "max_steps": int, "data": dict, "versions": dict, "device": str, "optimizers": list,
             "scaler": dict, "rng": dict}  # fmt: skip
    if not isinstance(checkpoint, dict) or type(checkpoint.get("format")) is not int:
        raise Damaged(f"{path} 不是 mini-llm 的检查点")
    if (found := checkpoint["format"]) != FORMAT:
        todo = "是更新的程序写的，请更新程序" if found > FORMAT else "是旧程序写的，请重新训练"
        raise UserError(f"{path} {todo}（它的格式是 {found}，这个程序认识的是 {FORMAT}）")
    wrong = [k for k, kind in kinds.items() if not isinstance(checkpoint.get(k), kind)]
    if not isinstance(checkpoint.get("shared_row", ""), dict | None):
        wrong.append("shared_row")
    progress = checkpoint.get("progress")
    if not wrong and any(type(progress.get(k)) is not type(v) for k, v in vars(Progress()).items()):
        wrong = ["progress"]
    if wrong:
        raise Damaged(f"{path} 不是完好的检查点（{'、'.join(wrong)} 不对）")
    return checkpoint


def capture(
    stage: str, config: Config, tokenizer: Tokenizer, model, optimizers, device, progress: Progress,
    shared, max_steps: int, rows: tuple[int, int], card: dict,
) -> dict[str, Any]:  # fmt: skip
    """把训练的全部状态收进一个字典；模型分开放时，要全体进程一起调用。

    Args:
        device: `training.Device`。
        shared: `training.SharedRow` 或 None。
        max_steps: 全程的步数；学习率的曲线由它和 config 决定。
        rows: (每步的行数, 一遍的行数)，由此知道读到了第几遍的第几行。
        card: 词元文件的卡片。
    """
    epoch, row = divmod(progress.step * rows[0], rows[1])
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "format": FORMAT,
        "stage": stage,
        "config": asdict(config),
        "tokenizer": tokenizer.fingerprint(),
        "versions": versions(),
        "device": device.describe(),
        "model": whole(model.state_dict()),
        "optimizers": [whole(optimizer.state_dict()) for optimizer in optimizers],
        "scaler": device.scaler.state_dict(),
        "shared_row": shared and whole(shared._asdict()),
        "progress": asdict(progress),
        "max_steps": max_steps,
        "data": data_identity(card) | {"epoch": epoch, "row": row},
        "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
    }


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
        return f"{stage}只练了 {step}/{checkpoint['max_steps']} 步，{result}"
    return f"{stage} {step} 步，{result}"


def data_identity(card: dict) -> dict[str, Any]:
    """训练与检验的词元各是哪些：内容的散列，与文件放在哪里无关。"""
    return {name: card[name] for name in ("train_sha256", "val_sha256")}


# ---------- 2. 读出模型 ----------


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
    if not path.is_file():
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
                "n_experts": 0, "n_active": 0, "router_scale": 1.0}  # fmt: skip


def config_of(checkpoint: dict, path: Path, tokenizer: Tokenizer) -> Config:
    """检查点里的配置。Raises UserError：分词器不同，或者有不可能的值。"""
    if checkpoint["tokenizer"] != tokenizer.fingerprint():
        raise UserError(f"{path} 是用另一个分词器训练的；请换回当时的 tokenizer.py，或重新训练")
    names = {f.name for f in fields(Config)}
    saved = NOT_RECORDED | {k: v for k, v in checkpoint["config"].items() if v is not None}
    config = Config(**{k: v for k, v in saved.items() if k in names})
    problems: list[str] = []
    wrong = check_types(config, problems)
    optional = {name for pair in STEPS_OR_EPOCHS for name in pair}
    problems += [f"缺少 {n}" for n in sorted(PER_PRESET - optional) if getattr(config, n) is None]
    if not problems:
        check_values(config, problems, wrong)
    if problems:
        raise UserError(f"{path} 里的配置不对：{'；'.join(problems)}")
    return config


def build_model(config: Config, checkpoint: dict, path: Path) -> Transformer:
    """照配置建模型，装上检查点里的参数。Raises UserError：对不上。"""
    state = checkpoint["model"]
    n_layers = len({name.split(".")[1] for name in state if str(name).startswith("blocks.")})
    try:
        if n_layers != config.n_layers:  # 先看层数：写着一亿层的，不要真的去建
            raise ValueError(f"参数有 {n_layers} 层，配置是 {config.n_layers} 层")
        if tuple(state["embedding.weight"].shape) != (config.vocab_size, config.dim):
            raise ValueError("词嵌入的形状不同")
        routers = [name for name in state if name.endswith(".router.weight")]
        if config.n_experts != (len(state[routers[0]]) if routers else 0):  # 专家的数目也是
            raise ValueError(f"专家不是 {config.n_experts} 位")
        model = Transformer(config)
        model.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[min(1, len(str(error).splitlines()) - 1)].strip()
        raise UserError(f"{path} 的参数与它的配置对不上（{reason}）") from error
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


# ---------- 3. 输出目录 ----------

# 接着练的时候，命令行上的这些可以与上次不同，不影响训练的结果。
HARMLESS = {"data_dir", "data", "sft_data", "init_from", "eval_every", "eval_tokens", "prompt",
            "sft_prompt", "save_every"}  # fmt: skip
# 这些也可以不同：算的是同一件事，只是浮点数相加的次序变了，不再逐位相同。
ROUNDING = {"device", "dtype", "compile", "parallel", "batch_size", "grad_accum"}
# 这些绝不可以：参数装不下，或者读到哪里就说不清了。
FIXED = {"preset", *SHAPE, "seq_len", "seed", "isolate_documents", "val_fraction"}
# 其余的（学习率、步数等）只有加上 --allow_changes 才可以。


class Folder:
    """一次训练的输出目录：同时只有一个程序写，已有的训练不会悄悄被盖掉。

    Args:
        stage: "pretrain" 或 "sft"。
        config, origins: `load_config` 的结果。
        world: 多个进程时，只有第 0 个上锁、改名。
        program: 接着练时写在 python 后面的；默认是这个阶段的脚本。
    Raises:
        UserError: 有别的训练正在写这个目录，或者目录写不了。
    """

    def __init__(
        self, stage: str, config: Config, origins: dict[str, str], world: World, program: str = ""
    ):
        self.stage, self.world = stage, world
        self.root = Path(config.out_dir)
        self.path = self.root / f"{stage}.pt"
        self.damaged = False
        program = program or SCRIPTS[stage]
        command = f"python {program}"
        if world.launched:
            how = "…" if world.machines > 1 else f"--nproc_per_node={world.size}"
            command = f"torchrun {how} {program}"
        self.how_to_resume = f"{command} --out_dir {shlex.quote(config.out_dir)} --resume"
        if world.rank == 0:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                self.lock = filelock.FileLock(self.root / ".lock")
                self.lock.acquire(timeout=0)  # 进程一死，系统就替它松手
            except filelock.Timeout:
                raise UserError(
                    f"另一个训练正在写 {self.root}；请等它结束，或用 --out_dir 换一个目录"
                ) from None
            except OSError as error:
                raise UserError(
                    f"写不了 {self.root}（{error.strerror}）；请检查路径与权限，"
                    f"或用 --out_dir 换一个目录"
                ) from error

    def begin(
        self, config: Config, origins: dict[str, str], tokenizer: Tokenizer
    ) -> dict[str, Any] | None:
        """从头练时返回 None；接着练时返回检查点，配置也改成检查点里的。

        Raises:
            UserError: 目录里已有一次训练，却没有说要接着练还是盖掉；或者接不上。
        """
        existing = [p for p in (self.path, previous_of(self.path)) if p.exists()]
        # 这一次 torchrun 自己重新启动的，才不用说 --resume 就接着练。
        restarted = self.world.restarts > 0 and self._launch_id() == self.world.launch_id != "none"
        if not config.resume and not (restarted and existing):
            done = self._done(existing)
            if done != "0 步" and not config.overwrite:
                again = "" if done == IMPORTED else f"接着练：{self.how_to_resume}；"
                raise UserError(
                    f"{self.path} 已经有了（{done}）；{again}"
                    f"不要它了：加上 --overwrite；两个都要：用 --out_dir 换一个目录"
                    if done
                    else f"{'、'.join(map(str, existing))} 已经有了，但读不出来；"
                    f"不要了：加上 --overwrite；要留着：用 --out_dir 换一个目录"
                )
            return None
        if config.overwrite and not restarted:
            raise UserError("--resume 与 --overwrite 只能写一个")
        if not existing:
            others = "、".join(sorted(map(str, Path("out").glob(f"*/{self.path.name}"))))
            raise UserError(
                f"{self.root} 里没有{NAMES[self.stage]}的检查点 {self.path.name}，无从接起；"
                + (f"现有的是 {others}，请用 --out_dir 指定目录，或" if others else "请")
                + f"去掉 --resume，从头{NAMES[self.stage]}"
            )
        path, checkpoint = self._newest_good(existing)
        if imported(checkpoint):
            raise UserError(
                f"{path} 是导入的，只有参数，没有训练的状态，接不上；"
                f"以它为起点微调：python sft_train.py --init_from {shlex.quote(str(path))}，"
                f"并用 --out_dir 换一个目录"
            )
        adopt(config, origins, config_of(checkpoint, path, tokenizer), path)
        return checkpoint

    def settle(self, fresh: bool) -> None:
        """真要开始了：从头练，就删掉原有的；接着练，就把坏的挪开，免得下次保存时顶替了好的。"""
        if self.world.rank > 0:
            return
        if fresh:
            for path in (self.path, previous_of(self.path)):
                path.unlink(missing_ok=True)
        elif self.damaged:
            os.replace(self.path, self.path.with_name(f"{self.path.stem}.damaged.pt"))
        (self.root / f".{self.stage}.launch").write_text(self.world.launch_id, encoding="utf-8")

    def _launch_id(self) -> str:
        """最近一次在这个目录里开始训练的，是哪一次 torchrun。"""
        with suppress(OSError, UnicodeDecodeError):
            return (self.root / f".{self.stage}.launch").read_text(encoding="utf-8")
        return "none"

    def _newest_good(self, existing: list[Path]) -> tuple[Path, dict[str, Any]]:
        """最新的好检查点；坏的说出来，改个名字留着。"""
        problems = []
        for path in existing:
            try:
                checkpoint = read(path)
            except Damaged as error:
                problems.append(str(error))
                continue
            if checkpoint["stage"] != self.stage:
                raise UserError(f"{path} 是 {checkpoint['stage']} 阶段的检查点；是不是改过名字？")
            if problems:
                self.damaged = True
                print(
                    f"（{'；'.join(problems)}；改用前一个 {path}，"
                    f"坏的改名为 {self.path.stem}.damaged.pt，留着）"
                )
            return path, checkpoint
        raise UserError(
            f"{'；'.join(problems)}；没有好的检查点，只能从头练：去掉 --resume，加上 --overwrite"
        )

    def _done(self, existing: list[Path]) -> str:
        """已有的训练走了几步；都读不出来，返回空的。一步都没走的，盖掉也不可惜，说「0 步」。"""
        if not existing:
            return "0 步"
        for path in existing:
            with suppress(UserError):
                checkpoint = read(path, mmap=True)
                step, total = checkpoint["progress"]["step"], checkpoint["max_steps"]
                # 最新的坏了，它也许走了很远：前一个哪怕一步没走，也不能悄悄盖掉。
                if step == 0 and path == existing[0]:
                    return IMPORTED if imported(checkpoint) else "0 步"
                return f"练了 {step} 步，共 {total} 步"
        return ""


def adopt(config: Config, origins: dict[str, str], source: Config, path: Path) -> None:
    """接着练：配置一律取自检查点，命令行上另外指定的除外，那些要看会不会影响结果。

    Args:
        config: 会被就地改写。
        source: 检查点里的配置。
    Raises:
        UserError: 改了不能改的，或者改了会影响结果的却没有加 --allow_changes。
    """
    local = {"resume", "overwrite", "allow_changes", "out_dir"}
    changed: dict[str, str] = {}
    # 没有改过 config.py 时，这些项是空着的，由预设决定。
    blank = PER_PRESET | {name for pair in STEPS_OR_EPOCHS for name in pair}
    edited = {n: getattr(config, n) for n in blank if origins[n] == "config.py"}
    given = {name for name, origin in origins.items() if origin == "命令行"}
    for pair in STEPS_OR_EPOCHS:  # 二选一的，命令行上给了一个，另一个就不作数
        if given & set(pair):
            given |= set(pair)
    for name in (f.name for f in fields(Config)):
        mine, theirs = getattr(config, name), getattr(source, name)
        if name in given - local and mine != theirs:
            changed[name] = f"{name}（{theirs} → {mine}）"
        elif name not in local:
            setattr(config, name, theirs)
            origins[name] = "检查点"
    ignored = [n for n, mine in edited.items() if mine not in (None, getattr(source, n))]
    if ignored:
        names = "、".join(sorted(ignored))
        print(f"（接着练时以检查点为准，config.py 里改过的 {names} 不算数；要改请写在命令行上）")
    rows = config.batch_size * config.grad_accum
    if rows != source.batch_size * source.grad_accum:
        raise UserError(
            f"接着练时每步的行数 batch_size × grad_accum 不能变：{path} 里是 "
            f"{source.batch_size} × {source.grad_accum}，现在是 "
            f"{config.batch_size} × {config.grad_accum}；可以一个减半、另一个加倍"
        )
    if fixed := [text for name, text in changed.items() if name in FIXED]:
        raise UserError(
            f"接着练时不能改 {'、'.join(fixed)}：参数或数据的次序会对不上 {path}；"
            f"请去掉这些设置，或用 --out_dir 换一个目录从头练"
        )
    rest = [text for name, text in changed.items() if name not in HARMLESS | ROUNDING]
    if rest and not config.allow_changes:
        raise UserError(
            f"改了 {'、'.join(rest)}，接着练的结果就与不中断的那一次不同；"
            f"真要这样，请加上 --allow_changes"
        )
    if rest:
        print(f"（改了 {'、'.join(rest)}：从这里起，结果与不中断的那一次不同）")
    if rounding := [text for name, text in changed.items() if name in ROUNDING]:
        print(f"（改了 {'、'.join(rounding)}：浮点数相加的次序不同，结果相近而不再逐位相同）")
    problems: list[str] = []
    check_values(config, problems, set())
    if problems:
        raise UserError("；".join(problems))


def restore(
    checkpoint: dict[str, Any], card: dict, optimizers, device, folder: Folder, max_steps: int
) -> Progress:
    """接着练：核对语料，装回优化器、scaler 与随机数的状态，返回上次走到了哪里。

    Raises:
        UserError: 语料变了，或者要的步数比走完的还少。
        Damaged: 里面的状态与这个程序对不上。
    """
    if data_identity(card) != {k: checkpoint["data"].get(k) for k in data_identity(card)}:
        raise UserError(
            f"语料与 {folder.path} 训练时的不同，接不上；请换回原来的语料，"
            f"或用 --out_dir 换一个目录从头练"
        )
    try:
        _restore_optimizers(checkpoint, optimizers)
        if checkpoint["scaler"]:  # 上次不是 fp16 的，没有什么可装
            device.scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        for i, state in enumerate(checkpoint["rng"]["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise Damaged(f"{folder.path} 里优化器或随机数的状态不对（{error}）") from error

    saved = checkpoint["progress"]
    progress = Progress(**{name: saved[name] for name in vars(Progress())})
    now = {"设备": device.describe(), **versions()}
    before = {"设备": checkpoint["device"], **checkpoint["versions"]}
    if differ := [f"{k} {before.get(k)} → {now[k]}" for k in now if before.get(k) != now[k]]:
        print(f"（与上次不同：{'；'.join(differ)}。结果相近，但不保证逐位相同）")
    if progress.step > max_steps:
        raise UserError(f"已经走完 {progress.step} 步，比现在要的 {max_steps} 步还多；请加大步数")
    print(f"接着 {folder.root} 里的检查点练：已经走完 {progress.step} 步，共 {max_steps} 步")
    return progress


def _restore_optimizers(checkpoint: dict[str, Any], optimizers) -> None:
    """装回优化器的状态；模型分开放的，状态也照样分开。"""
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {}
        for index, entry in saved["state"].items():
            p = parameters[index]
            state[index] = {
                name: shard_like(v, p) if v.shape == p.shape else v for name, v in entry.items()
            }
        # 学习率等取自现在的配置：--allow_changes 时会与存下的不同。
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


# ---------- 4. 什么时候存 ----------


class Saver:
    """按时间保存。存不下时训练照常进行，下次再试。

    Args:
        folder: 存在哪里；几个进程时，只有第 0 个写。
        every: 隔多少秒；None 表示一分钟，但写得慢的磁盘会自动少存，保存占用的时间不超过 2%。
        progress: 记下保存用去的时间。
    Fields:
        step: 存下的检查点走到了第几步；还没有存过，是 None。
    """

    def __init__(self, folder: Folder, every: float | None, progress: Progress):
        self.folder, self.every, self.progress = folder, every, progress
        self.step = progress.step or None
        self.last, self.cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """该存了没有；别的进程听第 0 个的。"""
        wait = max(60, 50 * self.cost) if self.every is None else self.every
        return self.folder.world.rank == 0 and time.monotonic() - self.last >= wait

    def save(
        self, make: Callable[[], dict[str, Any]], must: bool = False, leaving: bool = False
    ) -> None:
        """保存 make() 给出的检查点。

        Args:
            make: 收集状态；全体进程都要调用。
            must: 真时，存不下就抛出 UserError；否则只说一声。
            leaving: 存不存得下都要走了。
        """
        started = time.monotonic()
        checkpoint = make()
        if self.folder.world.rank == 0:
            try:
                write(self.folder.path, checkpoint)
                self.step = self.progress.step
            except UserError as error:
                if must and self.step is None:
                    raise
                kept = f"第 {self.step} 步的检查点还在"
                if must:
                    again = f"腾出空间后接着练：{self.folder.how_to_resume}"
                    raise UserError(f"{error}；{kept}，{again}") from error
                then = "" if leaving else "；训练接着进行，下次再存"
                tqdm.write(f"（{error}。{kept}{then}）", file=sys.stderr)
        self.last = time.monotonic()
        self.cost = self.last - started
        self.progress.saving_seconds += self.cost
