"""看进模型里去：一段文字从编号到「下一个词元」，每一步发生了什么。

    python -m tools.explain "守株待兔："                    印在终端里，并写出 out/explain.html
    python -m tools.explain "你好" --checkpoint out/tiny/sft.pt --write 20 --html a.html

网页自成一体，不联网，用浏览器打开即可。每个数都来自模型自己的前向（见 microscope.py）。
"""

import base64
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chat import display
from config import Config, UserError, option
from engine.device import Device
from engine.speed import load_for_chat
from generate import Sampling, Speaker, check_finite
from microscope import anatomy, leave_one_out, logit_lens, look
from settings.flags import check_choices, help_text, is_text, parse_flags, run_script
from settings.resolve import load_config

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class Options:
    """命令行参数。"""

    checkpoint: str | None = option(None, "检查点；默认是训练脚本写下的，微调过的优先")
    html: str = option("out/explain.html", "网页写到哪里")
    write: int = option(0, "先让模型接着写多少个词元（总选最可能的），再一起看", "词元")
    at: int | None = option(None, "看第几个词元之后的猜测，从 1 数起；默认最后一个")
    most: int = option(64, "最多看多少个词元：时间与内存随它的平方增长", "词元")
    device: str = option("auto", "设备", choices=("auto", "cuda", "mps", "cpu"))


def main() -> None:
    """读命令行，看一遍，印出来，写成网页。"""
    text, options = read_arguments(sys.argv[1:])
    speaker = load_speaker(options.checkpoint, options.device)
    ids = speaker.prompt(text)
    if len(ids) > speaker.config.max_len:
        limit = speaker.config.max_len
        raise UserError(f"这段文字有 {len(ids)} 个词元，模型最多看 {limit} 个；请短一些")
    greedy = Sampling(temp=0, penalty=1, max=options.write)
    ids += speaker.generate(ids, greedy) if options.write else []
    dropped = max(0, len(ids) - options.most)
    if dropped:
        print(
            f"（共 {len(ids)} 个词元，只把最后 {options.most} 个送进模型，数因此与读全文时不同；"
            f"想看全文用 --most {len(ids)}）"
        )
    ids = ids[dropped:]
    at = len(ids) if options.at is None else options.at
    if not 1 <= at <= len(ids):
        raise UserError(f"--at 要在 1 与词元数 {len(ids)} 之间，得到的是 {at}")
    started = time.perf_counter()
    facts = examine(speaker, ids, dropped)
    seconds = time.perf_counter() - started
    report(facts, at - 1, display.terminal(sys.stdout))
    path = Path(options.html)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(facts, at - 1), encoding="utf-8")
    print(f"\n看一遍用了 {seconds:.2f} 秒。网页：{path}（用浏览器打开）")


def read_arguments(argv: list[str]) -> tuple[str, Options]:
    """命令行 -> 要看的文字与各项参数。"""
    if "--help" in argv or "-h" in argv:
        print(help_text(Options, '用法：python -m tools.explain "文字" [--参数 值 …]'))
        raise SystemExit(0)
    if not argv or argv[0].startswith("--") or not argv[0].strip():
        raise UserError('请先写要看的文字，例如：python -m tools.explain "守株待兔："')
    problems: list[str] = []
    options = Options(**parse_flags(Options, argv[1:], problems))
    if not is_text(argv[0]):
        problems.append(f"要看的文字不是 UTF-8：{argv[0]!r}")
    if options.write < 0:
        problems.append(f"--write 不能是负数，得到的是 {options.write}")
    if options.most < 1:
        problems.append(f"--most 至少是 1，得到的是 {options.most}")
    if not options.html.strip():
        problems.append("--html 是空的；请写上网页的路径")
    check_choices(options, problems)
    if problems:
        raise UserError("；".join(problems))
    return argv[0], options


def load_speaker(checkpoint: str | None, device: str = "auto") -> Speaker:
    """用 fp32 载入一个模型；没有指定就找默认训练写下的，微调过的优先。

    Raises:
        UserError: 没有检查点，或者不能用。
    """
    if checkpoint is None:
        out = Path(load_config("pretrain", [])[0].out_dir)
        found = [path for path in (out / "sft.pt", out / "pretrain.pt") if path.exists()]
        if not found:
            raise UserError(
                f"{out} 里还没有模型；请先运行 python pre_train.py，或用 --checkpoint 指定"
            )
        checkpoint = str(found[0])
    config = Config(device=device, dtype="float32", compile=False)
    return load_for_chat(Path(checkpoint), Device(config))


# ---------- 1. 看一遍，记成能写进 JSON 的样子 ----------


def examine(speaker: Speaker, ids: list[int], dropped: int = 0) -> dict:
    """把 ids 看一遍，所有要给人看的数。

    「目标」是每个位置的下一个词元；最后一个位置没有下一个，就用模型最想写的。

    Args:
        dropped: 前面还有多少个词元没有送进来，只用来说一声。
    Raises:
        UserError: 模型坏了，打分不是有限的数。
    """
    model, label = speaker.model, speaker.tokenizer.label
    view = look(model, ids)
    check_finite(view.logits)
    probs = view.logits.softmax(-1)  # (T, V)
    targets = [*ids[1:], probs[-1].argmax().item()]
    lens = logit_lens(model, view.residual).softmax(-1)  # (L + 1, T, V)
    without = leave_one_out(model, ids, targets).exp()  # (T, T)
    wanted = torch.tensor(targets, device=probs.device)

    def best(p: torch.Tensor, k: int) -> list:
        """概率 (T, V) -> 每个位置最可能的 k 个 [名字, 概率]。"""
        values, tokens = p.topk(k)
        return [
            [[label(token), rounded(value)] for token, value in zip(*pair, strict=True)]
            for pair in zip(tokens.tolist(), values.tolist(), strict=True)
        ]

    parts = [asdict(part) for part in anatomy(speaker.config, len(ids))]
    return {
        "stage": speaker.stage,
        "ids": ids,
        "dropped": dropped,
        "tokens": [label(token) for token in ids],
        "targets": [label(token) for token in targets],
        "next": best(probs, 10),
        "target_p": [rounded(p) for p in probs.gather(1, wanted[:, None])[:, 0].tolist()],
        "attention": packed(view.attention),
        "n_heads": view.attention.size(1),
        "n_layers": view.attention.size(0),
        "lens": [best(layer, 3) for layer in lens],
        "lens_target_p": [
            [rounded(p) for p in layer.gather(1, wanted[:, None])[:, 0].tolist()] for layer in lens
        ],
        "without": [[None if p != p else rounded(p) for p in row] for row in without.tolist()],
        "norms": [[rounded(x) for x in row] for row in view.residual.norm(dim=-1).tolist()],
        "writes": [[[rounded(x) for x in y] for y in pair] for pair in view.writes.tolist()],
        "experts": taken(view.experts, speaker.config.n_active),
        "parts": parts,
        "total_params": sum(p.numel() for p in model.parameters()),
    }


def taken(experts: torch.Tensor | None, n_active: int) -> list | None:
    """各位专家占多少 (L, T, E) -> 每层每个词元挑中的几位 [第几位（从 1 数起）, 占多少]。"""
    if experts is None:
        return None
    weights, chosen = experts.topk(n_active, dim=-1)  # 各 (L, T, A)
    pairs = torch.stack([chosen + 1, weights], dim=-1).tolist()
    return [[[[int(e), rounded(w)] for e, w in token] for token in layer] for layer in pairs]


def rounded(x: float) -> float:
    """留六位有效数字：写进网页的字节少一半，看不出差别。"""
    return float(f"{x:.6g}")


def packed(attention: torch.Tensor) -> str:
    """注意力 (L, H, T, T) -> 下三角的数，每个 16 位（1/65535 为单位），base64 文字。

    只写 j ≤ i 的：看不见后面，那里都是 0。
    """
    rows, columns = np.tril_indices(attention.size(-1))
    weights = attention.cpu().numpy()[:, :, rows, columns]
    return base64.b64encode((weights * 65535).round().astype("<u2").tobytes()).decode()


def unpacked(facts: dict) -> np.ndarray:
    """`packed` 的反面：(L, H, T, T)。"""
    n, shape = len(facts["ids"]), (facts["n_layers"], facts["n_heads"])
    weights = np.zeros((*shape, n, n), np.float32)
    rows, columns = np.tril_indices(n)
    numbers = np.frombuffer(base64.b64decode(facts["attention"]), "<u2").reshape(*shape, -1)
    weights[:, :, rows, columns] = numbers / 65535
    return weights


# ---------- 2. 网页 ----------


def page(facts: dict, at: int) -> str:
    """一张自成一体的网页：样式、程序、数据都在里面。

    Args:
        facts: `examine` 的结果。
        at: 打开时选中的位置，从 0 数起。
    """
    data = json.dumps(facts | {"at": at}, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # 文字里若有 </script>，不能让它结束了程序
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", data)


# ---------- 3. 终端 ----------


def report(facts: dict, at: int, console: Console) -> None:
    """印出位置 at 的猜测是怎样来的；网页里每个位置都有。"""
    tokens, target = facts["tokens"], facts["targets"][at]

    def show(title: str, *things) -> None:
        console.print(Text(f"\n{title}", "bold"))
        for thing in things:
            console.print(thing)

    pairs = "  ".join(f"{t} {i}" for t, i in zip(tokens, facts["ids"], strict=True))
    show(f"一、{len(tokens)} 个词元与编号", Text(pairs))
    here = f"第 {at + 1} 个「{tokens[at]}」之后"
    rows = [(name, p, display.percent(p)) for name, p in facts["next"][at]]
    show(f"二、{here}，它猜下一个是", bars(rows))
    p = facts["target_p"][at]
    rows = [
        (
            f"第 {i + 1} 个「{tokens[i]}」",
            facts["without"][i][at],
            change(p, facts["without"][i][at]),
        )
        for i in range(at + 1)
        if facts["without"][i][at] is not None
    ]
    title = f"三、「{target}」的概率是 {display.percent(p)}；去掉一个词元就变成（少 1 比特是减半）"
    show(title if rows else "三、只有一个词元，去掉就没有了", bars(rows))
    lens = [facts["lens"][layer][at] for layer in range(facts["n_layers"] + 1)]
    rows = [
        (layer_name(i), facts["lens_target_p"][i][at], guesses(best)) for i, best in enumerate(lens)
    ]
    show(f"四、读到某一层就停，它猜什么（横条是「{target}」的概率）", bars(rows))
    show(f"五、{here}，每个头最看哪个", most_attended(facts, at))
    longest = max(row[at] for row in facts["norms"])
    rows = [
        (layer_name(i), row[at] / longest, f"{row[at]:.2f}" + added(facts, i, at))
        for i, row in enumerate(facts["norms"])
    ]
    show("六、残差流里的向量有多长", bars(rows))
    show("七、每一步的形状、参数、运算量", anatomy_table(facts))
    if facts["experts"]:
        show("八、每层把这个词元交给了哪几位专家，各占多少", experts_table(facts, at))


def layer_name(layer: int) -> str:
    """第 0 行是还没有进任何一层的词嵌入。"""
    return f"第 {layer} 层" if layer else "词嵌入"


def bars(rows: list[tuple[str, float, str]]) -> Table:
    """(名字, 0 到 1 的长短, 后面的话) 画成横条。"""
    table = Table.grid(padding=(0, 1))
    for name, p, words in rows:
        table.add_row(Text(name), Bar(1, 0, p, width=24), Text(words))
    return table


def change(before: float, after: float) -> str:
    """概率变了多少，写成比特：少 1 比特就是减半。"""
    moved = display.bits(before) - display.bits(after)
    return f"{display.percent(after)}（{moved:+.1f} 比特）"


def guesses(best: list) -> str:
    """几个猜测写成一行。"""
    return "  ".join(f"{name} {display.percent(p)}" for name, p in best)


def added(facts: dict, layer: int, at: int) -> str:
    """这一层的注意力与前馈各加了多长的向量。"""
    if layer == 0:
        return ""
    attention, feed_forward = (kind[at] for kind in facts["writes"][layer - 1])
    return f"  注意力加了 {attention:.2f}，前馈加了 {feed_forward:.2f}"


def most_attended(facts: dict, at: int) -> Table:
    """每层每头，位置 at 看得最多的那个词元。"""
    weights = unpacked(facts)[:, :, at]  # (L, H, T)
    table = Table(box=None, padding=(0, 1))
    table.add_column("")
    for head in range(facts["n_heads"]):
        table.add_column(f"头 {head + 1}")
    for layer, heads in enumerate(weights):
        cells = [(row.argmax(), row.max()) for row in heads]
        table.add_row(
            f"第 {layer + 1} 层",
            *(Text(f"{facts['tokens'][j]} {display.percent(float(p))}") for j, p in cells),
        )
    return table


def experts_table(facts: dict, at: int) -> Table:
    """每层一行：接下位置 at 的几位专家，以及其中第一位还接了哪些词元。"""
    table = Table(box=None, padding=(0, 1))
    for name in ("", "交给", "其中第一位还接了"):
        table.add_column(name, overflow="fold")
    for number, layer in enumerate(facts["experts"], start=1):
        first = layer[at][0][0]
        others = [
            facts["tokens"][i]
            for i, pairs in enumerate(layer)
            if i != at and first in (e for e, _ in pairs)
        ]
        table.add_row(
            f"第 {number} 层",
            Text("  ".join(f"{e} 号 {display.percent(w)}" for e, w in layer[at])),
            Text(" ".join(others) or "—"),
        )
    return table


def anatomy_table(facts: dict) -> Table:
    """每一步一行；块只列第一个，其余相同。"""
    table = Table(box=None, padding=(0, 1))
    for name in ("零件", "形状", "参数", "运算量", "做什么"):
        right = name in ("参数", "运算量")
        table.add_column(
            name, justify="right" if right else "left", overflow="fold", no_wrap=name != "做什么"
        )
    for part in facts["parts"]:
        shape = " × ".join(map(str, part["shape"]))
        flops = f"{part['flops']:,}" if part["flops"] else "—"
        name = part["name"].replace("blocks.0.", "  ")  # 缩进的在块里
        table.add_row(name, f"({shape})", f"{part['params']:,}", flops, part["does"])
    table.add_row("", "", f"{facts['total_params']:,}", f"{total_flops(facts):,}", "合计（所有层）")
    return table


def total_flops(facts: dict) -> int:
    """一次前向的浮点运算数：块里的乘以层数。"""
    times = [facts["n_layers"] if p["name"].startswith("blocks.") else 1 for p in facts["parts"]]
    return sum(n * p["flops"] for n, p in zip(times, facts["parts"], strict=True))


if __name__ == "__main__":
    run_script(main)
