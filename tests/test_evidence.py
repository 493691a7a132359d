"""Evidence for concepts: associations within cell types, lines, grades and nulls, on cases with known answers."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.stats import kstest, spearmanr

from scsae_utils import plots
from scsae_utils.attribution import AttributionConfig
from scsae_utils.concepts import KINDS, add_taxonomy
from scsae_utils.evidence import (
    LINES,
    EvidenceConfig,
    beaten,
    better_than_nothing,
    card,
    driven,
    enrichment,
    evidence_table,
    first_prototypes,
    found_again,
    generalises,
    grade,
    halves,
    line,
    match,
    meaningful,
    not_technical,
    read_cross_types,
)
from scsae_utils.nulls import Case, headline, make_cases, measure, random_directions
from scsae_utils.technical import associations, group_association, technical_covariates, within_strata


def cells(types, study=None, split=None, U=None) -> AnnData:
    """Cells x concepts; mid- and high-level types are the first letter."""
    types = [str(t) for t in types]
    obs = pd.DataFrame(
        {"cell_type": types, "cell_type_mid": [t[0] for t in types], "cell_type_high": [t[0] for t in types]}
    )
    obs["study"] = list(study) if study is not None else "one"
    obs["split"] = list(split) if split is not None else "train"
    obs.index = obs.index.astype(str)
    U = np.ones((len(types), 1)) if U is None else np.asarray(U, float)
    out = AnnData(sparse.csr_matrix(U), obs=obs)
    out.var_names = [f"concept_{j}" for j in range(U.shape[1])]
    n = (U > 0).sum(0)
    out.var = out.var.assign(n_cells=n, frequency=n / len(U), kept=n > 0)
    return out


class TestWithinStrata:
    def test_effect_and_p_by_hand(self):
        """Ranks 1 2 3 4 less 2.5 against 1 2 4 3: the sum of products is 4, of 5 at most. Under permutation its
        variance is 5 * 5 / 3, so z = 4 / 2.887 = 1.386 and p = 0.166. Weights of a single stratum cancel."""
        table = within_strata(np.array([[0.0], [2], [5], [9]]), pd.DataFrame({"x": [1, 2, 4, 3]}), ["a"] * 4, 1)
        row = table.loc[(0, "x")]
        assert row["effect"] == pytest.approx(0.8) and row["p_value"] == pytest.approx(0.1659, abs=1e-4)
        assert row["low"] == pytest.approx(0.8 - 1.96 * np.sqrt(25 / 3) / 5, abs=1e-4) and row["high"] == 1
        assert row["informative"] == 1  # three cells are active, one is silent

    def test_one_stratum_without_ties_is_spearman(self):
        rng = np.random.default_rng(0)
        u, x = rng.random(40), rng.random(40)
        table = within_strata(u[:, None], pd.DataFrame({"x": x}), ["a"] * 40, 0)
        assert table["effect"].item() == pytest.approx(spearmanr(u, x).statistic)

    def test_a_concept_on_or_off_gives_two_auc_less_one(self):
        """Active cells have x = 4 and 2, silent ones 1 and 3: 3 of 4 pairs are in order, AUC 0.75."""
        table = within_strata(np.array([[1.0], [0], [0], [1]]), pd.DataFrame({"x": [4, 1, 3, 2]}), ["a"] * 4, 1)
        assert table["effect"].item() == pytest.approx(0.5)

    def test_simpson(self):
        """Type a is in study one, b in two, and the concept is that of b. Across all cells it is the study; within
        types there is nothing to compare. With ten cells of each in both studies, nothing remains of it."""
        types = np.repeat(["a", "b"], 60)
        study = np.where(types == "a", "one", "two")
        U = (types == "b")[:, None] * np.random.default_rng(0).random((120, 1))
        assert np.isnan(group_association(U, study, types)["effect"]).all()
        assert group_association(U, study, ["all"] * 120)["effect"].item() > 0.9
        study[[*range(10), *range(60, 70)]] = ["two"] * 10 + ["one"] * 10
        inside = group_association(U, study, types).iloc[0]
        assert inside["informative"] == 0  # every b is active, every a silent
        U[::2] = 0
        inside = group_association(U, study, types).iloc[0]
        assert abs(inside["effect"]) < 0.4 and inside["p_value"] > 0.05

    def test_p_values_are_uniform_where_there_is_nothing(self):
        rng = np.random.default_rng(1)
        U = sparse.random(300, 400, 0.1, random_state=1).toarray()
        x = pd.DataFrame({"x": rng.random(300)})
        p = within_strata(U, x, rng.integers(4, size=300))["p_value"]
        assert kstest(p, "uniform").pvalue > 0.01 and (p < 0.05).mean() == pytest.approx(0.05, abs=0.03)

    def test_many_concepts_are_ranked_in_parts(self, monkeypatch):
        rng = np.random.default_rng(2)
        U, x = sparse.random(90, 12, 0.3, random_state=2), pd.DataFrame(rng.random((90, 2)), columns=["x", "y"])
        strata = rng.integers(3, size=90)
        whole = within_strata(U, x, strata, 1)
        monkeypatch.setattr("scsae_utils.technical.DENSE", 100)
        pd.testing.assert_frame_equal(within_strata(U, x, strata, 1), whole)

    def test_studies_that_differ_within_a_type_are_found(self):
        """Three studies: the p-value counts that three were tried."""
        study = np.tile(["one", "two", "three"], 40)
        U = (study == "two").astype(float)[:, None]
        row = group_association(U, study, ["a"] * 120).iloc[0]
        assert row["effect"] == pytest.approx(1) and row["value"] == "two"
        single = within_strata(U, pd.DataFrame({"two": study == "two"}).astype(float), ["a"] * 120)
        assert row["p_value"] == pytest.approx(3 * single["p_value"].item())


@pytest.fixture(scope="module")
def planted():
    """Types a1 and a2 in both studies, b in one. Concepts: library size, study, nothing, b."""
    rng = np.random.default_rng(0)
    types = np.repeat(["a1", "a2", "b"], 100)
    study = np.where((types != "b") & (np.arange(300) % 2 == 0), "two", "one")
    size = rng.random(300)
    U = np.c_[np.maximum(size - 0.5, 0), study == "two", rng.random(300) * (rng.random(300) < 0.5), types == "b"]
    out = cells(types, study, np.where(np.arange(300) % 5 == 0, "validation", "train"), U)
    return out, associations(out.X, out.obs, pd.DataFrame({"library size": size}))


class TestTechnical:
    def test_planted(self, planted):
        verdict = planted[1]["verdict"].unstack()
        assert verdict.loc[0].to_dict() == {"library size": "associated", "study": "free"}
        assert verdict.loc[1].to_dict() == {"library size": "cannot be told", "study": "associated"}
        assert verdict.loc[2].to_dict() == {"library size": "free", "study": "free"}
        assert (verdict.loc[3] == "cannot be told").all()  # all of b are active, and all are of one study

    def test_line(self, planted):
        table = not_technical(*planted)
        assert table["verdict"].tolist() == ["failed", "failed", "passed", "not testable"]
        assert table["value"].iloc[0] == pytest.approx(1) and "library size" in table["note"].iloc[0]
        assert "cannot be told: library size, study" in table["note"].iloc[3]

    def test_coarser_types_can_clear_a_concept_but_not_convict_it(self):
        """a1 is in one study, a2 in the other: only the mid-level type a has both."""
        rng = np.random.default_rng(0)
        types = np.repeat(["a1", "a2"], 150)
        even, subtype = rng.random(300) * (np.arange(300) % 2), (types == "a2") * rng.random(300)
        U = np.c_[even, subtype]
        table = associations(U, cells(types, np.where(types == "a1", "one", "two")).obs, pd.DataFrame(index=range(300)))
        assert table["level"].eq("mid").all() and table["verdict"].tolist() == ["free", "cannot be told"]

    def test_few_cells_decide_nothing(self):
        """Ten active cells of 40, with a sum of ranks of 255: AUC (255 - 55) / 300, an effect of 1/3 -+ 0.42."""
        U = np.zeros((40, 1))
        U[np.arange(11, 39, 3)] = 1
        row = associations(U, cells(["a"] * 40).obs, pd.DataFrame({"x": np.arange(40)})).iloc[0]
        assert row["effect"] == pytest.approx(1 / 3) and row["high"] == pytest.approx(0.752, abs=1e-3)
        assert row["verdict"] == "undecided"

    def test_nothing_to_test(self):
        with pytest.raises(ValueError, match="nothing to test"):
            associations(np.ones((4, 1)), cells(["a"] * 4).obs, pd.DataFrame(index=range(4)))

    def test_covariates(self):
        X = sparse.csr_matrix([[1.0, 0, 3], [2, 2, 0]])
        adata = AnnData(X, obs=pd.DataFrame({"study": "one"}, index=["x", "y"]), layers={"counts": X})
        adata.var_names = ["MT-ND1", "CD3E", "LYZ"]
        table, missing = technical_covariates(adata)
        assert table["mitochondrial share"].tolist() == [0.25, 0.5]
        assert set(table) == {"mitochondrial share"}  # library size and genes are the same in both cells
        assert "3 genes" in missing["doublet score"] and "0 genes of S" in missing["cell cycle"]
        assert "same in all cells" in missing["library size"]
        adata.obs["n_counts"] = [10, 20]
        del adata.layers["counts"]
        table, missing = technical_covariates(adata)
        assert table["library size"].tolist() == [10, 20] and "not known" in missing["doublet score"]


class TestStable:
    def test_match_is_one_to_one(self):
        """Both concepts are like the first partner; the first is its twin and takes it."""
        U = sparse.csr_matrix(np.array([[1, 1.0], [2, 2], [3, 2], [0, 0]]))
        V = sparse.csr_matrix(np.array([[1, 0.0], [2, 1], [3, 0], [0, 1]]))
        reached = match(U, V)
        assert reached[0] == pytest.approx(1) and reached[1] < 0.7

    def test_counts_by_hand(self):
        rng = np.random.default_rng(0)
        U = rng.random((50, 2))
        random = [sparse.csr_matrix(rng.random((50, 2)))]
        one = sparse.csr_matrix(np.c_[U[:, 1], rng.random(50)])
        both = sparse.csr_matrix(U[:, ::-1])
        table = found_again(cells(["a"] * 50, U=U), [one, both], random)
        assert table["value"].tolist() == [0.5, 1] and table["verdict"].tolist() == ["failed", "passed"]
        assert table["note"].iloc[1].startswith("2 of 2")
        assert table["low"].iloc[1] == pytest.approx(2 / 5.8415, abs=1e-4)  # Wilson: 2 of 2
        with pytest.raises(ValueError, match="at least one"):
            found_again(cells(["a"] * 50, U=U), [], random)

    def test_what_random_dictionaries_find_as_well_is_not_stable(self):
        """Concept 0 is in every random dictionary too; concept 1 is not."""
        rng = np.random.default_rng(0)
        U = rng.random((50, 2))
        random = [sparse.csr_matrix(np.c_[U[:, 0], rng.random(50)]) for _ in range(3)]
        other = sparse.csr_matrix(U + 0.01 * rng.random(U.shape))
        table = found_again(cells(["a"] * 50, U=U), [other], random)
        assert table["verdict"].tolist() == ["failed", "passed"] and table["null"].iloc[0] == pytest.approx(1)


class TestGeneralises:
    def test_by_hand(self):
        """Concept 0 is b in both parts; concept 1 is b in training and c in held-out cells; 2 is hardly active."""
        types = ["b"] * 20 + ["c"] * 20
        split = (["train"] * 10 + ["validation"] * 10) * 2
        U = np.zeros((40, 3))
        U[:20, 0] = U[:10, 1] = U[30:, 1] = U[:11, 2] = 1
        table = generalises(add_taxonomy(cells(types, split=split, U=U)))
        assert table["verdict"].tolist() == ["passed", "failed", "not testable"]
        assert table["value"].tolist() == [1, 0, 1] and table["null"].tolist() == [0.5] * 3
        assert table["low"].iloc[0] == pytest.approx(10 / 13.8415, abs=1e-4)


class TestBetter:
    def test_beaten_by_hand(self):
        """The two null concepts of the most alike size are the first two: one is worse, one is equal."""
        share, n = beaten([0.5, np.nan], [10, 10], [0.4, 0.5, 0.9, np.nan], [9, 12, 500, 10], 2)
        assert share[0] == 0.75 and np.isnan(share[1]) and n.tolist() == [2, 2]
        share, n = beaten([0.5], [10], [np.nan], [3], 2)
        assert np.isnan(share[0]) and n[0] == 0

    def test_the_strongest_null_counts(self):
        """Types by F1, the others by attribution; a null without any is left out."""
        concepts = cells(["a"] * 4, U=np.ones((4, 2)))
        concepts.var["kind"] = [KINDS[0], KINDS[2]]
        measured = pd.DataFrame({"kind": concepts.var["kind"], "n_cells": 4, "f1": [0.9, 0], "strength": [0, 0.2]})
        weak = pd.DataFrame({"kind": KINDS[0], "n_cells": 4, "f1": [0.1] * 9 + [0.95], "strength": [0.1] * 10})
        strong = pd.DataFrame({"kind": KINDS[0], "n_cells": 4, "f1": [0.95] * 10, "strength": np.nan})
        table = better_than_nothing(concepts, measured, {"weak": weak})
        assert table["value"].tolist() == [0.9, 1] and (table["verdict"] == "passed").all()
        table = better_than_nothing(concepts, measured, {"weak": weak, "strong": strong})
        assert table["value"].tolist() == [0, 1] and table["verdict"].tolist() == ["failed", "passed"]
        assert "strong" in table["note"].iloc[0] and "attribution" in table["note"].iloc[1]


def attributions_of(values: dict[str, list[float]], concept=0) -> pd.DataFrame:
    """Gene to its attribution in each prototype, the first one the most active."""
    rows = [
        {"concept": concept, "cell": str(i), "gene": g, "activation": 9.0 - i, "attribution": v}
        for g, each in values.items()
        for i, v in enumerate(each)
    ]
    return pd.DataFrame(rows)


class TestDriven:
    def test_halves_by_hand(self):
        """Means of cells 0 and 2 are 2, 4, 6, those of 1 and 3 are 1, 3, 2: correlation 0.5."""
        table = halves(attributions_of({"x": [1, 1, 3, 1], "y": [4, 3, 4, 3], "z": [6, 2, 6, 2]}))
        assert table.loc[0, "agreement"] == pytest.approx(0.5) and table.loc[0, "n_genes"] == 3
        assert table.loc[0, "strength"] == 4 and np.isnan(table.loc[0, "other"])

    def test_the_same_genes_agree_and_other_concepts_do_not(self):
        rng = np.random.default_rng(0)
        parts = []
        for c in range(3):
            effect = rng.standard_normal(40)
            noise = rng.standard_normal((40, 6)) * (0.1 if c < 2 else 10)
            parts.append(attributions_of({f"g{i}": effect[i] + noise[i] for i in range(40)}, c))
        table = halves(pd.concat(parts))
        assert (table.loc[[0, 1], "low"] > 0.9).all() and table.loc[2, "low"] < 0.5
        assert table["other"].abs().max() < 0.5 and (table["low"] <= table["high"]).all()

    def test_line(self):
        concepts = cells(["a"] * 4, U=np.ones((4, 4)))
        table = pd.DataFrame(
            {"agreement": 0.9, "low": [0.8, 0.8, 0.4, 0.8], "high": 0.95, "other": 0.1}, index=range(4)
        )
        orders = pd.MultiIndex.from_product(
            [range(3), ["attribution", "random 0", "random 1"]], names=["concept", "order"]
        )
        areas = pd.DataFrame({"deletion": [0.3, 0.5, 0.6, 0.5, 0.6, 0.4, 0.3, 0.5, 0.6]}, index=orders)
        verdicts = driven(concepts, table, areas)["verdict"].tolist()
        # 0 agrees and is faster; 1 is slower than one random order; 2 does not agree; 3 has no curve
        assert verdicts == ["passed", "failed", "failed", "not testable"]

    def test_first_prototypes(self):
        table = first_prototypes(attributions_of({"x": [1, 2, 3], "y": [4, 5, 6]}), 2)
        assert sorted(table["attribution"]) == [1, 2, 4, 5]


class TestMeaningful:
    def test_planted_set(self):
        """Concept 0 is driven by a set, 1 by genes from everywhere, 2 by a single gene."""
        panel = pd.Index([f"g{i}" for i in range(200)])
        sets = {f"set {i}": list(panel[10 * i : 10 * i + 10]) for i in range(20)}
        rows = [(0, f"g{i}") for i in range(6)] + [(1, f"g{31 * i % 200}") for i in range(6)] + [(2, "g3")]
        drivers = pd.DataFrame(rows, columns=["concept", "gene"]).assign(attribution=0.1, q_value=0.01)
        found = enrichment(drivers, sets, panel, np.ones(200))
        assert found.loc[0, "set"] == "set 0" and found.loc[0, "p_value"] == pytest.approx(1 / 201)
        assert found.loc[1, "p_value"] > 0.05
        table = meaningful(cells(["a"] * 4, U=np.ones((4, 3))), found)
        assert table["verdict"].tolist() == ["passed", "failed", "not testable"]
        assert table["q_value"].iloc[0] == pytest.approx(2 / 201)  # of two that were tested


class TestGrade:
    def test_by_hand(self):
        """What could not be tested is not passed."""
        passed, failed, unknown = "passed", "failed", "not testable"
        verdicts = pd.DataFrame(
            [[passed] * 6, [passed] * 5 + [unknown], [passed] * 4 + [failed] * 2, [passed] * 2 + [unknown] * 4],
            columns=LINES,
        )
        table = grade(verdicts)
        assert table["grade"].tolist() == ["A", "B", "C", "D"] and table["n_passed"].tolist() == [6, 5, 4, 2]
        assert table["n_testable"].tolist() == [6, 5, 6, 2]

    def test_not_testable_wins_over_passed(self):
        assert line(["x", "y"], [True, True], [True, False])["verdict"].tolist() == ["passed", "not testable"]

    def test_readings_and_card(self, planted):
        """Library size, study, nothing (two thirds of its cells are a): taken as cross-cell-type; b: a cell type."""
        concepts, found = planted
        add_taxonomy(concepts).var["kind"] = [*[KINDS[2]] * 3, KINDS[0]]
        lines = {name: line(concepts.var_names, [True] * 4) for name in LINES}
        table = evidence_table(concepts, lines, found)
        assert table["reading"].tolist() == ["technical", "tissue or study", "lineage", ""]
        assert (table["grade"] == "A").all()
        assert card(table, 2)["verdict"].tolist() == ["passed"] * 6
        with pytest.raises(ValueError, match="no evidence for concept 9"):
            card(table, 9)
        with pytest.raises(ValueError, match="the card has the lines"):
            evidence_table(concepts, {"stable": lines["stable"]}, found)

    def test_programs_have_a_meaning_and_no_lineage(self):
        concepts = cells([f"{t}{i}" for t in "abcd" for i in range(3)] * 5, U=np.tile([[1.0, 1], [0, 0]], (30, 1)))
        concepts.obs["cell_type_high"] = concepts.obs["cell_type_mid"]
        add_taxonomy(concepts)
        free = pd.DataFrame(
            {"verdict": "free"}, index=pd.MultiIndex.from_product([[0, 1], ["study"]], names=["concept", "covariate"])
        )
        lines = {name: line(concepts.var_names, [True, False]) for name in LINES}
        assert read_cross_types(concepts, lines, free).tolist() == ["program", "unresolved"]

    def test_config(self):
        with pytest.raises(ValueError, match="max_effect must be above 0"):
            EvidenceConfig(max_effect=0)
        with pytest.raises(ValueError, match="min_cells must be at least 1"):
            EvidenceConfig(min_cells=0)


class TestNulls:
    def test_random_directions_are_as_sparse(self, embedded):
        dictionary = random_directions(embedded.obsm["X_scGPT"], 20, 3)
        assert dictionary.activations(embedded.obsm["X_scGPT"]).nnz == pytest.approx(3 * embedded.n_obs, abs=2)

    def test_all_cases_go_the_same_way(self, embedded, tiny_model, sae):
        cases, others = make_cases(embedded, tiny_model, sae, n_seeds=1, progress=False)
        assert len(others) == 1 and others[0].config.seed != sae.config.seed
        assert not cases["random dictionary"].dictionary.config.train_decoder
        some = {name: cases[name] for name in ("scGPT", "PCA")}
        done = {name: measure(case, 0.01, n_concepts=0) for name, case in some.items()}
        data, tables = ({name: pair[i] for name, pair in done.items()} for i in (0, 1))
        assert tables["scGPT"]["strength"].isna().all() and tables["scGPT"]["f1"].notna().any()
        table = headline(some, others, data, tables)
        assert list(table) == ["scGPT", "PCA"] and table.loc["concepts", "scGPT"] == len(tables["scGPT"])
        assert table.loc["variance explained"].between(-1, 1).all()

    def test_attribution_of_a_null(self, embedded, tiny_model):
        dictionary = random_directions(embedded.obsm["X_scGPT"], 12, 3)
        case = Case(embedded, tiny_model, dictionary)
        table = measure(case, 0.01, n_concepts=1, occlusion=AttributionConfig(4, 5), progress=False)[1]
        assert table["strength"].notna().sum() == 1 and table["strength"].max() > 0

    def test_noise_gets_a_low_grade(self):
        """Activations at random: no seed finds them again, no type holds, no gene set, halves that disagree."""
        rng = np.random.default_rng(0)
        U, V = (rng.random((400, 6)) * (rng.random((400, 6)) < 0.2) for _ in range(2))
        split = np.where(np.arange(400) % 4 == 0, "validation", "train")
        concepts = add_taxonomy(cells(rng.choice(["a1", "a2", "b"], 400), split=split, U=U))
        found = associations(concepts.X, concepts.obs, pd.DataFrame({"library size": rng.random(400)}))
        empty = pd.DataFrame(columns=["agreement", "low", "high", "other"], dtype=float)
        index = pd.MultiIndex.from_tuples([], names=["concept", "order"])
        areas = pd.DataFrame({"deletion": []}, index=index)
        measured = pd.DataFrame({"kind": KINDS[2], "n_cells": 80, "f1": 0.1, "strength": 0.1}, index=concepts.var_names)
        lines = {
            "stable": found_again(concepts, [sparse.csr_matrix(V)], [sparse.csr_matrix(V)]),
            "generalises": generalises(concepts),
            "not_technical": not_technical(concepts, found),
            "better": better_than_nothing(concepts, measured, {"the same": measured}),
            "driven": driven(concepts, empty, areas),
            "meaningful": meaningful(concepts, pd.DataFrame(columns=["best", "set", "null", "p_value", "n_genes"])),
        }
        table = evidence_table(concepts, lines, found)
        assert set(table["grade"]) <= {"C", "D"} and (table["grade"] == "D").mean() > 0.5
        assert (table["not_technical_verdict"] == "passed").any()


class TestFigures:
    @pytest.fixture
    def table(self):
        verdicts = {f"{name}_verdict": ["passed", "failed", "not testable"] for name in LINES}
        kinds = {"kind": [KINDS[0], KINDS[2], KINDS[2]], "reading": ["", "program", "technical"]}
        return pd.DataFrame(kinds | {"n_passed": [6, 0, 0], "grade": ["A", "D", "D"]} | verdicts)

    def test_real_and_null(self):
        tables = {
            "scGPT": pd.DataFrame({"f1": [0.2, 0.4, 0.9], "x": 1.0}),
            "PCA": pd.DataFrame({"f1": [0.1], "x": np.nan}),
        }
        fig = plots.real_and_null(tables, {"f1": "F1", "x": "something"})
        first, second = fig.axes
        assert [t.get_text() for t in first.get_yticklabels()] == ["scGPT (3)", "PCA (1)"]
        assert [line.get_xdata()[0] for line in first.lines] == [0.4, 0.1] and first.get_xlabel() == "F1"
        assert [t.get_text() for t in second.get_yticklabels()] == ["scGPT (3)"]  # nothing is known of the null

    def test_grades(self, table):
        ax = plots.grades_by_kind(table).axes[0]
        names = ["whole-cell-type (1)", "cross-cell-type (2)", "↳ program (1)", "↳ technical (1)"]
        assert [t.get_text() for t in ax.get_yticklabels()] == names
        assert [bar.get_width() for bar in ax.containers[0]] == [1, 0, 0, 0]  # grade A
        assert ax.get_xlabel() == "share of the concepts"

    def test_lines(self, table):
        ax = plots.lines_by_kind(table).axes[0]
        np.testing.assert_array_equal(ax.images[0].get_array(), np.repeat([[0], [1], [2]], 6, axis=1))
        assert [t.get_text() for t in ax.get_yticklabels()] == ["whole-cell-type (1)", "program (1)", "technical (1)"]
        assert "not technical" in [t.get_text() for t in ax.get_xticklabels()]

    def test_associations(self, planted):
        ax = plots.association_strip(planted[1]).axes[0]
        assert [t.get_text() for t in ax.get_yticklabels()] == ["library size", "study"]
        legend = [t.get_text() for t in ax.get_legend().get_texts()]
        assert legend == ["associated (2)", "undecided (0)", "free (3)", "cannot be told (3)"]
