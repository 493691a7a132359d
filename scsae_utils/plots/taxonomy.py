"""Figures of the kinds of concepts and of their cells (chapters 3 to 5)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from anndata import AnnData
from matplotlib.figure import Figure

from ..cells import LEVELS, UNASSIGNED
from ..concepts import KINDS, kept, type_shares
from .cells import umap_values
from .style import GREY, KIND_COLORS, legend_below, palette, point_size, umap_axes

BARS = 12  # types of a concept's cells that are named in a figure, at most


def specificity_sensitivity(concepts: AnnData, threshold: float = 0.8) -> Figure:
    """Scatter plot of the concepts: specificity against sensitivity for the main cell type of each (Fig. 9)."""
    fig, ax = plt.subplots(figsize=(6, 4.5))
    for kind in KINDS:
        part = kept(concepts).var.query("kind == @kind")
        ax.scatter(
            part["sensitivity"],
            part["specificity"],
            s=18,
            color=KIND_COLORS[kind],
            label=f"{kind} ({len(part)})",
            alpha=0.8,
            linewidths=0,
        )
    ax.axhline(threshold, color="black", lw=0.6, ls=":")
    ax.axvline(threshold, color="black", lw=0.6, ls=":")
    ax.set(
        xlabel="sensitivity, P(active | type)",
        ylabel="specificity, P(type | active)",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    legend_below(ax, "kind (concepts)")
    return fig


def concept_map(concepts: AnnData, xy: np.ndarray) -> Figure:
    """Scatter plot of the concepts in the UMAP of their vectors, coloured by high-level cell type (Fig. 10).

    ``xy`` is (k, 2). Size: frequency; opacity: share of the main type. The colour is that of the high-level type that
    the main type belongs to: lower ones cannot be told apart.
    """
    var = kept(concepts).var
    parents = {t: p for c in LEVELS.values() for t, p in concepts.obs[[c, "cell_type_high"]].astype(str).to_numpy()}
    parent, colors = var["main_type"].map(lambda t: parents.get(t, UNASSIGNED)), palette(concepts, "high")
    fig, ax = plt.subplots(figsize=(6.5, 4.8))
    opacity = var["specificity"].clip(0.15, 1).to_numpy()
    ax.scatter(*xy.T, s=15 + 700 * var["frequency"], c=list(parent.map(colors)), alpha=opacity, linewidths=0)
    umap_axes(ax)
    for name, n in parent.value_counts().items():
        ax.scatter([], [], s=40, color=colors[name], label=f"{name} ({n})")
    for share in (0.01, 0.1, 0.3):
        ax.scatter([], [], s=15 + 700 * share, facecolor="none", edgecolor="black", label=f"active in {share:.0%}")
    legend_below(ax, "high-level type of the main type (concepts)")
    return fig


def type_heatmap(concepts: AnnData, level: str = "low") -> Figure:
    """Heat map: share of each cell type among the cells that activate a concept (Figs. 11 and 12)."""
    shares = type_shares(kept(concepts), level)
    types = [t for t in palette(concepts, level) if t in shares.columns]
    shares = shares[types]
    order = pd.DataFrame({"type": shares.to_numpy().argmax(1), "share": -shares.max(axis=1)}, index=shares.index)
    shares = shares.loc[order.sort_values(["type", "share"]).index]
    fig, ax = plt.subplots(figsize=(9, 0.24 * len(types) + 1.6))
    sns.heatmap(
        shares.T, cmap="mako_r", vmin=0, vmax=1, xticklabels=False, ax=ax, cbar_kws={"label": "share of active cells"}
    )
    ax.set(xlabel=f"{len(shares)} concepts, by their most frequent type", ylabel="")
    return fig


def concept_examples(concepts: AnnData, chosen: list[int], level: str = "low") -> Figure:
    """Some concepts: activation in the cell UMAP (left), types of the active cells (right) (Fig. 13)."""
    fig, axes = plt.subplots(len(chosen), 2, figsize=(10, 3.1 * len(chosen)), layout="constrained", squeeze=False)
    colors = palette(concepts, level)
    for (left, right), j in zip(axes, chosen):
        name = f"concept_{j}"
        row = concepts.var.loc[name]
        umap_values(
            left,
            concepts.obsm["X_umap"],
            concepts[:, name].X.toarray().ravel(),
            f"concept {j}: {row['kind']}, {row['main_type']}",
        )
        shares = type_shares(concepts[:, name], level).iloc[0]
        most = shares[shares > 0.01].nlargest(BARS)[::-1]
        others = {"all others": shares.sum() - most.sum()} if len(most) < (shares > 0.01).sum() else {}
        most = pd.concat([pd.Series(others, dtype=float), most])
        right.barh(most.index, most, color=[colors.get(t, GREY) for t in most.index])
        right.set(xlim=(0, 1), xlabel=f"share of the {int(row['n_cells'])} active cells")
    return fig


def activation_by_type(concepts: AnnData, concept: int, level: str = "low") -> Figure:
    """Activation of a concept in the cells of each type; the share of active cells in brackets (Fig. 2a)."""
    table = pd.DataFrame(
        {
            "activation": concepts[:, f"concept_{concept}"].X.toarray().ravel(),
            "type": concepts.obs[LEVELS[level]].astype(str).to_numpy(),
        }
    )
    groups = table.groupby("type")["activation"]
    order = groups.mean().sort_values(ascending=False).index
    share = groups.apply(lambda a: (a > 0).mean())
    fig, ax = plt.subplots(figsize=(7.5, 0.32 * len(order) + 1))
    sns.stripplot(
        table,
        x="activation",
        y="type",
        hue="type",
        order=order,
        palette=palette(concepts, level),
        size=3,
        jitter=0.3,
        ax=ax,
        legend=False,
    )
    ax.set_yticks(range(len(order)), [f"{t} ({share[t]:.0%} of {len(groups.get_group(t))})" for t in order])
    ax.set(xlabel=f"activation of concept {concept}", ylabel="")
    return fig


def prototypes_in_umap(concepts: AnnData, concept: int, prototypes, counterfactuals) -> Figure:
    """Prototypes and counterfactuals of a concept among all cells (Fig. 2b)."""
    xy = concepts.obsm["X_umap"]
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    umap_values(axes[0], xy, concepts[:, f"concept_{concept}"].X.toarray().ravel(), f"activation of concept {concept}")
    axes[1].scatter(*xy.T, s=point_size(len(xy), 5), color="#DDDDDD", linewidths=0)
    for rows, color, marker, label in [
        (np.unique(counterfactuals), "#0072B2", "o", "counterfactuals"),
        (prototypes, "#D55E00", "^", "prototypes"),
    ]:
        axes[1].scatter(
            *xy[rows].T,
            s=22,
            color=color,
            marker=marker,
            label=f"{label} ({len(rows)})",
            edgecolors="white",
            linewidths=0.4,
        )
    umap_axes(axes[1], "prototypes and counterfactuals")
    axes[1].legend(frameon=False, loc="best")
    return fig


def concept_umaps(concepts: AnnData, chosen: list[int], columns: int = 3) -> Figure:
    """Activation of several concepts in the cell UMAP (Fig. 14)."""
    rows = -(-len(chosen) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.9 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for ax, j in zip(axes.flat, chosen):
        umap_values(ax, concepts.obsm["X_umap"], concepts[:, f"concept_{j}"].X.toarray().ravel(), f"concept {j}")
    for ax in list(axes.flat)[len(chosen) :]:
        ax.axis("off")
    return fig
