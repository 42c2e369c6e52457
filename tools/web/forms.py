"""页面送来的表单：先照着页面上有什么核对，再给 Gradio。

页面自己不会送错；送错的是别的程序。Gradio 遇到想不到的类型、几千层的嵌套、文件与网址，有的会出错，
有的会去下载，所以这里只认得四样：文字、数、选中的一项、空着。
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

WORDS = 20_000  # 一个文字框最多几个字
PATH = 4096  # 选项里是文件的路径，最多这么长
LARGEST = 2**63 - 1
SESSION = re.compile(r"[A-Za-z0-9]{1,40}")
EVENT = re.compile(r"[0-9a-f]{32}")
Check = Callable[[Any], bool]


class BadForm(ValueError):
    """送来的不像这个页面送的；消息是一句话。"""


class Forms:
    """每个按钮要送来什么。

    Args:
        config: 页面的描述（`Blocks.config`）：components 与 dependencies。
    """

    def __init__(self, config: dict):
        components = {part["id"]: part for part in config["components"]}
        self.inputs = {
            dep["id"]: [check_for(components[i]) for i in dep["inputs"]]
            for dep in config["dependencies"]
            if dep["backend_fn"]
        }

    def read(self, path: str, body: bytes) -> dict[str, Any]:
        """核对，只留认得的几项。

        Raises:
            BadForm: 不是 JSON，或者哪一项不对。
        """
        try:
            form = json.loads(body, parse_constant=nothing)
        except (ValueError, RecursionError):
            raise BadForm("正文不是能读的 JSON") from None
        if not isinstance(form, dict):
            raise BadForm("正文要是一个 JSON 对象")
        session, fn = form.get("session_hash"), form.get("fn_index")
        if not isinstance(session, str) or not SESSION.fullmatch(session):
            raise BadForm("session_hash 不对；请刷新这一页")
        if type(fn) is not int or (path.endswith("/join") and fn not in self.inputs):
            raise BadForm("没有这个按钮；请刷新这一页")
        if path.endswith("/join"):
            return {"data": self.read_data(form.get("data"), fn), **self.rest(form, session, fn)}
        event = form.get("event_id")
        if not isinstance(event, str) or not EVENT.fullmatch(event):
            raise BadForm("event_id 不对；请刷新这一页")
        return {"event_id": event, "session_hash": session, "fn_index": fn}

    def read_data(self, data: object, fn: int) -> list:
        """每个控件的值，一个一个看。"""
        checks = self.inputs[fn]
        if not isinstance(data, list) or len(data) != len(checks):
            raise BadForm("送来的控件不是这一页的；请刷新这一页")
        for i, (value, (check, name)) in enumerate(zip(data, checks, strict=True)):
            if not check(value):
                raise BadForm(f"{name or f'第 {i + 1} 个控件'}的值不对；请改一改，或刷新这一页")
        return data

    def rest(self, form: dict, session: str, fn: int) -> dict[str, Any]:
        """别的几项。"""
        trigger = form.get("trigger_id")
        return {
            "session_hash": session, "fn_index": fn, "event_data": None,
            "trigger_id": trigger if type(trigger) is int and abs(trigger) <= LARGEST else None,
        }  # fmt: skip


def nothing(text: str) -> None:
    """JSON 里没有 NaN 与 Infinity。"""
    raise ValueError(text)


def check_for(part: dict) -> tuple[Check, str]:
    """一个控件认得怎样的值，叫什么。"""
    props = part["props"]
    name = str(props.get("label") or "")
    match part["type"]:
        case "state":  # 存在服务器上，页面送来的不看
            return lambda value: value is None, name
        case "textbox":
            return lambda value: value is None or is_words(value, WORDS), name
        case "dropdown":
            return lambda value: value is None or is_words(value, PATH), name
        case "slider":
            low, high = props["minimum"], props["maximum"]
            return lambda value: is_number(value) and low <= value <= high, name
        case "number":
            return lambda value: value is None or (is_number(value) and 0 <= value <= LARGEST), name
        case kind:  # 写这个页面的人加了一种控件，却没有写它认得什么
            raise NotImplementedError(f"tools/web/forms.py 不认得控件 {kind}")


def is_words(value: object, most: int) -> bool:
    """一段文字，没有落单的代理字符（写不成 UTF-8）。"""
    if not isinstance(value, str) or len(value) > most:
        return False
    return not re.search("[\ud800-\udfff]", value)


def is_number(value: object) -> bool:
    """一个有限的数；真假不算。"""
    return type(value) is int or (type(value) is float and math.isfinite(value))
