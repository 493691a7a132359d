// Pages: of a concept, a gene, a cell.
"use strict";

scsaeAtlas.pages = (() => {
  const { el, link, percent, digits, count, small, title } = scsaeAtlas;
  const has = (name) => scsaeAtlas.index.tables.includes(name);
  const { figures } = scsaeAtlas, { part } = figures;
  const gene = (name) => link({ gene: name }, name);
  const concept = (i) => link({ concept: scsaeAtlas.index.concepts.number[i] }, `${scsaeAtlas.index.concepts.number[i]} · ${title(i)}`);
  const symbols = (genes) => genes.split(",").map((name) => name.trim()).filter(Boolean).flatMap((name, k) => [k ? ", " : "", scsaeAtlas.index.genes.includes(name) ? gene(name) : name]);
  const role = (name) => el("span", { class: "atlas-role" }, el("i", { "aria-hidden": "true", style: { background: figures.ROLES[name] } }), name);
  const chapters = (name, words) => el("a", { href: `${name}.html` }, words);

  function frame(above, heading, facts, ...parts) {
    return el("article", { class: "atlas-page" },
      el("nav", { class: "atlas-nav", "aria-label": "Atlas" }, el("a", { href: scsaeAtlas.list.here() }, "← All concepts"), above.around ?? null),
      el("p", { class: "atlas-above" }, above.text), el("h2", { tabindex: "-1" }, heading), facts, ...parts);
  }

  const facts = (pairs) => el("dl", { class: "atlas-facts" }, pairs.filter(([, value]) => value !== null && value !== undefined).map(([name, ...value]) => el("div", {}, el("dt", {}, name), el("dd", {}, ...value))));

  function problem(message) {
    return frame({ text: "Nothing here" }, "This page is not in the atlas", null, el("p", { role: "alert" }, message));
  }

  const missing = (title, what) => el("section", { class: "atlas-part atlas-missing" }, el("h3", {}, title), el("p", {}, what));

  async function conceptPage(asked) {
    const { index } = scsaeAtlas, c = index.concepts;
    const i = /^\d+$/.test(asked) ? c.number.indexOf(Number(asked)) : -1;
    if (i < 0) throw new Error(`There is no concept “${asked}” in this run, or it is active in too few cells. Concepts have numbers, such as ${c.number.slice(0, 3).join(", ")}.`);
    const [page, cells, pages] = await Promise.all([scsaeAtlas.page("concepts", i), scsaeAtlas.piece("cells"), scsaeAtlas.piece("pages").catch(() => ({})), figuresReady()]);
    const number = c.number[i], file = `concept_${number}`;
    const found = scsaeAtlas.list.found.length ? scsaeAtlas.list.found : c.number.map((_, k) => k);
    const at = found.indexOf(i), near = (k, words) => (found[k] === undefined || at < 0 ? null : link({ concept: c.number[found[k]] }, words));
    const kind = index.kinds[c.kind[i]];
    const parts = [evidence(page), where(i, page, cells, file), types(i, page, file), ...genes(page, file), meaning(page, file), sets(page, file), curves(page, file), best(page, cells), neighbours(page)];
    return frame({ text: `Concept ${number}`, around: el("span", {}, near(at - 1, "‹ Previous"), " ", near(at + 1, "Next ›")) }, title(i),
      facts([
        ["Kind", kind ? el("span", { class: "atlas-role" }, el("i", { "aria-hidden": "true", style: { background: kind[1] } }), kind[0]) : "–"],
        index.grades.length ? ["Grade of evidence", scsaeAtlas.list.grade(c.grade[i])] : ["", null],
        ["Main cell type", index.mains[c.main[i]] || "none"],
        ["Active in", `${count(c.cells[i])} cells (${percent(c.frequency[i])})`],
        ["Specificity", digits(c.specificity[i])], ["Sensitivity", digits(c.sensitivity[i])],
        ["F1, held-out cells", digits(c.f1_held_out[i])],
        index.studies > 1 ? ["Largest share of one study", percent(c.study_share[i])] : ["", null],
        page.auroc?.[0] != null ? ["Its genes predict it (AUROC)", `${digits(page.auroc[0])} (${digits(page.auroc[1])} to ${digits(page.auroc[2])}; random genes up to ${digits(page.auroc[3])})`] : ["", null],
      ]),
      el("div", { class: "atlas-parts" }, parts), more(number, pages));
  }

  const figuresReady = () => scsaeAtlas.script("../vendor/plot/plot.umd.min.js");

  function evidence(page) {
    if (!has("evidence")) return missing("Evidence", "This run has no evidence cards.");
    const marks = { passed: ["✓", "passed"], failed: ["✕", "failed"] };
    const lines = (page.evidence ?? []).map(([line, verdict, value]) => {
      const [mark, words] = marks[verdict] ?? ["–", "not testable"];
      return el("li", { class: verdict === "passed" || verdict === "failed" ? verdict : null }, el("b", { "aria-hidden": "true" }, mark), el("span", {}, el("strong", {}, line), el("em", {}, ` ${words}`), value ? el("small", {}, value) : null));
    });
    return part({ title: "Evidence", note: ["Why believe it, or not. ", chapters("06_evidence", "What the lines ask"), "."], body: lines.length ? el("ul", { class: "atlas-evidence" }, lines) : el("p", {}, "Not tested for this concept."), wide: true });
  }

  function where(i, page, cells, file) {
    const { index } = scsaeAtlas, [rows, values] = page.active, level = new Map(rows.map((r, k) => [r, values[k]]));
    const order = d3.range(cells.x.length).sort((a, b) => (level.get(a) ?? 0) - (level.get(b) ?? 0));
    const body = figures.cellMap(cells, {
      color: (r) => (level.has(r) ? d3.interpolateViridis(0.12 + 0.88 * level.get(r) / 255) : getComputedStyle(document.getElementById("atlas")).getPropertyValue("--atlas-faint")),
      alpha: () => 1, radius: (r) => (level.has(r) ? 3.2 : 2), order,
      label: (r) => [index.types[cells.types[r]]?.[0] ?? "", level.has(r) ? `activation ${digits(page.max * level.get(r) / 255)}` : "silent", cells.names[r]],
      name: "Map of the cells, coloured by activation",
    });
    const active = rows.map((r, k) => [r, page.max * values[k] / 255]).sort((a, b) => b[1] - a[1]);
    const numbers = active.slice(0, 100).map(([r, v]) => [link({ cell: cells.names[r] }, cells.names[r]), index.types[cells.types[r]]?.[0] ?? "", digits(v)]);
    const some = index.cells_shown < index.cells ? ` ${count(index.cells_shown)} of ${count(index.cells)} cells are drawn.` : "";
    const ramp = el("div", { class: "atlas-ramp" }, "silent", el("i", { class: "atlas-off" }), "low", el("i", { style: { background: `linear-gradient(90deg, ${d3.range(0.12, 1.01, 0.11).map(d3.interpolateViridis)})` } }), `high (${digits(page.max)})`);
    return part({ title: "Where it is active", note: `Each point is a cell.${some} Click one to see what else fires in it.`, body: el("div", {}, body, ramp), file: `${file}_cells`,
      columns: ["cell", "type", "activation"], rows: numbers, raw: active.map(([r, v]) => [cells.names[r], index.types[cells.types[r]]?.[0] ?? "", Number(v.toPrecision(3))]) });
  }

  function types(i, page, file) {
    const { index } = scsaeAtlas, total = index.concepts.cells[i];
    const data = page.types.map(([t, n, all]) => ({ name: index.types[t][0], color: index.types[t][1], value: n / total, n, all, text: `${index.types[t][0]}: ${count(n)} of ${count(total)} active cells; ${percent(n / all)} of the ${count(all)} cells of this type are active` }));
    return part({ title: "In which cell types", note: "Share of each type among the active cells. The table also says which share of the type is active.", body: figures.bars(data.slice(0, 10), { label: "share of the active cells (%)", percent: true, most: 100 }),
      columns: ["type", "active cells", "share of active", "share of type"], rows: data.map((d) => [d.name, d.n, percent(d.value), percent(d.n / d.all)]), raw: data.map((d) => [d.name, d.n, d.value, d.n / d.all]), file: `${file}_types` });
  }

  function genes(page, file) {
    const { index } = scsaeAtlas;
    if (!has("drivers")) return [missing("Which genes drive it", "Genes were not occluded in this run.")];
    if (!page.drivers) return [missing("Which genes drive it", "Genes were not occluded for this concept.")];
    const rows = page.drivers.map(([g, value, error, q, r, tag, selected]) => ({ name: index.genes[g], value, error, q, role: index.roles[r], tag, selected, text: `${index.genes[g]}: ${digits(value, 3)} ± ${digits(error, 3)}, ${index.roles[r]}${q === null ? "" : `, q ${small(q)}`}` }));
    const strongest = rows.slice().sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    const top = new Set(strongest.slice(0, 16));
    const effect = rows.filter((d) => d.role === "driver" || d.role === "inhibitor").length;
    const columns = ["gene", "attribution", "error", "q-value", "role", "tag", "paper's rule"];
    const parts = [part({ title: "Which genes drive it",
      note: `Attribution: the share of the activation that is lost when the gene is occluded, mean over the concept's best cells ± error. Right of 0 a gene drives the concept (●), left of 0 it holds it back (▲). ${count(page.n_tested)} genes were occluded; of the ${rows.length} strongest, ${effect} have an effect beyond twice their error (✕: not).`,
      body: figures.effects(rows.filter((d) => top.has(d)).sort((a, b) => b.value - a.value), { label: "attribution" }), file: `${file}_genes`, columns,
      rows: strongest.map((d) => [gene(d.name), digits(d.value, 3), digits(d.error, 3), small(d.q), role(d.role), d.tag || "–", d.selected ? "selected" : "–"]),
      raw: strongest.map((d) => [d.name, d.value, d.error, d.q, d.role, d.tag, d.selected ? "selected" : ""]) })];
    if (page.scatter) {
      const [which, folds, values, roles] = page.scatter;
      const data = which.map((g, k) => ({ name: index.genes[g], x: folds[k], y: values[k], role: index.roles[roles[k]] }));
      const passengers = data.filter((d) => d.role === "passenger").length;
      const sorted = data.slice().sort((a, b) => Math.abs(b.y) - Math.abs(a.y));
      parts.push(part({ title: "Passengers and drivers", note: `A gene can differ between active and silent cells without the model using it: a passenger. Here ${count(passengers)} genes do.`, body: figures.against(data), file: `${file}_expression`,
        columns: ["gene", "log2 fold change", "attribution", "role"], rows: sorted.slice(0, 100).map((d) => [gene(d.name), digits(d.x), digits(d.y, 3), role(d.role)]), raw: sorted.map((d) => [d.name, d.x, d.y, d.role]) }));
    } else parts.push(missing("Passengers and drivers", has("quadrants") ? "Too few cells to compare expression." : "Genes were not compared in expression in this run."));
    return parts;
  }

  function meaning(page, file) {
    if (!page.words?.length) return missing("Words", has("words") ? "The genes of this concept have no words of their own." : "This run has no words.");
    const most = Math.max(...page.words.map((w) => w[1]));
    const words = page.words.map(([word, n, q, names]) => el("li", { class: q !== null && q < 0.05 ? "atlas-sure" : null, style: { fontSize: `${0.85 + 0.75 * (n / most)}rem` }, title: names }, link({ q: word }, word)));
    return part({ title: "Words", note: "From the descriptions of its genes. Larger: in more genes. Bold and underlined: more than chance (q < 0.05).", body: el("ul", { class: "atlas-words" }, words), file: `${file}_words`,
      columns: ["word", "genes", "q-value", "which"], rows: page.words.map(([word, n, q, names]) => [word, n, small(q), el("span", {}, symbols(names))]), raw: page.words });
  }

  function sets(page, file) {
    if (!page.gene_sets?.length) return missing("Gene sets", has("gene_sets") ? "No gene set has any of its genes." : "This run has no gene sets.");
    const rows = page.gene_sets.map(([set, q, names]) => [link({ q: set }, set), small(q), el("span", {}, symbols(names))]);
    const sure = page.gene_sets.filter(([, q]) => q !== null && q < 0.05).length;
    return part({ title: "Gene sets", note: sure ? `${sure} with q < 0.05, against the genes that could have been found.` : "None is more than chance (q < 0.05).", file: `${file}_gene_sets`, columns: ["gene set", "q-value", "genes"], rows, raw: page.gene_sets });
  }

  function curves(page, file) {
    if (!page.curves) return missing("Deletion curves", has("curves") ? "Not computed for this concept." : "This run has no deletion curves.");
    const rows = page.curves.flatMap((o) => o.n.map((n, k) => [o.order, n, o.left[k], o.low?.[k] ?? null, o.high?.[k] ?? null]));
    return part({ title: "Deletion curves", note: "What is left of the activation while genes are removed in order. Genes that matter let it fall early. Band: lowest to highest of the random orders.", body: figures.curves(page.curves), file: `${file}_deletion`, columns: ["order", "genes removed", "activation left", "lowest", "highest"], rows: rows.map(([o, n, ...values]) => [o, n, ...values.map((v) => digits(v))]), raw: rows });
  }

  function neighbours(page) {
    const list = (pairs) => (pairs.length ? el("ol", { class: "atlas-near" }, pairs.map(([i, cosine]) => el("li", {}, concept(i), el("span", { title: "cosine" }, digits(cosine))))) : el("p", {}, "None."));
    return part({ title: "Neighbours", note: "With the cosine: 1 is the same.", body: el("div", { class: "atlas-two" },
      el("div", {}, el("h4", {}, "Fire in the same cells"), list(page.together)), el("div", {}, el("h4", {}, "Have similar vectors"), list(page.similar))), wide: true });
  }

  function best(page, cells) {
    const { index } = scsaeAtlas;
    return part({ title: "Best cells", note: "Highest activation. A cell's page tells which genes drive the concept in it.", body: el("ol", { class: "atlas-near" }, page.best.map(([r, value]) => el("li", {}, el("span", {}, link({ cell: cells.names[r] }, cells.names[r]), el("small", {}, ` ${index.types[cells.types[r]]?.[0] ?? ""}`)), el("span", {}, digits(value))))) });
  }

  function more(number, pages) {
    const { run } = scsaeAtlas.index;
    const links = (pages[number] ?? []).map(([name, words]) => el("li", {}, chapters(name, words)));
    const made = (pages[number] ?? []).some(([name]) => name === `concepts/concept_${number}`);
    return el("section", { class: "atlas-part atlas-wide" }, el("h3", {}, "More"),
      links.length ? el("ul", {}, links) : el("p", {}, "No chapter speaks of this concept by itself."),
      made ? null : el("p", {}, "Make its full page, with every gene of every prototype:"),
      made ? null : el("pre", { tabindex: "0" }, el("code", {}, `make concept CONCEPT=${number}${run === "mini" ? "" : ` PROFILE=profiles/${run}.yaml`}`)));
  }

  async function genePage(asked) {
    const { index } = scsaeAtlas;
    if (!has("drivers")) throw new Error("Genes were not occluded in this run, so there are no gene pages.");
    const at = index.genes.findIndex((name) => name === asked), other = index.genes.find((name) => name.toLowerCase() === asked.toLowerCase());
    if (at < 0) throw new Error(`There is no gene “${asked}” among those that were occluded.${other ? ` Did you mean ${other}?` : ""}`);
    const [page] = await Promise.all([scsaeAtlas.page("genes", at), figuresReady()]);
    const rows = page.concepts.map(([i, value, error, q, r]) => ({ i, name: `${index.concepts.number[i]} · ${title(i)}`, value, error, q, role: index.roles[r], text: `${title(i)}: ${digits(value, 3)} ± ${digits(error, 3)}, ${index.roles[r]}` }));
    const of = (name) => rows.filter((d) => d.role === name);
    const effects = rows.filter((d) => d.role !== "passenger").slice(0, 20).sort((a, b) => b.value - a.value).map((d) => ({ ...d, name: `concept ${index.concepts.number[d.i]}` }));
    const types = (page.types ?? []).map(([t, value]) => ({ name: index.types[t][0], color: index.types[t][1], value, text: `${index.types[t][0]}: ${digits(value)}` }));
    return frame({ text: "Gene" }, asked, facts([
      page.name ? ["Name", page.name] : ["", null], ["Drives", `${of("driver").length} concepts`], ["Holds back", `${of("inhibitor").length} concepts`],
      has("quadrants") ? ["Passenger in", `${of("passenger").length} concepts`] : ["", null], ["Occluded in", `${page.tested} concepts`]]),
      el("div", { class: "atlas-parts" },
        effects.length ? part({ title: "What it does to concepts", note: `Attribution ± error, mean over each concept's best cells; the ${effects.length} strongest. Right of 0 it drives the concept (●), left of 0 it holds it back (▲).`, body: figures.effects(effects, { label: "attribution" }), wide: !types.length })
          : missing("What it does to concepts", "It has no effect beyond its error on any concept."),
        types.length ? part({ title: "Where it is expressed", note: "Mean log expression in the cell types that express it most.", body: figures.bars(types, { label: "mean log(1 + counts per 10,000)" }), columns: ["type", "mean"], rows: types.map((d) => [d.name, digits(d.value)]), raw: types.map((d) => [d.name, d.value]), file: `${asked}_expression` }) : null,
        rows.length ? part({ title: "Concepts", note: has("quadrants") ? "A passenger differs in expression between the concept's active and silent cells, and has no effect on it." : "Genes were not compared in expression in this run, so that passengers are not known.", wide: true, file: `${asked}_concepts`,
          columns: ["concept", "role", "attribution", "error", "q-value"], rows: rows.map((d) => [concept(d.i), role(d.role), digits(d.value, 3), digits(d.error, 3), small(d.q)]), raw: rows.map((d) => [d.name, d.role, d.value, d.error, d.q]) }) : null));
  }

  async function cellPage(asked) {
    const { index } = scsaeAtlas, cells = await scsaeAtlas.piece("cells");
    const at = cells.names.indexOf(asked);
    if (at < 0) throw new Error(`There is no cell “${asked}” in the atlas${index.cells_shown < index.cells ? `, which has a sample of ${count(index.cells_shown)} of ${count(index.cells)} cells` : ""}.`);
    const page = await scsaeAtlas.page("cells", at);
    const [low, mid, high] = page.labels;
    const known = page.concepts.filter((row) => row[3]?.length);
    const contrast = known.filter((row) => row[4]).map(([i, , , pairs, near]) => {
      const names = pairs.filter(([, value]) => value > 0).slice(0, 3).flatMap(([g], k) => [k ? ", " : "", gene(index.genes[g])]);
      if (!names.length) return null;
      const other = near[0] < 0 ? near[1] : link({ cell: near[1] }, near[1]);
      const lead = near[2] === low ? ["A ", el("b", {}, low), " in which ", concept(i), " fires, and not like the nearest one in which it is silent (", other, "), because of "]
        : ["A ", el("b", {}, low), " and not a ", el("b", {}, near[2]), " (the nearest cell in which ", concept(i), " is silent: ", other, "), because of "];
      return el("li", {}, lead, names, ".");
    }).filter(Boolean);
    const color = (r) => index.types[cells.types[r]]?.[1] ?? "#BBBBBB";
    const effect = (row) => (row[3]?.length ? el("span", {}, row[3].flatMap(([g, value], k) => [k ? ", " : "", gene(index.genes[g]), ` ${value > 0 ? "+" : "−"}${digits(Math.abs(value), 3)}`])) : "–");
    const shown = page.concepts.map((row) => [concept(row[0]), digits(row[1]), el("span", { class: "atlas-meter", title: `${percent(row[2])} of its highest activation` }, el("i", { style: { width: `${100 * row[2]}%` } })), effect(row)]);
    return frame({ text: "Cell" }, asked, facts([["Cell type", low], mid !== low ? ["Mid level", mid] : ["", null], high !== mid ? ["High level", high] : ["", null], ["Study", page.study], ["Concepts that fire", page.concepts.length]]),
      el("div", { class: "atlas-parts" },
        part({ title: "Why this and not another", note: "Counterfactuals: for each concept, the nearest cell (in the embedding) in which it is silent, and the genes whose occlusion takes most of the concept's activation in this cell.",
          body: contrast.length ? el("ul", { class: "atlas-why-not" }, contrast) : el("p", {}, has("attributions") ? "Genes were occluded in each concept's best cells, and this cell is not among them." : "This run has no attributions of single cells.") }),
        part({ title: "Where it lies", note: "All cells by type; the ring is this one.", body: el("div", {}, figures.cellMap(cells, { color, alpha: () => 0.7, order: d3.range(cells.x.length), marked: at, name: "Map of the cells, coloured by cell type", label: (r) => [index.types[cells.types[r]]?.[0] ?? "", cells.names[r]] }),
            el("div", { class: "atlas-legend" }, index.types.map(([name, fill]) => el("span", {}, el("i", { "aria-hidden": "true", style: { background: fill } }), name)))) }),
        part({ title: "What fires in it", note: `Concepts by their activation, relative to the highest of any cell.${known.length ? " Genes: the share of the concept's activation in this cell that is lost without the gene." : ""}`, columns: ["concept", "activation", "of its highest", "genes in this cell"], rows: shown, file: `${asked}_concepts`, wide: true,
          raw: page.concepts.map(([i, value, share, pairs]) => [`${index.concepts.number[i]} · ${title(i)}`, value, share, (pairs ?? []).map(([g, v]) => `${index.genes[g]} ${v}`).join(" ")]) })));
  }

  return { concept: conceptPage, gene: genePage, cell: cellPage, problem };
})();
