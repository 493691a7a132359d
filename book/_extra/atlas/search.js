// Search: which concepts have all words of a query, in a gene, word, gene set, cell type, name or number; and by what.
"use strict";

scsaeAtlas.makeSearch = (index, terms) => {
  const KINDS = { gene: ["gene", 30], type: ["cell type", 20], set: ["gene set", 20], word: ["word", 10] }; // and what a hit weighs
  const n = index.concepts.number.length;
  const titles = index.concepts.number.map((_, i) => scsaeAtlas.title(i));
  const names = titles.map((name) => name.toLowerCase());
  const lower = {};
  for (const kind of Object.keys(KINDS)) lower[kind] = terms[kind][0].map((term) => term.toLowerCase());

  // How well a text has a word: 4 all of it, 3 at its start, 2 at the start of a word, 1 inside; 0 not.
  function fit(text, word) {
    const at = text.indexOf(word);
    if (at < 0) return 0;
    if (text.length === word.length) return 4;
    if (at === 0) return 3;
    if (/[^a-z0-9]/.test(text[at - 1])) return 2;
    return word.length > 2 ? 1 : 0;
  }

  function one(word) {
    const score = new Float32Array(n);
    const why = new Array(n);
    const better = (i, value, reason) => { if (value > score[i]) { score[i] = value; why[i] = reason; } };
    for (const [kind, [words, weight]] of Object.entries(KINDS)) {
      lower[kind].forEach((text, t) => {
        const value = fit(text, word);
        if (!value) return;
        const places = terms[kind][1][t], reason = [words, terms[kind][0][t]];
        places.forEach((i, rank) => better(i, (value > 1 ? weight : 0) + value + 1 - rank / places.length, reason)); // the strongest first
      });
    }
    for (let i = 0; i < n; i++) {
      const value = fit(names[i], word);
      if (value) better(i, (value > 1 ? 40 : 0) + value + (index.concepts.f1[i] ?? 0), ["name", titles[i]]);
    }
    const number = /^\d+$/.test(word) ? index.concepts.number.indexOf(Number(word)) : -1;
    if (number >= 0) better(number, 99, ["number", word]);
    return { score, why };
  }

  // null for an empty query; else { score, why }, 0 where a concept is not found.
  function search(query) {
    const phrase = query.trim().toLowerCase().replace(/\s+/g, " ");
    if (!phrase) return null;
    const whole = one(phrase);
    const words = phrase.split(" ");
    if (words.length === 1) return whole;
    const parts = words.map(one);
    for (let i = 0; i < n; i++) {
      const least = Math.min(...parts.map((part) => part.score[i]));
      if (whole.score[i]) whole.score[i] += 100; // a phrase before its words
      else if (least) { whole.score[i] = least; whole.why[i] = parts[0].why[i]; }
    }
    return whole;
  }

  // Genes whose symbol starts like this.
  search.genes = (query, most = 6) => {
    const word = query.trim().toLowerCase();
    return word ? index.genes.filter((gene) => gene.toLowerCase().startsWith(word)).sort((a, b) => a.length - b.length).slice(0, most) : [];
  };
  return search;
};
