"""旁边还有别的程序：两个训练一起，聊天旁边在训练，各剩独自时的几成；都在 CPU 上。"""

from concurrent.futures import ThreadPoolExecutor

from engine.device import Device
from tools.bench import contestants
from tools.bench.measuring import Contestant, Row, compete, rates, ratios
from tools.bench.options import Options
from tools.bench.trainer import settings
from tools.bench.training import player


def bench_neighbour(options: Options, preset: str) -> list[Row]:
    """我们的，普通的 Qwen3，借给它我们的设置的：各自独自训练，再两个一起；最后是聊天。"""
    how = "compiled" if Device(settings(preset, device="cpu")).compile else "eager"
    plain, lent = f"qwen3 {how}", f"qwen3 {how}, tuned"
    what = {"ours": "我们", plain: "Qwen3", lent: "借给它我们的设置的 Qwen3"}

    def training(kind: str) -> Contestant:
        return player(contestants.train, kind, preset, options.seconds, device="cpu")

    alone = {kind: training(kind) for kind in what}
    chat = Contestant(contestants.chat, preset, options.seconds, device="cpu")
    together = {f"{kind} × 2": Together(alone[kind], training(kind)) for kind in what}
    beside = Together(chat, alone["ours"])
    found = compete({**alone, **together, "chat": chat, "chat + ours": beside}, options.repeats)

    rows = []
    for kind, who in what.items():
        slower = [min(rates(both)) for both in found[f"{kind} × 2"]]
        goal = "≥ 0.4 倍" if kind == "ours" else ""
        rows += compare(f"{preset}，训练：{who}", "两个一起", rates(found[kind]), slower, goal)
    answering = rates([both[0] for both in found["chat + ours"]])
    what = f"{preset}，不编译的聊天"
    return rows + compare(what, "旁边在训练", rates(found["chat"]), answering, "≥ 0.3 倍")


def compare(who: str, when: str, alone: list[float], shared: list[float], goal: str) -> list[Row]:
    """独自的速度，有邻居时的（两个一起的，是慢的那一个），后者是前者的几倍。"""
    return [
        Row(f"{who}，独自", alone, "词元/秒"),
        Row(f"{who}，{when}", shared, "词元/秒"),
        Row(f"{who}，{when}时是独自的", ratios(shared, alone), "倍", goal),
    ]


class Together:
    """几个参赛者同时干活，算作一方：`work` 返回每一个的 (结果, 秒)。"""

    def __init__(self, *players: Contestant):
        self.players = players

    def launch(self) -> None:
        """启动，不等他们备好。"""
        for one in self.players:
            one.launch()

    def start(self) -> None:
        """一个一个地备好。"""
        for one in self.players:
            one.start()

    def leave(self) -> None:
        """各自结束。"""
        for one in self.players:
            one.leave()

    def work(self) -> list[tuple]:
        """一起开始，都干完才返回。"""
        self.start()
        with ThreadPoolExecutor(len(self.players)) as pool:  # 一个线程等一个进程
            return list(pool.map(lambda one: one.work(), self.players))
