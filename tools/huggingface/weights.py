"""safetensors 的权重 -> 我们的参数。文件头写的，先与文件的大小、config.json 写的对上，再分配内存。

open_weights   一个文件夹 -> {名字: Stored}，文件都开着
check_count    层数、专家数、宽度与 config.json 的相同：先看它们，写着一亿层的不要真的去列
plan           我们的每个参数取自哪些；少了、多了、形状不对的，一次说全
read_state     照着读，fp32
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from chat.numbers import file_size
from config import N_TOKENS, Config, UserError
from model import Transformer
from settings.say import brief
from tools.huggingface.foreign import opened, parse_object, read_object, size_of
from tools.huggingface.shapes import (
    DOWN,
    GATE_UP,
    OUR_STACKS,
    STATISTIC,
    check_finite,
    their_name,
)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HEADER = 8 << 20  # 文件头至多多少字节：一万多个参数的也不到 3 MB
SHARDS = 200  # 至多分成几个文件
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class Stored(NamedTuple):
    """文件里的一个参数。"""

    file: BinaryIO
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # 从文件的第几个字节起
    size: int  # 多少字节


# ---------- 1. 文件头 ----------


@contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, Stored]]:
    """文件夹里的权重，一个文件或几个分片。

    Raises:
        UserError: 没有，不完好，或者有半精度与 fp32 以外的数。
    """
    one, index = os.path.lexists(folder / ONE), os.path.lexists(folder / INDEX)
    if one and index:
        raise UserError(f"{folder} 里 {ONE} 与分片的 {INDEX} 都有，不知道用哪一份；请删掉旧的")
    if not one and not index:
        raise UserError(f"{folder} 里没有 safetensors 的权重（{ONE}）；请用 save_pretrained 存")
    with ExitStack() as stack:
        if one:
            yield read_header(stack.enter_context(opened(folder / ONE)), folder / ONE)
            return
        places = read_index(folder / INDEX)
        found: dict[str, Stored] = {}
        for name in sorted({*places.values()}):
            part = read_header(stack.enter_context(opened(folder / name)), folder / name)
            if {*part} != {n for n, place in places.items() if place == name}:
                raise UserError(f"{folder / name} 里的参数与 {INDEX} 写的不同；请重新导出")
            found |= part
        yield found


def read_index(path: Path) -> dict[str, str]:
    """分片的索引：{参数的名字: 文件名}；文件都要在同一个文件夹里。"""
    places = read_object(path, HEADER).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path} 里没有 weight_map；请重新导出")
    for place in places.values():
        if not isinstance(place, str) or not re.fullmatch(r"[\w-][\w.-]{0,99}\.safetensors", place):
            raise UserError(f"{path} 里的 {brief(place)} 不是这个文件夹里的分片；请重新导出")
    if len({*places.values()}) > SHARDS:
        raise UserError(f"{path} 写着 {SHARDS} 个以上的分片；请用 save_pretrained 重新存成几个")
    return places


def read_header(file: BinaryIO, path: Path) -> dict[str, Stored]:
    """一个文件的头 -> {名字: Stored}：一个接一个，不重叠，不留空，正好到文件的末尾。"""
    broken = f"{path} 不是完好的 safetensors"
    start = file.read(8)
    length, whole = int.from_bytes(start, "little"), size_of(file)
    if len(start) < 8 or not 2 <= length <= min(HEADER, whole - 8):
        raise UserError(f"{broken}（文件有 {whole} 字节，文件头写着 {length} 字节）；请重新导出")
    raw = parse_object(file.read(length), f"{path} 的文件头")
    raw.pop("__metadata__", None)
    begin, found = 8 + length, {}
    spans = {name: read_span(name, entry, path) for name, entry in raw.items()}
    end = 0
    for name, (dtype, shape, first, last) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise UserError(f"{broken}（{brief(name)} 与前面的重叠，或者中间空着）；请重新导出")
        end = last
        found[name] = Stored(file, dtype, shape, begin + first, last - first)
    if begin + end != whole:
        raise UserError(f"{broken}（参数到 {begin + end}，文件有 {whole} 字节）；请重新导出")
    return found


def read_span(name: str, entry: Any, path: Path) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """文件头里的一项 -> (类型, 形状, 从哪里, 到哪里)；三样要说得通。"""
    what = f"{path} 的参数 {brief(name)}"
    if not isinstance(entry, dict) or {*entry} != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{what} 写得不对，不是完好的 safetensors；请重新导出")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        kinds = "、".join(DTYPES)
        raise UserError(f"{what} 的类型是 {brief(dtype)}，能导入的只有 {kinds}；请存成其中一种")
    for numbers, most in ((shape, 8), (offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) > most or not all(
            type(n) is int and 0 <= n < 2**48 for n in numbers
        ):  # fmt: skip
            raise UserError(f"{what} 的形状或位置是 {brief(numbers)}，不对；请重新导出")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != expected:
        raise UserError(
            f"{what} 的形状 {brief(shape)} 要 {expected} 字节，位置是 {brief(offsets)}；请重新导出"
        )
    return DTYPES[dtype], tuple(shape), *offsets


# ---------- 2. 与 config.json 对上 ----------


def check_count(stored: dict[str, Stored], config: Config, folder: Path) -> None:
    """层数、专家数、宽度，与 config.json 写的相同；参数装得进内存。Raises UserError。"""
    layers = {m[1] for name in stored if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    if len(layers) != config.n_layers:
        raise UserError(
            f"{folder} 的权重有 {len(layers)} 层，与 config.json 的 num_hidden_layers 不同"
        )
    table = stored.get(EMBEDDING)
    if table is not None and table.shape != (N_TOKENS, config.dim):
        raise UserError(
            f"{folder} 的参数与 config.json 对不上：形状不对：{EMBEDDING} "
            f"是 {table.shape}，应为 {(N_TOKENS, config.dim)}"
        )
    gates = [s.shape[0] for name, s in stored.items() if name.endswith("mlp.gate.weight")]
    if gates and config.n_experts != gates[0]:
        raise UserError(f"{folder} 的权重有 {gates[0]} 位专家，与 config.json 的 num_experts 不同")
    need = 3 * 4 * sum(math.prod(s.shape) for s in stored.values())  # 读进来，建好，写出去
    if hasattr(os, "sysconf"):
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need > have:
            raise UserError(
                f"{folder} 的参数要 {file_size(need)} 内存才导得进来，这台机器只有 "
                f"{file_size(have)}；请换小些的模型"
            )


def plan(
    stored: dict[str, Stored], config: Config, tied: bool, folder: Path
) -> dict[str, list[str]]:
    """我们的每个参数 -> 它取自文件里的哪些：专家的一叠可以分开存，也可以接在一起存。

    Raises:
        UserError: 少了、多了、形状不对。
    """
    with torch.device("meta"):  # 只要名字与形状，不占内存
        newborn = Transformer(replace(config, vocab_size=N_TOKENS, max_len=1)).state_dict()
    sources: dict[str, list[str]] = {}
    expected: dict[str, tuple[int, ...]] = {} if tied else {OUTPUT: (N_TOKENS, config.dim)}
    for name, fresh in newborn.items():
        shape = tuple(fresh.shape)
        if name.endswith(STATISTIC):
            continue
        theirs = their_name(name)
        stack = next((s for s in OUR_STACKS if theirs.endswith(s)), None)
        layer = theirs.removesuffix(stack) if stack else ""
        if stack is None:
            wanted = {theirs: shape}
        elif layer + GATE_UP in stored or layer + DOWN in stored:
            E, C, I = config.n_experts, config.dim, config.hidden_dim  # noqa: E741
            wanted = ({layer + DOWN: (E, C, I)} if stack == OUR_STACKS[2]
                      else {layer + GATE_UP: (E, 2 * I, C)})  # fmt: skip
        else:
            one = stack.replace("mlp.", "mlp.experts.{}.") + ".weight"
            wanted = {layer + one.format(e): shape[1:] for e in range(shape[0])}
        sources[name] = [*wanted]
        expected |= wanted
    wrong = [n for n, shape in expected.items() if n in stored and stored[n].shape != shape]
    missing, more = expected.keys() - stored.keys(), stored.keys() - expected.keys() - {OUTPUT}
    problems = {"少了 ": missing, "多了 ": more, "形状不对：": wrong}
    if said := [f"{what}{first(names)}" for what, names in problems.items() if names]:
        raise UserError(f"{folder} 的参数与 config.json 对不上：{'；'.join(said)}")
    return sources


def first(names) -> str:
    """对不上的参数：第一个的名字，共几个。"""
    names = sorted(names)
    return brief(names[0]) + (f" 等 {len(names)} 个" if len(names) > 1 else "")


# ---------- 3. 读 ----------


def read_state(
    stored: dict[str, Stored], config: Config, tied: bool, folder: Path
) -> dict[str, Tensor]:
    """我们的 state_dict，fp32，词表还没有补齐；训练的统计量它没有，从头数起。

    Raises:
        UserError: 与 config.json 对不上，输出层另是一个矩阵，或者有 NaN。
    """
    state: dict[str, Tensor] = {}
    for name, theirs in plan(stored, config, tied, folder).items():
        parts = [read_tensor(one, stored[one], folder) for one in theirs]
        if theirs[0].endswith(GATE_UP):  # (E, 2I, C) -> 两个 (E, I, C)
            parts = [parts[0].chunk(2, dim=1)[name.endswith(".up")].contiguous()]
        split = len(theirs) > 1 or ".mlp.experts.0." in theirs[0]
        state[name] = torch.stack(parts) if split else parts[0]
    for layer in range(config.n_layers if config.n_experts else 0):
        load = torch.full((config.n_experts,), 1 / config.n_experts)
        state[f"blocks.{layer}.feed_forward{STATISTIC}"] = load
    if OUTPUT in stored:
        check_output(stored, state["embedding.weight"], folder)
    return state


def check_output(stored: dict[str, Stored], table: Tensor, folder: Path) -> None:
    """另存了一份输出层的，要与词嵌入相同。"""
    found = stored[OUTPUT]
    same = found.shape == tuple(table.shape)
    if not same or not torch.equal(read_tensor(OUTPUT, found, folder), table):
        raise UserError(f"{folder} 的输出层与词嵌入不是同一个矩阵，我们的模型装不下；请换一个模型")


def read_tensor(name: str, stored: Stored, folder: Path) -> Tensor:
    """一个参数，fp32。Raises UserError：读不全，或者有 NaN。"""
    data = bytearray(stored.size)
    stored.file.seek(stored.start)
    if stored.file.readinto(data) != stored.size:
        raise UserError(f"{folder} 的 {brief(name)} 没有读全，文件正在变；请等它写完")
    tensor = torch.frombuffer(data, dtype=stored.dtype).view(stored.shape).float()
    check_finite({name: tensor}, folder)
    return tensor
