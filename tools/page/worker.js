"use strict";
// 模型住在自己的线程里：算的时候，页面照样滚得动、按得动。页面送来 {id, job, ...}，这里做完送回 {id, result}；
// 写字的一边写一边送 {id, token}。一件做完再做下一件；"stop" 不排队，正在做的歇下来时看见它。

let model, tokenizer, banned, cache;
let read_ids = [], read_with = "";  // 缓存里是哪些编号，读的时候动过什么手脚
let stopped = 0;  // 编号不大于它的事都不要了
let rested = 0;  // 上次歇是什么时候
const bell = new MessageChannel();  // 歇的时候给自己送一封信：setTimeout 每次至少要等 4 毫秒

const CONTEXT_FOR_PROMPT = 0.75;  // 其余留给回答
const CANDIDATES = 200;  // 至多送回多少个候选，也是 top-k 的上限
const STOPPED = "已停止";

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

/** 歇一歇，让 "stop" 进得来；这件事叫停了，就不再往下做。 */
async function rest(id) {
  if (performance.now() - rested > 30) {
    await new Promise(resolve => { bell.port1.onmessage = resolve; bell.port2.postMessage(0); });
    rested = performance.now();
  }
  if (id <= stopped) throw new Error(STOPPED);
}

/** 读完 ids，返回最后一个词元之后的向量；开头读过的不再读。changes：{off, patch}；id 是哪件事。 */
async function read(ids, {off = [], patch = null} = {}, id = Infinity) {
  const how = JSON.stringify([off, patch && {...patch, vector: [...patch.vector]}]);
  let done = 0;
  if (how === read_with) while (done < ids.length - 1 && ids[done] === read_ids[done]) done++;
  [read_ids, read_with] = [ids.slice(0, done), how];
  let x;
  for (; done < ids.length; done++) {
    if (done < ids.length - 1) await rest(id);
    const restore = change(model, off, patch);
    try { x = model.hidden(ids[done], done, cache); } finally { restore(); }
    read_ids.push(ids[done]);
  }
  return x;
}

const probability = (logits, id) => softmax(logits.slice())[id];
const named = (id, p) => ({id, name: tokenizer.label(id), text: tokenizer.decode([id]), p});
const best = (probs, k) => highest(probs, k).map(([id, p]) => [tokenizer.label(id), p]);

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
    ids = [...ids]; written = [...written];
    for (let n = 0; n < sampling.max; n++) {
      if (ids.length >= model.config.max_len) return {why: `写满了 ${model.config.max_len} 个词元的上下文`};
      const logits = model.score(await read(ids, {off}, id));
      const candidates = highest(adjust(logits, written, sampling.penalty, banned), sampling.top_k);
      const token = draw(lottery(candidates, sampling)), p = probability(logits, token);
      if (token === tokenizer.eos_id) return {why: "end"};
      ids.push(token); written.push(token);
      postMessage({id, token: named(token, p)});
      if (is_looping(written, tokenizer)) return {why: "开始重复，停在这里"};
      await rest(id);
    }
    return {why: `写满了 ${sampling.max} 个词元`};
  },

  /** 每个词元的概率，从第 from 个起：看着前文，它有多意外。 */
  async surprise({id, ids, from, off}) {
    const result = [];
    for (let i = Math.max(1, from); i < ids.length; i++) {
      await rest(id);
      const p = probability(model.score(await read(ids.slice(0, i), {off}, id)), ids[i]);
      result.push(named(ids[i], p));
    }
    return result;
  },

  /** 读到 ids 的最后一个为止，它猜下一个是什么，途中发生了什么。
   *
   *  target：真的下一个（没有就是最可能的）；written、penalty：抽签时罚哪些；
   *  patch：{ids, layer}，换上那段文字的最后一个词元在这一层之后的向量；also：另外要哪些编号的概率。
   */
  async look({id, ids, target = null, written, penalty, off, patch = null, also = []}) {
    const position = ids.length - 1;
    const moved = patch && {layer: patch.layer, position, vector: await jobs.vector({id, ...patch})};
    await read(ids, {off, patch: moved}, id);
    const restore = change(model, off, moved);
    let seen;
    try { seen = look(model, ids[position], position, cache); } finally { restore(); }
    const logits = model.score(seen.hidden).slice(), probs = softmax(logits.slice());
    target ??= highest(probs, 1)[0][0];
    const scores = highest(adjust(logits, written, penalty, banned), CANDIDATES);
    const lens = seen.residual.map(vector => softmax(model.score(model.norm.forward(vector)).slice()));
    return {
      target: tokenizer.label(target), target_id: target, target_p: probs[target],
      // 参加抽签的：[编号, 名字, 模型给的概率, 罚过的打分]，由页面照温度与 top-p 画
      candidates: scores.map(([token, score]) => [token, tokenizer.label(token), probs[token], score]),
      also: also.map(token => probs[token]),
      lens: lens.map(layer => best(layer, 3)), lens_target_p: lens.map(layer => layer[target]),
      norms: seen.residual.map(length), writes: seen.writes, attention: seen.attention,
      experts: seen.experts, names: ids.map(token => tokenizer.label(token)),
    };
  },

  /** 另一段文字的最后一个词元，读到第 layer 层之后的向量。 */
  async vector({id, ids, layer}) {
    await read(ids, {}, id);
    return look(model, ids[ids.length - 1], ids.length - 1, cache).residual[layer];
  },

  /** 每个位置的打分，只给核对用。 */
  async logits({ids, off}) {
    const rows = [];
    for (let n = 1; n <= ids.length; n++) rows.push(model.score(await read(ids.slice(0, n), {off})).slice());
    return rows;
  },

  decode: ({ids}) => tokenizer.decode(ids),
};

let queue = Promise.resolve();  // 一件做完再做下一件
onmessage = ({data}) => {
  if (data.job === "stop") { stopped = data.id; return; }
  queue = queue.then(async () => {
    try {
      postMessage({id: data.id, result: await jobs[data.job](data)});
    } catch (error) {
      postMessage({id: data.id, error: error.message});
    }
  });
};
