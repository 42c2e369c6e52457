"""带到 llama.cpp 与 ollama 去：一个 GGUF 文件（用法见 docs/export.md）。

export      检查点 -> 一个 .gguf；命令是 python -m tools.export 检查点.pt --gguf 文件
words       词表换成 llama.cpp 认得的写法，编号一个不动
template    对话模板，llama.cpp 与 llama-cpp-python 得到同样的编号
"""
