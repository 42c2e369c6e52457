"""别人给的文件夹：写着什么都不照办，占多少内存先看有没有那么多字节，管道也拖不住。

改了读别人文件的代码，不妨多试几千个：

    python -m pytest tests/test_foreign.py --hypothesis-profile=thorough
"""

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_export import EXPERTS, SFT, SMALL, edit, exported
from test_hostile import nested

from config import UserError
from engine.checkpoint import read
from settings.say import clean
from tools.huggingface import claims as claims_module
from tools.huggingface.import_hf import Options, import_folder, our_config, read_config
from tools.huggingface.weights import INDEX, ONE, check_count, open_weights, plan, read_state

MB = 1 << 20
SLOW = settings(max_examples=settings().max_examples // 4)
BASES: dict[str, Path] = {}  # hypothesis 的测试用它：一个例子一个例子地取夹具太慢


@pytest.fixture(scope="module", autouse=True)
def bases(tmp_path_factory):
    """两个真的导出的小模型：稠密的，专家混合的。"""
    for name, config in (("dense", SMALL), ("experts", EXPERTS)):
        BASES[name] = exported(tmp_path_factory.mktemp(name), config).folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """稠密的一份副本，可以弄坏。"""
    return Path(shutil.copytree(BASES["dense"], tmp_path / "hf"))


def check(folder: Path, options=SFT):
    """全部的核对，只是不读权重，也不看分词器。"""
    claims = read_config(folder, options.max_len)
    _, config = our_config(folder / "config.json", claims, options)
    with open_weights(folder) as stored:
        check_count(stored, config, folder)
        return config, plan(stored, config, claims.tied, folder)


def load(folder: Path, options=SFT):
    """核对，再读权重。"""
    config, _ = check(folder, options)
    with open_weights(folder) as stored:
        return read_state(stored, config, True, folder)


def refused(folder: Path, options=SFT, act=check) -> str:
    """不收，一句话，只有一行，不太长，没有控制字符，用时不多；返回那句话。"""
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        act(folder, options)
    assert time.monotonic() - began < 5
    said = str(error.value)
    assert "\n" not in said and clean(said) == said and len(said) < 2000
    return said


def whole(folder: Path, options=SFT):
    """真的导入。"""
    return import_folder(folder, folder.parent / "refused.pt", options)


# ---------- 1. config.json ----------

REFUSED = {
    "quantization_config": {"quant_method": "fp_quant", "load_in_4bit": True},
    "auto_map": {"AutoModelForCausalLM": "evil.Model"},
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "mlp_bias": True, "is_encoder_decoder": True, "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8.0, "vocab_size": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": float(10**300)},
    "rms_norm_eps": 2, "hidden_size": 40_000, "num_hidden_layers": 10**8,
    "num_key_value_heads": 3, "intermediate_size": 10**9, "max_position_embeddings": 10**9,
    "num_attention_heads": True, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_mathematics_is_refused_by_name(name, folder):
    """从前 quantization_config 走到了装别的库的代码；10^9 的上下文要了 8 GB 才说不行。"""
    edit(folder, **{name: REFUSED[name]})
    told = {"intermediate_size": "形状不对", "tie_word_embeddings": "少了 lm_head",
            "num_key_value_heads": "n_kv_heads（3）", "num_hidden_layers": "n_layers 不能超过",
            "hidden_size": "head_dim 是 8，应为 10000"}  # fmt: skip
    tracemalloc.start()
    assert told.get(name, name) in refused(folder)
    assert tracemalloc.get_traced_memory()[1] < 20 * MB
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["quantization_config", "max_position_embeddings"])
def test_the_program_refuses_too(name, folder):
    """命令走的也是这几步，什么也没有写。"""
    edit(folder, **{name: REFUSED[name]})
    assert name in refused(folder, act=whole)
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_what_picks_a_kernel_reaches_nothing(folder, tmp_path, monkeypatch, capsys):
    """_attn_implementation 曾让 transformers 去取别人的核；如今整个导入用不到 transformers。"""
    edit(folder, _attn_implementation="kernels-community/evil", dtype="float128", invented={"a": 1},
         **{"\x1b]0;x": 1})  # fmt: skip
    (folder / "generation_config.json").write_text("{")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.X"}}')
    (folder / "chat_template.jinja").write_text("{{ '' .__class__ }}")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    for name in [m for m in sys.modules if m.partition(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)  # 谁导入它就出错
    assert import_folder(folder, tmp_path / "sft.pt", Options()) == "sft"
    assert "不认得、没有用的：\\x1b]0;x、invented" in capsys.readouterr().out


def test_only_the_note_we_wrote_is_kept(folder, tmp_path):
    """记下的配置里别人机器上的路径、别的开关，都不跟着走。"""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["mini_llm"]["config"] |= {"data": "/etc/passwd", "data_dir": "/etc", "out_dir": "/root",
                                  "init_from": "/x", "resume": True, "dim": 1}  # fmt: skip
    path.write_text(json.dumps(raw))
    import_folder(folder, tmp_path / "sft.pt", Options())
    saved = read(tmp_path / "sft.pt")["config"]
    assert saved["data"] == "passwd" and saved["dim"] == 32
    assert not {"/etc", "/root", "/x", True} & {saved[n] for n in ("data_dir", "out_dir", "resume")}
    raw["mini_llm"]["config"]["prompt"] = [[["深"]]]
    path.write_text(json.dumps(raw))
    assert "mini_llm 里 prompt 是" in refused(folder)


def test_less_context_can_be_asked_for(folder, tmp_path):
    """写着的太长，可以只要一部分：旋转位置用不着文件里有表。"""
    edit(folder, max_position_embeddings=10**9)
    assert "--max_len 1024" in refused(folder)
    import_folder(folder, tmp_path / "ok.pt", Options(max_len=64))
    saved = read(tmp_path / "ok.pt")["config"]
    assert (saved["max_len"], saved["seq_len"]) == (64, 64)
    edit(folder, max_position_embeddings=32)
    assert "应在 1 与它写的 32 之间" in refused(folder, Options(max_len=64))


TEXTS = {
    "嵌套": (nested("[", "]", 20_000), "不是完好的 JSON"),
    "写了两次": ('{"a": 1, "a": 2}', "a 写了两次"),
    "里面写了两次": ('{"b": {"\\n": 1, "\\n": 2}}', "写了两次"),
    "千位的整数": ('{"a": ' + "9" * 5000 + "}", "不是完好的 JSON"),
    "NaN": ('{"a": NaN}', "NaN 不是数"),
    "太大的数": ('{"a": 1e999}', "1e999 不是数"),
    "太大": (" " * (2 * MB), "比 1 MB 还大"),
    "别的编码": ("{}".encode("utf-16"), "不是完好的 JSON"),
    "空的": ("", "不是完好的 JSON"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_trick_in_json_is_one_sentence(kind, folder):
    text, said = TEXTS[kind]
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in refused(folder)


# ---------- 2. 不是普通的文件 ----------

FILES = ["config.json", "tokenizer.json", ONE, INDEX, "part.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows 没有管道文件")
@pytest.mark.parametrize("what", ["fifo", "folder", "dangling", "device"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_not_a_plain_file_is_named_at_once(name, what, folder):
    if name in FILES[3:]:
        (folder / ONE).unlink()
        (folder / INDEX).write_text('{"weight_map": {"a": "part.safetensors"}}')
    place = folder / name
    place.unlink(missing_ok=True)
    if what in ("fifo", "folder"):
        (os.mkfifo if what == "fifo" else os.mkdir)(place)
    else:
        place.symlink_to("/dev/zero" if what == "device" else "nothing")
    assert name in refused(folder, act=whole if name == "tokenizer.json" else check)


def test_a_link_to_a_plain_file_is_fine(folder, tmp_path):
    """Hugging Face 的缓存就是这样放的。"""
    (folder / ONE).rename(tmp_path / "blob")
    (folder / ONE).symlink_to(tmp_path / "blob")
    assert import_folder(folder, tmp_path / "sft.pt", SFT) == "sft"


@pytest.mark.skipif(os.name == "nt", reason="Windows 没有 SIGTERM")
def test_sigterm_ends_an_import(folder, tmp_path):
    """从前卡在管道上，SIGTERM 也不理。"""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    tool = Path(__file__).resolve().parent.parent / "tools" / "import_hf.py"
    process = subprocess.Popen([sys.executable, tool, folder, tmp_path / "sft.pt"],
                               stderr=subprocess.PIPE, encoding="utf-8")  # fmt: skip
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode in (2, 143, -signal.SIGTERM) and "Traceback" not in err


# ---------- 3. 权重 ----------


def header_of(path: Path) -> tuple[dict, bytes]:
    """(文件头, 后面的内容)。"""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: bytes, n_bytes: int, length: int | None = None) -> None:
    """写一个文件：头是 header，后面是 n_bytes 个零（不真的占磁盘）。"""
    path.unlink(missing_ok=True)
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length % 2**64) + header)
    os.truncate(path, 8 + len(header) + n_bytes)


NORM = "model.norm.weight"
LIES = {
    "头写着 10^15": (lambda h: None, 10**15, "文件头写着 1000000000000000"),
    "头是零": (lambda h: None, 0, "文件头写着 0"),
    "头比文件短": (lambda h: None, 5, "不是完好的 JSON"),
    "重叠": (lambda h: h[NORM].update(data_offsets=[0, 128]), None, "重叠"),
    "伸到外面": (lambda h: h[NORM].update(data_offsets=[2**40, 2**40 + 128]), None, "空着"),
    "倒着": (lambda h: h[NORM].update(data_offsets=[128, 0]), None, "要 128 字节"),
    "负的": (lambda h: h[NORM].update(data_offsets=[-128, 0]), None, "不对"),
    "小数": (lambda h: h[NORM].update(data_offsets=[0.0, 128.0]), None, "不对"),
    "形状太大": (lambda h: h[NORM].update(shape=[10**18]), None, "不对"),
    "形状乘起来太大": (lambda h: h[NORM].update(shape=[10**14, 10**14]), None, "要 4"),
    "形状是真": (lambda h: h[NORM].update(shape=[True]), None, "不对"),
    "形状是嵌套": (lambda h: h[NORM].update(shape=[[32]]), None, "不对"),
    "多一样": (lambda h: h[NORM].update(extra=1), None, "写得不对"),
    "不是对象": (lambda h: h.update({NORM: 3}), None, "写得不对"),
    "类型不认得": (lambda h: h[NORM].update(dtype="F1024"), None, "类型是 F1024"),
    "类型是列表": (lambda h: h[NORM].update(dtype=["F32"]), None, "类型是"),
    "名字有转义": (lambda h: h.update({"\x1b[2J\n": h.pop(NORM)}), None, "\\x1b[2J"),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_header_that_lies_is_one_sentence(kind, folder):
    change, length, said = LIES[kind]
    header, rest = header_of(folder / ONE)
    change(header)
    write_header(folder / ONE, json.dumps(header).encode(), len(rest), length)
    assert said in refused(folder)


@pytest.mark.parametrize(
    "dtype",
    [torch.int32, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64, torch.float64],
)
def test_only_ordinary_floats_are_weights(folder, dtype):
    """整数、复数、fp8 从前悄悄变成 fp32。"""
    found = load_file(folder / ONE)
    found[NORM] = torch.ones(32, dtype=dtype)
    save_file(found, folder / ONE)
    assert f"{NORM} 的类型是" in refused(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_refused(folder, value):
    found = load_file(folder / ONE)
    found[NORM][3] = value
    save_file(found, folder / ONE)
    assert "有 NaN 或无穷大" in refused(folder, act=load)


def test_more_than_the_machine_has_is_not_begun(folder, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    assert "这台机器只有 1 MB" in refused(folder)


def split(folder: Path) -> dict:
    """分成两片；返回索引。"""
    found = load_file(folder / ONE)
    places = {name: f"{n % 2}.safetensors" for n, name in enumerate(found)}
    for place in ("0.safetensors", "1.safetensors"):
        save_file({n: found[n] for n, p in places.items() if p == place}, folder / place)
    (folder / ONE).unlink()
    return places


INDEXES = {
    "缺一片": (lambda p: p.update(x="2.safetensors"), "2.safetensors"),
    "到外面去": (lambda p: p.update({NORM: "../0.safetensors"}), "不是这个文件夹里的分片"),
    "绝对的": (lambda p: p.update({NORM: "/etc/passwd"}), "不是这个文件夹里的分片"),
    "不是文字": (lambda p: p.update({NORM: [1]}), "不是这个文件夹里的分片"),
    "张冠李戴": (lambda p: p.update({NORM: "01"[p[NORM][0] == "0"] + ".safetensors"}), "写的不同"),
    "没有的名字": (lambda p: p.update(x="0.safetensors"), "写的不同"),
    "太多片": (lambda p: p.update({f"x{n}": f"{n}.safetensors" for n in range(999)}), "200 个以上"),
    "空的": (lambda p: p.clear(), "没有 weight_map"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_a_bad_index_is_one_sentence(kind, folder):
    change, said = INDEXES[kind]
    places = split(folder)
    change(places)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    assert said in refused(folder)


def test_two_kinds_of_weights_are_not_guessed_between(folder):
    (folder / INDEX).write_text("{}")
    assert "不知道用哪一份" in refused(folder)


# ---------- 4. 随便什么 ----------

numbers = st.sampled_from(
    [0, 1, -1, 2, 3, 8, 32, 64, 128, 10**8, 10**9, 2**31, 2**63, 10**18, 10**300, True, False,
     0.5, 32.0, -1e308, 1e-320]
)  # fmt: skip
values = st.recursive(
    numbers | st.none() | st.text(max_size=6)
    | st.sampled_from(["x\x1b[2J", "\ud800", "qwen3", "qwen3_moe", "silu", "F32", "I64"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
kinds = st.sampled_from(["dense", "experts"])
FIELDS = sorted(claims_module.HARMLESS | claims_module.CHECKED | {*claims_module.REFUSED})


def beside(base: str, name: str, **files) -> contextlib.AbstractContextManager:
    """一个文件夹：别的文件链接到真的，name 另写。"""

    @contextlib.contextmanager
    def made():
        with tempfile.TemporaryDirectory() as place:
            for path in BASES[base].iterdir():
                if path.name != name:
                    Path(place, path.name).symlink_to(path)
            yield Path(place)

    return made()


def tried(folder: Path):
    """收下，或者一句话；收下的返回 (配置, 计划)。"""
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            found = check(folder)
        assert clean(out.getvalue()) == out.getvalue()
        return found
    except UserError as error:
        said = str(error).replace(str(folder), "")
        assert "\n" not in said and clean(said) == said and len(said) < 3000
        return None


@given(kinds, st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3),
       st.dictionaries(st.text(max_size=5), values, max_size=1))  # fmt: skip
@example("dense", {"max_position_embeddings": 10**9}, {})
@example("experts", {"num_experts": 10**9, "moe_intermediate_size": 10**9}, {})
def test_any_config_is_understood_or_refused(base, changes, more):
    """改几项：收下的，形状一定还是权重的那个形状。"""
    with beside(base, "config.json") as folder:
        raw = json.loads((BASES[base] / "config.json").read_text()) | changes | more
        (folder / "config.json").write_text(json.dumps(raw))
        if (found := tried(folder)) is not None:
            config, model = found[0], {"dense": SMALL, "experts": EXPERTS}[base]
            for name in ("dim", "n_layers", "n_heads", "hidden_dim", "n_experts"):
                assert getattr(config, name) == getattr(model, name)
            assert config.max_len <= claims_module.LONGEST


@given(kinds, st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=3)), max_size=3))
def test_any_bytes_of_a_config_are_understood_or_refused(base, cuts):
    """在任意的地方换几个字节。"""
    text = bytearray((BASES[base] / "config.json").read_bytes())
    for place, piece in cuts:
        text[place % len(text) : place % len(text) + len(piece)] = piece
    with beside(base, "config.json") as folder:
        (folder / "config.json").write_bytes(text)
        tried(folder)


entry_fields = st.sampled_from(["dtype", "shape", "data_offsets", "extra"])
changed_entries = st.lists(
    st.tuples(st.integers(0, 99), entry_fields, values), min_size=1, max_size=2
)


@given(kinds, changed_entries, st.sampled_from([0, 0, 0, 1, -1, 2**40]))
def test_any_header_is_understood_or_refused(base, changes, more):
    """文件头里改几项，文件再长一点或短一点。"""
    header, rest = HEADERS.setdefault(base, header_of(BASES[base] / ONE))
    header = json.loads(json.dumps(header))
    names = [name for name in header if name != "__metadata__"]
    for place, field, value in changes:
        header[names[place % len(names)]][field] = value
    with beside(base, ONE) as folder:
        write_header(folder / ONE, json.dumps(header).encode(), max(0, len(rest) + more))
        tried(folder)


HEADERS: dict[str, tuple[dict, bytes]] = {}


lengths = st.integers(-1, 2**64 - 1) | st.sampled_from([0, 1, 2, 8, 100])


@given(kinds, lengths, st.binary(max_size=40), st.integers(0, 4000))
def test_any_bytes_of_a_header_are_understood_or_refused(base, length, piece, place):
    header, rest = HEADERS.setdefault(base, header_of(BASES[base] / ONE))
    text = bytearray(json.dumps(header).encode())
    text[place % len(text) : place % len(text) + len(piece)] = piece
    with beside(base, ONE) as folder:
        write_header(folder / ONE, bytes(text), len(rest), None if length < 101 else length)
        tried(folder)


@given(st.dictionaries(st.sampled_from([NORM, "x", "lm_head.weight"]), values, max_size=3) | values)
def test_any_index_is_understood_or_refused(places):
    with beside("dense", ONE) as folder:
        (folder / "0.safetensors").symlink_to(BASES["dense"] / ONE)
        header = header_of(BASES["dense"] / ONE)[0]
        names = {name: "0.safetensors" for name in header if name != "__metadata__"}
        changed = names | places if isinstance(places, dict) else places
        (folder / INDEX).write_text(json.dumps({"weight_map": changed}))
        tried(folder)


@SLOW
@given(kinds, st.integers(0, 10**7), st.binary(min_size=1, max_size=8))
def test_any_bytes_of_the_weights_are_read_or_refused(base, place, piece):
    """参数里换几个字节：读得出来，都是数；或者一句话。"""
    data = bytearray((BASES[base] / ONE).read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    place = start + place % (len(data) - start - 8)
    data[place : place + len(piece)] = piece
    with beside(base, ONE) as folder:
        (folder / ONE).write_bytes(data)
        config, _ = check(folder)
        try:
            with open_weights(folder) as stored:
                state = read_state(stored, config, True, folder)
            assert all(weight.isfinite().all() for weight in state.values())
        except UserError as error:
            assert "NaN" in str(error)


def test_a_wide_model_in_a_small_file_is_refused(folder):
    """config.json 处处都对得上，只是权重没有那么多字节：还没有分配就看出来。"""
    edit(folder, hidden_size=40_000, head_dim=10_000, intermediate_size=100_000)
    header, _ = header_of(folder / ONE)
    write_header(folder / ONE, json.dumps(header).encode(), 0)
    assert (folder / ONE).stat().st_size < 4000
    tracemalloc.start()
    assert "不是完好的 safetensors" in refused(folder)
    assert tracemalloc.get_traced_memory()[1] < 20 * MB
    tracemalloc.stop()
