"""模型 -> 网页里的字节：矩阵存成 int8（或 fp32），名字与 state_dict 的相同。

pack         参数 -> 字节，与每个参数在哪里
loss_added   存成 int8，损失增加几成
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import N_TOKENS
from engine import speed
from engine.quantize import CompactLinear
from generate import KVCache, Speaker
from model import Transformer
from tools.huggingface.shapes import STATISTIC

STACKS = ("feed_forward.gate", "feed_forward.up", "feed_forward.down")  # 各位专家叠在一起的矩阵
ROWS = 4  # 网页里四行一起乘：行数补到它的倍数


def parameters(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """要带走的参数，fp32；补齐词表用的那些行没有对应的词元，不带；专家的一叠分成一份一份。"""
    for name, weight in model.state_dict().items():
        if name.endswith(STATISTIC):
            continue
        layer, stack = name.rpartition("feed_forward.")[0], name.rpartition(".")[2]
        if name.endswith(STACKS):
            for e, matrix in enumerate(weight.float()):
                yield f"{layer}feed_forward.experts.{e}.{stack}.weight", matrix
        else:
            rows = N_TOKENS if name == "embedding.weight" else len(weight)
            yield name, weight.float()[:rows]


def stored(name: str, weight: Tensor, exact: bool) -> tuple[Tensor, Tensor | None]:
    """一个参数存成什么：矩阵是 int8 与每行的倍数，其余原样。

    Args:
        exact: 真时矩阵也原样。
    """
    if exact or weight.dim() < 2 or name.endswith("router.weight"):  # 它很小，差一点就挑错人
        return weight, None
    small = CompactLinear(weight, torch.int8)
    return small.weight, small.scale.float()


def pack(model: Transformer, exact: bool) -> tuple[dict[str, Any], bytes]:
    """全部参数 -> ({名字: {shape, at, scale_at}}, 字节)。

    at 与 scale_at 是从第几个字节起，都是 4 的倍数；没有 scale_at 的是 fp32。
    int8 的矩阵行数补到 4 的倍数，四行的同一列挨着放：网页里一次读四个。
    """
    places: dict[str, Any] = {}
    pieces: list[bytes] = []

    def write(numbers: Tensor) -> int:
        start = sum(map(len, pieces))
        pieces.append(numbers.contiguous().numpy().tobytes())
        return start

    for name, weight in parameters(model):
        numbers, scale = stored(name, weight, exact)
        place = places[name] = {"shape": [*weight.shape]}
        if scale is not None:
            more = -len(numbers) % ROWS
            rows = F.pad(numbers, (0, 0, 0, more)).view(-1, ROWS, numbers.size(1))
            numbers = rows.transpose(1, 2)  # (出/4, 4, 入) -> (出/4, 入, 4)
            place["scale_at"] = write(F.pad(scale, (0, more)))
        place["at"] = write(numbers)
    return places, b"".join(pieces)


@torch.no_grad()
def as_shown(model: Transformer) -> Transformer:
    """网页里的模型：矩阵（词嵌入也是）存成 int8 再还原。"""
    small = copy.deepcopy(model)
    for name, weight in small.state_dict().items():
        for matrix in weight if name.endswith(STACKS) else [weight]:
            numbers, scale = stored(name, matrix.float(), exact=False)
            if scale is not None:
                matrix.copy_(numbers.float() * scale[:, None])
    return small


def loss_added(speaker: Speaker) -> float:
    """存成 int8，损失增加几成；怎样估，见 engine/speed.py。"""
    small = as_shown(speaker.model)
    cache = KVCache(speaker.config, small.embedding.weight.device, torch.float32)
    return speed.loss_added(speaker, replace(speaker, model=small, head=small.score, cache=cache))
