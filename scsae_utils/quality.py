"""How good an embedding is: do a cell's neighbours have its type? Beside random weights and principal components."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler

from .cells import LEVELS, UNASSIGNED
from .embedding import BLOCK_CELLS, at_precision, bin_cells, cell_tokens, embed_tokens, token_ids
from .encoder import CellEncoder
from .metrics import knn_accuracy
from .scgpt import ScGPT


def knn_transfer(X: np.ndarray, labels, X_new: np.ndarray, labels_new, k: int = 15) -> float:
    """Accuracy of the types of new cells by their ``k`` nearest neighbours among labelled cells of another study."""
    vote = KNeighborsClassifier(n_neighbors=k).fit(X, np.asarray(labels, str))
    return float((vote.predict(X_new) == np.asarray(labels_new, str)).mean())


def principal_components(adata: AnnData, n: int = 50, fit_on=slice(None), max_cells: int = 20_000) -> np.ndarray:
    """(n_cells, n) principal components of the scaled log expression, fitted on the rows ``fit_on``.

    Of these at most ``max_cells``, drawn at random, so that no more cells than that are dense at a time.
    """
    rows = np.arange(adata.n_obs)[fit_on]
    if len(rows) > max_cells:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:max_cells])
    X = adata.X[rows].toarray()
    scaler, n = StandardScaler().fit(X), min(n, *(size - 1 for size in X.shape))
    pca = PCA(n, random_state=0).fit(np.clip(scaler.transform(X), -10, 10))
    blocks = (adata.X[i : i + max_cells].toarray() for i in range(0, adata.n_obs, max_cells))
    return np.vstack([pca.transform(np.clip(scaler.transform(X), -10, 10)).astype(np.float32) for X in blocks])


def random_embedding(adata: AnnData, model: ScGPT, seed: int = 0) -> np.ndarray:
    """(n_cells, d) embeddings of the same tokens by the same architecture with random weights."""
    bins, ids, random = adata.layers["bins"].tocsr(), token_ids(adata.var_names, model), model.random_like(seed)
    blocks = (bins[i : i + BLOCK_CELLS] for i in range(0, adata.n_obs, BLOCK_CELLS))
    return np.vstack([embed_tokens(cell_tokens(block, ids, model), random) for block in blocks])


def embedding_noise(adata: AnnData, model: CellEncoder, seed: int = 0, n_cells: int = 500) -> pd.DataFrame:
    """How far chance and rounding move a cell's embedding, beside how far the nearest other cell is.

    Returns
    -------
    One row for each of at most ``n_cells`` random cells, Euclidean distances. ``two draws of the ties``: between two
    embeddings of the cell, its ties broken at random as ``embed_data`` does; ``bfloat16`` and ``float16``: between
    the embedding and that in half precision; ``nearest other cell``: to the nearest of the other cells, in the first
    draw.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(adata.n_obs)[:n_cells])
    cells, ids = adata[rows], token_ids(adata.var_names, model)
    draws = [
        embed_tokens(cell_tokens(bin_cells(cells, model, "random", seed + i), ids, model), model) for i in range(2)
    ]
    tokens = cell_tokens(bin_cells(cells, model), ids, model)
    exact = embed_tokens(tokens, model)
    half = {p: embed_tokens(tokens, at_precision(model, p)) for p in ("bfloat16", "float16")}
    return pd.DataFrame(
        {
            "two draws of the ties": np.linalg.norm(draws[0] - draws[1], axis=1),
            **{p: np.linalg.norm(exact - x, axis=1) for p, x in half.items()},
            "nearest other cell": NearestNeighbors(n_neighbors=2).fit(draws[0]).kneighbors(draws[0])[0][:, 1],
        },
        index=cells.obs_names,
    )


def compare_embeddings(adata: AnnData, model: ScGPT, k: int = 15, max_cells: int = 20_000) -> pd.DataFrame:
    """Accuracy of cell types by nearest neighbours: the model, 50 principal components, random weights.

    Columns: each study by itself (low-level types, leave-one-out), then each study with the neighbours taken from the
    others (mid-level types that both have; components are fitted on the others). Cells without a label are left out.
    Of more than ``max_cells`` cells, so many are compared, drawn at random.
    """
    if adata.n_obs > max_cells:
        adata = adata[np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:max_cells])].copy()
    random = random_embedding(adata, model)
    study = adata.obs["study"].astype(str).to_numpy()
    low, mid = (adata.obs[LEVELS[level]].astype(str).to_numpy() for level in ("low", "mid"))
    table: dict[str, dict[str, float]] = {"scGPT": {}, "50 principal components": {}, "random weights": {}}

    def spaces(fit_on) -> list[np.ndarray]:
        return [adata.obsm["X_scGPT"], principal_components(adata, fit_on=fit_on), random]

    for name in sorted(set(study)):
        rows = (study == name) & (low != UNASSIGNED)
        if len(set(low[rows])) > 1 and rows.sum() > k:
            for row, X in zip(table.values(), spaces(study == name)):
                row[f"within {name}"] = knn_accuracy(X[rows], low[rows], k)
    for name in sorted(set(study)) if len(set(study)) > 1 else []:
        shared = set(mid[study == name]) & set(mid[study != name]) - {UNASSIGNED}
        new, known = (study == name) & np.isin(mid, list(shared)), (study != name) & np.isin(mid, list(shared))
        if len(shared) > 1 and known.sum() > k:
            for row, X in zip(table.values(), spaces(known)):
                row[f"across, to {name}"] = knn_transfer(X[known], mid[known], X[new], mid[new], k)
    return pd.DataFrame(table).T
