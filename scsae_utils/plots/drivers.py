"""Figures of many concepts' drivers: errors, interactions, curves, passengers (chapter 5b)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from .style import GREY, legend_below

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
QUADRANT_COLORS = {  # by significance.QUADRANTS
    "driver that differs": ORANGE,
    "driver that does not differ": GREEN,
    "passenger": BLUE,
    "neither": GREY,
}
ORDER_COLORS = {"attribution": ORANGE, "differential expression": BLUE, "random": "#7F7F7F"}


def attribution_errors(statistics: pd.DataFrame, max_q: float = 0.1, n: int = 12, redrawn: pd.Series | None = None):
    """The strongest genes of one concept: mean attribution with twice its error either way, and which stand out.

    ``statistics`` are indexed by gene; ``redrawn`` (by gene) is the root mean square of what re-drawn bins give, drawn
    as a grey bar around zero.
    """
    shown = statistics.loc[statistics["attribution"].abs().nlargest(n).index].sort_values("attribution")
    fig, ax = plt.subplots(figsize=(5.2, 0.27 * len(shown) + 1.6))
    y = np.arange(len(shown))
    if redrawn is not None:
        width = 2 * redrawn.reindex(shown.index).to_numpy()
        ax.barh(y, 2 * width, left=-width, color="#E3E3E3", label="bins drawn again (± 2 r.m.s.)")
    ax.axvline(0, color="black", lw=0.6)
    for passes, label, color in ((True, f"stands out (q < {max_q:g})", ORANGE), (False, "does not", "#4D4D4D")):
        part = (shown["q_value"] < max_q).to_numpy() == passes
        ax.errorbar(
            shown["attribution"][part], y[part], xerr=2 * shown["error"][part],
            fmt="o", ms=4, color=color, lw=1, label=label,
        )  # fmt: skip
    ax.set_yticks(y, shown.index, fontsize=9)
    ax.set(xlabel="mean attribution ± 2 errors (share of the activation)")
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.4, 1), ncol=1)
    return fig


def p_values(groups: dict[str, pd.Series]) -> Figure:
    """Histogram of the p-values of each group of genes, as densities; dotted: what no effect at all would give."""
    fig, ax = plt.subplots(figsize=(5.2, 3.4))
    edges = np.linspace(0, 1, 21)
    for (name, p), color in zip(groups.items(), (BLUE, ORANGE, GREEN)):
        ax.hist(
            p.dropna(),
            bins=edges,
            density=True,
            histtype="step",
            lw=1.6,
            color=color,
            label=f"{name} ({len(p.dropna())})",
        )
    ax.axhline(1, color="black", lw=0.8, ls=":")
    ax.set(xlabel="p-value", ylabel="density", xlim=(0, 1))
    legend_below(ax, "genes", columns=1)
    return fig


def precision_recall_bars(table: pd.DataFrame) -> Figure:
    """Bars: precision and recall of several methods that look for drivers.

    ``table`` has a row for each method.
    """
    fig, ax = plt.subplots(figsize=(5.2, 0.5 * len(table) + 1.3))
    y = np.arange(len(table))[::-1]
    for shift, (name, color) in zip((0.18, -0.18), {"precision": BLUE, "recall": "#E69F00"}.items()):
        ax.barh(y + shift, table[name].fillna(0), height=0.34, color=color, label=name)
        for at, value in zip(y + shift, table[name]):
            text = "nothing found" if np.isnan(value) else f"{value:.2f}"
            ax.text((0 if np.isnan(value) else value) + 0.01, at, text, va="center", fontsize=8)
    ax.set_yticks(y, table.index)
    ax.set(xlabel="share (precision: of what was found; recall: of the drivers)", xlim=(0, 1.12))
    ax.xaxis.label.set_fontsize(9)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2, fontsize=9)
    return fig


def joint_losses(found: pd.DataFrame, n_names: int = 6) -> Figure:
    """Scatter plot of pairs and families of genes: the losses of each on its own, added up, against the loss of all.

    ``found`` is from :func:`redundancy.interactions`. Above the diagonal genes stand in for each other, below it they
    need each other. The largest are named.
    """
    fig, ax = plt.subplots(figsize=(5.2, 4.6))
    limits = [found[["sum", "loss"]].min().min(), found[["sum", "loss"]].max().max()]
    ax.plot(limits, limits, color="black", lw=0.8, ls=":")
    for kind, color in {"": GREY, "redundant": BLUE, "synergistic": ORANGE}.items():
        part = found["kind"] == kind
        label = f"{kind or 'neither'} ({part.sum()})"
        ax.scatter(found.loc[part, "sum"], found.loc[part, "loss"], s=12, color=color, linewidths=0, label=label)
    sure = found[found["kind"] != ""]
    for _, row in sure.loc[sure["interaction"].abs().nlargest(n_names).index].iterrows():
        name = row["name"] if isinstance(row.get("name"), str) else " + ".join(row["set"])
        right = row["sum"] > np.mean(limits)
        at = {"xytext": (-4 if right else 4, 4), "textcoords": "offset points", "ha": "right" if right else "left"}
        ax.annotate(name, (row["sum"], row["loss"]), fontsize=7.5, **at)
    ax.set(xlabel="losses of each on its own, added up", ylabel="loss of all together")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    legend_below(ax, "interaction (sets)", columns=3)
    return fig


def order_bands(curves: pd.DataFrame) -> Figure:
    """Lines: the activation of one concept while genes are taken away or given back, in several orders of the genes.

    The band has the random orders, lowest to highest.
    ``curves`` are those of one concept of :func:`curves.order_curves`; means over its cells.
    """
    fig, axes = plt.subplots(2, 1, figsize=(5.2, 6), sharex=True, layout="constrained")
    common = curves.groupby("order")["n"].agg(set).pipe(lambda sets: set.intersection(*sets))
    curves = curves[curves["n"].isin(common)]
    for ax, kind in zip(axes, ("deletion", "insertion")):
        means = curves.pivot_table(index="n", columns="order", values=kind)
        random = means.filter(regex=r"^random \d+$")
        x = np.log2(1 + means.index)
        ax.fill_between(x, random.min(axis=1), random.max(axis=1), color=GREY, alpha=0.6, lw=0, label="random orders")
        for name in means.columns.difference(random.columns):
            ax.plot(x, means[name], "o-", ms=3, color=ORDER_COLORS.get(name, GREEN), label=name)
        ax.axhline(0, color="black", lw=0.6)
        ax.set(ylabel="activation, relative\nto the whole cell", title=kind.capitalize())
        shown = np.r_[np.diff(x) > 0.4, True]  # the last number may be near the one before
        ax.set_xticks(x[shown], [f"{n}" for n in means.index[shown]], fontsize=8)
    axes[1].set(xlabel="genes taken away (above), given back (below)")
    axes[1].legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncol=2)
    return fig


def area_scatter(areas: pd.DataFrame, other: str = "random") -> Figure:
    """Scatter plot of the concepts: area under the deletion curve by attribution against that of another order.

    Below the diagonal the concept falls faster by attribution.
    """
    table = areas["deletion"].unstack("order")
    table["random"] = table.filter(regex=r"^random \d+$").mean(axis=1)
    fig, ax = plt.subplots(figsize=(4.8, 4.4))
    both = table[["attribution", other]].dropna()
    limits = [min(0, both.min().min()), both.max().max()]
    ax.plot(limits, limits, color="black", lw=0.8, ls=":")
    for better, color, label in ((True, ORANGE, "attribution"), (False, "#7F7F7F", other)):
        part = both[(both["attribution"] < both[other]) == better]
        ax.scatter(part[other], part["attribution"], s=14, color=color, linewidths=0, label=f"{label} ({len(part)})")
    ax.set(xlabel=f"area under the curve, {other} order", ylabel="area under the curve, by attribution")
    legend_below(ax, "falls faster by (concepts)", columns=2)
    return fig


def quadrant_scatter(table: pd.DataFrame, min_log2fc: float, min_attribution: float) -> Figure:
    """Scatter plot of the genes of all concepts: how much they differ against how much they matter, in four quadrants.

    ``table`` is from :func:`significance.quadrants`. Genes that one group never expresses have no finite fold change
    and are drawn at the right edge.
    """
    fig, ax = plt.subplots(figsize=(5.2, 4.6))
    edge = float(np.ceil(table.loc[~table["never"], "log2fc"].abs().max())) + 1
    x = table["log2fc"].abs().where(~table["never"], edge)
    y = table["attribution"].abs().clip(lower=1e-4)
    for name in list(QUADRANT_COLORS)[::-1]:
        part = table["quadrant"] == name
        ax.scatter(
            x[part], y[part], s=5, alpha=0.5, color=QUADRANT_COLORS[name], linewidths=0, rasterized=True,
            label=f"{name} ({part.sum():,})",
        )  # fmt: skip
    ax.axvline(min_log2fc, color="black", lw=0.8, ls=":")
    ax.axhline(min_attribution, color="black", lw=0.8, ls=":")
    ax.set(yscale="log", xlabel="|log2 fold change|, prototypes / counterfactuals", ylabel="|mean attribution|")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    legend_below(ax, "genes of concepts", columns=1, markerscale=3)
    return fig
