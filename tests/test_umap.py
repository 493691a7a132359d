"""The map of many cells: a sample is laid out, the others are placed among it."""

import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData

from scsae_utils.embedding import add_umap


def test_neighbours_are_exact_also_where_scanpy_would_take_approximate_ones(monkeypatch):
    """From 8,192 cells on: what some versions of pynndescent answer, scanpy cannot read."""
    monkeypatch.setattr(sc.tl, "umap", lambda adata, random_state: None)
    cells = AnnData(obsm={"X_scGPT": np.arange(9000, dtype=np.float32)[:, None]})
    add_umap(cells)
    assert set(cells.obsp["distances"][4000].indices) == {*range(3993, 4008)} - {4000}


@pytest.fixture(scope="module")
def placed():
    """200 cells of three kinds, and each of the first 100 of the sample once more; the sample; the map."""
    rng = np.random.default_rng(0)
    sample = np.sort(np.random.default_rng(0).permutation(300)[:200])
    kinds = rng.integers(3, size=300)
    X = (5 * rng.normal(size=(3, 8))[kinds] + rng.normal(size=(300, 8))).astype(np.float32)
    rest = np.setdiff1d(np.arange(300), sample)
    X[rest], kinds[rest] = X[sample[:100]], kinds[sample[:100]]
    adata = AnnData(obsm={"X_scGPT": X})
    add_umap(adata, max_cells=200)
    return adata, sample, rest, kinds


def test_a_cell_of_the_rest_is_placed_where_the_same_cell_of_the_sample_is(placed):
    adata, sample, rest, _ = placed
    place = adata.obsm["X_umap"]
    apart = np.linalg.norm(place[rest] - place[sample[:100]], axis=1)
    assert np.isfinite(place).all() and np.median(apart) < 0.05 * place[sample].std(0).sum()


def test_kinds_stay_together(placed):
    adata, sample, rest, kinds = placed
    centres = np.array([adata.obsm["X_umap"][sample[kinds[sample] == k]].mean(0) for k in range(3)])
    nearest = np.linalg.norm(adata.obsm["X_umap"][rest][:, None] - centres, axis=2).argmin(1)
    assert (nearest == kinds[rest]).mean() > 0.95


def test_the_rest_does_not_move_the_sample_and_the_map_is_the_same_again(placed):
    adata, sample, rest, _ = placed
    again, other = adata.copy(), adata.copy()
    other.obsm["X_scGPT"][rest] = other.obsm["X_scGPT"][rest][::-1]
    for cells in (again, other):
        add_umap(cells, max_cells=200)
    np.testing.assert_array_equal(again.obsm["X_umap"], adata.obsm["X_umap"])
    np.testing.assert_array_equal(other.obsm["X_umap"][sample], adata.obsm["X_umap"][sample])
