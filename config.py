"""全部配置：一个 Config 类，几套预设，以及把命令行覆盖在上面的规则。

一个值从哪里来，按先后：命令行 > 在本文件里改过的 > 预设 > 自动判断。
每个字段都是一个命令行参数：``python pre_train.py --preset deep --lr 3e-4 --no-compile``。
"""

import difflib
import json
import os
import re
import reprlib
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints


class UserError(ValueError):
    """用户能改正的错误：说明发生了什么、是哪个值、现在该做什么。脚本把它印成一句话。"""


def option(
    default: Any, help: str, unit: str = "", choices: tuple[str, ...] = (), auto: bool = False
) -> Any:
    """一个配置项：默认值、中文说明、单位、可选值；数字也可以写成 "auto" 的，auto 为真。"""
    metadata = {"help": help, "unit": unit, "choices": choices, "auto": auto}
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """训练与模型的全部配置。值为 None 的字段由预设决定；改成别的值，就以你的为准。"""

    # ===================== 改这里：最常改的几项 =====================
    preset: str = option(
        "auto",
        "预设；auto：有 NVIDIA 显卡用 wide，否则用 tiny",
        choices=("auto", "tiny", "wide", "deep", "tiny-moe", "moe"),
    )
    data: str = option(
        "auto",
        "预训练语料：builtin（内置成语词典）或文件路径；auto：有下载好的维基就用它，否则 builtin",
    )
    sft_data: str = option("auto", "微调对话：builtin 或文件路径；auto：有下载好的就用它")
    lr: float | None = option(None, "预训练的最高学习率（Muon 管的矩阵）")
    sft_lr: float | None = option(None, "微调的最高学习率；默认是 lr 的五分之一")
    max_steps: int | None = option(None, "预训练的步数；与 epochs 二选一", "步")
    epochs: float | None = option(None, "预训练把语料读几遍；默认四遍，一亿词元以上一遍", "遍")
    sft_max_steps: int | None = option(None, "微调的步数；与 sft_epochs 二选一", "步")
    sft_epochs: float | None = option(None, "微调把对话读几遍；默认两遍", "遍")
    # ================================================================

    # 模型的形状
    dim: int | None = option(None, "宽度：每个词元的向量有多长", "维")
    n_layers: int | None = option(None, "层数", "层")
    n_heads: int | None = option(None, "查询头数，须整除 dim", "头")
    n_kv_heads: int | None = option(None, "键值头数，须整除 n_heads", "头")
    hidden_dim: int | None = option(None, "前馈层的中间宽度；有专家时，是每位专家的", "维")
    n_experts: int | None = option(None, "每层有几位专家；0：不分专家", "位")
    n_active: int | None = option(None, "每个词元交给其中几位", "位")
    max_len: int | None = option(None, "模型最多能看多长的上下文", "词元")
    vocab_size: int = option(21248, "词表大小，补到 128 的倍数，GPU 算得快", "个")
    rope_theta: float = option(10000.0, "旋转位置编码的底数")
    norm_eps: float = option(1e-6, "归一化时防止除以零的小数")

    # 一步训练多少词元：batch_size × seq_len × grad_accum
    batch_size: int | None = option(
        None,
        "一次前向的行数；显存不够就减半，grad_accum 加倍；auto：在显卡上试出来，每步的行数不变",
        "行",
        auto=True,
    )
    seq_len: int | None = option(None, "每行的长度，不超过 max_len", "词元")
    grad_accum: int | None = option(None, "梯度累积：几次前向合成一步", "次")
    isolate_documents: bool | None = option(None, "同一行里的几篇文档互相看不见；文档短时更好")

    # 优化
    embed_lr_scale: float = option(1.0, "词嵌入与增益（AdamW 管的）的学习率是 lr 的几倍", "倍")
    muon_momentum: float | None = option(None, "Muon 的动量：步数少的训练，小些更好")
    adam_beta1: float = option(0.8, "AdamW 的动量")
    adam_beta2: float = option(0.99, "AdamW 求梯度平方的平均时，旧的占多少")
    weight_decay: float = option(0.1, "权重衰减，只作用于 Muon 管的矩阵")
    warmup: float = option(0.03, "学习率从 0 升到最高，占全程的比例")
    decay: float = option(0.9, "学习率最后降到 0，占全程的比例")
    grad_clip: float = option(1.0, "梯度范数的上限")
    balance_coef: float = option(0.01, "负载均衡损失的系数：越大，各位专家越忙得一样")
    router_scale: float | None = option(
        None, "路由器的初值与学习率，是别的矩阵的几倍；没有专家时用不到", "倍"
    )
    seed: int = option(42, "随机种子：初始化、打乱与采样")

    # 设备
    device: str = option("auto", "设备", choices=("auto", "cuda", "mps", "cpu"))
    parallel: str = option(
        "ddp",
        "多个进程时：ddp 每个进程一份完整的；fsdp 把参数、梯度与优化器的状态分开放，省显存",
        choices=("ddp", "fsdp"),
    )
    dtype: str = option(
        "auto",
        "矩阵乘法的精度；auto：硬件支持就用 bfloat16",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    compile: bool = option(True, "用 torch.compile 加速（需要 C++ 编译器；没有会自动跳过）")

    # 数据与记录
    val_fraction: float = option(0.03, "留出多大比例的文档不训练，只用来检验")
    eval_tokens: int = option(16384, "每次检验最多用多少词元；最后一次用十倍", "词元")
    eval_every: int | None = option(
        None, "每隔多少步检验并采样一次；默认全程十次，至多隔 500 步", "步"
    )
    save_every: float | None = option(
        None, "每隔多少秒保存一次；默认 60，磁盘慢就自动少存，保存占用的时间不超过 2%", "秒"
    )
    prompt: str = option("守株待兔：", "预训练时用来采样的固定开头")
    sft_prompt: str = option("守株待兔是什么意思？", "微调时用来采样的固定问题")
    data_dir: str = option("data", "下载的数据与词元文件放在哪里")
    out_dir: str | None = option(None, "检查点与记录放在哪里；默认 out/预设名")
    init_from: str | None = option(None, "从哪个预训练检查点开始微调；默认 out_dir/pretrain.pt")
    resume: bool = option(False, "接着 out_dir 里最新的检查点练；其余设置取自检查点，不必再写")
    allow_changes: bool = option(
        False, "接着练时允许改学习率、步数等；结果与不中断的那一次不再相同"
    )
    overwrite: bool = option(False, "从头练，盖掉 out_dir 里已有的训练")

    def active_width(self) -> int:
        """每个词元经过的前馈宽度：有专家时，是挑中的几位合起来的。"""
        return self.hidden_dim * (self.n_active or 1)


BOTH_STAGES = ("data", "prompt", "lr", "max_steps", "epochs")  # 微调的那一份前面加 sft_
STEPS_OR_EPOCHS = (("max_steps", "epochs"), ("sft_max_steps", "sft_epochs"))  # 各是二选一
N_TOKENS = 21146  # 分词器的词元数：bert-base-chinese 的 21128 个，加上 tokenizer.py 补的
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "n_experts", "n_active",
         "max_len", "vocab_size", "rope_theta", "norm_eps")  # fmt: skip

# 每套预设：形状，以及随形状而定的批次与学习率（扫描的记录见 docs/lab-notes.md）。
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        dim=192, n_layers=4, n_heads=3, n_kv_heads=1, hidden_dim=576, n_experts=0, n_active=0,
        max_len=512,
        batch_size=8, seq_len=256, grad_accum=1, lr=0.02, muon_momentum=0.9, router_scale=1.0,
        isolate_documents=True,
        max_steps=1000, sft_max_steps=150,
    ),
    "wide": dict(  # 矮胖
        dim=512, n_layers=8, n_heads=8, n_kv_heads=2, hidden_dim=1664, n_experts=0, n_active=0,
        max_len=1024,
        batch_size=32, seq_len=512, grad_accum=1, lr=0.01, muon_momentum=0.95, router_scale=0.2,
        isolate_documents=False,
    ),
    "deep": dict(  # 瘦高
        dim=512, n_layers=24, n_heads=8, n_kv_heads=2, hidden_dim=1664, n_experts=0, n_active=0,
        max_len=1024,
        batch_size=16, seq_len=512, grad_accum=2, lr=0.005, muon_momentum=0.95, router_scale=0.2,
        isolate_documents=False,
    ),
}  # fmt: skip
# 专家混合：挑中的几位合起来，与不分专家的那一套一样宽，每个词元用到的参数也就一样多。
PRESETS["tiny-moe"] = PRESETS["tiny"] | dict(hidden_dim=144, n_experts=16, n_active=4)
PRESETS["moe"] = PRESETS["wide"] | dict(hidden_dim=416, n_experts=16, n_active=4)

PER_PRESET = {name for preset in PRESETS.values() for name in preset}


# ---------- 1. 命令行：参数名就是字段名 ----------


def parse_flags(cls: type, argv: list[str], problems: list[str]) -> dict[str, Any]:
    """把 ``--名字 值`` 解析成 {字段名: 值}；看不懂的记进 problems，最后一并报告。

    Args:
        cls: 带 `option` 字段的 dataclass。
        argv: 命令行参数，不含脚本名。``--no-名字`` 把布尔字段设为假。
        problems: 收集问题，一条一句。
    """
    types = field_types(cls)
    may_be_auto = {f.name for f in fields(cls) if f.metadata["auto"]}
    given: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        name, has_value, value = flag.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        positive = name.removeprefix("no_")
        if not flag.startswith("--"):
            problems.append(f"多余的参数 {flag!r}：参数要写成 --名字 值")
        elif types.get(positive) is bool and not has_value:
            given[positive] = name == positive
        elif name not in types:
            near = difflib.get_close_matches(name, types, n=1, cutoff=0.0)[0]
            problems.append(f"没有参数 {flag.partition('=')[0]}；最接近的是 --{near}")
            if rest and not rest[0].startswith("--"):
                rest.pop(0)  # 它的值
        elif not has_value and (not rest or rest[0].startswith("--")):
            problems.append(f"参数 --{name} 后面要跟一个值")
        else:
            text = value if has_value else rest.pop(0)
            if name in may_be_auto and text == "auto":
                given[name] = text
            elif (value := convert(name, text, types[name], problems)) is not None:
                given[name] = value
    return given


def check_choices(options: Any, problems: list[str]) -> None:
    """只能从几个里选的字段，值在不在其中；不在的记进 problems。"""
    for f in fields(options):
        choices, value = f.metadata["choices"], getattr(options, f.name)
        if choices and value not in choices:
            problems.append(f"--{f.name} 只能是 {'、'.join(choices)}，得到的是 {value!r}")


def field_types(cls: type) -> dict[str, type]:
    """每个字段的类型，``int | None`` 记作 int。"""
    hints = get_type_hints(cls)
    return {f.name: (get_args(hints[f.name]) or (hints[f.name],))[0] for f in fields(cls)}


def convert(name: str, text: str, kind: type, problems: list[str]) -> Any:
    """把命令行上的文字变成字段的类型；变不了就记下问题，返回 None。"""
    expected = {int: "整数", float: "数", bool: "true 或 false", str: " UTF-8 编码的文字"}
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if is_text(text):
            return kind(text)
    except (ValueError, KeyError):
        pass
    problems.append(f"--{name} 要的是{expected[kind]}，得到的是 {reprlib.repr(text)}")


def is_text(text: str) -> bool:
    """写得成 UTF-8，也能交给操作系统（其中不能有 NUL）。"""
    try:
        return b"\0" not in text.encode("utf-8")
    except UnicodeEncodeError:  # 别的编码的终端送来的字节，会变成不成对的代理字符
        return False


def help_text(cls: type, usage: str) -> str:
    """列出每个参数的名字、单位、默认值与说明。"""
    types = field_types(cls)
    where = "参数（写在命令行上，或改 config.py 里的默认值）：" if cls is Config else "参数："
    lines = [usage, "", where]
    for f in fields(cls):
        default = f.default
        if default is None:  # 各预设里的值
            named = [f"{p} {v[f.name]}" for p, v in PRESETS.items() if f.name in v]
            default = "、".join(named) or "见说明"
        flag = f"  --{f.name}" + (f" / --no-{f.name}" if types[f.name] is bool else "")
        unit = f"，单位：{f.metadata['unit']}" if f.metadata["unit"] else ""
        choices = "，可选：" + " ".join(f.metadata["choices"]) if f.metadata["choices"] else ""
        lines += [flag, f"      {f.metadata['help']}（默认：{default}{unit}{choices}）"]
    return "\n".join(lines)


# ---------- 2. 定值：命令行 > 改过的默认值 > 预设 > 自动 ----------


def load_config(stage: str, argv: list[str], default: Config | None = None):
    """得到一份每个值都已确定的配置，以及每个值的来历。

    Args:
        stage: "pretrain" 或 "sft"。微调的命令行上，BOTH_STAGES 里的参数指这一次运行，
            例如 --lr 就是 --sft_lr。
        argv: 命令行参数。
        default: 代替 ``Config()`` 的起点，测试用。
    Returns:
        (config, origins)；origins 是 {字段名: 来历}。
    Raises:
        UserError: 看得出的问题一次列出。
    """
    if "--help" in argv or "-h" in argv:
        script = {"pretrain": "pre_train.py", "sft": "sft_train.py"}[stage]
        print(help_text(Config, f"用法：python {script} [--参数 值 …]"))
        raise SystemExit(0)
    problems: list[str] = []
    flags = parse_flags(Config, argv, problems)
    if stage == "sft":
        for name in BOTH_STAGES:
            if name in flags and f"sft_{name}" in flags:
                problems.append(f"--{name} 与 --sft_{name} 在这里是一回事，只能写一个")
            elif name in flags:
                flags[f"sft_{name}"] = flags.pop(name)
    else:
        ignored = [n for n in flags if n.startswith("sft_") or n == "init_from"]
        problems += [f"--{n} 只用于微调（sft_train.py），预训练用不到它" for n in ignored]

    config = default or Config()
    for pair in STEPS_OR_EPOCHS:
        if len(given := [name for name in pair if name in flags]) == 1:
            setattr(config, next(n for n in pair if n != given[0]), None)  # 命令行的算数
    origins = {f.name: "config.py" for f in fields(Config)}
    for name, value in flags.items():
        setattr(config, name, value)
        origins[name] = "命令行"
    wrong = check_types(config, problems)
    fill_in(config, origins)
    check_values(config, problems, wrong)
    if problems:
        raise UserError("配置有问题：" + "；\n  ".join(["", *problems]).removeprefix("；"))
    return config, origins


def fill_in(config: Config, origins: dict[str, str]) -> None:
    """填好留空的字段，并记下来历。"""

    def fill(name: str, value: Any, origin: str) -> None:
        setattr(config, name, value)
        origins[name] = origin

    if config.preset == "auto":
        on_gpu = config.device in ("auto", "cuda") and has_cuda()
        fill("preset", "wide" if on_gpu else "tiny", "自动")
    preset = dict(PRESETS[config.preset])
    if config.batch_size == "auto":  # 一大批有多少行由预设决定，训练脚本再试出怎样分成小批
        fill("batch_size", preset["batch_size"], "auto")
    for steps, epochs in STEPS_OR_EPOCHS:
        if getattr(config, epochs) is not None:
            preset.pop(steps, None)  # 用户指定了遍数，预设的步数便不作数
    for name, value in preset.items():
        if getattr(config, name) is None:
            fill(name, value, f"预设 {config.preset}")
    wiki = Path(config.data_dir) / "wiki_zh_texts_filtered.json"
    sft = Path(config.data_dir) / "sft_t2t_mini.jsonl"
    if config.data == "auto":  # 与 Path.exists 不同：名字太长时说没有，而不是抛出异常
        fill("data", str(wiki) if os.path.exists(wiki) else "builtin", "自动")
    if config.sft_data == "auto":
        fill("sft_data", str(sft) if os.path.exists(sft) else "builtin", "自动")
    if config.sft_lr is None and config.lr > 0:
        fill("sft_lr", config.lr / 5, "自动")
    if config.out_dir is None:
        fill("out_dir", f"out/{config.preset}", "自动")
    if config.init_from is None:
        fill("init_from", f"{config.out_dir}/pretrain.pt", "自动")


def has_cuda() -> bool:
    """有没有能用的 NVIDIA 显卡。"""
    import torch  # 用到才导入：--help 和配置的错误不必等它

    return torch.cuda.is_available()


# ---------- 3. 检查：所有问题一起报告，什么都还没加载 ----------


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


# ---------- 4. 说给用户听，留给以后看 ----------


def describe(config: Config, origins: dict[str, str]) -> str:
    """按来历分组，列出每个值。"""
    groups: dict[str, list[str]] = {}
    for name, value in asdict(config).items():
        if value is not None:
            groups.setdefault(origins[name], []).append(f"{name}={value}")
    order = sorted(groups, key=lambda origin: (origin == "config.py", origin != "命令行"))
    return "\n".join(f"  [{origin}] " + "  ".join(groups[origin]) for origin in order)


def save_config(config: Config, path: Path) -> None:
    """把定下来的配置写成 JSON，与结果放在一起。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(config), ensure_ascii=False, indent=2), encoding="utf-8")


def run_script(main: Callable[[], None]) -> None:
    """运行脚本的 main()；用户的错误印成一句话，退出码 2；Ctrl-C 是 130，SIGTERM 是 143。"""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # 启动时就被关掉了（<&-）
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # Windows 默认不是 UTF-8
            getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")
    if hasattr(sys.stdout, "reconfigure"):  # 输出接到文件或管道时，也写一行看得到一行
        sys.stdout.reconfigure(line_buffering=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except UserError as error:
        who = f"第 {rank} 个进程" if (rank := os.environ.get("RANK", "0")) != "0" else ""
        print(f"{who}错误：{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\n已中断", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # 例如接在后面的 head 先走了
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE，与别的命令一样
    except OSError as error:
        where = f" {error.filename} " if error.filename else ""
        print(f"错误：读写{where}失败（{error.strerror}）；请检查路径、权限与空间", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            print(
                "错误：内存不够；请把 --batch_size 减半、--grad_accum 加倍，或换小些的 --preset",
                file=sys.stderr,
            )
            sys.exit(2)
        reason = (str(error).splitlines() or [""])[0][:200]
        if "WORLD_SIZE" in os.environ and re.search("gloo|nccl|connection", reason, re.IGNORECASE):
            print(
                f"错误：与别的进程联系不上，结束（{reason}）；若别的进程先出了错，原因在那里",
                file=sys.stderr,
            )
            sys.exit(1)
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """是不是内存或显存不够；PyTorch 在 CPU 上抛出的只是 RuntimeError。"""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
