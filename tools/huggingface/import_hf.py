"""把模型带回来：Hugging Face 的文件夹 -> 检查点，聊天、看进去、接着微调都认得。

    python -m tools.import_hf out/tiny/hf out/mine/sft.pt
    python -m tools.import_hf out/lora out/mine/sft.pt --stage sft --preset wide

认的是 tools.export 写出来的，以及用 transformers 等接着练过的那一种：Qwen3 的结构、这里的分词器、
safetensors 的权重；bf16 与 fp16 的读成 fp32。对不上的一律不收，并说出是哪里。
优化器等训练的状态没有，所以导入的只能当作起点，不能 --resume。
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer as Backend
from torch import Tensor

from config import N_TOKENS, PRESETS, SHAPE, Config, UserError, option
from engine.checkpoint import FORMAT, SCRIPTS, build_model, versions, write
from engine.progress import Progress
from model import Transformer
from settings.check import check_types, check_values
from settings.flags import read_options
from settings.resolve import fill_in
from tokenizer import Tokenizer
from tools.huggingface.export import KEY
from tools.huggingface.shapes import (
    TwoPaths,
    check_finite,
    our_shape,
    quiet,
    qwen3_config,
    to_ours,
)

USAGE = "用法：python -m tools.import_hf 文件夹 检查点.pt [--参数 值 …]"
KINDS = ((["Qwen3ForCausalLM"], "qwen3"), (["Qwen3MoeForCausalLM"], "qwen3_moe"))
# 两边必须一样的：写着别的值，它算的就不是我们的模型。形状取自它，不必比。
SAME = ("vocab_size", "head_dim", "hidden_act", "attention_bias", "sliding_window", "layer_types",
        "rope_parameters", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")  # fmt: skip
SAME_TOKENIZER = ("normalizer", "pre_tokenizer", "model", "decoder")
WRONG = {"missing_keys": "少了 ", "unexpected_keys": "多了 ", "mismatched_keys": "形状不对："}
UNKNOWN = "没有记下"


@dataclass
class Options(TwoPaths):
    """命令行参数。"""

    stage: str = option(
        "auto",
        "练到了哪个阶段；auto：导出时记下的（带出去之后才学会回答的，写 sft）",
        choices=("auto", "pretrain", "sft"),
    )
    preset: str = option(
        "auto",
        "接着微调时照哪套预设（批次、学习率）；auto：导出时记下的，没有就找形状相同的",
        choices=("auto", *PRESETS),
    )
    overwrite: bool = option(False, "检查点已经有了时，换掉它")


def main(argv: list[str] | None = None) -> None:
    """读命令行，导入，说接下来做什么。"""
    options = read_options(Options, sys.argv[1:] if argv is None else argv, USAGE)
    path = Path(options.target)
    stage = import_folder(Path(options.source), path, options)
    chat = {"pretrain": "pre_chat.py", "sft": "sft_chat.py"}[stage]
    where = shlex.quote(str(path))
    print(
        f"写好 {path}（没有训练的状态：可以聊，可以当作微调的起点，不能 --resume）\n"
        f"  python {chat} --checkpoint {where}\n"
        f"  python {SCRIPTS['sft']} --init_from {where} --out_dir 另一个目录"
    )


def import_folder(folder: Path, path: Path, options: Options) -> str:
    """文件夹 -> 检查点；返回它的阶段。全部核对过了才写。

    Raises:
        UserError: 文件夹不是我们认得的模型，或者检查点写不了。
    """
    if path.is_dir():
        raise UserError(f"{path} 是目录；请写出检查点的文件名，例如 {path / 'sft.pt'}")
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} 已经有了；不要它了：加上 --overwrite；或换一个名字")
    tokenizer = Tokenizer()
    theirs, noted = read_config(folder)
    check_tokenizer(folder, tokenizer)
    stage, config = our_config(folder / "config.json", theirs, noted, options)
    checkpoint = {
        "format": FORMAT, "stage": stage, "config": asdict(config),
        "tokenizer": tokenizer.fingerprint(), "versions": versions(), "device": "导入",
        "model": {}, "optimizers": [], "scaler": {}, "shared_row": None,
        "progress": asdict(Progress()), "max_steps": 0, "data": {}, "rng": {},
    }  # fmt: skip
    checkpoint["model"] = read_weights(folder, config, theirs)
    build_model(config, checkpoint, folder)
    write(path, checkpoint)
    return stage


# ---------- 1. 配置与分词器 ----------


def read_config(folder: Path) -> tuple[Any, dict]:
    """config.json -> (transformers 的配置, 导出时记下的)。

    Raises:
        UserError: 没有、读不懂，不是 Qwen3，或者层数与权重的不同。
    """
    if not folder.is_dir():
        what = "是文件，不是文件夹" if folder.exists() else "不存在"
        raise UserError(f"{folder} {what}；要的是 tools.export 或 save_pretrained 写出来的文件夹")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} 里是 LoRA 的适配器；请先用 merge_and_unload 合并，再存成模型")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} 里没有 config.json，不是 transformers 的模型；请检查路径")
    raw = parse(path)
    kind = raw.get("model_type")
    if (raw.get("architectures"), kind) not in KINDS:
        names = "、".join(names[0] for names, _ in KINDS)
        raise UserError(
            f"{path} 的结构是 {raw.get('architectures')}（{kind}）；能导入的只有 {names}"
        )
    if (n := count_layers(folder)) != raw.get("num_hidden_layers"):  # 写着一亿层的，不要真的去建
        raise UserError(f"{folder} 的权重有 {n} 层，与 config.json 的 num_hidden_layers 不同")
    from transformers import AutoConfig  # 导入要几秒，路径不对的不必等

    with unreadable(f"{path} 里有不对的值"), quiet():
        return AutoConfig.from_pretrained(folder, local_files_only=True), raw.get(KEY) or {}


@contextmanager
def unreadable(what: str) -> Iterator[None]:
    """读别人写的文件：transformers、tokenizers、safetensors 抛出的异常种类繁多，没有共同的基类。

    Raises:
        UserError: what，后面是英文异常的最后一行。
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:150]
        raise UserError(f"{what}（{reason}）；请重新导出") from error


def count_layers(folder: Path) -> int:
    """权重有几层；顺便看看文件是否完好。"""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} 里没有 safetensors 的权重；请用 save_pretrained 存成这一种")
    names: list[str] = []
    for path in paths:
        with unreadable(f"{path} 不是完好的 safetensors"), safe_open(path, "pt") as file:
            names += file.keys()
    return len({m[1] for name in names if (m := re.match(r"model\.layers\.(\d+)\.", name))})


def parse(path: Path) -> dict:
    """一个 JSON 文件，内容是一个对象。"""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} 不是完好的 JSON；请重新导出") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} 里应是一个 JSON 对象；请重新导出")
    return raw


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """文件夹里的分词器与我们的相同：同样的文字得到同样的编号。"""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} 里没有 tokenizer.json，无从知道词表是不是这里的；请一并存下")
    with unreadable(f"{path} 读不出来"):
        found = Backend.from_file(str(path))
    theirs, ours = found.get_vocab(), tokenizer.backend.get_vocab()
    if differ := sorted(f"{t!r}" for t, _ in theirs.items() ^ ours.items()):
        raise UserError(
            f"{path} 的词表与这里的不同（{len(theirs)} 个词元，应为 {len(ours)} 个；"
            f"例如 {differ[0]}）；只能导入用这里的分词器练的模型"
        )
    theirs, ours = json.loads(found.to_str()), json.loads(tokenizer.backend.to_str())
    if differ := [name for name in SAME_TOKENIZER if theirs[name] != ours[name]]:
        raise UserError(f"{path} 的 {'、'.join(differ)} 与这里的不同；请换回 tools.export 写出的")


def our_config(path: Path, theirs, noted: dict, options: Options) -> tuple[str, Config]:
    """它的配置 -> (阶段, 我们的配置)；形状取自它，其余取自导出时记下的。

    Args:
        path: config.json，只用来说话。
    Raises:
        UserError: 记下的不对，算法与我们的不同，或者缺了 --stage、--preset。
    """
    if not isinstance(noted, dict) or not isinstance(noted.get("config", {}), dict):
        raise UserError(f"{path} 的 {KEY} 不对；请删掉这一项，再加上 --stage 与 --preset")
    stage = noted.get("stage") if options.stage == "auto" else options.stage
    if stage not in [*SCRIPTS]:
        raise UserError(f"{path} 没有记下练到了哪个阶段；请加上 --stage pretrain 或 --stage sft")
    known = {f.name for f in fields(Config)}
    saved = {"data": UNKNOWN, "sft_data": UNKNOWN} | noted.get("config", {}) | our_shape(theirs)
    config = Config(**{name: value for name, value in saved.items() if name in known})
    problems: list[str] = []
    check_types(config, problems)
    if problems:
        raise UserError(f"{path} 里的配置不对：{'；'.join(problems)}")
    if options.preset != "auto":
        config.preset = options.preset
    elif config.preset == "auto":
        config.preset = preset_like(config)
    fill_in(config, {})
    config.seq_len = min(config.seq_len, config.max_len)
    check_values(config, problems, set())  # 值与值之间也要相容
    if problems:
        raise UserError(f"{path} 里的配置不对：{'；'.join(problems)}")
    check_same(path, theirs, config)
    return stage, config


def check_same(path: Path, theirs, config: Config) -> None:
    """它的算法与我们的相同。Raises UserError：列出不同的。"""
    expected = qwen3_config(config, vocab_size=N_TOKENS)
    pairs = {name: (getattr(theirs, name, None), getattr(expected, name, None)) for name in SAME}
    differ = [f"{name} 是 {a}，应为 {b}" for name, (a, b) in pairs.items() if a != b]
    if differ:
        raise UserError(f"{path} 与我们的模型算法不同：{'；'.join(differ)}")


def preset_like(config: Config) -> str:
    """形状相同的预设。"""
    for name, preset in PRESETS.items():
        if all(preset[field] == getattr(config, field) for field in SHAPE if field in preset):
            return name
    experts = f"，{config.n_experts} 位专家" if config.n_experts else ""
    raise UserError(
        f"形状（宽 {config.dim}，{config.n_layers} 层{experts}）与哪套预设都不同；"
        f"请用 --preset 指定接着微调时照哪一套（{'、'.join(PRESETS)}）"
    )


# ---------- 2. 权重 ----------


def read_weights(folder: Path, config: Config, theirs) -> dict[str, Tensor]:
    """文件夹里的权重 -> 我们的 state_dict，fp32，词表补齐到 config.vocab_size。"""
    weights = read_model(folder, theirs).state_dict()
    state = to_ours(weights, Transformer(config).state_dict())
    return state | {"embedding.weight": pad(state["embedding.weight"], config.vocab_size)}


def read_model(folder: Path, theirs):
    """文件夹里的权重 -> transformers 的模型，fp32。

    分片、半精度、一个专家一个专家分开存的，都由 transformers 认。
    Raises:
        UserError: 坏了，或者多了、少了、形状不对、有 NaN。
    """
    from transformers import AutoModelForCausalLM

    with unreadable(f"{folder} 的权重读不出来"), quiet():
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=theirs, dtype=torch.float32, local_files_only=True,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    problems = [f"{what}{first(found[key])}" for key, what in WRONG.items() if found[key]]
    if problems:
        raise UserError(f"{folder} 的参数与 config.json 对不上：{'；'.join(problems)}")
    weights = model.state_dict()
    if not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
        raise UserError(f"{folder} 的输出层与词嵌入不是同一个矩阵，我们的模型装不下；请换一个模型")
    check_finite(weights, folder)
    return model


def first(names: set) -> str:
    """对不上的参数：第一个的名字，共几个。形状不对的，transformers 连同两个形状一起给。"""
    names = sorted(name if isinstance(name, str) else name[0] for name in names)
    return names[0] if len(names) == 1 else f"{names[0]} 等 {len(names)} 个"


def pad(table: Tensor, n_rows: int) -> Tensor:
    """词嵌入 (N_TOKENS, C) -> (n_rows, C)：补上的都照抄重复最多的那一行。

    语料里从没出现过的词元合用一行（见 `engine.shared_row.SharedRow`），补齐词表用的原本也在其中；
    抄回来，微调时才认得出它们可以合用。没有哪行重复的，抄 [unused1] 的：它从不是答案。
    """
    rows, counts = table.unique(dim=0, return_counts=True)
    fill = rows[counts.argmax()] if counts.max() > 1 else table[1]
    return torch.cat([table, fill.expand(n_rows - len(table), -1)])
