"""与别人并排：同样的文字，同样的几分钟，同一台机器，在没有学过的文字上各要多少比特每字。

    python -m tools.bench peers --data 语料 --held_out 留出的.jsonl --minutes 10
    python -m tools.bench peers … --minimind ../minimind --nanogpt ../nanoGPT     也比它们

一个接一个地练，各住一个进程，写好的结果不重做，所以可以分几次跑完。别人的代码不在这个仓库里：
要比 minimind 与 nanoGPT，先把它们检出到别处。谁用谁的分词器；比的是原文的每个字，怎样算见
tools/lab/prose.py。

    ours       python pre_train.py --hours …：编译、检验与保存都算在这几分钟里
    qwen3      transformers 的 Qwen3，同样的形状，我们的词元，AdamW，编译
    nanogpt    它的 GPT 与 AdamW，同样的层数与宽度，我们的词元，编译
    minimind   它的模型、分词器、补齐的一行一篇与学习率的曲线；shipped 照它的默认（一次 32 行，
               攒 8 次，fp32，不编译），helped 编译、有 bf16 就用、一次 8 行、不攒

别人的几分钟从头一步算起，编译在内，读文字、最后的检验不算。
"""
