"""与 transformers 的 Qwen3 对照：同样的结构，两套名字。导出、导入与测速都用这一份。

    qwen3_config      我们的形状 -> Qwen3Config 或 Qwen3MoeConfig
    qwen3             同样形状的 Qwen3ForCausalLM，可以装进同样的权重
    to_theirs         我们的参数 -> 它的参数
    TwoPaths          导出与导入共用的命令行：两个路径，后面是各项参数

图例：E 专家数，C 宽度，I 前馈的中间宽度。
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config import Config, UserError
from settings.flags import word
from settings.say import clean

TWO_PATHS = "要先写两个路径：从哪里、到哪里；{usage}"

# 我们的配置 -> transformers 的配置。
SHAPE = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size", "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}  # fmt: skip
EXPERTS = {
    "n_experts": "num_experts", "n_active": "num_experts_per_tok",
    "hidden_dim": "moe_intermediate_size",
}  # fmt: skip

# 我们的参数 -> transformers 的参数，从上到下逐个替换。
NAMES = {
    "embedding.": "model.embed_tokens.", "blocks.": "model.layers.",
    "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.router": "mlp.gate",
    "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}  # fmt: skip
# 专家的门、升、降三叠矩阵；它在内存里把门与升首尾相接，存盘时又一个专家一个专家地分开。
OUR_STACKS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
STATISTIC = ".load"  # 上一步各位专家的份额，不是参数


# ---------- 1. 形状 ----------


def qwen3_config(config: Config, **more):
    """同样形状的 `Qwen3Config`；有专家的是 `Qwen3MoeConfig`。

    Args:
        more: 另外要写进去的，例如 eos_token_id。
    """
    from transformers import Qwen3Config, Qwen3MoeConfig

    shape = {theirs: getattr(config, ours) for ours, theirs in SHAPE.items()}
    shape |= dict(
        head_dim=config.dim // config.n_heads, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    if not config.n_experts:
        return Qwen3Config(**shape | more)
    experts = {theirs: getattr(config, ours) for ours, theirs in EXPERTS.items()}
    return Qwen3MoeConfig(**shape | experts | {"norm_topk_prob": True} | more)


def qwen3(config: Config, state: dict[str, Tensor] | None = None, **more) -> nn.Module:
    """同样形状的 `Qwen3ForCausalLM`，fp32。

    Args:
        state: 我们的 state_dict，装进去；不给就是随机的。
        more: 另外写进配置的。
    """
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_config(qwen3_config(config, **more), dtype=torch.float32)
    if state is not None:
        theirs.load_state_dict(to_theirs(state))
    return theirs


# ---------- 2. 参数 ----------


def their_name(name: str) -> str:
    """blocks.0.attention.query.weight -> model.layers.0.self_attn.q_proj.weight"""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return "model.norm.weight" if name == "norm.weight" else name


def to_theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """我们的 state_dict -> 它的。数没有变，只是换了名字，专家的门与升接在一起。"""
    weights = {their_name(n): w for n, w in state.items() if not n.endswith(STATISTIC)}
    for name in [n for n in weights if n.endswith(OUR_STACKS[0])]:
        layer = name.removesuffix(OUR_STACKS[0])
        gate, up, down = (weights.pop(layer + stack) for stack in OUR_STACKS)
        weights[layer + GATE_UP] = torch.cat([gate, up], dim=1)  # 两个 (E, I, C) -> (E, 2I, C)
        weights[layer + DOWN] = down  # (E, C, I)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def check_finite(state: dict[str, Tensor], path: Path) -> None:
    """参数里有没有 NaN 或无穷大。Raises UserError：说出是哪一个。"""
    for name, weight in state.items():
        if not weight.isfinite().all():
            raise UserError(
                f"{path} 的参数 {clean(str(name))[:200]} 里有 NaN 或无穷大，不能用；请换一个模型"
            )


# ---------- 3. 程序 ----------


@dataclass
class TwoPaths:
    """命令行的开头：从哪里、到哪里；导出与导入的参数都接着它写。"""

    source: str = word("路径", TWO_PATHS)
    target: str = word("路径", TWO_PATHS)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers 读写时不印进度条与英文的报告：该说的，我们自己用一句话说。"""
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before[0])
        if before[1]:
            logging.enable_progress_bar()
