"""蒸馏：损失与手算的、与整张词表的相同；没有老师时逐位不变；练出来的检查点哪里都能用。"""

import math
import os
import re
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from losses import loss_of
from scripts import LITTLE, LITTLE_STEPS, QUICK, Running, assert_same_run, last_step, run
from test_export import random_model as plain_model
from test_export import save

from config import Config, UserError
from dataset import IGNORE, Batch
from engine.shared_row import SharedRow, tie_unused_rows
from examples.distill import distill
from examples.distill.distill import Options, TaughtLoss, Teacher, divergence, split_flags
from model import Transformer
from optimizer import build_optimizer

SMALL = Config(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, max_len=16, device="cpu",
    dtype="float32", compile=False, lr=0.01, muon_momentum=0.9, residual_lr_scale=1.0,
    vocab_size=640, n_experts=0, n_active=0, router_scale=1.0,
)  # fmt: skip
WORDS = np.arange(200, dtype=np.uint16)  # 学生的语料只用到这些编号


def random_model(seed: int, **shape) -> Transformer:
    """参数全是随机数的小模型：打分有大有小，考得出对错；shape 是要改的字段。"""
    torch.manual_seed(seed)
    model = Transformer(replace(SMALL, **shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def state_of(model: Transformer) -> dict[str, torch.Tensor]:
    """参数与缓冲区，不进检查点的也在内。"""
    return dict([*model.named_parameters(), *model.named_buffers()])


def a_batch(seed: int = 1) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(200, (3, 8), generator=g) for _ in range(2))
    targets[torch.rand(3, 8, generator=g) < 0.3] = IGNORE
    return Batch(ids, targets)


def gradients(loss: torch.Tensor, model: Transformer) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---------- 1. 损失 ----------


def test_divergence_is_what_the_formula_says():
    """¼ · ln(¼ / ½) + ¼ · ln(¼ / ¼) + ½ · ln(½ / ¼) = ¼ · ln 2；不算损失的位置不算。"""
    student = torch.tensor([[[0.5, 0.25, 0.25]] * 3]).log()
    teacher = torch.tensor([[[0.25, 0.25, 0.5]] * 3]).log()
    targets = torch.tensor([[0, IGNORE, 2]])
    assert divergence(student, teacher, targets).item() == pytest.approx(2 * 0.25 * math.log(2))


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (0.9, 2.0), (1.0, 4.0)])
def test_the_loss_is_the_weighted_sum_over_the_whole_vocabulary(alpha, tau):
    """照公式在整张词表上直接写一遍；老师比学生宽。"""
    student, teacher, batch = random_model(0), random_model(1, dim=32), a_batch()
    with torch.no_grad():
        soft = (teacher(batch.ids) / tau).softmax(-1)
        kl = (soft * (soft.log() - (student(batch.ids) / tau).log_softmax(-1))).sum(-1)
        hard = loss_of(student, batch)
    expected = (1 - alpha) * hard + alpha * tau**2 * kl[batch.targets != IGNORE].sum()
    found = lesson_of(teacher, student, alpha=alpha, temperature=tau)(batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def lesson_of(teacher, student, shared=None, **options) -> TaughtLoss:
    """听这位老师的损失。"""
    lesson = TaughtLoss(student, Teacher(teacher, Options(**options)))
    lesson.shared_row = shared
    lesson.teacher.prepare(shared)
    return lesson


def shared_of(model: Transformer) -> SharedRow:
    return tie_unused_rows(model, WORDS, newborn=True)


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("same_corpus", [True, False])
def test_sharing_a_row_teaches_the_same(same_corpus, tau):
    """学生合用一行时，梯度与在整张词表上算的相同：老师自己也合用着，或者每个词元都见过。

    老师也合用着，损失的数也相同；都见过的，只差一个与学生无关的常数：它在合用的词元里偏爱谁。
    """
    student, teacher, batch = random_model(0), random_model(1), a_batch()
    shared = shared_of(student)
    if same_corpus:
        shared_of(teacher)
    found = []
    for way in (None, shared):
        lesson = lesson_of(teacher, student, way, alpha=0.7, temperature=tau)
        loss = lesson(batch)
        found.append((loss.item(), gradients(loss, student)))
    columns = len(lesson.teacher.table[1])
    assert columns == (len(shared.rows) if same_corpus else SMALL.vocab_size)
    (whole, wanted), (compact, got) = found
    assert (compact == pytest.approx(whole, rel=1e-5)) == same_corpus
    table, own = wanted.pop("embedding.weight"), got.pop("embedding.weight")
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=2e-4, rtol=1e-3)
    alone = shared.rows[:-1]
    torch.testing.assert_close(own[alone], table[alone], atol=2e-4, rtol=1e-3)
    # 合用的那一行走的，是每个词元自己会走的路的平均。
    mean = table[shared.members].mean(0)
    torch.testing.assert_close(own[shared.rows[-1]], mean, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("sharing", [False, True])
def test_nothing_to_learn_from_oneself(sharing, tau):
    student, teacher = random_model(0), random_model(0)
    shared = None
    if sharing:
        shared = shared_of(student)
        shared_of(teacher)
    loss = lesson_of(teacher, student, shared, alpha=1.0, temperature=tau)(a_batch())
    assert abs(loss.item()) < 1e-5
    assert max(g.abs().max() for g in gradients(loss, student).values()) < 1e-4
    other = lesson_of(random_model(2), student, shared, alpha=1.0)(a_batch())
    assert max(g.abs().max() for g in gradients(other, student).values()) > 1


def test_the_gradient_is_the_slope():
    """沿梯度的方向走一小步，损失的变化正是梯度说的那么多。"""
    student, batch = random_model(0), a_batch()
    shared = shared_of(student)
    lesson = lesson_of(random_model(1, dim=32), student, shared, alpha=0.6, temperature=2.0)
    found = gradients(lesson(batch), student)
    # 代表的那一行收到的只是它自己的一份，动它却等于动了全部：这里不动它。
    found["embedding.weight"][shared.rows[-1]] = 0
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in found.values()))
    h, ends = 1e-3, []
    for sign in (1, -2):  # 前进一步，再退回两步
        with torch.no_grad():
            for name, p in student.named_parameters():
                p += sign * h * found[name] / norm
        ends.append(lesson(batch).item())
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize("experts", [0, 4])
def test_the_teacher_does_not_change_and_is_not_asked_when_evaluating(experts):
    """专家混合的老师也一样：它那份负载的统计，不因为给学生讲课而变。"""
    student, batch = random_model(0), a_batch()
    teacher = random_model(1, n_experts=experts, n_active=min(experts, 2))
    before = {name: value.clone() for name, value in state_of(teacher).items()}
    lesson = lesson_of(teacher, student, alpha=0.5)
    optimizer = build_optimizer(student, SMALL, 0.01)
    losses = []
    for _ in range(20):
        losses.append(lesson(batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in state_of(teacher).items())
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(lesson.eval()(batch), loss_of(student, batch))


# ---------- 2. 命令行 ----------


def test_flags_are_split_with_their_values():
    argv = ["--alpha", "0.3", "--lr", "0.1", "--teacher=a b.pt", "--no-compile", "x", "--alpha"]
    mine, rest = split_flags(argv)
    assert mine == ["--alpha", "0.3", "--teacher=a b.pt", "--alpha"]
    assert rest == ["--lr", "0.1", "--no-compile", "x"]


BAD = [
    ("--teacher no.pt", "找不到老师 no.pt；请先练一个大的：python pre_train.py --preset wide"),
    ("--teacher out/tiny", "out/tiny 是目录；请写出检查点的文件名"),
    ("--teacher out/tiny/sft.pt", "老师 out/tiny/sft.pt 已经微调过"),
    ("--vocab_size 21376", "词表大小是 21248，学生的是 21376"),
    ("--max_len 1024 --seq_len 1024", "至多看 512 个词元，一行却有 1024 个"),
    ("--alpha 1.5", "--alpha 要在 0 与 1 之间，得到的是 1.5"),
    ("--temperature 0", "--temperature 要在 0.1 与 100 之间，得到的是 0.0"),
    ("--alpha", "参数 --alpha 后面要跟一个值"),
    ("--alfa 1", "没有参数 --alfa"),
    ("--batch_size auto", "没有算上老师占的显存"),
]


def start(monkeypatch, folder: Path, args: str) -> None:
    """在同一个进程里运行，免得每条都等导入。"""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["distill", *args.split()])
    distill.main()


@pytest.mark.parametrize(("args", "sentence"), BAD, ids=[b[0] for b in BAD])
def test_what_cannot_be_taught_is_one_clear_sentence(args, sentence, trained, monkeypatch):
    default = "" if "--teacher" in args else "--teacher out/tiny/pretrain.pt "
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        start(monkeypatch, trained[0], default + args)
    assert "\n" not in str(error.value).removeprefix("配置有问题：\n")
    assert not (trained[0] / "out/distill").exists()


def test_a_teacher_of_another_tokenizer_is_refused(trained, tmp_path, monkeypatch):
    checkpoint = torch.load(trained[0] / "out/tiny/pretrain.pt", weights_only=True)
    torch.save(checkpoint | {"tokenizer": "别的"}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="是用另一个分词器训练的"):
        start(monkeypatch, tmp_path, "--teacher other.pt")


def test_going_on_asks_what_the_checkpoint_says(trained, tmp_path, monkeypatch):
    """接着练时，老师教得了教不了，看检查点里的一行多长，不看默认的。"""
    save(tmp_path / "short.pt", plain_model(), stage="pretrain")  # 至多看 128 个词元，正好一行
    (tmp_path / "out/tiny").mkdir(parents=True)  # 不在大家共用的目录里：它上了锁，别的测试会撞上
    os.link(trained[0] / "out/tiny/pretrain.pt", tmp_path / "out/tiny/pretrain.pt")
    went_on = []
    monkeypatch.setattr(distill.pre_train, "main", lambda **given: went_on.append(given))
    short = f"--teacher {tmp_path / 'short.pt'} --out_dir out/tiny"
    start(monkeypatch, tmp_path, f"{short} --resume")
    assert len(went_on) == 1
    with pytest.raises(UserError, match="一行却有 256 个"):
        start(monkeypatch, tmp_path, short)


def test_help_names_its_own_flags_and_where_the_others_are(monkeypatch, capsys, tmp_path):
    start(monkeypatch, tmp_path, "--help")
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("teacher", "alpha", "temperature"))
    assert "python pre_train.py --help" in shown


# ---------- 3. 从头到尾 ----------

PUPIL = ["--dim", "32", "--n_heads", "1", "--n_layers", "2", "--hidden_dim", "64", "--max_steps",
         "6", "--alpha", "0.9", "--temperature", "2", "--teacher", "out/tiny/pretrain.pt",
         *QUICK]  # fmt: skip


@pytest.fixture(scope="module")
def taught(trained, tmp_path_factory) -> tuple[Path, str]:
    """读者的 tiny 教一个更小的；返回输出目录与印出的话。"""
    out = tmp_path_factory.mktemp("taught")
    return out, run(trained[0], distill.PROGRAM, *PUPIL, "--out_dir", str(out))[0]


def test_without_listening_it_is_the_plain_training(trained, little, tmp_path):
    """α = 0：参数、优化器、记录与样本都与 pre_train.py 的逐位相同。"""
    flags = ("--teacher", "out/tiny/pretrain.pt", "--alpha", "0", "--out_dir", str(tmp_path))
    steps = ("--max_steps", str(LITTLE_STEPS["pre_train.py"]), *QUICK, *LITTLE)
    run(trained[0], distill.PROGRAM, *flags, *steps)
    assert_same_run(little / "out/tiny", tmp_path, "pretrain")


def test_the_result_goes_on_to_chat_and_finetuning(trained, taught):
    """最后印出的两条命令原样就能用。"""
    out, text = taught
    assert re.search(r"老师：out/tiny/pretrain.pt（5\.8 M 参数，预训练 16 步，检验 \d", text)
    assert "损失：0.1 · 交叉熵 + 0.9 · τ² · KL，温度 τ = 2\n" in text
    chat, sft = (
        shlex.split(line.partition("    ")[0])
        for line in re.findall(r"^  python (\w+\.py .*)$", text, re.M)
    )
    stdout, _ = run(trained[0], *chat, "--prompt", "守株待兔：", "--max", "5")
    assert stdout.startswith("守株待兔：")
    run(trained[0], *sft, "--max_steps", "2", "--eval_tokens", "512", "--batch_size", "2")
    assert torch.load(out / "sft.pt", weights_only=True)["config"]["dim"] == 32


@pytest.mark.slow
def test_stopping_says_how_to_go_on_and_the_end_is_the_same(trained, taught, tmp_path):
    """中断之后照它说的命令接着练：老师还在，结果与不中断的逐位相同。"""
    running = Running(trained[0], distill.PROGRAM, *PUPIL, "--out_dir", str(tmp_path))
    assert running.until(lambda: last_step(tmp_path, "pretrain") >= 2)
    assert running.end(signal.SIGTERM) == 128 + signal.SIGTERM
    said = re.search(r"python -m (examples\.distill\.distill .* --resume)", running.text())
    program, *rest = shlex.split(said[1])
    assert "--alpha=0.9" in rest
    run(trained[0], program, *rest)
    assert_same_run(taught[0], tmp_path, "pretrain")
