"""The protocol of models, its implementations, and the planted model's arithmetic."""

import numpy as np
import pytest
import torch
from anndata import AnnData
from conftest import perturbed

from scsae_utils.embedding import embed
from scsae_utils.encoder import CellEncoder, PlantedConcept, PlantedEncoder
from scsae_utils.scgpt import ScGPTConfig

GENES = [f"G{i}" for i in range(12)]
CONCEPTS = [
    PlantedConcept(("G0", "G1")),
    PlantedConcept(("G2", "G3"), how="any"),
    PlantedConcept(("G4", "G5"), how="all"),
    PlantedConcept(("G6",), inhibitors=("G7",)),
]


@pytest.fixture
def planted():
    return PlantedEncoder(GENES, CONCEPTS)


def fed(planted, **values):
    """The embedding of a cell with these genes and bins."""
    ids = torch.tensor([[planted.cls[0], *(planted.vocab[g] for g in values)]])
    return planted(ids, torch.tensor([[planted.cls[1], *values.values()]]))[0]


def models():
    scgpt = perturbed(ScGPTConfig(embsize=16, nheads=2, d_hid=24, nlayers=2), GENES)
    return {"scGPT": scgpt, "random weights": scgpt.random_like(0), "planted": PlantedEncoder(GENES, CONCEPTS)}


@pytest.mark.parametrize("name", models())
class TestEveryEncoder:
    def test_has_the_members_of_the_protocol(self, name):
        assert isinstance(models()[name], CellEncoder)

    def test_embeds_cells(self, name):
        rng = np.random.default_rng(0)
        cells = AnnData(np.maximum(rng.poisson(2, (30, 12)), np.eye(30, 12)).astype(np.float32))
        cells.var_names = GENES
        model = models()[name]
        X = embed(cells, model, progress=False).obsm["X_scGPT"]
        assert X.shape == (30, model.dim)
        np.testing.assert_allclose(np.linalg.norm(X, axis=1), 1, rtol=1e-6)
        alone = embed(cells[[7]].copy(), model, progress=False).obsm["X_scGPT"]
        np.testing.assert_allclose(alone, X[[7]], atol=1e-6)

    def test_takes_gradients_of_token_vectors(self, name):
        model = models()[name]
        ids = torch.tensor([[model.cls[0], *(model.vocab[g] for g in GENES)]])
        x = model.tokens(ids, torch.linspace(1, 50, 13)[None]).requires_grad_()
        model.encode(x)[0, 0].backward()
        assert x.grad.shape == x.shape and x.grad.abs().sum() > 0


class TestPlanted:
    def test_arithmetic_by_hand(self, planted):
        """Four concepts: each is at most 1/2. Values are bins of 50."""
        embedding = fed(planted, G0=50.0, G1=25.0, G2=10.0, G3=40.0, G4=10.0, G5=40.0, G6=50.0, G7=25.0)
        torch.testing.assert_close(embedding[:4], torch.tensor([0.375, 0.4, 0.1, 0.25]))
        torch.testing.assert_close(embedding.norm(), torch.tensor(1.0))

    def test_silent_genes_count_as_zero(self, planted):
        torch.testing.assert_close(fed(planted, G0=50.0, G2=50.0, G4=50.0)[:4], torch.tensor([0.25, 0.5, 0, 0]))

    def test_passengers_change_nothing(self, planted):
        assert torch.equal(fed(planted, G0=50.0), fed(planted, G0=50.0, G8=50.0, G11=3.0))

    def test_inhibitors_do_not_go_below_zero(self, planted):
        assert fed(planted, G6=10.0, G7=50.0)[3] == 0

    def test_fingerprint_is_of_the_truth(self, planted):
        assert planted.fingerprint() == PlantedEncoder(GENES, CONCEPTS).fingerprint()
        assert planted.fingerprint() != PlantedEncoder(GENES, CONCEPTS[:3]).fingerprint()

    def test_refusals(self):
        with pytest.raises(ValueError, match="does not have: X1"):
            PlantedEncoder(GENES, [PlantedConcept(("G0", "X1"))])
        with pytest.raises(ValueError, match="unique"):
            PlantedEncoder(["A", "A"], [])
        with pytest.raises(ValueError, match="'sum', 'any' or 'all', not 'most'"):
            PlantedConcept(("A",), how="most")
        with pytest.raises(ValueError, match="at least one gene"):
            PlantedConcept(())
