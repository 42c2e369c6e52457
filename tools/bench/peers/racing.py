"""一个接一个地练，各练同样久，写好的不重做。"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config import Config, UserError, option
from engine.device import Device
from engine.speed import load_for_chat
from settings.files import write_text
from settings.flags import read_options
from settings.resolve import load_config
from settings.say import say
from tools.bench.measuring import Contestant, machine
from tools.bench.peers.others import MiniMind, NanoGPT, PlainQwen3
from tools.bench.yardsticks import PlainContestant
from tools.lab.answers import plus_minus, ratio
from tools.lab.laboratory import numbers_in
from tools.lab.prose import Text, bits, bits_of, read_texts

SCRIPT = Path(__file__).resolve().parents[3] / "pre_train.py"


@dataclass
class Options:
    """命令行参数。"""

    data: str | None = option(None, "学的文字：预训练的语料")
    held_out: str | None = option(None, "没有学过的文字，一行一篇 {text}")
    minutes: float = option(10.0, "各练多久", "分钟")
    preset: str = option("tiny", "我们的预设；qwen3 与 nanogpt 的形状照它")
    minimind: str | None = option(None, "minimind 检出在哪个目录；不写就不比它")
    nanogpt: str | None = option(None, "nanoGPT 检出在哪个目录；不写就不比它")
    size: str = option("256x4", "minimind 的宽度与层数")
    rates: str = option("0.001,0.002,0.004", "别人各试哪几种最高学习率，用逗号隔开")
    seed: int = option(42, "随机种子")
    data_dir: str = option("data", "词元文件放在哪里")
    out: str = option("out/peers", "我们的检查点放在哪里")
    json: str = option("out/peers.json", "结果写在哪里")

    def decides(self) -> dict[str, str]:
        """结果由什么决定：一个文件里的，都是同样地练、同样地量的，才好比。"""
        names = ("data", "held_out", "minutes", "preset", "size", "seed")
        return {name: str(getattr(self, name)) for name in names}

    def problems(self) -> list[str]:
        """不能用的值，一条一句；别人的代码不在那里，也现在就说，不等练到它。"""
        missing = [n for n in ("data", "held_out") if not getattr(self, n)]
        found = [f"请用 --{name} 写明文件" for name in missing]
        if not 0 < self.minutes < 1e5:
            found.append("--minutes 要是正数，不超过十万")
        if not numbers_in(self.rates):
            found.append(f"--rates 要是用逗号隔开的几个数，例如 0.001,0.002，不能是 {self.rates}")
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,2}", self.size):
            found.append(f"--size 要写成宽x层，例如 256x4，不能是 {self.size}")
        for folder, file in ((self.nanogpt, NanoGPT.FILE), (self.minimind, MiniMind.FILE)):
            if folder and not (Path(folder) / file).is_file():
                found.append(f"找不到 {Path(folder) / file}；请写它检出的目录")
        return found


def settings_of(options: Options) -> Config:
    """我们的预设，语料是给的那一份。"""
    given = {"preset": options.preset, "data": options.data, "data_dir": options.data_dir,
             "seed": options.seed}  # fmt: skip
    return load_config("pretrain", [f"--{name}={value}" for name, value in given.items()])[0]


def their_turn(options: Options, name: str, lr: float) -> Callable[[], dict]:
    """别人的一方，备好；干一份活就是练完再检验。"""
    config = settings_of(options)
    # 一次前向的行数与我们的相同，一步的也相同
    make = {
        "qwen3": lambda: PlainQwen3(config, lr),
        "nanogpt": lambda: NanoGPT(config, lr, options.nanogpt),
        "minimind shipped": lambda: MiniMind(config, lr, options.minimind, options.size, False),
        "minimind helped": lambda: MiniMind(config, lr, options.minimind, options.size, True),
    }
    peer, texts = make[name](), read_texts(options.held_out)

    def work() -> dict:
        steps, tokens = peer.train(options.minutes * 60)
        n_params = sum(p.numel() for p in peer.module.parameters())
        return exam(texts, peer.bits) | {"steps": steps, "tokens": tokens, "params": n_params}

    return work


def our_turn(options: Options) -> dict:
    """我们的：真的脚本，从敲下命令算起。"""
    config, path = settings_of(options), Path(options.out) / "pretrain.pt"
    command = [sys.executable, str(SCRIPT), "--hours", str(options.minutes / 60), "--overwrite"]
    for name in ("preset", "data", "data_dir", "seed"):
        command += [f"--{name}", str(getattr(config, name))]
    began = time.monotonic()
    if subprocess.run([*command, "--out_dir", options.out]).returncode:
        raise UserError("我们的训练没有练完，比不下去；原因在上面")
    seconds = time.monotonic() - began
    speaker = load_for_chat(path, Device(Config(compile=False)))
    n_params = sum(p.numel() for p in speaker.model.parameters())
    found = exam(read_texts(options.held_out), bits_of(speaker))
    return found | {"seconds": seconds, "params": n_params}


def exam(texts: list[Text], measure: Callable) -> dict:
    """在没有学过的文字上：每个字多少比特，与它的标准误差。"""
    value, error = ratio([pair[1:] for pair in bits(texts, measure)])
    return {"bits": value, "error": error}


def turns(options: Options) -> Iterator[tuple[str, Callable[[], Contestant] | None]]:
    """轮到谁：(名字，它的进程)；我们的是 None。"""
    yield "ours", None
    names = ["qwen3"] + ["nanogpt"] * bool(options.nanogpt)
    names += ["minimind helped"] * bool(options.minimind)
    for name in names:
        for lr in numbers_in(options.rates):
            yield f"{name}, lr {lr:g}", partial(PlainContestant, their_turn, options, name, lr)
    if options.minimind:
        name, lr = "minimind shipped", 5e-4  # 它的默认
        yield f"{name}, lr {lr:g}", partial(PlainContestant, their_turn, options, name, lr)


def bench_peers(argv: list[str]) -> None:
    """读命令行，一个接一个地练，每练完一个就写盘。"""
    usage = "用法：python -m tools.bench peers --data 语料 --held_out 文件 [--参数 值 …]"
    options = read_options(Options, argv, usage)
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if done.setdefault("settings", options.decides()) != options.decides():
        before = "，".join(f"{k} 是 {v}" for k, v in done["settings"].items())
        raise UserError(f"{path} 里的是照别的设置练的（{before}）；请用 --json 换一个文件")
    for given, name in ((options.minimind, "minimind"), (options.nanogpt, "nanoGPT")):
        if not given:
            say(f"（没有写 --{name.lower()}，不比 {name}）")
    for name, launch in turns(options):
        if name not in done:
            if launch is None:
                found = our_turn(options)
            else:
                with launch() as peer:
                    found = peer.work()[0] | {"memory": peer.peak_memory()}
            done[name] = found | {"machine": machine()}
            write_text(path, json.dumps(done, ensure_ascii=False, indent=1))
        say(f"{name}：每个字 {plus_minus(done[name]['bits'], done[name]['error'])} 比特")
