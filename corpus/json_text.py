"""一边读一边解析的 JSON 文字：不管有多少个值，手里只留着还没用的那一点。"""

import codecs
import json
import re
from typing import Any, BinaryIO

from corpus.sniff import JSON, reaches_the_end

MAX_LINE = 64 << 20  # 一条最长多少字节；再长多半拿错了文件
BLOCK = 1 << 18  # 一次读进来多少字节
BLANK = re.compile("[ \t\n\r\ufeff]*")  # 接起来的文件，中间也会有 BOM
REST_OF_NUMBER = re.compile(r"[\d.eE+-]*")


class Text:
    """一边解码一边用的文字：`text` 里从 `at` 起是还没用的。"""

    def __init__(self, stream: BinaryIO):
        self.stream, self.text, self.at, self.more = stream, "", 0, True
        self.n_bytes = 0  # 读进来的
        self.decode = codecs.getincrementaldecoder("utf-8")().decode

    def read_on(self) -> None:
        """再读进来一些：还没用的越长，一次读得越多，几十 MB 的一条也只解析几次。"""
        block = self.stream.read(max(BLOCK, len(self.text) - self.at))
        self.more, self.n_bytes = bool(block), self.n_bytes + len(block)
        self.text = self.text[self.at :] + self.decode(block)
        self.at = 0

    def look_ahead(self) -> None:
        """读到眼前至少有一块没用的，或者没有更多了。"""
        while self.more and len(self.text) - self.at < BLOCK // 4:
            self.read_on()

    def next_character(self) -> str:
        """下一个不是空白的字，不用掉它；没有了，是空的。"""
        while True:
            self.at = BLANK.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def value(self) -> Any:
        """解析下一个值。Raises BadValue。"""
        while True:
            try:
                value, end = JSON.raw_decode(self.text, self.at)
                # 后面只剩数字里的字，直到末尾的，也许是半个数字：「1.」「1e」
                if REST_OF_NUMBER.match(self.text, end).end() < len(self.text) or not self.more:
                    self.at = end
                    return value
                cut, problem = True, ""
            except RecursionError:
                raise BadValue("嵌套得太深", at_end=False) from None
            except json.JSONDecodeError as error:
                cut, problem = reaches_the_end(error, self.text), error.msg
            except ValueError:  # Python 不肯把几千位的数字变成整数
                raise BadValue("有一个整数太长", at_end=False) from None
            if len(self.text) - self.at > MAX_LINE:
                raise BadValue(f"一条长于 {MAX_LINE >> 20} MB", at_end=False)
            if not cut or not self.more:
                raise BadValue(problem, at_end=cut)
            self.read_on()


class BadValue(ValueError):
    """一个值解析不了；at_end 真时，是因为到了末尾。"""

    def __init__(self, problem: str, at_end: bool):
        super().__init__(problem)
        self.at_end = at_end
