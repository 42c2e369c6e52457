"""tools.explain：网页自成一体，里面的数就是模型的数，什么文字都看得了。"""

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scripts import run

from config import Config, UserError
from generate import Sampling, make_speaker
from microscope import look, patched, without
from model import Transformer
from tokenizer import Tokenizer
from tools.explain import report
from tools.explain.__main__ import main
from tools.explain.facts import examine, total_flops, unpacked
from tools.explain.hands import read_hands
from tools.explain.page import page

TOKENIZER = Tokenizer()
SHAPE = Config(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=32, max_len=80)
EXPERTS = replace(SHAPE, n_experts=5, n_active=2, router_scale=1.0)


def speaker_of(shape):
    """没训练过、但每层都真的做事的小模型。"""
    torch.manual_seed(0)
    model = Transformer(shape).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return make_speaker(model, shape, TOKENIZER, "pretrain")


@pytest.fixture(scope="module")
def speaker():
    """稠密的。"""
    return speaker_of(SHAPE)


def data_of(html: str) -> dict:
    """网页里的数据。"""
    return json.loads(re.search(r"^const F = (.*);$", html, re.M)[1])


def test_the_page_says_what_the_model_says(speaker):
    ids = speaker.prompt("守株待兔")
    facts = data_of(page(examine(speaker, ids), 2))
    probs = speaker.model(torch.tensor([ids]))[0].softmax(-1)
    assert (facts["at"], facts["ids"], facts["tokens"][1:]) == (2, ids, list("守株待兔"))
    for t, best in enumerate(facts["next"]):
        value, token = probs[t].max(0)
        assert best[0] == [TOKENIZER.label(token.item()), pytest.approx(value.item(), rel=1e-5)]
        assert facts["lens"][-1][t] == best[:3]
    for t, token in enumerate(ids[1:]):
        assert facts["target_p"][t] == pytest.approx(probs[t, token].item(), rel=1e-4)
        assert facts["lens_target_p"][-1][t] == facts["target_p"][t]
    assert facts["targets"][-1] == facts["next"][-1][0][0]
    assert facts["without"][1][0] is None and facts["without"][0][0] is None
    assert facts["without"][1][1] == pytest.approx(probs[0, ids[2]].item(), rel=1e-3)
    view = look(speaker.model, ids)
    assert torch.allclose(torch.tensor(facts["norms"]), view.residual.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(torch.tensor(facts["writes"]), view.writes, rtol=1e-5)
    assert facts["total_params"] == sum(p.numel() for p in speaker.model.parameters())


def test_attention_survives_the_packing(speaker):
    ids = speaker.prompt("守株待兔守株待兔")
    facts = examine(speaker, ids)
    exact = look(speaker.model, ids).attention.numpy()
    assert abs(unpacked(facts) - exact).max() <= 0.5 / 65535 + 1e-7


def test_the_page_needs_no_network(speaker):
    html = page(examine(speaker, speaker.prompt("守")), 0)
    assert not re.findall(r"https?:|//[a-z]+\.|@import|url\(|<link|src=", html)
    assert "/*DATA*/" not in html


@given(st.text(max_size=20).map(lambda s: s.encode("utf-8", "replace").decode()))
@settings(max_examples=25)
def test_any_text_makes_a_sound_page(speaker, text):
    ids = speaker.prompt(text + "</script><!--")[: SHAPE.max_len]
    facts = examine(speaker, ids)
    html = page(facts, len(ids) - 1)
    assert html.count("</script>") == 1 and "<!--" not in html
    assert data_of(html)["ids"] == ids


def test_the_words_in_the_terminal(speaker):
    """变小写成负的比特；最看哪个取最大的；合计的运算量乘上了层数。"""
    assert report.change(0.5, 0.125) == "12.5%（-2.0 比特）"
    assert report.change(0.25, 0.5) == "50.0%（+1.0 比特）"
    facts = examine(speaker, speaker.prompt("守株待兔"))
    weights = look(speaker.model, facts["ids"]).attention[1, 0, 4]
    cells = list(report.most_attended(facts, 4).columns[1].cells)
    assert cells[1].plain.startswith(facts["tokens"][weights.argmax()] + " ")
    parts = {p["name"]: p["flops"] for p in facts["parts"]}
    blocks = sum(flops for name, flops in parts.items() if name.startswith("blocks."))
    assert total_flops(facts) == 2 * blocks + parts["score"]


def test_which_expert_took_which_token():
    """网页与终端里的专家，就是那一层真的挑中的，从 1 数起，占得多的在前。"""
    speaker = speaker_of(EXPERTS)
    ids = speaker.prompt("守株待兔守株待兔")
    facts = data_of(page(examine(speaker, ids), 2))
    exact = look(speaker.model, ids).experts
    for layer, row in enumerate(facts["experts"]):
        for t, pairs in enumerate(row):
            assert [w for _, w in pairs] == sorted((w for _, w in pairs), reverse=True)
            assert len(pairs) == 2 and sum(w for _, w in pairs) == pytest.approx(1, abs=1e-4)
            for e, w in pairs:
                assert w == pytest.approx(exact[layer, t, e - 1].item(), rel=1e-4)
    console = Console(file=io.StringIO(), width=200)
    console.print(report.experts_table(facts, 3))
    first = facts["experts"][1][3][0][0]
    others = [facts["tokens"][t] for t, pairs in enumerate(facts["experts"][1])
              if t != 3 and first in [e for e, _ in pairs]]  # fmt: skip
    line = console.file.getvalue().splitlines()[2]
    assert f"{first} 号" in line and line.rstrip().endswith(" ".join(others) or "—")


def test_hands_change_what_is_shown(speaker):
    """关掉、换掉、搬过来：看到的是动手之后的，旁边是动手之前的，都与直接算的相同。"""
    ids = speaker.prompt("守株待兔")
    tiger = TOKENIZER.encode("虎")[0]
    hands = read_hands(speaker, ids, 3, "1.2，2.feed_forward", "3=虎", "1=画蛇")
    facts = hands.examine(speaker)
    vector = look(speaker.model, speaker.prompt("画蛇")).residual[1, -1]
    new = [*ids[:2], tiger, *ids[3:]]
    with without(speaker.model, ["1.2", "2.feed_forward"]), patched(speaker.model, 1, 3, vector):
        after = speaker.read(new)
    before = speaker.read(ids)
    assert facts["ids"] == new and facts["tokens"][2] == "虎"
    for t in range(len(ids)):
        best = after[t].topk(10)
        assert [p for _, p in facts["next"][t]] == pytest.approx(best.values.tolist(), rel=1e-4)
        former = before[t, best.indices].tolist()
        assert facts["before"]["next_p"][t] == pytest.approx(former, rel=1e-4)
    assert facts["before"]["target_p"][0] == pytest.approx(before[0, ids[1]].item(), rel=1e-4)
    for words in ("1.2、2.feed_forward", "第 3 个词元换成了「虎」", "「画蛇」"):
        assert words in facts["changed"]
    assert torch.equal(speaker.read(ids), before)  # 离开之后一点不剩
    table = report.compared(facts, 3)
    assert len(list(table.columns[0].cells)) in (10, 11)
    assert data_of(page(facts, 3))["before"] == facts["before"]


def test_what_is_written_before_and_after(speaker):
    """动手之前与之后各接着写什么：与直接生成的相同，两样不同；什么也没动，就没有。"""
    ids = speaker.prompt("守株待兔")
    hands = read_hands(speaker, ids, 3, "1.attention", "2=虎", "")
    greedy = Sampling(temp=0, penalty=1, max=9)
    before = list(speaker.generate(ids[:4], greedy))
    with without(speaker.model, ["1.attention"]):
        after = list(speaker.generate([ids[0], *TOKENIZER.encode("虎"), *ids[2:4]], greedy))
    wanted = [TOKENIZER.decode(before), TOKENIZER.decode(after)]
    assert hands.answers(speaker, 4, 9) == wanted and wanted[0] != wanted[1]
    assert hands.answers(speaker, 0, 9) is None  # 开头都没有送进来
    assert read_hands(speaker, ids, 0, "", "", "").answers(speaker, 4, 9) is None


def test_idle_hands_change_nothing(speaker):
    ids = speaker.prompt("守株")
    assert read_hands(speaker, ids, 0, " ", "", "").examine(speaker) == examine(speaker, ids)


@pytest.mark.parametrize(
    ("without", "replace", "patch", "sentence"),
    [
        ("3.1", "", "", "没有第 3 层"), ("1.9", "", "", "每层有 2 个头"), ("头", "", "", "看不懂"),
        ("", "虎", "", "--replace 要写成"), ("", "9=虎", "", "不在 1 与词元数"),
        ("", "1=老虎", "", "是 2 个词元"), ("", "", "画蛇", "--patch 要写成"),
        ("", "", "0=画蛇", "没有第 0 层"), ("", "", "1=" + "长" * 99, "最多 80 个"),
    ],
)  # fmt: skip
def test_hands_that_miss_are_one_sentence(speaker, without, replace, patch, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        read_hands(speaker, speaker.prompt("守株"), 0, without, replace, patch)
    assert "\n" not in str(error.value)


def test_a_dense_model_has_no_experts_to_show(speaker):
    assert examine(speaker, speaker.prompt("守"))["experts"] is None


def test_a_broken_model_is_one_sentence(speaker, monkeypatch):
    monkeypatch.setattr(
        speaker.model, "score", lambda x: x.new_full((*x.shape[:-1], 30), torch.nan)
    )
    with pytest.raises(UserError, match="不是有限的数"):
        examine(speaker, speaker.prompt("守株"))


def test_a_token_cannot_end_the_program(speaker):
    """词表里若有这样的词元，页面也不会被它截断。"""
    facts = examine(speaker, speaker.prompt("守株"))
    facts["tokens"][1] = "</script><!--"
    html = page(facts, 0)
    assert html.count("</script>") == 1 and "<!--" not in html
    assert data_of(html)["tokens"][1] == "</script><!--"


def test_it_runs_as_in_the_readme(trained):
    folder, *_ = trained
    out, _ = run(folder, "tools.explain", "守株待兔：", "--write", "5")
    for title in ("编号", "猜下一个", "去掉一个词元", "读到某一层", "哪个", "多长", "运算量"):
        assert title in out
    html = (folder / "out/explain.html").read_text(encoding="utf-8")
    assert data_of(html)["stage"] == "sft"  # 两个都有，用微调过的
    out, _ = run(folder, "tools.explain", "守株待兔", "--without", "2.1", "--patch", "2=画蛇添足")
    assert "动手之后：关掉了 2.1；" in out and "它接着写" not in out
    out, _ = run(folder, "tools.explain", "守株待兔", "--without", "2.1", "--write", "5")
    assert "动手之前，它接着写" in out and "动手之后，它接着写" in out
    html = (folder / "out/explain.html").read_text(encoding="utf-8")
    assert len(data_of(html)["answers"]) == 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "请先写要看的文字"),
        (["--write", "5"], "请先写要看的文字"),
        (["  "], "请先写要看的文字"),
        (["你好", "--wrte", "5"], "最接近的是 --write"),
        (["你好", "--write", "-1"], "不能是负数"),
        (["你好", "--most", "0"], "至少是 1"),
        (["你好", "--device", "tpu"], "device 只能是"),
        (["你好", "再见"], "多余的参数"),
        (["\udcff"], "不是 UTF-8"),
    ],
)
def test_mistakes_are_one_sentence(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        main(argv)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["字" * 600], "最多看"),
        (["你好", "--at", "99"], "--at 要在 1 与"),
        (["你好", "--checkpoint", "没有.pt"], "找不到"),
    ],
)
def test_what_does_not_fit_is_said(argv, sentence, trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    with pytest.raises(UserError, match=sentence) as error:
        main(argv)
    assert "\n" not in str(error.value)


def test_no_model_yet(tmp_path):
    """走真的命令行：一句话，退出码 2。"""
    _, err = run(tmp_path, "tools.explain", "你好", code=2)
    assert "还没有模型" in err and "pre_train.py" in err and err.count("\n") == 1
