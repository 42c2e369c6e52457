"""参赛者：tools.bench 里比的每一方，各住一个进程。

每个函数备好一切（含编译与热身），返回一个没有参数的函数；它每被调用一次，就干一份活，返回干了多少。
训练的几方用同样的语料，每步的行数也相同（最初的做法除外，补齐的一步太久）；只数要猜的词元，补齐用的不算。
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from config import Config
from corpus.token_file import tokenize_corpus
from engine.checkpoint import load
from engine.device import Device
from engine.speed import speed_up
from generate import Sampling, Speaker, make_speaker
from model import Transformer
from optimizer import learning_rate
from tokenizer import Tokenizer
from tools.bench.ours import Ours
from tools.bench.trainer import Trainer, compiled_or_error, corpus, settings
from tools.bench.yardsticks import Original, OriginalManner, Qwen3, plain_device
from tools.huggingface.shapes import qwen3

# ---------- 1. 训练 ----------


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


def speaker(preset: str, dtype: str, compiled: bool, quantize: str, **changes) -> Speaker:
    """我们的生成，与聊天程序走的是同一条路。"""
    config = settings(preset, **changes | {"dtype": dtype, "compile": compiled})
    device = Device(config)
    made = make_speaker(random_model(config).to(device.place), config, Tokenizer(), "pretrain")
    made.banned = made.banned[:0]  # 对照的那一方没有禁用的编号
    made = speed_up(made, device, quantize)
    with compiled_or_error(device):
        list(made.generate(PROMPT, Sampling(temp=0, penalty=1, max=8)))
    return made


def decode(preset: str, n: int, dtype: str, compiled: bool, quantize: str) -> Callable[[], list]:
    """一份活：贪心写 n 个词元，返回编号。"""
    made = speaker(preset, dtype, compiled, quantize)
    return lambda: list(made.generate(PROMPT, Sampling(temp=0, penalty=1, max=n)))


def chat(preset: str, seconds: float, **changes) -> Callable[[], int]:
    """一份活：像聊天的默认那样（不编译）至少写 seconds 秒，返回词元数；每次写 32 个。"""
    made = speaker(preset, "auto", False, "none", **changes)

    def work() -> int:
        start, total = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            total += len(list(made.generate(PROMPT, Sampling(temp=0, penalty=1, max=32))))
        return total

    return work


def decode_qwen3(preset: str, n: int, dtype: str, **changes) -> Callable[[], list]:
    """transformers 的 generate，同样的权重。"""
    config = settings(preset, **changes)
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
    speed_up(speaker, device, "int8")
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
