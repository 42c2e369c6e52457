"""把数写给人看：每一种写法的名字说出它给谁看、留几位。

file_size     文件多大：1.6 GB
measured      量出来的数：三到四位有效数字
magnitude     只看数量级的数：两位有效数字
"""

import math


def file_size(n_bytes: float) -> str:
    """字节数 -> 「1.6 GB」。"""
    for unit in ("B", "KB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def measured(value: float) -> str:
    """三到四位有效数字，大数加千分位。"""
    if value == 0 or not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def magnitude(value: float) -> str:
    """两位有效数字；大的数分节，太大的写成 10 的幂。"""
    if value >= 1e6:
        return f"10^{math.log10(value):.0f}"
    return f"{float(f'{value:.2g}'):,g}" if value >= 10 else f"{value:.1f}"
