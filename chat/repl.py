"""两个聊天程序共用的部分：命令行参数、行编辑、命令、一个字一个字地打印。

start      读命令行，载入检查点
Chat       一场聊天：读一句，答一句；/probs、/why、/next 让人看见它怎样猜，动手改的在 hands 里
obey       执行设置采样的命令
"""

import reprlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chat import display
from chat.hands import Hands
from chat.inputs import Remembered, notify, read_inputs
from config import Config, UserError, option
from engine.device import Device
from engine.speed import load_for_chat, stored_as
from generate import CALM, Choice, Sampling, Speaker, is_looping, probabilities
from settings.flags import convert, field_types, read_options
from settings.resolve import default_checkpoint
from settings.say import say

HELP = """\
  /help              这份说明；下面的数是举例，只写名字就说出现在的值
  /reset             忘掉前文，重新开始（连同 /system 的话）
  /temp 0.6          温度（0：总选最可能的）      /top_k 50     只从最可能的几个里选
  /top_p 0.95        概率之和到此为止             /min_p 0.05   太不可能的不选
  /penalty 1.3       重复惩罚                     /max 400      一次最多写多少词元
  /seed 1            固定随机种子（0：不固定）    /quit         离开（或按 Ctrl-D）
  /probs 5           每写一个词元，画出最可能的几个；不写数就是 5，/probs 0 不再画
  /why               刚才的回答里，每个词元有多意外
  /next 守株待       不写，只看接下来最可能是什么（sft_chat.py 当作提问，看回答的头一个）
  /without 2.1       关掉第 2 层第 1 头再聊；2.attention、2.feed_forward、2.expert3 也行，/with 恢复
  /replace 3 虎      刚才的回答，第 3 个词元若是「虎」，后面的各有多意外
  /patch 2 另一句话  换上另一句话在第 2 层之后的向量，回答的头一个词元变成什么
  /system 请简短     只在 sft_chat.py：换一段系统的话，重新开始；不写字就说出现在的
  /tool 晴，20 度    只在 sft_chat.py：替工具答复它刚才的调用，它接着回答
  /forget            忘掉输入过的话，连同存在你自己目录里的
  回答时按 Ctrl-C 停止回答；上下方向键翻看输入过的话。"""


@dataclass
class ChatOptions(Sampling):
    """聊天程序的命令行参数：采样的各项，加上用哪个检查点。"""

    checkpoint: str | None = option(None, "检查点的路径；默认是训练脚本写下的那一个")
    prompt: str | None = option(None, "只回答这一句，然后退出；供脚本使用")
    device: str = option("auto", "设备", choices=("auto", "cuda", "mps", "cpu"))
    quantize: str = option(
        "auto",
        "矩阵存得更小，说得更快，损失略增；auto：最快的、损失至多增加千分之一的",
        choices=("auto", "none", "bf16", "int8"),
    )
    compile: bool = option(False, "编译逐个生成的那一步：开头多等半分钟到一分钟，之后快一倍以上")
    probs: int = option(0, "每写一个词元，画出最可能的几个；0 表示不画", "个")

    def problems(self) -> list[str]:
        """同 `Sampling.problems`，加上 probs。"""
        wrong = [] if 0 <= self.probs <= 50 else [f"probs 要在 0 与 50 之间，得到的是 {self.probs}"]
        return super().problems() + wrong


def start(stage: str, argv: list[str]) -> tuple[ChatOptions, Speaker]:
    """读命令行，载入检查点。

    Args:
        stage: "pretrain" 或 "sft"，决定默认读哪个检查点。
        argv: 命令行参数，不含脚本名。
    Raises:
        UserError: 参数有问题，或检查点不能用。
    """
    script = {"pretrain": "pre_chat.py", "sft": "sft_chat.py"}
    usage = f"用法：python {script[stage]} [--参数 值 …]"
    options = read_options(ChatOptions, argv, usage, **CALM.get(stage, {}))
    usual = default_checkpoint(stage)  # 用不到也问一声：config.py 改错了，这时就说
    path = Path(options.checkpoint or usual)
    options.checkpoint = str(path)
    device = Device(Config(device=options.device, compile=options.compile))
    speaker = load_for_chat(path, device, options.quantize)
    if speaker.stage != stage:
        right = script.get(speaker.stage)
        then = f"请改用 python {right}" if right else "它不是训练脚本写的，请换一个"
        raise UserError(f"{path} 是 {speaker.stage} 阶段的检查点；{then}")
    if options.compile:
        for note in device.notes:
            notify(f"（{note}）")
    if device.compile:
        notify("（正在编译：第一次半分钟到一分钟，以后快些……）")
        list(speaker.generate([speaker.tokenizer.bos_id], Sampling(max=2)))
    if sys.stdout.isatty() and options.prompt is None:
        say(f"已载入 {path}，矩阵存成 {stored_as(speaker)}。输入 /help 看命令，Ctrl-D 离开。")
    return options, speaker


@dataclass
class Chat:
    """一场聊天：设置、模型，以及刚写过什么（`/why` 要看）。"""

    options: ChatOptions
    speaker: Speaker
    last: tuple[list[int], list[int]] | None = None  # (开头, 接着写的，连同写完的标记)

    def __post_init__(self):
        self.hands = Hands(self.speaker)

    def run(
        self,
        answer: Callable[[str], None],
        reset: Callable[[], None],
        roles: dict[str, Callable[[str], None]] | None = None,
    ) -> None:
        """读一句，答一句，直到离开。

        Args:
            answer: 回答一句话，自己负责打印；答不了的（例如太长）抛出 UserError。
            reset: 忘掉前文。
            roles: /system 与 /tool 各做什么，得到的是后面的字；没有这两种角色的，不给。
        Raises:
            UserError: 用 --prompt 给的那句话答不了，或管道里送来的不是 UTF-8；
                聊天中答不了则只是说一声，接着聊。
        """
        if self.options.prompt is not None:
            if not self.options.prompt.strip():
                raise UserError("--prompt 是空的；请写上要说的话")
            answer(self.options.prompt)
            return
        remembered = Remembered(old=Path(self.options.checkpoint).with_name("chat_history"))
        commands = self.commands(reset, remembered, roles)
        for text in read_inputs(remembered):
            if text.startswith(("/", "／")):  # 中文输入法打出来的是全角的
                text = "/" + text[1:]
            command = text.split()[0].lower() if text.startswith("/") else ""
            rest = "".join(text.split(maxsplit=1)[1:])
            try:
                if command in ("/quit", "/exit"):
                    return
                if command in commands:
                    commands[command](rest)
                elif command:
                    notify(obey(text.lower(), self.options))
                else:
                    answer(text)
            except UserError as error:
                notify(f"（{error}）")
            except KeyboardInterrupt:  # 停在 /why 或 /next 的半途
                notify("（已停止）")

    def commands(self, reset, remembered: Remembered, roles) -> dict[str, Callable[[str], None]]:
        """{命令: 做什么}，得到的是后面的字；设置采样的几个不在内，见 `obey`。"""

        def forget_all(_: str) -> None:
            reset()
            self.last = None
            notify("（已忘掉前文）")

        def elsewhere(command: str) -> None:
            raise UserError(f"{command} 要在 sft_chat.py 里用：这里不分谁说的话")

        return {
            "/reset": forget_all,
            "/forget": lambda _: notify(remembered.forget()),
            "/why": lambda _: self.why(),
            "/next": self.next,
            **self.hands.commands(lambda: self.last),
            **(roles or {name: lambda _, n=name: elsewhere(n) for name in ("/system", "/tool")}),
        }

    def stream(self, ids: list[int]) -> list[int]:
        """一边生成一边打印，返回生成的编号。Ctrl-C 停止；不是自己写完的，都说明为什么停下。"""
        speaker, options = self.speaker, self.options
        new: list[int] = []
        end: list[int] = []
        notice = ""
        try:
            with self.hands.on():
                for choice in speaker.choices(ids, options):
                    if options.probs:
                        self.show(choice, len(new) + 1)
                    if choice.token == speaker.tokenizer.eos_id:
                        end = [choice.token]
                        break
                    new.append(choice.token)
                    if not options.probs:
                        say(speaker.tokenizer.decode([choice.token]), end="", flush=True)
                    if is_looping(new, speaker.tokenizer):
                        harder = options.penalty + 0.2
                        notice = f"（开始重复，停在这里；可以用 /penalty {harder:.1f} 加重惩罚）"
                        break
                else:
                    if len(ids) + len(new) >= speaker.config.max_len:
                        notice = f"（写满了 {speaker.config.max_len} 个词元的上下文）"
                    elif len(new) >= options.max:
                        notice = f"（写满了 {options.max} 个词元，/max 可以调）"
            if not new and not notice:
                notice = "（它一个字也没写：认为到这里就完了）"
        except KeyboardInterrupt:
            notice = "（已停止）"
        say(speaker.tokenizer.decode(new) if options.probs else "")
        if notice:
            notify(notice)
        self.last = (ids, new + end)
        return new

    def show(self, choice: Choice, number: int) -> None:
        """/probs：写第 number 个词元的那一刻，有哪些候选，选中的是哪个，有多意外。"""
        speaker, k = self.speaker, self.options.probs
        probs = choice.logits.float().softmax(-1)
        lottery = probabilities(choice.logits, choice.written, self.options, speaker.banned)
        name, p = speaker.tokenizer.label(choice.token), probs[choice.token].item()
        console = display.terminal()
        console.print(f"\n第 {number} 个：", end="")
        console.print(f"「{name}」，意外 {display.bits(p):.1f} 比特", style="bold", markup=False)
        console.print(display.candidates(speaker.tokenizer, probs, k, choice.token, lottery))

    def why(self) -> None:
        """/why：刚才的回答里，每个词元有多意外；最意外的三个，它本来更想写什么。"""
        ids, new = self.last or ([], [])
        if not new:
            raise UserError("还没有回答；先说一句话，再看它为什么这样答")
        tokenizer = self.speaker.tokenizer
        with self.hands.on():
            probs = self.speaker.read([*ids, *new])[len(ids) - 1 : -1]  # (n, V)
        chosen = [row[token].item() for row, token in zip(probs, new, strict=True)]
        console = display.terminal()
        console.print(display.surprise(tokenizer, new, chosen, console.width - 2))
        mean = sum(map(display.bits, chosen)) / len(chosen)
        notify(f"平均每个词元意外 {mean:.1f} 比特。最意外的：")
        for i in sorted(range(len(new)), key=lambda i: chosen[i])[:3]:
            best = probs[i].argmax().item()
            wanted = f"；它最想写的是「{tokenizer.label(best)}」{display.percent(probs[i].max())}"
            notify(
                f"  第 {i + 1} 个「{tokenizer.label(new[i])}」{display.percent(chosen[i])}"
                + (wanted if best != new[i] else "；这已经是它最想写的")
            )

    def next(self, text: str) -> None:
        """/next：不写，只看这段文字之后，下一个词元的概率。"""
        if not text:
            raise UserError("请写上一段文字，例如：/next 守株待")
        ids = self.speaker.prompt(text)
        if len(ids) > self.speaker.config.max_len:
            limit = self.speaker.config.max_len
            raise UserError(f"这段文字有 {len(ids)} 个词元，最多 {limit} 个；请短一些")
        with self.hands.on():
            probs, k = self.speaker.read(ids)[-1], self.options.probs or 10
        if self.speaker.stage == "sft":
            notify("（当作一句提问，这是回答的头一个词元）")
        display.terminal().print(display.candidates(self.speaker.tokenizer, probs, k))


def obey(command: str, options: ChatOptions) -> str:
    """执行一条设置采样的命令，返回要打印的话；不合法的值不会生效。"""
    name, *rest = command.removeprefix("/").split(maxsplit=1) or [""]  # 空格也可以是全角的
    value = "".join(rest).strip()
    types = field_types(Sampling) | {"probs": int}
    if name not in types:
        shown = reprlib.repr(name)[1:-1]
        return HELP if name == "help" else f"没有命令 /{shown}；输入 /help 看有哪些命令"
    if not value and name == "probs":
        value = "5"
    if not value:
        return f"{name} 现在是 {getattr(options, name)}"
    problems: list[str] = []
    before, new = getattr(options, name), convert(name, value, types[name], problems)
    if not problems:
        setattr(options, name, new)
        problems = options.problems()
    if problems:
        setattr(options, name, before)
        return "；".join(problems).removeprefix("--")
    return f"{name} 改为 {new}"
