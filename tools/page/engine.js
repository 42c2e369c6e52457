"use strict";
// 模型，用 JavaScript 再写一遍：与 model.py、experts.py 同名的零件，从下往上读。
//
//     Linear             矩阵乘向量：全部的时间几乎都花在这里
//     RMSNorm            把向量的长度归一
//     RotaryEmbedding    用旋转表示位置
//     KVCache            前文的键与值
//     Attention          注意力
//     FeedForward        前馈（SwiGLU）；MixtureOfExperts 是专家混合
//     Block              注意力 + 前馈，各自加在残差流上
//     Transformer        编号 -> 向量 -> 每个词元的打分
//
// 与 PyTorch 的一份不同的：一次只算一个词元，所以没有批次，也没有遮罩，前文都在 KVCache 里，后面的
// 还没有写；读一段开头，就是一个一个地读。矩阵可以是 int8 的；词表补齐的那些行没有对应的词元，没有带来。
//
// 图例：C 宽度，H 头数，K 键值头数，D 头宽，I 前馈的中间宽度，E 专家数，V 词表大小，S 看得见几个位置。
// 向量都是 Float32Array；各个零件的输出写在自己的一块内存里，下一次会盖掉。

/** 矩阵乘向量，看得懂的一份：每行与 x 作内积，写进 y。 */
function multiply(matrix, x, y) {
  for (let row = 0, at = 0; row < y.length; row++) {
    let sum = 0;
    for (let i = 0; i < x.length; i++, at++) sum += matrix[at] * x[i];
    y[row] = sum;
  }
}

/** int8 的一份：四行的同一列叠在一个 32 位数里，读一次，移位拆成四个，各乘各的。 */
function multiply_int8(matrix, x, y) {
  for (let row = 0, at = 0; row < y.length; row += 4) {
    let a = 0, b = 0, c = 0, d = 0;
    for (let i = 0; i < x.length; i++, at++) {
      const four = matrix[at], value = x[i];
      a += (four << 24 >> 24) * value;  // 移到最高处再移回来，带上符号
      b += (four << 16 >> 24) * value;
      c += (four << 8 >> 24) * value;
      d += (four >> 24) * value;
    }
    y[row] = a; y[row + 1] = b; y[row + 2] = c; y[row + 3] = d;
  }
}

/** 没有偏置的线性层：矩阵 (出, 入) 乘向量。 */
class Linear {
  /** data：fp32 的矩阵，按行存；或者 int8 的，四行叠在一起（行数补到 4 的倍数），每行另有一个倍数 scale。 */
  constructor({data, scale, shape: [n_out, n_in]}) {
    Object.assign(this, {data, scale, n_in});
    this.all = new Float32Array(scale ? scale.length : n_out);
    this.y = this.all.subarray(0, n_out);
  }

  /** (入,) -> (出,) */
  forward(x) {
    if (!this.scale) multiply(this.data, x, this.y);
    else {
      multiply_int8(this.data, x, this.all);
      for (let row = 0; row < this.y.length; row++) this.y[row] *= this.scale[row];
    }
    return this.y;
  }

  /** 第 n 行 (入,)：词嵌入就是这样查的。 */
  row(n) {
    const {data, scale, n_in} = this;
    if (!scale) return data.slice(n * n_in, (n + 1) * n_in);
    const first = (n >> 2) * n_in, left = 24 - 8 * (n % 4);
    return Float32Array.from({length: n_in}, (_, i) => (data[first + i] << left >> 24) * scale[n]);
  }
}

/** 除以均方根，再乘可学的增益。 */
class RMSNorm {
  constructor({data}, eps) {
    Object.assign(this, {weight: data, eps, y: new Float32Array(data.length)});
  }

  /** (C,) -> (C,) */
  forward(x) {
    let sum = 0;
    for (let i = 0; i < x.length; i++) sum += x[i] * x[i];
    const scale = 1 / Math.sqrt(sum / x.length + this.eps);
    for (let i = 0; i < x.length; i++) this.y[i] = x[i] * scale * this.weight[i];
    return this.y;
  }
}

/** 把查询和键按位置旋转，内积便只取决于相对距离。 */
class RotaryEmbedding {
  constructor(head_dim, theta) {
    this.frequencies = Float32Array.from({length: head_dim / 2}, (_, i) => theta ** (-2 * i / head_dim));
  }

  /** (D,)，当场改：第 i 维与第 i + D/2 维组成一个平面，在其中旋转。 */
  rotate(x, position) {
    const half = x.length / 2;
    for (let i = 0; i < half; i++) {
      const angle = Math.fround(position * this.frequencies[i]);  // 与 PyTorch 的一样，取到 fp32
      const cos = Math.cos(angle), sin = Math.sin(angle), a = x[i], b = x[i + half];
      x[i] = a * cos - b * sin;
      x[i + half] = b * cos + a * sin;
    }
  }
}

/** 每层的键与值 (S, K, D)，写在各自位置的那一格里。 */
class KVCache {
  constructor({n_layers, max_len, n_kv_heads, head_dim}) {
    this.width = n_kv_heads * head_dim;
    const make = () => Array.from({length: n_layers}, () => new Float32Array(max_len * this.width));
    [this.keys, this.values] = [make(), make()];
  }

  update(layer, position, k, v) {
    this.keys[layer].set(k, position * this.width);
    this.values[layer].set(v, position * this.width);
    return [this.keys[layer], this.values[layer]];
  }
}

/** 把打分变成和为 1 的权重，当场改：只看前 n 个。 */
function softmax(x, n = x.length) {
  let most = -Infinity, sum = 0;
  for (let i = 0; i < n; i++) if (x[i] > most) most = x[i];
  for (let i = 0; i < n; i++) sum += x[i] = Math.exp(x[i] - most);
  for (let i = 0; i < n; i++) x[i] /= sum;
  return x;
}

/** 分组查询注意力；查询与键先归一。 */
class Attention {
  constructor(take, config, layer) {
    const {n_heads: H, n_kv_heads: K, head_dim: D, norm_eps, max_len} = config;
    Object.assign(this, {layer, H, K, D, y: new Float32Array(H * D)});
    this.query = new Linear(take("query.weight"));
    this.key = new Linear(take("key.weight"));
    this.value = new Linear(take("value.weight"));
    this.out = new Linear(take("out.weight"));
    this.query_norm = new RMSNorm(take("query_norm.weight"), norm_eps);
    this.key_norm = new RMSNorm(take("key_norm.weight"), norm_eps);
    this.weights = Array.from({length: H}, () => new Float32Array(max_len));  // 上一次的，每头一份
  }

  /** (C,) -> (C,)：新的键与值写进缓存，前文的取自其中。 */
  forward(x, {position, cache, rotary}) {
    const q = this.query.forward(x), k = this.key.forward(x), v = this.value.forward(x);
    for (const [heads, norm] of [[q, this.query_norm], [k, this.key_norm]])
      for (let start = 0; start < heads.length; start += this.D) {
        const head = heads.subarray(start, start + this.D);
        head.set(norm.forward(head));
        rotary.rotate(head, position);
      }
    const [keys, values] = cache.update(this.layer, position, k, v);
    for (let head = 0; head < this.H; head++) this.attend(head, q, keys, values, position + 1);
    return this.out.forward(this.y);
  }

  /** 一个头：按查询与各个键有多像，把值加权平均起来，写进 y 的那一段。 */
  attend(head, q, keys, values, S) {
    const {H, K, D, y} = this, width = K * D, weights = this.weights[head];
    const mine = head * D, theirs = Math.floor(head * K / H) * D;  // H/K 个查询头共用一个键值头
    for (let s = 0; s < S; s++) {
      let score = 0;
      for (let i = 0, at = s * width + theirs; i < D; i++) score += q[mine + i] * keys[at + i];
      weights[s] = score / Math.sqrt(D);
    }
    softmax(weights, S);
    y.fill(0, mine, mine + D);
    for (let s = 0; s < S; s++)
      for (let i = 0, at = s * width + theirs; i < D; i++) y[mine + i] += weights[s] * values[at + i];
  }
}

/** SwiGLU：一路经 SiLU 作门，与另一路相乘，再投影回来。 */
class FeedForward {
  constructor(take) {
    this.gate = new Linear(take("gate.weight"));
    this.up = new Linear(take("up.weight"));
    this.down = new Linear(take("down.weight"));
  }

  /** (C,) -> (C,) */
  forward(x) {
    const gate = this.gate.forward(x), up = this.up.forward(x);
    for (let i = 0; i < gate.length; i++) gate[i] *= up[i] / (1 + Math.exp(-gate[i]));
    return this.down.forward(gate);
  }
}

/** 专家混合：路由器挑几位专家，把它们的输出加权相加。每位专家就是一个窄的 FeedForward。 */
class MixtureOfExperts {
  constructor(take, config) {
    const {n_experts: E, n_active, dim} = config;
    this.router = new Linear(take("router.weight"));
    this.experts = Array.from({length: E}, (_, e) => new FeedForward(name => take(`experts.${e}.${name}`)));
    Object.assign(this, {n_active, y: new Float32Array(dim)});
  }

  /** (C,) -> (C,) */
  forward(x) {
    this.y.fill(0);
    for (const [e, weight] of this.route(x)) this.expert(e, x).forEach((value, i) => this.y[i] += weight * value);
    return this.y;
  }

  /** 挑中的几位与它们的权重 [[e, 权重], …]，从大到小，和为 1。 */
  route(x) {
    const probs = [...softmax(this.router.forward(x))].map((p, e) => [e, p]);
    const chosen = probs.sort((a, b) => b[1] - a[1]).slice(0, this.n_active);
    const sum = chosen.reduce((total, [, p]) => total + p, 0);
    return chosen.map(([e, p]) => [e, p / sum]);
  }

  expert(e, x) {
    return this.experts[e].forward(x);
  }
}

/** 一层：先归一再变换，结果加回残差流。 */
class Block {
  constructor(take, config, layer) {
    const inside = name => rest => take(`${name}.${rest}`);
    this.attention_norm = new RMSNorm(take("attention_norm.weight"), config.norm_eps);
    this.attention = new Attention(inside("attention"), config, layer);
    this.feed_forward_norm = new RMSNorm(take("feed_forward_norm.weight"), config.norm_eps);
    this.feed_forward = new (config.n_experts ? MixtureOfExperts : FeedForward)(inside("feed_forward"), config);
  }

  /** (C,) -> (C,)，当场加在 x 上。 */
  forward(x, context) {
    add(x, this.attention.forward(this.attention_norm.forward(x), context));
    add(x, this.feed_forward.forward(this.feed_forward_norm.forward(x)));
    return x;
  }
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

/** 整个模型：编号进，打分出。 */
class Transformer {
  /** weights：{参数的名字: {data, scale}}，名字与 PyTorch 的 state_dict 相同。 */
  constructor(config, weights) {
    const take = name => weights[name];
    this.config = {...config, head_dim: config.dim / config.n_heads};
    this.embedding = new Linear(take("embedding.weight"));
    this.rotary = new RotaryEmbedding(this.config.head_dim, config.rope_theta);
    this.blocks = Array.from({length: config.n_layers}, (_, layer) =>
      new Block(name => take(`blocks.${layer}.${name}`), this.config, layer));
    this.norm = new RMSNorm(take("norm.weight"), config.norm_eps);
  }

  /** 读一个词元：编号与它的位置 -> 读完所有层之后的向量 (C,)。 */
  hidden(id, position, cache) {
    let x = this.embedding.row(id);
    for (const block of this.blocks) x = block.forward(x, {position, cache, rotary: this.rotary});
    return this.norm.forward(x);
  }

  /** 向量 -> 打分 (V,)：与每个词元的嵌入作内积。 */
  score(x) {
    return this.embedding.forward(x);
  }
}
