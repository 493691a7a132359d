"""Real cells, the shipped model: concepts of known biology, each found by what it does, and what they are called.

The concept of a cell type is the one that fits it best. That of a program is found by an experiment: the genes of the
program are taken out of the training cells that express them most, the model runs again, and the concept that loses the
largest share is the one. What is then tested was not used to find them: the attribution of single genes in the
prototypes, and the gene sets and words of the drivers.
"""

import numpy as np
import pytest
from scipy import sparse

import scsae_utils
from scsae_utils.attribution import attribute, gene_summary
from scsae_utils.cells import split_cells
from scsae_utils.concepts import add_taxonomy, best_concept_for_type, concept_data, kept
from scsae_utils.enrichment import over_representation
from scsae_utils.genesets import gene_sets
from scsae_utils.names import name_concepts
from scsae_utils.words import gene_words, word_counts

FAMILIES = {
    "B cell": ["CD79A", "CD79B", "MS4A1", "IGLL5"],
    "alarmins": ["S100A8", "S100A9", "LYZ"],
    "MHC class II": [
        *("HLA-DRA", "HLA-DRB1", "HLA-DRB5", "HLA-DPA1", "HLA-DPB1", "HLA-DQA1", "HLA-DQA2", "HLA-DQB1"),
        *("HLA-DMA", "HLA-DMB", "CD74"),
    ],
    "cytotoxic": ["NKG7", "GNLY", "GZMB"],
}


TYPES = {"B cell": "B_lymphocytes", "cytotoxic": "NK"}


@pytest.fixture(scope="module")
def cells(mini_cells):
    model = scsae_utils.load_model("scgpt-mini")
    adata = split_cells(mini_cells[:, mini_cells.var_names.isin(model.genes)].copy())
    return scsae_utils.embed(adata, model, progress=False), model


@pytest.fixture(scope="module")
def sae(cells):
    return scsae_utils.train_sae(
        cells[0], sae="batchtopk", n_concepts=128, k=8, learning_rate=1e-3, batch_size=256, epochs=150, progress=False
    )


@pytest.fixture(scope="module")
def concepts(cells, sae):
    return add_taxonomy(concept_data(cells[0], sae, min_frequency=0.015))


@pytest.fixture(scope="module")
def found(cells, sae, concepts):
    """Family to the number of its concept."""
    adata, model = cells
    there = kept(concepts).var_names
    numbers = np.flatnonzero(concepts.var_names.isin(there))
    chosen = {family: best_concept_for_type(concepts, cell_type) for family, cell_type in TYPES.items()}
    for family in FAMILIES.keys() - TYPES.keys():
        genes = FAMILIES[family]
        train = adata[adata.obs["split"] == "train"]
        most = np.argsort(-train[:, genes].X.mean(axis=1).A1)[:40]
        with_, without = train[most].copy(), train[most].copy()
        without.X = sparse.csr_matrix(without.X.multiply(~adata.var_names.isin(genes)))
        without.X.eliminate_zeros()
        scsae_utils.embed(without, model, progress=False)
        before, after = (sae.activations(c.obsm["X_scGPT"])[:, numbers].toarray() for c in (with_, without))
        often = (before > 0).sum(axis=0) >= 10
        loss = (before - after).sum(axis=0) / np.maximum(before.sum(axis=0), 1e-9)
        chosen[family] = int(numbers[np.argmax(np.where(often, loss, -np.inf))])
    return chosen


@pytest.fixture(scope="module")
def drivers(cells, sae, found):
    attributions = attribute(*cells, sae, sorted(set(found.values())), n_prototypes=4, progress=False)
    summary = gene_summary(attributions, 0.05, 2).rename(columns={"mean": "attribution"})
    return summary.reset_index()


@pytest.fixture(scope="module")
def names(cells, concepts, drivers):
    words = gene_words(cells[0].var_names)
    return name_concepts(concepts, cells[0], drivers, words, gene_sets())


def strongest(drivers, concept, n=20):
    return drivers[drivers["concept"] == concept].nlargest(n, "attribution")["gene"].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_among_the_drivers(family, found, drivers, cells):
    top = strongest(drivers, found[family])
    row = over_representation(top, {family: FAMILIES[family]}, cells[0].var_names).iloc[0]
    assert row["count"] >= 2 and row["pvalue"] < 0.01


@pytest.mark.parametrize(
    "family, gene_set", [("B cell", "B cell"), ("alarmins", "monocyte"), ("cytotoxic", "NK"), ("MHC class II", "MHC")]
)
def test_the_gene_set_says_what_it_is(family, gene_set, found, names):
    row = names.loc[f"concept_{found[family]}"]
    assert gene_set in row["gene_set"] and row["gene_set_q"] < 0.05 and row["named_by"]


def test_a_concept_of_b_cells_is_about_immunoglobulins(found, drivers, cells):
    """Not with a q-value below 0.05: names of genes are short, and twenty genes are few."""
    words = gene_words(cells[0].var_names)
    top = [gene for gene in strongest(drivers, found["B cell"]) if words[gene]]
    assert {"CD79A", "MS4A1"} <= set(top)
    table = word_counts(top, words).set_index("word")
    for word in ("B-cell", "immunoglobulin"):
        assert table.loc[word, "count"] >= 3 > 5 * table.loc[word, "expected"]


def test_a_concept_of_antigen_presentation_is_about_class_ii(found, names):
    row = names.loc[f"concept_{found['MHC class II']}"]
    assert "class II" in row["words"] and row["words_q"] < 1e-3


@pytest.mark.parametrize("family", TYPES)
def test_the_drivers_alone_tell_the_cells(family, found, names):
    row = names.loc[f"concept_{found[family]}"]
    assert row["auroc_low"] > 0.6 and row["auroc"] > row["auroc_random"]
