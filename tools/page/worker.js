"use strict";
// 模型住在自己的线程里：算的时候，页面照样滚得动、按得动。页面送来 {id, job, ...}，这里做完送回 {id, result}；
// 写字的一边写一边送 {id, token}。一次只做一件事，"stop" 除外。

let model, tokenizer, banned, cache;
let read_ids = [], read_with = "";  // 缓存里是哪些编号，读的时候动过什么手脚
let stopped = 0;  // 编号不大于它的事都不要了

const CONTEXT_FOR_PROMPT = 0.75;  // 其余留给回答

/** 字节与目录 -> {参数的名字: {shape, data, scale}}。 */
function unpack(places, bytes) {
  return Object.fromEntries(Object.entries(places).map(([name, {shape, at, scale_at}]) => {
    const [n_out, n_in = 1] = shape, rows = 4 * Math.ceil(n_out / 4);
    if (scale_at === undefined) return [name, {shape, data: new Float32Array(bytes, at, n_out * n_in)}];
    return [name, {shape, data: new Int32Array(bytes, at, rows * n_in / 4), scale: new Float32Array(bytes, scale_at, rows)}];
  }));
}

/** base64 -> 字节。 */
function from_base64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text).buffer;
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes.buffer;
}

/** 读完 ids，返回最后一个词元之后的向量；开头读过的不再读。changes：{off, patch}。 */
function read(ids, changes = {}) {
  const {off = [], patch = null} = changes, how = JSON.stringify([off, patch && [...patch.vector], patch?.layer, patch?.position]);
  let done = 0;
  if (how === read_with) while (done < ids.length - 1 && ids[done] === read_ids[done]) done++;
  [read_ids, read_with] = [[...ids], how];
  const restore = change(model, off, patch);
  try {
    let x;
    for (; done < ids.length; done++) x = model.hidden(ids[done], done, cache);
    return x;
  } finally {
    restore();
  }
}

const probability = (logits, id) => softmax(logits.slice())[id];
const best = (probs, k) => highest(probs, k).map(([id, p]) => [tokenizer.label(id), p]);
const pause = () => new Promise(resolve => setTimeout(resolve));  // 让 "stop" 进得来

const jobs = {
  /** 装好模型。 */
  open({config, places, weights, tokens}) {
    model = new Transformer(config, unpack(places, from_base64(weights)));
    [tokenizer, banned] = [new Tokenizer(tokens), tokens.banned];
    cache = new KVCache(model.config);
    return {};
  },

  encode: ({text}) => tokenizer.encode(text),

  /** 几轮编号与这一问 -> 交给模型的编号；太长就从最早的一问一答起忘掉（sft_chat.py 的 fit）。 */
  ask({turns, text}) {
    const question = tokenizer.turn("user", tokenizer.encode(text)), prefix = tokenizer.reply_prefix();
    const limit = Math.floor(model.config.max_len * CONTEXT_FOR_PROMPT) - prefix.length;
    if (question.length > limit) return {error: `这句话有 ${question.length} 个词元，最多 ${limit} 个；请说短一些`};
    let kept = [...turns, question], forgotten = 0;
    for (; kept.flat().length > limit && kept.length > 2; forgotten++) kept = kept.slice(2);
    return {turns: kept.slice(0, -1), question, ids: [...kept.flat(), ...prefix], forgotten};
  },

  /** 接着 ids 往下写，written 是其中已经写出的最后几个；写到 <|im_end|>、写满、反复或者叫停。 */
  async write({id, ids, written = [], sampling, off}) {
    let resting = performance.now(), why = "";
    ids = [...ids]; written = [...written];
    while (!why) {
      if (written.length >= sampling.max) { why = `写满了 ${sampling.max} 个词元`; break; }
      if (ids.length >= model.config.max_len) { why = `写满了 ${model.config.max_len} 个词元的上下文`; break; }
      const logits = model.score(read(ids, {off}));
      const chances = lottery(highest(adjust(logits, written, sampling.penalty, banned), sampling.top_k), sampling);
      const token = draw(chances), p = probability(logits, token);
      if (token === tokenizer.eos_id) { why = "end"; break; }
      ids.push(token); written.push(token);
      postMessage({id, token: {id: token, name: tokenizer.label(token), text: tokenizer.decode([token]), p}});
      if (is_looping(written, tokenizer)) why = "开始重复，停在这里";
      if (performance.now() - resting > 30) { await pause(); resting = performance.now(); }
      if (id <= stopped) why = "已停止";
    }
    return {why};
  },

  /** 每个词元的概率，从第 from 个起：看着前文，它有多意外。 */
  surprise({ids, from, off}) {
    const result = [];
    for (let i = Math.max(1, from); i < ids.length; i++) {
      const p = probability(model.score(read(ids.slice(0, i), {off})), ids[i]);
      result.push({id: ids[i], name: tokenizer.label(ids[i]), text: tokenizer.decode([ids[i]]), p});
    }
    return result;
  },

  /** 读到 ids 的最后一个为止，它猜下一个是什么，途中发生了什么；target 是真的下一个（没有就是最可能的）。 */
  look({ids, target, written, penalty, off, patch}) {
    const x = patch && jobs.vector(patch);
    const changes = {off, patch: patch && {layer: patch.layer, position: ids.length - 1, vector: x}};
    read(ids, changes);
    const restore = change(model, off, changes.patch);
    let seen;
    try { seen = look(model, ids[ids.length - 1], ids.length - 1, cache); } finally { restore(); }
    const logits = model.score(seen.hidden).slice(), probs = softmax(logits.slice());
    target ??= highest(probs, 1)[0][0];
    const lens = seen.residual.map(vector => softmax(model.score(model.norm.forward(vector)).slice()));
    return {
      target: tokenizer.label(target), target_id: target, target_p: probs[target], next: best(probs, 10),
      // 参加抽签的：[编号, 名字, 模型给的概率, 罚过的打分]，由页面照温度与 top-p 画
      candidates: highest(adjust(logits, written, penalty, banned), 200).map(([id, score]) => [id, tokenizer.label(id), probs[id], score]),
      lens: lens.map(layer => best(layer, 3)), lens_target_p: lens.map(layer => layer[target]),
      norms: seen.residual.map(length), writes: seen.writes, attention: seen.attention, experts: seen.experts,
      names: ids.map(id => tokenizer.label(id)),
    };
  },

  /** 另一段文字的最后一个词元，读到第 layer 层之后的向量。 */
  vector({ids, layer}) {
    read(ids);
    return look(model, ids[ids.length - 1], ids.length - 1, cache).residual[layer];
  },

  /** 每个位置的打分，只给核对用。 */
  logits: ({ids, off}) => ids.map((_, i) => model.score(read(ids.slice(0, i + 1), {off})).slice()),

  decode: ({ids}) => tokenizer.decode(ids),
};

let queue = Promise.resolve();  // 一件做完再做下一件
onmessage = ({data}) => {
  if (data.job === "stop") { stopped = data.id; return; }
  queue = queue.then(async () => {
    try {
      postMessage({id: data.id, result: await jobs[data.job](data)});
    } catch (error) {
      postMessage({id: data.id, error: String(error)});
    }
  });
};
