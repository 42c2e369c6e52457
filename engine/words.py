"""训练前后说给人看的话：设备与配置、模型的大小、检验的结果、接下来做什么。只说，不做决定。"""

import shlex

from engine.checkpoint import NAMES, summary
from settings.defaults import MOST_EPOCHS
from settings.resolve import Origin, describe, repeat_flags


def introduction(run) -> str:
    """设备，每个值与它的来历，该知道的事。"""
    config, lines = run.config, []
    lines.append(f"{NAMES[run.stage]} · {run.device.describe()}")
    lines.append(describe(config, run.origins))
    if run.start and not run.resumed:
        lines.append(f"起点：{config.init_from}（{summary(run.start)}）")
    if run.stage == "pretrain" and run.origins["preset"] is Origin.AUTO:
        lines.append(
            "（想换一种大小：--preset tiny 小而快，--preset small 大一号，没有显卡也练得动，"
            "--preset wide 矮胖，--preset deep 瘦高）"
        )
    if run.stage == "pretrain" and config.data == "builtin":
        lines.append("（用的是内置成语词典；想用维基百科：python download.py wiki）")
    return "\n".join(lines + [f"（{note}）" for note in run.device.notes])


def epochs(run, n_steps: int) -> float:
    """走 n_steps 步，把数据读几遍。"""
    return n_steps * run.rows_per_step / run.train.n_rows


def scale(run) -> str:
    """模型多大，走多少步，把数据读几遍。"""
    text = (
        f"模型：{run.n_params / 1e6:.1f} M 参数；"
        + (f"{run.deadline}，" if run.deadline else f"共 {run.n_steps} 步，")
        + f"每步 {run.rows_per_step * run.config.seq_len} 个词元，"
        + ("走几步，量了速度再定" if run.deadline else f"合计读 {epochs(run, run.n_steps):.2g} 遍")
    )
    if run.swap and run.train.n_old:
        text += f"，每一遍 {run.train.n_new} 行新的、{run.train.n_old} 行旧的"
    if run.shared:
        n = len(run.shared.members)
        text += f"\n（词表里有 {n} 个词元这份语料从没用过：合用词嵌入的一行，打分只算一次）"
    return text


def exam_result(step: int, result: tuple, old: tuple | None, load, sample: str) -> str:
    """一次检验的结果。

    Args:
        result: (损失，每字的比特数)；old 是旧语料上的，没有是 None。
        load: 专家混合的负载，稠密模型是 None。
    """
    text = f"第 {step} 步 · 检验损失 {result[0]:.3f} · 每字 {result[1]:.3f} 比特"
    if old:
        text += f" · 旧语料 {old[0]:.3f}，每字 {old[1]:.3f} 比特"
    return text + (f" · {load}" if load else "") + f"\n    {sample}"


def few_data(run, before: int, after: int) -> str:
    """数据太少，预设的步数从 before 减到 after。"""
    what = {"pretrain": "语料", "sft": "对话"}[run.stage]
    return (
        f"（{what}只有 {run.card['train_tokens']} 个词元：预设的 {before} 步要读 "
        f"{epochs(run, before):.0f} 遍，改为 {epochs(run, after):.0f} 遍、{after} 步）"
    )


def rising(run) -> str:
    """检验损失连着升了三次。"""
    progress, read = run.progress, epochs(run, run.progress.step)
    text = (
        f"检验损失连着升了三次：最低是 {progress.best_val_loss:.3f}，在第 {progress.best_step} 步"
    )
    if read <= 1:
        return f"（{text}；语料一遍还没有读完，多半是学习率太大）"
    kept = f"最好的另存在 {run.folder.best}；" if run.folder.best.exists() else ""
    return (
        f"（{text}；语料已经读了 {read:.1f} 遍，它多半是在背书。{kept}"
        f"可以就停在这里（Ctrl-C），换多些的语料，或者少读几遍）"
    )


def best(run, kept: dict) -> str:
    """最后的不是最好的：最好的在哪里。

    Args:
        kept: 另存的检查点里的 progress。
    """
    return (
        f"（留出的文字上，最好的不是最后的，是第 {kept['step']} 步，检验损失 "
        f"{kept['val_loss']:.3f}：另存在 {run.folder.best}，用 --checkpoint 或 --init_from "
        f"写明就能用它）"
    )


def duration(seconds: float) -> str:
    """大约多久，例如「约 12 分钟」。"""
    if seconds < 90:
        return f"约 {max(1, round(seconds))} 秒"
    if seconds < 5400:
        return f"约 {seconds / 60:.0f} 分钟"
    return f"约 {seconds / 3600:.1f} 小时"


def remaining(run) -> str:
    """量够了步数，说一次还要多久；练到几点的，说走得了几步、读几遍，读得太多的，提醒一声。"""
    measured = f"照前 {run.pace.timed} 步的速度，"
    if not run.deadline:
        return f"{measured}还要{duration(run.pace.remaining())}"
    read = epochs(run, run.n_steps)
    text = f"{measured}约走 {run.n_steps} 步，读 {read:.2g} 遍"
    if read <= MOST_EPOCHS:
        return text
    return f"{text}：{MOST_EPOCHS} 遍以上多半是在背书；换多些的数据，或者少练些时间"


def size(n_bytes: int) -> str:
    """大小，例如「71.0 MB」。"""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def loss(expected) -> str:
    """估的损失；估不了的，已经是一句为什么。"""
    return expected if isinstance(expected, str) else f"{expected.loss:.2f} ± {expected.error:.2f}"


def plan(found) -> str:
    """``--plan`` 估出来的几样；found 是 plan.py 的 `Estimate`。"""
    once, twice, thrice = (size(n * found.checkpoint) for n in (1, 2, 3))
    full = found.free < 3 * found.checkpoint + found.token_files
    lines = [
        "估一估（只走了十来步，什么也没有写下）：",
        f"  用时  {duration(found.total)}：{found.steps} 步，每步 {found.step_seconds:.3g} 秒；"
        f"其中检验{duration(found.checking)}，备数据与编译{duration(found.startup)}",
        f"  词元  {found.tokens:,} 个，把数据读 {found.epochs:.2g} 遍",
        f"  内存  最多 {size(found.memory) if found.memory else '（这个系统上没有办法量）'}",
        f"  磁盘  检查点 {once}，连前一个 {twice}，正在写的时候 {thrice}；"
        f"词元文件 {size(found.token_files)}；那里还剩 {size(found.free)}{'，不够' * full}",
        f"  损失  {loss(found.loss)}",
    ]
    if not isinstance(found.loss, str):
        lines[-1] += f"（照这个仓库自己练完的 {found.loss.n_runs} 次，见 docs/lab-notes.md）"
    lines.append("放进一个晚上，三种走法，命令照抄就行：")
    for way in found.ways:
        time = "要多久没有量过" if way.seconds is None else duration(way.seconds)
        known = "" if isinstance(way.loss, str) else f"，损失 {loss(way.loss)}"
        note = f"；{way.note}" if way.note else ""
        lines += [f"  {way.command}", f"      {time}{known}{note}"]
    return "\n".join(lines)


def farewell(run) -> str:
    """用了多久，结果在哪里，接下来做什么。"""
    path = shlex.quote(str(run.folder.path))
    page = shlex.quote(str(run.folder.path.with_suffix(".html")))
    after = {
        "pretrain": f"  python pre_chat.py --checkpoint {path}    看它接着往下写\n"
        f"  python sft_train.py{repeat_flags(run.config, run.origins)}    教它回答问题",
        "sft": f"  python sft_chat.py --checkpoint {path}    跟它聊\n"
        f"  python -m tools.page {path} {page}    做成一个网页，带得走",
    }
    return (
        f"完成，用时 {run.metrics.seconds() / 60:.1f} 分钟，"
        f"其中保存 {run.progress.saving_seconds:.1f} 秒。\n"
        f"  检查点    {run.folder.path}\n"
        f"  损失曲线  {run.metrics.picture}\n"
        f"  记录      {run.metrics.path}\n"
        f"接下来：\n{after[run.stage]}"
    )
