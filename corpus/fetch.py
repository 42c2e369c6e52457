"""把一个网址的内容存成文件：有上限，断了接得上，存完说得出核对了什么。

Partial     没下完的部分：名字后面加 .incomplete
receive     下载，断了再连，直到完整
verify      核对大小与 sha256；没有公布 sha256 的，看看它像不像数据
most_bytes  至多收多少
"""

import contextlib
import os
import re
import shutil
import stat
import time
from pathlib import Path

from tqdm import tqdm

from config import UserError
from corpus.find import sha256
from corpus.hub import Remote
from corpus.sniff import recognise
from corpus.unpack import HEAD, Part, packing
from corpus.wire import Answer, Dropped, get
from settings.say import clean

TRIES = 5  # 接连几次没有进展，才放弃
PAUSE = 0.5  # 秒：第一次再连之前等多久，以后加倍
PROGRESS = 1 << 20  # 多收了这么多字节，才算有进展
RESERVE = 10**9  # 大小没有公布时，磁盘上至少留下这么多字节
UNKNOWN = 16 * 10**9  # 大小没有公布时，至多收这么多字节：现有的最大的不到 2 GB
AGAIN = "再次运行同一条命令会接着下载"


class Partial:
    """没下完的部分。只认普通的、没有别名的文件：链接会把内容写到别处去。

    Raises:
        UserError: 那个名字上是别的东西，或者别的程序正在下载它。
    """

    def __init__(self, target: Path):
        self.target = target
        self.path = target.with_name(target.name + ".incomplete")
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(self.path, flags, 0o644)
        except OSError as error:
            if os.path.lexists(self.path) and not is_regular(self.path):
                raise self.not_a_file() from error
            raise
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            os.close(descriptor)
            raise self.not_a_file()
        self.file = os.fdopen(descriptor, "r+b")
        self.lock()
        self.done = found.st_size
        self.file.seek(self.done)

    def not_a_file(self) -> UserError:
        return UserError(f"{self.path} 不是普通的文件（链接或管道之类），不往里写；请先把它移走")

    def lock(self) -> None:
        """两个程序同时接着写同一个文件，就写坏了。Windows 没有 flock，就不锁。"""
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.file.close()
                raise UserError(f"另一个程序正在下载 {self.target}；请等它结束") from error

    def write(self, block: bytes) -> None:
        self.file.write(block)
        self.done += len(block)

    def cut(self, size: int) -> None:
        """只留下开头的 size 个字节。"""
        self.file.seek(size)
        self.file.truncate()
        self.done = size

    def finish(self) -> None:
        """改成该有的名字；内容先落盘。Raises UserError：那个名字这时有了别的东西。"""
        self.file.flush()
        os.fsync(self.file.fileno())
        if os.path.lexists(self.target):
            raise UserError(f"{self.target} 刚刚有了别的内容，没有盖掉；下载的在 {self.path}")
        os.replace(self.path, self.target)

    def discard(self) -> None:
        """内容不对，留着也接不上。"""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *error) -> None:
        try:
            self.file.close()
        finally:
            with contextlib.suppress(OSError):
                if self.path.stat().st_size == 0:  # 一个字节也没有来
                    self.path.unlink()


def is_regular(path: Path) -> bool:
    """是普通的文件，不是链接、管道、设备、目录。"""
    return stat.S_ISREG(os.lstat(path).st_mode)


def most_bytes(partial: Partial, file: Remote) -> int:
    """至多收多少字节：公布的大小；没有公布，看磁盘，也不超过 UNKNOWN。"""
    if file.size is not None:
        return file.size
    free = shutil.disk_usage(partial.path.parent).free + partial.done
    return max(0, min(free - RESERVE, UNKNOWN))


# ---------- 1. 下载 ----------


def receive(session, url: str, partial: Partial, file: Remote) -> None:
    """下载，断了再连；接连几次没有进展就放弃，已经下载的留着。

    Raises:
        UserError: 连不上，停住了，或者来的不是公布的那个文件。
    """
    most, best, failures = most_bytes(partial, file), partial.done, 0
    tag: dict[str, str] = {}  # 这一次运行里见过的 ETag
    while True:
        try:
            return attempt(session, url, partial, file, most, tag)
        except Dropped as error:
            failures = 1 if partial.done >= best + PROGRESS else failures + 1
            best = max(best, partial.done)
            if failures >= TRIES:
                host = url.split("/api/")[0]
                raise UserError(f"连不上 {host}，或者连接中途断开（{error}）；"
                                f"请检查网络与代理，{AGAIN}") from error  # fmt: skip
            time.sleep(PAUSE * 2 ** (failures - 1))


def attempt(session, url: str, partial: Partial, file: Remote, most: int, tag: dict) -> None:
    """连一次，收到底。Raises Dropped：断了，可以再连。"""
    if file.size is not None and partial.done == file.size:
        return
    headers = {}
    if partial.done and (file.sha256 or tag):  # 不知道两半是不是同一个文件的，不接
        headers = {"Range": f"bytes={partial.done}-", **tag}
    with get(session, url, headers) as answer:
        check_answer(answer, partial)
        start = begins_at(answer, partial, bool(headers))
        total = announced(answer, start)
        check_total(total, most, file, partial)
        partial.cut(start)
        remember(answer, tag)
        name = clean(Path(file.path).name)
        with tqdm(desc=name, total=file.size or total, initial=start, unit="B", unit_scale=True,
                  leave=False) as bar:  # fmt: skip
            for block in answer.blocks:
                if partial.done + len(block) > most:
                    raise too_long(most, file, partial)
                partial.write(block)
                bar.update(len(block))
    whole = file.size if file.size is not None else total
    if whole is not None and partial.done < whole:
        raise Dropped(f"来了 {partial.done} 字节，应有 {whole}")


def check_answer(answer: Answer, partial: Partial) -> None:
    """服务器肯不肯给，给的是不是原样。"""
    if answer.status == 416:  # 它的文件没有这么长：上次留下的不是它的开头
        partial.cut(0)
        raise Dropped("HTTP 416")
    if answer.status >= 500 or answer.status in (408, 429):
        raise Dropped(f"HTTP {answer.status}")
    if answer.status not in (200, 206):
        raise UserError(
            f"服务器不给这个文件（HTTP {answer.status}）；请到网页上确认它还在、并且公开"
        )
    if answer.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
        raise UserError("服务器给的是另外压缩过的内容，没法与公布的核对，不下载；请稍后再试")


def begins_at(answer: Answer, partial: Partial, asked: bool) -> int:
    """给的内容从第几个字节开始；不接着上次的，就从头。"""
    if answer.status == 200:
        return 0
    span = re.fullmatch(r"bytes (\d{1,18})-.*", answer.headers.get("Content-Range", ""))
    if not asked or span is None or int(span[1]) != partial.done:
        partial.cut(0)
        raise Dropped("给的不是要的那一段")
    return partial.done


def announced(answer: Answer, start: int) -> int | None:
    """服务器说整个文件有多大；没有说是 None。"""
    total = re.fullmatch(r"bytes \d+-\d+/(\d{1,18})", answer.headers.get("Content-Range", ""))
    if answer.status == 206 and total:
        return int(total[1])
    length = answer.headers.get("Content-Length", "")
    return start + int(length) if re.fullmatch(r"\d{1,18}", length) else None


def check_total(total: int | None, most: int, file: Remote, partial: Partial) -> None:
    """还没有收，先看它说的大小。"""
    if total is None:
        return
    if file.size is not None and total != file.size:
        raise UserError(
            f"服务器要给的有 {total} 字节，公布的是 {file.size} 字节，不是同一个文件；"
            "没有下载，请稍后再试"
        )
    if total > most:
        raise too_long(most, file, partial)


def too_long(most: int, file: Remote, partial: Partial) -> UserError:
    """收到上限还没有完：不是公布的那个文件，接不上，删掉。"""
    partial.cut(0)
    if file.size is not None:
        return UserError(f"服务器给的比公布的 {most} 字节还多，不是公布的那个文件；"
                         "已经停下，收到的已经删除，请稍后再试")  # fmt: skip
    return UserError(
        f"没有公布大小，收到 {most} 字节还没有完（磁盘要留 {RESERVE // 10**9} GB，"
        f"至多收 {UNKNOWN // 10**9} GB）；已经停下，收到的已经删除，请腾出空间或换一个文件"
    )


def remember(answer: Answer, tag: dict) -> None:
    """记下这个文件的 ETag：再连时带上，换了文件服务器就会从头给。弱的（W/ 开头）不算。"""
    found = answer.headers.get("ETag", "")
    tag.clear()
    if re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', found):
        tag["If-Range"] = found


# ---------- 2. 核对 ----------


def verify(partial: Partial, file: Remote) -> str:
    """核对收到的；返回核对了什么。

    Raises:
        UserError: 与公布的不符，或者不是数据；收到的已经删除。
    """
    partial.file.flush()
    if file.sha256:
        if sha256(partial.path) == file.sha256:
            return "大小与 sha256 无误" if file.size is not None else "sha256 无误"
        partial.discard()
        raise UserError(
            f"下载到的 {file.path} 与公布的 sha256 不符，已经删除；请再次运行同一条命令"
        )
    try:
        looks = kind_of(partial, Path(file.path).name)
    except UserError as error:
        partial.discard()
        raise UserError(f"下载到的不是数据，已经删除：{error}") from error
    known = "只核对了大小" if file.size is not None else "也没有公布大小，内容对不对无从核对"
    return f"没有公布 sha256，{known}；看开头像是 {looks}"


def kind_of(partial: Partial, name: str) -> str:
    """看开头，像是什么。Raises UserError：不是数据，例如网页。"""
    partial.file.seek(0)
    head = partial.file.read(HEAD)
    if (packed := packing(head)) is not None:
        return f"{packed} 压缩的"
    suffix = os.path.splitext(name)[1].lower()
    return recognise(Part(name, suffix, head, partial.file, True)).name
