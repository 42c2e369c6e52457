"""python -m tools.export 检查点.pt 文件夹：把模型带出去；做事的是 huggingface/export.py。"""

from settings.flags import run_script
from tools.huggingface.export import Options, main

__all__ = ["Options", "main"]

if __name__ == "__main__":
    run_script(main)
