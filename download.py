"""从 ModelScope 下载完整的训练数据，放进 data/。

    python download.py wiki                   中文维基百科，预训练用
    python download.py sft                    minimind 的对话数据，SFT 用
    python download.py sft --file NAME        同一个数据集里的另一个文件

download() 按顺序做五件事：列出数据集里的文件 → 选中一个 → 已经完整就不再下载 →
看磁盘够不够 → 下载。断点续传、重试、进度条、大小与 sha256 的核对都由 ModelScope 的
官方客户端 modelscope_hub 完成（modelscope 包自己的下载也交给它，而它导入快得多）；
这里只决定下载什么、放到哪里，并把它的异常翻译成一句看得懂的话。
"""

from settings.script import run_script

import contextlib
import difflib
import logging
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chat.numbers import file_size
from config import UserError, option
from corpus.find import sha256
from settings.flags import read_options, word


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


@contextlib.contextmanager
def plain_errors(dataset, endpoint, data_dir):
    """把客户端、网络与磁盘的异常换成 UserError；程序自己的错误照常抛出。"""
    import requests
    from modelscope_hub import errors

    # 顺序要紧：NetworkError 和 RequestException 也是 OSError，具体的必须排在前面。
    try:
        yield
    except errors.NotExistError as error:
        message = f"{endpoint} 上没有数据集 {dataset}，或者它不公开；请到网页上确认它还在"
        raise UserError(message) from error
    except errors.FileIntegrityError as error:
        message = f"从 {dataset} 下载到的内容与公布的大小或 sha256 不符，已经删除"
        raise UserError(f"{message}；请稍后再次运行同一条命令") from error
    except (errors.NetworkError, requests.RequestException) as error:
        message = f"连不上 {endpoint}，或者连接中途断开；请检查网络与代理"
        raise UserError(f"{message}，再次运行同一条命令会接着下载") from error
    except errors.HubError as error:
        raise UserError(f"{endpoint} 没有完成请求（{error.message}）；请稍后再试") from error
    except OSError as error:
        message = f"写不进 {data_dir}（{error}）；请腾出空间、检查权限"
        raise UserError(f"{message}，或用 --data_dir 换一个位置，然后再次运行") from error


def choose_file(files, name, dataset):
    """在数据集的文件列表里找到 name；没有就报出最接近的名字和全部文件。"""
    by_name = {info.path: info for info in files if not info.is_dir}
    if not by_name:
        raise UserError(f"数据集 {dataset} 没有列出任何文件；请到网页上确认它还在、并且公开")
    if name not in by_name:
        nearest = difflib.get_close_matches(name, by_name, n=1, cutoff=0)[0]
        listing = "、".join(f"{path}（{file_size(i.size)}）" for path, i in by_name.items())
        raise UserError(
            f"数据集 {dataset} 里没有文件 {name}，最接近的是 {nearest}；"
            f"请用 --file 指定其中一个：{listing}"
        )
    return by_name[name]


def is_whole(target, info):
    """target 已经完整时为 True，还不存在时为 False。

    Raises:
        UserError: 存在，却不是公布的那个文件。它也许是用户自己改过的，所以绝不覆盖。
    """
    if not target.exists():
        return False
    print(f"{target} 已经存在，正在核对……")
    same = info.size in (0, target.stat().st_size)  # 列表里的 0 表示“不知道”
    if same and info.sha256:
        same = sha256(target) == info.sha256
    if not same:
        raise UserError(f"{target} 已经存在，但与公布的文件不同；想重新下载，请先把它移走或改名")
    return True


def check_space(target, info):
    """报告要下载多少、放到哪里、还剩多少空间；放不下就不开始。"""
    # 客户端把没下完的内容存成“文件名.incomplete”，下次从它的末尾接着下载。
    partial = target.with_name(target.name + ".incomplete")
    done = partial.stat().st_size if partial.exists() else 0
    free = shutil.disk_usage(target.parent).free
    print(f"下载 {info.path}（{file_size(info.size)}）到 {target}；磁盘剩余 {file_size(free)}")
    if done:
        print(f"上次已经下载 {file_size(done)}，从那里接着下载")
    if info.size - done > free:
        raise UserError(
            f"磁盘空间不够：还要下载 {file_size(info.size - done)}，{target.parent} 只剩 "
            f"{file_size(free)}；请腾出空间，或用 --data_dir 换一个位置"
        )


def download(dataset, name, data_dir):
    """下载一个文件（已经完整就不下载），返回它的路径 data_dir/name。"""
    from modelscope_hub import HubApi, get_default_config  # 用到才导入，--help 不必等它

    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # 不要它列表与重试的日志
    endpoint = get_default_config().endpoint
    print(f"查询 {endpoint} 上的数据集 {dataset} ……")
    with plain_errors(dataset, endpoint, data_dir):
        api = HubApi()
        info = choose_file(api.list_repo_files(dataset, "dataset"), name, dataset)
        target = data_dir / name
        if not target.resolve().is_relative_to(data_dir.resolve()):
            raise UserError(f"文件名 {name} 指向 data_dir（{data_dir}）之外，不下载；请换一个文件")
        if is_whole(target, info):
            print("文件完整，不必再下载")
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target, info)
        published = {"file_size": info.size or None, "expected_sha256": info.sha256}
        api.download_file(dataset, "dataset", name, local_dir=data_dir, **published)
    print("下载完成" + ("，sha256 无误" if info.sha256 else "（没有公布 sha256，只核对了大小）"))
    return target


def main():
    """读命令行，下载，告诉用户接下来运行什么。"""
    options = read_options(Options, sys.argv[1:], USAGE)
    source = SOURCES[options.source]
    try:
        target = download(source.dataset, options.file or source.file, Path(options.data_dir))
    except KeyboardInterrupt:
        print("\n已中断；再次运行同一条命令，会从中断的地方接着下载", file=sys.stderr)
        sys.exit(130)
    # minimind 的数据集里也有预训练用的文件，名字都以 pretrain 开头。
    trainer = SOURCES["wiki"].trainer if target.name.startswith("pretrain") else source.trainer
    print(f"接下来运行：\n  python {trainer} {shlex.quote(target.as_posix())}")


if __name__ == "__main__":
    run_script(main)
