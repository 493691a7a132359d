"""The data of the atlas, the page on which every concept can be searched (chapter 7). Ours.

A browser does not fetch JSON from a folder on disk, so the data are scripts, each a call ``scsaeAtlas.data(name,
value)``, cut in pieces that the page loads when it needs them: ``index`` (one row a concept) and ``search`` first, then
``cells`` (the map of cells), and in parts ``concepts-0``, ``genes-0``, ``cells-0`` and so on (what is on one's page).
The page itself lies in ``book/_extra/atlas``. Labels are data: the page writes them as text, never as markup.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from sklearn.metrics import pairwise_distances_argmin
from sklearn.preprocessing import normalize

from .cells import LEVELS, UNASSIGNED
from .concepts import KINDS, active_counts, kept, map_concepts, number, type_shares
from .plots.style import KIND_COLORS, OTHER_COLORS, palette
from .words import gene_table

PART = 100  # concepts, genes or cells in a file
ROLES = ("no effect", "driver", "inhibitor", "passenger")
COLUMNS = {  # what each optional table must have; more is welcome where the class says so
    "drivers": "concept gene attribution error",
    "expression": "concept gene log2fc differs",
    "attributions": "concept cell gene attribution",
    "evidence": "concept line verdict value",
    "names": "concept name",
    "words": "concept word count qvalue genes",
    "gene_sets": "concept set qvalue genes",
    "curves": "concept order n deletion",
}


@dataclass
class Tables:
    """What the atlas is made of. Only the concepts are needed; what is missing is left out of the page, which says so.

    Parameters
    ----------
    concepts
        Cells x concepts with taxonomy, vectors and the cells' UMAP (``concepts.h5ad``). Those that post-processing
        dropped are left out. ``var["grade"]``, if there, is the grade of the evidence.
    adata
        The same cells x genes: the mean expression of each gene in each cell type.
    drivers
        ``concept`` (number), ``gene``, ``attribution`` (mean), ``error``; and if there, ``q_value``, ``selected``,
        ``tag``.
    expression
        ``concept``, ``gene``, ``log2fc``, ``differs`` (bool): differential expression, prototypes against
        counterfactuals. Genes that differ without an effect are passengers.
    attributions
        ``concept``, ``cell`` (name), ``gene``, ``attribution`` in this cell: :func:`scsae_utils.attribute`.
    evidence
        ``concept``, ``line``, ``verdict`` (``"yes"``, ``"weak"``, ``"no"`` or ``""``: not tested), ``value`` (text).
    names
        ``concept``, ``name``; and if there, ``auroc``, ``auroc_low``, ``auroc_high``.
    words, gene_sets
        ``concept``, ``word`` (with ``count``) or ``set``, ``qvalue``, ``genes`` (separated by commas).
    curves
        ``concept``, ``order``, ``n`` (genes removed), ``deletion`` (activation left), a row for each cell; orders
        ``random 0``, ``random 1`` and so on make a band.

    Raises
    ------
    ValueError
        If a table lacks a column; names it.
    """

    concepts: AnnData
    adata: AnnData | None = None
    drivers: pd.DataFrame | None = None
    expression: pd.DataFrame | None = None
    attributions: pd.DataFrame | None = None
    evidence: pd.DataFrame | None = None
    names: pd.DataFrame | None = None
    words: pd.DataFrame | None = None
    gene_sets: pd.DataFrame | None = None
    curves: pd.DataFrame | None = None

    def __post_init__(self):
        for name, columns in COLUMNS.items():
            table = getattr(self, name)
            missing = [] if table is None else [c for c in columns.split() if c not in table]
            if missing:
                raise ValueError(f"the table {name} lacks the column {', '.join(missing)}; it has {', '.join(table)}")
        if self.adata is not None and not self.adata.obs_names.equals(self.concepts.obs_names):
            raise ValueError("adata and concepts are of other cells, or of cells in another order")
        self.concepts = kept(self.concepts).copy()
        if self.concepts.n_vars == 0:
            raise ValueError("no concept survives post-processing: there is nothing to show")
        self.concepts.X = sparse.csr_matrix(self.concepts.X)
        self.numbers = [number(name) for name in self.concepts.var_names]
        self.place = {j: i for i, j in enumerate(self.numbers)}

    def of(self, name: str) -> dict[int, pd.DataFrame]:
        """Rows of a table by the place of their concept; empty if there is no such table."""
        table = getattr(self, name)
        groups = {} if table is None else table.groupby("concept")
        return {self.place[j]: rows for j, rows in groups if j in self.place}

    @cached_property
    def effects(self) -> pd.DataFrame:
        """The drivers, largest first, with ``log2fc``, ``place`` (of the concept), ``code`` (of the gene), ``role``.

        The role is an index into :data:`ROLES`. A gene has an effect if its attribution is at least 0.01 in size and
        beyond twice its error, as in :func:`scsae_utils.significance.quadrants`. Empty if there are no drivers.
        """
        table = pd.DataFrame(columns=COLUMNS["drivers"].split()) if self.drivers is None else self.drivers
        table = table[table["concept"].isin(self.numbers)].drop(columns=["log2fc", "differs"], errors="ignore")
        table = table.assign(gene=table["gene"].astype(str))
        for column, otherwise in {"q_value": np.nan, "tag": "", "selected": False}.items():
            table[column] = table[column].fillna(otherwise) if column in table else otherwise
        if self.expression is None:
            table = table.assign(log2fc=np.nan, differs=False)
        else:
            columns = COLUMNS["expression"].split()
            table = table.merge(self.expression[columns], on=["concept", "gene"], how="left")
        size = table["attribution"].abs()
        effect = (size >= 0.01) & (size > 2 * table["error"].fillna(0))
        cases = [effect & (table["attribution"] > 0), effect, table["differs"].eq(True)]
        table["role"] = np.select(cases, [1, 2, 3], 0)
        table["place"] = table["concept"].map(self.place)
        table["code"] = pd.Categorical(table["gene"]).codes
        return table.assign(size=size).sort_values("size", ascending=False, kind="stable")

    @cached_property
    def genes(self) -> list[str]:
        """Genes that have a page, by their code."""
        return sorted(self.effects["gene"].unique())


def rounded(values, digits: int = 3) -> list:
    """Numbers as short as a page needs them; None where there is none."""
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in np.asarray(values, float)]


def coded(values, names) -> list[int]:
    """The place of each value in ``names``; -1 if it is not there."""
    return pd.Index(names).get_indexer(pd.Index(values)).tolist()


def listed(table: pd.DataFrame, columns: str, digits: int = 3) -> list[list]:
    """Rows of some columns (their names, separated by blanks): numbers are rounded, what is missing is None."""
    parts = []
    for values in (table[column] for column in columns.split()):
        plain = values.dtype.kind in "iub"
        parts.append(values.tolist() if plain else rounded(values, digits) if values.dtype.kind == "f" else
                     ["" if pd.isna(v) else str(v) for v in values])  # fmt: skip
    return [list(row) for row in zip(*parts)]


def nearest(vectors, n: int = 5, block: int = 1000) -> list[list]:
    """For each row the ``n`` others with the highest cosine above 0: ``[row, cosine]``."""
    unit = normalize(vectors)
    found = []
    for start in range(0, unit.shape[0], block):
        cosine = unit[start : start + block] @ unit.T
        cosine = cosine.toarray() if sparse.issparse(cosine) else cosine
        cosine[np.arange(len(cosine)), start + np.arange(len(cosine))] = -np.inf
        top = np.argsort(-cosine, axis=1, kind="stable")[:, :n]
        for row, columns in zip(cosine, top):
            found.append([[int(c), float(f"{row[c]:.3g}")] for c in columns if row[c] > 0])
    return found


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


def index_data(tables: Tables, xy: np.ndarray, cells: np.ndarray, run: str, grades: dict[str, str]) -> dict:
    """One row a concept, as columns; and what the page has to know before all else. ``xy`` (k, 2): the map."""
    concepts, var = tables.concepts, tables.concepts.var
    kinds = [k for k in [*KINDS, *sorted(set(var["kind"].astype(str)) - {*KINDS, ""})] if (var["kind"] == k).any()]
    spare = iter(OTHER_COLORS * len(kinds))
    low, high = (palette(concepts, level) for level in ("low", "high"))
    parents = {t: p for c in LEVELS.values() for t, p in concepts.obs[[c, "cell_type_high"]].astype(str).to_numpy()}
    parent = var["main_type"].astype(str).map(lambda t: parents.get(t, UNASSIGNED))
    mains = sorted(set(var["main_type"].astype(str)))
    names = {} if tables.names is None else dict(zip(tables.names["concept"], tables.names["name"].astype(str)))
    names = {j: name for j, name in names.items() if not name.startswith("concept ")}  # a number is no name
    strong = tables.effects[tables.effects["role"].isin([1, 2])].groupby("place")["code"].agg(list)
    grade = var.get("grade", pd.Series("", var.index)).astype(str).replace("nan", "")
    scaled = (xy - xy.min(0)) / np.maximum(np.ptp(xy, axis=0), 1e-9)
    columns = {
        "number": tables.numbers,
        "name": [names.get(j, "") for j in tables.numbers],
        "kind": coded(var["kind"].astype(str), kinds),
        "grade": coded(grade, list(grades)),
        "main": coded(var["main_type"].astype(str), mains),
        "high": coded(parent, list(high)),
        "cells": var["n_cells"].astype(int).tolist(),
        **{c: rounded(var[c]) for c in ("frequency", "specificity", "sensitivity", "f1", "study_share")},
        "held_out": rounded(var.get("f1_held_out", pd.Series(np.nan, var.index))),
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
        "kinds": [[k, KIND_COLORS.get(k) or next(spare)] for k in kinds],
        "grades": list(grades.items()),
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
    or inhibitor; and the words and gene sets of its tables. Where there is an order, the strongest come first.
    """
    found: dict[str, dict[str, list[int]]] = {kind: {} for kind in ("gene", "word", "set", "type")}
    for level in LEVELS:
        shares = type_shares(tables.concepts, level).drop(columns=UNASSIGNED, errors="ignore")
        for name in shares:
            order = np.argsort(-shares[name].to_numpy(), kind="stable")
            found["type"].setdefault(str(name), order[: (shares[name] >= min_share).sum()].tolist())
    for kind, name, column in [("word", "words", "word"), ("set", "gene_sets", "set")]:
        for i, rows in tables.of(name).items():
            for term in rows[column].astype(str):
                found[kind].setdefault(term, []).append(i)
    strong = tables.effects[tables.effects["role"].isin([1, 2])]
    found["gene"] = {gene: places.tolist() for gene, places in strong.groupby("gene")["place"]}
    terms = {kind: sorted((term, places) for term, places in f.items() if places) for kind, f in found.items()}
    return {kind: [[term for term, _ in pairs], [places for _, places in pairs]] for kind, pairs in terms.items()}


def concept_details(tables: Tables, cells: np.ndarray, best: list[np.ndarray], n_genes: int = 30) -> list[dict]:
    """What is on the page of each concept."""
    concepts = tables.concepts
    low = list(palette(concepts, "low"))
    counts, sizes = active_counts(concepts, "low")
    codes = coded(counts.columns, low)
    sizes = sizes[counts.columns].to_numpy()
    together, similar = nearest(concepts.X.T.tocsr()), nearest(concepts.varm["vectors"])
    X = concepts.X[cells].tocsc()
    seen = pd.Series(np.arange(len(cells)), cells)
    names, curves = tables.of("names"), tables.of("curves")
    effects = dict(list(tables.effects.groupby("place")))
    tabled = [("evidence", "line verdict value", 6), ("words", "word count qvalue genes", 25)]
    tabled = [(tables.of(name), name, *rest) for name, *rest in [*tabled, ("gene_sets", "set qvalue genes", 12)]]
    pages = []
    for i in range(concepts.n_vars):
        rows, values = (part[X.indptr[i] : X.indptr[i + 1]] for part in (X.indices, X.data))
        hit = np.flatnonzero(counts.iloc[i])
        own = sorted(zip(counts.iloc[i].iloc[hit], hit), reverse=True)
        page = {
            "max": float(concepts.var["max_activation"].iloc[i]),
            "active": [rows.tolist(), np.ceil(255 * values / max(values.max(initial=0), 1e-9)).astype(int).tolist()],
            "types": [[codes[t], int(n), int(sizes[t])] for n, t in own],
            "together": together[i],
            "similar": similar[i],
            "best": [[int(seen[r]), v] for r, v in zip(best[i], rounded(concepts.X[best[i], i].toarray().ravel()))],
        }
        if i in effects:
            strongest = effects[i].head(n_genes)
            page["drivers"] = listed(strongest, "code attribution error q_value role tag selected")
            page["n_tested"] = len(effects[i])
            if (both := effects[i].dropna(subset=["log2fc"])).size:
                columns = (both["code"].tolist(), *(rounded(both[c], 2) for c in ("log2fc", "attribution")))
                page["scatter"] = [*columns, both["role"].tolist()]
        for rows_of, name, columns, n in tabled:
            if i in rows_of:
                page[name] = listed(rows_of[i].head(n), columns)
        if i in names and "auroc" in names[i]:
            row = names[i].iloc[0]
            page["auroc"] = rounded([row.get(c, np.nan) for c in "auroc auroc_low auroc_high auroc_random".split()])
        if i in curves:
            page["curves"] = curve_data(curves[i])
        pages.append(page)
    return pages


def curve_data(curves: pd.DataFrame) -> list[dict]:
    """Mean curve over the cells of each order; of the random ones their mean, lowest and highest."""
    means = curves.groupby(["order", "n"], sort=False)["deletion"].mean().unstack("n").sort_index(axis=1)
    random = means.index.str.match(r"random( \d+)?$")
    out = []
    for name, row in means[~random].iterrows():
        row = row.dropna()
        out.append({"order": str(name), "n": [int(n) for n in row.index], "left": rounded(row)})
    if random.any():
        band = means[random].dropna(axis=1)
        low, high = band.min(), band.max()
        out.append({"order": "random", "n": [int(n) for n in band], "left": rounded(band.mean())})
        out[-1] |= {"low": rounded(low), "high": rounded(high)}
    return out


def gene_details(tables: Tables, n_types: int = 12) -> list[dict]:
    """What is on the page of each gene: its name, the concepts in which it has a role, its mean expression by type."""
    described = gene_table()["name"].reindex(tables.genes).fillna("")
    pages = {gene: {"name": described[gene]} for gene in tables.genes}
    for gene, rows in tables.effects.groupby("gene"):
        with_role = rows[rows["role"] > 0]
        pages[gene] |= {
            "tested": len(rows),
            "concepts": listed(with_role, "place attribution error q_value role"),
        }
    if tables.adata is not None:
        low = list(palette(tables.concepts, "low"))
        types = tables.concepts.obs[LEVELS["low"]].astype(str)
        there = [gene for gene in tables.genes if gene in tables.adata.var_names]
        member = pd.get_dummies(types).astype(float)
        means = sparse.csr_matrix((member / member.sum()).to_numpy()).T @ sparse.csr_matrix(tables.adata[:, there].X)
        for gene, values in zip(there, means.toarray().T):
            order = np.argsort(-values, kind="stable")[:n_types]
            pages[gene]["types"] = [[low.index(member.columns[t]), v] for t, v in zip(order, rounded(values[order]))]
    return list(pages.values())


def cell_details(tables: Tables, cells: np.ndarray, n_genes: int = 5, key: str = "X_scGPT") -> list[dict]:
    """What is on the page of each cell: labels, active concepts and, where the genes were occluded, what drives them.

    For each such concept the nearest cell in which it is silent, counted in the embedding: the counterfactual.
    """
    concepts = tables.concepts
    obs = concepts.obs
    code = {gene: i for i, gene in enumerate(tables.genes)}
    name = {c: i for i, c in enumerate(concepts.obs_names)}
    seen = {int(row): i for i, row in enumerate(cells)}
    effects: dict[tuple[int, int], list] = {}
    if tables.attributions is not None:
        table = tables.attributions
        table = table[table["concept"].isin(tables.numbers) & table["cell"].isin(name) & table["gene"].isin(code)]
        table = table.assign(size=table["attribution"].abs(), code=table["gene"].map(code)).nlargest(len(table), "size")
        for (concept, cell), rows in table.groupby(["concept", "cell"]):
            effects[tables.place[concept], name[cell]] = listed(rows.head(n_genes), "code attribution")
    other = {}
    X = concepts.X.tocsc()
    for place in {p for p, _ in effects} if key in concepts.obsm else ():
        rows = [r for p, r in effects if p == place]
        silent = np.setdiff1d(np.arange(concepts.n_obs), X.indices[X.indptr[place] : X.indptr[place + 1]])
        if len(silent):
            E = concepts.obsm[key]
            found = silent[pairwise_distances_argmin(E[rows], E[silent])]
            other |= {(place, r): int(f) for r, f in zip(rows, found)}
    labels = obs[list(LEVELS.values())].astype(str).to_numpy().tolist()
    top = concepts.var["max_activation"].to_numpy()
    pages = []
    for row in cells:
        part = concepts.X[row]
        order = np.argsort(-part.data / top[part.indices], kind="stable")
        fires = []
        for place, value in zip(part.indices[order].tolist(), part.data[order].tolist()):
            fires.append([place, *rounded([value, value / top[place]])])
            if (place, row) in effects:
                silent = other.get((place, row))
                near = None if silent is None else [seen.get(silent, -1), str(obs.index[silent]), labels[silent][0]]
                fires[-1] += [effects[place, row], near]
        pages.append({"labels": labels[row], "study": str(obs["study"].iloc[row]), "concepts": fires})
    return pages


def write_atlas(
    tables: Tables,
    folder: Path,
    run: str = "mini",
    grades: dict[str, str] | None = None,
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
    grades
        Grade to its meaning, best first; by default those in ``concepts.var["grade"]``, in order.
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
    if grades is None:
        found = concepts.var["grade"].astype(str) if "grade" in concepts.var else []
        grades = {g: "" for g in sorted(set(found) - {"", "nan"})}
    cells, best = shown_cells(concepts, n_cells, n_best, seed)
    xy = map_concepts(concepts, seed) if xy is None else np.asarray(xy, float)
    low = list(palette(concepts, "low"))
    place = concepts.obsm["X_umap"]
    place = ((place - place.min(0)) / np.maximum(np.ptp(place, axis=0), 1e-9))[cells]
    pieces = {
        "index": index_data(tables, xy, cells, run, grades),
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
