"""与 Hugging Face 的生态往来：带出去，带回来（用法见 docs/ecosystem.md）。

export      检查点 -> 一个 Hugging Face 的文件夹；命令是 python -m tools.export
card        文件夹里的模型卡
import_hf   反过来；命令是 python -m tools.import_hf
shapes      与 transformers 的 Qwen3 对照：同样的结构，两套名字
"""
