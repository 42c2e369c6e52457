"""借到显卡的八分钟：`python -m tools.bench gpu`，把显卡上没有定论的一次测清。

    python -m tools.bench gpu                       全部，最有用的在前，八分钟（要 NVIDIA 显卡）
    python -m tools.bench gpu list                  有哪些部分，各约多少秒
    python -m tools.bench gpu attention profile     只测其中几部分
    python -m tools.bench gpu --seconds_total 900   时间多些
    python -m tools.bench gpu --rehearse            演习：在 CPU 上用极小的形状走一遍

每一部分住在自己的进程里，在里面一个一个地编译、测量；得到一行，写一次盘。一部分死了、卡住了、显存
不够，写成一行，不妨碍后面的；放不下的说「没有轮到」，并给出补测的命令。按 Ctrl-C，做完的都在。

running     命令行，有哪些部分，一部分一部分地走
stage       各部分共用的：形状、计时、出了错怎么办
attention   每种注意力走的是哪个算子，多快，占多少显存
profile     一步里显卡闲了多久：前向、反向、截短、更新各发多少内核；trace 读剖析的记录
former      从前的一步：每个小批等一次，Muon 逐个矩阵发小算子
training    从前与现在，编译过的 Qwen3，deep 的两种分法，照推断该快些的几种改法
sft         微调走各条注意力的路，比预训练慢多少
half        fp16 练得动吗；杀掉再接着练；batch_size auto 试出来的放得下吗
decode      生成，比 transformers 的 generate
puzzle      专家混合编译过的检验为什么高 0.06
"""
