// 这一页的脸：说话，一个词元一个词元地显示。模型在 worker 里；点开一个词元之后的事在 inside.js 里。
//
//     job           请 worker 做一件事
//     work          页面上同时只做一件事：正在做的没完，别的按钮按了不算
//     show place    一个词元、一个回答怎样显示
//     ask speak     说一句话，写一个回答
//
// 一个回答 answer：said 说的话；turns、question 之前几轮与这一问的编号；start 模型看见的开头；
// tokens 显示的词元，其中前 given 个是自己打的字（只会接着写的模型才有）。
// 一个词元 token：{id, name, text, p}，另有 from：写它时看得见的从第几个起；since：从第几个起算自己写的。

const INFO = JSON.parse($("info").textContent), SFT = INFO.stage === "sft";
const {bos_id, eos_id, roles} = INFO.tokens, MAX_LEN = INFO.config.max_len;
const KEEP = Math.floor(MAX_LEN * 3 / 4) - 1;  // 接着写时至多看前面多少个，其余留给要写的
const answers = [];
const off = new Set();  // 关掉的零件，例如 2.1、2.attention

// ---------- 1. 与 worker 说话 ----------

const code = ["engine", "tokenizer", "sampling", "microscope", "worker"].map(name => $(name).textContent);
const worker = new Worker(URL.createObjectURL(new Blob(code, {type: "text/javascript"})));
const waiting = new Map();
let number = 0;  // 最近一件事的编号

/** 请 worker 做一件事；heard 听它一边做一边送来的。 */
function job(name, more = {}, heard = null) {
  if (halted) return Promise.reject(new Error("已停止"));
  worker.postMessage({id: ++number, job: name, ...more});
  return new Promise((resolve, reject) => waiting.set(number, {resolve, reject, heard}));
}
worker.onmessage = ({data: {id, result, token, error}}) => {
  const {resolve, reject, heard} = waiting.get(id);
  if (token) return heard(token);
  waiting.delete(id);
  error === undefined ? resolve(result) : reject(new Error(error));
};
worker.onerror = () => {
  for (const {reject} of waiting.values()) reject(new Error("模型停了：内存不够，或者浏览器太旧；请刷新这一页"));
  waiting.clear();
};

const say = words => { $("status").textContent = words; };
const knobs = ["temp", "top_p", "top_k", "penalty"];
const sampling = () => ({...INFO.sampling, ...Object.fromEntries(knobs.map(name => [name, +$(name).value]))});

let working = true;  // 正在做一件事；装好模型之前也是
let halted = false;  // 叫停了：这件事里，往后的都不再请

/** 做一件事，其间别的都不做；words 是其间说的话，做完若没有别的要说，就不说了。出了错说一声。 */
async function work(words, task) {
  if (working) return;
  [working, halted] = [true, false];
  say(words);
  refresh();
  let failed = false;
  try {
    await task();
  } catch (error) {
    [failed] = [true, say(error.message)];
  }
  working = false;
  if ($("status").textContent === words) say("");
  refresh();
  if (!failed && now && now.penalty !== sampling().penalty) open(now.answer, now.at, now.patch);  // 其间拖过滑块
}

/** 哪些按钮按了不算。不用 disabled：按下的那一个若是不许再按，键盘就不知道走到了哪里。 */
function refresh() {
  for (const b of document.querySelectorAll("button:not(.heads button)"))
    b.setAttribute("aria-disabled", working !== (b.id === "stop"));
  $("again").hidden = !answers.length;
  $("restore").hidden = !off.size;
  $("off").textContent = off.size ? `关掉了：${[...off].join("、")}（层.头；attention 注意力，feed_forward 前馈）` : "";
}

// ---------- 2. 显示 ----------

/** 一个词元放进回答里：点它，或者走到它按回车，就打开。 */
function show(answer, token) {
  const span = make("span", token.text === "\n" ? "⏎\n" : token.text, {class: "t", role: "button", tabindex: -1,
    "aria-label": `词元「${token.name}」，概率 ${percent(token.p)}`});
  tint(span, token.p);
  span.onclick = () => open(answer, [...answer.row.children].indexOf(span));
  answer.row.append(span);
  if (answer.row.children.length === 1) span.tabIndex = 0;
}

/** 一个新的回答：上面是说的话，下面一行是词元。 */
function place(answer) {
  answer.box = make("div", undefined, {class: "message"});
  answer.row = make("div", undefined, {class: "answer", role: "group", "aria-label": "一个词元一个按钮"});
  answer.row.onkeydown = e => {
    const at = [...answer.row.children].indexOf(document.activeElement);
    const next = answer.row.children[at + ({ArrowLeft: -1, ArrowRight: 1}[e.key] ?? NaN)];
    if (next) { e.preventDefault(); next.focus(); }
    if (at >= 0 && (e.key === "Enter" || e.key === " ")) { e.preventDefault(); open(answer, at); }
  };
  [answer.head, answer.note] = [make("small"), make("small")];
  answer.spoken = make("p", undefined, {class: "spoken", "aria-live": "polite"});  // 读屏软件读整句
  if (SFT) answer.box.append(make("p", answer.said, {class: "said"}));
  answer.box.append(answer.head, answer.row, answer.note, answer.spoken);
  $("messages").append(answer.box);
  answers.push(answer);
  for (const token of answer.tokens) show(answer, token);
  return answer;
}

/** 第 at 个词元起换成 tokens；问答里，这之后的几轮都不算了：它们是接着原来的话说的。 */
function replace(answer, at, tokens) {
  if (SFT) for (const later of answers.splice(answers.indexOf(answer) + 1)) later.box.remove();
  answer.tokens.splice(at, Infinity, ...tokens);
  [...answer.row.children].slice(at).forEach(span => span.remove());
  for (const token of tokens) show(answer, token);
  const {children} = answer.row;
  if (children.length && ![...children].some(span => span.tabIndex === 0)) children[0].tabIndex = 0;
  answer.given = Math.min(answer.given, answer.tokens.length);
  answer.note.textContent = "";
  answer.spoken.textContent = answer.tokens.map(t => t.text).join("");
}

/** 写第 at 个词元时，模型看见的编号；以及其中自己写的。 */
function before(answer, at) {
  const {from, since} = answer.tokens[at] ?? {from: 0, since: answer.given};
  const ids = answer.tokens.slice(0, at).map(t => t.id);
  return {ids: [...answer.start, ...ids.slice(from)], written: ids.slice(since)};
}

// ---------- 3. 说话 ----------

/** 接着 answer 已有的词元往下写。from、since 同 token 的：接着写满了的，只看得见末尾，也重新数自己写的。 */
async function speak(answer, {from = 0, since = answer.given} = {}) {
  say("正在写……");
  replace(answer, answer.tokens.length, []);
  const ids = answer.tokens.map(t => t.id), heard = [], muted = [...off];
  const {why} = await job("write", {ids: [...answer.start, ...ids.slice(from)], written: ids.slice(since),
    sampling: sampling(), off: muted}, token => {
    heard.push(performance.now());
    answer.tokens.push({...token, from, since});
    show(answer, token);
  }).catch(error => ({why: error.message}));
  const rate = heard.length > 1 ? `，每秒 ${(1000 * (heard.length - 1) / (heard.at(-1) - heard[0])).toFixed(0)} 个` : "";
  const reason = why !== "end" ? `（${why}）` : heard.length ? "" : "（它一个字也没写：认为到这里就完了）";
  answer.note.textContent = reason + (muted.length ? `（写的时候关着 ${muted.join("、")}）` : "");
  answer.spoken.textContent = answer.tokens.map(t => t.text).join("");
  say(heard.length ? `写了 ${heard.length} 个词元${rate}。点一个词元，看它怎样来。` : "");
  halted = false;  // 叫停的是写；写出的还可以看
}

/** 说过的几轮：问与答交替；一个字也没答的提问不留着，免得它接着答上一句。 */
function history() {
  const last = answers.at(-1);
  if (!last?.tokens.length) return last?.turns ?? [];
  return [...last.turns, last.question, [bos_id, roles.assistant, ...last.tokens.map(t => t.id), eos_id]];
}

const only_the_end = n => `（前文 ${n} 个词元，只看得到最后 ${KEEP} 个）`;

/** 说一句话：微调过的当作提问，接着前几轮；只会接着写的当作开头，空的就接着写。 */
const ask = text => work("正在读……", async () => {
  const last = answers.at(-1);
  if (SFT && text.trim()) {
    const {error, forgotten, ids, ...rest} = await job("ask", {turns: history(), text});
    if (error) throw new Error(error);
    const answer = place({said: text, start: ids, tokens: [], given: 0, ...rest});
    if (forgotten) answer.head.textContent = `（前文太长，忘掉了最早的 ${forgotten} 轮）`;
    sent(text);
    await speak(answer);
  } else if (!SFT && text.trim()) {
    const all = await job("encode", {text}), ids = all.slice(-KEEP);
    const tokens = await job("surprise", {ids: [bos_id, ...ids], from: 1, off: [...off]});
    const own = tokens.map((token, i) => ({...token, from: 0, since: i}));  // 自己打的，不罚
    const answer = place({said: text, start: [bos_id], tokens: own, given: own.length});
    if (all.length > ids.length) answer.head.textContent = only_the_end(all.length);
    sent(text);
    await speak(answer);
  } else if (!SFT && last) {
    const n = last.tokens.length;
    if (n > KEEP) last.head.textContent = only_the_end(n);
    await speak(last, {from: Math.max(0, n - KEEP), since: n});
  } else say(SFT ? "请先说一句话。" : "请先起个头，例如：守株待兔：");
});

/** 说出去了：框里还是它，就清空；按的是例子，框里没写完的留着。 */
function sent(text) {
  if ($("text").value === text) $("text").value = "";
}

/** 从头重写最后一个回答；原来写的留一行，好比较。 */
const again = () => work("正在写……", async () => {
  const answer = answers.at(-1);
  const former = answer.tokens.slice(answer.given).map(t => t.text).join("");
  replace(answer, answer.given, []);
  await speak(answer);
  answer.note.textContent += former ? `（原来写的是：${former}）` : "";
  if (now?.answer === answer) await inspect(answer, now.at);
});

// ---------- 4. 开始 ----------

function start() {
  $("about").textContent = INFO.about;
  $("text").placeholder = SFT ? "说一句话" : "起一个头，它接着写；空着就接着写";
  $("text").setAttribute("aria-label", SFT ? "说一句话" : "起一个头");
  $("examples").append(...INFO.examples.map(words => {
    const b = make("button", words, {type: "button"});
    b.onclick = () => ask(words);
    return b;
  }));
  for (const name of knobs) {
    const knob = $(name), shown = knob.nextElementSibling;
    knob.value = INFO.sampling[name];
    knob.oninput = () => { shown.textContent = knob.value; if (now) drawCandidates(); };
    knob.onchange = () => { if (now && name === "penalty") open(now.answer, now.at, now.patch); };
    shown.textContent = knob.value;
  }
  $("ask").onsubmit = e => { e.preventDefault(); ask($("text").value); };
  $("text").onkeydown = e => {  // 229：输入法正在选字（有的浏览器先说选完了，再送这个回车）
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing && e.keyCode !== 229) { e.preventDefault(); ask($("text").value); }
  };
  $("stop").onclick = () => {
    halted = working;
    worker.postMessage({id: number, job: "stop"});
  };
  $("again").onclick = again;
  $("restore").onclick = () => {
    if (working) return;
    off.clear();
    changed();
    $("again").focus();  // 自己藏起来了
  };
  refresh();
  // 模型的文字留在页面里不删：浏览器「另存为」存下的，才还是会说话的一个文件。
  job("open", {config: INFO.config, places: INFO.places, weights: $("weights").textContent, tokens: INFO.tokens})
    .then(() => { working = false; say(""); refresh(); $("text").focus({preventScroll: true}); }, error => say(error.message));
}
