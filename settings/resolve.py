"""每个值最后是多少，从哪里来：命令行 > 在 config.py 里改过的 > 预设 > 自动判断。

Origin              一个值的来历
load_config         命令行 -> 每个值都已确定的配置，以及各自的来历
default_checkpoint  没有指定时，训练脚本把检查点写在哪里
describe / save_config / repeat_flags   印出来，存下来，写进下一个命令

从检查点开始、接着检查点练时，哪些听它的，见 stored.py。
"""

import json
import os
import re
import shlex
import warnings
from dataclasses import asdict, fields
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from config import BOTH_STAGES, HOW_LONG, PRESETS, Config, UserError
from settings.check import check_types, check_values
from settings.clock import SHOWN, moment
from settings.defaults import AUTOMATIC, sft_start
from settings.files import write_text
from settings.flags import help_text, parse_flags
from settings.say import say

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
REPLAYING = ("replay", "replay_data", "replay_stage")  # 用于增量预训练与微调
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
        say(help_text(Config, f"用法：python {script} [--参数 值 …]"))
        raise SystemExit(0)
    problems: list[str] = []
    flags = parse_flags(Config, argv, problems)
    for_this_stage(stage, flags, problems)
    config = default or Config()
    for group in HOW_LONG:
        if len(given := [name for name in group if name in flags]) == 1:
            for name in {*group} - {*given}:
                setattr(config, name, None)  # 命令行的算数
    origins = {f.name: Origin.EDITED for f in fields(Config)}
    for name, value in flags.items():
        setattr(config, name, value)
        origins[name] = Origin.FLAG
    wrong = check_types(config, problems)
    fill_in(config, origins)
    settle_start(stage, config, origins, problems)
    # 形状取自起点的，读了它才知道 max_len（settings/stored.py），seq_len 那时再比
    later = {"max_len"} if config.init_from and origins["max_len"] is Origin.PRESET else set()
    check_values(config, problems, wrong | later)
    report(problems)
    if config.until:
        config.until = moment(config.until, datetime.now()).strftime(SHOWN)
    return config, origins


def for_this_stage(stage: str, flags: dict[str, Any], problems: list[str]) -> None:
    """命令行上的参数在这个阶段指什么；这个阶段用不到的，记进 problems。"""
    if stage == "sft":
        for name in BOTH_STAGES:
            if name in flags and f"sft_{name}" in flags:
                problems.append(f"--{name} 与 --sft_{name} 在这里是一回事，只能写一个")
            elif name in flags:
                flags[f"sft_{name}"] = flags.pop(name)
    else:
        ignored = [n for n in flags if n.startswith("sft_") or n == "keep_reasoning"]
        problems += [f"--{n} 只用于微调（sft_train.py），预训练用不到它" for n in ignored]


def settle_start(stage: str, config: Config, origins: Origins, problems: list[str]) -> None:
    """微调总有起点；预训练没有起点就不回放。用不到的记进 problems。"""
    if stage == "sft":
        if config.init_from is None:
            config.init_from, origins["init_from"] = sft_start(config), Origin.AUTO
        return
    if not (config.init_from or config.resume):
        unused = [name for name in REPLAYING if origins[name] is Origin.FLAG]
        problems += [f"预训练的 {n} 要同时用 --init_from 写明起点" for n in unused]
        config.replay, config.replay_data = 0.0, None
    if origins["replay_stage"] is Origin.FLAG:
        problems.append("--replay_stage 只用于微调（sft_train.py）；预训练回放的总是文字")
    config.replay_stage = None


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
    for steps, *others in HOW_LONG:
        if any(getattr(config, name) is not None for name in others):
            preset.pop(steps, None)  # 用户写了练多久，预设的步数便不作数
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
    """有没有能用的 NVIDIA 显卡：看得见，PyTorch 里也有给它编译的代码。"""
    import torch  # 用到才导入：--help 和配置的错误不必等它

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 用不上的原因，engine/doctor.py 用中文说
        if not torch.cuda.is_available():
            return False
        built = torch.cuda.get_arch_list()
        return not built or compiled_for(torch.cuda.get_device_capability(), built)


def compiled_for(capability: tuple[int, int], built: list[str]) -> bool:
    """给 built 编译的 PyTorch，在这种显卡上能不能用。

    Args:
        capability: 显卡的计算能力，例如 (8, 6)。
        built: 例如 ["sm_75", "sm_90a", "compute_90"]：sm 是编译好的，同一代里新的能用旧的，
            带字母的只给那一种；compute 在更新的显卡上现编译。没有一个认得的（AMD）不判断。
    """
    mine = 10 * capability[0] + capability[1]
    found = [m for name in built if (m := re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", name))]
    for kind, number, letter in (match.groups() for match in found):
        code = int(number)
        newer_of_its_kind = kind == "compute" or code // 10 == capability[0]
        if code == mine or (not letter and code < mine and newer_of_its_kind):
            return True
    return not found


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
            shown = str(value).replace("\n", "\\n")  # 一个值占不了两行，冒充不了别的值
            groups.setdefault(origins[name], []).append(f"{name}={shown}")
    order = sorted(groups, key=lambda o: (o is Origin.EDITED, o is not Origin.FLAG))
    labels = {o: o.value for o in Origin} | {Origin.PRESET: f"预设 {config.preset}"}
    return "\n".join(f"  [{labels[origin]}] " + "  ".join(groups[origin]) for origin in order)


def save_config(config: Config, path: Path) -> None:
    """把定下来的配置写成 JSON，与结果放在一起。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(config), ensure_ascii=False, indent=2))


def repeat_flags(config: Config, origins: Origins) -> str:
    """下一个命令也要带上的参数：文件在哪里，用什么设备。"""
    names = ("preset", "data_dir", "out_dir", "device", "dtype")
    default = Config()
    flag, stored = Origin.FLAG, Origin.CHECKPOINT
    changed = [n for n in names if getattr(config, n) != getattr(default, n)]
    given = [n for n in names if origins[n] is flag or (origins[n] is stored and n in changed)]
    flags = "".join(f" --{n} {shlex.quote(getattr(config, n))}" for n in given)
    return flags if config.compile else flags + " --no-compile"
