// 点开一个词元：它还可以写什么，注意力，逐层的猜测；动手改。
//
//     open inspect       打开一个词元
//     drawInside …       画
//     take swap patch    换一个走，只换这一个，搬一个向量
//     switchButton       关掉、恢复一个零件

// 打开着的：{answer, at, seen, former, patch, penalty}；former 是动手之前的，没有动手是 null
let now = null;
let head = [INFO.config.n_layers - 1, 0];  // 选中的头：第几层，第几个，从 0 数起

// ---------- 1. 打开 ----------

/** answer 的第 at 个词元：看着它前面的，模型怎样猜。 */
const open = (answer, at, patch = null) => work("正在看……", () => inspect(answer, at, patch));

/** 同上，已经在做一件事里面。 */
async function inspect(answer, at, patch = null) {
  if (!answer.tokens.length) return close();
  at = Math.max(0, Math.min(at, answer.tokens.length - 1));
  const asked = {...before(answer, at), target: answer.tokens[at].id, penalty: sampling().penalty};
  const seen = await job("look", {...asked, off: [...off], patch});
  const former = off.size || patch ?
    await job("look", {...asked, off: [], also: rowsOf(seen).map(([id]) => id)}) : null;
  mark(null);
  now = {answer, at, seen, former, patch, penalty: asked.penalty};
  mark(answer.row.children[at]);
  const opened = $("inside").hidden;
  $("inside").hidden = false;
  drawInside();
  if (opened && matchMedia("(max-width: 899px)").matches) $("title").scrollIntoView({behavior: "smooth"});
  if (opened || document.activeElement === document.body) $("title").focus({preventScroll: true});
}

/** 打开着的词元框起来；键盘走进这一行，从它开始。 */
function mark(span) {
  for (const b of document.querySelectorAll(".t[aria-pressed]")) b.removeAttribute("aria-pressed");
  if (!span) return;
  span.setAttribute("aria-pressed", true);
  for (const other of span.parentElement.children) other.tabIndex = other === span ? 0 : -1;
}

function close() {
  mark(null);
  $("inside").hidden = true;
  const span = now?.answer.row.children[now.at];
  now = null;
  (span ?? $("text")).focus();
}

// ---------- 2. 画 ----------

function drawInside() {
  const {answer, at, seen, former} = now, name = answer.tokens[at].name;
  $("title").textContent = `第 ${at + 1} 个词元「${name}」`;
  $("target").textContent = `看着前文，它的概率是 ${percent(seen.target_p)}，意外 ${bits(seen.target_p).toFixed(1)} 比特。` +
    (former ? `动手之前是 ${percent(former.target_p)}。` : "");
  drawCandidates();
  const columns = seen.names.length, room = $("heads").parentElement.clientWidth - 55;
  const width = Math.max(24, Math.min(110, 8 * columns, room / INFO.config.n_heads - 9));
  headGrid($("heads"), INFO.config.n_layers, INFO.config.n_heads, (canvas, l, h) =>
    shade(prepare(canvas, width, 16), 1, columns, (_, j) => seen.attention[l][h][j], 0, 0, width / columns, 16),
  (l, h) => { head = [l, h]; drawHead(); });
  drawHead();
  $("lens-help").textContent = `读到某一层就停下来，直接翻译成词元（logit lens）；横条是那一层给「${seen.target}」的概率。`;
  drawLens($("lens"), seen);
  drawNorms($("norms"), seen);
  $("experts-part").hidden = !seen.experts;
  if (seen.experts) drawExpertBars($("experts"), seen);
}

/** 要画的候选：最可能的十个，加上真的那一个；[编号, 名字, 概率]。 */
function rowsOf(seen) {
  const rows = [...seen.candidates].sort((a, b) => b[2] - a[2]).slice(0, 10);
  if (!rows.some(([id]) => id === seen.target_id)) rows.push([seen.target_id, seen.target, seen.target_p]);
  return rows;
}

/** 候选：模型给的概率，以及照现在的温度与 top-p 抽签的概率；拖动滑块时只重画这一样。 */
function drawCandidates() {
  const {seen, former} = now, settings = sampling();
  const scores = seen.candidates.slice(0, settings.top_k).map(([id, , , score]) => [id, score]);
  const chances = new Map(lottery(scores, settings));
  $("next-help").textContent = (former ? "每行三条：现在的概率，动手之前的（斜纹），抽签的（绿）。" :
    "每行两条：模型给的概率，抽签的概率（绿；罚过重复，照现在的温度、top-k 与 top-p）。") + "点一个，就换成它，从那里接着写。";
  bars($("next"), rowsOf(seen).map(([id, name, p], k) => {
    const b = make("button", name, {type: "button", "aria-disabled": working});
    b.onclick = () => take({id, name, p});
    const chance = chances.get(id) ?? 0, was = former?.also[k];
    const lanes = [[p], ...former ? [[was, "less"]] : [], [chance, "more"]];
    const words = former ? `${percent(was)} → ${percent(p)}` : percent(p);
    return [b, lanes, words + (chance ? `　抽签 ${percent(chance)}` : "　不参加抽签"), id === seen.target_id];
  }));
}

/** 选中的头看着谁；这个头、这一层的零件都可以关掉。 */
function drawHead() {
  const {seen} = now, [l, h] = head, weights = seen.attention[l][h];
  pressHead($("heads"), l, h);
  const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 3);
  const most = order.map(j => `「${seen.names[j]}」${percent(weights[j])}`).join("，");
  $("looks").textContent = `${headName(l, h)}，看得最多的是${most}。`;
  $("context").replaceChildren(...seen.names.map((name, j) => {
    const span = make("span", name.replace(/^##/, ""), {title: percent(weights[j])});
    span.style.background = `rgba(${colour("--hue")}, ${.8 * Math.sqrt(weights[j])})`;
    return span;
  }));
  const layer = `第 ${l + 1} 层`, experts = new Set(seen.experts?.[l].map(([e]) => e));
  for (const part of off) if (part.startsWith(`${l + 1}.expert`)) experts.add(+part.split("expert")[1]);
  const parts = [[`${l + 1}.${h + 1}`, headName(l, h)], [`${l + 1}.attention`, `${layer}的注意力`],
    [`${l + 1}.feed_forward`, `${layer}的前馈`], ...[...experts].map(e => [`${l + 1}.expert${e}`, `${layer} ${e} 号专家`])];
  const focused = document.activeElement?.dataset.part;
  $("switches").replaceChildren(...parts.map(([part, name]) => switchButton(part, name)));
  if (focused) [...$("switches").children].find(b => b.dataset.part === focused)?.focus();
}

// ---------- 3. 动手改 ----------

/** 一个开关：关掉，或者恢复。 */
function switchButton(part, name) {
  const b = make("button", (off.has(part) ? "恢复" : "关掉") + name, {type: "button",
    class: off.has(part) ? "silent" : "", "aria-disabled": working, "data-part": part});
  b.onclick = () => {
    if (working) return;
    off.has(part) ? off.delete(part) : off.add(part);
    changed();
  };
  return b;
}

/** 关掉的零件变了：说出来，显微镜跟着变。 */
function changed() {
  refresh();
  if (now) open(now.answer, now.at, now.patch);
}

/** 换成另一个词元，从那里接着写；换成「写完了」，就到这里为止。 */
const take = ({id, name, p}) => work("正在写……", async () => {
  const {answer, at} = now, {from, since} = answer.tokens[at], own = answer.given <= at ? since : at;
  const text = INFO.tokens.vocab[id].replace(/^##/, "");
  replace(answer, at, id === eos_id ? [] : [{id, name, text, p, from, since: own}]);
  if (id === eos_id) answer.note.textContent = "（到这里为止）";
  else await speak(answer, {from, since: own});
  await inspect(answer, at);
});

/** 只换这一个，后面的不动：后面的每个词元有多意外，跟着变。 */
const swap = text => work("正在读……", async () => {
  const {answer, at} = now, ids = await job("encode", {text});
  if (ids.length !== 1) throw new Error(`「${text}」是 ${ids.length} 个词元；换上去的要正好是一个`);
  const tokens = answer.tokens.slice(at).map((token, k) => k ? token : {...token, id: ids[0]});
  const whole = [...answer.tokens.slice(0, at), ...tokens];
  for (let first = at; first < whole.length;) {  // 看得见的开头相同的，一起读
    const {from} = whole[first];
    let end = first + 1;
    while (end < whole.length && whole[end].from === from) end++;
    const seen = [...answer.start, ...whole.slice(from, end).map(t => t.id)];
    const read = await job("surprise", {ids: seen, from: seen.length - (end - first), off: [...off]});
    read.forEach((token, k) => { whole[first + k] = {...whole[first + k], ...token}; });
    first = end;
  }
  replace(answer, at, whole.slice(at));
  await inspect(answer, at);
});

/** 另一句话的最后一个词元，第 layer 层之后的向量，换到这里。 */
const patch = (text, layer) => work("正在看……", async () => {
  if (!text.trim()) throw new Error("请先写上另一句话");
  const {error, ids} = SFT ? await job("ask", {turns: [], text}) : {ids: [bos_id, ...await job("encode", {text})]};
  if (error || ids.length > MAX_LEN) throw new Error(error ?? `这句话有 ${ids.length} 个词元，最多 ${MAX_LEN} 个`);
  await inspect(now.answer, now.at, {ids, layer});
});

function startInside() {
  for (let l = 1; l <= INFO.config.n_layers; l++) $("layer").append(make("option", l, {value: l}));
  $("previous").onclick = () => open(now.answer, now.at - 1);
  $("next-token").onclick = () => open(now.answer, now.at + 1);
  $("close").onclick = () => { if (!working) close(); };
  $("swap").onsubmit = e => { e.preventDefault(); swap($("other-token").value); };
  $("patch").onsubmit = e => { e.preventDefault(); patch($("other-text").value, +$("layer").value); };
  $("unpatch").onclick = () => open(now.answer, now.at);
  matchMedia("(prefers-color-scheme: dark)").onchange = () => { if (now) drawInside(); };
}

startInside();
start();
