"""对照：别人是怎样做的。tools.bench 拿我们的与它们比，谁都可以装来核对。

qwen3            transformers 的 Qwen3ForCausalLM：同样的形状，可以装进同样的权重
OriginalManner   最初那个项目的做法：fp32、学出来的位置、每行补齐到 max_len、没有缓存
padded_rows      同上：一行放一篇文档，不足的补齐
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from dataset import IGNORE, TokenFile
from model import Transformer

# 我们的名字 -> transformers 的名字
NAMES = {
    "embedding.": "model.embed_tokens.", "blocks.": "model.layers.",
    "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}  # fmt: skip


def qwen3(config: Config, model: Transformer | None = None) -> nn.Module:
    """同样形状的 `Qwen3ForCausalLM`；给了 model，就装进它的权重，否则随机。"""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size, hidden_size=config.dim,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, head_dim=config.dim // config.n_heads,
            intermediate_size=config.hidden_dim, max_position_embeddings=config.max_len,
            rms_norm_eps=config.norm_eps, tie_word_embeddings=True, attention_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    if model is not None:
        weights = {}
        for name, value in model.state_dict().items():
            for ours, hf in NAMES.items():
                name = name.replace(ours, hf)
            weights["model.norm.weight" if name == "norm.weight" else name] = value
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        theirs.load_state_dict(weights)
    return theirs


class OriginalManner(nn.Module):
    """PyTorch 自带的 Transformer 层，位置是学出来的；层数、宽度、头数与我们的相同。

    前馈有两个矩阵而不是三个，中间宽度乘 1.5，前馈的参数便一样多；整个模型多出一成。
    """

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position = nn.Embedding(config.max_len, config.dim)
        layer = nn.TransformerEncoderLayer(
            config.dim, config.n_heads, config.hidden_dim * 3 // 2, dropout=0.0,
            activation="gelu", batch_first=True, norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(
            layer, config.n_layers, nn.LayerNorm(config.dim), enable_nested_tensor=False
        )
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)"""
        T = ids.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(T, ids.device)
        x = self.embedding(ids) + self.position(torch.arange(T, device=ids.device))
        return F.linear(self.layers(x, mask, is_causal=True), self.embedding.weight)


def padded_rows(data: TokenFile, length: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """一行一篇，补齐到 length；无穷无尽地给出 (编号, 目标)，各 (rows, length)。"""
    tokens, starts = data.tokens["train"], data.starts["train"]
    order = np.random.default_rng(0).permutation(len(starts) - 1)
    at = 0
    while True:
        ids = np.zeros((rows, length), np.int64)
        targets = np.full((rows, length), IGNORE, np.int64)
        for r in range(rows):
            n = order[at % len(order)]
            document = tokens[starts[n] : starts[n + 1]][: length + 1].astype(np.int64)
            ids[r, : len(document) - 1] = document[:-1]
            targets[r, : len(document) - 1] = document[1:]
            at += 1
        yield torch.from_numpy(ids), torch.from_numpy(targets)
