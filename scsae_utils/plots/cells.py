"""Figures of cells and their embedding (chapter 1)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.figure import Figure

from ..cells import LEVELS
from .style import distinct, legend_below, palette, point_size, scatter_groups, umap_axes


def umap_types(adata: AnnData, level: str = "mid", ax=None) -> Figure:
    """Scatter plot of the cells in the UMAP of their embeddings, coloured by cell type (Figs. 4 and 5)."""
    fig, ax = (ax.figure, ax) if ax is not None else plt.subplots(figsize=(6.5, 4.8))
    types = adata.obs[LEVELS[level]].astype(str).to_numpy()
    scatter_groups(ax, adata.obsm["X_umap"], types, palette(adata, level))
    umap_axes(ax)
    legend_below(ax, f"cell type, {level} level (cells)")
    return fig


def umap_values(ax, xy: np.ndarray, values: np.ndarray, title: str = "", label: str = "activation") -> None:
    """Cells in the UMAP, coloured from dark blue (0) to yellow; high values are drawn on top."""
    order = np.argsort(values, kind="stable")
    high = values[order] > 0  # a few of many would not be seen if they were as small as the others
    size = np.where(high, point_size(high.sum(), 7), point_size(len(xy), 7))
    points = ax.scatter(*xy[order].T, c=values[order], s=size, cmap="viridis", linewidths=0)
    umap_axes(ax, title)
    ax.figure.colorbar(points, ax=ax, label=label, shrink=0.8)


def umap_studies(adata: AnnData) -> Figure:
    """Scatter plot of the cells in the UMAP of their embeddings, coloured by study."""
    fig, ax = plt.subplots(figsize=(6.2, 4.5))
    studies = adata.obs["study"].astype(str).to_numpy()
    names = sorted(set(studies))
    scatter_groups(ax, adata.obsm["X_umap"], studies, dict(zip(names, distinct(len(names)))))
    umap_axes(ax)
    legend_below(ax, "study (cells)")
    return fig


def cell_tokens_bars(adata: AnnData, cell: str, n: int = 40) -> Figure:
    """Bars: what the model is fed of one cell, its most expressed genes with their bins."""
    bins = adata[cell].layers["bins"].toarray().ravel()
    n = min(n, int((bins > 0).sum()))
    top = np.argsort(-bins, kind="stable")[:n]
    fig, ax = plt.subplots(figsize=(8, 3))
    ax.bar(range(n), bins[top], color="#0072B2")
    ax.set_xticks(range(n), adata.var_names[top], rotation=90, fontsize=8)
    ax.set(
        ylabel="bin (0 to 50)",
        title=f"{cell}: {n} of {int((bins > 0).sum())} tokens, highest bins first",
        xlim=(-0.7, n - 0.3),
    )
    return fig


def noise_distances(noise: pd.DataFrame) -> Figure:
    """Share of the cells that each kind of noise moves at most so far, and the distance to the nearest other cell.

    ``noise`` is from :func:`scsae_utils.quality.embedding_noise`.
    """
    fig, ax = plt.subplots(figsize=(6, 3.6))
    for (name, distances), color in zip(noise.items(), ["#D55E00", "#0072B2", "#56B4E9", "black"]):
        ax.ecdf(distances[distances > 0], label=name, color=color, ls="--" if name == noise.columns[-1] else "-")
    ax.set(xscale="log", xlabel="Euclidean distance in the embedding", ylabel="share of cells", ylim=(0, 1.02))
    legend_below(ax, "what lies between", columns=2)
    return fig
