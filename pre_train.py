"""预训练：让模型学会接着往下写。

    python pre_train.py                                        默认：在任何机器上都能跑
    python pre_train.py --preset deep --lr 3e-4 --no-compile   每个配置都能在命令行上改

从上到下就是训练的全过程。
"""

import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config import UserError, describe, load_config, run_script, save_config
from dataset import IGNORE, PretrainBatches, prepare, rows_of_step
from generate import Sampling, make_speaker
from model import Transformer
from optimizer import build_optimizers, learning_rate, set_learning_rate, total_steps
from tokenizer import Tokenizer
from training import (
    Device,
    Metrics,
    bits_per_character,
    compile_if_possible,
    evaluate,
    loss_sum,
    repeat_flags,
    save,
    share_row,
)


def main() -> None:
    """读配置、备数据、建模型，然后一步一步地训练。"""
    # ---------- 1. 配置与设备 ----------
    config, origins = load_config("pretrain", sys.argv[1:])
    device = Device(config)
    torch.manual_seed(config.seed)
    print(f"预训练 · {device.describe()}\n{describe(config, origins)}")
    if origins["preset"] == "自动":
        print("（想换一种大小：--preset wide 矮胖，--preset deep 瘦高，--preset tiny 小而快）")
    if config.data == "builtin":
        print("（用的是内置成语词典；想用维基百科：python download.py wiki）")
    for note in device.notes:
        print(f"（{note}）")
    out_dir = Path(config.out_dir)
    checkpoint_path = out_dir / "pretrain.pt"

    # ---------- 2. 数据：一个词元文件，切成等长的行 ----------
    tokenizer = Tokenizer()
    data = prepare(config.data, "pretrain", tokenizer, config)
    isolate = tokenizer.bos_id if config.isolate_documents else None
    train, val = (
        PretrainBatches(data.tokens[side], config.seq_len, isolate) for side in ("train", "val")
    )
    rows_per_step = config.batch_size * config.grad_accum
    # 语料不大时读四遍，再多便只是背书（Scaling Data-Constrained LMs，arXiv 2305.16264）。
    epochs = 4 if data.card["train_tokens"] < 100e6 else 1
    max_steps = total_steps(config.max_steps, config.epochs or epochs, train.n_rows, rows_per_step)

    # ---------- 3. 模型与优化器 ----------
    model = Transformer(config).to(device.torch)
    optimizers = build_optimizers(model, config, device, config.lr)
    shared = share_row(model, train.tokens, newborn=True)
    loss_fn = compile_if_possible(loss_sum, device)
    speaker = make_speaker(model, config, tokenizer, "pretrain")
    eval_every = config.eval_every or min(500, math.ceil(max_steps / 10))
    n_params = sum(p.numel() for p in model.parameters())
    print(
        f"模型：{n_params / 1e6:.1f} M 参数；共 {max_steps} 步，"
        f"每步 {rows_per_step * config.seq_len} 个词元，"
        f"合计读 {max_steps * rows_per_step / train.n_rows:.2g} 遍"
    )
    if shared:
        n = len(shared.members)
        print(f"（词表里有 {n} 个词元这份语料从没用过：合用词嵌入的一行，打分只算一次）")

    def check(step: int, everything: bool) -> dict:
        """检验，再采样一段给人看；返回检验的结果。"""
        limit = config.eval_tokens * (10 if everything else 1)
        loss = evaluate(loss_fn, model, val, config.batch_size, limit, device)
        bpc = bits_per_character(loss, data.card)
        prompt = [tokenizer.bos_id, *tokenizer.encode(config.prompt)]
        written = speaker.generate(prompt, Sampling(seed=config.seed + 1, max=60))
        sample = tokenizer.decode(written).replace("\n", "\n    ")
        tqdm.write(
            f"第 {step} 步 · 检验损失 {loss:.3f} · 每字 {bpc:.3f} 比特\n    {config.prompt}{sample}"
        )
        return {"val_loss": loss, "val_bpc": bpc}

    # ---------- 4. 训练 ----------
    save_config(config, out_dir / "pretrain" / "config.json")
    metrics = Metrics(out_dir / "pretrain")
    print("第一步之前要编译，约一分钟……" if device.compile else "开始训练……")
    result = check(0, everything=False)
    print(
        f"没训练过的模型对 {config.vocab_size} 个词元一视同仁，损失应为 ln V = "
        f"{math.log(config.vocab_size):.2f}，实际是 {result['val_loss']:.2f}"
    )
    metrics.write(step=0, tokens=0, **result)
    bar = tqdm(total=max_steps, unit="步", dynamic_ncols=True, smoothing=0.1)
    tokens = 0
    for step in range(max_steps):
        started = time.monotonic()

        # 4.1 这一步的学习率
        factor = learning_rate(step, max_steps, config.warmup, config.decay)
        set_learning_rate(optimizers, factor)

        # 4.2 前向与反向，几个小批的梯度累积成一大批；按整个大批的目标数求平均
        rows = rows_of_step(step, rows_per_step, train.n_rows, config.seed)
        batches = [train.get(rows[i :: config.grad_accum]) for i in range(config.grad_accum)]
        n_targets = sum(int((b.targets != IGNORE).sum()) for b in batches)
        loss = 0.0
        for batch in batches:
            with device.autocast():
                part = loss_fn(model, batch.to(device.torch), shared) / n_targets
            device.scaler.scale(part).backward()
            loss += part.item()

        # 4.3 梯度太长就截短；有一个不是数，就在更新之前停下
        for optimizer in optimizers:
            device.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        broken = not math.isfinite(loss) or not (math.isfinite(norm) or device.scaler.is_enabled())
        if broken:  # fp16 的梯度偶尔溢出是正常的，scaler 会跳过那一步
            raise UserError(f"第 {step + 1} 步的损失或梯度不是有限的数；请减小 --lr（{config.lr}）")

        # 4.4 更新参数
        for optimizer in optimizers:
            device.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        device.scaler.update()
        if shared:
            shared.spread(model)

        # 4.5 记录
        tokens += n_targets
        speed = n_targets / (time.monotonic() - started)
        bar.update()
        bar.set_postfix_str(f"损失 {loss:.3f}，{speed:.0f} 词元/秒")
        row = {
            "step": step + 1, "tokens": tokens, "train_loss": loss, "lr": config.lr * factor,
            "grad_norm": norm, "tokens_per_second": speed,
        }  # fmt: skip

        # 4.6 每隔一段：检验、采样、保存
        last = step + 1 == max_steps
        if last or (step + 1) % eval_every == 0:
            row |= (result := check(step + 1, everything=last))
            save(
                checkpoint_path, model, config, tokenizer, stage="pretrain", step=step + 1, **result
            )
        metrics.write(**row)
    bar.close()

    # ---------- 5. 收尾 ----------
    metrics.draw()
    print(
        f"完成，用时 {metrics.minutes():.1f} 分钟。\n"
        f"  检查点    {checkpoint_path}\n"
        f"  损失曲线  {metrics.picture}\n"
        f"  记录      {metrics.path}\n"
        f"接下来：\n"
        f"  python pre_chat.py --checkpoint {checkpoint_path}    看它接着往下写\n"
        f"  python sft_train.py{repeat_flags(config, origins)}    教它回答问题"
    )


if __name__ == "__main__":
    run_script(main)
