// Small things that a static page cannot know by itself.
(function () {
  "use strict";

  // Pages that are made, not written: where their source lies in the repository.
  const madeFrom = [
    [/notebooks\/concepts\/[^/?#]+\.ipynb/, "notebooks/04_case_study.ipynb"],
    [/book\/model_card\.md/, "scsae_utils/data/scgpt-mini/MODEL_CARD.md"],
  ];
  function repairLinks() {
    document.querySelectorAll(".article-header-buttons a[href^='http']").forEach((link) => {
      madeFrom.forEach(([page, source]) => { link.href = link.href.replace(page, source); });
    });
  }

  // Figures with panels side by side would be too small to read on a phone: let them scroll (custom.css).
  function markWideFigures() {
    document.querySelectorAll(".bd-content .cell_output img").forEach((image) => {
      const mark = () => {
        if (image.naturalWidth < 1.7 * image.naturalHeight) return;
        const frame = document.createElement("div");
        frame.className = "wide-figure";
        frame.tabIndex = 0; // so that the keyboard can scroll it
        image.replaceWith(frame);
        frame.append(image);
      };
      if (image.complete) mark(); else image.addEventListener("load", mark, { once: true });
    });
  }

  // Names for buttons and lists that the theme leaves without, or gives others than they show.
  function nameControls() {
    document.querySelectorAll(".search-button-field, .bd-content summary[aria-label]").forEach((node) => node.removeAttribute("aria-label"));
    document.querySelector(".citation-list")?.removeAttribute("role"); // its items are no list items
    document.querySelectorAll(".bd-sidebar-primary .has-children > details > summary").forEach((node) => {
      node.setAttribute("aria-label", `Sections of ${node.closest("li").querySelector("a").textContent}`);
    });
  }

  // What scrolls in a frame of its own can be scrolled by the keyboard too.
  function reachFrames() {
    document.querySelectorAll(".pst-scrollable-table-container, .cell_output .output, .bd-content div.math, .bd-content pre").forEach((frame) => {
      if (frame.scrollWidth > frame.clientWidth) frame.tabIndex = 0;
    });
  }

  function start() {
    repairLinks();
    markWideFigures();
    nameControls();
    reachFrames();
    addEventListener("load", reachFrames);
    addEventListener("resize", reachFrames);
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
