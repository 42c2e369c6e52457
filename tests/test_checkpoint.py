"""检查点：写得不会坏，坏了认得出，接得上；已有的训练不会悄悄被盖掉。"""

import pickle
import resource
import signal
import zipfile
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import Config, UserError
from engine import checkpoint
from engine import saver as saver_module
from engine.checkpoint import (
    Damaged,
    capture,
    load,
    previous_of,
    read,
    restore,
    summary,
    write,
)
from engine.device import Device
from engine.distributed import World, whole
from engine.progress import Progress, RandomNumbers
from engine.run import Run
from engine.run_folder import RunFolder
from engine.saver import Saver
from loss import Loss
from model import Transformer
from optimizer import build_optimizer
from settings.resolve import Origin, load_config
from settings.stored import inherit
from tokenizer import Tokenizer

SMALL = Config(
    preset="tiny", dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=24, n_experts=0,
    n_active=0, max_len=16, seq_len=8, batch_size=2, grad_accum=1, device="cpu", dtype="float32",
    compile=False, lr=0.01, sft_lr=0.002, max_steps=10, muon_momentum=0.9, isolate_documents=True,
    whole_documents=False, residual_lr_scale=1.0,
    router_scale=1.0, out_dir="out/x", data="builtin",
)  # fmt: skip
CARD = {"train_sha256": "a" * 64, "val_sha256": "b" * 64, "format": 2}


def trained(config=SMALL, steps=3):
    """一个真的走过几步的小模型，和它的优化器。"""
    torch.manual_seed(0)
    model = Transformer(config)
    optimizer = build_optimizer(model, config, config.lr)
    for _ in range(steps):
        model(torch.randint(200, (2, 8))).float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def snapshot(tokenizer, config=SMALL, stage="pretrain", step=3, model=None):
    """一个完整的检查点。"""
    made, optimizer = trained(config)
    parts = {"model": model or made, "optimizers": optimizer, "rng": RandomNumbers(),
             "progress": Progress(step=step, val_bpc=5.0)}  # fmt: skip
    return capture(
        parts, stage=stage, config=config, tokenizer=tokenizer, max_steps=10,
        device=Device(config).describe(), data=CARD | {"epoch": 0, "row": 0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole_file(tokenizer, tmp_path_factory) -> Path:
    """一个好的检查点。"""
    path = tmp_path_factory.mktemp("whole") / "m.pt"
    write(path, snapshot(tokenizer))
    return path


def same(a, b) -> bool:
    """嵌套的字典、列表与张量逐位相同。"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---------- 一个文件 ----------


def test_a_missing_checkpoint_names_the_next_command(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"请先运行 python pre_train\.py$"):
        load(Path("out/tiny/pretrain.pt"), tokenizer)
    with pytest.raises(UserError, match=r"请先运行 python pre_train\.py --out_dir '我 的'$"):
        load(Path("我 的/pretrain.pt"), tokenizer)
    other = tmp_path / "out/wide/pretrain.pt"
    other.parent.mkdir(parents=True)
    other.touch()
    with pytest.raises(UserError, match=r"现有的是 out/wide/pretrain\.pt.*--init_from"):
        load(Path("out/tiny/pretrain.pt"), tokenizer)
    with pytest.raises(UserError, match=r"请检查路径"):  # 打错了的名字，不劝人去训练
        load(tmp_path / "nope.pt", tokenizer)
    with pytest.raises(UserError, match=r"请先运行 python sft_train\.py"):
        load(Path("out/tiny/sft.pt"), tokenizer)  # 预训练的检查点代替不了
    with pytest.raises(UserError, match=r"是目录.*out/wide/pretrain\.pt"):
        load(Path("out/wide"), tokenizer)


def test_checkpoint_describes_itself_and_loads_equal(tokenizer, tmp_path):
    path = tmp_path / "a" / "m.pt"
    model, *_ = trained()
    write(path, snapshot(tokenizer, model=model, step=5))
    again, config, found = load(path, tokenizer)
    assert config == SMALL
    assert (found["stage"], found["progress"]["step"], found["max_steps"]) == ("pretrain", 5, 10)
    assert set(found["versions"]) == {"python", "torch", "numpy", "线程", "指令集"}
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert list(path.parent.iterdir()) == [path]  # 没有留下临时文件


def test_whatever_a_tensor_looks_like_in_memory_it_is_read_back(tokenizer, tmp_path):
    """转置过的、合用一块内存的、空的、从中间起的：写下的都要读得回来，否则一次训练就白费了。"""
    F = torch.randn
    flat = F(60)
    shapes = {"转置": F(3, 4).t(), "切片": F(4, 4)[:, 1], "一行": F(1, 4).t(), "空的": F(0, 3),
              "一个数": F(()), "从中间起": flat[7:31].view(4, 6), "同一块": flat[:30]}  # fmt: skip
    state = {i: {"momentum": x} for i, x in enumerate(shapes.values())}
    saved = whole(snapshot(tokenizer) | {"optimizers": [{"state": state}, {"state": {}}]})
    saved["model"] = OrderedDict(saved["model"])
    saved["model"]._metadata = OrderedDict({"": {"version": 1}})  # 旧的程序连它一起存
    write(tmp_path / "m.pt", saved)
    for mapped in (False, True):
        found = read(tmp_path / "m.pt", mmap=mapped)
        assert same(found["optimizers"][0]["state"], state)
        assert same(found["model"], dict(saved["model"]))


def test_an_earlier_one_keeps_the_values_it_was_trained_with(tokenizer, tmp_path):
    """那时还没有这几项设置：接着练要用当时的值，不是现在的默认值。"""
    path, snap = tmp_path / "m.pt", snapshot(tokenizer)
    for name in ("muon_momentum", "adam_beta1", "adam_beta2", "router_scale", "muon_heads",
                 "muon_beta2", "residual_lr_scale", "whole_documents"):  # fmt: skip
        del snap["config"][name]
    write(path, snap)
    _, config, _ = load(path, tokenizer)
    assert (config.muon_momentum, config.adam_beta1, config.adam_beta2) == (0.95, 0.9, 0.95)
    assert config.router_scale is None  # 没有专家，也就没有路由器
    assert not config.muon_heads and not config.whole_documents
    assert (config.muon_beta2, config.residual_lr_scale) == (0.0, 1.0)
    optimizer = build_optimizer(Transformer(config), config, 0.01)
    assert optimizer.muon.param_groups[0]["momentum"] == 0.95
    assert optimizer.adamw.param_groups[0]["betas"] == (0.9, 0.95)


def test_where_it_came_from_says_whether_it_was_finished(tokenizer):
    """没练完的，要说练了几分之几：聊得不好，多半是因为这个。"""
    snap = snapshot(tokenizer)
    snap["progress"] |= {"step": 10, "val_bpc": 5.5}
    assert summary(snap) == "预训练 10 步，检验 5.500 比特每字"
    snap["progress"]["step"] = 4
    assert summary(snap) == "预训练只练了 4/10 步，最近一次检验 5.500 比特每字"
    snap["progress"] |= {"step": 0, "val_bpc": float("inf")}  # 开头存下的那一份
    assert summary(snap) == "预训练只练了 0/10 步，还没有检验过"


def test_the_one_before_is_kept_until_the_new_one_is_whole(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    for step in (1, 2, 3):
        write(path, snapshot(tokenizer, step=step))
    steps = [read(p)["progress"]["step"] for p in (path, previous_of(path))]
    assert steps == [3, 2]

    def no_links(*names):
        raise OSError("这个文件系统没有硬链接")

    monkeypatch.setattr(checkpoint.os, "link", no_links)
    write(path, snapshot(tokenizer, step=4))
    assert [read(p)["progress"]["step"] for p in (path, previous_of(path))] == [4, 3]


@pytest.mark.parametrize("moment", ["torch.save", "fsync", "link", "replace", "folder"])
def test_power_cut_at_any_moment_leaves_a_good_one(tokenizer, tmp_path, monkeypatch, moment):
    """写到任何一处断电：pretrain.pt 仍在，而且是完好的；要么旧，要么新。"""
    path = tmp_path / "m.pt"
    for step in (1, 2):
        write(path, snapshot(tokenizer, step=step))

    class PowerCut(BaseException):
        pass

    def cut(*args, **kwargs):
        if moment == "torch.save":
            args[1].write(b"half")
        raise PowerCut

    where = {"torch.save": (checkpoint.torch, "save"), "fsync": (checkpoint.os, "fsync"),
             "link": (checkpoint.os, "link"), "replace": (checkpoint.os, "replace"),
             "folder": (checkpoint, "sync_folder")}  # fmt: skip
    monkeypatch.setattr(*where[moment], cut)
    with pytest.raises(PowerCut):
        write(path, snapshot(tokenizer, step=3))
    monkeypatch.undo()
    assert read(path)["progress"]["step"] == (3 if moment == "folder" else 2)
    write(path, snapshot(tokenizer, step=4))  # 残留的临时文件不碍事
    assert read(path)["progress"]["step"] == 4


def test_full_disk_keeps_the_previous_checkpoint(tokenizer, tmp_path):
    """真的写到一半写不下去：文件大小受限，与磁盘写满走的是同一条路。"""
    path = tmp_path / "m.pt"
    write(path, snapshot(tokenizer, step=1))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="腾出空间"):
            write(path, snapshot(tokenizer, step=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---------- 坏的与恶意的文件 ----------


@given(st.data())
def test_a_damaged_file_is_named_or_still_says_the_same(whole_file, tmp_path_factory, data):
    """翻转、截断、删掉、插入任意的字节：要么说它坏了，要么内容一个比特也没变。"""
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    content = bytearray(whole_file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1), label="位置")
    match data.draw(st.sampled_from(["翻转", "截断", "删掉", "插入"]), label="怎样坏"):
        case "翻转":
            content[at] ^= 1 << data.draw(st.integers(0, 7), label="第几个比特")
        case "截断":
            del content[at:]
        case "删掉":
            del content[at : at + data.draw(st.integers(1, 5000), label="几个字节")]
        case "插入":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=100), label="什么")
    path.write_bytes(content)
    try:
        found = read(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert same(found, read(whole_file))


@given(st.binary(max_size=3000))
@example(b"")
@example(b"PK\x05\x06" + bytes(18))  # 空的 zip
def test_any_bytes_are_refused_with_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.pt"
    path.write_bytes(content)
    with pytest.raises(Damaged, match="不是完好的检查点"):
        read(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
SPOTS = ["format", "stage", "config", "tokenizer", "model", "progress", "max_steps", "data",
         "versions", "config.dim", "config.n_layers", "config.max_len", "config.lr",
         "config.n_heads", "config.rope_theta", "progress.step", "model.embedding.weight",
         "model.blocks.0.attention.key.weight", "optimizers", "rng", "shared_row"]  # fmt: skip


@settings(max_examples=settings().max_examples // 2)  # 每个都要建一次模型
@given(st.sampled_from(SPOTS), VALUES | st.just("删掉"))
@example("config.n_layers", 10**9)
@example("config.dim", 2**40)
@example("config.n_heads", 0)
@example("config.dim", "十六")
def test_any_value_in_any_place_is_refused_or_harmless(
    whole_file, tokenizer, tmp_path_factory, spot, value
):
    """格式完好、内容被人改过的检查点：要么照常能用，要么一句话拒绝，不会去建一个十亿层的模型。"""
    path = tmp_path_factory.getbasetemp() / "edited.pt"
    content = torch.load(whole_file, weights_only=True)
    first, _, rest = spot.partition(".")
    place, name = (content[first], rest) if rest else (content, first)
    place.pop(name) if value == "删掉" else place.update({name: value})
    torch.save(content, path)
    try:
        load(path, tokenizer)
    except UserError as error:
        assert str(error)


def test_a_program_inside_a_checkpoint_is_refused_and_not_run(tokenizer, tmp_path, whole_file):
    """pickle 里能夹带程序：放在裸的文件里，或者藏进一个好的检查点，都不会运行。"""
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (trace,))

    bare, hidden = tmp_path / "bare.pt", tmp_path / "hidden.pt"
    bare.write_bytes(pickle.dumps(Evil()))
    torch.save({"format": 2, "stage": Evil()}, hidden)
    swapped = tmp_path / "swapped.pt"  # 好的检查点，只换掉 data.pkl，校验和也是对的
    with zipfile.ZipFile(whole_file) as old, zipfile.ZipFile(swapped, "w") as new:
        for info in old.infolist():
            evil = info.filename.endswith("data.pkl")
            new.writestr(info, pickle.dumps(Evil()) if evil else old.read(info))
    for path in (bare, hidden, swapped):
        with pytest.raises(UserError, match="不是完好的检查点"):
            load(path, tokenizer)
    assert not trace.exists()
    with hidden.open("rb") as f:
        torch.load(f, weights_only=False)  # 确实是有毒的：不设防的读法会运行它
    assert trace.exists()


def test_other_formats_are_named(tokenizer, tmp_path):
    path = tmp_path / "m.pt"
    for number, todo in ((checkpoint.FORMAT + 1, "请更新程序"), (1, "请重新训练")):
        write(path, snapshot(tokenizer) | {"format": number})
        with pytest.raises(UserError, match=f"{todo}.*格式是 {number}"):
            load(path, tokenizer)
    torch.save({"hello": 1}, path)
    with pytest.raises(UserError, match="不是 mini-llm 的检查点"):
        load(path, tokenizer)
    write(path, snapshot(tokenizer) | {"config": asdict(replace(SMALL, n_layers=3))})
    with pytest.raises(UserError, match="参数与它的配置对不上"):
        load(path, tokenizer)


def test_checkpoint_of_another_tokenizer_is_refused(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    write(path, snapshot(tokenizer))
    monkeypatch.setattr(Tokenizer, "fingerprint", lambda self: "另一个")
    with pytest.raises(UserError, match="另一个分词器"):
        load(path, tokenizer)


def test_a_damaged_one_names_the_one_before(tokenizer, tmp_path):
    path = tmp_path / "m.pt"
    for step in (1, 2):
        write(path, snapshot(tokenizer, step=step))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"前一个是 .*m\.previous\.pt"):
        load(path, tokenizer)


# ---------- 输出目录 ----------


@pytest.fixture
def out(tmp_path, monkeypatch):
    """在一个空目录里，out/x 是输出目录；返回一个「再次启动」的函数。"""
    monkeypatch.chdir(tmp_path)

    def start(*flags, stage="pretrain"):
        argv = ["--out_dir", "out/x", "--preset", "tiny", *flags]
        config, origins = load_config(stage, argv)
        folder = RunFolder(stage, config, origins, World())
        try:
            return folder.begin(config, origins, Tokenizer()), config, origins
        finally:
            folder.lock.release()
            start.folder = folder

    return start


def test_a_second_run_on_one_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [load_config(stage, ["--out_dir", "out/x"]) for stage in ("pretrain", "sft")]
    first = RunFolder("pretrain", *runs[0], World())
    with pytest.raises(UserError, match="另一个训练正在写 out/x"):
        RunFolder("sft", *runs[1], World())
    first.lock.release()
    RunFolder("sft", *runs[1], World()).lock.release()


def test_a_finished_or_unfinished_run_is_never_silently_overwritten(out, tokenizer):
    assert out()[0] is None  # 空的目录，从头开始
    path = Path("out/x/pretrain.pt")
    write(path, snapshot(tokenizer, step=0))
    assert out()[0] is None  # 一步都没走的，不可惜
    for step in (4, 10):
        write(path, snapshot(tokenizer, step=step))
        with pytest.raises(UserError, match=f"练了 {step} 步，共 10 步.*--resume.*--overwrite"):
            out()
    assert out("--overwrite")[0] is None
    assert path.exists()  # 到了真要开始的时候才删
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match="练了 4 步，共 10 步"):  # 前一个
        out()
    write(previous_of(path), snapshot(tokenizer, step=0))
    with pytest.raises(UserError, match=r"练了 0 步，共 10 步.*--resume"):  # 坏了的也许走了很远
        out()
    previous_of(path).unlink()
    with pytest.raises(UserError, match="读不出来"):
        out()
    with pytest.raises(UserError, match="只能写一个"):
        out("--overwrite", "--resume")


def test_resume_finds_the_newest_good_one(out, tokenizer, capsys):
    with pytest.raises(UserError, match="无从接起"):
        out("--resume")
    path = Path("out/x/pretrain.pt")
    for step in (4, 5):
        write(path, snapshot(tokenizer, step=step))
    assert out("--resume")[0]["progress"]["step"] == 5
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert out("--resume")[0]["progress"]["step"] == 4
    said = capsys.readouterr().out
    assert "out/x/pretrain.pt 不是完好的检查点" in said
    assert "改用前一个 out/x/pretrain.previous.pt" in said
    out.folder.settle(fresh=False)
    assert Path("out/x/pretrain.damaged.pt").read_bytes() == damaged
    write(path, snapshot(tokenizer, step=6))  # 坏的没有顶替掉好的
    assert read(previous_of(path))["progress"]["step"] == 4
    for p in (path, previous_of(path)):
        p.write_bytes(b"")
    with pytest.raises(UserError, match="没有好的检查点"):
        out("--resume")
    with pytest.raises(UserError, match="读不出来；不要了：加上 --overwrite") as failed:
        out()
    assert "--resume" not in str(failed.value)  # 那样也接不起来


def test_only_the_launch_that_began_a_run_resumes_it_by_itself(out, tokenizer, monkeypatch):
    """torchrun --max-restarts：自己开始的，重启后接着练；别人的训练，重启几次也不去碰。"""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "这一次")
    write(Path("out/x/pretrain.pt"), snapshot(tokenizer, step=4))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="已经有了"):
        out()
    config, origins = load_config("pretrain", ["--out_dir", "out/x"])
    folder = RunFolder("pretrain", config, origins, World())
    folder.settle(fresh=False)
    folder.lock.release()
    assert out("--overwrite")[0]["progress"]["step"] == 4
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "下一次")
    with pytest.raises(UserError, match="已经有了"):
        out()


def test_resume_takes_every_setting_from_the_checkpoint(out, tokenizer):
    source = replace(SMALL, seed=7, weight_decay=0.3, eval_every=5)
    write(Path("out/x/pretrain.pt"), snapshot(tokenizer, source))
    _, config, origins = out("--resume")
    assert config == replace(source, resume=True)
    assert (origins["seed"], origins["out_dir"]) == (
        Origin.CHECKPOINT, Origin.FLAG,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--seed", "9"], r"不能改 seed（42 → 9）"),
        (["--seq_len", "16"], r"不能改 seq_len"),
        (["--n_layers", "3"], r"不能改 n_layers（2 → 3）"),
        (["--val_fraction", "0.1"], r"不能改 val_fraction"),
        (["--batch_size", "4"], r"不能变.*2 × 1.*4 × 1"),
        (["--lr", "0.5"], r"lr（0.01 → 0.5）.*--allow_changes"),
        (["--max_steps", "20"], r"max_steps（10 → 20）.*--allow_changes"),
        (["--epochs", "2"], r"epochs（None → 2.0）.*--allow_changes"),
    ],
)
def test_changes_that_break_exactness_are_refused(out, tokenizer, flags, part):
    write(Path("out/x/pretrain.pt"), snapshot(tokenizer))
    with pytest.raises(UserError, match=part):
        out("--resume", *flags)


def test_edits_in_config_py_are_named_when_they_do_not_count(out, tokenizer, monkeypatch, capsys):
    write(Path("out/x/pretrain.pt"), snapshot(tokenizer))
    edited = Config(lr=0.3)
    config, origins = load_config("pretrain", ["--out_dir", "out/x", "--resume"], edited)
    folder = RunFolder("pretrain", config, origins, World())
    folder.begin(config, origins, tokenizer)
    assert config.lr == 0.01
    assert "config.py 里改过的 lr 不算数" in capsys.readouterr().out


def test_allowed_changes_say_what_they_cost(out, tokenizer, capsys):
    write(Path("out/x/pretrain.pt"), snapshot(tokenizer))
    _, config, _ = out("--resume", "--epochs", "2", "--lr", "0.5", "--allow_changes")
    assert (config.epochs, config.max_steps, config.lr) == (2, None, 0.5)
    assert "结果与不中断的那一次不同" in capsys.readouterr().out
    _, config, _ = out("--resume", "--batch_size", "1", "--grad_accum", "2")
    assert (config.batch_size, config.grad_accum) == (1, 2)
    assert "不再逐位相同" in capsys.readouterr().out
    _, config, _ = out("--resume", "--eval_every", "3", "--prompt", "画蛇添足：")
    assert (config.eval_every, config.prompt) == (3, "画蛇添足：")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="warmup"):  # 合在一起也要说得通
        out("--resume", "--warmup", "0.8", "--allow_changes")


def test_only_what_was_changed_is_said_to_be(out, tokenizer, capsys):
    """照时间练的，改成照步数：微调的步数谁也没有改。"""
    source = replace(SMALL, hours=1.0, max_steps=None, sft_max_steps=None)
    write(Path("out/x/pretrain.pt"), snapshot(tokenizer, source))
    _, config, _ = out("--resume", "--max_steps", "20", "--allow_changes")
    assert (config.max_steps, config.hours, config.sft_max_steps) == (20, None, None)
    assert "（改了 max_steps（None → 20）：" in capsys.readouterr().out
    with pytest.raises(UserError, match="eval_tokens"):  # 另存的那一份，是照原来的量法最好
        out("--resume", "--eval_tokens", "64")


def test_restoring_gives_back_the_optimizers_the_generator_and_the_place(tokenizer, out, capsys):
    path = Path("out/x/pretrain.pt")
    before = snapshot(tokenizer, step=4)
    expected = torch.rand(3)
    write(path, before)
    found, *_ = out("--resume")
    _, optimizer = trained(steps=0)
    progress = Progress()
    parts = {"optimizers": optimizer, "progress": progress, "rng": RandomNumbers(),
             "scaler": torch.amp.GradScaler("cpu", enabled=False)}  # fmt: skip
    restore(found, parts, path)
    assert progress == Progress(step=4, val_bpc=5.0)
    assert torch.equal(torch.rand(3), expected)
    for state, saved in zip(optimizer.state_dict(), before["optimizers"], strict=True):
        assert same(state["state"], saved["state"])
    for name, broken in (("optimizers", [{}]), ("rng", {"cpu": 1}), ("progress", {"step": 1})):
        with pytest.raises(Damaged, match="状态不对"):
            restore(found | {name: broken}, parts, path)


def ready_to_resume(snap, argv):
    """一次接着练的 Run，走到取回状态之前；argv 之外，接着的是 snap。"""
    write(Path("out/x/pretrain.pt"), snap)
    run = Run("pretrain", ["--resume", "--out_dir", "out/x", *argv])
    run.plan(SimpleNamespace(n_rows=7, tokens=np.arange(200, dtype=np.uint16)),
             CARD | {"train_tokens": 99})  # fmt: skip
    run.parallel(Loss(run.model()))
    return run


def test_going_on_checks_the_corpus_the_versions_and_the_number_of_steps(
    tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    snap = snapshot(tokenizer, step=4)
    for data, part in (
        (CARD | {"train_sha256": "c"}, r"语料与 out/x/pretrain\.pt 训练时的不同"),
        # 读法或划分改过：怪的不是语料，说的是怎样从它的参数开始
        ({"train_sha256": "c"}, r"读数据、分检验的办法与现在的不同.*--init_from out/x/pretrain"),
        (CARD | {"val_sha256": "c", "format": 1}, r"不会逐位相同.*python pre_train\.py"),
    ):
        with (
            pytest.raises(UserError, match=part),
            ready_to_resume(snap | {"data": data}, []) as run,
        ):
            run.optimizer(build_optimizer, 0.01)
    more = ["--allow_changes", "--max_steps", "3"]
    with (
        pytest.raises(UserError, match="比现在要的 3 步还多"),
        ready_to_resume(snap, more) as run,
    ):
        run.optimizer(build_optimizer, 0.01)
    capsys.readouterr()
    snap["versions"]["torch"] = "1.0"
    snap["data"].pop("format")  # 早先的没有记；词元一个没变，就接得上
    with ready_to_resume(snap, []) as run:
        run.optimizer(build_optimizer, 0.01)
        run.begin()
        # 每步 2 行，一遍 7 行：走完 4 步，是第二遍的第 1 行（都从 0 数）
        assert run.state()["data"] == CARD | {"epoch": 1, "row": 1}
    assert "torch 1.0 → " in (said := capsys.readouterr().out)
    assert "已经走完 4 步，共 10 步" in said


# ---------- 什么时候存 ----------


def test_saving_takes_at_most_two_percent_of_the_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(saver_module.time, "monotonic", lambda: now)
    folder = SimpleNamespace(path=tmp_path / "m.pt", writes=True)
    saver = Saver(folder, None, Progress())

    def slow(path, content):
        nonlocal now
        now += 10

    monkeypatch.setattr(saver_module, "write", slow)
    saves = 0
    while now < 20000:
        now += 1  # 一步一秒
        if saver.due():
            saver.save(dict)
            saves += 1
    assert saver.progress.saving_seconds == pytest.approx(10 * saves)
    assert 0.015 < saver.progress.saving_seconds / now <= 0.02


def test_a_failed_save_is_one_line_and_the_next_one_tries_again(tmp_path, capsys, tokenizer):
    blocked = tmp_path / "file"
    blocked.touch()
    folder = SimpleNamespace(path=blocked / "m.pt", writes=True, how_to_resume="--resume")
    first = Saver(folder, 0.0, Progress())
    with pytest.raises(UserError, match="写不了检查点") as failed:
        first.save(lambda: snapshot(tokenizer), must=True)
    assert "还在" not in str(failed.value)  # 第一次就没存下，没有早先的
    saver = Saver(folder, 0.0, Progress(step=2))
    saver.progress.step = 3
    saver.save(lambda: snapshot(tokenizer))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "第 2 步的检查点还在；训练接着进行，下次再存" in said
    saver.save(lambda: snapshot(tokenizer), leaving=True)
    assert "训练接着进行" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"写不了检查点.*第 2 步的检查点还在，腾出空间后接着练"):
        saver.save(lambda: snapshot(tokenizer), must=True)
    assert saver.step == 2
    blocked.unlink()
    saver.save(lambda: snapshot(tokenizer))
    assert saver.step == read(blocked / "m.pt")["progress"]["step"] == 3


# ---------- 微调的起点 ----------


def test_sft_takes_its_shape_from_the_checkpoint():
    changed = {"preset": "tiny", "n_layers": 5, "dim": 64, "max_len": 200, "val_fraction": 0.1,
               "data": "builtin"}  # fmt: skip
    source = Config(**{**vars(SMALL), **changed, "lr": 0.1})
    config, origins = load_config("sft", ["--preset", "tiny"])
    inherit(config, origins, source, "x.pt")
    assert (config.n_layers, config.dim, origins["dim"]) == (
        5, 64, Origin.CHECKPOINT,
    )  # fmt: skip
    assert config.val_fraction == 0.1  # 预训练没见过的，微调也不许见
    own, own_origins = load_config("sft", ["--data", "my.jsonl", "--val_fraction", "0.2"])
    own.preset = "tiny"
    inherit(own, own_origins, source, "x.pt")
    assert own.val_fraction == 0.2  # 自己的对话，留多少由自己定
    assert config.sft_lr == pytest.approx(0.02)  # 预训练真正用过的 lr 的五分之一
    assert config.seq_len == 200  # 预设的 256 放不进这个模型
    config, origins = load_config("sft", ["--preset", "deep"])
    with pytest.raises(UserError, match="请加上 --preset tiny"):
        inherit(config, origins, source, "x.pt")
    config, origins = load_config("sft", ["--n_layers", "4", "--dim", "66", "--preset", "tiny"])
    with pytest.raises(UserError, match="n_layers 指定为 4，检查点里是 5") as caught:
        inherit(config, origins, source, "x.pt")
    assert "dim 指定为 66，检查点里是 64" in str(caught.value)  # 一次说全
    config, origins = load_config("sft", [], Config(preset="tiny", n_layers=4))
    with pytest.raises(UserError, match="n_layers 指定为 4"):  # 改在 config.py 里的也算指定
        inherit(config, origins, source, "x.pt")


def test_a_row_is_held_against_the_start_not_against_the_preset():
    flags = ["--preset", "tiny", "--seq_len", "1024"]  # tiny 自己的 max_len 是 512
    for max_len, sentence in ((1024, None), (768, "超过了 x.pt 的 max_len（768）")):
        source = Config(**{**vars(SMALL), "preset": "tiny", "max_len": max_len})
        config, origins = load_config("sft", flags)
        if sentence:
            with pytest.raises(UserError, match=sentence):
                inherit(config, origins, source, "x.pt")
        else:
            inherit(config, origins, source, "x.pt")
            assert (config.seq_len, config.max_len) == (1024, 1024)
    with pytest.raises(UserError, match="不能超过 max_len（512）"):
        load_config("pretrain", flags)  # 从头练的，形状就是预设的
