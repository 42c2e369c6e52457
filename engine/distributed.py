"""几个进程一起训练：各读各的行，梯度相加，结果与一个进程的相同。

    World        我是第几个进程，一共几个；几个数在各进程间求和
    Parallel     数据并行：DDP 每个进程一份完整的模型，FSDP 把模型也分开放
    gather       分开放的张量 -> 完整的一份；shard_like 反过来

进程由 torchrun 启动，身份写在环境变量里；不用 torchrun 时，就是第 0 个，一共一个。
全局的一大批有多少行只由配置决定，与进程数无关：进程多，只是每个进程分到的少，算得快。
"""

import inspect
import math
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import UserError
from dataset import send
from settings.say import say


class World:
    """全体进程：我的编号 rank，一共 size 个；在这台机器上是第 local_rank 个。"""

    def __init__(self):
        self.rank, self.size, self.local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        self.launched = "TORCHELASTIC_RUN_ID" in os.environ  # 由 torchrun 启动
        self.launch_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # 哪一次启动
        self.machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))  # 一共几台机器
        # torchrun --max-restarts：有进程死了，全体重新启动，这里数第几次。
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.device = torch.device("cpu")
        if self.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  话由第 0 个进程说

    def connect(self, device: torch.device, rows_per_step: int) -> None:
        """与别的进程接上：显卡之间用 NCCL，处理器之间用 gloo。

        Raises:
            UserError: 一大批的行不能平分。
        """
        self.device = device
        if rows_per_step % self.size:
            raise UserError(
                f"每步 {rows_per_step} 行（batch_size × grad_accum）不能平分给 {self.size} 个进程；"
                f"请让它是 {self.size} 的倍数，或换一个 --nproc_per_node"
            )
        if self.size > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            if self.machines > 1:  # 各数各的重启次数，不一定相同
                shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                if shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
                    say(
                        "（几台机器重启之后可能连不上；要用 --max-restarts，"
                        "请在每台的 torchrun 前面加上 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1）"
                    )
                dist.init_process_group(backend)
                return
            # torchrun 重启之后，各进程交换地址用的还是原来的那张表，会读到已经死了的进程的地址
            # （pytorch 的 issue 135712）；给每次启动的条目加上各自的前缀，就读不到旧的了。
            store, *_ = next(dist.rendezvous("env://", self.rank, self.size))
            store = dist.PrefixStore(f"restart_{self.restarts}", store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)

    def disconnect(self) -> None:
        """训练结束，断开。"""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, *values: float) -> Sequence[float]:
        """每个数在全体进程间求和；一个进程时原样返回。"""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def read(
        self, tensors: Sequence[Tensor], numbers: Sequence[float] = ()
    ) -> tuple[list[float], list[float], Sequence[float]]:
        """设备上的一串数取回来，只等设备一次，几个进程要对的数也一起对。

        Args:
            tensors: 设备上的张量，按次序接成一串。
            numbers: 处理器上的几个数。
        Returns:
            tensors 里我的每个数；它们在全体进程间的和；numbers 在全体进程间的和。
        """
        ours = torch.cat([x.flatten() for x in tensors])
        if self.size == 1:
            mine = ours.tolist()
            return mine, mine, numbers
        n = len(ours)
        ours = torch.cat([ours.double(), send(torch.tensor(numbers).double(), self.device)])
        total = ours.clone()
        dist.all_reduce(total)
        mine, total = torch.stack([ours, total]).tolist()
        return mine[:n], total[:n], total[n:]

    def gather(self, value: Any) -> list[Any]:
        """各进程的值，按编号排列。"""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, what: str, value: Any) -> None:
        """确认各进程的这个值相同。Raises UserError：不同，多半是多台机器没有共用一个目录。"""
        if len(set(values := self.gather(value))) > 1:
            raise UserError(
                f"各进程的{what}不同：{'、'.join(map(str, values))}；"
                f"多台机器一起训练时，out_dir 要放在共用的目录里，语料与代码也要相同"
            )

    def shards(self, kind: str) -> bool:
        """参数要不要分开放；kind 同 `Parallel` 的。"""
        return self.size > 1 and kind == "fsdp"

    def my_share(self, rows: list[int], batch_size: int) -> list[list[int]]:
        """一大批里归我的行，再分成每次前向的小批，每批至多 batch_size 行。"""
        mine = rows[self.rank :: self.size]
        n = math.ceil(len(mine) / batch_size)
        return [mine[i::n] for i in range(n)]


# ---------- 数据并行 ----------


class Parallel:
    """几个进程一起练：`loss` 反向时自动在各进程间求梯度的平均；一个进程时，就是原来的那个。

    Args:
        loss: 损失的模块，它的 `model` 各进程相同；FSDP 会把其中的参数换成分开放的，
            优化器要在这之后建。DDP 与 FSDP 从模块的 forward 进来，才知道何时该通信。
        kind: "ddp" 或 "fsdp"。
    """

    def __init__(self, loss: nn.Module, world: World, kind: str):
        self.loss, self.sharded = loss, world.shards(kind)
        if self.sharded:  # 一层一组：算到哪一层，才把哪一层凑齐
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard  # 导入要一秒，用到才导入

            mesh = init_device_mesh(world.device.type, (world.size,))
            for block in loss.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(loss, mesh=mesh)
        elif world.size > 1:
            known = inspect.signature(DistributedDataParallel).parameters
            names = ("forward_sync_buffers", "broadcast_buffers")  # 后来换了名字
            keep = next(name for name in names if name in known)
            self.loss = DistributedDataParallel(loss, **{keep: False})

    @contextmanager
    def accumulate(self, last: bool):
        """梯度累积时，DDP 只在最后一个小批之后通信；FSDP 每次都通信，不必存一份完整的梯度。"""
        if isinstance(self.loss, DistributedDataParallel) and not last:
            with self.loss.no_sync():
                yield
        else:
            yield

    @contextmanager
    def gathered(self):
        """不经过 loss 而直接用模型时（采样），先把不属于任何一层的参数凑齐。"""
        if self.sharded:
            self.loss.unshard()
        try:
            yield
        finally:
            if self.sharded:
                self.loss.reshard()


def gather(tensor: Tensor) -> Tensor:
    """分开放的张量凑成完整的一份，要全体进程一起调用；没有分开放的，原样返回。"""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole(state: Any) -> Any:
    """嵌套的字典与列表里，每个张量换成 CPU 上完整的一份；分开放的要全体进程一起调用。"""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [whole(value) for value in state]
    # 检查点只收连续的（unpickle.py）
    return gather(state).detach().cpu().contiguous() if isinstance(state, Tensor) else state


def is_sharded(tensor: Any) -> bool:
    """是不是 FSDP 分开放的张量（DTensor）。"""
    return hasattr(tensor, "full_tensor")


def shard_like(full: Tensor, parameter: Tensor) -> Tensor:
    """完整的张量照着参数的样子分开放；参数没有分开放时，原样返回。"""
    if not is_sharded(parameter):
        return full
    from torch.distributed.tensor import distribute_tensor

    # 每个进程手里都是同样的一份，各取各的，不必通信。
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(full, mesh, placements, src_data_rank=None)
