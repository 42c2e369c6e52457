"""整个页面：选模型，下面四个标签页。"""

from pathlib import Path

import gradio as gr

from tools.web import actions
from tools.web.chat import chat_tab
from tools.web.compare import compare_tab
from tools.web.step import step_tab
from tools.web.training import training_tab

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


class Page(gr.Blocks):
    """整个页面；控件的值不对时是访客的事，不印回溯。"""

    async def preprocess_data(self, *args, **more):
        """页面送来的值，交给控件核对：例如选的不是列出的检查点。"""
        try:
            return await super().preprocess_data(*args, **more)
        except gr.Error:
            raise gr.Error("选中的不在列出的里面；请刷新这一页", print_exception=False) from None


def build(root: Path, checkpoint: str | None):
    """整个页面。

    Args:
        root: 在哪个目录里找检查点与训练的记录。
        checkpoint: 打开时选中的检查点；没有就选找到的第一个。
    """
    title = "mini-llm：看见它怎样猜"
    with Page(title=title, analytics_enabled=False, fill_width=True) as demo:
        gr.Markdown("# mini-llm：看见它怎样猜下一个词元")
        model = gr.Dropdown([], label="模型", info="out/ 里的检查点；重新训练过会自动用新的")
        with gr.Tab("聊天"):
            chat_tab(model)
        with gr.Tab("一步一步"):
            step_tab(model)
        with gr.Tab("比较"):
            refresh_pair = compare_tab()
        with gr.Tab("训练"):
            run = training_tab()

        def found():
            """每次打开页面，重新找一遍检查点与记录。"""
            paths = actions.checkpoints(root)
            if checkpoint and checkpoint not in paths:
                paths.insert(0, checkpoint)
            first = checkpoint or (paths[0] if paths else None)
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
