"""读数据：各种各样的原始文件 -> 一篇篇文档，或一段段对话。

认得的文件（.json .jsonl .txt，也可以是 .gz；看内容而不看扩展名）：

    JSONL             一行一个字符串，或一个有 text / content（可另有 title）的对象
    JSON 数组         同样的内容放在一个大数组里；边读边给，不整个装进内存
    纯文本            空行隔开的段落，一段一篇
    wiki2019zh        一行一个 {"id", "url", "title", "text"}
    minimind          正文里写着 <|im_start|>…<|im_end|> 或 <s>…</s>，每一对里是一篇
    对话              {"conversations": [{"role", "content"}, …]}，或 instruction/input/output

坏行不会悄悄丢掉：`ReadLog` 记下文件与行号，最后一并报告；超过 1% 就停下来。
"""

import codecs
import contextlib
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from config import UserError

MAX_LINE = 8 << 20  # 一行（一条）最长多少字节；再长多半不是按行组织的数据
BLOCK = 1 << 18  # 大数组一次读进来多少字节
MAX_DOCUMENT = 1 << 12  # 纯文本一篇最长多少字；没有空行的长文在换行处分篇
BAD_ROWS_ALLOWED = 0.01
GIVE_UP_AFTER = 1000  # 开头这么多条全是坏行，就不再往下读
NOT_UTF8 = "不是 UTF-8（第 {} 字节）；可以先用 iconv -f GB18030 -t UTF-8 转换编码"
CUT_LINE = "最后一行不完整，多半是下载中断了；请接着下载，或删掉这一行"
JSON, JSON_TEXT = json.JSONDecoder(), json.JSONEncoder(ensure_ascii=False)
JSON_BLANK = re.compile(r"[ \t\n\r]*")
END = object()  # 大数组到此为止
BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)


class ReadLog:
    """边读边记：读到了文件的哪里，有多少好行与坏行，最先遇到的几条坏行。"""

    def __init__(self, source: str):
        self.source = source
        self.file: BinaryIO | None = None  # 磁盘上的文件，它的 tell() 就是进度
        self.rows = 0
        self.bad = 0
        self.blank = 0
        self.examples: list[str] = []
        self.notes: Counter[str] = Counter()  # 没有照原样使用的，各有多少

    def add(self, row: str, reason: str) -> None:
        """记下一条坏行；``row`` 例如「第 3 行」。"""
        self.bad += 1
        if len(self.examples) < 5:
            self.examples.append(f"{self.source} {row}：{reason}")
        if self.bad == self.rows == GIVE_UP_AFTER:  # 多半拿错了文件，不必读完几个 GB 才说
            self.check()

    def report(self) -> list[str]:
        """给用户看的几行话；没有问题时为空。"""
        lines = [f"{self.source} 里有 {count} 条{note}" for note, count in self.notes.items()]
        if self.blank:
            lines.append(f"{self.source} 里有 {self.blank} 条空白文档，已跳过")
        if self.bad:
            lines += [f"跳过 {self.bad} 条坏行（共 {self.rows} 条），例如：", *self.examples]
        return lines

    def check(self) -> None:
        """读完之后：一条好的都没有，或者坏行超过 1%，就报错。"""
        good = self.rows - self.bad - self.blank
        if good > 0 and self.bad <= BAD_ROWS_ALLOWED * self.rows:
            return
        if not self.bad:
            raise UserError(f"{self.source} 里没有一条能用的数据；请检查文件内容")
        raise UserError(
            f"{self.source} 有 {self.bad} / {self.rows} 条坏行，超过 "
            f"{BAD_ROWS_ALLOWED:.0%}；请先修好数据，例如：\n  " + "\n  ".join(self.examples)
        )


# ---------- 1. 打开与辨认 ----------


@contextlib.contextmanager
def open_binary(path: Path, log: "ReadLog | None" = None) -> Iterator[BinaryIO]:
    """打开文件；gzip 压缩的（看开头两个字节）顺便解压，BOM 跳过。"""
    with path.open("rb") as raw:
        if log:
            log.file = raw
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if compressed else raw as f:
            if f.read(3) != b"\xef\xbb\xbf":
                f.seek(0)
            yield f


def sha256(path: Path) -> str:
    """文件内容的散列；一块一块地读，多大的文件都行。"""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_source(path: Path) -> bytes:
    """确认文件存在、读得了、不空，返回开头的一段字节。

    Raises:
        UserError: 说明哪里不对、该怎么办。
    """
    if os.path.isdir(path):  # 与 Path 的同名方法不同：名字太长时说不是，而不是抛出异常
        raise UserError(f"{path} 是目录，要的是一个文件；可以先用 cat 把里面的文件接成一个")
    if not os.path.exists(path):
        raise UserError(f"找不到数据文件 {path}；请检查路径，或先运行 python download.py")
    if not os.path.isfile(path):  # 例如 /dev/zero，永远读不完
        raise UserError(f"{path} 不是普通的文件；请先把数据存成文件")
    try:
        with open_binary(path) as f:
            head = f.read(1 << 16)
    except BROKEN_GZIP as error:
        raise UserError(f"{path} 的 gzip 压缩数据已损坏（{error}）；请重新下载") from error
    except OSError as error:
        raise UserError(f"读不了 {path}（{error.strerror or error}）；请检查权限") from error
    if not head.strip():
        raise UserError(f"{path} 是空文件；请检查它是否下载完整")
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise UserError(f"{path} 是 UTF-32 编码；请先用 iconv -f UTF-32 -t UTF-8 转换")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} 是 UTF-16 编码；请先用 iconv -f UTF-16 -t UTF-8 转换")
    return head


def sniff(path: Path, head: bytes) -> str:
    """看开头的内容，辨认是 "array"、"jsonl" 还是 "text"；看不出时才看扩展名。"""
    head = head.lstrip()
    if re.match(rb'\[\s*["{\]]', head):
        return "array"
    if head.startswith(b"{") or _is_json_string(head.split(b"\n")[0]):
        return "jsonl"
    if path.name.removesuffix(".gz").endswith((".json", ".jsonl")):
        return "array" if head.startswith(b"[") else "jsonl"  # 第一行就是坏行
    return "text"


def _is_json_string(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), str)
    except (ValueError, RecursionError):
        return False


def read_rows(path: Path, log: ReadLog) -> Iterator[tuple[str, Any]]:
    """逐条给出 (在哪里, 解析好的 JSON 值或一段纯文本)。"""
    kind = sniff(path, check_source(path))
    try:
        yield from {"array": _read_array, "jsonl": _read_jsonl, "text": _read_text}[kind](path, log)
    except BROKEN_GZIP as error:
        log.rows += 1
        log.add("末尾", f"gzip 压缩数据不完整（{error}），多半是下载中断了；请接着下载")


def read_lines(path: Path, log: ReadLog) -> Iterator[tuple[int, str]]:
    """逐行给出 (行号, 文字)，行号从 1 起；过长或不是 UTF-8 的行记为坏行。"""
    with open_binary(path, log) as f:
        number = 0
        while line := f.readline(MAX_LINE):
            number += 1
            where, complete = f"第 {number} 行", line.endswith(b"\n")
            if len(line) == MAX_LINE and not complete:
                log.rows += 1
                log.add(where, f"长于 {MAX_LINE >> 20} MB，是不是少了换行？")
                while line and not line.endswith(b"\n"):
                    line = f.readline(MAX_LINE)
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                log.rows += 1
                cut = not complete and error.start >= len(line) - 3  # 文件断在一个字的中间
                log.add(where, CUT_LINE if cut else NOT_UTF8.format(error.start))
                continue
            yield number, text


def _read_jsonl(path: Path, log: ReadLog) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(path, log):
        if not line.strip():
            continue
        log.rows += 1
        try:
            yield f"第 {number} 行", json.loads(line)
        except (ValueError, RecursionError) as error:
            complete = line.endswith("\n")
            reason = str(error).partition(": line")[0]  # 它说的行号是这一行里面的，只会误导
            log.add(f"第 {number} 行", f"不是合法的 JSON（{reason}）" if complete else CUT_LINE)


def _read_array(path: Path, log: ReadLog) -> Iterator[tuple[str, Any]]:
    """数组没有写完，少的只是末尾，算一条坏行；写完了却在中间出错，后面的全读不到，不能继续。"""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    text, at, number, more = "", 0, 0, True  # 读进来的文字、用到哪里、第几条、文件读完没有
    with open_binary(path, log) as f:
        try:
            while True:
                row, end, problem = _next_item(text, at, "," if number else "[")
                if end == len(text) and more and end - at <= MAX_LINE:  # 也许只是还没读到
                    block = f.read(max(BLOCK, end - at))
                    text, at, more = text[at:] + decode(block), 0, bool(block)
                elif row is END or problem:
                    break
                else:
                    at, number, log.rows = end, number + 1, log.rows + 1
                    yield f"第 {number} 条", row
            if row is END and (text[end:].strip() or any(line.strip() for line in f)):
                problem = "数组结束之后还有别的内容"
        except UnicodeDecodeError as error:
            problem = NOT_UTF8.format(f.tell() - len(error.object) + error.start)
    if problem and end - at > MAX_LINE:
        problem = f"一条长于 {MAX_LINE >> 20} MB"
    closed = text.rstrip().endswith("]") and not problem.startswith("Unterminated")
    if problem and end == len(text) and not more and not closed:
        log.rows += 1
        log.add(f"第 {number} 条之后", "数组没有写完，不完整，多半是下载中断了；请接着下载")
    elif problem:
        raise UserError(f"{path} 第 {number} 条之后不是合法的 JSON（{problem}）；请先修好那一条")


def _next_item(text: str, at: int, opening: str) -> tuple[Any, int, str]:
    """解析 text 里从 at 起的分隔符 opening 与它后面的一条。

    Returns:
        (那一条, 到哪里为止, 哪里不对)；数组到此为止时，那一条是 END。
        错在末尾的，多半只是还没读到：「到哪里为止」就是末尾。
    """
    at = JSON_BLANK.match(text, at).end()
    if text.startswith("]", at) and opening == ",":
        return END, at + 1, ""
    if not text.startswith(opening, at):
        return None, at, f"少了 {opening}"
    at = JSON_BLANK.match(text, at + 1).end()
    if text.startswith("]", at) and opening == "[":
        return END, at + 1, ""
    try:
        return *JSON.raw_decode(text, at), ""
    except RecursionError:
        return None, at, "嵌套得太深"
    except json.JSONDecodeError as error:
        # 没写完的字符串，错误记在它的开头；没写完的词，最长的是 -Infinity，九个字。
        cut = error.msg.startswith("Unterminated") or error.pos > len(text.rstrip()) - 9
        return None, len(text) if cut else error.pos, error.msg
    except ValueError:  # Python 不肯把几千位的数字变成整数
        return None, at, "有一个整数太长"


def _read_text(path: Path, log: ReadLog) -> Iterator[tuple[str, Any]]:
    paragraph: list[str] = []
    size = start = 0
    for number, line in read_lines(path, log):
        if paragraph and (not line.strip() or size > MAX_DOCUMENT):
            log.rows += 1
            yield f"第 {start} 行", "".join(paragraph)
            paragraph, size = [], 0
        if line.strip():
            start = number if not paragraph else start
            paragraph.append(line)
            size += len(line)
    if paragraph:
        log.rows += 1
        yield f"第 {start} 行", "".join(paragraph)


# ---------- 2. 文档 ----------


# ---------- 3. 对话 ----------
