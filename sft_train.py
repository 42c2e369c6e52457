"""监督微调（SFT）：让会接着写的模型学会回答。

    python sft_train.py                                   接着 pre_train.py 的结果
    python sft_train.py --sft_data data/my_chat.jsonl     用自己的对话
    python sft_train.py --resume                          接着上次中断的地方
    python sft_train.py --replay 0.1                      掺一成学过的，忘得少些

循环与 pre_train.py 的一字不差；不同的只有三处，都标着「不同」：数据是问答，只学答；
起点是预训练的检查点；学习率小得多，轻轻推一把。
"""

from settings.script import run_script

import math

from corpus.token_file import tokenize_corpus
from dataset import SIDES, Replay, replayed_batches, sft_batches
from engine.run import Run
from generate import make_speaker
from loss import Exam, Loss
from optimizer import build_optimizer, learning_rate
from settings.say import say


def main(argv: list[str] | None = None, run: Run | None = None) -> None:
    """备对话，取回预训练的模型，然后一步一步地训练；参数同 `pre_train.main`。"""
    with run or Run("sft", argv) as run:  # 参数、设备、输出目录；--resume 时还有上次的状态
        config, device = run.config, run.device

        # ---------- 1. 数据（不同）：几段对话拼成一行，互相看不见，只在助手的话上算损失 ----------
        data = tokenize_corpus(config.sft_data, "sft", run.tokenizer, config, wait=run.waits)
        run.make_room(data.starts["train"])  # 长的对话多，一行就长些
        train, val = (sft_batches(data, side, config, run.tokenizer) for side in SIDES)
        for sentence in train.left_out():
            say(f"（{sentence}）")
        if old := run.old_corpus(tokenize_corpus):  # --replay：掺一些学过的，免得忘了
            again, old_val = (replayed_batches(old, side, config, run.tokenizer) for side in SIDES)
            train = Replay(train, again, config.replay, config.seed)
        run.plan(train, data.card)  # 定下走几步，与别的进程接上

        # ---------- 2. 模型、损失、优化器、检验 ----------
        model = run.model()  # 不同：预训练过的，形状也是它的
        loss = run.parallel(Loss(model))  # 编译；几个进程时，梯度在它们之间求和
        speaker = make_speaker(model, config, run.tokenizer, "sft")
        optimizer = run.optimizer(build_optimizer, config.sft_lr)  # 不同：默认是 lr 的五分之一
        exam = Exam(loss, val, data.card, speaker, config.sft_prompt, device)
        if old:
            exam.also(old_val, old.card)  # 看忘了多少
        run.begin()  # 真要开始了：旧的盖掉，记录备好，先存一次
        if run.newborn:
            before, blind = run.first_check(exam, config.eval_tokens), math.log(config.vocab_size)
            say(f"微调之前，对助手的话的损失是 {before:.2f}（全凭瞎猜是 ln V = {blind:.2f}）")

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


if __name__ == "__main__":
    run_script(main)
