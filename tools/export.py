"""把模型带出去：检查点 -> 一个 Hugging Face 的文件夹，transformers 与它的生态都能用。

    python -m tools.export out/tiny/sft.pt out/tiny/hf              写出来
    python -m tools.export out/tiny/sft.pt out/tiny/hf --overwrite  换掉已有的

里面是 Qwen3ForCausalLM 的权重与配置、分词器、生成的设置与一张模型卡；读它不需要这个仓库的代码。
反过来，tools.import_hf 把（在别处接着练过的）文件夹变回检查点。
"""

import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from checkpoint import load
from config import N_TOKENS, PLACES, Config, UserError, option, run_script
from generate import CALM, Sampling
from tokenizer import Tokenizer
from tools.huggingface import paths_and_options, qwen3

USAGE = "python -m tools.export 检查点.pt 文件夹 [--参数 值 …]"
KEY = "mini_llm"  # config.json 里，transformers 用不到而我们导入时要用的
LOCAL = ("resume", "allow_changes", "overwrite", *PLACES)  # 与模型无关，或是这台机器上的路径


@dataclass
class Options:
    """命令行参数。"""

    overwrite: bool = option(False, "文件夹里已有一个模型时，换掉它")


def main() -> None:
    """读命令行，导出，说怎样用。"""
    path, folder, options = paths_and_options(Options, sys.argv[1:], USAGE)
    export(path, folder, options.overwrite)
    print(f"写好 {folder}；怎样用，见里面的 README.md")


def export(path: Path, folder: Path, overwrite: bool = False) -> None:
    """检查点 -> 文件夹。先写在旁边，写完才改名：中途出错，不会留下半个看着像样的。

    Raises:
        UserError: 检查点不能用，文件夹已经有东西，或写不进去。
    """
    tokenizer = Tokenizer()
    model, config, checkpoint = load(path, tokenizer)
    check_target(folder, overwrite)
    stage = checkpoint["stage"]
    state = model.state_dict()
    state["embedding.weight"] = state["embedding.weight"][:N_TOKENS].clone()  # 补齐的不带走
    theirs = qwen3(
        replace(config, vocab_size=N_TOKENS), state,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
        **{KEY: recorded(stage, config)},
    )  # fmt: skip
    theirs.generation_config = generation_config(stage, tokenizer)
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        theirs.save_pretrained(part)
        tokenizer.to_transformers(stage, config.max_len).save_pretrained(part)
        (part / "README.md").write_text(model_card(checkpoint, config, theirs), encoding="utf-8")
        put_in_place(part, folder)
    except OSError as error:
        raise UserError(
            f"写不了 {folder}（{error.strerror or error}）；请检查路径、权限与空间"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_target(folder: Path, overwrite: bool) -> None:
    """能不能写到这里；已有的别的东西，说什么也不动。"""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} 是文件，不是文件夹；请换一个名字")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} 里有别的东西，不像是导出的模型；请换一个文件夹")
    if not overwrite:
        raise UserError(f"{folder} 里已经有一个模型；不要它了：加上 --overwrite；或换一个文件夹")


def put_in_place(part: Path, folder: Path) -> None:
    """写好的改成该有的名字；原有的先挪开，最后才删。"""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


# ---------- 权重之外的 ----------


def recorded(stage: str, config: Config) -> dict:
    """记在 config.json 里的：哪个阶段，怎样练的；路径不带走，语料只留文件名。"""
    kept = {k: v for k, v in asdict(config).items() if k not in LOCAL}
    names = {name: Path(getattr(config, name)).name for name in ("data", "sft_data")}
    return {"stage": stage, "config": kept | names}


def generation_config(stage: str, tokenizer: Tokenizer):
    """聊天程序默认的采样，以及绝不该抽到的词元。

    重复惩罚没有带上：transformers 连提问里的字也罚，我们只罚模型自己写过的。
    """
    from transformers import GenerationConfig

    sampling = Sampling(**CALM.get(stage, {}))
    return GenerationConfig(
        do_sample=True, temperature=sampling.temp, top_k=sampling.top_k, top_p=sampling.top_p,
        max_new_tokens=sampling.max, suppress_tokens=tokenizer.never_sampled(),
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=0,
    )  # fmt: skip


def model_card(checkpoint: dict, config: Config, theirs) -> str:
    """README.md：它是什么，学过什么，学得怎样，怎样用，有什么限制。"""
    return "TODO\n"


if __name__ == "__main__":
    run_script(main)
