"""借到显卡的八分钟：没有显卡也走得通每一部分；一部分死了、卡住了，不妨碍后面的。"""

import json
import multiprocessing

import pytest
import torch
from forked import CONTEXT
from jobs import rows_then

import model
from config import Config, UserError
from dataset import IGNORE, pretrain_batches
from engine.device import Device
from experts import MixtureOfExperts
from model import FeedForward, attend_by_hand
from tokenizer import Tokenizer
from tools.bench.__main__ import main
from tools.bench.contestants import random_model
from tools.bench.gpu import attention, half, puzzle, sft, training
from tools.bench.gpu.former import Former, former_but_new_optimizer
from tools.bench.gpu.running import PARTS, rows_of
from tools.bench.gpu.stage import Stage
from tools.bench.gpu.trace import FORWARD, covered, read_shares
from tools.bench.measuring import Contestant, Row
from tools.bench.ours import Ours
from tools.bench.trainer import corpus

QUICK = ["--rehearse", "--seconds", "0.001", "--repeats", "1"]


@pytest.fixture
def rehearse(monkeypatch, tmp_path, builtin_config, builtin_pretrain, builtin_sft):
    """演习其中几部分；返回写下的结果。各部分的进程不必等导入 torch。"""
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: CONTEXT)
    path = tmp_path / "b.json"

    def run(*args: str) -> dict:
        main(["gpu", *args, *QUICK, "--json", str(path), "--data_dir", builtin_config.data_dir])
        return json.loads(path.read_text(encoding="utf-8") or "{}")

    return run


@pytest.fixture
def stage(tmp_path, builtin_config, builtin_pretrain, builtin_sft):
    """演习用的。"""
    return Stage(
        str(tmp_path), 0.001, 1, rehearse=True, compile=False, data_dir=builtin_config.data_dir
    )


def check(done: dict, parts: list[str]) -> None:
    """每一部分都有结果，没有一项出错。"""
    assert list(done) == [f"gpu {name}（演习）" for name in parts]
    for section in done.values():
        assert section["rows"]
        for row in section["rows"]:
            assert not any(bad in row["what"] for bad in ("没有做完", "停在这里")), row["what"]


def test_every_part_can_be_rehearsed_without_a_card(rehearse, capsys, tmp_path):
    """除了另起训练脚本的 half：它在下面。"""
    parts = [name for name in PARTS if name != "half"]
    done = rehearse(*parts, "--no-compile")
    check(done, parts)
    values = {r["what"]: r["values"] for section in done.values() for r in section["rows"]}
    for what in ("wide：现在的一步", "wide：我们", "deep：4 行 × 1 次", "wide，门与升合成一次",
                 "wide，微调，注意力：复制键值", "wide：--quantize int8，不编译"):  # fmt: skip
        assert values[what][0] > 0, what
    assert values["wide：反向，处理器"][0] > 0
    assert values["wide：一步里显卡忙着"] == []  # 没有显卡，就没有测量
    apart = [v for what, v in values.items() if "均衡系数" in what and "多" in what]
    assert len(apart) == 4 and all(abs(x) < 10 for (x,) in apart)  # 不到万分之一
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"请带回 {tmp_path / 'b.json'}")
    assert "一步的剖析" in (tmp_path / "b/log.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_killed_run_and_both_automatic_batches_are_rehearsed(rehearse):
    """fp16 的一部分：真的杀掉一个训练，再接着练完；两个脚本都走得完。"""
    done = rehearse("half", "--no-compile")
    check(done, ["half"])
    rows = done["gpu half（演习）"]["rows"]
    goals = [(r["values"], r["goal"]) for r in rows if r["goal"].startswith("= ")]
    assert len(goals) == 5
    assert all(values == [float(goal[2:])] for values, goal in goals), goals


def test_half_precision_is_rehearsed(stage):
    """同一部分里不必另起进程的那一项。"""
    found = {row.what: row.values for row in half.trains(stage)}
    assert found["wide，float32：30 步里，损失是有限的数的"] == [30]
    assert found["wide，float32：最后一步的损失"] < found["wide，float32：第一步的损失"]


@pytest.mark.slow
def test_a_compiled_part_can_be_rehearsed(rehearse):
    check(rehearse("former", "profile"), ["former", "profile"])


# ---------- 时限、死了、显存不够、没有轮到 ----------


def test_a_part_that_dies_or_hangs_is_a_row(monkeypatch):
    """交出来的都留着；死了的、到了时限的，各是一行。"""
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: CONTEXT)
    for end, said, limit in (("die", "中途死了", 60), ("hang", "还没有做完", 3), ("stop", "", 60)):
        with Contestant(rows_then, end) as player:
            found = list(rows_of("某一部分", player, limit))
            if said:  # 不必等它肯走：已经不在了
                player.process.join(5)
                assert not player.process.is_alive()
        assert [row.what for row in found[:2]] == ["0", "1"]
        assert len(found) == 2 + bool(said)
        assert said in found[-1].what


def test_an_error_costs_one_row_and_the_rest_goes_on(stage, tmp_path):
    def fails(error):
        yield Row("前一半", [1.0], "")
        raise error

    memory = stage.attempt("甲", fails(RuntimeError("CUDA out of memory. Tried to allocate")))
    assert [r.what for r in memory] == ["前一半", "甲（没有做完：RuntimeError，显存不够）"]
    wrong = stage.attempt("乙", fails(ValueError("形状不对\n第二行")))
    assert [r.what for r in wrong][1] == "乙（没有做完：ValueError，形状不对 第二行）"
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "===== 甲" in log and "in fails" in log  # 回溯在原始记录里


def test_what_does_not_fit_in_the_time_is_named(rehearse, capsys):
    total = PARTS["attention"].seconds - 1
    assert rehearse("attention", "profile", "--no-compile", "--seconds_total", str(total)) == {}
    said = capsys.readouterr().out
    assert "没有轮到：attention、profile；补测：python -m tools.bench gpu attention profile" in said
    assert "请带回" not in said  # 什么也没有测


@pytest.mark.skipif(torch.cuda.is_available(), reason="有显卡的机器上，它真的会测")
def test_without_a_card_it_says_so():
    with pytest.raises(UserError, match=r"要 NVIDIA 显卡.*--rehearse"):
        main(["gpu"])


def test_mistakes_are_one_sentence_and_the_parts_can_be_listed(capsys):
    with pytest.raises(UserError, match="没有 speed 这一部分；可选：attention、"):
        main(["gpu", "speed", "--rehearse"])
    with pytest.raises(UserError, match="找不到检查点 nowhere"):
        main(["gpu", "puzzle", "--rehearse", "--checkpoint", "nowhere.pt"])
    main(["gpu", "list"])
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in PARTS)


# ---------- 量的是该量的 ----------


def test_the_former_step_learns_as_the_present_one(stage):
    """从前的一步与现在的，算的是同一件事：否则比的是两个程序。现在的优化器另外做的几样关掉。"""
    makers = (Ours, Former, former_but_new_optimizer)
    plain = {"muon_beta2": 0.0, "muon_heads": False}
    made = [make(stage.config("wide", grad_accum=2, **plain)) for make in makers]
    for factor in (0.2, 1.0, 1.0, 0.5):
        assert len({m.step(factor) for m in made}) == 1
        ours, *others = (m.loss for m in made)
        assert others == pytest.approx([ours] * 2, rel=1e-5)
    made[0].leave()
    assert not made[0].loop.thread.is_alive()


def test_kernels_belong_to_the_part_that_launched_them():
    """内核做完得晚，也算在发出它的那一段；重叠的忙，只算一次。"""

    def event(cat, name, ts, dur, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    events = [
        event("user_annotation", "part:whole", 0, 10_000),
        event("user_annotation", "part:backward", 2_000, 3_000),
        event("user_annotation", "part:wait", 6_000, 3_000),
        event("user_annotation", "part:fetch", 6_500, 500),  # 等之前先备下一批：套在里面
        event("gpu_user_annotation", "part:backward", 9_000, 500),
        event("cuda_runtime", "cudaLaunchKernel", 1_000, 5, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 2_500, 5, correlation=2),
        event("cuda_runtime", "cudaMemcpyAsync", 6_600, 5, correlation=3),
        event("cuda_runtime", "cudaStreamSynchronize", 7_500, 1_000, correlation=4),
        event("cuda_runtime", "cudaLaunchKernel", 11_000, 5, correlation=5),
        event("kernel", "a", 1_500, 1_000, correlation=1),
        event("kernel", "b", 6_000, 1_500, correlation=2),  # 做的时候，处理器已经在等了
        event("gpu_memcpy", "c", 7_000, 1_000, correlation=3),  # 与 b 重叠半毫秒
        event("kernel", "d", 11_500, 1_000, correlation=5),  # 量完之后的
        {"ph": "M", "name": "process_name"},
    ]
    shares, whole, busy = read_shares(events)
    assert (whole, busy) == (10.0, 3.0)
    assert (shares[FORWARD].launched, shares[FORWARD].busy) == (1, 1.0)
    assert (shares["backward"].launched, shares["backward"].busy) == (1, 1.5)
    assert (shares["fetch"].launched, shares["fetch"].waits) == (1, 0)
    assert (shares["wait"].launched, shares["wait"].waits) == (0, 1)
    assert shares["backward"].host == 3.0
    assert covered([(0, 4), (1, 2), (6, 7)]) == 5


@pytest.mark.parametrize("masked", [True, False])
def test_every_way_of_attention_is_attention(masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 32, 16) for heads in (4, 2, 2))
    segments = torch.arange(32) // 8
    mask = (segments[:, None] == segments).tril().expand(2, 1, 32, 32) if masked else None
    expected, _ = attend_by_hand(q, k, v, mask, not masked)
    for way in (*attention.WAYS.values(), attention.flexible):
        assert torch.allclose(way(q, k, v, mask, not masked), expected, atol=1e-5)


def test_the_way_of_attention_is_really_taken(stage, monkeypatch):
    """微调的每一条路，模型里走的就是它。"""
    taken = []

    def way(*args):
        taken.append(args[3] is not None)  # 有遮罩
        return attention.repeated(*args)

    list(sft.one(stage, "微调", "sft", way, [], []))
    assert taken and all(taken)
    assert model.attend is not way


def test_each_option_changes_what_it_says(stage):
    layer, x = FeedForward(Config(dim=32, hidden_dim=48)), torch.randn(2, 5, 32)
    assert torch.allclose(training.gate_and_up_together(layer, x), layer(x), atol=1e-6)
    made = Ours(stage.config("wide"))
    made.device.dtype = torch.bfloat16
    training.bf16_stream(made)
    assert made.model.embedding(torch.zeros(1, 1, dtype=torch.long)).dtype == torch.bfloat16
    made.leave()


def test_a_document_alone_is_what_it_was_in_its_row(stage):
    """拆开的与拼着的，要猜的一个不差；模型给的打分也一样。"""
    config = stage.config("tiny-moe", **puzzle.SHAPE)
    batches = pretrain_batches(corpus(config), "val", config, Tokenizer())
    chosen = [r for r, row in enumerate(batches.rows) if len(row) > 1][:6]
    whole = batches.get(chosen)
    apart = puzzle.separated(whole)
    assert len(apart.ids) > len(whole.ids)

    def targets(batch):
        return sorted(batch.targets[batch.targets != IGNORE].tolist())

    assert targets(apart) == targets(whole)
    made = random_model(config)  # 刚出生的，前文还影响不到打分
    assert any(isinstance(m, MixtureOfExperts) for m in made.modules())
    device = Device(config)
    evaluate = puzzle.evaluator(made, device, 0.0)
    rows = [puzzle.Rows(batches, chosen, apart) for apart in (False, True)]
    losses = [puzzle.mean_loss(evaluate, some, 4, device, grad=False) for some in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.gpu
def test_on_a_card_a_fused_kernel_takes_every_case(tmp_path, builtin_config):
    """半精度的训练，没有一种情形退到 math；真的在显卡上量一次。"""
    path = tmp_path / "b.json"
    main(["gpu", "attention", "--seconds", "0.2", "--repeats", "1", "--json", str(path),
          "--data_dir", builtin_config.data_dir])  # fmt: skip
    (section,) = json.loads(path.read_text(encoding="utf-8")).values()
    ours = [r["what"] for r in section["rows"] if "，我们的：" in r["what"]]
    half_precision = [what for what in ours if what.startswith(("bfloat16", "float16"))]
    assert half_precision and not any("math" in what for what in half_precision)
