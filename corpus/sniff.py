"""看一份内容的开头，辨认它是什么；不能用的，说出它其实是什么、怎样变成能用的。

recognise   一份内容 -> Kind
"""

import csv
import json
import re
from typing import NamedTuple

from config import UserError
from corpus.fields import KNOWN, ROLE
from corpus.unpack import HEAD, Part

JSON = json.JSONDecoder(parse_constant=lambda name: None)  # NaN 就是没有
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
BOM = b"\xef\xbb\xbf"
# 一篇的结尾：各个项目写在纯文本里的。
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|endofdoc|>", "<eod>", "<|eos|>", "[EOS]",
                 "</s>")  # fmt: skip

MAGIC = {
    b"%PDF": "PDF；请先运行 pdftotext {name} 文字.txt",
    b"\x89PNG": "PNG 图片，不是文字",
    b"\xff\xd8\xff": "JPEG 图片，不是文字",
    b"GIF8": "GIF 图片，不是文字",
    b"SQLite format 3": "SQLite 数据库；请先把表导出成 CSV：sqlite3 -header -csv {name} "
                        "'select * from 表名' > 数据.csv",
    b"7z\xbc\xaf\x27\x1c": "7z 压缩包；请先运行 7z x {name}",
    b"Rar!": "RAR 压缩包；请先运行 unrar x {name}",
    b"\x93NUMPY": "NumPy 数组，不是文字；请给出原始的文字",
    b"\xd0\xcf\x11\xe0": "旧的 Word 或 Excel 文档；请先另存为纯文本或 CSV（UTF-8）",
    b"ARROW1": "Arrow 文件；请先用 datasets 的 to_json() 存成 JSONL",
    b"\xff\xff\xff\xff": "Arrow 文件（datasets 的 save_to_disk 写的）；"
                         "请先用 to_json() 存成 JSONL",
    b"\x7fELF": "可执行文件，不是数据；请检查路径",
    b"\x80\x04\x95": "Python 的 pickle；请先存成 JSONL",
    b"\x04\x22\x4d\x18": "lz4 压缩的；请先运行 lz4 -d {name}",
    b"\x1f\x9d": "compress 压缩的（.Z）；请先运行 uncompress {name}",
    b"\x89HDF": "HDF5 文件；请先把里面的文字存成 JSONL",
    b"GGUF\3\0\0\0": "GGUF 模型，不是数据；请检查路径",
}  # fmt: skip


class Empty(UserError):
    """空的文件。"""


class Kind(NamedTuple):
    """认作什么。

    Fields:
        name: jsonl（一行一条）、json（别的摆法）、csv、tsv、parquet、wikiextractor 或 text。
        layout: 纯文本怎样分篇：一篇结尾的标记，"blank"（空行）、"line"（一行）
            或 "sentence"（句末）；表格的，是各格之间的那个字。
    """

    name: str
    layout: str = ""


def recognise(part: Part) -> Kind:
    """辨认一份内容。

    Raises:
        UserError: 空的，编码不对，或者不是数据。
    """
    head = part.head
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise UserError(f"{part.name} 是 UTF-32 编码；请先用 iconv -f UTF-32 -t UTF-8 转换")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{part.name} 是 UTF-16 编码；请先用 iconv -f UTF-16 -t UTF-8 转换")
    if head.startswith(b"PAR1"):
        return Kind("parquet")
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{part.name} 是 {what.format(name=part.name)}")
    if head.count(b"\0") > len(head) // 1000:  # 零星的一两个，只是混进了控制字符
        guess = guess_utf16(head)
        raise UserError(
            f"{part.name} 里有 NUL 字节，"
            + (f"多半是 {guess} 编码；请先用 iconv -f {guess} -t UTF-8 转换" if guess
               else "是二进制文件，不是文字；请检查路径")
        )  # fmt: skip
    head = head.removeprefix(BOM)
    if not head.strip():
        raise Empty(f"{part.name} 是空文件；请检查它是否下载完整")
    text = head.decode("utf-8", "replace").lstrip()
    whole = len(part.head) < HEAD
    check_is_data(part.name, text)
    if re.match(r"<doc\s", text):
        return Kind("wikiextractor")
    if is_json(text, part.suffix):
        return Kind(json_layout(text, whole, part.suffix))
    if (comma := separator(text, part.suffix)) is not None:
        return Kind("tsv" if comma == "\t" else "csv", comma)
    return Kind("text", text_layout(text.replace("\r\n", "\n").replace("\r", "\n"), whole))


def guess_utf16(head: bytes) -> str:
    """没有 BOM 的 UTF-16：照它解码，得到的几乎都是汉字、标点与字母；不像，返回空的。"""
    for name in ("UTF-16LE", "UTF-16BE"):
        text = head[: len(head) // 2 * 2].decode(name, "replace")[:4000]
        usual = sum("\t" <= c <= "~" or "\u3000" <= c <= "\u9fff" or c >= "\uff00" for c in text)
        if usual > 0.9 * len(text) and "\ufffd" not in text[:-1]:
            return name
    return ""


def check_is_data(name: str, text: str) -> None:
    """网页、指针之类，下载时常被当成数据存了下来。Raises UserError：是什么，该怎么办。"""
    start = text[:2000].lower()
    if start.startswith("version https://git-lfs.github.com/spec/"):
        size = re.search(r"^size (\d+)", text, re.MULTILINE)
        real = f"（真正的文件有 {int(size[1]):,} 字节）" if size else ""
        raise UserError(f"{name} 是 Git LFS 的指针，不是数据{real}；请先运行 git lfs pull")
    if re.match(
        r"(<\?xml[^>]*>\s*)?(?:<!--(?:(?!-->).)*-->\s*)*(<!doctype html|<html)", start, re.DOTALL
    ):
        raise UserError(
            f"{name} 是网页（HTML），不是数据：多半是下载时存下了网页；请找到文件本身的下载地址"
        )
    if re.match(r"(<\?xml[^>]*>\s*)?<mediawiki", start):
        raise UserError(
            f"{name} 是维基百科的 XML；请先用 WikiExtractor 变成文字："
            f"python -m wikiextractor.WikiExtractor {name}"
        )
    if start.startswith("<?xml"):
        raise UserError(f"{name} 是 XML，不是认得的格式；请先变成 JSONL 或纯文本")


# ---------- JSON ----------


def is_json(text: str, suffix: str) -> bool:
    """是不是 JSON。扩展名是的就算；不是的，要真的读得出一个值：文章也会以括号、引号开头。"""
    if suffix in JSON_SUFFIXES:
        return True
    if not re.match(r"""\{\s*["'}]|(\[\s*)+["{\]]|\"""", text):
        return False
    if re.match(r"\{\s*'", text):
        return False
    first, *rest = [line for line in text.split("\n")[:20] if line.strip()]
    if parses(first):  # 文章里也会有一行恰好是 "走吧。"：别的行也要有一半是
        return sum(map(parses, rest)) * 2 >= len(rest)
    if text.startswith('"'):
        return False
    try:
        _, end = JSON.raw_decode(text)
        return text[end:].lstrip()[:1] in ("", ",", "{", "[", '"')
    except RecursionError:
        return True
    except ValueError as error:
        cut = isinstance(error, json.JSONDecodeError) and reaches_the_end(error, text)
        return cut or any(map(parses, rest))


def parses(line: str) -> bool:
    """这一行恰好是一个对象、数组或字符串。"""
    try:
        return isinstance(json.loads(line), dict | list | str)
    except (ValueError, RecursionError):
        return False


def reaches_the_end(error: json.JSONDecodeError, text: str) -> bool:
    """错在末尾：也许只是后面的还没有读到。"""
    # 没写完的字符串，错误记在它的开头；没写完的词，最长的是 -Infinity，九个字。
    return error.msg.startswith("Unterminated") or error.pos > len(text.rstrip()) - 9


def json_layout(text: str, whole: bool, suffix: str) -> str:
    """一行一条（"jsonl"：坏了一行，别的行照读），还是别的摆法（"json"：一个值接一个值地读）。"""
    first, newline, rest = text.partition("\n")
    more = bool(newline) and (bool(rest.strip()) or not whole)
    try:
        value = json.loads(first)
        return "jsonl" if more or is_message_list(value) else "json"
    except RecursionError:
        return "jsonl"
    except ValueError as error:
        if str(error).startswith("Extra data"):  # 两个文件接起来，接的地方少了换行
            return "jsonl" if more else "json"
    if not more or re.fullmatch(r"[\[{]\s*", first):
        return "json"
    try:
        JSON.raw_decode(text)
        return "json"  # 一个值占了好几行
    except RecursionError:
        return "json"
    except ValueError as error:
        cut = isinstance(error, json.JSONDecodeError) and reaches_the_end(error, text)
        return "json" if cut and text.startswith(("{", "[")) else "jsonl"


def is_message_list(value: object) -> bool:
    """一个数组里头一个是发言：它是一段对话，而不是许多条；后面有坏的，读到时再说。"""
    return isinstance(value, list) and bool(value) and is_message(value[0])


def is_message(value: object) -> bool:
    """有角色的对象：一轮发言。"""
    return isinstance(value, dict) and any(isinstance(value.get(name), str) for name in ROLE)


# ---------- 表格与纯文本 ----------


def separator(text: str, suffix: str) -> str | None:
    """有表头的表格，各格之间用什么隔开；不是表格，返回 None。"""
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]
    if suffix in (".csv", ".tsv"):
        return max("\t,;" if suffix == ".tsv" else ",\t;", key=first.count)
    for comma in "\t,;":
        names = [name.strip() for name in next(csv.reader([first], delimiter=comma), [])]
        if len(names) > 1 and any(name in KNOWN for name in names) and all(map(is_name, names)):
            return comma
    return None


def is_name(text: str) -> bool:
    """像一个字段的名字，而不是半句话。"""
    return len(text) <= 40 and re.fullmatch(r"[\w .\-/]*", text) is not None


def document_end(text: str) -> str:
    """用哪一种标记写着一篇的结尾；没有，是空的。

    文章里顺口提到的不算：要有一半写在行末，或者不止一处。<s>…</s> 成对的是网页的删除线，只认行末。
    """
    if "<" not in text and "[EOS]" not in text:  # 多数如此，不必一种种找
        return ""
    for end in DOCUMENT_ENDS:
        if end not in text:
            continue
        at_line_end = re.findall(re.escape(end) + r"[ \t\r]*(?=\n|$)", text)
        struck = end == "</s>" and "<s>" in text
        if len(at_line_end) * 2 >= text.count(end) or (text.count(end) > 1 and not struck):
            return end
    return ""


def text_layout(text: str, whole: bool) -> str:
    """纯文本怎样分篇，见 `Kind`。"""
    if end := document_end(text):
        return end
    lines = text.rstrip().split("\n")
    if not whole and len(lines) > 1:
        lines.pop()  # 可能没有读完
    if any(not line.strip() for line in lines):
        return "blank"
    sentences = sum(line.rstrip().endswith(tuple("。！？!?…”」』；;.~）)")) for line in lines)
    return "line" if len(lines) > 1 and sentences >= 0.9 * len(lines) else "sentence"
