"""Figures of the evidence for concepts: real beside null, grades, the six lines (chapter 6)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..concepts import KINDS, READINGS
from .style import GREY, legend_below

REAL, NULL = "#D55E00", "#7F7F7F"
VERDICT_COLORS = {"passed": "#009E73", "failed": "#D55E00", "not testable": "#DDDDDD"}
GRADE_COLORS = {"A": "#00573F", "B": "#009E73", "C": "#E69F00", "D": GREY}


def real_and_null(tables: dict[str, pd.DataFrame], measures: dict[str, str]) -> Figure:
    """Distribution over concepts of each measure, for the real dictionary and each null, with the median.

    Parameters
    ----------
    tables
        From :func:`~scsae_utils.nulls.measure`, by case; the first is the real one.
    measures
        Column to its name on the axis.
    """
    fig, axes = plt.subplots(
        len(measures), 1, figsize=(5.2, (0.3 * len(tables) + 0.9) * len(measures)), layout="constrained", squeeze=False
    )
    rng = np.random.default_rng(0)
    for ax, (column, label) in zip(axes[:, 0], measures.items()):
        shown = {name: table[column].dropna() for name, table in tables.items()}
        shown = {name: values for name, values in shown.items() if len(values)}
        for i, values in enumerate(shown.values()):
            color = NULL if i else REAL
            ax.scatter(values, i + rng.uniform(-0.25, 0.25, len(values)), s=6, color=color, alpha=0.5, linewidths=0)
            ax.plot([values.median()] * 2, [i - 0.38, i + 0.38], color="black", lw=1.5)
        ax.set_yticks(range(len(shown)), [f"{name} ({len(values)})" for name, values in shown.items()], fontsize=9)
        ax.set_ylim(len(shown) - 0.5, -0.5)
        ax.set_xlabel(label)
        ax.xaxis.set_major_locator(MaxNLocator(6))
    return fig


def grades_by_kind(table: pd.DataFrame) -> Figure:
    """Bars: share of the concepts with each grade, by kind; below (↳) cross-cell-type ones by reading."""
    kinds = [kind for kind in KINDS if (table["kind"] == kind).any()]
    groups = {kind: table["kind"] == kind for kind in kinds}
    groups |= {f"↳ {name}": table["reading"] == name for name in READINGS if (table["reading"] == name).any()}
    names = [f"{name} ({mask.sum()})" for name, mask in groups.items()]
    shares = pd.DataFrame([table.loc[m, "grade"].value_counts(normalize=True) for m in groups.values()], index=names)
    shares = shares.reindex(columns=list(GRADE_COLORS)).fillna(0)
    fig, ax = plt.subplots(figsize=(5.2, 0.36 * len(names) + 1.4))
    left = np.zeros(len(names))
    for name in GRADE_COLORS:
        ax.barh(names, shares[name], left=left, color=GRADE_COLORS[name], label=name)
        left += shares[name].to_numpy()
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set(xlim=(0, 1), xlabel="share of the concepts")
    ax.legend(
        frameon=False, ncol=len(GRADE_COLORS), loc="lower center", bbox_to_anchor=(0.4, 1), title="grade", fontsize=9
    )
    return fig


def lines_by_kind(table: pd.DataFrame) -> Figure:
    """Which lines of evidence pass: one row for each concept, by kind and reading, the best grades first."""
    order = {name: i for i, name in enumerate([*KINDS[:2], *READINGS])}
    group = table["reading"].where(table["reading"] != "", table["kind"])
    rank = group.map(order).fillna(len(order))
    rows = table.assign(rank=rank, group=group).sort_values(
        ["rank", "n_passed"], ascending=[True, False], kind="stable"
    )
    codes = {verdict: i for i, verdict in enumerate(VERDICT_COLORS)}
    lines = rows.filter(regex="_verdict$")
    values = lines.apply(lambda column: column.map(codes)).to_numpy()
    fig, ax = plt.subplots(figsize=(5.2, 6))
    colors = ListedColormap(list(VERDICT_COLORS.values()))
    ax.imshow(values, cmap=colors, vmin=0, vmax=len(codes) - 1, aspect="auto", interpolation="nearest")
    ends = np.cumsum(rows.groupby("rank", sort=True).size().to_numpy())
    starts = np.r_[0, ends[:-1]]
    for end in ends[:-1]:
        ax.axhline(end - 0.5, color="black", lw=0.8)
    names = rows.drop_duplicates("rank")["group"]
    labels = [f"{name} ({end - start})" for name, start, end in zip(names, starts, ends)]
    ax.set_yticks((starts + ends - 1) / 2, labels, fontsize=9)
    ax.set_xticks(
        range(lines.shape[1]),
        [c.removesuffix("_verdict").replace("_", " ") for c in lines],
        rotation=40,
        ha="right",
        fontsize=9,
    )
    ax.set(ylabel="concepts, by kind or reading", xlabel="line of evidence")
    for verdict, color in VERDICT_COLORS.items():
        ax.plot([], [], "s", color=color, label=verdict)
    ax.legend(frameon=False, ncol=3, loc="lower center", bbox_to_anchor=(0.4, 1), fontsize=9)
    return fig


def association_strip(found: pd.DataFrame, max_effect: float = 0.5) -> Figure:
    """Effect of each trait of the cells on each concept within cell types, coloured by verdict.

    ``found`` is from :func:`~scsae_utils.technical.associations`.
    """
    covariates = list(dict.fromkeys(found.index.get_level_values("covariate")))
    colors = {"associated": REAL, "undecided": "#E69F00", "free": "#009E73", "cannot be told": GREY}
    rng = np.random.default_rng(0)
    fig, ax = plt.subplots(figsize=(5.2, 0.5 * len(covariates) + 1.6))
    for verdict, color in colors.items():
        part = found[(found["verdict"] == verdict) & found["effect"].notna()]
        y = part.index.get_level_values("covariate").map(covariates.index).to_numpy(float)
        n = (found["verdict"] == verdict).sum()
        ax.scatter(part["effect"], y + rng.uniform(-0.3, 0.3, len(y)), s=7, color=color, lw=0, label=f"{verdict} ({n})")
    for edge in (-max_effect, max_effect):
        ax.axvline(edge, color="black", lw=0.6, ls=":")
    ax.axvline(0, color="black", lw=0.6)
    ax.set_yticks(range(len(covariates)), covariates, fontsize=9)
    ax.set(xlim=(-1.05, 1.05), xlabel="effect within cell types (2 AUC - 1)")
    ax.invert_yaxis()
    legend_below(ax, "verdict (pairs of a concept and a covariate)", columns=2, markerscale=2)
    return fig
