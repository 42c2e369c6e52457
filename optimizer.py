"""参数怎样更新：学习率的曲线，Muon 与 AdamW。

learning_rate     学习率曲线：升温、平稳、下降
Muon              给矩阵用的优化器
MuonAdamW         循环里用的那一个：矩阵归 Muon，其余归 AdamW
build_optimizer   照配置造它
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config
from experts import MixtureOfExperts
from model import Transformer

# ---------- 1. 学习率 ----------


def learning_rate(step: int, max_steps: int, warmup: float, decay: float) -> float:
    """第 step 步（从 0 数）的学习率是最高值的几倍：升温 -> 平稳 -> 下降到 0。

    平稳段让训练随时可以延长，最后一段的下降换来大部分的好处（WSD，arXiv 2404.06395）。
    """
    rising = (step + 1) / max(1, warmup * max_steps)  # 1. 从 0 线性升到 1
    falling = (max_steps - step) / max(1, decay * max_steps)  # 3. 最后线性降到 0
    return min(1.0, rising, falling)  # 2. 中间保持 1


# ---------- 2. Muon ----------


class Heads(NamedTuple):
    """注意力的一个矩阵里，各个头各占一段：每段多宽，在各行（查询、键、值）还是各列（输出）。"""

    width: int
    in_columns: bool


class Muon(torch.optim.Optimizer):
    """给矩阵用的优化器：把动量正交化，使每个方向上的更新一样大（Muon，arXiv 2502.16982）。

    与 `torch.optim.Muon` 的算法相同（测试里逐步比对），不同处有四：许多矩阵叠在一起算，
    发给设备的只有几十个运算；正交化之后，再让每个神经元的步子一样大（`even_out`）；
    注意力的矩阵可以按头切开，各算各的；精度可选，因为没有 bf16 指令的 CPU 上，bf16 会慢上百倍。

    Args:
        matrices: 二维参数；三维的是叠在一起的许多个（各位专家的），各算各的。
        lr: 学习率，已换算成与 AdamW 相当的大小（每个元素的更新约为 0.2 lr）。
        momentum: 更新是最近约 1 / (1 - momentum) 步梯度的平均。
        weight_decay: 解耦的权重衰减。
        dtype: 正交化时的精度。
        pace: 步子与别的不同的参数：{参数: 几倍}。
        heads: 按头切开的参数：{参数: 怎样切}；不在其中的，整个是一个矩阵。
        beta2: 求步子大小的平均时，旧的占多少；0：不调匀。
        gather, scatter: 几个进程把参数分开放时（FSDP）用：正交化要整个的矩阵，gather 凑齐它，
            scatter(更新, 参数) 再各取各的；不分开放就什么也不用做。
    """

    def __init__(
        self,
        matrices,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
        pace: dict[Tensor, float] | None = None,
        heads: dict[Tensor, Heads] | None = None,
        beta2: float = 0.0,
        gather: Callable[[Tensor], Tensor] = lambda update: update,
        scatter: Callable[[Tensor, Tensor], Tensor] = lambda update, p: update,
    ):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype, self.pace, self.heads, self.beta2 = dtype, pace or {}, heads or {}, beta2
        self.gather, self.scatter = gather, scatter

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """按已经算好的梯度更新一次。"""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads, momenta = [p.grad for p in params], [self._state(p)["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            updates = [self.gather(update) for update in updates]
            for members, size, done in self._orthogonalize(params, updates):
                some = [params[i] for i in members]
                step = group["lr"] * self.pace.get(some[0], 1.0) * size
                torch._foreach_add_(some, [*map(self.scatter, done, some)], alpha=-step)

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
            if self.beta2:
                n, _, long = self.laid_out(p)
                state["second"] = torch.zeros(n, long, device=p.device)
        return state

    def laid_out(self, p: Tensor) -> torch.Size:
        """参数 p 摆好之后（`lay_out`）：几个矩阵，短边，长边。"""
        return lay_out(torch.empty(1, *p.shape, device="meta"), self.heads.get(p)).shape

    def _orthogonalize(self, params: list[Tensor], updates: list[Tensor]):
        """每个更新正交化。一组一组地给出：是第几个参数，乘上多大才与 AdamW 的相当，更新。"""
        alike = defaultdict(list)  # 形状、切法与步子都相同的，叠在一起
        for i, p in enumerate(params):
            alike[p.shape, self.heads.get(p), self.pace.get(p, 1.0)].append(i)
        batches = defaultdict(list)  # 摆好之后一样大的，一起算
        for (shape, heads, _), members in alike.items():
            stack = lay_out(torch.stack([updates[i] for i in members]), heads)
            batches[stack.shape[1:]].append((shape, heads, members, stack))
        for size, groups in batches.items():
            stacks = [stack for *_, stack in groups]
            done = orthogonalize(torch.cat(stacks) if stacks[1:] else stacks[0], self.dtype)
            if self.beta2:
                owners = [params[i] for *_, members, _ in groups for i in members]
                seconds = [self.state[p]["second"] for p in owners]
                second = torch.cat(seconds)
                done = even_out(done, second, self.beta2)
                torch._foreach_copy_(seconds, second.split([len(x) for x in seconds]))
            parts = done.split([len(stack) for stack in stacks])
            for (shape, heads, members, _), part in zip(groups, parts, strict=True):
                # 每个元素的均方根是 1 / √长边，AdamW 的约为 0.2
                yield members, 0.2 * max(size) ** 0.5, put_back(part, shape, heads)


def lay_out(x: Tensor, heads: Heads | None) -> Tensor:
    """同形状的许多个更新 (L, …, 行, 列) -> 要正交化的矩阵 (N, 短边, 长边)。"""
    if heads:
        x = x.mT if heads.in_columns else x
        x = x.reshape(-1, heads.width, x.size(-1))
    x = x.reshape(-1, *x.shape[-2:])
    return x.mT if x.size(-2) > x.size(-1) else x  # 短边在前，乘积的矩阵更小


def put_back(x: Tensor, shape: torch.Size, heads: Heads | None) -> Tensor:
    """`lay_out` 反过来：(N, 短边, 长边) -> (L, *shape)，fp32，连续的。"""
    rows, columns = shape[-2:]
    if heads and heads.in_columns:
        rows, columns = columns, rows
    if (heads.width if heads else rows) > columns:
        x = x.mT
    x = x.reshape(-1, *shape[:-2], rows, columns)
    x = x.mT if heads and heads.in_columns else x
    return x.to(torch.float32, memory_format=torch.contiguous_format)


def orthogonalize(matrices: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """把每个矩阵的奇异值都推到 1 附近，方向不变：牛顿–舒尔茨迭代，不用做奇异值分解。

    Args:
        matrices: (N, 行, 列)，行不比列多时最省。
        dtype: 迭代的精度；半精度就够，但要先归一再换过去：fp16 装不下没有归一的。
        steps: 迭代次数。
    Returns:
        (N, 行, 列)，精度是 dtype。
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Keller Jordan 选的系数：在 0 附近升得最快
    size = matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = torch.div(matrices, size, out=torch.empty_like(matrices, dtype=dtype))
    if dtype == torch.float32:
        return all_at_once(x @ x.mT, (a, b, c), steps) @ x
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b·gram + c·gram²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a·x + polynomial·x
    return x


def all_at_once(gram: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """牛顿–舒尔茨的几步合成一个矩阵，乘上 x 就是结果。

    每一步都是左乘一个只由 x·xᵀ 决定的多项式，所以先在短边见方的小矩阵上连乘，长的那一边只在头尾
    各乘一次：长边是短边的三倍时省三分之一。舍入放大了几十倍，fp32 还有余地，半精度就不行。

    Args:
        gram: x·xᵀ，(N, 行, 行)。
        coefficients: 多项式 a + b·gram + c·gram² 的系数。
    Returns:
        (N, 行, 行)。
    """
    a, b, c = coefficients
    polynomial = product = None
    for _ in range(steps):
        if product is not None:
            gram = polynomial @ gram @ polynomial  # 走过几步的 x，x·xᵀ 是它
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
    return product


def even_out(x: Tensor, second: Tensor, beta2: float) -> Tensor:
    """正交化过的矩阵，各列的步子调匀：除以各列近来的大小，与平均的相比；整个矩阵的大小差不多不变。

    短边的各行一样长，长边的各列却不：前馈层的长边是一个个神经元，有的一步走得远，有的几乎不走
    （NorMuon，arXiv 2510.05491）。

    Args:
        x: (N, 短边, 长边)。
        second: 各列长度平方的滑动平均 (N, 长边)，就地更新。
        beta2: 求平均时，旧的占多少。
    Returns:
        (N, 短边, 长边)，fp32。
    """
    lengths = torch.linalg.vector_norm(x, dim=-2, dtype=torch.float32)  # (N, 长边)
    second.lerp_(lengths.square(), 1 - beta2)
    sizes = second.clamp(min=1e-20)  # 全是零的矩阵，调了仍是零
    return x * (sizes / sizes.mean(-1, keepdim=True)).rsqrt()[:, None]


# ---------- 3. 合成一个 ----------


class MuonAdamW(torch.optim.Optimizer):
    """两个优化器合成一个：各层的矩阵归 Muon，词嵌入与归一化的增益归 AdamW。

    后者没有「方向」可以正交化。循环只管 `set_lr`、`step`、`zero_grad`；检查点只管
    `state_dict` 与 `load_state_dict`。

    Args:
        muon, adamw: 两部分；构造时的学习率就是各自的最高值。
    """

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        for group in (*muon.param_groups, *adamw.param_groups):
            group["max_lr"] = group["lr"]
        super().__init__([*muon.param_groups, *adamw.param_groups], {})  # 同一些组，不是副本

    def set_lr(self, factor: float) -> None:
        """每组参数的学习率 = 它的最高值 × factor。"""
        for group in self.param_groups:
            group["lr"] = group["max_lr"] * factor

    @property
    def lr(self) -> float:
        """Muon 现在的学习率：写进记录的是它。"""
        return self.muon.param_groups[0]["lr"]

    def part_of(self, p: Tensor) -> torch.optim.Optimizer:
        """管着参数 p 的是哪一部分。"""
        mine = {id(q) for group in self.muon.param_groups for q in group["params"]}
        return self.muon if id(p) in mine else self.adamw

    def step(self, closure=None) -> None:
        """按已经算好的梯度更新一次。"""
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> list[dict]:
        """两部分各自的状态。"""
        return [self.muon.state_dict(), self.adamw.state_dict()]

    def load_state_dict(self, saved: list[dict]) -> None:
        """装回两部分的状态；学习率等取自现在的配置，接着练时它可以与存下的不同。

        Raises:
            ValueError, KeyError, IndexError, TypeError, AttributeError: 存下的与参数对不上。
        """
        for part, old in zip((self.muon, self.adamw), saved, strict=True):
            params = [p for group in part.param_groups for p in group["params"]]
            check_state(part, params, old["state"])
            state = {
                i: {
                    name: self.muon.scatter(x, params[i]) if x.shape == params[i].shape else x
                    for name, x in entry.items()
                }
                for i, entry in old["state"].items()
            }
            groups = part.state_dict()["param_groups"]
            part.load_state_dict({"state": state, "param_groups": groups})
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def check_state(part: torch.optim.Optimizer, params: list[Tensor], saved: dict) -> None:
    """存下的状态与参数一一对得上；PyTorch 自己不核对，形状不同的也照装不误。

    Args:
        params: 这一部分管的参数，按次序。
        saved: {第几个参数: {名字: 张量}}；一步也没有更新过的，是空的。
    Raises:
        ValueError: 少了、多了，或者形状、类型、值不对。
    """
    if saved and saved.keys() != set(range(len(params))):
        raise ValueError(f"有 {len(saved)} 个参数的状态，参数有 {len(params)} 个")
    names = {"step", "exp_avg", "exp_avg_sq"}
    if isinstance(part, Muon):
        names = {"momentum", "second"} if part.beta2 else {"momentum"}
    for i, entry in saved.items():
        if entry.keys() != names:
            raise ValueError(f"第 {i} 个参数的状态应当是 {'、'.join(sorted(names))}")
        for name, x in entry.items():
            shape = torch.Size() if name == "step" else params[i].shape
            if name == "second":
                n, _, long = part.laid_out(params[i])
                shape = (n, long)
            if x.shape != shape or x.dtype != torch.float32:
                raise ValueError(f"第 {i} 个参数的 {name} 的形状或类型不对")
            if name == "step" and not 1 <= x.item() < float("inf"):
                raise ValueError(f"第 {i} 个参数的 {name} 是 {x.item()}")


def build_optimizer(
    model: Transformer, config: Config, lr: float, dtype: torch.dtype = torch.float32, **sharding
) -> MuonAdamW:
    """照配置造优化器。

    有两种矩阵走得慢些：各层写进残差流的最后一个投影，走得太急，几步之内就盖过了词嵌入，
    后面的层便认不出眼前是哪个词元；专家混合的路由器，走得太急，就有专家再也轮不到。

    Args:
        lr: 最高学习率。
        dtype: 前向用的精度，正交化也用它。
        sharding: 模型分开放时的 gather 与 scatter，见 `Muon`。
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    experts = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    pace = {m.router.weight: m.router_scale for m in experts}
    pace |= dict.fromkeys(written_by(model), config.residual_lr_scale)
    heads = heads_of(model) if config.muon_heads else {}
    muon = Muon(matrices, lr, config.muon_momentum, config.weight_decay, dtype, pace, heads,
                config.muon_beta2, **sharding)  # fmt: skip
    adamw = torch.optim.AdamW(
        rest,
        lr * config.embed_lr_scale,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=0.0,
        fused=rest[0].device.type in ("cuda", "cpu"),
    )
    return MuonAdamW(muon, adamw)


def written_by(model: Transformer) -> list[Tensor]:
    """各层写进残差流的最后一个投影。"""
    ends = ("attention.out.weight", "feed_forward.down.weight", "feed_forward.down")
    return [p for name, p in model.blocks.named_parameters() if name.endswith(ends)]


def heads_of(model: Transformer) -> dict[Tensor, Heads]:
    """注意力的各个矩阵里，每个头在哪一段。"""
    found = {}
    for layer in (block.attention for block in model.blocks):
        for inward in (layer.query, layer.key, layer.value):
            found[inward.weight] = Heads(layer.head_dim, in_columns=False)
        found[layer.out.weight] = Heads(layer.head_dim, in_columns=True)
    return found
