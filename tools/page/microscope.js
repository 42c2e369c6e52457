"use strict";
// 显微镜与手：不改 engine.js，换掉零件的一个方法，在它算完之后看一眼，或者动一动（microscope.py 里的钩子）。
//
//     after     挂一个钩子
//     change    关掉几个零件，换上一个向量
//     look      读一个词元，记下途中的各样数

/** 零件的一个方法算完之后，再交给 then(结果, ...输入)；返回取下它的办法。 */
function after(part, method, then) {
  const before = part[method];
  part[method] = (...inputs) => {
    const result = before.apply(part, inputs);
    return then(result, ...inputs) ?? result;
  };
  return () => { part[method] = before; };
}

/** 关掉几个零件，换上一个向量；返回恢复原状的办法。层、头、专家都从 1 数起。
 *
 *  off：["2.1"（第 2 层第 1 头）, "2.attention", "2.feed_forward", "2.expert3", …]。
 *  patch：{layer, position, vector}：读到 position 时，第 layer 层之后的残差流换成 vector；没有就是 null。
 */
function change(model, off, patch) {
  const undo = off.map(name => {
    const [layer, what] = name.split("."), {attention, feed_forward} = model.blocks[layer - 1];
    const zero = y => { y.fill(0); };
    if (what === "attention") return after(attention, "forward", zero);
    if (what === "feed_forward") return after(feed_forward, "forward", zero);
    if (what.startsWith("expert")) return after(feed_forward, "expert", (y, e) => { if (e === what.slice(6) - 1) zero(y); });
    const D = attention.D, only = what - 1;
    return after(attention, "attend", (_, head) => { if (head === only) zero(attention.y.subarray(head * D, (head + 1) * D)); });
  });
  if (patch) undo.push(after(model.blocks[patch.layer - 1], "forward", (x, _, {position}) => {
    if (position === patch.position) x.set(patch.vector);
  }));
  return () => undo.reverse().forEach(restore => restore());
}

const length = vector => Math.hypot(...vector);

/** 读一个词元，记下：各层的残差流 residual，注意力与前馈各写进多长的向量 writes，
 *  各头的注意力 attention[层][头]，挑中的专家 experts[层]（稠密的是 null），最后的向量 hidden。 */
function look(model, id, position, cache) {
  const seen = {residual: [], writes: model.blocks.map(() => []), experts: model.config.n_experts ? [] : null};
  const undo = model.blocks.flatMap(({attention, feed_forward}, l) => [
    after(attention, "forward", y => { seen.writes[l][0] = length(y); }),
    after(feed_forward, "forward", y => { seen.writes[l][1] = length(y); }),
    ...seen.experts ? [after(feed_forward, "route", pairs => { seen.experts[l] = pairs.map(([e, w]) => [e + 1, w]); })] : [],
  ]);
  undo.push(after(model.embedding, "row", x => { seen.residual[0] = x.slice(); }));
  model.blocks.forEach((block, l) => undo.push(after(block, "forward", x => { seen.residual[l + 1] = x.slice(); })));
  try {
    seen.hidden = model.hidden(id, position, cache).slice();
  } finally {
    undo.reverse().forEach(restore => restore());
  }
  seen.attention = model.blocks.map(({attention}) => attention.weights.map(row => row.slice(0, position + 1)));
  return seen;
}
