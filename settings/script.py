"""一个程序从头到尾，出了什么事都只说一句：还在导入，正在运行，已经走完。

run_script        运行 main()；错误印成一句话，退出码
outcome           一个异常 -> 说什么，退出码
is_out_of_memory  是不是内存不够

每个程序最先导入它：torch 要导入一两秒，这时按了 Ctrl-C，内存的上限太小，或者包没有装，也只说一句。
所以它自己先不导入别的，只在末尾定下线程怎样等（settings/threads.py）；
由 pytest 等别的程序导入的，此外什么也不改。
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# 上限比这还低，底层的库会直接中止，或者卡住，来不及说话。量到的：两个核上，地址空间不到 0.7 GB
# 导入不了 torch，不到 1.1 GB 分词时会中止；最多打开十二个文件，训练会卡住。
LEAST_MEMORY, LEAST_FILES = 13 * 10**8, 64


# ---------- 1. 运行 ----------


def run_script(main: Callable[[], None]) -> None:
    """运行脚本的 main()；用户的错误印成一句话，退出码 2；Ctrl-C 是 130，SIGTERM 是 143。"""
    _ready_streams()
    try:
        if signal.getsignal(signal.SIGINT) is _interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if _in_main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        main()
    except BrokenPipeError:  # 例如接在后面的 head 先走了
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE，与别的命令一样
    except (Exception, KeyboardInterrupt) as error:
        found = outcome(error)
        if found is None:
            raise
        sentence, code = found
        _tell(sentence)
        sys.exit(code)
    finally:
        _quiet_ctrl_c()  # 已经走完：Python 收拾的时候再按，也不要回溯


def outcome(error: BaseException) -> tuple[str, int] | None:
    """一个异常 -> (说什么, 退出码)；没有想到的是 None，那是程序自己的错，照常印出回溯。"""
    from config import UserError

    if isinstance(error, UserError):
        who = f"第 {rank} 个进程" if (rank := os.environ.get("RANK", "0")) != "0" else ""
        return f"{who}错误：{error}", 2
    if _was_interrupted(error):
        return "\n已中断", 130
    if (reason := _too_little(error)) is not None:
        return f"错误：{reason}", 2
    if isinstance(error, OSError):
        where = f" {error.filename} " if error.filename else ""
        return f"错误：读写{where}失败（{error.strerror}）；请检查路径、权限与空间", 2
    if isinstance(error, RuntimeError) and "WORLD_SIZE" in os.environ:
        reason = (str(error).splitlines() or [""])[0][:200]
        if any(word in reason.lower() for word in ("gloo", "nccl", "connection")):
            lost = f"错误：与别的进程联系不上，结束（{reason}）；若别的进程先出了错，原因在那里"
            return lost, 1
    return None


def _tell(sentence: str) -> None:
    from settings.say import indented, say

    first = sentence.startswith("\n")  # 「^C」的后面另起一行
    say("\n" * first + indented(sentence.lstrip("\n")), file=sys.stderr)


def _ready_streams() -> None:
    """标准输入输出：都在，都是 UTF-8，写一行就看得到一行。"""
    from contextlib import suppress

    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # 启动时就被关掉了（<&-）
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # Windows 默认不是 UTF-8
            with suppress(ValueError):  # 已经从它读过（例如调试器），就换不了了
                getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")
    if hasattr(sys.stdout, "reconfigure"):  # 输出接到文件或管道时，也写一行看得到一行
        sys.stdout.reconfigure(line_buffering=True)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


# ---------- 2. 认出原因 ----------


def is_out_of_memory(error: BaseException) -> bool:
    """是不是内存或显存不够；PyTorch 在 CPU 上抛出的只是 RuntimeError。"""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED", "bad_alloc", "bad allocation",
             "failed to map segment", "can't start new thread")  # fmt: skip
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _too_little(error: BaseException) -> str | None:
    """缺了什么：打开的文件数到了上限，内存不够，包没有装；都不是就是 None。"""
    import errno

    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or (
        "Too many open files" in str(error)
    ):
        _, limit = _limits()
        return f"同时打开的文件到了上限（ulimit -n 是 {limit}）；请先运行 ulimit -n 1024"
    if isinstance(error, MemoryError | RuntimeError | OSError | ImportError | SystemError) and (
        is_out_of_memory(error)
    ):
        limit, _ = _limits()
        now = f"（ulimit -v 把它限制在 {limit / 1e9:.1f} GB）" if limit else ""
        return f"内存不够{now}；请关掉别的程序、放宽限制，或换小些的模型、短些的文字"
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        if not any(os.path.exists(os.path.join(ROOT, name + end)) for end in ("", ".py")):
            return f"还没有安装 {name}；请先运行 pip install -r {_requirements()}"
    return None


def _requirements() -> str:
    """这个程序要的包写在哪里：examples 里的，各有一份。"""
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "requirements.txt")
    if os.path.exists(beside) and beside.startswith(ROOT + os.sep):
        return os.path.relpath(beside, ROOT)
    return "requirements.txt"


def _was_interrupted(error: BaseException) -> bool:
    """是不是 Ctrl-C：导入 C 写的模块时，它会被换成 ImportError。"""
    if isinstance(error, ImportError | SystemError):
        return any(isinstance(cause, KeyboardInterrupt) for cause in _causes(error))
    return isinstance(error, KeyboardInterrupt)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _limits() -> tuple[int, int]:
    """(地址空间的上限，字节；同时打开的文件数的上限)；没有限制、不知道的是 0。"""
    try:
        import resource
    except ImportError:  # Windows
        return 0, 0
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_NOFILE)
    found = (resource.getrlimit(kind)[0] for kind in kinds)
    return tuple(0 if limit == resource.RLIM_INFINITY else limit for limit in found)


# ---------- 3. 还没有开始，与已经走完 ----------


def _interrupted(number: int, frame) -> None:
    """run_script 还没有接手，或者已经走完：没有什么要存的，立刻走。"""
    _leave("\n已中断\n" if os.environ.get("RANK", "0") == "0" else "", 128 + number)


def _terminated(number: int, frame) -> None:
    _leave("", 128 + number)


def _leave(sentence: str, code: int) -> None:
    """说一句就走，不经过 Python 的收拾：这时连标准库都未必导入得了。"""
    from contextlib import suppress

    with suppress(Exception):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, sentence.encode())
    os._exit(code)


def _quiet_ctrl_c() -> None:
    if typed and _in_main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # fmt: skip
        signal.signal(signal.SIGINT, _interrupted)


def _uncaught(kind, error, trace) -> None:
    """没有人接的异常：想得到的说一句，想不到的照常印出回溯，但其中的字不能控制终端。"""
    from settings.say import clean, indented, say

    if (found := outcome(error)) is not None:
        sentence, code = found
        _leave(clean(indented(sentence)) + "\n", code)
    import traceback

    say("".join(traceback.format_exception(kind, error, trace)), end="", file=sys.stderr)


def _show_no_controls() -> None:
    """库的警告与日志，也不能控制终端。"""
    import logging
    import warnings

    from settings.say import clean

    class CleanRecord(logging.LogRecord):
        def getMessage(self) -> str:
            return clean(super().getMessage())

    logging.setLogRecordFactory(CleanRecord)
    before = warnings.formatwarning
    warnings.formatwarning = lambda *args, **named: clean(before(*args, **named))


def _check_limits() -> None:
    """上限太低，就不开始。"""
    memory, files = _limits()
    if 0 < files < LEAST_FILES:
        _leave(f"错误：最多只能同时打开 {files} 个文件，至少要 {LEAST_FILES} 个；"
               f"请先运行 ulimit -n 1024\n", 2)  # fmt: skip
    if 0 < memory < LEAST_MEMORY:
        _leave(f"错误：ulimit -v 把内存限制在 {memory / 1e9:.2g} GB，至少要 "
               f"{LEAST_MEMORY / 1e9:.1f} GB；请先运行 ulimit -v unlimited\n", 2)  # fmt: skip


def _typed() -> bool:
    """导入我的，是不是用户运行的那个程序自己，而不是测试、调试器或别的程序。"""
    importing = {"_frozen_importlib", "_frozen_importlib_external",
                 "importlib._bootstrap", "importlib._bootstrap_external"}  # fmt: skip
    ours = {__name__, "__main__", "runpy", *importing}
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in ours:
        frame = frame.f_back
    return frame is None


typed = _typed()
if typed:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup 等要忽略的，仍忽略
        signal.signal(signal.SIGINT, _interrupted)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)
    sys.excepthook = _uncaught
    _check_limits()
    _show_no_controls()

import settings.threads  # noqa: E402, F401  也要在导入 torch 之前
