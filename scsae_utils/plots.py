"""One function for each kind of figure; each returns a matplotlib ``Figure`` and says which of the paper's it is."""

from __future__ import annotations

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from anndata import AnnData
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage

from .cells import LEVELS, UNASSIGNED
from .concepts import KINDS, kept, number, type_shares

# Okabe and Ito's colours, which colour-blind readers can tell apart; lower levels are shades of the high one.
HIGH_COLORS = {"Myeloid": "#D55E00", "B": "#0072B2", "T": "#009E73", "ILC": "#CC79A7", "Progenitor": "#B8860B"}
OTHER_COLORS = ["#56B4E9", "#E69F00", "#F0E442", "#7B4B94", "#8C564B", "#17BECF", "#2F4F4F"]
GREY = "#BBBBBB"
KIND_COLORS = dict(zip(KINDS, ["#0072B2", "#E69F00", "#7F7F7F"]))


def set_style() -> None:
    """Fonts and sizes of the whole book."""
    sns.set_theme(style="ticks", context="notebook", font_scale=0.9)
    plt.rcParams.update(
        {"figure.dpi": 110, "savefig.bbox": "tight", "axes.spines.top": False, "axes.spines.right": False}
    )


def palette(adata: AnnData, level: str = "low") -> dict[str, str]:
    """Colour of each cell type of a level; the shades of a high-level type's colour for the types below it."""
    obs = adata.obs[list(LEVELS.values())].astype(str)
    high = sorted(set(obs["cell_type_high"]) - {UNASSIGNED})
    spare = [c for c in OTHER_COLORS]
    base = {t: HIGH_COLORS.get(t) or spare[i % len(spare)] for i, t in enumerate(high)} | {UNASSIGNED: GREY}
    if level == "high":
        colors = base
    else:
        colors = {}
        for parent, group in obs.groupby("cell_type_high"):
            names = list(dict.fromkeys(group.sort_values(list(LEVELS.values())[::-1])[LEVELS[level]]))
            shades = sns.blend_palette(
                [sns.light_palette(base[parent], 5)[2], base[parent], sns.dark_palette(base[parent], 5)[1]],
                len(names),
            )
            colors |= {t: to_hex(c) for t, c in zip(names, shades if len(names) > 1 else [base[parent]])}
    colors.pop(UNASSIGNED, None)
    return colors | {UNASSIGNED: GREY}  # the last one


def legend_below(ax, title: str, columns: int = 3, markerscale: float = 1) -> None:
    """A legend under the axes, where it covers no points and leaves figures narrow enough for a telephone."""
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncol": columns}
    ax.legend(**below, frameon=False, title=title, fontsize=9, title_fontsize=10, markerscale=markerscale)


def umap_axes(ax, title: str = "") -> None:
    """A UMAP has no units: no ticks, only names of the axes."""
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", title=title)


def umap_types(adata: AnnData, level: str = "mid", ax=None) -> Figure:
    """Cells in the UMAP of their embeddings, coloured by cell type (Figs. 4 and 5)."""
    fig, ax = (ax.figure, ax) if ax is not None else plt.subplots(figsize=(6.5, 4.8))
    colors, types, xy = palette(adata, level), adata.obs[LEVELS[level]].astype(str), adata.obsm["X_umap"]
    for cell_type, color in colors.items():
        rows = (types == cell_type).to_numpy()
        if rows.any():
            ax.scatter(*xy[rows].T, s=9, color=color, label=f"{cell_type} ({rows.sum()})", linewidths=0)
    umap_axes(ax)
    legend_below(ax, f"cell type, {level} level (cells)", markerscale=2)
    return fig


def umap_values(ax, xy: np.ndarray, values: np.ndarray, title: str = "", label: str = "activation") -> None:
    """Cells in the UMAP, coloured from dark blue (0) to yellow; high values are drawn on top."""
    order = np.argsort(values, kind="stable")
    points = ax.scatter(*xy[order].T, c=values[order], s=7, cmap="viridis", linewidths=0)
    umap_axes(ax, title)
    ax.figure.colorbar(points, ax=ax, label=label, shrink=0.8)


def umap_studies(adata: AnnData) -> Figure:
    """Cells in the UMAP, coloured by study: how much of the picture is biology and how much the laboratory."""
    fig, ax = plt.subplots(figsize=(6.2, 4.5))
    for i, study in enumerate(sorted(adata.obs["study"].astype(str).unique())):
        rows = (adata.obs["study"] == study).to_numpy()
        ax.scatter(
            *adata.obsm["X_umap"][rows].T,
            s=9,
            color=OTHER_COLORS[i % len(OTHER_COLORS)],
            label=f"{study} ({rows.sum()})",
            linewidths=0,
        )
    umap_axes(ax)
    legend_below(ax, "study (cells)", markerscale=2)
    return fig


def cell_tokens_bars(adata: AnnData, cell: str, n: int = 40) -> Figure:
    """What the model is fed of one cell: its most expressed genes with their bins."""
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


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss, variance explained and, where it changes, concepts per cell over the epochs (training cells)."""
    columns = ["loss", "variance_explained", "concepts_per_cell"]
    columns = [c for c in columns if len(history) < 2 or history[c].nunique() > 1]
    fig, axes = plt.subplots(1, len(columns), figsize=(3.7 * len(columns), 3), layout="constrained", squeeze=False)
    for ax, column in zip(axes[0], columns):
        ax.plot(history["epoch"], history[column], color="#0072B2")
        ax.set(xlabel="epoch", ylabel=column.replace("_", " "))
        if column == "loss":
            ax.set_yscale("log")
        elif column == "variance_explained":
            ax.set_ylim(min(0, history[column].quantile(0.05)), 1.02)
    return fig


def concepts_per_cell(concepts: AnnData) -> Figure:
    """Distribution of the number of active concepts of a cell (Fig. 6)."""
    active = pd.DataFrame(
        {"concepts": concepts.X.getnnz(axis=1), "cells": concepts.obs["split"].astype(str).to_numpy()}
    )
    fig, ax = plt.subplots(figsize=(6, 3.5))
    colors = {"train": "#0072B2", "validation": "#E69F00"}
    sns.histplot(
        active,
        x="concepts",
        hue="cells",
        discrete=True,
        stat="density",
        common_norm=False,
        ax=ax,
        element="step",
        palette=colors,
    )
    ax.set(xlabel="active concepts of a cell", ylabel="share of the cells")
    return fig


def cells_per_concept(concepts: AnnData) -> Figure:
    """Distribution of the number of cells that activate a concept (Fig. 7)."""
    var = concepts.var[concepts.var["n_cells"] > 0]
    fig, ax = plt.subplots(figsize=(6, 3.5))
    sns.histplot(x=var["n_cells"], log_scale=True, bins=30, color="#0072B2", ax=ax)
    ax.axvline(
        concepts.uns["min_frequency"] * concepts.n_obs, color="#D55E00", ls="--", label="post-processing threshold"
    )
    ax.set(xlabel="cells that activate a concept", ylabel="concepts")
    ax.legend(frameon=False)
    return fig


def frequency_and_activation(concepts: AnnData) -> Figure:
    """Activation frequency of each concept against its maximal activation (Fig. 8)."""
    var = concepts.var[concepts.var["n_cells"] > 0]
    fig, ax = plt.subplots(figsize=(6, 4))
    for is_kept, color, label in [(False, GREY, "dropped"), (True, "#0072B2", "kept")]:
        part = var[var["kept"] == is_kept]
        ax.scatter(
            part["frequency"],
            part["max_activation"],
            s=14,
            color=color,
            label=f"{label} ({len(part)})",
            alpha=0.7,
            linewidths=0,
        )
    ax.axvline(concepts.uns["min_frequency"], color="#D55E00", ls="--", lw=1, label="post-processing threshold")
    ax.set(xscale="log", yscale="log", xlabel="activation frequency (share of the cells)", ylabel="maximal activation")
    ax.legend(frameon=False)
    return fig


def specificity_sensitivity(concepts: AnnData, threshold: float = 0.8) -> Figure:
    """Specificity against sensitivity for the main cell type of each concept (Fig. 9)."""
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
    """Concepts in the UMAP (k, 2) of their vectors; size: frequency, opacity: share of the main type (Fig. 10).

    The colour is that of the high-level type to which the main type belongs: lower ones cannot be told apart.
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
    """Share of each cell type among the cells that activate a concept (Figs. 11 and 12)."""
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
    """Concepts in the cell UMAP (left) and their distribution over cell types (right) (Fig. 13)."""
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
        shares = shares[shares > 0.01].sort_values()
        right.barh(shares.index, shares, color=[colors[t] for t in shares.index])
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
    axes[1].scatter(*xy.T, s=5, color="#DDDDDD", linewidths=0)
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


def volcano(table: pd.DataFrame, min_log2fc: float, max_padj: float, n_names: int = 7) -> Figure:
    """Differential expression: log2 fold change against adjusted p-value, regulated genes coloured (Fig. 2c).

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


def word_cloud(counts: pd.DataFrame, seed: int = 0) -> Figure:
    """Words of a gene list, size by the number of genes, and the most frequent ones as bars (Fig. 2d).

    ``counts`` has columns ``word``, ``count``, ``expected``.
    """
    from wordcloud import WordCloud  # slow to import, and only needed here

    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=[1.5, 1])
    cloud = WordCloud(
        width=900,
        height=560,
        background_color="white",
        colormap="viridis",
        max_words=60,
        random_state=seed,
        prefer_horizontal=1,
        relative_scaling=1,
    )
    axes[0].axis("off")
    if len(counts) == 0:
        axes[0].text(0.5, 0.5, "no words", ha="center")
        return fig
    axes[0].imshow(
        cloud.generate_from_frequencies(dict(zip(counts["word"], counts["count"]))), interpolation="bilinear"
    )
    top = counts.nlargest(15, "count", keep="first").iloc[::-1]
    axes[1].barh(top["word"], top["count"], color="#0072B2", label="these genes")
    axes[1].plot(top["expected"], top["word"], "D", color="#D55E00", ms=5, label="expected of random genes")
    axes[1].set(xlabel="genes with the word in their description")
    axes[1].legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2, fontsize=9)
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig


def attribution_strip(attributions: pd.DataFrame, genes: list[str], threshold: float = 0.05, selected=None) -> Figure:
    """Attribution of each gene in each prototype (Fig. 2e); dotted: the paper's threshold.

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
    """Activation while genes are removed, by order of removal; band: random orders, lowest to highest (Fig. 2f)."""
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
    """Mean attribution (genes x concepts) under the share of cell types (concepts x types) (Fig. 3).

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


def concept_umaps(concepts: AnnData, chosen: list[int], columns: int = 3) -> Figure:
    """Activation of several concepts in the cell UMAP (Fig. 14)."""
    rows = -(-len(chosen) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.9 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for ax, j in zip(axes.flat, chosen):
        umap_values(ax, concepts.obsm["X_umap"], concepts[:, f"concept_{j}"].X.toarray().ravel(), f"concept {j}")
    for ax in list(axes.flat)[len(chosen) :]:
        ax.axis("off")
    return fig
