"""与微调过的模型聊天：你问，它答，记得前几轮。

python sft_chat.py                                  一问一答
python sft_chat.py --prompt "画蛇添足是什么意思？"  只答一次，供脚本使用
"""

from settings.script import run_script

import sys
from collections.abc import Sequence

from chat import repl
from config import UserError
from generate import Speaker

Turns = list[list[int]]


def trim(turns: Turns, limit: int) -> Turns:
    """前文太长时，从最早的一问一答起整轮忘掉，直到放得下；最后一问总是留着。

    Args:
        turns: 每轮发言的编号，问与答交替，最后是问。
        limit: 总共最多多少个词元。
    """
    while sum(map(len, turns)) > limit and len(turns) > 2:
        turns = turns[2:]
    return turns


def ask(
    speaker: Speaker, turns: Turns, text: str, role: str = "user", system: Sequence[int] = ()
) -> tuple[Turns, list[int]]:
    """在前几轮之后提问：返回放得下的各轮（最后是这一问），以及交给模型的编号。

    Args:
        role: 谁说的；"tool" 是工具的答复，与它的提问、调用合成一问，要忘一起忘。
        其余同 `fit`。
    """
    tokenizer = speaker.tokenizer
    question = tokenizer.turn_ids(role, speaker.encode(text))
    if role == "tool":
        *turns, asked, call = turns
        question = asked + call + question
    return fit(speaker, turns, question, system)


def fit(
    speaker: Speaker, turns: Turns, question: list[int], system: Sequence[int] = ()
) -> tuple[Turns, list[int]]:
    """同 `ask`，这一问已经是编号。

    Args:
        system: 系统的话的编号，总在最前面，不会忘掉。
    Raises:
        UserError: 这句话太长，放不下。
    """
    prefix = speaker.tokenizer.reply_prefix()
    limit = speaker.config.max_len * 3 // 4 - len(prefix) - len(system)  # 四分之一留给回答
    if len(question) > limit:
        raise UserError(f"这句话有 {len(question)} 个词元，最多 {limit} 个；请说短一些")
    turns = trim([*turns, question], limit)
    return turns, [*system, *(i for turn in turns for i in turn), *prefix]


def main(argv: list[str] | None = None) -> None:
    """载入模型，读一句话，答一句话。"""
    options, speaker = repl.start("sft", sys.argv[1:] if argv is None else argv)
    chat, tokenizer = repl.Chat(options, speaker), speaker.tokenizer
    turns, system = [], []  # 问与答交替；系统的话

    def answer(text: str, role: str = "user") -> None:
        """接着前几轮，回答这一句。"""
        if not text.strip():
            return
        remembered, ids = ask(speaker, turns, text, role, system)
        if forgotten := (len(turns) + (role == "user") - len(remembered)) // 2:
            repl.notify(f"（前文太长，忘掉了最早的 {forgotten} 轮）")
        if reply := chat.stream(ids):  # 一个字也没答的提问不留着，免得它接着答上一句
            turns[:] = [*remembered, tokenizer.turn_ids("assistant", reply)]

    def begin(text: str = "") -> None:
        """忘掉前文，换上这段系统的话。"""
        ids = tokenizer.turn_ids("system", speaker.encode(text)) if text else []
        if len(ids) > (limit := speaker.config.max_len // 2):  # 另一半留给问与答
            raise UserError(f"这段话有 {len(ids)} 个词元，最多 {limit} 个；请短一些")
        turns[:], system[:], chat.last = [], ids, None

    def set_system(text: str) -> None:
        """/system：换一段系统的话，重新开始；不写字就说出现在的。"""
        if text.strip():
            begin(text)
        repl.notify(f"（system 是「{tokenizer.decode(system)}」）" if system else "（没有 system）")

    def use_tool(text: str) -> None:
        """/tool：工具的答复，接在它的调用之后，它再回答。"""
        if not text.strip() or not turns:
            raise UserError("请等它写出调用，再写上工具的答复，例如：/tool 晴，20 度")
        answer(text, "tool")

    chat.run(answer, reset=begin, roles={"/system": set_system, "/tool": use_tool})


if __name__ == "__main__":
    run_script(main)
