"""python -m tools.export 检查点.pt 文件夹：把模型带出去；做事的是 huggingface/export.py。"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

from tools.huggingface.export import Options, main

__all__ = ["Options", "main"]

if __name__ == "__main__":
    run_script(main)
