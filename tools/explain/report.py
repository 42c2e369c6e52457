"""印在终端里：某一个位置的猜测是怎样来的。"""

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chat import display
from tools.explain.facts import total_flops, unpacked


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
    if facts["before"]:
        show(f"动手之后：{facts['changed']}", compared(facts, at))
    for when, text in zip(("动手之前", "动手之后"), facts["answers"] or (), strict=False):
        show(f"{when}，它接着写", Text(text))
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


def compared(facts: dict, at: int) -> Table:
    """位置 at 的猜测，动手之前与之后。"""
    before = facts["before"]
    pairs = [*facts["next"][at], [facts["targets"][at], facts["target_p"][at]]]
    former = [*before["next_p"][at], before["target_p"][at]]
    if facts["targets"][at] in [name for name, _ in facts["next"][at]]:
        pairs, former = pairs[:-1], former[:-1]
    rows = zip(pairs, former, strict=True)
    return bars(
        [(name, p, f"{display.percent(was)} → {change(was, p)}") for (name, p), was in rows]
    )


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
