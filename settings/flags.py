"""命令行 -> 一个 dataclass：每个程序都用同样的写法，错了说同样的话。

read_options    一次做完：--help、解析、检查；有问题一次说全
word / words    写在前面、不带名字的字段（config.option 是带名字的）
parse_flags     ``--名字 值`` -> {字段名: 值}
check_choices   只能从几个里选的，在不在其中
help_text       --help 印的
"""

import difflib
import reprlib
from dataclasses import field, fields
from typing import Any, get_args, get_type_hints

from config import PRESETS, Config, UserError
from settings.defaults import SENTENCES
from settings.say import say

# ---------- 1. 一次做完 ----------


def word(help: str, missing: str = "", choices: tuple[str, ...] = ()) -> Any:
    """一个写在前面、不带名字的字段，例如一个路径；没有写的是 None。

    Args:
        help: 它是什么，例如「路径」；出了错，用它来称呼。
        missing: 没有写时说的话，其中的 {usage} 换成用法；不给就是可以不写。
        choices: 只能是其中之一。
    """
    return field(default=None, metadata=_word(help, missing, choices))


def words(help: str) -> Any:
    """同 `word`，但收下全部不带名字的，得到 tuple；可以一个也没有。"""
    return field(default=(), metadata=_word(help, "", ()) | {"many": True})


def _word(help: str, missing: str, choices: tuple[str, ...]) -> dict[str, Any]:
    return {"help": help, "unit": "", "choices": choices, "auto": False, "missing": missing}


def is_word(f: Any) -> bool:
    """这个字段是不是写在前面、不带名字的。"""
    return "missing" in f.metadata


def read_options(cls: type, argv: list[str], usage: str, **defaults: Any) -> Any:
    """命令行 -> 一个 cls；--help 时印出说明并结束。

    Args:
        cls: 用 `option`、`word` 写成的 dataclass。它若有 problems()，列出的问题也一并报告。
        argv: 命令行参数，不含脚本名。
        usage: 用法，一行，连同「用法：」。
        defaults: 这个程序里不同于 cls 的默认值。
    Raises:
        UserError: 看得出的问题一次列出。
        SystemExit: --help。
    """
    if "--help" in argv or "-h" in argv:
        say(help_text(cls, usage))
        raise SystemExit(0)
    problems: list[str] = []
    options = cls(**defaults | parse_flags(cls, argv, problems))
    missing = [f for f in fields(cls) if is_word(f) and f.metadata["missing"]]
    missing = [f for f in missing if not (getattr(options, f.name) or "").strip()]
    for f in missing:
        setattr(options, f.name, None)  # 空白的也算没有写
    said = dict.fromkeys(f.metadata["missing"].replace("{usage}", usage) for f in missing)
    problems = [*said, *problems]  # 两个路径都没有写的，同一句话说一次
    check_choices(options, problems)
    if hasattr(options, "problems"):
        problems += options.problems()
    if problems:
        raise UserError("；".join(problems))
    return options


# ---------- 2. 一步一步 ----------


def parse_flags(cls: type, argv: list[str], problems: list[str]) -> dict[str, Any]:
    """把 ``--名字 值`` 解析成 {字段名: 值}；看不懂的记进 problems，最后一并报告。

    Args:
        cls: 带 `option` 字段的 dataclass。
        argv: 命令行参数，不含脚本名。``--no-名字`` 把布尔字段设为假。
        problems: 收集问题，一条一句。
    """
    types = {f.name: field_types(cls)[f.name] for f in fields(cls) if not is_word(f)}
    may_be_auto = {f.name for f in fields(cls) if f.metadata["auto"]}
    given: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        name, has_value, value = flag.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        positive = name.removeprefix("no_")
        if not flag.startswith("--"):
            _take_word(cls, flag, given, problems)
        elif types.get(positive) is bool and not has_value:
            given[positive] = name == positive
        elif name not in types:
            near = difflib.get_close_matches(name, types, n=1, cutoff=0.0)[0]
            problems.append(f"没有参数 {flag.partition('=')[0]}；最接近的是 --{near}")
            if rest and not rest[0].startswith("--"):
                rest.pop(0)  # 它的值
        elif not has_value and (not rest or rest[0].startswith("--")):
            problems.append(f"参数 --{name} 后面要跟一个值")
        else:
            text = value if has_value else rest.pop(0)
            if name in may_be_auto and text == "auto":
                given[name] = text
            elif (value := convert(name, text, types[name], problems)) is not None:
                given[name] = value
    return given


def _take_word(cls: type, text: str, given: dict[str, Any], problems: list[str]) -> None:
    """不带名字的一个：归下一个还空着的 `word`；没有空着的，就是多余的。"""
    for f in filter(is_word, fields(cls)):
        many = f.metadata.get("many", False)
        if f.name in given and not many:
            continue
        if not is_text(text):
            problems.append(f"{f.metadata['help']}不是 UTF-8：{text!r}")
        given[f.name] = (*given.get(f.name, ()), text) if many else text
        return
    problems.append(f"多余的参数 {text!r}：参数要写成 --名字 值")


def check_choices(options: Any, problems: list[str]) -> None:
    """只能从几个里选的字段，值在不在其中；不在的记进 problems。"""
    for f in fields(options):
        choices, value = f.metadata["choices"], getattr(options, f.name)
        if choices and value not in choices and not (is_word(f) and value is None):
            name = f"{f.metadata['help']}" if is_word(f) else f"--{f.name} "
            problems.append(f"{name}只能是 {'、'.join(choices)}，得到的是 {value!r}")


def field_types(cls: type) -> dict[str, type]:
    """每个字段的类型，``int | None`` 记作 int。"""
    hints = get_type_hints(cls)
    return {f.name: (get_args(hints[f.name]) or (hints[f.name],))[0] for f in fields(cls)}


def convert(name: str, text: str, kind: type, problems: list[str]) -> Any:
    """把命令行上的文字变成字段的类型；变不了就记下问题，返回 None。"""
    expected = {int: "整数", float: "数", bool: "true 或 false", str: " UTF-8 编码的文字"}
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if is_text(text):
            return kind(text)
    except (ValueError, KeyError):
        pass
    problems.append(f"--{name} 要的是{expected[kind]}，得到的是 {reprlib.repr(text)}")


def is_text(text: str) -> bool:
    """写得成 UTF-8，也能交给操作系统（其中不能有 NUL）。"""
    try:
        return b"\0" not in text.encode("utf-8")
    except UnicodeEncodeError:  # 别的编码的终端送来的字节，会变成不成对的代理字符
        return False


def help_text(cls: type, usage: str) -> str:
    """列出每个参数的名字、单位、默认值与说明；写在前面的不带名字，由用法来说。"""
    types = field_types(cls)
    where = "参数（写在命令行上，或改 config.py 里的默认值）：" if cls is Config else "参数："
    lines = [usage, "", where]
    for f in fields(cls):
        if is_word(f):
            continue
        default, help = f.default, f.metadata["help"]
        if default is None:  # 各预设里的值
            named = [f"{p} {v[f.name]}" for p, v in PRESETS.items() if f.name in v]
            default = "、".join(named) or "见说明"
        if cls is Config and f.name in SENTENCES:  # 取决于别的设置
            help += f"；{SENTENCES[f.name]}"
        flag = f"  --{f.name}" + (f" / --no-{f.name}" if types[f.name] is bool else "")
        unit = f"，单位：{f.metadata['unit']}" if f.metadata["unit"] else ""
        choices = "，可选：" + " ".join(f.metadata["choices"]) if f.metadata["choices"] else ""
        lines += [flag, f"      {help}（默认：{default}{unit}{choices}）"]
    return "\n".join(lines)
