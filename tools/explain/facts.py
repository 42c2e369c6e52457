"""看一遍，所有要给人看的数，记成能写进 JSON 的样子。

    examine            一段文字 -> 全部的数
    packed, unpacked   注意力写成文字，再读回来
    total_flops        一次前向的浮点运算数

图例：L 层数，H 头数，T 词元数，V 词表，E 专家数，A 每个词元挑中的专家数。
"""

import base64
from dataclasses import asdict

import numpy as np
import torch

from generate import Speaker, check_finite
from microscope import leave_one_out, logit_lens, look
from tools.explain.anatomy import anatomy


def examine(speaker: Speaker, ids: list[int], dropped: int = 0) -> dict:
    """把 ids 看一遍，所有要给人看的数。

    「目标」是每个位置的下一个词元；最后一个位置没有下一个，就用模型最想写的。

    Args:
        dropped: 前面还有多少个词元没有送进来，只用来说一声。
    Raises:
        UserError: 模型坏了，打分不是有限的数。
    """
    model, label = speaker.model, speaker.tokenizer.label
    view = look(model, ids)
    check_finite(view.logits)
    probs = view.logits.softmax(-1)  # (T, V)
    targets = [*ids[1:], probs[-1].argmax().item()]
    lens = logit_lens(model, view.residual).softmax(-1)  # (L + 1, T, V)
    without = leave_one_out(model, ids, targets).exp()  # (T, T)
    wanted = torch.tensor(targets, device=probs.device)

    def best(p: torch.Tensor, k: int) -> list:
        """概率 (T, V) -> 每个位置最可能的 k 个 [名字, 概率]。"""
        values, tokens = p.topk(k)
        return [
            [[label(token), rounded(value)] for token, value in zip(*pair, strict=True)]
            for pair in zip(tokens.tolist(), values.tolist(), strict=True)
        ]

    parts = [asdict(part) for part in anatomy(speaker.config, len(ids))]
    return {
        "stage": speaker.stage,
        "ids": ids,
        "changed": "",  # 动了什么，见 hands.py
        "before": None,
        "answers": None,
        "dropped": dropped,
        "tokens": [label(token) for token in ids],
        "targets": [label(token) for token in targets],
        "next": best(probs, 10),
        "target_p": [rounded(p) for p in probs.gather(1, wanted[:, None])[:, 0].tolist()],
        "attention": packed(view.attention),
        "n_heads": view.attention.size(1),
        "n_layers": view.attention.size(0),
        "lens": [best(layer, 3) for layer in lens],
        "lens_target_p": [
            [rounded(p) for p in layer.gather(1, wanted[:, None])[:, 0].tolist()] for layer in lens
        ],
        "without": [[None if p != p else rounded(p) for p in row] for row in without.tolist()],
        "norms": [[rounded(x) for x in row] for row in view.residual.norm(dim=-1).tolist()],
        "writes": [[[rounded(x) for x in y] for y in pair] for pair in view.writes.tolist()],
        "experts": taken(view.experts, speaker.config.n_active),
        "parts": parts,
        "total_params": sum(p.numel() for p in model.parameters()),
    }


def taken(experts: torch.Tensor | None, n_active: int) -> list | None:
    """各位专家占多少 (L, T, E) -> 每层每个词元挑中的几位 [第几位（从 1 数起）, 占多少]。"""
    if experts is None:
        return None
    weights, chosen = experts.topk(n_active, dim=-1)  # 各 (L, T, A)
    pairs = torch.stack([chosen + 1, weights], dim=-1).tolist()
    return [[[[int(e), rounded(w)] for e, w in token] for token in layer] for layer in pairs]


def rounded(x: float) -> float:
    """留六位有效数字：写进网页的字节少一半，看不出差别。"""
    return float(f"{x:.6g}")


def packed(attention: torch.Tensor) -> str:
    """注意力 (L, H, T, T) -> 下三角的数，每个 16 位（1/65535 为单位），base64 文字。

    只写 j ≤ i 的：看不见后面，那里都是 0。
    """
    rows, columns = np.tril_indices(attention.size(-1))
    weights = attention.cpu().numpy()[:, :, rows, columns]
    return base64.b64encode((weights * 65535).round().astype("<u2").tobytes()).decode()


def unpacked(facts: dict) -> np.ndarray:
    """`packed` 的反面：(L, H, T, T)。"""
    n, shape = len(facts["ids"]), (facts["n_layers"], facts["n_heads"])
    weights = np.zeros((*shape, n, n), np.float32)
    rows, columns = np.tril_indices(n)
    numbers = np.frombuffer(base64.b64decode(facts["attention"]), "<u2").reshape(*shape, -1)
    weights[:, :, rows, columns] = numbers / 65535
    return weights


def total_flops(facts: dict) -> int:
    """一次前向的浮点运算数：块里的乘以层数。"""
    times = [facts["n_layers"] if p["name"].startswith("blocks.") else 1 for p in facts["parts"]]
    return sum(n * p["flops"] for n, p in zip(times, facts["parts"], strict=True))
