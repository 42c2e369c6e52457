"""python -m tools.import_hf 文件夹 检查点.pt：把模型带回来；做事的是 huggingface/import_hf.py。"""

from settings.flags import run_script
from tools.huggingface.import_hf import Options, main

__all__ = ["Options", "main"]

if __name__ == "__main__":
    run_script(main)
