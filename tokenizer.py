"""分词器：bert-base-chinese 的词表，改造成能「写」的样子。

BERT 的分词器是为「读」设计的：它丢掉空格、认不得中文引号和换行，解码时又在汉字之间塞满空格。
语言模型要一个字一个字地写，所以这里保持原词表的编号 0–21127 一个不动，只做三件事：

1. 在词表后面补上「写」所需的词元：对话的控制词元，以及引号、省略号、破折号、换行、空格等
   （每个词元换来了什么，见 docs/lab-notes.md）；
2. 空格也是词元，于是解码就是把词元首尾相接：去掉 ``##``，什么也不加。
   逐个词元解码与整段解码的结果因此相同，可以边生成边打印；
3. 文本里写着 ``<|im_end|>`` 这样的字样时，它们只是普通文字；控制词元只能由程序按编号放入。

会丢失的信息：大写字母变小写，重音符号被去掉，词表里没有的生僻字与表情符号变成 [UNK]，
一百个字母以上的单词也是。
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from config import N_TOKENS, UserError

VOCAB_FILE = Path(__file__).parent / "tokenizer" / "vocab.txt"
VOCAB_SHA256 = "45bbac6b341c319adc98a532532882e91a9cefc0329aa57bac9ae761c27b291c"
BERT_VOCAB_SIZE = 21128
NOT_ALONE = 0xFFFF  # 比任何编号都大

CONTROL_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>",
]  # fmt: skip
VISIBLE = {"\n": "⏎", " ": "␣", "\u3000": "□", "\t": "⇥"}  # 看不见的字，给人看时换成看得见的
TEXT_TOKENS = ["“", "”", "‘", "’", "—", "–", "…", "`", "\n", " ", "\u3000", "\t"]

# 每一篇文档、每一轮发言都写成同一种样子：<|im_start|> [角色] 正文 <|im_end|>。
# 这是给 transformers 用的：它先拼成一段文字再分词，正文里写着的控制词元字样会被当真；
# 所以在其中夹一个 U+200B，字样不再完整，规范化时它又被去掉，编号与 `Tokenizer.encode` 的相同。
# 思考过程、工具的说明与调用写成文字，写法与 corpus/turns.py 的相同：说明归到开头的 system 一轮。
# generation 标出助手要学的那一段，与 SFT 算损失的相同。
CHAT_TEMPLATE = r"""
{%- macro as_text(value) %}{{ value if value is string else value | tojson }}{% endmacro %}
{%- macro safe(text) %}
{{- text | replace('<|', '<\u200b|') | replace('[PAD]', '[\u200bPAD]')
    | replace('[UNK]', '[\u200bUNK]') }}
{%- endmacro %}
{%- if tools and messages[0]['role'] != 'system' %}
{{- '<|im_start|><|system|>' ~ safe(as_text(tools)) ~ '<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('role 只能是 system、user、assistant 或 tool') }}
{%- elif message['content'] is not string and not message['tool_calls'] %}
{{- raise_exception('content 只能是一段文字') }}
{%- endif %}
{%- set pieces = namespace(all=[message['content']] if message['content'] else []) %}
{%- for name in ['tools', 'tool_calls'] if message[name] %}
{%- set pieces.all = pieces.all + [as_text(message[name])] %}
{%- endfor %}
{%- if tools and loop.first and message['role'] == 'system' %}
{%- set pieces.all = pieces.all + [as_text(tools)] %}
{%- endif %}
{%- set text = pieces.all | join('\n') %}
{%- set thought = message['reasoning_content'] or '' %}
{%- if KEEP_REASONING and message['role'] == 'assistant' and thought | trim %}
{%- set text = '<think>\n' ~ thought | trim ~ '\n</think>\n\n' ~ text %}
{%- endif %}
{{- '<|im_start|><|' ~ message['role'] ~ '|>' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ safe(text) ~ '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- safe(text) ~ '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|><|assistant|>' }}{% endif %}
""".strip()
# 反过来，写出的词元里哪些是回答。没有它，transformers serve 就用 Qwen3 的那一份，开头对不上，
# 连提问也算进回答。
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|><|assistant|>",
    "fields": {
        "content": {"close": "<|im_end|>", "content": "text", "content_args": {"strip": False}},
    },
}


def _build_backend(vocab_file: Path) -> Backend:
    """用 `tokenizers` 库的标准零件拼出分词器；这些零件都能写进 tokenizer.json。"""
    # 自己按行读：`WordPiece.read_file` 会剥掉 U+2028，使两个词元变成空的。
    lines = vocab_file.read_text(encoding="utf-8").split("\n")[:-1]
    vocab = {token: number for number, token in enumerate(lines)}
    # 一个单词至多 100 个字母，与 BERT 的相同：切一个单词的用时，随它的长度成平方地长。
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    # 词表里没有 A–Z：不转小写的话，凡是有大写字母的单词都会变成 [UNK]。
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.Sequence([decoders.Replace(Regex("^##"), ""), decoders.Fuse()])
    # normalized=False：在规范化之前匹配。否则 "\n" 先被规范成空格，再匹配到每个汉字的周围。
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL_TOKENS])
    backend.add_tokens([AddedToken(t, normalized=False) for t in TEXT_TOKENS])
    backend.encode_special_tokens = True  # 文本里的控制词元字样按普通文字切分
    return backend


class Tokenizer:
    """文本与编号（整数列表）之间的双向翻译。

    Args:
        vocab_file: WordPiece 词表，一行一个词元。
    Raises:
        UserError: 词表缺失，或者不是公开的 bert-base-chinese 词表。
    """

    def __init__(self, vocab_file: Path = VOCAB_FILE):
        if not vocab_file.is_file():
            raise UserError(f"找不到词表 {vocab_file}；请运行 git checkout tokenizer")
        found = hashlib.sha256(vocab_file.read_bytes()).hexdigest()
        if found != VOCAB_SHA256:
            raise UserError(
                f"词表 {vocab_file} 不是公开的 bert-base-chinese 词表（SHA-256 为 {found[:12]}…，"
                f"应为 {VOCAB_SHA256[:12]}…）；请运行 git checkout tokenizer 恢复它"
            )
        self.backend = _build_backend(vocab_file)
        self.vocab_size = self.backend.get_vocab_size()
        self.bos_id, self.eos_id, *roles = map(self.backend.token_to_id, CONTROL_TOKENS)
        self.role_ids = dict(zip(["user", "assistant", "system", "tool"], roles, strict=True))
        self.unk_id = self.backend.token_to_id("[UNK]")
        self._start, self._end = (np.array([i], np.uint16) for i in (self.bos_id, self.eos_id))
        self._seen: dict[str, tuple[np.ndarray, str]] = {}
        self._self_test()

    def _self_test(self) -> None:
        """开机自检：编号没有移位，常见文字来回不变。不过关就不要开始训练。"""
        text = "“你好”，他说：2024 年的 3.14…\nhello world——完"
        assert self.bos_id == BERT_VOCAB_SIZE, f"控制词元应从 {BERT_VOCAB_SIZE} 开始"
        assert self.vocab_size == N_TOKENS, f"词元数应为 {N_TOKENS}，实为 {self.vocab_size}"
        assert self.decode(self.encode(text)) == text, "自检失败：文字编码后再解码发生了变化"
        assert self.bos_id not in self.encode("<|im_start|>"), "自检失败：文字变成了控制词元"

    def encode(self, text: str) -> list[int]:
        """文本 -> 编号。不加任何首尾标记；文本里的控制词元字样按普通文字处理。"""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """同 `encode`，一次许多篇，每篇是一个 uint16 数组。"""
        return [ids for ids, _ in self.encode_and_lose(texts)]

    def encode_and_lose(self, texts: list[str]) -> list[tuple[np.ndarray, str]]:
        """同 `encode_batch`，另外给出每篇里写不出的字，连成一串。

        写不出的：变成 [UNK] 的，以及被规范化悄悄去掉的（例如 U+200B）。一个 [UNK] 可以代表许多字，
        所以要数字，而不是数 [UNK]。

        汉字与标点从不与左右相连，一个字就是一个词元，查表即可；夹在中间的字母、数字、假名等，
        才一截一截地交给 `tokenizers`。结果相同，快好几倍。
        """
        if not texts:
            return []
        together = "\n".join(texts)  # 换行从不与左右相连：几篇接起来一次查完，再从换行处分开
        codes = np.frombuffer(together.encode("utf-32-le"), np.uint32)  # 每个字的 Unicode 编号
        ids = self._alone[np.minimum(codes, 0xFFFF)]
        joined = np.flatnonzero(np.diff(ids == NOT_ALONE, prepend=False, append=False))
        lost = [(at, together[at]) for at in np.flatnonzero(ids == self.unk_id).tolist()]
        pieces, done, longer = [], 0, []  # longer：每一截变成的编号比字多几个
        for start, end in joined.reshape(-1, 2).tolist():
            found, missing = self._joined(together[start:end])
            pieces += [ids[done:start], found]
            longer.append(len(found) - (end - start))
            done = end
            if missing:
                lost.append((start, missing))
        ids = np.concatenate([*pieces, ids[done:]])
        ends = np.cumsum(
            [len(text) + 1 for text in texts]
        )  # 每一篇之后的换行之后，在接起来的文字里
        shift = np.concatenate([[0], np.cumsum(longer, dtype=np.int64)])
        bounds = [0, *(ends + shift[np.searchsorted(joined[::2], ends)]).tolist()]
        missing = [""] * len(texts)
        of_text = np.searchsorted(ends, [at for at, _ in lost], side="right").tolist()
        for text, (_, characters) in zip(of_text, lost, strict=True):
            missing[text] += characters
        return [
            (ids[start : end - 1], gone)
            for start, end, gone in zip(bounds, bounds[1:], missing, strict=False)
        ]

    @cached_property
    def _alone(self) -> np.ndarray:
        """每个字（Unicode 编号 0–65535）单独成为哪个词元；会与左右相连的是 NOT_ALONE。"""
        table = np.full(0x10000, NOT_ALONE, np.uint16)
        characters = [chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000]
        a = self.backend.token_to_id("a")
        tried = self.backend.encode_batch_fast([f"a{c}{c}a" for c in characters])
        for character, encoding in zip(characters, tried, strict=True):
            ids = encoding.ids
            if len(ids) == 4 and ids == [a, ids[1], ids[1], a]:  # 夹在中间、连写两遍都不相连
                table[ord(character)] = ids[1]
        return table

    def _joined(self, text: str) -> tuple[np.ndarray, str]:
        """一截会与左右相连的字的编号，以及其中写不出的字；常见的（年份、单位）记住，不必再算。"""
        if (found := self._seen.get(text)) is None:
            encoding = self.backend.encode(text, add_special_tokens=False)
            kept = np.zeros(len(text), bool)
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token != self.unk_id:
                    kept[start:end] = True
            lost = "" if kept.all() else "".join(text[i] for i in np.flatnonzero(~kept))
            found = np.array(encoding.ids, np.uint16), lost
            if len(text) <= 16 and len(self._seen) < 100_000:
                self._seen[text] = found
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """编号 -> 文本，略去控制词元。逐个解码再相接，与整段解码结果相同。"""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def label(self, token: int) -> str:
        """一个词元给人看的名字：空白换成看得见的符号，控制词元原样，没有用到的编号写成 #编号。"""
        name = self.backend.id_to_token(token)
        return f"#{token}" if name is None else VISIBLE.get(name, name)

    def document_ids(self, ids: np.ndarray) -> np.ndarray:
        """给一篇文档的编号 (uint16) 加上首尾标记。"""
        return np.concatenate([self._start, ids, self._end])

    def turn_ids(self, role: str, ids: list[int]) -> list[int]:
        """给一轮发言的编号加上首尾标记与角色。"""
        return [self.bos_id, self.role_ids[role], *ids, self.eos_id]

    def reply_prefix(self) -> list[int]:
        """轮到助手发言时的开头。"""
        return [self.bos_id, self.role_ids["assistant"]]

    def question_ids(self, text: str) -> list[int]:
        """一句提问，加上助手发言的开头：接着往下写的就是回答。"""
        return self.turn_ids("user", self.encode(text)) + self.reply_prefix()

    def never_sampled(self) -> list[int]:
        """生成时绝不该抽到的编号：占位符、BERT 的标记、[UNK]，以及除 <|im_end|> 外的控制词元。"""
        vocab = self.backend.get_vocab()
        bert_marks = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<S>", "<T>"}
        banned = [i for t, i in vocab.items() if t in bert_marks or t.startswith("[unused")]
        return sorted([*banned, self.bos_id, *self.role_ids.values()])

    def fingerprint(self) -> str:
        """词表与补充词元的指纹，写进词元文件和检查点，防止张冠李戴。"""
        added = "\x00".join(CONTROL_TOKENS + TEXT_TOKENS)
        return hashlib.sha256((VOCAB_SHA256 + added).encode()).hexdigest()[:16]

    def to_transformers(
        self, stage: str = "sft", max_len: int | None = None, keep_reasoning: bool = True
    ):
        """包装成 `transformers` 的分词器，可以 `save_pretrained` 后由 `AutoTokenizer` 读回。

        Args:
            stage: 微调过的才带对话模板；只会接着写的套上它，答的也不是回答。
            max_len: 模型最多看多长；更长的，它会提醒。
            keep_reasoning: 真时，消息里的思考过程也写出来；没有学过它的模型，不写。
        """
        from transformers import PreTrainedTokenizerFast

        template = CHAT_TEMPLATE.replace("KEEP_REASONING", str(keep_reasoning).lower())
        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            unk_token="[UNK]",
            pad_token="[PAD]",
            chat_template=template if stage == "sft" else None,
            response_template=RESPONSE_TEMPLATE if stage == "sft" else None,
            model_max_length=max_len,
            clean_up_tokenization_spaces=False,
        )
