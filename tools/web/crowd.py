"""排队的访客：还在听的才答。

网页的每一次提问是两个请求：先报名（queue/join），再来听（queue/data）。报了名却不来听的、听到一半走了的，
过几秒就不再替他写；不然两百个这样的，后面的人要等上几分钟。
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GRACE = 4.5  # 秒：报名之后这么久还没有来听，就是走了；机器忙时，浏览器来得慢
LEFT = 3.0  # 秒：听过又断开的，这么久没有再来，就是走了
WAITING = 256  # 一共最多几件事在等
EACH = 16  # 一位访客最多几件


@dataclass
class Visitor:
    """一位访客：有几条连接在听，没有动静等到什么时候为止。"""

    streams: int = 0
    until: float = 0.0


class Crowd:
    """谁还在听。

    Args:
        queue: Gradio 的队伍（`Blocks._queue`）；只有这里碰它里面的东西。
        grace: 等多久，秒。
    """

    def __init__(self, queue: Any, grace: float = GRACE):
        self.queue, self.grace = queue, grace
        self.visitors: dict[str, Visitor] = {}
        self.tasks: set[asyncio.Task] = set()

    def knows(self, session: str) -> bool:
        """报过名，还没有走。"""
        return session in self.visitors

    def join(self, session: str) -> str:
        """报名；不能再收了，返回为什么。"""
        if len(self.queue) >= WAITING:
            return "排队的人太多了，请过几秒再试"
        if len(self.queue.pending_event_ids_session.get(session, ())) >= EACH:
            return "前面的还没有答完，请等一等"
        visitor = self.visitors.setdefault(session, Visitor())
        self.touch(session, visitor, self.grace)
        return ""

    @contextlib.contextmanager
    def listening(self, session: str | None) -> Iterator[None]:
        """其间这位访客在听。"""
        if session is None:
            yield
            return
        visitor = self.visitors[session]
        visitor.streams += 1
        try:
            yield
        finally:
            visitor.streams -= 1
            self.touch(session, visitor, min(self.grace, LEFT))

    def touch(self, session: str, visitor: Visitor, wait: float) -> None:
        """有了动静；过 wait 秒再看看还在不在。"""
        visitor.until = time.monotonic() + wait
        asyncio.get_running_loop().call_later(wait, self.look, session, visitor)

    def look(self, session: str, visitor: Visitor) -> None:
        """没有人在听，就不再替他写。"""
        late = time.monotonic() >= visitor.until - 0.01
        if visitor.streams or not late or self.visitors.get(session) is not visitor:
            return
        del self.visitors[session]
        task = asyncio.create_task(self.forget(session))
        self.tasks.add(task)  # 不留着，可能还没做完就被回收了
        task.add_done_callback(self.tasks.discard)

    async def forget(self, session: str) -> None:
        """正在写的停下，还在排队的走开。"""
        await self.queue.clean_events(session_hash=session)
        self.queue.pending_messages_per_session.pop(session, None)
