"""训练的记录画成的两张图：每步的学习率与梯度，损失怎样降下来。"""

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from optimizer import learning_rate
from tools.draw.svg import BLUE, GREY, ORANGE, SOFT
from tools.draw.trained import Trained

# ---------- 1. 训练循环 ----------


def loop(trained: Trained) -> Figure:
    """默认的一次训练：每步的学习率，每步梯度的长度与截短的界线。"""
    rows = [r for r in trained.metrics() if "lr" in r]
    config = trained.speaker().config
    steps = [r["step"] for r in rows]
    n_steps = steps[-1]
    highest = max(r["lr"] for r in rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    left.plot(steps, [r["lr"] for r in rows], color=BLUE, label="记录里的学习率")
    some = range(0, n_steps, max(1, n_steps // 20))
    factors = [learning_rate(s, n_steps, config.warmup, config.decay) for s in some]
    left.plot([s + 1 for s in some], [highest * f for f in factors], "o", color=ORANGE,
              markersize=4, label="learning_rate() 算出的")  # fmt: skip
    left.axvspan(0, config.warmup * n_steps, color=SOFT[ORANGE])
    left.axvspan((1 - config.decay) * n_steps, n_steps, color=SOFT[BLUE], alpha=0.5)
    left.set(title="学习率：升温、平稳、下降", xlabel="步", ylim=(0, highest * 1.1))
    left.legend(frameon=False)
    norms = [r["grad_norm"] for r in rows]
    right.semilogy(steps, norms, color=BLUE, linewidth=0.9, label="梯度的长度")
    right.axhline(config.grad_clip, color=ORANGE, label=f"上限 {config.grad_clip:g}，超过的截短")
    over = sum(n > config.grad_clip for n in norms)
    right.set(title=f"梯度的长度：{len(norms)} 步里 {over} 步被截短", xlabel="步")
    right.legend(frameon=False)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.9, bottom=0.13, wspace=0.16)
    return figure


# ---------- 2. 预训练 ----------


def pretraining(trained: Trained) -> Figure:
    """损失曲线，旁边是几次检验时写出来的文字。"""
    rows = trained.metrics()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.15, 1))
    train = [(r["step"], r["train_loss"]) for r in rows if r.get("train_loss")]
    checks = [r for r in rows if r.get("val_loss")]
    left.plot(*zip(*train, strict=True), color=GREY, linewidth=0.8, label="训练（每步）")
    left.plot([r["step"] for r in checks], [r["val_loss"] for r in checks], "o-", color=BLUE,
              markersize=4, label="检验（没有训练过的文档）")  # fmt: skip
    left.set(xlabel="步", ylabel="损失（奈特每词元）", ylim=(3, 10.3))
    left.grid(alpha=0.25)
    left.legend(frameon=False)
    picked = sorted({round(i * (len(checks) - 1) / 5) for i in range(6)})
    right.axis("off")
    right.set(xlim=(0, 1), ylim=(0, 1))
    for number, i in enumerate(picked):
        row = checks[i]
        left.annotate(str(number + 1), (row["step"], row["val_loss"]), xytext=(0, 8),
                      textcoords="offset points", ha="center", color=ORANGE)  # fmt: skip
        y = 0.99 - number * 0.17
        right.text(0, y, f"{number + 1}", color=ORANGE, va="top")
        right.text(0.04, y, f"第 {row['step']} 步，{row['val_bpc']:.2f} 比特每字", va="top",
                   color="#555", fontsize=10)  # fmt: skip
        sample = row["sample"].split("\n")[0]
        sample = sample[:20] + ("……" if len(sample) > 20 else "")
        right.text(0.04, y - 0.065, f"守株待兔：{sample}", va="top", fontsize=11)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.97, bottom=0.12, wspace=0.06)
    return figure
