"""A name for each concept, made without any network, and a score of how much the name says. Ours.

A name says where the concept is active (its cell type, if it has one) and what its driver genes are about: the gene
set, the words or the known markers that they are enriched for. Nothing goes into a name without a q-value, and a
p-value against random genes of like expression. Where nothing is significant the name says no more than the cell
type, or the number.

The score asks how far the drivers explain the concept by themselves: cells are ranked by the mean of the drivers'
scaled log expression, those that hold the concept back counted negatively, and the area under the ROC curve (AUROC)
tells how well this separates held-out cells in which the concept is active from those in which it is silent.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.optimize import brentq
from scipy.stats import norm, rankdata
from sklearn.utils.sparsefuncs import mean_variance_axis

from .attribution import choose_prototypes
from .cells import MARKERS
from .concepts import KINDS
from .enrichment import over_representation, plain, random_lists
from .genesets import on_panel
from .words import without_parts, word_sets

SCORED = 5000  # held-out cells, active and silent ones each, that a score asks at most


@dataclass(frozen=True)
class NameConfig:
    """How concepts are named.

    Parameters
    ----------
    max_gene_q
        Drivers with a q-value below this are significant.
    max_q
        Gene sets, words and markers with a q-value below this are significant, if their p-value against random genes
        of like expression is as well.
    min_genes
        A concept with fewer significant drivers is named after its strongest ones.
    n_strongest
        So many, by positive attribution.
    n_words
        Words in a name, at most.
    n_random
        Random lists of genes of like expression.
    n_prototypes
        So many cells with the highest activation chose the drivers, and are left out of the score.
    """

    max_gene_q: float = 0.1
    max_q: float = 0.05
    min_genes: int = 3
    n_strongest: int = 20
    n_words: int = 3
    n_random: int = 200
    n_prototypes: int = 20
    seed: int = 0

    def __post_init__(self):
        numbers = self.min_genes, self.n_strongest, self.n_words, self.n_prototypes
        if not (0 < self.max_gene_q < 1 and 0 < self.max_q < 1 and min(numbers) >= 1):
            raise ValueError(f"max_gene_q and max_q must lie between 0 and 1, and the numbers be at least 1: {self}")
        if self.n_random < 2 / self.max_q:
            raise ValueError(f"n_random must be at least {2 / self.max_q:.0f} for max_q = {self.max_q}")


def driver_genes(drivers: pd.DataFrame, config: NameConfig | None = None) -> pd.DataFrame:
    """The genes that a concept is named after.

    Parameters
    ----------
    drivers
        One row for each concept and gene: ``concept`` (number), ``gene``, ``attribution`` (mean), and ``q_value`` or,
        if there is none, ``selected`` (the paper's rule).

    Returns
    -------
    The significant rows (``q_value`` below ``max_gene_q``, or ``selected``), strongest first, with ``basis``
    ``"significant"``; for concepts with fewer than ``min_genes`` of them that have a positive attribution, the
    ``n_strongest`` positive ones, with ``basis`` ``"strongest"``.

    Raises
    ------
    ValueError
        If a column is missing, or a gene occurs twice in a concept.
    """
    config = config or NameConfig()
    missing = {"concept", "gene", "attribution"} - set(drivers)
    if missing or not {"q_value", "selected"} & set(drivers):
        raise ValueError(f"the table of drivers lacks {', '.join(sorted(missing)) or 'q_value (or selected)'}")
    if drivers.duplicated(["concept", "gene"]).any():
        twice = drivers[drivers.duplicated(["concept", "gene"])].iloc[0]
        raise ValueError(f"the gene {twice['gene']} occurs twice among the drivers of concept {twice['concept']}")
    table = drivers[drivers["attribution"] != 0].reset_index(drop=True)
    significant = table["q_value"] < config.max_gene_q if "q_value" in table else table["selected"].astype(bool)
    n_positive = (significant & (table["attribution"] > 0)).groupby(table["concept"]).transform("sum")
    positive = table["attribution"].where(table["attribution"] > 0)
    rank = positive.groupby(table["concept"]).rank(ascending=False, method="first")
    enough = n_positive >= config.min_genes
    chosen = (significant & enough) | (~enough & (rank <= config.n_strongest))
    out = table[chosen].assign(basis=np.where(enough[chosen], "significant", "strongest"))
    order = out.assign(size=out["attribution"].abs()).sort_values(["concept", "size"], ascending=[True, False]).index
    return out.loc[order, ["concept", "gene", "attribution", "basis"]].reset_index(drop=True)


def name_concepts(
    concepts: AnnData,
    adata: AnnData,
    drivers: pd.DataFrame,
    words: pd.Series | None = None,
    sets: dict | None = None,
    markers: dict | None = MARKERS,
    config: NameConfig | None = None,
) -> pd.DataFrame:
    """Name every concept of a table of drivers, and score the name.

    Parameters
    ----------
    concepts
        Cells x concepts with taxonomy.
    adata
        The same cells x genes: log expression in ``X``, ``obs["split"]``. Its genes are the panel, the background of
        all tests: leave out those that the model does not know.
    drivers
        See :func:`driver_genes`; of all concepts or of some.
    words
        From :func:`~scsae_utils.words.gene_words` for the genes of ``adata``; None: no words.
    sets
        From :func:`~scsae_utils.genesets.gene_sets`; None: none.
    markers
        Cell type to marker genes; None: none. Types with too few of them on the panel are left out.

    Returns
    -------
    One row for each concept, indexed like ``concepts.var``: ``name``; ``named_by`` (what the name says beyond the cell
    type: ``"gene set"``, ``"words"``, ``"markers"`` or empty); ``cell_type`` (empty for cross-cell-type concepts);
    ``gene_set``, ``words``, ``markers`` that are significant (the best gene set and marker type, up to ``n_words``
    words), each with its ``_q``; ``genes`` (drivers, strongest first, those that hold back with a minus), ``basis``;
    ``auroc`` with ``auroc_low`` and ``auroc_high`` (95 % interval), ``auroc_random`` (5 % of random lists of like
    expression exceed it), ``n_active`` (active held-out cells that count: of more than :data:`SCORED` active or silent
    ones, so many are drawn).

    Raises
    ------
    ValueError
        If the cells or concepts do not belong together, or the drivers are of other genes or concepts.
    """
    config = config or NameConfig()
    if not concepts.obs_names.equals(adata.obs_names):
        raise ValueError("the concepts and the expression are of other cells, or of cells in another order")
    chosen = driver_genes(drivers, config)
    unknown = sorted({f"concept_{j}" for j in drivers["concept"].unique()} - set(concepts.var_names))
    if unknown:
        raise ValueError(f"there are drivers of concepts that are not there: {', '.join(unknown[:5])}")
    panel = adata.var_names
    sources = {}
    if sets is not None:
        sources["gene_set"] = {name: genes for name, genes in on_panel(sets, panel).items() if name[:4] != "TBA "}
    if markers is not None:
        with suppress(ValueError):  # the panel has none of them: it is of other cells than they are for
            sources["markers"] = on_panel(markers, panel)
    described = None
    if words is not None:
        described = words[words.map(len) > 0]
        sources["words"] = word_sets(described)
    U = concepts[:, [f"concept_{j}" for j in drivers["concept"].unique()]].X.tocsc()
    total = U.T @ adata.X
    total = total.toarray() if sparse.issparse(total) else np.asarray(total)
    expression = total / np.maximum(np.asarray(U.sum(axis=0)).reshape(-1, 1), 1e-12)  # mean, weighted by activation
    X, split = sparse.csr_matrix(adata.X), concepts.obs["split"].to_numpy()
    mean, variance = mean_variance_axis(X[split == "train"], axis=0)
    scale = mean, np.maximum(np.sqrt(variance), 1e-6)
    rows = {}
    for j, concept in enumerate(drivers["concept"].unique()):
        own = chosen[chosen["concept"] == concept]
        up = own.loc[own["attribution"] > 0, "gene"].tolist()
        row = {name: "" for name in ("gene_set", "words", "markers")}
        row |= {f"{name}_q": np.nan for name in row}
        for kind, source in sources.items():
            background = described.index if kind == "words" else panel
            found = _significant(up, source, background, pd.Series(expression[j], panel), config)
            if kind == "words":
                found = without_parts(found.rename(columns={"set": "word"})).rename(columns={"word": "set"})
            row[kind] = ", ".join(found["set"].head(config.n_words if kind == "words" else 1))
            row[f"{kind}_q"] = found["qvalue"].iloc[0] if len(found) else np.nan
        row["genes"] = ", ".join(np.where(own["attribution"] < 0, "-", "") + own["gene"])
        row["basis"] = own["basis"].iloc[0] if len(own) else ""
        activation = U[:, [j]].toarray().ravel()
        row |= _score(own, activation, X, scale, split == "validation", panel, expression[j], config)
        rows[f"concept_{concept}"] = _name(concepts.var.loc[f"concept_{concept}"], int(concept), row)
    return pd.DataFrame.from_dict(rows, orient="index")


def _significant(genes, sets, background, expression: pd.Series, config: NameConfig) -> pd.DataFrame:
    """Sets that are enriched among the genes against the background, and against random genes of like expression."""
    genes = [gene for gene in genes if gene in background]
    empty = pd.DataFrame({"set": [], "qvalue": [], "genes": []})
    if len(genes) < 2 or not sets:
        return empty
    random = random_lists(genes, background, config.n_random, expression[background], seed=config.seed)
    table = over_representation(genes, sets, background, random=random)
    found = (table["qvalue"] < config.max_q) & (table["p_random"] < config.max_q) & (table["count"] >= 2)
    return table[found]


def _name(about: pd.Series, concept: int, row: dict) -> dict:
    """The row with ``name``, ``named_by`` and ``cell_type`` in front."""
    cell_type = about["main_type"] if about["kind"] in KINDS[:2] else ""
    what = {"gene set": plain(row["gene_set"]), "words": row["words"]}
    if row["words"] and not row["gene_set_q"] <= row["words_q"]:  # the more significant one
        what.pop("gene set")
    what["markers"] = row["markers"] and f"markers of {row['markers']}"
    named_by = next((kind for kind, text in what.items() if text), "")
    name = ": ".join(filter(None, [cell_type, what.get(named_by)]))
    name = name or f"concept {concept} ({about['kind'] or 'never active'})"
    return {"name": name, "named_by": named_by, "cell_type": cell_type, **row}


def _score(own, activation, X, scale, held_out, panel, expression, config: NameConfig) -> dict:
    """AUROC of the drivers on held-out cells, its interval, and that of random lists.

    ``X`` is log expression; ``scale`` the mean and standard deviation of each gene in the training cells.
    """
    held_out, rng = held_out.copy(), np.random.default_rng(config.seed)
    if (activation > 0).any():
        held_out[choose_prototypes(activation, config.n_prototypes)] = False
    groups = (np.flatnonzero(held_out & (activation > 0)), np.flatnonzero(held_out & (activation <= 0)))
    active, silent = (rng.permutation(rows)[:SCORED] for rows in groups)
    nothing = dict.fromkeys(["auroc", "auroc_low", "auroc_high", "auroc_random"], np.nan) | {"n_active": len(active)}
    if len(own) == 0 or 0 in (len(active), len(silent)):
        return nothing
    random = random_lists(own["gene"], panel, config.n_random, expression, seed=config.seed)
    lists = np.vstack([own["gene"].to_numpy()[None], random])
    genes, places = np.unique(pd.Index(panel).get_indexer(lists.ravel()), return_inverse=True)
    signs = np.zeros((len(genes), len(lists)))  # of each gene in each list
    numbers = np.repeat(np.arange(len(lists)), lists.shape[1])
    np.add.at(signs, (places.ravel(), numbers), np.tile(np.sign(own["attribution"].to_numpy()), len(lists)))
    mean, deviation = (values[genes] for values in scale)
    values = (X[np.r_[active, silent]][:, genes].toarray() - mean) / deviation @ signs
    areas = auroc(values, np.arange(len(values)) < len(active))
    low, high = auroc_interval(areas[0], len(active), len(silent))
    return nothing | {
        "auroc": areas[0],
        "auroc_low": low,
        "auroc_high": high,
        "auroc_random": float(np.quantile(areas[1:], 0.95)),
    }


def auroc(values: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (m,) of each column of values (n, m) for active cells (n,) bool; ties count half."""
    n, m = active.sum(), (~active).sum()
    ranks = rankdata(values, axis=0)[active].sum(axis=0)
    return (ranks - n * (n + 1) / 2) / (n * m)


def auroc_interval(area: float, n_active: int, n_silent: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of an area under the ROC curve by the score method (Newcombe 2006, method 5).

    To it is to an area what Wilson's interval is to a share: it has a width at 0 and 1, and is right for few cells.
    """
    z = norm.isf((1 - level) / 2)
    half = (n_active + n_silent) / 2 - 1

    def excess(x: float) -> float:
        variance = x * (1 - x) * (1 + half * (1 - x) / (2 - x) + half * x / (1 + x)) / (n_active * n_silent)
        return (x - area) ** 2 - z**2 * variance

    low = 0.0 if area == 0 else brentq(excess, 0, min(area, 1 - 1e-9))  # at 0 and 1 the area itself is a root
    high = 1.0 if area == 1 else brentq(excess, max(area, 1e-9), 1)
    return float(low), float(high)
