"""Known truth: the data are as described, and the default objectives find more of it than the paper's."""

import numpy as np
import pytest
from anndata import AnnData

from scsae_utils.controls import paper_at
from scsae_utils.dictionaries import BaselineConfig, fit_baseline
from scsae_utils.metrics import l0, recovery
from scsae_utils.sae import SAEConfig
from scsae_utils.synthetic import SyntheticConfig, frequencies, make_synthetic
from scsae_utils.training import train_saes

SMALL = SyntheticConfig(n_cells=4000, dim=48, n_features=48, l0=3, groups=8, noise=0.02)


class TestData:
    def test_cells_are_sums_of_their_features(self):
        data = make_synthetic(SMALL)
        assert data.a.shape == (4000, 48) and data.U.shape == (4000, 48)
        np.testing.assert_allclose(np.linalg.norm(data.vectors, axis=1), 1, rtol=1e-5)
        assert np.std(data.a - data.U @ data.vectors) == pytest.approx(SMALL.noise, rel=0.02)
        assert data.U.data.mean() == pytest.approx(1, abs=0.03) and data.U.data.min() > 0

    def test_frequencies_are_a_power_law(self):
        p = frequencies(SMALL)
        assert p.sum() == pytest.approx(3)
        assert p[3] / p[15] == pytest.approx(4**SMALL.exponent)  # ranks 4 and 16
        capped = frequencies(SyntheticConfig(n_features=48, l0=8, exponent=1.5))
        assert capped.max() == 0.5 and capped.sum() == pytest.approx(8)
        data = make_synthetic(SMALL)
        np.testing.assert_allclose(data.U.getnnz(axis=0) / 4000, p, atol=0.03)
        assert l0(data.U) == pytest.approx(3, abs=0.1)

    def test_features_of_a_group_come_with_their_parent(self):
        """Feature 3 is the parent of 11, 19 and so on, which prefer the same cells."""
        on = (make_synthetic(SMALL).U > 0).toarray()
        children = on[:, 11::8]
        assert not children[~on[:, 3]].any() and children[on[:, 3]].mean() > 0.1
        phi = np.corrcoef(children[on[:, 3]].T)
        assert phi[~np.eye(len(phi), dtype=bool)].mean() > 0.1
        assert abs(np.corrcoef(on[:, 3], on[:, 4])[0, 1]) < 0.1  # two groups have nothing in common

    def test_seed(self):
        one, same = (make_synthetic(SMALL) for _ in range(2))
        np.testing.assert_array_equal(one.a, same.a)
        assert (make_synthetic(SyntheticConfig(seed=1)).a != make_synthetic(SyntheticConfig()).a).all()

    @pytest.mark.parametrize("settings", [{"correlation": 1.0}, {"l0": 0}, {"l0": 60.0}])
    def test_settings_that_cannot_be(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SyntheticConfig(**settings)


class TestRecovery:
    @pytest.fixture(scope="class")
    def found(self):
        """F1 and correlation on cells that were not in training, with twice as many concepts as features."""
        data = make_synthetic(SMALL)
        train, rest = data.a[:3000], slice(3000, None)
        config = SAEConfig("batchtopk", 96, 128, 5e-3, 40, l1=1e-2, k=3, decay=0.3)
        configs = [config, paper_at(AnnData(obsm={"X_scGPT": train}), config)]
        saes = train_saes(train, configs, progress=False)
        saes.append(fit_baseline(train, BaselineConfig("pca", 96, k=3)))
        U = [sae.activations(data.a[rest]) for sae in saes]
        assert all(l0(each) == pytest.approx(3.3, abs=1) for each in U)
        return [recovery(each, data.U[rest]) for each in U]

    @pytest.mark.parametrize("score", ["f1", "correlation"])
    def test_batchtopk_finds_more_than_the_papers_objective_and_components(self, found, score):
        batchtopk, paper, components = (each[score] for each in found)
        assert batchtopk > paper + 0.03 > components + 0.1
        assert batchtopk > 0.85
