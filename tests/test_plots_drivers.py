"""Figures of many concepts' drivers: labelled, with a legend, and of what they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scsae_utils import plots
from scsae_utils.plots.drivers import QUADRANT_COLORS
from scsae_utils.significance import QUADRANTS


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_colours_are_those_of_the_quadrants():
    assert tuple(QUADRANT_COLORS) == QUADRANTS


def test_errors_show_the_strongest_genes_and_which_stand_out():
    genes = pd.Index(list("ABCDE"), name="gene")
    table = pd.DataFrame(
        {"attribution": [0.1, -0.2, 0.01, 0.3, 0], "error": 0.01, "q_value": [0.01, 0.5, 1, 0.02, np.nan]}, genes
    )
    ax = plots.attribution_errors(table, max_q=0.1, n=3, redrawn=pd.Series(0.005, genes)).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["B", "A", "D"]
    assert legend(ax) == ["bins drawn again (± 2 r.m.s.)", "stands out (q < 0.1)", "does not"]
    assert [len(c.lines[0].get_xdata()) for c in ax.containers[1:]] == [2, 1]
    assert ax.containers[0][0].get_width() == pytest.approx(0.02)  # 2 r.m.s. either way
    assert "share of the activation" in ax.get_xlabel()


def test_p_values_are_densities():
    ax = plots.p_values({"all": pd.Series(np.linspace(0, 1, 1001)), "other": pd.Series([0.5, np.nan])}).axes[0]
    assert legend(ax) == ["all (1001)", "other (1)"]
    assert ax.patches[0].get_xy()[1:-1, 1] == pytest.approx(1, abs=0.03)


def test_precision_and_recall_say_when_nothing_was_found():
    table = pd.DataFrame({"precision": [0.5, np.nan], "recall": [1.0, 0.0]}, index=["one way", "another"])
    ax = plots.precision_recall_bars(table).axes[0]
    assert [t.get_text() for t in ax.texts] == ["0.50", "nothing found", "1.00", "0.00"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["one way", "another"]


def test_joint_losses_name_pairs_and_modules():
    table = pd.DataFrame(
        {"set": [("A", "B"), ("C", "D"), ("E", "F", "G")], "sum": [0.1, 1.2, 0.2], "loss": [0.5, 0.8, 0.2],
         "interaction": [0.4, -0.4, 0], "kind": ["redundant", "synergistic", ""], "name": [None, "ribosomal (2)", None]}
    )  # fmt: skip
    ax = plots.joint_losses(table).axes[0]
    assert {t.get_text() for t in ax.texts} == {"A + B", "ribosomal (2)"}
    assert legend(ax) == ["neither (1)", "redundant (1)", "synergistic (1)"]


def curves() -> pd.DataFrame:
    rows = [
        (1, order, cell, n, 1 - n / last, n / last)
        for order in ("attribution", "differential expression", "random 0", "random 1")
        for cell, last in (("a", 8), ("b", 6))
        for n in (0, 1, 2, 4, last)
    ]
    return pd.DataFrame(rows, columns=["concept", "order", "cell", "n", "deletion", "insertion"])


def test_bands_have_both_curves_and_every_order():
    axes = plots.order_bands(curves()).axes
    assert [ax.get_title() for ax in axes] == ["Deletion", "Insertion"]
    assert legend(axes[1]) == ["random orders", "attribution", "differential expression"]
    lines = [line for line in axes[0].lines if line.get_label() == "attribution"]
    assert lines[0].get_ydata()[1] == pytest.approx(np.mean([1 - 1 / 8, 1 - 1 / 6]))


def test_areas_count_who_wins():
    index = pd.MultiIndex.from_product([[1, 2, 3], ["attribution", "random 0", "random 1"]], names=["concept", "order"])
    areas = pd.DataFrame({"deletion": [0.2, 0.5, 0.7, 0.3, 0.9, 0.9, 0.8, 0.4, 0.4]}, index)
    assert legend(plots.area_scatter(areas).axes[0]) == ["attribution (2)", "random (1)"]


def test_quadrants_are_counted():
    table = pd.DataFrame(
        {"log2fc": [3, -4, 0.1, 30], "attribution": [0.1, 0, -0.2, 0.001], "never": [False] * 3 + [True]}
    )
    table["quadrant"] = [QUADRANTS[0], QUADRANTS[2], QUADRANTS[1], QUADRANTS[2]]
    ax = plots.quadrant_scatter(table, 2, 0.01).axes[0]
    assert legend(ax)[::-1] == [f"{name} ({n})" for name, n in zip(QUADRANTS, (1, 1, 2, 0))]
    assert ax.get_xlim()[1] < 6  # a gene that one group never expresses is at the edge, not at its fold change
