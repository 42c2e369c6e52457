"""实验：每个实验一份，改装一样零件，练一练，画一张图，说三句话（结果见 docs/experiments.md）。

try_residual     残差与层前的归一           try_without    没有位置、没有因果、没有注意力
try_shapes       矮胖与瘦高                 try_experts    专家混合
try_sampling     温度、top-k、top-p         try_sft        微调前后
check_answers    微调之后，回答的样子对不对
answers          用留出的对话量回答；talks 读对话
prose            没有学过的文字，每个字多少比特
gallery          同样的二十句话，各答一次
night            一个晚上：预训练、微调、量、写画廊

laboratory       实验台：命令行、语料、训练，几个实验共用
showing          给人看：图、几个种子的起伏、三句话
"""
