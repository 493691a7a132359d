"""Dictionaries side by side on held-out cells: what is scored, on which cells, and at which sparsity."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scsae_utils import plots
from scsae_utils.concepts import concept_data
from scsae_utils.controls import best_f1, compare_dictionaries, held_out_scores, paper_at, sweep
from scsae_utils.metrics import l0, variance_explained
from scsae_utils.sae import ARCHITECTURES, SAEConfig
from scsae_utils.synthetic import SyntheticConfig, make_synthetic
from scsae_utils.training import train_sae

CONFIG = SAEConfig("batchtopk", 24, 64, 1e-2, 30, l1=3e-3, k=4)


@pytest.fixture(scope="module")
def trained(embedded):
    return train_sae(embedded, CONFIG, progress=False)


def test_scores_are_of_held_out_cells(embedded, trained):
    scores = held_out_scores(embedded, trained, 0.01)
    held_out = embedded[embedded.obs["split"] == "validation"]
    U = trained.activations(held_out.obsm["X_scGPT"])
    expected = variance_explained(held_out.obsm["X_scGPT"], trained.decode_sparse(U))
    assert scores["variance explained"] == pytest.approx(expected, abs=1e-5)
    assert scores["concepts per cell"] == l0(U)
    assert scores["surviving"] == concept_data(embedded, trained, 0.01).var["kept"].mean()


def test_concepts_are_chosen_on_training_cells(embedded, trained):
    """Types of held-out cells that are mixed up afterwards change the scores, not the choice."""
    concepts = concept_data(embedded, trained, 0.01)
    before = best_f1(concepts)
    assert before.between(0, 1).all() and before.max() > 0.5
    rows = np.flatnonzero(concepts.obs["split"] == "validation")
    for column in ("cell_type", "cell_type_mid", "cell_type_high"):
        values = concepts.obs[column].astype(str).to_numpy()
        values[rows] = values[np.random.default_rng(0).permutation(rows)]
        concepts.obs[column] = pd.Categorical(values)
    assert best_f1(concepts).mean() < before.mean()


def test_the_papers_penalty_is_found():
    """Cells of which each has three features: the penalty for six concepts."""
    a = make_synthetic(SyntheticConfig(n_cells=600, dim=32, n_features=48, l0=3, groups=8)).a
    config = SAEConfig("topk", 48, 100, 1e-2, 40, l1=6e-3, k=6)
    found = train_sae(a, paper_at(AnnData(obsm={"X_scGPT": a}), config), progress=False)
    assert found.config.sae == "paper" and found.config.l1 != 6e-3
    assert found.history["concepts_per_cell"].iloc[-1] == pytest.approx(6, rel=0.2)


def test_every_architecture_and_reference_is_there(embedded):
    table = compare_dictionaries(embedded, CONFIG, 0.01)
    assert table.index.tolist() == [*ARCHITECTURES, "random dictionary", "pca", "ica", "nmf", "raw"]
    assert table.notna().all(axis=None)
    close = table.loc[
        ["topk", "batchtopk", "matryoshka", "pca", "ica", "raw", "random dictionary"], "concepts per cell"
    ]
    assert close.between(2.5, 6).all()
    assert table.at["batchtopk", "variance explained"] > table.at["random dictionary", "variance explained"]


def test_sweep_has_every_point_as_the_mean_over_seeds(embedded):
    table = sweep(embedded, replace(CONFIG, epochs=3), [12, 24], [2, 4], 0.01, progress=False)
    assert table[["n_concepts", "k"]].to_numpy().tolist() == [[12, 2], [12, 4], [24, 2], [24, 4]]
    assert table["stability"].between(-1, 1).all()
    settings = replace(CONFIG, n_concepts=24, k=2, epochs=3)
    alone = [
        held_out_scores(embedded, train_sae(embedded, replace(settings, seed=s), progress=False), 0.01) for s in (0, 1)
    ]
    assert table.loc[2, "mean F1"] == pytest.approx(np.mean([each["mean F1"] for each in alone]))
    figure = plots.sweep(table, 24, 2)
    assert [ax.get_ylabel() for ax in figure.axes][0] == "variance explained"
    assert figure.axes[0].lines[-1].get_ydata().tolist() == [table.loc[2, "variance explained"]]
    plt.close(figure)


def test_cells_without_types_have_no_scores():
    a = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    obs = pd.DataFrame({c: ["Unassigned"] * 60 for c in ("cell_type", "cell_type_mid", "cell_type_high")})
    cells = AnnData(obs=obs.assign(split=["train", "validation"] * 30), obsm={"X_scGPT": a})
    sae = train_sae(a, SAEConfig("topk", 8, 32, 1e-2, 3, k=2), progress=False)
    assert len(best_f1(concept_data(cells, sae))) == 0
