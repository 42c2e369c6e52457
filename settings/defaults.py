"""取决于别的设置的默认值：怎样算，怎样说，都只写在这里；--help 也读这里。

AUTOMATIC        读完配置就能算的：{字段名: 由配置算出它}
sft_start        微调的起点；continued_lr：增量预训练的学习率，读了起点才能算
total_steps      有了数据才能算的：这次训练共多少步
fewer_steps      数据太少时，预设的步数减到多少
eval_interval    知道了步数才能算的：隔多少步检验一次
save_interval    知道了保存要多久才能算的：隔多少秒保存一次
SENTENCES        以上各项说给人看的：{字段名: 一句话}

预设直接给出的默认值在 config.py 的 PRESETS 里。
"""

import math
from collections.abc import Callable
from typing import Any

from config import PRESETS, Config

# ---------- 1. 读完配置就能算的 ----------

SFT_GENTLER = 5  # 微调是在学好的模型上轻轻推一把
CONTINUED_GENTLER = 2  # 增量预训练：再小，新的学得慢；再大，旧的忘得多。测量见 docs/lab-notes.md
NARROW = 256  # 预设不比这宽，路由器与别的矩阵一样
WIDE_ROUTER = 0.2  # 宽的，专家会饿死：测量见 docs/lab-notes.md


def sft_lr(config: Config) -> float | None:
    """微调的最高学习率；lr 本身不对的，不由它算。"""
    return config.lr / SFT_GENTLER if config.lr > 0 else None


def continued_lr(source: Config) -> float:
    """增量预训练的最高学习率：从头练的那一次（source）的几分之一。"""
    return source.lr / CONTINUED_GENTLER


def sft_start(config: Config) -> str:
    """微调从哪个检查点开始。预训练没有默认的起点：不写，就是从头练。"""
    return f"{config.out_dir}/pretrain.pt"


def router_scale(config: Config) -> float | None:
    """路由器的初值与学习率是别的矩阵的几倍；没有专家就没有路由器，是 None。"""
    if config.n_experts <= 0:
        return None
    return 1.0 if PRESETS[config.preset]["dim"] <= NARROW else WIDE_ROUTER


# 次序要紧：后面的可以用到前面的。
AUTOMATIC: dict[str, Callable[[Config], Any]] = {
    "sft_lr": sft_lr,
    "router_scale": router_scale,
    "out_dir": lambda config: f"out/{config.preset}",
}

# ---------- 2. 训练时才知道的 ----------

# 语料不大时读四遍，再多便只是背书（Scaling Data-Constrained LMs，arXiv 2305.16264）。
EPOCHS, EPOCHS_OF_MANY, MANY = 4, 1, 10**8  # 一亿个词元以上，读一遍就够
SFT_EPOCHS = 2
FEWEST_STEPS = 20  # 遍数也没有写的，至少走这么多步：数据再少，一两步也学不到什么
MOST_EPOCHS = 20  # 预设的步数是照内置语料定的；自己的数据少，再多便只是背书
N_EVALUATIONS, LONGEST_WAIT = 10, 500  # 全程检验几次，至多隔多少步
SAVE_EVERY, SAVING_SHARE = 60, 0.02  # 秒；保存占用的时间不超过这么多


def total_steps(config: Config, stage: str, n_rows: int, n_train_tokens: int) -> int:
    """这次训练共多少步：指定了步数就用它，否则由遍数算出。

    Args:
        config: 用到这个阶段的步数与遍数，以及 batch_size、grad_accum。
        stage: "pretrain" 或 "sft"。
        n_rows: 训练数据一遍有多少行。
        n_train_tokens: 训练数据有多少词元；预训练没有写遍数时，由它决定读几遍。
    """
    if stage == "sft":
        steps, epochs = config.sft_max_steps, config.sft_epochs or SFT_EPOCHS
    else:
        few = n_train_tokens < MANY
        steps, epochs = config.max_steps, config.epochs or (EPOCHS if few else EPOCHS_OF_MANY)
    fewest = 1 if (config.sft_epochs if stage == "sft" else config.epochs) else FEWEST_STEPS
    rows_per_step = config.batch_size * config.grad_accum
    return steps or max(fewest, math.ceil(epochs * n_rows / rows_per_step))


def fewer_steps(config: Config, n_steps: int, n_rows: int) -> int:
    """预设的 n_steps 步，在一遍只有 n_rows 行的数据上该走几步：至多读 MOST_EPOCHS 遍。

    一步比一遍还长的，一步算一遍：数据再少，也走得了 MOST_EPOCHS 步。
    """
    steps_per_epoch = max(1.0, n_rows / (config.batch_size * config.grad_accum))
    return min(n_steps, math.ceil(MOST_EPOCHS * steps_per_epoch))


def eval_interval(config: Config, n_steps: int) -> int:
    """隔多少步检验一次；全程共 n_steps 步。"""
    return config.eval_every or min(LONGEST_WAIT, math.ceil(n_steps / N_EVALUATIONS))


def save_interval(every: float | None, cost: float) -> float:
    """隔多少秒保存一次。

    Args:
        every: 设置里的 save_every；None：一分钟，写得慢的磁盘少存些。
        cost: 上一次保存用去的秒数。
    """
    return max(SAVE_EVERY, cost / SAVING_SHARE) if every is None else every


# ---------- 3. 说给人看的 ----------

SENTENCES = {
    "lr": f"增量预训练默认是起点的 1/{CONTINUED_GENTLER}",
    "sft_lr": f"默认是 lr 的 1/{SFT_GENTLER}",
    "max_steps": f"预设的步数若要把语料读 {MOST_EPOCHS} 遍以上，就改为 {MOST_EPOCHS} 遍",
    "sft_max_steps": f"预设的步数至多把对话读 {MOST_EPOCHS} 遍",
    "epochs": f"默认 {EPOCHS} 遍，{MANY // 10**8} 亿词元以上 {EPOCHS_OF_MANY} 遍，"
    f"至少 {FEWEST_STEPS} 步",
    "sft_epochs": f"默认 {SFT_EPOCHS} 遍，至少 {FEWEST_STEPS} 步",
    "router_scale": f"别的预设分了专家，预设的 dim 不超过 {NARROW} 是 1，再宽是 {WIDE_ROUTER}",
    "eval_every": f"默认全程 {N_EVALUATIONS} 次，至多隔 {LONGEST_WAIT} 步",
    "save_every": f"默认 {SAVE_EVERY}，磁盘慢就自动少存，保存占用的时间不超过 {SAVING_SHARE:.0%}",
    "out_dir": "默认 out/预设名",
    "init_from": "微调默认 out_dir/pretrain.pt，预训练默认从头练",
    "replay_data": "默认是起点的检查点里记着的那一份",
}
