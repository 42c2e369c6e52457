"""别人的三方：各怎样备好，怎样练，怎样量。"""

import importlib.util
import math
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from config import Config, UserError
from corpus.log import ReadLog
from corpus.readers import read_rows
from corpus.token_file import tokenize_corpus
from dataset import IGNORE, PretrainBatches, rows_of_step
from loss import BITS_OF_A_LOST_CHARACTER
from optimizer import learning_rate
from tokenizer import Tokenizer
from tools.bench.yardsticks import plain_device
from tools.huggingface.shapes import qwen3


class Peer:
    """别人的一方：模型、优化器、一批一批的数据、学习率的曲线。

    Fields:
        model: 编号 (B, T) 与目标 -> 损失，见 `loss`。
        batches: 没有尽头的 (编号, 目标)，目标与编号一样长，各自右移由 `loss` 管。
        curve: 走到全程的几分之几 -> 学习率是最高值的几倍。
        accumulate: 几批合成一步。
    """

    accumulate = 1

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """这一批的平均损失。"""
        raise TypeError("由各方自己定")

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, T) -> (1, T, V)。"""
        raise TypeError("由各方自己定")

    def encode(self, text: str) -> tuple[list[int], int]:
        """一段文字 -> 编号（连同开头标记），写不出的字有几个。"""
        ids, lost = self.tokenizer.encode_and_lose([text])[0]
        return [self.tokenizer.bos_id, *ids.tolist()], len(lost)

    def train(self, seconds: float) -> tuple[int, int]:
        """练这么久；返回 (步数, 词元数)。"""
        start, tokens, steps = time.perf_counter(), 0, 0
        while (progress := (time.perf_counter() - start) / seconds) < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self.curve(progress)
            for _ in range(self.accumulate):
                ids, targets = (x.to(self.device.place) for x in next(self.batches))
                with self.device.autocast():
                    loss = self.loss(ids, targets)
                (loss / self.accumulate).backward()
                tokens += int((targets >= 0).sum())
            clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            steps += 1
        return steps, tokens

    @torch.inference_mode()
    def bits(self, texts: list[str]) -> list[float]:
        """各篇的比特，写不出的字在内。"""
        found = []
        self.module.eval()
        for text in texts:
            ids, lost = self.encode(text)
            row = torch.tensor([ids], device=self.device.place)
            scores = self.logits(row)[0, :-1].float()
            nats = F.cross_entropy(scores, row[0, 1:], reduction="sum").item()
            found.append(nats / math.log(2) + BITS_OF_A_LOST_CHARACTER * lost)
        return found


class OnOurTokens(Peer):
    """用我们的词元，首尾相接；每步的词元数与我们的预设相同。"""

    def __init__(self, config: Config, lr: float):
        self.config, self.lr, self.tokenizer = config, lr, Tokenizer()
        self.device = plain_device(config)
        torch.manual_seed(config.seed)
        data = tokenize_corpus(config.data, "pretrain", self.tokenizer, config)
        rows = PretrainBatches(data.tokens["train"], config.seq_len)
        self.batches = (
            rows.get(rows_of_step(step, config.batch_size, rows.n_rows, config.seed))[:2]
            for step in count()
        )
        self.accumulate = config.grad_accum

    def curve(self, progress: float) -> float:
        """与我们的相同。"""
        return learning_rate(int(progress * 1000), 1000, self.config.warmup, self.config.decay)


class PlainQwen3(OnOurTokens):
    """transformers 的 Qwen3，AdamW。"""

    def __init__(self, config: Config, lr: float):
        super().__init__(config, lr)
        self.module = qwen3(config).to(self.device.place)
        self.call = torch.compile(self.module) if self.device.compile else self.module
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=lr, fused=True)

    def loss(self, ids, targets):
        """它的打分，我们的目标。"""
        logits = self.call(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    def logits(self, ids):
        """打分。"""
        return self.module(input_ids=ids, use_cache=False).logits


class NanoGPT(OnOurTokens):
    """nanoGPT 的 model.py：它的 GPT 与它的 configure_optimizers；曲线也照它的 train.py。"""

    FILE = "model.py"

    def __init__(self, config: Config, lr: float, folder: str):
        super().__init__(config, lr)
        theirs = their_module(Path(folder) / self.FILE)
        self.module = theirs.GPT(theirs.GPTConfig(
            block_size=config.max_len, vocab_size=config.vocab_size, n_layer=config.n_layers,
            n_head=config.n_heads, n_embd=config.dim, dropout=0.0, bias=False,
        )).to(self.device.place)  # fmt: skip
        self.call = torch.compile(self.module) if self.device.compile else self.module
        kind = self.device.place.type
        self.optimizer = self.module.configure_optimizers(0.1, lr, (0.9, 0.95), kind)

    def curve(self, progress: float) -> float:
        """升温百分之三，余弦降到十分之一。"""
        if progress < 0.03:
            return progress / 0.03 + 0.01
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97))

    def loss(self, ids, targets):
        """它自己算的损失；它认的「不算」是 -1。"""
        return self.call(ids, targets.where(targets >= 0, -1))[1]

    def logits(self, ids):
        """不给目标时它只算最后一处，所以给一份不用的。"""
        return self.module(ids, ids)[0]


class MiniMind(Peer):
    """minimind 的模型与分词器；一行一篇，长的截断，短的补齐。"""

    FILE, LENGTH = "model/model_minimind.py", 340  # 后者是它的 max_seq_len

    def __init__(self, config: Config, lr: float, folder: str, size: str, helped: bool):
        from transformers import AutoTokenizer

        theirs = their_module(Path(folder) / self.FILE)
        self.tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
        config.compile &= helped
        if not helped:
            config.dtype = "float32"
        self.lr, self.device = lr, plain_device(config)
        torch.manual_seed(config.seed)
        width, depth = map(int, size.split("x"))
        self.module = theirs.MiniMindForCausalLM(
            theirs.MiniMindConfig(hidden_size=width, num_hidden_layers=depth)
        ).to(self.device.place)
        self.call = torch.compile(self.module) if self.device.compile else self.module
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=lr)
        rows, self.accumulate = (8, 1) if helped else (32, 8)
        self.batches = self.rows(everything(config.data), rows, config.seed)

    def rows(self, texts: list[str], n: int, seed: int):
        """每批 n 行，每遍打乱一次。"""
        if len(texts) < n:
            raise UserError(f"语料只有 {len(texts)} 篇，一批要 {n} 篇")
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(texts))
            for at in range(0, len(texts) - n + 1, n):
                ids = torch.full((n, self.LENGTH), self.tokenizer.pad_token_id)
                targets = torch.full((n, self.LENGTH), IGNORE)
                for row, target, i in zip(ids, targets, order[at : at + n], strict=True):
                    found, _ = self.encode(texts[i][: 16 * self.LENGTH])
                    found = [*found[: self.LENGTH - 1], self.tokenizer.eos_token_id]
                    row[: len(found)] = target[: len(found)] = torch.tensor(found)
                yield ids, targets

    def encode(self, text: str) -> tuple[list[int], int]:
        """按字节的分词器，没有写不出的字。"""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return [self.tokenizer.bos_token_id, *ids], 0

    def curve(self, progress: float) -> float:
        """余弦，从最高降到十分之一。"""
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    def loss(self, ids, targets):
        """它自己算的损失，目标由它右移。"""
        return self.call(ids, labels=targets).loss

    def logits(self, ids):
        """打分。"""
        return self.module(ids).logits


def their_module(path: Path):
    """别人的一个 Python 文件。"""
    spec = importlib.util.spec_from_file_location(f"theirs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def everything(path: str) -> list[str]:
    """语料的全部文字。"""
    rows = (row for _, row in read_rows(path, ReadLog(path)))
    texts = (row.get("text") if isinstance(row, dict) else row for row in rows)
    return [text for text in texts if isinstance(text, str) and text.strip()]
