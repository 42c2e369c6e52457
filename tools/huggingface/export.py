"""把模型带出去：检查点 -> 一个 Hugging Face 的文件夹，transformers 与它的生态都能用。

    python -m tools.export out/tiny/sft.pt out/tiny/hf
    python -m tools.export out/tiny/sft.pt out/tiny/hf --overwrite    换掉已有的
    python -m tools.export out/tiny/sft.pt --gguf out/tiny/tiny.gguf  给 llama.cpp 的一个文件

里面是 Qwen3 结构的权重与配置、分词器、生成的设置与一张模型卡；读它不需要这个仓库的代码。
反过来，tools.import_hf 把它（或在别处接着练过的）变回检查点。
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from chat.numbers import file_size
from config import N_TOKENS, Config, UserError, option
from engine.checkpoint import load
from generate import CALM, Sampling
from settings.check import PLACES
from settings.flags import read_options, word
from settings.say import say
from tokenizer import Tokenizer
from tools.gguf.export import TYPES, check_file, export_gguf, installed
from tools.huggingface.card import corpora, model_card
from tools.huggingface.shapes import TWO_PATHS, check_finite, quiet, qwen3

USAGE = "用法：python -m tools.export 检查点.pt [文件夹] [--gguf 文件] [--type f16] [--overwrite]"
KEY = "mini_llm"  # config.json 里，transformers 用不到、导入时才要的那一项
# 不记在 config.json 里的：这台机器上的路径，以及只与那一次运行有关的。
LOCAL = {*PLACES, "resume", "allow_changes", "overwrite", "plan", "device", "dtype", "compile",
         "parallel"}  # fmt: skip


@dataclass
class Options:
    """命令行参数。"""

    source: str = word("路径", TWO_PATHS)
    target: str = word("路径")
    gguf: str | None = option(None, "另外（或只）写成一个 GGUF 文件，给 llama.cpp 与 ollama")
    type: str = option("f16", "GGUF 里的矩阵存成什么", choices=TYPES)
    overwrite: bool = option(False, "已经有一个模型时，换掉它")

    def problems(self) -> list[str]:
        """不能用的组合，一条一句。"""
        found = []
        if self.source and self.target is None and self.gguf is None:
            found.append(TWO_PATHS.replace("{usage}", USAGE))
        if self.target and self.gguf and Path(self.target).resolve() == Path(self.gguf).resolve():
            found.append(f"文件夹与 GGUF 文件都是 {self.gguf}；请各写一个名字")
        if self.type != "f16" and self.gguf is None:
            found.append("--type 说的是 GGUF 文件；请加上 --gguf 文件，或去掉 --type")
        return found


def main(argv: list[str] | None = None) -> None:
    """读命令行，导出，说接下来做什么。"""
    options = read_options(Options, sys.argv[1:] if argv is None else argv, USAGE)
    source = Path(options.source)
    if options.gguf is not None:  # 还没有写文件夹，先看写不写得了它
        installed()
        check_file(source, Path(options.gguf), options.overwrite)
    if options.target is not None:
        folder = Path(options.target)
        export(source, folder, options.overwrite)
        say(
            f"写好 {folder}：权重、配置、分词器与模型卡（README.md，里面有用法）\n"
            f"带回来：python -m tools.import_hf {shlex.quote(str(folder))} 新的检查点.pt"
        )
    if options.gguf is not None:
        file = Path(options.gguf)
        export_gguf(source, file, options.type, options.overwrite)
        where = shlex.quote(str(file))
        say(
            f"写好 {file}（{file_size(file.stat().st_size)}，{options.type}）\n"
            f"怎样用、与这里有什么不同：examples/llama_cpp/README.md；例如 "
            f"python -m llama_cpp.server --model {where} --n_ctx 0"
        )


def export(path: Path, folder: Path, overwrite: bool = False) -> None:
    """检查点 -> 文件夹。

    Raises:
        UserError: 检查点不能用，文件夹里已经有东西，或写不进去。
    """
    folder = folder.resolve()
    check_target(folder, overwrite)
    if path.resolve().is_relative_to(folder):
        raise UserError(f"{path} 就在 {folder} 里，换掉它会连检查点一起删掉；请换一个文件夹")
    tokenizer = Tokenizer()
    model, config, checkpoint = load(path, tokenizer)
    state = model.state_dict()
    check_finite(state, path)
    theirs = dressed(checkpoint["stage"], config, state, tokenizer)
    with written_whole(folder) as part:
        theirs.save_pretrained(part)
        save_tokenizer(
            tokenizer.to_transformers(checkpoint["stage"], config.max_len, config.keep_reasoning),
            part,
        )
        card = model_card(checkpoint, config, theirs.num_parameters())
        (part / "README.md").write_text(card, encoding="utf-8")


def dressed(stage: str, config: Config, state: dict[str, Tensor], tokenizer: Tokenizer):
    """我们的参数 -> transformers 的模型，带着要一起存下的配置。"""
    # 补齐词表用的那些行不带走：它们没有对应的词元。
    state = state | {"embedding.weight": state["embedding.weight"][:N_TOKENS].clone()}
    theirs = qwen3(
        replace(config, vocab_size=N_TOKENS), state, bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id, **{KEY: recorded(stage, config)},
    )  # fmt: skip
    theirs.generation_config = generation_config(stage, tokenizer)
    return theirs


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """给出旁边的一个文件夹去写，写完才改名：中途出错，不会留下半个看着像样的。

    Raises:
        UserError: 写不进去。
    """
    folder = folder.resolve()
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # 上次写到一半断了电的
        part.mkdir(parents=True)
        with quiet():
            yield part
        give_ordinary_permissions(part)
        put_in_place(part, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or "写到一半写不下去，多半是磁盘满了"
        raise UserError(f"写不了 {folder}（{reason}）；请检查路径、权限与空间") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def give_ordinary_permissions(folder: Path) -> None:
    """每个文件都像平常新建的那样，由 umask 定：safetensors 写的只有自己能读，别的用户打不开。"""
    sample = folder / ".permissions"
    sample.touch()
    mode = sample.stat().st_mode & 0o777
    sample.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def save_tokenizer(theirs, folder: Path) -> None:
    """写下分词器。Raises OSError：写不下去；`tokenizers` 自己抛出的只是 Exception。"""
    try:
        theirs.save_pretrained(folder)
    except Exception as error:
        raise OSError(str(error)) from error


def check_target(folder: Path, overwrite: bool) -> None:
    """能不能写到这里；不像模型的东西，加了 --overwrite 也不动。"""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} 是文件，不是文件夹；请换一个名字")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} 里有别的东西，不是导出的模型；请换一个文件夹")
    if not overwrite:
        raise UserError(f"{folder} 里已经有一个模型；不要它了：加上 --overwrite；或换一个文件夹")


def put_in_place(part: Path, folder: Path) -> None:
    """写好的改成该有的名字；原有的先挪开，新的到位了才删。"""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    replacing = folder.exists()
    if replacing:
        os.replace(folder, old)
    try:
        os.replace(part, folder)
    except OSError:
        if replacing:
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


# ---------- 权重之外的 ----------


def recorded(stage: str, config: Config) -> dict[str, Any]:
    """记在 config.json 里、导入时取回的：阶段与训练的配置；语料只留文件名，路径是私事。"""
    kept = {name: value for name, value in asdict(config).items() if name not in LOCAL}
    return {"stage": stage, "config": kept | corpora(config)}


def generation_config(stage: str, tokenizer: Tokenizer):
    """聊天程序默认的采样，以及绝不该抽到的词元。

    重复惩罚没有带上：`generate` 连提问里的字也罚，我们只罚模型自己写过的。
    """
    from transformers import GenerationConfig

    sampling = Sampling(**CALM.get(stage, {}))
    return GenerationConfig(
        do_sample=True, temperature=sampling.temp, top_k=sampling.top_k, top_p=sampling.top_p,
        max_new_tokens=sampling.max, suppress_tokens=tokenizer.never_sampled(),
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=0,
    )  # fmt: skip
