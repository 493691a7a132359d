"""Embeddings made from a known sparse dictionary, to see whether its features are found again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.special import ndtri
from sklearn.preprocessing import normalize


@dataclass(frozen=True)
class SyntheticConfig:
    """A dictionary with features of realistic frequencies and correlations.

    Parameters
    ----------
    n_cells, dim, n_features
        Size of the data and of the true dictionary.
    l0
        True features of a cell, on average.
    exponent
        Frequencies fall as rank to the power of ``-exponent``; the most frequent feature is in half of the cells at
        most.
    groups, correlation
        Features belong to so many groups in turn, as subtypes to a cell type. The first, most frequent one of a group
        is its parent: a cell without it has none of the group. Given the parent, the others still tend to occur
        together: ``correlation`` is that of the normal variables that are cut off to say which features a cell has.
    noise
        Standard deviation of each coordinate, beside feature vectors of length 1 with magnitudes of mean 1.
    seed
        Of everything.
    """

    n_cells: int = 4000
    dim: int = 64
    n_features: int = 128
    l0: float = 8.0
    exponent: float = 0.7
    groups: int = 16
    correlation: float = 0.4
    noise: float = 0.01
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.correlation < 1:
            raise ValueError(f"correlation must be from 0 to below 1, not {self.correlation}")
        if not 0 < self.l0 <= self.n_features / 4:
            raise ValueError(
                f"l0 must be positive and at most a quarter of the {self.n_features} features, not {self.l0}"
            )


@dataclass(frozen=True)
class Synthetic:
    """Embeddings ``a`` (n, d) = ``U @ vectors`` + noise, the true activations ``U`` (n, t) and ``vectors`` (t, d)."""

    a: np.ndarray
    U: sparse.csr_matrix
    vectors: np.ndarray


def frequencies(config: SyntheticConfig) -> np.ndarray:
    """(t,) share of the cells that have each feature: a power law with sum ``l0`` and no value above a half."""
    weight = np.arange(1, config.n_features + 1.0) ** -config.exponent
    p = np.zeros(config.n_features)
    free = np.ones(config.n_features, bool)
    while True:  # what the cap takes from the most frequent goes to the others
        p[free] = (config.l0 - 0.5 * (~free).sum()) * weight[free] / weight[free].sum()
        if (p <= 0.5).all():
            return p
        free &= p <= 0.5
        p[~free] = 0.5


def make_synthetic(config: SyntheticConfig) -> Synthetic:
    """Draw cells: which features (a Gaussian copula), their magnitudes (gamma of shape 4 and mean 1), and noise."""
    rng = np.random.default_rng(config.seed)
    vectors = normalize(rng.normal(size=(config.n_features, config.dim))).astype(np.float32)
    group = np.arange(config.n_features) % config.groups
    p = frequencies(config)
    given = np.where(np.arange(config.n_features) < config.groups, p, np.minimum(p / p[group], 1))
    cut = ndtri(given)
    parts = []
    for start in range(0, config.n_cells, 4096):  # dense only for so many cells at a time
        n = min(4096, config.n_cells - start)
        common = rng.normal(size=(n, config.groups))[:, group]
        own = rng.normal(size=(n, config.n_features))
        shared = np.where(np.arange(config.n_features) < config.groups, 0, config.correlation)
        on = np.sqrt(shared) * common + np.sqrt(1 - shared) * own < cut
        on &= on[:, group]  # the parent of group i is feature i
        parts.append(sparse.csr_matrix(on * rng.gamma(4, 1 / 4, size=on.shape).astype(np.float32)))
    U = sparse.vstack(parts, format="csr")
    noise = config.noise * rng.normal(size=(config.n_cells, config.dim))
    return Synthetic((U @ vectors + noise).astype(np.float32), U, vectors)
