"""对照：别人是怎样做的。tools.bench 拿我们的与它们比，谁都可以装来核对。

OriginalManner   最初那个项目的做法：fp32、学出来的位置、每行补齐到 max_len、没有缓存
padded_rows      同上：一行放一篇文档，不足的补齐
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from corpus.token_file import TokenFile
from dataset import IGNORE


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
