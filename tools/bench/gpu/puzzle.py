"""专家混合编译过的检验，为什么比不编译的高 0.06（docs/lab-notes.md「第一次上真的显卡」）。

同一份权重，同样的 160 行，三样各换一种：编译与否、留不留梯度，均衡损失的系数，
几篇拼成一行还是一篇一行。哪一样一换，损失就变，原因就在哪里。
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from config import Config
from dataset import IGNORE, Batch, pretrain_batches, row_order
from engine.checkpoint import load
from engine.device import Device, compile_if_possible
from experts import MixtureOfExperts
from loss import Loss
from model import Transformer
from optimizer import learning_rate
from tokenizer import Tokenizer
from tools.bench.gpu.stage import Stage, skipped
from tools.bench.measuring import Row
from tools.bench.ours import Ours
from tools.bench.trainer import compiled_or_error, corpus

N_ROWS, N_STEPS = 160, 600  # 训练时最后一次检验的行数；没有给检查点，练几步
SHAPE = {"n_experts": 8, "n_active": 2, "hidden_dim": 288}  # 那时的 tiny-moe：八位挑两位


def measure(stage: Stage) -> Iterator[Row]:
    """先要一份练过的权重，再逐样换。"""
    yield from stage.attempt("专家混合的检验", compare(stage))


def compare(stage: Stage) -> Iterator[Row]:
    """{不编译，编译，编译且留着梯度} × {系数 0.01，0} × {拼成一行，一篇一行}。"""
    rows = 8 if stage.rehearse else N_ROWS
    model, config, about, said = weights(stage, rows)
    yield Row(f"{about}，{rows} 行，训练的循环自己检验的", said, "奈特")
    device = Device(config)
    can_compile = device.compile
    batches = pretrain_batches(corpus(config), "val", config, Tokenizer())
    chosen = row_order(batches.n_rows, seed=0, epoch=0)[:rows].tolist()
    packings = {
        "拼成一行": Rows(batches, chosen),
        "一篇一行": Rows(batches, chosen, apart=True),
    }
    ways = {"不编译": (False, False), "编译": (True, False), "编译，留着梯度": (True, True)}
    first: dict[str, float] = {}
    for (how, (compiled, grad)), coef in itertools.product(ways.items(), (0.01, 0.0)):
        if compiled and not can_compile:
            yield skipped(f"{about}，{rows} 行，{how}，均衡系数 {coef:g}", "这里不编译")
            continue
        device.compile = compiled
        evaluate = evaluator(model, device, coef)
        for packing, found in packings.items():
            with compiled_or_error(device):
                loss = mean_loss(evaluate, found, config.batch_size, device, grad)
            what = f"{about}，{rows} 行，{how}，均衡系数 {coef:g}，{packing}"
            yield Row(f"{what}：{loss:.5f}", [loss], "奈特")
            away = (loss - first.setdefault(packing, loss)) * 1e5
            yield Row(f"{what}，比不编译的（系数 0.01）多", [away], "× 10⁻⁵ 奈特", "≈ 0")
        stage.clean()


def weights(stage: Stage, rows: int) -> tuple[Transformer, Config, str, list[float]]:
    """给了检查点就是它，否则当场练一个；连同它的来历，与当时的检验（在同样的 rows 行上）。"""
    if stage.checkpoint:
        model, config, _ = load(Path(stage.checkpoint), Tokenizer())
        config.data_dir, config.compile = stage.data_dir, stage.compile
        return model.to(Device(config).place), config, stage.checkpoint, []
    steps = 6 if stage.rehearse else N_STEPS
    made = Ours(stage.config("tiny-moe", **SHAPE))
    config = made.config
    with compiled_or_error(made.device):
        made.warm_up()
    for step in range(steps):
        made.step(learning_rate(step, steps, config.warmup, config.decay))
    said = made.loop.exam.measure(rows * config.seq_len)[0]
    made.leave()
    return made.model, config, f"练了 {steps} 步的", [said]


def evaluator(model: Transformer, device: Device, coef: float) -> Callable[[Batch], torch.Tensor]:
    """检验用的损失，编译与否由 device 定；均衡损失的系数换成 coef。"""
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.balance_coef = coef
    loss = Loss(model).eval()
    return compile_if_possible(loss.forward, device)


class Rows:
    """选好的几行；apart：一行里的每一篇各占一行，行尾补齐，其余与拼在一起的一样。"""

    def __init__(self, batches, chosen: list[int], apart: bool = False):
        whole = batches.get(chosen)
        self.batch = separated(whole) if apart else whole

    def parts(self, size: int) -> Iterator[Batch]:
        """size 行一批；最后一批用重复的行凑满，凑数的不算损失。"""
        n = len(self.batch.ids)
        for at in range(0, n, size):
            index = torch.arange(at, at + size)
            part = Batch(*(x[index.clamp(max=n - 1)] for x in self.batch))
            part.targets[index >= n] = IGNORE
            yield part


def separated(batch: Batch) -> Batch:
    """一行里的每一篇各占一行，从行首放起：位置与看得见的都与原来一样，要猜的词元也一个不差。"""
    T, found = batch.ids.size(1), []
    for row in range(len(batch.ids)):
        ids, targets, positions, segments = (x[row] for x in batch)
        for segment in segments[segments >= 0].unique().tolist():
            here = segments == segment
            n = int(here.sum())
            alone = [torch.zeros(T, dtype=torch.long), torch.full((T,), IGNORE),
                     torch.zeros(T, dtype=torch.long), torch.full((T,), -1)]  # fmt: skip
            for to, x in zip(alone, (ids, targets, positions, segments), strict=True):
                to[:n] = x[here]
            found.append(alone)
    return Batch(*map(torch.stack, zip(*found, strict=True)))


def mean_loss(evaluate, found: Rows, size: int, device: Device, grad: bool) -> float:
    """每个目标的平均损失，奈特。"""
    total, count = 0.0, 0
    for part in found.parts(size):
        count += int((part.targets != IGNORE).sum())
        with torch.set_grad_enabled(grad), device.autocast():
            total += evaluate(part.to(device.place)).item()
    return total / count
