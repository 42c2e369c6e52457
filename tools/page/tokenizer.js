"use strict";
// 分词器，用 JavaScript 再写一遍：文字与编号互换，与 tokenizer.py 逐个编号相同。
//
// 一段文字从左到右走：补上的词元（引号、换行、空格……）直接查表；汉字与标点各自单独成词；
// 字母、数字、假名等连成一截，从左起取词表里最长的一段，余下的前面加上 ## 再取（WordPiece）。
//
// 哪些字单独成词、哪些会去掉，取决于 Unicode 的版本，各个浏览器不同；所以不问浏览器，
// 用做成网页时从 tokenizer.py 抄来的表（kinds）。拆重音、转小写问它：这两样，已有的字不会再变。

const GONE = 1, SPACE = 2, ALONE = 3;  // 去掉的、当作空白的、单独成词的；其余的与左右相连
const LONGEST_WORD = 100;  // 再长的单词不切，就是 [UNK]
const VISIBLE = {"\n": "⏎", " ": "␣", "\u3000": "□", "\t": "⇥"};

class Tokenizer {
  /** vocab：词表，第几个就是几号；n_bert：前多少个是 BERT 的；n_control：其后多少个是控制词元。 */
  constructor({vocab, n_bert, n_control, kinds, roles, bos_id, eos_id, unk_id}) {
    Object.assign(this, {vocab, roles, bos_id, eos_id, unk_id});
    this.first_text = n_bert + n_control;
    this.is_control = id => id >= n_bert && id < this.first_text;
    this.numbers = new Map(vocab.slice(0, n_bert).map((token, id) => [token, id]));
    this.added = new Map(vocab.slice(this.first_text).map((token, i) => [token, this.first_text + i]));
    this.kinds = new Uint8Array(0x110000);
    for (const [kind, ranges] of [[GONE, kinds.gone], [SPACE, kinds.space], [ALONE, kinds.alone]])
      for (const [first, last] of ranges) this.kinds.fill(kind, first, last + 1);
  }

  /** 文字 -> 编号。文字里写着的控制词元只是普通文字。 */
  encode(text) {
    const ids = [];
    let word = "";
    const finish = () => { if (word) ids.push(...this.wordpiece(word)); word = ""; };
    for (const character of text) {
      const kind = this.kinds[character.codePointAt(0)], added = this.added.get(character);
      if (added === undefined && kind === GONE) continue;
      if (added === undefined && !kind) { word += this.normalize(character); continue; }
      finish();
      if (added !== undefined) ids.push(added);
      else if (kind === ALONE) ids.push(...this.wordpiece(this.normalize(character)));
    }
    finish();
    return ids;
  }

  /** 拆出重音符号，去掉，再转小写：é -> e。 */
  normalize(character) {
    const letters = [...character.normalize("NFD")].filter(c => this.kinds[c.codePointAt(0)] !== GONE);
    return letters.map(c => c.toLowerCase()).join("");
  }

  /** 一个单词 -> 编号：每次取最长的；有一段取不出，整个就是 [UNK]。 */
  wordpiece(word) {
    const letters = [...word], ids = [];
    if (letters.length > LONGEST_WORD) return [this.unk_id];
    for (let start = 0, end; start < letters.length; start = end) {
      let id;
      for (end = letters.length; end > start; end--) {
        id = this.numbers.get((start ? "##" : "") + letters.slice(start, end).join(""));
        if (id !== undefined) break;
      }
      if (id === undefined) return [this.unk_id];
      ids.push(id);
    }
    return ids;
  }

  /** 编号 -> 文字：去掉 ##，首尾相接，略去控制词元。 */
  decode(ids) {
    return ids.filter(id => !this.is_control(id)).map(id => this.vocab[id].replace(/^##/, "")).join("");
  }

  /** 给人看的名字：看不见的字换成看得见的。 */
  label(id) {
    return VISIBLE[this.vocab[id]] ?? this.vocab[id];
  }

  /** 一轮发言的编号，带上首尾标记与角色。 */
  turn(role, ids) {
    return [this.bos_id, this.roles[role], ...ids, this.eos_id];
  }

  /** 轮到模型说话时的开头。 */
  reply_prefix() {
    return [this.bos_id, this.roles.assistant];
  }
}
