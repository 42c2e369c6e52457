"""显微镜：把模型的一次前向拆开来看。

`model.py` 里没有一行为此而写：PyTorch 的钩子（hook）能在每个零件算完时把输入和输出抄一份下来。

    look            走一遍前向，记下每层的残差流、注意力与挑中的专家
    logit_lens      假如读到某一层就停，它会猜什么
    leave_one_out   去掉前文里的一个词元，后面的猜测变了多少
    anatomy         从编号到打分的每一步：形状、参数、运算量

图例：L 层数，T 词元数，C 宽度，H 头数，E 专家数，V 词表大小。
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import Config
from experts import MixtureOfExperts, route
from model import RotaryEmbedding, Transformer, attend_by_hand


@dataclass
class View:
    """一次前向里发生的事，都是 fp32。"""

    ids: Tensor  # (T,)
    logits: Tensor  # (T, V)，模型的输出
    attention: Tensor  # (L, H, T, T)，每行之和为 1
    residual: Tensor  # (L + 1, T, C)，第 0 行是词嵌入，其后是每层之后的残差流
    writes: Tensor  # (L, 2, T)，每层的注意力与前馈各往残差流里加了多长的向量
    experts: Tensor | None  # (L, T, E)，各位专家占多少，没挑中的是 0，和为 1；稠密模型没有


# ---------- 1. 走一遍，记下来 ----------


@contextmanager
def hooks(model: Transformer) -> Iterator[dict[nn.Module, tuple]]:
    """给每个零件挂上钩子，离开时取下；得到 {零件: (输入, 输出)}。"""
    seen: dict[nn.Module, tuple] = {}

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen[module] = (inputs, output)

    handles = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def look(model: Transformer, ids: list[int]) -> View:
    """走一遍前向，记下每层的残差流、注意力与挑中的专家。

    Args:
        model: 没有压缩过的模型（压缩过的权重只是近似）。
        ids: 编号，1 到 max_len 个。
    """
    row = torch.tensor([ids], device=model.embedding.weight.device)  # (1, T)
    with hooks(model) as seen:
        logits = model(row)
    blocks = [seen[model.embedding], *(seen[block] for block in model.blocks)]
    branches = [(seen[b.attention], seen[b.feed_forward]) for b in model.blocks]
    writes = [torch.stack([y[0].float().norm(dim=-1) for _, y in pair]) for pair in branches]
    return View(
        ids=row[0],
        logits=logits[0].float(),
        attention=torch.stack([attention_weights(b.attention, seen) for b in model.blocks]),
        residual=torch.stack([output[0].float() for _, output in blocks]),
        writes=torch.stack(writes),
        experts=torch.stack([mixture(b.feed_forward, seen) for b in model.blocks])
        if isinstance(model.blocks[0].feed_forward, MixtureOfExperts)
        else None,
    )


def mixture(layer: MixtureOfExperts, seen: dict[nn.Module, tuple]) -> Tensor:
    """一层里每位专家占多少 (T, E)：由路由器的打分照样挑一遍。"""
    scores = seen[layer.router][1][0]  # (1, T, E) -> (T, E)
    _, weights, chosen = route(scores, layer.n_active)
    return torch.zeros_like(scores, dtype=torch.float32).scatter(1, chosen, weights)


def attention_weights(attention: nn.Module, seen: dict[nn.Module, tuple]) -> Tensor:
    """一层的注意力权重 (H, T, T)。

    融合的算子不交出权重，所以用它的输入再算一遍 `attend_by_hand`。
    """
    (_, context), _ = seen[attention]
    q, k = (
        RotaryEmbedding.rotate(seen[norm][1], context.cos, context.sin)
        for norm in (attention.query_norm, attention.key_norm)
    )  # (1, H, T, D), (1, K, T, D)
    _, weights = attend_by_hand(q, k, torch.zeros_like(k), context.mask, context.causal)
    return weights[0].float()


# ---------- 2. 读到某一层就停 ----------


@torch.inference_mode()
def logit_lens(model: Transformer, residual: Tensor) -> Tensor:
    """每层之后的残差流，跳过余下的层，直接翻译成打分：最后一层的就是模型的输出。

    「logit lens」由 nostalgebraist 在 2020 年提出；各层共用一条残差流，所以中途的也翻译得出来。

    Args:
        residual: (L + 1, T, C)
    Returns:
        打分 (L + 1, T, V)
    """
    return torch.stack([model.score(model.norm(x)).float() for x in residual])


# ---------- 3. 去掉一个词元 ----------


@torch.inference_mode()
def leave_one_out(
    model: Transformer, ids: list[int], targets: list[int], most: int = 4096
) -> Tensor:
    """去掉第 i 个词元，第 t 个位置给 targets[t] 的对数概率变成多少（i ≤ t）。

    其余词元留在原来的位置上，相对距离不变。去掉位置 t 自己时，由前一个词元来猜。位置 i 之前的看不见
    第 i 个，本来就不受影响。

    Args:
        ids: 编号，T 个。
        targets: 每个位置上要看的那个「下一个词元」，T 个。
        most: 一次前向最多多少个词元，只影响内存。
    Returns:
        (T, T)，奈特；行是去掉的，列是猜测的位置；没有意义的（i > t，或一个也不剩）是 NaN。
    """
    device, n = model.embedding.weight.device, len(ids)
    result = torch.full((n, n), float("nan"))
    if n == 1:
        return result
    others = torch.tensor([[j for j in range(n) if j != i] for i in range(n)], device=device)
    row, wanted = torch.tensor(ids, device=device), torch.tensor(targets, device=device)
    for some in torch.arange(n, device=device).split(max(1, most // n)):  # 去掉的是哪几个
        x = model.hidden(row[others[some]], positions=others[some])  # (R, T - 1, C)
        i, before = torch.where(torch.arange(1, n, device=device) >= some[:, None])
        logits = model.score(x[i, before]).float()  # 第 before 格接着猜的是位置 t = before + 1
        chosen = logits.gather(1, wanted[before + 1, None])[:, 0]
        result[some[i].cpu(), before.cpu() + 1] = (chosen - logits.logsumexp(1)).cpu()
    return result


# ---------- 4. 每一步的形状、参数、运算量 ----------

STEPS = {  # 零件的名字: 做什么；块里的前面加 blocks.0.
    "embedding": "查表：编号变成向量",
    "attention_norm": "归一化",
    "attention.query": "查询：我在找什么",
    "attention.key": "键：我有什么",
    "attention.value": "值：被看时交出什么",
    "attention.query_norm": "查询归一，再按位置旋转",
    "attention.key_norm": "键归一，再按位置旋转",
    "attention": "查询与键的内积取 softmax：每行的权重，再按它把值加起来",
    "attention.out": "投影回来，加进残差流",
    "feed_forward_norm": "归一化",
    "feed_forward.router": "路由器：给各位专家打分，挑最高的几位",
    "feed_forward": "挑中的几位专家各算各的，按权重相加，加进残差流",
    "feed_forward.gate": "前馈的门",
    "feed_forward.up": "前馈的另一路，与门相乘",
    "feed_forward.down": "投影回来，加进残差流",
    "norm": "最后的归一化",
    "": "与每个词元的嵌入作内积，得到打分",
}


@dataclass
class Part:
    """一步：哪个零件、做什么、输出的形状、参数的个数、一次前向的浮点运算数（只数矩阵乘法）。"""

    name: str
    does: str
    shape: tuple[int, ...]
    params: int
    flops: int


def grouped(rows: tuple, matrices: tuple, *_, **__) -> int:
    """PyTorch 不会数 `F.grouped_mm` 的运算：(N, 入) 的每一行只乘 (E, 入, 出) 里的一个矩阵。"""
    return 2 * rows[0] * rows[1] * matrices[-1]


def anatomy(config: Config, n_tokens: int) -> list[Part]:
    """从编号到打分的每一步，一个块只列一次（各块相同）。

    在 "meta" 设备上走一遍前向：张量只有形状，没有内容，所以再大的模型也是一眨眼。

    Args:
        config: 模型的形状。
        n_tokens: 输入几个词元。
    """
    with torch.device("meta"):
        model = Transformer(replace(config, n_layers=1)).bfloat16()  # grouped_mm 在这里只认 bf16
        ids = torch.zeros(1, n_tokens, dtype=torch.long)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped})
    with torch.inference_mode(), hooks(model) as seen, counter:
        model(ids)
    counted = {n: sum(ops.values()) for n, ops in counter.get_flop_counts().items()}
    modules, parts = dict(model.named_modules()), []
    for step, does in STEPS.items():
        name = f"blocks.0.{step}" if f"blocks.0.{step}" in modules and step else step
        if name not in modules or (step == "feed_forward" and not config.n_experts):
            continue  # 稠密模型没有路由器；专家混合的三个矩阵叠在一起，不是单独的零件
        module = modules[name]
        full = f"Transformer.{name}" if name else "Transformer"
        inside = [f"{full}.{child}" for child, _ in module.named_children()]
        if not name:  # 块在 ModuleList 里，没有自己的一项
            inside += ["Transformer.blocks.0"]
        flops = counted.get(full, 0) - sum(counted.get(child, 0) for child in inside)
        params = sum(p.numel() for p in module.parameters(recurse=False))
        shape = tuple(seen[module][1].shape[1:])
        if step == "attention":  # 它的输出是 out 的；自己做的是 T × T 的权重表
            shape = (config.n_heads, n_tokens, n_tokens)
        parts.append(Part(name or "score", does, shape, params, flops))
    return parts
