"""Metrics of a dictionary, as functions of arrays. Say of every value which cells it is of.

``U`` (n, c) are sparse concept activations (CSR, >= 0), ``a`` (n, d) cell embeddings, ``a'`` their reconstruction.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize


def variance_explained(a: np.ndarray, reconstruction: np.ndarray) -> float:
    """``1 - sum ||a - a'||^2 / sum ||a - mean(a)||^2`` over cells; both (n, d)."""
    return float(1 - ((a - reconstruction) ** 2).sum() / ((a - a.mean(0)) ** 2).sum())


def l0(U: sparse.csr_matrix) -> float:
    """Active concepts of a cell, on average: ``nnz(U) / n``."""
    return U.nnz / U.shape[0]


def density(U: sparse.csr_matrix) -> float:
    """Share of the pairs of a cell and a concept that are active: ``nnz(U) / (n c)``."""
    return U.nnz / (U.shape[0] * U.shape[1])


def activation_frequency(U: sparse.csr_matrix) -> np.ndarray:
    """(c,) share of the cells that activate a concept: ``||U_i||_0 / n``."""
    return U.getnnz(axis=0) / U.shape[0]


def surviving(U: sparse.csr_matrix, min_frequency: float) -> np.ndarray:
    """(c,) mask of the concepts that post-processing keeps: active, with a frequency of at least ``min_frequency``."""
    frequency = activation_frequency(U)
    return (frequency > 0) & (frequency >= min_frequency)


def mean_cosine(a: np.ndarray, reconstruction: np.ndarray) -> float:
    """Mean over cells of ``<a, a'> / (||a|| ||a'||)``; both (n, d). A vector of zeros has cosine 0."""
    return float((normalize(a) * normalize(reconstruction)).sum(1).mean())


def reconstruction_bias(a: np.ndarray, reconstruction: np.ndarray) -> float:
    """Length of reconstructions beside the best one: ``sum ||a' - m||^2 / sum <a' - m, a - m>``, with m = mean(a).

    1 is unbiased; below 1, reconstructions are shrunk, as an L1 penalty makes them (Rajamanoharan et al. 2024, who do
    not subtract the mean).
    """
    mean = a.mean(0)
    b = reconstruction - mean
    return float((b**2).sum() / (b * (a - mean)).sum())


def neighbours(X: np.ndarray, k: int) -> np.ndarray:
    """(n, k) row numbers of the ``k`` nearest other rows of X (n, d) (Euclidean)."""
    near = NearestNeighbors(n_neighbors=k + 1).fit(X).kneighbors(X, return_distance=False)
    return np.array([row[row != i][:k] for i, row in enumerate(near)])  # a cell is not its own neighbour


def neighbours_kept(a: np.ndarray, reconstruction: np.ndarray, k: int = 15) -> float:
    """Share of a cell's ``k`` nearest neighbours that are still its nearest ones in the reconstruction, on average.

    ``mean_i |N_k(a_i) & N_k(a'_i)| / k``, Euclidean, among the given cells.
    """
    both = zip(neighbours(a, k), neighbours(reconstruction, k))
    return float(np.mean([len(set(one) & set(other)) / k for one, other in both]))


def knn_accuracy(X: np.ndarray, labels, k: int = 15) -> float:
    """Share of cells whose type is the most frequent one among their ``k`` nearest other cells (Euclidean).

    ``X`` (n, d); of equally frequent types the one first in the alphabet counts. Of an embedding and of its
    reconstruction, it says whether a cell's type is still to be seen.
    """
    codes, names = pd.factorize(np.asarray(labels, str), sort=True)
    votes = np.zeros((len(X), len(names)))
    np.add.at(votes, (np.arange(len(X))[:, None], codes[neighbours(X, k)]), 1)
    return float((votes.argmax(1) == codes).mean())


def type_f1(U: sparse.csr_matrix, labels) -> pd.DataFrame:
    """F1 of each concept for each cell type: ``2 |active & type| / (|active| + |type|)``; (c, types).

    It is the harmonic mean of P(type | active) and P(active | type); 0 for a concept that is active in none.
    """
    member = pd.get_dummies(pd.Series(np.asarray(labels, str)))
    hits = ((U > 0).astype(float).T @ sparse.csr_matrix(member.to_numpy(float))).toarray()
    return pd.DataFrame(2 * hits / (U.getnnz(axis=0)[:, None] + member.to_numpy().sum(0)), columns=member.columns)


def matching(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the one-to-one matching with the largest sum of similarities (Hungarian method)."""
    return linear_sum_assignment(similarity, maximize=True)


def stability(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How alike two dictionaries are; ``one`` (c, d) and ``other`` (m, d) are concept vectors.

    Returns
    -------
    ``max_cosine``: mean over the vectors of ``one`` of the highest cosine with one of ``other``.
    ``matched_cosine``: mean cosine of pairs in the one-to-one matching with the largest sum.
    """
    cosine = normalize(one) @ normalize(other).T
    return {"max_cosine": float(cosine.max(1).mean()), "matched_cosine": float(cosine[matching(cosine)].mean())}


def recovery(U: sparse.csr_matrix, truth: sparse.csr_matrix) -> dict[str, float]:
    """How well known features are found, whose activations are ``truth`` (n, t); both of the same cells.

    Features and concepts are matched one to one by the correlation of their activations.

    Returns
    -------
    Means over the features that are active in some cell, of their matched concepts: ``f1`` of being active (2 |both| /
    (|one| + |other|)) and ``correlation`` (Pearson) of activations; 0 for a feature without a concept.
    """
    truth = truth[:, truth.getnnz(axis=0) > 0]
    correlation = correlations(truth, U)
    rows, columns = matching(correlation)
    both = ((truth > 0).astype(float)[:, rows].multiply((U > 0).astype(float)[:, columns])).sum(0).A1
    f1 = 2 * both / (truth.getnnz(axis=0)[rows] + U.getnnz(axis=0)[columns])
    return {"f1": f1.sum() / truth.shape[1], "correlation": correlation[rows, columns].sum() / truth.shape[1]}


def correlations(X: sparse.csr_matrix, Y: sparse.csr_matrix) -> np.ndarray:
    """(t, c) Pearson correlation of each column of X (n, t) with each of Y (n, c); 0 where one is constant."""
    n, X, Y = X.shape[0], X.astype(float), Y.astype(float)
    mean_x, mean_y = X.mean(0).A1, Y.mean(0).A1
    covariance = (X.T @ Y).toarray() / n - np.outer(mean_x, mean_y)
    sd_x, sd_y = (np.sqrt(np.maximum(M.multiply(M).mean(0).A1 - m**2, 0)) for M, m in ((X, mean_x), (Y, mean_y)))
    scale = np.outer(sd_x, sd_y)
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-12)
