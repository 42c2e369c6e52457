"""我们的训练：与 pre_train.py 的每一步做同样的事。"""

from torch.nn.utils import clip_grad_norm_

from config import Config
from dataset import IGNORE, rows_of_step
from engine.device import Device, compile_if_possible
from engine.expert_load import expert_loads, rebalance
from engine.shared_row import tie_unused_rows
from loss import loss_sum
from model import Transformer
from optimizer import build_optimizers, set_learning_rate
from tools.bench.trainer import Trainer, batches_of


class Ours(Trainer):
    """我们的：与 pre_train.py 的每一步做同样的事（有测试核对损失相同）。"""

    def __init__(self, config: Config, whole_vocabulary: bool = False):
        super().__init__(config, Device(config))
        self.train, self.val = (
            batches_of(config, self.data, side, config.isolate_documents)
            for side in ("train", "val")
        )
        self.model = Transformer(config).to(self.device.place)
        self.shared = None
        if not whole_vocabulary:
            self.shared = tie_unused_rows(self.model, self.train.tokens, newborn=True)
        self.loss_fn = self.evaluate_fn = compile_if_possible(loss_sum, self.device)
        self.optimizers = self.make_optimizers()

    def make_optimizers(self):
        """Muon 与 AdamW。"""
        return build_optimizers(self.model, self.config, self.device, self.config.lr)

    def step(self, factor: float) -> int:
        """走一步；factor 是学习率的倍数。"""
        set_learning_rate(self.optimizers, factor)
        rows = rows_of_step(self.n, self.rows_per_step, self.train.n_rows, self.config.seed)
        size = self.config.batch_size
        batches = [self.train.get(rows[i : i + size]) for i in range(0, len(rows), size)]
        n_targets = sum(int((b.targets != IGNORE).sum()) for b in batches)
        self.loss = 0.0
        for batch in batches:
            with self.device.autocast():
                batch = batch.to(self.device.place)
                part = self.loss_fn(self.model, batch, self.shared) / n_targets
            part.backward()
            self.loss += part.item()
        clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.shared:
            self.shared.spread(self.model.embedding.weight)
        if busy := expert_loads(self.model, self.device.world):
            rebalance(self.model, busy)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.n += 1
        return n_targets
