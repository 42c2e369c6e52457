"""每个值最后是多少，从哪里来：命令行 > 在 config.py 里改过的 > 预设 > 自动判断。

Origin              一个值的来历
load_config         命令行 -> 每个值都已确定的配置，以及各自的来历
default_checkpoint  没有指定时，训练脚本把检查点写在哪里
inherit             微调：形状取自预训练的检查点
adopt               接着练：一律取自检查点
describe / save_config / repeat_flags   印出来，存下来，写进下一个命令
"""

import json
import os
import shlex
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from typing import Any

from config import BOTH_STAGES, PER_PRESET, PRESETS, SHAPE, STEPS_OR_EPOCHS, Config, UserError
from settings.check import check_types, check_values
from settings.defaults import AUTOMATIC, sft_lr
from settings.flags import help_text, parse_flags

# ---------- 1. 定值 ----------


class Origin(Enum):
    """一个值从哪里来；值是印给人看的，程序只比是哪一个。"""

    FLAG = "命令行"
    EDITED = "config.py"  # 改过的，也包括没有改、照抄默认值的
    PRESET = "预设"
    AUTO = "自动"
    TRIED = "auto"  # batch_size：要在显卡上试出来
    CHECKPOINT = "检查点"


Origins = dict[str, Origin]  # {字段名: 来历}
# download.py 下载的，有它就用它
DOWNLOADED = {"data": "wiki_zh_texts_filtered.json", "sft_data": "sft_t2t_mini.jsonl"}


def load_config(
    stage: str, argv: list[str], default: Config | None = None
) -> tuple[Config, Origins]:
    """得到一份每个值都已确定的配置，以及每个值的来历。

    Args:
        stage: "pretrain" 或 "sft"。微调的命令行上，BOTH_STAGES 里的参数指这一次运行，
            例如 --lr 就是 --sft_lr。
        argv: 命令行参数。
        default: 代替 ``Config()`` 的起点，测试用。
    Returns:
        (config, origins)
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
    origins = {f.name: Origin.EDITED for f in fields(Config)}
    for name, value in flags.items():
        setattr(config, name, value)
        origins[name] = Origin.FLAG
    wrong = check_types(config, problems)
    fill_in(config, origins)
    check_values(config, problems, wrong)
    report(problems)
    return config, origins


def fill_in(config: Config, origins: Origins) -> None:
    """填好留空的字段，并记下来历。"""

    def fill(name: str, value: Any, origin: Origin) -> None:
        setattr(config, name, value)
        origins[name] = origin

    if config.preset == "auto":
        fill("preset", preset_for(config.device), Origin.AUTO)
    preset = dict(PRESETS[config.preset])
    if config.batch_size == "auto":  # 一大批有多少行由预设决定，训练脚本再试出怎样分成小批
        fill("batch_size", preset["batch_size"], Origin.TRIED)
    for steps, epochs in STEPS_OR_EPOCHS:
        if getattr(config, epochs) is not None:
            preset.pop(steps, None)  # 用户指定了遍数，预设的步数便不作数
    if config.n_experts == 0:
        preset.pop("router_scale", None)  # 用户不要专家，也就没有路由器
    for name, value in preset.items():
        if getattr(config, name) is None:
            fill(name, value, Origin.PRESET)
    for name, file in DOWNLOADED.items():
        path = Path(config.data_dir) / file
        if getattr(config, name) == "auto":
            # 与 Path.exists 不同：名字太长时说没有，而不是抛出异常
            fill(name, str(path) if os.path.exists(path) else "builtin", Origin.AUTO)
    fill_automatic(config, origins)


def fill_automatic(config: Config, origins: Origins) -> None:
    """还空着的，照 settings/defaults.py 里的算；算不出的仍空着。"""
    for name, rule in AUTOMATIC.items():
        if getattr(config, name) is None and (value := rule(config)) is not None:
            setattr(config, name, value)
            origins[name] = Origin.AUTO


def preset_for(device: str) -> str:
    """preset="auto" 是哪一套：有 NVIDIA 显卡又用得上它，就是大的。"""
    return "wide" if device in ("auto", "cuda") and has_cuda() else "tiny"


def has_cuda() -> bool:
    """有没有能用的 NVIDIA 显卡。"""
    import torch  # 用到才导入：--help 和配置的错误不必等它

    return torch.cuda.is_available()


def default_checkpoint(stage: str) -> Path:
    """没有指定时，训练脚本把这个阶段的检查点写在哪里；config.py 里改过 preset、out_dir 的照它。

    Raises:
        UserError: config.py 里有不能用的值，一次列出。
    """
    config, problems = Config(), []
    check_values(config, problems, check_types(config, problems))
    report(problems)
    if config.preset == "auto":
        config.preset = preset_for(config.device)
    return Path(config.out_dir or AUTOMATIC["out_dir"](config)) / f"{stage}.pt"


def report(problems: list[str]) -> None:
    """Raises UserError：有问题，一行一个。"""
    if problems:
        raise UserError("配置有问题：\n  " + "；\n  ".join(problems))


# ---------- 2. 说给用户听，留给以后看 ----------


def describe(config: Config, origins: Origins) -> str:
    """按来历分组，列出每个值。"""
    groups: dict[Origin, list[str]] = {}
    for name, value in asdict(config).items():
        if value is not None:
            groups.setdefault(origins[name], []).append(f"{name}={value}")
    order = sorted(groups, key=lambda o: (o is Origin.EDITED, o is not Origin.FLAG))
    labels = {o: o.value for o in Origin} | {Origin.PRESET: f"预设 {config.preset}"}
    return "\n".join(f"  [{labels[origin]}] " + "  ".join(groups[origin]) for origin in order)


def save_config(config: Config, path: Path) -> None:
    """把定下来的配置写成 JSON，与结果放在一起。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(config), ensure_ascii=False, indent=2), encoding="utf-8")


def repeat_flags(config: Config, origins: Origins) -> str:
    """下一个命令也要带上的参数：文件在哪里，用什么设备。"""
    names = ("preset", "data_dir", "out_dir", "device", "dtype")
    default = Config()
    flag, stored = Origin.FLAG, Origin.CHECKPOINT
    changed = [n for n in names if getattr(config, n) != getattr(default, n)]
    given = [n for n in names if origins[n] is flag or (origins[n] is stored and n in changed)]
    flags = "".join(f" --{n} {shlex.quote(getattr(config, n))}" for n in given)
    return flags if config.compile else flags + " --no-compile"


# ---------- 3. 检查点里已经有的 ----------


def inherit(config: Config, origins: Origins, source: Config, path: str) -> None:
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
        edited = origins[name] is Origin.EDITED and name in PER_PRESET
        explicit = origins[name] is Origin.FLAG or edited
        if mine != theirs and explicit:
            conflicts.append(f"{name} 指定为 {mine}，检查点里是 {theirs}")
        setattr(config, name, theirs)
        origins[name] = Origin.CHECKPOINT
    if conflicts:
        raise UserError(f"与 {path} 不符：{'；'.join(conflicts)}；请去掉这些设置")
    fill_automatic(config, origins)  # 有没有专家，现在才知道
    if origins["sft_lr"] is Origin.AUTO:
        config.sft_lr = sft_lr(source)
    if origins["seq_len"] is Origin.PRESET:
        config.seq_len = min(config.seq_len, config.max_len)
    if config.seq_len > config.max_len:
        raise UserError(f"seq_len（{config.seq_len}）超过了 {path} 的 max_len（{config.max_len}）")


# 只说这一次运行的，不取自检查点。
LOCAL = {"resume", "overwrite", "allow_changes", "out_dir"}
# 接着练的时候，命令行上的这些可以与上次不同，不影响训练的结果。
HARMLESS = {"data_dir", "data", "sft_data", "init_from", "eval_every", "eval_tokens", "prompt",
            "sft_prompt", "save_every"}  # fmt: skip
# 这些也可以不同：算的是同一件事，只是浮点数相加的次序变了，不再逐位相同。
ROUNDING = {"device", "dtype", "compile", "parallel", "batch_size", "grad_accum"}
# 这些绝不可以：参数装不下，或者读到哪里就说不清了。
FIXED = {"preset", *SHAPE, "seq_len", "seed", "isolate_documents", "val_fraction"}


def adopt(config: Config, origins: Origins, source: Config, path: Path) -> None:
    """接着练：配置一律取自检查点，命令行上另外指定的除外，那些要看会不会影响结果。

    Args:
        config: 会被就地改写。
        source: 检查点里的配置。
    Raises:
        UserError: 改了不能改的，或者改了会影响结果的却没有加 --allow_changes。
    """
    changed: dict[str, str] = {}
    # 没有改过 config.py 时，这些项是空着的，由预设决定。
    blank = PER_PRESET | {name for pair in STEPS_OR_EPOCHS for name in pair}
    edited = {n: getattr(config, n) for n in blank if origins[n] is Origin.EDITED}
    given = {name for name, origin in origins.items() if origin is Origin.FLAG}
    for pair in STEPS_OR_EPOCHS:  # 二选一的，命令行上给了一个，另一个就不作数
        if given & set(pair):
            given |= set(pair)
    for name in (f.name for f in fields(Config)):
        mine, theirs = getattr(config, name), getattr(source, name)
        if name in given - LOCAL and mine != theirs:
            changed[name] = f"{name}（{theirs} → {mine}）"
        elif name not in LOCAL:
            setattr(config, name, theirs)
            origins[name] = Origin.CHECKPOINT
    ignored = [n for n, mine in edited.items() if mine not in (None, getattr(source, n))]
    if ignored:
        names = "、".join(sorted(ignored))
        print(f"（接着练时以检查点为准，config.py 里改过的 {names} 不算数；要改请写在命令行上）")
    check_changes(config, source, changed, path)
    problems: list[str] = []
    check_values(config, problems, set())
    if problems:
        raise UserError("；".join(problems))


def check_changes(config: Config, source: Config, changed: dict[str, str], path: Path) -> None:
    """接着练时改了的，能不能改；能改的，说会怎样。

    Args:
        changed: {字段名: 怎样改的，说给人看}。
    Raises:
        UserError: 同 `adopt`。
    """
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
