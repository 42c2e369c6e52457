"""记录：一行一个 JSON，接着练时一行不多、一行不少；坏了的行数出来，留着，用其余的。"""

import json
import math
import os
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invented import documents_like, write
from scripts import LITTLE, QUICK, run

from engine import metrics as module
from engine.metrics import Metrics, in_order, read_metrics, read_records
from engine.progress import Progress
from tools.web import actions

MANY = settings(
    max_examples=2 * settings().max_examples,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def test_metrics_are_one_json_object_a_line_and_a_picture(tmp_path):
    metrics = Metrics(tmp_path / "pretrain", True, Progress())
    metrics.write(step=0, tokens=0, val_loss=math.log(21248), val_bpc=14.7)
    for step in (1, 2):
        metrics.write(step=step, tokens=step * 10, train_loss=9.0 / step, lr=0.1, grad_norm=1.0,
                      tokens_per_second=5.0)  # fmt: skip
    metrics.draw()
    metrics.write(step=3, tokens=30, train_loss=3.0, grad_norm=float("inf"))  # fp16 溢出的一步
    rows = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert rows[-1]["grad_norm"] is None
    assert all("seconds" in r for r in rows)
    assert metrics.picture.read_bytes()[:4] == b"\x89PNG"


def test_metrics_go_on_where_the_checkpoint_is(tmp_path):
    """检查点之后多记的、断电时写了一半的，都不要；时间接着数。"""
    metrics = Metrics(tmp_path, True, Progress())
    for step in range(5):
        metrics.write(step=step, tokens=step)
    with metrics.path.open("a") as f:
        f.write('{"step": 5, "tok')
    again = Metrics(tmp_path, True, Progress(step=3, seconds=100.0))
    again.write(step=4, tokens=44)
    rows = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [(r["step"], r["tokens"]) for r in rows] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 44)]
    assert rows == again.rows
    assert rows[-1]["seconds"] >= 100
    fresh = Metrics(tmp_path, True, Progress())
    assert fresh.path.read_text() == ""


def test_metrics_wait_in_memory_while_the_disk_is_full(tmp_path):
    metrics = Metrics(tmp_path, True, Progress())
    real, full = metrics.file, True

    class Disk:
        def write(self, content):
            if full:
                raise OSError(28, "No space left on device")
            return real.write(content[:7]) if len(content) > 7 else real.write(content)

    metrics.file = Disk()
    metrics.write(step=1, tokens=1)
    metrics.write(step=2, tokens=2)
    full = False
    for step in range(3, 60):  # 一次只写得进几个字节，也一个不丢
        metrics.write(step=step, tokens=step)
    metrics.file = real
    metrics.write(step=60, tokens=60)
    assert [json.loads(x)["step"] for x in metrics.path.open()] == list(range(1, 61))


# ---------- 坏了的记录 ----------


def line_of(step: int, **more) -> bytes:
    row = {"step": step, "tokens": 10 * step, "train_loss": 9.5, "sample": "好"} | more
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


POISON = {
    "deep": b"[" * 100_000 + b"]" * 100_000 + b"\n",
    "deep_inside": b'{"step": 2, "tokens": 3, "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n",
    "no_tokens": b'{"step": 2, "train_loss": 1.0}\n',
    "list": b"[1, 2]\n",
    "long_step": b'{"step": ' + b"9" * 1000 + b', "tokens": 3}\n',
    "longer_step": b'{"step": ' + b"9" * 9999 + b', "tokens": 3}\n',
    "long_loss": line_of(2, train_loss=10**999),
    "text_step": b'{"step": "2", "tokens": 3}\n',
    "true_step": b'{"step": true, "tokens": 3}\n',
    "nan_step": b'{"step": NaN, "tokens": 3}\n',
    "half_a_step": b'{"step": 2.5, "tokens": 3}\n',
    "negative": line_of(-2),
    "negative_tokens": line_of(2, tokens=-2),
    "duplicate": line_of(1),
    "decreasing": line_of(0),
    "far_step": line_of(2**52),
    "text_loss": line_of(2, val_loss="1.0"),
    "nan_loss": line_of(2, val_loss=math.nan),
    "infinite_loss": line_of(2, train_loss=math.inf),
    "list_sample": line_of(2, sample=[1]),
    "empty_list_sample": line_of(2, sample=[], val_loss=1.0),
    "false_sample": line_of(2, sample=False, val_loss=1.0),
    "zero_sample": line_of(2, sample=0, val_loss=1.0),
    "half_a_character": b'{"step": 2, "tokens": 3, "sample": "\\ud800"}\n',
    "null": b"null\n",
    "empty": b"\n",
    "binary": bytes(range(256)) * 9 + b"\n",
}  # fmt: skip


@pytest.mark.parametrize("name", POISON)
def test_a_poisoned_row_is_left_out_and_said(tmp_path, capsys, name):
    """一行有毒的：说一句几行没有用，其余的一个字节不差，原样的一份留着；网页与图也一样。"""
    good = [line_of(0, val_loss=9.9, extra=1e-05), line_of(1), line_of(3)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content := good[0] + good[1] + POISON[name] + good[2] + line_of(4))
    wrong = content[len(b"".join(good[:2])) :].count(b"\n") - 2
    points, samples, said = actions.curves(str(tmp_path))
    assert len(points) == 5 and len(samples) == 1
    assert f"有 {wrong} 行不是完好的记录" in said
    again = Metrics(tmp_path, True, Progress(step=3))
    again.draw()
    assert again.picture.is_file()
    assert path.read_bytes() == b"".join(good)
    assert f"有 {wrong} 行不是完好的记录" in capsys.readouterr().out
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == content
    again.write(step=4, tokens=40)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 3, 4]
    Metrics(tmp_path, True, Progress(step=4))
    assert "完好" not in capsys.readouterr().out  # 修好了，不再说


def test_damaged_records_do_not_cover_each_other(tmp_path):
    """坏了两次，两份都留着。"""
    for n in range(3):
        (tmp_path / "metrics.jsonl").write_bytes(line_of(1) + b"%d\n" % n)
        Metrics(tmp_path, True, Progress(step=1))
    kept = sorted(tmp_path.glob("metrics.damaged*.jsonl"))
    assert [path.read_bytes()[-2:] for path in kept] == [b"1\n", b"2\n", b"0\n"]


def test_a_half_written_last_row_is_not_damage(tmp_path, capsys):
    """断电时写了一半的最后一行：照旧不要，不算坏，也不另留一份。"""
    (tmp_path / "metrics.jsonl").write_bytes(line_of(1) + line_of(2)[:-9])
    Metrics(tmp_path, True, Progress(step=1))
    assert capsys.readouterr().out == ""
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_line_of_100_megabytes_costs_little_memory(tmp_path):
    """没有换行的 100 MB：数作一行，只读不存。"""
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as f:
        f.write(line_of(1) + b'{"step": 2, "x": "')
        for _ in range(100):
            f.write(b"x" * (1 << 20))
        f.write(b'"}\n' + line_of(3))
    tracemalloc.start()
    records = read_records(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row["step"] for row in records.rows] == [1, 3] and records.left_out == 1
    assert peak < 8e6


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_not_a_file_is_said(tmp_path, capsys, kind):
    """记录的名字上是目录、管道：不等它，说一声，换个名字留着。"""
    path = tmp_path / "metrics.jsonl"
    if kind == "pipe" and os.name == "nt":
        pytest.skip("Windows 没有 mkfifo")
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    assert actions.curves(str(tmp_path))[2]
    Metrics(tmp_path, True, Progress(step=1)).write(step=2, tokens=2)
    assert "metrics.damaged.jsonl" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(path)] == [2]


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(0, 9), st.floats(), st.text(max_size=3),
    st.sampled_from([10**400, -1, 2**53, [[]], {}, "\ud800"]),
    st.recursive(st.integers(), st.lists, max_leaves=5),
)  # fmt: skip
names = st.sampled_from(["step", "tokens", *module.NUMBERS, "sample", "val_load", "其它"])
lines = st.one_of(
    st.dictionaries(names, values).map(lambda row: json.dumps(row).encode() + b"\n"),
    st.builds(line_of, st.integers(-1, 9), val_loss=st.floats() | st.none()),
    st.builds(line_of, st.integers(0, 9)),
    st.binary(max_size=20),
    st.builds(lambda row, at: row[:at] + b"\n", st.builds(line_of, st.just(1)), st.integers(0, 60)),
    st.sampled_from(sorted(POISON.values())),
)


@MANY
@given(st.lists(lines, max_size=8), st.integers(1, 9))
def test_any_records_are_read(tmp_path, rows, step):
    """任意的行：接着练、网页都不回溯；用的行步数递增，与文件里的一字不差，其余的都数到了。"""
    for path in tmp_path.iterdir():
        path.unlink()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content := b"".join(rows))
    records = read_records(path)
    steps = [row["step"] for row in records.rows]
    assert steps == sorted(set(steps))
    physical = [line + b"\n" for line in content.split(b"\n")]
    assert all(line in physical for line in records.lines)
    torn = content.rpartition(b"\n")[2]
    n = len(physical) - (not torn)
    assert len(steps) + records.left_out in (n, n - torn.startswith(b'{"'))
    points, samples, said = actions.curves(str(tmp_path))
    json.dumps([points, samples], ensure_ascii=False, allow_nan=False).encode()
    assert bool(said) == bool(records.left_out)
    again = Metrics(tmp_path, True, Progress(step=step))
    assert path.read_bytes() == b"".join(
        line for row, line in zip(records.rows, records.lines, strict=True) if row["step"] <= step
    )
    assert [path.read_bytes() for path in tmp_path.glob("metrics.damaged*")] == (
        [content] if records.left_out else []
    )
    again.write(step=step + 1, tokens=1)
    assert read_metrics(path) == again.rows


@MANY
@given(st.lists(st.integers(0, 12), max_size=12))
def test_the_longest_increasing_run_is_kept(steps):
    """留下的递增，而且不能更多。"""
    kept = in_order(steps)
    assert [steps[i] for i in kept] == sorted({steps[i] for i in kept}) and kept == sorted(kept)
    best = []
    for i, step in enumerate(steps):
        best.append(1 + max((best[j] for j in range(i) if steps[j] < step), default=0))
    assert len(kept) == max(best, default=0)


REAL = [line_of(0, val_loss=9.9, val_bpc=14.5)] + [
    line_of(step, lr=0.01, grad_norm=1.5e-05, seconds=0.25 * step, tokens_per_second=1e4)
    for step in range(1, 12)
]


@st.composite
def spoilt(draw) -> tuple[list[bytes], list[bytes]]:
    """(改动过的记录的各行, 其中没有动过的)：换、删、插、抄、调换几行，或一行里改几个字节。"""
    kept = dict(enumerate(REAL))
    lines = [(i, line) for i, line in enumerate(REAL)]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        i, line = lines[at]
        how = draw(st.sampled_from(["bytes", "poison", "insert", "zeros", "drop"]))
        if how == "insert":
            lines.insert(at, (-1, draw(st.sampled_from(sorted(POISON.values())))))
            continue
        kept.pop(i, None)
        if how == "drop" and len(lines) > 2:
            lines.pop(at)
        elif how == "poison":
            lines[at] = -1, draw(st.sampled_from(sorted(POISON.values())))
        elif how == "zeros":
            lines[at] = -1, bytes(len(line))
        else:
            place, n = draw(st.integers(0, len(line))), draw(st.integers(0, 9))
            new = draw(st.binary(max_size=9).filter(lambda x: b"\n" not in x))
            lines[at] = -1, line[:place] + new + line[place + n :]
    return [line for _, line in lines], [kept[i] for i in sorted(kept)]


@settings(MANY, max_examples=3 * settings().max_examples)
@given(spoilt(), st.booleans())
def test_sound_rows_survive_any_damage_to_the_others(tmp_path, damage, torn):
    """几行坏了，其余的一个字节不差地留着；只有坏的行自称是别的步、挤得进次序里的，才会挤掉别的。"""
    for path in tmp_path.iterdir():
        path.unlink()
    lines, untouched = damage
    content = b"".join(lines)[: -1 if torn else None]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    physical = content.split(b"\n")
    found = [line for line in untouched if line[:-1] in physical]  # 上一行的换行没了，便连在一起
    records = read_records(path)
    others = [line for line in records.lines if line not in untouched]
    assert len(records.lines) >= len(found)
    assert len([line for line in found if line not in records.lines]) <= len(others)
    assert all(line[:-1] in physical for line in records.lines)
    points, _, said = actions.curves(str(tmp_path))
    assert len(points) >= len(records.rows) - len(others) and bool(said) == bool(records.left_out)
    again = Metrics(tmp_path, True, Progress(step=20))
    assert path.read_bytes() == b"".join(records.lines)
    again.write(step=21, tokens=210)
    assert read_records(path).left_out == 0


def test_training_goes_on_from_poisoned_records(tmp_path):
    """真的接着练：记录里每一种有毒的都有一行，说一句，往下练，完好的行一个字节不差，曲线照画。"""
    write(tmp_path / "s.jsonl", documents_like(60, 2))
    flags = ["--data", "s.jsonl", *QUICK, *LITTLE, "--preset", "tiny", "--seq_len", "32",
             "--eval_tokens", "32", "--out_dir", "o"]  # fmt: skip
    run(tmp_path, "pre_train.py", *flags, "--max_steps", "4")
    path = tmp_path / "o/pretrain/metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    looks_sound = ("far_step", "duplicate", "decreasing")  # 单看一行看不出
    poison = [line for name, line in POISON.items() if name not in looks_sound]
    path.write_bytes(b"".join(poison) + b"".join(before[:2] + poison + before[2:] + poison))
    spoilt = path.read_bytes()
    out, _ = run(
        tmp_path, "pre_train.py", *flags, "--max_steps", "6", "--resume", "--allow_changes"
    )
    assert out.count("行不是完好的记录，没有用") == 1
    after = path.read_bytes().splitlines(keepends=True)
    assert after[: len(before)] == before and len(after) > len(before)
    assert path.with_name("metrics.damaged.jsonl").read_bytes() == spoilt
    assert path.with_name("loss.png").is_file() and not actions.curves(str(path.parent))[2]


def test_a_link_in_the_place_of_the_part_is_not_followed(tmp_path):
    """别人在 metrics.jsonl.part 上放一个链接：不顺着它盖掉别处的文件。"""
    (tmp_path / "victim").write_text("别人的")
    (tmp_path / "metrics.jsonl.part").symlink_to("victim")
    Metrics(tmp_path, True, Progress()).write(step=0, tokens=0)
    assert (tmp_path / "victim").read_text() == "别人的"
    assert not (tmp_path / "metrics.jsonl").is_symlink()
