"""生成：让模型一个词元一个词元地往下写。

    KVCache          记住前文的键与值，每写一个词元只算一个词元
    next_logits      新词元 -> 下一个词元的打分，编译的就是它
    probabilities    打分 -> 概率：惩罚重复、温度、top-k、top-p、min-p
    generate         一边算一边给出编号
    is_looping       有没有陷进反复说同样的话的圈子

图例：L 层数，B 批次，T 词元数，K 键值头数，D 头宽，V 词表大小。
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config import Config, UserError, option
from model import Transformer
from tokenizer import Tokenizer


@dataclass
class Sampling:
    """怎样从概率里选下一个词元。"""

    temp: float = option(0.6, "温度：越低越稳，越高越野；0 表示总选最可能的；sft_chat.py 用 0.3")
    top_k: int = option(50, "只从最可能的几个里选；0 表示不限", "个")
    top_p: float = option(0.95, "只从概率之和刚够这么多的最可能的几个里选；1 表示不限")
    min_p: float = option(0.0, "不选概率低于最高者这么多倍的；0 表示不限", "倍")
    penalty: float = option(1.1, "重复惩罚：大于 1，写过的词元不易再写；1 不罚；sft_chat.py 用 1.3")
    max: int = option(200, "一次最多写多少；sft_chat.py 用 400", "词元")
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


CALM = {"sft": {"temp": 0.3, "penalty": 1.3, "max": 400}}  # 接龙要活，回答要稳，也要写得完
BLANK_LINES, SAME_LINES = 3, 4  # 空行连着几行、同样的一行写了几遍，就算在反复
CHARACTERS_PER_TOKEN = 32  # 真的文字里，一个词元平均到不了这么多字


class KVCache:
    """每层的键与值，一次分配好，写在各自位置的那一格里。

    `visible`：注意力看前几格。还没写过的格子被遮住，所以看多看少结果一样；不编译时只看写过的，省时间，
    编译过的代码要求形状不变，就总看全部。
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype, batch: int = 1):
        shape = (batch, config.n_kv_heads, config.max_len, config.dim // config.n_heads)
        layers = range(config.n_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.visible = config.max_len

    def clear(self) -> None:
        """全部归零：被遮住的格子权重是 0，但 0 × NaN 还是 NaN，上一次的坏数会混进来。"""
        for buffer in (*self.keys, *self.values):
            buffer.zero_()

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """新的键与值 (B, K, T, D) 写进 positions (T,) 那几格；返回看得见的 (B, K, visible, D)。"""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, positions, k.type_as(keys))
        values.index_copy_(2, positions, v.type_as(values))
        return keys[:, :, : self.visible], values[:, :, : self.visible]


def next_logits(model, head, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
    """送进新词元 (1, T)，它们的位置是 positions (T,)；返回最后一个之后的打分 (V,)。"""
    x = model.hidden(ids, positions, cache=cache)
    return head(x[:, -1]).view(-1)


# ---------- 1. 打分 -> 概率 -> 选一个 ----------


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """出现过的词元，正的打分除以 penalty，负的乘以 penalty（CTRL，arXiv 1909.05858）。"""
    scores = logits[seen]
    return logits.scatter(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def check_finite(logits: Tensor) -> None:
    """打分里有一个不是有限的数，后面的就都没有意义。

    Raises:
        UserError: 模型坏了。
    """
    if not math.isfinite(logits.float().sum().item()):  # 有一个不是，和就不是
        raise UserError("模型的打分不是有限的数，写不下去：训练时发散了？请换一个检查点")


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


def adjust(logits: Tensor, seen: Tensor, sampling: Sampling, banned: Tensor) -> Tensor:
    """打分 (V,) -> 打分 (V,)，fp32：绝不选的是负无穷，已经写过的受罚。"""
    logits = logits.float().index_fill(0, banned, float("-inf"))
    return penalize(logits, seen, sampling.penalty)


def probabilities(logits: Tensor, seen: Tensor, sampling: Sampling, banned: Tensor) -> Tensor:
    """一个位置的打分 (V,) -> 真正拿来抽签的概率 (V,)，和为 1。

    Args:
        logits: 模型的打分。
        seen: 已经写出的编号，用于惩罚重复。
        sampling: 温度等；温度为 0 时，概率全归最可能的那一个。
        banned: 绝不选的编号。
    """
    logits = adjust(logits, seen, sampling, banned)
    if sampling.temp < 1e-3:  # 再小，打分除以它会溢出
        return nn.functional.one_hot(logits.argmax(), logits.numel()).float()
    k = min(sampling.top_k or logits.numel(), logits.numel())
    scores, ids = logits.topk(k)  # top-k：之后只看这 k 个，不必给整张词表排序
    probs = (scores / sampling.temp).softmax(0)
    probs = keep_top_p(probs, sampling.top_p)
    probs = keep_min_p(probs, sampling.min_p)
    return torch.zeros_like(logits).scatter(0, ids, probs / probs.sum())


def sample(logits, seen, sampling: Sampling, banned, generator: torch.Generator) -> Tensor:
    """一个位置的打分 (V,) -> 选中的编号 (1,)，参数同 `probabilities`。"""
    if sampling.temp < 1e-3:
        return adjust(logits, seen, sampling, banned).argmax(0, keepdim=True)
    probs = probabilities(logits, seen, sampling, banned)
    return torch.multinomial(probs, 1, generator=generator)


# ---------- 2. 一个接一个 ----------


@dataclass
class Choice:
    """写下一个词元的那一刻：选了哪个，当时的打分，之前自己写过什么。"""

    token: int
    logits: Tensor  # (V,)，只在走到下一个之前有效：编译过的代码会接着用这块内存
    written: Tensor  # 编号 (n,)


def check_characters(text: str, max_len: int) -> None:
    """长得无论如何也放不进 max_len 个词元的文字，不必分词就知道。Raises UserError。"""
    if len(text) > (most := CHARACTERS_PER_TOKEN * max_len):
        raise UserError(
            f"这段文字有 {len(text):,} 个字，模型最多看 {max_len} 个词元，"
            f"放不下；请缩到 {most:,} 个字以内"
        )


@dataclass
class Speaker:
    """会说话的模型：模型、分词器，以及生成所需的一切。缓存只有一份，所以一次只能写一篇。"""

    model: Transformer
    config: Config
    tokenizer: Tokenizer
    stage: str
    banned: Tensor
    head: Callable[[Tensor], Tensor]  # 最后的向量 (..., C) -> 打分 (..., V)
    cache: KVCache
    step: Callable[..., Tensor] = next_logits  # 只有一个新词元时用的，可以是编译过的

    def generate(self, ids: list[int], sampling: Sampling, use_cache: bool = True) -> Iterator[int]:
        """接着 ids 往下写，逐个给出编号；写出 <|im_end|>、写满上限或上下文时停下。

        Args:
            ids: 开头，长度须在 1 与 max_len 之间。
            sampling: 怎样选。
            use_cache: 假时每一步都从头算一遍，只用来核对缓存。
        """
        for choice in self.choices(ids, sampling, use_cache):
            if choice.token != self.tokenizer.eos_id:
                yield choice.token

    @torch.inference_mode()
    def choices(
        self, ids: list[int], sampling: Sampling, use_cache: bool = True
    ) -> Iterator[Choice]:
        """同 `generate`，但给出每次选择的全部情形；选中 <|im_end|> 的那一次也在内，是最后一个。"""
        device = self.banned.device
        generator = torch.Generator(device)
        generator.manual_seed(sampling.seed) if sampling.seed else generator.seed()
        context = torch.tensor(ids, device=device)
        self.cache.clear()
        done = 0  # 前多少个词元已经在缓存里
        for _ in range(min(sampling.max, self.config.max_len - len(ids))):
            logits = self._next(context, done if use_cache else 0)
            done = len(context)
            check_finite(logits)
            written = context[len(ids) :]  # 只罚自己写过的：罚提问里的字，「你好」就答成「我好」
            new = sample(logits, written, sampling, self.banned, generator)
            yield Choice(new.item(), logits, written)
            if new.item() == self.tokenizer.eos_id:
                return
            context = torch.cat([context, new])

    def encode(self, text: str) -> list[int]:
        """用户写的一段文字 -> 编号。先看有多少个字：分词时一个字占几百字节，太长的不能交给它。

        Raises:
            UserError: 长得无论如何也放不进上下文。
        """
        check_characters(text, self.config.max_len)
        return self.tokenizer.encode(text)

    def prompt(self, text: str) -> list[int]:
        """一段文字变成开头：预训练的模型接着写，微调过的当作一句提问来回答。"""
        ids = self.encode(text)
        if self.stage == "sft":
            return self.tokenizer.turn_ids("user", ids) + self.tokenizer.reply_prefix()
        return [self.tokenizer.bos_id, *ids]

    @torch.inference_mode()
    def read(self, ids: list[int]) -> Tensor:
        """不写，只读一遍：每个位置之后「下一个词元」的概率，(T,) -> (T, V)，fp32。"""
        row = torch.tensor([ids], device=self.banned.device)
        logits = self.head(self.model.hidden(row))[0]
        check_finite(logits)
        return logits.float().softmax(-1)

    def _next(self, context: Tensor, done: int) -> Tensor:
        """context (T,) 之后的打分 (V,)；其中前 done 个已经在缓存里。"""
        new, positions = context[done:], torch.arange(done, len(context), device=context.device)
        compiled = self.step is not next_logits
        step = self.step if len(new) == 1 else next_logits
        self.cache.visible = self.config.max_len if compiled else len(context)
        return step(self.model, self.head, new[None], positions, self.cache)


def make_speaker(model: Transformer, config: Config, tokenizer: Tokenizer, stage: str) -> Speaker:
    """给一个模型配上生成所需的东西；模型留在原处，不改动。"""
    banned = [*tokenizer.never_sampled(), *range(tokenizer.vocab_size, config.vocab_size)]
    weight = model.embedding.weight
    cache = KVCache(config, weight.device, weight.dtype)
    banned = torch.tensor(banned).to(weight.device)
    return Speaker(model, config, tokenizer, stage, banned, model.score, cache)


def is_looping(ids: list[int], tokenizer: Tokenizer, longest: int = 48) -> bool:
    """写到这里，是不是只在反复了：末尾的一段连说几遍，空行一行接一行，或者同样的一行写了又写。

    Args:
        ids: 已经写出的编号。
        longest: 反复的一段至多多少个词元。
    """
    for period in range(1, min(longest, len(ids) // 3) + 1):
        span = max((4 if period < 8 else 3) * period, 24)  # 短的可能是语气（哈哈哈哈），要多几遍
        if span <= len(ids) and ids[-span:-period] == ids[-span + period :]:
            return True
    if not ids or tokenizer.decode(ids[-1:]) != "\n":
        return False
    *lines, _ = tokenizer.decode(ids).split("\n")  # 刚写完一行
    if len(lines) > BLANK_LINES and not any(line.strip() for line in lines[-BLANK_LINES:]):
        return True
    words = [re.sub(r"^[\s\d.、)）*•-]+", "", line) for line in lines]  # 去掉开头的编号
    # 没有汉字的不算：程序里的 }、else:、``` 本来就一行行地重现，真的反复上面认得出
    return sum("一" <= c <= "鿿" for c in words[-1]) > 1 and words.count(words[-1]) >= SAME_LINES
