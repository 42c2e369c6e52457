"""训练过的模型与它的记录：图里的数从这里来。"""

from dataclasses import dataclass
from pathlib import Path

from config import UserError
from engine.metrics import read_metrics
from generate import Speaker
from tools.explain.speaker import load_speaker


@dataclass
class Trained:
    """训练过的模型；用到哪样才读哪样。"""

    path: Path

    def speaker(self) -> Speaker:
        """fp32 的模型。Raises UserError：没有，或者不是预训练的。"""
        speaker = load_speaker(str(self.path), "cpu")
        if speaker.stage != "pretrain":
            raise UserError(
                f"{self.path} 是 {speaker.stage} 阶段的检查点；这些图画的是预训练的模型"
            )
        return speaker

    def metrics(self) -> list[dict]:
        """逐步的记录。Raises UserError：没有。"""
        path = self.path.parent / "pretrain" / "metrics.jsonl"
        rows = read_metrics(path)
        if len(rows) < 3:
            raise UserError(f"找不到训练的记录 {path}；请先运行 python pre_train.py --preset tiny")
        return rows
