// Points on a canvas: fast for tens of thousands, with zoom, names under the pointer and a click that opens.
"use strict";

// points: { x, y } in 0 to 1, and functions of a point's place: radius, color, alpha, label, href (or null).
// Returns { node, draw(order), point(i) }: `order` are the places to draw, the last on top; others stay faint.
scsaeAtlas.scatter = (points, { label: name, height = 340, zoom = true }) => {
  const { el } = scsaeAtlas;
  const canvas = el("canvas", { role: "img", "aria-label": name });
  const tip = el("div", { class: "atlas-tip", "aria-hidden": "true", hidden: true });
  const node = el("div", { class: "atlas-scatter", style: { height: `${height}px` } }, canvas, tip);
  const n = points.x.length;
  let order = d3.range(n), width = 0, high = 0, marked = -1, transform = d3.zoomIdentity, tree = null, waiting = false;
  let faint = new Uint8Array(n);

  const px = (i) => transform.applyX(14 + points.x[i] * (width - 28));
  const py = (i) => transform.applyY(14 + (1 - points.y[i]) * (high - 28));
  const grow = () => Math.sqrt(transform.k);

  function paint() {
    waiting = false;
    const ratio = devicePixelRatio || 1;
    width = node.clientWidth; high = node.clientHeight;
    if (!width) return;
    canvas.width = width * ratio; canvas.height = high * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(node);
    const circle = (i, radius) => { context.beginPath(); context.arc(px(i), py(i), radius, 0, 2 * Math.PI); };
    context.fillStyle = style.getPropertyValue("--atlas-faint");
    const side = 3 * grow();
    for (let i = 0; i < n; i++) if (faint[i]) context.fillRect(px(i) - side / 2, py(i) - side / 2, side, side);
    for (const i of order) {
      context.globalAlpha = points.alpha(i);
      context.fillStyle = points.color(i);
      circle(i, points.radius(i) * grow());
      context.fill();
    }
    context.globalAlpha = 1;
    if (marked >= 0) {
      context.lineWidth = 2.5;
      context.strokeStyle = style.color;
      circle(marked, points.radius(marked) * grow() + 3);
      context.stroke();
    }
    tree = null;
  }
  const repaint = () => { if (!waiting) { waiting = true; requestAnimationFrame(paint); } };

  function draw(places) {
    order = places;
    faint = new Uint8Array(n).fill(1);
    for (const i of order) faint[i] = 0;
    requestAnimationFrame(() => requestAnimationFrame(repaint)); // after the frame with the list, which is read first
  }

  function under(event) {
    const box = canvas.getBoundingClientRect();
    tree ??= d3.quadtree(order, px, py);
    return tree.find(event.clientX - box.left, event.clientY - box.top, 16) ?? -1;
  }

  function point(i) { if (i !== marked) { marked = i; repaint(); } }

  function hover(event) {
    const i = under(event);
    point(i);
    tip.hidden = i < 0;
    canvas.style.cursor = i >= 0 && points.href ? "pointer" : "";
    if (i < 0) return;
    tip.replaceChildren(...points.label(i).map((line, k) => el(k ? "span" : "strong", {}, line)));
    const left = px(i) > width / 2;
    Object.assign(tip.style, {
      left: left ? "" : `${px(i) + 12}px`, right: left ? `${width - px(i) + 12}px` : "",
      top: `${Math.min(Math.max(py(i) - 14, 4), Math.max(high - tip.offsetHeight - 4, 4))}px`,
    });
  }
  canvas.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch") hover(event); });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; point(points.marked ?? -1); });
  canvas.addEventListener("click", (event) => {
    const i = under(event);
    if (i >= 0 && points.href) location.hash = points.href(i);
  });

  if (zoom) {
    // The wheel scrolls the page, and one finger too: zoom with Ctrl and the wheel, two fingers or the buttons.
    const behaviour = d3.zoom().scaleExtent([1, 12])
      .filter((event) => (event.type === "wheel" ? event.ctrlKey || event.metaKey : event.type.startsWith("touch") ? event.touches.length > 1 : !event.button && transform.k > 1))
      .on("zoom", (event) => { transform = event.transform; tip.hidden = true; repaint(); });
    const selection = d3.select(canvas).call(behaviour).on("dblclick.zoom", null);
    const size = () => behaviour.extent([[0, 0], [width, high]]).translateExtent([[0, 0], [width, high]]);
    const button = (text, words, act) => el("button", { type: "button", "aria-label": words, title: words, onclick: () => { size(); act(); } }, text);
    canvas.addEventListener("pointerdown", size, { capture: true });
    node.append(el("div", { class: "atlas-zoom" },
      button("+", "Zoom in", () => behaviour.scaleBy(selection, 1.6)),
      button("−", "Zoom out", () => behaviour.scaleBy(selection, 1 / 1.6)),
      button("⟲", "Whole map", () => behaviour.transform(selection, d3.zoomIdentity))));
  }
  canvas.style.touchAction = "pan-x pan-y";
  marked = points.marked ?? -1;
  new ResizeObserver(repaint).observe(node);
  addEventListener("atlas-theme", function theme() { // until the page that it was on is gone
    if (node.isConnected) repaint(); else removeEventListener("atlas-theme", theme);
  });
  return { node, draw, point, repaint };
};
