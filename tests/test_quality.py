"""References: nearest neighbours by hand, principal components against scanpy, random weights, other objectives."""

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

from scsae_utils.concepts import add_taxonomy, concept_data
from scsae_utils.controls import taxonomy_nulls, types_found
from scsae_utils.quality import (
    compare_embeddings,
    embedding_noise,
    knn_accuracy,
    knn_transfer,
    principal_components,
    random_embedding,
)
from scsae_utils.sae import SAEConfig
from scsae_utils.training import train_sae

SMALL = SAEConfig("topk", n_concepts=16, batch_size=64, learning_rate=1e-2, epochs=5, k=2)


def test_a_cell_is_not_its_own_neighbour():
    """On a line, a at 0, 1, 2 and b at 10: b's three nearest others are all a."""
    X = np.array([[0.0], [1], [2], [10]])
    assert knn_accuracy(X, ["a", "a", "a", "b"], k=3) == 3 / 4
    assert knn_accuracy(X, ["a", "b", "a", "b"], k=1) == 0  # 0 and 1 are each other's nearest; 2 has 1, 10 has 2


def test_transfer_takes_neighbours_from_the_labelled_cells_only():
    assert knn_transfer(np.array([[0.0], [10]]), ["a", "b"], np.array([[1.0], [2], [9]]), ["a", "b", "b"], k=1) == 2 / 3


def test_principal_components_equal_scanpy_up_to_sign():
    X = np.random.default_rng(0).gamma(1, size=(40, 12)).astype(np.float32)
    ours = principal_components(AnnData(sparse.csr_matrix(X)), n=3)
    theirs = AnnData(X.copy())
    sc.pp.scale(theirs, max_value=10)
    sc.pp.pca(theirs, n_comps=3)
    for i in range(3):
        assert abs(np.corrcoef(ours[:, i], theirs.obsm["X_pca"][:, i])[0, 1]) == pytest.approx(1, abs=1e-4)


def test_principal_components_are_fitted_on_the_given_cells_alone():
    X = np.random.default_rng(0).gamma(1, size=(40, 12)).astype(np.float32)
    changed = X.copy()
    changed[30:] *= 3
    a, b = (principal_components(AnnData(sparse.csr_matrix(x)), 3, fit_on=slice(0, 30)) for x in (X, changed))
    np.testing.assert_allclose(a[:30], b[:30], atol=1e-5)
    assert abs(a[30:] - b[30:]).max() > 0.1


def test_principal_components_of_many_cells_are_fitted_on_a_sample_and_computed_in_blocks():
    """Three directions and hardly any noise: any 60 cells show the same ones."""
    rng = np.random.default_rng(0)
    X = (rng.gamma(2, size=(200, 3)) @ rng.gamma(1, size=(3, 12))).astype(np.float32)
    whole, parts = (principal_components(AnnData(sparse.csr_matrix(X)), 3, max_cells=m) for m in (1000, 60))
    assert parts.shape == (200, 3) and abs(whole - parts).max() > 0
    shared = np.linalg.svd(np.linalg.qr(whole - whole.mean(0))[0].T @ np.linalg.qr(parts - parts.mean(0))[0])[1]
    assert shared.min() > 0.99


def test_random_weights_are_another_network_and_the_same_each_time(embedded, tiny_model):
    first, again = (random_embedding(embedded, tiny_model, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert abs(first - embedded.obsm["X_scGPT"]).max() > 0.01


def test_comparison_has_every_study_and_the_three_embeddings(embedded, tiny_model):
    table = compare_embeddings(embedded, tiny_model, k=5)
    assert table.index.tolist() == ["scGPT", "50 principal components", "random weights"]
    studies = sorted(embedded.obs["study"].unique())
    assert [c for c in table if c.startswith("within")] == [f"within {s}" for s in studies]
    assert table.to_numpy().min() >= 0 and table.to_numpy().max() <= 1


def test_ties_are_noise_only_if_there_are_ties(embedded, tiny_model):
    noise = embedding_noise(embedded, tiny_model, n_cells=30)
    assert noise.shape == (30, 4) and (noise > 0).all(axis=None)
    untied = embedded[:30].copy()
    rng = np.random.default_rng(0)
    untied.X.data = rng.permutation(len(untied.X.data)).astype(np.float32) + 1
    still = embedding_noise(untied, tiny_model, n_cells=30)
    assert still["two draws of the ties"].max() < 1e-6
    assert still["bfloat16"].median() > still["float16"].median() > 0


def test_types_are_found_by_concepts_chosen_on_training_cells():
    """Concept 0 is b everywhere; concept 1 is t in training and silent on held-out cells."""
    U = np.zeros((40, 2), np.float32)
    types, split = np.array(["b", "t"] * 20), np.array(["train"] * 20 + ["validation"] * 20)
    U[types == "b", 0] = 1
    U[(types == "t") & (split == "train"), 1] = 1
    obs = pd.DataFrame({c: types for c in ("cell_type", "cell_type_mid", "cell_type_high")}).assign(split=split)
    var = pd.DataFrame({"kept": True, "n_cells": (U > 0).sum(0)}, index=["concept_0", "concept_1"])
    concepts = AnnData(sparse.csr_matrix(U), obs=obs.astype("category"), var=var)
    assert types_found(concepts) == {"b": 1.0}
    assert types_found(concepts, min_cells=11) == {}


def test_nulls_go_through_the_same_steps(embedded, tiny_model):
    sae = train_sae(embedded, SMALL, progress=False)
    concepts = add_taxonomy(concept_data(embedded, sae, 0.01))
    table = taxonomy_nulls(embedded, tiny_model, sae, concepts)
    assert table.index.tolist() == ["scGPT", "random weights", "principal components"]
    kinds = ["whole-cell-type", "sub-cell-type", "cross-cell-type"]
    assert (table[kinds].sum(axis=1) == table["concepts"]).all()
    assert table.at["scGPT", "concepts"] == concepts.var["kept"].sum()
