"""带得走的网页：在真的浏览器里，与 PyTorch 的模型、分词器、采样逐项相同。"""

import itertools
import json
import math
import os
import random
import re
from unittest import mock

import pytest
import torch
from scripts import REPO, run

from chat.display import percent
from config import N_TOKENS, Config, UserError
from corpus.idioms import dictionary_file, read_documents
from corpus.log import ReadLog
from engine.checkpoint import load
from generate import Sampling, adjust, is_looping, make_speaker, probabilities
from microscope import look, patched, without
from model import Transformer
from settings.resolve import load_config
from tokenizer import CONTROL_TOKENS, TEXT_TOKENS, Tokenizer
from tools.page import build
from tools.page.__main__ import main
from tools.page.build import page
from tools.page.pack import as_shown, loss_added, pack

TOKENIZER = Tokenizer()
SAID = {"progress": {"step": 7, "val_loss": 3.25}, "optimizers": ["有"]}
SHAPE = Config(
    dim=48, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=58, max_len=96, vocab_size=N_TOKENS
)  # 补齐的行不带走：没有它们，概率才逐个相同
EXPERTS = Config(**vars(SHAPE) | dict(hidden_dim=24, n_experts=5, n_active=2, router_scale=1.0))
LOOKED = list(range(0, 21146, 83))  # 每个位置的打分看这几个


def speaker_of(config, stage="pretrain", seed=0):
    """没训练过、但每层都真的做事的模型。"""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        wide = parameter.dim() > 1
        torch.nn.init.normal_(
            parameter, 0 if wide else 1, 3 * config.dim**-0.5 / 4 if wide else 0.1
        )
    return make_speaker(model, config, TOKENIZER, stage)


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """打开一个模型的网页；结束时核对没有向外联网，程序没有出错。"""
    folder = tmp_path_factory.mktemp("page")
    asked, errors, pages, made = [], [], [], []

    def show(speaker, exact=True, said=SAID, **more):
        path = folder / f"{id(speaker)}.html"
        if not path.exists():  # 同一个模型的，做一次
            path.write_text(page(speaker, said, "模型", exact), encoding="utf-8")
        made.append(speaker)  # 留着：另一个模型的 id 才不会与它相同
        tab = browser.new_page(**more)
        pages.append(tab)
        tab.set_default_timeout(20_000)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        tab.goto(f"file://{path}")
        tab.locator("#send[aria-disabled=false]").wait_for()
        return tab

    yield show
    for tab in pages:
        tab.close()
    assert errors == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "blob", "data"}
    assert sum(url.startswith("file") for url in asked) == len(pages)


def job(tab, name, **more):
    """请网页里的模型做一件事。"""
    return tab.evaluate("([name, more]) => job(name, more)", [name, more])


def scores(tab, ids, off=()):
    """网页里每个位置的打分，只看 `LOOKED` 那几个。"""
    return torch.tensor(json.loads(tab.evaluate(
        "async ([ids, off, looked]) => JSON.stringify("
        "(await job('logits', {ids, off})).map(row => looked.map(i => row[i])))",
        [ids, list(off), LOOKED],
    )))  # fmt: skip


def write(tab, ids, **sampling):
    """从 ids 往下写，返回 (编号, 为什么停下)。"""
    settings = vars(Sampling(**sampling))
    return tab.evaluate(
        """async ([ids, sampling]) => { const new_ids = [];
        const {why} = await job('write', {ids, sampling, off: []}, token => new_ids.push(token.id));
        return [new_ids, why]; }""",
        [ids, settings],
    )


def most_likely(speaker, ids, new):
    """ids 之后写了 new：总选最可能的（重复惩罚 1.3），每一步该写哪个；一次读完，比逐个生成快。"""
    with torch.inference_mode():
        logits = speaker.model(torch.tensor([[*ids, *new]]))[0, len(ids) - 1 : -1]
    settings = Sampling(temp=0, penalty=1.3)
    return [
        adjust(row, torch.tensor(new[:n], dtype=torch.long), settings, speaker.banned)
        .argmax()
        .item()
        for n, row in enumerate(logits)
    ]


def some_ids(n, seed=0):
    return torch.randint(106, 21128, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---------- 1. 同一个模型 ----------


@pytest.mark.parametrize("preset", ["tiny", "wide", "tiny-moe"])
def test_the_same_logits_and_the_same_words(opened, preset):
    """fp32：64 个位置的打分相差不到千分之一，总选最可能的，64 个编号相同。"""
    speaker = speaker_of(load_config("pretrain", ["--preset", preset])[0])
    tab = opened(speaker)
    ids = some_ids(64)
    with torch.inference_mode():
        ours = speaker.model(torch.tensor([ids]))[0][:, LOOKED]
    assert ours.std() > 0.3  # 打分真的有高有低
    assert (scores(tab, ids) - ours).abs().max() < 1e-3
    greedy = dict(temp=0, penalty=1.3, max=64)
    new, why = write(tab, ids[:12], **greedy)
    assert len(new) == 64 and why == "写满了 64 个词元"
    assert new == most_likely(speaker, ids[:12], new)
    tab.close()


@pytest.mark.parametrize("config", [SHAPE, EXPERTS], ids=["dense", "experts"])
def test_int8_is_the_rounded_model(opened, config):
    """int8 的网页，与矩阵存成 int8 再还原的模型相同；行数、宽度不是 4 的倍数也行。"""
    speaker = speaker_of(config)
    tab = opened(speaker, exact=False)
    ids = some_ids(20, seed=1)
    small = as_shown(speaker.model)
    with torch.inference_mode():
        rounded, exact = (m(torch.tensor([ids]))[0][:, LOOKED] for m in (small, speaker.model))
    assert (scores(tab, ids) - rounded).abs().max() < 1e-3 < (rounded - exact).abs().max()
    assert f"{loss_added(speaker):.2%}" in tab.locator("#about").inner_text()


def test_sizes(monkeypatch):
    """wide 的网页不到 55 MB（tiny 的，见最后一节）；fp32 的四倍大。"""
    monkeypatch.setattr(build, "loss_added", lambda speaker: 0)
    speaker = speaker_of(load_config("pretrain", ["--preset", "wide"])[0])
    assert 45e6 < len(page(speaker, SAID, "模型")) < 55e6
    places, small = pack(speaker_of(SHAPE).model, exact=False)
    _, exact = pack(speaker_of(SHAPE).model, exact=True)
    assert 3.4 < len(exact) / len(small) < 4
    assert all(place["at"] % 4 == 0 for place in places.values())


# ---------- 2. 同一个分词器，同样的抽签 ----------


def strange_text(noise: random.Random) -> str:
    """各种字混在一起：汉字、数字、字母、重音、标点、空白、控制词元的字样、随便哪个字。"""
    kinds = [
        lambda: chr(noise.randrange(0x4E00, 0x9FFF)),
        lambda: noise.choice("，。！？；：、（）《》,.!?;:()<>[]#@&*-+=/\\|~^%$"),
        lambda: noise.choice(["2024", "3.14", "12345678", "1,000", "０１２", "Ⅳ", "½"]),
        lambda: noise.choice(["hello", "World", "GPT", "naïve", "İstanbul", "ΣΑΣ", "ß"]),
        lambda: "".join(noise.choices("abcdefghijklmnopqrstuvwxyz", k=noise.randrange(1, 120))),
        lambda: noise.choice(TEXT_TOKENS + CONTROL_TOKENS),
        lambda: noise.choice(["[UNK]", "[PAD]", "##a", "\r", "\u00a0", "\u200b"]),
        lambda: noise.choice(["한국어", "かな", "カナ", "😀", "👨\u200d👩", "\u0301", "𠀀", "①"]),
        lambda: chr(noise.randrange(0x20, 0xD800)),
        lambda: chr(noise.randrange(0xE000, 0x110000)),
    ]  # fmt: skip
    return "".join(noise.choice(kinds)() for _ in range(noise.randrange(1, 12)))


@pytest.fixture(scope="module")
def small(opened):
    """一个小模型的网页，以及它的 PyTorch 的一份。"""
    speaker = speaker_of(SHAPE, "sft")
    return opened(speaker), speaker


def test_the_same_ids(small):
    """一万段编出来的文字，与内置语料的头两千篇，编号逐个相同；解码也相同。"""
    tab, _ = small
    noise = random.Random(0)
    texts = [strange_text(noise) for _ in range(10_000)] + builtin_texts(2000)
    theirs = json.loads(tab.evaluate(  # 装成一段文字送去、送回：一样一样地送，慢好几倍
        """async texts => JSON.stringify(
        await Promise.all(JSON.parse(texts).map(text => job("encode", {text}))))""",
        json.dumps(texts),
    ))  # fmt: skip
    wrong = [t for t, ids in zip(texts, theirs, strict=True) if TOKENIZER.encode(t) != ids]
    assert wrong == []
    some = [some_ids(30, seed) + TOKENIZER.reply_prefix() for seed in range(50)]
    decoded = tab.evaluate("all => Promise.all(all.map(ids => job('decode', {ids})))", some)
    assert decoded == [TOKENIZER.decode(ids) for ids in some]


def builtin_texts(n):
    """内置语料的头 n 篇。"""
    records = read_documents(dictionary_file(), ReadLog("builtin"))
    return [record.content for record in itertools.islice(records, n)]


def test_the_same_lottery(small):
    """打分 -> 抽签的概率，与 generate.py 的相同：惩罚、温度、top-k、top-p、min-p。"""
    tab, speaker = small
    noise = random.Random(1)
    banned = speaker.banned[speaker.banned < 3000]
    for seed in range(12):
        logits = 4 * torch.randn(3000, generator=torch.Generator().manual_seed(seed))
        written = [noise.randrange(3000) for _ in range(20)] + [logits.argmax().item()]
        settings = Sampling(
            temp=noise.choice([0, 0.3, 1, 2]), top_k=noise.choice([1, 5, 50, 200]),
            top_p=noise.choice([0.3, 0.95, 1]), min_p=noise.choice([0, 0.05, 0.5]),
            penalty=noise.choice([1, 1.3, 2]),
        )  # fmt: skip
        theirs = tab.evaluate(
            """([logits, written, settings, banned]) => {
            const scores = adjust(Float32Array.from(logits), written, settings.penalty, banned);
            const chances = lottery(highest(scores, settings.top_k), settings);
            return [[...scores], chances]; }""",
            [logits.tolist(), written, vars(settings), banned.tolist()],
        )
        seen = torch.tensor(written)
        ours = probabilities(logits, seen, settings, banned)
        adjusted = adjust(logits, seen, settings, banned)
        got = torch.tensor([-math.inf if x is None else x for x in theirs[0]])
        assert torch.allclose(got, adjusted, atol=1e-5)
        assert {i for i, _ in theirs[1]} == set(torch.where(ours > 0)[0].tolist()), settings
        assert all(p == pytest.approx(ours[i].item(), rel=1e-4) for i, p in theirs[1])


def test_a_draw_follows_the_chances(small):
    tab, _ = small
    drawn = tab.evaluate(
        "([chances, points]) => points.map(x => draw(chances, () => x))",
        [[[7, 0.5], [8, 0.3], [9, 0.2]], [0, 0.49, 0.51, 0.79, 0.81, 0.999, 1]],
    )
    assert drawn == [7, 7, 8, 8, 9, 9, 7]


def test_the_same_loops_are_noticed(small):
    """什么算在反复，与 generate.py 的相同。"""
    tab, _ = small
    noise = random.Random(2)
    cases = []
    for _ in range(300):
        unit = [noise.choice([200, 201, 202, 203]) for _ in range(noise.randrange(1, 20))]
        part = unit[: noise.randrange(len(unit))]  # 最后一遍没有说完
        cases.append(some_ids(noise.randrange(5)) + unit * noise.randrange(1, 9) + part)
    lines = "好看\n1. 好看\n2、好看\n好看\n"
    texts = [lines, lines[:-1], "好\n" * 6, "a\n\n\n\n", "}\n" * 9, "甲乙\n丙丁\n" * 2, "\n" * 5]
    cases += [TOKENIZER.encode(text) for text in texts]
    theirs = tab.evaluate(
        """cases => { const {vocab} = INFO.tokens;
        const decode = ids => ids.map(id => vocab[id].replace(/^##/, "")).join("");
        return cases.map(ids => is_looping(ids, {decode})); }""",
        cases,
    )
    ours = [is_looping(ids, TOKENIZER) for ids in cases]
    assert theirs == ours and 20 < sum(ours) < len(ours) - 20


# ---------- 3. 显微镜与手 ----------


@pytest.mark.parametrize("config", [SHAPE, EXPERTS], ids=["dense", "experts"])
def test_the_microscope_and_the_hands(opened, config):
    """网页里看到的、动过手之后的，都与 microscope.py 直接算的相同。"""
    speaker = speaker_of(config)
    tab, ids, other = opened(speaker), some_ids(15, seed=3), some_ids(6, seed=4)
    parts = [[], ["2.3"], ["1.attention", "3.2"], ["2.feed_forward"]]
    parts += [["2.expert3", "1.expert1"]] if config.n_experts else []
    vector = look(speaker.model, other).residual[2, -1]
    for off in parts:
        for patch in (None, {"ids": other, "layer": 2}):
            seen = job(
                tab, "look", ids=ids, target=None, written=[], penalty=1, off=off, patch=patch
            )
            place = 2, len(ids) - 1, vector
            with without(speaker.model, off):
                if patch:
                    with patched(speaker.model, *place):
                        view = look(speaker.model, ids)
                else:
                    view = look(speaker.model, ids)
            probs = view.logits[-1].softmax(-1)
            assert seen["target"] == TOKENIZER.label(probs.argmax().item())
            assert seen["target_p"] == pytest.approx(probs.max().item(), rel=1e-3)
            norms = view.residual[:, -1].norm(dim=-1).tolist()
            assert seen["norms"] == pytest.approx(norms, rel=1e-3)
            assert flat(seen["writes"]) == pytest.approx(
                view.writes[:, :, -1].flatten().tolist(), rel=1e-3, abs=1e-6
            )
            for layer, heads in enumerate(seen["attention"]):
                for head, weights in enumerate(heads):
                    row = view.attention[layer, head, -1].tolist()
                    assert weights == pytest.approx(row, abs=1e-4)
            lens = speaker.model.score(speaker.model.norm(view.residual[1, -1])).softmax(-1)
            assert seen["lens"][1][0][1] == pytest.approx(lens.max().item(), rel=1e-3)
            if config.n_experts:
                taken = view.experts[:, -1]
                for layer, pairs in enumerate(seen["experts"]):
                    assert {e - 1 for e, _ in pairs} == set(
                        torch.where(taken[layer] > 0)[0].tolist()
                    )


def flat(rows):
    return [x for row in rows for x in row]


def test_long_talks_forget_like_the_chat(small):
    """前文放不下时忘掉最早的几轮，与 sft_chat.py 的相同。"""
    from sft_chat import ask

    tab, speaker = small
    turns = []
    for n in range(6):
        text = "说" * (8 + n)
        kept, ids = ask(speaker, turns, text)
        theirs = job(tab, "ask", turns=turns, text=text)
        assert theirs["ids"] == ids and theirs["turns"] == kept[:-1]
        turns = [*kept, TOKENIZER.turn_ids("assistant", some_ids(9, seed=n))]
    assert len(turns) < 12  # 真的忘过
    with pytest.raises(UserError) as ours:
        ask(speaker, [], "长" * 90)
    assert job(tab, "ask", turns=[], text="长" * 90)["error"] == str(ours.value)


# ---------- 4. 脸 ----------


@pytest.fixture(scope="module")
def talkative():
    """一个小模型，打分拉开些，抽签才有得抽。"""
    speaker = speaker_of(SHAPE, "sft")
    speaker.model.norm.weight.data *= 3
    return speaker


@pytest.fixture
def chat(opened, talkative):
    """它的网页，手机那么宽，一次至多写十二个词元。"""
    speaker = talkative
    tab = opened(speaker, viewport={"width": 360, "height": 740})
    tab.evaluate("INFO.sampling.max = 12")
    set_knob(tab, "temp", 0)
    yield tab, speaker
    tab.close()


def set_knob(tab, name, value):
    tab.evaluate(
        "([n, v]) => { $(n).value = v; $(n).dispatchEvent(new Event('input'));"
        " $(n).dispatchEvent(new Event('change')); }",
        [name, value],
    )


def done(tab):
    """等手上的事做完。"""
    tab.locator("#stop[aria-disabled=true]").wait_for()


def say(tab, text):
    """说一句话，等它写完。"""
    tab.locator("#text").fill(text)
    tab.locator("#text").press("Enter")
    done(tab)


def click(tab, *names):
    """按下一个按钮，等它做完。"""
    tab.get_by_role("button", name=names[0]).click()
    done(tab)


def touch(tab, answer, token):
    """点开第几个回答的第几个词元。"""
    tab.locator(".answer").nth(answer).locator(".t").nth(token).click()
    done(tab)


def answer_ids(tab, n=-1):
    return tab.evaluate("n => answers.at(n).tokens.map(t => t.id)", n)


def greedy_from(speaker, ids, written, n):
    """已经写了 written，接着总选最可能的，至多 n 个，写出 <|im_end|> 就停。"""
    ids, written, new = list(ids), list(written), []
    for _ in range(n):
        logits = speaker.model(torch.tensor([ids]))[0, -1]
        seen = torch.tensor(written, dtype=torch.long)
        token = adjust(logits, seen, Sampling(penalty=1.3), speaker.banned).argmax().item()
        if token == TOKENIZER.eos_id:
            break
        new.append(token)
        ids.append(token)
        written.append(token)
    return new


def test_talking_and_looking(chat):
    """说话，点一个词元，换一个走，再问一句；手机上不横着滚，按得到的都有名字。"""
    tab, speaker = chat
    say(tab, "你好")
    first = greedy_from(speaker, speaker.prompt("你好"), [], 12)
    assert answer_ids(tab) == first and len(first) == 12
    touch(tab, 0, 4)
    probs = speaker.read([*speaker.prompt("你好"), *first[:4]])[-1]
    assert f"概率是 {percent(probs[first[4]].item())}" in tab.locator("#target").inner_text()
    assert tab.locator("#next button").count() in (10, 11)
    second = probs.topk(2).indices.tolist()[1]  # 换成第二可能的，从那里接着写
    tab.locator("#next button").nth(1).click()
    done(tab)
    taken = answer_ids(tab)
    assert taken[:5] == [*first[:4], second]
    start = [*speaker.prompt("你好"), *taken[:5]]
    assert taken[5:] == greedy_from(speaker, start, taken[:5], 12)
    assert f"第 5 个词元「{TOKENIZER.label(second)}」" in tab.locator("#title").inner_text()
    say(tab, "再见")
    begin = [*speaker.prompt("你好"), *taken, TOKENIZER.eos_id]
    assert tab.evaluate("answers[1].start") == begin + speaker.prompt("再见")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    unnamed = tab.evaluate(
        "[...document.querySelectorAll('button, input, textarea, select, [role=button]')]"
        ".filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_changing_an_earlier_answer_takes_the_later_ones_back(chat):
    """换了前面的一个词元，后面的几轮是接着原来的话说的，不再算数；再问时，历史就是看见的。"""
    tab, speaker = chat
    for text in ("你好", "再见"):
        say(tab, text)
    touch(tab, 0, 2)
    tab.locator("#other-token").fill("虎")
    click(tab, "只换这个词元")
    assert tab.locator(".message").count() == 1
    ids, tiger = answer_ids(tab), TOKENIZER.encode("虎")
    assert ids[2:3] == tiger and len(ids) == 12
    given = [*speaker.prompt("你好"), *ids[:3]]
    p = speaker.read(given)[-1, ids[3]].item()
    assert tab.evaluate("answers[0].tokens[3].p") == pytest.approx(p, rel=1e-3)
    say(tab, "再见")
    begin = [*speaker.prompt("你好"), *ids, TOKENIZER.eos_id]
    assert tab.evaluate("answers[1].start") == begin + speaker.prompt("再见")
    touch(tab, 0, 1)
    tab.locator("#other-token").fill("老虎")
    click(tab, "只换这个词元")
    assert "是 2 个词元" in tab.locator("#status").inner_text()
    assert answer_ids(tab, 0) == ids


def test_an_answer_cut_to_nothing_is_forgotten(chat):
    """换成「写完了」，一个字也不剩：合上；再问时，不带着没有答的那一句。"""
    tab, speaker = chat
    say(tab, "你好")
    touch(tab, 0, 0)
    tab.evaluate("eos => take({id: eos, name: '', p: 0})", TOKENIZER.eos_id)
    done(tab)
    assert answer_ids(tab) == [] and tab.locator("#inside").is_hidden()
    assert tab.locator("#status").inner_text() == ""
    assert "到这里为止" in tab.locator(".message").inner_text()
    say(tab, "再见")
    assert tab.evaluate("answers[1].start") == speaker.prompt("再见")
    click(tab, "重写一遍")
    assert answer_ids(tab) == greedy_from(speaker, speaker.prompt("再见"), [], 12)
    assert "原来写的是" in tab.locator(".message").nth(1).inner_text()


def test_what_is_forgotten_is_said(chat):
    tab, _ = chat
    for n in range(7):
        say(tab, f"第{n}次说的话有这么长")
    assert "忘掉了最早的" in tab.locator(".message").last.inner_text()
    say(tab, "长" * 99)
    assert "请说短一些" in tab.locator("#status").inner_text()
    assert tab.locator(".message").count() == 7 and tab.locator("#text").input_value()


def test_one_thing_at_a_time(chat):
    """正在写的时候，别的按钮按了不算；写完了，一样也没有乱。"""
    tab, speaker = chat
    say(tab, "你好")
    touch(tab, 0, 3)
    tab.evaluate("() => off.add('1.1')")
    tab.evaluate(
        """() => { ask("再见"); open(answers[0], 5); again(); swap("虎"); patch("画", 1);
        take({id: 2000, name: "x", p: 0}); ask("还有"); $("restore").click();
        for (const b of document.querySelectorAll("#switches button")) b.click(); }"""
    )
    done(tab)
    assert tab.locator(".message").count() == 2 and tab.evaluate("[...off]") == ["1.1"]
    with without(speaker.model, ["1.1"]):
        wanted = greedy_from(speaker, tab.evaluate("answers[1].start"), [], 12)
    assert answer_ids(tab) == wanted
    assert answer_ids(tab, 0) == greedy_from(speaker, speaker.prompt("你好"), [], 12)
    assert "第 4 个词元" in tab.locator("#title").inner_text()


def test_a_stop_while_a_token_is_open(chat):
    """开着一个词元，重写到一半叫停：看到的换成写出来的；再换一个，照样换得成。"""
    tab, _ = chat
    say(tab, "你好")
    touch(tab, 0, 7)
    tab.evaluate(
        """() => { again(); const real = show; show = (answer, token) => { real(answer, token);
        if (answer.tokens.length === 2) { $("stop").click(); show = real; } }; }"""
    )
    done(tab)
    n = len(answer_ids(tab))
    assert tab.evaluate("now.at") == min(7, n - 1)
    assert f"第 {min(8, n)} 个词元" in tab.locator("#title").inner_text()
    tab.locator("#next button").nth(1).click()
    done(tab)
    assert "写了" in tab.locator("#status").inner_text()
    assert tab.evaluate("now.answer.tokens[now.at].id") == answer_ids(tab)[min(7, n - 1)]
    assert tab.locator(".t[tabindex='0']").count() == 1


def test_the_last_answer_is_the_one_rewritten(chat):
    """开着的是前一个回答，重写的仍是最后一个，哪一个也不丢。"""
    tab, speaker = chat
    say(tab, "你好")
    touch(tab, 0, 3)
    say(tab, "再见")
    click(tab, "重写一遍")
    assert tab.locator(".message").count() == 2
    assert answer_ids(tab, 0) == greedy_from(speaker, speaker.prompt("你好"), [], 12)
    assert "原来写的是" in tab.locator(".message").last.inner_text()
    tab.locator("#text").fill("写到一半")
    tab.evaluate("ask('换一句')")
    done(tab)
    assert tab.locator("#text").input_value() == "写到一半"


def test_a_penalty_changed_meanwhile_is_not_lost(chat):
    """正在看的时候又拖了惩罚：看完之后，照最后的值。"""
    tab, _ = chat
    say(tab, "你好")
    touch(tab, 0, 5)
    tab.evaluate(
        """() => { const move = v => { $("penalty").value = v;
        for (const name of ["input", "change"]) $("penalty").dispatchEvent(new Event(name)); };
        move(1.5); move(2); }"""
    )
    tab.wait_for_timeout(50)
    done(tab)
    assert tab.evaluate("now.penalty") == 2


def test_the_bars_move_while_dragging(chat):
    """拖动温度：抽签的概率当场变，模型给的不变。"""
    tab, _ = chat
    say(tab, "你好")
    touch(tab, 0, 0)
    drawn, models = [], []
    for temp in (0.3, 1, 2):
        set_knob(tab, "temp", temp)
        words = tab.locator("#next > :nth-child(3n)").all_inner_texts()
        drawn.append([text.partition("　")[2] for text in words])
        models.append([text.partition("　")[0] for text in words])
    assert len({tuple(texts) for texts in drawn}) == 3
    assert models[0] == models[1] == models[2] and all("%" in text for text in models[0])


def test_switching_off_and_carrying_over(chat):
    """关掉一个头：概率、重写的回答都是直接算的那样；恢复之后变回来；搬一个向量也是。"""
    tab, speaker = chat
    say(tab, "你好")
    touch(tab, 0, 3)
    first = answer_ids(tab)
    ids, token = [*speaker.prompt("你好"), *first[:3]], first[3]

    def shown():
        return tab.evaluate("[now.seen.target_p, now.former?.target_p ?? null]")

    plain = speaker.read(ids)[-1]
    assert shown() == [pytest.approx(plain[token].item(), rel=1e-3), None]
    tab.locator("#heads button").nth(5).click()  # 第 2 层第 2 头
    click(tab, "关掉第 2 层第 2 头")
    with without(speaker.model, ["2.2"]):
        changed = speaker.read(ids)[-1]
        again = greedy_from(speaker, speaker.prompt("你好"), [], 12)
    assert shown() == [pytest.approx(p[token].item(), rel=1e-3) for p in (changed, plain)]
    best = [i for i in changed.topk(50).indices.tolist() if i not in speaker.banned][:10]
    wanted = [f"{percent(plain[i].item())} → {percent(changed[i].item())}" for i in best]
    words = tab.locator("#next > :nth-child(3n)").all_inner_texts()
    assert [text.partition("　")[0] for text in words[:10]] == wanted
    assert tab.evaluate("document.activeElement.dataset.part") == "2.2"  # 键盘还在这个开关上
    click(tab, "重写一遍")
    assert answer_ids(tab) == again != first
    note = tab.locator(".message").inner_text()
    assert "写的时候关着 2.2" in note and "原来写的是" in note
    click(tab, "全部恢复")
    assert tab.evaluate("now.former") is None
    ids, token = [*speaker.prompt("你好"), *again[:3]], again[3]
    tab.locator("#other-text").fill("再见")
    tab.locator("#layer").select_option("3")
    click(tab, "搬过来")
    vector = look(speaker.model, speaker.prompt("再见")).residual[3, -1]
    with patched(speaker.model, 3, len(ids) - 1, vector):
        assert shown()[0] == pytest.approx(speaker.read(ids)[-1, token].item(), rel=1e-3)
    click(tab, "搬回去")
    assert shown() == [pytest.approx(speaker.read(ids)[-1, token].item(), rel=1e-3), None]


def test_experts_can_be_switched_off_in_every_layer(opened):
    speaker = speaker_of(EXPERTS, "sft")
    tab = opened(speaker)
    tab.evaluate("INFO.sampling.max = 8")
    set_knob(tab, "temp", 0)
    say(tab, "你好")
    touch(tab, 0, 2)
    ids, token = [*speaker.prompt("你好"), *answer_ids(tab)[:2]], answer_ids(tab)[2]
    for layer in (0, 2):
        tab.locator("#heads button").nth(4 * layer).click()
        expert = look(speaker.model, ids).experts[layer, -1].argmax().item() + 1
        click(tab, f"关掉第 {layer + 1} 层 {expert} 号专家")
        with without(speaker.model, [f"{layer + 1}.expert{expert}"]):
            p = speaker.read(ids)[-1, token].item()
        assert tab.evaluate("now.seen.target_p") == pytest.approx(p, rel=1e-3)
        click(tab, f"恢复第 {layer + 1} 层 {expert} 号专家")
    tab.close()


def test_only_a_keyboard_and_the_dark(opened):
    """只会接着写的模型，只用键盘走一遍：自己打的字也看得见多意外；深色的底。"""
    speaker = speaker_of(SHAPE, "pretrain")
    tab = opened(speaker, color_scheme="dark")
    tab.evaluate("INFO.sampling.max = 8")
    set_knob(tab, "temp", 0)
    set_knob(tab, "penalty", 1.3)
    say(tab, "春天来了")
    ids, given = answer_ids(tab), TOKENIZER.encode("春天来了")
    assert ids == given + greedy_from(speaker, [TOKENIZER.bos_id, *given], [], 8)
    p = speaker.read([TOKENIZER.bos_id, *ids])[1, ids[1]].item()
    assert tab.evaluate("answers[0].tokens[1].p") == pytest.approx(p, rel=1e-3)
    tab.locator(".t").first.focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        tab.keyboard.press(key)
    done(tab)
    assert "第 3 个词元「来」" in tab.locator("#title").inner_text()
    assert tab.evaluate("document.activeElement.id") == "title"
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # 下一个
    done(tab)
    assert "第 4 个词元「了」" in tab.locator("#title").inner_text()
    assert tab.evaluate("document.activeElement.id") == "next-token"
    touch(tab, 0, len(ids) - 1)
    click(tab, "合上")
    click(tab, "重写一遍")  # 框着的那个没有了，Tab 仍然走得进这一行
    assert tab.locator(".answer .t[tabindex='0']").count() == 1
    say(tab, "守株")  # 各是各的：改前一篇，后一篇还在
    touch(tab, 0, 1)
    tab.locator("#other-token").fill("虎")
    click(tab, "只换这个词元")
    assert tab.locator(".message").count() == 2
    assert tab.locator(".answer").first.locator(".t[tabindex='0']").count() == 1
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", paper))) < 150
    tab.close()


def test_going_on_past_the_limit(opened):
    """空着按回车，接着写：写满一次的、写满上下文的，都接得下去，只看末尾的四分之三。"""
    speaker = speaker_of(SHAPE, "pretrain")
    tab = opened(speaker)
    tab.evaluate("INFO.sampling.max = 30")
    set_knob(tab, "temp", 1.5)
    set_knob(tab, "top_k", 200)
    say(tab, "春天")
    keep = SHAPE.max_len * 3 // 4 - 1
    tab.evaluate(
        "() => { window.asked = []; const real = job; job = (name, more, heard) => {"
        " asked.push([name, more]); return real(name, more, heard); }; }"
    )
    for _ in range(4):
        n = len(answer_ids(tab))
        say(tab, "")
    ids = answer_ids(tab)
    assert len(ids) > SHAPE.max_len and len(ids) > n
    last = tab.evaluate("answers[0].tokens.at(-1)")
    assert (last["from"], last["since"]) == (n - keep, n)
    name, sent = tab.evaluate("asked.at(-1)")
    assert name == "write" and sent["ids"] == [TOKENIZER.bos_id, *ids[n - keep : n]]
    assert sent["written"] == []  # 这一次自己还没有写；下面，写最后一个之前写过的
    assert tab.evaluate("before(answers[0], answers[0].tokens.length - 1).written") == ids[n:-1]
    p = speaker.read([TOKENIZER.bos_id, *ids[n - keep : -1]])[-1, ids[-1]].item()
    assert last["p"] == pytest.approx(p, rel=1e-3)
    touch(tab, 0, len(ids) - 1)
    assert tab.evaluate("now.seen.target_p") == pytest.approx(p, rel=1e-3)
    assert f"只看得到最后 {keep} 个" in tab.locator(".message").inner_text()
    say(tab, "长" * 90)
    assert f"前文 90 个词元，只看得到最后 {keep} 个" in tab.locator(".message").last.inner_text()
    tab.close()


def test_stopping_before_the_first_token(chat):
    """还在读的时候叫停，一个字也不写；之后还能接着问。"""
    tab, speaker = chat
    say(tab, "你好")
    tab.evaluate("() => { ask('再见'); $('stop').click(); }")
    done(tab)
    assert tab.locator(".message").count() == 2 and answer_ids(tab) == []
    assert "已停止" in tab.locator(".message").last.inner_text()
    say(tab, "还在吗")
    begin = [*speaker.prompt("你好"), *answer_ids(tab, 0), TOKENIZER.eos_id]
    assert tab.evaluate("answers[2].start") == begin + speaker.prompt("还在吗")


def test_a_dead_model_is_said_and_the_page_lives(chat):
    """worker 出了错：说一声，按钮不会永远按不动。"""
    tab, _ = chat
    tab.evaluate("worker.onerror()")
    say(tab, "你好")
    tab.evaluate("() => { work('x', async () => { throw new Error('坏了'); }); }")
    done(tab)
    assert tab.locator("#status").inner_text() == "坏了"
    tab.evaluate("() => { work('x', () => job('look', {ids: []})); }")
    done(tab)
    assert tab.locator("#send").get_attribute("aria-disabled") == "false"


def test_what_a_model_says_is_only_text(opened):
    """写着标签、控制词元的话，照样是文字。"""
    speaker = speaker_of(SHAPE, "sft")
    tab = opened(speaker)
    words = "<img src=x onerror=alert(1)></script><|im_end|>"
    say(tab, words)
    assert tab.locator(".said").inner_text() == words
    assert tab.evaluate("answers[0].question") == TOKENIZER.turn_ids(
        "user", TOKENIZER.encode(words)
    )
    assert tab.locator("#messages img").count() == 0
    tab.close()


def test_nothing_may_leave(small, browser):
    """页面自己也取不到外面的东西：内容安全策略拦下。"""
    tab = browser.new_page()
    tab.goto(small[0].url)
    blocked = tab.evaluate(
        """async () => { const said = [];
        document.addEventListener("securitypolicyviolation", e => said.push(e.effectiveDirective));
        const image = new Image();
        image.src = "http://127.0.0.1:9/x.png"; document.body.append(image);
        await fetch("http://127.0.0.1:9/").catch(() => 0);
        await new Promise(resolve => setTimeout(resolve, 50));
        image.remove(); return said.sort(); }"""
    )
    assert blocked == ["connect-src", "img-src"]


# ---------- 5. 命令 ----------


def test_the_command(trained, tmp_path, monkeypatch):
    """照 README 的命令：写好，说多大；已经有的不悄悄盖掉。"""
    folder, *_ = trained
    target = tmp_path / "model.html"
    out, _ = run(
        folder, "tools.page", "out/tiny/sft.pt", str(target), "--title", "甲<乙/*WEIGHTS*/"
    )
    whole = target.read_text(encoding="utf-8")
    assert "写好" in out and target.stat().st_size < 9e6
    shown = "甲&lt;乙/&#42;WEIGHTS&#42;/"
    assert f"<title>{shown}</title>" in whole and f"<h1>{shown}</h1>" in whole
    assert not re.findall(r"(src|href)=\"?(https?:|//)", whole)
    _, err = run(folder, "tools.page", "out/tiny/sft.pt", str(target), code=2)
    assert "--overwrite" in err and err.count("\n") == 1
    run(folder, "tools.page", "out/tiny/sft.pt", str(target), "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mock.Mock(side_effect=KeyboardInterrupt))
        run(folder, "tools.page", "out/tiny/sft.pt", str(tmp_path / "other.html"), code=130)
    assert [p.name for p in tmp_path.iterdir()] == ["model.html"]


def test_a_model_not_yet_measured(monkeypatch):
    """还没有检验过的、从别处带回来的，不写损失。"""
    speaker = speaker_of(SHAPE)
    early = {"progress": {"step": 3, "val_loss": math.inf}, "optimizers": ["有"]}
    words = build.about(speaker, early, exact=True)
    assert "练了 3 步，还没有检验过。" in words and "inf" not in words
    words = build.about(speaker, early | {"optimizers": []}, exact=True)
    assert "练了" not in words


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "要先写检查点与网页的路径"),
        (["a.pt"], "要先写检查点与网页的路径"),
        (["没有.pt", "a.html"], "没有.pt"),
        (["a.pt", "a.pt"], "以 .html 结尾"),
        (["a.pt", "a.html", "--titel", "x"], "最接近的是 --title"),
    ],
)
def test_mistakes_are_one_sentence(argv, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        main(argv)
    assert "\n" not in str(error.value)


def test_the_checkpoint_is_what_is_shown(trained, opened):
    """从检查点读出来的真的模型：网页里的打分就是它的。"""
    folder, *_ = trained
    model, config, checkpoint = load(folder / "out/tiny/sft.pt", TOKENIZER)
    speaker = make_speaker(model.eval(), config, TOKENIZER, "sft")
    tab = opened(speaker, exact=False, said=checkpoint)
    ids = speaker.prompt("画蛇添足是什么意思？")
    with torch.inference_mode():
        ours = as_shown(model)(torch.tensor([ids]))[0][:, LOOKED]
    assert (scores(tab, ids) - ours).abs().max() < 1e-3
    assert f"{checkpoint['progress']['val_loss']:.3f}" in tab.locator("#about").inner_text()
    # 写到一半叫停：写出的留着
    for name, value in (("temp", 2), ("top_k", 200), ("top_p", 1)):
        set_knob(tab, name, value)
    tab.evaluate(
        "() => { const real = show; show = (answer, token) => {"
        " real(answer, token); if (answer.tokens.length === 2) $('stop').click(); }; }"
    )
    for _ in range(5):  # 头两个就写完了的，再问
        say(tab, "你好")
        if len(answer_ids(tab)) >= 2:
            break
    assert "已停止" in tab.locator(".message").last.inner_text()
    assert 2 <= len(answer_ids(tab)) < 60
    tab.close()


TRY = REPO / "docs" / "try.html"


def test_the_page_in_docs_talks(browser):
    """README 开头的那一张：不到 9 MB，打开就会答，一次也不联网。"""
    assert TRY.stat().st_size < 9e6
    asked = []
    tab = browser.new_page()
    tab.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    tab.goto(TRY.as_uri())
    tab.locator("#send[aria-disabled=false]").wait_for()
    set_knob(tab, "temp", 0)
    say(tab, "你好")
    assert tab.locator(".answer").inner_text() == "你好！我是 mini-llm，想问哪个成语？"
    assert set(asked) == {"file", "blob"}
    tab.close()
