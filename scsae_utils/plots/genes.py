"""Figures of genes: expression, attribution, words (chapters 4 and 5)."""

from __future__ import annotations

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage

from ..concepts import number
from .style import GREY, OTHER_COLORS, legend_below


def volcano(table: pd.DataFrame, min_log2fc: float, max_padj: float, n_names: int = 7) -> Figure:
    """Volcano plot: log2 fold change against adjusted p-value of each gene, regulated genes coloured (Fig. 2c).

    On each side the ``n_names`` most significant genes are named, where the name covers no other. Genes that are
    never expressed in one of the groups have no finite fold change and are not drawn.
    """
    fig, ax = plt.subplots(figsize=(6.5, 4.6))
    table = table[~table["never"]]
    p = -np.log10(table["padj"].clip(lower=1e-300))
    for regulation, color in [("", GREY), ("down", "#0072B2"), ("up", "#D55E00")]:
        part = table["regulation"] == regulation
        label = f"{regulation or 'not regulated'} ({part.sum()})"
        ax.scatter(table.loc[part, "log2fc"], p[part], s=10, color=color, linewidths=0, label=label)
    ax.axhline(-np.log10(max_padj), color="black", lw=0.6, ls=":")
    for x in (-min_log2fc, min_log2fc):
        ax.axvline(x, color="black", lw=0.6, ls=":")
    ax.set(xlabel="log2 fold change, prototypes / counterfactuals", ylabel="-log10 adjusted p-value")
    legend_below(ax, "regulation (genes)")
    boxes = []
    for regulation in ("up", "down"):
        genes = p[table["regulation"] == regulation].sort_values(ascending=False, kind="stable").index[:n_names]
        for gene in genes:
            at = {"xytext": (2, 3), "textcoords": "offset points", "fontsize": 8}
            name = ax.annotate(gene, (table.at[gene, "log2fc"], p[gene]), **at)
            boxes.append(name.get_window_extent())
            if any(boxes[-1].overlaps(box) for box in boxes[:-1]):
                name.remove()
                boxes.pop()
    return fig


def attribution_strip(attributions: pd.DataFrame, genes: list[str], threshold: float = 0.05, selected=None) -> Figure:
    """Attribution of the strongest genes, a dot for each prototype, with the paper's threshold (Fig. 2e).

    Genes that are not ``selected`` (all are by default) are grey.
    """
    part = attributions[attributions["gene"].isin(genes)]
    colors = {gene: "#0072B2" if selected is None or gene in set(selected) else "#7F7F7F" for gene in genes}
    fig, ax = plt.subplots(figsize=(max(4, 0.42 * len(genes) + 2), 4))
    axis = {"x": "gene", "y": "attribution", "order": genes, "ax": ax}
    sns.boxplot(part, color="#E8EEF4", fliersize=0, linewidth=0.8, **axis)
    sns.stripplot(part, hue="gene", palette=colors, size=3, alpha=0.7, legend=False, **axis)
    for y in (-threshold, threshold):
        ax.axhline(y, color="#D55E00", lw=0.8, ls=":")
    ax.axhline(0, color="black", lw=0.6)
    ax.tick_params(axis="x", rotation=90)
    for label in ax.get_xticklabels():
        label.set_color(colors[label.get_text()])
    ax.set(xlabel="", ylabel="attribution (share of the activation)")
    return fig


def deletion(curves: pd.DataFrame, what: str = "differentially expressed genes") -> Figure:
    """Lines: activation while genes are removed, by order of removal; band: random orders (Fig. 2f)."""
    fig, ax = plt.subplots(figsize=(6.5, 4))
    means = curves.groupby(["order", "n_removed"])["activation"].mean().unstack("order")
    random = means[[c for c in means if c.startswith("random")]]
    if random.shape[1]:
        ax.fill_between(
            random.index,
            random.min(axis=1),
            random.max(axis=1),
            color=GREY,
            alpha=0.6,
            label=f"{random.shape[1]} random orders",
            lw=0,
        )
    named = [c for c in means if not c.startswith("random")]
    for order, color in zip(named, cycle(["#D55E00", "#0072B2", "#009E73", *OTHER_COLORS])):
        line = means[order].dropna()
        ax.plot(line.index, line, color=color, marker="o", ms=3, label=order)
    ax.axhline(0, color="black", lw=0.6)
    ax.set(xlabel=f"{what} removed", ylabel="activation, relative to the whole cell")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(ax, "order of removal", columns=2)
    return fig


def attribution_heatmap(means: pd.DataFrame, shares: pd.DataFrame, passed: pd.DataFrame | None = None) -> Figure:
    """Heat map of the mean attributions of genes to concepts, under the share of cell types in each (Fig. 3).

    Genes are ordered by clustering; ``passed`` (genes x concepts, bool) puts a dot where a gene passes the rule.
    """
    if len(means) > 2:
        means = means.iloc[leaves_list(linkage(means.to_numpy(), "average"))]
    width, height = 0.62 * means.shape[1] + 2.6, 0.2 * means.shape[0]
    fig, axes = plt.subplots(
        2, 1, figsize=(width, height + 2.6), sharex=True, layout="constrained", height_ratios=[1.6, max(height, 1)]
    )
    bottom = np.zeros(len(shares))
    for i, name in enumerate(shares.columns):
        color = ["#8C2D04", "#FDAE6B", GREY][i % 3]
        axes[0].bar(np.arange(len(shares)) + 0.5, shares[name], bottom=bottom, color=color, label=name, width=0.85)
        bottom += shares[name].to_numpy()
    axes[0].set(ylabel="share of\nactive cells", ylim=(0, 1))
    axes[0].legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=3, fontsize=9)
    limit = max(float(means.abs().max().max()), 0.05)
    dots = None if passed is None else np.where(passed.loc[means.index], "•", "")
    bar = {"label": "mean attribution", "shrink": 0.6}
    sns.heatmap(
        means, cmap="RdBu_r", vmin=-limit, vmax=limit, annot=dots, fmt="", ax=axes[1], yticklabels=True, cbar_kws=bar
    )
    axes[1].set(xlabel="concept", ylabel="")
    axes[1].set_xticks(np.arange(means.shape[1]) + 0.5, [str(number(c)) for c in means.columns], rotation=90)
    axes[1].tick_params(axis="y", labelsize=8)
    return fig
