"""存得小的矩阵：算出来的还是那个矩阵，误差有上限，聊天程序用得上。"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config
from engine import speed
from engine.device import Device
from engine.quantize import CompactLinear, compact
from engine.speed import loss_added, speed_up, stored_as
from experts import MixtureOfExperts
from generate import Sampling, make_speaker, next_logits
from model import Transformer
from tokenizer import Tokenizer

SMALL = Config(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, max_len=64, device="cpu",
    dtype="float32", compile=False,
)  # fmt: skip


def speaker_of(
    quantize: str, compile: bool = False, seed: int = 0, experts: int = 0, device: str = "cpu"
):
    """种子相同，随机的权重就相同，按 quantize 存。"""
    torch.manual_seed(seed)
    shape = {"n_experts": experts, "n_active": experts // 2, "router_scale": 1.0}
    config = Config(**{**vars(SMALL), "compile": compile, "device": device, **shape})
    model = Transformer(config).eval()
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
    place = Device(config)
    model.to(place.place)
    return speed_up(make_speaker(model, config, Tokenizer(), "sft"), place, quantize)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 3), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_int8_is_within_half_a_step_of_each_row(seed, rows, scale):
    """每个元素差不出半格多一点（一格是该行最大值的 1/127，倍数存成 bf16），全零的行也不除以零。"""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 32, generator=g) * scale
    weight[3] = 0
    stored = CompactLinear(weight, torch.int8)
    assert stored.weight.dtype == torch.int8
    back = stored.weight.float() * stored.scale.float()[:, None]
    step = weight.abs().amax(1, keepdim=True) / 127
    # 舍入至多半格；倍数若舍小了，最大的那个要截到 127，再差 127 × 1/256 格。
    assert ((back - weight).abs() <= step * 0.51).float().mean() > 0.9
    assert ((back - weight).abs() <= step).all()
    x = torch.randn(rows, 32, generator=g)
    expected = F.linear(x, back)
    torch.testing.assert_close(stored(x), expected, rtol=2e-2, atol=2e-2 * float(step.max()) * 127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32), (2, 3, 32)])
def test_one_row_and_many_rows_agree(dtype, shape):
    """一行走内积，许多行走矩阵乘法；输入输出的形状与类型照旧。"""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=g)
    x = torch.randn(shape, generator=g)
    y = CompactLinear(weight, dtype)(x)
    assert y.shape == (*shape[:-1], 16)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y, F.linear(x, weight), rtol=0, atol=0.2)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_where_there_is_no_ready_made_kernel(monkeypatch, rows, dtype):
    """显卡上不编译时走的路：先还原矩阵再乘，半精度也不溢出。"""
    weight = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)) * 4
    x = torch.full((rows, 1024), 8.0) * weight[:1].sign()  # 与第一行同号：整数的内积远超 65504
    stored = CompactLinear(weight, torch.int8)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", None)  # 走到那里就会出错
    y = F.linear(x.to(dtype), stored.dense(dtype))
    expected = F.linear(x, weight)
    torch.testing.assert_close(
        y.float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max())
    )


def test_every_matrix_is_stored_small_and_the_embedding_stays():
    model = Transformer(SMALL)
    embedding = model.embedding.weight.clone()
    head = compact(model, torch.int8)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    small = [m for m in model.modules() if isinstance(m, CompactLinear)]
    assert len(small) == 7 * SMALL.n_layers
    assert {m.weight.dtype for m in [*small, head]} == {torch.int8}
    assert torch.equal(model.embedding.weight, embedding)


def test_the_matrices_of_experts_are_stored_small_and_the_router_is_not():
    small = speaker_of("int8", experts=4).model
    stored = [m for m in small.modules() if isinstance(m, CompactLinear)]
    assert len(stored) == (4 + 3 * 4) * SMALL.n_layers
    assert all(type(b.feed_forward.router) is torch.nn.Linear for b in small.blocks)
    assert not [m for m in small.modules() if isinstance(m, MixtureOfExperts)]


def test_experts_do_not_compile_one_token_at_a_time(capfd):
    """挑中哪几位要看了才知道：说一声，照不编译的来。"""
    speaker = speaker_of("none", compile=True, experts=4)
    assert speaker.step is next_logits
    assert len(list(speaker.generate([5, 6], Sampling(temp=0, max=3)))) == 3


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("quantize", ["bf16", "int8"])
def test_a_small_model_says_nearly_the_same(quantize, experts):
    """打分的相关系数极高，最可能的词元相同；写得满要求的长度。"""
    ids = list(range(1000, 1020))
    plain, small = speaker_of("none", experts=experts), speaker_of(quantize, experts=experts)
    with torch.inference_mode():
        a, b = (s._next(torch.tensor(ids), 0) for s in (plain, small))
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.999
    assert a.argmax() == b.argmax()
    assert len(list(small.generate(ids, Sampling(temp=0, penalty=1.0, max=20)))) == 20


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("quantize", ["none", "bf16", "int8"])
def test_compiled_generation_equals_eager(quantize, device, capfd):
    """编译只是快：fp32 的贪心输出一个编号也不差，存得小的打分几乎相同。显卡上录成 CUDA 图。

    同一个进程里，矩阵存法不同的第二个模型也不会误用第一个编译好的代码。
    """
    ids, greedy = list(range(1000, 1010)), Sampling(temp=0, penalty=1.0, max=40)
    for kind in (quantize, "int8" if quantize == "none" else "none"):
        eager, compiled = (speaker_of(kind, compile=c, device=device) for c in (False, True))
        if kind == "none":
            assert list(compiled.generate(ids, greedy)) == list(eager.generate(ids, greedy))
        context = torch.tensor(ids, device=device)
        with torch.inference_mode():
            for speaker in (eager, compiled):
                speaker._next(context[:-1], 0)
            a, b = (s._next(context, len(ids) - 1) for s in (eager, compiled))
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9995
    assert "失败" not in capfd.readouterr().err  # 编译失败会改走不编译的，那就什么也没有检验


@pytest.mark.slow
def test_a_second_int8_model_does_not_speak_with_the_first_ones_matrices(capfd):
    """编译 int8 时矩阵是常数，写在编译好的代码里；形状相同的另一个模型要有自己的一份。"""
    ids = torch.tensor(list(range(1000, 1010)))
    for seed in (0, 1):
        pair = speaker_of("int8", seed=seed), speaker_of("int8", compile=True, seed=seed)
        with torch.inference_mode():
            for speaker in pair:
                speaker._next(ids[:-1], 0)
            a, b = (s._next(ids, len(ids) - 1) for s in pair)
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9995
    assert "失败" not in capfd.readouterr().err  # 编译失败会改走不编译的，那就什么也没有检验


# ---------- --quantize auto ----------


@pytest.fixture
def worth_trying(monkeypatch):
    """再小的模型也试，不论什么处理器。"""
    monkeypatch.setattr(speed, "WORTH_TRYING", range(10**9))
    monkeypatch.setattr(speed, "on_x86", lambda device: True)


def coarse(monkeypatch, bits: int) -> None:
    """int8 换成更粗的：每个元素只有 bits 位。"""
    whole = CompactLinear.__init__

    def store(self, weight, dtype):
        whole(self, weight, dtype)
        if self.scale is not None:
            step = 2 ** (8 - bits)
            self.weight = (self.weight.float() / step).round().mul(step).clamp(-127, 127).char()

    monkeypatch.setattr(CompactLinear, "__init__", store)


@pytest.mark.parametrize("experts", [0, 4])
def test_auto_takes_int8_where_it_costs_nothing(worth_trying, experts):
    """与写明 int8 的说的一个字也不差；只是挑，不动全局的随机数。"""
    named, chosen = speaker_of("int8", experts=experts), speaker_of("auto", experts=experts)
    assert stored_as(chosen) == stored_as(named) == "int8"
    random = Sampling(temp=1, seed=5, max=20)
    ids = list(range(1000, 1010))
    assert list(chosen.generate(ids, random)) == list(named.generate(ids, random))
    speaker_of("none", experts=experts)
    untouched = torch.get_rng_state()
    speaker_of("auto", experts=experts)
    assert torch.equal(torch.get_rng_state(), untouched)


def test_auto_refuses_what_costs_more(worth_trying, monkeypatch):
    """粗到损失多了千分之一以上，就照旧，原来的矩阵一位也没有动。"""
    coarse(monkeypatch, 3)
    plain, chosen = speaker_of("none"), speaker_of("auto")
    assert stored_as(chosen) == "float32"
    assert not [m for m in chosen.model.modules() if isinstance(m, CompactLinear)]
    pairs = zip(plain.model.parameters(), chosen.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_loss_it_estimates_grows_with_the_error(monkeypatch):
    """原样的不增加；每少两位，误差大四倍，增加的损失大一个数量级上下。"""
    full = speaker_of("none")
    assert abs(loss_added(full, speaker_of("none"))) < 1e-6
    found = []
    for bits in (8, 6, 4):
        with monkeypatch.context() as patch:
            coarse(patch, bits)
            found.append(loss_added(full, speaker_of("int8")))
        assert loss_added(full, speaker_of("none")) < 1e-6  # full 自己没有变
    assert 0 < found[0] < 1e-3
    assert 8 < found[1] / found[0] < 32 and 8 < found[2] / found[1] < 32


def test_the_loss_it_estimates_is_the_loss_of_a_long_text(monkeypatch):
    """几十个词元的估计，与 full 自己写一千多个词元、逐个算损失之差所得的，差不了一半。"""
    coarse(monkeypatch, 3)
    full, small = speaker_of("none"), speaker_of("int8")
    losses = torch.zeros(2)
    for seed in range(1, 31):
        ids = full.prompt("你好")
        as_it_is = Sampling(temp=1, top_k=0, top_p=1, penalty=1, max=40, seed=seed)
        new = [choice.token for choice in full.choices(ids, as_it_is)]
        for i, speaker in enumerate((full, small)):
            probs = speaker.read([*ids, *new])[len(ids) - 1 : -1]
            losses[i] -= probs.gather(1, torch.tensor(new)[:, None]).log().sum()
    long = (losses[1] / losses[0] - 1).item()
    assert long > 1e-3
    assert loss_added(full, small) == pytest.approx(long, rel=0.5)


def test_auto_leaves_small_models_and_other_machines_alone(monkeypatch):
    """小的不值得等，编译 int8 要等太久，没有量过的设备照旧：连试也不试。"""
    monkeypatch.setattr(speed, "loss_added", lambda *_: pytest.fail("试了"))
    assert stored_as(speaker_of("auto")) == "float32"
    monkeypatch.setattr(speed, "WORTH_TRYING", range(10**9))
    assert stored_as(speaker_of("auto", compile=True)) == "float32"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert stored_as(speaker_of("auto")) == "float32"


def test_auto_with_hardly_any_context(worth_trying):
    """上下文放不下那一段文字的，就只读放得下的。"""
    full, small = speaker_of("none"), speaker_of("int8")
    for length in (1, 5):
        full.config.max_len = length
        assert 0 < loss_added(full, small) < 1e-3


def test_nan_is_never_good_enough(worth_trying, monkeypatch):
    monkeypatch.setattr(speed, "loss_added", lambda *_: float("nan"))
    assert stored_as(speaker_of("auto")) == "float32"
