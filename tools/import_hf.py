"""把模型带回来：Hugging Face 的文件夹 -> 检查点，聊天、看进去、接着微调都认得。

    python -m tools.import_hf out/tiny/hf out/mine/sft.pt
    python -m tools.import_hf 别处练的 out/mine/sft.pt --stage sft --preset wide

认的是 tools.export 写出来的，以及用 transformers 等接着练过的那一种：Qwen3ForCausalLM、
这里的分词器、safetensors。优化器等训练的状态没有，所以只能当作起点，不能 --resume。
"""

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import FORMAT, Progress, build_model, config_of, versions, write
from config import (
    Config,
    UserError,
    fill_in,
    option,
    run_script,
)
from model import Transformer
from tokenizer import Tokenizer
from tools.export import KEY
from tools.huggingface import paths_and_options, to_ours

USAGE = "python -m tools.import_hf 文件夹 检查点.pt [--参数 值 …]"


@dataclass
class Options:
    """命令行参数。"""

    stage: str | None = option(None, "pretrain 或 sft；默认取自 config.json 里记下的")
    preset: str | None = option(None, "哪套预设；默认取自 config.json，没有就按形状找")
    overwrite: bool = option(False, "检查点已经有了，换掉它")


def main() -> None:
    """读命令行，导入，说怎样用。"""
    folder, path, options = paths_and_options(Options, sys.argv[1:], USAGE)
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} 已经有了；不要它了：加上 --overwrite；或换一个名字")
    import_folder(folder, path, options)
    print(f"写好 {path}")


def import_folder(folder: Path, path: Path, options: Options) -> None:
    """文件夹 -> 检查点。"""
    from transformers import AutoModelForCausalLM

    theirs = read_config(folder)
    tokenizer = Tokenizer()
    stage, config = our_config(theirs, options)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True,
        output_loading_info=True,
    )  # fmt: skip
    if any(info.values()):
        raise UserError(f"{folder} 的权重不对：{info}")
    with torch.device("meta"):
        names = list(Transformer(config).state_dict())
    state = to_ours(model.state_dict(), names)
    state["embedding.weight"] = pad(state["embedding.weight"], config.vocab_size)
    checkpoint = {
        "format": FORMAT, "stage": stage, "config": asdict(config),
        "tokenizer": tokenizer.fingerprint(), "versions": versions(), "device": "导入",
        "model": state, "optimizers": [], "scaler": {}, "shared_row": None,
        "progress": asdict(Progress()), "max_steps": 0, "data": {}, "rng": {},
    }  # fmt: skip
    config_of(checkpoint, path, tokenizer)
    build_model(config, checkpoint, path)
    write(path, checkpoint)


def read_config(folder: Path) -> dict:
    """文件夹里的 config.json。"""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} 里没有 config.json，不是 transformers 的模型")
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def our_config(theirs: dict, options: Options) -> tuple[str, Config]:
    """它的配置 -> (阶段, 我们的配置)。"""
    noted = theirs.get(KEY, {})
    stage = options.stage or noted.get("stage")
    if stage not in ("pretrain", "sft"):
        raise UserError("不知道是哪个阶段的；请加上 --stage pretrain 或 --stage sft")
    names = {f.name for f in fields(Config)}
    config = Config(**{k: v for k, v in noted.get("config", {}).items() if k in names})
    shape = dict(
        dim=theirs["hidden_size"], n_layers=theirs["num_hidden_layers"],
        n_heads=theirs["num_attention_heads"], n_kv_heads=theirs["num_key_value_heads"],
        hidden_dim=theirs["intermediate_size"], max_len=theirs["max_position_embeddings"],
        rope_theta=theirs["rope_parameters"]["rope_theta"], norm_eps=theirs["rms_norm_eps"],
    )  # fmt: skip
    for name, value in shape.items():
        setattr(config, name, value)
    if config.preset == "auto":
        config.preset = options.preset or "tiny"
    fill_in(config, {})
    return stage, config


def pad(table: Tensor, rows: int) -> Tensor:
    """词嵌入 (N_TOKENS, C) -> (rows, C)，补上的都照抄重复最多的那一行。

    语料里从没出现过的词元合用一行（见 `training.SharedRow`），补齐词表用的也在其中；
    抄得一样，微调时才认得出它们。
    """
    distinct, counts = table.unique(dim=0, return_counts=True)
    fill = distinct[counts.argmax()] if counts.max() > 1 else table[1]  # [unused1]：从不是答案
    return torch.cat([table, fill.expand(rows - len(table), -1)])


if __name__ == "__main__":
    run_script(main)
