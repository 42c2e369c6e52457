"""带得走的网页：在真的浏览器里，与 PyTorch 的模型、分词器、采样逐项相同。"""

import itertools
import math
import random
import re

import pytest
import torch
from scripts import run

from config import N_TOKENS, PRESETS, Config, UserError
from corpus.idioms import dictionary_file, read_documents
from corpus.log import ReadLog
from engine.checkpoint import load
from generate import Sampling, adjust, is_looping, make_speaker, probabilities
from microscope import look, patched, without
from model import Transformer
from settings.resolve import load_config
from tokenizer import CONTROL_TOKENS, TEXT_TOKENS, Tokenizer
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
    asked, errors, pages = [], [], []

    def show(speaker, exact=True, said=SAID, **more):
        path = folder / f"{len(pages)}.html"
        path.write_text(page(speaker, said, "模型", exact), encoding="utf-8")
        tab = browser.new_page(**more)
        pages.append(tab)
        tab.set_default_timeout(20_000)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        tab.goto(f"file://{path}")
        tab.locator("#send:not([disabled])").wait_for()
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
    return torch.tensor(tab.evaluate(
        "async ([ids, off, looked]) =>"
        " (await job('logits', {ids, off})).map(row => looked.map(i => row[i]))",
        [ids, list(off), LOOKED],
    ))  # fmt: skip


def write(tab, ids, **sampling):
    """从 ids 往下写，返回 (编号, 为什么停下)。"""
    settings = vars(Sampling(**sampling))
    return tab.evaluate(
        """async ([ids, sampling]) => { const new_ids = [];
        const {why} = await job('write', {ids, sampling, off: []}, token => new_ids.push(token.id));
        return [new_ids, why]; }""",
        [ids, settings],
    )


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
    assert new == list(speaker.generate(ids[:12], Sampling(**greedy)))
    assert len(new) == 64 and why == "写满了 64 个词元"
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


def test_sizes():
    """tiny 不到 9 MB，wide 不到 55 MB；fp32 的四倍大。"""
    for preset, most in [("tiny", 9e6), ("wide", 55e6)]:
        with torch.device("meta"):
            n = sum(p.numel() for p in Transformer(Config(**PRESETS[preset])).parameters())
        assert n * 4 / 3 + 600_000 < most
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
    theirs = tab.evaluate("texts => Promise.all(texts.map(text => job('encode', {text})))", texts)
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
    for seed in range(12):
        logits = 4 * torch.randn(21146, generator=torch.Generator().manual_seed(seed))
        written = [noise.randrange(21146) for _ in range(20)] + [logits.argmax().item()]
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
            [logits.tolist(), written, vars(settings), speaker.banned.tolist()],
        )
        seen, banned = torch.tensor(written), speaker.banned[speaker.banned < 21146]
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
        cases.append(some_ids(noise.randrange(5)) + unit * noise.randrange(1, 9))
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


@pytest.fixture
def chat(opened):
    """一个小模型的网页，手机那么宽；打分拉开些，抽签才有得抽。"""
    speaker = speaker_of(SHAPE, "sft")
    speaker.model.norm.weight.data *= 3
    tab = opened(speaker, viewport={"width": 360, "height": 740})
    yield tab, speaker
    tab.close()


def set_knob(tab, name, value):
    tab.evaluate(
        "([n, v]) => { $(n).value = v; $(n).dispatchEvent(new Event('input'));"
        " $(n).dispatchEvent(new Event('change')); }",
        [name, value],
    )


def say(tab, text):
    """说一句话，等它写完。"""
    tab.locator("#text").fill(text)
    tab.keyboard.press("Enter")
    tab.locator("#stop[disabled]").wait_for()
    tab.locator("#status").filter(has_text=re.compile("写了|^$")).wait_for()


def answer_ids(tab, n=-1):
    return tab.evaluate("n => answers.at(n).tokens.map(t => t.id)", n)


def test_talking_and_looking(chat):
    """说话，点一个词元，换一个走，再问一句；手机上不横着滚，按得到的都有名字。"""
    tab, speaker = chat
    set_knob(tab, "temp", 0)
    say(tab, "你好")
    first = list(speaker.generate(speaker.prompt("你好"), Sampling(temp=0, penalty=1.3, max=400)))
    shown = answer_ids(tab)
    assert shown == first[: len(shown)] and len(shown) > 10  # 网页在反复时停下
    tab.locator(".t").nth(4).click()
    tab.locator("#inside").wait_for()
    probs = speaker.read([*speaker.prompt("你好"), *first[:4]])[-1]
    assert f"概率是 {percent_of(probs[first[4]].item())}" in tab.locator("#target").inner_text()
    assert tab.locator("#next button").count() in (10, 11)
    # 换成第二可能的，从那里接着写
    second = probs.topk(2).indices.tolist()[1]
    tab.locator("#next button").nth(1).click()
    tab.locator("#stop[disabled]").wait_for()
    taken = answer_ids(tab)
    assert taken[:5] == [*first[:4], second]
    start = [*speaker.prompt("你好"), *taken[:5]]
    penalized = greedy_from(speaker, start, taken[:5], len(taken) - 5)
    assert taken[5:] == penalized
    say(tab, "再见")
    assert tab.locator(".message").count() == 2
    history = tab.evaluate("answers.at(-1).start")
    begin = [*speaker.prompt("你好"), *taken, TOKENIZER.eos_id]
    if len(begin) < SHAPE.max_len // 2:
        assert history[: len(begin)] == begin
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    unnamed = tab.evaluate(
        "[...document.querySelectorAll('button, input, textarea, select, [role=button]')]"
        ".filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []


def percent_of(p):
    from chat.display import percent

    return percent(p)


def greedy_from(speaker, ids, written, n):
    """已经写了 written，接着总选最可能的 n 个。"""
    ids, written = list(ids), list(written)
    for _ in range(n):
        logits = speaker.model(torch.tensor([ids]))[0, -1]
        token = adjust(
            logits, torch.tensor(written), Sampling(penalty=1.3), speaker.banned
        ).argmax()
        ids.append(token.item())
        written.append(token.item())
    return ids[len(ids) - n :] if n else []


def test_the_bars_move_while_dragging(chat):
    """拖动温度：抽签的概率当场变，模型给的不变。"""
    tab, _ = chat
    say(tab, "你好")
    tab.locator(".t").first.click()
    tab.locator("#inside").wait_for()
    texts = []
    for temp in (0.3, 1, 2):
        set_knob(tab, "temp", temp)
        texts.append(tab.locator("#next").inner_text())
    assert len(set(texts)) == 3
    chosen = [re.findall(r"^([\d.<]+%)", line) for text in texts for line in text.split("\n")]
    assert [c for c in chosen[: len(chosen) // 3] if c] == [
        c for c in chosen[len(chosen) // 3 : 2 * len(chosen) // 3] if c
    ]


def test_switching_off_and_carrying_over(chat):
    """关掉一个头：概率变成直接算的那样；恢复之后变回来；搬一个向量、只换一个词元也是。"""
    tab, speaker = chat
    set_knob(tab, "temp", 0)
    say(tab, "你好")
    tab.locator(".t").nth(3).click()
    tab.locator("#inside").wait_for()
    ids, token = [*speaker.prompt("你好"), *answer_ids(tab)[:3]], answer_ids(tab)[3]

    def shown():
        return tab.evaluate("[now.seen.target_p, now.before?.target_p ?? null]")

    plain = speaker.read(ids)[-1, token].item()
    assert shown() == [pytest.approx(plain, rel=1e-3), None]
    tab.locator("#heads button").nth(5).click()  # 第 2 层第 2 头
    tab.get_by_role("button", name="关掉第 2 层第 2 头").click()
    tab.get_by_role("button", name="恢复第 2 层第 2 头").wait_for()
    with without(speaker.model, ["2.2"]):
        changed = speaker.read(ids)[-1, token].item()
    assert shown() == [pytest.approx(changed, rel=1e-3), pytest.approx(plain, rel=1e-3)]
    assert "2.2" in tab.locator("#off").inner_text()
    tab.locator("#again").click()  # 就这样重答一遍
    tab.locator("#stop[disabled]").wait_for()
    with without(speaker.model, ["2.2"]):
        again = list(speaker.generate(speaker.prompt("你好"), Sampling(temp=0, penalty=1.3, max=8)))
    assert answer_ids(tab)[:8] == again[: len(answer_ids(tab))]
    tab.locator("#restore").click()
    tab.locator("#hands").wait_for(state="hidden")
    tab.locator(".t").nth(2).click()
    ids, token = [*speaker.prompt("你好"), *answer_ids(tab)[:2]], answer_ids(tab)[2]
    tab.locator("#other-text").fill("再见")
    tab.locator("#layer").select_option("3")
    tab.get_by_role("button", name="搬过来").click()
    tab.locator("#unpatch:not([disabled])").wait_for()
    vector = look(speaker.model, speaker.prompt("再见")).residual[3, -1]
    with patched(speaker.model, 3, len(ids) - 1, vector):
        assert shown()[0] == pytest.approx(speaker.read(ids)[-1, token].item(), rel=1e-3)
    tab.locator("#unpatch").click()
    tab.locator("#unpatch[disabled]").wait_for()
    rest = answer_ids(tab)[3:]
    tab.locator("#other-token").fill("虎")
    tab.get_by_role("button", name="只换这个词元").click()
    tab.locator("#title").filter(has_text="虎").wait_for()
    tiger = TOKENIZER.encode("虎")[0]
    assert answer_ids(tab)[2:] == [tiger, *rest]
    p = speaker.read([*ids, tiger])[-1, rest[0]].item()
    assert tab.evaluate("answers[0].tokens[3].p") == pytest.approx(p, rel=1e-3)


def test_only_a_keyboard_and_the_dark(opened):
    """只用键盘走一遍；深色的底上也有对比。"""
    speaker = speaker_of(SHAPE, "pretrain")
    tab = opened(speaker, color_scheme="dark")
    tab.keyboard.type("春天来了")
    tab.keyboard.press("Enter")
    tab.locator("#status").filter(has_text="写了").wait_for()
    ids = answer_ids(tab)
    assert ids[:4] == TOKENIZER.encode("春天来了") and len(ids) > 4
    p = speaker.read([TOKENIZER.bos_id, *ids])[1, ids[1]].item()
    assert tab.evaluate("answers[0].tokens[1].p") == pytest.approx(
        p, rel=1e-3
    )  # 自己打的字也看得见多意外
    tab.locator(".t").first.focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        tab.keyboard.press(key)
    tab.locator("#title").filter(has_text="第 3 个词元「来」").wait_for()
    assert tab.evaluate("document.activeElement.id") == "title"
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", paper))) < 150
    tab.close()


def test_stopping(chat):
    """写到一半叫停：停下，写出的留着，还能接着问。"""
    tab, _ = chat
    tab.evaluate("INFO.sampling.max = 100000")
    set_knob(tab, "temp", 2)
    set_knob(tab, "top_k", 200)
    tab.evaluate(
        "() => { const real = show;"
        " show = (a, t) => { real(a, t); if (a.tokens.length === 5) $('stop').click(); }; }"
    )
    tab.locator("#text").fill("你好")
    tab.keyboard.press("Enter")
    tab.get_by_text("已停止").or_(tab.get_by_text("上下文")).first.wait_for()
    assert tab.locator(".t").count() >= 5


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


def test_the_command(trained, tmp_path):
    """照 README 的命令：写好，说多大；已经有的不悄悄盖掉。"""
    folder, *_ = trained
    target = tmp_path / "model.html"
    out, _ = run(folder, "tools.page", "out/tiny/sft.pt", str(target), "--title", "甲<乙")
    whole = target.read_text(encoding="utf-8")
    assert "写好" in out and target.stat().st_size < 9e6
    assert "<title>甲&lt;乙</title>" in whole and "检验" not in whole[:500]
    assert not re.findall(r"(src|href)=\"?(https?:|//)", whole)
    _, err = run(folder, "tools.page", "out/tiny/sft.pt", str(target), code=2)
    assert "--overwrite" in err and err.count("\n") == 1
    run(folder, "tools.page", "out/tiny/sft.pt", str(target), "--overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["model.html"]


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
    tab.close()
