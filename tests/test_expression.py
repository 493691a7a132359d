"""Differential expression: parity with scanpy and scipy, eq. 2, genes that one group never expresses, bad input."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from scipy.stats import false_discovery_control, mannwhitneyu

from scsae_utils.expression import differential_expression, smallest_pvalue

B, MONO = slice(0, 30), slice(30, 60)


def cells(linear, names=None) -> AnnData:
    """Cells from linear expression, (n_cells, n_genes)."""
    linear = np.asarray(linear, float)
    adata = AnnData(sparse.csr_matrix(np.log1p(linear)))
    adata.var_names = names if names is not None else [f"g{i}" for i in range(linear.shape[1])]
    return adata


@pytest.fixture(scope="module")
def adata():
    """60 cells, 40 genes, many zeros; the first 30 cells express the first 5 genes ten times as much."""
    rng = np.random.default_rng(0)
    linear = rng.gamma(1, 2, (60, 40)) * (rng.random((60, 40)) < 0.6)
    linear[B, :5] *= 10
    return cells(linear)


@pytest.fixture
def markers():
    """Six cells against six: up, down, the same, and genes that only one group expresses (much, little) or neither."""
    group, reference = np.zeros((6, 6)), np.zeros((6, 6))
    group[:, 0], reference[:, 0] = 40, 4
    group[:, 1], reference[:, 1] = 1, 31
    group[:, 2], reference[:, 2] = 5, 5
    group[:, 3] = 20
    reference[:, 4] = 0.5
    return cells(np.r_[group, reference], ["up", "down", "same", "only_much", "only_little", "silent"])


GROUP, REFERENCE = np.arange(6), np.arange(6, 12)


class TestParity:
    @pytest.mark.parametrize("tie_correct", [True, False])
    def test_scanpy(self, adata, tie_correct):
        ours = differential_expression(adata, range(30), range(30, 60), tie_correct=tie_correct)
        theirs = adata.copy()
        theirs.obs["cells"] = pd.Categorical(["group"] * 30 + ["rest"] * 30)
        sc.tl.rank_genes_groups(theirs, "cells", method="wilcoxon", reference="rest", tie_correct=tie_correct)
        theirs = sc.get.rank_genes_groups_df(theirs, "group").set_index("names").loc[ours.index]
        columns = {"score": "scores", "pvalue": "pvals", "padj": "pvals_adj", "log2fc_scanpy": "logfoldchanges"}
        for column, name in columns.items():
            np.testing.assert_allclose(ours[column], theirs[name], rtol=1e-5)

    def test_scipy(self, adata):
        table = differential_expression(adata, np.arange(30), np.arange(30, 60)).loc[adata.var_names]
        x = adata.X.toarray()
        expected = mannwhitneyu(x[B], x[MONO], method="asymptotic", use_continuity=False).pvalue
        np.testing.assert_allclose(table["pvalue"], expected, rtol=1e-6)
        np.testing.assert_allclose(table["padj"], false_discovery_control(expected), rtol=1e-6)

    def test_real_cells(self):
        real = sc.datasets.pbmc68k_reduced().raw.to_adata()
        b = (real.obs["bulk_labels"] == "CD19+ B").to_numpy()
        table = differential_expression(real, b, ~b)
        assert {"CD79A", "CD79B", "MS4A1"} <= set(table.index[table["regulation"] == "up"])
        assert {"LYZ", "CST3", "TYROBP"} <= set(table.index[table["regulation"] == "down"])
        assert table["score"].is_monotonic_decreasing and len(table) == 765


class TestFoldChange:
    def test_eq_2_is_of_means_of_linear_expression_and_scanpys_is_not(self):
        linear = np.array([[15.0], [0], [0], [0], [1], [1], [1], [1]])
        with pytest.warns(UserWarning, match="no gene can be regulated"):
            row = differential_expression(cells(linear), [0, 1, 2, 3], [4, 5, 6, 7]).iloc[0]
        assert row["mean_group"] == pytest.approx(15 / 4) and row["mean_reference"] == pytest.approx(1)
        assert row["log2fc"] == pytest.approx(np.log2(3.75))
        assert row["mean_log_group"] == pytest.approx(np.log(16) / 4)
        # scanpy: exp(log(16) / 4) - 1 = 1, against 1: no change
        assert row["log2fc_scanpy"] == pytest.approx(0, abs=1e-6)
        assert row["share_group"] == 0.25 and row["share_reference"] == 1

    def test_which_one_the_threshold_is_for(self):
        linear = np.r_[np.tile([[63.0], [1.5]], (15, 1)), np.full((30, 1), 1.0)]  # mean 32.25, scanpy's 11.6
        pair = cells(np.c_[linear, linear[::-1]])
        settings = dict(min_log2fc=4, max_padj=1)
        table = differential_expression(pair, np.arange(30), np.arange(30, 60), **settings)
        assert table.loc["g0", "log2fc"] == pytest.approx(np.log2(32.25))
        assert table.loc["g0", "log2fc_scanpy"] == pytest.approx(np.log2(np.sqrt(64 * 2.5) - 1))
        assert table["regulation"].to_dict() == {"g0": "up", "g1": "down"}
        by_scanpy = differential_expression(pair, np.arange(30), np.arange(30, 60), fold_change="scanpy", **settings)
        assert (by_scanpy["regulation"] == "").all()

    def test_logarithms_of_another_base(self, markers):
        markers.X = markers.X / np.log(2)
        markers.uns["log1p"] = {"base": 2}
        table = differential_expression(markers, GROUP, REFERENCE, max_padj=0.05)
        assert table.loc["up", "mean_group"] == pytest.approx(40)
        assert table.loc["up", ["log2fc", "log2fc_scanpy"]].tolist() == pytest.approx([np.log2(10)] * 2, rel=1e-5)


class TestRegulation:
    def test_up_down_and_never(self, markers):
        table = differential_expression(markers, GROUP, REFERENCE, max_padj=0.05, never_max_mean=1)
        assert table["regulation"].to_dict() == {
            "up": "up", "down": "down", "same": "", "only_much": "up", "only_little": "never", "silent": "",
        }  # fmt: skip
        assert table.index[table["never"]].tolist() == ["only_much", "silent", "only_little"]
        assert table.loc["only_much", "log2fc"] > 30  # only epsilon bounds it
        assert table.loc["only_little", "mean_reference"] == pytest.approx(0.5)  # the evidence

    def test_by_default_low_is_below_the_median_of_the_other_groups_expressed_genes(self, markers):
        table = differential_expression(markers, GROUP, REFERENCE, max_padj=0.05)
        # expressed by the group: 40, 1, 5, 20; by the reference: 4, 31, 5, 0.5
        assert table.attrs["never_max_mean"] == pytest.approx({"mean_group": 12.5, "mean_reference": 4.5})
        assert table.loc["only_much", "regulation"] == "up" and table.loc["only_little", "regulation"] == "never"

    def test_the_paper_removes_them_all(self, markers):
        table = differential_expression(markers, GROUP, REFERENCE, max_padj=0.05, never_max_mean=np.inf)
        assert table["regulation"].value_counts()["never"] == 2

    def test_swapping_the_groups_swaps_the_signs(self, adata):
        one = differential_expression(adata, np.arange(30), np.arange(30, 60)).sort_index()
        two = differential_expression(adata, np.arange(30, 60), np.arange(30)).sort_index()
        np.testing.assert_allclose(one[["log2fc", "score"]], -two[["log2fc", "score"]], atol=1e-6)
        assert one.index[one["regulation"] == "up"].equals(two.index[two["regulation"] == "down"])

    def test_smallest_p_value(self):
        assert smallest_pvalue(20, 20, tie_correct=False) == pytest.approx(6.3e-8, rel=0.01)
        separated = cells(np.r_[np.full((6, 1), 9.0), np.zeros((6, 1))])
        with pytest.warns(UserWarning, match="with 6 and 6 cells the smallest possible p-value is 0.0009"):
            table = differential_expression(separated, GROUP, REFERENCE)
        assert table["pvalue"].iloc[0] == pytest.approx(smallest_pvalue(6, 6))


class TestInput:
    def test_masks_positions_dense_sparse_and_layers_are_the_same(self, adata):
        mask = np.arange(60) < 30
        expected = differential_expression(adata, np.arange(30), np.arange(30, 60))
        pd.testing.assert_frame_equal(differential_expression(adata, mask, ~mask), expected)
        dense = AnnData(np.zeros(adata.shape), var=adata.var, layers={"log": adata.X.toarray()})
        pd.testing.assert_frame_equal(differential_expression(dense, mask, ~mask, layer="log"), expected)

    def test_the_cells_are_left_as_they_are(self, adata):
        before = adata.copy()
        differential_expression(adata, np.arange(30), np.arange(30, 60))
        assert set(adata.uns) == set(before.uns) and list(adata.obs) == list(before.obs)
        assert (adata.X != before.X).nnz == 0

    def test_silent_genes_make_no_noise(self, markers):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            row = differential_expression(markers, GROUP, REFERENCE, max_padj=0.05).loc["silent"]
        assert row["pvalue"] == 1 and row["log2fc"] == 0 and row["score"] == 0

    @pytest.mark.parametrize(
        "group, reference, message",
        [
            ([0, 1, 2, 3], [3, 4, 5], "1 cells are in both groups \\(first: 3\\)"),
            ([0, 1], [3, 4, 5], "group has 2 cells; the test needs at least 3"),
            ([0, 1, 2], [], "reference has 0 cells"),
            ([0, 1, 2], np.zeros(60, bool), "reference has 0 cells"),
            ([0, 1, 2], np.ones(59, bool), "mask of 59 cells, adata has 60"),
            ([0, 1, 60], [3, 4, 5], "outside of 0 to 59"),
            ([0, 1, -1], [3, 4, 5], "outside of 0 to 59"),
            ([0, 1, 1, 2], [3, 4, 5], "group holds a cell more than once"),
            ([0.0, 1.0, 2.0], [3, 4, 5], "integers"),
            (["a", "b", "c"], [3, 4, 5], "integers"),
            ([[0, 1, 2]], [3, 4, 5], "shape"),
        ],
    )
    def test_groups(self, adata, group, reference, message):
        with pytest.raises(ValueError, match=message):
            differential_expression(adata, group, reference)

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda x: np.rint(x * 3), "counts or linear values"),
            (lambda x: x * 1000, "counts or linear values"),
            (lambda x: (x > 0).astype(int), "counts or linear values"),
            (lambda x: x - x.mean(0), "negative values"),
            (lambda x: np.where(x > 1, np.nan, x), "not finite"),
            (lambda x: x * 0, "no gene is expressed"),
        ],
    )
    def test_expression_that_is_not_log1p(self, adata, change, message):
        wrong = AnnData(change(adata.X.toarray()))
        with pytest.raises(ValueError, match=message):
            differential_expression(wrong, np.arange(30), np.arange(30, 60))

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"layer": "counts"}, "no layer 'counts'"),
            ({"fold_change": "log"}, "fold_change must be"),
            ({"min_log2fc": -1}, "min_log2fc"),
            ({"max_padj": 0}, "max_padj"),
            ({"never_max_mean": -1}, "never_max_mean"),
        ],
    )
    def test_settings(self, adata, settings, message):
        with pytest.raises(ValueError, match=message):
            differential_expression(adata, np.arange(30), np.arange(30, 60), **settings)

    def test_gene_names_must_be_unique(self, adata):
        twice = adata.copy()
        twice.var_names = ["g"] * 40
        with pytest.raises(ValueError, match="more than once"):
            differential_expression(twice, np.arange(30), np.arange(30, 60))
