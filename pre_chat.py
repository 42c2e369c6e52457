"""与预训练的模型玩接龙：你起个头，它接着往下写。

python pre_chat.py                          一句一句地玩
python pre_chat.py --prompt "守株待兔："    只写一次，供脚本使用
"""

from settings.script import run_script

import sys

from chat import repl
from config import UserError
from settings.say import say


def main(argv: list[str] | None = None) -> None:
    """载入模型，读一个开头，接着写；直接回车，接着刚才的往下写。"""
    options, speaker = repl.start("pretrain", sys.argv[1:] if argv is None else argv)
    chat = repl.Chat(options, speaker)
    written: list[int] = []  # 到目前为止的全文，不含开头的标记

    def answer(text: str) -> None:
        """从这个开头接着写；空的就接着刚才的写。"""
        nonlocal written
        if text.strip():
            written = speaker.encode(text)
        elif not written:
            raise UserError("请先写个开头，例如：守株待兔：")
        # 太长时只留末尾，至少空出四分之一的上下文给它写。
        keep = speaker.config.max_len * 3 // 4 - 1
        if len(written) > keep:
            repl.notify(f"（前文 {len(written)} 个词元，只看得到最后 {keep} 个）")
        ids = [speaker.tokenizer.bos_id, *written[-keep:]]
        say(text, end="", flush=True)
        written = written + chat.stream(ids)

    chat.run(answer, reset=lambda: written.clear())


if __name__ == "__main__":
    run_script(main)
