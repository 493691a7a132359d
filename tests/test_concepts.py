"""Cells x concepts: Table 2 and the taxonomy on cases small enough for pencil and paper."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from scsae_utils.cells import UNASSIGNED
from scsae_utils.concepts import (
    KINDS,
    active_counts,
    add_taxonomy,
    attributable,
    best_concept_for_type,
    check_concept,
    choose_by_types,
    concept_data,
    concepts_to_attribute,
    kept,
    map_concepts,
    number,
    overlap,
    sae_metrics,
    score_types,
    taxonomy,
    type_shares,
    wilson,
)
from scsae_utils.sae import SAE, SAEConfig

MID = {"cm": "mono", "nm": "mono", "mac": "mac", "b": "b", "cd4": "t", "cd8": "t", UNASSIGNED: UNASSIGNED}
HIGH = {"mono": "myeloid", "mac": "myeloid", "b": "lymphoid", "t": "lymphoid", UNASSIGNED: UNASSIGNED}


def make(types, *active, split=None) -> AnnData:
    """Cells of these low-level types; one concept for each list of rows that activate it."""
    X = np.zeros((len(types), len(active)), np.float32)
    for j, rows in enumerate(active):
        X[list(rows), j] = 1 + np.arange(len(rows))
    obs = pd.DataFrame({"cell_type": types}, index=[f"cell{i}" for i in range(len(types))])
    obs["cell_type_mid"] = obs["cell_type"].map(MID)
    obs["cell_type_high"] = obs["cell_type_mid"].map(HIGH)
    if split:
        obs["split"] = split
    n_cells = (X > 0).sum(0)
    var = pd.DataFrame({"n_cells": n_cells, "kept": n_cells > 1}, index=[f"concept_{j}" for j in range(len(active))])
    return AnnData(sparse.csr_matrix(X), obs=obs.astype("category"), var=var)


def one(types, rows) -> pd.Series:
    """The taxonomy of a single concept."""
    return taxonomy(make(types, rows)).iloc[0]


class TestTable2:
    @pytest.fixture
    def four_cells(self):
        """Identity encoder and decoder of three concepts, the last of them never active; four cells of two values."""
        sae = SAE(SAEConfig(n_concepts=3), 2)
        with torch.no_grad():
            sae.W_d.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 1]]))
            sae.W_e.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
            sae.b_d.zero_()
        cells = AnnData(np.zeros((4, 1)), obsm={"X_scGPT": np.array([[1.0, 0], [2, -1], [3, 2], [1, 4]], np.float32)})
        cells.obs["split"] = ["train", "train", "validation", "validation"]
        cells.obs["cell_type"] = ["A", "B", "A", "A"]
        return cells, sae

    def test_concept_data(self, four_cells):
        """Negative values are cut off: concept 0 is 1, 2, 3, 1 and concept 1 is 0, 0, 2, 4."""
        concepts = concept_data(*four_cells, min_frequency=0.6)
        assert concepts.X.toarray().tolist() == [[1, 0, 0], [2, 0, 0], [3, 2, 0], [1, 4, 0]]
        assert concepts.var["n_cells"].tolist() == [4, 2, 0]
        assert concepts.var["frequency"].tolist() == [1, 0.5, 0]
        assert concepts.var["max_activation"].tolist() == [3, 4, 0]
        assert concepts.var["mean_activation"].tolist() == [1.75, 3, 0]
        assert concepts.var["kept"].tolist() == [True, False, False]
        assert concept_data(*four_cells, min_frequency=0.5).var["kept"].tolist() == [True, True, False]
        assert concept_data(*four_cells, min_frequency=0).var["kept"].tolist() == [True, True, False]
        assert concepts.varm["vectors"].tolist() == [[1, 0], [0, 1], [0, 1]]

    def test_metrics_by_hand(self, four_cells):
        """Training: (2, -1) comes back as (2, 0), 1 of 1 squared unit is lost. Validation is perfect. Without
        concept 1 the second values are lost: (3, 2) and (1, 4) come back as (3, 0) and (1, 0), 4 + 16 of 2 + 2."""
        table = sae_metrics(concept_data(*four_cells, min_frequency=0.6), four_cells[1])
        expected = {
            "Variance explained": [0, 1, 1 - 20 / 4],
            "Concepts": [3, 3, 1],
            "Active concepts": [1, 2, 1],
            "Dead concepts": [2, 1, 0],
            "Concepts per sample": [1, 2, 1],
            "Concept activation frequency": [1, 1, 1],
            "Density": [1 / 3, 2 / 3, 1],
            "Cosine": [(1 + 2 / 5**0.5) / 2, 1, (3 / 13**0.5 + 1 / 17**0.5) / 2],
            "Reconstruction bias": [1 / 0.5, 1, 20 / 2],  # from means (1.5, -0.5) and (2, 3)
            "Neighbours kept": [1, 1, 1],  # there is but one
            "Cell type by neighbours": [0, 1, 1],
            "The same, of the embedding": [0, 1, 1],
            "Cells": [2, 2, 2],
        }
        columns = ["Training", "Validation", "Validation, post-processed"]
        assert table.columns.tolist() == columns and table.index.tolist() == list(expected)
        for name, values in expected.items():
            assert table.loc[name].tolist() == pytest.approx(values, abs=1e-6), name

    def test_frequency_times_active_concepts_is_concepts_per_sample(self, concepts, sae):
        """What the numbers of the paper's last column do not satisfy."""
        table = sae_metrics(concepts, sae).T
        product = table["Concept activation frequency"] * table["Active concepts"]
        np.testing.assert_allclose(product, table["Concepts per sample"])

    def test_of_real_cells(self, embedded, sae, concepts):
        assert (concepts.X != sae.activations(embedded.obsm["X_scGPT"])).nnz == 0
        np.testing.assert_array_equal(concepts.var["n_cells"], (concepts.X.toarray() > 0).sum(0))
        assert concepts.obs["cell_type"].equals(embedded.obs["cell_type"]) and "X_scGPT" in concepts.obsm
        assert kept(concepts).n_vars == concepts.var["kept"].sum() > 2


class TestTaxonomy:
    def test_whole_cell_type(self):
        """9 of 10 active cells are b (0.9), 9 of all 10 b are active (0.9)."""
        row = one(["b"] * 10 + ["cm"] * 10, range(1, 11))
        assert (row["main_type"], row["level"], row["kind"]) == ("b", "low", "whole-cell-type")
        assert (row["specificity"], row["sensitivity"], row["f1"]) == pytest.approx((0.9, 0.9, 0.9))

    def test_sub_cell_type(self):
        """All 4 active cells are b, but b has 10 cells."""
        row = one(["b"] * 10 + ["cm"] * 10, range(4))
        assert (row["main_type"], row["kind"]) == ("b", "sub-cell-type")
        assert (row["specificity"], row["sensitivity"], row["f1"]) == pytest.approx((1, 0.4, 2 * 0.4 / 1.4))

    def test_cross_cell_type_has_its_most_frequent_low_type(self):
        """Of 10 active cells 7 are b and 3 are cm: 0.7 at every level."""
        row = one(["b"] * 10 + ["cm"] * 10, [*range(7), 10, 11, 12])
        assert (row["main_type"], row["level"], row["kind"]) == ("b", "low", "cross-cell-type")
        assert (row["specificity"], row["sensitivity"]) == pytest.approx((0.7, 0.7))

    def test_the_mid_level_is_next(self):
        """5 cm and 5 nm: no low type exceeds 0.8, together they are mono."""
        row = one(["cm"] * 5 + ["nm"] * 5 + ["b"] * 10, range(10))
        assert (row["main_type"], row["level"], row["kind"]) == ("mono", "mid", "whole-cell-type")
        assert (row["specificity"], row["sensitivity"]) == (1, 1)

    def test_then_the_high_level(self):
        row = one(["cm"] * 5 + ["mac"] * 5 + ["cd4"] * 5 + ["b"] * 5, [*range(10, 14), *range(16, 20)])
        assert (row["main_type"], row["level"], row["kind"]) == ("lymphoid", "high", "sub-cell-type")
        assert (row["specificity"], row["sensitivity"]) == (1, 0.8)  # 0.8 does not exceed 0.8

    def test_the_lowest_level_wins(self):
        """All cm: also all mono and all myeloid, but the specific name counts, with its own sensitivity."""
        row = one(["cm"] * 10 + ["nm"] * 10, range(9))
        assert (row["main_type"], row["level"], row["sensitivity"]) == ("cm", "low", 0.9)

    def test_the_threshold_itself_is_not_enough(self):
        row = one(["b"] * 8 + ["cm"] * 2, range(10))  # 0.8 b
        assert (row["specificity"], row["kind"]) == (0.8, "cross-cell-type")  # not 0.800000012, as in 32 bits
        assert taxonomy(make(["b"] * 8 + ["cm"] * 2, range(10)), 0.79)["kind"].item() == "whole-cell-type"

    def test_unlabelled_cells_count_but_are_nobodys_type(self):
        """9 of 10 active cells have no label: the tenth is a tenth."""
        row = one([UNASSIGNED] * 9 + ["b"], range(10))
        assert (row["main_type"], row["specificity"], row["sensitivity"]) == ("b", 0.1, 1)
        assert row["kind"] == "cross-cell-type"

    def test_a_concept_of_unlabelled_cells_alone_has_no_type(self):
        row = one([UNASSIGNED] * 5 + ["b"] * 5, range(5))
        assert (row["main_type"], row["level"], row["kind"]) == ("", "", "cross-cell-type")
        assert (row["specificity"], row["sensitivity"], row["f1"]) == (0, 0, 0)
        row = one([UNASSIGNED] * 5, range(3))
        assert (row["main_type"], row["kind"]) == ("", "cross-cell-type")

    def test_silent_concepts_have_no_kind(self):
        row = one(["b"] * 3, [])
        assert (row["main_type"], row["kind"]) == ("", "") and np.isnan(row["specificity"])

    def test_shares_by_hand(self):
        concepts = make(["cm", "cm", "nm", "b"], [0, 2, 3], [])
        assert type_shares(concepts).to_dict("index") == {
            "concept_0": pytest.approx({"b": 1 / 3, "cm": 1 / 3, "nm": 1 / 3}),
            "concept_1": {"b": 0, "cm": 0, "nm": 0},
        }
        assert type_shares(concepts, "mid").loc["concept_0"].to_dict() == pytest.approx({"b": 1 / 3, "mono": 2 / 3})
        counts, sizes = active_counts(concepts, "low")
        assert counts.loc["concept_0"].to_dict() == {"b": 1, "cm": 1, "nm": 1} and sizes["cm"] == 2
        with pytest.raises(ValueError, match="low, mid, high"):
            type_shares(concepts, "middle")

    def test_of_real_cells(self, concepts):
        active = concepts.var["n_cells"] > 0
        assert concepts.var.loc[active, "kind"].isin(KINDS).all() and (concepts.var.loc[~active, "kind"] == "").all()
        assert (concepts.var["main_type"] != UNASSIGNED).all()
        named = concepts.var[active & (concepts.var["level"] == "low")]
        for name, row in named.iterrows():  # the definition, in other words
            on = concepts[:, name].X.toarray().ravel() > 0
            is_type = (concepts.obs["cell_type"] == row["main_type"]).to_numpy()
            assert row["specificity"] == pytest.approx((on & is_type).sum() / on.sum())
            assert row["sensitivity"] == pytest.approx((on & is_type).sum() / is_type.sum())


def test_wilson_by_hand():
    """Of 10 all or none: z^2 / (10 + z^2) away from the end; 8 of 10 as in Wilson's formula; of none anything."""
    low, high = wilson([10, 0, 8, 0], [10, 10, 10, 0])
    np.testing.assert_allclose(low, [10 / 13.8415, 0, 0.49016, 0], atol=1e-5)
    np.testing.assert_allclose(high, [1, 3.8415 / 13.8415, 0.94332, 1], atol=1e-5)


class TestHeldOut:
    def test_scores_by_hand(self):
        """Two of three active cells are b, two of four b are active: F1 = 2 * 2 / (3 + 4)."""
        concepts = make(["b"] * 4 + ["cm"] * 4, [0, 1, 4])
        main = pd.DataFrame({"main_type": ["b"], "level": ["low"]}, index=["concept_0"])
        row = score_types(concepts, main).iloc[0]
        scores = row[["specificity", "sensitivity", "f1", "n_active"]].to_dict()
        assert scores == pytest.approx({"specificity": 2 / 3, "sensitivity": 0.5, "f1": 4 / 7, "n_active": 3})
        # 2 of 3: (2 + z^2 / 2 -+ z sqrt(2 / 3 + z^2 / 4)) / (3 + z^2), with z^2 = 3.8415
        assert (row["specificity_low"], row["specificity_high"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)
        assert (row["sensitivity_low"], row["sensitivity_high"]) == pytest.approx((0.1500, 0.8500), abs=1e-4)

    def test_a_concept_that_stays_silent_scores_zero_and_not_missing(self):
        """A mean over missing scores would leave out the worst concepts."""
        concepts = make(["b"] * 4 + ["cm"] * 4, [], [5])
        main = pd.DataFrame({"main_type": ["b", "b"], "level": "low"}, index=["concept_0", "concept_1"])
        scores = score_types(concepts, main)
        assert scores["f1"].tolist() == [0, 0] and scores["sensitivity"].tolist() == [0, 0]
        assert np.isnan(scores.loc["concept_0", "specificity"]) and scores.loc["concept_1", "specificity"] == 0

    def test_a_type_that_is_not_there_cannot_be_scored(self):
        main = pd.DataFrame({"main_type": ["mac"], "level": ["low"]}, index=["concept_0"])
        assert score_types(make(["b"] * 4, [0, 1]), main)[["specificity", "sensitivity", "f1"]].isna().all(axis=None)

    def test_types_are_chosen_on_training_cells_and_scored_on_the_others(self):
        """Training cells say b, the held-out ones say cm: the held-out score of b is zero."""
        types = ["b"] * 5 + ["cm"] * 5 + ["b"] * 5 + ["cm"] * 5
        concepts = make(types, [*range(5), *range(15, 20)], split=["train"] * 10 + ["validation"] * 10)
        concepts.obs["study"] = ["one"] * 18 + ["two"] * 2
        row = add_taxonomy(concepts).var.iloc[0]
        assert row["study_share"] == 0.8  # 8 of the 10 active cells
        assert (row["main_type_train"], row["f1_train"], row["f1_held_out"]) == ("b", 1, 0)
        assert row["specificity"] == 0.5 and row["kind"] == "cross-cell-type"  # over all cells

    def test_held_out_labels_do_not_change_the_choice(self, concepts):
        other = concepts.copy()
        held_out = (other.obs["split"] == "validation").to_numpy()
        labels = other.obs["cell_type"].astype(str).to_numpy()
        labels[held_out] = labels[held_out][::-1]
        other.obs["cell_type"] = pd.Categorical(labels)
        add_taxonomy(other)
        pd.testing.assert_series_equal(other.var["main_type_train"], concepts.var["main_type_train"])
        pd.testing.assert_series_equal(other.var["f1_train"], concepts.var["f1_train"])
        assert not other.var["f1_held_out"].equals(concepts.var["f1_held_out"])

    def test_can_be_done_twice(self, concepts):
        again = add_taxonomy(concepts.copy())
        pd.testing.assert_frame_equal(again.var[concepts.var.columns], concepts.var)
        assert again.var.columns.is_unique


class TestChoosing:
    @pytest.fixture
    def five(self):
        """0: all b; 1: half of b; 2: mono; 3: in one cell, dropped; 4: silent."""
        types = ["b"] * 6 + ["cm"] * 3 + ["nm"] * 3 + ["cd4"] * 3
        return make(types, range(6), range(3), range(6, 12), [13], [])

    def test_check_concept(self, five):
        assert check_concept(five, 2) == 2 and check_concept(five, "1") == 1
        with pytest.raises(ValueError, match="no concept 99: the dictionary has 0 to 4; near it: 0, 1, 2"):
            check_concept(five, 99)
        with pytest.raises(ValueError, match="no concept -1"):
            check_concept(five, -1)
        with pytest.raises(ValueError, match="concept 4 never activates"):
            check_concept(five, 4)
        with pytest.raises(ValueError, match="concept 3 is active in only 1 cells and was dropped"):
            check_concept(five, 3)
        with pytest.raises(ValueError, match="no concept survives"):
            check_concept(five[:, 3:].copy(), 3)

    def test_best_concept_for_a_type_of_any_level(self, five):
        assert best_concept_for_type(five, "b") == 0  # F1 1 against 2/3
        assert best_concept_for_type(five, "mono") == 2
        assert best_concept_for_type(five, "cm") == 2
        assert best_concept_for_type(five, "lymphoid") == 0

    def test_errors_name_near_misses(self, five):
        with pytest.raises(ValueError, match="no cell is a 'Mono'; did you mean 'mono'"):
            best_concept_for_type(five, "Mono")
        with pytest.raises(ValueError, match="types: b, cd4, cm, .*nm, t"):
            best_concept_for_type(five, "zebrafish")
        with pytest.raises(ValueError, match="no concept is active in any 'cd4' cell"):
            best_concept_for_type(five, "cd4")  # its only concept was dropped

    def test_unassigned_is_no_type_to_ask_for(self):
        with pytest.raises(ValueError, match=f"no cell is a '{UNASSIGNED}'"):
            best_concept_for_type(make([UNASSIGNED, "b"], [0, 1]), UNASSIGNED)

    def test_a_concept_that_every_cell_activates_is_passed_over(self):
        """It has no counterfactuals, though here it fits the type better than the others do."""
        types = ["b"] * 6 + ["cm"] * 2
        concepts = make(types, range(8), [0, 1, 2], [6, 7])
        assert list(attributable(concepts).var_names) == ["concept_1", "concept_2"]
        assert best_concept_for_type(concepts, "b") == 1  # F1 2/3 against 6/7
        assert concepts_to_attribute(concepts, None, "b") == ([1, 2], 1)
        assert choose_by_types(concepts, ["b"], "low", min_share=0.7) == [1]

    def test_choose_by_types(self, five):
        assert choose_by_types(five, ["b"]) == [0, 1]  # 21 of summed activation, then 6
        assert choose_by_types(five, ["b", "mono"], n=2) == [0, 2]
        assert choose_by_types(five, ["cm", "nm"], "low") == [2]
        with pytest.raises(ValueError, match="no cell is a 'monos' at the mid level; did you mean 'mono'"):
            choose_by_types(five, ["monos"])
        with pytest.raises(ValueError, match="no concept has 80% of its active cells among cm"):
            choose_by_types(five, ["cm"], "low")

    def test_a_concept_that_says_the_same_again_is_passed_over(self):
        concepts = make(["b"] * 3 + ["cm"], [0, 1, 2], [1, 2], [0, 2])  # activations (1, 2, 3), (0, 1, 2), (1, 0, 2)
        assert choose_by_types(concepts, ["b"]) == [0, 2]  # cosine with the first: 8 / sqrt(70) = 0.96 and 0.84
        assert choose_by_types(concepts, ["b"], max_cosine=1.0) == [0, 1, 2]

    def test_overlap(self):
        assert overlap({1: {"a", "b"}, 2: {"b", "c"}, 3: set()}).tolist() == pytest.approx([1 / 3, 0, 0])
        assert overlap({1: {"a"}}).tolist() == [0]

    def test_number(self):
        assert number("concept_17") == 17


class TestMap:
    def test_one_point_for_each_kept_concept(self, concepts):
        xy = map_concepts(concepts)
        assert xy.shape == (concepts.var["kept"].sum(), 2) and np.isfinite(xy).all()

    def test_too_few_concepts(self, concepts):
        with pytest.raises(ValueError, match="only 3 concepts survive"):
            map_concepts(kept(concepts)[:, :3].copy())
