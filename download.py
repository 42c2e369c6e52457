"""从 ModelScope 下载完整的训练数据，放进 data/。

    python download.py wiki                   中文维基百科，预训练用
    python download.py sft                    minimind 的对话数据，SFT 用
    python download.py sft --file NAME        同一个数据集里的另一个文件

download() 按顺序做五件事：列出数据集里的文件 → 选中一个 → 已经完整就不再下载 →
看磁盘够不够 → 下载。断点续传、重试、进度条、大小与 sha256 的核对都由 ModelScope 的
官方客户端 modelscope_hub 完成（modelscope 包自己的下载也交给它，而它导入快得多）；
这里决定下载什么、放到哪里，不轻信列表（corpus/hub.py），收多少、等多久都有上限
（corpus/wire.py），最后说清楚核对了什么。
"""

from settings.script import run_script

import difflib
import os
import shlex
import shutil
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chat.numbers import file_size
from config import UserError, option
from corpus import hub, wire
from corpus.find import sha256
from corpus.sniff import recognise
from corpus.unpack import HEAD, Part, packing
from settings.flags import read_options, word
from settings.say import say

RESERVE = 10**9  # 大小没有公布时，磁盘上至少留下这么多字节
UNKNOWN = 16 * 10**9  # 大小没有公布时，至多收这么多字节：现有的最大的不到 2 GB
SLACK = 1 << 20  # 大小公布了的，由客户端核对到一个字节；这里再宽这么多，只防它没有核对


class Source(NamedTuple):
    dataset: str  # ModelScope 上的“所有者/数据集”
    file: str  # 不写 --file 时下载的文件
    trainer: str  # 用它训练的命令，后面接文件的路径


SOURCES = {
    "wiki": Source("ngxc11/mini-llm-dataset", "wiki_zh_texts_filtered.json", "pre_train.py --data"),
    "sft": Source("gongjy/minimind_dataset", "sft_t2t_mini.jsonl", "sft_train.py --sft_data"),
}
USAGE = """\
用法：python download.py wiki|sft [--参数 值 …]
  wiki    预训练语料
  sft     对话数据"""


@dataclass
class Options:
    """命令行参数。"""

    source: str = word(
        "要下载的",
        "请写要下载哪一个：python download.py wiki（预训练语料），"
        "或 python download.py sft（对话数据）",
        choices=tuple(SOURCES),
    )
    file: str | None = option(None, "数据集里的另一个文件；名字不对会列出全部文件")
    data_dir: str = option("data", "放在哪个目录")


def choose_file(files, name, dataset):
    """在数据集的文件列表里找到 name；没有就报出最接近的名字和二十来个文件。"""
    if not files:
        raise UserError(f"数据集 {dataset} 没有列出任何文件；请到网页上确认它还在、并且公开")
    if name in files:
        return hub.remote(name, files[name])
    near = difflib.get_close_matches(name, [*files][:300], n=20, cutoff=0)  # 多了，比得慢
    listing = "、".join(
        f"{path}（{file_size(files[path].size)}）" if 0 < files[path].size <= hub.LARGEST else path
        for path in near
    )
    more = f" 等 {len(files)} 个" if len(files) > len(near) else ""
    raise UserError(
        f"数据集 {dataset} 里没有文件 {name}，最接近的是 {near[0]}；"
        f"请用 --file 指定其中一个：{listing}{more}"
    )


def place(data_dir, name):
    """存到哪里。Raises UserError：会存到 data_dir 之外。"""
    target = data_dir / name
    if not target.resolve().is_relative_to(data_dir.resolve()) and not target.is_symlink():
        raise UserError(f"文件名 {name} 指向 data_dir（{data_dir}）之外，不下载；请换一个文件")
    return target


def is_whole(target, file):
    """target 已经完整时为 True，还不存在时为 False。

    Raises:
        UserError: 存在，却不是公布的那个文件。它也许是用户自己改过的，所以绝不覆盖。
    """
    if not os.path.lexists(target):
        return False
    if not target.is_file():  # 断了的链接、管道、目录
        raise UserError(f"{target} 已经存在，却不是普通的文件；想下载，请先把它移走或改名")
    say(f"{target} 已经存在，正在核对……")
    same = file.size in (None, target.stat().st_size)
    if same and file.sha256:
        same = sha256(target) == file.sha256
    if not same:
        raise UserError(f"{target} 已经存在，但与公布的文件不同；想重新下载，请先把它移走或改名")
    if file.sha256:
        say("文件完整，不必再下载")
    else:
        known = "大小相同" if file.size else "也没有公布大小，无从核对"
        say(f"没有公布 sha256，{known}；就用它，不再下载；想重新下载，请先把它移走或改名")
    return True


def partial_of(target, file):
    """客户端把没下完的存在这个名字下，下次从它的末尾接着；接不上的先删掉。

    Raises:
        UserError: 那里是链接之类，客户端会顺着它写到别处去。
    """
    partial = target.with_suffix(target.suffix + ".incomplete")
    if not os.path.lexists(partial):
        return partial
    found = partial.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise UserError(f"{partial} 不是普通的文件（链接或管道之类），不往里写；请先把它移走")
    if file.size is not None and found.st_size > file.size:
        say("上次留下的比公布的还长，不是它的开头；从头下载")
        partial.unlink()
    elif found.st_size and not file.sha256:
        say("没有公布 sha256，不知道上次留下的是不是同一个文件；从头下载")
        partial.unlink()
    return partial


def check_space(target, partial, file):
    """报告要下载多少、放到哪里、还剩多少空间；放不下就不开始。返回至多收多少。"""
    done = partial.stat().st_size if partial.exists() else 0
    free = shutil.disk_usage(target.parent).free
    size = "大小没有公布" if file.size is None else file_size(file.size)
    say(f"下载 {file.path}（{size}）到 {target}；磁盘剩余 {file_size(free)}")
    if done:
        say(f"上次已经下载 {file_size(done)}，从那里接着下载")
    need = RESERVE if file.size is None else file.size - done
    if need > free:
        raise UserError(
            f"磁盘空间不够：还要下载 {file_size(need)}，{target.parent} 只剩 "
            f"{file_size(free)}；请腾出空间，或用 --data_dir 换一个位置"
        )
    return min(free + done - RESERVE, UNKNOWN) if file.size is None else file.size + SLACK


def limits(file, most):
    """下载这个文件的上限。"""
    if file.size is not None:
        too_long = f"服务器给的比公布的 {file.size} 字节还多，不是公布的那个文件；已经停下、删除"
    else:
        too_long = (
            f"没有公布大小，收到 {most} 字节还没有完（磁盘要留 {RESERVE // 10**9} GB，"
            f"至多收 {UNKNOWN // 10**9} GB）；已经停下、删除，请腾出空间或换一个文件"
        )
    return wire.Limits(most, too_long, is_file=True, same_tag=not file.sha256)


def verified(target, file):
    """返回核对了什么。公布了的客户端已经核对；没有公布 sha256 的，看看开头像不像数据。

    Raises:
        UserError: 不是数据，例如网页；已经删除。
    """
    if file.sha256:
        return "大小与 sha256 无误" if file.size is not None else "sha256 无误"
    try:
        looks = kind_of(target)
    except UserError as error:
        target.unlink()
        raise UserError(f"下载到的不是数据，已经删除：{error}") from error
    known = "只核对了大小" if file.size is not None else "也没有公布大小，内容对不对无从核对"
    return f"没有公布 sha256，{known}；看开头像是 {looks}"


def kind_of(path):
    """看开头，像是什么。Raises UserError：不是数据。"""
    with path.open("rb") as stream:
        head = stream.read(HEAD)
        if (packed := packing(head)) is not None:
            return f"{packed} 压缩的"
        return recognise(Part(path.name, path.suffix.lower(), head, stream, True)).name


def download(dataset, name, data_dir):
    """下载一个文件（已经完整就不下载），返回它的路径 data_dir/name。"""
    api, endpoint = hub.client()
    say(f"查询 {endpoint} 上的数据集 {dataset} ……")
    file = choose_file(hub.list_files(api, endpoint, dataset), name, dataset)
    target = place(data_dir, name)
    try:
        if is_whole(target, file):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(target, file)
        most = check_space(target, partial, file)
        try:
            hub.fetch_file(api, endpoint, dataset, file, data_dir, limits(file, most))
        except wire.Useless:
            partial.unlink(missing_ok=True)
            raise
        checked = verified(target, file)
    except OSError as error:
        raise UserError(
            f"写不进 {data_dir}（{error}）；请腾出空间、检查权限，"
            "或用 --data_dir 换一个位置，然后再次运行"
        ) from error
    say(f"下载完成，{checked}")
    return target


def main():
    """读命令行，下载，告诉用户接下来运行什么。"""
    options = read_options(Options, sys.argv[1:], USAGE)
    source = SOURCES[options.source]
    try:
        target = download(source.dataset, options.file or source.file, Path(options.data_dir))
    except KeyboardInterrupt:
        say("\n已中断；再次运行同一条命令，会从中断的地方接着下载", file=sys.stderr)
        sys.exit(130)
    # minimind 的数据集里也有预训练用的文件，名字都以 pretrain 开头。
    trainer = SOURCES["wiki"].trainer if target.name.startswith("pretrain") else source.trainer
    say(f"接下来运行：\n  python {trainer} {shlex.quote(target.as_posix())}")


if __name__ == "__main__":
    run_script(main)
