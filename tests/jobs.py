"""test_bench.py 里交给另一个进程做的活；单独一个文件，那个进程便不必导入别的。"""


def job(n: int, fail: bool = False):
    """一份活：返回 n 个数；fail：备不好。"""
    if fail:
        raise ValueError("坏了")
    return lambda: list(range(n))
