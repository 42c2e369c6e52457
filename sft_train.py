"""监督微调（SFT）：让会接着写的模型学会回答。

    python sft_train.py                                   接着 pre_train.py 的结果
    python sft_train.py --sft_data data/my.jsonl          用自己的对话

循环与 pre_train.py 逐节相同；不同的只有数据（问答，只学答）与起点（预训练的检查点）。
"""

import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config import UserError, describe, load_config, run_script, save_config
from dataset import IGNORE, SFTBatches, prepare, rows_of_step
from generate import Sampling, make_speaker
from optimizer import build_optimizers, learning_rate, set_learning_rate, total_steps
from tokenizer import Tokenizer
from training import (
    Device,
    Metrics,
    bits_per_character,
    compile_if_possible,
    evaluate,
    inherit,
    load,
    loss_sum,
    save,
    share_row,
)


def main() -> None:
    """读配置、取回预训练的模型、备数据，然后一步一步地训练。"""
    # ---------- 1. 配置与设备 ----------
    config, origins = load_config("sft", sys.argv[1:])
    device = Device(config)
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer()
    model, pretrained, checkpoint = load(Path(config.init_from), tokenizer)
    inherit(config, origins, pretrained, config.init_from)
    print(f"微调 · {device.describe()}\n{describe(config, origins)}")
    print(
        f"起点：{config.init_from}（{checkpoint['stage']} 阶段，第 {checkpoint['step']} 步，"
        f"检验 {checkpoint['val_bpc']:.3f} 比特每字）"
    )
    for note in device.notes:
        print(f"（{note}）")
    out_dir = Path(config.out_dir)
    checkpoint_path = out_dir / "sft.pt"

    # ---------- 2. 数据：一个词元文件，几段对话拼成一行 ----------
    data = prepare(config.sft_data, "sft", tokenizer, config)
    train, val = (
        SFTBatches(data.tokens[side], data.starts[side], config.seq_len, tokenizer, config.seed)
        for side in ("train", "val")
    )
    if train.skipped:
        print(f"（{train.skipped} 段对话在 {config.seq_len} 个词元之内没有助手的话，不用）")
    if train.cut:
        print(f"（{train.cut} 段对话超过 {config.seq_len} 个词元，末尾没有放进来）")
    rows_per_step = config.batch_size * config.grad_accum
    max_steps = total_steps(
        config.sft_max_steps, config.sft_epochs or 2, train.n_rows, rows_per_step
    )

    # ---------- 3. 模型与优化器 ----------
    model.to(device.torch)
    optimizers = build_optimizers(model, config, device, config.sft_lr)
    shared = share_row(model, train.tokens, newborn=False)
    loss_fn = compile_if_possible(loss_sum, device)
    speaker = make_speaker(model, config, tokenizer, "sft")
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
        prompt = tokenizer.question_ids(config.sft_prompt)
        written = speaker.generate(prompt, Sampling(seed=config.seed + 1, max=60))
        sample = tokenizer.decode(written).replace("\n", "\n    ")
        tqdm.write(
            f"第 {step} 步 · 检验损失 {loss:.3f} · 每字 {bpc:.3f} 比特\n"
            f"    问：{config.sft_prompt}  答：{sample}"
        )
        return {"val_loss": loss, "val_bpc": bpc}

    # ---------- 4. 训练 ----------
    save_config(config, out_dir / "sft" / "config.json")
    metrics = Metrics(out_dir / "sft")
    print("第一步之前要编译，约一分钟……" if device.compile else "开始训练……")
    result = check(0, everything=False)
    print(
        f"微调之前，对助手的话的损失是 {result['val_loss']:.2f}（全凭瞎猜是 ln V = "
        f"{math.log(config.vocab_size):.2f}）"
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
            raise UserError(
                f"第 {step + 1} 步的损失或梯度不是有限的数；请减小 --lr（{config.sft_lr}）"
            )

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
        bar.set_postfix_str(f"损失 {loss:.3f}，{speed:.0f} 个回答的词元/秒")
        row = {
            "step": step + 1, "tokens": tokens, "train_loss": loss, "lr": config.sft_lr * factor,
            "grad_norm": norm, "tokens_per_second": speed,
        }  # fmt: skip

        # 4.6 每隔一段：检验、采样、保存
        last = step + 1 == max_steps
        if last or (step + 1) % eval_every == 0:
            row |= (result := check(step + 1, everything=last))
            save(checkpoint_path, model, config, tokenizer, stage="sft", step=step + 1, **result)
        metrics.write(**row)
    bar.close()

    # ---------- 5. 收尾 ----------
    metrics.draw()
    print(
        f"完成，用时 {metrics.minutes():.1f} 分钟。\n"
        f"  检查点    {checkpoint_path}\n"
        f"  损失曲线  {metrics.picture}\n"
        f"  记录      {metrics.path}\n"
        f"接下来：\n  python sft_chat.py --checkpoint {checkpoint_path}"
    )


if __name__ == "__main__":
    run_script(main)
