"""Names of concepts: what goes into one, what it falls back to, and how far its genes explain the concept."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from sklearn.metrics import roc_auc_score

from scsae_utils import names
from scsae_utils.enrichment import plain
from scsae_utils.names import NameConfig, auroc, auroc_interval, driver_genes, name_concepts

B = ["CD79A", "CD79B", "MS4A1", "CD19"]
PANEL = [*B, *(f"G{i}" for i in range(96))]
SETS = {"enriched in B cells (I) (M47.0)": B, **{f"set {i}": PANEL[i : i + 6] for i in range(8, 90, 6)}}


@pytest.fixture
def cells():
    """200 cells, every fifth held out; the B genes are high in cells 0 to 59."""
    rng = np.random.default_rng(0)
    X = rng.gamma(1.0, 1.0, (200, 100)) * (rng.random((200, 100)) < 0.5)
    X[:60, :4] += 3
    split = np.where(np.arange(200) % 5 == 0, "validation", "train")
    adata = AnnData(sparse.csr_matrix(X.astype(np.float32)), var=pd.DataFrame(index=PANEL))
    adata.obs["split"] = split
    return adata


@pytest.fixture
def concepts(cells):
    """Concept 0 is active in the B cells, 1 in random cells, 2 in one cell, 3 never."""
    rng = np.random.default_rng(1)
    U = np.zeros((200, 4), np.float32)
    U[:60, 0] = rng.uniform(1, 2, 60)
    U[rng.permutation(200)[:80], 1] = rng.uniform(1, 2, 80)
    U[7, 2] = 1
    var = {"main_type": ["CD19+ B", "Dendritic", "CD34+", ""], "kind": ["whole-cell-type", "cross-cell-type"] * 2}
    var["kind"][2:] = ["sub-cell-type", ""]
    var = pd.DataFrame(var, index=[f"concept_{j}" for j in range(4)])
    return AnnData(sparse.csr_matrix(U), obs=cells.obs.copy(), var=var)


def drivers(**genes):
    """A table of drivers: ``c0={"CD79A": 0.2}`` makes these genes of concept 0 significant."""
    rows = [(int(c[1:]), gene, value, 0.001) for c, found in genes.items() for gene, value in found.items()]
    return pd.DataFrame(rows, columns=["concept", "gene", "attribution", "q_value"])


class TestDriverGenes:
    def test_significant_ones_by_size(self):
        table = pd.concat([drivers(c0={"A": 0.1, "B": 0.3, "C": 0.2, "D": -0.25}), drivers(c0={"E": 0.9})])
        table.loc[table["gene"] == "E", "q_value"] = 0.5
        found = driver_genes(table)
        assert found["gene"].tolist() == ["B", "D", "C", "A"] and set(found["basis"]) == {"significant"}

    def test_too_few_give_way_to_the_strongest(self):
        table = drivers(c0={"A": 0.1, "B": 0.3, "C": -0.2, "D": 0.0}, c1={"A": 0.3, "B": 0.2, "C": 0.1})
        table.loc[(table["concept"] == 0) & (table["gene"] == "A"), "q_value"] = np.nan
        found = driver_genes(table, NameConfig(n_strongest=2))
        assert found.query("concept == 0")["gene"].tolist() == ["B", "A"]
        assert found.groupby("concept")["basis"].first().to_dict() == {0: "strongest", 1: "significant"}

    def test_the_papers_rule_where_there_are_no_q_values(self):
        table = drivers(c0={"A": 0.1, "B": 0.3, "C": 0.2, "D": 0.5}).drop(columns="q_value")
        found = driver_genes(table.assign(selected=[True, True, True, False]))
        assert found["gene"].tolist() == ["B", "C", "A"]

    @pytest.mark.parametrize(
        "table, message",
        [
            (drivers(c0={"A": 0.1}).drop(columns="gene"), "lacks gene"),
            (drivers(c0={"A": 0.1}).drop(columns="q_value"), "lacks q_value"),
            (pd.concat([drivers(c4={"A": 0.1})] * 2), "gene A occurs twice among the drivers of concept 4"),
        ],
    )
    def test_errors(self, table, message):
        with pytest.raises(ValueError, match=message):
            driver_genes(table)


class TestNames:
    def test_cell_type_and_gene_set(self, concepts, cells):
        row = name_concepts(concepts, cells, drivers(c0=dict.fromkeys(B, 0.2)), sets=SETS, markers=None).loc[
            "concept_0"
        ]
        assert row["name"] == "CD19+ B: genes of B cells" and row["named_by"] == "gene set"
        assert row["gene_set_q"] < 1e-4 and row["genes"] == ", ".join(B) and row["basis"] == "significant"

    def test_the_more_significant_of_gene_set_and_words(self, concepts, cells):
        words = pd.Series({gene: {"other"} for gene in PANEL})
        table = drivers(c0=dict.fromkeys([*B, "G7", "G8"], 0.2))
        words[["G7", "G8", *B]] = [{"immunoglobulin", "other"}] * 6  # six of six, the set has four
        row = name_concepts(concepts, cells, table, words, SETS, None).loc["concept_0"]
        assert row["name"] == "CD19+ B: immunoglobulin" and row["named_by"] == "words"
        assert row["gene_set"] and row["words_q"] < row["gene_set_q"]

    def test_markers_where_there_is_nothing_else(self, concepts, cells):
        row = name_concepts(concepts, cells, drivers(c1=dict.fromkeys(B, 0.2)), None, None, {"B cells": B}).iloc[0]
        assert row["name"] == "markers of B cells" and row["named_by"] == "markers" and row["cell_type"] == ""

    def test_with_nothing_significant_the_cell_type_or_the_number(self, concepts, cells):
        scattered = dict.fromkeys(["G3", "G30", "G50", "G70"], 0.2)
        table = name_concepts(concepts, cells, drivers(c0=scattered, c1=scattered), sets=SETS)
        assert table["name"].tolist() == ["CD19+ B", "concept 1 (cross-cell-type)"]
        assert (table["named_by"] == "").all() and table["gene_set_q"].isna().all()

    def test_genes_that_hold_back_do_not_name(self, concepts, cells):
        table = drivers(c1=dict.fromkeys(B, -0.2) | dict.fromkeys(["G3", "G30", "G50"], 0.1))
        row = name_concepts(concepts, cells, table, sets=SETS, markers=None).iloc[0]
        assert row["named_by"] == "" and row["genes"].startswith("-CD79A, ")

    def test_concepts_without_a_driver_or_a_cell(self, concepts, cells):
        table = name_concepts(concepts, cells, drivers(c2={"CD79A": -0.2}, c3=dict.fromkeys(B, 0.1)), sets=SETS)
        assert table.loc["concept_2", ["name", "genes", "basis"]].tolist() == ["CD34+", "", ""]
        assert table.loc["concept_3", "name"] == "genes of B cells"
        assert table["auroc"].isna().all() and (table["n_active"] == 0).all()

    def test_a_significant_set_that_random_genes_of_like_expression_have_too_does_not_name(self, concepts, cells):
        """The ten most expressed genes are the set: any ten genes of such expression are."""
        X = cells.X.toarray()
        X[:, :10] += 50
        cells.X = sparse.csr_matrix(X)
        table = drivers(c0=dict.fromkeys(PANEL[:6], 0.2))
        row = name_concepts(concepts, cells, table, sets={"ribosome": PANEL[:10], **SETS}, markers=None).iloc[0]
        assert row["gene_set"] != "ribosome"

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda c, a, d: (c[::-1], a, d), "other cells"),
            (lambda c, a, d: (c, a, d.assign(concept=9)), "concepts that are not there: concept_9"),
            (lambda c, a, d: (c, a, d.assign(gene=["Z", "Y", "X", "W"])), "not in the panel.*Z"),
        ],
    )
    def test_errors(self, concepts, cells, change, message):
        with pytest.raises(ValueError, match=message):
            name_concepts(*change(concepts, cells, drivers(c0=dict.fromkeys(B, 0.2))), sets=SETS)

    @pytest.mark.parametrize("settings", [{"max_q": 0}, {"n_strongest": 0}, {"n_random": 10}])
    def test_settings_are_checked(self, settings):
        with pytest.raises(ValueError, match="max_q|n_random"):
            NameConfig(**settings)

    @pytest.mark.parametrize(
        "name, short",
        [
            ("enriched in B cells (I) (M47.0)", "genes of B cells"),
            ("T cell surface signature (S0)", "T cell surface signature"),
            ("antigen presentation (lipids and proteins) (M28)", "antigen presentation (lipids and proteins)"),
            ("Astrocyte Development (GO:0014002)", "Astrocyte Development"),
            ("REACTOME_MHC_CLASS_II_ANTIGEN_PRESENTATION", "mhc class ii antigen presentation"),
        ],
    )
    def test_gene_sets_in_plain_words(self, name, short):
        assert plain(name) == short


def test_a_panel_without_any_known_marker_can_be_named(concepts, cells):
    table = name_concepts(
        concepts, cells, drivers(c0=dict.fromkeys(B, 0.2)), sets=SETS, markers={"T": ["CD3D", "CD3E"]}
    )
    assert table.loc["concept_0", "named_by"] == "gene set" and table.loc["concept_0", "markers"] == ""


class TestScore:
    def test_is_the_auroc_of_signed_mean_expression_on_held_out_cells(self, concepts, cells):
        weights = {"CD79A": 0.3, "G1": -0.2, "MS4A1": 0.1, "G2": 0.1}
        row = name_concepts(concepts, cells, drivers(c0=weights)).iloc[0]
        activation = concepts.X[:, 0].toarray().ravel()
        held_out = (cells.obs["split"] == "validation").to_numpy()
        held_out[np.argsort(-activation, kind="stable")[:20]] = False  # the prototypes chose the drivers
        X = cells[:, list(weights)].X.toarray()
        train = X[(cells.obs["split"] == "train").to_numpy()]
        value = ((X - train.mean(0)) / train.std(0)) @ [1, -1, 1, 1]
        assert row["auroc"] == pytest.approx(roc_auc_score(activation[held_out] > 0, value[held_out]))
        assert row["n_active"] == (activation[held_out] > 0).sum() and 0 < row["n_active"] < 12
        assert row["auroc_low"] < row["auroc"] <= row["auroc_high"] and row["auroc_random"] < row["auroc"]

    def test_genes_that_have_nothing_to_do_with_it_are_no_better_than_random_ones(self, concepts, cells):
        row = name_concepts(concepts, cells, drivers(c1=dict.fromkeys(["G5", "G9", "G11"], 0.2))).iloc[0]
        assert row["auroc_low"] < 0.5 < row["auroc_high"] and row["auroc"] < row["auroc_random"]

    def test_of_many_cells_some_are_asked(self, concepts, cells, monkeypatch):
        of_all = name_concepts(concepts, cells, drivers(c1={"G5": 0.2, "G9": 0.1})).iloc[0]
        monkeypatch.setattr(names, "SCORED", 5)
        of_some = name_concepts(concepts, cells, drivers(c1={"G5": 0.2, "G9": 0.1})).iloc[0]
        assert of_all["n_active"] > 5 and of_some["n_active"] == 5
        assert of_some["auroc_high"] - of_some["auroc_low"] > of_all["auroc_high"] - of_all["auroc_low"]

    def test_auroc_is_that_of_sklearn(self):
        rng = np.random.default_rng(0)
        values, active = rng.integers(0, 5, (60, 7)), rng.random(60) < 0.3  # many ties
        expected = [roc_auc_score(active, column) for column in values.T]
        np.testing.assert_allclose(auroc(values, active), expected)

    def test_the_interval_covers_the_truth_in_95_percent(self):
        """Two normal distributions one standard deviation apart: the area is Phi(1 / sqrt 2) = 0.760."""
        rng = np.random.default_rng(0)
        inside = []
        for _ in range(1500):
            area = auroc(np.r_[rng.normal(1, 1, 12), rng.normal(0, 1, 60)][:, None], np.arange(72) < 12)[0]
            low, high = auroc_interval(area, 12, 60)
            inside.append(low <= 0.7602 <= high)
        assert 0.93 < np.mean(inside) < 0.98

    def test_an_interval_has_a_width_at_the_ends(self):
        low, high = auroc_interval(1.0, 3, 50)
        assert 0.3 < low < 0.95 and high == 1
        assert auroc_interval(0.0, 3, 50) == pytest.approx((0, 1 - low))
        assert np.ptp(auroc_interval(0.7, 30, 500)) < np.ptp(auroc_interval(0.7, 3, 50))
