"""从词元文件里数出来的：长短、截掉多少、三个样本。

nothing_known   体检结果的样子：每一项都在，还不知道的是 None
of_card         词元文件的卡片上写着的
of_refusal      训练不收的，读到那里为止知道的
rows_of         微调的对话装成的行，与训练用的是同一段程序
lengths         每篇多少个词元，多少篇长过一行
samples         三个样本，照模型看到的样子
"""

from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from config import Config, UserError
from corpus.token_file import TokenFile
from dataset import IGNORE, SIDES, SFTBatches, sft_batches
from tokenizer import Tokenizer

TITLE = "数据体检"
CARD = (
    "kind", "files", "rows", "used", "changed", "refused", "unused_fields", "notes",
    "characters", "lost_characters", "lost_top", "unk_rate", "duplicates", "openings",
    "train_documents", "val_documents", "train_tokens", "val_tokens",
    "train_targets", "val_targets",
)  # fmt: skip
COUNTED = ("lengths", "cut", "skipped", "samples", "time", "error")
N_SAMPLES = 3
BUCKETS = 8  # 直方图至多几行


def nothing_known(stage: str, config: Config) -> dict[str, Any]:
    """体检结果的样子：每一项都在，还不知道的是 None。"""
    source = {"pretrain": config.data, "sft": config.sft_data}[stage]
    about = {"report": TITLE, "source": source, "stage": stage}
    about |= {"preset": config.preset, "seq_len": config.seq_len}
    return about | dict.fromkeys((*CARD, *COUNTED))


def of_card(card: dict) -> dict[str, Any]:
    """词元文件的卡片上写着的。"""
    return {name: card[name] for name in CARD}


def of_refusal(error: UserError) -> dict[str, Any]:
    """训练不收的，读到那里为止知道的：读数据时的账（log），数完了字的还有字数（totals）。"""
    log, totals = getattr(error, "log", None), getattr(error, "totals", None) or {}
    known = {name: totals[name] for name in CARD if name in totals} | {"error": str(error)}
    if log is None:  # 一条也没有读到
        return known
    return known | {
        "kind": log.kind or None, "files": log.counted_files(), "rows": log.rows,
        "used": log.used, "changed": dict(log.changed), "refused": dict(log.refused),
        "unused_fields": dict(log.unused), "notes": list(log.notes),
    }  # fmt: skip


Rows = dict[str, SFTBatches] | None  # 微调时训练与检验各自的行；预训练没有装箱，是 None


def rows_of(data: TokenFile, stage: str, config: Config, tokenizer: Tokenizer) -> Rows:
    """微调的对话装成行，照 sft_train.py 那样。

    Raises:
        UserError: 没有一段装得下一句助手的话，训练也不收。
    """
    if stage == "pretrain":
        return None
    return {side: sft_batches(data, side, config, tokenizer) for side in SIDES}


# ---------- 长短 ----------


def lengths(data: TokenFile, rows: Rows, seq_len: int) -> dict[str, Any]:
    """每篇有多少个词元，两边合起来；多少篇长过一行。

    微调的，长过一行的末尾截掉（cut），截掉之后没有话可学的整段不用（skipped）；预训练的只是断开，
    接到下一行，什么也不丢。
    """
    counts = np.concatenate([np.diff(data.starts[side]) for side in SIDES])
    median, most = np.percentile(counts, (50, 90), method="lower")
    shape = {
        "median": int(median), "p90": int(most), "longest": int(counts.max()),
        "mean": float(counts.mean()), "histogram": histogram(counts),
    }  # fmt: skip
    if rows is None:
        return {"lengths": shape, "cut": int((counts > seq_len).sum()), "skipped": 0}
    total = {name: sum(getattr(rows[s], name) for s in SIDES) for name in ("cut", "skipped")}
    return {"lengths": shape} | total


def histogram(counts: np.ndarray) -> list[dict[str, int]]:
    """长短的分布：每格的上限加倍，至多 BUCKETS 格，两头少的并进邻近的一格。

    Args:
        counts: 每篇的词元数，一维。
    Returns:
        每格 {"from", "to", "documents"}，两端都含。
    """
    powers = np.frexp(counts - 1)[1]  # 2^(p-1) < n <= 2^p 的 p
    found = np.bincount(powers)
    low, high = int(powers.min()), int(powers.max())
    amounts = found[low : high + 1].tolist()
    first, last = int(counts.min()), int(counts.max())
    while len(amounts) > BUCKETS:
        if amounts[0] <= amounts[-1]:
            amounts[:2], low = [amounts[0] + amounts[1]], low + 1
        else:
            amounts[-2:], high = [amounts[-2] + amounts[-1]], high - 1
    tops = [2**p for p in range(low, high)] + [last]
    starts = [first] + [top + 1 for top in tops[:-1]]
    cells = zip(starts, tops, amounts, strict=True)
    return [{"from": a, "to": b, "documents": n} for a, b, n in cells]


# ---------- 样本 ----------


class Sample(NamedTuple):
    """一篇文档或一段对话，照模型看到的样子；控制词元看得见。"""

    pieces: list[tuple[str, bool]]  # 一截一截的文字，各要不要学
    cut_off: str  # 微调：一行装不下，末尾截掉的
    tokens: int  # 连截掉的
    cut: bool  # 长过一行

    def to_dict(self) -> dict[str, Any]:
        """写进 JSON 的样子。"""
        text = "".join(piece for piece, _ in self.pieces) + self.cut_off
        learned = [piece for piece, supervised in self.pieces if supervised]
        return {"text": text, "tokens": self.tokens, "cut": self.cut, "supervised": learned}


def samples(data: TokenFile, rows: Rows, seq_len: int, tokenizer: Tokenizer) -> list[Sample]:
    """训练用的最前、中间、最后一个；不满三个就有几个给几个。微调的只从用上的里挑。"""
    tokens, starts = data.tokens["train"], data.starts["train"]
    found = range(len(starts) - 1)
    if rows:
        found = np.sort(np.fromiter(chain.from_iterable(rows["train"].rows), np.int64))
    chosen = sorted({int(found[i * (len(found) - 1) // (N_SAMPLES - 1)]) for i in range(N_SAMPLES)})
    made = []
    for index in chosen:
        ids = tokens[starts[index] : starts[index + 1]]
        learned, too_long = np.ones(len(ids), bool), len(ids) > seq_len  # 预训练的全都要学
        if rows:
            learned = learned_in_training(rows["train"], index)
            too_long = len(learned) < len(ids)
        seen, rest = ids[: len(learned)], written(ids[len(learned) :], tokenizer)
        made.append(Sample(pieces(seen, learned, tokenizer), rest, len(ids), too_long))
    return made


def learned_in_training(batches: SFTBatches, index: int) -> np.ndarray:
    """第 index 段对话的词元各要不要学，截掉的不算：看训练时真的送进去的那一行。"""
    row = next(r for r, items in enumerate(batches.rows) if index in items)
    batch = batches.get([row])
    here = batch.segments[0] == batches.rows[row].index(index)
    targets = batch.targets[0][here].numpy() != IGNORE
    return np.concatenate([[False], targets])  # 目标是右移一位的：第一个词元不用猜


def pieces(ids: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """在要不要学改变的地方断开，各自写成文字。"""
    bounds = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    return [(written(ids[a:b], tokenizer), bool(learned[a])) for a, b in pairwise(bounds)]


def written(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """写成文字，控制词元与 [UNK] 看得见。"""
    return tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False)
