"""认得的字段名：各个项目、各个数据集的写法。"""

# ---------- 文档 ----------

TEXT = ("text", "content", "正文", "内容")
PARTS = ("sections", "paragraphs", "段落")  # 一篇分成的几节
TITLE = ("title", "标题")
HEADING = (*TITLE, "heading")
DETAIL = "desc"  # 题目的补充（brightmart 的几个语料），接在题目与正文之间

# ---------- 对话 ----------

TURNS = ("conversations", "messages", "conversation", "dialogue", "dialog")
QUESTION = ("instruction", "prompt", "question", "query", "problem", "ask", "问题")
CONTEXT = ("input", "context")  # 接在提问后面
ANSWER = ("output", "response", "answer", "completion", "target", "回答", "答案")
SYSTEM = ("system", "system_prompt")
REASONING = ("reasoning_content", "reasoning", "thinking")
ROLE, WORDS = ("role", "from"), ("content", "value", "text", "parts")
CALLS = ("tools", "functions", "tool_calls", "function_call")  # 工具的说明与调用

ROLES = {
    "system": "system", "developer": "system", "系统": "system",
    "user": "user", "human": "user", "client": "user", "patient": "user", "prompter": "user",
    "用户": "user", "问": "user", "客户": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant", "ai": "assistant", "counselor": "assistant", "doctor": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "助手": "assistant", "答": "assistant", "客服": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
    "ipython": "tool",
}  # fmt: skip

# 一个对象包着全部数据时，那一项常用的名字。
WRAPPERS = ("data", "rows", "items", "examples", "instances", "records", "documents", "train",
            "results", "list")  # fmt: skip

KNOWN = {*TEXT, *PARTS, *TITLE, DETAIL, *TURNS, *QUESTION, *CONTEXT, *ANSWER, *REASONING,
         *SYSTEM, "history", "tools", "chosen", "rejected"}  # fmt: skip
# 有了这些中的一个，这个对象自己就是一条，不是包着许多条的。
OF_A_ROW = {*TEXT, *TURNS, *QUESTION, *ANSWER, "chosen", "rejected", "role"}
