"""DPO 与 GRPO：考卷与练习不重叠，打分打得对，trl 学的正是我们的编号，练了真的会变好。"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import run
from test_export import random_model, save

from config import Config, UserError
from corpus import idioms
from corpus.split import is_held_out
from engine.checkpoint import load
from examples.align import dpo, grpo
from examples.align.measure import Exam, frozen_copy, log_probabilities, still_a_model, trl_settings
from examples.align.questions import (
    Question,
    ask,
    dictionary,
    is_real,
    rules,
    score,
    training_entries,
)
from examples.common import load_folder
from tools.huggingface.export import export
from tools.huggingface.import_hf import Options, import_folder
from tools.lab.check_answers import unseen_entries

pytest.importorskip("trl", reason="没有安装 examples/align/requirements.txt")
pytestmark = pytest.mark.doors

VAL_FRACTION = Config().val_fraction


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """一个小模型导出的目录。"""
    root = tmp_path_factory.mktemp("align")
    export(save(root / "sft.pt", random_model()), root / "hf")
    return root / "hf"


@pytest.fixture
def models(base):
    """刚读进来的模型与分词器，以及一份不动的。"""
    model, tokenizer, _ = load_folder(base)
    return SimpleNamespace(model=model, tokenizer=tokenizer, reference=frozen_copy(model))


PAIRS = [
    dpo.Pair(Question("你好", "意思", "你好", "好"), "好", "坏"),
    dpo.Pair(Question("一心一意是什么意思？", "意思", "一心一意", "专心"), "专心。", "出自《书》"),
]


# ---------- 1. 问什么 ----------


def test_practice_and_exam_share_no_idiom():
    """练的成语，考卷里没有，连释义相同的也没有；考卷的都是训练时留出的。"""
    practice, exam = training_entries(3000, VAL_FRACTION, 0), unseen_entries(300, VAL_FRACTION)
    assert len(practice) == 3000
    assert {e["word"] for e in practice}.isdisjoint(e["word"] for e in exam)
    assert not any(is_held_out(e["explanation"], VAL_FRACTION) for e in practice)
    assert all(is_held_out(e["explanation"], VAL_FRACTION) for e in exam)
    first, again, other = (training_entries(5, VAL_FRACTION, seed) for seed in (0, 0, 1))
    assert first == again != other
    fewer = training_entries(3000, 0.3, 0)  # 训练时留出得多，练习也就少
    assert not any(is_held_out(e["explanation"], 0.3) for e in fewer)
    with pytest.raises(UserError, match="没有一个留出的成语可考"):
        ask([])


def test_questions_are_worded_as_in_sft():
    """问法是微调时见过的；没有书名的不问出处；回答就是词典的。"""
    with_book = next(e for e in dictionary() if "》" in e["derivation"])
    without = next(e for e in dictionary() if "》" not in e["derivation"])
    meaning, origin, which = ask([with_book])
    word = with_book["word"]
    assert meaning.text in [t.format(word) for t in idioms.MEANING]
    assert origin.text in [t.format(word) for t in idioms.ORIGIN]
    assert which.text in [t.format(with_book["explanation"]) for t in idioms.WHICH]
    assert meaning.answer == with_book["explanation"]
    assert origin.answer == "出自" + with_book["derivation"]
    assert which.answer == word + "。"
    assert [q.kind for q in ask([without])] == ["意思", "找成语"]


# ---------- 2. 怎样打分 ----------


@pytest.mark.parametrize(
    "kind, answer, broken",
    [
        ("意思", "比喻做事十分专心。", []),
        ("意思", "比喻做事十分专心", ["样子对"]),
        ("意思", "出自《书》。", ["样子对"]),
        ("意思", "很专心。", ["六到六十个字"]),
        ("意思", "形容一心一意地做事。", ["不用成语解释它自己"]),
        ("意思", "同“专心致志。", ["括号引号成对"]),
        ("意思", "指专心专心专心地做事。", ["不反复"]),
        ("意思", "指专心做啊啊啊的事。", ["不反复"]),
        ("出处", "出自《书》：“其心一也，其意亦一。”", []),
        ("出处", "出自《书》：“其心一也。”唐·某《文》：“意在此。”", []),
        ("出处", "出自《书》：“学而时习之。”", ["引文里有成语的两个字"]),
        ("出处", "出自《书》：“一也，一一。”", ["引文里有成语的两个字"]),
        ("出处", "出自《书》：“其心一也，其意亦一。", ["引文里有成语的两个字", "括号引号成对"]),
        ("出处", "出自《书》：“其心一也”，其意", ["有始有终"]),
        ("出处", "《书》：“其心一也。”", ["样子对"]),
        ("找成语", "一心一意。", []),
        ("找成语", "一心一意", ["样子对"]),
        ("找成语", "出自《一心一意》。", ["样子对"]),
    ],
)
def test_rules(kind, answer, broken):
    """每条规矩都有一个回答，只违反它。"""
    kept = rules(kind, "一心一意", answer)
    assert [rule for rule, held in kept.items() if not held] == broken
    assert score(kind, "一心一意", answer) == pytest.approx(1 - len(broken) / len(kept))


def test_a_comma_is_not_a_character_of_the_idiom():
    """引文里的逗号人人都有，不算成语的字。"""
    for quoted, held in (("百尺，高也。", True), ("竿，长也。", False)):
        kept = rules("出处", "百尺竿头，更进一步", f"出自《书》：“{quoted}”")
        assert kept["引文里有成语的两个字"] == held


def test_the_dictionary_itself_passes():
    """规矩不苛刻：词典自己的回答，每一类都有 97% 以上一条也没违反。"""
    for kind in ("意思", "出处", "找成语"):
        questions = [q for q in ask(dictionary()[::10]) if q.kind == kind]
        passed = [score(q.kind, q.word, q.answer) == 1 for q in questions]
        assert sum(passed) / len(passed) > 0.97, kind


def test_reward_is_called_as_trl_calls_it():
    """trl 给的是几轮发言与同名的列，要的是一串数，次序相同。"""
    written = ["比喻做事十分专心。", "很专心。"]
    found = grpo.reward(
        prompts=None, completions=[[{"role": "assistant", "content": text}] for text in written],
        completion_ids=None, kind=["意思"] * 2, word=["一心一意"] * 2, trainer_state=None,
    )  # fmt: skip
    assert found == [score("意思", "一心一意", text) for text in written]
    assert found[0] == 1 > found[1] > 0


def test_a_real_idiom_is_recognised():
    """「真有」只看找成语那一类，而且要是词典里的。"""
    question = Question("？", "找成语", "一心一意", "一心一意。")
    assert is_real(question, "画蛇添足。")
    assert not is_real(question, "画龙添足。")
    assert not is_real(Question("？", "意思", "一心一意", ""), "画蛇添足。")


# ---------- 3. 测量 ----------


def test_log_probabilities_are_those_of_our_model(models, tokenizer):
    """成批补齐了算的，与我们的模型一段一段算的相同；只算回答与它的 <|im_end|>。"""
    ours = random_model()
    questions, answers = [p.question for p in PAIRS], ["专心。", "形容“好”得不得了，好到了头。"]
    sums, counts = log_probabilities(models.model, questions, answers)
    for question, answer, found, n in zip(questions, answers, sums, counts, strict=True):
        prompt = tokenizer.question_ids(question.text)
        reply = [*tokenizer.encode(answer), tokenizer.eos_id]
        assert n == len(reply)
        with torch.no_grad():
            logits = ours(torch.tensor([prompt + reply]))[0, len(prompt) - 1 : -1, :21146]
        expected = logits.log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)].sum()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_an_exam_is_the_same_twice_and_unchanged_models_are_at_distance_zero(models, capsys):
    """同一份考卷考两遍，回答相同；没练过的，与原来相差 0。"""
    exam = Exam(ask(unseen_entries(2, VAL_FRACTION)), models.reference, seed=1)
    first = exam.take(models.model, models.tokenizer)
    assert exam.take(models.model, models.tokenizer) == first
    assert "（KL）每个回答 0.00 奈特" in capsys.readouterr().out


def test_a_diverged_model_is_said_in_one_sentence(models):
    """学习率太大，打分成了 NaN：叫人调小，不是英文的调用栈。"""
    with torch.no_grad():
        models.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"练坏了.*--lr 9 调小"), still_a_model(lr=9):
        Exam([PAIRS[0].question], models.reference, seed=1).take(models.model, models.tokenizer)


# ---------- 4. DPO ----------


def test_trl_learns_our_ids(models, tokenizer, tmp_path):
    """trl 拼出的提问与两个回答，编号与 SFT 的相同，回答以 <|im_end|> 结束。"""
    trainer = dpo.make_trainer(
        models.model, models.reference, models.tokenizer, PAIRS, dpo.Options(), tmp_path
    )
    for row, pair in zip(trainer.train_dataset, PAIRS, strict=True):
        assert row["prompt_ids"] == tokenizer.question_ids(pair.question.text)
        assert row["chosen_ids"] == [*tokenizer.encode(pair.chosen), tokenizer.eos_id]
        assert row["rejected_ids"] == [*tokenizer.encode(pair.rejected), tokenizer.eos_id]


def test_dpo_moves_towards_the_chosen(models, tmp_path, capsys):
    """在几对上多练几步：每一对都是好的涨得更多；当裁判的那份一点没变。"""
    before = [p.clone() for p in models.reference.parameters()]
    options = dpo.Options(lr=1e-2, epochs=10, batch_size=2)
    trainer = dpo.make_trainer(
        models.model, models.reference, models.tokenizer, PAIRS, options, tmp_path
    )
    trainer.train()
    assert all(map(torch.equal, before, models.reference.parameters()))
    capsys.readouterr()
    dpo.tell_preference(models.model, models.reference, PAIRS)
    assert "好的涨得更多的占 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "written", "paired"),
    [
        ("比喻做事十分专心。", "很专心。", True),
        ("比喻做事十分专心。", "形容非常专心。", False),  # 写得合格
        ("同“专心致志。", "同“专心致志。", False),  # 词典自己不合格，模型背得一字不差
        ("同“专心致志。", "很专心。", False),  # 词典自己不合格，不能说它好
    ],
)
def test_a_pair_is_good_against_bad(monkeypatch, answer, written, paired):
    """好的是词典的，合格；差的是它自己写的，不合格。"""
    monkeypatch.setattr(dpo, "write_answers", lambda *_, **__: iter([written]))
    question = Question("一心一意是什么意思？", "意思", "一心一意", answer)
    pairs = dpo.make_pairs(None, None, [question])
    assert pairs == ([dpo.Pair(question, answer, written)] if paired else [])


def test_one_step_learns_too(models, tmp_path):
    """一共只有一步：学习率不是 0。步数多的，升温三步。"""
    options = dpo.Options(lr=1e-2)
    trainer = dpo.make_trainer(
        models.model, models.reference, models.tokenizer, PAIRS, options, tmp_path
    )
    trainer.train()
    after = models.model.parameters()
    assert not all(map(torch.equal, models.reference.parameters(), after))
    assert trl_settings(tmp_path, 0.1, 0, 40)["warmup_steps"] == 3


# ---------- 5. 从头到尾 ----------


@pytest.mark.parametrize(
    "program, options",
    [
        ("examples.align.dpo", ["--n_train", "2", "--n_test", "2", "--batch_size", "4"]),
        pytest.param("examples.align.grpo", ["--steps", "2", "--n_test", "2", "--prompts", "1",
                     "--tries", "2", "--beta", "0.1", "--max_tokens", "12"],
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_from_export_to_chat(base, tokenizer, program, options, tmp_path):
    """导出的练两步，写下，带回来，聊天认得；我们的打分与 transformers 的相同，与练之前的不同。"""
    said, _ = run(tmp_path, program, str(base), "new/hf", "--lr", "0.01", *options)
    assert said.count("合格") == 2
    assert said.index("练之前：") < said.index("步 · ") < said.index("练之后：")
    import_folder(tmp_path / "new" / "hf", tmp_path / "new" / "sft.pt", Options())
    ours, _, _ = load(tmp_path / "new" / "sft.pt", tokenizer)
    ids = torch.tensor([tokenizer.question_ids("你好")])
    with torch.no_grad():
        old, new = (load_folder(f)[0].eval()(ids).logits for f in (base, tmp_path / "new" / "hf"))
        torch.testing.assert_close(ours.eval()(ids)[..., :21146], new, rtol=1e-4, atol=1e-4)
    assert (old - new).abs().max() > 1e-3
    run(tmp_path, "sft_chat.py", "--checkpoint", "new/sft.pt", "--prompt", "你好", "--max", "3")


@pytest.mark.parametrize("program", [dpo, grpo])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "new"], "nowhere 不存在"),
        (["{base}", "new", "--lr", "0"], "--lr 必须是正数"),
        (["{base}", "new", "--seed", "-1"], "--seed 不能是负数"),
        (["{base}", "{base}"], "已经有一个模型"),
    ],
)
def test_mistakes_are_one_sentence(base, program, arguments, says, tmp_path, monkeypatch):
    """一句话，什么也没有写下。"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", *(a.format(base=base) for a in arguments)])
    with pytest.raises(UserError, match=says):
        program.main()
    assert not (tmp_path / "new").exists()


def test_a_pretrained_model_is_refused(tmp_path):
    """只会接着写的，还不会回答：说先微调。"""
    export(save(tmp_path / "pretrain.pt", random_model(), stage="pretrain"), tmp_path / "hf")
    with pytest.raises(ValueError, match=r"还没有微调过.*sft_train\.py"):
        load_folder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        (dpo, ["--seed", "0", "--sft_weight", "0"], r"trl.*examples/align/requirements\.txt"),
        (grpo, ["--seed", "0", "--beta", "0"], r"trl.*examples/align/requirements\.txt"),
        (dpo, ["--beta", "0"], "--beta 必须是正数"),
        (grpo, ["--tries", "1"], "--tries 至少是 2"),
    ],
)
def test_what_may_be_zero_and_what_is_said_at_once(
    base, program, arguments, says, tmp_path, monkeypatch, capsys
):
    """可以是 0 的放行；没有装 trl，说装哪一份，不必等考完一次。"""
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", ["", str(base), str(tmp_path / "new"), *arguments])
    with pytest.raises(UserError, match=says):
        program.main()
    assert not capsys.readouterr().out
