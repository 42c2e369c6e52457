"""训练与语料：接着练的，语料得是上次的；增量预训练的，另有学过的那一份（旧语料）。

identity     语料的身份，存进检查点
check        接着练时核对它
read_old     读旧语料；读不了又不是非要不可的，说一声
moved        数据不在了，路径却取自检查点：说清楚
"""

import os
import shlex
from collections.abc import Callable
from typing import Any

from config import MissingData, UserError
from engine.checkpoint import SCRIPTS, imported
from settings.places import as_flags, ask, outside
from settings.resolve import Origin
from settings.say import say

HASHES = ("train_sha256", "val_sha256")


def identity(card: dict, old: dict | None = None) -> dict[str, Any]:
    """训练与检验的词元各是哪些：内容的散列，与文件放在哪里无关；读法与划分变了，format 不同。

    Args:
        card: 词元文件的卡片。
        old: 旧语料的，没有是 None。
    """
    named = {name: card[name] for name in (*HASHES, "format")}
    return named | ({f"old_{name}": old[name] for name in HASHES} if old else {})


def check(run) -> None:
    """接着练时核对语料：用来训练的，一个词元都不许变；只用来检验的旧语料变了，说一声。

    Raises:
        UserError: 变了，以及怎样才能往下走。
    """
    stored, mine, path = run.checkpoint["data"], identity(run.card, run.old_card), run.folder.path
    differ = [n for n in mine if n != "format" and stored.get(n) != mine[n]]
    new = [n for n in differ if n in HASHES]
    if new and stored.get("format") != mine["format"]:
        raise UserError(
            f"写 {path} 的程序，读数据、分检验的办法与现在的不同，接着练不会逐位相同；"
            f"可以从它的参数开始：python {SCRIPTS[run.stage]} "
            f"--init_from {shlex.quote(str(path))} --out_dir 另一个目录"
        )
    if new or (differ and run.config.replay):
        which, flag = ("语料", "") if new else ("旧语料", "（--replay_data）")
        raise UserError(
            f"{which}与 {path} 训练时的不同，接不上；请换回原来的{which}{flag}，"
            f"或用 --out_dir 换一个目录从头练"
        )
    if differ:
        say("（旧语料与上次的不同：不影响训练，只是它的检验损失与前面的比不得）")


def read_old(run, read: Callable):
    """旧语料的词元文件；用不着（从头练，微调又不回放），或者读不了，返回 None。

    Args:
        run: 这一次训练。
        read: corpus/token_file.py 的 tokenize_corpus。
    Raises:
        UserError: 要回放，它却读不了，或者就是新语料。
    """
    config, source, wanted = run.config, run.config.replay_data, run.config.replay > 0
    stage = config.replay_stage or "pretrain"  # 旧的是文字，还是对话
    new = {"pretrain": config.data, "sft": config.sft_data}[run.stage]
    if source is None or (run.checkpoint and "old_val_sha256" not in run.checkpoint["data"]):
        return None
    same = source == new or os.path.realpath(source) == os.path.realpath(new)
    if same and stage == run.stage:
        if wanted:
            raise UserError(
                f"新旧语料都是 {source}，没有什么要回放；"
                f"请去掉 --replay，或用 --replay_data 写明旧语料"
            )
        return None
    if run.origins["replay_data"] is Origin.CHECKPOINT and outside(source):
        flag = as_flags(config, ["replay_data"])
        if wanted:
            ask(config, ["replay_data"], run.start_path, f"加上{flag}")
        say(
            f"（旧语料 {source} 是 {run.start_path} 里记着的，在项目与现在的目录之外，没有读，"
            f"忘了多少就看不到；要看：加上{flag}）"
        )
        return None
    try:
        old = read(source, stage, run.tokenizer, config, wait=run.waits)
    except UserError as error:
        if wanted and isinstance(error, MissingData):
            raise UserError(
                f"要回放的旧语料找不到：{error}；"
                f"{where_from(run, 'replay_data')}用 --replay_data 写出它现在的路径"
                + ("" if run.resumed else "，或去掉 --replay")
            ) from error
        # 几个进程时，别的进程也许正等着这一个把数据备好：坏的不能就这样跳过。
        if wanted or (run.world.size > 1 and not isinstance(error, MissingData)):
            raise
        say(f"（旧语料读不了，忘了多少就看不到：{error}；用 --replay_data 可以写明它在哪里）")
        return None
    warn_if_split_anew(run, old.card)
    return old


def warn_if_split_anew(run, card: dict) -> None:
    """旧语料留出的若不是起点训练时留出的那些，检验的题里便有学过的。"""
    stage = run.config.replay_stage or "pretrain"
    if run.resumed or run.start["stage"] != stage or imported(run.start):
        return  # 接着练的已经说过；别的阶段的、导入的，没有记下那一份留出了哪些
    if run.start["data"].get("val_sha256") != card["val_sha256"]:
        say(
            f"（旧语料现在留出的，与 {run.start_path} 训练时留出的不同："
            f"检验的题里也许有它学过的，旧语料的检验损失会偏低）"
        )


def where_from(run, name: str) -> str:
    """路径若取自检查点，说一声；相对的路径，还要说从哪里找起。"""
    if run.origins[name] is not Origin.CHECKPOINT:
        return ""
    path = getattr(run.config, name)
    start = "" if os.path.isabs(path) else f"，从现在的目录 {os.getcwd()} 找起"
    return f"这个路径是 {run.start_path} 里记着的{start}；"


def moved(run, error: MissingData) -> UserError:
    """接着练时找不到数据：路径从哪里来，搬到了别处该怎么写。"""
    name = {"pretrain": "data", "sft": "sft_data"}[run.stage]
    return UserError(
        f"{error}；{where_from(run, name)}"
        f"搬到别处了就写出新的路径：{run.folder.resume_without(name)} --{name} 新的路径"
    )
