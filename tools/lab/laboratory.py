"""实验台：tools/lab/try_*.py 共用的几件事，每个实验的故事在它自己的文件里。

    LabOptions     每个实验都有的命令行参数；DataOptions 是用到语料的
    open_lab       读命令行，说要做什么，摆好实验台
    Laboratory     同样的语料、次序、步数与学习率，训练任何一种改装过的模型

改装都在外面做：先照常造一个 Transformer，再换掉其中的零件；model.py 一个字也不改。
一律用 fp32、不编译：模型小，快慢差不多，换一台机器结果也相近。
"""

import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import pre_train
from config import Config, UserError, option
from corpus.token_file import tokenize_corpus
from dataset import SIDES, pretrain_batches
from engine.device import Device
from engine.expert_load import ExpertLoad, expert_loads
from engine.shared_row import tie_unused_rows
from engine.stepper import Stepper
from generate import Sampling, check_characters, make_speaker
from loss import Loss, evaluate
from model import Transformer
from settings.flags import read_options
from settings.resolve import load_config
from settings.say import say
from tokenizer import Tokenizer

# ---------- 1. 命令行 ----------


@dataclass
class LabOptions:
    """每个实验都有的命令行参数；其中的数都须是正数。"""

    out: str = option("out/lab", "图写在哪个目录")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        numbers = {n: v for n, v in vars(self).items() if type(v) in (int, float)}
        return [
            f"--{name} 必须是正数，得到的是 {value}"
            for name, value in numbers.items()
            if not 0 < value < math.inf
        ]


@dataclass
class DataOptions(LabOptions):
    """用到语料的实验，另有这些。"""

    data_dir: str = option("data", "词元文件放在哪里")
    device: str = option("auto", "设备", choices=("auto", "cuda", "mps", "cpu"))
    eval_tokens: int = option(32768, "检验时最多用多少词元", "词元")

    def tiny(self, **changes) -> Config:
        """tiny 预设，内置语料，fp32，不编译；changes 是要改的字段。"""
        fixed = {"preset": "tiny", "data": "builtin", "dtype": "float32", "compile": False}
        names = ("data_dir", "device", "eval_tokens")
        given = {name: getattr(self, name) for name in names}
        flags = [f"--{name}={value}" for name, value in (fixed | given | changes).items()]
        return load_config("pretrain", flags)[0]


def numbers_in(text: str) -> list[float]:
    """用逗号隔开的几个数，例如 0.01,0.02；写得不对是空的。"""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


def read_lab_options(cls: type, program: str, argv: list[str] | None):
    """解析命令行；--help 时打印说明并结束。

    Args:
        cls: LabOptions 的子类。
        program: 程序名，例如 "try_residual"。
        argv: 命令行参数；None 是真的命令行。
    Raises:
        UserError: 有看不懂的参数或不能用的值，一次列出。
    """
    usage = f"用法：python -m tools.lab.{program} [--参数 值 …]"
    options = read_options(cls, sys.argv[1:] if argv is None else argv, usage)
    Path(options.out).mkdir(parents=True, exist_ok=True)  # 写不了，现在就知道，不必等到练完
    return options


def open_lab(cls: type, program: str, argv: list[str] | None):
    """读命令行，说要做什么，摆好实验台；返回 (options, Laboratory)。

    Args:
        cls: DataOptions 的子类；`base()` 给出实验台的配置，`plan()` 用一句话说要做什么、多久。
        program, argv: 同上。
    """
    options = read_lab_options(cls, program, argv)
    config = options.base()
    say(options.plan())
    return options, Laboratory(config)


def prompt_ids(tokenizer: Tokenizer, prompt: str, as_question: bool, max_len: int) -> list[int]:
    """一句话的编号，后面就轮到模型写：当作提问，或当作一篇文档的开头。

    Raises:
        UserError: 是空的，或者长过模型的上下文。
    """
    check_characters(prompt, max_len)
    if as_question:
        ids = tokenizer.question_ids(prompt)
    else:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if not prompt.strip() or len(ids) >= max_len:
        raise UserError(f"--prompt 要有文字，并且少于 {max_len} 个词元，现在是 {len(ids)} 个")
    return ids


# ---------- 2. 训练 ----------


@dataclass
class Record:
    """一次训练的记录。"""

    losses: list[float] = field(default_factory=list)  # 每一步的训练损失（奈特每词元）
    held_out: float = math.inf  # 练完之后在留出词条上的损失；中途死了便没有
    died: int = 0  # 第几步出现了不是有限数的损失或梯度；0 表示没有
    load: ExpertLoad | None = None  # 专家混合：在留出词条上，各位专家的负载


class Trial(Stepper):
    """实验台上的一次训练：走的就是 pre_train.py 的循环，只是没有检查点、检验与记录。"""

    def __init__(self, lab: "Laboratory", subject: Transformer, name: str, lr: float, seed: int):
        super().__init__("pretrain", replace(lab.config, lr=lr, seed=seed), lab.device,
                         lab.tokenizer)  # fmt: skip
        self.lab, self.subject, self.name, self.record = lab, subject, name, Record()
        self.watch: Callable[[int, Transformer], None] | None = None

    def plan(self, train, card: dict) -> None:
        """语料是实验台的。"""
        super().plan(self.lab.train_rows, card)

    def model(self) -> Transformer:
        """改装好的。"""
        return self.subject

    def steps(self, exam) -> Iterator[int]:
        """一步一步地走；数坏了就停下，不再往下练。"""
        bar = tqdm(total=self.n_steps, desc=self.name, unit="步", dynamic_ncols=True)
        for self.step in super().steps(exam):
            yield self.step
            bar.update()
            bar.set_postfix_str(f"损失 {self.step_loss:.3f}")
            if self.record.died:
                break
        bar.close()

    def clip(self, optimizer, limit: float):
        """截短之前，让人看一眼梯度。"""
        if self.watch:
            self.watch(self.step, self.subject)
        return super().clip(optimizer, limit)

    def finite(self, losses, norm) -> bool:
        """记下损失；不是有限的数，就是死了。"""
        alive = super().finite(losses, norm)
        self.record.losses.append(self.step_loss)
        self.record.died = 0 if alive else self.step + 1
        return alive


class Laboratory:
    """语料、设备与训练的规矩；几种模型在同一张台上练，差别便只在模型。

    Args:
        config: 用到 seq_len、batch_size、max_steps、eval_tokens，以及优化器的各项。
    """

    def __init__(self, config: Config):
        self.config, self.device, self.tokenizer = config, Device(config), Tokenizer()
        data = tokenize_corpus("builtin", "pretrain", self.tokenizer, config)
        self.train_rows, self.val_rows = (
            pretrain_batches(data, side, config, self.tokenizer) for side in SIDES
        )

    def build(self, seed: int, config: Config | None = None) -> Transformer:
        """原样的模型；同样的种子与形状，得到同样的参数。"""
        torch.manual_seed(seed)
        return Transformer(config or self.config).to(self.device.place)

    def rows_scored(self) -> int:
        """训练时真正算打分的词元数：没出现过的合用一行（engine.shared_row.SharedRow）。"""
        shared = tie_unused_rows(self.build(seed=0), self.train_rows.tokens, newborn=True)
        return len(shared.rows) if shared else self.config.vocab_size

    def train(
        self,
        model: Transformer,
        name: str,
        lr: float,
        seed: int = 1,
        watch: Callable[[int, Transformer], None] | None = None,
    ) -> Record:
        """照 pre_train.py 的循环练；数坏了就停下，不再往下练。

        Args:
            model: 就地训练。
            name: 写在进度条上。
            lr: 最高学习率，升温与下降的曲线照预设。
            seed: 决定读语料的次序。
            watch: 每步反向之后、截短梯度之前调用：watch(第几步（从 0 数）, model)。
        """
        trial = Trial(self, model, name, lr, seed)
        trial.watch = watch
        with redirect_stdout(io.StringIO()):  # 每次都说一遍用的是哪份语料，这里不必
            pre_train.main(run=trial)
        record = trial.record
        if not record.died:
            record.held_out = self.held_out_loss(model)
            record.load = expert_loads(model, self.device.world)
        return record

    def held_out_loss(self, model: Transformer) -> float:
        """留出词条上每个词元的平均损失（奈特），整张词表的 softmax。"""
        c = self.config
        return evaluate(Loss(model), self.val_rows, c.batch_size, c.eval_tokens, self.device)

    def frequency_loss(self) -> float:
        """只会按词频猜的损失：不看前文，每个词元的概率就是它在训练语料里的比例。"""
        V = self.config.vocab_size
        counts = 1.0 + np.bincount(self.train_rows.tokens, minlength=V)  # 加一，没见过的也有份
        logs = np.log(counts / counts.sum())
        return float(-logs[self.val_rows.tokens].mean())

    def write(self, model: Transformer, prompt: str, length: int = 40) -> str:
        """接着 prompt 往下写，每次选最可能的。

        每个词元都从头算一遍，不用缓存：缓存假定前文的键与值不因后文而变，改装过的未必如此。
        """
        speaker = make_speaker(model.eval(), self.config, self.tokenizer, "pretrain")
        ids = prompt_ids(self.tokenizer, prompt, False, self.config.max_len)
        greedy = Sampling(temp=0, penalty=1, max=length)
        written = list(speaker.generate(ids, greedy, use_cache=False))
        model.train()
        return self.tokenizer.decode(written)
