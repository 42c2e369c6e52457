"""叫停：Ctrl-C、kill 与断线，做完这一步，存好了再走。"""

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from engine.distributed import World
from engine.progress import Progress, out_of
from engine.saver import Saver
from settings.say import say


class Lasting:
    """标准输出或标准错误的替身：收到中断的信号之后，另一头没人读了也不要紧，先把检查点存好。

    例如 ``python pre_train.py 2>&1 | tee log`` 时按 Ctrl-C，tee 会先走。
    """

    def __init__(self, stream):
        self.stream, self.lasting = stream, False

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def _try(self, action, *args):
        try:
            return action(*args)
        except BrokenPipeError:
            if not self.lasting:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text: str):
        """写；没人读就算了。"""
        return self._try(self.stream.write, text)

    def flush(self):
        """送出去；没人读就算了。"""
        return self._try(self.stream.flush)


class Stop:
    """Ctrl-C、kill 与断线：第一次只记下来，做完这一步、存好了再走；第二次立刻退出。

    从走完第一步起才生效：在那之前没有什么要存，照平常那样立刻中断。
    `signal` 是收到的信号，0 表示没有。
    """

    SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

    def __init__(self, world: World):
        self.world, self.signal = world, 0
        self.before: dict = {}  # 信号原来归谁管
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)

    def watch(self) -> None:
        """从现在起留心信号；nohup 等事先要求忽略的，仍然忽略。"""
        if self.before:
            return
        for number in self.SIGNALS:
            self.before[number] = signal.getsignal(number)
            if self.before[number] != signal.SIG_IGN:
                signal.signal(number, self._caught)

    def close(self) -> None:
        """训练结束了，还原；收到过信号的正在离开，替身要一直留到最后。"""
        if not self.signal:
            sys.stdout, sys.stderr = self.streams
            for number, handler in self.before.items():
                if handler is not None:  # 不是 Python 装上的，还原不了
                    signal.signal(number, handler)

    def _caught(self, number: int, frame) -> None:
        self.signal = number
        # torchrun 会把同一个 Ctrl-C 再转发一次，不能当成第二次；它自己等 30 秒，再不走就杀掉。
        again = signal.SIG_IGN if self.world.launched else signal.SIG_DFL
        for known in self.SIGNALS:
            signal.signal(known, again)
        if number == getattr(signal, "SIGHUP", None):  # 终端没了，再往上面写会出错
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Lasting):
                stream.lasting = True
        if self.world.rank == 0:  # 信号随时会来，这时只有 os.write 是安全的
            again = "" if self.world.launched else "；再按一次，立刻退出"
            with suppress(OSError):
                os.write(2, f"\n（做完这一步就保存并退出{again}）\n".encode())

    def leave(self, saver: Saver, progress: Progress, max_steps: int) -> NoReturn:
        """说清停在哪里、怎样接着练，然后退出；退出码是 128 加信号，与系统的约定相同。"""
        folder = saver.folder
        saved = saver.step == progress.step
        where = "已经存进" if saved else f"没有存下，走到第 {saver.step} 步的检查点还在"
        say(
            f"停在第 {progress.step} 步{out_of(max_steps)}；{where} {folder.path}。\n"
            f"接着练：{folder.how_to_resume}"
        )
        self.world.disconnect()
        sys.exit(128 + (self.signal or signal.SIGTERM))
