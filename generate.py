"""生成：让模型一个词元一个词元地往下写。

    KVCache          记住前文的键与值，每写一个词元只算一个词元
    probabilities    打分 -> 概率：惩罚重复、温度、top-k、top-p、min-p
    generate         一边算一边给出编号
    is_looping       有没有陷进反复说同一句话的圈子
    load_for_chat    读检查点，放到设备上，准备好生成

图例：L 层数，B 批次，T 词元数，K 键值头数，D 头宽，V 词表大小。
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import load
from config import Config, UserError, option
from model import Transformer
from tokenizer import Tokenizer
from training import Device


@dataclass
class Sampling:
    """怎样从概率里选下一个词元。"""

    temp: float = option(0.6, "温度：越低越稳，越高越野；0 表示总选最可能的；sft_chat.py 用 0.3")
    top_k: int = option(50, "只从最可能的几个里选；0 表示不限", "个")
    top_p: float = option(0.95, "只从概率之和刚够这么多的最可能的几个里选；1 表示不限")
    min_p: float = option(0.0, "不选概率低于最高者这么多倍的；0 表示不限", "倍")
    penalty: float = option(1.1, "重复惩罚：大于 1 时，自己写过的词元不易再写；1 表示不罚")
    max: int = option(200, "一次最多写多少", "词元")
    seed: int = option(0, "随机种子：0 表示每次都不同")

    def problems(self) -> list[str]:
        """不合理的值，一条一句；都合理就是空列表。"""
        allowed = {  # 名字: (最小, 最大)
            "temp": (0, 10), "top_k": (0, 10**6), "top_p": (1e-6, 1), "min_p": (0, 1),
            "penalty": (0.1, 10), "max": (1, 10**6), "seed": (0, 2**63 - 1),
        }  # fmt: skip
        return [
            f"{name} 要在 {low} 与 {high} 之间，得到的是 {getattr(self, name)}"
            for name, (low, high) in allowed.items()
            if not low <= getattr(self, name) <= high
        ]


class KVCache:
    """每层的键与值，一次分配好；`length` 是已经记住的词元数，由模型推进。"""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype, batch: int = 1):
        head_dim = config.dim // config.n_heads
        shape = (config.n_layers, batch, config.n_kv_heads, config.max_len, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, K, max_len, D)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """写入新的键与值 (B, K, T, D)，返回到目前为止的全部 (B, K, length + T, D)。"""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


# ---------- 1. 打分 -> 概率 -> 选一个 ----------


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """出现过的词元，正的打分除以 penalty，负的乘以 penalty（CTRL，arXiv 1909.05858）。"""
    scores = logits[seen]
    return logits.scatter(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def keep_top_k(probs: Tensor, k: int) -> Tensor:
    """只留最可能的 k 个，其余归零。"""
    if k <= 0 or k >= probs.numel():
        return probs
    return torch.where(probs >= probs.topk(k).values[-1], probs, 0.0)


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """从大到小，留到概率之和达到 p 为止（nucleus sampling，arXiv 1904.09751）；至少留一个。"""
    if p >= 1:
        return probs
    sorted_probs, order = probs.sort(descending=True)
    before = sorted_probs.cumsum(0) - sorted_probs  # 排在它前面的概率之和
    return probs.scatter(0, order, torch.where(before < p, sorted_probs, 0.0))


def keep_min_p(probs: Tensor, p: float) -> Tensor:
    """去掉概率不到最高者 p 倍的（min-p，arXiv 2407.01082）。"""
    return torch.where(probs >= p * probs.max(), probs, 0.0)


def probabilities(logits: Tensor, seen: Tensor, sampling: Sampling, banned: Tensor) -> Tensor:
    """一个位置的打分 (V,) -> 真正拿来抽签的概率 (V,)，和为 1。

    Args:
        logits: 模型的打分。
        seen: 已经写出的编号，用于惩罚重复。
        sampling: 温度等；温度为 0 时，概率全归最可能的那一个。
        banned: 绝不选的编号。
    """
    logits = logits.float().index_fill(0, banned, float("-inf"))
    logits = penalize(logits, seen, sampling.penalty)
    if sampling.temp < 1e-3:  # 再小，打分除以它会溢出
        return nn.functional.one_hot(logits.argmax(), logits.numel()).float()
    probs = (logits / sampling.temp).softmax(0)
    probs = keep_top_k(probs, sampling.top_k)
    probs = keep_top_p(probs / probs.sum(), sampling.top_p)
    probs = keep_min_p(probs, sampling.min_p)
    return probs / probs.sum()


# ---------- 2. 一个接一个 ----------


@dataclass
class Speaker:
    """会说话的模型：模型、分词器，以及生成所需的一切。"""

    model: Transformer
    config: Config
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    stage: str
    banned: Tensor

    @torch.inference_mode()
    def generate(self, ids: list[int], sampling: Sampling, use_cache: bool = True) -> Iterator[int]:
        """接着 ids 往下写，逐个给出编号；写出 <|im_end|>、写满上限或上下文时停下。

        Args:
            ids: 开头，长度须在 1 与 max_len 之间。
            sampling: 怎样选。
            use_cache: 假时每一步都从头算一遍，只用来核对缓存。
        """
        generator = torch.Generator(self.device)
        generator.manual_seed(sampling.seed) if sampling.seed else generator.seed()
        cache = KVCache(self.config, self.device, self.dtype) if use_cache else None
        context = torch.tensor(ids, device=self.device)
        new = context
        for _ in range(min(sampling.max, self.config.max_len - len(ids))):
            logits = self.model((new if use_cache else context)[None], cache=cache)[0, -1]  # (V,)
            if not logits.isfinite().all():
                raise UserError("模型的打分不是有限的数，写不下去：训练时发散了？请换一个检查点")
            written = context[len(ids) :]  # 只罚自己写过的：罚提问里的字，「你好」就答成「我好」
            probs = probabilities(logits, written, sampling, self.banned)
            new = torch.multinomial(probs, 1, generator=generator)
            if new.item() == self.tokenizer.eos_id:
                return
            yield new.item()
            context = torch.cat([context, new])


def make_speaker(model: Transformer, config: Config, tokenizer: Tokenizer, stage: str) -> Speaker:
    """给一个模型配上生成所需的东西；模型留在原处，不改动。"""
    banned = [*tokenizer.never_sampled(), *range(tokenizer.vocab_size, config.vocab_size)]
    dtype = model.embedding.weight.dtype
    place = model.embedding.weight.device
    return Speaker(model, config, tokenizer, place, dtype, stage, torch.tensor(banned).to(place))


def load_for_chat(path: Path, device: Device) -> Speaker:
    """读检查点，放到设备上；矩阵换成设备擅长的精度，归一化与位置编码仍是 fp32。

    Raises:
        UserError: 检查点不存在、已损坏或不相配。
    """
    tokenizer = Tokenizer()
    model, config, checkpoint = load(path, tokenizer)
    model.eval().to(device.torch)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.to(device.dtype)
    return make_speaker(model, config, tokenizer, checkpoint["stage"])


def is_looping(ids: list[int], longest: int = 48) -> bool:
    """末尾是不是同一段话在反复：一段（至多 longest 个词元）连说四遍以上，且总共不少于 24 个。"""
    for period in range(1, min(longest, len(ids) // 4) + 1):
        span = max(4 * period, 24)
        if span <= len(ids) and ids[-span:-period] == ids[-span + period :]:
            return True
    return False
