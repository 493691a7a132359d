"""Differential expression between two groups of cells, by scanpy (paper Sec. 3.1, A.7).

It says which genes differ between prototypes and counterfactuals, not which ones the concept depends on; the book
compares it with the attribution.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from scipy.stats import norm

EPSILON = 1e-9  # scanpy's, in the fold change
LARGEST_LOG = 25  # no cell has e^25 molecules of a gene: larger values are not logarithms


def differential_expression(
    adata: AnnData,
    group,
    reference,
    min_log2fc: float = 2.0,
    max_padj: float = 1e-5,
    layer: str | None = None,
    tie_correct: bool = True,
    fold_change: str = "eq2",
    never_max_mean: float | None = None,
) -> pd.DataFrame:
    r"""Compare two groups of cells gene by gene: Wilcoxon rank sum test, Benjamini-Hochberg adjustment.

    .. math:: \mathrm{log2fc} = \log_2 \frac{\bar e_1 + \epsilon}{\bar e_2 + \epsilon} \qquad \text{(eq. 2)}

    where :math:`\bar e` is a group's mean of the *linear* expression ``expm1(X)`` and :math:`\epsilon` is 1e-9.
    Erratum: the paper gives eq. 2 and uses scanpy, whose fold change is another one: ``expm1`` of the mean of the log
    values, near a geometric mean, and less moved by a few cells with much expression. Both are in the table.

    Parameters
    ----------
    adata
        Cells; ``X`` (or the layer) holds log1p of normalised expression.
    group, reference
        The cells: integer positions, or a mask of (n_cells,) bool. At least 3 each, without overlap.
    min_log2fc, max_padj
        A gene is regulated if its log2 fold change is beyond ``min_log2fc`` in size and its adjusted p-value below
        ``max_padj``.
    layer
        Take the expression from this layer, not from ``X``.
    tie_correct
        Correct the variance of the rank sum for ties. scanpy's default, and so probably the paper's, is False; then
        the p-values of genes with many zeros are too large (among random halves of one cell type 2 % were below 0.05).
    fold_change
        Which one the threshold is for: ``"eq2"`` or ``"scanpy"``.
    never_max_mean
        Genes never expressed in one group have a fold change that only :math:`\epsilon` bounds. They are not called
        regulated if their linear mean in the other group is at most this. None: the median of that group's means over
        the genes it expresses. Genes above it are kept, because silence in one group and strong expression in the
        other is a difference. ``np.inf`` removes all of them, as the paper does.

    Returns
    -------
    One row a gene, highest score first, indexed by ``gene``: ``log2fc`` (eq. 2), ``log2fc_scanpy``, ``score`` (z of
    the rank sum), ``pvalue``, ``padj``, ``mean_group`` and ``mean_reference`` (linear), ``mean_log_group`` and
    ``mean_log_reference`` (of log1p values), ``share_group`` and ``share_reference`` (of cells that express it),
    ``never`` (never expressed in one of the groups, or in both), ``regulation``: ``"up"``, ``"down"``, ``"never"``
    (beyond both thresholds, removed by ``never_max_mean``) or empty. ``attrs["never_max_mean"]`` holds the limit used,
    one for each group.

    Raises
    ------
    ValueError
        If the groups overlap, are too small or point outside of ``adata``, if the expression is not log1p (counts,
        scaled or non-finite values), if no gene is expressed, or if gene names or parameters are not valid.

    Warns
    -----
    UserWarning
        If groups of these sizes cannot reach ``max_padj``, however different they are.
    """
    if fold_change not in ("eq2", "scanpy"):
        raise ValueError(f"fold_change must be 'eq2' or 'scanpy', not {fold_change!r}")
    if not (min_log2fc >= 0 and 0 < max_padj <= 1):
        raise ValueError(f"need min_log2fc >= 0 and 0 < max_padj <= 1, got {min_log2fc!r} and {max_padj!r}")
    if never_max_mean is not None and not never_max_mean >= 0:
        raise ValueError(f"never_max_mean is a mean expression, at least 0, not {never_max_mean!r}")
    if not adata.var_names.is_unique:
        raise ValueError("gene names occur more than once: call adata.var_names_make_unique() first")
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"no layer {layer!r}; there are: {', '.join(adata.layers) or 'none'}")
    first, second = _cells(group, adata.n_obs, "group"), _cells(reference, adata.n_obs, "reference")
    both = np.intersect1d(first, second)
    if len(both):
        raise ValueError(f"{len(both)} cells are in both groups (first: {adata.obs_names[both[0]]})")
    least = smallest_pvalue(len(first), len(second), tie_correct)
    if least > max_padj:
        warnings.warn(
            f"no gene can be regulated: with {len(first)} and {len(second)} cells the smallest possible p-value is "
            f"{least:.1g}, above max_padj = {max_padj:g}; take more cells",
            stacklevel=2,
        )
    values = adata.X if layer is None else adata.layers[layer]
    values = sparse.csr_matrix(values[np.r_[first, second]])
    values = values if values.dtype == np.float64 else values.astype(np.float32)
    _check_log1p(values, "X" if layer is None else f"layer {layer!r}")
    values.eliminate_zeros()

    names = np.repeat(["group", "reference"], [len(first), len(second)])
    base = adata.uns.get("log1p", {}).get("base")
    pair = AnnData(
        values,
        obs=pd.DataFrame({"cells": pd.Categorical(names)}, index=[str(i) for i in range(len(names))]),
        var=pd.DataFrame(index=adata.var_names.astype(str)),
        uns={"log1p": {"base": base}},
    )
    with np.errstate(invalid="ignore"):  # 0 / 0 for genes that no cell expresses; scanpy gives them score 0, p = 1
        sc.tl.rank_genes_groups(
            pair,
            "cells",
            groups=["group"],
            reference="reference",
            method="wilcoxon",
            corr_method="benjamini-hochberg",
            use_raw=False,
            tie_correct=tie_correct,
        )
    test = sc.get.rank_genes_groups_df(pair, group="group").set_index("names").loc[pair.var_names]

    table = pd.DataFrame(index=pair.var_names.rename("gene"))
    linear = values.astype(np.float64)
    linear.data = np.expm1(linear.data * (1 if base is None else np.log(base)))
    for name, rows in (("group", slice(None, len(first))), ("reference", slice(len(first), None))):
        table[f"mean_{name}"] = np.asarray(linear[rows].mean(axis=0)).ravel()
        table[f"mean_log_{name}"] = np.asarray(values[rows].astype(np.float64).mean(axis=0)).ravel()
        table[f"share_{name}"] = values[rows].getnnz(axis=0) / values[rows].shape[0]
    table["log2fc"] = np.log2((table["mean_group"] + EPSILON) / (table["mean_reference"] + EPSILON))
    table["log2fc_scanpy"] = test["logfoldchanges"].to_numpy(float)
    table["score"] = test["scores"].to_numpy(float)
    table["pvalue"], table["padj"] = test["pvals"].to_numpy(float), test["pvals_adj"].to_numpy(float)

    means = table[["mean_group", "mean_reference"]]
    limit = means.where(means > 0).median().fillna(0) if never_max_mean is None else means.max() * 0 + never_max_mean
    table["never"] = (means == 0).any(axis=1)
    low = table["never"] & (means <= limit).all(axis=1)
    change = table["log2fc" if fold_change == "eq2" else "log2fc_scanpy"]
    regulated = (table["padj"] < max_padj) & (change.abs() > min_log2fc)
    table["regulation"] = np.select([regulated & low, regulated & (change > 0), regulated], ["never", "up", "down"], "")
    table.attrs["never_max_mean"] = limit.to_dict()
    order = "log2fc log2fc_scanpy score pvalue padj mean_group mean_reference mean_log_group mean_log_reference"
    table = table[[*order.split(), "share_group", "share_reference", "never", "regulation"]]
    return table.sort_values("score", ascending=False, kind="stable")


def smallest_pvalue(n_group: int, n_reference: int, tie_correct: bool = True) -> float:
    """The smallest two-sided p-value that the test can give for two groups of these sizes, before adjustment.

    Without ties a perfect separation of n and m cells has z = sqrt(3 n m / (n + m + 1)). Corrected for ties, the
    largest z is that of a gene with one value in each group, sqrt(n + m - 1).
    """
    n, m = n_group, n_reference
    return float(2 * norm.sf(np.sqrt(n + m - 1 if tie_correct else 3 * n * m / (n + m + 1))))


def _cells(cells, n_cells: int, name: str) -> np.ndarray:
    """Positions of a group's cells, from positions or a mask."""
    cells = np.asarray(cells)
    if cells.ndim != 1:
        raise ValueError(f"{name} must be a list of cell positions or a mask, not an array of shape {cells.shape}")
    if cells.dtype == bool:
        if len(cells) != n_cells:
            raise ValueError(f"{name} is a mask of {len(cells)} cells, adata has {n_cells}")
        cells = np.flatnonzero(cells)
    elif len(cells) and not np.issubdtype(cells.dtype, np.integer):
        raise ValueError(f"{name} must hold cell positions (integers) or be a mask (bool), not {cells.dtype}")
    if len(cells) < 3:
        raise ValueError(f"{name} has {len(cells)} cells; the test needs at least 3")
    if cells.min() < 0 or cells.max() >= n_cells:
        raise ValueError(f"{name} has positions outside of 0 to {n_cells - 1}")
    if len(np.unique(cells)) < len(cells):
        raise ValueError(f"{name} holds a cell more than once")
    return cells


def _check_log1p(values: sparse.csr_matrix, where: str) -> None:
    if not np.isfinite(values.data).all():
        raise ValueError(f"{where} holds values that are not finite")
    if (values.data < 0).any():
        raise ValueError(f"{where} holds negative values (scaled data?); it must hold log1p of normalised expression")
    if not (values.data > 0).any():
        raise ValueError(f"{where}: no gene is expressed in these cells")
    if values.data.max() > LARGEST_LOG or (values.data == np.rint(values.data)).all():
        raise ValueError(f"{where} holds counts or linear values; apply sc.pp.normalize_total and sc.pp.log1p first")
