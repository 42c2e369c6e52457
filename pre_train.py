"""预训练：让模型学会接着往下写。

    python pre_train.py                                        默认：在任何机器上都能跑
    python pre_train.py --preset deep --lr 3e-4 --no-compile   每个配置都能在命令行上改
    python pre_train.py --resume                               接着上次中断的地方
    python pre_train.py --init_from X.pt --data new.jsonl      增量预训练：在新的语料上接着学
    torchrun --nproc_per_node=4 pre_train.py                   四块显卡一起

从上到下就是训练的全过程：备数据，造模型，然后一步一步地猜、对答案、改参数。
循环之外的一切（配置、检查点、记录、叫停）都交给 `run`，见 engine/run.py；
循环里 `run` 的几个动作（取一批、反向、截短、更新）在 engine/stepper.py，每个只有几行。
"""

from settings.script import run_script

import math

from config import Config
from corpus.token_file import tokenize_corpus
from dataset import SIDES, Replay, pretrain_batches
from engine.run import Run
from generate import make_speaker
from loss import Exam, Loss
from optimizer import build_optimizer, learning_rate
from settings.say import say


def main(argv: list[str] | None = None, run: Run | None = None) -> None:
    """备数据，造模型，然后一步一步地训练。

    Args:
        argv: 参数；不给就取自命令行。
        run: 换一种 `Run`，循环一行不改：examples/distill 听老师的，实验台练改装过的模型。
    """
    with run or Run("pretrain", argv) as run:  # 参数、设备、输出目录；--resume 时还有上次的状态
        config, device = run.config, run.device

        # ---------- 1. 数据：一个词元文件，切成等长的行 ----------
        data = tokenize_corpus(config.data, "pretrain", run.tokenizer, config, wait=run.waits)
        train, val = (pretrain_batches(data, side, config, run.tokenizer) for side in SIDES)
        if old := run.old_corpus(tokenize_corpus):  # 增量预训练才有：学过的语料，掺一些进来
            again, old_val = (pretrain_batches(old, side, config, run.tokenizer) for side in SIDES)
            train = Replay(train, again, config.replay, config.seed)
        run.plan(train, data.card)  # 定下走几步，与别的进程接上

        # ---------- 2. 模型、损失、优化器、检验 ----------
        model = run.model()  # 刚出生的；接着练的、增量的，是学过的
        loss = run.parallel(Loss(model))  # 编译；几个进程时，梯度在它们之间求和
        speaker = make_speaker(model, config, run.tokenizer, "pretrain")
        optimizer = run.optimizer(build_optimizer, config.lr)  # 接着练的，连同它上次的状态
        exam = Exam(loss, val, data.card, speaker, config.prompt, device)
        if old:
            exam.also(old_val, old.card)  # 看忘了多少
        run.begin()  # 真要开始了：旧的盖掉，记录备好，先存一次
        if run.newborn:
            n = config.batch_size * config.seq_len if run.from_scratch else config.eval_tokens
            say(expected(config, run.first_check(exam, n), run.from_scratch))

        # ---------- 3. 训练：检验、记录、保存、叫停都在两步之间 ----------
        for step in run.steps(exam):
            # 3.1 这一步的学习率：最高值的几倍
            optimizer.set_lr(learning_rate(step, run.n_steps, config.warmup, config.decay))

            # 3.2 前向与反向：几个小批的梯度累积成一大批，按整个大批的目标数（n_targets）求平均
            losses = []
            for batch in run.batches(step):
                with device.autocast():  # 矩阵乘法用半精度算，快
                    part = loss(batch) / run.n_targets
                run.backward(part)
                losses.append(part.detach())

            # 3.3 梯度太长就截短；损失与梯度都是有限的数，才更新参数
            norm = run.clip(optimizer, config.grad_clip)
            if run.finite(losses, norm):
                run.update(optimizer)
            optimizer.zero_grad()


def expected(config: Config, loss: float, from_scratch: bool) -> str:
    """开始之前的损失是 loss；没训练过的模型，应当是多少。"""
    V = config.vocab_size
    if not from_scratch:
        return f"接着学之前，在这份语料上的损失是 {loss:.2f}（全凭瞎猜是 ln V = {math.log(V):.2f}）"
    text = (
        f"没训练过的模型对 {V} 个词元一视同仁，损失应为 ln V = {math.log(V):.2f}，实际是 {loss:.2f}"
    )
    if config.dim > 256:  # 打分用的也是词嵌入，所以眼前的词元最像自己
        own = 0.02 * config.dim  # 词嵌入的标准差 × 宽度
        more = math.log(V + math.exp(own))
        text += f"\n（宽的模型给眼前的词元自己多打 {own:.1f} 分，算上它，应为 {more:.2f}）"
    return text


if __name__ == "__main__":
    run_script(main)
