"""全部配置：能改什么，各是什么意思，几套预设。

    UserError    用户能改正的错误；MissingData 是其中的一种：找不到数据
    option       一个配置项：默认值、说明、单位
    Config       全部配置；最常改的几项在最前面
    PRESETS      几套预设

一个值从哪里来，按先后：命令行 > 在本文件里改过的 > 预设 > 自动判断（怎样判断，见 settings/）。
每个字段都是一个命令行参数：``python pre_train.py --preset deep --lr 3e-4 --no-compile``。
"""

from dataclasses import dataclass, field
from typing import Any


class UserError(ValueError):
    """用户能改正的错误：说明发生了什么、是哪个值、现在该做什么。脚本把它印成一句话。"""


class MissingData(UserError):
    """找不到数据文件。路径若取自检查点，训练的外壳会再说清它从哪里来。"""


def option(
    default: Any, help: str, unit: str = "", choices: tuple[str, ...] = (), auto: bool = False
) -> Any:
    """一个配置项：默认值、中文说明、单位、可选值；数字也可以写成 "auto" 的，auto 为真。"""
    metadata = {"help": help, "unit": unit, "choices": choices, "auto": auto}
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """训练与模型的全部配置。

    值为 None 的字段由预设决定，预设里没有的照 settings/defaults.py 算；改成别的值，就以你的为准。
    """

    # ===================== 改这里：最常改的几项 =====================
    preset: str = option(
        "auto",
        "预设；auto：有 NVIDIA 显卡用 wide，否则用 tiny",
        choices=("auto", "tiny", "small", "wide", "deep", "tiny-moe", "moe"),
    )
    data: str = option(
        "auto",
        "预训练语料：builtin（内置成语词典）或文件路径；auto：有下载好的维基就用它，否则 builtin",
    )
    sft_data: str = option("auto", "微调对话：builtin 或文件路径；auto：有下载好的就用它")
    lr: float | None = option(None, "预训练的最高学习率（Muon 管的矩阵）")
    sft_lr: float | None = option(None, "微调的最高学习率")
    max_steps: int | None = option(None, "预训练的步数；与 epochs、hours、until 只写一个", "步")
    epochs: float | None = option(None, "预训练把语料读几遍", "遍")
    sft_max_steps: int | None = option(None, "微调的步数；同样只写一个", "步")
    sft_epochs: float | None = option(None, "微调把对话读几遍", "遍")
    hours: float | None = option(None, "练几小时就收尾，代替步数与遍数；中断的时候不算", "小时")
    until: str | None = option(
        None, "练到几点就收尾，代替步数与遍数，例如 23:00，或 '2026-11-30 07:30'"
    )
    # ================================================================

    # 模型的形状
    dim: int | None = option(None, "宽度：每个词元的向量有多长", "维")
    n_layers: int | None = option(None, "层数", "层")
    n_heads: int | None = option(None, "查询头数，须整除 dim", "头")
    n_kv_heads: int | None = option(None, "键值头数，须整除 n_heads", "头")
    hidden_dim: int | None = option(None, "前馈层的中间宽度；有专家时，是每位专家的", "维")
    n_experts: int | None = option(None, "每层有几位专家；0：不分专家", "位")
    n_active: int | None = option(None, "每个词元交给其中几位", "位")
    max_len: int | None = option(None, "模型最多能看多长的上下文", "词元")
    vocab_size: int = option(21248, "词表大小，补到 128 的倍数，GPU 算得快", "个")
    rope_theta: float = option(10000.0, "旋转位置编码的底数")
    norm_eps: float = option(1e-6, "归一化时防止除以零的小数")

    # 一步训练多少词元：batch_size × seq_len × grad_accum
    batch_size: int | None = option(
        None,
        "一次前向的行数；显存不够就减半，grad_accum 加倍；auto：在显卡上试出来，每步的行数不变",
        "行",
        auto=True,
    )
    seq_len: int | None = option(None, "每行的长度，不超过 max_len", "词元")
    grad_accum: int | None = option(None, "梯度累积：几次前向合成一步", "次")
    isolate_documents: bool | None = option(None, "同一行里的几篇文档互相看不见；文档短时更好")
    whole_documents: bool | None = option(
        None, "互相看不见时，一行只装整篇的文档，不把它们切开；行尾放不下的空着"
    )

    # 优化
    embed_lr_scale: float = option(1.0, "词嵌入与增益（AdamW 管的）的学习率是 lr 的几倍", "倍")
    residual_lr_scale: float | None = option(
        None, "各层写进残差流的最后一个投影，学习率是 lr 的几倍：小些，写的盖不过词嵌入", "倍"
    )
    muon_momentum: float | None = option(None, "Muon 的动量：步数少的训练，小些更好")
    muon_heads: bool = option(True, "Muon 把注意力的每个头当作一个矩阵，各自正交化")
    muon_beta2: float = option(
        0.95, "Muon 把每个神经元的步子调匀，求步子大小的平均时，旧的占多少；0：不调匀"
    )
    adam_beta1: float = option(0.8, "AdamW 的动量")
    adam_beta2: float = option(0.99, "AdamW 求梯度平方的平均时，旧的占多少")
    weight_decay: float = option(0.1, "权重衰减，只作用于 Muon 管的矩阵")
    warmup: float = option(0.03, "学习率从 0 升到最高，占全程的比例")
    decay: float = option(0.9, "学习率最后降到 0，占全程的比例")
    grad_clip: float = option(1.0, "梯度范数的上限")
    balance_coef: float = option(0.01, "负载均衡损失的系数：越大，各位专家越忙得一样")
    router_scale: float | None = option(
        None, "路由器的初值与学习率，是别的矩阵的几倍；没有专家时用不到", "倍"
    )
    seed: int = option(42, "随机种子：初始化、打乱与采样")

    # 设备
    device: str = option("auto", "设备", choices=("auto", "cuda", "mps", "cpu"))
    parallel: str = option(
        "ddp",
        "多个进程时：ddp 每个进程一份完整的；fsdp 把参数、梯度与优化器的状态分开放，省显存",
        choices=("ddp", "fsdp"),
    )
    dtype: str = option(
        "auto",
        "矩阵乘法的精度；auto：硬件支持就用 bfloat16",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    compile: bool = option(True, "用 torch.compile 加速（需要 C++ 编译器；没有会自动跳过）")

    # 数据与记录
    keep_reasoning: bool = option(
        False, "微调时把思考过程（reasoning_content）也学进去，写在回答之前的 <think> 里"
    )
    val_fraction: float = option(0.03, "留出多大比例的文档不训练，只用来检验")
    eval_tokens: int = option(16384, "每次检验最多用多少词元；最后一次用十倍", "词元")
    eval_every: int | None = option(None, "每隔多少步检验并采样一次", "步")
    save_every: float | None = option(None, "每隔多少秒保存一次", "秒")
    prompt: str = option("守株待兔：", "预训练时用来采样的固定开头")
    sft_prompt: str = option("守株待兔是什么意思？", "微调时用来采样的固定问题")
    data_dir: str = option("data", "下载的数据与词元文件放在哪里")
    out_dir: str | None = option(None, "检查点与记录放在哪里")
    init_from: str | None = option(
        None, "从哪个检查点开始；预训练写了它，就是增量预训练：在新的语料上接着学"
    )
    replay: float = option(
        0.0, "增量预训练与微调时，每一遍里旧语料（预训练读过的）的行占几成，免得忘了学过的"
    )
    replay_data: str | None = option(
        None, "旧语料：builtin 或文件路径；读得到就总在它上面也检验，看忘了多少"
    )
    replay_stage: str | None = option(
        None,
        "微调时回放什么：pretrain 预训练的文字，sft 微调过的对话；默认看起点是哪个阶段的",
        choices=("pretrain", "sft"),
    )
    resume: bool = option(False, "接着 out_dir 里最新的检查点练；其余设置取自检查点，不必再写")
    allow_changes: bool = option(
        False, "接着练时允许改学习率、步数等；结果与不中断的那一次不再相同"
    )
    overwrite: bool = option(False, "从头练，盖掉 out_dir 里已有的训练")
    plan: bool = option(False, "先估一估：走十来步，说出要多久、占多少、练到多好；什么也不写下")

    def active_width(self) -> int:
        """每个词元经过的前馈宽度：有专家时，是挑中的几位合起来的。"""
        return self.hidden_dim * (self.n_active or 1)


BOTH_STAGES = ("data", "prompt", "lr", "max_steps", "epochs")  # 微调的那一份前面加 sft_
# 练多久的几种写法，每个阶段只能写一种
HOW_LONG = tuple(
    (f"{stage}max_steps", f"{stage}epochs", "hours", "until") for stage in ("", "sft_")
)
N_TOKENS = 21146  # 分词器的词元数：bert-base-chinese 的 21128 个，加上 tokenizer.py 补的
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "n_experts", "n_active",
         "max_len", "vocab_size", "rope_theta", "norm_eps")  # fmt: skip

# 每套预设：形状，以及随形状而定的批次与学习率（扫描见 docs/lab-notes.md；small 的在真的文章上）。
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        dim=192, n_layers=4, n_heads=3, n_kv_heads=1, hidden_dim=576, n_experts=0, n_active=0,
        max_len=512,
        batch_size=8, seq_len=256, grad_accum=1, lr=0.02, muon_momentum=0.9,
        residual_lr_scale=0.25, isolate_documents=True, whole_documents=True,
        max_steps=1000, sft_max_steps=150,
    ),
    "small": dict(  # 没有显卡的一个晚上：预训练 --hours 1，微调 --hours 0.25
        dim=256, n_layers=4, n_heads=4, n_kv_heads=1, hidden_dim=768, n_experts=0, n_active=0,
        max_len=1024,
        batch_size=16, seq_len=256, grad_accum=1, lr=0.015, muon_momentum=0.9,
        residual_lr_scale=0.25, isolate_documents=True, whole_documents=True,
    ),
    "wide": dict(  # 矮胖
        dim=512, n_layers=8, n_heads=8, n_kv_heads=2, hidden_dim=1664, n_experts=0, n_active=0,
        max_len=1024,
        batch_size=32, seq_len=512, grad_accum=1, lr=0.01, muon_momentum=0.95,
        residual_lr_scale=1.0, isolate_documents=False, whole_documents=False,
    ),
    "deep": dict(  # 瘦高
        dim=512, n_layers=24, n_heads=8, n_kv_heads=2, hidden_dim=1664, n_experts=0, n_active=0,
        max_len=1024,
        batch_size=16, seq_len=512, grad_accum=2, lr=0.005, muon_momentum=0.95,
        residual_lr_scale=1.0, isolate_documents=False, whole_documents=False,
    ),
}  # fmt: skip
# 专家混合：挑中的几位合起来，与不分专家的那一套一样宽，每个词元用到的参数也就一样多。
PRESETS["tiny-moe"] = PRESETS["tiny"] | dict(
    hidden_dim=144, n_experts=16, n_active=4, router_scale=1.0
)
PRESETS["moe"] = PRESETS["wide"] | dict(hidden_dim=416, n_experts=16, n_active=4, router_scale=0.2)

PER_PRESET = {name for preset in PRESETS.values() for name in preset}
