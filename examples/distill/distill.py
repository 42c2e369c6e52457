"""蒸馏：大模型教小模型，教的不是答案，而是它对每个词元的看法。

    python -m examples.distill.distill                                  wide 教 tiny
    python -m examples.distill.distill --teacher out/deep/pretrain.pt --alpha 0.5 --max_steps 2000

答案只说「下一个字是蛇」；老师还说「是虎也不奇怪，是的就太怪了」。学生每个位置都听见整张词表的概率，
比一个答案多得多（Distilling the Knowledge in a Neural Network，arXiv 1503.02531）：

    损失 = (1 - α) · 对答案的交叉熵 + α · τ² · KL(老师 ‖ 学生)

τ 是温度：老师与学生的打分都先除以它再做 softmax，小的概率便看得清些。除以 τ 使梯度缩到大约 1/τ²，
所以乘回来。α = 0 就是没有老师的训练，逐位相同。

数据、优化器、循环、检查点都是 pre_train.py 的，一样也没有另写，只换了怎样评判；它的参数这里都能用。

图例：B 批次，T 词元数，C 宽度，V 词表大小，R 学生算打分的列数（engine/shared_row.py）。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}examples{os.sep}")[0]

from settings.script import run_script

import shlex
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import pre_train
from config import Config, UserError, option
from dataset import IGNORE, Batch
from engine.checkpoint import load, summary
from engine.device import Device
from engine.distributed import World
from engine.run import Run
from engine.shared_row import SharedRow
from loss import Loss, cross_entropy
from model import Transformer
from settings.flags import help_text, parse_flags
from settings.resolve import Origin, load_config
from settings.say import say
from tokenizer import Tokenizer

PROGRAM = "examples.distill.distill"


@dataclass
class Options:
    """命令行参数；其余的归 pre_train.py。接着练时这三个要再写一遍，中断时印出的命令里都有。"""

    teacher: str = option("out/wide/pretrain.pt", "老师：预训练的检查点，大小不限")
    alpha: float = option(1.0, "α：听老师的占多少，其余的看答案；0 就是没有老师")
    temperature: float = option(1.0, "τ：温度；越高，老师那些小的概率越受重视")


# ---------- 1. 损失 ----------


def divergence(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """KL(老师 ‖ 学生) 之和，单位奈特：学生照自己的概率去猜老师的下一个词元，多吃惊多少。

    Args:
        student, teacher: 对数概率 (B, T, R)。
        targets: 答案 (B, T)；是 IGNORE 的位置不算。
    """
    each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)  # (B, T)
    return each.masked_fill(targets == IGNORE, 0.0).sum()


class Teacher:
    """老师，以及听老师的损失。老师只读题，自己不再学。

    Args:
        model: 老师的模型，已经在训练用的设备上。
        options: 用到 alpha 与 temperature。
    """

    def __init__(self, model: Transformer, options: Options):
        self.model = model.eval().requires_grad_(False)
        self.alpha, self.temperature = options.alpha, options.temperature
        self.table: tuple[Tensor, Tensor] | None = None  # 见 prepare

    @torch.no_grad()  # 不用 inference_mode：反向要用老师的概率，而那样得到的张量不让反向用
    def log_probs(
        self, batch: Batch, table: Tensor, bias: Tensor, shared: SharedRow | None
    ) -> Tensor:
        """老师在温度 τ 下的对数概率，每一列与学生的对应：(B, T, R)。"""
        x = self.model.hidden(batch.ids, batch.positions, batch.segments)  # (B, T, C)
        logits = F.linear(x, table).float() / self.temperature + bias
        if shared is not None:
            n = len(shared.rows) - 1  # 学生合用的那些，老师的概率加起来，归到最后一列
            merged = logits[..., n:].logsumexp(-1, keepdim=True)
            logits = torch.cat([logits[..., :n], merged], dim=-1)
        return logits.log_softmax(-1)

    @torch.no_grad()
    def prepare(self, shared: SharedRow | None) -> None:
        """备好 table：老师要算哪几行的打分 (N, C)，各加上多少 (N,)；一次训练里 shared 不变。

        学生有 n 个词元合用一行，给它们的概率各是 S / n；KL 里与学生有关的就只有

            - Σ t_v · ln(S / n) = - T · ln S + T · ln n        T = Σ t_v

        老师给这些词元多少概率，只有总和 T 要紧。老师没见过的词元在它那里也是同样的一行，
        k 个相同的只算一个，加上 ln k：老师学的若是同一份语料，列数便与学生的一样多。
        """
        table = self.model.embedding.weight
        if shared is None:
            self.table = table, table.new_zeros(len(table))
            return
        rows, counts = table[shared.members].unique(dim=0, return_counts=True)
        alone = shared.rows[:-1]
        bias = torch.cat([table.new_zeros(len(alone)), counts.to(table.dtype).log()])
        self.table = torch.cat([table[alone], rows]), bias


class TaughtLoss(Loss):
    """听老师的损失：训练时听，检验时不听，数便与没有老师的可以比。"""

    def __init__(self, model: Transformer, teacher: Teacher):
        super().__init__(model)
        self.teacher = teacher

    def judge(self, batch: Batch, logits: Tensor, targets: Tensor) -> Tensor:
        """学生的打分 (B, T, R) -> 两种损失合起来。"""
        hard = cross_entropy(logits, targets)
        if not self.training:
            return hard
        shared, alpha, tau = self.shared_row, self.teacher.alpha, self.teacher.temperature
        teacher = self.teacher.log_probs(batch, *self.teacher.table, shared)
        soft = logits.float() / tau
        if shared is not None:  # n 个相同的打分除以 τ 之后还是 n 个：ln n 不跟着除
            soft = soft + (1 - 1 / tau) * shared.bias
        kl = divergence(soft.log_softmax(-1), teacher, targets)
        return (1 - alpha) * hard + alpha * tau**2 * kl


# ---------- 2. 命令行与老师 ----------


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """把命令行分成两份：这个程序自己的参数，与交给 pre_train.py 的；值跟着它的参数走。"""
    mine: list[str] = []
    rest: list[str] = []
    into = rest
    for part in argv:
        if part.startswith("--"):
            name = part.removeprefix("--").partition("=")[0]
            into = mine if name in {f.name for f in fields(Options)} else rest
        into.append(part)
    return mine, rest


def read_options(argv: list[str]) -> Options:
    """解析这个程序自己的参数。Raises UserError：有不能用的值，一次列出。"""
    problems: list[str] = []
    options = Options(**parse_flags(Options, argv, problems))
    if not 0 <= options.alpha <= 1:
        problems.append(f"--alpha 要在 0 与 1 之间，得到的是 {options.alpha}")
    if not 0.1 <= options.temperature <= 100:
        problems.append(f"--temperature 要在 0.1 与 100 之间，得到的是 {options.temperature}")
    if problems:
        raise UserError("；".join(problems))
    return options


def load_teacher(path: Path, config: Config) -> Transformer:
    """读老师的检查点，核对它教得了这样的学生，介绍一句。

    Args:
        config: 学生的配置。
    Raises:
        UserError: 没有这个检查点，或者它教不了。
    """
    if not path.exists():
        raise UserError(
            f"找不到老师 {path}；请先练一个大的：python pre_train.py --preset wide，"
            f"或用 --teacher 指定已有的检查点"
        )
    model, theirs, checkpoint = load(path, Tokenizer())
    if checkpoint["stage"] != "pretrain":
        raise UserError(f"老师 {path} 已经微调过，写的是回答；请用它微调之前的 pretrain.pt")
    if theirs.vocab_size != config.vocab_size:
        raise UserError(
            f"老师 {path} 的词表大小是 {theirs.vocab_size}，学生的是 {config.vocab_size}，"
            f"打分对不上；请加上 --vocab_size {theirs.vocab_size}"
        )
    if theirs.max_len < config.seq_len:
        raise UserError(
            f"老师 {path} 至多看 {theirs.max_len} 个词元，一行却有 {config.seq_len} 个；"
            f"请加上 --seq_len {theirs.max_len}"
        )
    n_params = sum(p.numel() for p in model.parameters())
    say(f"老师：{path}（{n_params / 1e6:.1f} M 参数，{summary(checkpoint)}）")
    if (theirs.data, theirs.val_fraction) != (config.data, config.val_fraction):
        say("（老师学的语料与这次的不同：这次留出的它也许学过，检验损失会因此偏低）")
    return model


class Distillation(Run):
    """pre_train.py 的一次训练，只是损失换成听老师的。"""

    def __init__(self, argv: list[str], teacher: Teacher, program: str):
        super().__init__("pretrain", argv, program)
        self.teacher = teacher

    def parallel(self, loss: Loss):
        """同 `Run.parallel`，先把损失换掉；老师的打分表在第一步之前备好，编译器不必看。"""
        taught = super().parallel(TaughtLoss(loss.model, self.teacher))
        self.teacher.prepare(self.shared)
        return taught


def main(argv: list[str] | None = None) -> None:
    """请来老师，其余的交给 pre_train.py。"""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(argv):
        say(help_text(Options, f"用法：python -m {PROGRAM} [--参数 值 …]"))
        say("接着练（--resume）时，以上三个要再写一遍；中断时印出的命令里都有。")
        say("其余的参数与预训练的相同：python pre_train.py --help")
        return
    mine, rest = split_flags(argv)
    options = read_options(mine)
    # 学生默认是 tiny，不写进没有老师的那一个的目录；接着练时，大小听检查点的。
    argv = ["--out_dir=out/distill", *([] if "--resume" in rest else ["--preset=tiny"]), *rest]
    config, origins = load_config("pretrain", argv)  # 先看老师教得了教不了，再去碰输出的目录
    if origins["batch_size"] is Origin.TRIED:
        raise UserError("试 batch_size 时没有算上老师占的显存；请写一个数，例如 --batch_size 8")
    student = config
    if config.resume:
        with suppress(UserError):  # 没有的、坏了的，接着会说
            _, student, _ = load(Path(config.out_dir) / "pretrain.pt", Tokenizer())
    model = load_teacher(Path(options.teacher), student)
    teacher = Teacher(model.to(Device(config, World()).place), options)
    say(
        f"损失：{1 - options.alpha:g} · 交叉熵 + {options.alpha:g} · τ² · KL，"
        f"温度 τ = {options.temperature:g}"
    )
    program = shlex.join(["-m", PROGRAM, *(f"--{k}={v}" for k, v in vars(options).items())])
    pre_train.main(run=Distillation(argv, teacher, program))


if __name__ == "__main__":
    run_script(main)
