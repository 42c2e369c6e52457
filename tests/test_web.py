"""网页：在真的浏览器里走一遍；背后的每个数与直接计算相同。

浏览器是系统里的 chromium（Debian 的 chromium 包），由 Playwright 驱动；不让它联网。
"""

import contextlib
import functools
import http.client
import http.server
import json
import os
import re
import shutil
import socket
import threading
import time
from dataclasses import replace

import pytest
import torch
from chromium import CHROMIUM, QUIET
from scripts import Running, run

from chat.display import bits, percent
from config import Config, UserError
from generate import Sampling, make_speaker
from microscope import leave_one_out, look
from model import Transformer
from tokenizer import Tokenizer
from tools.explain.facts import examine
from tools.explain.page import page as explain_page
from tools.web import actions

TOKENIZER = Tokenizer()
# 像网页的，像公式的，像 Gradio 的模板的，控制终端的。
MARKUP = "<img src=x onerror=alert(1)>$$x^2$$ ${1+1} {{value}}\x1b[2J"
SHAPE = Config(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=32, max_len=80)


# ---------- 1. 背后的函数 ----------


@pytest.fixture(scope="module", params=["sft", "pretrain"])
def speaker(request):
    """没训练过、但每层都真的做事的小模型。"""
    torch.manual_seed(0)
    model = Transformer(SHAPE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.norm.weight.data *= 10  # 打分拉开些，概率才不都小到写成 <0.1%
    return make_speaker(model, SHAPE, TOKENIZER, request.param)


def last(iterator):
    """走到底，返回最后一个。"""
    *_, final = iterator
    return final


def test_the_page_answers_like_the_chat(speaker):
    """同样的种子，网页写的与聊天程序写的相同；缓存各用各的。"""
    sampling = Sampling(seed=5, max=12)
    turns, ids, new, _ = last(actions.reply(speaker, [], "守株待兔", sampling))
    assert ids == speaker.prompt("守株待兔")
    assert new == list(speaker.generate(ids, sampling))
    if speaker.stage == "sft":
        assert turns[-1] == TOKENIZER.turn_ids("assistant", new)
        _, again, *_ = last(actions.reply(speaker, turns, "你好", sampling))
        assert again == [
            *ids[: -len(TOKENIZER.reply_prefix())],
            *turns[-1],
            *speaker.prompt("你好"),
        ]


def test_two_visitors_do_not_mix(speaker):
    """两个人交替着写，与各写各的相同；旁边还有人在看显微镜。"""
    sampling = Sampling(seed=3, max=60)
    alone = [last(actions.reply(speaker, [], text, sampling)) for text in ("守株待兔", "画蛇添足")]
    together: dict[str, tuple] = {}
    ids = speaker.prompt("守株待兔")
    page = actions.microscope(speaker, ids)

    def visit(text):
        together[text] = last(actions.reply(speaker, [], text, sampling))

    threads = [threading.Thread(target=visit, args=[text]) for text in ("守株待兔", "画蛇添足")]
    for thread in threads:
        thread.start()
    pages = []
    while any(thread.is_alive() for thread in threads):
        pages.append(actions.microscope(speaker, ids))
    assert [together["守株待兔"], together["画蛇添足"]] == alone
    assert {*pages} == {page}


@pytest.mark.parametrize("text", ["", "  \n", "字" * 10_000])
def test_what_cannot_be_answered_is_one_sentence(speaker, text):
    with pytest.raises(UserError, match=r"请先写点什么|请说短一些|请短一些|放不下"):
        last(actions.reply(speaker, [], text, Sampling()))
    if text.strip():
        with pytest.raises(UserError, match=r"请短一些|放不下"):
            last(actions.answer_html(speaker, text, Sampling()))


def test_candidates_are_the_models(speaker):
    ids = speaker.prompt("守株待兔")
    probs = speaker.model(torch.tensor([ids]))[0, -1].softmax(-1)
    found = actions.candidates(speaker, ids, len(ids), Sampling(temp=0), 10)
    assert [p for _, _, p, _ in found] == pytest.approx(probs.topk(10).values.tolist(), rel=1e-4)


def test_drawing_step_by_step_is_the_lottery_shown(speaker):
    """一步一步地抽：抽中的就是写着 100% 的，与一口气写的相同；重复惩罚也在。"""
    sampling, ids = Sampling(temp=0, penalty=5, max=12), speaker.prompt("守株待兔")
    start, straight = len(ids), [c.token for c in speaker.choices(ids, sampling)]
    for _ in straight:
        found = actions.candidates(speaker, ids, start, sampling, SHAPE.vocab_size)
        (sure,) = [token for token, _, _, q in found if q == 1]
        ids = [*ids, actions.draw(speaker, ids, start, sampling)]
        assert ids[-1] == sure
    assert ids[start:] == straight


def test_a_fixed_seed_is_not_the_same_number_every_step(speaker):
    ids = speaker.prompt("守株待兔")
    sampling, start = Sampling(temp=10, top_k=0, top_p=1, penalty=1, seed=7), len(ids)
    drawn = [actions.draw(speaker, [*ids, *[5] * n], start, sampling) for n in range(8)]
    assert len(set(drawn)) > 4
    assert drawn[0] == actions.draw(speaker, ids, start, sampling)


def test_what_was_said_before_a_stop_is_remembered(speaker):
    """停在半途，写了一半的回答也是前文；一问一答不乱。"""
    steps = actions.reply(speaker, [], "守株待兔", Sampling(seed=5, max=12))
    *_, (turns, _, new, _) = [next(steps) for _ in range(3)]
    if speaker.stage == "sft":
        assert turns[1:] == [TOKENIZER.turn_ids("assistant", new)]
    else:
        assert turns == []


def test_forgetting_is_said(speaker):
    turns = [TOKENIZER.turn_ids(role, [5] * 12) for role in ("user", "assistant") * 2]
    notices = [n for *_, n in actions.reply(speaker, turns, "守株待兔", Sampling(max=3))]
    assert all("忘掉了最早的" in n for n in notices) == (speaker.stage == "sft")


def test_the_percent_under_a_token_is_its_own(speaker):
    """写出来的每个词元下面，是看着前文时它的概率；比较里的平均意外也由它们算出。"""
    sampling = Sampling(seed=5, max=12)
    start = len(speaker.prompt("守株待兔"))
    _, ids, new, _ = last(actions.reply(speaker, [], "守株待兔", sampling))
    probs = speaker.model(torch.tensor([[*ids, *new]]))[0].softmax(-1)
    chosen = [probs[start - 1 + i, token].item() for i, token in enumerate(new)]
    shown = actions.tokens_html(speaker, [*ids, *new], start)
    assert re.findall(r"<small>(.*?)</small>", shown) == [percent(p) for p in chosen]
    mean = sum(map(bits, chosen)) / len(chosen)
    assert f"平均每个词元意外 {mean:.1f} 比特" in last(
        actions.answer_html(speaker, "守株待兔", sampling)
    )


def test_html_escapes_what_the_model_writes(speaker):
    ids = [*speaker.prompt("x"), *TOKENIZER.encode("<b>&")]
    shown = actions.tokens_html(speaker, ids, len(ids) - 3)
    assert "<b>" not in shown and "&lt;" in shown and "&amp;" in shown
    assert actions.microscope(speaker, ids).count("<iframe") == 1
    assert actions.microscope(speaker, []) == ""


def test_records_and_checkpoints_are_found(trained):
    folder, *_ = trained
    found = actions.checkpoints(folder / "out")
    assert [p.rpartition("/")[2] for p in found] == ["sft.pt", "pretrain.pt"]
    (pretrain, _sft) = actions.runs(folder / "out")
    points, samples, _problem = actions.curves(pretrain)
    assert {p["哪一种"] for p in points} == {"训练", "检验"}
    assert samples[0][0] == 0 and samples[-1][0] == 16
    assert actions.curves(None) == ([], [], "")


def test_a_new_training_is_noticed(trained, tmp_path):
    folder, *_ = trained
    path = tmp_path / "sft.pt"
    shutil.copy(folder / "out/tiny/sft.pt", path)
    first = actions.open_model(str(path))
    assert actions.open_model(str(path)) is first
    shutil.copy(folder / "out/tiny/pretrain.pt", path)
    assert actions.open_model(str(path)).stage == "pretrain"
    path.unlink()
    with pytest.raises(UserError, match="请刷新这一页"):
        actions.open_model(str(path))
    with pytest.raises(UserError, match="还没有模型"):
        actions.open_model(None)


# ---------- 2. 命令行 ----------


def test_mistakes_are_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for args, sentence in [
            (["--port", port], "请用 --port"),
            (["--port", "0"], "port 要在"),
            (["--host", "不是地址"], "请用 --port 或 --host"),
            (["--checkpoint", "没有.pt"], "没有.pt"),
            (["--prot", "1"], "最接近的是 --port"),
        ]:
            _, err = run(tmp_path, "tools.web", *args, code=2)
            assert sentence in err and err.count("\n") == 1


# ---------- 3. 真的浏览器 ----------


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    """一个开着的网页。"""
    pytest.importorskip("gradio", reason="没有安装 requirements-web.txt")
    folder, *_ = trained
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("web")
    out, temporary = log / "out", log / "tmp"
    shutil.copytree(folder / "out", out, copy_function=os.link)
    temporary.mkdir()
    record = out / f"zz{MARKUP}" / "metrics.jsonl"
    record.parent.mkdir()
    row = {"step": 0, "tokens": 1, "train_loss": 2.0, "val_loss": 2.0, "sample": MARKUP}
    record.write_text(json.dumps(row) + "\n", encoding="utf-8")
    server = Running(
        log, "tools.web", "--port", str(port), "--out_dir", str(out),
        env={"TMPDIR": str(temporary)},
    )  # fmt: skip
    assert server.until(lambda: "网页开在" in server.text()), server.text()
    yield f"http://127.0.0.1:{port}"
    assert server.end(15) == 143
    assert "Traceback" not in server.text() and "网页答不了" not in server.text()
    left = [p.name for p in temporary.iterdir() if "torch" not in p.name]
    assert left == []  # 什么也没有留下


@pytest.fixture
def visit(browser, address):
    """打开页面；结束时核对没有向外联网，页面里没有程序出错。"""
    outside, errors, contexts = [], [], []

    def open_page(**more):
        context = browser.new_context(**more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)

        def local_only(route):
            if route.request.url.startswith((address, "data:", "blob:")):
                route.continue_()
            else:
                outside.append(route.request.url)
                route.abort()

        page.route("**/*", local_only)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_function("document.querySelector('input[aria-label=\"模型\"]')?.value")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert outside == [] and errors == []


def say(page, text):
    """说一句话。"""
    page.get_by_label("你说").fill(text)
    page.get_by_role("button", name="发送").click()


def sampling(page, **values):
    """打开采样的抽屉，改几个数。"""
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_role("button", name="采样").click()
    for name, value in values.items():
        box = panel.get_by_label(name if name == "seed" else f"number input for {name}")
        for _ in range(20):  # 页面刚打开时，Gradio 会把初值再写一遍
            box.fill(f"{value:g}")
            box.press("Tab")
            page.wait_for_timeout(150)
            if float(box.input_value()) == value:
                break


WILD = dict(temp=10.0, top_k=0, top_p=1.0, max=400, penalty=1.0)


def be_talkative(page, seed):
    """让回答又长又乱，够时间停下它。"""
    sampling(page, **WILD, seed=seed)


@functools.cache
def talkative_seed(folder, *texts):
    """一个对这几句话都不会早早写完的种子。

    打开页面之前就要算好：浏览器的请求都经过这个进程（`local_only`），它忙着算，页面就断了线。
    """
    speaker = actions.open_model(str(folder / "out/tiny/sft.pt"))

    def length(seed, text):
        return len(list(speaker.generate(speaker.prompt(text), Sampling(**WILD, seed=seed))))

    return next(s for s in range(1, 99) if all(length(s, text) == 400 for text in texts))


def microscope_of(page):
    """显微镜里的页面。"""
    page.locator("iframe[title^=显微镜]").wait_for()
    return page.frame_locator("iframe[title^=显微镜]")


def test_a_chat_and_its_microscope(visit):
    page = visit()
    sampling(page, temp=0, max=5)
    say(page, "守株待兔")
    lens = microscope_of(page)
    lens.locator("#tokens button").nth(7).wait_for()
    before = lens.locator("#cell").inner_text()
    assert re.match(r"第 4 层第 1 头：第 \d+ 个「.+」看第 \d+ 个「.+」，占 [\d.<]+%。", before)
    lens.get_by_role("button", name="第 1 层第 2 头").click()
    assert lens.locator("#cell").inner_text().startswith("第 1 层第 2 头")
    lens.locator("#map").focus()
    page.keyboard.press("ArrowUp")  # 换到上一个词元：所有的图跟着变
    assert lens.locator("#tokens [aria-pressed=true]").count() == 1
    assert "它猜下一个是" in lens.locator("#next-title").inner_text()
    start, size = lens.locator("#map").evaluate("[margin, size]")
    lens.locator("#map").hover(position={"x": start + size / 2, "y": start + size / 2})
    # 左上角那一格：第一个词元只能看自己
    assert "占 100.0%" in lens.locator("#cell").inner_text()
    page.get_by_role("button", name="重新开始").click()
    page.get_by_text("先说一句话。").wait_for()


def test_the_page_shows_the_numbers_of_the_model(visit, trained):
    """网页上读得到的每个数，与直接算的相同：注意力的每一格、去掉一个词元、残差流、概率。"""
    page = visit()
    sampling(page, temp=0, max=5)
    say(page, "守株待兔")
    lens = microscope_of(page)
    body = lens.locator("body")
    facts = body.evaluate("({ids: F.ids, at: at, targets: F.targets})")
    folder, *_ = trained
    model = actions.open_model(str(folder / "out/tiny/sft.pt")).model
    ids, at = facts["ids"], facts["at"]
    view, n = look(model, ids), len(ids)
    shown = body.evaluate(
        """[...Array(L).keys()].map(l => [...Array(H).keys()].map(h =>
            F.ids.map((_, i) => F.ids.map((_, j) => weight(l, h, i, j)))))"""
    )
    assert torch.allclose(torch.tensor(shown), view.attention, atol=1e-5)
    target = view.logits[-1].argmax().item()
    without = leave_one_out(model, ids, [*ids[1:], target]).exp()[:, at].tolist()
    words = lens.locator("#without > :nth-child(3n)").all_inner_texts()
    assert [w.split("　")[0] for w in words] == [percent(p) for p in without]
    bars = lens.locator("#without i")
    smaller = [p < view.logits[-1].softmax(-1)[target] for p in without]
    classes = bars.evaluate_all("all => all.map(e => e.className)")
    assert [c == "less" for c in classes] == smaller
    moved = [abs(bits(p) - bits(q)) for p in [view.logits[-1].softmax(-1)[target].item()]
             for q in without]  # fmt: skip
    widths = bars.evaluate_all("all => all.map(e => parseFloat(e.style.width))")
    assert widths == pytest.approx([100 * m / max(1, *moved) for m in moved], abs=0.1)
    norms = lens.locator("#norms > :nth-child(3n)").all_inner_texts()
    lengths = view.residual.norm(dim=-1)[:, at].tolist()
    shown = [float(w.split("　")[0]) for w in norms]
    assert shown == pytest.approx(lengths, abs=0.006)  # 写到两位小数，末位差在舍入
    best = view.logits[-1].softmax(-1).topk(10).values.tolist()
    assert lens.locator("#next > :nth-child(3n)").all_inner_texts() == [percent(p) for p in best]
    assert n == lens.locator("#tokens button").count()


def test_what_looks_like_html_is_shown_as_typed(visit):
    """不会变成网页，也不会去取里面的图片（visit 核对没有向外联网）。"""
    page = visit()
    sampling(page, temp=0, max=3)
    text = "<img src=http://example.invalid/a.png><b>粗</b> & 体"
    say(page, text)
    microscope_of(page)
    assert page.locator("[data-testid=user]").inner_text().strip() == text


def test_what_looks_like_a_formula_or_a_template_is_text(visit):
    """说的话、模型旁边的提示、记录的名字、样本，都原样；没有公式，没有图片，没有程序。"""
    page = visit()
    sampling(page, temp=0, max=3)
    text = MARKUP.replace("\x1b", "")
    say(page, text)
    microscope_of(page)
    assert page.locator("[data-testid=user]").inner_text().strip() == text
    page.get_by_role("tab", name="一步一步").click()
    page.get_by_label("开头（或者一句提问）").fill(text)
    page.get_by_role("button", name="从这里开始").click()
    page.locator(".tokens .given").nth(5).wait_for()
    given = "".join(page.locator(".tokens .given").all_inner_texts())
    assert "${" in given or "$" in given
    page.get_by_role("tab", name="训练").click()
    page.get_by_label("训练", exact=True).click()
    page.get_by_role("option").filter(has_text="zz<img").click()
    cell = page.get_by_role("gridcell").filter(has_text="$$x^2$$").first
    cell.wait_for()
    shown = cell.inner_text()
    assert "<img src=x onerror=alert(1)>" in shown and "${1+1} {{value}}" in shown
    assert page.locator(".katex, img[src=x]").count() == 0


# ---------- 4. 别的网站，别的程序 ----------

FOREIGN = """<!doctype html><script>
async function attack(url) {
  const found = {};
  const join = {method: 'POST', credentials: 'include', body: JSON.stringify(
      {fn_index: 0, session_hash: 'foreign', data: []})};
  for (const [name, path, options] of [
      ['read', '/', {}], ['config', '/config', {credentials: 'include'}],
      ['theme', '/theme.css', {}],
      ['json', '/gradio_api/queue/join', {...join, headers: {'content-type': 'application/json'}}],
      ['text', '/gradio_api/queue/join', join],
      ['listen', '/gradio_api/queue/data?session_hash=foreign', {}],
      ['upload', '/gradio_api/upload', {method: 'POST', body: new FormData()}],
  ]) {
    try { const r = await fetch(url + path, options); found[name] = r.status; }
    catch (e) { found[name] = 'refused'; }
  }
  const frame = document.createElement('iframe'); frame.src = url; document.body.append(frame);
  const script = document.createElement('script'); script.src = url + '/theme.css';
  await new Promise(done => {
    script.onerror = done; script.onload = () => { found.script = 1; done(); };
    document.body.append(script);
  });
  return found;
}</script><body></body>"""


@pytest.fixture
def foreign():
    """另一个网站，在另一个端口上。"""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(FOREIGN.encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        # 没有最新的保护的浏览器：不问能不能访问本机，不管同源，域名可以指到任何地方。
        ["--disable-web-security", "--host-resolver-rules=MAP evil.example 127.0.0.1",
         "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests"],
    ],
    ids=["平常的", "没有保护的"],
)  # fmt: skip
def test_a_foreign_page_can_neither_chat_nor_read(address, foreign, flags, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="没有安装 playwright")
    if CHROMIUM is None:
        pytest.skip("没有 chromium：apt-get install chromium")
    port = address.rpartition(":")[2]
    # 另一个端口的网页；没有保护时，还有域名指到这里来的（DNS rebinding）。
    pages = [f"http://127.0.0.1:{foreign}/", f"http://localhost:{foreign}/"]
    targets = [address, f"http://localhost:{port}"]
    if flags:
        pages.append(f"http://evil.example:{foreign}/")
        targets.append(f"http://evil.example:{port}")
    results = run_in_another_browser(sync_api, [*QUIET, *flags], pages, targets)
    assert len(results) == len(pages) * len(targets)
    for where, found in results.items():
        assert {v for v in found.values() if v in (200, 1)} == set(), (where, found)


def run_in_another_browser(sync_api, args, pages, targets) -> dict:
    """另开一个浏览器（另一个线程：Playwright 一个线程只许一个），从各个网页攻各个地址。"""
    results, errors = {}, []

    def attack():
        try:
            with sync_api.sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
                for page_url in pages:
                    for target in targets:
                        page = browser.new_page()
                        page.goto(page_url)
                        results[page_url, target] = page.evaluate("url => attack(url)", target)
                        page.close()
                browser.close()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attack)
    thread.start()
    thread.join(100)
    assert not errors, errors
    return results


def get(address, path="/", method="GET", body=None, **headers):
    """不经过浏览器。"""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text


def test_raw_requests(address):
    """真的套接字：别的名字、上传、没完没了的正文、说一半的请求；之后照常答。"""
    assert get(address)[0] == 200
    status, words = get(address, Host="evil.example")
    assert status == 421 and "这个网页不叫这个名字" in words
    assert get(address, "/gradio_api/upload", "POST", b"x" * 100)[0] == 404
    header = {"Content-Type": "application/json", "Content-Length": "9999999999"}
    assert get(address, "/gradio_api/queue/join", "POST", None, **header)[0] == 413
    with pytest.raises(OSError):  # 答完 413 就挂断，不再收
        endless = (b"x" * 65536 for _ in range(10**6))
        del header["Content-Length"]
        assert get(address, "/gradio_api/queue/join", "POST", endless, **header)[0] == 413
        raise OSError
    assert get(address)[0] == 200


def test_silent_connections_do_not_lock_others_out(address):
    """六百条连上不说话的：后来的人照样打得开；十秒之后都挂断了。"""
    host, port = address.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(600)]
    for connection in silent[::2]:
        with contextlib.suppress(OSError):
            connection.sendall(b"GET / HTTP/1.1\r\nHo")
    begun = time.monotonic()
    assert get(address)[0] == 200
    assert time.monotonic() - begun < 5
    for connection in silent:
        connection.close()


@pytest.mark.slow
def test_starting_again_stops_the_answer(visit, trained):
    seed = talkative_seed(trained[0], "守株待兔")
    page = visit()
    be_talkative(page, seed)
    say(page, "守株待兔")
    page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length > 0")
    page.get_by_label("你说").fill("下一句")
    page.wait_for_timeout(300)
    assert page.get_by_label("你说").input_value() == "下一句"  # 边答边写，不会被擦掉
    page.get_by_role("button", name="重新开始").click()
    page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length === 0")
    page.wait_for_timeout(2500)  # 停下来的那一次若还要看显微镜，也看完了
    assert page.locator("[data-testid=bot]").count() == 0
    assert page.locator("iframe").count() == 0


def test_a_page_that_lost_its_line_comes_back(visit):
    """断了线（合上过笔记本、机器太忙）：说一声，自己刷新，接着就能用；从前要一直等下去。"""
    page = visit()
    page.route("**/queue/data?*", lambda route: route.abort(), times=1)
    with page.expect_event("load"):
        say(page, "守株待兔")
        page.get_by_text("Connection to the server was lost").wait_for()
    page.wait_for_function("document.querySelector('input[aria-label=\"模型\"]')?.value")
    say(page, "守株待兔")
    page.locator("[data-testid=bot]").first.wait_for()


def test_a_stop_keeps_what_was_said(visit, trained):
    seed = talkative_seed(trained[0], "守株待兔")
    page = visit()
    be_talkative(page, seed)
    say(page, "守株待兔")
    answer = page.locator("[data-testid=bot]").last
    page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length > 0")
    page.get_by_role("button", name="停止").click()
    page.get_by_text("（已停止）").wait_for()
    lens = microscope_of(page)
    said = answer.inner_text()
    page.wait_for_timeout(700)
    assert answer.inner_text() == said and 0 < len(said) < 400  # 真的停了
    tokens = [t.partition("\n")[0] for t in lens.locator("#tokens button").all_inner_texts()]
    assert tokens[-1] in said or tokens[-1].startswith(("#", "⏎", "##"))  # 看的就是停下的那一句


@pytest.mark.parametrize(
    ("text", "sentence"), [("", "请先写点什么"), ("字" * 10_000, "请说短一些")]
)
def test_empty_and_endless_input(visit, text, sentence):
    page = visit()
    say(page, text)
    page.get_by_text(sentence).wait_for()
    assert page.get_by_label("你说").input_value() == text  # 写下的还在，可以改
    assert page.locator("[data-testid=bot]").count() == 0


def test_step_by_step(visit):
    """选一个，抽一个，退一步：写成的就是选的。"""
    page = visit()
    page.get_by_role("tab", name="一步一步").click()
    first = page.get_by_text("请先按「从这里开始」")
    for _ in range(20):  # 页面刚打开时，Gradio 还没有接好按钮，点了没有反应
        page.get_by_role("button", name="让它抽一个").click()
        page.wait_for_timeout(500)
        if first.is_visible():
            break
    first.wait_for()
    page.get_by_role("button", name="从这里开始").click()
    choices = page.locator("button.candidate")
    choices.nth(9).wait_for()
    third = choices.nth(2).inner_text().split("　")[1]
    sampling(page, temp=0)
    page.get_by_text("抽签 100.0%").wait_for()  # 采样改了，候选跟着变
    choices.nth(2).focus()
    page.keyboard.press("Enter")  # 只用键盘也行
    page.get_by_text(f"你选了「{third}」").wait_for()
    written = page.locator(".tokens .written")
    assert [w.split()[0] for w in written.all_inner_texts()] == [third]
    page.get_by_role("button", name="让它抽一个").click()
    page.get_by_text("抽中「").wait_for()
    assert written.count() == 2
    page.get_by_role("button", name="退一步").click()
    page.wait_for_function("document.querySelectorAll('.tokens .written').length === 1")
    assert [w.split()[0] for w in written.all_inner_texts()] == [third]


def test_compare_and_training(visit, trained):
    page = visit()
    page.get_by_role("tab", name="比较").click()
    sampling(page, max=4)
    page.get_by_role("button", name="比较", exact=True).click()
    page.get_by_text("平均每个词元意外").nth(1).wait_for()
    folder, *_ = trained
    for table, stage in zip(page.locator("table.bars").all(), ("pretrain", "sft"), strict=True):
        speaker = actions.open_model(str(folder / f"out/tiny/{stage}.pt"))
        probs = speaker.read(speaker.prompt("守株待兔是什么意思？"))[-1]
        assert percent(probs.max().item()) in table.inner_text()
    page.get_by_role("tab", name="训练").click()
    page.get_by_text("沿途的样本").wait_for()
    page.locator("canvas, svg.marks").first.wait_for()


@pytest.mark.slow
def test_two_visitors_at_once(visit, trained):
    """两个人同时说话，各得各的回答，谁也不用等谁说完。"""
    seed = talkative_seed(trained[0], "守株待兔", "画蛇添足")
    pages = [visit(), visit()]
    for page, text in zip(pages, ("守株待兔", "画蛇添足"), strict=True):
        be_talkative(page, seed)
        page.get_by_label("你说").fill(text)
    for page in pages:
        page.get_by_role("button", name="发送").click()
    lengths = []  # 两位各得到了多少字，隔十分之一秒看一次
    for _ in range(30):
        lengths.append([p.locator("[data-testid=bot]").all_inner_texts() for p in pages])
        pages[0].wait_for_timeout(100)
    lengths = [[len("".join(texts)) for texts in both] for both in lengths]
    begun = next(both for both in lengths if all(both))
    assert all(now > then for now, then in zip(lengths[-1], begun, strict=True)), lengths
    for page, text in zip(pages, ("守株待兔", "画蛇添足"), strict=True):
        page.get_by_role("button", name="停止").click()
        microscope_of(page).locator("#tokens button").first.wait_for()
        assert page.locator("[data-testid=user]").inner_text().strip().startswith(text)


def test_a_phone_and_a_screen_reader(visit):
    """手机那么宽也不必左右滑；说的是中文；每个能操作的都有名字。"""
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    sampling(page, temp=0, max=5)
    say(page, "守株待兔")
    lens = microscope_of(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    width = lens.locator("body").evaluate("document.documentElement.scrollWidth")
    assert width <= lens.locator("body").evaluate("window.innerWidth")
    unnamed = page.locator("button:visible, input:visible, textarea:visible").evaluate_all(
        """all => all.filter(e => !(e.innerText || e.ariaLabel || e.title || e.labels?.length))
                    .map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_the_page_of_a_mixture_of_experts(browser, tmp_path):
    """每格是占得最多的那位专家；只用键盘也能换一层，看那一层的每位专家接了哪些词元。"""
    torch.manual_seed(0)
    shape = replace(SHAPE, n_experts=5, n_active=2, router_scale=1.0)
    model = Transformer(shape).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    speaker = make_speaker(model, shape, TOKENIZER, "pretrain")
    ids = speaker.prompt("守株待兔")
    experts = look(model, ids).experts
    path = tmp_path / "experts.html"
    path.write_text(explain_page(examine(speaker, ids), 2), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    cells = page.locator("#experts td").all_inner_texts()
    assert cells == [str(row.argmax().item() + 1) for row in experts.flatten(0, 1)]
    for layer in (0, 1):
        button = page.get_by_role("button", name=f"第 {layer + 1} 层", exact=True)
        button.press("Enter")
        assert button.get_attribute("aria-pressed") == "true"
        taken = page.locator("#taken tr").all_inner_texts()
        expected = [
            f"{e + 1} 号\t"
            + "　".join(
                f"{TOKENIZER.label(token)} {percent(w.item())}"
                for token, w in zip(ids, experts[layer, :, e], strict=True)
                if w > 0
            )
            for e in range(5)
            if (experts[layer, :, e] > 0).any()
        ]
        assert taken == expected
    page.close()
