"""The data of the atlas, the page on which every concept can be searched (chapter 7). Ours.

A browser does not fetch JSON from a folder on disk, so the data are scripts, each a call ``scsaeAtlas.data(name,
value)``, cut in pieces that the page loads when it needs them: ``index`` (one row a concept) and ``search`` first, then
``cells`` (the map of cells), and in parts ``concepts-0``, ``genes-0``, ``cells-0`` and so on (the pages; see
:mod:`scsae_utils.atlas_pages`). What draws them lies in ``book/_extra/atlas``. Labels are data: they are written as
text, never as markup.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
from anndata import AnnData

from .atlas_pages import COLUMNS, ROLES, Tables, cell_details, coded, concept_details, gene_details, rounded
from .cells import LEVELS, UNASSIGNED
from .concepts import KINDS, READINGS, map_concepts, type_shares
from .evidence import GRADES, LINES
from .plots.style import GREY, KIND_COLORS, palette

CHAPTERS = ("03_concept_taxonomy", "04_case_study", "05_myeloid_concepts", "05b_drivers", "06_evidence")
PART = 100  # concepts, genes or cells in a file
READING_COLORS = dict(zip([f"{KINDS[2]}: {r}" for r in READINGS], ["#009E73", "#CC79A7", "#56B4E9", "#D55E00", GREY]))
KIND_COLORS_ALL = KIND_COLORS | READING_COLORS


def shown_cells(concepts: AnnData, n_cells: int, n_best: int, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows of the cells that have a page, and each concept's ``n_best`` cells, highest activation first.

    All cells if there are at most ``n_cells``; else the best cells of every concept and others at random.
    """
    X = concepts.X.tocsc()
    best = []
    for j in range(concepts.n_vars):
        rows, values = (part[X.indptr[j] : X.indptr[j + 1]] for part in (X.indices, X.data))
        best.append(rows[np.lexsort([rows, -values])[:n_best]])
    if concepts.n_obs <= n_cells:
        return np.arange(concepts.n_obs), best
    chosen = np.unique(np.concatenate(best))
    others = np.setdiff1d(np.arange(concepts.n_obs), chosen)
    more = np.random.default_rng(seed).permutation(others)[: max(0, n_cells - len(chosen))]
    return np.sort(np.r_[chosen, more]), best


def index_data(tables: Tables, xy: np.ndarray, cells: np.ndarray, run: str) -> dict:
    """One row a concept, as columns; and what the page has to know before all else. ``xy`` (k, 2): the map."""
    concepts, var = tables.concepts, tables.concepts.var
    kinds = [kind for kind in KIND_COLORS_ALL if (tables.kinds == kind).any()]
    grades = [] if tables.evidence is None else list(GRADES)
    low, high = (palette(concepts, level) for level in ("low", "high"))
    parents = {t: p for c in LEVELS.values() for t, p in concepts.obs[[c, "cell_type_high"]].astype(str).to_numpy()}
    parent = var["main_type"].astype(str).map(lambda t: parents.get(t, UNASSIGNED))
    mains = sorted(set(var["main_type"].astype(str)))
    names = tables.column("names", "name", "").astype(str)
    names = names.mask(names.str.match(r"concept \d+ "), "")  # a number is no name
    strong = tables.effects[tables.effects["role"].isin([1, 2])].groupby("place")["code"].agg(list)
    scaled = (xy - xy.min(0)) / np.maximum(np.ptp(xy, axis=0), 1e-9)
    columns = {
        "number": tables.numbers,
        "name": names.tolist(),
        "kind": coded(tables.kinds, kinds),
        "grade": coded(tables.column("evidence", "grade", ""), grades),
        "main": coded(var["main_type"].astype(str), mains),
        "high": coded(parent, list(high)),
        "cells": var["n_cells"].astype(int).tolist(),
        **{c: rounded(var[c]) for c in "frequency specificity sensitivity f1 f1_held_out study_share".split()},
        "x": rounded(scaled[:, 0]),
        "y": rounded(scaled[:, 1]),
        "drivers": [len(strong.get(i, [])) for i in range(len(var))],
        "top": [strong.get(i, [])[:4] for i in range(len(var))],
    }
    return {
        "run": run,
        "cells": concepts.n_obs,
        "cells_shown": len(cells),
        "studies": int(concepts.obs["study"].nunique()),
        "part": PART,
        "tables": [name for name in [*COLUMNS, "adata"] if getattr(tables, name) is not None],
        "kinds": [[kind, KIND_COLORS_ALL[kind]] for kind in kinds],
        "grades": [[grade, f"passes {GRADES[grade]} or more of {len(LINES)} lines"] for grade in grades],
        "types": [[t, c] for t, c in low.items()],
        "highs": [[t, c] for t, c in high.items()],
        "mains": mains,
        "genes": tables.genes,
        "roles": ROLES,
        "concepts": columns,
    }


def search_data(tables: Tables, min_share: float = 0.1) -> dict:
    """Terms of each kind (gene, word, gene set, cell type), and the places of the concepts that have them.

    A concept has a cell type, of any level, that makes up ``min_share`` of its active cells; a gene that is a driver
    or inhibitor; a gene set with q < 0.05; a word with q < 0.05 or in two of its genes or more. Where there is an
    order, the strongest come first.
    """
    found: dict[str, dict[str, list[int]]] = {kind: {} for kind in ("gene", "word", "set", "type")}
    for level in LEVELS:
        shares = type_shares(tables.concepts, level).drop(columns=UNASSIGNED, errors="ignore")
        for name in shares:
            order = np.argsort(-shares[name].to_numpy(), kind="stable")
            found["type"].setdefault(str(name), order[: (shares[name] >= min_share).sum()].tolist())
    for kind, name, column in [("word", "words", "word"), ("set", "gene_sets", "set")]:
        for i, rows in tables.of(name).items():
            sure = rows["qvalue"] < 0.05
            for term in rows.loc[sure | (rows["count"] > 1) if kind == "word" else sure, column].astype(str):
                found[kind].setdefault(term, []).append(i)
    strong = tables.effects[tables.effects["role"].isin([1, 2])]
    found["gene"] = {gene: places.tolist() for gene, places in strong.groupby("gene")["place"]}
    terms = {kind: sorted((term, places) for term, places in f.items() if places) for kind, f in found.items()}
    return {kind: [[term for term, _ in pairs], [places for _, places in pairs]] for kind, pairs in terms.items()}


def write_atlas(
    tables: Tables,
    folder: Path,
    run: str = "mini",
    n_cells: int = 5000,
    n_best: int = 6,
    xy: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Write the data of the atlas, whole or not at all.

    Parameters
    ----------
    folder
        Replaced if it is there.
    run
        Name of the profile, for the command that makes a concept's page.
    n_cells
        With more cells than this, a sample of them has a page (see :func:`shown_cells`).
    n_best
        Cells on a concept's page.
    xy
        (k, 2) place of each kept concept on the map; by default :func:`~scsae_utils.concepts.map_concepts`.

    Returns
    -------
    Size in bytes of each file.
    """
    concepts = tables.concepts
    cells, best = shown_cells(concepts, n_cells, n_best, seed)
    xy = map_concepts(concepts, seed) if xy is None else np.asarray(xy, float)
    low = list(palette(concepts, "low"))
    place = concepts.obsm["X_umap"]
    place = ((place - place.min(0)) / np.maximum(np.ptp(place, axis=0), 1e-9))[cells]
    pieces = {
        "index": index_data(tables, xy, cells, run),
        "search": search_data(tables),
        "cells": {
            "names": [str(c) for c in concepts.obs_names[cells]],
            "types": coded(concepts.obs[LEVELS["low"]].astype(str).iloc[cells], low),
            "x": rounded(place[:, 0]),
            "y": rounded(place[:, 1]),
        },
    }
    for name, pages in [
        ("concepts", concept_details(tables, cells, best)),
        ("genes", gene_details(tables)),
        ("cells", cell_details(tables, cells)),
    ]:
        pieces |= {f"{name}-{i // PART}": pages[i : i + PART] for i in range(0, len(pages), PART)}
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, value in pieces.items():
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        (part / f"{name}.js").write_text(f"scsaeAtlas.data({json.dumps(name)},{text});\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def mentions(folder: Path) -> dict[int, list[list[str]]]:
    """Which executed chapters in ``folder`` speak of which concepts: number to a list of ``[page, title]``.

    Chapter 5 counts only if its concepts are those of the run (its parameter ``cells`` is None).
    """
    found: dict[int, list[list[str]]] = {}
    for name in CHAPTERS:
        path = folder / f"{name}.ipynb"
        content = json.loads(path.read_text()) if path.is_file() else {"cells": [], "metadata": {}}
        if content["metadata"].get("papermill", {}).get("parameters", {}).get("cells"):
            continue
        sources = ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == "markdown"]
        title = next((m[1] for m in map(re.compile(r"^# (.+)", re.M).search, sources) if m), name)
        data = [o.get("data", {}) for c in content["cells"] for o in c.get("outputs", [])]
        shown = " ".join("".join(d.get("text/markdown", "")) for d in data)
        for concept in sorted(set(map(int, re.findall(r"\b[Cc]oncept (\d+)\b", shown)))):
            found.setdefault(concept, []).append([name, title])
    for path in folder.glob("concepts/concept_*[0-9].ipynb"):
        concept = int(path.stem.removeprefix("concept_"))
        found.setdefault(concept, []).append([f"concepts/{path.stem}", "Its full page"])
    return found


def write_mentions(notebooks: Path, folder: Path) -> None:
    """Put :func:`mentions` beside the other pieces of data; done when the book is built."""
    (folder / "pages.js").write_text(f'scsaeAtlas.data("pages",{json.dumps(mentions(notebooks))});\n')


def container() -> str:
    """The place of the atlas on a page of the book, as HTML: what the notebook shows.

    Addresses are relative to ``notebooks/`` of the built book; outside of it the note stays.
    """
    scripts = ["atlas/atlas.js", "atlas/data/index.js", "vendor/d3/d3.min.js"]
    scripts += [f"atlas/{name}.js" for name in ("search", "scatter", "list", "figures", "pages", "start")]
    return "\n".join(
        [
            '<link rel="stylesheet" href="../atlas/atlas.css">',
            '<div id="atlas"><p>The atlas is drawn on the page of the book, with JavaScript.</p></div>',
            *(f'<script defer src="../{path}"></script>' for path in scripts),
        ]
    )
