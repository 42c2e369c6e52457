"""说「该不该学」的字段：label、weight、loss_mask、kto_tag、accepted、is_bad……各家的名字都不同。

verdicts    一个对象里，每个这样的字段说学还是不学
"""

import re
from typing import Any

# 名字里有这些词的：前一种是假的、0、负的就不该学，后一种是真的、1 就不该学。
LEARN = {"loss", "weight", "weights", "train", "training", "trained", "trainable", "learn",
         "supervised", "label", "labels", "tag", "mask", "accept", "accepted", "chosen", "correct",
         "preferred", "good", "valid", "quality", "status", "feedback", "rating", "reward",
         "采纳"}  # fmt: skip
AVOID = {"reject", "rejected", "masked", "ignore", "ignored", "bad", "wrong", "exclude", "skip",
         "discard", "deleted"}  # fmt: skip
NO = {"false", "no", "n", "f", "reject", "rejected", "bad", "negative", "dislike", "undesirable",
      "lose", "thumbs_down", "否", "差"}  # fmt: skip
YES = {"true", "yes", "y", "t", "good", "positive", "like", "desirable", "win", "是", "好"}
# 打的分：大小要与另一个比才有意思，单看不出学不学。
SCORES = {"score", "scores", "rating", "ratings", "logp", "logps", "length"}


def verdicts(row: dict[str, Any]) -> dict[str, bool]:
    """说学不学的字段：{名字: 学不学}。"""
    return {name: v for name, x in row.items() if (v := verdict(name, x)) is not None}


def verdict(name: str, value: Any) -> bool | None:
    """一个字段说的是学（真）还是不学（假）；说的是另外的事，是 None。"""
    words = set(re.findall("[a-z]+|采纳", re.sub("([A-Z])", r"_\1", name).lower()))
    if not words & (LEARN | AVOID) or not isinstance(value, bool | int | float | str):
        return None
    if name in ("chosen", "rejected") and not isinstance(value, bool):
        return None  # 是两个回答，不是两个标记
    said = yes_or_no(value)
    if said is None or (words & SCORES and not isinstance(value, str)):
        return None
    if not isinstance(value, bool) and ({"train", "loss"} <= words or words == {"tag"}):
        return None  # 训练时的损失；文章的标签
    if words == {"mask"}:
        return False  # 1 是遮住还是留下，各家说法不一：宁可不学
    return not said if words & AVOID else said


def yes_or_no(value: bool | int | float | str) -> bool | None:
    """一个值是真是假；不是说真假的文字，是 None。"""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in NO or text in YES:
            return text in YES
        try:
            value = float(text)
        except ValueError:
            return None
    return value > 0
