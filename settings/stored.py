"""检查点里已经有的设置，哪些听它的。

inherit         从它开始（微调、增量预训练）：形状取自它，学习率与旧语料跟着它（follow）
adopt           接着它练：一律取自它
check_changes   接着练时改了的，能不能改
"""

from dataclasses import fields
from pathlib import Path

from config import HOW_LONG, PER_PRESET, SHAPE, Config, UserError
from settings.check import PLACES, check_values
from settings.defaults import continued_lr, sft_lr
from settings.resolve import Origin, Origins, fill_automatic
from settings.say import say


def inherit(
    config: Config,
    origins: Origins,
    source: Config,
    path: str,
    stage: str = "sft",
    start: str = "pretrain",
) -> None:
    """从检查点开始时，形状取自它；明确指定过、又不相同的，一次报告。

    Args:
        config: 会被就地改成与检查点一致。
        source: 检查点里的配置。
        stage: 要做的是微调（"sft"），还是增量预训练（"pretrain"）。
        start: 检查点是哪个阶段的。
    Raises:
        UserError: 列出对不上的字段。
    """
    if config.preset != source.preset:
        raise UserError(f"{path} 是 {source.preset} 预设的；请加上 --preset {source.preset}")
    conflicts = []
    # 读的是同一份语料时，留出的必须是同样的几篇；自己的数据，留多少由自己定。
    learned = (source.data, source.replay_data)
    same = (config.data if stage == "pretrain" else config.sft_data) in learned
    free = stage == "pretrain" and origins["val_fraction"] is not Origin.FLAG
    for name in (*SHAPE, *(("val_fraction",) if same or free else ())):
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
    if origins["seq_len"] is Origin.PRESET:
        config.seq_len = min(config.seq_len, config.max_len)
    if config.seq_len > config.max_len:
        raise UserError(f"seq_len（{config.seq_len}）超过了 {path} 的 max_len（{config.max_len}）")
    follow(config, origins, source, stage, start)


def follow(config: Config, origins: Origins, source: Config, stage: str, start: str) -> None:
    """没有写明的学习率与旧语料，由起点的来定；参数同 `inherit`。"""
    again = start == "pretrain" and source.replay_data  # 起点已经是增量的
    if origins["sft_lr"] is Origin.AUTO:
        # 起点若是增量的，它的 lr 已经小了，不再除一次
        config.sft_lr = source.sft_lr if again else sft_lr(source)
    if stage == "sft":  # 预训练读过什么，跟着模型走
        config.data, origins["data"] = source.data, Origin.CHECKPOINT
        if config.replay or config.replay_data:  # 不回放，只看忘了多少，也要知道是哪个阶段的
            config.replay_stage = config.replay_stage or start
        if config.replay:
            learned = source.sft_data if config.replay_stage == "sft" else source.data
            if config.replay_data is None:
                config.replay_data, origins["replay_data"] = learned, Origin.CHECKPOINT
        return
    if origins["lr"] is Origin.PRESET:
        config.lr, origins["lr"] = source.lr if again else continued_lr(source), Origin.AUTO
    if config.replay_data is None:
        config.replay_data, origins["replay_data"] = source.data, Origin.CHECKPOINT


# 只说这一次运行的，不取自检查点。
LOCAL = {"resume", "overwrite", "allow_changes", "plan", "out_dir"}
# 接着练的时候，命令行上的这些可以与上次不同，不影响训练的结果。
HARMLESS = {"data_dir", "data", "sft_data", "replay_data", "init_from", "eval_every",
            "prompt", "sft_prompt", "save_every"}  # fmt: skip
# 这些也可以不同：算的是同一件事，只是浮点数相加的次序变了，不再逐位相同。
ROUNDING = {"device", "dtype", "compile", "parallel", "batch_size", "grad_accum"}
# 这些绝不可以：参数或优化器的状态装不下，或者读到哪里就说不清了。
FIXED = {"preset", *SHAPE, "seq_len", "seed", "isolate_documents", "whole_documents",
         "val_fraction", "replay", "replay_stage", "keep_reasoning",
         "muon_heads", "muon_beta2"}  # fmt: skip


def adopt(config: Config, origins: Origins, source: Config, path: Path) -> None:
    """接着练：配置一律取自检查点，命令行上另外指定的除外，那些要看会不会影响结果。

    路径与检查点里的相同的，仍算自己写的：不必再问（places.py）。

    Args:
        config: 会被就地改写。
        source: 检查点里的配置。
    Raises:
        UserError: 改了不能改的，或者改了会影响结果的却没有加 --allow_changes。
    """
    changed: dict[str, str] = {}
    # 没有改过 config.py 时，这些项是空着的，由预设决定。
    blank = PER_PRESET | {name for group in HOW_LONG for name in group}
    edited = {n: getattr(config, n) for n in blank if origins[n] is Origin.EDITED}
    flags = {name for name, origin in origins.items() if origin is Origin.FLAG}
    # 只能写一种的，命令行上给了一种，别的就不作数
    given = flags.union(*(group for group in HOW_LONG if flags & set(group)))
    for name in (f.name for f in fields(Config)):
        mine, theirs = getattr(config, name), getattr(source, name)
        if name in given - LOCAL and mine != theirs:
            if mine is not None:  # 换了一种写法，原来的那种不作数，不必说
                changed[name] = f"{name}（{theirs} → {mine}）"
        elif name not in LOCAL and not (name in PLACES and mine == theirs):
            setattr(config, name, theirs)
            origins[name] = Origin.CHECKPOINT
    ignored = [n for n, mine in edited.items() if mine not in (None, getattr(source, n))]
    if ignored:
        names = "、".join(sorted(ignored))
        say(f"（接着练时以检查点为准，config.py 里改过的 {names} 不算数；要改请写在命令行上）")
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
        say(f"（改了 {'、'.join(rest)}：从这里起，结果与不中断的那一次不同）")
    if rounding := [text for name, text in changed.items() if name in ROUNDING]:
        say(f"（改了 {'、'.join(rounding)}：浮点数相加的次序不同，结果相近而不再逐位相同）")
