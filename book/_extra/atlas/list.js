// The list of concepts: search, filters, sorting, map and table.
"use strict";

scsaeAtlas.list = (() => {
  const { el, link, address, percent, digits, count } = scsaeAtlas;
  const ROWS = 50; // at a time
  const SORTS = { // key: what it is called, value of a concept, highest first
    fit: ["best match", null, true],
    number: ["number", (c, i) => c.number[i], false],
    name: ["name", (c, i) => scsaeAtlas.title(i).toLowerCase(), false],
    grade: ["grade of evidence", (c, i) => (c.grade[i] < 0 ? 99 : c.grade[i]), false],
    cells: ["active cells", (c, i) => c.cells[i], true],
    f1: ["fit to its cell type (F1)", (c, i) => c.f1[i] ?? -1, true],
    drivers: ["genes with an effect", (c, i) => c.drivers[i], true],
  };
  let index, c, bySize, search = null, view, map, inputs, colorOf, rows = ROWS, found = [], opened = null, heading = "";
  let state = { q: "", kind: [], grade: [], sort: "" };
  const has = (name) => index.tables.includes(name);
  const graded = () => index.grades.length > 0;

  // The colour of a concept, and what the colours mean.
  function colors() {
    const by = inputs.color.value;
    const grades = ["#0072B2", "#56B4E9", "#E69F00", "#999999", "#777777", "#555555"];
    const other = "#999999";
    if (by === "kind") return [(i) => index.kinds[c.kind[i]]?.[1] ?? other, index.kinds.map(([kind, color]) => [short(kind), color])];
    if (by === "grade") return [(i) => grades[c.grade[i]] ?? other, index.grades.map(([grade], k) => [`grade ${grade}`, grades[k]])];
    return [(i) => index.highs[c.high[i]]?.[1] ?? other, index.highs.filter((_, k) => c.high.includes(k))];
  }

  function start(root) {
    index = scsaeAtlas.index;
    c = index.concepts;
    bySize = d3.range(c.number.length).sort((a, b) => c.frequency[b] - c.frequency[a]);
    heading = document.title;
    const control = (words, node) => el("label", { class: "atlas-control" }, el("span", {}, words), node);
    const update = () => { rows = ROWS; apply(); };
    inputs = {
      q: el("input", { type: "search", id: "atlas-search", autocomplete: "off", spellcheck: "false", oninput: update,
        placeholder: "LYZ, antigen, Monocyte, 17 …" }),
      sort: el("select", { onchange: () => { state.sort = inputs.sort.value; update(); } }, Object.entries(SORTS)
        .filter(([key]) => (key !== "grade" || graded()) && (key !== "drivers" || has("drivers")))
        .map(([key, [words]]) => el("option", { value: key }, words))),
      color: el("select", { onchange: () => { legend(); map.repaint(); } },
        [["high", "cell type"], ["kind", "kind"], ...(graded() ? [["grade", "grade"]] : [])].map(([value, words]) => el("option", { value }, words))),
      kind: index.kinds.map(([kind, color]) => choice("kind", kind, short(kind), color, update, kind)),
      grade: index.grades.map(([grade, means]) => choice("grade", grade, grade, null, update, means)),
    };
    inputs.sort.value = "number";
    map = scsaeAtlas.scatter({
      x: c.x, y: c.y, radius: (i) => 2.2 + 13 * Math.sqrt(c.frequency[i]),
      color: (i) => colorOf(i), alpha: (i) => Math.min(Math.max(c.specificity[i] ?? 0, 0.25), 0.95),
      label: (i) => [`${c.number[i]} · ${scsaeAtlas.title(i)}`, `${index.kinds[c.kind[i]]?.[0] ?? ""}, active in ${percent(c.frequency[i])} of cells`,
        ...(c.top[i].length ? [c.top[i].map((g) => index.genes[g]).join(", ")] : [])],
      href: (i) => address({ concept: c.number[i] }),
    }, { label: "Map of the concepts. The table of concepts lists the same.", height: 400 });
    view = el("div", { class: "atlas-list" },
      el("a", { class: "atlas-skip", href: "#atlas-table", onclick: (event) => { event.preventDefault(); view.querySelector("#atlas-table").focus(); } }, "Skip to the table of concepts"),
      el("form", { role: "search", class: "atlas-controls", onsubmit: (event) => event.preventDefault() },
        el("div", { class: "atlas-searchbox" },
          el("label", { for: "atlas-search" }, `Search ${count(c.number.length)} concepts by gene, word, gene set, cell type or name`), inputs.q,
          el("div", { class: "atlas-suggest" })),
        el("div", { class: "atlas-filters" }, filter("Kind", inputs.kind), graded() ? filter("Grade of evidence", inputs.grade) : null)),
      el("div", { class: "atlas-bar" },
        el("p", { class: "atlas-count", role: "status", "aria-live": "polite" }),
        control("Sort by", inputs.sort),
        el("button", { type: "button", onclick: save }, "Download CSV")),
      el("div", { class: "atlas-both" },
        el("section", { class: "atlas-map", "aria-label": "Map of the concepts" }, map.node,
          el("div", { class: "atlas-legend" }),
          el("p", { class: "atlas-note" }, control("Colour:", inputs.color),
            "Near each other: similar vectors. Larger: active in more cells. Stronger colour: a larger share of one cell type. Zoom with the buttons, Ctrl and the wheel, or two fingers.")),
        el("div", { class: "atlas-rows", id: "atlas-table", tabindex: "-1" })));
    root.append(view);
    legend();
    scsaeAtlas.piece("search").then((terms) => {
      search = scsaeAtlas.makeSearch(index, terms);
      if (inputs.q.value) apply();
    });
  }

  const short = (kind) => kind.replace("cross-cell-type: ", "cross: "); // what cross-cell-type concepts turned out to be

  function choice(name, value, words, color, update, title) {
    const input = el("input", { type: "checkbox", name, value, onchange: update });
    const node = el("label", { class: "atlas-choice", title: title || null }, input,
      color ? el("i", { style: { background: color }, "aria-hidden": "true" }) : null, el("span", {}, words), el("small", {}));
    return { input, node, tally: node.querySelector("small") };
  }

  const filter = (words, choices) => el("fieldset", {}, el("legend", {}, words), choices.map(({ node }) => node));

  function legend() {
    const [of, names] = colors();
    colorOf = of;
    view.querySelector(".atlas-legend").replaceChildren(...names.map(([name, color]) => el("span", {}, el("i", { style: { background: color } }), name)));
  }

  // Which concepts are shown, and in which order.
  function choose() {
    const result = search ? search(state.q) : null;
    const kinds = state.kind.map((kind) => index.kinds.findIndex(([name]) => name === kind));
    const grades = state.grade.map((grade) => index.grades.findIndex(([name]) => name === grade));
    const tally = { kind: new Map(), grade: new Map() };
    const add = (counts, k) => counts.set(k, (counts.get(k) ?? 0) + 1);
    found = [];
    for (let i = 0; i < c.number.length; i++) {
      if (result && !result.score[i]) continue;
      const kind = !kinds.length || kinds.includes(c.kind[i]);
      const grade = !grades.length || grades.includes(c.grade[i]);
      if (grade) add(tally.kind, c.kind[i]);
      if (kind) add(tally.grade, c.grade[i]);
      if (kind && grade) found.push(i);
    }
    inputs.kind.forEach((choice, k) => { choice.tally.textContent = count(tally.kind.get(k) ?? 0); });
    inputs.grade.forEach((choice, k) => { choice.tally.textContent = count(tally.grade.get(k) ?? 0); });
    const sort = state.sort || (result ? "fit" : "number");
    const down = SORTS[sort][2] ? -1 : 1;
    if (sort === "fit") found.sort((a, b) => (result ? result.score[b] - result.score[a] : 0) || a - b);
    else {
      const values = c.number.map((_, i) => SORTS[sort][1](c, i));
      found.sort((a, b) => (values[a] < values[b] ? -down : values[a] > values[b] ? down : a - b));
    }
    return { result, sort };
  }

  function apply() {
    const was = state.q;
    state = {
      q: inputs.q.value, sort: state.sort,
      kind: inputs.kind.filter(({ input }) => input.checked).map(({ input }) => input.value),
      grade: inputs.grade.filter(({ input }) => input.checked).map(({ input }) => input.value),
    };
    if (!was !== !state.q) state.sort = ""; // a new search shows its best matches
    const { result, sort } = choose();
    inputs.sort.value = sort;
    inputs.sort.querySelector("[value=fit]").disabled = !state.q;
    const total = c.number.length;
    const status = state.q && !search ? "Loading the search …" : found.length === total ? `All ${count(total)} concepts` : `${count(found.length)} of ${count(total)} concepts`;
    view.querySelector(".atlas-count").textContent = status;
    suggest();
    table(result, sort);
    const shown = new Uint8Array(total);
    for (const i of found) shown[i] = 1;
    map.draw(bySize.filter((i) => shown[i])); // small ones on top
    const plain = here() === address({ list: "all" }) && !location.hash.includes("=");
    if (here() !== location.hash && !plain) history.replaceState(null, "", here());
  }

  // The address of the list as it is.
  function here() {
    const query = [["q", state.q], ...state.kind.map((kind) => ["kind", kind]), ...state.grade.map((grade) => ["grade", grade]), ["sort", state.sort]];
    const set = query.filter(([, value]) => value);
    return address(set.length ? set : { list: "all" });
  }

  function suggest() {
    const genes = has("drivers") ? search?.genes(state.q) ?? [] : [];
    view.querySelector(".atlas-suggest").replaceChildren(...(genes.length ? [el("span", {}, "Gene pages: "), ...genes.map((gene) => link({ gene }, gene))] : []));
  }

  function columns() {
    return [["number", "Concept"], ...(graded() ? [["grade", "Grade"]] : []), ["cells", "Active in"], ["f1", "F1"], ...(has("drivers") ? [["drivers", "Strongest genes"]] : [])];
  }

  function table(result, sort) {
    const place = view.querySelector(".atlas-rows");
    if (!found.length) {
      place.replaceChildren(el("p", { class: "atlas-empty" }, "No concept has all of this. "), el("button", { type: "button", onclick: () => show(new URLSearchParams(), true) }, "Show all concepts"));
      return;
    }
    const header = columns().map(([key, words]) => el("th", { scope: "col", class: `c-${key}`, "aria-sort": sort === key ? (SORTS[key][2] ? "descending" : "ascending") : null },
      el("button", { type: "button", onclick: () => { state.sort = key; inputs.sort.value = key; apply(); view.querySelector(`th.c-${key} button`).focus(); } }, words)));
    const body = found.slice(0, rows).map((i) => row(i, result));
    const more = found.length > rows ? el("button", { type: "button", class: "atlas-more", onclick: () => {
      const next = rows; rows += ROWS; table(result, sort);
      place.querySelectorAll("tbody a.atlas-name")[next].focus();
    } }, `Show ${count(Math.min(ROWS, found.length - rows))} more of ${count(found.length - rows)}`) : null;
    place.replaceChildren(el("table", {}, el("caption", { class: "atlas-hidden" }, "Concepts"), el("thead", {}, el("tr", {}, header)), el("tbody", {}, body)), ...(more ? [more] : []));
  }

  function row(i, result) {
    const why = result && result.why[i] && !["number", "name"].includes(result.why[i][0]) ? el("span", { class: "atlas-why" }, `${result.why[i][0]}: ${result.why[i][1]}`) : null;
    const kind = index.kinds[c.kind[i]];
    const main = index.mains[c.main[i]];
    const about = [kind && short(kind[0]), scsaeAtlas.title(i).includes(main) ? null : main].filter(Boolean).join(" · ");
    const cells = {
      number: el("th", { scope: "row" },
        el("a", { href: address({ concept: c.number[i] }), class: "atlas-name", "data-place": i, onclick: () => { opened = i; } }, el("b", {}, String(c.number[i])), " ", scsaeAtlas.title(i)),
        el("small", {}, kind ? el("i", { style: { background: kind[1] }, "aria-hidden": "true" }) : null, " ", about, " ", why)),
      grade: el("td", {}, grade(c.grade[i])),
      cells: el("td", { class: "atlas-number" }, percent(c.frequency[i])),
      f1: el("td", { class: "atlas-number" }, digits(c.f1[i])),
      drivers: el("td", { class: "atlas-genes" }, c.top[i].length ? c.top[i].map((g) => link({ gene: index.genes[g] }, index.genes[g])) : "–"),
    };
    const node = el("tr", {}, columns().map(([key]) => { cells[key].classList.add(`c-${key}`); return cells[key]; }));
    node.addEventListener("pointerenter", () => map.point(i));
    node.addEventListener("pointerleave", () => map.point(-1));
    node.addEventListener("focusin", () => map.point(i));
    return node;
  }

  function grade(k) {
    const [name, means] = index.grades[k] ?? ["–", "not graded"];
    return el("span", { class: `atlas-grade g${k}`, title: means || null }, name);
  }

  function save() {
    const kinds = (i) => index.kinds[c.kind[i]]?.[0] ?? "";
    scsaeAtlas.download("concepts", ["concept", "name", "kind", "grade", "main_type", "active_cells", "frequency", "specificity", "sensitivity", "f1", "f1_held_out", "study_share", "genes_with_effect", "strongest_genes"],
      found.map((i) => [c.number[i], scsaeAtlas.title(i), kinds(i), index.grades[c.grade[i]]?.[0] ?? "", index.mains[c.main[i]], c.cells[i], c.frequency[i], c.specificity[i], c.sensitivity[i], c.f1[i], c.f1_held_out[i], c.study_share[i], c.drivers[i], c.top[i].map((g) => index.genes[g]).join(" ")]));
  }

  // The list as an address has it.
  function show(asks, focus = false) {
    const back = view.hidden;
    view.hidden = false;
    view.parentElement.querySelector(".atlas-page")?.remove();
    document.title = heading;
    if (!back || [...asks].length) {
      inputs.q.value = asks.get("q") ?? "";
      for (const name of ["kind", "grade"]) inputs[name].forEach(({ input }) => { input.checked = asks.getAll(name).includes(input.value); });
      state.sort = asks.get("sort") in SORTS ? asks.get("sort") : "";
      state.q = inputs.q.value;
    }
    apply();
    if (back && opened !== null) view.querySelector(`a[data-place="${opened}"]`)?.focus();
    if (focus) inputs.q.focus();
  }

  return { start, show, get searchable() { return search !== null; }, hide: () => { view.hidden = true; }, grade, here, get found() { return found; } };
})();
