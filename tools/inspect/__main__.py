"""数据体检：不训练，先看看一份数据会变成什么。

    python -m tools.inspect data/my.jsonl                      预训练的
    python -m tools.inspect data/my_chat.jsonl --stage sft     微调的对话
    python -m tools.inspect data/ --json report.json           另写成 JSON；- 是标准输出

读法与训练的相同，训练不收的这里也不收，说同样的话；备好的词元文件留着，接着训练就直接用。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}tools{os.sep}")[0]

from settings.script import run_script

import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from config import PRESETS, Config, UserError, option
from corpus.token_file import tokenize_corpus
from settings.flags import read_options, words
from settings.lengths import make_room
from settings.resolve import Origin, Origins, load_config
from settings.say import VISIBLE
from tokenizer import Tokenizer
from tools.inspect import facts, screen

USAGE = "用法：python -m tools.inspect 文件 … [--stage sft] [--json 文件] [--参数 值 …]"


@dataclass
class Options:
    """命令行参数；是 None 的照 config.py。"""

    files: tuple[str, ...] = words("数据文件")
    stage: str = option("pretrain", "当作什么来读：文档，或对话", choices=("pretrain", "sft"))
    json: str | None = option(None, "把结果也写成 JSON：写到哪里；- 是标准输出，别的话改走标准错误")
    preset: str | None = option(None, f"预设：{'、'.join(PRESETS)}；默认与训练一样自动判断")
    seq_len: int | None = option(None, "每行的长度", "词元")
    data_dir: str | None = option(None, "词元文件放在哪里，默认与训练相同")
    val_fraction: float | None = option(None, "留出多大比例的文档只用来检验，默认与训练相同")
    keep_reasoning: bool | None = option(None, "思考过程也学，默认与训练相同")
    time: bool = option(True, "真的走几步，估计训练要多久")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        found = [] if any(map(str.strip, self.files)) else [f"请先写数据文件；{USAGE}"]
        if self.json is not None and not self.json.strip():
            found.append("--json 是空的；请写上路径，或写 - 印在标准输出")
        return found

    def config(self) -> tuple[Config, Origins]:
        """训练时会用的那一份配置，每个值从哪里来；文件有几个的，合成一份语料。

        Raises:
            UserError: 看得出的问题一次列出。
        """
        names = ("preset", "seq_len", "data_dir", "val_fraction", "keep_reasoning")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        given["data"] = ",".join(self.files)
        return load_config(self.stage, [f"--{name}={value}" for name, value in given.items()])


def main(argv: list[str] | None = None) -> None:
    """读命令行，看一遍，印出来，写成 JSON。"""
    options = read_options(Options, sys.argv[1:] if argv is None else argv, USAGE)
    stdout = sys.stdout
    with redirect_stdout(sys.stderr if options.json == "-" else stdout):
        config, origins = options.config()
        if options.json not in (None, "-"):
            check_writable(Path(options.json))
        report = facts.nothing_known(options.stage, config)
        samples: list[facts.Sample] = []
        try:
            samples += examine(report, config, origins, options.time)
        except UserError as error:  # 不收的，知道多少写多少
            report |= facts.of_refusal(error)
            raise
        finally:
            if report["samples"] is not None or report["error"] is not None:
                screen.show(report, samples)
                write_json(report, options.json, stdout)


def examine(report: dict, config: Config, origins: Origins, with_time: bool) -> list[facts.Sample]:
    """备好词元文件，把知道的逐项填进 report；返回样本。

    Raises:
        UserError: 训练不收的，这里也不收。
    """
    stage, tokenizer = report["stage"], Tokenizer()
    with redirect_stdout(sys.stderr):  # 它说的，下面的一屏里都有
        data = tokenize_corpus(report["source"], stage, tokenizer, config)
    report |= facts.of_card(data.card)
    if stage == "sft":  # 训练时也这样
        starts = data.starts["train"]
        make_room(config, origins, starts[1:] - starts[:-1] - 1)
        report["seq_len"] = config.seq_len
    rows = facts.rows_of(data, stage, config, tokenizer)
    report |= facts.lengths(data, rows, config.seq_len)
    samples = facts.samples(data, rows, config.seq_len, tokenizer)
    if with_time:
        from tools.inspect.timing import time_of_default_run  # 用到训练的一切，不估计时不必等

        steps = {"pretrain": "max_steps", "sft": "sft_max_steps"}[stage]
        preset = origins[steps] is Origin.PRESET
        report["time"] = time_of_default_run(stage, config, tokenizer, preset)
    report["samples"] = [sample.to_dict() for sample in samples]
    return samples


# ---------- 写成 JSON ----------


def check_writable(path: Path) -> None:
    """现在就知道写不写得进去，不必等看完；不是以前的体检结果就不盖掉。

    Raises:
        UserError: 那里是别的文件，例如数据自己。
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as f:
        if path.is_file() and f.seek(0, 2):
            f.seek(0)
            if not f.read(64).startswith(opening()):
                raise UserError(f"{path} 不是以前的体检结果，不盖掉它；请换一个 --json")


def opening() -> bytes:
    """体检结果的开头：凭它认出以前的。"""
    return to_json({"report": facts.TITLE}).rstrip(b"\n}")


def to_json(report: dict) -> bytes:
    """UTF-8 的 JSON；不成对的代理字符、能控制终端的，写成 \\ud800 的样子，仍是合法的 JSON。"""
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    text = text.translate({code: f"\\u{code:04x}" for code in VISIBLE})
    return text.encode("utf-8", "backslashreplace")


def write_json(report: dict, where: str | None, stdout) -> None:
    """写到 where：文件，或者标准输出（"-"）。"""
    if where == "-":
        stdout.write(to_json(report).decode("utf-8"))
    elif where is not None:
        Path(where).write_bytes(to_json(report))


if __name__ == "__main__":
    run_script(main)
