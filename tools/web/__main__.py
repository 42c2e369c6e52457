"""本地的网页：聊天、显微镜、一步一步地写、比较两个模型、看训练的过程。

    pip install -r requirements-web.txt
    python -m tools.web                       打开 http://127.0.0.1:7860
    python -m tools.web --host 0.0.0.0        同一个网络里的别人也能打开（没有密码，请当心）

这里只是页面的布局；每个按钮背后做的事在 tools/web_actions.py。不需要联网。
"""

import html
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from chat.display import percent
from config import UserError, option
from generate import Sampling
from settings.flags import help_text, parse_flags, run_script
from tools.web import actions

N_CANDIDATES = 10
NOTHING = '<p class="quiet">先说一句话。</p>'
CSS = """
.tokens { font-size: 1.1rem; line-height: 2; overflow-wrap: anywhere; }
.tokens span { padding: .1rem .1rem; border-radius: .2rem; }
.tokens .written { display: inline-block; text-align: center; line-height: 1.2; }
.tokens small { display: block; font-size: .65rem; }
.tokens .given { opacity: .65; }
.bars { width: 100%; border: 0 !important; } .bars caption { text-align: left; opacity: .75; }
.bars tr, .bars th, .bars td { border: 0 !important; padding: .1rem .3rem !important; }
.bars th, .bars .percent { width: 1%; white-space: nowrap; text-align: left; font-weight: 400; }
.bars .bar div { height: .9rem; background: currentColor; border-radius: .15rem; min-width: 1px; }
.answer { font-size: 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.quiet { opacity: .75; }
.candidate { justify-content: flex-start !important; text-align: left; font-weight: 400;
             font-variant-numeric: tabular-nums; white-space: pre; overflow: hidden; }
"""
# 读屏软件要知道这是中文；Gradio 自己写的是 en。
CHINESE = "() => { document.documentElement.lang = 'zh-CN'; }"


@dataclass
class Options:
    """命令行参数。"""

    checkpoint: str | None = option(None, "打开时选中的检查点；默认是找到的第一个，微调过的优先")
    out_dir: str = option("out", "在哪个目录里找检查点与训练的记录")
    host: str = option("127.0.0.1", "在哪个地址上等；0.0.0.0 表示别的机器也能打开")
    port: int = option(7860, "端口")
    open: bool = option(False, "顺便打开浏览器")


def main() -> None:
    """读命令行，打开网页，一直等到 Ctrl-C。"""
    if "--help" in sys.argv or "-h" in sys.argv:
        print(help_text(Options, "用法：python -m tools.web [--参数 值 …]"))
        return
    problems: list[str] = []
    options = Options(**parse_flags(Options, sys.argv[1:], problems))
    if not 1 <= options.port <= 65535:
        problems.append(f"port 要在 1 与 65535 之间，得到的是 {options.port}")
    if problems:
        raise UserError("；".join(problems))
    if options.checkpoint:
        actions.open_model(options.checkpoint)  # 坏的现在就说
    check_port(options.host, options.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # 不联网；要写在导入之前
    try:
        import gradio as gr
    except ImportError:
        raise UserError("还没有安装 gradio；请先运行 pip install -r requirements-web.txt") from None
    demo = build(options)
    demo.queue(default_concurrency_limit=8)  # 几位访客同时用
    fonts = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
    demo.launch(
        server_name=options.host, server_port=options.port, inbrowser=options.open, quiet=True,
        prevent_thread_lock=True, ssr_mode=False, share=False, footer_links=[], css=CSS, js=CHINESE,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
    print(f"网页开在 http://{options.host}:{options.port}，按 Ctrl-C 关掉。", flush=True)
    threading.Event().wait()


def check_port(host: str, port: int) -> None:
    """端口用不了，先说清楚。"""
    try:
        family = socket.getaddrinfo(host, port)[0][0]  # IPv4 或 IPv6
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "地址不对"
        raise UserError(f"{host}:{port} 用不了（{why}）；请用 --port 或 --host 换一个") from None


def build(options: Options):
    """整个页面。"""
    import gradio as gr

    root = Path(options.out_dir)
    with gr.Blocks(
        title="mini-llm：看见它怎样猜", analytics_enabled=False, fill_width=True
    ) as demo:
        gr.Markdown("# mini-llm：看见它怎样猜下一个词元")
        model = gr.Dropdown([], label="模型", info="out/ 里的检查点；重新训练过会自动用新的")
        with gr.Tab("聊天"):
            chat_tab(gr, model)
        with gr.Tab("一步一步"):
            step_tab(gr, model)
        with gr.Tab("比较"):
            refresh_pair = compare_tab(gr)
        with gr.Tab("训练"):
            run = training_tab(gr)

        def found():
            """每次打开页面，重新找一遍检查点与记录。"""
            paths = actions.checkpoints(root)
            if options.checkpoint and options.checkpoint not in paths:
                paths.insert(0, options.checkpoint)
            first = options.checkpoint or (paths[0] if paths else None)
            other = next((p for p in paths if p != first), first)
            records = actions.runs(root)
            return (
                gr.Dropdown(paths, value=first),
                gr.Dropdown(paths, value=other),
                gr.Dropdown(paths, value=first),
                gr.Dropdown(records, value=records[0] if records else None),
            )

        demo.load(found, outputs=[model, *refresh_pair, run], api_name=False)
    return demo


def status(words: str) -> str:
    """一句提示，读屏软件会读出来。"""
    return f'<p role="status" class="quiet">{html.escape(words)}</p>'


def sampling_controls(gr) -> list:
    """采样的各项，说明取自 `Sampling`。"""
    ranges = {"temp": (0, 2), "top_k": (0, 200), "top_p": (0.05, 1), "min_p": (0, 0.5),
              "penalty": (1, 2), "max": (1, 500)}  # fmt: skip
    controls = []
    with gr.Accordion("采样", open=False):
        for f in fields(Sampling):
            if f.name in ranges:
                whole = isinstance(f.default, int)
                value = 0.3 if f.name == "temp" else f.default  # 打开时多半选着微调过的模型
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


# ---------- 1. 聊天与显微镜 ----------


def chat_tab(gr, model) -> None:
    """左边说话，右边看最后一次回答的里面。"""
    turns, seen = gr.State([]), gr.State(None)  # seen：哪个模型，全部编号，最后一句
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            box = gr.Chatbot(label="对话", render_markdown=False, height=360, buttons=["copy"])
            notice = gr.HTML(status(""))
            text = gr.Textbox(
                label="你说", lines=1, max_lines=6, placeholder="例如：画蛇添足是什么意思？"
            )
            with gr.Row():
                send = gr.Button("发送", variant="primary", min_width=80)
                stop = gr.Button("停止", min_width=80)
                clear = gr.Button("重新开始", min_width=80)
            controls = sampling_controls(gr)
        with gr.Column(scale=3, min_width=320):
            gr.Markdown("### 显微镜：最后一次回答的里面")
            lens = gr.HTML(NOTHING)

    def talk(path, message, messages, turns, *values) -> Iterator[tuple]:
        """一边写一边显示。"""
        messages, box_after = messages or [], ""  # 发出之后清空输入框，只清一次
        try:
            speaker, sampling = actions.open_model(path), sampling_from(values)
            said = [*messages, bubble("user", message)]
            for remembered, ids, new, why in actions.reply(speaker, turns, message, sampling):
                answer = bubble("assistant", speaker.tokenizer.decode(new))
                seen = path, [*ids, *new], answer
                yield [*said, answer], remembered, seen, box_after, status(why)
                box_after = gr.skip()
        except UserError as error:  # 写下的字留在框里，改一改再发
            yield messages, turns, None, message, status(str(error))

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
        return messages or [], status("（已停止）")

    outputs = [box, turns, seen, text, notice]
    talking = [
        ask(talk, [model, text, box, turns, *controls], outputs, api_name=False)
        for ask in (send.click, text.submit)
    ]
    for event in talking:
        event.then(examine, seen, lens, api_name=False)
    stop.click(None, cancels=talking, api_name=False).then(
        stopped, [seen, box], [box, notice], api_name=False
    )
    for forget in (clear.click, box.clear, model.change):  # 先停下，再清空
        forget(None, cancels=talking, api_name=False).then(
            lambda: ([], [], None, gr.skip(), status(""), NOTHING), None, [*outputs, lens],
            api_name=False,
        )  # fmt: skip


def bubble(role: str, words: str) -> dict:
    """对话里的一句。尖括号要转写：Gradio 会把它当作网页，甚至去取里面的图片。"""
    return {"role": role, "content": html.escape(words, quote=False)}


# ---------- 2. 一步一步 ----------


def step_tab(gr, model) -> None:
    """每个词元之前停下来：看候选，自己挑一个，或者让它抽。"""
    ids, start = gr.State([]), gr.State(0)
    gr.Markdown("它每写一个词元之前都停下来。挑一个候选，看看从那里起会写成什么。")
    with gr.Row():
        text = gr.Textbox(label="开头（或者一句提问）", value="守株待兔", scale=4)
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
    controls = sampling_controls(gr)

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
        if not text.strip():
            raise UserError("请先写个开头")
        speaker = actions.open_model(path)
        ids = actions.checked(speaker, speaker.prompt(text))
        return show(path, ids, len(ids), values)

    def draw_one(path, ids, start, text, *values):
        begun(ids)
        speaker = actions.open_model(path)
        if is_over(speaker, ids, start) or len(ids) >= speaker.config.max_len:
            raise UserError("已经写完了；退一步，或者重新开始")
        token = actions.draw(speaker, ids, start, sampling_from(values))
        return show(path, [*ids, token], start, values, f"抽中「{speaker.tokenizer.label(token)}」")

    def pick(number):
        def step(path, ids, start, text, *values):
            begun(ids)
            speaker = actions.open_model(path)
            found = actions.candidates(speaker, ids, start, sampling_from(values), N_CANDIDATES)
            token, name, p, _ = found[number]
            return show(path, [*ids, token], start, values, f"你选了「{name}」（{percent(p)}）")

        return step

    def refresh(path, ids, start, text, *values):
        return (
            show(path, ids, start, values)
            if ids
            else (ids, start, *[gr.skip()] * (2 + N_CANDIDATES))
        )

    def back(path, ids, start, text, *values):
        begun(ids)
        return show(path, ids[:-1] if len(ids) > start else ids, start, values)

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


# ---------- 3. 比较 ----------


def compare_tab(gr) -> list:
    """同一个开头，两个模型：微调前后，矮胖与瘦高。"""
    gr.Markdown(
        "同一段文字给两个模型：微调前后，或者矮胖与瘦高，猜得有什么不同？"
        "微调过的把它当作一句提问，只预训练过的接着往下写。"
        "「意外」是各自对自己写的话，不能拿来比好坏。"
    )
    text = gr.Textbox(label="文字", value="守株待兔是什么意思？")
    go = gr.Button("比较", variant="primary")
    notice = gr.HTML(status(""))
    with gr.Row():
        sides, views = [], []
        for name in ("左边的模型", "右边的模型"):
            with gr.Column(min_width=300):
                sides.append(gr.Dropdown([], label=name))
                views.append(gr.HTML())
    controls = sampling_controls(gr)

    def compare(left, right, text, *values):
        shown = ["", ""]
        try:
            for i, path in enumerate((left, right)):
                speaker, sampling = actions.open_model(path), sampling_from(values)
                for shown[i] in actions.answer_html(speaker, text, sampling):
                    yield *shown, status("")
        except UserError as error:
            yield *shown, status(str(error))

    for ask in (go.click, text.submit):
        ask(compare, [*sides, text, *controls], [*views, notice], api_name=False)
    return sides


# ---------- 4. 训练的过程 ----------


def training_tab(gr):
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
        import pandas

        points, rows = actions.curves(run)
        return pandas.DataFrame(points, columns=["词元", "损失", "哪一种"]), rows

    run.change(show, run, [plot, samples], api_name=False)
    return run


if __name__ == "__main__":
    run_script(main)
