"""预训练：让模型学会接着往下写。

    python pre_train.py                                        默认：在任何机器上都能跑
    python pre_train.py --preset deep --lr 3e-4 --no-compile   每个配置都能在命令行上改
    python pre_train.py --resume                               接着上次中断的地方
    torchrun --nproc_per_node=4 pre_train.py                   四块显卡一起

从上到下就是训练的全过程。
"""

import math
import shlex
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from corpus.token_file import tokenize_corpus
from dataset import IGNORE, PretrainBatches, rows_of_step
from engine.checkpoint import Progress, build_model, capture, restore
from engine.device import Device, compile_if_possible
from engine.distributed import Parallel, World, whole
from engine.expert_load import expert_loads, rebalance
from engine.guard import diverged, skip_step, too_many_skipped
from engine.memory import auto_batch, memory_advice
from engine.metrics import Metrics
from engine.run_folder import RunFolder, Saver
from engine.shared_row import shared_before, tie_unused_rows
from engine.stop import Stop
from generate import Sampling, make_speaker
from loss import bits_per_character, evaluate, loss_sum
from model import Transformer
from optimizer import build_optimizers, learning_rate, set_learning_rate, total_steps
from settings.flags import run_script
from settings.resolve import Origin, describe, load_config, repeat_flags, save_config
from tokenizer import Tokenizer


def main(
    argv: list[str] | None = None,
    loss_sum: Callable[..., Tensor] = loss_sum,
    program: str = "pre_train.py",
) -> None:
    """读配置、备数据、建模型，然后一步一步地训练。

    Args:
        argv: 参数；不给就取自命令行。
        loss_sum: 一批的损失之和怎样算；examples/distill 换成了听老师的。
        program: 接着练时写在 python 后面的。
    """
    # ---------- 1. 配置、设备、输出目录 ----------
    config, origins = load_config("pretrain", sys.argv[1:] if argv is None else argv)
    world = World()
    tokenizer = Tokenizer()
    folder = RunFolder("pretrain", config, origins, world, program)
    checkpoint = folder.begin(config, origins, tokenizer)  # --resume：上次的全部状态
    device = Device(config, world)
    print(f"预训练 · {device.describe()}\n{describe(config, origins)}")
    if origins["preset"] is Origin.AUTO:
        print("（想换一种大小：--preset wide 矮胖，--preset deep 瘦高，--preset tiny 小而快）")
    if config.data == "builtin":
        print("（用的是内置成语词典；想用维基百科：python download.py wiki）")
    for note in device.notes:
        print(f"（{note}）")

    # ---------- 2. 数据：一个词元文件，切成等长的行 ----------
    data = tokenize_corpus(config.data, "pretrain", tokenizer, config, wait=world.local_rank > 0)
    isolate = tokenizer.bos_id if config.isolate_documents else None
    train, val = (
        PretrainBatches(data.tokens[side], config.seq_len, isolate) for side in ("train", "val")
    )
    rows_per_step = config.batch_size * config.grad_accum
    # 语料不大时读四遍，再多便只是背书（Scaling Data-Constrained LMs，arXiv 2305.16264）。
    epochs = 4 if data.card["train_tokens"] < 100e6 else 1
    max_steps = total_steps(config.max_steps, config.epochs or epochs, train.n_rows, rows_per_step)

    # ---------- 3. 模型与优化器 ----------
    world.connect(device.place, rows_per_step)
    torch.manual_seed(config.seed)
    model = build_model(config, checkpoint, folder.path) if checkpoint else Transformer(config)
    model.to(device.place)
    if checkpoint:
        shared = shared_before(checkpoint, device)
    else:
        shared = tie_unused_rows(model, train.tokens, newborn=True)
    if origins["batch_size"] is Origin.TRIED:
        auto_batch(config, model, device)
    n_params = sum(p.numel() for p in model.parameters())
    parallel = Parallel(model, compile_if_possible(loss_sum, device), world, config.parallel)
    loss_fn, shared = parallel.loss_fn, None if parallel.sharded else shared
    optimizers = build_optimizers(model, config, device, config.lr)
    progress, fresh = Progress(), checkpoint is None
    if checkpoint:
        progress = restore(checkpoint, data.card, optimizers, device, folder, max_steps)
        checkpoint = None  # 用完就放手，不占内存
    speaker = make_speaker(model, config, tokenizer, "pretrain")
    eval_every = config.eval_every or min(500, math.ceil(max_steps / 10))
    print(
        f"模型：{n_params / 1e6:.1f} M 参数；共 {max_steps} 步，"
        f"每步 {rows_per_step * config.seq_len} 个词元，"
        f"合计读 {max_steps * rows_per_step / train.n_rows:.2g} 遍"
    )
    if shared:
        n = len(shared.members)
        print(f"（词表里有 {n} 个词元这份语料从没用过：合用词嵌入的一行，打分只算一次）")

    def check(limit: int, everything: bool = False) -> dict:
        """用至多 limit 个词元检验，再采样一段给人看；返回写进记录的几项。"""
        with memory_advice(config, model, config.batch_size):
            loss = evaluate(loss_fn, model, val, config.batch_size, limit, device)
        bpc = bits_per_character(loss, data.card)
        busy = expert_loads(model, world)  # 专家混合：留出的文档上，各位专家的负载
        progress.checked(loss, bpc, everything)
        prompt = [tokenizer.bos_id, *tokenizer.encode(config.prompt)]
        written = []
        if math.isfinite(loss):
            with parallel.gathered():
                written = list(speaker.generate(prompt, Sampling(seed=config.seed + 1, max=60)))
        sample = tokenizer.decode(written)
        shown = sample.replace("\n", "\n    ")
        tqdm.write(
            f"第 {progress.step} 步 · 检验损失 {loss:.3f} · 每字 {bpc:.3f} 比特"
            f"{f' · {busy}' if busy else ''}\n"
            f"    {config.prompt}{shown}"
        )
        experts = {"val_load": busy.rounded()} if busy else {}
        return {"val_loss": loss, "val_bpc": bpc, "sample": sample, **experts}

    def state() -> dict:
        """此刻的全部状态：存进检查点，接着练的结果便与不中断的逐位相同。"""
        metrics.sync()
        progress.seconds = metrics.seconds()
        if shared:
            shared.spread_state(model.embedding.weight, optimizers[1])
        return capture(
            "pretrain", config, tokenizer, model, optimizers, device, progress, shared, max_steps,
            (rows_per_step, train.n_rows), data.card,
        )  # fmt: skip

    # ---------- 4. 训练 ----------
    world.agree("起点（步数与语料）", f"{progress.step} {data.card['train_sha256'][:8]}")
    folder.settle(fresh)
    if world.rank == 0:
        save_config(config, folder.root / "pretrain" / "config.json")
    metrics = Metrics(folder.root / "pretrain", world, progress)
    saver = Saver(folder, config.save_every, progress)
    stop = Stop(world)
    print("第一步之前要编译，约一分钟……" if device.compile else "开始训练……")
    if progress.step == 0:
        saver.save(state, must=True)  # 现在就知道存不存得下，不必等到一小时以后
        result = check(config.batch_size * config.seq_len)  # 一批就看得出是不是 ln V
        print(
            f"没训练过的模型对 {config.vocab_size} 个词元一视同仁，损失应为 ln V = "
            f"{math.log(config.vocab_size):.2f}，实际是 {result['val_loss']:.2f}"
        )
        if config.dim > 256:  # 打分用的也是词嵌入，所以眼前的词元最像自己
            own = 0.02 * config.dim  # 词嵌入的标准差 × 宽度
            expected = math.log(config.vocab_size + math.exp(own))
            print(f"（宽的模型给眼前的词元自己多打 {own:.1f} 分，算上它，应为 {expected:.2f}）")
        metrics.write(step=0, tokens=0, **result)
    bar = tqdm(
        total=max_steps, initial=progress.step, unit="步", dynamic_ncols=True, smoothing=0.1,
        disable=world.rank > 0,
    )  # fmt: skip
    for step in range(progress.step, max_steps):
        started = time.monotonic()

        # 4.1 这一步的学习率
        factor = learning_rate(step, max_steps, config.warmup, config.decay)
        set_learning_rate(optimizers, factor)

        # 4.2 前向与反向，几个小批的梯度累积成一大批；按整个大批的目标数求平均
        rows = rows_of_step(step, rows_per_step, train.n_rows, config.seed)
        micro_rows = world.my_share(rows, config.batch_size)  # 几个进程分着读
        batches = [train.get(some) for some in micro_rows]
        (n_targets,) = world.sum(sum(int((b.targets != IGNORE).sum()) for b in batches))
        losses = []
        with memory_advice(config, model, len(micro_rows[0])):
            for i, batch in enumerate(batches, start=1):
                with parallel.accumulate(last=i == len(batches)):
                    with device.autocast():
                        part = loss_fn(model, batch.to(device.place), shared) / n_targets
                    # DDP 在各进程间求梯度的平均，要的是和：先乘上进程数。
                    device.scaler.scale(part * world.size).backward()
                losses.append(part.item())
        loss, stopping, saving = world.sum(sum(losses), stop.signal > 0, saver.due())

        # 4.3 梯度太长就截短
        for optimizer in optimizers:
            device.scaler.unscale_(optimizer)
        norm = whole(clip_grad_norm_(model.parameters(), config.grad_clip)).item()

        # 4.4 更新参数；损失或梯度有一个不是有限的数，就不更新
        notes = {}
        if math.isfinite(loss) and math.isfinite(norm):
            progress.skipped_in_a_row = 0
            with memory_advice(config, model, len(micro_rows[0])):
                for optimizer in optimizers:
                    device.scaler.step(optimizer)
            if shared:
                shared.spread(model.embedding.weight)
        else:
            epoch = step * rows_per_step // train.n_rows
            notes = skip_step(progress, loss, micro_rows, losses, epoch, device)
        device.scaler.update()
        if busy := expert_loads(model, world):  # 专家混合：下一步按它求均衡
            rebalance(model, busy)
            notes |= busy.row()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

        # 4.5 记录
        progress.step, progress.tokens = step + 1, progress.tokens + int(n_targets)
        speed = n_targets / (time.monotonic() - started)
        bar.update()
        bar.set_postfix_str(f"损失 {loss:.3f}，{speed:.0f} 词元/秒")
        row = {
            "step": step + 1, "tokens": progress.tokens, "train_loss": loss,
            "lr": config.lr * factor, "grad_norm": norm, "tokens_per_second": speed, **notes,
        }  # fmt: skip

        # 4.6 每隔一段：检验、采样；每隔一分钟：保存
        last = step + 1 == max_steps
        if last or (step + 1) % eval_every == 0:
            row |= check(config.eval_tokens * (10 if last else 1), everything=last)
        metrics.write(**row)
        if too_many_skipped(progress, device.scaler):
            raise diverged(state(), folder, progress, "--lr", config.lr)
        if last or saving or stopping:
            saver.save(state, must=last, leaving=stopping)
        if stopping and not last:
            bar.close()
            stop.leave(saver, progress, max_steps)
        stop.watch()
    bar.close()

    # ---------- 5. 收尾 ----------
    metrics.draw()
    print(
        f"完成，用时 {metrics.seconds() / 60:.1f} 分钟，"
        f"其中保存 {progress.saving_seconds:.1f} 秒。\n"
        f"  检查点    {folder.path}\n"
        f"  损失曲线  {metrics.picture}\n"
        f"  记录      {metrics.path}\n"
        f"接下来：\n"
        f"  python pre_chat.py --checkpoint {shlex.quote(str(folder.path))}    看它接着往下写\n"
        f"  python sft_train.py{repeat_flags(config, origins)}    教它回答问题"
    )
    world.disconnect()


if __name__ == "__main__":
    run_script(main)
