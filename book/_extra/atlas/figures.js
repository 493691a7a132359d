// Figures of a page: drawn by Observable Plot as wide as there is room, each with its table and the table as CSV.
"use strict";

scsaeAtlas.figures = (() => {
  const { el, download } = scsaeAtlas;
  const ready = () => scsaeAtlas.script("../vendor/plot/plot.umd.min.js");
  const ROLES = { driver: "#D55E00", inhibitor: "#0072B2", passenger: "#E69F00", "no effect": "#999999" };
  const SYMBOLS = { driver: "circle", inhibitor: "triangle", passenger: "square", "no effect": "times" };

  // A table; a cell is text, a number or an element.
  function table(columns, rows, caption) {
    return el("div", { class: "atlas-scroll", tabindex: "0", role: "region", "aria-label": caption },
      el("table", {}, el("caption", { class: "atlas-hidden" }, caption), el("thead", {}, el("tr", {}, columns.map((c) => el("th", { scope: "col" }, c)))),
        el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, k) => el(k ? "td" : "th", k ? {} : { scope: "row" }, value === null ? "–" : value instanceof Node ? value : String(value))))))));
  }

  // A part of a page: a figure or a table, what to see in it, and below it the numbers.
  // body: a node, or a function of the width that returns an SVG; without one the table is what there is to see.
  function part({ title, note, body, columns, rows, raw, file, wide }) {
    const place = !body || body instanceof Node ? body : el("div", { class: "atlas-plot", role: "img", "aria-label": `${title}. The table below has the numbers.` });
    if (place !== body) {
      let last = 0;
      const paint = () => {
        const width = Math.floor(place.clientWidth);
        if (!width || width === last) return;
        last = width;
        const figure = body(width);
        figure.setAttribute("aria-hidden", "true"); // the frame has a name, the table the numbers
        place.replaceChildren(figure);
      };
      ready().then(() => { paint(); new ResizeObserver(paint).observe(place); });
    }
    const numbers = rows && [table(columns, rows, title), el("button", { type: "button", onclick: () => download(file, columns, raw ?? rows) }, "Download CSV")];
    return el("section", { class: wide ? "atlas-part atlas-wide" : "atlas-part" }, el("h3", {}, title), note && el("p", { class: "atlas-note" }, ...[note].flat()), place ?? null,
      numbers && (place ? el("details", {}, el("summary", {}, "Table"), numbers) : numbers));
  }

  const common = (width, options) => Plot.plot({
    width, style: { background: "none", color: "inherit", fontFamily: "inherit", fontSize: "12px", overflow: "visible" }, marginBottom: 42, ...options,
    x: { labelOffset: 38, labelAnchor: "center", labelArrow: "none", ...options.x },
  });
  const shorten = (text, n) => (text.length > n ? `${text.slice(0, n - 1)}…` : text);

  // Horizontal bars: [{ name, value, color, text }].
  const bars = (data, { label, most = null, percent = false }) => (width) => common(width, {
    height: 26 * data.length + 45, marginLeft: Math.min(170, width * 0.42), marginRight: 16,
    x: { label, domain: [0, most ?? Math.max(...data.map((d) => d.value), 1e-9)], ticks: 4, percent, grid: true },
    y: { label: null, domain: data.map((d) => d.name), tickFormat: (name) => shorten(name, width < 400 ? 20 : 26), tickSize: 0 },
    marks: [
      Plot.barX(data, { x: "value", y: "name", fill: "color", insetTop: 3, insetBottom: 3, title: "text", tip: { fill: "var(--pst-color-surface)" } }),
      Plot.ruleX([0]),
    ],
  });

  // Attributions with errors: [{ name, value, error, role }].
  const effects = (data, { label }) => (width) => common(width, {
    height: 20 * data.length + 50, marginLeft: 92, marginRight: 16,
    x: { label, ticks: 4, grid: true, nice: true },
    y: { label: null, domain: data.map((d) => d.name), tickSize: 0, tickFormat: (name) => shorten(name, 14) },
    color: { domain: Object.keys(ROLES), range: Object.values(ROLES) }, symbol: { domain: Object.keys(SYMBOLS), range: Object.values(SYMBOLS) },
    marks: [
      Plot.ruleX([0]),
      Plot.ruleY(data, { y: "name", x1: (d) => d.value - (d.error ?? 0), x2: (d) => d.value + (d.error ?? 0), stroke: "role", strokeWidth: 1.5 }),
      Plot.dot(data, { x: "value", y: "name", fill: "role", stroke: "role", symbol: "role", r: 4, title: "text", tip: { fill: "var(--pst-color-surface)" } }),
    ],
  });

  // Expression against effect: [{ name, x, y, role }].
  const against = (data) => (width) => {
    const named = data.filter((d) => d.role !== "no effect").sort((a, b) => Math.abs(b.y) - Math.abs(a.y)).slice(0, 6);
    return common(width, {
      height: Math.max(260, Math.min(340, width * 0.75)), marginLeft: 48, marginRight: 20,
      x: { label: "log2 fold change, prototypes against counterfactuals", ticks: 6 },
      y: { label: "attribution", labelArrow: "none", ticks: 5 },
      color: { domain: Object.keys(ROLES), range: Object.values(ROLES) }, symbol: { legend: true, domain: Object.keys(SYMBOLS), range: Object.values(SYMBOLS) },
      marks: [
        Plot.ruleY([0], { strokeOpacity: 0.4 }), Plot.ruleX([0], { strokeOpacity: 0.4 }),
        Plot.dot(data, { x: "x", y: "y", stroke: "role", symbol: "role", r: 3, strokeOpacity: (d) => (d.role === "no effect" ? 0.45 : 1), title: (d) => `${d.name}: ${d.role}`, tip: { fill: "var(--pst-color-surface)" } }),
        Plot.text(named, { x: "x", y: "y", text: "name", dy: -9, fontSize: 11 }),
      ],
    });
  };

  const CURVES = { attribution: ["#D55E00", "by attribution"], "differential expression": ["#0072B2", "by differential expression"], random: ["#777777", "at random"] };

  // Deletion curves: [{ order, n, left, low, high }].
  const curves = (orders) => (width) => {
    const names = orders.map((o) => CURVES[o.order]?.[1] ?? o.order);
    const data = orders.flatMap((o, k) => o.n.map((n, i) => ({ n: n + 1, left: o.left[i], low: o.low?.[i], high: o.high?.[i], order: names[k] })));
    return common(width, {
      height: 280, marginLeft: 44, marginRight: 20,
      x: { type: "log", label: "genes removed", tickFormat: (n) => (Number.isInteger(Math.log10(n)) || n === 1 ? String(n === 1 ? 0 : n) : "") },
      y: { label: "activation left", labelArrow: "none", grid: true, domain: [Math.min(0, d3.min(data, (d) => d.left)), Math.max(1, d3.max(data, (d) => d.high ?? d.left))] },
      color: { legend: true, domain: names, range: orders.map((o, k) => CURVES[o.order]?.[0] ?? d3.schemeTableau10[k]) },
      marks: [
        Plot.areaY(data.filter((d) => d.low !== undefined), { x: "n", y1: "low", y2: "high", fill: "order", fillOpacity: 0.2 }),
        Plot.lineY(data, { x: "n", y: "left", stroke: "order", strokeWidth: 2 }),
        Plot.dot(data, { x: "n", y: "left", fill: "order", r: 2.5 }),
      ],
    });
  };

  // Cells on their map. alpha and color by place; `marked` has a ring.
  function cellMap(cells, { color, alpha, radius = () => 2.6, order, label, name, marked, height = 300 }) {
    const map = scsaeAtlas.scatter({ x: cells.x, y: cells.y, radius, color, alpha, label, marked,
      href: (i) => scsaeAtlas.address({ cell: cells.names[i] }) }, { label: name, height });
    map.draw(order);
    return map.node;
  }

  return { part, table, bars, effects, against, curves, cellMap, ROLES };
})();
