"""一步里处理器只等设备一次，发给设备的运算有几个：在没有内容的设备（"meta"）上走两个脚本的循环。

"meta" 上的张量只有形状。谁要读它的内容，PyTorch 就报错，所以走得完，就没有别处在等；
处理器自己的张量（数据、专家的负载）仍是真的。
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pre_train
import sft_train
from config import Config
from engine.device import Device
from engine.distributed import World
from engine.shared_row import SharedRow
from engine.stepper import Stepper
from model import Transformer
from optimizer import build_optimizer
from settings.resolve import load_config

META = torch.device("meta")
MARKS = {"步", "备", "反向", "截短", "等", "更新", "步间"}
# 只改看法、不算什么的，设备上没有活。
VIEWS = {"view", "t", "transpose", "unbind", "slice", "alias", "expand", "detach", "_unsafe_view",
         "select", "permute", "split", "split_with_sizes", "unsqueeze", "squeeze", "as_strided",
         "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # fmt: skip


class Sent(TorchDispatchMode):
    """记下发给设备的每个运算。"""

    def __init__(self, story: list[str]):
        super().__init__()
        self.story = story

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if name not in VIEWS and any(x.is_meta for x in tensors_in((args, result))):
            self.story.append(name)
        return result


def tensors_in(value) -> Iterator[Tensor]:
    """嵌套的列表与元组里的张量。"""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for x in value:
            yield from tensors_in(x)


class Watched(World):
    """等设备的那一次记下来；要读的数没有内容，都当作 1。"""

    story: list[str]

    def read(self, tensors: Sequence[Tensor], numbers=()):
        self.story.append("等")
        n = sum(x.numel() for x in tensors)
        return [1.0] * n, [1.0] * n, numbers


class OnPaper(Stepper):
    """走的是脚本自己的循环，只是设备上的张量没有内容；每个动作都记在 `story` 里。"""

    def __init__(self, stage: str, config: Config, tokenizer):
        super().__init__(stage, config, Device(config), tokenizer)
        self.story = []
        self.device.place = META
        self.world = self.device.world = Watched()
        self.world.story = self.story

    def model(self) -> Transformer:
        return Transformer(self.config)

    def find_shared_row(self) -> SharedRow | None:
        shared = super().find_shared_row()  # 要看参数的内容，所以先在处理器上
        return shared and SharedRow.from_state_dict(shared.state_dict(), META)

    def fit(self, loss) -> None:
        loss.model.to(META, torch.bfloat16)  # 显卡上各位专家的乘法只认它

    def steps(self, exam) -> Iterator[int]:
        with Sent(self.story):
            for step in super().steps():
                self.story.append("步")
                yield step

    def _prepare(self, step: int):
        self.story.append("备")
        return super()._prepare(step)

    def backward(self, part) -> None:
        self.story.append("反向")
        super().backward(part)

    def clip(self, optimizer, limit):
        self.story.append("截短")
        return super().clip(optimizer, limit)

    def update(self, optimizer) -> None:
        self.story.append("更新")
        super().update(optimizer)

    def between_steps(self) -> None:
        self.story.append("步间")
        super().between_steps()


SMALL = [
    "--dim",
    "32",
    "--n_layers",
    "2",
    "--n_heads",
    "2",
    "--n_kv_heads",
    "1",
    "--seq_len",
    "128",
    "--batch_size",
    "4",
]
MAIN = {"pretrain": pre_train.main, "sft": sft_train.main}


@pytest.fixture
def walk(tokenizer, builtin_config, builtin_pretrain, builtin_sft):
    """走三步：(阶段, 预设, 另外的参数) -> 走完的 `OnPaper`。"""

    def go(stage: str, preset: str, *flags: str) -> OnPaper:
        argv = ["--preset", preset, "--device", "cpu", "--dtype", "float32", "--no-compile",
                "--data_dir", builtin_config.data_dir, *SMALL, *flags]  # fmt: skip
        config, _ = load_config(stage, argv)
        config.max_steps = config.sft_max_steps = 3
        paper = OnPaper(stage, config, tokenizer)
        MAIN[stage](run=paper)
        return paper

    return go


def steps_of(story: list[str]) -> list[list[str]]:
    """一步一步的。"""
    cuts = [i for i, what in enumerate(story) if what == "步"] + [len(story)]
    return [story[a:b] for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-moe", "wide"])
@pytest.mark.parametrize("accum", ["1", "2"])
def test_a_step_waits_once_when_everything_has_been_sent(walk, stage, preset, accum):
    """反向、截短都已发出，下一批也备好、送出了，才等；等到了，更新发出去，又往下走。"""
    story = walk(stage, preset, "--grad_accum", accum).story
    first, *middle, last = steps_of(story)
    for step in (first, *middle, last):
        marks = [what for what in step if what in MARKS]
        prepares = ["备"] * (step is first), ["备"] * (step is not last)
        assert marks == ["步", *prepares[0], *["反向"] * int(accum), "截短", *prepares[1],
                         "等", "更新", "步间"]  # fmt: skip
        after_clip = step[step.index("截短") : step.index("等")]
        assert "linalg_vector_norm" in after_clip


def test_the_whole_reading_is_one_list(monkeypatch):
    """`World.read` 不管读几样，只向设备要一次。"""
    asked = []
    plain = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: asked.append(x.shape) or plain(x))
    mine, total, numbers = World().read([torch.ones(()), torch.arange(6.0).view(1, 2, 3)], (5, 0.5))
    assert mine == total == [1, 0, 1, 2, 3, 4, 5] and numbers == (5, 0.5)
    assert asked == [(7,)]


def test_reading_what_is_on_the_device_is_noticed(walk, monkeypatch):
    """这份测试自己：循环里多看一眼损失，就走不下去。"""
    clip = OnPaper.clip
    monkeypatch.setattr(OnPaper, "clip", lambda self, *args: clip(self, *args).item())
    with pytest.raises(RuntimeError, match="meta"):
        walk("pretrain", "tiny")


def count(act) -> Counter:
    """做一件事，发给设备的各种运算有几个。"""
    story = []
    with Sent(story):
        act()
    return Counter(story)


@pytest.mark.parametrize("preset", ["tiny", "small", "wide", "deep", "tiny-moe", "moe"])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("beta2", [0.95, 0.0])
def test_an_update_is_a_few_dozen_operations_however_deep(preset, heads, beta2):
    """Muon 发出的运算与层数无关：同样大的矩阵叠在一起，其余的用 `torch._foreach_*` 一次做完。

    分开算时，wide 有 310 个，deep 有 758 个。
    """
    config, _ = load_config("pretrain", ["--preset", preset, "--device", "cpu"])
    config.muon_heads, config.muon_beta2 = heads, beta2
    plain, even = {
        (False, True): (57, 72), (False, False): (70, 96),
        (True, True): (78, 102), (True, False): (91, 126),
    }[config.n_experts > 0, heads]  # fmt: skip
    muon = even if beta2 else plain
    if config.residual_lr_scale != 1 and not heads:  # 形状相同、步子不同的，分成两组
        muon += 3 if beta2 else 4
    with META:
        model = Transformer(config)
    optimizer = build_optimizer(model, config, 0.01, torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.muon.step()
    found = count(optimizer.muon.step)
    assert sum(found.values()) == muon, found


def test_what_happens_around_the_update_does_not_grow_with_the_layers(walk):
    """专家的负载一次取走、一次放回；合用的一行抄给其余的，不先问设备那一行是第几行。"""
    paper = walk("pretrain", "tiny-moe", "--n_layers", "5")
    step = steps_of(paper.story)[1]
    before_wait, after = step[step.index("截短") : step.index("等")], step[step.index("步间") :]
    assert Counter(before_wait)["_foreach_zero_"] == 1
    assert after == ["步间", "_foreach_copy_"] or after == ["步间", "_to_copy", "_foreach_copy_"]
    shared, table = paper.shared, paper._model.embedding.weight
    assert count(lambda: shared.spread(table)) == {"index": 1, "index_put_": 1}
