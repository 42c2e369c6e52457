"""陷阱：炸弹、边读边变的文件、拿错的文件、没有空行的书。时间与内存有限，一句话说清。"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from invented import (
    TOKENIZER,
    answer,
    check_accounts,
    check_sentence,
    conversations,
    documents,
    documents_like,
    dump,
    jsonl,
    prepare,
    question,
    sentence,
    squeezed,
    turn,
    write,
)

from dataset import SIDES
from tokenizer import Tokenizer

TEXTS = documents_like(40, 3, seed=21)
STAGES = ["pretrain", "sft"]


def refused(path: Path, words: str, stage: str = "pretrain") -> str:
    """不能用，一句话，话里有 words（正则）。"""
    outcome = prepare(path, stage)
    assert outcome.file is None, f"该拒绝，却读成了 {outcome.card}"
    check_sentence(outcome.error, path)
    assert re.search(words, outcome.error), outcome.error
    return outcome.error


# ---------- 1. 炸弹 ----------

PROGRAM = """
import resource, sys
from invented import prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outcome = prepare(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("MB", (after - before) >> 10)
print("ERROR", outcome.error)
"""


def repeat_into(path: Path, block: bytes, n: int) -> Path:
    """把 block 重复 n 遍，压缩成 path；按扩展名决定怎样压。"""
    with contextlib.ExitStack() as stack:
        if path.suffix == ".zip":
            archive = stack.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED))
            out = stack.enter_context(archive.open("a.jsonl", "w", force_zip64=True))
        elif path.suffix == ".gz":
            out = stack.enter_context(gzip.open(path, "wb", 1))
        elif path.suffix == ".bz2":
            out = stack.enter_context(bz2.open(path, "wb", 1))
        else:
            out = stack.enter_context(lzma.open(path, "wb", preset=0))
        for _ in range(n):
            out.write(block)
    return path


FILLINGS = {"zeros": b"\0", "one_line": "没有换行。".encode(), "spaces": b" ", "newlines": b"\n",
            "lines": '{"text": "同一行"}\n'.encode(), "open_array": b"["}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind, filling", [
    ("gz", "zeros"), ("gz", "one_line"), ("gz", "lines"), ("gz", "spaces"), ("gz", "newlines"),
    ("gz", "open_array"), ("xz", "zeros"), ("bz2", "zeros"), ("zip", "lines"),
])  # fmt: skip
def test_a_bomb_of_two_gigabytes(tmp_path, kind, filling):
    """几 MB 的文件解开有两 GB：两分钟之内、700 MB 之内，一句话。"""
    block = FILLINGS[filling] * ((1 << 22) // len(FILLINGS[filling]))
    path = repeat_into(tmp_path / f"bomb.jsonl.{kind}", block, 512)
    assert path.stat().st_size < 30 << 20
    memory, error = in_another_process(path, timeout=120)
    assert memory < 700
    assert "bomb" in error and re.search("[一-龥]{4}", error), error


def in_another_process(path: Path, timeout: int) -> tuple[int, str]:
    """另起一个进程准备它：(多用了多少 MB 内存, 那句报错)。"""
    tests = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], env=env, encoding="utf-8",
                          capture_output=True, timeout=timeout)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"^MB (\d+)\nERROR (.*)", done.stdout, re.M | re.S)
    return int(found[1]), found[2].strip()


@pytest.mark.parametrize("filling", ["zeros", "spaces", "newlines", "open_array"])
def test_a_small_bomb_is_one_sentence(tmp_path, filling):
    """三十几 KB 的文件解开有 32 MB，里面什么也没有：一句话。"""
    path = repeat_into(tmp_path / "bomb.jsonl.gz", FILLINGS[filling] * (1 << 20), 32)
    refused(path, "bomb")


def test_well_compressed_data_is_not_a_bomb(tmp_path):
    """压得很小的真数据（重复很多，几十比一）照读。"""
    texts = [f"{t}{i}" for i in range(400) for t in TEXTS[:10]]
    path = write(tmp_path / "a.jsonl.xz", lzma.compress(jsonl(texts).encode()))
    assert len(jsonl(texts).encode()) > 15 * path.stat().st_size
    assert prepare(path).card["rows"] == 4000


@pytest.mark.parametrize("depth", [2, 30])
def test_archives_inside_archives_end(tmp_path, depth):
    """压缩包里还是压缩包：读得出，或者说是什么；不会没完没了。"""
    content, name = jsonl(TEXTS).encode(), "a.jsonl"
    for i in range(depth):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr(name, content)
        content, name = data.getvalue(), f"{i}.zip"
    outcome = prepare(write(tmp_path / "nested.zip", content))
    if outcome.file is None:
        assert "zip" in outcome.error
    else:
        assert sorted(documents(outcome.file)) == sorted(TEXTS)


@pytest.mark.parametrize("name", ["../../escaped.jsonl", "/tmp/escaped-mini-llm.jsonl",
                                  "C:\\escaped.jsonl"])  # fmt: skip
def test_an_archive_writes_nothing_outside(tmp_path, name):
    """压缩包里的路径往外指：不写到那里去。"""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr(name, jsonl(TEXTS))
    with tarfile.open(folder / "x.tar", "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(jsonl(TEXTS).encode())
        archive.addfile(member, io.BytesIO(jsonl(TEXTS).encode()))
    before = set(tmp_path.rglob("*"))
    for path in (folder / "x.zip", folder / "x.tar"):
        prepare(path)
    assert set(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped-mini-llm.jsonl").exists()


def test_an_encrypted_zip_is_named(tmp_path):
    """加了密码的 zip：一句话。"""
    path = tmp_path / "secret.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", jsonl(TEXTS))
    data = bytearray(path.read_bytes())
    data[6] |= 1  # 本地头的「加密」一位
    at = data.rindex(b"PK\x01\x02")
    data[at + 8] |= 1
    path.write_bytes(data)
    refused(path, "密码|加密")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip", "tar", "tar.gz", "zst", "parquet"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_archives_say_so(tmp_path, kind, keep):
    """没有下载完的压缩包：一句话；读得到一部分的，也说末尾缺了。"""
    path = write(tmp_path / f"cut.jsonl.{kind}", b"")
    noise = random.Random(0)
    known = [token for token in TOKENIZER.backend.get_vocab() if re.fullmatch("[一-龥]", token)]
    texts = ["".join(noise.choices(sorted(known), k=300)) for _ in range(300)]
    content = jsonl({"text": t} for t in texts).encode()
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="没有 pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet", reason="没有 pyarrow")
        parquet.write_table(pyarrow.table({"text": texts}), path)
    elif kind == "zst":
        pyarrow = pytest.importorskip("pyarrow", reason="没有 pyarrow，写不出 zstd")
        with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
            out.write(content)
    elif kind.startswith("tar"):
        with tarfile.open(path, "w:" + kind.partition(".")[2]) as archive:
            member = tarfile.TarInfo("a.jsonl")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    else:
        repeat_into(path, content, 1)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    outcome = prepare(path)
    text = outcome.error or outcome.out
    assert re.search("不完整|损坏|没有下载完|中断|缺|截断|坏|重新下载", text), text
    if outcome.file is None:
        check_sentence(outcome.error, path)
    else:
        assert set(documents(outcome.file)) <= set(texts)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip", "tar.gz", "zst", "parquet"])
def test_damaged_archives_are_one_sentence(tmp_path, kind):
    """压缩包中间坏了几个字节。"""
    pyarrow = pytest.importorskip("pyarrow", reason="没有 pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="没有 pyarrow")
    path = tmp_path / f"bad.jsonl.{kind}"
    content = jsonl(documents_like(3000, 1)).encode()
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"text": documents_like(3000, 1)}), path)
    elif kind == "zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
            out.write(content)
    elif kind == "tar.gz":
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo("a.jsonl")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    else:
        repeat_into(path, content, 1)
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 60):
        data[at] ^= 0xFF
    path.write_bytes(data)
    outcome = prepare(path)
    if outcome.file is None:
        check_sentence(outcome.error, path)
    else:
        assert outcome.card["refused"], outcome.out


# ---------- 2. 边读边变 ----------


class Meddling(Tokenizer):
    """每次成批分词时（不管叫哪个名字），对来源文件做一件事：像有别的程序正在写它。"""

    def __init__(self, meddle):
        super().__init__()
        self.meddle, self.calls = meddle, 0

    def __getattribute__(self, name: str):
        if name.startswith("encode_"):
            self.calls += 1
            assert self.calls < 200, "文件一直在长，就一直读下去"
            self.meddle(self.calls)
        return super().__getattribute__(name)


def append(path: Path, n: int) -> None:
    with path.open("a", encoding="utf-8") as f:
        f.write(jsonl(documents_like(n, 1, seed=time.monotonic_ns())))


def change(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace("井台".encode(), "井底".encode()))


MEDDLERS = {
    "grows_once": lambda path: lambda call: append(path, 50) if call == 1 else None,
    "grows_forever": lambda path: lambda call: append(path, 6000),
    "changes": lambda path: lambda call: change(path) if call == 1 else None,
    "shrinks": lambda path: lambda call: os.truncate(path, 1000) if call == 1 else None,
    "vanishes": lambda path: lambda call: path.unlink() if call == 1 else None,
    "is_replaced": lambda path: lambda call: (
        write(path.parent / "new", documents_like(9000, 1, seed=99)).replace(path)
        if call == 1 else None),
}  # fmt: skip


def check_honest(outcome, old: list[str], source: Path, path: Path, data_dir: Path) -> None:
    """变了的文件：一句话；或者用的整个是旧的、整个是新的，而下一次用的是新的，不沿用旧的。"""
    if outcome.file is None:
        check_sentence(outcome.error, path)
        assert re.search("变|改|长|换|不见|没有了|找不到", outcome.error), outcome.error
        assert not list(data_dir.rglob("*.part"))
        assert not list(data_dir.rglob("*.json"))
    else:
        assert sorted(documents(outcome.file)) in (sorted(old), fresh(source, None))
    if path.exists():
        assert fresh(source, data_dir) == fresh(source, None), "沿用了旧的"


def fresh(source: Path, data_dir: Path | None) -> list[str] | str:
    """现在再读，会读出什么；不能用的，是那句话。"""
    outcome = prepare(source, data_dir=data_dir)
    return sorted(documents(outcome.file)) if outcome.file else outcome.error


@pytest.mark.parametrize("n", [300, 9000], ids=["short", "long"])
@pytest.mark.parametrize("name", MEDDLERS)
def test_a_file_that_changes_while_it_is_read(tmp_path, name, n):
    """读到一半，文件变了：不会没完没了，不会把半新半旧的当成准备好的，也不会把旧的当成新的。"""
    path = write(tmp_path / "source.jsonl", old := documents_like(n, 1))
    outcome = prepare(path, tokenizer=Meddling(MEDDLERS[name](path)), data_dir=tmp_path / "data")
    check_honest(outcome, old, path, path, tmp_path / "data")


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_an_archive_that_changes_while_it_is_read(tmp_path, kind):
    """压缩包也一样。"""
    old = documents_like(9000, 1)
    path = repeat_into(tmp_path / f"a.jsonl.{kind}", jsonl(old).encode(), 1)
    other = jsonl(documents_like(9000, 1, seed=3)).encode()

    def meddle(call: int) -> None:
        if call == 1:
            repeat_into(path, other, 1)

    outcome = prepare(path, tokenizer=Meddling(meddle), data_dir=tmp_path / "data")
    check_honest(outcome, old, path, path, tmp_path / "data")


@pytest.mark.parametrize("name, call", [("a", 1), ("b", 1), ("a", 2), ("a", 3), ("b", 3)])
def test_a_file_that_changes_while_its_folder_is_read(tmp_path, name, call):
    """读目录的时候，里面的一个文件变了：还没有读到的、正在读的、读完了的。"""
    old = documents_like(3000, 1) + documents_like(3000, 1, seed=4)
    write(tmp_path / "d" / "a.jsonl", old[:3000])
    write(tmp_path / "d" / "b.jsonl", old[3000:])
    path = tmp_path / "d" / f"{name}.jsonl"
    meddle = Meddling(lambda now: append(path, 10) if now == call else None)
    outcome = prepare(tmp_path / "d", tokenizer=meddle, data_dir=tmp_path / "data")
    check_honest(outcome, old, tmp_path / "d", path, tmp_path / "data")


@pytest.mark.parametrize("layout", ["file", "directory", "gz", "zip"])
def test_a_replaced_file_of_the_same_size_and_time(tmp_path, layout):
    """换成了另一个同样大小、同样时间的文件（解压、rsync -t 会这样）：要用新的。"""
    old, new = TEXTS, [text.replace("其", "甲") for text in TEXTS]
    if layout == "directory":
        source, path = tmp_path / "d", tmp_path / "d" / "a.jsonl"
    else:
        source = path = tmp_path / f"a.{layout}"

    def put(texts: list[str]) -> None:
        content = jsonl(texts).encode()
        if layout == "gz":  # 不压，大小才会一样
            content = gzip.compress(content, 0, mtime=0)
        elif layout == "zip":
            data = io.BytesIO()
            with zipfile.ZipFile(data, "w") as archive:
                archive.writestr(zipfile.ZipInfo("a.jsonl"), content)
            content = data.getvalue()
        write(path, content)
        os.utime(path, ns=(10**18, 10**18))

    put(old)
    size = path.stat().st_size
    first = prepare(source, data_dir=tmp_path / "data")
    assert sorted(documents(first.file)) == sorted(old)
    put(new)
    assert path.stat().st_size == size
    second = prepare(source, data_dir=tmp_path / "data")
    assert sorted(documents(second.file)) == sorted(new)


def test_a_file_swapped_by_rename(tmp_path):
    """新文件改名盖过来的，也一样。"""
    path = write(tmp_path / "a.jsonl", TEXTS)
    os.utime(path, ns=(10**18, 10**18))
    prepare(path, data_dir=tmp_path / "data")
    other = write(tmp_path / "b.jsonl", new := [text.replace("其", "甲") for text in TEXTS])
    os.utime(other, ns=(10**18, 10**18))
    other.replace(path)
    assert sorted(documents(prepare(path, data_dir=tmp_path / "data").file)) == sorted(new)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="没有 /dev/zero")
@pytest.mark.parametrize("kind", ["fifo", "device", "link_to_device"])
def test_what_is_not_a_file_is_named(tmp_path, kind):
    """管道、设备：永远读不完，不去读。"""
    path = tmp_path / "endless"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    source = tmp_path if kind == "link_to_device" else path
    outcome = prepare(source)
    assert outcome.file is None and re.search("[一-龥]{4}", outcome.error)


def test_a_folder_that_contains_itself(tmp_path):
    """目录里有指回自己的链接：不会转圈。"""
    write(tmp_path / "d" / "a.jsonl", TEXTS)
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    outcome = prepare(tmp_path / "d")
    if outcome.file is not None:
        assert sorted(documents(outcome.file)) == sorted(TEXTS)
    else:
        assert re.search("[一-龥]{4}", outcome.error)


# ---------- 3. 拿错的文件 ----------


def archive_of(names: list[str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, f"<xml>{name}</xml>" * 20)
    return data.getvalue()


def numpy_file() -> bytes:
    data = io.BytesIO()
    np.save(data, np.arange(100, dtype=np.uint16))
    return data.getvalue()


NOISE = bytes(range(256)) * 20
WORD = ["[Content_Types].xml", "_rels/.rels", "word/document.xml", "word/styles.xml"]
SHEET = ["[Content_Types].xml", "_rels/.rels", "xl/workbook.xml", "xl/worksheets/sheet1.xml"]
BINARIES = {
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + NOISE, "PDF"),
    "png": (b"\x89PNG\r\n\x1a\n" + NOISE, "PNG|图片"),
    "jpg": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + NOISE, "JPE?G|图片"),
    "sqlite": (b"SQLite format 3\x00" + NOISE, "(?i)sqlite"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04" + NOISE, "7z"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + NOISE, "(?i)rar"),
    "docx": (archive_of(WORD), "(?i)docx|Word"),
    "xlsx": (archive_of(SHEET), "(?i)xlsx|Excel"),
    "epub": (archive_of(["mimetype", "META-INF/container.xml", "OEBPS/a.xhtml"]), "(?i)epub"),
    "doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + NOISE, r"(?i)\.doc|Word|Office|xls"),
    "npy": (numpy_file(), "(?i)numpy|npy"),
    "pt": (archive_of(["archive/data.pkl", "archive/version", "archive/data/0"]),
           "(?i)pytorch|torch|检查点|权重"),
    "pkl": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00]\x94." + NOISE, "(?i)pickle|pkl"),
    "safetensors": (struct.pack("<Q", 60) + b'{"w":{"dtype":"F32","shape":[4],"data_offsets":'
                    b"[0,16]}}  " + NOISE, "(?i)safetensors"),
    "arrow": (b"ARROW1\x00\x00" + NOISE, "(?i)arrow"),
    "h5": (b"\x89HDF\r\n\x1a\n" + NOISE, "HDF"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + NOISE, "(?i)gguf"),
}  # fmt: skip


@pytest.mark.parametrize("name", BINARIES)
def test_binary_files_are_named_for_what_they_are(tmp_path, name):
    """二进制的文件：说出是什么，不说「请用 iconv」。"""
    content, words = BINARIES[name]
    error = refused(write(tmp_path / f"data.{name}", content), words)
    assert "iconv" not in error
    if name in ("pdf", "7z", "rar", "docx", "sqlite", "xlsx"):
        assert re.search("请|可以|先", error)


@pytest.mark.parametrize("name", ["pdf", "png", "sqlite", "docx", "npy", "pt", "7z"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_name_hides_nothing(tmp_path, name, stage):
    """改了扩展名也认得出，两个阶段都一样。"""
    content, words = BINARIES[name]
    refused(write(tmp_path / "corpus.jsonl", content), words, stage)


def test_unknown_binary_is_called_binary(tmp_path):
    """认不得的二进制：说不是文字，不说是某种编码。"""
    noise = random.Random(0)
    content = b"\x00\x01\x02\x03" + bytes(noise.randrange(256) for _ in range(5000))
    refused(write(tmp_path / "x.bin", content), "不是文字|二进制")


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0f' * 32}\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.csv"])
@pytest.mark.parametrize("stage", STAGES)
def test_git_lfs_pointers_are_named(tmp_path, name, stage):
    """Git LFS 的指针：说出它是什么、怎样取回真的数据。"""
    error = refused(write(tmp_path / name, LFS), "Git LFS", stage)
    assert "git lfs pull" in error
    refused(write(tmp_path / f"crlf-{name}", LFS.replace("\n", "\r\n")), "Git LFS", stage)


HTML = {
    "doctype": "<!DOCTYPE html>\n<html><head><title>404</title></head><body>找不到</body></html>",
    "lower": "<!doctype html><html lang='zh'><body>请先登录</body></html>",
    "bare": "<html>\n<head><title>Just a moment...</title></head><body></body></html>",
    "blank_first": "\n\n  <!DOCTYPE HTML PUBLIC \"-//W3C//DTD HTML 4.01//EN\">\n<HTML></HTML>",
    "bom": "\ufeff<!DOCTYPE html><html></html>",
    "comment_first": "<!-- saved from url -->\n<!DOCTYPE html>\n<html><body></body></html>",
    "xhtml": '<?xml version="1.0"?>\n<!DOCTYPE html>\n<html xmlns="x"><body></body></html>',
}  # fmt: skip


@pytest.mark.parametrize("kind", HTML)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet"])
def test_a_web_page_saved_instead_of_data_is_named(tmp_path, kind, name):
    """存下来的是网页，不是数据。"""
    refused(write(tmp_path / name, HTML[kind] + "<p>字</p>\n" * 30), "HTML|网页")


def test_a_text_about_html_is_a_text(tmp_path):
    """讲网页的文章、以 <p> 之外的尖括号开头的文章，还是文章。"""
    for start in ("<html> 是网页最外面的标签。", "<3 是一颗心。", "<html>标签怎么写？"):
        texts = [start, *TEXTS]
        path = write(tmp_path / "a.jsonl", texts)
        assert sorted(documents(prepare(path).file)) == sorted(texts)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("layout", ["a.txt", "a.jsonl", "a.csv"])
def test_utf16_is_read_or_named(tmp_path, encoding, layout):
    """UTF-16（有没有 BOM 都一样）：说出来，给出转换的命令；不当成别的编码。"""
    text = {"a.txt": "\n\n".join(TEXTS), "a.jsonl": jsonl(TEXTS),
            "a.csv": "text\n" + "\n".join(TEXTS)}[layout]  # fmt: skip
    path = write(tmp_path / layout, text.encode(encoding))
    outcome = prepare(path)
    if outcome.file is not None:
        assert sorted(documents(outcome.file)) == sorted(TEXTS)
        return
    check_sentence(outcome.error, path)
    assert re.search("UTF-16|UTF-32" if encoding in ("utf-16", "utf-32") else "UTF-|二进制",
                     outcome.error)  # fmt: skip
    assert "GB18030" not in outcome.error


def test_a_byte_order_mark_in_the_middle_is_not_learned(tmp_path):
    """几个带 BOM 的文件接在一起：BOM 不是字。"""
    half = "\ufeff" + jsonl(TEXTS[:20]), "\ufeff" + jsonl(TEXTS[20:])
    outcome = prepare(write(tmp_path / "a.jsonl", "".join(half)))
    assert sorted(documents(outcome.file)) == sorted(TEXTS)


# ---------- 4. 换行与分篇 ----------


@pytest.mark.parametrize("layout", ["paragraphs.txt", "lines.txt", "rows.jsonl", "array.json",
                                    "table.csv", "inside.jsonl"])  # fmt: skip
def test_windows_line_ends_change_nothing(tmp_path, layout):
    """Windows 的换行与 Unix 的读出来一样，也不算丢的字。"""
    texts = [f"{t}\n{sentence(random.Random(i))}" for i, t in enumerate(TEXTS)]
    content = {
        "paragraphs.txt": "\n\n".join(texts),
        "lines.txt": "\n".join(TEXTS),
        "rows.jsonl": jsonl({"text": t} for t in texts),
        "array.json": dump([{"text": t} for t in texts], indent=1),
        "table.csv": "id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(texts)),
        "inside.jsonl": jsonl({"text": t} for t in texts),
    }[layout]
    windows = content.replace("\n", "\r\n")
    if layout == "inside.jsonl":
        windows = content.replace("\\n", "\\r\\n")
    unix = prepare(write(tmp_path / "unix" / layout, content))
    other = prepare(write(tmp_path / "windows" / layout, windows))
    assert documents(unix.file) == documents(other.file)
    assert other.card["lost_characters"] == 0
    for key in ("train_sha256", "val_sha256", "characters"):
        assert unix.card[key] == other.card[key]


def test_old_macintosh_line_ends(tmp_path):
    """只有 \\r 的文字：也分得出篇。"""
    outcome = prepare(write(tmp_path / "a.txt", "\r\r".join(TEXTS)))
    check_accounts(outcome.card)
    assert sum(outcome.card[f"{side}_documents"] for side in SIDES) > 1


def book(n_characters: int, seed: int = 0) -> str:
    """一本书：一行，没有换行。"""
    noise = random.Random(seed)
    marks = ["。", "。", "。", "！", "？", "。”", "……"]
    parts = [sentence(noise)[:-1] + noise.choice(marks) for _ in range(n_characters // 16)]
    return "".join(parts)


def check_book(path: Path, text: str) -> None:
    """在句末分成许多篇，说了；一字不少，没有一句被切断，没有一篇太长。"""
    outcome = prepare(path)
    check_accounts(outcome.card)
    found = documents(outcome.file)
    assert len(found) >= len(text) // 20_000
    assert max(map(len, found)) <= 20_000
    assert sum(map(len, found)) == len(text)
    for piece in found:
        assert piece in text or squeezed(piece) in text
        assert re.search("(。|！|？|”|……)$", piece) or text.endswith(piece), piece[-20:]
        assert not piece.startswith(("”", "。", "…"))
    assert re.search("句", outcome.out), outcome.out


def test_a_book_in_one_line_is_split_at_sentence_ends(tmp_path):
    """3 MB 的书，只有一行。"""
    text = book(1_000_000)
    check_book(write(tmp_path / "book.txt", text), text)


@pytest.mark.slow
def test_a_book_of_ten_megabytes(tmp_path):
    """10 MB，只有一行。"""
    text = book(3_500_000)
    assert len(text.encode()) > 9_600_000
    check_book(write(tmp_path / "book.txt", text), text)


def test_a_small_book_in_one_line(tmp_path):
    """只有几百字、一行的文字也分得出两边：在句末分。"""
    text = book(400)
    outcome = prepare(write(tmp_path / "a.txt", text))
    check_accounts(outcome.card)
    found = documents(outcome.file)
    assert len(found) >= 2 and sum(map(len, found)) == len(text)
    assert "句" in outcome.out or "行" in outcome.out


def test_a_book_without_any_sentence_end(tmp_path):
    """没有句号、没有换行的一大段（古文、歌词）：也要分得开，一字不少。"""
    noise = random.Random(0)
    text = "".join(noise.choices("天地玄黄宇宙洪荒日月盈仄辰宿列张", k=60_000))
    outcome = prepare(write(tmp_path / "a.txt", text))
    check_accounts(outcome.card)
    assert "".join(sorted(squeezed("".join(documents(outcome.file))))) == "".join(sorted(text))


def test_a_chapter_with_line_breaks_but_no_blank_lines(tmp_path):
    """每一段一行、没有空行的小说：不在段落中间切断。"""
    noise = random.Random(0)
    lines = ["　　" + "".join(sentence(noise) for _ in range(noise.randint(1, 12)))
             for _ in range(3000)]  # fmt: skip
    outcome = prepare(write(tmp_path / "novel.txt", "\n".join(lines)))
    check_accounts(outcome.card)
    found = documents(outcome.file)
    assert len(found) > 10
    bodies = {line.strip() for line in lines}
    for piece in found:
        assert all(part.strip() in bodies for part in piece.splitlines())
    assert sum(len(piece.splitlines()) for piece in found) == len(lines)


def test_a_long_document_in_a_row_is_kept_whole_or_said(tmp_path):
    """JSONL 里一条就是一本书（9 MB）：用上，一字不少，或者说清；不能悄悄没了。"""
    text = book(3_000_000)
    outcome = prepare(write(tmp_path / "a.jsonl", [text, *documents_like(300, 1)]))
    check_accounts(outcome.card)
    if outcome.card["refused"]:
        assert "第 1 行" in outcome.out
    else:
        assert outcome.card["characters"] > 3_000_000 - 100


# ---------- 5. 长的单词 ----------


def seconds(text: str) -> float:
    """分词要多久：几次里最快的一次。"""
    TOKENIZER._seen.clear()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        TOKENIZER.encode_batch([text])
        best = min(best, time.perf_counter() - start)
    return best


def letters(noise: random.Random, n: int) -> str:
    return "".join(noise.choices("abcdefghijklmnopqrstuvwxyz", k=n))


def test_long_words_cost_no_more_than_short_ones():
    """同样多的字母，一个词九个字母与九百九十九个字母，用时差不多（从前差几百倍）。"""
    noise = random.Random(0)
    short = " ".join(letters(noise, 9) for _ in range(4000))
    long = " ".join(letters(noise, 999) for _ in range(40))
    longer = letters(noise, 40_000)
    usual = seconds(short)
    assert seconds(long) < 12 * usual
    assert seconds(longer) < 12 * usual


@pytest.mark.parametrize("n", [90, 101, 300, 999, 1001, 5000])
def test_long_words_are_kept_or_counted(n):
    """长的单词：写得回来，或者记在丢的字里；两条路（一篇、一批）一样。"""
    word = letters(random.Random(n), n)
    ids = TOKENIZER.encode(word)
    assert ids == TOKENIZER.encode_batch([word])[0].tolist()
    assert TOKENIZER.decode(ids) == word or TOKENIZER.unk_id in ids


def test_base64_is_counted(tmp_path):
    """base64：不是不认得的字；读成什么样都要数得清。"""
    noise = random.Random(0)
    letters_ = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    lines = ["".join(noise.choices(letters_, k=3000)) for _ in range(20)]
    outcome = prepare(write(tmp_path / "a.jsonl", lines))
    if outcome.file is None:
        assert "%" in outcome.error
        return
    lost = sum(len(text) for text in documents(outcome.file) if "[UNK]" in text)
    assert lost == 0 or outcome.card["lost_characters"] > 0


# ---------- 6. 文件里的记号 ----------


@pytest.mark.parametrize("mark", ["<|endoftext|>", "<|end_of_text|>", "</s>"])
@pytest.mark.parametrize("joint", ["{0}", "\n{0}\n", "{0}\n", "\n\n{0}\n\n"])
def test_document_ends_are_not_learned(tmp_path, mark, joint):
    """文件里的篇末记号把文字分成篇，自己不学。"""
    texts = [f"{a}\n{b}" for a, b in zip(TEXTS[::2], TEXTS[1::2], strict=True)]
    outcome = prepare(write(tmp_path / "a.txt", joint.format(mark).join([*texts, ""])))
    assert sorted(documents(outcome.file)) == sorted(texts)


def test_a_mark_mentioned_once_splits_nothing_else(tmp_path):
    """只是文章里提到一次 <|endoftext|>：别的篇还是按空行分。"""
    texts = [*TEXTS[:20], "GPT-2 用 <|endoftext|> 隔开文档。", *TEXTS[20:]]
    found = documents(prepare(write(tmp_path / "a.txt", "\n\n".join(texts))).file)
    assert set(TEXTS) <= set(found)


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_left_behind_after_a_refusal(tmp_path, stage):
    """拒绝之后，不留下半成品；修好了再来，用的是修好的。"""
    path = write(tmp_path / "a.jsonl", LFS)
    assert prepare(path, stage, data_dir=tmp_path / "data").file is None
    rows = [{"messages": [turn("user", question(i)), turn("assistant", answer(i))]}
            for i in range(30)]  # fmt: skip
    write(path, rows if stage == "sft" else TEXTS)
    file = prepare(path, stage, data_dir=tmp_path / "data").file
    assert len(conversations(file) if stage == "sft" else documents(file)) in (30, 40)
    left = [f.name for f in (tmp_path / "data").rglob("*.part")]
    assert left == []
    shutil.rmtree(tmp_path / "data")


def test_numbers_too_long_and_nesting_too_deep_are_rows(tmp_path):
    """一个几千位的整数、几万层的括号：一条坏行，不是整份都坏。"""
    lines = [json.dumps(t, ensure_ascii=False) for t in documents_like(300, 1)]
    lines[7] = '{"text": "字", "n": ' + "9" * 5000 + "}"
    lines[9] = '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}"
    outcome = prepare(write(tmp_path / "a.jsonl", "\n".join(lines)))
    check_accounts(outcome.card)
    assert outcome.card["rows"] == 300
    assert outcome.card["used"] >= 298
