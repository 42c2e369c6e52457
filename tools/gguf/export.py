"""检查点 -> 一个 GGUF 文件：llama.cpp、llama-cpp-python 与 ollama 读的那一种。

    python -m tools.export out/tiny/sft.pt --gguf out/tiny/tiny.gguf
    python -m tools.export out/tiny/sft.pt --gguf out/tiny/tiny.gguf --type q8_0

里面是 Qwen3（或 Qwen3-MoE）结构的权重、词表、停止的词元与采样的设置；微调过的还有对话模板。
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from config import N_TOKENS, Config, UserError
from engine.checkpoint import load
from generate import CALM, Sampling
from settings.files import sync_folder
from tokenizer import Tokenizer
from tools.gguf.template import template
from tools.gguf.words import words
from tools.huggingface.shapes import STATISTIC, check_finite

if TYPE_CHECKING:
    import gguf

TYPES = ("f16", "q8_0")
MAGIC = b"GGUF"
INSTALL = "pip install -r examples/llama_cpp/requirements.txt"

# 我们的参数 -> llama.cpp 的参数，从上到下逐个替换。
NAMES = {
    "embedding.": "token_embd.", "blocks.": "blk.",
    "attention.query_norm": "attn_q_norm", "attention.key_norm": "attn_k_norm",
    "attention.query": "attn_q", "attention.key": "attn_k", "attention.value": "attn_v",
    "attention.out": "attn_output", "attention_norm": "attn_norm", "feed_forward_norm": "ffn_norm",
    "feed_forward.router": "ffn_gate_inp", "feed_forward.": "ffn_",
}  # fmt: skip


def export_gguf(path: Path, target: Path, kind: str = "f16", overwrite: bool = False) -> None:
    """检查点 -> GGUF 文件；写完才出现。

    Args:
        kind: 矩阵存成什么：f16，或者 q8_0（每 32 个数合用一个缩放，每个数 8 位）。
    Raises:
        UserError: 没有装 gguf，检查点不能用，已经有这个文件，或写不进去。
    """
    gguf = installed()
    check_file(path, target, overwrite)
    tokenizer = Tokenizer()
    model, config, checkpoint = load(path, tokenizer)
    state = model.state_dict()
    check_finite(state, path)
    check_range(state, path, kind)
    with written_file(target) as part, ExitStack() as stack:
        writer = gguf.GGUFWriter(part, "qwen3moe" if config.n_experts else "qwen3")
        stack.callback(writer.close)  # 写不下去也关上：Windows 上，开着的文件删不掉
        add_shape(writer, config, checkpoint["stage"], kind)
        add_words(writer, tokenizer)
        if checkpoint["stage"] == "sft":  # 只会接着写的套上它，答的也不是回答
            writer.add_chat_template(template(config.keep_reasoning))
        add_sampling(writer, checkpoint["stage"], tokenizer)
        for name, weight in state.items():
            if not name.endswith(STATISTIC):
                add_tensor(writer, name, weight, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def installed():
    """gguf 这个包。Raises UserError：没有装。"""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UserError(f"还没有安装 {error.name}；请先运行 {INSTALL}") from None
    return gguf


def check_file(path: Path, target: Path, overwrite: bool) -> None:
    """能不能写到这里；不是 GGUF 的东西，加了 --overwrite 也不动。"""
    if target.is_dir():
        raise UserError(f"{target} 是文件夹；--gguf 要的是文件名，例如 {target / 'model.gguf'}")
    if not os.path.lexists(target):
        return
    if path.exists() and target.exists() and target.samefile(path):
        raise UserError(f"{target} 就是检查点，不能写在它上面；请换一个文件名")
    try:
        with target.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError:
        start = b""
    if not target.is_file() or start != MAGIC:
        raise UserError(f"{target} 已经有了，又不是 GGUF 文件；请换一个文件名")
    if not overwrite:
        raise UserError(f"{target} 已经有了；不要它了：加上 --overwrite；或换一个文件名")


@contextmanager
def written_file(target: Path) -> Iterator[Path]:
    """给出旁边的一个文件名去写，写完才改名：中途出错，不会留下半个看着像样的。

    Raises:
        UserError: 写不进去。
    """
    target = target.resolve()
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # 上次写到一半的；别人放的链接，也只去掉链接
        yield part
        with part.open("rb+") as file:  # Windows 上，只读的不能落盘
            os.fsync(file.fileno())
        os.replace(part, target)
        sync_folder(target.parent)
    except OSError as error:
        reason = error.strerror or "写到一半写不下去，多半是磁盘满了"
        raise UserError(f"写不了 {target}（{reason}）；请检查路径、权限与空间") from error
    finally:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)


def check_range(state: dict[str, Tensor], path: Path, kind: str) -> None:
    """半精度（q8_0 的缩放也是）装得下的数。Raises UserError：说出是哪一个参数。"""
    most = torch.finfo(torch.float16).max * (127 if kind == "q8_0" else 1)
    for name, weight in state.items():
        if weight.dim() > 1 and (largest := weight.abs().max().item()) > most:
            raise UserError(
                f"{path} 的参数 {name} 里有 {largest:.3g}，{kind} 装不下（最大 {most:.3g}）；"
                "训练时发散了？请换一个检查点"
            )


# ---------- 1. 说明 ----------


def add_shape(writer: "gguf.GGUFWriter", config: Config, stage: str, kind: str) -> None:
    """结构：llama.cpp 照它建模型。"""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_name(f"mini-llm {config.preset} {stage}")
    writer.add_languages(["zh"])
    writer.add_file_type({"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_context_length(config.max_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.dim // config.n_heads)
    writer.add_value_length(config.dim // config.n_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(N_TOKENS)
    if config.n_experts:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.n_active)
        writer.add_expert_feed_forward_length(config.hidden_dim)


def add_words(writer: "gguf.GGUFWriter", tokenizer: Tokenizer) -> None:
    """词表与几个有名字的词元；首尾添的是哪两个、为什么，见 template.py。"""
    vocabulary = words(tokenizer)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word.text for word in vocabulary])
    writer.add_token_types([word.kind for word in vocabulary])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_sep_token_id(tokenizer.role_ids["assistant"])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_sep_token(True)
    writer.add_add_eos_token(False)


def add_sampling(writer: "gguf.GGUFWriter", stage: str, tokenizer: Tokenizer) -> None:
    """聊天程序默认的采样，以及绝不该抽到的词元；llama-server 照着做，别的程序多半不看。

    重复惩罚没有带上：llama.cpp 连提问里的字也罚，我们只罚模型自己写过的。
    """
    sampling = Sampling(**CALM.get(stage, {}))
    writer.add_int32("general.sampling.top_k", sampling.top_k)
    for name in ("temp", "top_p", "min_p"):
        writer.add_float32(f"general.sampling.{name}", getattr(sampling, name))
    banned = np.array(tokenizer.never_sampled(), np.int32)
    writer.add_array("tokenizer.ggml.suppress_tokens", banned.tolist())


# ---------- 2. 权重 ----------


def gguf_name(name: str) -> str:
    """blocks.0.attention.query.weight -> blk.0.attn_q.weight；一叠专家的矩阵也有自己的名字。"""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    if name == "norm.weight":
        return "output_norm.weight"
    return name if name.endswith(".weight") else f"{name}_exps.weight"


def add_tensor(writer: "gguf.GGUFWriter", name: str, weight: Tensor, kind: str) -> None:
    """一个参数。

    归一的与选专家的存成 fp32：它们很小，选错一位专家，整层就变了。其余的照 kind；q8_0 以 32 个数
    为一组，一行分不成整组的，存成 f16。补齐词表用的那些行不带走：它们没有对应的词元。
    """
    from gguf import GGMLQuantizationType, quants

    data = weight.detach().float().cpu().numpy()
    if name == "embedding.weight":
        data = data[:N_TOKENS]
    if data.ndim == 1 or ".router." in name:
        writer.add_tensor(gguf_name(name), data)
    elif kind == "q8_0" and data.shape[-1] % 32 == 0:
        q8_0 = GGMLQuantizationType.Q8_0
        writer.add_tensor(gguf_name(name), quants.quantize(data, q8_0), raw_dtype=q8_0)
    else:
        writer.add_tensor(gguf_name(name), data.astype(np.float16))
