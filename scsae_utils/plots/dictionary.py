"""Figures of a dictionary and its training (chapter 2)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from anndata import AnnData
from matplotlib.figure import Figure

from .style import GREY


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
