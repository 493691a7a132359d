"""What a sparse autoencoder must beat: PCA, ICA, NMF and the raw dimensions, as dictionaries of the same interface.

A direction and its opposite are two concepts, since activations are not negative. Concepts count above one threshold,
which is set on training cells so that a cell has k of them on average. The random dictionary is an SAE with
``train_decoder=False``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import NMF, PCA, FastICA, non_negative_factorization
from sklearn.preprocessing import normalize
from torch import Tensor

from .sae import Dictionary, load_sae, load_tensors, read_metadata

ICA_VARIANCE = (
    0.999  # of the training cells; components of the rest are noise, which the whitening of ICA would blow up
)
FITTED = 20_000  # cells that a reference is fitted to, at most
METHODS = ("pca", "ica", "nmf", "raw")


@dataclass(frozen=True)
class BaselineConfig:
    """How a dictionary is made without training in epochs.

    Parameters
    ----------
    method
        ``pca``, ``ica``, ``nmf`` (scikit-learn), or ``raw``: the axes of the embedding.
    n_concepts
        Size c at most; as many as the method can give: two for each of the embedding's d dimensions, fewer with
        ``ica`` where a few dimensions hold 99.9 % of the variance, and d with ``nmf``.
    k
        Active concepts of a cell, on average over the cells that it is fitted on; None: all that are positive.
    seed
        Of ``ica`` and ``nmf``.
    """

    method: str = "pca"
    n_concepts: int = 512
    k: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        for name in ("n_concepts", "k"):
            if getattr(self, name) is not None and getattr(self, name) < (2 if name == "n_concepts" else 1):
                raise ValueError(f"{name} is too small: {getattr(self, name)}")


class NMFDictionary(Dictionary):
    """Parts that are added up: cells less ``b_d`` (the smallest value of each dimension) as a product of factors >= 0.

    Activations have no closed form; they are found with the parts held fixed, and have no gradient.
    """

    def pre_activations(self, a: Tensor) -> Tensor:
        shifted = (a - self.b_d).clamp_min(0).cpu().numpy()
        parts = self.vectors
        u, *_ = non_negative_factorization(
            shifted, H=parts, n_components=len(parts), update_H=False, init="custom", max_iter=1000, tol=1e-3
        )
        return torch.from_numpy(u.astype(np.float32))


def fit_baseline(a: np.ndarray, config: BaselineConfig) -> Dictionary:
    """Fit a dictionary to the cells a (n, d), of more than :data:`FITTED` to so many that are drawn.

    Its ``config`` has the size that came out.
    """
    if len(a) > FITTED:
        a = a[np.sort(np.random.default_rng(0).permutation(len(a))[:FITTED])]
    a = np.asarray(a, np.float32)
    dim = a.shape[1]
    if config.method == "nmf":
        n = min(config.n_concepts, dim, len(a))
        low = a.min(0)
        parts = NMF(n, init="nndsvda", max_iter=1000, tol=1e-3, random_state=config.seed).fit(a - low).components_
        dictionary = NMFDictionary(replace(config, n_concepts=n), dim)
        fill(dictionary, W_d=normalize(parts), b_d=low)
    else:
        n = min(config.n_concepts // 2, dim, len(a) - 1)
        if config.method == "pca":
            encoder = PCA(n, random_state=config.seed).fit(a).components_
            decoder = encoder
        elif config.method == "ica":
            share = np.cumsum(PCA(n, random_state=config.seed).fit(a).explained_variance_ratio_)
            n = min(n, int((share < ICA_VARIANCE).sum()) + 1)
            ica = FastICA(n, whiten="unit-variance", random_state=config.seed, max_iter=1000, tol=1e-3).fit(a)
            length = np.linalg.norm(ica.mixing_, axis=0)[:, None]
            encoder, decoder = ica.components_ * length, ica.mixing_.T / length
        else:
            encoder = decoder = np.eye(dim)[np.argsort(-a.var(0), kind="stable")[:n]]
        dictionary = Dictionary(replace(config, n_concepts=2 * n), dim)
        fill(dictionary, W_e=np.vstack([encoder, -encoder]).T, W_d=np.vstack([decoder, -decoder]), b_d=a.mean(0))
    if config.k is not None:
        dictionary.calibrate(torch.from_numpy(a), config.k)
    return dictionary.eval().requires_grad_(False)


def fill(dictionary: Dictionary, **weights: np.ndarray) -> None:
    """Put arrays into parameters of the same names and shapes."""
    with torch.no_grad():
        for name, array in weights.items():
            getattr(dictionary, name).copy_(torch.from_numpy(np.ascontiguousarray(array, np.float32)))


def load_dictionary(path: str | Path) -> Dictionary:
    """Open any dictionary that :func:`scsae_utils.sae.save_sae` wrote; raises as :func:`scsae_utils.sae.load_sae`."""
    if not Path(path).is_file() or "method" not in read_metadata(path).get("config", {}):
        return load_sae(path)

    def make(config: dict, dim: int) -> Dictionary:
        kind = NMFDictionary if config["method"] == "nmf" else Dictionary
        return kind(BaselineConfig(**config), dim)

    return load_tensors(path, make)
