"""九张图，次序就是九课的次序：图名 -> 画它的函数。"""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from tools.draw.lottery import sampling
from tools.draw.of_hands import hands
from tools.draw.of_model import attention, predictor, residual
from tools.draw.of_tokens import sft, tokenizer
from tools.draw.of_training import loop, pretraining
from tools.draw.svg import SVG, quiet_about_fonts
from tools.draw.trained import Trained

STYLE = SVG | {"font.size": 11, "axes.titlesize": 12, "figure.facecolor": "white"}
PICTURES: dict[str, Callable[[Trained], Figure]] = {
    f.__name__: f
    for f in (predictor, tokenizer, attention, residual, loop, pretraining, sft, sampling, hands)
}


def draw(name: str, trained: Trained, folder: Path) -> Path:
    """画一张，写成 folder/lesson-第几课.svg；同样的数每次写出同样的字节。"""
    path = folder / f"lesson-{list(PICTURES).index(name) + 1}.svg"
    with matplotlib.rc_context(STYLE), quiet_about_fonts():
        figure = PICTURES[name](trained)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return path
