"""手写的 Transformer 解码器：给出每个位置上「下一个词元」的打分。

从下往上读：

    RMSNorm            把向量的长度归一
    RotaryEmbedding    用旋转表示位置（RoPE）
    attend_by_hand     注意力：按相关程度，从前文取信息（看得懂的一份；attend 是快的一份）
    Attention          产生查询、键、值的一层注意力
    FeedForward        逐个位置做的非线性变换（SwiGLU）
    Block              注意力 + 前馈（或者 experts.py 的专家混合），各自加在残差流上
    Transformer        词嵌入 -> 若干个 Block -> 每个词元的打分

结构与 Qwen3（arXiv 2505.09388）相同，包括它的专家混合。本文件不认识分词器、文件、设备和采样。

图例：B 批次，T 词元数，S 可见的键的个数，C 宽度，H 头数，K 键值头数，D 头宽，V 词表大小。
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from experts import MixtureOfExperts, Routing


class RMSNorm(nn.Module):
    """除以均方根，再乘可学的增益（Root Mean Square Layer Normalization，arXiv 1910.07467）。"""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)，类型不变；均方根在 fp32 中计算，半精度的平方会溢出。"""
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale * self.weight).type_as(x)


class RotaryEmbedding(nn.Module):
    """旋转位置编码：把查询和键按位置旋转，内积便只取决于相对距离（RoFormer，arXiv 2104.09864）。"""

    def __init__(self, head_dim: int, max_len: int, theta: float):
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)  # (D/2,)
        angles = torch.outer(torch.arange(max_len).float(), frequencies)  # (max_len, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """位置 (B, T) 或 (T,) -> 余弦与正弦 (B 或 1, 1, T, D/2)，可与各个头广播相乘。"""
        cos, sin = self.cos[positions], self.sin[positions]
        return cos.view(-1, 1, *cos.shape[-2:]), sin.view(-1, 1, *sin.shape[-2:])

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, T, D)：第 i 维与第 i + D/2 维组成一个平面，在其中旋转。"""
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class AttentionContext(NamedTuple):
    """一层注意力除了 x 还要知道的：每个词元在哪里，看得见谁，前文的键与值在哪里。各层用同一份。"""

    cos: Tensor  # (B 或 1, 1, T, D/2)，按位置旋转的角度
    sin: Tensor
    mask: Tensor | None  # 布尔 (B 或 1, 1, T, S)，真表示可以看
    causal: bool  # 没有 mask 时，只许看自己与前文
    positions: Tensor  # (B, T) 或 (T,)
    cache: Any  # `generate.KVCache` 或 None


def attend_by_hand(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """注意力，看得懂的一份：按查询与键有多像，把值加权平均起来。

    Args:
        q: 查询 (B, H, T, D)。
        k, v: 键与值 (B, K, S, D)，每 H/K 个查询头共用一个键值头（GQA，arXiv 2305.13245）。
        mask: 布尔 (B 或 1, 1, T, S)，真表示可以看；None 表示不另设限制。
        causal: 只许看自己与前文（T = S 时用，与 mask 二选一）。
    Returns:
        (B, H, T, D)，以及权重 (B, H, T, S)，每行之和为 1。
    """
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # K -> H
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5  # (B, H, T, S)
    if causal:
        mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    return weights @ v, weights


def needs_own_heads(q: Tensor, mask: Tensor | None) -> bool:
    """显卡上要不要把键值抄成每个查询头一份：看有没有融合算子肯让几个查询头共用一份。

    各种显卡上都肯的只有 flash，而它不收 mask，只收半精度，要 Ampere 以上；我们在那些卡上用 bf16，
    更老的用 fp16，所以看精度就知道。别的融合算子 Turing 上也有，但要头数相同。
    都不肯，PyTorch 就退到逐步算的一份：fp32，写出 T × S 的权重表。见 docs/lab-notes.md。
    """
    return q.is_cuda and (mask is not None or q.dtype != torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """注意力，快的一份：参数同 `attend_by_hand`，不交出权重，返回 (B, H, T, D)。

    交给 PyTorch 的融合算子，不在内存里写出 T × S 的权重表。在 CPU 上编译 bf16 时例外：
    编译器把 `attend_by_hand` 融合得比那个算子快，见 docs/lab-notes.md。
    """
    if q.size(2) == 1 and not causal:  # 只有一个新词元：同组的 H/K 个头当作 H/K 行，键值只读一遍
        rows = q.view(q.size(0), k.size(1), -1, q.size(3))  # (B, K, H/K, D)
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)
    if torch.compiler.is_compiling() and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_by_hand(q, k, v, mask, causal)[0]
    groups = q.size(1) // k.size(1)
    if groups > 1 and needs_own_heads(q, mask):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # K -> H
        groups = 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1
    )


class Attention(nn.Module):
    """分组查询注意力，查询与键先归一（QK-norm，arXiv 2302.05442），训练因此更稳。"""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer  # 第几层，从 0 数：缓存里各层有各层的一份
        dim, self.head_dim = config.dim, config.dim // config.n_heads
        self.query = nn.Linear(dim, config.n_heads * self.head_dim, bias=False)
        self.key = nn.Linear(dim, config.n_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(dim, config.n_kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.n_heads * self.head_dim, dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C)。有缓存时，新的键与值写进去，前文的取自其中。"""
        B, T, _ = x.shape
        q = self.query(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.key(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.value(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q = RotaryEmbedding.rotate(self.query_norm(q), context.cos, context.sin)
        k = RotaryEmbedding.rotate(self.key_norm(k), context.cos, context.sin)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, context.positions, k, v)  # (B, K, S, D)
        y = attend(q, k, v, context.mask, context.causal)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU：一路经 SiLU 作门，与另一路相乘，再投影回来（GLU Variants，arXiv 2002.05202）。"""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)；routing 只有专家混合才用。"""
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def start_from_nothing(self) -> None:
        """最后一个投影归零：刚出生时，什么也不往残差流里加。"""
        nn.init.zeros_(self.down.weight)


class Block(nn.Module):
    """一层：先归一再变换，结果加回残差流。残差流从词嵌入直通输出，梯度因此传得到底。"""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = (MixtureOfExperts if config.n_experts else FeedForward)(config)

    def forward(
        self, x: Tensor, context: AttentionContext, routing: Routing | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.feed_forward(self.feed_forward_norm(x), routing)


class Transformer(nn.Module):
    """整个模型：编号进，打分出。

    Args:
        config: 用到 vocab_size、dim、n_layers、n_heads、n_kv_heads、hidden_dim、n_experts、
            n_active、balance_coef、router_scale、max_len、rope_theta、norm_eps。
    """

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.rotary = RotaryEmbedding(
            config.dim // config.n_heads, config.max_len, config.rope_theta
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.max_len = config.max_len
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """词嵌入取小的随机数；各层按输入宽度缩放；每条残差支路的最后一个投影从零开始。

        于是刚出生的每一层都是「什么也不做」，模型对所有词元几乎一视同仁，损失约为 ln V。
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for block in self.blocks:
            nn.init.zeros_(block.attention.out.weight)
            block.feed_forward.start_from_nothing()

    def forward(self, ids: Tensor, positions=None, segments=None, cache=None) -> Tensor:
        """下一个词元的打分（未归一的对数概率）：(B, T) -> (B, T, V)，参数同 `hidden`。"""
        return self.score(self.hidden(ids, positions, segments, cache))

    def score(self, x: Tensor) -> Tensor:
        """向量 -> 打分：(..., C) -> (..., V)，就是与每个词元的嵌入作内积（arXiv 1608.05859）。"""
        return F.linear(x, self.embedding.weight)

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache=None,
        routing: Routing | None = None,
    ) -> Tensor:
        """读完所有层之后，每个位置上的向量：模型对「下一个词元」的全部想法，还没有翻译成打分。

        Args:
            ids: 编号 (B, T)，整型。
            positions: 每个词元的位置 (B, T) 或 (T,)；默认从 0 起依次递增。
            segments: 每个词元属于第几段 (B, T)；同段才能互相看见。默认整行是一段。
            cache: `generate.KVCache`；给了就只送新词元，并且要给 positions (T,)：写进缓存的第几格。
            routing: 训练专家混合时给，收集负载均衡损失。
        Returns:
            (B, T, C)
        Raises:
            ValueError: 词元数超过模型的最大长度。
        """
        if (T := ids.size(1)) > self.max_len:
            raise ValueError(f"词元数 {T} 超过模型的最大长度 {self.max_len}")
        if positions is None:
            positions = torch.arange(T, device=ids.device)

        mask = None
        if segments is not None:
            same_segment = segments[:, None, :, None] == segments[:, None, None, :]
            mask = same_segment.tril()  # (B, 1, T, T)
        elif cache is not None:
            slots = torch.arange(cache.visible, device=ids.device)
            mask = slots <= positions.view(1, 1, T, 1)  # (1, 1, T, S)
        causal = mask is None

        x = self.embedding(ids)  # (B, T, C)
        context = AttentionContext(*self.rotary(positions), mask, causal, positions, cache)
        for block in self.blocks:
            x = block(x, context, routing)
        return self.norm(x)
