"""「训练」标签页：损失曲线与沿途的样本。"""

import html

import gradio as gr
import pandas

from settings.say import clean
from tools.web import actions


def training_tab():
    """损失曲线与沿途的样本。"""
    run = gr.Dropdown([], label="训练")
    plot = gr.LinePlot(
        x="词元", y="损失", color="哪一种", title="损失（奈特每词元）", height=320,
        color_map={"训练": "#7a8ba6", "检验": "#d55e00"},
    )  # fmt: skip
    samples = gr.Dataframe(
        headers=["步", "检验损失", "样本"], label="沿途的样本", wrap=True, interactive=False,
        column_widths=["70px", "90px", "auto"],
    )  # fmt: skip

    def show(run):
        points, rows, problem = actions.curves(run)
        if problem:
            gr.Warning(html.escape(clean(problem)))
        return pandas.DataFrame(points, columns=["词元", "损失", "哪一种"]), rows

    run.change(show, run, [plot, samples], api_name=False)
    return run
