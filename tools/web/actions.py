"""网页背后做的事：载入模型、一个词元一个词元地写、比较、读训练的记录。不认识 Gradio。

几位访客共用一个模型：各有各的 KV 缓存，每写一个词元轮一次，所以谁也不会把谁的话写乱。
"""

import html
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from chat.display import bits, percent
from config import UserError
from engine.metrics import NOTHING, read_records
from generate import (
    Choice,
    KVCache,
    Sampling,
    Speaker,
    check_finite,
    is_looping,
    probabilities,
)
from sft_chat import ask
from tools.explain.facts import examine
from tools.explain.page import page
from tools.explain.speaker import load_speaker

LOCK = threading.RLock()  # 一次只算一件事：显微镜的钩子挂在共用的模型上，同时算的会混进去
MOST = 64  # 显微镜看最后多少个词元


# ---------- 1. 模型 ----------


def checkpoints(root: Path) -> list[str]:
    """root 里的检查点，微调过的在前；备份与发散的不算。"""
    found = [p for p in root.rglob("*.pt") if p.name in ("pretrain.pt", "sft.pt")]
    return [str(p) for p in sorted(found, key=lambda p: (p.name != "sft.pt", str(p)))]


def open_model(path: str | None) -> Speaker:
    """载入一个模型；文件没变就用载入过的。

    Raises:
        UserError: 没有选、找不到、已损坏。
    """
    if not path:
        raise UserError("还没有模型；请先运行 python pre_train.py，再刷新这一页")
    with LOCK:
        try:
            changed = Path(path).stat().st_mtime
        except OSError as error:
            raise UserError(f"读不了 {path}（{error.strerror}）；请刷新这一页") from None
        return _load(path, changed)


@lru_cache(maxsize=4)
def _load(path: str, changed: float) -> Speaker:
    """changed 是文件的时间：重新训练过就重新载入。"""
    return load_speaker(path)


def choices(speaker: Speaker, ids: list[int], sampling: Sampling) -> Iterator[Choice]:
    """同 `Speaker.choices`，但有自己的缓存，每一步都排队。"""
    weight = speaker.model.embedding.weight
    own = replace(speaker, cache=KVCache(speaker.config, weight.device, weight.dtype))
    steps = own.choices(ids, sampling)
    while True:
        with LOCK:
            choice = next(steps, None)
        if choice is None:
            return
        yield choice


def read(speaker: Speaker, ids: list[int]) -> torch.Tensor:
    """每个位置之后的概率 (T, V)，排队。

    Raises:
        UserError: 比模型的上下文长：检查点中途换成了更小的模型。
    """
    if len(ids) > speaker.config.max_len:
        raise UserError(f"有 {len(ids)} 个词元，模型最多看 {speaker.config.max_len} 个；请重新开始")
    with LOCK:
        return speaker.read(ids)


# ---------- 2. 聊天 ----------


def reply(
    speaker: Speaker, turns: list[list[int]], text: str, sampling: Sampling
) -> Iterator[tuple[list[list[int]], list[int], list[int], str]]:
    """回答一句，写一个词元给一次。

    Args:
        turns: 微调过的模型记得的前几轮；预训练的模型不记，每次都从 text 接着写。
    Yields:
        (各轮, 开头的编号, 写出的编号, 为什么停下)。
    Raises:
        UserError: 没有写字，或者太长。
    """
    if not text.strip():
        raise UserError("请先写点什么")
    if speaker.stage == "sft":
        asked, ids = ask(speaker, turns, text)
        forgotten = (len(turns) + 1 - len(asked)) // 2
    else:
        asked, ids, forgotten = [], checked(speaker, speaker.prompt(text)), 0
    new: list[int] = []
    notice = f"（前文太长，忘掉了最早的 {forgotten} 轮）" if forgotten else ""

    def state(why: str = "") -> tuple:
        """中途停下也记得写了一半的；一个字也没答的提问不留着。"""
        answered = [*asked, speaker.tokenizer.turn_ids("assistant", new)] if new else asked[:-1]
        return answered if speaker.stage == "sft" else [], ids, new, notice + why

    for choice in choices(speaker, ids, sampling):
        if choice.token == speaker.tokenizer.eos_id:
            yield state("" if new else "它一个字也没写：认为到这里就完了")
            return
        new.append(choice.token)
        yield state()
        if is_looping(new, speaker.tokenizer):
            yield state("开始重复，停在这里")
            return
    full = len(ids) + len(new) >= speaker.config.max_len
    yield state("写满了上下文" if full else f"写满了 {len(new)} 个词元，采样里的 max 可以调")


def checked(speaker: Speaker, ids: list[int]) -> list[int]:
    """开头太长就说清楚；至少空出四分之一的上下文给它写。"""
    limit = speaker.config.max_len * 3 // 4
    if len(ids) > limit:
        raise UserError(f"这段文字有 {len(ids)} 个词元，最多 {limit} 个；请短一些")
    return ids


def microscope(speaker: Speaker, ids: list[int]) -> str:
    """显微镜的网页，装在一个框里；从最后一个词元看起。"""
    if not ids:
        return ""
    dropped = max(0, len(ids) - min(MOST, speaker.config.max_len))
    if dropped:  # 从一轮发言的开头看起，不从半句话看起
        starts = [i for i, t in enumerate(ids) if t == speaker.tokenizer.bos_id and i >= dropped]
        dropped = starts[0] if starts and starts[0] < len(ids) - 2 else dropped
    ids = ids[dropped:]
    with LOCK:
        facts = examine(speaker, ids, dropped)
    inside = html.escape(page(facts, len(ids) - 1), quote=True)
    return (
        '<iframe title="显微镜：这段话的每一步" sandbox="allow-scripts" '
        f'style="width:100%;height:46rem;border:0" srcdoc="{inside}"></iframe>'
    )


# ---------- 3. 一步一步 ----------


def lottery(
    speaker: Speaker, ids: list[int], start: int, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """接下来：模型给的概率 (V,)，与真正拿来抽签的概率 (V,)。

    Args:
        ids: 到现在为止的编号。
        start: 开头有多长，其后是写出来的：重复惩罚只管它们。
    """
    with LOCK, torch.inference_mode():
        row = torch.tensor([ids], device=speaker.banned.device)
        logits = speaker.head(speaker.model.hidden(row)[0, -1])
        check_finite(logits)
        drawn_from = probabilities(logits, row[0, start:], sampling, speaker.banned)
        return logits.float().softmax(-1), drawn_from


def candidates(speaker: Speaker, ids: list[int], start: int, sampling: Sampling, k: int) -> list:
    """接下来最可能的 k 个：[(编号, 名字, 模型给的概率, 抽签时的概率)]，参数同 `lottery`。"""
    probs, drawn_from = lottery(speaker, ids, start, sampling)
    best, tokens = probs.topk(k)
    return [
        (token, speaker.tokenizer.label(token), p, drawn_from[token].item())
        for token, p in zip(tokens.tolist(), best.tolist(), strict=True)
    ]


def draw(speaker: Speaker, ids: list[int], start: int, sampling: Sampling) -> int:
    """让它自己抽一个，参数同 `lottery`；固定了种子，每一步仍是不同的随机数。"""
    _, drawn_from = lottery(speaker, ids, start, sampling)
    generator = torch.Generator(drawn_from.device)
    generator.manual_seed(sampling.seed + len(ids)) if sampling.seed else generator.seed()
    return torch.multinomial(drawn_from, 1, generator=generator).item()


# ---------- 4. 写成网页 ----------


def tokens_html(speaker: Speaker, ids: list[int], start: int) -> str:
    """一串词元：写出来的按意外程度上色，下面是概率；start 之前的是开头，不上色。"""
    probs = read(speaker, ids) if len(ids) > start else None
    pieces = []
    for i, token in enumerate(ids):
        name = html.escape(speaker.tokenizer.label(token))
        if i < start:
            pieces.append(f'<span class="given">{name}</span>')
        else:
            p = probs[i - 1, token].item()
            strength = min(0.4, bits(p) / 20)
            pieces.append(
                f'<span class="written" style="background:rgba(213,94,0,{strength:.2f})">{name}'
                f"<small>{percent(p)}</small></span>"
            )
    return f'<p class="tokens">{"".join(pieces)}</p>'


def bars_html(rows: list[tuple[str, float]]) -> str:
    """[(名字, 概率)] 画成横条。"""
    cells = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td class="bar">'
        f'<div style="width:{100 * p:.2f}%"></div></td><td class="percent">{percent(p)}</td></tr>'
        for name, p in rows
    )
    return f'<table class="bars"><caption>下一个词元的概率</caption>{cells}</table>'


def answer_html(speaker: Speaker, text: str, sampling: Sampling) -> Iterator[str]:
    """一个模型对 text 的反应：下一个词元的概率，接着是它写的，一个词元更新一次。"""
    ids = checked(speaker, speaker.prompt(text))
    best, tokens = read(speaker, ids)[-1].topk(8)
    label = speaker.tokenizer.label
    bars = bars_html([(label(t), p) for t, p in zip(tokens.tolist(), best.tolist(), strict=True)])
    for *_, new, notice in reply(speaker, [], text, sampling):
        said = html.escape(speaker.tokenizer.decode(new))
        yield f'{bars}<p class="answer">{said}</p><p class="quiet">{html.escape(notice)}</p>'
    probs = read(speaker, [*ids, *new])
    mean = [bits(probs[len(ids) - 1 + i, t].item()) for i, t in enumerate(new)]
    if mean:
        yield (
            f"{bars}{tokens_html(speaker, [*ids, *new], len(ids))}"
            f'<p class="quiet">平均每个词元意外 {sum(mean) / len(mean):.1f} 比特。'
            f"{html.escape(notice)}</p>"
        )


# ---------- 5. 训练的记录 ----------


def runs(root: Path) -> list[str]:
    """有记录的训练。"""
    return sorted(str(p.parent) for p in root.rglob("metrics.jsonl"))


def curves(run: str | None) -> tuple[list[dict], list[list], str]:
    """一次训练的损失曲线与沿途的样本，以及记录有什么不对（没有，是空的）。

    Returns:
        ([{词元, 损失, 哪一种}], [[步, 检验损失, 样本]], 一句话)。
    """
    try:
        records = read_records(Path(run) / "metrics.jsonl") if run else NOTHING
    except OSError as error:
        return [], [], f"读不了 {run} 的记录（{error.strerror}）；请检查权限"
    points = [
        {"词元": row["tokens"], "损失": float(row[key]), "哪一种": name}
        for key, name in (("train_loss", "训练"), ("val_loss", "检验"))
        for row in records.rows
        if row.get(key) is not None
    ]
    samples = [
        [row["step"], f"{row['val_loss']:.3f}", row["sample"]]
        for row in records.rows
        if row.get("sample") is not None and row.get("val_loss") is not None
    ]
    problem = records.complaint()
    return points, samples, problem and f"{run} 的记录{problem}"
