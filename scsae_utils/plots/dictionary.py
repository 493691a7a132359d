"""Figures of a dictionary and its training (chapter 2)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from anndata import AnnData
from matplotlib.figure import Figure

from .style import GREY


def training_curves(history: pd.DataFrame) -> Figure:
    """Lines over the epochs of training: variance that is not explained and, where it changes, concepts per cell.

    Of training cells in the course of an epoch; of held-out cells after it, if there.
    """
    varies = history["concepts_per_cell"].nunique() > 1
    fig, axes = plt.subplots(1, 1 + varies, figsize=(4.2 * (1 + varies), 3.2), layout="constrained", squeeze=False)
    for column, color, label in [
        ("variance_explained", "#0072B2", "training cells"),
        ("held_out_variance_explained", "#E69F00", "held-out cells"),
    ]:
        if column in history:
            axes[0, 0].plot(history["epoch"], 1 - history[column], color=color, label=label)
    axes[0, 0].set(xlabel="epoch", ylabel="variance not explained (share)", yscale="log")
    axes[0, 0].legend(frameon=False)
    if varies:
        axes[0, 1].plot(history["epoch"], history["concepts_per_cell"], color="#0072B2")
        axes[0, 1].set(xlabel="epoch", ylabel="concepts of a training cell")
    return fig


def sweep(table: pd.DataFrame, n_concepts: int, k: int) -> Figure:
    """Four scores of dictionaries of several sizes, over the concepts of a held-out cell; a ring: the one in use.

    ``table`` is from :func:`scsae_utils.controls.sweep`.
    """
    scores = ["variance explained", "stability", "types found", "surviving"]
    labels = ["variance explained", "stability (cosine of two seeds)", "cell types found", "share that survives"]
    fig, axes = plt.subplots(2, 2, figsize=(7.2, 6), layout="constrained", sharex=True)
    sizes = sorted(table["n_concepts"].unique())
    colors = sns.color_palette("viridis", len(sizes) + 1)[: len(sizes)]
    chosen = table[(table["n_concepts"] == n_concepts) & (table["k"] == k)]
    for ax, score, label in zip(axes.flat, scores, labels):
        for size, color in zip(sizes, colors):
            part = table[table["n_concepts"] == size].sort_values("k")
            ax.plot(part["concepts per cell"], part[score], "o-", color=color, label=f"{size}")
        ax.plot(
            chosen["concepts per cell"], chosen[score], "o", ms=13, mfc="none", mec="#D55E00", mew=2, label="in use"
        )
        ax.set(xscale="log", ylabel=label)
    for ax in axes[1]:
        ax.set_xlabel("concepts of a cell")
        ax.set_xticks(sorted(table["k"].unique()), sorted(table["k"].unique()))
        ax.minorticks_off()
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(sizes) + 1,
        frameon=False,
        title="concepts of the dictionary",
    )
    return fig


def concepts_per_cell(concepts: AnnData) -> Figure:
    """Histogram of the number of active concepts of a cell, for training and for held-out cells (Fig. 6)."""
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
    """Histogram of the number of cells that activate a concept, with the threshold of post-processing (Fig. 7)."""
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
    """Scatter plot of the concepts: activation frequency against maximal activation (Fig. 8)."""
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
