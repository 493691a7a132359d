"""Several genes changed at once: against the model run by hand, and on a model whose interactions are known."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import naive

from scsae_utils import redundancy
from scsae_utils.attribution import attribute, choose_prototypes
from scsae_utils.embedding import cell_tokens, token_ids
from scsae_utils.redundancy import (
    Change,
    driver_interactions,
    interactions,
    module_genes,
    occlude_sets,
    pair_sets,
    set_losses,
    tag_genes,
)
from scsae_utils.significance import cells_of_concepts, mean_bins


@pytest.fixture(scope="module")
def rows(fed, relu_sae):
    return choose_prototypes(relu_sae.activations(fed.obsm["X_scGPT"])[:, 4].toarray().ravel(), 3)


def embeddings(*arguments) -> np.ndarray:
    """Of every change."""
    different, which = occlude_sets(*arguments)
    return different[which]


class TestOccludingSets:
    def test_equals_the_model_run_by_hand(self, fed, tiny_model):
        """Some genes get a new value, some lose their token; a gene that the cell does not express changes nothing."""
        ids, bins = token_ids(fed.var_names, tiny_model), fed.layers["bins"].tocsr()
        own = bins[7].indices
        other = np.setdiff1d(np.arange(fed.n_vars), own)[0]
        values = np.array([0, 33.3, 0, 20])
        out = embeddings(bins, ids, tiny_model, [Change(0, 7, np.r_[own[:3], other], values), Change(0, 7, own)])
        cell_ids, before = cell_tokens(bins[7], ids, tiny_model)[0]
        after = before.copy()
        after[2] = 33.3
        stays = np.ones(len(cell_ids), bool)
        stays[[1, 3]] = False
        np.testing.assert_allclose(out[0], naive(tiny_model, cell_ids[stays], after[stays]), atol=1e-6)
        np.testing.assert_allclose(out[1], naive(tiny_model, cell_ids[:1], before[:1]), atol=1e-6)  # <cls> is left

    def test_genes_that_the_model_does_not_know_change_nothing(self, fed, tiny_model):
        ids = token_ids(fed.var_names, tiny_model)
        bins = fed.layers["bins"].tocsr()
        last = int(ids.argmax())
        row = int(np.flatnonzero(bins[:, last].toarray())[0])
        unknown = ids.copy()
        unknown[0] = -1
        out = embeddings(bins[:, 1:], unknown[1:], tiny_model, [Change(0, row, np.array([], int))])
        bins = bins.tolil()
        bins[:, 0] = 0
        same = embeddings(bins.tocsr(), unknown, tiny_model, [Change(0, row, np.array([0]))])
        np.testing.assert_allclose(out, same, atol=1e-6)

    def test_equal_inputs_are_computed_once(self, fed, tiny_model, monkeypatch):
        ids, bins = token_ids(fed.var_names, tiny_model), fed.layers["bins"].tocsr()
        silent = np.setdiff1d(np.arange(fed.n_vars), bins[3].indices)
        seen = []
        encode = type(tiny_model).encode
        monkeypatch.setattr(
            type(tiny_model), "encode", lambda s, x, *a, **k: (seen.append(len(x)), encode(s, x, *a, **k))[1]
        )
        out, which = occlude_sets(bins, ids, tiny_model, [Change(j, 3, silent[: j + 1]) for j in range(5)])
        assert sum(seen) == len(out) == 1 and which.tolist() == [0] * 5

    def test_of_single_genes_it_is_the_attribution(self, fed, tiny_model, relu_sae):
        table = attribute(fed, tiny_model, relu_sae, [4, 7], n_prototypes=3, progress=False)
        from scsae_utils.attribution import AttributionConfig

        prototypes, others = cells_of_concepts(fed, tiny_model, relu_sae, [4, 7], AttributionConfig(n_prototypes=3))
        sets = {c: {g: [g] for g in table.loc[table["concept"] == c, "gene"].unique()} for c in (4, 7)}
        losses = set_losses(fed, tiny_model, relu_sae, prototypes, sets, mean_bins(fed, others), progress=False)
        losses = losses.set_index(["concept", "cell", "set"])["loss"]
        single = table.set_index(["concept", "cell", "gene"])["attribution"]
        np.testing.assert_allclose(losses[single.index], single, atol=1e-4)
        assert (losses.drop(single.index).abs() < 1e-5).all()  # genes that a prototype does not express

    def test_removal_together_by_hand(self, fed, tiny_model, relu_sae, rows):
        genes = fed.var_names[::4].tolist()
        losses = set_losses(fed, tiny_model, relu_sae, {4: rows}, {4: {"some": genes}}, progress=False)
        for row, (_, found) in zip(rows, losses.iterrows()):
            ids, values = cell_tokens(fed.layers["bins"][row], token_ids(fed.var_names, tiny_model), tiny_model)[0]
            stays = ~np.isin(ids, [tiny_model.vocab[g] for g in genes])
            both = np.stack([naive(tiny_model, ids, values), naive(tiny_model, ids[stays], values[stays])])
            before, after = relu_sae.encode(torch.from_numpy(both))[:, 4].tolist()
            assert found["loss"] == pytest.approx(1 - after / before, abs=1e-4)

    def test_refusals(self, fed, tiny_model, relu_sae, rows):
        gene = fed.var_names[0]
        with pytest.raises(ValueError, match=f"did you mean .*{gene}"):
            set_losses(fed, tiny_model, relu_sae, {4: rows}, {4: {"a": [gene.lower()]}}, progress=False)
        silent = int(relu_sae.activations(fed.obsm["X_scGPT"])[:, 4].toarray().ravel().argmin())
        with pytest.raises(ValueError, match=f"concept 4 is silent in {fed.obs_names[silent]}"):
            set_losses(fed, tiny_model, relu_sae, {4: [silent]}, {4: {"a": [gene]}}, progress=False)


def test_modules_are_families_and_no_namesakes():
    genes = ["RPL7A", "RPLP0", "RPS4Y1", "RPSA", "RPS6KA1", "RPN1", "MT-ND1", "MT-CO2", "MTOR", "HLA-DRA", "HLA-DRB1",
             "HLA-DMA", "CD74", "HLA-A", "IGKC", "IGHM", "IGLC2", "IGHV3-23", "JCHAIN", "IGHMBP2", "IGF1", "S100A8",
             "S100A9", "S100A12", "S100A4"]  # fmt: skip
    found = module_genes(genes)
    assert found["ribosomal"] == genes[:4]
    assert found["mitochondrial"] == ["MT-ND1", "MT-CO2"]
    assert found["MHC class II"] == ["HLA-DRA", "HLA-DRB1", "HLA-DMA", "CD74"]
    assert found["immunoglobulin"] == ["IGKC", "IGHM", "IGLC2", "IGHV3-23", "JCHAIN"]
    assert found["alarmins"] == ["S100A8", "S100A9", "S100A12"]
    assert module_genes(["S100A8", "MTOR"]) == {}  # one gene is no module


@pytest.mark.parametrize("min_loss", [0, 2], ids=["with the module", "without"])
def test_interactions_of_drivers_and_of_modules(fed, tiny_model, relu_sae, rows, monkeypatch, min_loss):
    """Every pair of the genes, and of the modules those that the concept loses enough without."""
    genes = [gene for gene in fed.var_names if (fed[rows, gene].X.toarray() > 0).all()][:3]
    monkeypatch.setattr(redundancy, "MODULES", {"family": "|".join(genes)})
    means = mean_bins(fed, {4: np.arange(5)})
    found = driver_interactions(
        fed, tiny_model, relu_sae, {4: rows}, {4: genes}, means, min_loss, progress=False
    ).set_index("set")
    assert list(found.index[:3]) == [tuple(genes[:2]), (genes[0], genes[2]), tuple(genes[1:])]
    assert found["name"][:3].isna().all()
    assert found["name"][3:].to_dict() == ({} if min_loss else {tuple(genes): "family (3)"})


def losses(**sets) -> pd.DataFrame:
    """A table as of ``set_losses``, of four cells: sets named by their letters, one loss for each cell."""
    rows = [(1, f"c{i}", tuple(name), x) for name, values in sets.items() for i, x in enumerate(values)]
    return pd.DataFrame(rows, columns=["concept", "cell", "set", "loss"])


class TestInteractions:
    def test_by_hand(self):
        """A and B together lose 0.5, alone 0.1 and 0.2 (a little more or less from cell to cell)."""
        table = losses(A=[0.1, 0.12, 0.08, 0.1], B=[0.2] * 4, AB=[0.5] * 4)
        row = interactions(table).iloc[0]
        assert row["set"] == ("A", "B") and row["loss"] == pytest.approx(0.5) and row["sum"] == pytest.approx(0.3)
        assert row["interaction"] == pytest.approx(0.2)
        assert row["error"] == pytest.approx(np.std([0.2, 0.18, 0.22, 0.2], ddof=1) / 2)
        assert row["kind"] == "redundant"

    def test_kinds(self):
        """Two switches for one lamp are redundant; two keys for one lock are synergistic; two weights add up."""
        noise = np.array([-0.01, 0.01, 0.005, -0.005])
        parts = dict(
            A=noise, B=noise, AB=1 + noise, C=1 + noise, D=1 + noise, CD=1 + noise, E=0.3 + noise, F=0.2 + noise
        )
        table = losses(**parts, EF=0.5 + noise * 1.5)
        found = interactions(table).set_index("set")["kind"]
        assert found.to_dict() == {("A", "B"): "redundant", ("C", "D"): "synergistic", ("E", "F"): ""}

    def test_small_or_unsure_ones_are_none(self):
        tiny = losses(A=[0.1] * 4, B=[0.1] * 4, AB=[0.205, 0.206, 0.207, 0.205])
        unsure = losses(A=[0.1] * 4, B=[0.1] * 4, AB=[0.9, -0.4, 0.6, 0.1])
        assert interactions(tiny)["kind"].tolist() == [""] and interactions(unsure)["kind"].tolist() == [""]

    def test_rounding_is_no_interaction(self):
        assert interactions(losses(A=[0.1] * 4, B=[0.2] * 4, AB=[0.300001] * 4))["q_value"].tolist() == [1]

    def test_exact_ones_are_sure(self):
        """No spread at all, as of a model that knows nothing but these genes."""
        row = interactions(losses(A=[1.0] * 4, B=[1.0] * 4, AB=[1.0] * 4)).iloc[0]
        assert row["q_value"] == 0 and row["kind"] == "synergistic"

    def test_pairs(self):
        assert list(pair_sets(["A", "B", "C"])) == [("A",), ("B",), ("C",), ("A", "B"), ("A", "C"), ("B", "C")]


def test_tags():
    """B is in both kinds of pairs, the larger counts; D adds up; E is not significant."""
    found = pd.DataFrame(
        {
            "concept": 1,
            "set": [("A", "B"), ("B", "C"), ("D", "E")],
            "interaction": [0.2, -0.5, 0.0],
            "kind": ["redundant", "synergistic", ""],
        }
    )
    tags = tag_genes(found, {(1, "A"), (1, "D")}).loc[1]
    assert tags.to_dict() == {"A": "redundant", "B": "synergistic", "C": "synergistic", "D": "necessary", "E": ""}
