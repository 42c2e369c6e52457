"""TODO"""

import difflib
import os
import re
import reprlib
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from config import PRESETS, Config, UserError


def parse_flags(cls: type, argv: list[str], problems: list[str]) -> dict[str, Any]:
    """把 ``--名字 值`` 解析成 {字段名: 值}；看不懂的记进 problems，最后一并报告。

    Args:
        cls: 带 `option` 字段的 dataclass。
        argv: 命令行参数，不含脚本名。``--no-名字`` 把布尔字段设为假。
        problems: 收集问题，一条一句。
    """
    types = field_types(cls)
    may_be_auto = {f.name for f in fields(cls) if f.metadata["auto"]}
    given: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        name, has_value, value = flag.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        positive = name.removeprefix("no_")
        if not flag.startswith("--"):
            problems.append(f"多余的参数 {flag!r}：参数要写成 --名字 值")
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


def check_choices(options: Any, problems: list[str]) -> None:
    """只能从几个里选的字段，值在不在其中；不在的记进 problems。"""
    for f in fields(options):
        choices, value = f.metadata["choices"], getattr(options, f.name)
        if choices and value not in choices:
            problems.append(f"--{f.name} 只能是 {'、'.join(choices)}，得到的是 {value!r}")


def read_options(cls: type, argv: list[str], usage: str, **defaults: Any) -> Any:
    """命令行 -> 一个 cls；--help 时印出说明并结束。

    Args:
        cls: 带 `option` 字段的 dataclass；有 `problems()` 方法的，再问它哪些值不能用。
        argv: 命令行参数，不含程序名。
        usage: 说明的第一行。
        defaults: 换掉 cls 里的默认值。
    Raises:
        UserError: 有看不懂的参数或不能用的值，一次列出。
    """
    if {"--help", "-h"} & {*argv}:
        print(help_text(cls, usage))
        raise SystemExit(0)
    problems: list[str] = []
    options = cls(**defaults | parse_flags(cls, argv, problems))
    check_choices(options, problems)
    if hasattr(options, "problems"):
        problems += options.problems()
    if problems:
        raise UserError("；".join(problems))
    return options


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
    """列出每个参数的名字、单位、默认值与说明。"""
    types = field_types(cls)
    where = "参数（写在命令行上，或改 config.py 里的默认值）：" if cls is Config else "参数："
    lines = [usage, "", where]
    for f in fields(cls):
        default = f.default
        if default is None:  # 各预设里的值
            named = [f"{p} {v[f.name]}" for p, v in PRESETS.items() if f.name in v]
            default = "、".join(named) or "见说明"
        flag = f"  --{f.name}" + (f" / --no-{f.name}" if types[f.name] is bool else "")
        unit = f"，单位：{f.metadata['unit']}" if f.metadata["unit"] else ""
        choices = "，可选：" + " ".join(f.metadata["choices"]) if f.metadata["choices"] else ""
        lines += [flag, f"      {f.metadata['help']}（默认：{default}{unit}{choices}）"]
    return "\n".join(lines)


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
