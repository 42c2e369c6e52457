"""TODO"""

import json
import os
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from config import BOTH_STAGES, PER_PRESET, PRESETS, SHAPE, STEPS_OR_EPOCHS, Config, UserError
from settings.check import check_types, check_values
from settings.flags import help_text, parse_flags


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


def inherit(config: Config, origins: dict[str, str], source: Config, path: str) -> None:
    """微调时，形状取自预训练的检查点；明确指定过、又不相同的，一次报告。

    Args:
        config: 会被就地改成与检查点一致。
        source: 检查点里的配置。
    Raises:
        UserError: 列出对不上的字段。
    """
    if config.preset != source.preset:
        raise UserError(f"{path} 是 {source.preset} 预设的；请加上 --preset {source.preset}")
    conflicts = []
    # 两个阶段读的是同一部词典时，留出的必须是同样的成语；自己的对话，留多少由自己定。
    held_out = ("val_fraction",) if config.sft_data == source.data else ()
    for name in (*SHAPE, *held_out):
        mine, theirs = getattr(config, name), getattr(source, name)
        explicit = origins[name] == "命令行" or (
            origins[name] == "config.py" and name in PER_PRESET
        )
        if mine != theirs and explicit:
            conflicts.append(f"{name} 指定为 {mine}，检查点里是 {theirs}")
        setattr(config, name, theirs)
        origins[name] = "检查点"
    if conflicts:
        raise UserError(f"与 {path} 不符：{'；'.join(conflicts)}；请去掉这些设置")
    if origins["sft_lr"] == "自动":
        config.sft_lr = source.lr / 5
    if origins["seq_len"].startswith("预设"):
        config.seq_len = min(config.seq_len, config.max_len)
    if config.seq_len > config.max_len:
        raise UserError(f"seq_len（{config.seq_len}）超过了 {path} 的 max_len（{config.max_len}）")


# 接着练的时候，命令行上的这些可以与上次不同，不影响训练的结果。
HARMLESS = {"data_dir", "data", "sft_data", "init_from", "eval_every", "eval_tokens", "prompt",
            "sft_prompt", "save_every"}  # fmt: skip
# 这些也可以不同：算的是同一件事，只是浮点数相加的次序变了，不再逐位相同。
ROUNDING = {"device", "dtype", "compile", "parallel", "batch_size", "grad_accum"}
# 这些绝不可以：参数装不下，或者读到哪里就说不清了。
FIXED = {"preset", *SHAPE, "seq_len", "seed", "isolate_documents", "val_fraction"}


def adopt(config: Config, origins: dict[str, str], source: Config, path: Path) -> None:
    """接着练：配置一律取自检查点，命令行上另外指定的除外，那些要看会不会影响结果。

    Args:
        config: 会被就地改写。
        source: 检查点里的配置。
    Raises:
        UserError: 改了不能改的，或者改了会影响结果的却没有加 --allow_changes。
    """
    local = {"resume", "overwrite", "allow_changes", "out_dir"}
    changed: dict[str, str] = {}
    # 没有改过 config.py 时，这些项是空着的，由预设决定。
    blank = PER_PRESET | {name for pair in STEPS_OR_EPOCHS for name in pair}
    edited = {n: getattr(config, n) for n in blank if origins[n] == "config.py"}
    given = {name for name, origin in origins.items() if origin == "命令行"}
    for pair in STEPS_OR_EPOCHS:  # 二选一的，命令行上给了一个，另一个就不作数
        if given & set(pair):
            given |= set(pair)
    for name in (f.name for f in fields(Config)):
        mine, theirs = getattr(config, name), getattr(source, name)
        if name in given - local and mine != theirs:
            changed[name] = f"{name}（{theirs} → {mine}）"
        elif name not in local:
            setattr(config, name, theirs)
            origins[name] = "检查点"
    ignored = [n for n, mine in edited.items() if mine not in (None, getattr(source, n))]
    if ignored:
        names = "、".join(sorted(ignored))
        print(f"（接着练时以检查点为准，config.py 里改过的 {names} 不算数；要改请写在命令行上）")
    rows = config.batch_size * config.grad_accum
    if rows != source.batch_size * source.grad_accum:
        raise UserError(
            f"接着练时每步的行数 batch_size × grad_accum 不能变：{path} 里是 "
            f"{source.batch_size} × {source.grad_accum}，现在是 "
            f"{config.batch_size} × {config.grad_accum}；可以一个减半、另一个加倍"
        )
    if fixed := [text for name, text in changed.items() if name in FIXED]:
        raise UserError(
            f"接着练时不能改 {'、'.join(fixed)}：参数或数据的次序会对不上 {path}；"
            f"请去掉这些设置，或用 --out_dir 换一个目录从头练"
        )
    rest = [text for name, text in changed.items() if name not in HARMLESS | ROUNDING]
    if rest and not config.allow_changes:
        raise UserError(
            f"改了 {'、'.join(rest)}，接着练的结果就与不中断的那一次不同；"
            f"真要这样，请加上 --allow_changes"
        )
    if rest:
        print(f"（改了 {'、'.join(rest)}：从这里起，结果与不中断的那一次不同）")
    if rounding := [text for name, text in changed.items() if name in ROUNDING]:
        print(f"（改了 {'、'.join(rounding)}：浮点数相加的次序不同，结果相近而不再逐位相同）")
    problems: list[str] = []
    check_values(config, problems, set())
    if problems:
        raise UserError("；".join(problems))


def repeat_flags(config: Config, origins: dict[str, str]) -> str:
    """下一个命令也要带上的参数：文件在哪里，用什么设备。"""
    names = ("preset", "data_dir", "out_dir", "device", "dtype")
    default = Config()
    given = [
        n
        for n in names
        if origins[n] == "命令行"
        or (origins[n] == "检查点" and getattr(config, n) != getattr(default, n))
    ]
    flags = "".join(f" --{n} {shlex.quote(getattr(config, n))}" for n in given)
    return flags if config.compile else flags + " --no-compile"
