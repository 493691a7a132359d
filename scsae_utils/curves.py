"""Curves of deletion and insertion, and other ways of occlusion (paper Sec. 3.1, A.7)."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.integrate import trapezoid
from scipy.stats import binomtest

from .attribution import AttributionConfig, attribute, check_embedded
from .cells import near_misses
from .embedding import cell_tokens, embed_tokens, token_ids
from .encoder import CellEncoder
from .redundancy import Change, activations_after, gene_columns, set_losses
from .sae import Dictionary


def deletion_curves(
    adata: AnnData,
    model: CellEncoder,
    sae: Dictionary,
    concept: int,
    cells,
    orders: dict[str, list[str]],
    n_steps: int = 20,
    progress: bool = True,
) -> pd.DataFrame:
    """Activation of a concept while genes are removed from the input, one after the other (paper Fig. 2f).

    Parameters
    ----------
    cells
        Rows of ``adata``, usually the prototypes.
    orders
        Name of a curve to the genes in the order of their removal.
    n_steps
        Points of a curve, besides the start.

    Returns
    -------
    Table: ``order``, ``n_removed``, ``cell``, ``activation`` relative to the whole cell (1 at the start). A cell
    keeps at least ``<cls>``.

    Raises
    ------
    ValueError
        If a gene is not there (names the near misses), or the concept is silent in one of the cells.
    """
    sets = {
        (order, n): list(genes[:n])
        for order, genes in orders.items()
        for n in np.unique(np.linspace(0, len(genes), min(n_steps, len(genes)) + 1).round().astype(int))
    }
    losses = set_losses(adata, model, sae, {concept: cells}, {concept: sets}, progress=progress)
    table = pd.DataFrame(losses["set"].tolist(), columns=["order", "n_removed"])
    return table.assign(cell=losses["cell"], activation=losses["occluded"] / losses["activation"])


def loss_without(adata: AnnData, model: CellEncoder, sae: Dictionary, concept: int, cells, genes: list[str]) -> float:
    """Mean share of a concept's activation that the ``cells`` (rows) lose when ``genes`` are removed together."""
    sets = {concept: {"together": genes}}
    return float(set_losses(adata, model, sae, {concept: cells}, sets, progress=False)["loss"].mean())


def order_curves(
    adata: AnnData,
    model: CellEncoder,
    sae: Dictionary,
    cells: dict[int, np.ndarray],
    orders: dict[int, dict[str, list[str]]],
    n_random: int = 3,
    factor: float = 2.0,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Deletion and insertion curves of many concepts over all genes of their cells (Fig. 2f made a statistic; ours).

    Deletion takes a cell's genes away in the given order; insertion starts from a cell without genes and gives them
    back in the same order. Only genes that the cell expresses count, so that every order takes away as much.

    Parameters
    ----------
    cells
        Concept to rows of ``adata``: a few prototypes, best others than those that the orders were made from.
    orders
        Concept to the genes by name of the order; genes of a cell that an order lacks come last, at random.
    n_random
        Random orders, named ``random 0`` and so on.
    factor
        The numbers of genes are 0, 1 and then each ``factor`` times the last, up to all of the cell's.

    Returns
    -------
    Table: ``concept``, ``order``, ``cell``, ``n`` (genes taken away or given back), ``deletion`` and ``insertion``:
    activation relative to the whole cell.

    Raises
    ------
    ValueError
        If a gene is not there, a concept is silent in one of its cells, or ``factor`` is not above 1.
    """
    if not factor > 1:
        raise ValueError(f"factor must be above 1, not {factor}")
    rng = np.random.default_rng(seed)
    known = token_ids(adata.var_names, model) >= 0
    bins = adata.layers["bins"].tocsr()
    changes, labels = [], []
    for concept, rows in cells.items():
        ranks = {name: np.full(adata.n_vars, np.inf) for name in orders[concept]}
        for name, genes in orders[concept].items():
            ranks[name][gene_columns(adata, genes)] = np.arange(len(genes))
        for row in rows:
            own = bins[row].indices
            own = rng.permutation(own[known[own]])
            sequences = {name: own[np.argsort(rank[own], kind="stable")] for name, rank in ranks.items()}
            sequences |= {f"random {i}": rng.permutation(own) for i in range(n_random)}
            steps = np.log(max(len(own), 2)) / np.log(factor)
            grid = np.unique(np.r_[0, factor ** np.arange(steps), len(own)].astype(int))
            for name, genes in sequences.items():
                for n in grid:
                    changes += [Change(concept, row, genes[:n]), Change(concept, row, genes[n:])]
                    labels.append((concept, name, adata.obs_names[row], n))
    after = activations_after(adata, model, sae, changes, progress=progress).reshape(-1, 2)
    table = pd.DataFrame(labels, columns=["concept", "order", "cell", "n"])
    table["deletion"], table["insertion"] = after.T
    start = table["deletion"].where(table["n"] == 0).ffill()  # the whole cell is the first point of a curve
    if (start == 0).any():
        at = table.loc[(start == 0).idxmax()]
        raise ValueError(f"concept {at['concept']} is silent in {at['cell']}: choose cells that activate it")
    table[["deletion", "insertion"]] = table[["deletion", "insertion"]].div(start, axis=0)
    return table


def curve_areas(curves: pd.DataFrame, share: float = 0.8) -> pd.DataFrame:
    """What the curves of :func:`order_curves` come to, mean over cells.

    Returns
    -------
    Indexed by concept and order: ``deletion`` and ``insertion``, the areas under the curves over log(1 + n), scaled
    so that a curve that stays at 1 has area 1 (low is good for deletion, high for insertion); ``smallest``, the least
    number of genes on the grid whose deletion takes ``share`` of the activation or more, mean over the cells in which
    some number does (NaN if in none).
    """
    rows = []
    for (concept, order, _), part in curves.groupby(["concept", "order", "cell"], sort=False):
        x = np.log1p(part["n"].to_numpy())
        deletion, insertion = (trapezoid(part[c], x) / x[-1] for c in ("deletion", "insertion"))
        gone = part.loc[part["deletion"] <= 1 - share, "n"]
        rows.append((concept, order, deletion, insertion, gone.min()))
    table = pd.DataFrame(rows, columns=["concept", "order", "deletion", "insertion", "smallest"])
    return table.groupby(["concept", "order"], sort=False).mean()


def better_orders(areas: pd.DataFrame, order: str = "attribution") -> pd.DataFrame:
    """In how many concepts is one order better than the others? From :func:`curve_areas`.

    Returns
    -------
    Indexed by curve (``deletion``, ``insertion``) and the other order (``random``: the mean of all random ones):
    ``n`` concepts, ``share`` of them in which ``order`` is better, ``low`` and ``high`` of its 95 % interval (Wilson),
    ``difference`` (median of the areas', above zero if ``order`` is better).
    """
    names = areas.index.get_level_values("order").str.replace(r"^random \d+$", "random", regex=True)
    means = areas.groupby([areas.index.get_level_values("concept"), names]).mean()
    rows = {}
    for curve, sign in (("deletion", -1), ("insertion", 1)):
        table = means[curve].unstack()
        for other in table.columns.drop(order):
            difference = (sign * (table[order] - table[other])).dropna()
            test = binomtest(int((difference > 0).sum()), len(difference))
            interval = test.proportion_ci(method="wilson")
            row = {"n": len(difference), "share": test.statistic, "low": interval.low, "high": interval.high}
            rows[curve, other] = row | {"difference": difference.median()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["curve", "than"])


def concepts_of_gene(
    adata: AnnData, model: CellEncoder, sae: Dictionary, gene: str, progress: bool = True
) -> pd.Series:
    """How much of each concept's activation rests on one gene: its token is removed from every cell that has it.

    Returns
    -------
    (c,) share of the concept's summed activation that is lost, over all cells; 0 for silent concepts.

    Raises
    ------
    ValueError
        If the gene is not in the panel, not known to the model or in no cell; names the near misses.
    """
    check_embedded(adata, model)
    ids = token_ids(adata.var_names, model)
    known = adata.var_names[ids >= 0]
    if gene not in known:
        raise ValueError(
            f"gene {gene!r} is not among the {len(known)} genes of these cells that the model knows"
            f"{near_misses(gene, known)}"
        )
    bins = adata.layers["bins"].tocsr()
    column = adata.var_names.get_loc(gene)
    cells = np.flatnonzero(bins[:, column].toarray().ravel())
    if len(cells) == 0:
        raise ValueError(f"no cell expresses {gene!r}")
    without = bins[cells]
    without.data[without.indices == column] = 0
    without.eliminate_zeros()
    after = embed_tokens(cell_tokens(without, ids, model), model, progress=progress)
    before = sae.activations(adata.obsm["X_scGPT"])
    lost = before[cells].sum(0).A1 - sae.activations(after).sum(0).A1
    total = before.sum(0).A1
    names = [f"concept_{j}" for j in range(len(total))]
    return pd.Series(np.divide(lost, total, out=np.zeros_like(lost), where=total > 0), index=names, name=gene)


def compare_occlusions(
    adata: AnnData, model: CellEncoder, sae: Dictionary, concept: int, config: AttributionConfig, n_prototypes: int = 5
) -> pd.DataFrame:
    """Do other ways of occlusion give the same genes? Each option of ``config`` is changed, one at a time.

    Counterfactuals of the prototype's own study are tried where ``obs["study"]`` has more than one.

    Returns
    -------
    One row for each way: ``correlation`` with the attributions of ``config`` over the genes of ``n_prototypes``
    prototypes, ``top 10 shared`` (share of the ten genes with the largest mean |attribution|), ``largest``
    |attribution|.
    """
    config = replace(config, n_prototypes=n_prototypes, insertion=False, counterfactual_match=None)
    options = {"absent": ("remove", "value"), "binning": ("frozen", "rebinned")}
    options["counterfactual_mean"] = ("pooled", "matched")
    if config.binning == "frozen":
        options["insertion"] = (True,)
    if "study" in adata.obs and adata.obs["study"].nunique() > 1:
        options["counterfactual_match"] = ("study",)
    ways = {"as chosen": config}
    for name, values in options.items():
        for value in set(values) - {getattr(config, name)}:
            ways[f"{name}: {value}"] = replace(config, **{name: value})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* prototypes have no silent cell with their study")
        results = {
            name: attribute(adata, model, sae, concept, way, progress=False).set_index(["cell", "gene"])["attribution"]
            for name, way in ways.items()
        }
    reference = results["as chosen"]

    def top(result: pd.Series) -> set[str]:
        return set(result.abs().groupby("gene").sum().nlargest(10).index)

    return pd.DataFrame(
        {
            name: {
                "correlation": reference.corr(result.reindex(reference.index)),
                "top 10 shared": len(top(reference) & top(result)) / len(top(reference)),
                "largest": result.abs().max(),
            }
            for name, result in results.items()
        }
    ).T
