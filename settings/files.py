"""文件：写的不顺着链接写到别处去，读的不等没有尽头的。

new_file      新建一个文件来写；原来叫这个名字的，先去掉
write_text    一段文字写成一个文件，换掉原有的
sync_folder   改名也落盘
open_regular  打开一个普通的文件来读

在名字猜得到的地方（X.pt.part、config.json），别人可以先放一个链接：照普通的 open("w") 写，盖掉的
是链接指着的那个文件；硬链接也一样。去掉的只是这个名字，它指着的文件不受影响。
"""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def new_file(path: Path, mode: str = "wb", **how: Any) -> IO[Any]:
    """新建一个文件来写。

    Args:
        path: 原来有叫这个名字的文件或链接，先去掉；目录不去掉。
        mode: "wb" 或 "w"。
        how: 同 open，例如 encoding。
    Raises:
        OSError: 写不了；FileExistsError：刚去掉，又有人放了一个。
    """
    Path(path).unlink(missing_ok=True)
    return open(path, mode.replace("w", "x"), **how)  # "x"：已经有的（也包括链接）不打开


def write_text(path: Path, text: str) -> None:
    """写成 UTF-8 的文件；写完才换掉原有的。写不完（磁盘满了、按了 Ctrl-C），不留下半个。"""
    part = path.with_name(path.name + ".part")
    try:
        with new_file(part, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """改名也要落盘。Windows 不能打开目录，也不需要。"""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # 有的网络文件系统不支持；文件本身已经写好了
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: str | Path) -> int | None:
    """打开一个普通的文件来读（链接可以，指到的要是），返回描述符；是管道、设备、目录，返回 None。

    Raises:
        OSError: 打不开。
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)  # O_NONBLOCK：打开没有人写的管道也不等
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None
