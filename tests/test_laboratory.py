"""实验：改装过的模型正是它说的那样，比较是公平的，程序从头跑得到尾。"""

import dataclasses
import importlib
import math
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from losses import loss_of
from scripts import REPO, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import Config, UserError
from dataset import IGNORE, Batch
from engine.shared_row import tie_unused_rows
from microscope import attention_weights, hooks, without
from model import AttentionContext, Block, Transformer
from tools.bench.flops import training_flops
from tools.lab.heads import attention_to_the_next, knock_out, two_kinds
from tools.lab.heads import losses as head_losses
from tools.lab.laboratory import Laboratory, Record
from tools.lab.showing import smooth
from tools.lab.try_experts import DENSE, EXPERTS, already_seen
from tools.lab.try_experts import Options as ExpertOptions
from tools.lab.try_residual import VARIANTS as TORN
from tools.lab.try_residual import Options as ResidualOptions
from tools.lab.try_residual import Result as TornResult
from tools.lab.try_residual import TornBlock, sentences, tear
from tools.lab.try_sampling import entropy
from tools.lab.try_shapes import (
    SHAPES,
    TALL,
    TALL_FLOPS,
    TALL_WIDTH,
    WIDE,
    block_parameters,
    compare,
)
from tools.lab.try_shapes import Options as ShapeOptions
from tools.lab.try_shapes import Result as ShapeResult
from tools.lab.try_without import NO_ATTENTION, NO_ROPE, NOT_CAUSAL, WHOLE, take_out

SMALL = Config(
    dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=48, max_len=32, vocab_size=97
)
T = 12


def small(name: str) -> Transformer:
    """换掉一样零件的小模型；零初始化的投影换成随机数，否则各层什么也不做，考不出对错。"""
    torch.manual_seed(0)
    model = Transformer(SMALL).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return take_out(model, name)


def some_ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(97, (2, T), generator=torch.Generator().manual_seed(seed))


# ---------- 1. 改装 ----------


def test_the_whole_model_is_the_transformer():
    torch.manual_seed(0)
    model = Transformer(SMALL)
    assert torch.equal(take_out(model, WHOLE)(some_ids()), model(some_ids()))
    assert type(model.blocks[0]) is Block


def test_without_rope_distances_do_not_matter():
    """最后一个词元看见的是同一些前文：前文次序怎样、隔得多远，都一样；有位置的就不一样。"""
    ids, spread = some_ids(), torch.arange(T) * 2
    shuffled = ids.clone()
    shuffled[:, : T - 1] = ids[:, torch.randperm(T - 1)]
    one_layer = {}
    for name in (WHOLE, NO_ROPE):
        model = small(name)
        model.blocks = model.blocks[:1]  # 只有一层：往上的各层，因果遮罩会泄露先后
        one_layer[name] = model
        same = torch.equal(model(ids), model(ids, spread))
        assert same == (name == NO_ROPE)
    bare = one_layer[NO_ROPE]
    torch.testing.assert_close(bare(ids)[:, -1], bare(shuffled)[:, -1], atol=1e-5, rtol=1e-5)
    whole = one_layer[WHOLE]
    assert (whole(ids)[:, -1] - whole(shuffled)[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("segmented", [False, True])
def test_without_causality_the_future_leaks_and_only_then(segmented):
    ids, changed = some_ids(), some_ids()
    changed[:, 8] = (changed[:, 8] + 1) % 97
    segments = torch.tensor([[0] * 4 + [1] * 8] * 2) if segmented else None
    for name in (WHOLE, NO_ROPE, NOT_CAUSAL):
        model = small(name)
        moved = (model(ids, None, segments) - model(changed, None, segments)).abs().amax(-1)
        first = 4 if segmented else 0  # 别的段里的，无论如何看不见
        assert (moved[:, :first] == 0).all()
        assert ((moved[:, first:8] > 0) == (name == NOT_CAUSAL)).all(), name
        assert (moved[:, 8:] > 0).all()


def test_not_causal_generation_sees_the_whole_past(tiny_lab):
    """生成时每步从头算：得到的正是把前文整个送进去时最后一个位置的选择。"""
    model = take_out(tiny_lab.build(0), NOT_CAUSAL)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    text = tiny_lab.write(model, "画蛇添足", length=5)
    ids = [tiny_lab.tokenizer.bos_id, *tiny_lab.tokenizer.encode("画蛇添足")]
    banned = [*tiny_lab.tokenizer.never_sampled(), *range(tiny_lab.tokenizer.vocab_size, 21248)]
    for _ in range(5):
        logits = model(torch.tensor([ids]))[0, -1]
        logits[banned] = -math.inf
        ids.append(int(logits.argmax()))
    assert text == tiny_lab.tokenizer.decode(ids[5:])


def test_without_attention_each_token_is_alone():
    ids, changed = some_ids(), some_ids()
    changed[:, :5] = (changed[:, :5] + 1) % 97
    model = small(NO_ATTENTION)
    assert torch.equal(model(ids)[:, 5:], model(changed)[:, 5:])
    assert not torch.equal(model(ids)[:, :5], model(changed)[:, :5])


def test_only_the_named_part_is_taken_out():
    """其余的参数与完整的逐个相同：差别只在换掉的那一样。"""
    whole = small(WHOLE).state_dict()
    for name in (NO_ROPE, NOT_CAUSAL, NO_ATTENTION):
        left = small(name).state_dict()
        gone = {k for k in whole if k not in left}
        assert gone == ({k for k in whole if ".attention." in k} if name == NO_ATTENTION else set())
        assert all(torch.equal(left[k], whole[k]) for k in left)


@pytest.mark.parametrize(("residual", "pre_norm"), TORN.values(), ids=TORN)
def test_torn_block_is_what_it_says(residual, pre_norm):
    torch.manual_seed(0)
    model = Transformer(SMALL)
    torn = TornBlock(SMALL, 0, residual, pre_norm)
    for p in torn.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, T, 32)
    places = torch.arange(T)
    context = AttentionContext(*model.rotary(places), None, True, places, None)
    y = x if not pre_norm else torn.attention_norm(x)
    y = torn.attention(y, context) + (x if residual else 0)
    expected = torn.feed_forward(y if not pre_norm else torn.feed_forward_norm(y))
    expected = expected + (y if residual else 0)
    torch.testing.assert_close(torn(x, context), expected, atol=0, rtol=0)
    if residual and pre_norm:
        block = Block(SMALL, 0)
        block.load_state_dict(torn.state_dict())
        assert torch.equal(block(x, context), torn(x, context))


def test_torn_models_start_from_the_same_numbers():
    """不管在这之前抽过多少随机数。"""
    found = []
    for residual, pre_norm in TORN.values():
        model = tear(Transformer(SMALL), SMALL, residual, pre_norm, seed=3, zero_init=False)
        blocks = model.blocks.state_dict()
        found.append({k: v for k, v in blocks.items() if "_norm" not in k})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[k], v) for k, v in found[0].items())
    assert all(v.abs().sum() > 0 for v in found[0].values())  # 没有一个投影从零开始


def test_with_both_parts_and_zero_init_it_is_the_whole_model():
    """一样也不拆，参数也照 model.py 来：整个模型与 Transformer 同样的参数算出同样的打分。"""
    model = Transformer(SMALL)
    torn = tear(Transformer(SMALL), SMALL, True, True, seed=3, zero_init=True)
    model.load_state_dict(torn.state_dict())
    assert torch.equal(torn(some_ids()), model(some_ids()))
    assert all((b.feed_forward.down.weight == 0).all() for b in torn.blocks)
    assert all((b.attention.out.weight == 0).all() for b in torn.blocks)


# ---------- 2. 公平 ----------


def test_shapes_are_equal_where_they_say():
    configs = {n: dataclasses.replace(SMALL, seq_len=128, **s) for n, s in SHAPES.items()}
    n = {name: block_parameters(Transformer(config)) for name, config in configs.items()}
    flops = {name: training_flops(config, 5376) for name, config in configs.items()}
    assert n[TALL] == pytest.approx(n[WIDE], rel=0.01)
    assert flops[TALL_FLOPS] == pytest.approx(flops[WIDE], rel=0.01)
    assert flops[TALL] < 0.9 * flops[WIDE]  # 两种相等真的不是一回事
    assert SHAPES[TALL_WIDTH]["dim"] == SHAPES[WIDE]["dim"]  # 词嵌入也就一样多
    assert n[TALL_WIDTH] == pytest.approx(n[WIDE], rel=0.01)


def test_the_formula_counts_what_pytorch_counts(tiny_lab):
    """公式与 PyTorch 自己数的一致：前向加反向，词表里合用一行的只算一次。"""
    config = dataclasses.replace(tiny_lab.config, dim=64, n_heads=2, n_kv_heads=1)
    model = Transformer(config)
    shared = tie_unused_rows(model, tiny_lab.train_rows.tokens, newborn=True)
    batch = tiny_lab.train_rows.get(range(2))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(model, batch, shared).backward()
    counted = counter.get_total_flops() / batch.ids.numel()
    assert training_flops(config, tiny_lab.rows_scored()) == pytest.approx(counted, rel=0.01)


@pytest.fixture(scope="module")
def tiny_lab(builtin_config, builtin_pretrain) -> Laboratory:
    """一张很小的实验台，语料用整场测试备好的。"""
    options = ShapeOptions(data_dir=builtin_config.data_dir, device="cpu", eval_tokens=256)
    return Laboratory(
        options.tiny(
            dim=32, n_layers=2, n_heads=1, n_kv_heads=1, hidden_dim=64, max_len=64, seq_len=32,
            batch_size=2, max_steps=3,
        )
    )  # fmt: skip


def test_training_is_repeatable_and_learns(tiny_lab):
    first, again = (tiny_lab.train(tiny_lab.build(7), "x", 0.02, seed=7) for _ in range(2))
    other = tiny_lab.train(tiny_lab.build(7), "x", 0.02, seed=8)
    assert first == again
    assert first.losses != other.losses  # 种子换了，语料的次序也换
    assert len(first.losses) == 3
    assert first.held_out < math.log(21248)


def test_training_stops_when_numbers_go_wrong(tiny_lab):
    model = tiny_lab.build(0)
    torch.nn.init.constant_(model.blocks[0].feed_forward.down.weight, math.nan)
    run = tiny_lab.train(model, "x", 0.02)
    assert (run.died, len(run.losses), run.held_out) == (1, 1, math.inf)


def test_frequency_loss_is_between_knowing_nothing_and_something(tiny_lab):
    assert 5 < tiny_lab.frequency_loss() < math.log(21248)


def test_smooth_averages_the_last_few():
    assert smooth([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]


def pairs_by_hand(ids, targets, segments):
    """每个位置：与它同一段的前文里，有没有同样的一对（眼前的，接着的）。"""
    return [
        any(
            (ids[s], targets[s], segments[s]) == (ids[t], targets[t], segments[t]) for s in range(t)
        )
        for t in range(len(ids))
    ]


def repeating_batch() -> Batch:
    """四个字的小文字，多有重复；两段，后一段里的不算在前一段的前文里。"""
    rows = torch.randint(5, 9, (3, 25), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0] * 12 + [1] * 12] * 3)
    positions = torch.tensor([[*range(12), *range(12)]] * 3)
    targets = rows[:, 1:].clone()
    targets[:, 11] = targets[:, -1] = IGNORE
    return Batch(rows[:, :-1], targets, positions, segments)


def test_what_a_head_can_copy():
    """能照抄的：这样一对连着的词元，同一段的前文里有过；其余的至多取三倍那么多。"""
    batch = repeating_batch()
    can_copy, fresh = two_kinds(batch)
    for row in range(3):
        parts = (batch.ids[row], batch.targets[row], batch.segments[row])
        wanted = pairs_by_hand(*(part.tolist() for part in parts))
        real = (batch.targets[row] != IGNORE).tolist()
        assert can_copy[row].tolist() == [w and r for w, r in zip(wanted, real, strict=True)]
    assert not (can_copy & fresh).any() and not (fresh & (batch.targets == IGNORE)).any()
    assert 0 < fresh.sum() <= 3 * can_copy.sum()


def test_how_much_a_head_looks_at_what_came_after():
    """手数：能照抄的每个位置，前文里同样一对之后的那几个，各占多少注意力，加起来再平均。"""
    batch, model = repeating_batch(), small(WHOLE)
    got = attention_to_the_next(model, batch)
    total, count = torch.zeros_like(got), 0
    for row in range(3):
        view = look_with_segments(model, batch, row)
        pairs = list(zip(batch.ids[row].tolist(), batch.targets[row].tolist(), strict=True))
        for t, pair in enumerate(pairs):
            same = [s + 1 for s in range(t - 1) if pairs[s] == pair and pair[1] != IGNORE
                    and batch.segments[row, s] == batch.segments[row, t]]  # fmt: skip
            if same:
                total += view[:, :, t, same].sum(-1)
                count += 1
    torch.testing.assert_close(got, total / count)
    assert (got > 0).all() and (got < 1).all()


@torch.no_grad()
def look_with_segments(model, batch, row):
    """一行里各层各头的注意力 (L, H, T, T)，手算遮罩。"""
    one = Batch(*(part[row : row + 1] for part in batch))
    with hooks(model) as seen:
        model.hidden(one.ids, one.positions, one.segments)
    return torch.stack([attention_weights(block.attention, seen) for block in model.blocks])


def test_knocking_out_is_switching_off(tiny_lab):
    """报的数，就是双数的行上关掉那个头之后的损失之差；挑的那个，是单数的行上升得最多的。"""
    model = tiny_lab.build(3).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    result = knock_out(tiny_lab, model, 4096)
    n_rows = min(tiny_lab.val_rows.n_rows, 128)
    gaps = []
    for first in (0, 1):
        batch = tiny_lab.val_rows.get(range(first, n_rows, 2))
        kinds = two_kinds(batch)
        before = head_losses(model, batch, kinds)
        for layer in range(2):
            with without(model, [f"{layer + 1}.1"]):
                after = head_losses(model, batch, kinds) - before
            if first:
                assert result.worse_copied[layer, 0] == pytest.approx(after[0].item(), abs=1e-5)
                assert result.worse_fresh[layer, 0] == pytest.approx(after[1].item(), abs=1e-5)
            else:
                gaps.append((after[0] - after[1]).item())
    assert before.tolist() == pytest.approx([result.copied, result.fresh])
    assert result.n == tuple(int(kind.sum()) for kind in kinds)
    assert result.chosen == (gaps.index(max(gaps)), 0)


# ---------- 3. 说的话由数得出 ----------


def shape_result(*losses: float) -> ShapeResult:
    return ShapeResult({0.02: losses[0]}, 0.02, list(losses), [[]])


def test_a_difference_within_the_spread_is_not_a_verdict():
    wide = shape_result(5.0, 5.1, 5.2)
    assert "分不出高下" in compare(wide, shape_result(5.1, 5.2, 5.25), "参数相同")
    assert "瘦高的好" in compare(wide, shape_result(4.0, 4.1, 4.2), "参数相同")
    assert "矮胖的好" in compare(wide, shape_result(6.0, 6.1, 6.2), "参数相同")
    assert "不能下结论" in compare(shape_result(5.0), shape_result(1.0), "参数相同")
    assert "没法比" in compare(wide, shape_result(5.0, math.inf, 5.0), "参数相同")


def test_residual_sentences_follow_the_numbers():
    def result(first, last, losses, died=0):
        run = Record(losses, math.inf if died else losses[-1], died)
        return TornResult([1.0, last], {0: [first, last]}, run, 0.02, run, 0.02)

    nan = math.nan
    results = {
        "甲": result(30.0, 1.0, [5.0]), "乙": result(1.0, 50.0, [6.0]),
        "丙": result(nan, nan, [nan], died=1), "丁": result(0.0, 0.0, [9.9]),
    }  # fmt: skip
    text = "".join(sentences(results, ResidualOptions(steps=9), 9.96, 6.5))
    assert "「甲」第 1 层的梯度是第 2 层的 30 倍" in text
    assert "「乙」第 1 层的梯度是第 2 层的 1/50" in text
    assert "「丙」的梯度已经不是有限的数" in text
    assert "「丙」第 1 步就坏了" in text
    assert "「丁」有 2 层的梯度正好是 0" in text


def test_entropy_counts_questions():
    assert entropy(torch.tensor([0.25] * 4 + [0.0])) == pytest.approx(2)
    assert entropy(torch.tensor([1.0, 0.0])) == 0


def test_the_two_models_of_try_experts_differ_only_where_it_says(tmp_path):
    """每个词元经过的前馈一样宽，学习率、每步的词元也一样。"""
    kinds = ExpertOptions(data_dir=str(tmp_path)).shapes()
    assert kinds[EXPERTS].active_width() == kinds[DENSE].hidden_dim
    same = [(c.dim, c.n_layers, c.n_heads, c.lr, c.batch_size, c.seq_len) for c in kinds.values()]
    assert len({*same}) == 1


def test_what_can_be_copied_stands_before_in_the_same_document():
    ids = torch.tensor([[1, 5, 6, 5, 1, 6]])
    targets = torch.tensor([[5, 6, 5, 9, 6, 1]])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1]])
    batch = Batch(ids, targets, None, segments)
    assert already_seen(batch).tolist() == [[False, False, True, False, False, True]]


# ---------- 4. 程序 ----------

SHORT = {  # 程序: (参数, 图里该有的字)
    "try_residual": (("--steps", "2", "--layers", "3"), "每层参数的梯度范数"),
    "try_shapes": (("--steps", "1", "--seeds", "1", "--lrs", "0.02"), "矮胖与瘦高"),
    "try_sampling": ((), "之后的下一个词元"),
    "try_sft": (("--n", "1"), "微调之后，多了什么，忘了什么"),
    "try_without": (("--steps", "2"), "少一样零件，损失会怎样"),
    "try_experts": (("--steps", "2", "--seeds", "1"), "同样的词元，每个词元同样多的参数"),
    "heads": (("--checkpoints", "out/tiny/pretrain.pt"), "谁管照抄"),
}


SLOW = ("try_residual", "try_shapes", "try_without")  # 平时走过的三个，已经用到每一样共用的


def main_of(program: str):
    """一个实验的 main。"""
    return importlib.import_module(f"tools.lab.{program}").main


@pytest.fixture
def experiment(monkeypatch, capfd):
    """在同一个进程里、在 folder 里运行一个实验；返回它印出的话。"""

    def go(folder: Path, program: str, *args: str) -> str:
        monkeypatch.chdir(folder)
        with matplotlib.rc_context():  # 它改的画图设置，不留给别的测试
            main_of(program)([*args])
        stdout, stderr = capfd.readouterr()
        assert "Warning" not in stderr
        assert "findfont" not in stderr
        return stdout

    return go


@pytest.mark.parametrize(
    "program",
    [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in SHORT],
)
def test_experiment_ends_in_a_picture_and_three_sentences(experiment, trained, program, tmp_path):
    """默认的检查点与语料都在读者的目录里。"""
    args, title = SHORT[program]
    if program != "try_sampling":
        args = (*args, "--eval_tokens", "2048" if program == "heads" else "256")
    stdout = experiment(trained[0], program, *args, "--out", str(tmp_path))
    *_, heading, one, two, three, where = stdout.splitlines()
    assert heading == "这一次看到的："
    for number, sentence in enumerate((one, two, three), start=1):
        assert sentence.startswith(f"  {number}. ")
        assert sentence.endswith("。")
    path = tmp_path / f"{program}.svg"
    assert where == f"图：{path}"
    picture = path.read_text(encoding="utf-8")
    assert title in picture
    assert "Noto Sans CJK SC" in picture
    assert len(picture) < 300_000


BAD = [
    ("try_residual", "--steps 0", "--steps 必须是正数，得到的是 0"),
    ("try_shapes", "--lrs 大", "--lrs 要的是用逗号隔开的几个正数"),
    ("try_sampling", "--temps 1,2", "--temps 要的是三个数"),
    ("try_sft", "--preset 大", "--preset 只能是 tiny、small、wide、deep"),
    ("try_without", "--step 3", "没有参数 --step；最接近的是 --steps"),
    ("try_experts", "--seeds 0", "--seeds 必须是正数，得到的是 0"),
    ("heads", "--eval_tokens 0", "--eval_tokens 必须是正数，得到的是 0"),
]


@pytest.mark.parametrize(("program", "args", "sentence"), BAD, ids=[b[0] for b in BAD])
def test_a_bad_flag_is_one_clear_sentence(program, args, sentence, tmp_path, monkeypatch):
    """在同一个进程里，免得每条都等导入；退出码与印成一句话，由下面一条走真的命令行。"""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        main_of(program)(args.split())
    assert "\n" not in str(error.value)


def test_a_missing_checkpoint_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^out/tiny 里还没有模型") as error:
        main_of("try_sampling")([])
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_written_is_known_at_once(tmp_path):
    """走真的命令行：退出码 2，一句话，什么也还没有做。"""
    (tmp_path / "file").write_text("x")
    stdout, stderr = run(tmp_path, "tools.lab.try_without", "--out", "file", code=2)
    assert stdout == ""
    assert stderr.startswith("错误：读写 file 失败")


@pytest.mark.parametrize("program", SHORT)
def test_help_lists_the_flags(program, capsys):
    with pytest.raises(SystemExit):
        main_of(program)(["--help"])
    assert f"用法：python -m tools.lab.{program} " in (shown := capsys.readouterr().out)
    assert "--out" in shown


def test_every_experiment_is_documented_with_its_picture():
    text = (REPO / "docs/experiments.md").read_text(encoding="utf-8")
    assert {path.stem for path in (REPO / "tools/lab").glob("try_*.py")} == {*SHORT} - {"heads"}
    for program in SHORT:
        assert f"`python -m tools.lab.{program}`" in text
        assert f"(pictures/{program}.svg)" in text
        picture = (REPO / f"docs/pictures/{program}.svg").read_text(encoding="utf-8")
        assert SHORT[program][1] in picture
        assert len(picture) < 300_000
