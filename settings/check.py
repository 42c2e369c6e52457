"""TODO"""

from collections.abc import Callable
from dataclasses import fields

from config import N_TOKENS, SHAPE, STEPS_OR_EPOCHS, Config
from settings.flags import field_types, is_text


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
            problems.append(f"{f.name} 要的是 {kind.__name__}，得到的是 {value!r}")
        elif choices and value not in choices:
            problems.append(f"{f.name} 只能是 {'、'.join(choices)}，得到的是 {value!r}")
        elif kind is str and not is_text(value):
            problems.append(f"{f.name} 要的是 UTF-8 编码的文字，得到的是 {value!r}")
        elif f.name in PLACES and not value.strip():
            problems.append(f"{f.name} 不能是空的；请写上路径，或不写这一项")
        else:
            continue
        wrong.add(f.name)
        setattr(config, f.name, choices[0] if choices else kind(1))
    return wrong


PLACES = ("data", "sft_data", "data_dir", "out_dir", "init_from")  # 文件与目录
LARGEST = 10**9  # 再大的数，乘起来连 64 位整数也装不下
NOT_NEGATIVE = ("n_experts", "n_active", "balance_coef")
POSITIVE = (*(name for name in SHAPE if name not in NOT_NEGATIVE),
            "batch_size", "seq_len", "grad_accum", "lr", "sft_lr", "embed_lr_scale", "grad_clip",
            "router_scale", "max_steps", "epochs", "sft_max_steps", "sft_epochs", "eval_every",
            "eval_tokens")  # fmt: skip
FRACTIONS = ("warmup", "decay", "weight_decay")
BELOW_ONE = ("muon_momentum", "adam_beta1", "adam_beta2")


def check_values(c: Config, problems: list[str], wrong: set[str]) -> None:
    """单个值的范围，以及值与值之间能不能相容；本身就不对的值（wrong），不再与别的比。"""
    for name in POSITIVE:
        value = getattr(c, name)
        if name not in wrong and value is not None and not 0 < value <= LARGEST:
            rule = "不能超过 10^9" if value > 0 else "必须是正数"
            problems.append(f"{name} {rule}，得到的是 {value}")
            wrong.add(name)
    for name in NOT_NEGATIVE:
        value = getattr(c, name)
        if name not in wrong and value is not None and not 0 <= value <= LARGEST:
            rule = "不能超过 10^9" if value > 0 else "不能是负数"
            problems.append(f"{name} {rule}，得到的是 {value}")
            wrong.add(name)
    for name in FRACTIONS:
        if name not in wrong and not 0 <= getattr(c, name) <= 1:
            problems.append(f"{name} 必须在 0 与 1 之间，得到的是 {getattr(c, name)}")
            wrong.add(name)
    for name in BELOW_ONE:
        if name not in wrong and not 0 <= getattr(c, name) < 1:
            problems.append(f"{name} 不能小于 0，要小于 1，得到的是 {getattr(c, name)}")
            wrong.add(name)

    def require(names: str, holds: Callable[[], bool], sentence: str) -> None:
        if wrong.isdisjoint(names.split()) and not holds():
            problems.append(sentence)

    require(
        "val_fraction",
        lambda: 0 < c.val_fraction < 0.5,
        f"val_fraction 必须在 0 与 0.5 之间，得到的是 {c.val_fraction}",
    )
    require(
        "save_every",
        lambda: c.save_every is None or 0 <= c.save_every < float("inf"),
        f"save_every 不能是负数，得到的是 {c.save_every}",
    )
    require("seed", lambda: 0 <= c.seed < 2**63, f"seed 必须在 0 与 2^63 之间，得到的是 {c.seed}")
    require(
        "warmup decay",
        lambda: c.warmup + c.decay <= 1,
        f"warmup（{c.warmup}）与 decay（{c.decay}）之和不能超过 1",
    )
    require(
        "dim n_heads",
        lambda: c.dim % c.n_heads == 0,
        f"n_heads（{c.n_heads}）必须整除 dim（{c.dim}）",
    )
    require(
        "dim n_heads",
        lambda: c.dim // c.n_heads % 2 == 0 or c.dim % c.n_heads != 0,
        f"每个头的宽度 dim / n_heads（{c.dim} / {c.n_heads}）必须是偶数",
    )
    require(
        "n_heads n_kv_heads",
        lambda: c.n_heads % c.n_kv_heads == 0,
        f"n_kv_heads（{c.n_kv_heads}）必须整除 n_heads（{c.n_heads}）",
    )
    require(
        "n_experts n_active",
        lambda: c.n_experts == c.n_active == 0 or 2 <= c.n_active <= c.n_experts,
        f"n_active（{c.n_active}）至少是 2（只交给一位，权重总是 1，路由器学不到谁合适），"
        f"至多是 n_experts（{c.n_experts}）；不分专家就都是 0",
    )
    require(
        "n_experts dim hidden_dim",
        lambda: c.n_experts == 0 or c.dim % 8 == c.hidden_dim % 8 == 0,
        f"有专家时，dim（{c.dim}）与 hidden_dim（{c.hidden_dim}）须是 8 的倍数，"
        f"几位专家的乘法才能一次做完",
    )
    require(
        "seq_len max_len",
        lambda: c.seq_len <= c.max_len,
        f"seq_len（{c.seq_len}）不能超过 max_len（{c.max_len}）",
    )
    require(
        "vocab_size",
        lambda: N_TOKENS <= c.vocab_size <= 2**16,
        f"vocab_size（{c.vocab_size}）须在分词器的 {N_TOKENS} 与 uint16 的 65536 之间",
    )
    for steps, epochs in STEPS_OR_EPOCHS:
        require(
            f"{steps} {epochs}",
            lambda pair=(steps, epochs): None in (getattr(c, name) for name in pair),
            f"{steps} 与 {epochs} 只能指定一个",
        )
