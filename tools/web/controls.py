"""几个标签页都有的：一句提示、采样的各项。"""

import html
from dataclasses import fields

import gradio as gr

from config import UserError
from generate import CALM, Sampling


def status(words: str) -> str:
    """一句提示，读屏软件会读出来。"""
    return f'<p role="status" class="quiet">{html.escape(words)}</p>'


def sampling_controls() -> list:
    """采样的各项，说明取自 `Sampling`。"""
    ranges = {"temp": (0, 2), "top_k": (0, 200), "top_p": (0.05, 1), "min_p": (0, 0.5),
              "penalty": (1, 2), "max": (1, 1000)}  # fmt: skip
    controls = []
    with gr.Accordion("采样", open=False):
        for f in fields(Sampling):
            if f.name in ranges:
                whole = isinstance(f.default, int)
                value = CALM["sft"].get(f.name, f.default)  # 打开时多半选着微调过的
                controls.append(
                    gr.Slider(
                        *ranges[f.name], value, step=1 if whole else 0.05, label=f.name,
                        info=f.metadata["help"],
                    )
                )  # fmt: skip
            else:
                controls.append(
                    gr.Number(f.default, label=f.name, info=f.metadata["help"], precision=0)
                )
    return controls


def sampling_from(values: tuple) -> Sampling:
    """控件的值 -> Sampling；清空了的数字框用默认值。

    Raises:
        UserError: 值不合理。
    """
    given = {}
    for f, value in zip(fields(Sampling), values, strict=True):
        given[f.name] = f.default if value is None else type(f.default)(value)
    if problems := Sampling(**given).problems():
        raise UserError("；".join(problems))
    return Sampling(**given)
