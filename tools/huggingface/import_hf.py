"""把模型带回来：Hugging Face 的文件夹 -> 检查点，聊天、看进去、接着微调都认得。

    python -m tools.import_hf out/tiny/hf out/mine/sft.pt
    python -m tools.import_hf out/lora out/mine/sft.pt --stage sft --preset wide

认的是 tools.export 写出来的，以及用 transformers 等接着练过的那一种：Qwen3 的结构、这里的分词器、
safetensors 的权重；bf16 与 fp16 的读成 fp32。对不上的一律不收，并说出是哪里。
优化器等训练的状态没有，所以导入的只能当作起点，不能 --resume。

别人的文件只由这里读，不交给 transformers：claims 读 config.json 里认得的几项，weights 读权重，
foreign 管着只碰普通的文件。文件里写着的程序、量化、要下载的东西，都到不了任何地方。
"""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

from config import PRESETS, SHAPE, Config, UserError, option
from engine.checkpoint import FORMAT, SCRIPTS, build_model, versions, write
from engine.progress import Progress
from settings.check import check_types, check_values
from settings.flags import read_options
from settings.resolve import fill_in
from settings.say import brief, say
from tokenizer import Tokenizer
from tools.huggingface.claims import Claims, read_claims
from tools.huggingface.export import corpora, dressed
from tools.huggingface.foreign import read_bytes, read_object
from tools.huggingface.shapes import TwoPaths
from tools.huggingface.weights import check_count, open_weights, read_state

USAGE = "用法：python -m tools.import_hf 文件夹 检查点.pt [--参数 值 …]"
SAME_TOKENIZER = ("normalizer", "pre_tokenizer", "model", "decoder")
CONFIG_BYTES, TOKENIZER_BYTES = 1 << 20, 16 << 20  # 真的不到 4 KB 与 1 MB
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
    max_len: int | None = option(None, "上下文只要这么长；默认照 config.json 写的", "词元")
    overwrite: bool = option(False, "检查点已经有了时，换掉它")


def main(argv: list[str] | None = None) -> None:
    """读命令行，导入，说接下来做什么。"""
    options = read_options(Options, sys.argv[1:] if argv is None else argv, USAGE)
    path = Path(options.target)
    stage = import_folder(Path(options.source), path, options)
    chat = {"pretrain": "pre_chat.py", "sft": "sft_chat.py"}[stage]
    where = shlex.quote(str(path))
    say(
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
    claims = read_config(folder, options.max_len)
    check_tokenizer(folder, tokenizer)
    stage, config = our_config(folder / "config.json", claims, options)
    checkpoint = {
        "format": FORMAT, "stage": stage, "config": asdict(config),
        "tokenizer": tokenizer.fingerprint(), "versions": versions(), "device": "导入",
        "model": {}, "optimizers": [], "scaler": {}, "shared_row": None,
        "progress": asdict(Progress()), "max_steps": 0, "data": {}, "rng": {},
    }  # fmt: skip
    checkpoint["model"] = read_weights(folder, config, claims)
    build_model(config, checkpoint, folder)
    write(path, checkpoint)
    return stage


# ---------- 1. 配置与分词器 ----------


def read_config(folder: Path, max_len: int | None = None) -> Claims:
    """config.json 里认得的几项。

    Raises:
        UserError: 没有、读不懂，或者不是我们的模型。
    """
    if not folder.is_dir():
        what = "是文件，不是文件夹" if folder.exists() else "不存在"
        raise UserError(f"{folder} {what}；要的是 tools.export 或 save_pretrained 写出来的文件夹")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} 里是 LoRA 的适配器；请先用 merge_and_unload 合并，再存成模型")
    path = folder / "config.json"
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{folder} 里没有 config.json，不是 transformers 的模型；请检查路径")
    return read_claims(path, read_object(path, CONFIG_BYTES), max_len)


@contextmanager
def unreadable(what: str) -> Iterator[None]:
    """读别人写的文件：tokenizers 抛出的异常没有共同的基类，Rust 里的崩溃连 Exception 也不是。

    Raises:
        UserError: what，后面是英文异常的最后一行。
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise UserError(f"{what}（{brief(reason)}）；请重新导出") from error


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """文件夹里的分词器与我们的相同：同样的文字得到同样的编号。"""
    path = folder / "tokenizer.json"
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{folder} 里没有 tokenizer.json，无从知道词表是不是这里的；请一并存下")
    text = read_bytes(path, TOKENIZER_BYTES)
    with unreadable(f"{path} 读不出来"):
        found = Backend.from_str(text.decode("utf-8"))
    theirs, ours = found.get_vocab(), tokenizer.backend.get_vocab()
    if differ := sorted(f"{t!r}" for t, _ in theirs.items() ^ ours.items()):
        raise UserError(
            f"{path} 的词表与这里的不同（{len(theirs)} 个词元，应为 {len(ours)} 个；"
            f"例如 {brief(differ[0])}）；只能导入用这里的分词器练的模型"
        )
    theirs, ours = json.loads(found.to_str()), json.loads(tokenizer.backend.to_str())
    if differ := [name for name in SAME_TOKENIZER if theirs[name] != ours[name]]:
        raise UserError(f"{path} 的 {'、'.join(differ)} 与这里的不同；请换回 tools.export 写出的")


def our_config(path: Path, claims: Claims, options: Options) -> tuple[str, Config]:
    """它的配置 -> (阶段, 我们的配置)；形状取自它，其余取自导出时记下的。

    Args:
        path: config.json，只用来说话。
    Raises:
        UserError: 记下的不对，或者缺了 --stage、--preset。
    """
    stage = claims.stage if options.stage == "auto" else options.stage
    if stage not in [*SCRIPTS]:
        raise UserError(f"{path} 没有记下练到了哪个阶段；请加上 --stage pretrain 或 --stage sft")
    saved = {"data": UNKNOWN, "sft_data": UNKNOWN} | claims.noted | claims.shape
    known = {f.name for f in fields(Config)}
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
    return stage, replace(config, **corpora(config))  # 语料只留文件名


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


def read_weights(folder: Path, config: Config, claims: Claims) -> dict[str, Tensor]:
    """文件夹里的权重 -> 我们的 state_dict，fp32，词表补齐到 config.vocab_size。"""
    with open_weights(folder) as stored:
        check_count(stored, config, folder)
        state = read_state(stored, config, claims.tied, folder)
    return state | {"embedding.weight": pad(state["embedding.weight"], config.vocab_size)}


def read_model(folder: Path, config: Config, claims: Claims, stage: str):
    """文件夹里的权重 -> transformers 的模型，fp32；示例用它，存下来与导出的一样。"""
    state = read_weights(folder, config, claims)
    return dressed(stage, config, state, Tokenizer())


def pad(table: Tensor, n_rows: int) -> Tensor:
    """词嵌入 (N_TOKENS, C) -> (n_rows, C)：补上的都照抄重复最多的那一行。

    语料里从没出现过的词元合用一行（见 `engine.shared_row.SharedRow`），补齐词表用的原本也在其中；
    抄回来，微调时才认得出它们可以合用。没有哪行重复的，抄 [unused1] 的：它从不是答案。
    """
    rows, counts = table.unique(dim=0, return_counts=True)
    fill = rows[counts.argmax()] if counts.max() > 1 else table[1]
    return torch.cat([table, fill.expand(n_rows - len(table), -1)])
