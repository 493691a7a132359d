"""Palette, legends and axes that all figures share."""

from __future__ import annotations

import matplotlib.pyplot as plt
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
