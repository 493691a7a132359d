r"""How sure is an attribution: errors from replicates, p-values from genes alike, drivers against passengers. Ours.

The mean attribution :math:`m_i` of gene i over the P prototypes has an **error** with two parts: the spread over
prototypes (the bootstrap's standard error, in closed form), and what comes from choices that could have been
otherwise: how ties in the bins are broken, which genes scGPT reads, which counterfactuals there are (replicates).

The **p-value** asks whether :math:`m_i` is larger in size than what comes from genes like it: genes that as many of
the prototypes express (:math:`n_i`) and that occlusion changes by as many bins (:math:`b_i`). Its null is empirical
(Efron 2004): the typical size :math:`s_i` of an attribution is fitted to all genes of the concept, by median
regression of :math:`\log |m|` on :math:`\log n` and :math:`\log b`, which few drivers hardly move. With the centre c
and the scaled median absolute deviation :math:`\sigma` of :math:`m / s`,

.. math:: t_i = \frac{m_i - c s_i}{\max(\sigma s_i, \mathrm{error}_i)}

is compared with Student's t with P - 1 degrees of freedom. A null gene is one gene, the same in all prototypes.
Prototypes are cells alike, and a gene does the same in all of them: a null that drew another gene in each prototype
would average its effects away and call almost every gene significant.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.stats import false_discovery_control, t
from sklearn.linear_model import QuantileRegressor
from tqdm.auto import tqdm

from .attribution import AttributionConfig, gene_summary, make_plan
from .embedding import bin_cells
from .encoder import CellEncoder
from .expression import differential_expression
from .redundancy import Change, activations_after, gene_columns, set_losses
from .sae import Dictionary
from .shards import named_folder

ROUNDING = 1e-6  # of the activation: smaller differences are those of float32


def cells_of_concepts(
    adata: AnnData, model: CellEncoder, sae: Dictionary, concepts, config: AttributionConfig
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Rows of the prototypes, and of the distinct counterfactuals, of each concept."""
    plan = make_plan(adata, model, sae, concepts, config, "X_scGPT", {})
    numbers = plan.concepts.tolist()
    others = [np.unique(np.concatenate(rows)) for rows in plan.counterfactuals]
    return dict(zip(numbers, plan.prototypes)), dict(zip(numbers, others))


def work_folder(
    base: Path, adata: AnnData, model: CellEncoder, sae: Dictionary, concepts, config: AttributionConfig, *settings
) -> Path:
    """A folder below ``base`` for the attributions with just these inputs and ``settings`` (dataclasses or text).

    Other settings have another folder, so that work of a changed run is neither mixed nor in the way.
    """
    plan = make_plan(adata, model, sae, concepts, config, "X_scGPT", {})
    return named_folder(base, [plan.settings(), *map(repr, settings)])


def mean_bins(adata: AnnData, rows: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """(n_genes,) mean bins of the cells of each concept."""
    bins = adata.layers["bins"].tocsr()
    return {concept: bins[r].mean(axis=0).A1 for concept, r in rows.items()}


def replicate_bins(adata: AnnData, model: CellEncoder, seed: int, genes_kept: float = 0.9) -> sparse.csr_matrix:
    """Bins as they could also have been: ties broken at random, and a random ``genes_kept`` of each cell's genes.

    Both are what scGPT's own embedding does, the second to cells with more genes than it reads.
    """
    bins = bin_cells(adata, model, ties="random", seed=seed)
    bins.data[np.random.default_rng(seed).random(len(bins.data)) >= genes_kept] = 0
    bins.eliminate_zeros()
    return bins


def replicate_attributions(
    adata: AnnData,
    model: CellEncoder,
    sae: Dictionary,
    genes: dict[int, list[str]],
    prototypes: dict[int, np.ndarray],
    counterfactuals: dict[int, np.ndarray],
    n_replicates: int = 4,
    genes_kept: float = 0.9,
    counterfactuals_kept: float = 0.5,
    absent_below: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Attributions of some genes again, in replicates of their cells (:func:`replicate_bins`, frozen bins).

    Parameters
    ----------
    genes, prototypes, counterfactuals
        By concept: symbols, rows, rows.
    counterfactuals_kept
        Share of the counterfactuals in a replicate. Means of a random half are as far from those of all as the means
        of all are from those of another sample.

    Returns
    -------
    Table: ``concept``, ``gene``, ``replicate``, ``attribution`` (mean over the prototypes that kept the gene; 0 in
    those that never expressed it, as in :func:`~scsae_utils.attribution.gene_summary`).
    """
    before = adata.layers["bins"].tocsr()
    sets = {concept: {gene: [gene] for gene in symbols} for concept, symbols in genes.items()}
    parts = []
    for replicate in tqdm(range(n_replicates), desc="replicates", disable=not progress):
        rng = np.random.default_rng([seed, replicate])
        bins = replicate_bins(adata, model, int(rng.integers(2**32)), genes_kept)
        means = {}
        for concept, rows in counterfactuals.items():
            half = rng.choice(rows, max(1, round(len(rows) * counterfactuals_kept)), replace=False)
            means[concept] = before[half].mean(axis=0).A1
        part = set_losses(adata, model, sae, prototypes, sets, means, absent_below, bins, progress=False)
        at = adata.obs_names.get_indexer(part["cell"]), gene_columns(adata, part["set"])
        dropped = (before[at].A1 > 0) & (bins[at].A1 == 0)
        parts.append(part[~dropped].assign(replicate=replicate))
    table = pd.concat(parts).rename(columns={"set": "gene"})
    return (
        table.groupby(["concept", "gene", "replicate"], sort=False)["loss"].mean().rename("attribution").reset_index()
    )


def redrawn_attributions(
    adata: AnnData,
    model: CellEncoder,
    sae: Dictionary,
    genes: dict[int, list[str]],
    prototypes: dict[int, np.ndarray],
    n_draws: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Occlusion that changes nothing: each gene's bin is drawn again among those that its ties allow.

    What this gives is the noise of binning: an attribution of its size says nothing about counterfactuals.

    Returns
    -------
    Table: ``concept``, ``gene``, ``draw``, ``attribution`` (mean over prototypes).
    """
    U = sae.activations(adata.obsm["X_scGPT"]).tocsr()
    changes, labels = [], []
    for draw in range(n_draws):
        number = int(np.random.default_rng([seed, draw]).integers(2**32))
        for concept, symbols in genes.items():
            columns = gene_columns(adata, symbols)
            for row in prototypes[concept]:
                new = bin_cells(adata, model, "random", number, slice(row, row + 1)).toarray().ravel()
                changes += [Change(concept, row, np.array([c]), new[c]) for c in columns]
                labels += [(concept, gene, draw, U[row, concept]) for gene in symbols]
    table = pd.DataFrame(labels, columns=["concept", "gene", "draw", "activation"])
    after = activations_after(adata, model, sae, changes, progress=progress)
    table["attribution"] = (table["activation"] - after) / table.pop("activation")
    return table.groupby(["concept", "gene", "draw"], sort=False)["attribution"].mean().reset_index()


def gene_statistics(
    attributions: pd.DataFrame,
    replicates: pd.DataFrame | None = None,
    threshold: float = 0.05,
    min_prototypes: int = 5,
) -> pd.DataFrame:
    """Mean attribution of each gene to each concept, its error, and whether it stands out from genes like it.

    Parameters
    ----------
    attributions
        From :func:`~scsae_utils.attribution.attribute` or :func:`~scsae_utils.screening.attribute_all`.
    replicates
        From :func:`replicate_attributions`, of some or all of the genes.
    threshold, min_prototypes
        The paper's rule: |attribution| above ``threshold`` in ``min_prototypes`` or more. A gene that fewer
        prototypes express cannot pass it, and is not tested either.

    Returns
    -------
    Indexed by concept and gene, most positive first: ``attribution`` (mean over all prototypes), ``error``, ``sign``
    (1, -1 or 0), ``n_prototypes`` that express the gene, ``change`` (mean, in bins), ``p_value`` and ``q_value``
    (Benjamini-Hochberg within the concept; NaN for genes that are not tested), ``n_above``, ``selected`` (the paper's
    rule), ``method`` (``exact``, or ``screened`` if some of its occlusions are estimates), ``replicated`` (its error
    has both parts).
    """
    table = gene_summary(attributions, threshold, min_prototypes)
    change = attributions["bin"] - attributions["counterfactual"].where(attributions["change"] == "value", 0)
    change = change.abs().groupby([attributions["concept"], attributions["gene"]])
    table["change"] = change.mean()
    cells = attributions.groupby("concept")["cell"].nunique()
    total = cells.reindex(table.index.get_level_values("concept")).to_numpy()
    table = table.rename(columns={"mean": "attribution"})
    table["sign"] = np.sign(table["attribution"]).astype(int)
    table["error"] = table.pop("std") / np.sqrt(np.maximum(total - 1, 1))
    exact = (attributions["method"] == "exact").groupby([attributions["concept"], attributions["gene"]]).all()
    table["method"] = np.where(exact.reindex(table.index), "exact", "screened")
    table["replicated"] = False
    if replicates is not None:
        exact = table["attribution"].rename("exact")
        both = replicates.join(exact, on=["concept", "gene"]).dropna()
        apart = (both["attribution"] - both["exact"]) ** 2
        technical = np.sqrt(apart.groupby([both["concept"], both["gene"]]).mean()).reindex(table.index)
        table["replicated"] = technical.notna()
        table["error"] = np.hypot(table["error"], technical.fillna(0))
    table["p_value"] = np.nan
    tested = table["n_prototypes"] >= min_prototypes
    for concept, part in table[tested].groupby("concept"):
        table.loc[part.index, "p_value"] = stands_out(part, cells[concept])
    p = table["p_value"].dropna()
    table["q_value"] = p.groupby("concept").transform(false_discovery_control)
    columns = "attribution error sign n_prototypes change p_value q_value n_above selected method replicated"
    return table[columns.split()]


def stands_out(part: pd.DataFrame, n_prototypes: int) -> np.ndarray:
    """Two-sided p-values (n_genes,) of one concept's genes, as above; NaN if fewer than 20 are there."""
    if len(part) < 20:
        return np.full(len(part), np.nan)
    m = part["attribution"].to_numpy(float)
    like = np.log(part[["n_prototypes", "change"]].to_numpy(float).clip(ROUNDING))
    size = np.log(np.abs(m) + ROUNDING)
    typical = np.exp(QuantileRegressor(quantile=0.5, alpha=0).fit(like, size).predict(like))
    centre = np.median(m / typical)
    spread = 1.4826 * np.median(np.abs(m / typical - centre))
    scale = np.maximum(np.maximum(spread * typical, part["error"]), ROUNDING)
    return 2 * t.sf(np.abs(m - centre * typical) / scale, max(n_prototypes - 1, 1))


def expression_of_concepts(
    adata: AnnData,
    prototypes: dict[int, np.ndarray],
    counterfactuals: dict[int, np.ndarray],
    min_log2fc: float = 2.0,
    max_padj: float = 1e-5,
    progress: bool = True,
) -> pd.DataFrame:
    """:func:`~scsae_utils.expression.differential_expression` of each concept, indexed by concept and gene.

    Concepts with fewer than three cells in a group are left out.
    """
    found = {}
    for concept, rows in tqdm(prototypes.items(), desc="differential expression", unit="concept", disable=not progress):
        others = np.setdiff1d(counterfactuals[concept], rows)
        if min(len(rows), len(others)) >= 3:
            found[concept] = differential_expression(adata, rows, others, min_log2fc, max_padj)
    return pd.concat(found, names=["concept", "gene"])


def has_effect(statistics: pd.DataFrame, min_attribution: float = 0.01) -> pd.Series:
    """Genes whose mean attribution is at least ``min_attribution`` in size, and beyond twice its error."""
    size = statistics["attribution"].abs()
    return (size >= min_attribution) & (size > 2 * statistics["error"])


QUADRANTS = ("driver that differs", "driver that does not differ", "passenger", "neither")


def quadrants(
    statistics: pd.DataFrame, expression: pd.DataFrame, min_attribution: float = 0.01, min_prototypes: int = 5
) -> pd.DataFrame:
    """Each gene of each concept: does it differ, and does it have an effect?

    Parameters
    ----------
    statistics, expression
        From :func:`gene_statistics` and :func:`expression_of_concepts`.
    min_attribution
        See :func:`has_effect`.
    min_prototypes
        Genes that fewer prototypes express are left out: there is too little to occlude.

    Returns
    -------
    ``statistics`` of the genes in both tables, with ``log2fc``, ``padj``, ``differs`` (regulated), ``effect`` and
    ``quadrant``, one of :data:`QUADRANTS`.
    """
    table = statistics[statistics["n_prototypes"] >= min_prototypes]
    table = table.join(expression[["log2fc", "padj", "regulation", "never"]], how="inner")
    table["differs"] = table.pop("regulation").isin(["up", "down"])
    table["effect"] = has_effect(table, min_attribution)
    cases = [table["effect"] & table["differs"], table["effect"], table["differs"]]
    table["quadrant"] = np.select(cases, QUADRANTS[:3], QUADRANTS[3])
    return table


def share_with_interval(
    table: pd.DataFrame, of: str, among: str, n_draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Share of rows with ``of`` among those with ``among`` (bool columns), and its 95 % interval.

    By bootstrap over concepts, since the genes of one concept are not independent of each other.
    """
    counts = table[table[among]].groupby("concept")[of].agg(["sum", "size"]).to_numpy(float)
    if len(counts) == 0:
        return np.nan, np.nan, np.nan
    draws = counts[np.random.default_rng(seed).integers(len(counts), size=(n_draws, len(counts)))].sum(axis=1)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
    return counts[:, 0].sum() / counts[:, 1].sum(), float(low), float(high)


def driver_table(statistics: pd.DataFrame, tags: pd.Series) -> pd.DataFrame:
    """The result, one row for each concept and gene: what ``drivers.parquet`` holds.

    Columns: ``concept``, ``gene``, ``attribution``, ``error``, ``p_value``, ``q_value``, ``sign``, ``tag`` (empty
    where none of the tags holds, missing where interactions were not tried), ``method`` (``exact`` or ``screened``),
    ``n_prototypes``, ``selected`` (the paper's rule).
    """
    table = statistics.join(tags).reset_index()
    columns = "concept gene attribution error p_value q_value sign tag method n_prototypes selected"
    return table[columns.split()]
