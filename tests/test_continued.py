"""增量预训练：从学过的开始学新的，掺一些旧的；两份语料上都检验；语料少，就少走几步。"""

import itertools
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from scripts import (
    LITTLE,
    LITTLE_STEPS,
    QUICK,
    Running,
    assert_same_run,
    last_step,
    metrics,
    run,
    run_two,
)

from config import PRESETS, Config, UserError
from dataset import PretrainBatches, Replay, rows_of_step
from engine.checkpoint import read, write
from settings import resolve
from settings.defaults import CONTINUED_GENTLER, MOST_EPOCHS, fewer_steps
from settings.lengths import make_room
from settings.resolve import Origin, load_config
from settings.stored import adopt, inherit

FRUIT = "苹果梨桃杏李枣柿柑橘柚橙蕉莓瓜葡萄樱桃石榴山楂"


def documents(n: int, start: int = 0) -> list[str]:
    """n 篇各不相同的短文，每篇约一百字。"""
    rng = np.random.default_rng(start)
    return ["".join(rng.choice(list(FRUIT), 96)) + f"第{i}篇" for i in range(start, start + n)]


def write_lines(path: Path, texts: list[str]) -> Path:
    """一行一个 {"text": …}。"""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def folder(little, tmp_path) -> Path:
    """一个工作目录：备好的内置语料，一份新语料 new.jsonl；起点在 start/pretrain.pt。"""
    (tmp_path / "data").symlink_to(little / "data")
    (tmp_path / "start").mkdir()
    shutil.copy(little / "out/tiny/pretrain.pt", tmp_path / "start/pretrain.pt")
    write_lines(tmp_path / "new.jsonl", documents(120))
    return tmp_path


MORE = ["--init_from", "start/pretrain.pt", "--data", "new.jsonl", *QUICK]
OLD = {"val_loss_old", "val_bpc_old"}

# ---------- 怎样掺 ----------


def batches(n_rows: int, first: int) -> PretrainBatches:
    """n_rows 行，每行两个词元，编号从 first 起。"""
    return PretrainBatches(np.arange(first, first + 2 * n_rows + 1, dtype=np.uint16), 2)


def test_an_epoch_is_every_new_row_and_the_wanted_number_of_old_ones():
    new, old = batches(30, 0), batches(11, 1000)
    mixed = Replay(new, old, 0.25, seed=3)
    assert (mixed.n_new, mixed.n_old, mixed.n_rows, mixed.seq_len) == (30, 10, 40, 2)
    epochs = [rows_of_step(epoch, 40, 40, 3, mixed.swap) for epoch in range(11)]
    olds = []
    for rows in epochs:
        assert sorted(row for row in rows if row < 30) == list(range(30))
        olds += sorted(row - 30 for row in rows if row >= 30)
    # 一遍十行，旧的共十一行：轮完一圈才再来，十一遍里每行恰好十次。
    assert sorted(olds) == sorted(list(range(11)) * 10)
    assert len({*olds[:10]}) == 10 and olds[:10] != olds[10:20]
    # 第几步用哪几行只看种子与步数：一步四行，拼起来与一步四十行的相同。
    small = [rows_of_step(step, 4, 40, 3, mixed.swap) for step in range(110)]
    assert [*itertools.chain(*small)] == [*itertools.chain(*epochs)]


def test_the_rows_of_both_come_out_in_the_order_asked_for():
    new, old = batches(3, 0), batches(5, 1000)
    mixed = Replay(new, old, 0.5, seed=0)
    batch = mixed.get([3 + 4, 0, 3 + 1])
    assert batch.ids.tolist() == [[1008, 1009], [0, 1], [1002, 1003]]
    assert batch.targets.tolist() == [[1009, 1010], [1, 2], [1003, 1004]]
    assert batch.positions is None
    assert set(mixed.tokens.tolist()) == {*range(7), *range(1000, 1011)}


@pytest.mark.parametrize(("share", "n_old"), [(0, 0), (1e-9, 1), (0.1, 3), (0.9, 270)])
def test_any_share_above_zero_replays_something(share, n_old):
    mixed = Replay(batches(30, 0), batches(7, 1000), share, seed=0)
    assert mixed.n_old == n_old
    assert (1000 in mixed.tokens) == (share > 0)
    rows = rows_of_step(0, mixed.n_rows, mixed.n_rows, 0, mixed.swap)
    assert mixed.get(rows).ids.shape == (mixed.n_rows, 2)


# ---------- 设置 ----------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(resolve, "has_cuda", lambda: False)


def test_the_shape_is_the_checkpoints_and_the_learning_rate_is_gentler(no_gpu):
    source, _ = load_config(
        "pretrain", ["--n_layers", "5", "--n_experts", "4", "--n_active", "2", "--lr", "0.1",
                     "--val_fraction", "0.1", "--data", "old.jsonl"]
    )  # fmt: skip
    config, origins = load_config("pretrain", ["--init_from", "x.pt", "--data", "new.jsonl"])
    inherit(config, origins, source, "x.pt", "pretrain")
    assert (config.n_layers, config.n_experts, config.router_scale) == (5, 4, 1.0)
    assert config.lr == pytest.approx(0.1 / CONTINUED_GENTLER)
    assert config.sft_lr == pytest.approx(0.1 / 5)  # 将来微调，与从头练的一样
    assert (config.replay_data, origins["replay_data"]) == ("old.jsonl", Origin.CHECKPOINT)
    assert config.val_fraction == 0.1  # 旧语料留出的，正是它没学过的那些
    again, origins = load_config("pretrain", ["--init_from", "y.pt", "--val_fraction", "0.2"])
    inherit(again, origins, config, "y.pt", "pretrain")
    assert again.lr == config.lr and again.sft_lr == config.sft_lr  # 不再除一次
    assert (again.val_fraction, again.replay_data) == (0.2, "new.jsonl")
    given, origins = load_config("pretrain", ["--init_from", "x.pt", "--lr", "0.3"])
    inherit(given, origins, source, "x.pt", "pretrain")
    assert given.lr == 0.3
    tuned, origins = load_config("sft", [])
    inherit(tuned, origins, source, "x.pt")
    assert tuned.data == "old.jsonl"  # 微调的检查点也记得预训练读过什么
    other, origins = load_config("pretrain", ["--init_from", "x.pt", "--n_layers", "4"])
    with pytest.raises(UserError, match="n_layers 指定为 4，检查点里是 5"):
        inherit(other, origins, source, "x.pt", "pretrain")


@pytest.mark.parametrize(
    ("stage", "flags", "part"),
    [
        ("pretrain", ["--replay", "0.1"], "预训练的 replay 要同时用 --init_from 写明起点"),
        ("pretrain", ["--replay_data", "x"], "预训练的 replay_data 要同时用 --init_from"),
        ("sft", ["--replay", "1"], "replay 不能小于 0，要小于 1"),
        ("pretrain", ["--init_from", "x", "--replay", "1"], "replay 不能小于 0，要小于 1"),
        ("pretrain", ["--init_from", "x", "--replay", "nan"], "replay 不能小于 0，要小于 1"),
        ("pretrain", ["--init_from", " "], "init_from 不能是空的"),
        ("pretrain", ["--init_from", "x", "--replay_data", ""], "replay_data 不能是空的"),
    ],
)
def test_replaying_without_a_start_is_refused(no_gpu, stage, flags, part):
    with pytest.raises(UserError) as caught:
        load_config(stage, flags)
    assert part in str(caught.value)


def test_only_fine_tuning_has_a_start_by_default(no_gpu):
    config, origins = load_config("pretrain", [])
    assert (config.init_from, config.replay, config.replay_data) == (None, 0.0, None)
    config, origins = load_config("sft", [])
    assert (config.init_from, origins["init_from"]) == ("out/tiny/pretrain.pt", Origin.AUTO)
    edited = Config(init_from="x.pt", replay=0.1)
    assert load_config("pretrain", [], edited)[0].init_from == "x.pt"


def test_how_much_is_replayed_cannot_change_while_resuming(no_gpu):
    source, _ = load_config("pretrain", ["--init_from", "x.pt", "--replay", "0.1"])
    config, origins = load_config("pretrain", ["--resume", "--replay_data", "moved.jsonl"])
    adopt(config, origins, source, Path("m.pt"))
    assert (config.replay, config.replay_data) == (0.1, "moved.jsonl")
    config, origins = load_config("pretrain", ["--resume", "--replay", "0.2"])
    with pytest.raises(UserError, match=r"不能改 replay（0\.1 → 0\.2）"):
        adopt(config, origins, source, Path("m.pt"))


# ---------- 练 ----------


def test_training_goes_on_from_what_was_learned_and_both_corpora_are_examined(folder, little):
    learned = metrics(little / "out/tiny", "pretrain")[-1]  # 最后一次检验用了 5120 个词元
    out, _ = run(folder, "pre_train.py", *MORE, "--max_steps", "8", "--out_dir", "out/new",
                 "--eval_tokens", "5120")  # fmt: skip
    assert f"起点：start/pretrain.pt（预训练 {LITTLE_STEPS['pre_train.py']} 步" in out
    assert "接着学之前，在这份语料上的损失是" in out and "没训练过的模型" not in out
    assert out.count(" · 旧语料 ") == 2
    rows = metrics(folder / "out/new", "pretrain")
    # 参数原样取来，连没见过的词元合用的那一行也没有动：旧语料上的损失与起点的相同。
    assert rows[0]["val_loss_old"] == pytest.approx(learned["val_loss"], rel=1e-5)
    assert rows[0]["val_bpc_old"] == pytest.approx(learned["val_bpc"], rel=1e-5)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 1  # 新的学得到
    assert {*rows[-1]} >= OLD
    saved = read(folder / "out/new/pretrain.pt")
    assert saved["config"]["lr"] == pytest.approx(PRESETS["tiny"]["lr"] / CONTINUED_GENTLER)
    assert saved["config"]["n_layers"] == 2  # little 的形状，不是 tiny 的
    assert {"train_sha256", "val_sha256", "old_train_sha256", "old_val_sha256", "format"} <= {
        *saved["data"]
    }
    out, _ = run(folder, "sft_train.py", "--init_from", "out/new/pretrain.pt", "--max_steps", "1",
                 "--out_dir", "out/sft", *QUICK)  # fmt: skip
    assert "起点：out/new/pretrain.pt" in out
    assert read(folder / "out/sft/sft.pt")["config"]["data"] == "new.jsonl"


def test_replayed_training_resumes_bitwise(folder):
    flags = [*MORE, "--replay", "0.3", "--max_steps", "12", "--eval_every", "4"]
    whole, out = folder / "out/whole", folder / "out/killed"
    said, _ = run(folder, "pre_train.py", *flags, "--out_dir", str(whole))
    assert "行新的、" in said
    script = Running(folder, "pre_train.py", *flags, "--out_dir", str(out), "--save_every", "0")
    assert script.until(lambda: last_step(out, "pretrain") >= 3)
    assert script.end(signal.SIGKILL) == -signal.SIGKILL
    shutil.rmtree(folder / "start")  # 接着练时用不到起点
    run(folder, "pre_train.py", "--resume", "--out_dir", str(out))
    assert_same_run(whole, out, "pretrain")
    assert {*metrics(out, "pretrain")[-1]} >= OLD


def test_replay_with_two_processes_gives_the_losses_of_one(folder):
    flags = [*MORE, "--replay", "0.3", "--max_steps", "4", "--eval_every", "2"]
    run(folder, "pre_train.py", *flags, "--out_dir", "out/one")
    run_two(folder, "pre_train.py", *flags, "--batch_size", "1", "--grad_accum", "2",
            "--out_dir", "out/two")  # fmt: skip
    one, two = (metrics(folder / "out" / name, "pretrain") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in ("train_loss", "val_loss", "val_loss_old"):
            assert (name in a) == (name in b)
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-3)


def test_anything_of_the_same_shape_can_be_the_start(folder, little):
    """微调过的、导入的、分了专家的。"""
    shutil.copy(little / "out/tiny/sft.pt", folder / "start/sft.pt")
    steps = ["--max_steps", "2", "--data", "new.jsonl", *QUICK]
    out, _ = run(folder, "pre_train.py", "--init_from", "start/sft.pt", *steps,
                 "--replay", "0.2", "--out_dir", "out/sft")  # fmt: skip
    assert "起点：start/sft.pt（微调 " in out and " · 旧语料 " in out and "留出的不同" not in out

    foreign = read(folder / "start/pretrain.pt")
    foreign["config"]["data"] = "没有记下"
    foreign |= {"optimizers": [], "data": {"train_sha256": "", "val_sha256": ""}}
    write(folder / "start/foreign.pt", foreign)
    out, _ = run(folder, "pre_train.py", "--init_from", "start/foreign.pt", *steps,
                 "--out_dir", "out/foreign")  # fmt: skip
    assert "起点：start/foreign.pt（预训练过，导入的）" in out and "旧语料读不了" in out
    out, _ = run(folder, "pre_train.py", "--init_from", "start/foreign.pt", *steps,
                 "--replay_data", "builtin", "--out_dir", "out/known")  # fmt: skip
    assert " · 旧语料 " in out and "留出的不同" not in out  # 它没有记下留出了哪些

    experts = [*LITTLE, "--n_experts", "4", "--n_active", "2", "--max_steps", "1", *QUICK]
    run(folder, "pre_train.py", *experts, "--out_dir", "out/moe")
    out, _ = run(folder, "pre_train.py", "--init_from", "out/moe/pretrain.pt", *steps,
                 "--replay", "0.2", "--out_dir", "out/more-moe")  # fmt: skip
    assert read(folder / "out/more-moe/pretrain.pt")["config"]["n_experts"] == 4


def test_the_start_is_not_overwritten_by_accident(folder):
    flags = [*MORE, "--max_steps", "1", "--out_dir", "start"]
    _, err = run(folder, "pre_train.py", *flags, code=2)
    assert "起点 start/pretrain.pt 就在要写的目录 start 里" in err
    assert "--out_dir start-more" in err


def test_a_corpus_that_cannot_be_read_is_needed_only_to_replay_it(folder):
    flags = [*MORE, "--replay_data", "gone.jsonl", "--max_steps", "2", "--out_dir", "out/new"]
    out, _ = run(folder, "pre_train.py", *flags)
    assert "旧语料读不了，忘了多少就看不到：找不到" in out and "gone.jsonl" in out
    assert not OLD & {*metrics(folder / "out/new", "pretrain")[-1]}
    write_lines(folder / "gone.jsonl", documents(50, start=500))  # 后来有了：那一次没有用它
    run(folder, "pre_train.py", "--resume", "--allow_changes", "--max_steps", "3",
        "--out_dir", "out/new")  # fmt: skip
    (folder / "gone.jsonl").unlink()
    _, err = run(folder, "pre_train.py", *flags, "--replay", "0.1", "--overwrite", code=2)
    assert "gone.jsonl" in err
    _, err = run(folder, "pre_train.py", *MORE, "--replay", "0.1", "--replay_data", "new.jsonl",
                 "--out_dir", "out/same", code=2)  # fmt: skip
    assert "新旧语料都是 new.jsonl，没有什么要回放" in err


def test_another_split_of_the_old_corpus_is_said(folder):
    run(folder, "pre_train.py", *MORE, "--max_steps", "1", "--out_dir", "out/new")
    write_lines(folder / "third.jsonl", documents(80, start=900))
    flags = ["--init_from", "out/new/pretrain.pt", "--data", "third.jsonl", *QUICK]
    out, _ = run(folder, "pre_train.py", *flags, "--max_steps", "1", "--out_dir", "out/same")
    assert "留出的不同" not in out
    flags += ["--val_fraction", "0.4"]
    out, _ = run(folder, "pre_train.py", *flags, "--max_steps", "1", "--out_dir", "out/other")
    assert "与 out/new/pretrain.pt 训练时留出的不同" in out


def test_a_changed_old_corpus_stops_only_a_run_that_replays_it(folder):
    old = write_lines(folder / "old.jsonl", documents(60, start=300))
    flags = [*MORE, "--replay_data", "old.jsonl", "--max_steps", "2"]
    run(folder, "pre_train.py", *flags, "--replay", "0.2", "--out_dir", "out/replay")
    run(folder, "pre_train.py", *flags, "--out_dir", "out/exam")
    write_lines(old, documents(70, start=300))
    more = ["--resume", "--allow_changes", "--max_steps", "3"]
    _, err = run(folder, "pre_train.py", *more, "--out_dir", "out/replay", code=2)
    assert "旧语料与 out/replay/pretrain.pt 训练时的不同" in err
    out, _ = run(folder, "pre_train.py", *more, "--out_dir", "out/exam")
    assert "旧语料与上次的不同：不影响训练" in out
    old.unlink()  # 没有了，也只是从此看不到忘了多少
    for step in ("4", "5"):
        more[-1] = step
        out, _ = run(folder, "pre_train.py", *more, "--out_dir", "out/exam")
        assert ("旧语料读不了" in out) == (step == "4")  # 说一次就够
    rows = metrics(folder / "out/exam", "pretrain")
    assert [{*row} >= OLD for row in rows if "val_loss" in row][-3:] == [True, False, False]


# ---------- 数据搬了家 ----------


def test_moved_data_says_where_the_path_came_from_and_how_to_give_another(folder):
    flags = [*MORE, "--max_steps", "2", "--replay", "0.2", "--out_dir", "out/new"]
    old = write_lines(folder / "old.jsonl", documents(60, start=300))
    run(folder, "pre_train.py", *flags, "--replay_data", "old.jsonl")
    more = ["--resume", "--allow_changes", "--max_steps", "3", "--out_dir", "out/new"]
    new = (folder / "new.jsonl").rename(folder / "elsewhere.jsonl")
    _, err = run(folder, "pre_train.py", *more, code=2)
    assert "这个路径是 out/new/pretrain.pt 里记着的，从现在的目录" in err
    assert "python pre_train.py --out_dir out/new --resume --data 新的路径" in err
    old.rename(folder / "old2.jsonl")
    _, err = run(folder, "pre_train.py", *more, "--data", str(new), code=2)
    assert "要回放的旧语料找不到" in err and "用 --replay_data 写出它现在的路径" in err
    assert "去掉 --replay" not in err  # 接着练时去不掉
    run(folder, "pre_train.py", *more, "--data", str(new), "--replay_data", "old2.jsonl")
    _, err = run(folder, "pre_train.py", "--data", "nope.jsonl", "--out_dir", "out/x", code=2)
    assert "里记着的" not in err  # 自己写错的，不怪检查点


def test_moved_conversations_too(folder):
    talks = [{"instruction": f"{t}？", "output": f"{t}。"} for t in documents(60)]
    lines = "".join(json.dumps(talk, ensure_ascii=False) + "\n" for talk in talks)
    (folder / "chat.jsonl").write_text(lines, encoding="utf-8")
    run(folder, "sft_train.py", "--init_from", "start/pretrain.pt", "--sft_data", "chat.jsonl",
        "--max_steps", "1", "--out_dir", "out/chat", "--val_fraction", "0.2", *QUICK)  # fmt: skip
    (folder / "chat.jsonl").rename(folder / "talks.jsonl")
    _, err = run(folder, "sft_train.py", "--resume", "--out_dir", "out/chat", code=2)
    assert "这个路径是 out/chat/sft.pt 里记着的" in err
    assert "python sft_train.py --out_dir out/chat --resume --sft_data 新的路径" in err
    run(folder, "sft_train.py", "--resume", "--out_dir", "out/chat", "--data", "talks.jsonl")


# ---------- 语料少 ----------


@pytest.mark.parametrize(
    ("n_rows", "steps"), [(1, 20), (8, 20), (9, 23), (80, 200), (400, 1000), (9999, 1000)]
)
def test_the_preset_reads_a_small_corpus_at_most_twenty_times(no_gpu, n_rows, steps):
    config, _ = load_config("pretrain", [])
    assert MOST_EPOCHS == 20 and config.batch_size * config.grad_accum == 8
    assert fewer_steps(config, config.max_steps, n_rows) == steps


HANDFUL = {20: documents(20), 2: documents(2, start=4)}
SMALL = ["--no-compile", "--dtype", "float32", "--dim", "32", "--n_layers", "1", "--n_heads", "2",
         "--n_kv_heads", "1", "--hidden_dim", "48", "--data", "my.jsonl", "--out_dir", "out/mine",
         "--val_fraction", "0.2"]  # fmt: skip


@pytest.mark.parametrize("n", [20, 2])
def test_a_handful_of_documents_simply_works(tmp_path, n):
    write_lines(tmp_path / "my.jsonl", HANDFUL[n])
    out, _ = run(tmp_path, "pre_train.py", *SMALL)
    assert "（语料只有 " in out and "预设的 1000 步要读 " in out and "、20 步）" in out
    rows = metrics(tmp_path / "out/mine", "pretrain")
    assert [row["step"] for row in rows] == list(range(21))
    assert sum("val_loss" in row for row in rows) == 11  # 开始之前一次，全程十次
    saved = read(tmp_path / "out/mine/pretrain.pt")
    assert saved["config"]["max_steps"] == saved["max_steps"] == 20
    out, _ = run(tmp_path, "pre_train.py", "--resume", "--out_dir", "out/mine")
    assert "已经走完 20 步，共 20 步" in out and "预设的" not in out
    # 自己写的步数，一步不减
    out, _ = run(tmp_path, "pre_train.py", *SMALL, "--max_steps", "30", "--overwrite")
    assert "预设的" not in out and last_step(tmp_path / "out/mine", "pretrain") == 30


def test_a_handful_of_conversations_simply_works(folder):
    talks = [{"instruction": f"{t}？", "output": f"{t}。"} for t in HANDFUL[2]]
    lines = "".join(json.dumps(talk, ensure_ascii=False) + "\n" for talk in talks)
    (folder / "chat.jsonl").write_text(lines, encoding="utf-8")
    flags = ["--init_from", "start/pretrain.pt", "--sft_data", "chat.jsonl",
             "--out_dir", "out/mine", "--no-compile", "--dtype", "float32",
             "--val_fraction", "0.2"]  # fmt: skip
    out, _ = run(folder, "sft_train.py", *flags)
    assert "（对话只有 " in out and "预设的 150 步要读 " in out and "、20 步）" in out
    assert read(folder / "out/mine/sft.pt")["config"]["sft_max_steps"] == 20


# ---------- 微调时回放 ----------


@pytest.fixture
def chats(folder):
    """二十段对话，四段长过一行。"""
    talks = [
        {"instruction": f"第 {n} 问？", "output": "答，" * (150 if n % 5 == 0 else 5) + "。"}
        for n in range(20)
    ]
    lines = "".join(json.dumps(talk, ensure_ascii=False) + "\n" for talk in talks)
    (folder / "chat.jsonl").write_text(lines, encoding="utf-8")
    return ["--init_from", "start/pretrain.pt", "--sft_data", "chat.jsonl", "--no-compile",
            "--dtype", "float32", "--val_fraction", "0.2", "--max_steps", "4"]  # fmt: skip


def test_fine_tuning_can_replay_what_was_read_and_examines_both(folder, chats):
    flags = [*chats, "--replay", "0.25", "--eval_every", "2", "--eval_tokens", "512"]
    out, _ = run(folder, "sft_train.py", *flags, "--out_dir", "out/whole")
    assert "行新的、" in out and out.count(" · 旧语料 ") == 3
    saved = read(folder / "out/whole/sft.pt")
    assert saved["config"]["replay_data"] == "builtin" and "old_val_sha256" in saved["data"]
    short = [*flags, "--out_dir", "out/part", "--save_every", "0"]
    script = Running(folder, "sft_train.py", *short)
    assert script.until(lambda: last_step(folder / "out/part", "sft") >= 1)
    assert script.end(signal.SIGKILL) == -signal.SIGKILL
    run(folder, "sft_train.py", "--resume", "--out_dir", "out/part")
    assert_same_run(folder / "out/whole", folder / "out/part", "sft")
    # 回放过的微调，不是增量预训练：接着它预训练，学习率仍减半
    run(folder, "pre_train.py", "--init_from", "out/whole/sft.pt", "--data", "new.jsonl",
        "--max_steps", "1", "--out_dir", "out/after", *QUICK)  # fmt: skip
    lr = read(folder / "out/after/pretrain.pt")["config"]["lr"]
    assert lr == pytest.approx(PRESETS["tiny"]["lr"] / CONTINUED_GENTLER)


def test_replaying_into_a_preset_that_does_not_isolate_documents(folder, chats):
    """预训练首尾相接的（wide 那样），对话却是分段的：回放的也分段。"""
    flags = [*chats, "--replay", "0.5", "--no-isolate_documents", "--no-whole_documents"]
    out, _ = run(folder, "sft_train.py", *flags, "--out_dir", "out/joined")
    assert "行新的、" in out


def test_rows_grow_until_conversations_fit(folder, chats):
    out, _ = run(folder, "sft_train.py", *chats, "--out_dir", "out/grown")
    assert "的对话长过 256 个词元：一行改为 512 个，一次 4 行" in out and "截掉" not in out
    config = read(folder / "out/grown/sft.pt")["config"]
    assert (config["seq_len"], config["batch_size"]) == (512, 4)
    out, _ = run(folder, "sft_train.py", *chats, "--seq_len", "256", "--out_dir", "out/cut")
    assert "段对话超过 256 个词元，末尾截掉了" in out and "一行改为" not in out


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([255] * 100, (256, 8)),  # 都放得下
        ([256] * 95 + [257] * 5, (256, 8)),  # 少数几段长的，不为它们改
        ([256] * 94 + [257] * 6, (512, 4)),
        ([500] * 10, (512, 4)),
        ([5000] * 10, (512, 4)),  # 再长，也只到模型最多看的
    ],
)
def test_the_length_of_a_row(no_gpu, lengths, expected):
    config, origins = load_config("sft", ["--preset", "tiny"])
    changed = make_room(config, origins, np.array(lengths))
    assert (config.seq_len, config.batch_size) == expected
    assert bool(changed) == (expected != (256, 8))
    given, origins = load_config("sft", ["--preset", "tiny", "--batch_size", "3"])
    make_room(given, origins, np.array(lengths))
    assert given.batch_size == 3


def test_own_conversations_on_top_of_the_general_ones(folder, chats, little):
    """起点是微调过的：回放的就是它学过的对话。"""
    shutil.copy(little / "out/tiny/sft.pt", folder / "start/sft.pt")
    flags = [
        *chats[2:7],
        "--max_steps",
        "4",
        "--init_from",
        "start/sft.pt",
        "--replay",
        "0.5",
        "--eval_tokens",
        "512",
    ]
    out, _ = run(folder, "sft_train.py", *flags, "--out_dir", "out/shop")
    saved = read(folder / "out/shop/sft.pt")
    assert (saved["config"]["replay_stage"], saved["config"]["replay_data"]) == ("sft", "builtin")
    assert " · 旧语料 " in out and "留出的不同" not in out
    learned = read(little / "out/tiny/sft.pt")["data"]
    assert saved["data"]["old_val_sha256"] == learned["val_sha256"]  # 检验的正是它没学过的对话
    run(folder, "sft_train.py", "--resume", "--out_dir", "out/shop")
    flags += ["--replay_stage", "pretrain", "--out_dir", "out/text"]
    run(folder, "sft_train.py", *flags)
    saved = read(folder / "out/text/sft.pt")
    learned = read(little / "out/tiny/pretrain.pt")["data"]
    assert saved["data"]["old_val_sha256"] == learned["val_sha256"]
    # 不回放，只看忘了多少：看的也是它学过的对话
    flags = [*chats[2:7], "--init_from", "start/sft.pt", "--replay_data", "builtin"]
    flags += ["--max_steps", "4", "--eval_tokens", "512", "--out_dir", "out/see"]
    out, _ = run(folder, "sft_train.py", *flags)
    saved = read(folder / "out/see/sft.pt")
    learned = read(little / "out/tiny/sft.pt")["data"]
    assert " · 旧语料 " in out and saved["data"]["old_val_sha256"] == learned["val_sha256"]
    _, err = run(folder, "sft_train.py", "--init_from", "start/sft.pt", "--replay", "0.5",
                 "--sft_data", "builtin", "--out_dir", "out/x", code=2)  # fmt: skip
    assert "新旧语料都是 builtin" in err
    _, err = run(folder, "pre_train.py", *MORE, "--replay_stage", "sft", code=2)
    assert "--replay_stage 只用于微调" in err
