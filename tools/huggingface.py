"""与 transformers 的 Qwen3 对照：同样的结构，两套名字。导出、导入与测速都用这一份。

qwen3_config     我们的形状 -> Qwen3Config 或 Qwen3MoeConfig
qwen3            同样形状的 Qwen3ForCausalLM，可以装进同样的权重
to_theirs        我们的参数 -> 它的参数；to_ours 反过来
paths_and_options  两个程序共用的命令行：两个路径，后面是各项参数
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from config import Config, UserError, check_choices, help_text, is_text, parse_flags

# 我们的名字 -> transformers 的名字，从上到下逐个替换。
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
# 专家的三叠矩阵，它存成两叠：门与升维的首尾相接。
STACKS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


# ---------- 1. 形状 ----------


def qwen3_config(config: Config, **special):
    """同样形状的 `Qwen3Config`；有专家的是 `Qwen3MoeConfig`。

    Args:
        special: 另外要写进去的，例如 eos_token_id。
    """
    from transformers import Qwen3Config, Qwen3MoeConfig

    shape = dict(
        vocab_size=config.vocab_size, hidden_size=config.dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, head_dim=config.dim // config.n_heads,
        intermediate_size=config.hidden_dim, max_position_embeddings=config.max_len,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=True, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ) | special  # fmt: skip
    if not getattr(config, "n_experts", 0):
        return Qwen3Config(**shape)
    return Qwen3MoeConfig(
        **shape, num_experts=config.n_experts, num_experts_per_tok=config.n_active,
        moe_intermediate_size=config.hidden_dim, norm_topk_prob=True,
    )  # fmt: skip


def qwen3(config: Config, state: dict[str, Tensor] | None = None, **special) -> nn.Module:
    """同样形状的 `Qwen3ForCausalLM`；给了 state（我们的 state_dict），就装进它的权重，否则随机。"""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_config(qwen3_config(config, **special), dtype=torch.float32)
    if state is not None:
        theirs.load_state_dict(to_theirs(state))
    return theirs


# ---------- 2. 名字 ----------


def their_name(name: str) -> str:
    """blocks.0.attention.query.weight -> model.layers.0.self_attn.q_proj.weight"""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return "model.norm.weight" if name == "norm.weight" else name


def to_theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """我们的 state_dict -> 它的；数没有变，只是换了名字，专家的门与升维叠在一起。"""
    weights = {their_name(n): w for n, w in state.items() if not n.endswith(".load")}
    for name in [n for n in weights if n.endswith(STACKS[0])]:
        layer = name.removesuffix(STACKS[0])
        gate, up, down = (weights.pop(layer + stack) for stack in STACKS)  # 各 (E, …, …)
        weights[layer + FUSED[0]] = torch.cat([gate, up], dim=1)  # (E, 2·hidden_dim, C)
        weights[layer + FUSED[1]] = down
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def to_ours(weights: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """反过来：它的 state_dict -> 我们的。

    Args:
        names: 我们的 state_dict 里该有的名字。
    """
    weights = dict(weights)
    for name in [n for n in weights if n.endswith(FUSED[0])]:
        layer = name.removesuffix(FUSED[0])
        gate, up = weights.pop(name).chunk(2, dim=1)  # 各 (E, hidden_dim, C)
        parts = (gate, up, weights.pop(layer + FUSED[1]))
        weights |= {layer + stack: part for stack, part in zip(STACKS, parts, strict=True)}
    return {n: weights[their_name(n)].contiguous() for n in names if not n.endswith(".load")}


# ---------- 3. 命令行 ----------


def paths_and_options(cls: type, argv: list[str], usage: str) -> tuple[Path, Path, object]:
    """命令行 -> (从哪里, 到哪里, 各项参数)。

    Args:
        cls: 带 `option` 字段的 dataclass。
        argv: 命令行参数，不含程序名。
        usage: 「用法：」后面的一行。
    Raises:
        UserError: 少了路径，或者参数不对。
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, f"用法：{usage}"))
        raise SystemExit(0)
    if len(argv) < 2 or any(a.startswith("--") or not a.strip() for a in argv[:2]):
        raise UserError(f"请先写两个路径；用法：{usage}")
    problems = [f"路径不是 UTF-8：{a!r}" for a in argv[:2] if not is_text(a)]
    options = cls(**parse_flags(cls, argv[2:], problems))
    check_choices(options, problems)
    if problems:
        raise UserError("；".join(problems))
    return Path(argv[0]), Path(argv[1]), options
