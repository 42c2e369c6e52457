"""检查点里记着的路径：用户自己没有写、又在项目之外的，先问，不照办。

别人给的检查点里，`data` 可以是 /etc/passwd，`data_dir` 可以是任何目录：接着练它，便读了那个文件，
在那个目录里写了词元文件。命令行上写了的，config.py 里本来就是它的，在项目或现在的目录里的，照办。

    outside      这个路径是不是在项目与现在的目录之外
    must_ask     哪几个路径要问
    as_flags     写成命令行上的参数，原样重复一遍就是答应
"""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from config import Config, UserError

ROOT = str(Path(__file__).resolve().parent.parent)
# 每个阶段真的要读、要写的；别的只是记着，从哪里来的。out_dir 从来不取自检查点。
USED = {
    "pretrain": ("data", "data_dir", "replay_data"),
    "sft": ("sft_data", "data_dir", "replay_data"),
}


def outside(value: str | None) -> bool:
    """在项目与现在的目录之外；逗号隔开的几个，有一个就算。

    只看写法，不管链接指到哪里：data/ 可以是一个链接，指着另一块大的磁盘。里面有 .. 的也算。
    """
    if value in (None, "builtin", "auto"):
        return False
    return any(map(_outside, [value, *value.split(",")]))


def _outside(piece: str) -> bool:
    if ".." in piece.strip().replace(os.sep, "/").split("/"):
        return True  # 经过链接再往上，不知道到了哪里；写着许多层 */.. 的，也永远找不完
    path = os.path.abspath(piece.strip())
    for folder in (ROOT, os.getcwd()):
        try:
            if os.path.commonpath([folder, path]) == folder:
                return False
        except ValueError:  # Windows：不在一个盘上
            continue
    return True


def must_ask(config: Config, origins: dict, stage: str) -> list[str]:
    """哪几个路径只有检查点里有，又在外面：字段名。

    Args:
        origins: 各个值的来历，`resolve.Origins`。
    """
    names = [n for n in USED[stage] if origins[n].name == "CHECKPOINT"]
    if not config.replay:  # 旧语料只用来检验：不读它也练得下去，读的时候再说
        names = [n for n in names if n != "replay_data"]
    return [n for n in names if outside(getattr(config, n))]


def as_flags(config: Config, names: Iterable[str]) -> str:
    """--data /big/wiki.json 这样的参数，前面有一个空格；没有就是空的。"""
    return "".join(f" --{name} {shlex.quote(getattr(config, name))}" for name in names)


def ask(config: Config, names: list[str], path: Path | str, command: str) -> None:
    """有要问的，就停下来问。

    Args:
        names: `must_ask` 的结果。
        path: 哪个检查点里记着的。
        command: 再来一次的命令，已经带上了这些路径。
    Raises:
        UserError: 是哪几个路径，以及怎样算答应。
    """
    if names:
        said = "、".join(f"{name} 是 {shlex.quote(getattr(config, name))}" for name in names)
        raise UserError(
            f"{path} 里记着的 {said}，在项目与现在的目录之外，没有照办；"
            f"若确实是你的数据，请写明：{command}"
        )
