"""词元文件：原始文件读一遍、分词一遍，写到磁盘上；内容没变就直接用上次的。

    tokenize_corpus   原始文件 -> 词元文件

词元文件是 uint16 的一维数组（两万多个编号，16 位足够），旁边有一张 JSON 卡片写明来历、账目与
校验和。读到哪一块先核对哪一块（checked.py），卡片上的每一项也都看过（card.py）；坏了就重做一遍。
训练与检验按文档分开，怎样分见 split.py。
"""

import functools
import glob
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
from tqdm import tqdm

import tokenizer as tokenizer_module
from config import Config, UserError
from corpus import card as cards
from corpus import conversations, find, idioms, readers, shapes
from corpus.checked import AT_ONCE, Damaged, Tokens, read_starts
from corpus.encode import chunks, encode_conversations, encode_documents
from corpus.log import ReadLog, Refused
from corpus.writer import Writer, put
from dataset import SIDES
from settings.files import new_file
from settings.say import say
from tokenizer import Tokenizer


class TokenFile(NamedTuple):
    """准备好的数据。tokens[side] 是首尾相接的编号，starts[side] 是每篇的起点，末尾多一个总长。"""

    card: dict
    tokens: dict[str, Tokens]
    starts: dict[str, np.ndarray]


FORMAT = 3  # 词元文件的格式，或者划分的办法变了，就加一；旧文件会自动重做
LOST_WARNING, LOST_LIMIT = 0.01, 0.5  # 写不出的字占到这么多，就提醒；就不练


def tokenize_corpus(
    source: str, stage: str, tokenizer: Tokenizer, config: Config, wait: bool = False
) -> TokenFile:
    """把数据变成词元文件；来源、分词器、划分都没变时，用上次的。

    Args:
        source: "builtin"，或文件、目录、通配符、逗号隔开的几个。
        stage: "pretrain" 读成文档，"sft" 读成对话。
        wait: 真时自己不做，等同一台机器上的第 0 个进程做好。
    Raises:
        UserError: 数据不能用，并说明该怎么办。
    """
    paths = [idioms.dictionary_file()] if source == "builtin" else find.find_files(source)
    identity = {
        "format": FORMAT,
        "source": source,
        "stage": stage,
        "size": sum(path.stat().st_size for path in paths),
        "tokenizer": tokenizer.fingerprint(),
        "val_fraction": config.val_fraction,
        "keep_reasoning": config.keep_reasoning and stage == "sft",
        "code": code_fingerprint(),
    }
    place = "\n".join(str(path.resolve()) for path in paths)
    name = hashlib.sha256(os.fsencode(f"{place} {stage}")).hexdigest()[:8]
    stem = paths[0].stem[:40]  # 系统允许的文件名有长度限制，后面还要接别的
    base = Path(config.data_dir) / "cache" / f"{stem}-{stage}-{name}"
    ready, problem = _find(base, identity, paths, tokenizer)
    if ready:
        say(f"数据：沿用 {base}.*（{_summary(ready.card)}）")
        return ready
    while wait and not config.plan:
        time.sleep(0.2)
        if ready := _find(base, identity, paths, tokenizer)[0]:
            return ready
    if problem:
        say(f"数据：{problem}；不用它，从原始文件重做一遍")
    if config.plan:  # 打开着的文件，删掉之后仍读得到（Windows 上删不掉，留给系统清理）
        say("数据：还没有备好的。--plan 什么也不留下：做在临时目录里，打开就删")
        with tempfile.TemporaryDirectory(prefix="mini-llm-", ignore_cleanup_errors=True) as folder:
            return _make(Path(folder) / base.name, identity, paths, tokenizer)
    ready = _make(base, identity, paths, tokenizer)
    say(f"数据：写好 {base}.*（{_summary(ready.card)}）")
    return ready


def _make(base: Path, identity: dict, paths: list[Path], tokenizer: Tokenizer) -> TokenFile:
    """做好词元文件；别的程序正在做，就等它做好。"""
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with only_one(Path(f"{base}.lock")):
            ready, problem = _find(base, identity, paths, tokenizer)  # 等的时候也许别人做好了
            if ready is None:
                try:
                    _build(base, identity, paths, tokenizer)
                finally:
                    for part in base.parent.glob(f"{glob.escape(base.name)}.*.part"):
                        part.unlink()
                ready, problem = _find(base, identity, paths, tokenizer)
    except FileNotFoundError as error:
        if any(not os.path.exists(path) for path in paths):
            raise UserError(f"{identity['source']} 在读的时候不见了；请检查路径") from error
        raise
    except OSError as error:
        raise UserError(
            f"准备数据时读写失败（{error.strerror}：{error.filename or base.parent}）；"
            f"请检查权限与剩余的空间"
        ) from error
    if ready is None and not problem:
        raise UserError(f"{identity['source']} 在读的时候变了；请等它写完，再运行一次")
    if ready is None:
        raise UserError(f"刚写好的词元文件读不回来（{problem}）；请检查磁盘，再运行一次")
    return ready


@contextmanager
def only_one(lock_file: Path) -> Iterator[None]:
    """同时只有一个程序做这件事，别的等着；程序死了，系统会替它松手。"""
    lock = filelock.FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say("（另一个程序正在准备这份数据，等它做完……）")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def code_fingerprint() -> str:
    """决定词元文件内容的那些代码的指纹：改了其中任何一处，词元文件就要重做。"""
    code = [*sorted(Path(__file__).parent.glob("*.py")), Path(tokenizer_module.__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:16]


def _summary(card: dict) -> str:
    n = card["train_tokens"]
    tokens = f"{n / 1e6:.2f} M" if n >= 10**5 else f"{n:,}"
    return (
        f"{card['train_documents']} 篇训练，{card['val_documents']} 篇检验，"
        f"{tokens} 训练词元，[UNK] {card['unk_rate']:.2%}，"
        f"写不出的字 {card['lost_characters'] / max(1, card['characters']):.2%}"
    )


def _find(
    base: Path, identity: dict, paths: list[Path], tokenizer: Tokenizer
) -> tuple[TokenFile | None, str]:
    """(上次的词元文件, "")；没有，或者来源、读法变了，是 (None, "")；坏了，是 (None, 哪里坏了)。"""
    if not os.path.lexists(card_file := Path(f"{base}.json")):
        return None, ""
    try:
        card = cards.unseal(card_file)
        same = {key: value for key, value in identity.items() if key != "source"}  # 写法不同不要紧
        if any(card[key] != value for key, value in same.items()):
            return None, ""
        # 大小与时间没变就相信内容没变；变了（例如只是复制过）再比散列。
        if card["stamps"] != list(map(find.stamp, paths)) and card["sha256"] != hash_of(paths):
            return None, ""
        return _open(base, card, tokenizer), ""
    except Damaged as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename or base} 读不了（{error.strerror}）"


def _open(base: Path, card: dict, tokenizer: Tokenizer) -> TokenFile:
    """打开两边的编号与起点，核对。Raises Damaged：坏了。"""

    def forget() -> str:  # 没有卡片，下一次就重做
        again = "再运行一次同样的命令就会重做（训练过的，加上 --resume 接着练）"
        try:
            Path(f"{base}.json").unlink(missing_ok=True)
        except OSError:
            return f"请删掉 {base}.json，{again}"
        return again

    tokens, starts = {}, {}
    for s in SIDES:
        sums, n = card[f"{s}_blocks"], card[f"{s}_tokens"]
        tokens[s] = Tokens(f"{base}.{s}.bin", sums, n, tokenizer.vocab_size, forget)
        expected, documents = card[f"{s}_starts_sha256"], card[f"{s}_documents"]
        starts[s] = read_starts(f"{base}.{s}.idx", expected, documents, n)
    if sum(x.n_bytes for x in tokens.values()) <= AT_ONCE:
        for x in tokens.values():
            x.check_all()
    return TokenFile(card, tokens, starts)


def hash_of(paths: list[Path]) -> str:
    """几个文件的内容的散列。"""
    return combined([find.sha256(path) for path in paths])


def combined(each: list[str]) -> str:
    """几个文件各自的 SHA-256 合成一个；只有一个的，就是它。"""
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def _build(base: Path, identity: dict, paths: list[Path], tokenizer: Tokenizer) -> None:
    """分词并写盘。先写临时文件，最后才写卡片：中途断电，下次只是重做。"""
    Path(f"{base}.json").unlink(missing_ok=True)
    log, stamps = ReadLog(identity["source"]), list(map(find.stamp, paths))
    old = find.settled(stamps)  # 现在就看：读的时候时间才走到下一格的，那之前的改动看不出
    with ExitStack() as stack:
        writer = Writer(base)
        stack.enter_context(writer.file)
        bar = tqdm(total=identity["size"], desc="分词", unit="B", unit_scale=True)
        stack.enter_context(bar)
        records, encoder = _reading(identity, paths, log)
        for chunk in chunks(records):
            writer.add(chunk, list(encoder(chunk, tokenizer)), tokenizer.unk_id)
            bar.update(log.bytes_read() - bar.n)
        bar.update(identity["size"] - bar.n)
    log.check()
    totals = writer.totals()
    for line in [*log.report(), *check_lost(totals, log)]:
        say(line)
    held_out = writer.held_out(identity["val_fraction"])
    if held_out is None:
        raise Refused(
            f"{identity['source']} 里只有一种文档（共 {len(writer.keys)} 篇，内容或提问都相同），"
            f"留不出检验的；请增加数据",
            log,
        )
    for path, before in zip(paths, stamps, strict=True):
        if log.hashes.get(path, (None,))[0] != before:  # 读的已经不是开始时的那一个
            raise UserError(f"{path} 在读的时候变了；请等它写完，再运行一次")
        readers.check_unchanged(path, before)
    if identity["source"] != "builtin" and find.find_files(identity["source"]) != paths:
        raise UserError(f"{identity['source']} 里的文件在读的时候变了；请等它们写完，再运行一次")
    digest = combined([log.hashes[path][1] for path in paths])
    # 刚刚才改过的不记时间，下一次便再比散列。
    card = identity | {"stamps": stamps if old else [], "sha256": digest} | account(log) | totals
    for side, mine in (("train", ~held_out), ("val", held_out)):
        card |= writer.write_side(side, mine)
    part = Path(f"{base}.json.part")
    with new_file(part) as f:
        f.write(cards.seal(card))
    put(part, Path(f"{base}.json"))


def _reading(identity: dict, paths: list[Path], log: ReadLog):
    """(一条条数据, 怎样编码)。"""
    pretrain, source = identity["stage"] == "pretrain", identity["source"]
    encoder = encode_documents if pretrain else encode_conversations
    if source == "builtin":
        log.begin("builtin", "builtin")
        read = idioms.read_documents if pretrain else idioms.read_conversations
        return read(paths[0], log), encoder
    read = shapes.read_documents
    if not pretrain:
        keep = identity["keep_reasoning"]
        read = functools.partial(conversations.read_conversations, keep_reasoning=keep)
    return read(source, log), encoder


def account(log: ReadLog) -> dict:
    """账，写进卡片的几项。"""
    return {
        "kind": log.kind, "files": log.counted_files(), "rows": log.rows, "used": log.used,
        "changed": dict(log.changed), "refused": dict(log.refused), "bad_rows": log.bad,
        "unused_fields": dict(log.unused), "notes": log.notes,
    }  # fmt: skip


def check_lost(totals: dict, log: ReadLog) -> list[str]:
    """写不出的字多不多：要提醒的话。Raises Refused：多到学不了。"""
    lost, characters = totals["lost_characters"], totals["characters"]
    share = lost / max(1, characters)
    if share <= LOST_WARNING:
        return []
    most = " ".join(character for character, _ in totals["lost_top"])
    if share > LOST_LIMIT:
        raise Refused(
            f"{log.source} 的 {characters:,} 个字里有 {lost:,} 个（{share:.0%}）词表里没有"
            f"（最多的是 {most}）：bert-base-chinese 的词表只有中文、英文与常见的符号，这份语料"
            f"学不了；请换一份，或先去掉这些字",
            log,
            totals,
        )
    return [
        f"{log.source} 有 {share:.1%} 的字词表里没有（最多的是 {most}）：它们变成 [UNK]，"
        f"学不到也写不出；每字比特数里，每个这样的字多记 20 比特"
    ]
