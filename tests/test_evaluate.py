"""评测：真的 lm-eval；它算的概率与我们自己的模型相同，题目考的都是没见过的成语。"""

import importlib.util
import json
import re
import shlex
from collections import Counter

import numpy as np
import pytest
import torch
from rote import learn_by_rote
from scripts import REPO, run, run_apart

from config import N_TOKENS, UserError
from corpus import idioms, readers
from engine.checkpoint import load
from examples.evaluate import make_task
from examples.evaluate.make_task import Question, pairs, shared
from settings.flags import read_options
from tools.huggingface.export import export

FEW = 6  # 背下几道题，就考几道


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """出好的卷子，真的命令行出的。"""
    where = tmp_path_factory.mktemp("evaluate")
    out, _ = run(where, "examples.evaluate.make_task", "task")
    assert "323 题；不用模型，总选最长的 24.4%，总选最短的 22.5%" in out  # 文档里写的就是这些
    assert "字最多的 81.2%" in out and "73 题" in out
    return where / "task"


@pytest.fixture(scope="module")
def questions(folder) -> list[Question]:
    """全部的题。"""
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Question(**json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def examinable():
    """能考的成语，与去掉的各有多少。"""
    return make_task.examinable(0.03)


# ---------- 题目 ----------


def as_text(ids) -> str:
    """一个编号当作一个字，好用找字的办法来找。"""
    return np.asarray(ids, "<u2").tobytes().decode("utf-16-le")


def test_no_idiom_was_ever_trained_on(tokenizer, questions, builtin_pretrain, builtin_sft):
    for data in (builtin_pretrain, builtin_sft):
        trained_on, held_out = as_text(data.tokens["train"]), as_text(data.tokens["val"])
        # 干扰项也取自留出的：若见过，模型会偏爱它。
        for text in {q.word for q in questions} | {c for q in questions for c in q.choices}:
            found = as_text(tokenizer.encode(text))
            assert found in held_out and found not in trained_on, text


def test_every_question_has_one_right_answer(questions):
    log = readers.ReadLog("builtin")
    entries = {
        e["word"]: e["explanation"] for e in idioms.read_entries(idioms.dictionary_file(), log)
    }
    assert len({q.word for q in questions}) == len(questions)
    for q in questions:
        assert len(set(q.choices)) == 4
        assert entries[q.word].startswith(q.right)
        assert not any(entries[q.word].startswith(c) for c in q.choices if c != q.right)
        assert all(not pairs(q.word) & pairs(c) for c in q.choices)  # 没有一句引了成语
        assert not any(entries[q.other].startswith(c) for c in q.choices)  # 对照的，哪句都不对


def test_neither_place_nor_length_gives_the_answer_away(questions, folder):
    places = Counter(q.answer for q in questions)
    assert all(57 <= places[i] <= 104 for i in range(4))  # 323 / 4 ≈ 81，标准差 7.8
    found = make_task.controls(questions)
    assert abs(found["总选最长的"] - 0.25) < 0.03
    assert abs(found["总选最短的"] - 0.25) < 0.03
    assert found["总选与成语共同的字最多的"] > 0.7  # 照抄题目里的字，就能对这么多
    rows = map(json.loads, (folder / "unshared.jsonl").open(encoding="utf-8"))
    unshared = [Question(**row) for row in rows]
    assert make_task.controls(unshared)["总选与成语共同的字最多的"] == 0.25
    assert not any(shared(q.word, c) for q in unshared for c in q.choices)
    assert [q for q in questions if not shared(q.word, q.right)] == unshared
    # 这两类释义的样子不同（「比喻……」与照字面说的），混在一起，不看题目也挑得出来。
    right = {q.right for q in unshared}
    assert all(set(q.choices) <= right for q in unshared)
    assert not any(set(q.choices) & right for q in questions if q.right not in right)


def test_controls_count_ties_as_a_guess():
    two = Question("甲乙", ["甲。", "丙丁。", "戊己。", "丙。"], 0, "庚辛")
    found = make_task.controls([two])
    assert list(found.values()) == [0, 0.5, 1]


def test_the_same_seed_asks_the_same(examinable, folder):
    entries, _ = examinable
    word = next(iter(entries))
    first, again, other = (make_task.ask(word, entries, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first == Question(**json.loads((folder / "questions.jsonl").open().readline()))
    with pytest.raises(UserError, match="3 个成语不够给「" + word):
        make_task.ask(word, dict(list(entries.items())[:3]), 0)


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "请先写题目放在哪个目录"),
        (["--seed", "1"], "请先写题目放在哪个目录"),
        (["x", "--val_fraction", "0.7"], "得到的是 0.7"),
        (["x", "--sede", "1"], "最接近的是 --seed"),
    ],
)
def test_mistakes_are_one_sentence(args, words):
    with pytest.raises(UserError, match=words):
        read_options(make_task.Options, args, make_task.USAGE)


def test_its_readme_says_what_happens(examinable, folder):
    text = (REPO / "examples/evaluate/README.md").read_text(encoding="utf-8")
    for command in re.findall(r"^python -m examples\.evaluate\.make_task (.*)$", text, re.M):
        read_options(make_task.Options, shlex.split(command), make_task.USAGE)
    named = {name for line in re.findall(r"--tasks (\S+)", text) for name in line.split(",")}
    made = {path.stem for path in folder.glob("*.yaml")}
    assert named <= made and len(made) == 8
    assert all(f"（{n}" in text for n in examinable[1].values())
    assert all(n in text for n in ("323", "73", "24.4%", "22.5%", "81.2%"))


# ---------- 考 ----------


@pytest.fixture(scope="module")
def scores(tokenizer, folder, questions):
    """背下前几题（两种问法）的模型，导出，用真的 lm-eval 考：{任务: 各题的记录}，与模型自己。"""
    for package in ("lm_eval", "datasets"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"没有 {package}：pip install -r examples/evaluate/requirements.txt")
    where = folder.parent
    rows = [
        prompt(tokenizer, form, q) + tokenizer.encode(q.right)
        for q in questions[:FEW]
        for form in make_task.FORMS
    ]
    learn_by_rote(rows, where / "sft.pt", "sft", tokenizer)
    export(where / "sft.pt", where / "hf")
    found = {}
    for form, flags in (("document", []), ("chat", ["--apply_chat_template"])):
        run_apart(
            where, "lm_eval", "run", "--model", "hf", "--model_args", "pretrained=hf", *flags,
            "--device", "cpu", "--batch_size", "4", "--tasks", f"idiom_{form}",
            "--include_path", "task", "--limit", str(FEW), "--log_samples", "--output_path", form,
            env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(where / "cache")},
        )  # fmt: skip
        (samples,) = (where / form).rglob("samples_*.jsonl")
        found[form] = [json.loads(line) for line in samples.open(encoding="utf-8")]
    model, _, _ = load(where / "sft.pt", tokenizer)
    return found, model.eval()


def prompt(tokenizer, form: str, q: Question) -> list[int]:
    """题目的编号，与训练时的样子相同。"""
    if form == "document":
        return [tokenizer.bos_id, *tokenizer.encode(f"{q.word}：")]
    return tokenizer.question_ids(f"{q.word}是什么意思？")


@torch.inference_mode()
def log_likelihood(model, before: list[int], after: list[int]) -> float:
    """我们的模型：在 before 之后写出 after 的对数概率；补齐词表的那些不算在内，导出时去掉了。"""
    logits = model(torch.tensor([[*before, *after]]))[0, len(before) - 1 : -1, :N_TOKENS]
    return logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum().item()


@pytest.mark.doors
@pytest.mark.slow
@pytest.mark.parametrize("form", make_task.FORMS)
def test_lm_eval_scores_exactly_the_intended_tokens(tokenizer, questions, scores, form):
    found, model = scores
    assert len(found[form]) == FEW
    for q, sample in zip(questions, found[form], strict=False):
        assert Question(**sample["doc"]) == q
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        before = prompt(tokenizer, form, q)
        ours = [log_likelihood(model, before, tokenizer.encode(c)) for c in q.choices]
        assert theirs == pytest.approx(ours, abs=1e-3)  # 和有两百上下，fp32：实差 3e-5


def test_the_swapped_tasks_only_change_the_idiom(tmp_path):
    made = {task["task"]: task for task in make_task.tasks(tmp_path)}
    for name, task in made.items():
        if name.endswith("_swapped"):
            plain = made[name.removesuffix("_swapped")]
            assert task["doc_to_text"] == plain["doc_to_text"].replace("{{word}}", "{{other}}")
            assert {k for k in task if task[k] != plain[k]} == {"task", "doc_to_text"}


@pytest.mark.doors
@pytest.mark.slow
@pytest.mark.parametrize("form", make_task.FORMS)
def test_whoever_knows_the_answers_gets_full_marks(scores, form):
    found, _ = scores
    assert [(s["acc"], s["acc_norm"]) for s in found[form]] == [(1, 1)] * FEW
