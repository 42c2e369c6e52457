"""让模型说得快：聊天与测速之前，矩阵换成设备擅长的精度，必要时编译逐个生成的那一步。

load_for_chat   读检查点，准备好一个说得快的模型
speed_up        矩阵换精度，编译
choose          矩阵存成什么，由它挑（--quantize auto）
stored_as       现在存成什么
"""

import copy
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import FunctionType

import torch
from torch import nn

from engine.checkpoint import load
from engine.device import Device, compile_if_possible
from engine.quantize import STORED, CompactLinear, compact, compact_experts
from experts import MixtureOfExperts
from generate import KVCache, Speaker, make_speaker, next_logits
from settings.say import say
from tokenizer import Tokenizer

# --quantize auto：
MOST_LOSS = 1e-3  # 损失至多增加几成
WORTH_TRYING = range(20_000_000, 300_000_000)  # 参数：再少的本来就快，再多的试一次要等三秒以上
PASSAGE = (
    "守株待兔：比喻不想努力，只想碰运气得到好处。北京是中国的首都，每年春天公园里开满了花，"
    "人们一边散步，一边谈论昨天发生的事情。你好，请问今天的天气怎么样？"
)


def load_for_chat(path: Path, device: Device, quantize: str = "none") -> Speaker:
    """读检查点，放到设备上；矩阵换成设备擅长的精度，归一化与位置编码仍是 fp32。

    Args:
        path: 检查点。
        device: 用到它的设备、精度，以及编译与否；有显卡却用不上的，说一声。
        quantize: "bf16" 或 "int8"：矩阵存得更小，说得更快；"auto"：见 `choose`。
    Raises:
        UserError: 检查点不存在、已损坏或不相配。
    """
    if device.unused_card:
        say(f"（{device.unused_card}）", file=sys.stderr)
    tokenizer = Tokenizer()
    model, config, checkpoint = load(path, tokenizer)
    model.eval().to(device.place)
    return speed_up(make_speaker(model, config, tokenizer, checkpoint["stage"]), device, quantize)


def speed_up(speaker: Speaker, device: Device, quantize: str = "none") -> Speaker:
    """让模型说得快：矩阵换成半精度或 int8，必要时编译逐个生成的那一步。"""
    for module in speaker.model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | MixtureOfExperts):
            module.to(device.dtype)
    speaker.cache = KVCache(speaker.config, device.place, device.dtype)
    if device.compile and speaker.config.n_experts:
        device.compile = False  # 挑中哪几位要看了才知道，编译的代码却要事先定好
        device.notes.append("专家混合逐个生成时不编译")
    if quantize == "auto":
        quantize = choose(speaker, device)
    shrink(speaker, device, quantize)
    if device.compile:
        compile_step(speaker, device, quantize)
    elif device.place.type == "cpu" and size_of(speaker) < WORTH_TRYING.start:
        use_one_thread()
    return speaker


def size_of(speaker: Speaker) -> int:
    """有多少参数。"""
    return sum(p.numel() for p in speaker.model.parameters())


def use_one_thread() -> None:
    """小的模型逐个生成，一个线程就够：分给几个，叫醒它们的工夫比算的还长（docs/lab-notes.md）。

    用户自己定了几个线程的，照用户的。
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


# ---------- 1. 矩阵存成什么 ----------


def choose(speaker: Speaker, device: Device) -> str:
    """矩阵存成什么：最快的、损失至多增加千分之一的。

    谁快是事先量好的（docs/benchmarks.md）：x86 的处理器上 int8 最快，别处没有测量过，照旧。
    编译的也照旧：int8 的每次都要重新编译，多等十来秒，愿意等的自己写明。
    不在当场比快慢：机器忙闲不定，同样的种子，两次说的话就会不同。损失则当场估，它每次都一样。
    """
    if device.compile or not on_x86(device) or size_of(speaker) not in WORTH_TRYING:
        return "none"
    cache = KVCache(speaker.config, device.place, device.dtype)
    small = replace(speaker, model=copy.deepcopy(speaker.model), cache=cache)
    shrink(small, device, "int8")
    return "int8" if loss_added(speaker, small) <= MOST_LOSS else "none"


def loss_added(full: Speaker, small: Speaker) -> float:
    """full 存成 small 之后，损失增加几成：各把一段文字读一遍，比每个位置的整张概率表。

    文字若像 full 写的，损失就是它的熵，增加的就是 KL(full‖small)；用上整张表，几十个词元就估得准。
    与留出的文字上量的相比，见 docs/lab-notes.md。
    """
    most = full.config.max_len
    ids = full.prompt(PASSAGE[:most])[:most]
    probs, others = (speaker.read(ids).clamp(min=1e-30) for speaker in (full, small))  # (T, V)
    loss = -(probs * probs.log()).sum()
    return ((probs * (probs / others).log()).sum() / loss).item()


def shrink(speaker: Speaker, device: Device, quantize: str) -> None:
    """矩阵存成 quantize 说的；编译的话，总要换成写得出逐行内积的那一种。"""
    if quantize != "none":
        compact_experts(speaker.model, STORED[quantize])
    if quantize != "none" or (device.compile and device.place.type == "cpu"):
        speaker.head = compact(speaker.model, STORED.get(quantize, device.dtype))


def stored_as(speaker: Speaker) -> str:
    """矩阵现在存成什么，例如「int8」。"""
    small = isinstance(speaker.head, CompactLinear)
    return str((speaker.head if small else speaker.model.embedding).weight.dtype)[6:]


def on_x86(device: Device) -> bool:
    """是不是有向量指令的 x86 处理器：PyTorch 与编译器的 int8 内积，量过的只有这一种。"""
    return device.place.type == "cpu" and torch.backends.cpu.get_cpu_capability()[:3] == "AVX"


# ---------- 2. 编译 ----------


def compile_step(speaker: Speaker, device: Device, quantize: str) -> None:
    """编译逐个生成的那一步；第一次用到时才真的编译。"""
    for buffer in (*speaker.cache.keys, *speaker.cache.values):
        torch._dynamo.mark_static_address(buffer)  # 地址不变，CUDA 图才能直接写进去
    options = {
        "triton.cudagraphs": device.place.type == "cuda",
        # 只核对张量的形状与类型：一个进程里只有一个模型，不必每个词元都把几百个零件核对一遍。
        "guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe,
    }
    # x86 上编译器自己的 int8 内积快得多（见 docs/lab-notes.md），但矩阵是常数时它才肯用。
    frozen = quantize == "int8" and on_x86(device)
    if frozen:
        options |= {"max_autotune_gemm": True, "max_autotune_gemm_backends": "CPP"}
        options |= {"fx_graph_cache": False}  # 磁盘上存着的代码里，可能是旧检查点的矩阵
    # 常数写进编译好的代码，所以每个模型要有自己的一份函数，不与别的模型合用编译的结果。
    step = FunctionType(next_logits.__code__.replace(), next_logits.__globals__)
    speaker.step = compile_if_possible(step, device, **options)
    if frozen:
        from torch._inductor import config as inductor  # 导入它要一两秒

        # 写在上面的 options 里不够：读 Python 代码的那一步看不见它们。
        speaker.step = inductor.patch(freezing=True)(speaker.step)
