"""config.json 里写的 -> 我们的形状。只读认得的几项，每一项先看类型与范围；别的一个字也不交给谁。

read_claims   config.json 的内容 -> Claims

改变算法的（REFUSED 与别的值）不收，说出名字；不改变的（HARMLESS）不理会；两边都没有的，说一声。
"""

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from config import N_TOKENS, Config, UserError
from settings.check import LARGEST
from settings.say import brief, say
from tools.huggingface.export import KEY, LOCAL
from tools.huggingface.shapes import EXPERTS, SHAPE

KINDS = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
LONGEST = 2**18  # 上下文：Qwen3 自己公布的最长的就是它；位置的表一格一格地建，再长的先问过
# 写着就改变算法的：要么没有，要么是空的、零或 false。
REFUSED = (
    "quantization_config", "auto_map", "rope_scaling", "attention_bias", "mlp_bias",
    "pruned_heads", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size",
    "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier",
    "shared_expert_intermediate_size", "num_shared_experts", "num_nextn_predict_layers",
    "text_config", "vision_config", "mlp_only_layers",
)  # fmt: skip
# 不改变算法的：来历、怎样训练、怎样生成、在哪种硬件上用哪种写法算。
HARMLESS = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype",
    "_name_or_path", "_commit_hash", "_attn_implementation", "attn_implementation",
    "_experts_implementation", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "initializer_range", "use_cache", "attention_dropout",
    "output_router_logits", "router_aux_loss_coef", "max_window_layers", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "problem_type",
    "id2label", "label2id", "tokenizer_class", "prefix", "task_specific_params", "is_decoder",
    "tie_encoder_decoder", "torchscript", "use_bfloat16", "finetuning_task", KEY,
}  # fmt: skip
CHECKED = {"head_dim", "hidden_act", "use_sliding_window", "sliding_window", "layer_types",
           "tie_word_embeddings", "rope_parameters", "rope_theta", "norm_topk_prob",
           "decoder_sparse_step", "intermediate_size", *SHAPE.values(),
           *EXPERTS.values()}  # fmt: skip


class Claims(NamedTuple):
    """config.json 里写的，认得的几项；与权重对不对得上，还没有看。"""

    shape: dict[str, Any]  # {我们的字段名: 值}，不含 vocab_size
    noted: dict[str, Any]  # 导出时记下的配置
    stage: str | None  # 导出时记下的阶段
    tied: bool  # 输出层就是词嵌入，不必另存


def read_claims(path: Path, raw: dict[str, Any], max_len: int | None = None) -> Claims:
    """config.json 的内容 -> `Claims`。

    Args:
        path: 只用来说话。
        max_len: 上下文只要这么长；None 照它写的。
    Raises:
        UserError: 列出不对的几项。
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or raw.get("architectures") != [KINDS.get(kind)]:
        raise UserError(
            f"{path} 的结构是 {brief(raw.get('architectures'))}（{brief(kind)}）；"
            f"能导入的只有 {'、'.join(KINDS.values())}"
        )
    raw = dict(raw)
    local = raw.pop("num_local_experts", None)  # transformers 5 这样叫它
    if local is not None and raw.setdefault("num_experts", local) != local:
        raise UserError(f"{path} 的 num_experts 与 num_local_experts 不同；请重新导出")
    problems: list[str] = []
    shape = read_shape(raw, kind == "qwen3_moe", problems)
    shape["rope_theta"] = read_theta(raw, problems)
    problems += differences(raw, kind == "qwen3_moe")
    if problems:
        raise UserError(f"{path} 里有我们的模型装不下的：{'；'.join(problems)}")
    shape["max_len"] = context(path, shape["max_len"], max_len)
    noted, stage = read_note(path, raw.get(KEY))
    if strange := sorted({*raw} - HARMLESS - CHECKED - {*REFUSED}):
        names = "、".join(map(brief, strange[:5])) + (" 等" if len(strange) > 5 else "")
        say(f"{path} 里不认得、没有用的：{names}")
    return Claims(shape, noted, stage, raw.get("tie_word_embeddings") is True)


def read_shape(raw: dict[str, Any], experts: bool, problems: list[str]) -> dict[str, Any]:
    """形状：都是正整数；归一的小数是 0 与 1 之间的数。"""
    shape: dict[str, Any] = {"n_experts": 0, "n_active": 0}
    for ours, theirs in (SHAPE | (EXPERTS if experts else {})).items():
        value = raw.get(theirs)
        if theirs == "num_key_value_heads" and value is None:
            value = raw.get("num_attention_heads")
        if ours == "norm_eps":
            good, must = type(value) in (int, float) and 0 < value < 1, "0 与 1 之间的数"
        else:
            good = type(value) is int and 0 < value <= LARGEST
            must = f"1 到 {LARGEST:,} 的整数"
        if not good:
            what = f"{theirs} 是 {brief(value)}" if theirs in raw else f"没有写 {theirs}"
            problems.append(f"{what}，应是 {must}")
        shape[ours] = float(value) if good and ours == "norm_eps" else value
    shape.pop("vocab_size")
    return shape


def read_theta(raw: dict[str, Any], problems: list[str]) -> Any:
    """旋转的底数；只认不拉长的旋转。transformers 4 把它写在外面。"""
    rope = raw.get("rope_parameters")
    if rope is None:
        rope = {"rope_theta": raw.get("rope_theta")}
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    good = type(theta) in (int, float) and 0 < theta <= LARGEST
    plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    if not good or any(plain.get(k) != v for k, v in rope.items() if k != "rope_theta"):
        problems.append(f"rope_parameters 是 {brief(rope)}，应是 default 的，rope_theta 是正数")
        return None
    return float(theta)


def differences(raw: dict[str, Any], experts: bool) -> list[str]:
    """算法与我们的不同的，一条一句。"""
    found = [f"{name} 是 {brief(raw[name])}，应没有或是空的" for name in REFUSED
             if not empty(raw.get(name))]  # fmt: skip
    heads, dim = raw.get("num_attention_heads"), raw.get("hidden_size")
    expected = {"vocab_size": N_TOKENS, "hidden_act": "silu"}
    if type(heads) is int and type(dim) is int and heads > 0:  # 不是的，已经说过了
        expected["head_dim"] = dim // heads
    absent = {"hidden_act": "silu", "norm_topk_prob": False, "decoder_sparse_step": 1,
              "head_dim": expected.get("head_dim") if experts else 128}  # fmt: skip
    if experts:
        expected |= {"norm_topk_prob": True, "decoder_sparse_step": 1}
    for name, value in expected.items():
        there = raw.get(name, absent.get(name))
        if type(there) is not type(value) or there != value:
            found.append(f"{name} 是 {brief(there)}，应为 {value}")
    if not empty(raw.get("use_sliding_window")):
        found.append(f"sliding_window 是 {brief(raw.get('sliding_window'))}，应不用")
    layers = raw.get("layer_types")
    if layers is not None and not (
        isinstance(layers, list) and all(layer == "full_attention" for layer in layers)
    ):
        found.append(f"layer_types 是 {brief(layers)}，应都是 full_attention")
    return found


def empty(value: Any) -> bool:
    """没有写，或者写的是「没有」。"""
    return any(value is nothing for nothing in (None, False)) or value in ([], {}, 0, "")


def context(path: Path, claimed: int, asked: int | None) -> int:
    """上下文多长：它写的，或者要的那么长（不能更长，它没有练过）。"""
    if asked is not None and not 0 < asked <= claimed:
        raise UserError(f"--max_len 是 {asked}，应在 1 与它写的 {claimed:,} 之间")
    if (asked or claimed) > LONGEST:
        raise UserError(
            f"{path} 的 max_position_embeddings 是 {claimed:,}，超过 {LONGEST:,}；"
            "真的练过那么长，也可以加上 --max_len，只要一部分，例如 --max_len 1024"
        )
    return asked or claimed


def read_note(path: Path, note: Any) -> tuple[dict[str, Any], str | None]:
    """导出时记下的 (配置, 阶段)：只留我们有的、一个一个的值，别人机器上的路径不要。"""
    note = {} if note is None else note
    saved = note.get("config", {}) if isinstance(note, dict) else None
    if not isinstance(saved, dict):
        raise UserError(f"{path} 的 {KEY} 不对；请删掉这一项，再加上 --stage 与 --preset")
    known = {f.name for f in fields(Config)} - LOCAL | {"data", "sft_data"}
    kept = {name: value for name, value in saved.items() if name in known}
    for name, value in kept.items():
        large = type(value) is int and abs(value) >= 2**63
        if not (value is None or isinstance(value, str | int | float)) or large or (
            isinstance(value, str) and len(value) > 1000
        ):  # fmt: skip
            raise UserError(f"{path} 的 {KEY} 里 {name} 是 {brief(value)}，不对；请重新导出")
    stage = note.get("stage")
    return kept, stage if isinstance(stage, str) else None
