"""测速的结果：一个 .json，旁边同名的 .md；每测完一段就写一次。"""

import json
from pathlib import Path

from config import UserError
from tools.bench.measuring import to_markdown


def read_results(path: Path) -> dict:
    """以前测的各节；现在就确认写得进去，不必等测完才知道。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as f:
        f.seek(0)
        text = f.read()
    try:
        done = json.loads(text or "{}")
        to_markdown(done)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} 不是以前的测速结果；请换一个 --json，或删掉它") from None
    return done


def write_results(path: Path, done: dict) -> None:
    """写盘。"""
    path.write_text(json.dumps(done, ensure_ascii=False, indent=1), encoding="utf-8")
    path.with_suffix(".md").write_text(to_markdown(done), encoding="utf-8")
