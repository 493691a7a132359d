"""References: the same interface as a sparse autoencoder, and what each method is known to give."""

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import ortho_group
from sklearn.decomposition import PCA

from scsae_utils import dictionaries, sae
from scsae_utils.concepts import concept_data
from scsae_utils.dictionaries import METHODS, BaselineConfig, fit_baseline, load_dictionary
from scsae_utils.metrics import correlations, l0, variance_explained
from scsae_utils.sae import load_sae, save_sae
from scsae_utils.training import train_sae


def data(n=200, dim=6, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.gamma(1, size=(n, dim)) @ rng.normal(size=(dim, dim)) + 1).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_all_concepts_together_give_the_cells_back(self, method):
        a = data()
        dictionary = fit_baseline(a, BaselineConfig(method, 12))
        U = dictionary.activations(a)
        assert U.min() >= 0 and U.shape == (200, dictionary.config.n_concepts)
        np.testing.assert_allclose(np.linalg.norm(dictionary.vectors, axis=1), 1, rtol=1e-5)
        assert variance_explained(a, dictionary.decode_sparse(U)) > {"nmf": 0.9, "ica": 0.999}.get(method, 0.9999)

    def test_sparse_to_k_on_average(self, method):
        dictionary = fit_baseline(data(), BaselineConfig(method, 12, k=2))
        assert l0(dictionary.activations(data())) == pytest.approx(2, abs=0.01)
        assert 1 < l0(dictionary.activations(data(seed=1))) < 6  # other cells: the same threshold

    def test_of_many_cells_some_are_enough(self, method, monkeypatch):
        """Fitted to half of the cells and with its threshold set by half of those, it is of use for all."""
        monkeypatch.setattr(dictionaries, "FITTED", 200)
        monkeypatch.setattr(sae, "CALIBRATED", 100)
        a = data(400)
        dictionary = fit_baseline(a, BaselineConfig(method, 12, k=2))
        assert 1.6 < l0(dictionary.activations(a)) < 2.4

    def test_round_trip(self, method, tmp_path):
        dictionary = fit_baseline(data(), BaselineConfig(method, 12, k=2))
        save_sae(dictionary, tmp_path / "d.safetensors")
        opened = load_dictionary(tmp_path / "d.safetensors")
        assert opened.config == dictionary.config
        assert (opened.activations(data()) != dictionary.activations(data())).nnz == 0
        with pytest.raises(ValueError, match="does not fit its configuration"):
            load_sae(tmp_path / "d.safetensors")

    def test_makes_cells_x_concepts(self, method, embedded):
        dictionary = fit_baseline(embedded.obsm["X_scGPT"], BaselineConfig(method, 16, k=3))
        concepts = concept_data(embedded, dictionary)
        assert concepts.shape == (embedded.n_obs, dictionary.config.n_concepts)

    def test_is_the_same_each_time(self, method):
        one, same = (fit_baseline(data(), BaselineConfig(method, 12, k=2)).vectors for _ in range(2))
        np.testing.assert_array_equal(one, same)


def test_pca_reconstructs_as_scikit_learn():
    a = data()
    pca = PCA(2).fit(a)
    dictionary = fit_baseline(a, BaselineConfig("pca", 4))
    expected = pca.inverse_transform(pca.transform(data(seed=1)))
    np.testing.assert_allclose(
        dictionary.decode_sparse(dictionary.activations(data(seed=1))), expected, rtol=1e-3, atol=1e-3
    )


def test_ica_finds_independent_sources():
    """Rare sources, mixed by a rotation: each is one concept."""
    rng = np.random.default_rng(0)
    sources = rng.gamma(1, size=(3000, 5)) * (rng.random((3000, 5)) < 0.2)
    a = sources @ ortho_group.rvs(5, random_state=0)
    U = fit_baseline(a, BaselineConfig("ica", 10)).activations(a)
    assert (correlations(sparse.csr_matrix(sources), U).max(1) > 0.95).all()


def test_raw_dimensions_are_those_that_vary_most():
    a = data() * np.array([1, 9, 1, 1, 8, 1], np.float32)
    dictionary = fit_baseline(a, BaselineConfig("raw", 4))
    assert {int(i) for i in np.abs(dictionary.vectors).argmax(1)} == set(np.argsort(-a.var(0))[:2].tolist())


def test_random_dictionary_keeps_its_vectors():
    """The decoder stays as it was drawn, and the rest learns to use it."""
    settings = {
        "sae": "batchtopk",
        "n_concepts": 12,
        "k": 3,
        "batch_size": 50,
        "learning_rate": 1e-2,
        "progress": False,
    }
    short, long = (train_sae(data(), epochs=n, train_decoder=False, **settings) for n in (1, 60))
    np.testing.assert_array_equal(short.vectors, long.vectors)
    assert not torch.equal(short.W_e, long.W_e)
    assert long.history["variance_explained"].iloc[-1] > long.history["variance_explained"].iloc[0]
    free = train_sae(data(), epochs=60, **settings)
    assert free.history["variance_explained"].iloc[-1] > long.history["variance_explained"].iloc[-1]


@pytest.mark.parametrize(
    "settings, message",
    [({"method": "svd"}, "one of pca, ica, nmf, raw"), ({"n_concepts": 1}, "n_concepts"), ({"k": 0}, "k is too small")],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        BaselineConfig(**settings)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="run chapter 02_sae"):
        load_dictionary(tmp_path / "none.safetensors")
