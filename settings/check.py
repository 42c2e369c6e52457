"""检查：所有问题一起报告，什么都还没加载。

check_types    在 config.py 里改出来的值，类型对不对
RULES          一张表：一条规矩看哪几个字段，怎样算对，不对时说什么
check_values   逐条对照这张表
"""

import reprlib
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from itertools import combinations
from typing import NamedTuple

from config import HOW_LONG, N_TOKENS, SHAPE, Config
from settings.clock import moment
from settings.flags import field_types, is_text

PLACES = ("data", "sft_data", "replay_data", "data_dir", "out_dir", "init_from")  # 文件与目录
LARGEST = 10**9  # 再大的数，乘起来连 64 位整数也装不下


# ---------- 1. 类型 ----------


def check_types(config: Config, problems: list[str]) -> set[str]:
    """在 config.py 里改出来的值，类型也要对；返回不对的字段，先用能用的值代替，好接着检查别的。"""
    types, wrong = field_types(Config), set()
    for f in fields(Config):
        value, kind, choices = getattr(config, f.name), types[f.name], f.metadata["choices"]
        if kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
            setattr(config, f.name, value)
        if (value is None and f.default is None) or (f.metadata["auto"] and value == "auto"):
            continue
        if type(value) is not kind:
            problems.append(f"{f.name} 要的是 {kind.__name__}，得到的是 {reprlib.repr(value)}")
        elif choices and value not in choices:
            problems.append(f"{f.name} 只能是 {'、'.join(choices)}，得到的是 {reprlib.repr(value)}")
        elif kind is str and not is_text(value):
            problems.append(f"{f.name} 要的是 UTF-8 编码的文字，得到的是 {reprlib.repr(value)}")
        elif f.name in PLACES and len(value) > 4096:
            problems.append(f"{f.name} 有 {len(value)} 个字，比任何路径都长")
        elif f.name in PLACES and not value.strip():
            problems.append(f"{f.name} 不能是空的；请写上路径，或不写这一项")
        else:
            continue
        wrong.add(f.name)
        setattr(config, f.name, choices[0] if choices else kind(1))
    return wrong


# ---------- 2. 一张表 ----------


class Rule(NamedTuple):
    """一条规矩。"""

    names: tuple[str, ...]  # 看哪几个字段；有一个是 None（没有指定），这一条就不管
    holds: Callable[..., bool]  # 依次收下它们的值，对就是真；NaN 与谁比都不对
    sentence: str  # 不对时说的话，{字段名} 换成它的值


NOT_NEGATIVE = ("n_experts", "n_active", "balance_coef")
POSITIVE = (*(name for name in SHAPE if name not in NOT_NEGATIVE),
            "batch_size", "seq_len", "grad_accum", "lr", "sft_lr", "embed_lr_scale",
            "residual_lr_scale", "grad_clip", "router_scale", "max_steps", "epochs",
            "sft_max_steps", "sft_epochs", "eval_every", "eval_tokens")  # fmt: skip
NOT_TOO_LARGE = (lambda v: v <= LARGEST, "不能超过 10^9")
LONGEST = 2**20  # 位置编码与缓存都照 max_len 分配：一百万个词元已经要几 GB
MOST_LAYERS = 1000  # 一层没有参数也要几毫秒、几十 KB 来建；文件里写着的几万层，建起来要几分钟

# 一个字段自己的范围：（哪些字段，（怎样算对，不对时说什么）…）
RANGES = (
    (POSITIVE, (lambda v: v > 0, "必须是正数"), NOT_TOO_LARGE),
    (("max_len",), (lambda v: v <= LONGEST, "不能超过 2^20")),
    (("n_layers",), (lambda v: v <= MOST_LAYERS, "不能超过 1000")),
    (NOT_NEGATIVE, (lambda v: v >= 0, "不能是负数"), NOT_TOO_LARGE),
    (("warmup", "decay", "weight_decay"), (lambda v: 0 <= v <= 1, "必须在 0 与 1 之间")),
    (
        ("muon_momentum", "muon_beta2", "adam_beta1", "adam_beta2", "replay"),
        (lambda v: 0 <= v < 1, "不能小于 0，要小于 1"),
    ),
    (("val_fraction",), (lambda v: 0 < v < 0.5, "必须在 0 与 0.5 之间")),
    (("save_every",), (lambda v: 0 <= v < float("inf"), "不能是负数")),
    (("hours",), (lambda v: 0 < v <= 10**4, "必须是正数，不超过 10^4")),
    (
        ("until",),
        (lambda v: moment(v, datetime.now()), "要写成 23:00 或 '2026-11-30 07:30' 这样"),
    ),
    (("seed",), (lambda v: 0 <= v < 2**63, "必须在 0 与 2^63 之间")),
)

# 几个字段合起来。
COMBINATIONS = (
    Rule(
        ("warmup", "decay"),
        lambda warmup, decay: warmup + decay <= 1,
        "warmup（{warmup}）与 decay（{decay}）之和不能超过 1",
    ),
    Rule(
        ("dim", "n_heads"),
        lambda dim, n_heads: dim % n_heads == 0,
        "n_heads（{n_heads}）必须整除 dim（{dim}）",
    ),
    Rule(
        ("dim", "n_heads"),
        lambda dim, n_heads: dim // n_heads % 2 == 0 or dim % n_heads != 0,
        "每个头的宽度 dim / n_heads（{dim} / {n_heads}）必须是偶数",
    ),
    Rule(
        ("n_heads", "n_kv_heads"),
        lambda n_heads, n_kv_heads: n_heads % n_kv_heads == 0,
        "n_kv_heads（{n_kv_heads}）必须整除 n_heads（{n_heads}）",
    ),
    Rule(
        ("n_experts", "n_active"),
        lambda n_experts, n_active: n_experts == n_active == 0 or 2 <= n_active <= n_experts,
        "n_active（{n_active}）至少是 2（只交给一位，权重总是 1，路由器学不到谁合适），"
        "至多是 n_experts（{n_experts}）；不分专家就都是 0",
    ),
    Rule(
        ("n_experts", "dim", "hidden_dim"),
        lambda n_experts, dim, hidden_dim: n_experts == 0 or dim % 8 == hidden_dim % 8 == 0,
        "有专家时，dim（{dim}）与 hidden_dim（{hidden_dim}）须是 8 的倍数，"
        "几位专家的乘法才能一次做完",
    ),
    Rule(
        ("seq_len", "max_len"),
        lambda seq_len, max_len: seq_len <= max_len,
        "seq_len（{seq_len}）不能超过 max_len（{max_len}）",
    ),
    Rule(
        ("vocab_size",),
        lambda vocab_size: N_TOKENS <= vocab_size <= 2**16,
        f"vocab_size（{{vocab_size}}）须在分词器的 {N_TOKENS} 与 uint16 的 65536 之间",
    ),
    # 两个都指定了，才轮得到这一条，那就是不对。
    *(
        Rule(pair, lambda *_: False, "{} 与 {} 只能指定一个".format(*pair))
        for pair in dict.fromkeys(pair for group in HOW_LONG for pair in combinations(group, 2))
    ),
)

RULES = (
    *(
        Rule((name,), holds, f"{name} {must}，得到的是 {{{name}}}")
        for names, *checks in RANGES
        for name in names
        for holds, must in checks
    ),
    *COMBINATIONS,
)


def check_values(config: Config, problems: list[str], wrong: set[str]) -> None:
    """单个值的范围，以及值与值之间能不能相容；本身就不对的值（wrong），不再与别的比。

    Args:
        problems: 收集问题，一条一句。
        wrong: 已知不对的字段；范围不对的也会加进去。
    """
    for names, holds, sentence in RULES:
        values = {name: getattr(config, name) for name in names}
        if not wrong.isdisjoint(names) or None in values.values() or holds(*values.values()):
            continue
        problems.append(sentence.format(**values))
        if len(names) == 1:
            wrong.add(names[0])
