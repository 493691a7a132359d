"""How fast the atlas opens and searches, in headless Chromium, from a folder on disk.

    python benchmarks/atlas.py            # 10,000 generated concepts
    python benchmarks/atlas.py --concepts 1000

The concepts are generated: names, 2,000 genes, words and gene sets of lengths as in the book, with 5,000 cells and
about 35 active concepts in each. Times are of a page with the atlas alone, opened anew ``--repeats`` times: from the
start of the navigation to the first paint and to the list on the screen, and from a key stroke to the frame with the
list of its results; the map follows by one frame. Medians in milliseconds.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from playwright.sync_api import sync_playwright
from record import keep, versions
from scipy import sparse

from scsae_utils.atlas import Tables, container, write_atlas
from scsae_utils.concepts import add_taxonomy
from scsae_utils.words import gene_table

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
QUERIES = ["a", "CD", "CD16", "CD163", "cell", "type 7", "antigen", "word1 word2", "1234", "nothing of the kind"]


def generated(n_concepts: int, n_cells: int, seed: int = 0) -> Tables:
    """Tables of as many concepts, with real gene symbols and invented all else."""
    rng = np.random.default_rng(seed)
    types = np.array([f"type {i}" for i in range(45)])
    low = rng.integers(0, 45, n_cells)
    obs = pd.DataFrame(
        {"cell_type": types[low], "cell_type_mid": [f"mid {i // 3}" for i in low]}
        | {"cell_type_high": [f"high {i // 5}" for i in low], "study": "generated"}
        | {"split": np.where(rng.random(n_cells) < 0.8, "train", "validation")},
        index=[f"cell_{i}" for i in range(n_cells)],
    )
    home = np.arange(n_concepts) % 45
    cells, n = np.repeat(np.arange(n_cells), 36), n_cells * 36  # two thirds are concepts of the cell's own type
    own = 45 * rng.integers(0, n_concepts // 45, n) + low[cells]
    active = np.where(rng.random(n) < 0.67, own, rng.integers(0, n_concepts, n))
    X = sparse.csr_matrix((rng.random(n).astype(np.float32), (cells, active)), (n_cells, n_concepts))
    n_active = X.getnnz(axis=0)
    var = pd.DataFrame({"n_cells": n_active, "frequency": n_active / n_cells, "kept": n_active > 0})
    var["max_activation"] = X.max(axis=0).toarray().ravel()
    var.index = [f"concept_{i}" for i in range(n_concepts)]
    concepts = add_taxonomy(AnnData(X, obs=obs, var=var, obsm={"X_umap": rng.normal(size=(n_cells, 2))}))
    concepts.varm["vectors"] = rng.normal(size=(n_concepts, 64)).astype(np.float32)
    genes, sizes = np.asarray(gene_table().index[:2000]), np.full(n_concepts, 20)
    concept = np.repeat(np.arange(n_concepts), sizes)
    gene = np.concatenate([rng.choice(genes, n, replace=False) for n in sizes])
    drivers = pd.DataFrame({"concept": concept, "gene": gene, "attribution": rng.normal(0, 0.1, len(gene))})
    drivers["error"] = 0.01
    words = pd.DataFrame({"concept": concept, "count": 2})
    words["word"] = [f"word{i}" for i in rng.integers(0, 3000, len(words))]
    sets = pd.DataFrame(
        {"concept": concept[::4], "set": [f"gene set {i}" for i in rng.integers(0, 346, len(gene[::4]))]}
    )
    names = pd.DataFrame({"name": [f"type {h}: word{i % 3000}" for i, h in enumerate(home)]}, index=var.index)
    extra = {"qvalue": 0.01, "genes": "CD163,LYZ"}
    return Tables(concepts, drivers=drivers, names=names, words=words.assign(**extra), gene_sets=sets.assign(**extra))


def measure(folder: Path, repeats: int) -> tuple[dict[str, float], str]:
    """Medians in milliseconds, and the version of Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        paints, lists, searches = [], [], {query: [] for query in QUERIES}
        for _ in range(repeats + 1):  # the first one warms the disk up
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto((folder / "notebooks" / "07_atlas.html").as_uri(), wait_until="load")
            page.wait_for_function("performance.getEntriesByName('atlas-list').length && scsaeAtlas.list.searchable")
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            lists.append(page.evaluate("performance.getEntriesByName('atlas-list')[0].startTime"))
            for query in QUERIES:
                searches[query].append(
                    page.evaluate(
                        """async (query) => {
                            const input = document.getElementById("atlas-search");
                            input.value = query;
                            const start = performance.now();
                            input.dispatchEvent(new Event("input"));
                            await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
                            return performance.now() - start;
                        }""",
                        query,
                    )
                )
            page.close()
        version = browser.version
        browser.close()
    slowest = {query: float(np.median(times[1:])) for query, times in searches.items()}
    times = {"first paint": float(np.median(paints[1:])), "list": float(np.median(lists[1:]))}
    times |= {
        "search, median query": float(np.median(list(slowest.values()))),
        "search, slowest query": max(slowest.values()),
    }
    return times, version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=int, default=10_000)
    parser.add_argument("--cells", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("no Chromium: install it, for example with apt-get install chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "book" / "_extra", folder, dirs_exist_ok=True)
        tables = generated(args.concepts, args.cells)
        xy = np.random.default_rng(1).random((tables.concepts.n_vars, 2))
        sizes = write_atlas(tables, folder / "atlas" / "data", xy=xy)
        (folder / "notebooks").mkdir()
        page = (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>Atlas</title><h1>Atlas</h1>{container()}</html>"
        )
        (folder / "notebooks" / "07_atlas.html").write_text(page)
        times, chromium = measure(folder, args.repeats)
    rows = [{"what": what, "ms": round(ms, 1)} for what, ms in times.items()]
    mb = {"first_data_mb": (sizes["index.js"] + sizes["search.js"]) / 1e6, "all_data_mb": sum(sizes.values()) / 1e6}
    figures = {
        "concepts": tables.concepts.n_vars,
        "first_paint_ms": round(times["first paint"], 1),
        "list_ms": round(times["list"], 1),
        "search_ms": round(times["search, slowest query"], 1),
        **{name: round(value, 2) for name, value in mb.items()},
    }
    keep("atlas", rows, figures, versions("playwright", "numpy") | {"chromium": chromium})


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
