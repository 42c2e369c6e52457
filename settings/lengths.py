"""微调的一行多长：长的对话多，就长些；一段也放不进，说清多长、怎么办。"""

import numpy as np

from config import Config
from settings.resolve import Origin, Origins

MOST_CUT = 0.05  # 长过一行、末尾要截掉的对话，至多占这么多


def make_room(config: Config, origins: Origins, lengths: np.ndarray) -> str:
    """行长若是预设的，长到放得下九成五的对话，或者模型最多看的；行数减少，每步的词元数不变。

    Args:
        config: 会被就地改写。
        lengths: 每段对话占几格。
    Returns:
        改了什么；没有改是空的。
    """
    before, longer = config.seq_len, config.seq_len
    if origins["seq_len"] is not Origin.PRESET:
        return ""
    while longer < config.max_len and (lengths > longer).mean() > MOST_CUT:
        longer = min(2 * longer, config.max_len)
    if longer == before:
        return ""
    config.seq_len, origins["seq_len"] = longer, Origin.AUTO
    text = f"{(lengths > before).mean():.0%} 的对话长过 {before} 个词元：一行改为 {longer} 个"
    if origins["batch_size"] in (Origin.PRESET, Origin.TRIED):
        config.batch_size = max(1, config.batch_size * before // longer)
        text += f"，一次 {config.batch_size} 行"
    return text


def nothing_fits(questions: np.ndarray, seq_len: int, max_len: int | None, side: str) -> str:
    """一段对话也用不上：多长，最多能多长，怎么办。

    Args:
        questions: 每段对话到助手开口为止有多少个词元；没有助手的话的不在其中。
        max_len: 模型最多看多少个词元；None 表示 seq_len 改不了。
    """
    who = {"train": "训练的", "val": "留出的"}[side]
    if not len(questions):
        return f"{who}对话里没有一句助手的话，seq_len 再大也没有什么可学；请检查数据"
    longest = int(questions.max())
    found = f"{who} {len(questions)} 段对话，没有一段在 {seq_len} 个词元（seq_len）之内轮到助手说话"
    found += f"：到那里最短的要 {questions.min()} 个词元，最长的 {longest} 个"
    if max_len and (fit := int((questions <= max_len).sum())):
        return f"{found}；请加上 --seq_len {max_len}（模型最多看这么多），用得上 {fit} 段"
    shorten = "请缩短提问" + "，或调大 --val_fraction 多留出几段" * (side == "val")
    if not max_len:
        return f"{found}；{shorten}"
    n = 1 << longest.bit_length()
    return (
        f"{found}，而模型最多看 {max_len} 个，调大 seq_len 也没有用；{shorten}，或换一个看得更远的"
        f"模型：预训练时加上 --max_len {n} --seq_len {n}，微调时加上 --seq_len {n}"
    )
