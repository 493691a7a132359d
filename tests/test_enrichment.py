"""Enrichment against a panel: parity with gseapy and scipy, every testable set counts, random lists are alike."""

import gseapy
import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact

from scsae_utils.enrichment import best_of_random, over_representation, random_lists

PANEL = [f"G{i}" for i in range(200)]


@pytest.fixture(scope="module")
def sets():
    """60 random sets of 2 to 30 genes; some of their genes are not on the panel."""
    rng = np.random.default_rng(0)
    everything = [*PANEL, *(f"X{i}" for i in range(50))]
    return {f"set {i}": list(rng.choice(everything, rng.integers(2, 31), replace=False)) for i in range(60)}


GENES = PANEL[:25]


class TestOverRepresentation:
    def test_p_values_are_those_of_gseapy_and_of_fishers_exact_test(self, sets):
        ours = over_representation(GENES, sets, PANEL, min_genes=1).set_index("set")
        theirs = gseapy.enrich(GENES, sets, background=PANEL, outdir=None).res2d.set_index("Term")
        assert len(theirs) > 30
        np.testing.assert_allclose(ours.loc[theirs.index, "pvalue"], theirs["P-value"], rtol=1e-12)
        assert (ours.loc[theirs.index, ["count", "size"]].astype(str).agg("/".join, axis=1) == theirs["Overlap"]).all()
        for name in theirs.index[:10]:
            a, m = ours.loc[name, ["count", "size"]]
            table = [[a, m - a], [len(GENES) - a, len(PANEL) - len(GENES) - m + a]]
            assert ours.loc[name, "pvalue"] == pytest.approx(fisher_exact(table, "greater").pvalue)

    def test_q_values_count_sets_without_a_hit_which_gseapy_leaves_out(self, sets):
        ours = over_representation(GENES, sets, PANEL, min_genes=1).set_index("set")
        theirs = gseapy.enrich(GENES, sets, background=PANEL, outdir=None).res2d.set_index("Term")
        missed = ours[ours["count"] == 0]
        assert len(missed) > 0 and (missed["pvalue"] == 1).all() and not set(missed.index) & set(theirs.index)
        hit = {name: sets[name] for name in theirs.index}
        same = over_representation(GENES, hit, PANEL, min_genes=1).set_index("set")
        np.testing.assert_allclose(same.loc[theirs.index, "qvalue"], theirs["Adjusted P-value"], rtol=1e-12)
        assert (ours.loc[theirs.index, "qvalue"] >= theirs["Adjusted P-value"] - 1e-12).all()

    def test_counts_by_hand(self):
        sets = {"a": ["G0", "G1", "G2", "G2", "elsewhere"], "b": ["G1", "G9"], "none": ["elsewhere"]}
        table = over_representation(["G2", "G1"], sets, PANEL[:10]).set_index("set")
        assert list(table.index) == ["a", "b"]
        assert table.loc["a", ["count", "size", "genes"]].tolist() == [2, 3, "G2,G1"]  # in the order of the list
        assert table.loc["a", "expected"] == pytest.approx(3 * 2 / 10)
        assert table.loc["a", "pvalue"] == pytest.approx(3 / 45)  # (3 choose 2) / (10 choose 2)
        assert table.loc["a", "qvalue"] == table.loc["a", "pvalue"]  # the only set with three genes on the panel
        assert table.loc["b", "count"] == 1 and np.isnan(table.loc["b", "pvalue"])

    def test_the_background_matters(self, sets):
        everything = [*PANEL, *(f"other {i}" for i in range(20_000))]
        small = over_representation(GENES, sets, PANEL)["qvalue"]
        assert over_representation(GENES, sets, everything)["qvalue"].min() < 1e-3 < small.min()

    def test_random_lists_give_a_second_p_value(self):
        random = np.array([["G0", "G5"], ["G6", "G7"], ["G1", "G2"]])
        table = over_representation(["G0", "G1"], {"a": ["G0", "G1", "G2"]}, PANEL, random=random)
        assert table.loc[0, "p_random"] == pytest.approx((1 + 1) / (1 + 3))

    @pytest.mark.parametrize(
        "genes, sets, message",
        [
            ([], {"a": PANEL}, "empty"),
            (["G0", "Z"], {"a": PANEL}, "1 genes are not in the panel.*: Z"),
            (["G0", "G0"], {"a": PANEL}, "more than once: G0"),
            ("G0", {"a": PANEL}, "not the single string"),
            (["G0"], {"a": ["Z"]}, "none of the 1 sets has a gene of the panel"),
            (["G0"], {}, "none of the 0 sets"),
        ],
    )
    def test_errors(self, genes, sets, message):
        with pytest.raises(ValueError, match=message):
            over_representation(genes, sets, PANEL)


class TestRandomLists:
    def test_are_lists_of_the_panel_without_repetition(self):
        lists = random_lists(GENES, PANEL, 50)
        assert lists.shape == (50, 25) and set(lists.ravel()) <= set(PANEL)
        assert all(len(set(one)) == 25 for one in lists)
        assert (lists != random_lists(GENES, PANEL, 50, seed=1)).any()
        assert (lists == random_lists(GENES, PANEL, 50)).all()

    def test_are_alike_in_expression(self):
        expression = pd.Series(np.arange(200.0), PANEL)
        listed = PANEL[180:]  # the most expressed
        matched = random_lists(listed, PANEL, 50, expression)
        assert expression[matched.ravel()].min() >= 180
        assert expression[random_lists(listed, PANEL, 50).ravel()].mean() == pytest.approx(99.5, abs=5)

    def test_ties_in_expression_do_not_follow_the_order_of_the_panel(self):
        drawn = random_lists(["G0"], PANEL, 400, np.zeros(200))[:, 0]
        assert len(set(drawn)) <= 20  # one bin of ten
        assert np.ptp([int(g[1:]) for g in drawn]) > 100  # from all over the panel

    def test_expression_must_fit_the_panel(self):
        with pytest.raises(ValueError, match="one value for each of 200 genes"):
            random_lists(GENES, PANEL, expression=[1.0, 2.0])


class TestBestOfRandom:
    def test_random_lists_seldom_find_a_set(self, sets):
        found = best_of_random(random_lists(GENES, PANEL, 400), sets, PANEL)
        assert len(found) == 400 and ((found["best"] < 0.05) == (found["n_found"] > 0)).all()
        assert (found["n_found"] > 0).mean() < 0.08

    def test_a_list_that_is_a_set_is_found(self, sets):
        wanted = next(name for name in sets if len(set(sets[name]) & set(PANEL)) > 15)
        genes = [gene for gene in sets[wanted] if gene in PANEL]
        assert over_representation(genes, sets, PANEL).loc[0, "set"] == wanted
        assert best_of_random([genes], sets, PANEL).loc[0, "n_found"] >= 1
