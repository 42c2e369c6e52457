"""LoRA 与对齐两个例子共用的：命令行，模型目录，损失，成批的回答。

    Folders / read_arguments   命令行：从哪里、到哪里，各项参数
    check_installed            另外要装的包都在
    load_folder / save_folder  tools.export 写的那种目录 <-> transformers 的模型与分词器
    sft_batches                sft_train.py 用的那种批
    answer_loss                与 sft_train.py 同样的编号、同样的目标，只是换成 transformers 的模型
    write_answers              一批提问 -> 一批回答

图例：B 批次，T 词元数，V 词表大小。
"""

import importlib
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from config import Config, UserError
from corpus.token_file import tokenize_corpus
from dataset import IGNORE, SIDES, Batch, SFTBatches
from engine.device import Device, add_in_fixed_order, keep_freed_memory
from loss import evaluate
from settings.check import LARGEST
from settings.flags import read_options
from settings.say import say
from tokenizer import Tokenizer
from tools.huggingface.export import check_target, save_tokenizer, written_whole
from tools.huggingface.import_hf import Options as ImportOptions
from tools.huggingface.import_hf import (
    check_tokenizer,
    our_config,
    read_config,
    read_model,
)
from tools.huggingface.shapes import TwoPaths, quiet

Messages = list[dict[str, str]]  # [{"role": …, "content": …}, …]，transformers 的写法
ROWS = 8  # 检验与回答时，一次算几行

# peft 与 trl 里的旧写法，用户改不了。
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)


# ---------- 1. 命令行与模型目录 ----------


@dataclass
class Folders(TwoPaths):
    """从哪里、到哪里；各个例子的命令行参数都接着它写。其中的数都须是正数，种子可以是 0。"""

    may_be_zero: ClassVar[tuple[str, ...]] = ("seed",)

    def problems(self) -> list[str]:
        """不能用的数，一条一句。"""
        found = []
        for name, value in vars(self).items():
            zero = name in self.may_be_zero
            if type(value) in (int, float) and not (0 < value <= LARGEST or (zero and value == 0)):
                rule = "不能是负数" if zero else "必须是正数"
                found.append(f"--{name} {rule}，不超过 10^9，得到的是 {value}")
        return found


def read_arguments(cls: type, program: str) -> tuple[Path, Path, Any]:
    """命令行 -> (导出的模型, 结果写在哪里, 各项参数)；--help 时打印说明并结束。

    Args:
        cls: 接着 `Folders` 写成的 dataclass，有 overwrite。
        program: 程序名，例如 "examples.lora.train"。
    Raises:
        UserError: 有看不懂的参数或不能用的值，或者结果会盖掉别的东西。
    """
    usage = f"用法：python -m {program} 导出的文件夹 结果的文件夹 [--参数 值 …]"
    options = read_options(cls, sys.argv[1:], usage)
    source, target = Path(options.source), Path(options.target)
    check_target(target, overwrite=options.overwrite)
    return source, target, options


def load_folder(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Config]:
    """读 tools.export 写的目录：模型（fp32）、分词器，以及导出时记下的配置。

    Raises:
        UserError: 不是 tools.import_hf 收得下的模型，或者还没有微调过。
    """
    keep_freed_memory()  # 大块的内存留着用：还了又要，占去一半的时间
    add_in_fixed_order()  # 同样的种子，同样的结果
    claims, ours = read_config(path), Tokenizer()
    check_tokenizer(path, ours)
    if claims.stage == "pretrain":
        raise UserError(
            f"{path} 还没有微调过，不会回答；请先运行 python sft_train.py，再导出 sft.pt"
        )
    options = ImportOptions(stage="sft", preset="tiny")  # 没有记下也不要紧：要用的与预设无关
    _, config = our_config(path / "config.json", claims, options)
    tokenizer = ours.to_transformers("sft", config.max_len, config.keep_reasoning)
    tokenizer.padding_side = "left"
    if config.sft_data != "builtin":
        say(f"（它微调用的对话：{config.sft_data}；下面说的词典与训练过的成语，它未必学过）")
    return read_model(path, config, claims, "sft"), tokenizer, config


def save_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, adapter=None
) -> None:
    """写成 tools.import_hf 读得回来的目录，并说怎样带回来；原有的整个换掉。

    Args:
        adapter: peft 的模型，它的窄路另存在 adapter/ 里。
    Raises:
        UserError: 写不进去。
    """
    with written_whole(path) as part:
        model.save_pretrained(part)
        save_tokenizer(tokenizer, part)
        if adapter is not None:
            adapter.save_pretrained(part / "adapter")
    checkpoint, n = path.with_name("sft.pt"), 1
    while checkpoint.exists():  # 也许是它的起点，不要盖掉
        n += 1
        checkpoint = path.with_name(f"sft-{n}.pt")
    folder, file = shlex.quote(str(path)), shlex.quote(str(checkpoint))
    say(
        f"写好 {path}；带回来接着聊：\n  python -m tools.import_hf {folder} {file}\n"
        f"  python sft_chat.py --checkpoint {file}"
    )


def check_installed(example: str, *packages: str) -> None:
    """导入这个例子另外要装的包。Raises UserError：没有装，并说怎样装。"""
    try:
        for name in packages:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"还没有安装 {error.name}；请先运行 pip install -r examples/{example}/requirements.txt"
        ) from None


# ---------- 2. 与 sft_train.py 同样的数据，同样的损失 ----------


def sft_batches(source: str, config: Config, seed: int) -> dict[str, SFTBatches]:
    """sft_train.py 用的那种批，训练与留出各一：几段问答拼成一行，只学助手的话。

    Args:
        source: "builtin" 或文件路径。
        config: 用到 data_dir、val_fraction、seq_len。
        seed: 决定哪几段拼在一起。
    """
    tokenizer = Tokenizer()
    data = tokenize_corpus(source, "sft", tokenizer, config)
    return {
        side: SFTBatches(
            data.tokens[side], data.starts[side], config.seq_len, tokenizer, seed, side=side
        )
        for side in SIDES
    }


def answer_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """这一批里助手的话的负对数概率之和，单位奈特；同 loss.py 的 `Loss`。

    不给 attention_mask、也不用缓存，transformers 就从 positions 认出一行里拼着几段（位置又从 0
    数起的地方），使它们互相看不见。
    """
    logits = model(
        input_ids=batch.ids, position_ids=batch.positions, use_cache=False
    ).logits  # (B, T, V)
    return F.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def held_out_loss(model: PreTrainedModel, held_out: SFTBatches, max_tokens: int) -> float:
    """留出的问答上每个目标的平均损失，奈特；最多用 max_tokens 个词元。"""
    device = Device(Config(device="cpu", dtype="float32", compile=False))
    return evaluate(partial(answer_loss, model.eval()), held_out, ROWS, max_tokens, device)


# ---------- 3. 成批地回答 ----------


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    temperature: float = 0.0,
    max_tokens: int = 96,
) -> Iterator[str]:
    """逐个给出回答。

    Args:
        prompts: 几段对话，最后一轮是提问。
        temperature: 0 总选最可能的；1 照模型自己的概率抽签。
        max_tokens: 一个回答最多写多少词元。
    """
    settings = GenerationConfig(
        do_sample=True, temperature=temperature or 1.0, top_k=0 if temperature else 1, top_p=1.0,
        repetition_penalty=1.0, max_new_tokens=max_tokens,
        suppress_tokens=Tokenizer().never_sampled(),
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.eval()
    for first in range(0, len(prompts), 64):
        asked = tokenizer.apply_chat_template(
            prompts[first : first + 64], add_generation_prompt=True, padding=True,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip
        with quiet(), torch.inference_mode():
            ids = model.generate(**asked, generation_config=settings)
        yield from tokenizer.batch_decode(
            ids[:, asked["input_ids"].size(1) :], skip_special_tokens=True
        )
