"""python -m tools.import_hf 文件夹 检查点.pt：把模型带回来；做事的是 huggingface/import_hf.py。"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

from tools.huggingface.import_hf import Options, main

__all__ = ["Options", "main"]

if __name__ == "__main__":
    run_script(main)
