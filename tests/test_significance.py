"""Errors, p-values and quadrants: by hand, and on tables whose truth is known. See also ``test_planted.py``."""

import numpy as np
import pandas as pd
import pytest

from scsae_utils.attribution import AttributionConfig, attribute
from scsae_utils.plots.drivers import QUADRANT_COLORS
from scsae_utils.significance import (
    QUADRANTS,
    cells_of_concepts,
    driver_table,
    expression_of_concepts,
    gene_statistics,
    has_effect,
    quadrants,
    redrawn_attributions,
    replicate_attributions,
    replicate_bins,
    share_with_interval,
    stands_out,
    work_folder,
)


def attributions(values: dict[str, list[float]], concept: int = 1, bin: float = 10.0) -> pd.DataFrame:
    """A table as of ``attribute``: of each gene the attributions in the first cells; all were removed."""
    rows = [(concept, f"c{i}", gene, x) for gene, xs in values.items() for i, x in enumerate(xs)]
    table = pd.DataFrame(rows, columns=["concept", "cell", "gene", "attribution"])
    return table.assign(bin=bin, counterfactual=0.0, change="remove", method="exact")


def random_genes(n_genes=300, n_cells=20, size=0.01, noise=0.002, seed=0, **named) -> pd.DataFrame:
    """Genes with a random effect each, the same in all cells but for noise; and named ones."""
    rng = np.random.default_rng(seed)
    values = {f"G{i}": rng.normal(0, size) + rng.normal(0, noise, n_cells) for i in range(n_genes)}
    return attributions(values | {g: x + rng.normal(0, noise, n_cells) for g, x in named.items()})


class TestStatistics:
    def test_mean_and_error_by_hand(self):
        """A is in two of four prototypes: 0, 0, 0.2, 0.4 have the mean 0.15; the error is that of a mean of four."""
        table = gene_statistics(attributions({"A": [0.2, 0.4], "B": [0.1, 0.1, -0.1, -0.5]}), min_prototypes=2)
        a, b = table.loc[(1, "A")], table.loc[(1, "B")]
        assert a["attribution"] == pytest.approx(0.15) and a["n_prototypes"] == 2 and a["sign"] == 1
        assert a["error"] == pytest.approx(np.std([0, 0, 0.2, 0.4], ddof=1) / 2)
        assert b["attribution"] == pytest.approx(-0.1) and b["sign"] == -1 and b["selected"] and b["n_above"] == 4

    def test_error_is_the_bootstraps(self):
        x = np.random.default_rng(0).normal(0.1, 0.05, 20)
        draws = np.random.default_rng(1).choice(x, (20_000, 20)).mean(axis=1)
        error = gene_statistics(attributions({"A": x}))["error"].item()
        assert error * np.sqrt(19 / 20) == pytest.approx(draws.std(), rel=0.02)

    def test_replicates_add_to_the_error(self):
        """Two replicates are 0.03 and 0.05 away from the mean of 0.1: a root mean square of 0.0412."""
        table = attributions({"A": [0.1, 0.1, 0.1], "B": [0.2, 0.2, 0.2]})
        replicates = pd.DataFrame({"concept": 1, "gene": "A", "replicate": [0, 1], "attribution": [0.13, 0.05]})
        out = gene_statistics(table, replicates, min_prototypes=1)
        assert out.at[(1, "A"), "error"] == pytest.approx(np.sqrt((0.03**2 + 0.05**2) / 2))
        assert out.at[(1, "B"), "error"] == pytest.approx(0, abs=1e-9)
        assert out["replicated"].to_dict() == {(1, "A"): True, (1, "B"): False}

    def test_genes_of_few_prototypes_are_not_tested(self):
        table = pd.concat([random_genes(), attributions({"rare": [0.9] * 4})])
        out = gene_statistics(table, min_prototypes=5).loc[1]
        assert np.isnan(out.at["rare", "p_value"]) and np.isnan(out.at["rare", "q_value"])
        assert out["p_value"].notna().sum() == 300

    def test_a_gene_is_screened_if_one_of_its_occlusions_is(self):
        table = attributions({"A": [0.1, 0.2], "B": [0.1, 0.2]})
        table.loc[1, "method"] = "screened"
        assert gene_statistics(table)["method"].loc[1].to_dict() == {"A": "screened", "B": "exact"}


class TestStandingOut:
    def test_null_p_values_are_uniform(self):
        """Every gene has an effect of its own; none is larger than what comes from genes like it."""
        p = np.concatenate([gene_statistics(random_genes(seed=s))["p_value"] for s in range(10)])
        assert len(p) == 3000
        for level in (0.05, 0.2, 0.5, 0.8):
            assert (p < level).mean() == pytest.approx(level, abs=0.03)

    def test_false_discovery_rate_holds(self):
        false, found = 0, 0
        for seed in range(20):
            drivers = {f"D{i}": np.full(20, 0.08 * (-1) ** i) for i in range(10)}
            q = gene_statistics(random_genes(seed=seed, **drivers))["q_value"].loc[1]
            hits = q.index[q < 0.1]
            found += len(hits)
            false += hits.str.startswith("G").sum()
        assert found > 190 and false / found < 0.13  # at 0.1, give or take what chance does

    def test_genes_are_compared_with_genes_alike(self):
        """Effects of genes that all prototypes express are ten times those of genes that few express: an effect
        that is usual among the ones stands out among the others."""
        rng = np.random.default_rng(0)
        common = {f"C{i}": rng.normal(0, 0.02) + rng.normal(0, 0.001, 20) for i in range(200)}
        rare = {f"R{i}": (rng.normal(0, 0.02) + rng.normal(0, 0.001, 5)) / 10 for i in range(200)}
        out = gene_statistics(attributions(common | rare | {"C": [0.03] * 20, "R": [0.05] * 5}))["p_value"].loc[1]
        assert out["C"] > 0.1 and out["R"] < 0.05

    def test_an_unsure_gene_does_not_stand_out(self):
        """The same mean, from all prototypes or from one of them."""
        once = np.r_[1.6, np.zeros(19)]
        out = gene_statistics(random_genes(once=once, always=np.full(20, 0.08)))["p_value"].loc[1]
        assert out["always"] < 1e-4 and out["once"] > 0.1

    def test_a_model_that_uses_nothing_else(self):
        """Exact zeros are no evidence, and no division by zero."""
        zeros = {f"G{i}": np.zeros(20) for i in range(50)}
        out = gene_statistics(attributions(zeros | {"D": np.full(20, 0.3)}))["q_value"].loc[1]
        assert out["D"] < 1e-10 and (out.drop("D") > 0.9).all()

    def test_too_few_to_compare_with(self):
        part = pd.DataFrame({"attribution": np.ones(19), "error": 0.1, "n_prototypes": 20, "change": 10.0})
        assert np.isnan(stands_out(part, 20)).all()


class TestReplicates:
    def test_bins_of_replicates(self, fed, tiny_model):
        """Other bins only where there are ties; a tenth of the genes is gone."""
        one, same, other = (replicate_bins(fed, tiny_model, seed, 0.9) for seed in (1, 1, 2))
        assert (one != same).nnz == 0 and (one != other).nnz > 0
        before = fed.layers["bins"]
        assert one.nnz / before.nnz == pytest.approx(0.9, abs=0.03)
        assert ((one > 0) > (before > 0)).nnz == 0

    def test_without_changes_they_are_the_attributions(self, fed, tiny_model, relu_sae, monkeypatch):
        from scsae_utils import significance

        monkeypatch.setattr(significance, "replicate_bins", lambda adata, *_: adata.layers["bins"].tocsr())
        config = AttributionConfig(n_prototypes=3, n_counterfactuals=3)
        table = attribute(fed, tiny_model, relu_sae, [4], config, progress=False)
        prototypes, others = cells_of_concepts(fed, tiny_model, relu_sae, [4], config)
        genes = {4: list(table["gene"].unique()[:8])}
        out = replicate_attributions(
            fed, tiny_model, relu_sae, genes, prototypes, others, 2, counterfactuals_kept=1, progress=False
        )
        means = gene_statistics(table).loc[4, "attribution"]
        np.testing.assert_allclose(out["attribution"], means[out["gene"]], atol=1e-4)
        assert len(out) == 16

    def test_replicates_differ_from_each_other(self, fed, tiny_model, relu_sae):
        prototypes, others = cells_of_concepts(fed, tiny_model, relu_sae, [4], AttributionConfig(n_prototypes=3))
        own = fed.layers["bins"][prototypes[4]].getnnz(axis=0)
        genes = {4: list(fed.var_names[own == 3][:4])}
        out = replicate_attributions(fed, tiny_model, relu_sae, genes, prototypes, others, 2, progress=False)
        wide = out.pivot(index="gene", columns="replicate", values="attribution")
        assert (wide[0] - wide[1]).abs().max() > 1e-4
        again = replicate_attributions(fed, tiny_model, relu_sae, genes, prototypes, others, 2, progress=False)
        pd.testing.assert_frame_equal(out, again)

    def test_drawing_a_bin_without_ties_changes_nothing(self, fed, tiny_model, relu_sae):
        prototypes, _ = cells_of_concepts(fed, tiny_model, relu_sae, [4], AttributionConfig(n_prototypes=1))
        row = prototypes[4][0]
        values = fed.X[row].toarray().ravel()
        unique = pd.Series(values[values > 0]).value_counts()
        tied = np.isin(values, unique.index[unique > 1]) & (values > 0)
        if not tied.any() or tied.all():
            pytest.skip("no such gene in this cell")
        genes = {4: list(fed.var_names[values > 0])}
        out = redrawn_attributions(fed, tiny_model, relu_sae, genes, prototypes, 3, progress=False)
        size = out.assign(size=out["attribution"].abs()).groupby("gene")["size"].max()
        assert size[fed.var_names[tied]].max() > 1e-4
        silent = [g for g in fed.var_names[values == 0]][:2]
        none = redrawn_attributions(fed, tiny_model, relu_sae, {4: silent}, prototypes, 1, progress=False)
        np.testing.assert_allclose(none["attribution"], 0, atol=1e-5)


def test_folders_of_other_settings_are_others(fed, tiny_model, relu_sae, tmp_path):
    config = AttributionConfig(n_prototypes=3)
    one = work_folder(tmp_path, fed, tiny_model, relu_sae, [4], config, "exact")
    assert one == work_folder(tmp_path, fed, tiny_model, relu_sae, [4], config, "exact")
    others = [
        work_folder(tmp_path, fed, tiny_model, relu_sae, [4], AttributionConfig(n_prototypes=4), "exact"),
        work_folder(tmp_path, fed, tiny_model, relu_sae, [7], config, "exact"),
        work_folder(tmp_path, fed, tiny_model, relu_sae, [4], config, "screened"),
    ]
    assert len({one, *others}) == 4 and one.parent == tmp_path


class TestQuadrants:
    def table(self):
        index = pd.MultiIndex.from_tuples([(1, g) for g in "ABCDE"], names=["concept", "gene"])
        statistics = pd.DataFrame(
            {"attribution": [0.1, -0.1, 0.001, 0.02, 0.1], "error": [0.01, 0.01, 0.0, 0.02, 0.01],
             "n_prototypes": [20, 20, 20, 20, 4]}, index=index,
        )  # fmt: skip
        expression = pd.DataFrame(
            {"log2fc": [3.0, 0.5, 4.0, 0.1, 5.0], "padj": 0.0, "never": False,
             "regulation": ["up", "", "up", "", "up"]}, index=index,
        )  # fmt: skip
        return statistics, expression

    def test_by_hand(self):
        """D has a mean above the threshold but within twice its error; E is expressed in too few prototypes."""
        out = quadrants(*self.table()).loc[1]
        assert out["quadrant"].to_dict() == dict(zip("ABCD", QUADRANTS))
        assert tuple(QUADRANT_COLORS) == QUADRANTS

    def test_effect(self):
        assert has_effect(self.table()[0], 0.01).tolist() == [True, True, False, False, True]

    def test_share_and_interval(self):
        """Concept 1 has 9 of 10, concept 2 none of 10: 0.45, and the interval knows that there are two concepts."""
        table = pd.DataFrame(
            {"concept": [1] * 10 + [2] * 10, "of": [True] * 9 + [False] * 11, "among": True}
        ).set_index("concept")
        share, low, high = share_with_interval(table, "of", "among")
        assert share == pytest.approx(0.45) and low == 0 and high == 0.9
        assert np.isnan(share_with_interval(table.assign(among=False), "of", "among")).all()


def test_expression_of_concepts_is_that_of_each(fed, tiny_model, relu_sae):
    from scsae_utils.expression import differential_expression

    prototypes, others = cells_of_concepts(fed, tiny_model, relu_sae, [4, 7], AttributionConfig(n_prototypes=8))
    both = expression_of_concepts(fed, prototypes, others, 1, 0.9, progress=False)
    alone = differential_expression(fed, prototypes[7], np.setdiff1d(others[7], prototypes[7]), 1, 0.9)
    pd.testing.assert_frame_equal(both.loc[7], alone, check_names=False)


def test_driver_table_is_flat_and_opens_again(tmp_path):
    statistics = gene_statistics(random_genes())
    tags = pd.Series({(1, "G0"): "redundant"}, name="tag").rename_axis(["concept", "gene"])
    driver_table(statistics, tags).to_parquet(tmp_path / "drivers.parquet")
    table = pd.read_parquet(tmp_path / "drivers.parquet")
    assert table.columns.tolist() == (
        "concept gene attribution error p_value q_value sign tag method n_prototypes selected".split()
    )
    assert len(table) == 300 and table.set_index("gene")["tag"].dropna().to_dict() == {"G0": "redundant"}
