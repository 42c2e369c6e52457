"""对话模板：`tokenizer.CHAT_TEMPLATE` 换成 llama.cpp 与 llama-cpp-python 都看得懂的。

llama.cpp 照 BERT 的规矩，给 WordPiece 的模型总在开头与末尾各添一个词元，关不掉。所以请它添的就是
<|im_start|> 与 <|assistant|>：开头的那个，它见模板写了，自己会去掉；末尾的那个，模板就不写。
llama-cpp-python 不添，要写全。后者用的是 Python 的 Jinja2，有 `lipsum` 这个全局的名字，看它便知。
"""

import re

from tokenizer import CHAT_TEMPLATE

LAST = "{{ '<|im_start|><|assistant|>' }}"
LAST_IN_TWO = "{{ '<|im_start|>' }}{% if lipsum is defined %}{{ '<|assistant|>' }}{% endif %}"


def template(keep_reasoning: bool) -> str:
    """写进文件的模板。

    Args:
        keep_reasoning: 真时，消息里的思考过程也写出来；没有学过它的模型，不写。
    """
    text = re.sub(r"\{%-? (end)?generation %\}", "", CHAT_TEMPLATE)  # 只有训练才用得到的标记
    text = text.replace("\\u200b", "\u200b")  # 字的本身，两边都不必会转义
    assert text.count(LAST) == 1
    text = text.replace(LAST, LAST_IN_TWO)
    return text.replace("KEEP_REASONING", str(keep_reasoning).lower())
