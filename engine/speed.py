"""让模型说得快：聊天与测速之前，矩阵换成设备擅长的精度，必要时编译逐个生成的那一步。"""

from pathlib import Path
from types import FunctionType

import torch
from torch import nn

from engine.checkpoint import load
from engine.device import Device, compile_if_possible
from engine.quantize import STORED, compact, compact_experts
from experts import MixtureOfExperts
from generate import KVCache, Speaker, make_speaker, next_logits
from tokenizer import Tokenizer


def load_for_chat(path: Path, device: Device, quantize: str = "none") -> Speaker:
    """读检查点，放到设备上；矩阵换成设备擅长的精度，归一化与位置编码仍是 fp32。

    Args:
        path: 检查点。
        device: 用到它的设备、精度，以及编译与否。
        quantize: "bf16" 或 "int8"：矩阵存得更小，说得更快。
    Raises:
        UserError: 检查点不存在、已损坏或不相配。
    """
    tokenizer = Tokenizer()
    model, config, checkpoint = load(path, tokenizer)
    model.eval().to(device.place)
    return speed_up(make_speaker(model, config, tokenizer, checkpoint["stage"]), device, quantize)


def speed_up(speaker: Speaker, device: Device, quantize: str = "none") -> Speaker:
    """让模型说得快：矩阵换成半精度或 int8，必要时编译逐个生成的那一步。"""
    model = speaker.model
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | MixtureOfExperts):
            module.to(device.dtype)
    speaker.cache = KVCache(speaker.config, device.place, device.dtype)
    if device.compile and speaker.config.n_experts:
        device.compile = False  # 挑中哪几位要看了才知道，编译的代码却要事先定好
        device.notes.append("专家混合逐个生成时不编译")
    if quantize != "none":
        compact_experts(model, STORED[quantize])
    if quantize != "none" or (device.compile and device.place.type == "cpu"):
        speaker.head = compact(model, STORED.get(quantize, device.dtype))
    if device.compile:
        for buffer in (*speaker.cache.keys, *speaker.cache.values):
            torch._dynamo.mark_static_address(buffer)  # 地址不变，CUDA 图才能直接写进去
        options = {
            "triton.cudagraphs": device.place.type == "cuda",
            # 只核对张量的形状与类型：一个进程里只有一个模型，不必每个词元都把几百个零件核对一遍。
            "guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe,
        }
        # x86 上编译器自己的 int8 内积快得多（见 docs/lab-notes.md），但矩阵是常数时它才肯用。
        x86 = device.place.type == "cpu" and torch.backends.cpu.get_cpu_capability()[:3] == "AVX"
        frozen = x86 and quantize == "int8"
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
    return speaker
