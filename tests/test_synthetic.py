"""Known truth: the data are as described, and the default objectives find more of it than the paper's."""

import numpy as np
import pytest

from scsae_utils.metrics import l0, recovery
from scsae_utils.sae import SAEConfig
from scsae_utils.synthetic import SyntheticConfig, frequencies, make_synthetic
from scsae_utils.training import train_saes

SMALL = SyntheticConfig(n_cells=2500, dim=32, n_features=48, l0=3, groups=8)


class TestData:
    def test_cells_are_sums_of_their_features(self):
        data = make_synthetic(SMALL)
        assert data.a.shape == (2500, 32) and data.U.shape == (2500, 48)
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
        np.testing.assert_allclose(data.U.getnnz(axis=0) / 2500, p, atol=0.03)
        assert l0(data.U) == pytest.approx(3, abs=0.1)

    def test_features_of_a_group_come_together(self):
        on = (make_synthetic(SMALL).U > 0).toarray()
        phi = np.corrcoef(on.T)
        same = np.arange(48)[:, None] % 8 == np.arange(48) % 8
        assert phi[same & ~np.eye(48, dtype=bool)].mean() > 0.1
        assert abs(phi[~same].mean()) < 0.01

    def test_seed(self):
        one, same = (make_synthetic(SMALL) for _ in range(2))
        np.testing.assert_array_equal(one.a, same.a)
        assert (make_synthetic(SyntheticConfig(seed=1)).a != make_synthetic(SyntheticConfig()).a).all()

    @pytest.mark.parametrize("settings", [{"correlation": 1.0}, {"l0": 0}, {"l0": 60.0}])
    def test_settings_that_cannot_be(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SyntheticConfig(**settings)
