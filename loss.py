"""模型错得有多远：一批的损失，以及在留出的文档上的检验。

    cross_entropy        打分与答案 -> 负对数概率之和
    Loss                 一批数据 -> 损失之和，训练与检验都用它
    bits_per_character   损失换算成每个字的比特数：分词器不同的模型也能比
    Exam                 检验：留出的文档上错多少，写一段给人看

图例：B 批次，T 词元数，C 宽度，V 词表大小，R 训练时真正算打分的列数。
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import IGNORE, Batch, row_order
from experts import Routing
from generate import Sampling, Speaker
from model import Transformer

# ---------- 1. 一批的损失 ----------


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """打分 (B, T, V) 给答案 (B, T) 的负对数概率之和，单位奈特；答案是 IGNORE 的不算。"""
    return F.cross_entropy(
        logits.view(-1, logits.size(-1)).float(),  # (B·T, V)
        targets.reshape(-1),
        ignore_index=IGNORE,
        reduction="sum",
    )


class Loss(nn.Module):
    """这一批所有目标的负对数概率之和，单位奈特；平均由循环除以目标的总数得到。

    专家混合的负载均衡损失不在这个数里，只在它的梯度里：这样，记下来的总是语言的损失。

    Fields:
        model: 要学的模型。
        shared_row: 没出现过的词元合用一行的办法（engine/shared_row.py），None 是不合用；
            只在训练时用，结果与整张词表的相同，检验（eval）时总是整张词表。
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model
        self.shared_row = None

    def forward(self, batch: Batch) -> Tensor:
        """一批 (B, T) -> 损失之和，标量 fp32。"""
        routing = Routing(batch.targets != IGNORE)
        x = self.model.hidden(batch.ids, batch.positions, batch.segments, routing=routing)
        if self.training and self.shared_row is not None:
            logits = self.shared_row.score(x, self.model.embedding.weight)  # (B, T, R)
            targets = self.shared_row.columns(batch.targets)
        else:
            logits, targets = self.model.score(x), batch.targets  # (B, T, V)
        loss = self.judge(batch, logits, targets)
        if routing.penalty is None:
            return loss
        return loss + (routing.penalty - routing.penalty.detach())  # 加的是 0，梯度却在

    def judge(self, batch: Batch, logits: Tensor, targets: Tensor) -> Tensor:
        """给打分评判；合用一行时，打分是 (B, T, R)，答案是其中的第几列。"""
        return cross_entropy(logits, targets)


# ---------- 2. 检验 ----------


@torch.no_grad()
def evaluate(
    loss: Callable[[Batch], Tensor], batches, batch_size: int, max_tokens: int, device
) -> float:
    """留出数据上每个目标的平均损失（奈特）；几个进程分着做，合起来算。

    只够检验一部分时，用的是打乱之后的开头若干行：每次都是同样的行，而且不偏向文件的前一段。

    Args:
        loss: 一批 -> 损失之和。
        batches: `pretrain_batches` 给出的，或 `SFTBatches`。
        max_tokens: 至多用多少词元。
        device: 用到 place、autocast 与 world，见 engine/device.py。
    """
    n_rows = min(batches.n_rows, -(-max_tokens // batches.seq_len))
    rows = row_order(batches.n_rows, seed=0, epoch=0)[:n_rows].tolist()
    losses, count = [], 0
    for first in range(0, n_rows, batch_size * device.world.size):
        mine = first + batch_size * device.world.rank
        wanted = rows[mine : min(mine + batch_size, n_rows)]
        # 最后一批用重复的行凑满：形状不变，编译过的代码才能沿用；凑数的行不算。
        batch = batches.get(wanted + rows[:1] * (batch_size - len(wanted)))
        batch.targets[len(wanted) :] = IGNORE
        count += int((batch.targets != IGNORE).sum())
        with device.autocast():
            losses.append(loss(batch.to(device.place)))
    # 到最后才一起取回来：一批算完，下一批已经在等，设备不必等处理器。
    total, count = device.world.sum(sum(torch.stack(losses).tolist()), count)
    return total / count


# 词表写不出的字，除了 [UNK] 自己的损失，每个另记这么多：从 Unicode 的全部编号里指出它来。
BITS_OF_A_LOST_CHARACTER = math.log2(0x110000)  # 约 20.1


def bits_per_character(loss: float, card: dict) -> float:
    """每个词元的损失（奈特）-> 原文每个字的比特数。

    它是一种真的写得回原文的编码的长度，所以丢字不会让它变好：一个 [UNK] 可以顶替许多字，
    除了它自己的损失，顶替的每个字还要从 Unicode 里指出来。除以全部的字，写不出的也在内。

    Args:
        card: 词元文件的卡片：检验的那一边要猜多少词元，它们写出多少字，其中多少写不出。
    """
    model = loss / math.log(2) * card["val_targets"]
    spelled = card["val_lost"] * BITS_OF_A_LOST_CHARACTER
    return (model + spelled) / card["val_characters"]


class Exam:
    """检验：在没有训练过的文档上错多少，再写一段给人看。

    Args:
        loss: 训练用的 `Loss`（可以是编译过的、并行的）；检验时换到 eval。
        batches: 留出的一批批。
        card: 词元文件的卡片。
        speaker: 会说话的模型；微调的写回答，预训练的接着写。它的 config 就是这次训练的。
        prompt: 每次都用的开头或提问。
        device: 见 `evaluate`。
    """

    def __init__(self, loss: nn.Module, batches, card: dict, speaker: Speaker, prompt: str, device):
        self.loss, self.batches, self.card = loss, batches, card
        self.speaker, self.prompt, self.device = speaker, prompt, device
        self.old: tuple | None = None

    def also(self, batches, card: dict) -> None:
        """增量预训练：学过的语料上也检验，看忘了多少。"""
        self.old = batches, card

    def measure(self, max_tokens: int) -> tuple[float, float]:
        """用至多 max_tokens 个词元检验：(每个词元的损失，奈特；每个字的比特数)。"""
        return self._on(self.batches, self.card, max_tokens)

    def measure_old(self, max_tokens: int) -> tuple[float, float] | None:
        """同样，在学过的语料上；没有那一份，是 None。"""
        return self._on(*self.old, max_tokens) if self.old else None

    def _on(self, batches, card: dict, max_tokens: int) -> tuple[float, float]:
        self.loss.eval()
        batch_size = self.speaker.config.batch_size
        loss = evaluate(self.loss, batches, batch_size, max_tokens, self.device)
        self.loss.train()
        return loss, bits_per_character(loss, card)

    def write(self) -> str:
        """从固定的开头写一段；同样的模型，写的总是同样的。"""
        sampling = Sampling(seed=self.speaker.config.seed + 1, max=60)
        ids = self.speaker.generate(self.speaker.prompt(self.prompt), sampling)
        return self.speaker.tokenizer.decode(ids)

    def show(self, sample: str) -> str:
        """写出来的一段，连同它的开头或提问；第二行起往里缩。"""
        sample = sample.replace("\n", "\n    ")
        if self.speaker.stage == "sft":
            return f"问：{self.prompt}  答：{sample}"
        return f"{self.prompt}{sample}"
