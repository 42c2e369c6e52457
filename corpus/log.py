"""读数据时的账：每一条都记在一处，不多不少；最后一并说给用户听。

ReadLog    用了的、改过才用的、不用的，各有多少；没有用到的字段；最先遇到的几条坏的
Refused    这份数据不能用；账在里面
Unusable   一条不能用，为什么
"""

import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from config import UserError

BAD_ROWS_ALLOWED = 0.01
GIVE_UP_AFTER = 1000  # 开头这么多条全是坏的，就不再往下读
N_EXAMPLES, N_FIELDS = 5, 12  # 报告里至多写几个
MANY_NAMES = 10_000  # 至多记几个字段名
MANY_NOTES = 20


class Unusable(ValueError):
    """一条不能用。

    Args:
        why: 原因，同一类的写法相同，最后按它数。
        detail: 这一条的详情，写进例子里。
        broken: 假时它本身没有坏，只是不该学（例如标着是不好的回答），不算坏行。
    """

    def __init__(self, why: str, detail: str = "", broken: bool = True):
        super().__init__(why + (f"（{detail}）" if detail else ""))
        self.why, self.broken = why, broken


class Refused(UserError):
    """这份数据不能用；`log` 是读到那时的账，`totals` 是词元的账（算过的话）。"""

    def __init__(self, message: str, log: "ReadLog", totals: dict | None = None):
        super().__init__(message)
        self.log, self.totals = log, totals


def shown(name: str) -> str:
    """一个字段名，写给人看。"""
    return name if name.isprintable() and len(name) <= 60 else reprlib.repr(name)[1:-1]


class FileCount(NamedTuple):
    """一个文件（或包里的一个）：名字，认作什么，到它为止的条数。"""

    name: str
    kind: str
    rows_before: int


class OnDisk(Protocol):
    """磁盘上的文件，`tell()` 说读到了哪里。"""

    def tell(self) -> int:
        """读到了第几个字节。"""


class ReadLog:
    """边读边记。

    Fields:
        used: 照原样用了的条数。
        changed: {怎样改的: 条数}。
        refused: {为什么不用: 条数}；其中坏了的合计 `bad` 条。
        unused: {没有用到的字段: 条数}。
        notes: 该告诉用户的话，例如怎样分的篇。
        files: 读了哪些文件。
        hashes: {磁盘上的文件: (打开时的 find.stamp, 读到的内容的 SHA-256)}。
    """

    def __init__(self, source: str):
        self.source = self.place = source  # place：正在读的那一个文件
        self.used = self.bad = 0
        self.changed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.examples: list[str] = []  # 最先遇到的几条坏的
        self.seen_at: dict[str, str] = {}  # 不用的，每一种最先在哪里
        self.notes: list[str] = []
        self.files: list[FileCount] = []
        self.hashes: dict[Path, tuple[list[int], str]] = {}
        self.file: OnDisk | None = None
        self.done = 0  # 前几个文件合计多少字节

    def hashed(self, path: Path, found: tuple[list[int], str]) -> None:
        """记下读到的内容的散列。Raises UserError：写了两遍的文件，两遍读到的不同。"""
        if self.hashes.setdefault(path, found) != found:
            raise UserError(f"{path} 在读的时候变了；请等它写完，再运行一次")

    @property
    def rows(self) -> int:
        """读过的条数：每一条或照用，或改过才用，或不用。"""
        return self.used + self.changed.total() + self.refused.total()

    def begin(self, name: str, kind: str) -> None:
        """开始读一个文件（或包里的一个）。"""
        self.place = name
        self.files.append(FileCount(name, kind, self.rows))

    def use(self, changes: Sequence[str] = ()) -> None:
        """记下用了的一条；changes 是对它做了哪些改动。"""
        if changes:
            self.changed["；".join(dict.fromkeys(changes))] += 1
        else:
            self.used += 1

    def leave(self, fields: Iterable[str]) -> None:
        """记下一条里没有用到的字段；名字里看不见的字符转义，太长的截短。"""
        names = {shown(name) for name in fields}
        if len(self.unused) > MANY_NAMES:  # 拿编号当字段名的，不必一个个都记着
            names = {name if name in self.unused else "别的" for name in names}
        self.unused.update(names)

    def refuse(self, row: str, error: Unusable) -> None:
        """记下不用的一条；row 例如「第 3 行」。"""
        self.refused[error.why] += 1
        self.seen_at.setdefault(error.why, row)
        if not error.broken:
            return
        self.bad += 1
        if len(self.examples) < N_EXAMPLES:
            self.examples.append(f"{self.place} {row}：{error}")
        if self.bad == self.rows == GIVE_UP_AFTER:  # 多半拿错了文件，不必读完几个 GB 才说
            self.check()

    def note(self, sentence: str) -> None:
        """记下一句该告诉用户的话；许多文件都是同样的，只说前几个。"""
        if len(self.notes) < MANY_NOTES:
            self.notes.append(sentence)
        elif len(self.notes) == MANY_NOTES:
            self.notes.append("（别的文件也有这样的，不一一说了）")

    def left_out(self, place: str, names: list[str]) -> None:
        """place 里有些文件没有读。"""
        if names:
            some = "、".join(map(shown, names[:5])) + "……" * (len(names) > 5)
            self.note(f"{place} 里有 {len(names)} 个文件看名字不是数据，没有读：{some}")

    def bytes_read(self) -> int:
        """从磁盘上读了多少字节。"""
        return self.done + (self.file.tell() if self.file else 0)

    def counted_files(self) -> list[dict]:
        """每个文件的名字、认作什么、有多少条。"""
        ends = [f.rows_before for f in self.files[1:]] + [self.rows]
        return [
            {"name": f.name, "kind": f.kind, "rows": end - f.rows_before}
            for f, end in zip(self.files, ends, strict=True)
        ]

    @property
    def kind(self) -> str:
        """认作什么；几个文件各不相同的，用顿号隔开。"""
        return "、".join(dict.fromkeys(f.kind for f in self.files))

    def report(self) -> list[str]:
        """给用户看的几行话；没有什么可说时为空。"""
        lines = list(self.notes)
        if len(self.files) > 1:
            counted = [f"{f['name']} {f['rows']:,} 条" for f in self.counted_files()[:N_FIELDS]]
            more = "……" if len(self.files) > N_FIELDS else ""
            lines.append(f"依次读了 {len(self.files)} 个文件：{'，'.join(counted)}{more}")
        lines += [
            f"{self.source} 里有 {n:,} 条没有照原样用：{how}"
            for how, n in self.changed.most_common(N_FIELDS)
        ]
        if self.unused:
            fields = [f"{n:,} 条有 {name}" for name, n in self.unused.most_common(N_FIELDS)]
            more = f"，另有 {len(self.unused) - N_FIELDS} 种" if len(self.unused) > N_FIELDS else ""
            lines.append(f"没有用到的字段：{'，'.join(fields)}{more}")
        if self.bad < self.refused.total():
            lines.append(f"{self.source} 里不用的：{self._reasons()}")
        if self.bad:
            lines += [f"跳过 {self.bad} 条坏行（共 {self.rows} 条），例如：", *self.examples]
        return lines

    def _reasons(self) -> str:
        common = self.refused.most_common(N_FIELDS)
        return "，".join(f"{n:,} 条{why}（例如{self.seen_at[why]}）" for why, n in common)

    def check(self) -> None:
        """读完之后：一条好的都没有，或者坏行超过 1%，就报错。"""
        good = self.rows - self.refused.total()
        if good > 0 and self.bad <= BAD_ROWS_ALLOWED * self.rows:
            return
        if not self.bad:
            why = f"：{self._reasons()}" if self.refused else ""
            raise Refused(f"{self.source} 里没有一条能用的数据{why}；请检查文件内容", self)
        raise Refused(
            f"{self.source} 有 {self.bad} / {self.rows} 条坏行，超过 "
            f"{BAD_ROWS_ALLOWED:.0%}；请先修好数据，例如：\n  " + "\n  ".join(self.examples),
            self,
        )
