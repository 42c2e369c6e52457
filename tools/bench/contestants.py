"""参赛者：tools.bench 里比的每一方，各住一个进程。

每个函数备好一切（含编译与热身），返回一个没有参数的函数；它每被调用一次，就干一份活，返回干了多少。
训练的几方用同样的语料，每步的行数也相同（最初的做法除外，补齐的一步太久）；只数要猜的词元，补齐用的不算。
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from config import Config, UserError
from corpus.token_file import TokenFile, tokenize_corpus
from dataset import IGNORE, PretrainBatches, rows_of_step
from engine import device as training
from engine.checkpoint import load
from engine.device import Device, compile_if_possible
from engine.expert_load import expert_loads, rebalance
from engine.shared_row import tie_unused_rows
from engine.speed import speed_up as prepare_speaker
from generate import Sampling, Speaker, make_speaker
from loss import evaluate, loss_sum
from model import Transformer
from optimizer import build_optimizers, learning_rate, set_learning_rate
from settings.resolve import load_config
from tokenizer import Tokenizer
from tools.bench.yardsticks import OriginalManner, padded_rows
from tools.huggingface.shapes import qwen3

MICRO_ROWS = 8  # CPU 上一次前向的行数：再多，打分就放不进缓存，也费内存；每步的行数不变


def settings(preset: str, **changes) -> Config:
    """预设的默认值，语料用内置的；CPU 上把一步分成几小批。"""
    config, _ = load_config("pretrain", ["--preset", preset, "--data", "builtin"])
    for name, value in changes.items():
        setattr(config, name, value)
    if not torch.cuda.is_available():
        rows = config.batch_size * config.grad_accum
        config.batch_size = min(MICRO_ROWS, rows)
        config.grad_accum = rows // config.batch_size
    return config


def corpus(config: Config) -> TokenFile:
    """内置语料的词元文件。"""
    return tokenize_corpus("builtin", "pretrain", Tokenizer(), config)


def batches_of(config: Config, data: TokenFile, side: str, isolate: bool) -> PretrainBatches:
    """首尾相接的行；isolate：同一行里的几篇互相看不见。"""
    start = Tokenizer().bos_id if isolate else None
    return PretrainBatches(data.tokens[side], config.seq_len, start)


def plain_device(config: Config, lend_memory: bool = False) -> Device:
    """对照用的设备：没有我们在 CPU 上的两处设置（留住内存、相加的次序固定），普通的循环就是这样。

    Args:
        lend_memory: 真时借给它前一处，它便看得出快了多少。
    """
    skipped = ["add_in_fixed_order"] + ["keep_freed_memory"] * (not lend_memory)
    with mock.patch.multiple(training, **dict.fromkeys(skipped, lambda: None)):
        return Device(config)


@contextmanager
def compiled_or_error(device: Device) -> Iterator[None]:
    """热身时编译失败，训练与聊天会改用不编译的；测速却不能把它算作编译过的。"""
    wanted = device.compile
    yield
    if device.compile != wanted:
        raise UserError("torch.compile 失败了；请先让 python pre_train.py 编译得过，再来测速")


# ---------- 1. 训练 ----------


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
        self.n = 0
        self.optimizers = self.make_optimizers()

    def val_loss(self) -> float:
        """全部留出的词条上，每个词元的平均损失（奈特）。"""
        val, rows = self.val, self.config.batch_size
        return evaluate(self.evaluate_fn, self.model, val, rows, 10**9, self.device)


class Ours(Trainer):
    """我们的：与 pre_train.py 的每一步做同样的事（有测试核对损失相同）。"""

    def __init__(self, config: Config, whole_vocabulary: bool = False):
        super().__init__(config, Device(config))
        self.train, self.val = (
            batches_of(config, self.data, side, config.isolate_documents)
            for side in ("train", "val")
        )
        self.model = Transformer(config).to(self.device.place)
        self.shared = None
        if not whole_vocabulary:
            self.shared = tie_unused_rows(self.model, self.train.tokens, newborn=True)
        self.loss_fn = self.evaluate_fn = compile_if_possible(loss_sum, self.device)
        self.optimizers = self.make_optimizers()

    def make_optimizers(self):
        """Muon 与 AdamW。"""
        return build_optimizers(self.model, self.config, self.device, self.config.lr)

    def step(self, factor: float) -> int:
        """走一步；factor 是学习率的倍数。"""
        set_learning_rate(self.optimizers, factor)
        rows = rows_of_step(self.n, self.rows_per_step, self.train.n_rows, self.config.seed)
        size = self.config.batch_size
        batches = [self.train.get(rows[i : i + size]) for i in range(0, len(rows), size)]
        n_targets = sum(int((b.targets != IGNORE).sum()) for b in batches)
        self.loss = 0.0
        for batch in batches:
            with self.device.autocast():
                batch = batch.to(self.device.place)
                part = self.loss_fn(self.model, batch, self.shared) / n_targets
            part.backward()
            self.loss += part.item()
        clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.shared:
            self.shared.spread(self.model.embedding.weight)
        if busy := expert_loads(self.model, self.device.world):
            rebalance(self.model, busy)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.n += 1
        return n_targets


class Plain(Trainer):
    """最普通的训练循环：AdamW，每步 rows_per_step 行，损失对要猜的词元求平均。"""

    def make_optimizers(self):
        """只有 AdamW。"""
        return [torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, fused=True)]

    def step(self, factor: float) -> int:
        """走一步；factor 是学习率的倍数。"""
        (optimizer,) = self.optimizers
        optimizer.param_groups[0]["lr"] = self.config.lr * factor
        total = 0
        for _ in range(self.config.grad_accum):
            ids, targets = (x.to(self.device.place) for x in self.next_batch())
            with self.device.autocast():
                loss = self.loss_of(ids, targets)
            (loss / self.config.grad_accum).backward()
            total += int((targets != IGNORE).sum())
        loss.item()
        clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total


class Qwen3(Plain):
    """transformers 的 Qwen3，同样的形状；损失用它自带的（labels），语料首尾相接。"""

    def __init__(self, config: Config, compiled: bool, device: Device):
        super().__init__(config, device)
        self.train, self.val = (
            batches_of(config, self.data, side, False) for side in ("train", "val")
        )
        self.model = qwen3(config).to(self.device.place)
        self.call = torch.compile(self.model) if compiled else self.model
        self.optimizers = self.make_optimizers()

    def next_batch(self):
        """编号；目标由它自己右移，所以每行的最后一个词元没有目标。"""
        size = self.config.batch_size
        batch = self.train.get(rows_of_step(self.n, size, self.train.n_rows, self.config.seed))
        self.n += 1
        targets = batch.ids.clone()
        targets[:, 0] = IGNORE
        return batch.ids, targets

    def loss_of(self, ids, targets):
        """它自带的损失。"""
        return self.call(input_ids=ids, labels=targets, use_cache=False).loss

    def evaluate_fn(self, model, batch):
        """同样的留出词条上的损失之和。"""
        logits = self.call(input_ids=batch.ids, use_cache=False).logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch.targets.flatten(),
            ignore_index=IGNORE, reduction="sum",
        )  # fmt: skip


class Original(Plain):
    """最初那个项目的做法：fp32，不编译，一行一篇，补齐到 max_len（tiny 512，wide 1024）。"""

    def __init__(self, config: Config):
        config.dtype, config.grad_accum = "float32", 1  # 补齐的一步太久，只做其中一小批
        super().__init__(config, plain_device(config))
        self.model = OriginalManner(config).to(self.device.place)
        rows = max(1, config.batch_size * config.seq_len // config.max_len)
        self.rows = padded_rows(self.data, config.max_len, rows)
        self.optimizers = self.make_optimizers()

    def next_batch(self):
        """补齐的几行。"""
        return next(self.rows)

    def loss_of(self, ids, targets):
        """要猜的词元的平均损失。"""
        logits = self.model(ids)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def trainer(kind: str, preset: str, **changes) -> Trainer:
    """按名字造一方，热身完毕。"""
    config = settings(preset, **changes)
    made = {
        "ours": lambda: Ours(config),
        "ours, whole vocabulary": lambda: Ours(config, whole_vocabulary=True),
        "qwen3 compiled": lambda: Qwen3(config, True, plain_device(config)),
        "qwen3 eager": lambda: Qwen3(config, False, plain_device(config)),
        "qwen3 compiled, tuned": lambda: Qwen3(config, True, plain_device(config, True)),
        "qwen3 eager, tuned": lambda: Qwen3(config, False, plain_device(config, True)),
        "original": lambda: Original(config),
    }[kind]()
    with compiled_or_error(made.device):
        made.warm_up()
    return made


def train(kind: str, preset: str, seconds: float, **changes) -> Callable[[], int]:
    """一份活：训练至少 seconds 秒的整数步，返回要猜的词元数。"""
    made = trainer(kind, preset, **changes)

    def work() -> int:
        start, total = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            total += made.step(0.1)
        return total

    return work


def race(kind: str, preset: str, seconds: float, lr: float) -> Callable[[], dict]:
    """一份活：从头训练 seconds 秒（学习率按时间升降），返回最后的检验损失；编译与检验不计时。"""
    made = trainer(kind, preset, **({"lr": lr} if lr else {}))
    warmup, decay = made.config.warmup, made.config.decay

    def work() -> dict:
        spent, steps = 0.0, 0
        while spent < seconds:
            start = time.perf_counter()
            made.step(learning_rate(int(spent / seconds * 1000), 1000, warmup, decay))
            spent, steps = spent + time.perf_counter() - start, steps + 1
        return {"loss": made.val_loss(), "seconds": spent, "steps": steps}

    return work


# ---------- 2. 生成 ----------

PROMPT = list(range(1000, 1016))  # 十六个普通的汉字


def random_model(config: Config) -> Transformer:
    """每个矩阵都是随机数的模型：速度与训练好的一样，几方可以装同样的权重。"""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for p in model.parameters():
        if p.ndim >= 2:
            nn.init.normal_(p, std=p.size(-1) ** -0.5)
    return model


def speaker(preset: str, dtype: str, compiled: bool, quantize: str) -> Speaker:
    """我们的生成，与聊天程序走的是同一条路。"""
    config = settings(preset, dtype=dtype, compile=compiled)
    device = Device(config)
    made = make_speaker(random_model(config).to(device.place), config, Tokenizer(), "pretrain")
    made.banned = made.banned[:0]  # 对照的那一方没有禁用的编号
    made = prepare_speaker(made, device, quantize)
    with compiled_or_error(device):
        list(made.generate(PROMPT, Sampling(temp=0, penalty=1, max=8)))
    return made


def decode(preset: str, n: int, dtype: str, compiled: bool, quantize: str) -> Callable[[], list]:
    """一份活：贪心写 n 个词元，返回编号。"""
    made = speaker(preset, dtype, compiled, quantize)
    return lambda: list(made.generate(PROMPT, Sampling(temp=0, penalty=1, max=n)))


def decode_qwen3(preset: str, n: int, dtype: str) -> Callable[[], list]:
    """transformers 的 generate，同样的权重。"""
    config = settings(preset)
    place = plain_device(config).place
    model = qwen3(config, random_model(config).state_dict()).eval().to(place, getattr(torch, dtype))
    ids = torch.tensor([PROMPT], device=place)

    def work(length: int = n) -> list:
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False
        )
        return whole[0, len(PROMPT) :].tolist()

    work(8)
    return work


def decode_original(preset: str, n: int, padded: bool) -> Callable[[], list]:
    """最初的做法：没有缓存，每写一个词元都从头算；padded：每次都补齐到 max_len。"""
    config = settings(preset)
    config = replace(config, hidden_dim=config.active_width())  # 不分专家，前馈一样宽
    place = plain_device(config).place
    torch.manual_seed(0)
    model = OriginalManner(config).eval().to(place)

    @torch.inference_mode()
    def work(length: int = n) -> list:
        ids = list(PROMPT)
        for _ in range(length):
            row = ids + [0] * (config.max_len - len(ids)) * padded
            logits = model(torch.tensor([row], device=place))[0, len(ids) - 1]
            ids.append(int(logits.argmax()))
        return ids[len(PROMPT) :]

    work(2)
    return work


def first_token(preset: str, length: int, training: bool) -> Callable[[], int]:
    """一份活：读完 length 个词元的开头，给出第一个词元；training：同样长的一次训练前向。"""
    config = settings(preset, compile=False)
    if not training:
        made = speaker(preset, config.dtype, False, "none")
        ids = list(range(1000, 1000 + length))
        return lambda: len(list(made.generate(ids, Sampling(temp=0, penalty=1, max=1))))
    device, model = Device(config), random_model(config)
    model.to(device.place)
    ids = torch.arange(1000, 1000 + length, device=device.place)[None]

    def work() -> int:
        with device.autocast():
            logits = model(ids)
        F.cross_entropy(logits[0].float(), ids[0]).item()
        return 1

    return work


def int8_loss(checkpoint: str) -> Callable[[], tuple[float, float]]:
    """一份活：留出的词条上的损失，矩阵原样与 int8 各一次；像生成时那样一个词元一个词元地算。"""
    tokenizer = Tokenizer()
    model, config, _ = load(Path(checkpoint), tokenizer)
    config.compile = False
    device, tokens = Device(config), corpus(config).tokens["val"]
    speaker = make_speaker(model.eval().to(device.place), config, tokenizer, "pretrain")

    @torch.inference_mode()
    def loss() -> float:
        total, rows, length = 0.0, 16, min(256, config.max_len)
        for row in range(rows):
            ids = torch.tensor(tokens[row * length : (row + 1) * length + 1].astype("int64"))
            for i in range(length):
                logits = speaker._next(ids[: i + 1].to(device.place), i)
                total += F.cross_entropy(logits.float()[None].cpu(), ids[i + 1 : i + 2]).item()
        return total / rows / length

    before = loss()
    prepare_speaker(speaker, device, "int8")
    after = loss()
    return lambda: (before, after)


# ---------- 3. 数据 ----------


def tokenise(source: str, folder: str) -> Callable[[], int]:
    """一份活：把一个文件备成词元文件，返回词元数；每次都从头做，分词器也是新的。"""
    config = settings("tiny", data_dir=folder)

    def work() -> int:
        shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
        card = tokenize_corpus(source, "pretrain", Tokenizer(), config).card
        return card["train_tokens"] + card["val_tokens"]

    return work


def tokenise_one_by_one(source: str, n_rows: int) -> Callable[[], int]:
    """最初的做法：逐行读 JSON，逐篇调用 transformers 的分词器。"""
    tokenizer = Tokenizer().to_transformers()

    def work() -> int:
        total = 0
        with open(source, encoding="utf-8") as f:
            for line, _ in zip(f, range(n_rows), strict=False):
                text = json.loads(line)["text"]
                total += len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return total

    return work


# ---------- 4. 规模 ----------


def nothing() -> Callable[[], int]:
    """一份活：什么也不做，用来量程序自己占的内存。"""
    return lambda: 1


def forward_backward(**shape) -> Callable[[], int]:
    """一份活：一次前向与反向（不编译、fp32），返回词元数。"""
    config = settings("tiny", dtype="float32", compile=False)
    for name, value in shape.items():
        setattr(config, name, value)
    place = Device(config).place
    model = Transformer(config).to(place)
    ids = torch.randint(config.vocab_size, (config.batch_size, config.seq_len + 1)).to(place)

    def work() -> int:
        logits = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)
        return ids[:, 1:].numel()

    work()
    return work
