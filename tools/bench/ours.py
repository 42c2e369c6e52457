"""我们的训练：走的就是两个脚本的循环，一行没有另写；只是每一步之前等一声，学习率听测速的。"""

import threading
from collections.abc import Iterator
from queue import Queue

import torch

import pre_train
import sft_train
from config import Config
from engine.device import Device
from engine.shared_row import SharedRow
from engine.stepper import Stepper
from model import Transformer
from tokenizer import Tokenizer
from tools.bench.trainer import Trainer

MAINS = {"pretrain": pre_train.main, "sft": sft_train.main}


class Newborn(Stepper):
    """脚本里的循环，一行不改地走一遍，模型是刚出生的；没有检查点，没有记录。

    Args:
        whole_vocabulary: 真时整张词表逐个打分，没出现过的词元不合用一行。
        stage: 走哪一个脚本的循环。
    """

    from_scratch = True  # 微调的循环也是：合用的一行，与预训练过的模型微调时一样多

    def __init__(
        self, config: Config, device: Device, whole_vocabulary: bool, stage: str = "pretrain"
    ):
        super().__init__(stage, config, device, Tokenizer())
        self.whole_vocabulary = whole_vocabulary

    def walk(self) -> None:
        """走完整个脚本。"""
        MAINS[self.stage](run=self)

    def model(self) -> Transformer:
        """刚出生的模型。"""
        torch.manual_seed(self.config.seed)
        return Transformer(self.config).to(self.device.place)

    def find_shared_row(self) -> SharedRow | None:
        """没用到的词元合不合用一行。"""
        return None if self.whole_vocabulary else super().find_shared_row()


class OnCall(Newborn):
    """叫一声，走一步。循环走起来不会中途返回，所以住在自己的线程里，两边轮流，从不同时干活。"""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.answers = Queue(), Queue()
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.start()
        self._answer()  # 备好了

    def _live(self) -> None:
        try:
            self.walk()
        except BaseException as error:
            self.answers.put(error)

    def _answer(self):
        try:
            answer = self.answers.get()
        except KeyboardInterrupt:
            self.answers.get()  # 那边还在算：等它交回来再走，中途退出会惊动 PyTorch
            raise
        if isinstance(answer, BaseException):
            self.answers.put(answer)  # 那边已经停了，再问还是这一句
            raise answer
        return answer

    def go(self, factor: float) -> int:
        """走一步，学习率是最高值的 factor 倍；返回这一步要猜的词元数。"""
        self.calls.put(factor)
        return self._answer()

    def leave(self) -> None:
        """循环到此为止，线程结束：它不再占着显存。"""
        self.calls.put(None)
        self.thread.join()

    def start_over(self) -> None:
        """回到第 0 步，优化器什么也不记得。"""
        self.step = 0
        self._optimizer.muon.state.clear()
        self._optimizer.adamw.state.clear()

    def optimizer(self, build, lr: float):
        """学习率不照循环里的曲线，听测速的。"""
        optimizer = super().optimizer(build, lr)
        set_lr = optimizer.set_lr
        optimizer.set_lr = lambda _: set_lr(self.factor)
        return optimizer

    def steps(self, exam) -> Iterator[int]:
        """没有尽头，除非 `leave`；`step` 可以从外面拨回去。"""
        self.exam, self.step, answer = exam, 0, None
        while True:
            self.answers.put(answer)
            self.factor = self.calls.get()
            if self.factor is None:
                return
            yield self.step
            self.between_steps()
            self.step += 1
            answer = int(self.n_targets)


class Ours(Trainer):
    """我们的：与 pre_train.py 的每一步做同样的事（有测试核对损失相同）。"""

    def __init__(self, config: Config, whole_vocabulary: bool = False, stage: str = "pretrain"):
        super().__init__(config, Device(config))
        self.loop = OnCall(config, self.device, whole_vocabulary, stage)
        self.model, self.val = self.loop.exam.speaker.model, self.loop.exam.batches

    @property
    def loss(self) -> float:
        """上一步的损失，奈特每词元。"""
        return self.loop.step_loss

    def step(self, factor: float) -> int:
        """走一步；factor 是学习率的倍数。"""
        return self.loop.go(factor)

    def start_over(self) -> None:
        """回到第 0 步。"""
        self.loop.start_over()

    def leave(self) -> None:
        """不再走了。"""
        self.loop.leave()

    def val_loss(self) -> float:
        """全部留出的词条上，每个词元的平均损失（奈特）。"""
        return self.loop.exam.measure(10**9)[0]
