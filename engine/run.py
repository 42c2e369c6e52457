"""一次训练里，循环之外的一切：配置、设备、输出目录、检查点、记录、检验、叫停。

与 Trainer 相反：藏起来的是循环以外的，循环自己在 pre_train.py 与 sft_train.py 里。
这里不算损失，也不更新参数；一步之内的几个动作在 stepper.py。
"""

from settings.script import is_out_of_memory

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import MissingData, UserError
from engine import checks, corpora, plan, words
from engine.checkpoint import build_model, capture, load, restore, versions
from engine.deadline import Deadline
from engine.device import Device
from engine.distributed import World
from engine.guard import diverged, skip_step, too_many_skipped
from engine.memory import auto_batch, out_of_memory
from engine.metrics import Metrics
from engine.progress import Bar, Pace, Progress, RandomNumbers
from engine.run_folder import RunFolder
from engine.saver import Saver
from engine.shared_row import SharedRow
from engine.stepper import Stepper
from engine.stop import Stop
from model import Transformer
from settings.defaults import eval_interval, fewer_steps
from settings.lengths import make_room
from settings.resolve import Origin, load_config, save_config
from settings.say import say, say_above_bar
from settings.stored import inherit
from tokenizer import Tokenizer


class Run(Stepper):
    """一次训练：`with Run("pretrain") as run:`，里面按循环的次序用它的动作。

    Args:
        stage: "pretrain" 或 "sft"。
        argv: 命令行参数；不给就取自命令行。
        program: 接着练时写在 python 后面的；默认是这个阶段的脚本。
    Raises:
        UserError: 参数有问题，目录里已有训练，或者检查点不能用。
    """

    def __init__(self, stage: str, argv: list[str] | None = None, program: str = ""):
        self.began = time.monotonic()
        config, origins = load_config(stage, sys.argv[1:] if argv is None else argv)
        world, tokenizer = World(), Tokenizer()
        self.origins, self.stop, self.deadline = origins, None, None
        self.folder = RunFolder(stage, config, origins, world, program)
        self.checkpoint = self.folder.begin(config, origins, tokenizer)  # --resume：上次的状态
        self.start, start_path = self.checkpoint, self.folder.path
        if config.init_from and not self.checkpoint:  # 微调，或者增量预训练
            start_path = Path(config.init_from)
            _, source, self.start = load(start_path, tokenizer)
            inherit(config, origins, source, config.init_from, stage, self.start["stage"])
        self.start_path, self.resumed = start_path, self.checkpoint is not None
        super().__init__(stage, config, Device(config, world), tokenizer)
        self.progress, self.rng = Progress(), RandomNumbers()
        self.old_card: dict | None = None
        say(words.introduction(self))

    def __exit__(self, kind, error, trace) -> None:
        """离开：内存不够、数据搬走了，换成说得全的一句；断开别的进程，松开目录。"""
        if error is None:  # 出了错的直接走：别的进程也许正等着，断开反而会卡住
            self.world.disconnect()
        self.folder.close()
        if self.stop:
            self.stop.close()
        ran_out = isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error)
        if ran_out and self._model is not None:
            raise out_of_memory(self.config, self._model, self.rows_at_once) from error
        if isinstance(error, MissingData) and self.resumed:
            raise corpora.moved(self, error) from error

    # ---------- 1. 循环之前 ----------

    def make_room(self, starts) -> None:
        """微调的一行，要放得下长的对话；starts 是每段的起点，末尾多一个总长。"""
        if changed := make_room(self.config, self.origins, starts[1:] - starts[:-1] - 1):
            say(f"（{changed}）")

    def old_corpus(self, read):
        """增量预训练时，学过的那一份语料（词元文件）；没有、读不了是 None。"""
        old = corpora.read_old(self, read)
        self.old_card = old and old.card
        return old

    def plan(self, train, card: dict) -> None:
        """同 `Stepper.plan`；步数是预设的，数据又太少，就少走几步。hours 从这里算起。"""
        super().plan(train, card)
        if self.config.hours or self.config.until:
            self.deadline = Deadline(self.config, time.monotonic(), self.checkpoint)
            self.n_steps = self.deadline.n_steps
            return
        name = {"pretrain": "max_steps", "sft": "sft_max_steps"}[self.stage]
        steps = fewer_steps(self.config, self.n_steps, train.n_rows)
        if self.origins[name] is Origin.PRESET and steps < self.n_steps:
            say(words.few_data(self, self.n_steps, steps))
            self.n_steps = steps
            setattr(self.config, name, steps)  # 检查点里也是它：接着练时步数相同

    def model(self) -> Transformer:
        """刚出生的模型，或者起点里的：接着练的是上次的，微调与增量预训练的是学过的。"""
        if self.start is None:
            torch.manual_seed(self.config.seed)
            model = Transformer(self.config)
        else:
            model = build_model(self.config, self.start, self.start_path)
            torch.manual_seed(self.config.seed)
        self.start = None  # 用完就放手，不占内存
        return model.to(self.device.place)

    def find_shared_row(self) -> SharedRow | None:
        """接着练时，合用的与上次的相同。"""
        if self.checkpoint:
            return SharedRow.from_state_dict(self.checkpoint["shared_row"], self.device.place)
        return super().find_shared_row()

    def fit(self, loss: nn.Module) -> None:
        """``--batch_size auto``：试出一次前向放得下几行。"""
        if self.origins["batch_size"] is Origin.TRIED:
            auto_batch(self.config, loss, self.device, self.train)

    def optimizer(self, build, lr: float):
        """造优化器；接着练时，各部分取回上次的状态。"""
        optimizer = super().optimizer(build, lr)
        self.highest_lr = lr
        if self.checkpoint:
            self._resume()
        self.parts = {
            "model": self._model, "optimizers": optimizer, "scaler": self.device.scaler,
            "shared_row": self.shared, "progress": self.progress, "rng": self.rng,
        }  # fmt: skip
        return optimizer

    def _resume(self) -> None:
        """核对语料，取回优化器、scaler、随机数与走到了哪里。

        Raises:
            UserError: 语料变了，或者要的步数比走完的还少。
        """
        checkpoint, folder = self.checkpoint, self.folder
        corpora.check(self)
        parts = {"optimizers": self._optimizer, "scaler": self.device.scaler, "rng": self.rng,
                 "progress": self.progress}  # fmt: skip
        restore(checkpoint, parts, folder.path)
        now = {"设备": self.device.describe(), **versions()}
        before = {"设备": checkpoint["device"], **checkpoint["versions"]}
        if differ := [f"{k} {before.get(k)} → {now[k]}" for k in now if before.get(k) != now[k]]:
            say(f"（与上次不同：{'；'.join(differ)}。结果相近，但不保证逐位相同）")
        step = self.first_step = self.progress.step
        if step > self.n_steps:
            raise UserError(f"已经走完 {step} 步，比现在要的 {self.n_steps} 步还多；请加大步数")
        total = self.deadline or f"共 {self.n_steps} 步"
        say(f"接着 {folder.root} 里的检查点练：已经走完 {step} 步，{total}")
        self.checkpoint = None  # 用完就放手，不占内存

    def begin(self) -> None:
        """真要开始了：各进程对一对，旧的训练盖掉，记录备好，开始留心信号；从头练的，先存一次。"""
        say(words.scale(self))
        self.eval_every = eval_interval(self.config, self.n_steps)
        identity = f"{self.progress.step} {self.card['train_sha256'][:8]}"
        self.world.agree("起点（步数与语料）", identity)
        self.folder.settle(fresh=not self.resumed)
        records = self.folder.root / self.stage
        if self.folder.writes:
            save_config(self.config, records / "config.json")
        self.metrics = Metrics(records, self.folder.writes, self.progress)
        self.saver = Saver(self.folder, self.config.save_every, self.progress)
        self.stop = Stop(self.world)
        say("第一步之前要编译，约一分钟……" if self.device.compile else "开始训练……")
        if self.newborn:
            self.saver.save(self.state, must=True)  # 现在就知道存不存得下，不必等到一小时以后

    @property
    def n_params(self) -> int:
        """参数的个数。"""
        return sum(p.numel() for p in self._model.parameters())

    @property
    def newborn(self) -> bool:
        """一步还没有走过。"""
        return self.progress.step == 0

    # ---------- 2. 两步之间 ----------

    def steps(self, exam) -> Iterator[int]:
        """给出步数（从 0 数）；检验、记录、保存、叫停都在两步之间，从不在一步之中。"""
        self.pace = Pace.of(self, exam)
        if self.config.plan:
            yield from plan.rehearse(self, exam)
            return
        self.bar = Bar(
            self.pace, total=self.n_steps, initial=self.first_step, unit="步",
            dynamic_ncols=True, disable=self.world.rank > 0,
        )  # fmt: skip
        step = self.first_step
        while step < self.n_steps:
            started, self.notes = time.monotonic(), {}
            yield step
            self.between_steps()
            self._replan(int(self.votes[2]))
            seconds = time.monotonic() - started
            if self.pace.stepped(seconds):
                say_above_bar(words.remaining(self))
            self._record(step, self.n_targets / seconds, exam)
            step += 1
            self._save_or_leave(last=step == self.n_steps)
        self.bar.close()
        self.metrics.draw()
        checks.settle(self, exam)
        say(words.farewell(self))

    def ask(self) -> tuple[float, ...]:
        """有谁收到了叫停的信号，该不该存了；练到几点的，照第 0 个进程的钟，一共走几步。"""
        planned = 0
        if self.deadline and self.world.rank == 0:
            planned = self.deadline.plan(self.pace, self.n_steps)
        return self.stop.signal > 0, self.saver.due(), planned

    def _replan(self, planned: int) -> None:
        """练到几点的，一共走几步也许要改；学习率由它算出，所以记下来。"""
        if self.deadline and planned != self.n_steps:
            self.n_steps = self.pace.n_steps = self.bar.total = self.notes["n_steps"] = planned
            self.eval_every = self.pace.eval_every = eval_interval(self.config, planned)

    @property
    def rows_at_once(self) -> int:
        """一次前向的行数。"""
        return len(self.micro_rows[0]) if self.micro_rows else self.config.batch_size

    def finite(self, losses, norm) -> bool:
        """同 `Stepper.finite`；不是有限的数，就记下是哪些数据。"""
        if super().finite(losses, norm):
            self.progress.skipped_in_a_row = 0
            return True
        epoch = self.progress.step * self.rows_per_step // self.train.n_rows
        self.notes |= skip_step(
            self.progress, self.step_loss, self.micro_rows, self.losses, epoch, self.device
        )
        return False

    def _record(self, step: int, speed: float, exam) -> None:
        """记一行；每隔一段，检验一次。"""
        progress, last = self.progress, step + 1 == self.n_steps
        progress.step, progress.tokens = step + 1, progress.tokens + int(self.n_targets)
        unit = {"pretrain": "词元", "sft": "个回答的词元"}[self.stage]
        self.bar.update()
        self.bar.set_postfix_str(f"损失 {self.step_loss:.3f}，{speed:.0f} {unit}/秒")
        row = {
            "step": step + 1, "tokens": progress.tokens, "train_loss": self.step_loss,
            "lr": self._optimizer.lr, "grad_norm": self.norm, "tokens_per_second": speed,
            **self.notes,
        }  # fmt: skip
        if last or (step + 1) % self.eval_every == 0:
            started, most = time.monotonic(), self.config.eval_tokens * (10 if last else 1)
            row |= checks.check(self, exam, most, everything=last)
            self.pace.checked(time.monotonic() - started)
        self.metrics.write(**row)
        if "val_loss" in row and not last:
            checks.keep_best(self)
            checks.warn(self)

    def _save_or_leave(self, last: bool) -> None:
        """该停的停，该存的存。Raises UserError：发散了。"""
        stopping, saving, _ = self.votes
        if too_many_skipped(self.progress, self.device.scaler):
            raise diverged(self.state(), self.folder, self.progress, "--lr", self.highest_lr)
        if last or saving or stopping:
            self.saver.save(self.state, must=last, leaving=stopping)
        if stopping and not last:
            self.bar.close()
            self.stop.leave(self.saver, self.progress, self.n_steps)
        self.stop.watch()

    def first_check(self, exam, max_tokens: int) -> float:
        """一步还没有走时的检验，也写进记录；返回损失。"""
        result = checks.check(self, exam, max_tokens)
        self.metrics.write(step=0, tokens=0, **result)
        return result["val_loss"]

    def state(self) -> dict[str, Any]:
        """此刻的全部状态：存进检查点，接着练的结果便与不中断的逐位相同。"""
        self.metrics.sync()
        self.progress.seconds = self.metrics.seconds()
        epoch, row = divmod(self.progress.step * self.rows_per_step, self.train.n_rows)
        return capture(
            self.parts, stage=self.stage, config=self.config, tokenizer=self.tokenizer,
            device=self.device.describe(), max_steps=self.n_steps,
            data=corpora.identity(self.card, self.old_card) | {"epoch": epoch, "row": row},
        )  # fmt: skip
