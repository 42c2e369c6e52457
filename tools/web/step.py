"""「一步一步」标签页：每个词元之前停下来，看候选，自己挑一个，或者让它抽。

下面的每一步都返回同样几样：全部编号、开头有多长、写成网页的、一句提示、十个候选按钮。
"""

import gradio as gr

from chat.display import percent
from config import UserError
from tools.web import actions
from tools.web.controls import sampling_controls, sampling_from, status
from tools.web.forms import WORDS

N_CANDIDATES = 10


def step_tab(model) -> None:
    """每个词元之前停下来：看候选，自己挑一个，或者让它抽。"""
    ids, start = gr.State([]), gr.State(0)
    gr.Markdown("它每写一个词元之前都停下来。挑一个候选，看看从那里起会写成什么。")
    with gr.Row():
        text = gr.Textbox(label="开头（或者一句提问）", value="守株待兔", scale=4, max_length=WORDS)
        begin = gr.Button("从这里开始", variant="primary", scale=1)
    written = gr.HTML(label="到现在为止")
    notice = gr.HTML(status("按「从这里开始」。"))
    gr.Markdown(
        "**候选**（百分数是模型给的概率；括号里是抽签的概率：经过重复惩罚、温度、top-k、top-p、min-p）"
    )
    with gr.Row():
        draw = gr.Button("让它抽一个", min_width=120)
        undo = gr.Button("退一步", min_width=120)
    buttons = [gr.Button("", visible=False, elem_classes="candidate") for _ in range(N_CANDIDATES)]
    controls = sampling_controls()
    inputs = [model, ids, start, text, *controls]
    outputs = [ids, start, written, notice, *buttons]
    for event, step in [
        (begin.click, restart), (text.submit, restart), (draw.click, draw_one), (undo.click, back),
        *((button.click, pick(i)) for i, button in enumerate(buttons)),
        *((control.change, refresh) for control in controls),
    ]:  # fmt: skip
        event(guarded(step), inputs, outputs, api_name=False, show_progress="hidden")
    hidden = [gr.Button(visible=False)] * N_CANDIDATES
    model.change(
        lambda: ([], 0, "", status("按「从这里开始」。"), *hidden), None, outputs, api_name=False
    )


def show(path, ids, start, values, words="") -> tuple:
    """画出到现在为止的，和接下来的候选。"""
    speaker, sampling = actions.open_model(path), sampling_from(values)
    ended = is_over(speaker, ids, start)
    if ended or len(ids) >= speaker.config.max_len:
        words = "写完了。" if ended else "上下文写满了。"
        shown = [gr.Button(visible=False)] * N_CANDIDATES
    else:
        found = actions.candidates(speaker, ids, start, sampling, N_CANDIDATES)
        shown = [gr.Button(face(name, p, q), visible=True) for _, name, p, q in found]
    tokens = actions.tokens_html(speaker, ids, start)
    return ids, start, tokens, status(words), *shown


def guarded(step):
    """出了用户能改的错，只换提示，别的不动。"""

    def run(path, ids, start, *rest):
        try:
            return step(path, ids, start, *rest)
        except UserError as error:
            same = [gr.skip()] * N_CANDIDATES
            return ids, start, gr.skip(), status(str(error)), *same

    return run


def restart(path, ids, start, text, *values):
    """从写下的开头重新来。"""
    if not (text or "").strip():
        raise UserError("请先写个开头")
    speaker = actions.open_model(path)
    ids = actions.checked(speaker, speaker.prompt(text))
    return show(path, ids, len(ids), values)


def draw_one(path, ids, start, text, *values):
    """让它自己抽一个。"""
    begun(ids)
    speaker = actions.open_model(path)
    if is_over(speaker, ids, start) or len(ids) >= speaker.config.max_len:
        raise UserError("已经写完了；退一步，或者重新开始")
    token = actions.draw(speaker, ids, start, sampling_from(values))
    return show(path, [*ids, token], start, values, f"抽中「{speaker.tokenizer.label(token)}」")


def pick(number):
    """第 number 个候选按钮按下之后的一步。"""

    def step(path, ids, start, text, *values):
        begun(ids)
        speaker = actions.open_model(path)
        found = actions.candidates(speaker, ids, start, sampling_from(values), N_CANDIDATES)
        token, name, p, _ = found[number]
        return show(path, [*ids, token], start, values, f"你选了「{name}」（{percent(p)}）")

    return step


def refresh(path, ids, start, text, *values):
    """采样的哪一项改了：重画候选；还没有开头就什么也不动。"""
    if not ids:
        return ids, start, *[gr.skip()] * (2 + N_CANDIDATES)
    return show(path, ids, start, values)


def back(path, ids, start, text, *values):
    """退一步，最多退到开头。"""
    begun(ids)
    return show(path, ids[:-1] if len(ids) > start else ids, start, values)


def is_over(speaker, ids: list[int], start: int) -> bool:
    """写出来的最后一个是不是「写完了」的标记。"""
    return len(ids) > start and ids[-1] == speaker.tokenizer.eos_id


def begun(ids: list[int]) -> None:
    """还没有开头，就没有下一步。"""
    if not ids:
        raise UserError("请先按「从这里开始」")


def face(name: str, p: float, q: float) -> str:
    """一个候选按钮上的字：名字、横条、概率。"""
    p_words, q_words = (f"{percent(x):\u2007>6}" for x in (p, q))  # 与数字同宽的空格：对得齐
    q_words = f"抽签 {q_words}" if q else "不参加抽签"
    eighths = round(12 * 8 * p)
    bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]
    return f"{p_words}　{name}　（{q_words}）　{bar}"
