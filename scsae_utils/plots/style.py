"""Palette, legends and axes that all figures share."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from anndata import AnnData
from matplotlib.colors import to_hex

from ..cells import LEVELS, UNASSIGNED
from ..concepts import KINDS

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
    others = [t for t in high if t not in HIGH_COLORS]
    base = HIGH_COLORS | dict(zip(others, distinct(len(others)))) | {UNASSIGNED: GREY}
    base = {t: base[t] for t in [*high, UNASSIGNED]}
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


def distinct(n: int) -> list[str]:
    """``n`` colours; of more than there are in :data:`OTHER_COLORS`, hues at equal distances."""
    return OTHER_COLORS[:n] if n <= len(OTHER_COLORS) else [to_hex(c) for c in sns.husl_palette(n)]


def point_size(n_cells: int, largest: float = 9) -> float:
    """Size (square points) of a cell in a map: as scanpy's, the smaller the more cells there are."""
    return min(largest, 120_000 / max(n_cells, 1))


def legend_below(ax, title: str, columns: int = 3, markerscale: float = 1) -> None:
    """A legend under the axes, where it covers no points and leaves figures narrow enough for a telephone."""
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncol": columns}
    ax.legend(**below, frameon=False, title=title, fontsize=9, title_fontsize=10, markerscale=markerscale)


def scatter_groups(ax, xy: np.ndarray, groups: np.ndarray, colors: dict[str, str]) -> None:
    """Cells coloured by group, in random order, so that no group covers the others; with their numbers for a legend."""
    known = np.flatnonzero(np.isin(groups, list(colors)))
    order = np.random.default_rng(0).permutation(known)
    ax.scatter(*xy[order].T, s=point_size(len(xy)), c=[colors[group] for group in groups[order]], linewidths=0)
    for group, color in colors.items():
        n = (groups == group).sum()
        if n:
            ax.scatter([], [], s=36, color=color, label=f"{group} ({n})", linewidths=0)


def umap_axes(ax, title: str = "") -> None:
    """A UMAP has no units: no ticks, only names of the axes."""
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", title=title)
