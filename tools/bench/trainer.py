"""训练的几方共有的：同样的设置与语料，走一步，热身，检验。"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from config import Config, UserError
from corpus.token_file import TokenFile, tokenize_corpus
from engine.device import Device
from loss import evaluate
from settings.resolve import load_config
from tokenizer import Tokenizer

TWINS = {"tiny-moe": "tiny", "moe": "wide"}  # 专家混合: 每个词元用到的参数一样多的稠密模型
MICRO_ROWS = 8  # CPU 上一次前向的行数：再多，打分就放不进缓存，也费内存；每步的行数不变


def settings(preset: str, **changes) -> Config:
    """预设的默认值，语料用内置的；CPU 上把一步分成几小批。"""
    given = {"preset": preset, "data": "builtin"} | changes
    config, _ = load_config("pretrain", [f"--{name}={value}" for name, value in given.items()])
    if not torch.cuda.is_available():
        rows = config.batch_size * config.grad_accum
        config.batch_size = min(MICRO_ROWS, rows)
        config.grad_accum = rows // config.batch_size
    return config


def corpus(config: Config) -> TokenFile:
    """内置语料的词元文件。"""
    return tokenize_corpus("builtin", "pretrain", Tokenizer(), config)


@contextmanager
def compiled_or_error(device: Device) -> Iterator[None]:
    """热身时编译失败，训练与聊天会改用不编译的；测速却不能把它算作编译过的。"""
    wanted = device.compile
    yield
    if device.compile != wanted:
        raise UserError("torch.compile 失败了；请先让 python pre_train.py 编译得过，再来测速")


class Trainer:
    """一方的训练：`step(factor)` 走一步，返回这一步要猜的词元数；`val_loss()` 检验。"""

    def __init__(self, config: Config, device: Device):
        self.config, self.device = config, device
        self.data, self.n = corpus(config), 0
        self.rows_per_step = config.batch_size * config.grad_accum
        torch.manual_seed(config.seed)

    def warm_up(self) -> None:
        """走一步再回到原点：编译与第一次分配内存不算在内。"""
        before = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.step(0.0)
        self.model.load_state_dict(before)
        self.start_over()

    def start_over(self) -> None:
        """回到第 0 步，优化器什么也不记得。"""
        self.n = 0
        self.optimizers = self.make_optimizers()

    def val_loss(self) -> float:
        """全部留出的词条上，每个词元的平均损失（奈特）。"""
        val, rows = self.val, self.config.batch_size
        return evaluate(self.evaluate_fn, val, rows, 10**9, self.device)
