"""Concepts as an AnnData of cells x concepts: activations, Table 2, taxonomy (paper Sec. 2.2, A.3, A.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from sklearn.preprocessing import normalize
from statsmodels.stats.proportion import proportion_confint

from . import metrics
from .cells import LEVELS, UNASSIGNED, near_misses

if TYPE_CHECKING:  # so that figures of cells do not depend on the SAE's code
    from .sae import Dictionary

KINDS = ("whole-cell-type", "sub-cell-type", "cross-cell-type")
READINGS = ("lineage", "program", "tissue or study", "technical", "unresolved")  # of cross-cell-type ones; evidence.py
SCORES = tuple(f"{name}{end}" for name in ("specificity", "sensitivity") for end in ("", "_low", "_high"))


def concept_data(adata: AnnData, sae: Dictionary, min_frequency: float = 1e-4, key: str = "X_scGPT") -> AnnData:
    """Activations of every concept in every cell.

    Parameters
    ----------
    adata
        Cells with embeddings in ``obsm[key]``.
    sae
        From :func:`scsae_utils.train_sae`.
    min_frequency
        Concepts that are active in a smaller share of the cells are dropped by post-processing (paper: 0.01 %).

    Returns
    -------
    AnnData, cells x c concepts, named ``concept_0`` and so on: ``X`` activations (CSR); ``var``: ``n_cells``,
    ``frequency``, ``max_activation``, ``mean_activation`` (over active cells), ``kept`` (survives post-processing);
    ``varm["vectors"]`` (c, d) rows of W_d; ``obs``, ``obsm`` as in ``adata``.
    """
    U = sae.activations(adata.obsm[key])
    n_cells = U.getnnz(axis=0)
    var = pd.DataFrame(
        {
            "n_cells": n_cells,
            "frequency": metrics.activation_frequency(U),
            "max_activation": U.max(axis=0).toarray().ravel(),
            "mean_activation": U.sum(axis=0).A1 / np.maximum(n_cells, 1),
            "kept": metrics.surviving(U, min_frequency),
        },
        index=[f"concept_{j}" for j in range(U.shape[1])],
    )
    out = AnnData(U, obs=adata.obs.copy(), var=var, obsm={k: np.asarray(v) for k, v in adata.obsm.items()})
    out.varm["vectors"] = sae.vectors
    out.uns["min_frequency"] = min_frequency
    return out


def kept(concepts: AnnData) -> AnnData:
    """The concepts that survive post-processing (a view)."""
    return concepts[:, concepts.var["kept"].to_numpy()]


def attributable(concepts: AnnData) -> AnnData:
    """The kept concepts that some cell does not activate (a view): the others have no counterfactuals."""
    return concepts[:, (concepts.var["kept"] & (concepts.var["n_cells"] < concepts.n_obs)).to_numpy()]


def number(name: str) -> int:
    """``"concept_17"`` to 17."""
    return int(str(name).removeprefix("concept_"))


def sae_metrics(
    concepts: AnnData, sae: Dictionary, key: str = "X_scGPT", k: int = 15, max_cells: int = 5000
) -> pd.DataFrame:
    """The paper's Table 2, and what it leaves out.

    Columns: training, validation (each with all concepts, on the cells of that split), and validation with the concepts
    that post-processing keeps. Formulas are those of :mod:`scsae_utils.metrics`. "Concepts per sample" is the count:
    the paper's formula says ``1 - ||U_j||_0 / c``. The activation frequency is the mean over active concepts. Of
    neighbours (``k``) and types, at most ``max_cells`` cells of the part are asked; "Cell type by neighbours" is the
    accuracy in the reconstruction, beside that in the embedding itself.
    """
    held_out = (concepts.obs["split"] == "validation").to_numpy()
    every = np.ones(concepts.n_vars, bool)
    parts = {
        "Training": (~held_out, every),
        "Validation": (held_out, every),
        "Validation, post-processed": (held_out, concepts.var["kept"].to_numpy()),
    }
    table = {}
    for name, (rows, columns) in parts.items():
        U = concepts.X[rows] @ sparse.diags(columns.astype(np.float32), format="csr")
        U.eliminate_zeros()
        a, b = concepts.obsm[key][rows], sae.decode_sparse(U)
        frequency = metrics.activation_frequency(U)
        some = np.random.default_rng(0).permutation(len(a))[:max_cells]
        types = concepts.obs[LEVELS["low"]][rows].astype(str).to_numpy()[some]
        near = min(k, len(some) - 1)
        table[name] = {
            "Variance explained": metrics.variance_explained(a, b),
            "Concepts": int(columns.sum()),
            "Active concepts": int((frequency > 0).sum()),
            "Dead concepts": int((frequency[columns] == 0).sum()),
            "Concepts per sample": metrics.l0(U),
            "Concept activation frequency": frequency[frequency > 0].mean() if U.nnz else 0.0,
            "Density": U.nnz / (U.shape[0] * max(columns.sum(), 1)),
            "Cosine": metrics.mean_cosine(a, b),
            "Reconstruction bias": metrics.reconstruction_bias(a, b),
            "Neighbours kept": metrics.neighbours_kept(a[some], b[some], near),
            "Cell type by neighbours": metrics.knn_accuracy(b[some], types, near),
            "The same, of the embedding": metrics.knn_accuracy(a[some], types, near),
            "Cells": len(a),
        }
    return pd.DataFrame(table)


def type_shares(concepts: AnnData, level: str = "low") -> pd.DataFrame:
    """Share of each cell type among the cells that activate a concept: concepts x types, rows sum to 1.

    ``level`` is ``"low"``, ``"mid"`` or ``"high"``. The row of a concept that never activates is zero.
    """
    counts, _ = active_counts(concepts, level)
    return counts.div(np.maximum(counts.sum(axis=1), 1), axis=0)


def active_counts(concepts: AnnData, level: str) -> tuple[pd.DataFrame, pd.Series]:
    """Active cells of each concept and type (concepts x types), and the number of cells of each type."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    types = concepts.obs[LEVELS[level]].astype("category").cat.remove_unused_categories()
    member = sparse.csr_matrix(pd.get_dummies(types).to_numpy(float))  # 8 of 10 must not exceed 0.8
    counts = ((concepts.X > 0).astype(float).T @ member).toarray()
    return pd.DataFrame(counts, index=concepts.var_names, columns=list(types.cat.categories)), types.value_counts()


def wilson(hits, n) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95 % interval (Wilson 1927) of shares ``hits / n``; 0 and 1 where n is 0."""
    hits, n = np.asarray(hits, float), np.asarray(n, float)
    low, high = proportion_confint(hits, np.where(n > 0, n, 1), method="wilson")
    return np.where(n > 0, np.maximum(low, 0), 0.0), np.where(n > 0, np.minimum(high, 1), 1.0)


def taxonomy(concepts: AnnData, threshold: float = 0.8) -> pd.DataFrame:
    """Main cell type and kind of every concept (paper A.4).

    The main type is the first label whose share among the active cells exceeds ``threshold``, looked for at the low,
    then the mid, then the high level; where there is none, the most frequent low-level label. Cells without a label
    count among the active ones but are nobody's main type: a concept of theirs alone has an empty one.

    Returns
    -------
    Table, one row for each concept: ``main_type``, ``level``, ``specificity`` = P(type | active), ``sensitivity`` =
    P(active | type), ``f1`` of the two, ``kind``: whole-cell-type (both above the threshold), sub-cell-type
    (specificity alone), cross-cell-type (the rest). Concepts that never activate have an empty ``kind``.
    ``specificity_low``, ``specificity_high``, ``sensitivity_low`` and ``sensitivity_high`` are 95 % intervals
    (:func:`wilson`; not in the paper). They take the type as given, and it was chosen on these cells:
    :func:`score_types` on others is the fair score.
    """
    rows = pd.DataFrame({"main_type": "", "level": ""}, index=concepts.var_names, dtype=object)
    rows[[*SCORES]] = np.nan
    active = concepts.X.getnnz(axis=0) > 0
    found = np.zeros(concepts.n_vars, bool)
    for level, force in [("low", False), ("mid", False), ("high", False), ("low", True)]:
        counts, sizes = active_counts(concepts, level)
        named = counts.drop(columns=UNASSIGNED, errors="ignore")
        if named.empty:  # no cell has a label
            continue
        best = named.idxmax(axis=1)
        hits = named.max(axis=1)
        share = hits / np.maximum(counts.sum(axis=1), 1)
        new = active & ~found & (hits > 0).to_numpy() & ((share > threshold).to_numpy() | force)
        rows.loc[new, "main_type"] = best[new]
        rows.loc[new, "level"] = level
        rows.loc[new, [*SCORES]] = shares_of_type(hits[new], counts.sum(axis=1)[new], best[new].map(sizes))
        found |= new
    rows.loc[active & ~found, [*SCORES]] = 0.0
    total = rows["specificity"] + rows["sensitivity"]
    rows["f1"] = 2 * rows["specificity"] * rows["sensitivity"] / total.replace(0, 1)
    specific, sensitive = rows["specificity"] > threshold, rows["sensitivity"] > threshold
    rows["kind"] = np.select([~active, specific & sensitive, specific], ["", *KINDS[:2]], KINDS[2])
    return rows


def shares_of_type(hits: pd.Series, n_active: pd.Series, n_type: pd.Series) -> pd.DataFrame:
    """Specificity and sensitivity with their intervals, from numbers of cells: of both, active, of the type."""
    table = {}
    for name, n in (("specificity", n_active), ("sensitivity", n_type.astype(float))):
        table[name] = hits / n.replace(0, np.nan)
        table[f"{name}_low"], table[f"{name}_high"] = wilson(hits, n)
    return pd.DataFrame(table, index=hits.index)[[*SCORES]]


def score_types(concepts: AnnData, main: pd.DataFrame) -> pd.DataFrame:
    """Specificity, sensitivity (with intervals, see :func:`wilson`) and F1 of given main types in these cells.

    To be used with types (``main_type``, ``level``) that were chosen on other cells:
    ``score_types(held_out, taxonomy(training))``.
    ``n_active`` is the number of active cells; with none, specificity is missing and F1 is 0. All are missing for a
    type that no cell has.
    """
    out = pd.DataFrame(np.nan, index=main.index, columns=[*SCORES, "f1"])
    out["n_active"] = concepts[:, main.index].X.getnnz(axis=0)
    for level, group in main[main["level"] != ""].groupby("level"):
        counts, sizes = active_counts(concepts[:, group.index], level)
        present = group["main_type"].isin(counts.columns)
        hits = pd.Series({j: counts.at[j, t] for j, t in group.loc[present, "main_type"].items()}, dtype=float)
        n_type = group.loc[present, "main_type"].map(sizes)
        out.loc[hits.index, [*SCORES]] = shares_of_type(hits, counts.sum(axis=1)[hits.index], n_type)
    total = out["specificity"] + out["sensitivity"]
    out["f1"] = (2 * out["specificity"] * out["sensitivity"] / total.replace(0, 1)).mask(out["sensitivity"] == 0, 0)
    return out


def add_taxonomy(concepts: AnnData, threshold: float = 0.8) -> AnnData:
    """Put :func:`taxonomy` over all cells into ``var``, and beside it the held-out check.

    ``study_share`` is the largest share of one study among a concept's active cells: near 1, the concept may say where
    a cell comes from. ``f1_train`` and ``f1_held_out`` (with ``specificity_held_out``, ``sensitivity_held_out``, their
    intervals, and ``main_type_train``) are of main types that were chosen on the training cells alone.
    """
    concepts.var = concepts.var.drop(columns=concepts.var.columns.intersection(taxonomy_columns)).join(
        taxonomy(concepts, threshold)
    )
    active = (concepts.X > 0).astype(np.float32)
    studies = pd.get_dummies(concepts.obs["study"]).to_numpy(np.float32)
    in_one = (active.T @ studies).max(axis=1)
    concepts.var["study_share"] = in_one / np.maximum(active.getnnz(axis=0), 1)
    train = (concepts.obs["split"] == "train").to_numpy()
    chosen = taxonomy(concepts[train], threshold)
    held_out = score_types(concepts[~train], chosen)
    concepts.var["main_type_train"], concepts.var["f1_train"] = chosen["main_type"], chosen["f1"]
    for name in (*SCORES, "f1"):
        concepts.var[f"{name}_held_out"] = held_out[name]
    return concepts


taxonomy_columns = [
    *("main_type", "level", *SCORES, "f1", "kind", "study_share", "main_type_train", "f1_train", "f1_held_out"),
    *(f"{name}_held_out" for name in SCORES),
]


def map_concepts(concepts: AnnData, seed: int = 0) -> np.ndarray:
    """UMAP (k, 2) of the vectors of the kept concepts, for the paper's Fig. 10; cosine distance."""
    vectors = AnnData(kept(concepts).varm["vectors"])
    neighbors = min(15, vectors.n_obs - 1)
    if vectors.n_obs < 4:
        raise ValueError(f"only {vectors.n_obs} concepts survive post-processing: too few for a map")
    how = {"metric": "cosine", "transformer": "sklearn"}  # exact neighbours, also of many concepts
    sc.pp.neighbors(vectors, n_neighbors=neighbors, use_rep="X", **how, random_state=seed)
    sc.tl.umap(vectors, random_state=seed)
    return vectors.obsm["X_umap"]


def check_concept(concepts: AnnData, concept: int) -> int:
    """The number of a concept, or an error that names the nearest ones that are there.

    Raises
    ------
    ValueError
        If there is no such concept, or it never activates, or post-processing dropped it.
    """
    there = np.array([number(j) for j in kept(concepts).var_names])
    if len(there) == 0:
        raise ValueError("no concept survives post-processing; train the SAE longer or lower min_frequency")
    near = ", ".join(map(str, sorted(there[np.argsort(abs(there - int(concept)), kind="stable")[:3]])))
    name = f"concept_{int(concept)}"
    if name not in concepts.var_names:
        raise ValueError(
            f"there is no concept {concept}: the dictionary has 0 to {concepts.n_vars - 1}; near it: {near}"
        )
    row = concepts.var.loc[name]
    if row["n_cells"] == 0:
        raise ValueError(f"concept {concept} never activates in these cells; near it, active ones: {near}")
    if not row["kept"]:
        raise ValueError(
            f"concept {concept} is active in only {row['n_cells']} cells and was dropped by post-processing; "
            f"near it: {near}"
        )
    return int(concept)


def best_concept_for_type(concepts: AnnData, cell_type: str) -> int:
    """The concept (:func:`attributable`) with the highest F1 of specificity and sensitivity for a type of any level.

    Raises
    ------
    ValueError
        If no cell has this type; names the near misses.
    """
    known: dict[str, str] = {}
    for level in reversed(LEVELS):  # the lowest level that knows the name wins
        known |= dict.fromkeys(map(str, concepts.obs[LEVELS[level]].unique()), level)
    known.pop(UNASSIGNED, None)
    if cell_type not in known:
        raise ValueError(
            f"no cell is a {cell_type!r}{near_misses(cell_type, known) or '; types: ' + ', '.join(sorted(known))}"
        )
    there = attributable(concepts)
    main = pd.DataFrame({"main_type": cell_type, "level": known[cell_type]}, index=there.var_names)
    scores = score_types(there, main)["f1"].fillna(0)
    if len(scores) == 0 or scores.max() == 0:
        raise ValueError(f"no concept is active in any {cell_type!r} cell (those that are active in all cells apart)")
    return number(scores.idxmax())


def concepts_to_attribute(concepts: AnnData, n: int | None, cell_type: str) -> tuple[list[int], int]:
    """Numbers of ``n`` of the concepts (None: all), evenly spread, and of the best for a cell type, always in.

    Only of those that some cell does not activate, see :func:`attributable`.
    """
    surviving = [number(name) for name in attributable(concepts).var_names]
    example = best_concept_for_type(concepts, cell_type)
    chosen = np.linspace(0, len(surviving) - 1, n or len(surviving)).round().astype(int)
    return sorted({surviving[i] for i in chosen} | {example}), example


def one_of_each(concepts: AnnData, n: int = 4) -> list[int]:
    """Numbers of ``n`` kept concepts that show the kinds in turn, the clearest first.

    Clear are, of cell-type concepts, those with the highest F1, and of cross-cell-type ones those with the smallest
    share of any high-level type (of concepts with 20 or more active cells, where there are some).
    """
    var = kept(concepts).var.sort_values("f1", ascending=False)
    ranked = {kind: list(var.index[var["kind"] == kind]) for kind in KINDS}
    cross = var.loc[ranked[KINDS[2]]]
    cross = cross[cross["n_cells"] >= 20] if (cross["n_cells"] >= 20).any() else cross
    ranked[KINDS[2]] = list(type_shares(concepts[:, cross.index], "high").max(axis=1).sort_values(kind="stable").index)
    chosen: list[int] = []
    while len(chosen) < n and any(ranked.values()):
        chosen += [number(names.pop(0)) for names in ranked.values() if names]
    return chosen[:n]


def choose_by_types(
    concepts: AnnData, types: list[str], level: str = "mid", min_share: float = 0.8, n: int = 6, max_cosine: float = 0.9
) -> list[int]:
    """Numbers of ``n`` concepts whose active cells are of given types, the most active ones of each type in turn.

    Only of those that some cell does not activate, see :func:`attributable`. Together the types must make up at least
    ``min_share`` of a concept's active cells; a concept counts for the type that has most of them. One whose
    activations have a cosine above ``max_cosine`` with those of a concept already chosen says the same again and is
    passed over. The concepts are returned in order of the share of the first type, highest first.

    Raises
    ------
    ValueError
        If a type is not among the labels of the level, or no concept is of these types.
    """
    shares = type_shares(attributable(concepts), level)
    for name in types:
        if name not in shares.columns:
            raise ValueError(f"no cell is a {name!r} at the {level} level{near_misses(name, shares.columns)}")
    fitting = shares.index[shares[types].sum(axis=1) >= min_share]
    if len(fitting) == 0:
        raise ValueError(f"no concept has {min_share:.0%} of its active cells among {', '.join(types)}")
    total = pd.Series(concepts[:, fitting].X.sum(axis=0).A1, index=fitting).sort_values(ascending=False, kind="stable")
    turn = total.groupby(shares.loc[total.index, types].idxmax(axis=1)).cumcount()  # 0 for each type's most active one
    order = turn.sort_values(kind="stable").index
    U = normalize(concepts[:, order].X, axis=0)
    cosine = (U.T @ U).toarray()
    chosen: list[int] = []
    for j in range(len(order)):
        if len(chosen) < n and (cosine[j, chosen] <= max_cosine).all():
            chosen.append(j)
    shown = shares.loc[order[chosen], types[0]].sort_values(ascending=False, kind="stable")
    return [number(name) for name in shown.index]


def overlap(sets: dict[int, set[str]]) -> np.ndarray:
    """Jaccard index (shared / all) of each pair of sets; 0 where both are empty. With fewer than two sets, one 0."""
    pairs = [(a, b) for i, a in enumerate(sets.values()) for b in list(sets.values())[i + 1 :]]
    return np.array([len(a & b) / max(len(a | b), 1) for a, b in pairs] or [0.0])
