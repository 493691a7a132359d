"""Figures of what genes mean: words and gene sets (chapter 4)."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..enrichment import plain

Q_COLORS = {"q < 0.001": "#08306B", "q < 0.05": "#2171B5", "not enriched": "#8C8C8C"}


def word_cloud(counts: pd.DataFrame, random: pd.DataFrame | None = None, seed: int = 0) -> Figure:
    """Word cloud of a gene list, beside it that of random genes; below, the most frequent words as bars (Fig. 2d).

    Size: the number of genes; colour: the q-value. The cloud of a ``random`` list of as many genes is ours. Both tables
    are of :func:`~scsae_utils.words.word_counts`.
    """
    columns = 1 if random is None else 2
    fig = plt.figure(figsize=(6.6, 6.4), layout="constrained")
    clouds, bars = fig.subfigures(2, 1, height_ratios=[1, 1.25])
    axes = np.atleast_1d(clouds.subplots(1, columns))
    for ax, table, title in zip(axes, [counts, random], ["these genes", "as many random genes"]):
        ax.axis("off")
        ax.set_title(title, fontsize=11)
        if len(table) == 0:
            ax.text(0.5, 0.5, "no words", ha="center")
        else:
            ax.imshow(_cloud(table, seed, 900 // columns), interpolation="bilinear")
    ax = bars.subplots()
    if len(counts) == 0:
        ax.axis("off")
        return fig
    top = counts.nlargest(12, "count", keep="first").iloc[::-1]
    ax.barh(top["word"], top["count"], color=[_color(q) for q in top["qvalue"]])
    ax.plot(top["expected"], top["word"], "D", color="#D55E00", ms=5)
    ax.set(xlabel="genes with the word in their description")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    marks = [Patch(color=color, label=label) for label, color in Q_COLORS.items()]
    marks.append(Line2D([], [], color="#D55E00", marker="D", ls="", ms=5, label="expected"))
    bars.legend(handles=marks, frameon=False, loc="outside upper center", ncol=4, fontsize=9)
    return fig


def _cloud(counts: pd.DataFrame, seed: int, width: int):
    from wordcloud import WordCloud  # slow to import, and only needed here

    colors = {row.word: _color(row.qvalue) for row in counts.itertuples()}
    cloud = WordCloud(
        width=width,
        height=400,
        background_color="white",
        color_func=lambda word, **_: colors[word],
        max_words=25,
        random_state=seed,
        prefer_horizontal=1,
        relative_scaling=1,
        max_font_size=60,
        min_font_size=15,
    )
    return cloud.generate_from_frequencies(dict(zip(counts["word"], counts["count"])))


def _color(q: float) -> str:
    """NaN is a word in too few genes to be tested."""
    significant, below, neither = Q_COLORS.values()
    return significant if q < 0.001 else below if q < 0.05 else neither


def gene_set_bars(tables: dict[str, pd.DataFrame], random: dict[str, pd.DataFrame], n: int = 6) -> Figure:
    """Bars: the most significant gene sets by each method, and what random genes reach.

    Parameters
    ----------
    tables
        Method to a table, most significant first, with ``set``, ``qvalue``, ``size``,
        and ``count`` (genes of the list) or ``nes`` (its sign is the colour).
    random
        Method to the ``best`` q-values of random lists or rankings; 5 % of these are beyond the dashed line.
    """
    fig, axes = plt.subplots(len(tables), 1, figsize=(6.6, 2.5 * len(tables)), layout="constrained", squeeze=False)
    for ax, (method, table) in zip(axes[:, 0], tables.items()):
        top = table.dropna(subset="qvalue").head(n).iloc[::-1]
        sign = top["nes"] if "nes" in top else pd.Series(1, top.index)
        genes = top["size"].astype(str)
        if "count" in top:
            genes = top["count"].astype(str) + " of " + genes
        names = [textwrap.shorten(name if " " in name else plain(name), 44, placeholder=" …") for name in top["set"]]
        labels = [f"{name} ({of})" for name, of in zip(names, genes)]
        value = -np.log10(top["qvalue"].clip(lower=1e-300))
        ax.barh(np.arange(len(top)), value, color=np.where(sign > 0, "#2171B5", "#D55E00"))
        ax.set_yticks(np.arange(len(top)), labels, fontsize=9)
        ax.axvline(-np.log10(0.05), color="black", lw=0.8, ls=":")
        if method in random:
            ax.axvline(-np.log10(random[method]["best"].quantile(0.05)), color="#7B4B94", lw=1.4, ls="--")
        ax.set_title(method, fontsize=11, loc="left")
        ax.set_xlim(0, max(2.0, 1.05 * value.max()) if len(top) else 2)
    axes[-1, 0].set_xlabel("-log10 q-value")
    marks = [
        Patch(color="#2171B5", label="genes that drive it, or rise with it"),
        Patch(color="#D55E00", label="genes that hold it back"),
        Line2D([], [], color="black", lw=0.8, ls=":", label="q = 0.05"),
        Line2D([], [], color="#7B4B94", lw=1.4, ls="--", label="best of random genes, in 1 of 20"),
    ]
    fig.legend(handles=marks, frameon=False, loc="outside lower center", ncol=2, fontsize=9)
    return fig
