"""一次训练的输出目录：上锁，不盖掉别人的，找到该接着练的那一个。

目录里：pretrain.pt 是最新的检查点，pretrain.previous.pt 是它之前的一个；语料读了好几遍、后来
又变差了的，pretrain.best.pt 是留出的文字上最好的。出过事的话，还会有
pretrain.damaged.pt（坏了的）与 pretrain.diverged.pt（发散时的状态），留着供查看。
"""

import os
import shlex
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock

from config import Config, UserError
from engine.checkpoint import (
    NAMES,
    SCRIPTS,
    Damaged,
    config_of,
    imported,
    previous_of,
    read,
)
from engine.distributed import World
from engine.progress import out_of
from settings.files import write_text
from settings.places import USED, as_flags, ask, must_ask, outside
from settings.resolve import Origins
from settings.say import say
from settings.stored import adopt
from tokenizer import Tokenizer


def check_lock(path: Path) -> None:
    """锁是一个空文件，打开时会截成空的：若是链接，截断的就是它指着的文件。

    Raises:
        UserError: 是符号链接，或者是别的文件的另一个名字。
    """
    if not os.path.lexists(path):
        return
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or (found.st_nlink > 1 and found.st_size):
        raise UserError(f"{path} 是链接，不是训练的锁；请看看它指着什么，再把它挪走")


class RunFolder:
    """一次训练的输出目录：同时只有一个程序写，已有的训练不会悄悄被盖掉。

    Args:
        stage: "pretrain" 或 "sft"。
        config, origins: `load_config` 的结果。
        world: 多个进程时，只有第 0 个上锁、改名。
        program: 接着练时写在 python 后面的；默认是这个阶段的脚本。
    Fields:
        script: 怎样启动这个程序，例如 python pre_train.py。
        writes: 这个进程写不写：几个进程时只有第 0 个写，`--plan` 谁也不写，锁也不上。
    Raises:
        UserError: 有别的训练正在写这个目录，或者目录写不了。
    """

    def __init__(
        self, stage: str, config: Config, origins: Origins, world: World, program: str = ""
    ):
        self.stage, self.world, self.config = stage, world, config
        self.root = Path(config.out_dir)
        self.path, self.best = self.root / f"{stage}.pt", self.root / f"{stage}.best.pt"
        self.damaged = False
        self.writes = world.rank == 0 and not config.plan
        program = program or SCRIPTS[stage]
        command = f"python {program}"
        if world.launched:
            how = "…" if world.machines > 1 else f"--nproc_per_node={world.size}"
            command = f"torchrun {how} {program}"
        self.script = command
        self.command = f"{command} --out_dir {shlex.quote(config.out_dir)} --resume"
        if self.writes:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                check_lock(self.root / ".lock")
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

    @property
    def how_to_resume(self) -> str:
        """接着练的命令，照抄就行：项目之外的路径，写在里面才算数（settings/places.py）。"""
        return self.resume_without()

    def resume_without(self, left_out: str = "") -> str:
        """同 `how_to_resume`，但不写 left_out 这个路径。"""
        names = (n for n in USED[self.stage] if n != left_out)
        return self.command + as_flags(
            self.config, (n for n in names if outside(getattr(self.config, n)))
        )

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
            if not (config.overwrite or config.plan):
                self._keep([*existing, *[self.best] * self.best.exists()], config.init_from)
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
                f"以它为起点微调：python sft_train.py --init_from {shlex.quote(str(path))}"
                f"（继续预训练是 pre_train.py），并用 --out_dir 换一个目录"
            )
        adopt(config, origins, config_of(checkpoint, path, tokenizer), path)
        ask(config, must_ask(config, origins, self.stage), path, self.how_to_resume)
        return checkpoint

    def settle(self, fresh: bool) -> None:
        """真要开始了：从头练，就删掉原有的；接着练，就把坏的挪开，免得下次保存时顶替了好的。"""
        if not self.writes:
            return
        if fresh:
            for path in (self.path, previous_of(self.path), self.best):
                path.unlink(missing_ok=True)
        elif self.damaged:
            os.replace(self.path, self.path.with_name(f"{self.path.stem}.damaged.pt"))
        write_text(self.root / f".{self.stage}.launch", self.world.launch_id)

    def close(self) -> None:
        """松开锁；忘了也不要紧，进程一死系统会松。"""
        if self.writes:
            self.lock.release()

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
                kept = f"，坏的改名为 {self.path.stem}.damaged.pt，留着" if self.writes else ""
                say(f"（{'；'.join(problems)}；改用前一个 {path}{kept}）")
            return path, checkpoint
        raise UserError(
            f"{'；'.join(problems)}；没有好的检查点，只能从头练：去掉 --resume，加上 --overwrite"
        )

    def _keep(self, existing: list[Path], start: str | None) -> None:
        """已有的训练不许悄悄盖掉；一步都没走的，盖掉也不可惜。

        Args:
            existing: 已有的，最新的在前。
            start: 这一次的起点；也许正是已有的。
        Raises:
            UserError: 已经有了，说清走了几步，接下来可以怎样。
        """
        if start and any(path.resolve() == Path(start).resolve() for path in existing):
            raise UserError(
                f"起点 {start} 就在要写的目录 {self.root} 里，练起来会盖掉它；"
                f"请用 --out_dir 换一个目录，例如 --out_dir {shlex.quote(f'{self.root}-more')}"
            )
        problems = []
        for path in existing:
            try:
                checkpoint = read(path, mmap=True)
            except UserError as error:
                problems.append(str(error))
                continue
            step, total = checkpoint["progress"]["step"], checkpoint["max_steps"]
            # 最新的坏了，它也许走了很远：前一个哪怕一步没走，也不能悄悄盖掉。
            newest = path == existing[0]
            if step == 0 and newest and not imported(checkpoint):
                return
            done, again = f"练了 {step} 步{out_of(total)}", f"接着练：{self.how_to_resume}；"
            if step == 0 and newest:
                done, again = "是导入的", ""
            raise UserError(
                f"{self.path} 已经有了（{done}）；{again}"
                f"不要它了：加上 --overwrite；两个都要：用 --out_dir 换一个目录"
            )
        if existing:
            raise UserError(
                f"{'；'.join(problems)}：已经有了，但读不出来；"
                f"不要了：加上 --overwrite；要留着：用 --out_dir 换一个目录"
            )
