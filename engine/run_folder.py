"""TODO"""

import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
from tqdm import tqdm

from config import Config, UserError
from engine.checkpoint import (
    IMPORTED,
    NAMES,
    SCRIPTS,
    Damaged,
    Progress,
    config_of,
    imported,
    previous_of,
    read,
    write,
)
from engine.distributed import World
from settings.resolve import Origins, adopt
from tokenizer import Tokenizer


class RunFolder:
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
        self, stage: str, config: Config, origins: Origins, world: World, program: str = ""
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
        self, config: Config, origins: Origins, tokenizer: Tokenizer
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


class Saver:
    """按时间保存。存不下时训练照常进行，下次再试。

    Args:
        folder: 存在哪里；几个进程时，只有第 0 个写。
        every: 隔多少秒；None 表示一分钟，但写得慢的磁盘会自动少存，保存占用的时间不超过 2%。
        progress: 记下保存用去的时间。
    Fields:
        step: 存下的检查点走到了第几步；还没有存过，是 None。
    """

    def __init__(self, folder: RunFolder, every: float | None, progress: Progress):
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
