// The atlas: data, small helpers, addresses. Data come as scripts, since a browser fetches no files from a folder on disk.
"use strict";

const scsaeAtlas = (() => {
  const base = new URL(".", document.currentScript.src).href;
  const root = () => document.getElementById("atlas");
  const arrived = new Map(); // name of a piece: its value
  const asked = new Map(); // path of a script: promise

  // Each piece of data calls this when its script runs.
  function data(name, value) { arrived.set(name, value); }

  function script(path) {
    if (!asked.has(path)) {
      asked.set(path, new Promise((resolve, reject) => {
        const tag = document.createElement("script");
        tag.src = base + path;
        tag.onload = resolve;
        tag.onerror = () => { asked.delete(path); reject(new Error(`the file atlas/${path} is missing`)); };
        document.head.append(tag);
      }));
    }
    return asked.get(path);
  }

  async function piece(name) {
    if (!arrived.has(name)) await script(`data/${name}.js`);
    return arrived.get(name);
  }

  // One of the pages of a kind ("concepts", "genes", "cells"), which lie in parts.
  async function page(kind, i) {
    const { part } = arrived.get("index");
    return (await piece(`${kind}-${Math.floor(i / part)}`))[i % part];
  }

  // An element; strings become text, never markup: labels come from files of others.
  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") Object.assign(node.style, value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  const address = (values) => `#${new URLSearchParams(values)}`;
  const link = (values, ...text) => el("a", { href: address(values) }, ...text);
  const percent = (x) => (x === null ? "–" : x > 0 && x < 0.01 ? "<1%" : `${Math.round(100 * x)}%`);
  const digits = (x, n = 2) => (x === null || x === undefined ? "–" : x.toLocaleString("en", { maximumFractionDigits: n, minimumFractionDigits: n }));
  const count = (n) => n.toLocaleString("en");
  // A q-value; very small ones as a power of ten.
  const small = (q) => (q === null || q === undefined ? "–" : q >= 0.001 ? String(Number(q.toPrecision(2))) : q.toExponential(0).replace("-", "−"));

  function csv(columns, rows) {
    const cell = (value) => {
      if (value === null || value === undefined) return "";
      if (typeof value === "number") return String(value);
      const text = /^[=+@\t\r-]/.test(value) ? `'${value}` : String(value); // a label is no formula of a spreadsheet
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  function download(name, columns, rows) {
    const url = URL.createObjectURL(new Blob(["\ufeff", csv(columns, rows)], { type: "text/csv;charset=utf-8" }));
    el("a", { href: url, download: `${name}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  const parameters = () => new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");

  // What a concept is called: its name, or where it is active.
  const SPECIFIC = { "whole-cell-type": true, "sub-cell-type": true };
  function title(i) {
    const { concepts, mains, kinds } = arrived.get("index");
    const main = mains[concepts.main[i]];
    return concepts.name[i] || (main ? (kinds[concepts.kind[i]]?.[0] in SPECIFIC ? main : `mostly ${main}`) : "without a main type");
  }

  let shown = 0; // pages asked for; one that comes late is not shown
  async function route() {
    const asks = parameters();
    const kind = ["concept", "gene", "cell"].find((name) => asks.has(name));
    const turn = ++shown;
    if (!kind) { scsaeAtlas.list.show(asks); return; }
    let view;
    try {
      view = await scsaeAtlas.pages[kind](asks.get(kind));
    } catch (error) {
      view = scsaeAtlas.pages.problem(error.message);
    }
    if (turn !== shown) return;
    scsaeAtlas.list.hide();
    root().querySelector(".atlas-page")?.remove();
    root().append(view);
    document.title = `${view.querySelector("h2").textContent} · Atlas`;
    scrollTo(0, root().getBoundingClientRect().top + scrollY - 80);
    view.querySelector("h2").focus({ preventScroll: true });
  }

  function start() {
    if (!arrived.has("index")) {
      root().replaceChildren(el("p", { role: "alert" }, "The data of the atlas are missing: run make book."));
      return;
    }
    root().replaceChildren();
    scsaeAtlas.list.start(root());
    addEventListener("hashchange", route);
    route();
    performance.mark("atlas-list");
    new MutationObserver(() => dispatchEvent(new Event("atlas-theme")))
      .observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  }

  return { data, script, piece, page, el, link, address, percent, digits, count, small, csv, download, parameters, title, start,
           get index() { return arrived.get("index"); } };
})();
