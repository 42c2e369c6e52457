"""与微调过的模型聊天：你问，它答，记得前几轮。

python sft_chat.py                                  一问一答
python sft_chat.py --prompt "画蛇添足是什么意思？"  只答一次，供脚本使用
"""

import sys

from chat import repl
from config import UserError
from generate import Speaker
from settings.flags import run_script


def trim(turns: list[list[int]], limit: int) -> list[list[int]]:
    """前文太长时，从最早的一问一答起整轮忘掉，直到放得下；最后一问总是留着。

    Args:
        turns: 每轮发言的编号，问与答交替，最后是问。
        limit: 总共最多多少个词元。
    """
    while sum(map(len, turns)) > limit and len(turns) > 2:
        turns = turns[2:]
    return turns


def ask(speaker: Speaker, turns: list[list[int]], text: str) -> tuple[list[list[int]], list[int]]:
    """在前几轮之后提问：返回放得下的各轮（最后是这一问），以及交给模型的编号。

    Raises:
        UserError: 这句话太长，放不下。
    """
    tokenizer = speaker.tokenizer
    question = tokenizer.turn_ids("user", tokenizer.encode(text))
    # 至少空出四分之一的上下文给回答。
    limit = speaker.config.max_len * 3 // 4 - len(tokenizer.reply_prefix())
    if len(question) > limit:
        raise UserError(f"这句话有 {len(question)} 个词元，最多 {limit} 个；请说短一些")
    turns = trim([*turns, question], limit)
    return turns, [i for turn in turns for i in turn] + tokenizer.reply_prefix()


def main(argv: list[str] | None = None) -> None:
    """载入模型，读一句话，答一句话。"""
    options, speaker = repl.start("sft", sys.argv[1:] if argv is None else argv)
    chat = repl.Chat(options, speaker)
    turns: list[list[int]] = []

    def answer(text: str) -> None:
        """接着前几轮，回答这一句。"""
        nonlocal turns
        if not text.strip():
            return
        remembered, ids = ask(speaker, turns, text)
        if forgotten := (len(turns) + 1 - len(remembered)) // 2:
            repl.notify(f"（前文太长，忘掉了最早的 {forgotten} 轮）")
        turns = remembered
        if reply := chat.stream(ids):
            turns.append(speaker.tokenizer.turn_ids("assistant", reply))
        else:
            turns.pop()  # 一个字也没答的提问不留着，免得它接着答上一句

    chat.run(answer, reset=lambda: turns.clear())


if __name__ == "__main__":
    run_script(main)
