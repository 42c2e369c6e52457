"""哪些文档留出来检验：由文档自己的散列决定，与次序、机器、Python 版本无关。

is_held_out     一个键的散列落在留出的那一段里没有
choose          整份语料怎样分：两边都有，比例接近想要的，键相同的总在同一边
"""

import hashlib
import math

import numpy as np

TOLERANCE = 0.2  # 留出的篇数与想要的，至多差几成（够两百篇时）


def hash_of(key: str) -> int:
    """一个键的散列，64 位。"""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"mini-llm").digest()
    return int.from_bytes(digest, "big")


def is_held_out(key: str | None, fraction: float) -> bool:
    """这个键归检验还是训练；None 总归训练。"""
    return key is not None and hash_of(key) < fraction * 2**64


def choose(
    keys: np.ndarray, finer: np.ndarray, whole: np.ndarray, fraction: float
) -> np.ndarray | None:
    """哪些留出来检验。

    语料大时，与逐个问 `is_held_out` 的结果相同；碰巧留出得太多或太少时，才按散列的大小增减几个。
    键相同的多到留不下时，先改看更细的键；还是太多的，整个归训练。只有一种键的，才改看全文。

    Args:
        keys, finer, whole: 每篇的两个键与全文的散列，uint64 (n,)。
        fraction: 想留出的比例。
    Returns:
        布尔 (n,)；篇篇相同，分不成两边的，是 None。
    """
    n = len(keys)
    wanted = fraction * n
    low, high = math.ceil((1 - TOLERANCE) * wanted), math.floor((1 + TOLERANCE) * wanted)
    if low > high or high < 1:
        low = high = max(1, round(wanted))
    _, index, counts = np.unique(keys, return_inverse=True, return_counts=True)
    keys = np.where(counts[index] > high, finer, keys)
    if (keys == keys[0]).all():
        keys = whole
    groups, index, counts = np.unique(keys, return_inverse=True, return_counts=True)
    if len(groups) < 2:
        return None
    natural = int(np.searchsorted(groups, np.uint64(int(fraction * 2**64))))
    chosen, total = np.zeros(len(groups), bool), 0
    for group, count in enumerate(counts.tolist()):  # 散列从小到大
        if group >= natural and total >= low:
            break
        if total + count <= high:
            chosen[group], total = True, total + count
    if total == 0:  # 每一种都有许多篇
        chosen[counts.argmin()] = True
    return chosen[index]
