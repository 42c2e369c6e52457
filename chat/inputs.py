"""用户输入的话：终端上有行编辑与历史，管道里一行一句；记在只有自己读得到的地方。

read_inputs   逐行给出输入的话
Remembered    输入过的话：存在哪里，怎样存，/forget 全忘掉
notify        说给人看的话不是回答，走标准错误
"""

import json
import os
import stat
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

from chat.piped import piped_lines
from settings.say import indented, say

MOST = 1000  # 最多记多少句
LONGEST = 10_000  # 更长的一句不记，字


def notify(sentence: str) -> None:
    """说给人看的话不是回答，走标准错误：管道里接着的程序读不到它。"""
    say(indented(sentence), file=sys.stderr)


def as_text(line: str) -> str:
    """终端送来的字节若不是 UTF-8，读成的是不成对的代理字符；换成 ? 才是文字。"""
    return line.encode("utf-8", "replace").decode()


def state_folder() -> Path:
    """这个系统上，程序替用户记的东西放在哪里。

    Raises:
        OSError: 不知道用户的主目录在哪里。
    """
    given = {"win32": "LOCALAPPDATA", "darwin": ""}.get(sys.platform, "XDG_STATE_HOME")
    folder = Path(os.environ.get(given, ""))
    if not folder.is_absolute():  # 没有写；写成相对的，照约定不算数
        usual = {"win32": "AppData/Local", "darwin": "Library/Application Support"}
        try:
            folder = Path.home() / usual.get(sys.platform, ".local/state")
        except RuntimeError as error:
            raise OSError(0, "不知道主目录在哪里") from error
    return folder / "mini-llm"


class Remembered:
    """输入过的话，一行一句写成 JSON；文件 0600，目录 0700。写不了的，只记到离开为止。"""

    def __init__(self, old: Path | None = None) -> None:
        self.old = old  # 从前的版本记在检查点旁边，别的用户也读得到
        self.path: Path | None = None  # None：没有写进文件
        self.said: list[str] = []  # 这一次翻得到的，新的在前

    def begin(self) -> None:
        """读出从前的；太多了，只留最后一千句。

        Raises:
            OSError: 读写不了，或者那里的不是自己的普通文件。
        """
        self.path = state_folder() / "chat_history"
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.parent.chmod(0o700)
        with self._opened() as file:
            size = os.fstat(file).st_size
            kept = MOST * LONGEST  # 字节；读到的至多这么多，文件再大也不要紧
            os.lseek(file, max(0, size - kept), os.SEEK_SET)
            lines = os.read(file, kept).split(b"\n")
            found = [text for line in lines if (text := _text_of(line))]
            self.said[:] = found[: -MOST - 1 : -1]
            if size > kept or len(found) > 2 * MOST:
                os.ftruncate(file, 0)
                os.write(file, b"".join(map(_line_of, reversed(self.said))))

    def add(self, text: str) -> None:
        """记下一句；太长的，与写不进去的，不记在文件里。"""
        self.said.insert(0, text)
        if self.path is not None and len(text) <= LONGEST:
            try:
                with self._opened() as file:
                    os.write(file, _line_of(text))  # 一次写完：两个聊天同时写，也不会混在一起
            except OSError as error:
                notify(f"（写不了 {self.path}（{error.strerror}），这一句没有记下）")

    def forget(self) -> str:
        """全忘掉，连同文件里的；返回要说的话。"""
        self.said.clear()
        where = ""
        try:
            self.path = self.path or state_folder() / "chat_history"
            if self.path.exists():
                with self._opened() as file:
                    os.ftruncate(file, 0)
                where = f"，{self.path} 已清空"
        except OSError as error:
            return f"（清不了 {self.path}（{error.strerror}）；请自己删掉它）"
        return f"（输入过的话都忘掉了{where}；聊天的前文用 /reset 忘掉）"

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """打开文件，用完关上；不跟着符号链接走，别人的、不普通的不写。"""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, name, 0)
        file = os.open(self.path, flags, 0o600)
        try:
            found = os.fstat(file)
            mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
            if not (stat.S_ISREG(found.st_mode) and mine and found.st_nlink == 1):
                raise OSError(0, "那里的不是你自己的普通文件")
            if hasattr(os, "fchmod"):
                os.fchmod(file, 0o600)
            yield file
        finally:
            os.close(file)


def _line_of(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _text_of(line: bytes) -> str:
    """一行 -> 一句话；写了一半的、不是我们写的，略过。"""
    try:
        text = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return text if isinstance(text, str) and len(text) <= LONGEST else ""


def read_inputs(remembered: Remembered) -> Iterator[str]:
    """逐行给出用户输入的话；终端上有行编辑与历史，管道里就是一行一句，也不记。

    Raises:
        UserError: 管道里送来的不是 UTF-8，或者一行太长。
    """
    if not sys.stdin.isatty():
        yield from piped_lines(sys.stdin.buffer)
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

    class Inputs(History):  # 直接用 remembered.said，/forget 清空它，就翻不到了
        async def load(self) -> AsyncGenerator[str, None]:
            for text in remembered.said:
                yield text

        def get_strings(self) -> list[str]:
            return remembered.said[::-1]

        def append_string(self, string: str) -> None:
            remembered.add(as_text(string))

        def load_history_strings(self) -> list[str]:  # 这两个由上面的代替，但不能没有
            return remembered.said

        def store_string(self, string: str) -> None:
            pass

    try:
        remembered.begin()
    except OSError as error:
        where, remembered.path = remembered.path or "历史", None
        notify(f"（写不了 {where}（{error.strerror}），输入过的话只记到离开为止）")
    if remembered.old is not None and remembered.old.is_file():
        notify(f"（{remembered.old} 是从前记下的输入，别的用户也读得到；现在不用它了，可以删掉）")
    session: PromptSession[str] = PromptSession(history=Inputs())
    while True:
        try:
            yield as_text(session.prompt("\n你> "))
        except KeyboardInterrupt:
            notify("（要离开请按 Ctrl-D，或输入 /quit）")
        except EOFError:
            return
