"""Genes removed together: against the model run by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import naive
from scipy import sparse

from scsae_utils.attribution import AttributionConfig, attribute, choose_prototypes
from scsae_utils.curves import (
    better_orders,
    compare_occlusions,
    concepts_of_gene,
    curve_areas,
    deletion_curves,
    loss_without,
    order_curves,
)
from scsae_utils.embedding import cell_tokens, embed_tokens, token_ids
from scsae_utils.planted import plant
from scsae_utils.significance import cells_of_concepts


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


class TestDeletion:
    def test_starts_at_one_and_equals_removal_by_hand(self, fed, model, relu_sae):
        rows = choose_prototypes(relu_sae.activations(fed.obsm["X_scGPT"])[:, 4].toarray().ravel(), 3)
        genes = fed.var_names[::5].tolist()
        curves = deletion_curves(fed, model, relu_sae, 4, rows, {"a": genes, "b": genes[::-1]}, 4, progress=False)
        assert (curves.loc[curves["n_removed"] == 0, "activation"] == 1).all()
        assert sorted(curves["n_removed"].unique()) == [0, 4, 8, 12, 16] and len(genes) == 16
        assert len(curves) == 2 * 5 * 3
        ends = curves[curves["n_removed"] == 16].set_index(["order", "cell"])["activation"]
        np.testing.assert_allclose(ends["a"], ends["b"], atol=1e-4)  # at the end the same genes are gone
        for row in rows:
            ids, values = cell_tokens(fed.layers["bins"][row], token_ids(fed.var_names, model), model)[0]
            stays = ~np.isin(ids, [model.vocab[g] for g in genes[:8]])
            both = np.stack([naive(model, ids, values), naive(model, ids[stays], values[stays])])
            u = relu_sae.encode(torch.from_numpy(both))[:, 4]
            at = (curves["order"] == "a") & (curves["n_removed"] == 8) & (curves["cell"] == fed.obs_names[row])
            assert curves.loc[at, "activation"].item() == pytest.approx((u[1] / u[0]).item(), abs=1e-4)

    def test_loss_without_is_the_end_of_the_curve(self, fed, model, relu_sae):
        rows = choose_prototypes(relu_sae.activations(fed.obsm["X_scGPT"])[:, 4].toarray().ravel(), 3)
        genes = fed.var_names[::5].tolist()
        curves = deletion_curves(fed, model, relu_sae, 4, rows, {"a": genes}, 4, progress=False)
        end = curves.loc[curves["n_removed"] == 16, "activation"].mean()
        assert loss_without(fed, model, relu_sae, 4, rows, genes) == pytest.approx(1 - end, abs=1e-6)

    def test_all_genes_can_be_removed(self, fed, model, relu_sae):
        row = choose_prototypes(relu_sae.activations(fed.obsm["X_scGPT"])[:, 4].toarray().ravel(), 1)
        curves = deletion_curves(fed, model, relu_sae, 4, row, {"all": list(fed.var_names)}, 2, progress=False)
        assert np.isfinite(curves["activation"]).all() and curves["n_removed"].max() == fed.n_vars

    def test_refusals(self, fed, model, relu_sae):
        u = relu_sae.activations(fed.obsm["X_scGPT"])[:, 4].toarray().ravel()
        gene = fed.var_names[0]
        with pytest.raises(ValueError, match=f"not among the genes of these cells; did you mean .*{gene}"):
            deletion_curves(fed, model, relu_sae, 4, [u.argmax()], {"a": [gene.lower()]}, progress=False)
        with pytest.raises(ValueError, match=f"silent in {fed.obs_names[u.argmin()]}"):
            deletion_curves(fed, model, relu_sae, 4, [u.argmax(), u.argmin()], {"a": [gene]}, progress=False)


class TestConceptsOfGene:
    def test_equals_embedding_the_cells_without_the_gene(self, fed, model, relu_sae):
        gene = fed.var_names[10]
        share = concepts_of_gene(fed, model, relu_sae, gene, progress=False)
        rest = fed[:, fed.var_names != gene].copy()
        keep = np.delete(fed.layers["bins"].toarray(), 10, axis=1)
        tokens = cell_tokens(sparse.csr_matrix(keep), token_ids(rest.var_names, model), model)
        before = relu_sae.activations(fed.obsm["X_scGPT"]).sum(0).A1
        after = relu_sae.activations(embed_tokens(tokens, model)).sum(0).A1
        np.testing.assert_allclose(share, (before - after) / before, atol=1e-4)
        assert share.name == gene and share.index[3] == "concept_3" and share.abs().max() > 1e-3

    def test_refusals(self, fed, model, relu_sae):
        gene = fed.var_names[10]
        with pytest.raises(ValueError, match=f"did you mean .*'{gene}'"):
            concepts_of_gene(fed, model, relu_sae, gene.lower(), progress=False)
        without = fed.copy()
        bins = without.layers["bins"].tolil()
        bins[:, 10] = 0
        without.layers["bins"] = bins.tocsr()
        with pytest.raises(ValueError, match=f"no cell expresses '{gene}'"):
            concepts_of_gene(without, model, relu_sae, gene, progress=False)


def test_compare_occlusions(fed, model, relu_sae):
    """One row for each option that is not chosen, each really another occlusion."""
    table = compare_occlusions(fed, model, relu_sae, 4, AttributionConfig(n_counterfactuals=3), n_prototypes=2)
    expected = ["as chosen", "absent: value", "binning: rebinned", "counterfactual_mean: matched", "insertion: True"]
    assert table.index.tolist() == [*expected, "counterfactual_match: study"]
    for same in ("as chosen", "insertion: True"):  # insertion adds genes and leaves the others as they are
        assert table.at[same, "correlation"] == pytest.approx(1)
    assert (table["correlation"].drop(["as chosen", "insertion: True"]) < 0.99999).all()
    assert table.at["as chosen", "top 10 shared"] == 1 > table.at["insertion: True", "top 10 shared"]
    alone = attribute(fed, model, relu_sae, 4, n_prototypes=2, n_counterfactuals=3, binning="rebinned", progress=False)
    assert table.loc["binning: rebinned", "largest"] == pytest.approx(alone["attribution"].abs().max())


@pytest.fixture(scope="module")
def planted(mini_cells):
    """One concept of three drivers, whose losses add up, and one that needs both of its two."""
    return plant(mini_cells, hows=("sum", "all"))


@pytest.fixture(scope="module")
def curves(planted):
    """By attribution (drivers first), and by an order that puts the drivers last."""
    prototypes, _ = cells_of_concepts(planted.cells, planted.model, planted.sae, [0, 1], AttributionConfig())
    drivers = {c: [g for j, g in sorted(planted.genes()) if j == c] for c in (0, 1)}
    rest = {c: [g for g in planted.cells.var_names if g not in drivers[c]] for c in (0, 1)}
    orders = {c: {"attribution": drivers[c], "worst": rest[c] + drivers[c]} for c in (0, 1)}
    cells = {c: rows[:3] for c, rows in prototypes.items()}
    return order_curves(planted.cells, planted.model, planted.sae, cells, orders, 4, progress=False)


class TestOrderCurves:
    def test_ends_are_the_whole_cell_and_the_empty_one(self, curves):
        first = curves["n"] == 0
        last = curves["n"] == curves.groupby("cell")["n"].transform("max")
        assert (curves.loc[first, "deletion"] == 1).all() and (curves.loc[last, "insertion"] == 1).all()
        assert (curves.loc[first, "insertion"] == 0).all() and (curves.loc[last, "deletion"] == 0).all()

    def test_drivers_first_is_over_at_once_and_drivers_last_at_the_end(self, curves, planted):
        """Three drivers carry concept 0: of the numbers 1, 2, 4 the last takes all, or gives all back."""
        at = curves[(curves["concept"] == 0) & (curves["order"] == "attribution")].set_index("n")
        assert (at.loc[4, "deletion"] == 0).all() and (at.loc[4, "insertion"] == 1).all()
        worst = curves[(curves["concept"] == 0) & (curves["order"] == "worst")]
        before_last = worst[worst["n"] <= worst.groupby("cell")["n"].transform("max") - 3]
        assert (before_last["deletion"] == 1).all() and (before_last["insertion"] == 0).all()

    def test_only_genes_of_the_cell_count(self, curves, planted):
        expressed = (planted.cells.layers["bins"] > 0).sum(axis=1).A1
        ends = curves.groupby("cell")["n"].max()
        assert ends.to_dict() == {c: expressed[planted.cells.obs_names.get_loc(c)] for c in ends.index}

    def test_areas_and_smallest_sets(self, curves):
        areas = curve_areas(curves)
        for concept in (0, 1):
            table = areas.loc[concept]
            random = table.filter(like="random", axis=0)
            assert table.at["attribution", "deletion"] < random["deletion"].min()
            assert random["deletion"].max() <= table.at["worst", "deletion"]
            assert table.at["attribution", "insertion"] > random["insertion"].max()
        assert areas.loc[(1, "attribution"), "smallest"] == 1  # without one of the two there is nothing left
        assert areas.loc[(0, "attribution"), "smallest"] <= 4 < areas.loc[(0, "worst"), "smallest"]

    def test_better_than_others(self, curves):
        table = better_orders(curve_areas(curves))
        assert (table["share"] == 1).all() and (table["n"] == 2).all() and (table["difference"] > 0).all()
        assert table["high"].tolist() == [1.0] * 4
        assert table["low"].tolist() == pytest.approx([0.342] * 4, abs=1e-3)  # Wilson, 2 of 2

    def test_refusals(self, planted):
        with pytest.raises(ValueError, match="factor must be above 1"):
            order_curves(planted.cells, planted.model, planted.sae, {}, {}, factor=1)
        silent = int(planted.sae.activations(planted.cells.obsm["X_scGPT"])[:, 0].toarray().ravel().argmin())
        with pytest.raises(ValueError, match="concept 0 is silent in"):
            order_curves(planted.cells, planted.model, planted.sae, {0: [silent]}, {0: {}}, progress=False)


def test_areas_by_hand():
    """At n = 0, 1, 3 the places are log 1, log 2, log 4: equal steps. (1 + 0.5) / 2 and (0.5 + 0.1) / 2 make 0.525."""
    rows = {"concept": 1, "order": "a", "cell": "c", "n": [0, 1, 3], "deletion": [1, 0.5, 0.1], "insertion": [0, 0, 1]}
    areas = curve_areas(pd.DataFrame(rows), share=0.5).loc[(1, "a")]
    assert areas.tolist() == pytest.approx([0.525, 0.25, 1])
