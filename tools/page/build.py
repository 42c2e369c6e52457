"""各样东西拼成一张网页。"""

import base64
import hashlib
import html
import math
from pathlib import Path
from typing import Any

from config import SHAPE, Config
from engine.checkpoint import NAMES, imported
from generate import CALM, Sampling, Speaker
from tools.explain.page import inlined, look_and_draw, safe_json
from tools.page.pack import loss_added, pack
from tools.page.tokens import tokens

HERE = Path(__file__).parent
BUILTIN = ["画蛇添足是什么意思？", "画龙点睛出自哪里？"]  # 内置的词典里学得到的
GREETINGS = ["你好", "春天来了，心情怎么样？"]


def page(speaker: Speaker, checkpoint: dict[str, Any], title: str, exact: bool = False) -> str:
    """一张自成一体的网页：模型、分词器、算法、脸。

    Args:
        checkpoint: 读出来的检查点，模型的来历取自它。
        title: 网页的标题。
        exact: 真时矩阵用 fp32，文件四倍大。
    """
    places, weights = pack(speaker.model, exact)
    info = {
        "stage": speaker.stage, "about": about(speaker, checkpoint, exact), "places": places,
        "config": {name: getattr(speaker.config, name) for name in SHAPE},
        "tokens": tokens(speaker.tokenizer), "sampling": sampling(speaker.stage),
        "examples": examples(speaker.stage, speaker.config),
    }  # fmt: skip
    whole = inlined((HERE / "page.html").read_text(encoding="utf-8"), **scripts())
    whole = inlined(whole, POLICY=content_policy(whole))
    shown = html.escape(title).replace("*", "&#42;")  # 标题里的 /*…*/ 也只是文字
    whole = inlined(whole.replace("/*TITLE*/", shown), INFO=safe_json(info))
    return inlined(whole, WEIGHTS=base64.b64encode(weights).decode())  # 最大的最后放


def scripts() -> dict[str, str]:
    """网页里的样式与程序。"""
    names = ("engine", "tokenizer", "sampling", "microscope", "worker", "face", "inside")
    return look_and_draw() | {
        "OWN_STYLE": (HERE / "style.css").read_text(encoding="utf-8"),
        **{name.upper(): (HERE / f"{name}.js").read_text(encoding="utf-8") for name in names},
    }


def content_policy(whole: str) -> str:
    """只许这张网页自己的程序与样式，按指纹认；什么都不许从外面取，也不许送出去。"""
    return "; ".join([
        "default-src 'none'", f"script-src {fingerprints(whole, 'script')}",
        "worker-src blob:", "child-src blob:",  # 旧的浏览器只认后一个
        f"style-src {fingerprints(whole, 'style')}", "img-src data:", "base-uri 'none'",
        "form-action 'none'",
    ])  # fmt: skip


def fingerprints(whole: str, tag: str) -> str:
    """每一段程序或样式的 SHA-256；标着别的 type 的是数据，不会运行。"""
    found = []
    for piece in whole.split(f"<{tag}")[1:]:
        opening, _, rest = piece.partition(">")
        if "type=" not in opening:
            text = rest.partition(f"</{tag}>")[0]
            found.append(hashlib.sha256(text.encode()).digest())
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in found)


# ---------- 写在网页上的 ----------


def about(speaker: Speaker, checkpoint: dict[str, Any], exact: bool) -> str:
    """它是什么，学得怎样，存成 int8 的代价。"""
    config, progress = speaker.config, checkpoint["progress"]
    n = sum(p.numel() for p in speaker.model.parameters())
    words = [
        f"{NAMES[speaker.stage]}的模型，{n / 1e6:.1f} M 参数（宽 {config.dim}，"
        f"{config.n_layers} 层），就在这个文件里：不联网，你说的话哪里也不去。"
    ]
    if not imported(checkpoint):
        words.append(f"练了 {progress['step']} 步，")
        loss = progress["val_loss"]
        words.append(
            f"没学过的文字上每个词元的损失 {loss:.3f}。"
            if math.isfinite(loss)
            else "还没有检验过。"
        )
    if not exact:
        words.append(f"矩阵存成 int8，损失约增加 {loss_added(speaker):.2%}。")
    return "".join(words) + "它很小，内容多半是编的，不要当真。"


def sampling(stage: str) -> dict[str, Any]:
    """聊天程序默认的采样。"""
    chosen = Sampling(**CALM.get(stage, {}))
    return {
        name: getattr(chosen, name)
        for name in ("temp", "top_k", "top_p", "min_p", "penalty", "max")
    }


def examples(stage: str, config: Config) -> list[str]:
    """几句可以点的话。"""
    if stage == "pretrain":
        return [config.prompt, "春天"]
    return ["你好", *(BUILTIN if config.sft_data == "builtin" else GREETINGS[1:])]
