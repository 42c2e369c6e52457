"use strict";
// 这一页的脸：说话，点一个词元看它怎样来，动手改。模型在 worker 里；怎样画在 draw.js 里。
//
//     job           请 worker 做一件事
//     speak         写一个回答，一边写一边显示
//     open          打开一个词元：显微镜里的一切
//     动手改        换一个词元，关掉几个零件，搬一个向量

const INFO = JSON.parse($("info").textContent), SFT = INFO.stage === "sft";
const {bos_id, eos_id, roles} = INFO.tokens;
const answers = [];  // 每个回答：{said, turns, question, start, tokens, given, box}；start 是它之前的编号
let now = null;      // 显微镜里的：{answer, at, seen, before, patch}
let head = [INFO.config.n_layers - 1, 0];
const off = new Set();  // 关掉的零件，例如 2.1、2.attention

// ---------- 1. 与 worker 说话 ----------

const code = ["engine", "tokenizer", "sampling", "microscope", "worker"].map(name => $(name).textContent);
const worker = new Worker(URL.createObjectURL(new Blob(code, {type: "text/javascript"})));
const waiting = new Map();
let number = 0;

/** 请 worker 做一件事；heard 听它一边做一边送来的。 */
function job(name, more = {}, heard = null) {
  worker.postMessage({id: ++number, job: name, ...more});
  return new Promise((resolve, reject) => waiting.set(number, {resolve, reject, heard}));
}
worker.onmessage = ({data: {id, result, token, error}}) => {
  const {resolve, reject, heard} = waiting.get(id);
  if (token) return heard(token);
  waiting.delete(id);
  error ? reject(new Error(error)) : resolve(result);
};
worker.onerror = () => say("模型没有装好：这个浏览器太旧，或者文件没有下载完整。");

const say = words => { $("status").textContent = words; };
const knobs = ["temp", "top_p", "top_k", "penalty"];
const sampling = () => ({...INFO.sampling, ...Object.fromEntries(knobs.map(name => [name, +$(name).value]))});

// ---------- 2. 说话 ----------

let speaking = 0;  // 正在写的那件事的编号

/** 一个词元放进回答里：点它，或者走到它按回车，就打开。 */
function show(answer, token) {
  const span = make("span", token.text === "\n" ? "⏎\n" : token.text, {class: "t", role: "button", tabindex: -1,
    "aria-label": `词元「${token.name}」，概率 ${percent(token.p)}`});
  span.style.background = surprise(token.p);
  span.onclick = () => open(answer, [...answer.row.children].indexOf(span));
  answer.row.append(span);
  if (answer.row.children.length === 1) span.tabIndex = 0;
}

/** 一个新的回答：上面是说的话，下面一行是词元。 */
function place(answer) {
  answer.box = make("div", undefined, {class: "message"});
  answer.row = make("div", undefined, {class: "answer", role: "group", "aria-label": "回答，一个词元一个按钮"});
  answer.row.onkeydown = e => {
    const at = [...answer.row.children].indexOf(document.activeElement);
    const step = {ArrowLeft: -1, ArrowRight: 1}[e.key], next = step && answer.row.children[at + step];
    if (next) { e.preventDefault(); next.focus(); }
    if (at >= 0 && (e.key === "Enter" || e.key === " ")) { e.preventDefault(); open(answer, at); }
  };
  answer.note = make("small");
  answer.spoken = make("p", undefined, {class: "spoken", "aria-live": "polite"});  // 读屏软件读整句
  if (SFT) answer.box.append(make("p", answer.said, {class: "said"}));
  answer.box.append(answer.row, answer.note, answer.spoken);
  $("messages").append(answer.box);
  answers.push(answer);
}

/** 接着 answer 已有的词元往下写，写完为止；这之后的回答都不算了。 */
async function speak(answer) {
  for (const later of answers.splice(answers.indexOf(answer) + 1)) later.box.remove();
  busy(true);
  say("正在写……");
  answer.note.textContent = "";
  const written = answer.tokens.slice(answer.given).map(t => t.id), heard = [];
  const pending = job("write", {ids: [...answer.start, ...answer.tokens.map(t => t.id)], written,
    sampling: sampling(), off: [...off]}, token => {
    heard.push(performance.now()); answer.tokens.push(token); show(answer, token); });
  speaking = number;
  try {
    const {why} = await pending, n = heard.length;
    answer.note.textContent = why === "end" ? (answer.tokens.length ? "" : "（它一个字也没写：认为到这里就完了）") : `（${why}）`;
    answer.ended = why === "end";
    const rate = n > 1 ? `，每秒 ${(1000 * (n - 1) / (heard.at(-1) - heard[0])).toFixed(0)} 个` : "";
    say(n ? `写了 ${n} 个词元${rate}。点一个词元，看它怎样来。` : "");
    answer.spoken.textContent = answer.tokens.map(t => t.text).join("");
  } catch (error) { say(String(error.message)); }
  busy(false);
}

function busy(yes) {
  $("stop").disabled = !yes;
  for (const b of document.querySelectorAll("#send, #again, #examples button, #next button, #swap button")) b.disabled = yes;
}

/** 说一句话：微调过的当作提问，接着前几轮；只会接着写的当作开头。空的就接着写。 */
async function ask(text) {
  const last = answers.at(-1);
  if (!text.trim()) { if (!SFT && last) await speak(last); return; }
  busy(true);
  if (SFT) {
    const turns = last ? [...last.turns, last.question, [bos_id, roles.assistant, ...last.tokens.map(t => t.id), eos_id]] : [];
    const {error, forgotten, ids, ...rest} = await job("ask", {turns, text});
    if (error) { busy(false); return say(error); }
    place({said: text, start: ids, tokens: [], given: 0, ...rest});
    if (forgotten) answers.at(-1).note.textContent = `（前文太长，忘掉了最早的 ${forgotten} 轮）`;
  } else {
    const ids = (await job("encode", {text})).slice(-Math.floor(INFO.config.max_len * 3 / 4) + 1);
    const tokens = await job("surprise", {ids: [bos_id, ...ids], from: 1, off: [...off]});
    place({said: text, start: [bos_id], tokens, given: tokens.length});
    for (const token of tokens) show(answers.at(-1), token);
  }
  $("text").value = "";
  await speak(answers.at(-1));
}

// ---------- 3. 打开一个词元 ----------

/** answer 的第 at 个词元：看着它前面的，模型怎样猜。 */
async function open(answer, at, patch = null) {
  if (speaking && !$("stop").disabled) return;  // 正在写
  at = Math.max(0, Math.min(at, answer.tokens.length - 1));
  const ids = [...answer.start, ...answer.tokens.slice(0, at).map(t => t.id)];
  const written = ids.slice(answer.start.length + answer.given), {penalty} = sampling();
  const ask = {ids, target: answer.tokens[at].id, written, penalty};
  const seen = await job("look", {...ask, off: [...off], patch});
  const before = off.size || patch ? await job("look", {...ask, off: [], patch: null}) : null;
  now = {answer, at, seen, before, patch};
  for (const b of document.querySelectorAll(".t[aria-pressed=true]")) { b.removeAttribute("aria-pressed"); b.tabIndex = -1; }
  const span = answer.row.children[at];
  span.setAttribute("aria-pressed", true);
  for (const other of answer.row.children) other.tabIndex = other === span ? 0 : -1;
  const opened = $("inside").hidden;
  $("inside").hidden = false;
  draw_inside();
  if (opened && matchMedia("(max-width: 899px)").matches) $("title").scrollIntoView({behavior: "smooth"});
  if (opened) $("title").focus({preventScroll: true});
}

function draw_inside() {
  const {answer, at, seen, before, patch} = now, token = answer.tokens[at];
  $("title").textContent = `第 ${at + 1} 个词元「${token.name}」`;
  $("previous").disabled = at === 0;
  $("next-token").disabled = at === answer.tokens.length - 1;
  $("target").textContent = `看着前文，它的概率是 ${percent(seen.target_p)}，意外 ${bits(seen.target_p).toFixed(1)} 比特。` +
    (before ? `动手之前是 ${percent(before.target_p)}。` : "");
  draw_next();
  const columns = seen.names.length, room = $("heads").parentElement.clientWidth - 55;
  const width = Math.max(24, Math.min(110, 8 * columns, room / INFO.config.n_heads - 9));
  headGrid($("heads"), INFO.config.n_layers, INFO.config.n_heads, (canvas, l, h) =>
    shade(prepare(canvas, width, 16), 1, columns, (_, j) => seen.attention[l][h][j], 0, 0, width / columns, 16),
    (l, h) => { head = [l, h]; draw_head(); });
  draw_head();
  $("lens-help").textContent = `读到某一层就停下来，直接翻译成词元（logit lens）；横条是那一层给「${seen.target}」的概率。`;
  drawLens($("lens"), seen);
  drawNorms($("norms"), seen);
  $("experts-part").hidden = !seen.experts;
  if (seen.experts) {
    drawExpertBars($("experts"), seen);
    const here = seen.experts[head[0]].map(([e]) => switch_button(`${head[0] + 1}.expert${e}`, `第 ${head[0] + 1} 层 ${e} 号专家`));
    $("off-experts").replaceChildren(...here);
  }
  $("unpatch").disabled = !patch;
}

/** 候选：模型给的概率，以及照现在的温度与 top-p 抽签的概率；拖动滑块时只重画这一样。 */
function draw_next() {
  const {seen, before} = now, settings = sampling();
  const chances = new Map(lottery(seen.candidates.slice(0, settings.top_k).map(([id, , , score]) => [id, score]), settings));
  const rows = [...seen.candidates].sort((a, b) => b[2] - a[2]).slice(0, 10);
  if (!rows.some(([id]) => id === seen.target_id)) rows.push([seen.target_id, seen.target, seen.target_p]);
  const former = before && new Map(before.candidates.map(([id, , p]) => [id, p]));
  $("next-help").textContent = (before ? "每行三条：现在的概率，动手之前的（斜纹），抽签的（绿）。" : "每行两条：模型给的概率，抽签的概率（绿；罚过重复，照现在的温度、top-k 与 top-p）。") +
    "点一个，就换成它，从那里接着写。";
  bars($("next"), rows.map(([id, name, p]) => {
    const b = make("button", name, {type: "button"}), chance = chances.get(id) ?? 0;
    b.onclick = () => take({id, name, p});
    b.disabled = !$("stop").disabled;
    const was = former && (former.get(id) ?? (id === seen.target_id ? before.target_p : 0));
    const lanes = [[p], ...was === null ? [] : [[was, "less"]], [chance, "more"]];
    return [b, lanes, (was === null ? percent(p) : `${percent(was)} → ${percent(p)}`) + (chance ? `　抽签 ${percent(chance)}` : "　不参加抽签"), id === seen.target_id];
  }));
}

function draw_head() {
  const {seen} = now, [l, h] = head, weights = seen.attention[l][h];
  pressHead($("heads"), l, h);
  const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 3);
  $("looks").textContent = `${headName(l, h)}，看得最多的是 ` + order.map(j => `「${seen.names[j]}」${percent(weights[j])}`).join("，") + "。";
  $("context").replaceChildren(...seen.names.map((name, j) => {
    const span = make("span", name.replace(/^##/, ""), {title: percent(weights[j])});
    span.style.background = `rgba(${colour("--hue")}, ${.8 * Math.sqrt(weights[j])})`;
    return span;
  }));
  $("off-head").replaceWith(switch_button(`${l + 1}.${h + 1}`, `${headName(l, h)}`, "off-head"));
  for (const [part, name] of [["attention", "注意力"], ["feed_forward", "前馈"]])
    $(`off-${part}`).replaceWith(switch_button(`${l + 1}.${part}`, `第 ${l + 1} 层的${name}`, `off-${part}`));
}

// ---------- 4. 动手改 ----------

/** 一个开关：关掉，或者恢复。 */
function switch_button(part, name, id) {
  const b = make("button", (off.has(part) ? "恢复" : "关掉") + name, {type: "button", class: "knob", "aria-pressed": off.has(part), ...id && {id}});
  b.onclick = async () => {
    off.has(part) ? off.delete(part) : off.add(part);
    await changed();
    if (id) $(id).focus();
  };
  return b;
}

/** 关掉的零件变了：说出来，显微镜跟着变。 */
async function changed() {
  $("hands").hidden = !off.size;
  $("off").textContent = `关掉了：${[...off].join("、")}（层.头；attention 注意力，feed_forward 前馈）`;
  if (now) await open(now.answer, now.at, now.patch);
}

/** 换成另一个词元，从那里接着写。 */
async function take({id, name, p}) {
  const {answer, at} = now, text = await job("decode", {ids: [id]});
  answer.tokens.splice(at);
  [...answer.row.children].slice(at).forEach(span => span.remove());
  answer.given = Math.min(answer.given, at);
  if (id !== eos_id) { answer.tokens.push({id, name, text, p}); show(answer, answer.tokens[at]); await speak(answer); }
  if (answer.tokens.length) await open(answer, at);
}

/** 只换这一个，后面的不动：后面的每个词元有多意外，跟着变。 */
async function swap(text) {
  const {answer, at} = now, ids = await job("encode", {text});
  if (!ids.length) return say("请先写上要换成什么");
  const all = [...answer.start, ...answer.tokens.slice(0, at).map(t => t.id), ...ids, ...answer.tokens.slice(at + 1).map(t => t.id)];
  const tokens = await job("surprise", {ids: all.slice(0, INFO.config.max_len), from: answer.start.length + at, off: [...off]});
  answer.tokens.splice(at, Infinity, ...tokens);
  answer.row.replaceChildren();
  for (const token of answer.tokens) show(answer, token);
  await open(answer, at);
}

/** 另一句话的最后一个词元，第 layer 层之后的向量。 */
async function patch(text, layer) {
  const ids = SFT ? (await job("ask", {turns: [], text})).ids : [bos_id, ...await job("encode", {text})];
  if (!text.trim() || !ids) return say("请先写上另一句话，不要太长");
  await open(now.answer, now.at, {ids: ids.slice(0, INFO.config.max_len), layer});
}

// ---------- 5. 开始 ----------

function start() {
  $("about").textContent = INFO.about;
  $("text").placeholder = SFT ? "说一句话" : "起一个头，它接着写；空着就接着写";
  $("text").setAttribute("aria-label", SFT ? "说一句话" : "起一个头");
  $("examples").append(...INFO.examples.map(words => {
    const b = make("button", words, {type: "button", disabled: ""});
    b.onclick = () => ask(words);
    return b;
  }));
  for (const name of knobs) {
    const knob = $(name), shown = knob.nextElementSibling;
    knob.value = INFO.sampling[name];
    knob.oninput = () => { shown.textContent = knob.value; if (now) draw_next(); };
    knob.onchange = () => { if (now && name === "penalty") open(now.answer, now.at, now.patch); };
    shown.textContent = knob.value;
  }
  for (let l = 1; l <= INFO.config.n_layers; l++) $("layer").append(make("option", l, {value: l}));
  $("ask").onsubmit = e => { e.preventDefault(); if (!$("send").disabled) ask($("text").value); };
  $("text").onkeydown = e => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); $("ask").requestSubmit(); }
  };
  $("stop").onclick = () => worker.postMessage({id: speaking, job: "stop"});
  $("previous").onclick = () => open(now.answer, now.at - 1);
  $("next-token").onclick = () => open(now.answer, now.at + 1);
  $("close").onclick = () => { $("inside").hidden = true; now.answer.row.children[now.at]?.focus(); now = null; };
  $("swap").onsubmit = e => { e.preventDefault(); swap($("other-token").value); };
  $("patch").onsubmit = e => { e.preventDefault(); patch($("other-text").value, +$("layer").value); };
  $("unpatch").onclick = () => open(now.answer, now.at);
  $("restore").onclick = () => { off.clear(); changed(); };
  $("again").onclick = async () => {
    const answer = now?.answer ?? answers.at(-1);
    if (!answer) return;
    answer.tokens.splice(answer.given);
    [...answer.row.children].slice(answer.given).forEach(span => span.remove());
    await speak(answer);
    if (now && answer.tokens.length) await open(answer, now.at);
  };
  matchMedia("(prefers-color-scheme: dark)").onchange = () => { if (now) draw_inside(); };
  say("正在装模型……");
  job("open", {config: INFO.config, places: INFO.places, weights: $("weights").textContent, tokens: INFO.tokens})
    .then(() => { say(""); busy(false); $("text").focus({preventScroll: true}); }, error => say(String(error.message)));
}
start();
