"""线程怎样等：旁边还有别的程序时，别占着核空转。

几个线程分着做一次运算，先做完的等最慢的。GNU 的 OpenMP（Linux 上 pip 的 torch 带的那一份）等的时候
原地空转几毫秒，省下睡着与叫醒；可是核若不够分，空转的正占着最慢的那个要用的核，谁也走不下去：
两个训练一起，各慢五十倍。改为空转几微秒就睡，独自时差不多快，一起时各得一半（docs/lab-notes.md）。
英特尔与 LLVM 的 OpenMP 空转时自己会让，不用管，也不读这个变量。
"""

import os
import sys

VARIABLE, BRIEFLY, USUAL = "GOMP_SPINCOUNT", "1500", "300000"  # USUAL：不设时 libgomp 自己用的


def wait_briefly() -> bool:
    """让线程空转一会儿就睡；libgomp 只在载入时读一次，所以要在导入 torch 之前。

    Returns:
        改了没有：用户自己定了怎样等，或者 torch 已经导入，就不动。
    """
    if {VARIABLE, "OMP_WAIT_POLICY"} & os.environ.keys() or "torch" in sys.modules:
        return False
    os.environ[VARIABLE] = BRIEFLY
    return True


changed = wait_briefly()
