"""「比较」标签页：同一个开头，两个模型。"""

import gradio as gr

from config import UserError
from tools.web import actions
from tools.web.controls import sampling_controls, sampling_from, status
from tools.web.forms import WORDS


def compare_tab() -> list:
    """同一个开头，两个模型：微调前后，矮胖与瘦高。"""
    gr.Markdown(
        "同一段文字给两个模型：微调前后，或者矮胖与瘦高，猜得有什么不同？"
        "微调过的把它当作一句提问，只预训练过的接着往下写。"
        "「意外」是各自对自己写的话，不能拿来比好坏。"
    )
    text = gr.Textbox(label="文字", value="守株待兔是什么意思？", max_length=WORDS)
    go = gr.Button("比较", variant="primary")
    notice = gr.HTML(status(""))
    with gr.Row():
        sides, views = [], []
        for name in ("左边的模型", "右边的模型"):
            with gr.Column(min_width=300):
                sides.append(gr.Dropdown([], label=name))
                views.append(gr.HTML())
    controls = sampling_controls()

    for ask in (go.click, text.submit):
        ask(compare, [*sides, text, *controls], [*views, notice], api_name=False)
    return sides


def compare(left, right, text, *values):
    """左边的写完，右边的接着写；一边写一边显示。"""
    shown = ["", ""]
    try:
        for i, path in enumerate((left, right)):
            speaker, sampling = actions.open_model(path), sampling_from(values)
            for shown[i] in actions.answer_html(speaker, text, sampling):
                yield *shown, status("")
    except UserError as error:
        yield *shown, status(str(error))
