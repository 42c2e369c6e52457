"""LoRA：学的正是 sft_train.py 会学的，只有窄路变了，合并、带回来之后还是同一个模型。"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import run
from test_export import SMALL, random_model, save

from config import N_TOKENS, Config, UserError
from corpus.conversations import read_conversations
from corpus.idioms import GREETINGS
from corpus.log import ReadLog
from dataset import IGNORE
from engine.checkpoint import load
from examples import common
from examples.common import answer_loss, load_folder, save_folder, sft_batches, write_answers
from examples.lora import train as lora
from loss import cross_entropy
from tools.huggingface.export import export
from tools.huggingface.import_hf import Options, import_folder

peft = pytest.importorskip("peft", reason="没有安装 examples/lora/requirements.txt")
pytestmark = pytest.mark.doors

SAMPLE = Path(lora.__file__).with_name("teahouse.jsonl")
PROGRAM = "examples.lora.train"


@pytest.fixture(scope="module")
def made(tmp_path_factory, builtin_config, builtin_sft):
    """一个小模型，导出、加上窄路练几步、带回来，全走命令行。"""
    root = tmp_path_factory.mktemp("lora")
    export(save(root / "sft.pt", random_model()), root / "hf")
    few = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)[:28]  # 四件事
    (root / "few.jsonl").write_text("".join(few), encoding="utf-8")
    options = ["--data", "few.jsonl", "--epochs", "5", "--lr", "0.02", "--eval_tokens", "512",
               "--data_dir", builtin_config.data_dir]  # fmt: skip
    said, _ = run(root, PROGRAM, "hf", "lora/hf", *options)
    import_folder(root / "lora" / "hf", root / "lora" / "sft.pt", Options())
    return SimpleNamespace(root=root, said=said, base=root / "hf", merged=root / "lora" / "hf")


def own(tmp_path, seq_len=128) -> dict:
    """例子自带的问答，像例子那样读。"""
    config = Config(val_fraction=0.2, seq_len=seq_len, data_dir=str(tmp_path))
    return sft_batches(str(SAMPLE), config, 0)


# ---------- 1. 数据：与 sft_train.py 同样的编号，同样的目标 ----------


def test_ids_and_labels_are_those_of_sft(made, tmp_path):
    """transformers 照对话模板拼出的编号与「助手的话」，与 SFT 的一批里逐段相同。"""
    _, tokenizer, _ = load_folder(made.base)
    expected = []
    for record in read_conversations(SAMPLE, ReadLog(str(SAMPLE))):
        turns = record.content
        found = tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns],
            return_dict=True, return_assistant_tokens_mask=True,
        )  # fmt: skip
        ids, mask = found["input_ids"], found["assistant_masks"]
        targets = [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]
        expected.append((ids[:-1], targets[1:]))
    found = []
    for batches in own(tmp_path).values():
        batch = batches.get(range(batches.n_rows))
        for ids, targets, segments in zip(batch.ids, batch.targets, batch.segments, strict=True):
            for segment in range(int(segments.max()) + 1):
                here = segments == segment
                found.append((ids[here].tolist(), targets[here].tolist()))
    assert len(found) == 140
    assert sorted(found) == sorted(expected)


def test_packed_rows_cost_the_same_as_in_our_model(made, tmp_path):
    """几段拼成一行，transformers 认得出界线：损失与我们的模型相同；看得见别段就不会相同。"""
    theirs, *_ = load_folder(made.base)
    batch = own(tmp_path)["train"].get([0, 1])
    assert int(batch.segments.max()) >= 3
    logits = random_model()(batch.ids, batch.positions, batch.segments)[..., :N_TOKENS]
    ours = cross_entropy(logits, batch.targets)  # 补齐词表用的行没有带出去，这里也不算
    torch.testing.assert_close(answer_loss(theirs, batch), ours, rtol=1e-5, atol=1e-3)
    no_borders = batch._replace(positions=torch.arange(128).expand(2, -1))
    assert (answer_loss(theirs, no_borders) - ours).abs() > 0.1


def test_held_out_questions_are_not_trained_on(tmp_path):
    """留出的问法，一个也不在训练的那一边；两边都与词元文件的划分相同。"""
    (learned, _), (held_out, answers) = lora.questions_and_answers(str(SAMPLE), 0.2, 256)
    batches = own(tmp_path)
    assert len(learned) == len(batches["train"].lengths)
    assert len(held_out) == len(answers) == len(batches["val"].lengths) == 26
    texts = [{messages[0]["content"] for messages in side} for side in (learned, held_out)]
    assert texts[0].isdisjoint(texts[1])


def test_the_sample_contradicts_nothing_it_already_knows():
    """茶馆的问法不与寒暄相同：陪读的词典里有寒暄，同一句话不能有两个答案。"""
    (learned, _), (held_out, _) = lora.questions_and_answers(str(SAMPLE), 0.2, 256)
    asked = {messages[0]["content"] for messages in learned + held_out}
    assert asked.isdisjoint(question for question, _ in GREETINGS)


def test_the_last_answer_of_a_long_conversation_is_asked(tmp_path):
    """多轮的：前面各轮原样给它，问的是最后一答；末尾没人答的提问不算。"""
    turns = [
        ("user", "一"),
        ("assistant", "甲"),
        ("user", "二"),
        ("assistant", "乙"),
        ("user", "三"),
    ]
    row = {"conversations": [{"role": role, "content": text} for role, text in turns]}
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    ((messages,), answers), _ = lora.questions_and_answers(str(path), 0.5, 256)
    assert [m["content"] for m in messages] == ["一", "甲", "二"]
    assert answers == ["乙"]


def qa_file(path: Path, answers: list[str]) -> str:
    """写一份问答，每个回答一问。"""
    rows = [{"instruction": f"第{i}问", "output": text} for i, text in enumerate(answers)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_the_expected_answer_is_one_the_model_can_write(tmp_path):
    """分词器没有大写与生僻字：要它一字不差，比的是编码再解码的。"""
    path = qa_file(tmp_path / "my.jsonl", ["Wi-Fi 叫 Teahouse。"])
    (_, answers), _ = lora.questions_and_answers(path, 0.0, 256)
    assert answers == ["wi-fi 叫 teahouse。"]


def test_a_few_hundred_that_fit_are_asked(tmp_path):
    """至多问两百段，首尾都有；一行放不下的不问。"""
    path = qa_file(tmp_path / "my.jsonl", [f"答{i}" for i in range(900)])
    (asked, answers), _ = lora.questions_and_answers(path, 0.0, 256)
    assert len(asked) == len(answers) == 200
    assert answers[0] == "答0" and int(answers[-1][1:]) > 700
    path = qa_file(tmp_path / "long.jsonl", ["长" * 52, "长" * 53])  # 连同提问与首尾，六十一个
    (_, answers), _ = lora.questions_and_answers(path, 0.0, 60)
    assert answers == ["长" * 52]


# ---------- 2. 窄路 ----------


def test_only_the_narrow_paths_learn(made):
    """窄路的参数个数是各矩阵 r·(输入 + 输出) 之和；此外什么也不收梯度。"""
    model, *_ = load_folder(made.base)
    shapes = [m.weight.shape for n, m in model.named_modules()
              if isinstance(m, torch.nn.Linear) and n != "lm_head"]  # fmt: skip
    assert len(shapes) == 7 * SMALL.n_layers
    adapted = lora.add_lora(model, rank=3)
    trained, _ = adapted.get_nb_trainable_parameters()
    assert trained == sum(3 * (rows + columns) for rows, columns in shapes)
    learns = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in learns)


def test_a_new_path_changes_nothing_yet(made, tmp_path):
    """B 从零开始：刚加上时，打分一个比特也没变。"""
    model, *_ = load_folder(made.base)
    ids = own(tmp_path)["train"].get([0]).ids
    before = model(ids).logits
    assert torch.equal(lora.add_lora(model, rank=4)(ids).logits, before)


def test_training_lowers_the_loss_and_replay_is_used(made, tmp_path):
    """练了损失就降；陪读的那一份也真的在学：换成别的，结果就不同。"""
    batches = own(tmp_path)
    options = lora.Options(epochs=3, lr=0.02)
    losses = []
    for old in (None, batches["val"]):
        model, *_ = load_folder(made.base)
        torch.manual_seed(0)
        adapted = lora.add_lora(model, rank=4)
        before = answer_loss(adapted, batches["train"].get([0])).item()
        lora.train(adapted, batches["train"], old, options)
        losses.append(answer_loss(adapted, batches["train"].get([0])).item())
        assert losses[-1] < before
    assert losses[0] != losses[1]


def test_a_diverged_step_is_not_taken(made, tmp_path):
    """损失不是有限的数：这一步不走，叫人把学习率调小。"""
    model, *_ = load_folder(made.base)
    adapted = lora.add_lora(model, rank=2)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = [p.clone() for p in adapted.parameters() if p.requires_grad]
    with pytest.raises(UserError, match=r"第 1 步的损失是 nan.*--lr 0\.01 调小"):
        lora.train(adapted, own(tmp_path)["train"], None, lora.Options())
    assert all(map(torch.equal, before, (p for p in adapted.parameters() if p.requires_grad)))


# ---------- 3. 合并，带回来 ----------


def test_merged_equals_base_plus_adapter(made, tmp_path):
    """合并之后的打分，与「原来的 + 窄路」只差舍入；与原来的确实不同。"""
    ids = own(tmp_path)["train"].get([0]).ids
    base, merged = load_folder(made.base)[0].eval(), load_folder(made.merged)[0].eval()
    with torch.no_grad():
        before, after = base(ids).logits, merged(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, made.merged / "adapter")
        torch.testing.assert_close(adapted(ids).logits, after, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(merged.model.embed_tokens.weight, base.get_input_embeddings().weight,
                               rtol=0, atol=0)  # fmt: skip


def test_back_home_it_is_the_same_model(made, tokenizer, tmp_path):
    """带回来的检查点，我们的模型打分与 transformers 的相同，聊天程序认得。"""
    ids = own(tmp_path)["train"].get([0]).ids
    ours, _, checkpoint = load(made.root / "lora" / "sft.pt", tokenizer)
    assert checkpoint["stage"] == "sft"
    with torch.no_grad():
        theirs = load_folder(made.merged)[0].eval()(ids).logits
        found = ours.eval()(ids)[..., : theirs.size(-1)]
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)
    run(made.root, "sft_chat.py", "--checkpoint", "lora/sft.pt", "--prompt", "你好", "--max", "5")


def test_conversations_too_long_are_counted(tmp_path, capsys):
    """没有用的、没有用全的，各有多少，练的与留出的合起来。"""
    lora.tell_what_is_left_out(
        {"train": SimpleNamespace(skipped=2, cut=0), "val": SimpleNamespace(skipped=1, cut=4)}, 256
    )
    said = capsys.readouterr().out
    assert "（3 段对话在 256 个词元之内没有助手的话" in said
    assert "（4 段对话超过 256 个词元" in said


def test_it_tells_what_it_did(made):
    """练之前与之后都量；参数个数、留出的问法、词典的损失都写着。"""
    learned, held_out = lora.questions_and_answers(str(made.root / "few.jsonl"), 0.2, 256)
    assert len(learned[0]) + len(held_out[0]) == 28 and held_out[0]
    assert made.said.count(f"练的 {len(learned[0])} 个问法") == 2
    assert made.said.count(f"留出的 {len(held_out[0])} 个，") == 2
    assert made.said.count("词典：留出的成语") == 2
    assert "python -m tools.import_hf lora/hf lora/sft.pt" in made.said


def test_answers_do_not_depend_on_the_company(made):
    """成批地问与单独问，最可能的回答一样：补在左边的空格子看不见。"""
    model, tokenizer, _ = load_folder(made.base)
    prompts = [[{"role": "user", "content": text}] for text in ("你好", "画蛇添足是什么意思？")]
    together = list(write_answers(model, tokenizer, prompts, max_tokens=12))
    alone = [next(write_answers(model, tokenizer, [p], max_tokens=12)) for p in prompts]
    assert together == alone


# ---------- 4. 读与写 ----------


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """导出的文件夹的一份副本，可以改。"""
    return Path(shutil.copytree(made.base, tmp_path / "hf"))


def change(path: Path, edit) -> None:
    """改一个 JSON 或 safetensors 文件。"""
    if path.suffix == ".json":
        raw = json.loads(path.read_text(encoding="utf-8"))
        edit(raw)
        path.write_text(json.dumps(raw), encoding="utf-8")
    else:
        weights = load_file(path)
        edit(weights)
        save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("model.safetensors", lambda w: w.pop("model.norm.weight"), r"少了 model\.norm\.weight"),
        ("model.safetensors", lambda w: w["model.norm.weight"].fill_(torch.nan), "NaN"),
        ("config.json", lambda c: c.update(attention_bias=True), "attention_bias 是 True"),
        ("config.json", lambda c: c["mini_llm"]["config"].update(val_fraction=7.0), "val_fraction"),
    ],
)
def test_what_import_refuses_is_refused_here_too(folder, name, edit, says):
    """少了的参数不会悄悄变成随机的；坏了的文件，一句话。"""
    if edit:
        change(folder / name, edit)
    else:
        (folder / name).write_text('{"tokenizer_class": "PreT')
    with pytest.raises(UserError, match=says):
        load_folder(folder)


def test_what_was_held_out_is_still_held_out(folder, tmp_path, monkeypatch, capsys):
    """训练时留出多少，取自 config.json；微调用的不是词典，说一声。"""
    noted = {"val_fraction": 0.4, "sft_data": "mine.jsonl"}
    change(folder / "config.json", lambda c: c["mini_llm"]["config"].update(noted))
    used = []

    def batches(source, config, seed):
        used.append((source, config.val_fraction))
        if source == "builtin":
            raise UserError("够了")
        return own(tmp_path)

    monkeypatch.setattr(lora, "sft_batches", batches)
    monkeypatch.setattr(sys, "argv", ["", str(folder), str(tmp_path / "new")])
    with pytest.raises(UserError, match="够了"):
        lora.main()
    assert used[1] == ("builtin", 0.4)
    said = capsys.readouterr().out
    assert "（它微调用的对话：mine.jsonl；" in said
    change(folder / "config.json", lambda c: c.pop("mini_llm"))  # 别处的，什么也没有记下
    assert load_folder(folder)[2].val_fraction == Config().val_fraction
    assert "（它微调用的对话：没有记下；" in capsys.readouterr().out


def test_an_old_model_is_replaced_whole_or_not_at_all(folder, tmp_path, monkeypatch, capsys):
    """旧的模型卡与窄路不留在新模型旁边；写不下去，旧的原样还在。"""
    (folder / "adapter").mkdir()
    (tmp_path / "sft.pt").touch()
    model, tokenizer, _ = load_folder(folder)
    before = sorted(p.name for p in folder.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m, pytest.raises(UserError, match=r"写不了.*No space left"):
        m.setattr(common, "save_tokenizer", full)
        save_folder(model, tokenizer, folder)
    assert sorted(p.name for p in folder.iterdir()) == before
    save_folder(model, tokenizer, folder)
    assert {"README.md", "adapter"}.isdisjoint(p.name for p in folder.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "sft.pt"]
    assert f"import_hf {folder} {tmp_path}/sft-2.pt" in capsys.readouterr().out


def test_the_printed_commands_can_be_copied(folder, capsys):
    """路径里有空格也行。"""
    model, tokenizer, _ = load_folder(folder)
    save_folder(model, tokenizer, folder.parent / "a b" / "hf")
    assert f"'{folder.parent}/a b/hf' '{folder.parent}/a b/sft.pt'" in capsys.readouterr().out


# ---------- 5. 用错了 ----------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere", "x/hf"], "nowhere 不存在"),
        (["hf"], "要先写两个路径"),
        (["hf", "lora/hf"], "已经有一个模型"),
        (["hf", "x/hf", "--rank", "0"], "--rank 必须是正数"),
        (["hf", "x/hf", "--seed", "-1"], "--seed 不能是负数"),
        (["hf", "x/hf", "--seed", "0", "--lr", "nan"], "^--lr 必须是正数"),
        (["hf", "x/hf", "--data", "builtin"], "--data 要的是自己的问答"),
        (["hf", "x/hf", "--data", "none.jsonl"], "找不到数据文件 none.jsonl"),
        (["hf", "x/hf", "--lerning_rate", "1"], "没有参数 --lerning_rate"),
    ],
)
def test_mistakes_are_one_sentence(made, arguments, says, monkeypatch):
    """一句话，什么也没有写下。"""
    monkeypatch.chdir(made.root)
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(UserError, match=says):
        lora.main()
    assert not (made.root / "x").exists()


def test_a_missing_package_is_named_at_once(made, monkeypatch, capsys):
    """没有装 peft：说装哪一份，不必等模型读完、考完一遍。"""
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(sys, "argv", ["", str(made.base), str(made.root / "x")])
    with pytest.raises(UserError, match=r"peft.*examples/lora/requirements\.txt"):
        lora.main()
    assert not capsys.readouterr().out
