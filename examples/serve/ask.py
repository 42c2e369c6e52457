"""向服务提问：用 openai 的客户端，边写边印，记得前几轮。

    python -m examples.serve.ask                                       一行一句，Ctrl-D 离开
    python -m examples.serve.ask "画蛇添足是什么意思？" "它出自哪里？"   问完就走

这里没有模型：模型在 `transformers serve` 的进程里，怎样启动它，见 examples/serve/README.md。
"""

import os
import sys

if not __package__:  # 当作文件运行的：其余的到仓库里找
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}examples{os.sep}")[0]

from settings.script import run_script

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chat.piped import piped_lines
from config import UserError, option
from settings.flags import read_options, words
from settings.say import say

if TYPE_CHECKING:
    import openai

USAGE = "用法：python -m examples.serve.ask [问题 …] [--参数 值 …]"
Turn = dict[str, str]  # {"role": "user" 或 "assistant", "content": 说的话}


@dataclass
class Options:
    """命令行参数。"""

    questions: tuple[str, ...] = words("问题")
    url: str = option("http://127.0.0.1:8000/v1", "服务的地址")
    temp: float | None = option(None, "温度，0 表示总选最可能的；默认由导出的文件夹决定")
    max: int = option(200, "一次最多写多少", "词元")
    rounds: int = option(4, "最多带上前几轮问答；太多，就超过模型能看的上下文", "轮")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        found = []
        if not self.url.startswith(("http://", "https://")):
            found.append(f"--url 要以 http:// 或 https:// 开头，得到的是 {self.url!r}")
        if self.temp is not None and not 0 <= self.temp <= 10:
            found.append(f"--temp 要在 0 与 10 之间，得到的是 {self.temp}")
        if self.max < 1:
            found.append(f"--max 至少是 1，得到的是 {self.max}")
        if self.rounds < 0:
            found.append(f"--rounds 不能是负数，得到的是 {self.rounds}")
        return found


def main() -> None:
    """逐句提问，边收边印；每一句都带上前几轮。"""
    options = read_options(Options, sys.argv[1:], USAGE)
    try:
        import openai
    except ModuleNotFoundError as error:
        raise UserError(
            f"还没有安装 {error.name}；请先运行 pip install -r examples/serve/requirements.txt"
        ) from None
    turns: list[Turn] = []
    pieces: list[str] = []
    try:
        client = openai.OpenAI(base_url=options.url, api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        for text in options.questions or typed():
            if not text.strip():
                continue
            remembered = turns[-2 * options.rounds :] if options.rounds else []
            question = {"role": "user", "content": text}
            pieces.clear()
            for piece in answer(client, model, [*remembered, question], options):
                say(piece, end="", flush=True)
                pieces.append(piece)
            say()
            if pieces:  # 一个字也没答的提问不留着，免得它接着答上一句
                turns += [question, {"role": "assistant", "content": "".join(pieces)}]
    except openai.APIConnectionError as error:
        if pieces:
            say()
            raise UserError(f"话没说完，与 {options.url} 断开了；请看服务那边的输出") from error
        raise UserError(
            f"连不上 {options.url}；请先启动服务（见 examples/serve/README.md），"
            f"或用 --url 写对它的地址"
        ) from error
    except UserError:  # 管道里送来的不是 UTF-8：与服务无关
        raise
    # 不是这种服务的：给的是网页，或者 JSON 里没有该有的。
    except (openai.OpenAIError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{options.url} 的服务答不了（{error}）；请看服务那边的输出") from error


def typed() -> Iterator[str]:
    """一行一句，直到输入结束。"""
    if not sys.stdin.isatty():
        yield from piped_lines(sys.stdin.buffer)
        return
    with suppress(EOFError):
        while True:
            yield input("\n问：")


def answer(
    client: "openai.OpenAI", model: str, turns: Iterable[Turn], options: Options
) -> Iterator[str]:
    """提问，一小段一小段地给出回答。

    Args:
        model: 服务报出的名字。
        turns: 前几轮，最后是这一问。
    Raises:
        openai.OpenAIError: 连不上，或服务答不了。
    """
    chosen = {} if options.temp is None else {"temperature": options.temp}
    with client.chat.completions.create(
        model=model, messages=turns, stream=True, max_tokens=options.max, **chosen
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content:
                    yield choice.delta.content


if __name__ == "__main__":
    run_script(main)
