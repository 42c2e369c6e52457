"""与 Hugging Face 的生态往来：带出去，带回来（用法见 docs/ecosystem.md）。

export      检查点 -> 一个 Hugging Face 的文件夹；命令是 python -m tools.export
card        文件夹里的模型卡
import_hf   反过来；命令是 python -m tools.import_hf
foreign     读别人写的文件；claims 读 config.json，weights 读权重，都先核对再分配内存
shapes      与 transformers 的 Qwen3 对照：同样的结构，两套名字
"""
