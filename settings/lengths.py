"""一段对话也放不进一行：说清多长，怎么办。"""

import numpy as np


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
