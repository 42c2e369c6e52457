"""LoRA 与对齐两个例子共用的：命令行，模型目录，损失，成批的回答。

    read_options               命令行 -> 一个 dataclass
    installed_with             导入另外要装的包
    load_folder / save_folder  tools.export 写的那种目录 <-> transformers 的模型与分词器
    sft_batches                sft_train.py 用的那种批
    answer_loss                与 sft_train.py 同样的编号、同样的目标，只是换成 transformers 的模型
    write_answers              一批提问 -> 一批回答

图例：B 批次，T 词元数，V 词表大小。
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from config import LARGEST, Config, UserError
from dataset import IGNORE, SIDES, Batch, SFTBatches, prepare
from tokenizer import Tokenizer
from tools.export import check_target
from tools.huggingface import arguments, quiet
from tools.import_hf import check_tokenizer, last_line, read_config
from training import Device, add_in_fixed_order, evaluate, keep_freed_memory

Messages = list[dict[str, str]]  # [{"role": …, "content": …}, …]，transformers 的写法
ROWS = 8  # 检验与回答时，一次算几行

# peft 与 trl 里的旧写法，用户改不了。
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)


# ---------- 1. 命令行与模型目录 ----------


def read_options(cls: type, program: str) -> tuple[Path, Path, object]:
    """命令行 -> (导出的模型, 结果写在哪里, 各项参数)；--help 时打印说明并结束。

    Args:
        cls: 用 `option` 写成的 dataclass；其中的数都须是正数。
        program: 程序名，例如 "examples.lora.train"。
    Raises:
        UserError: 有看不懂的参数或不能用的值，或者结果会盖掉别的东西。
    """
    usage = f"python -m {program} 导出的文件夹 结果的文件夹 [--参数 值 …]"
    source, target, options = arguments(cls, sys.argv[1:], usage)
    problems = [
        f"--{f.name} 必须是正数，不超过 10^9，得到的是 {value}"
        for f in fields(cls)
        if isinstance(value := getattr(options, f.name), int | float)
        and not isinstance(value, bool)
        and not 0 < value <= LARGEST
    ]
    if problems:
        raise UserError("；".join(problems))
    check_target(target, overwrite=options.overwrite)
    return source, target, options


def load_folder(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """读 tools.export 写的目录：模型（fp32）与分词器。

    Raises:
        UserError: 不是我们认得的模型，或者还没有微调过。
    """
    keep_freed_memory()  # 大块的内存留着用：还了又要，占去一半的时间
    add_in_fixed_order()  # 同样的种子，同样的结果
    theirs, _ = read_config(path)
    check_tokenizer(path, Tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.chat_template is None:
        raise UserError(
            f"{path} 还没有微调过，不会回答；请先运行 python sft_train.py，再导出 sft.pt"
        )
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(path, config=theirs, dtype=torch.float32)
    except Exception as error:  # 坏文件引起的异常种类繁多，没有共同的基类
        raise UserError(f"{path} 的权重读不出来（{last_line(error)}）；请重新导出") from error
    return model, tokenizer


def save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """写成 tools.import_hf 读得回来的目录，并说怎样带回来。"""
    with quiet():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    checkpoint = path.parent / "sft.pt"
    print(
        f"写好 {path}；带回来接着聊：\n  python -m tools.import_hf {path} {checkpoint}\n"
        f"  python sft_chat.py --checkpoint {checkpoint}"
    )


@contextmanager
def installed_with(example: str) -> Iterator[None]:
    """在其中导入这个例子另外要装的包；没有装的，说怎样装。"""
    try:
        yield
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
    data = prepare(source, "sft", tokenizer, config)
    return {
        side: SFTBatches(data.tokens[side], data.starts[side], config.seq_len, tokenizer, seed)
        for side in SIDES
    }


def answer_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """这一批里助手的话的负对数概率之和，单位奈特；同 `training.loss_sum`。

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
    return evaluate(answer_loss, model.eval(), held_out, ROWS, max_tokens, device)


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
        with torch.inference_mode():
            ids = model.generate(**asked, generation_config=settings)
        yield from tokenizer.batch_decode(
            ids[:, asked["input_ids"].size(1) :], skip_special_tokens=True
        )
