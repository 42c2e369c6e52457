"""显微镜：把模型的一次前向拆开来看，还能伸手进去改。

`model.py` 里没有一行为此而写：PyTorch 的钩子（hook）能在每个零件算完时把输入和输出抄一份下来，
或者换成别的。

    look            走一遍前向，记下每层的残差流、注意力与挑中的专家
    logit_lens      假如读到某一层就停，它会猜什么
    leave_one_out   去掉前文里的一个词元，后面的猜测变了多少
    without         关掉几个头、几层的注意力或前馈、几位专家
    patched         一个位置上的向量，换成从别处搬来的

图例：L 层数，T 词元数，C 宽度，H 头数，E 专家数，V 词表大小。
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config import UserError
from experts import MixtureOfExperts, route
from model import AttentionContext, Block, RotaryEmbedding, Transformer, attend_by_hand


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


# ---------- 4. 动手改 ----------


@contextmanager
def without(model: Transformer, names: Iterable[str]) -> Iterator[None]:
    """关掉几个零件：输出是零，什么也不往残差流里加。离开时恢复（消融，arXiv 1905.10650）。

    Args:
        names: 层、头、专家都从 1 数起：2.1 是第 2 层第 1 头；2.attention 与 2.feed_forward 是
            第 2 层的注意力与前馈；2.expert3 是它的 3 号专家，挑中的仍然挑它，只是它不说话。
    Raises:
        UserError: 没有这个零件。
    """
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(switched_off(model, name))
        yield


@contextmanager
def switched_off(model: Transformer, name: str) -> Iterator[None]:
    """关掉一个零件；参数同 `without`。"""
    block, part, number = find_part(model, name)
    if part == "expert":
        down = block.feed_forward.down[number]
        weight = getattr(down, "weight", down)  # 压缩过的，矩阵在它里面
        with torch.no_grad():
            before = weight.clone()
            try:
                weight.zero_()
                yield
            finally:
                weight.copy_(before)
        return
    if part == "head":
        D = block.attention.head_dim
        mine = slice(number * D, (number + 1) * D)

        def silence(module: nn.Module, inputs: tuple) -> tuple:
            y = inputs[0].clone()  # (B, T, H·D)，各个头首尾相接
            y[..., mine] = 0
            return (y,)

        handle = block.attention.out.register_forward_pre_hook(silence)
    else:
        handle = getattr(block, part).register_forward_hook(lambda m, i, y: torch.zeros_like(y))
    try:
        yield
    finally:
        handle.remove()


def find_part(model: Transformer, name: str) -> tuple[Block, str, int]:
    """零件的名字 -> 在哪一层，哪一种，第几个（从 0 数起）；写法见 `without`。Raises UserError。"""
    found = re.fullmatch(
        r"(\d{1,4})\.(?:(\d{1,4})|(attention|feed_forward)|expert(\d{1,4}))", name, re.A
    )
    if not found:
        raise UserError(
            f"看不懂「{name[:40]}」；写成 2.1（第 2 层第 1 头）、2.attention、2.feed_forward "
            "或 2.expert3"
        )
    layer, head, part, expert = found.groups()
    check_layer(model, int(layer))
    block = model.blocks[int(layer) - 1]
    if part:
        return block, part, 0
    mixture = block.feed_forward if hasattr(block.feed_forward, "router") else None
    if expert and mixture is None:
        raise UserError(f"这个模型没有专家，关不掉 {name}；前馈是 {layer}.feed_forward")
    number = int(expert or head)
    most = len(mixture.down) if expert else n_heads(model)
    if not 1 <= number <= most:
        what = "专家" if expert else "头"
        raise UserError(f"每层有 {most} 个{what}，从 1 数起，没有 {name}")
    return block, "expert" if expert else "head", number - 1


def n_heads(model: Transformer) -> int:
    """每层几个头。"""
    return model.embedding.embedding_dim // model.blocks[0].attention.head_dim


def check_layer(model: Transformer, layer: int) -> None:
    """有没有这一层，从 1 数起。Raises UserError。"""
    if not 1 <= layer <= len(model.blocks):
        raise UserError(f"模型有 {len(model.blocks)} 层，从 1 数起，没有第 {layer} 层")


@contextmanager
def patched(model: Transformer, layer: int, position: int, vector: Tensor) -> Iterator[None]:
    """读到 position，第 layer 层（从 1 数起）之后的残差流换成 vector (C,)，再往上读。

    vector 多半是另一段文字的 `look(…).residual[layer, 位置]`：搬过来之后猜测跟着变，
    说明它装着这件事（activation patching，arXiv 2202.05262）。

    Raises:
        UserError: 没有这一层。
    """
    check_layer(model, layer)

    def swap(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        context: AttentionContext = inputs[1]
        here = context.positions == position  # (T,) 或 (B, T)
        return torch.where(here[..., None], vector.type_as(output), output)

    handle = model.blocks[layer - 1].register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()
