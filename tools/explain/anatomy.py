"""从编号到打分的每一步：哪个零件，做什么，形状、参数、运算量。

anatomy   在没有内容的模型上走一遍前向，数出来

图例：T 词元数，E 专家数。
"""

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from config import Config
from microscope import hooks
from model import Transformer

STEPS = {  # 零件的名字: 做什么；块里的前面加 blocks.0.
    "embedding": "查表：编号变成向量",
    "attention_norm": "归一化",
    "attention.query": "查询：我在找什么",
    "attention.key": "键：我有什么",
    "attention.value": "值：被看时交出什么",
    "attention.query_norm": "查询归一，再按位置旋转",
    "attention.key_norm": "键归一，再按位置旋转",
    "attention": "查询与键的内积取 softmax：每行的权重，再按它把值加起来",
    "attention.out": "投影回来，加进残差流",
    "feed_forward_norm": "归一化",
    "feed_forward.router": "路由器：给各位专家打分，挑最高的几位",
    "feed_forward": "挑中的几位专家各算各的，按权重相加，加进残差流",
    "feed_forward.gate": "前馈的门",
    "feed_forward.up": "前馈的另一路，与门相乘",
    "feed_forward.down": "投影回来，加进残差流",
    "norm": "最后的归一化",
    "": "与每个词元的嵌入作内积，得到打分",
}


@dataclass
class Part:
    """一步：哪个零件、做什么、输出的形状、参数的个数、一次前向的浮点运算数（只数矩阵乘法）。"""

    name: str
    does: str
    shape: tuple[int, ...]
    params: int
    flops: int


def grouped(rows: tuple, matrices: tuple, *_, **__) -> int:
    """PyTorch 不会数 `F.grouped_mm` 的运算：(N, 入) 的每一行只乘 (E, 入, 出) 里的一个矩阵。"""
    return 2 * rows[0] * rows[1] * matrices[-1]


def anatomy(config: Config, n_tokens: int) -> list[Part]:
    """从编号到打分的每一步，一个块只列一次（各块相同）。

    在 "meta" 设备上走一遍前向：张量只有形状，没有内容，所以再大的模型也是一眨眼。

    Args:
        config: 模型的形状。
        n_tokens: 输入几个词元。
    """
    with torch.device("meta"):
        model = Transformer(replace(config, n_layers=1)).bfloat16()  # grouped_mm 在这里只认 bf16
        ids = torch.zeros(1, n_tokens, dtype=torch.long)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped})
    with torch.inference_mode(), hooks(model) as seen, counter:
        model(ids)
    counted = {n: sum(ops.values()) for n, ops in counter.get_flop_counts().items()}
    modules, parts = dict(model.named_modules()), []
    for step, does in STEPS.items():
        name = f"blocks.0.{step}" if f"blocks.0.{step}" in modules and step else step
        if name not in modules or (step == "feed_forward" and not config.n_experts):
            continue  # 稠密模型没有路由器；专家混合的三个矩阵叠在一起，不是单独的零件
        module = modules[name]
        full = f"Transformer.{name}" if name else "Transformer"
        inside = [f"{full}.{child}" for child, _ in module.named_children()]
        if not name:  # 块在 ModuleList 里，没有自己的一项
            inside += ["Transformer.blocks.0"]
        flops = counted.get(full, 0) - sum(counted.get(child, 0) for child in inside)
        params = sum(p.numel() for p in module.parameters(recurse=False))
        shape = tuple(seen[module][1].shape[1:])
        if step == "attention":  # 它的输出是 out 的；自己做的是 T × T 的权重表
            shape = (config.n_heads, n_tokens, n_tokens)
        parts.append(Part(name or "score", does, shape, params, flops))
    return parts
