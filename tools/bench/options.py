"""命令行参数：哪种大小，几次，多久，写在哪里。"""

from dataclasses import dataclass, fields
from pathlib import Path

from config import PRESETS, option
from settings.flags import words

SECTIONS = ("train", "time-to-loss", "decode", "data", "memory", "scale", "neighbour")


@dataclass
class Options:
    """命令行参数。"""

    sections: tuple[str, ...] = words("要测的几节")
    preset: str = option(
        "auto", "哪种大小；auto：CPU 上 tiny 与 wide，显卡上 wide 与 deep",
        choices=("auto", *PRESETS),
    )  # fmt: skip
    json: str = option("out/bench.json", "结果写在哪里")
    repeats: int = option(5, "每一方上场几次", "次")
    seconds: float = option(8.0, "训练的每一方每次上场至少多久", "秒")
    race: float = option(300.0, "比谁先到：对照练多久", "秒")

    def problems(self) -> list[str]:
        """不能用的值，一条一句。"""
        found = [
            f"没有 {name} 这一节；可选：{'、'.join(SECTIONS)}"
            for name in self.sections
            if name not in SECTIONS
        ]
        if not all(0 < x < 1e6 for x in (self.repeats, self.seconds, self.race)):
            found.append("repeats、seconds、race 都必须是正数，不超过一百万")
        if Path(self.json).suffix != ".json":
            found.append(f"--json 的文件名要以 .json 结尾，得到的是 {self.json!r}")
        return found

    def command(self, section: str, preset: str) -> str:
        """重测这一节的命令：改过的参数都写上。"""
        changed = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}
        flags = {"preset": preset} if preset else {}
        flags |= {n: v for n, v in changed.items() if n not in ("sections", "preset", "json")}
        typed = [f"--{name} {value}" for name, value in flags.items()]
        return " ".join(["python -m tools.bench", section, *typed])
