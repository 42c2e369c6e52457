// 怎样画：看进去的网页（tools/explain，tools/web 的显微镜就是它）与带得走的网页（tools/page）都用这一份。
//
//     bars tint                                         横条，越没料到越深的底色
//     tokenRow pressToken                               一串词元，按意外上色，方向键可换
//     prepare shade headGrid pressHead                  注意力的深浅
//     drawNext drawLens drawNorms drawExpertBars        一个位置的各样数

const $ = id => document.getElementById(id);
const percent = p => p === 0 ? "0.0%" : p < 0.001 ? "<0.1%" : (100 * p).toFixed(1) + "%";
const bits = p => -Math.log2(Math.max(p, 1e-30));
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const layerName = l => l === 0 ? "词嵌入" : `第 ${l} 层`;
const headName = (l, h) => `第 ${l + 1} 层第 ${h + 1} 头`;

function make(tag, text, attributes) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  for (const [k, v] of Object.entries(attributes || {})) e.setAttribute(k, v);
  return e;
}

/** 每行：[名字（文字或一个零件）, [[长短, 样式], …], 后面的话, 加粗]。 */
function bars(box, rows) {
  box.replaceChildren(...rows.flatMap(([name, lengths, words, bold]) => {
    const lane = make("div");
    for (const [length, style] of lengths) {
      const bar = make("i", undefined, {class: style || ""});
      bar.style.width = 100 * Math.min(1, length) + "%";
      if (lengths.length > 1) bar.style.height = ".5rem";
      lane.append(bar);
    }
    const tag = bold ? "b" : "span";
    return [name instanceof Node ? name : make(tag, name), lane, make(tag, words)];
  }));
}

// ---------- 一串词元 ----------

/** 底色：越没料到越深（style.css 里的 --surprise）。 */
const tint = (e, p) => e.style.setProperty("--surprise", Math.min(.35, bits(p) / 30));

/** 一个词元的按钮：{name, p, small, title}，p 是看着前文给它的概率。 */
function tokenButton({name, p, small, title}) {
  const words = title || `看着前文，它的概率是 ${percent(p)}（意外 ${bits(p).toFixed(1)} 比特）`;
  const b = make("button", name, {type: "button", class: "token", title: words});
  if (small !== undefined) b.append(make("small", small));
  tint(b, p);
  return b;
}

/** 一串词元，点一个或用左右方向键换一个。 */
function tokenRow(box, tokens, pick) {
  box.replaceChildren(...tokens.map(tokenButton));
  [...box.children].forEach((b, i) => b.onclick = () => pick(i));
  box.onkeydown = e => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[e.key], at = [...box.children].indexOf(document.activeElement);
    const next = step && box.children[at + step];
    if (next) { e.preventDefault(); pick(at + step); box.children[at + step].focus(); }
  };
}
function pressToken(box, at) {
  [...box.children].forEach((b, j) => {
    b.setAttribute("aria-pressed", j === at); b.tabIndex = j === at ? 0 : -1; });
  const chosen = box.children[at];
  box.scrollTop = chosen.offsetTop - (box.clientHeight - chosen.offsetHeight) / 2;
}

// ---------- 注意力 ----------

function prepare(canvas, width, height) {  // 高分辨率的屏幕上也清楚
  const scale = window.devicePixelRatio || 1, c = canvas.getContext("2d");
  canvas.width = width * scale; canvas.height = height * scale;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  c.scale(scale, scale);
  return c;
}

/** 一格一格的权重，深浅按平方根；每格宽 size，高 height。 */
function shade(c, rows, columns, weight, x, y, size, height = size) {
  const hue = colour("--hue");
  c.fillStyle = colour("--soft");
  c.fillRect(x, y, columns * size, rows * height);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) {
    c.fillStyle = `rgba(${hue}, ${Math.sqrt(weight(i, j))})`;
    c.fillRect(x + j * size, y + i * height, Math.max(size - (size > 6), 1), Math.max(height - (height > 6), 1));
  }
}

/** 每层一行、每头一列的小图，点开一个。 */
function headGrid(box, L, H, draw, pick) {
  box.style.gridTemplateColumns = `max-content repeat(${H}, max-content)`;
  box.replaceChildren();
  for (let l = 0; l < L; l++) {
    box.append(make("span", layerName(l + 1)));
    for (let h = 0; h < H; h++) {
      const b = make("button", undefined, {type: "button", "aria-label": headName(l, h), title: headName(l, h),
        "data-layer": l, "data-head": h});
      const canvas = make("canvas", undefined, {"aria-hidden": "true"});
      draw(canvas, l, h);
      b.append(canvas);
      b.onclick = () => pick(l, h);
      box.append(b);
    }
  }
}
function pressHead(box, layer, head) {
  for (const b of box.querySelectorAll("button"))
    b.setAttribute("aria-pressed", +b.dataset.layer === layer && +b.dataset.head === head);
}

// ---------- 一个位置：{target, target_p, next, lens, lens_target_p, norms, writes, experts} ----------

// next_before：动手之前，同样几个词元的概率（斜纹）
const drawNext = (box, {next, target, next_before}) => bars(box, next.map(([name, p], k) => next_before ?
  [name, [[p], [next_before[k], "less"]], `${percent(next_before[k])} → ${percent(p)}`, name === target] :
  [name, [[p]], percent(p), name === target]));

const drawLens = (box, {lens, lens_target_p}) => bars(box, lens_target_p.map((p, l) =>
  [layerName(l), [[p]], `${percent(p)}　最想写「${lens[l][0][0]}」`]));

function drawNorms(box, {norms, writes}) {
  const longest = Math.max(...norms);
  bars(box, norms.map((norm, l) => {
    if (l === 0) return [layerName(0), [[norm / longest]], norm.toFixed(2)];
    const [attention, feedForward] = writes[l - 1];
    return [layerName(l), [[norm / longest], [attention / longest, "more"], [feedForward / longest, "less"]],
      `${norm.toFixed(2)}　注意力 ${attention.toFixed(2)}，前馈 ${feedForward.toFixed(2)}`];
  }));
}

const drawExpertBars = (box, {experts}) => bars(box, experts.map((pairs, l) => [layerName(l + 1),
  pairs.map(([, w]) => [w]), pairs.map(([e, w]) => `${e} 号 ${percent(w)}`).join("，")]));
