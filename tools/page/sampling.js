"use strict";
// 采样，用 JavaScript 再写一遍：下一个词元怎样从打分里抽出来，与 generate.py 的规矩相同。
//
//     adjust       绝不选的去掉，自己写过的受罚
//     lottery      打分 -> 抽签的概率：温度、top-k、top-p、min-p
//     draw         抽一个
//     is_looping   是不是只在反复了

/** 打分 (V,) -> 打分 (V,)：banned 绝不选；written 是自己已经写过的，正的除以 penalty，负的乘。 */
function adjust(logits, written, penalty, banned) {
  const scores = Float32Array.from(logits);
  for (const id of banned) scores[id] = -Infinity;
  for (const id of new Set(written)) scores[id] *= scores[id] > 0 ? 1 / penalty : penalty;
  return scores;
}

/** 最高的 k 个 [编号, 打分]，从高到低。 */
function highest(scores, k) {
  const best = [];
  for (let id = 0; id < scores.length; id++) {
    if (scores[id] === -Infinity || (best.length >= k && scores[id] <= best[k - 1][1])) continue;
    let place = Math.min(best.length, k - 1);
    for (; place > 0 && best[place - 1][1] < scores[id]; place--) best[place] = best[place - 1];
    best[place] = [id, scores[id]];
  }
  return best;
}

/** 抽签的概率 [[编号, 概率], …]，从高到低，和为 1；candidates 是 top-k 留下的。 */
function lottery(candidates, {temp, top_p, min_p}) {
  if (temp < 1e-3) return [[candidates[0][0], 1]];
  const probs = candidates.map(([, score]) => Math.exp((score - candidates[0][1]) / temp));
  const total = probs.reduce((sum, p) => sum + p, 0);
  let before = 0;
  const kept = [];
  for (const [place, [id]] of candidates.entries()) {
    const p = probs[place] / total;
    if (top_p < 1 && before >= top_p) break;  // 排在前面的已经够了
    before += p;
    kept.push([id, p]);
  }
  const lowest = min_p * kept[0][1], left = kept.filter(([, p]) => p >= lowest);
  const sum = left.reduce((all, [, p]) => all + p, 0);
  return left.map(([id, p]) => [id, p / sum]);
}

/** 抽一个编号。 */
function draw(chances, random = Math.random) {
  let left = random();
  for (const [id, p] of chances) if ((left -= p) < 0) return id;
  return chances[0][0];  // 舍入剩下的一点点
}

/** 是不是只在反复了：末尾的一段连说几遍，空行一行接一行，或者同样的一行写了又写。 */
function is_looping(ids, tokenizer, longest = 48) {
  for (let period = 1; period <= Math.min(longest, Math.floor(ids.length / 3)); period++) {
    const span = Math.max((period < 8 ? 4 : 3) * period, 24);  // 短的可能是语气（哈哈哈哈），要多几遍
    if (span > ids.length) continue;
    const tail = ids.slice(-span);
    if (tail.every((id, i) => i < period || id === tail[i - period])) return true;
  }
  if (!ids.length || tokenizer.decode(ids.slice(-1)) !== "\n") return false;
  const lines = tokenizer.decode(ids).split("\n").slice(0, -1);  // 刚写完一行
  if (lines.length > 3 && !lines.slice(-3).some(line => line.trim())) return true;
  const words = lines.map(line => line.replace(/^[\s\p{Nd}.、)）*•-]+/u, "")), last = words[words.length - 1];
  return (last.match(/[一-鿿]/g) ?? []).length > 1 && words.filter(line => line === last).length >= 4;
}
