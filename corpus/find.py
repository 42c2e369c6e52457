"""找到数据文件，记住它们的样子。

find_files    --data 写的（文件、目录、通配符、逗号隔开的几个）-> 一个个文件
stamp         大小、修改时间等：两次相同，内容就没有变（刚刚改过的，还要比内容：settled）
sha256        内容的散列
"""

import glob
import hashlib
import os
import time
from pathlib import Path

from config import MissingData, UserError
from corpus.log import ReadLog

TICK = 2 * 10**9  # 文件系统的时间最粗的一格，纳秒
PACKED = (".gz", ".xz", ".bz2", ".zst", ".lzma", ".zip", ".tar", ".tgz", ".txz", ".tbz", ".tbz2")
PLAIN = ("", ".txt", ".text", ".md", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
NOT_DATA = ("readme", "license", "licence", "notice", "changelog", "makefile", "dockerfile",
            "dataset_info", "dataset_dict")  # fmt: skip


def find_files(source: str, log: ReadLog | None = None) -> list[Path]:
    """``--data`` 写的 -> 一个个文件：目录里的按名字排，逗号隔开的照写的次序。

    Args:
        log: 目录里没有读的，记在它的 notes 里。
    Raises:
        MissingData: 有一个找不到。
        UserError: 目录里没有数据。
    """
    if os.path.isdir(source):
        return _in_folder(Path(source), log)
    if os.path.exists(source):
        return [Path(source)]
    if "," in source:
        pieces = [piece.strip() for piece in source.split(",") if piece.strip()]
        if pieces:
            return [path for piece in pieces for path in find_files(piece, log)]
    if glob.has_magic(source) and (found := sorted(glob.glob(source, recursive=True))):
        every = (path for name in found for path in find_files(name, log))
        return list(dict.fromkeys(every))  # ** 既找到目录，也找到里面的文件
    raise MissingData(
        f"找不到数据文件 {source}；请检查路径，或先运行 python download.py wiki（对话是 sft）"
    )


def _in_folder(folder: Path, log: ReadLog | None) -> list[Path]:
    def unreadable(error: OSError) -> None:
        raise UserError(f"读不了目录 {error.filename}（{error.strerror}）；请检查权限") from error

    found, left, seen = [], [], set()
    for root, names, files in os.walk(folder, followlinks=True, onerror=unreadable):
        names[:] = sorted(n for n in names if not n.startswith("."))
        if (real := os.path.realpath(root)) in seen:  # 链接绕了回来
            names[:] = []
            continue
        seen.add(real)
        for name in sorted(files):
            path = Path(root, name)
            cache = name.endswith(".json") and path.with_suffix(".train.bin").exists()
            wanted = looks_like_data(name) and not cache and path.exists()  # 断了的链接不算
            (found if wanted else left).append(path)
    if log:
        log.left_out(str(folder), [path.name for path in left])
    if not found:
        raise UserError(f"目录 {folder} 里没有数据文件（{'、'.join(PLAIN[1:])} 等）；请检查路径")
    return sorted(found)


def looks_like_data(name: str) -> bool:
    """目录或包里的一个文件，看名字像不像数据；没有扩展名的也像（例如 wiki_00）。"""
    stem, suffix = os.path.splitext(os.path.basename(name).lower())
    if name.lower().endswith("state.json") and stem == "state":  # datasets 的 save_to_disk 写的
        return False
    return suffix in PLAIN + PACKED and not stem.startswith((".", *NOT_DATA))


def stamp(path: Path) -> list[int]:
    """大小、修改时间、状态改变的时间与 inode。

    只换内容而保住大小与修改时间的，改变不了后两样里的至少一样。
    """
    return stamp_of(path.stat())


def stamp_of(s: os.stat_result) -> list[int]:
    """同 stamp；打开着的文件，用 os.fstat。"""
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def settled(stamps: list[list[int]]) -> bool:
    """两个时间都过去了一阵子：往后再改，时间必定不同。

    文件系统的时间有粗有细（FAT 两秒一格），与上一次同在一格里的改动，从时间上看不出来。
    """
    now = time.time_ns()
    return all(max(mtime, ctime) + TICK < now for _, mtime, ctime, _ in stamps)


def sha256(path: Path) -> str:
    """文件内容的散列；一块一块地读，多大的文件都行。"""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
