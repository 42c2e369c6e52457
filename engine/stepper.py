"""一步训练的几个动作：取一批、反向、截短、看看是不是有限的数、更新。

动作的先后写在 pre_train.py 与 sft_train.py 的循环里；这里只是每个动作怎样做：几个进程怎样分工，
fp16 怎样放大，专家怎样均衡。`run.py` 的 `Run` 在此之上加了检查点、记录与叫停；实验台与测速
用不着那些，直接用这一个。
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from config import Config
from dataset import IGNORE, Batch, Replay, rows_of_step
from engine.device import Device, compile_if_possible
from engine.distributed import Parallel, gather, shard_like
from engine.expert_load import ExpertLoad, rebalance, take_tally
from engine.shared_row import SharedRow, tie_unused_rows
from settings.defaults import total_steps
from tokenizer import Tokenizer


class Prepared(NamedTuple):
    """备好了数据的一步。"""

    step: int
    micro_rows: list[list[int]]  # 各小批用哪几行
    batches: list[Batch]  # 已经在设备上，或者正在送去
    n_targets: int  # 这一步有多少目标


class Stepper:
    """一步训练的几个动作，按循环里的次序。

    Args:
        stage: "pretrain" 或 "sft"。
        config: 一次前向的行数、累积几次、种子等。
        device: 在哪里练。
    Fields:
        n_steps: 一共走几步。
        n_targets: 这一步的大批里有多少目标，各进程的合起来。
        newborn: 一步还没有走过，开始之前要先检验一次。
    """

    newborn = False

    def __init__(self, stage: str, config: Config, device: Device, tokenizer: Tokenizer):
        self.stage, self.config, self.tokenizer = stage, config, tokenizer
        self.device, self.world = device, device.world
        self.first_step = 0  # 从第几步走起
        self.swap: Callable[[int, int], int] | None = None  # 回放旧语料的，换上哪一行
        self.notes: dict = {}  # 这一步要记下的别的事
        self._model: nn.Module | None = None
        self.micro_rows: list[list[int]] = []  # 这一步的各小批用哪几行
        self.n_steps = 0
        self._step = 0  # 正在走第几步
        self._next: Prepared | None = None  # 下一步的数据
        self._load: ExpertLoad | None = None  # 这一步里专家的负载

    @property
    def waits(self) -> bool:
        """同一台机器上不是第 0 个进程：备数据之类的事，等它做好。"""
        return self.world.local_rank > 0

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    @property
    def from_scratch(self) -> bool:
        """模型刚出生，还没有学过别的：不是微调，也不是增量预训练。"""
        return self.stage == "pretrain" and self.config.replay_data is None

    # ---------- 1. 循环之前 ----------

    def make_room(self, starts) -> None:
        """微调的一行要不要加长：`Run` 才改，这里照配置的。"""

    def old_corpus(self, read: Callable):
        """增量预训练与微调时，学过的那一份语料：`Run` 才有。"""

    def plan(self, train, card: dict) -> None:
        """训练的一批批有了：定下走几步，与别的进程接上。

        Args:
            train: `pretrain_batches` 给出的、`Replay` 或 `SFTBatches`。
            card: 词元文件的卡片。
        """
        self.train, self.card = train, card
        self.swap = train.swap if isinstance(train, Replay) else None
        self.rows_per_step = self.config.batch_size * self.config.grad_accum
        self.n_steps = total_steps(self.config, self.stage, train.n_rows, card["train_tokens"])
        self.world.connect(self.device.place, self.rows_per_step)

    def parallel(self, loss: nn.Module) -> nn.Module:
        """损失换成能在这些设备上练的：没用到的词元合用一行，编译，几个进程并行。"""
        self._model = loss.model
        shared = self.find_shared_row()
        sharded = self.world.shards(self.config.parallel)
        self.shared = loss.shared_row = None if sharded else shared
        if self.device.compile:
            loss.forward = compile_if_possible(loss.forward, self.device)
        self.fit(loss)
        self._parallel = Parallel(loss, self.world, self.config.parallel)
        return self._parallel.loss

    def find_shared_row(self) -> SharedRow | None:
        """没用到的词元，哪些合用一行。"""
        return tie_unused_rows(self._model, self.train.tokens, newborn=self.from_scratch)

    def fit(self, loss: nn.Module) -> None:
        """并行之前的最后一刻，要练的都齐了：这里什么也不做。"""

    def optimizer(self, build: Callable, lr: float):
        """照 `build`（optimizer.py 的 build_optimizer）造优化器：精度与分开放的办法由设备决定。"""
        sharding = {"gather": gather, "scatter": shard_like} if self._parallel.sharded else {}
        self._optimizer = build(self._model, self.config, lr, self.device.dtype, **sharding)
        if self.shared:
            table = self._model.embedding.weight
            self.shared.follow(self._optimizer.part_of(table), table)
        return self._optimizer

    def begin(self) -> None:
        """一切都造好了，真要开始：这里没有什么要做的。"""

    # ---------- 2. 一步 ----------

    def steps(self, exam=None) -> Iterator[int]:
        """一步一步地走，给出步数（从 0 数）。"""
        for step in range(self.first_step, self.n_steps):
            yield step
            self.between_steps()

    def batches(self, step: int) -> Iterator[Batch]:
        """这一步的大批里归这个进程的，分成几小批，已经在设备上。"""
        if self._next is None or self._next.step != step:  # 头一步；以后的，上一步就备好了
            first = self._prepare(step)
            (n_targets,) = self.world.sum(first.n_targets)
            self._next = first._replace(n_targets=n_targets)
        self._step, self.micro_rows, batches, self.n_targets = self._next
        self._next = None
        for i, batch in enumerate(batches, start=1):
            with self._parallel.accumulate(last=i == len(batches)):
                yield batch

    def _prepare(self, step: int) -> Prepared:
        """取出第 step 步里归这个进程的数据，送往设备，不等它送到；目标也只数这些。"""
        n_rows, seed = self.train.n_rows, self.config.seed
        rows = rows_of_step(step, self.rows_per_step, n_rows, seed, self.swap)
        micro_rows = self.world.my_share(rows, self.config.batch_size)
        batches = [self.train.get(some) for some in micro_rows]
        n_targets = sum(int((b.targets != IGNORE).sum()) for b in batches)
        return Prepared(step, micro_rows, [b.to(self.device.place) for b in batches], n_targets)

    def backward(self, part: Tensor) -> None:
        """反向：梯度累积在各参数上。fp16 的先放大；DDP 求的是平均，要的是和，所以乘上进程数。"""
        self.device.scaler.scale(part * self.world.size).backward()

    def clip(self, optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        """梯度太长就截短，返回截短之前的长度。"""
        self.device.scaler.unscale_(optimizer)
        return clip_grad_norm_(self._model.parameters(), limit)

    def finite(self, losses: Sequence[Tensor], norm: Tensor) -> bool:
        """损失与梯度是不是都是有限的数：不是的话，这一步不能更新。

        一步里只在这里等设备一次。反向与截短都已经发给它了，趁它在算，先备好下一步的数据；
        然后要看的几个数一起取回来，几个进程要对的数也一起对。

        Args:
            losses: 各小批的损失，加起来是这个进程的一份。
            norm: `clip` 返回的长度。
        """
        last = self._step + 1 >= self.n_steps
        following = None if last else self._prepare(self._step + 1)
        tally = take_tally(self._model)
        asked = (following.n_targets if following else 0, *self.ask())
        mine, total, (n_targets, *self.votes) = self.world.read(
            [*losses, gather(norm), *([] if tally is None else [tally])], asked
        )
        self._next = following and following._replace(n_targets=int(n_targets))
        n = len(losses)
        self.losses, self.norm, self.step_loss = mine[:n], mine[n], sum(total[:n])
        self._load = None if tally is None else ExpertLoad.of(total[n + 1 :], tally.shape)
        return math.isfinite(self.step_loss) and math.isfinite(self.norm)

    def ask(self) -> tuple[float, ...]:
        """趁着各进程对数，一起问的几件事；总和在 `votes` 里。"""
        return ()

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """更新参数。梯度已经缩回原来的大小，也看过都是有限的数，不必再问 scaler：问它又要等。"""
        optimizer.step()

    def between_steps(self) -> None:
        """一步走完：fp16 的倍数跟着调整；专家混合的负载交给下一步。"""
        self.device.scaler.update()
        if self._load:
            rebalance(self._model, self._load)
            self.notes |= self._load.row()
