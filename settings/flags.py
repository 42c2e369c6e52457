"""命令行 -> 一个 dataclass：每个程序都用同样的写法，错了说同样的话。

read_options    一次做完：--help、解析、检查；有问题一次说全
word / words    写在前面、不带名字的字段（config.option 是带名字的）
parse_flags     ``--名字 值`` -> {字段名: 值}
check_choices   只能从几个里选的，在不在其中
help_text       --help 印的
run_script      运行 main()；错误印成一句话，退出码
"""

import difflib
import os
import re
import reprlib
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, get_args, get_type_hints

from config import PRESETS, Config, UserError
from settings.defaults import SENTENCES

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
        print(help_text(cls, usage))
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


# ---------- 3. 运行 ----------


def run_script(main: Callable[[], None]) -> None:
    """运行脚本的 main()；用户的错误印成一句话，退出码 2；Ctrl-C 是 130，SIGTERM 是 143。"""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # 启动时就被关掉了（<&-）
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # Windows 默认不是 UTF-8
            getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")
    if hasattr(sys.stdout, "reconfigure"):  # 输出接到文件或管道时，也写一行看得到一行
        sys.stdout.reconfigure(line_buffering=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except UserError as error:
        who = f"第 {rank} 个进程" if (rank := os.environ.get("RANK", "0")) != "0" else ""
        print(f"{who}错误：{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\n已中断", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # 例如接在后面的 head 先走了
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE，与别的命令一样
    except OSError as error:
        where = f" {error.filename} " if error.filename else ""
        print(f"错误：读写{where}失败（{error.strerror}）；请检查路径、权限与空间", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            print(
                "错误：内存不够；请把 --batch_size 减半、--grad_accum 加倍，或换小些的 --preset",
                file=sys.stderr,
            )
            sys.exit(2)
        reason = (str(error).splitlines() or [""])[0][:200]
        if "WORLD_SIZE" in os.environ and re.search("gloo|nccl|connection", reason, re.IGNORECASE):
            print(
                f"错误：与别的进程联系不上，结束（{reason}）；若别的进程先出了错，原因在那里",
                file=sys.stderr,
            )
            sys.exit(1)
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """是不是内存或显存不够；PyTorch 在 CPU 上抛出的只是 RuntimeError。"""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
