"""What is on the pages of the atlas: the tables it is made of, and the page of each concept, gene and cell. Ours.

See :mod:`scsae_utils.atlas`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from sklearn.metrics import pairwise_distances_argmin
from sklearn.preprocessing import normalize

from .cells import LEVELS
from .concepts import KINDS, active_counts, kept, number
from .evidence import LINES
from .plots.style import palette
from .significance import has_effect
from .words import gene_table

ROLES = ("no effect", "driver", "inhibitor", "passenger")
COLUMNS = {  # what each optional table must have
    "drivers": "concept gene attribution error",
    "quadrants": "concept gene log2fc differs",
    "attributions": "concept cell gene attribution",
    "curves": "concept order n deletion",
    "evidence": "grade " + " ".join(f"{line}_verdict" for line in LINES),
    "names": "name",
    "words": "concept word count qvalue genes",
    "gene_sets": "concept set qvalue genes",
}


@dataclass
class Tables:
    """What the atlas is made of. Only the concepts are needed; what is missing is left out of the page, which says so.

    Parameters
    ----------
    concepts
        Cells x concepts with taxonomy, vectors and the cells' UMAP (``concepts.h5ad``). Those that post-processing
        dropped are left out.
    adata
        The same cells x genes: the mean expression of each gene in each cell type.
    drivers
        :func:`~scsae_utils.significance.driver_table`: ``concept`` (number), ``gene``, ``attribution`` (mean),
        ``error``; and if there, ``q_value``, ``tag``, ``selected``.
    quadrants
        :func:`~scsae_utils.significance.quadrants`: ``concept``, ``gene``, ``log2fc``, ``differs`` (bool).
    attributions
        :func:`~scsae_utils.attribution.attribute`: ``concept``, ``cell`` (name), ``gene``, ``attribution`` in it.
    curves
        :func:`~scsae_utils.curves.order_curves`: ``concept``, ``order``, ``n`` (genes removed), ``deletion``
        (activation left), a row for each cell; orders ``random 0``, ``random 1`` and so on make a band.
    evidence
        :func:`~scsae_utils.evidence.evidence_table`: indexed like ``concepts.var``, with ``grade``, and for each line
        ``<line>_verdict`` and its other columns. ``reading``, if there, parts the cross-cell-type concepts.
    names
        :func:`~scsae_utils.names.name_concepts`: indexed like ``concepts.var``, with ``name``; and if there,
        ``auroc`` and what belongs to it.
    words, gene_sets
        ``concept``, ``word`` (with ``count``) or ``set``, ``qvalue``, ``genes`` (separated by commas), the best first.

    Raises
    ------
    ValueError
        If a table lacks a column (names it), no concept is left, or ``adata`` has other cells.
    """

    concepts: AnnData
    adata: AnnData | None = None
    drivers: pd.DataFrame | None = None
    quadrants: pd.DataFrame | None = None
    attributions: pd.DataFrame | None = None
    curves: pd.DataFrame | None = None
    evidence: pd.DataFrame | None = None
    names: pd.DataFrame | None = None
    words: pd.DataFrame | None = None
    gene_sets: pd.DataFrame | None = None

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

    def column(self, name: str, column: str, otherwise) -> pd.Series:
        """A column of ``evidence`` or ``names`` for all concepts; ``otherwise`` where there is nothing."""
        table = getattr(self, name)
        if table is None or column not in table:
            return pd.Series(otherwise, self.concepts.var_names)
        return table[column].reindex(self.concepts.var_names).fillna(otherwise)

    @cached_property
    def kinds(self) -> pd.Series:
        """Kind of each concept; of a cross-cell-type one its reading, where there is evidence."""
        kind, reading = self.concepts.var["kind"].astype(str), self.column("evidence", "reading", "").astype(str)
        return kind.where((kind != KINDS[2]) | (reading == ""), "cross-cell-type: " + reading)

    @cached_property
    def effects(self) -> pd.DataFrame:
        """The drivers, largest first, with ``log2fc``, ``place`` (of the concept), ``code`` (of the gene), ``role``.

        The role is an index into :data:`ROLES`. Which genes have an effect is said by
        :func:`~scsae_utils.significance.has_effect`. Empty if there are no drivers.
        """
        table = pd.DataFrame(columns=COLUMNS["drivers"].split()) if self.drivers is None else self.drivers
        table = table[table["concept"].isin(self.numbers)].drop(columns=["log2fc", "differs"], errors="ignore")
        table = table.astype({"gene": str, "attribution": float, "error": float})
        for column, otherwise in {"q_value": np.nan, "tag": "", "selected": False}.items():
            table[column] = table[column].fillna(otherwise) if column in table else otherwise
        if self.quadrants is None:
            table = table.assign(log2fc=np.nan, differs=False)
        else:
            columns = COLUMNS["quadrants"].split()
            table = table.merge(self.quadrants[columns], on=["concept", "gene"], how="left")
        effect = has_effect(table)
        cases = [effect & (table["attribution"] > 0), effect, table["differs"].eq(True)]
        table["role"] = np.select(cases, [1, 2, 3], 0)
        table["place"] = table["concept"].map(self.place)
        table["code"] = pd.Categorical(table["gene"]).codes
        return table.assign(size=table["attribution"].abs()).sort_values("size", ascending=False, kind="stable")

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
        top = np.argpartition(-cosine, min(n, cosine.shape[1] - 1), axis=1)[:, :n]
        for row, columns in zip(cosine, top):
            columns = columns[np.lexsort([columns, -row[columns]])]
            found.append([[int(c), float(f"{row[c]:.3g}")] for c in columns if row[c] > 0])
    return found


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
    curves = tables.of("curves")
    scores = [tables.column("names", c, np.nan) for c in "auroc auroc_low auroc_high auroc_random".split()]
    effects = dict(list(tables.effects.groupby("place")))
    tabled = [("words", "word count qvalue genes", 25), ("gene_sets", "set qvalue genes", 12)]
    tabled = [(tables.of(name), name, *rest) for name, *rest in tabled]
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
            compared = effects[i]["log2fc"].notna()
            if compared.any():
                both = effects[i][compared]
                columns = (both["code"].tolist(), *(rounded(both[c], 2) for c in ("log2fc", "attribution")))
                page["scatter"] = [*columns, both["role"].tolist()]
        for rows_of, name, columns, n in tabled:
            if i in rows_of:
                page[name] = listed(rows_of[i].head(n), columns)
        if tables.evidence is not None and concepts.var_names[i] in tables.evidence.index:
            page["evidence"] = evidence_lines(tables.evidence.loc[concepts.var_names[i]])
        if tables.names is not None:
            page["auroc"] = rounded([score.iloc[i] for score in scores])
        if i in curves:
            page["curves"] = curve_data(curves[i])
        pages.append(page)
    return pages


def evidence_lines(row: pd.Series) -> list[list[str]]:
    """Name, verdict and what it rests on, as text, of each line of a concept's evidence."""
    lines = []
    for line in LINES:
        value, low, high, null = (row.get(f"{line}_{c}", np.nan) for c in ("value", "low", "high", "null"))
        text = "" if pd.isna(value) else f"{value:.2g}"
        text += f" ({low:.2g} to {high:.2g})" if text and pd.notna(low) and pd.notna(high) else ""
        text += f", null {null:.2g}" if text and pd.notna(null) else ""
        note = str(row.get(f"{line}_note", "") or "")
        lines.append([line.replace("_", " "), str(row[f"{line}_verdict"]), "; ".join(filter(None, [text, note]))])
    return lines


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
        table = tables.attributions[["concept", "cell", "gene", "attribution"]]
        table = table[table["concept"].isin(tables.numbers) & table["cell"].isin(name) & table["gene"].isin(code)]
        for concept, part in table.groupby("concept"):  # one at a time: the table is the largest of all
            part = part.assign(size=part["attribution"].abs(), code=part["gene"].map(code))
            part = part.sort_values("size", ascending=False, kind="stable").groupby("cell").head(n_genes)
            for cell, rows in part.groupby("cell"):
                effects[tables.place[concept], name[cell]] = listed(rows, "code attribution")
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
