"""「聊天」标签页：左边说话，右边看最后一次回答的里面。"""

import html
from collections.abc import Iterator

import gradio as gr

from config import UserError
from tools.web import actions
from tools.web.controls import sampling_controls, sampling_from, status
from tools.web.forms import WORDS

SHOWN = 100  # 框里最多留着前面的几句：开着不关的页面，不能越留越多
NOTHING = '<p class="quiet">先说一句话。</p>'


def chat_tab(model) -> None:
    """左边说话，右边看最后一次回答的里面。"""
    turns, seen = gr.State([]), gr.State(None)  # seen：哪个模型，全部编号，最后一句
    shown = gr.State([])  # 框里显示的；存在这里，不听页面送来的
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            box = gr.Chatbot(
                label="对话", render_markdown=False, height=360, buttons=["copy"],
                latex_delimiters=[],  # $$…$$ 是文字，不是公式
            )  # fmt: skip
            notice = gr.HTML(status(""))
            text = gr.Textbox(
                label="你说", lines=1, max_lines=6, max_length=WORDS,
                placeholder="例如：画蛇添足是什么意思？",
            )  # fmt: skip
            with gr.Row():
                send = gr.Button("发送", variant="primary", min_width=80)
                stop = gr.Button("停止", min_width=80)
                clear = gr.Button("重新开始", min_width=80)
            controls = sampling_controls()
        with gr.Column(scale=3, min_width=320):
            gr.Markdown("### 显微镜：最后一次回答的里面")
            lens = gr.HTML(NOTHING)

    outputs = [box, shown, turns, seen, text, notice]
    talking = [
        ask(talk, [model, text, shown, turns, *controls], outputs, api_name=False)
        for ask in (send.click, text.submit)
    ]
    for event in talking:
        event.then(examine, seen, lens, api_name=False)
    stop.click(None, cancels=talking, api_name=False).then(
        stopped, [seen, shown], [box, shown, notice], api_name=False
    )
    for forget in (clear.click, box.clear, model.change):  # 先停下，再清空
        forget(None, cancels=talking, api_name=False).then(
            lambda: ([], [], [], None, gr.skip(), status(""), NOTHING), None, [*outputs, lens],
            api_name=False,
        )  # fmt: skip


def talk(path, message, messages, turns, *values) -> Iterator[tuple]:
    """一边写一边显示。"""
    message, box_after = message or "", ""  # 发出之后清空输入框，只清一次
    messages = messages[-SHOWN:]
    try:
        speaker, sampling = actions.open_model(path), sampling_from(values)
        said = [*messages, bubble("user", message)]
        for remembered, ids, new, why in actions.reply(speaker, turns, message, sampling):
            answer = bubble("assistant", speaker.tokenizer.decode(new))
            seen = path, [*ids, *new], answer
            now = [*said, answer]
            yield now, now, remembered, seen, box_after, status(why)
            box_after = gr.skip()
    except UserError as error:  # 写下的字留在框里，改一改再发
        yield messages, messages, turns, None, message, status(str(error))


def examine(seen) -> str:
    """看最后一次回答的里面；用的是作答的那个模型。"""
    if not seen:
        return gr.skip()
    try:
        path, ids, _ = seen
        return actions.microscope(actions.open_model(path), ids)
    except UserError as error:
        return status(str(error))


def stopped(seen, messages) -> tuple:
    """停下的那一刻，最后一个词元可能已经记下，还没有显示：照记下的补上。"""
    if seen and messages and messages[-1]["role"] == "assistant":
        *_, answer = seen
        messages = [*messages[:-1], answer]
    return messages, messages, status("（已停止）")


def bubble(role: str, words: str) -> dict:
    """对话里的一句。尖括号要转写：Gradio 会把它当作网页，甚至去取里面的图片。"""
    return {"role": role, "content": html.escape(words, quote=False)}
