"""Genes removed together: against the model run by hand."""

import numpy as np
import pytest
import torch
from conftest import naive
from scipy import sparse

from scsae_utils.attribution import AttributionConfig, attribute, choose_prototypes
from scsae_utils.curves import compare_occlusions, concepts_of_gene, deletion_curves, loss_without
from scsae_utils.embedding import cell_tokens, embed_tokens, token_ids


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
    assert table.index.tolist() == ["as chosen", "absent: value", "binning: rebinned", "counterfactual_mean: matched"]
    assert table.loc["as chosen", ["correlation", "top 10 shared"]].tolist() == pytest.approx([1, 1])
    assert (table["correlation"].iloc[1:] < 0.99999).all()
    alone = attribute(fed, model, relu_sae, 4, n_prototypes=2, n_counterfactuals=3, binning="rebinned", progress=False)
    assert table.loc["binning: rebinned", "largest"] == pytest.approx(alone["attribution"].abs().max())
