"""训练要多少运算：测速与实验都按这一份算，与 PyTorch 自己数的相同（有测试核对）。"""

from config import Config


def training_flops(config: Config, n_rows: int) -> float:
    """训练一个词元的浮点运算：前向每个参数两次（一乘一加），反向再两倍。

    Args:
        config: 形状；专家只算每个词元挑中的几位。
        n_rows: 真正算打分的词元数；没出现过的合用一行（engine.shared_row.SharedRow）。
    """
    head_dim = config.dim // config.n_heads
    projections = 2 * config.dim * (config.n_heads + config.n_kv_heads) * head_dim
    feed_forward = 3 * config.dim * config.active_width() + config.dim * (config.n_experts or 0)
    matrices = config.n_layers * (projections + feed_forward) + config.dim * n_rows
    # 每个词元与一行里的 T 个求相关、再加权求和，看不见的一半也算：分段的遮罩是算完之后才遮的。
    # 不分段时，有的内核会跳过那一半，但 PyTorch 自己也照全部来数。
    attention = 2 * config.n_layers * config.seq_len * config.n_heads * head_dim
    return 6 * (matrices + attention)
