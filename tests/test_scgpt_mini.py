"""The shipped model: is it what its card says, and is it sound where the method looks?"""

import json
from importlib.resources import files

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from scsae_utils.embedding import bin_cells, cell_tokens, embed_tokens, token_ids
from scsae_utils.scgpt import load_model

NEAR_ZERO = (0.0, 0.1, 0.3)
FOLDER = files("scsae_utils") / "data" / "scgpt-mini"
MARKERS = """
    PPBP MYL9 PF4 CTSD CD163 CD14 FCGR3A FCN1 LYZ S100A8 S100A9 CST3 HLA-DRA HLA-DRB1 HLA-DPA1 HLA-DPB1 HLA-DQA1
    HLA-DQB1 HLA-DMA HLA-DMB CD74 MT-ND1 MT-ND2 MT-ND4 MT-ATP6 MT-CO1 CD19 MS4A1 CD79A CD79B IGJ MZB1 CD3D CD3E
    CD4 CD8A CD8B IL7R CCR7 FOXP3 GNLY NKG7 GZMB PRF1 KLRD1 FCER1A CD1C LILRA4 CD34 HBB ISG15 B2M ACTB
""".split()


@pytest.fixture(scope="module")
def model():
    return load_model("scgpt-mini")


@pytest.fixture(scope="module")
def pbmc():
    """700 blood cells with 10 types, log-normalised, 765 genes: never trained on."""
    import scanpy as sc

    small = sc.datasets.pbmc68k_reduced()
    return AnnData(sparse.csr_matrix(small.raw.X), obs=small.obs[["bulk_labels"]], var=small.raw.var[[]])


@pytest.fixture(scope="module")
def cells(pbmc, model):
    """Token ids and bins of each cell."""
    return cell_tokens(bin_cells(pbmc, model), token_ids(pbmc.var_names, model), model)


@pytest.fixture(scope="module")
def vectors(cells, model):
    return embed_tokens(cells, model)


def chosen(cells, n_cells, n_genes):
    """Some expressed genes of some cells: (ids, values, places)."""
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(cells))[:n_cells]:
        yield *cells[i], 1 + rng.permutation(len(cells[i][0]) - 1)[:n_genes]


def with_value(ids, values, place, value):
    return ids, np.where(np.arange(len(ids)) == place, np.float32(value), values)


def neighbour_accuracy(x, labels, k=15):
    kinds, codes = np.unique(labels, return_inverse=True)
    distance = ((x[:, None] - x[None]) ** 2).sum(-1) if len(x) < 100 else (x**2).sum(1) - 2 * x @ x.T
    np.fill_diagonal(distance, np.inf)
    near = codes[np.argpartition(distance, k, axis=1)[:, :k]]
    return np.mean([np.bincount(r, minlength=len(kinds)).argmax() for r in near] == codes)


def test_files_are_small_and_free_of_paths():
    assert (FOLDER / "model.safetensors").stat().st_size <= 10e6
    for name in ("args.json", "vocab.json", "card.json", "MODEL_CARD.md"):
        text = (FOLDER / name).read_text()
        assert not any(place in text for place in ("/tmp/", "/home/", "C:\\"))


def test_card_belongs_to_the_weights(model):
    assert model.card["fingerprint"] == model.fingerprint()
    assert model.card["genes"] == len(model.genes)
    assert not set(model.card["held_out_files"]) & set(model.card["training_cells"])
    for row in model.card["quality"]["types"]:
        assert row["model"] > row["random"]
    assert {"decoder.fc.0.weight", "mvc_decoder.gene2query.weight", "mvc_decoder.W.weight"} <= set(model.ignored)


def test_vocabulary(model, pbmc):
    assert 3000 <= len(model.genes) <= 6000
    assert set(pbmc.var_names) <= model.genes
    assert not [g for g in MARKERS if g not in model.genes]
    assert {"<pad>", "<cls>", "<eoc>"} <= set(model.vocab)


def test_aliases_lead_into_the_vocabulary(model):
    aliases = json.loads((FOLDER / "aliases.json").read_text())
    assert set(aliases.values()) <= model.genes and not set(aliases) & model.genes
    assert aliases["JCHAIN"] == "IGJ"


def test_cell_types_are_neighbours(vectors, pbmc, model):
    from sklearn.decomposition import PCA

    labels = pbmc.obs["bulk_labels"].astype(str)
    x = pbmc.X.toarray()
    components = PCA(50, random_state=0).fit_transform(((x - x.mean(0)) / (x.std(0) + 1e-9)).clip(-10, 10))
    ours, pca = neighbour_accuracy(vectors, labels), neighbour_accuracy(components, labels)
    chance = model.random_like(0)
    bins = cell_tokens(bin_cells(pbmc, chance), token_ids(pbmc.var_names, chance), chance)
    random = neighbour_accuracy(embed_tokens(bins, chance), labels)
    assert ours >= 0.95 * pca, (ours, pca)
    assert ours >= random + 0.15, (ours, random)


def test_order_of_genes_does_not_matter(cells, vectors, model):
    rng = np.random.default_rng(0)
    shuffled = []
    for ids, values in cells[:20]:
        order = np.r_[0, 1 + rng.permutation(len(ids) - 1)]
        shuffled.append((ids[order], values[order]))
    np.testing.assert_allclose(embed_tokens(shuffled, model), vectors[:20], atol=1e-5)


def test_response_to_one_gene_is_smooth(cells, model):
    """From -1 (masked) over 0 to 50: no jump, little to and fro. Path's width = its two farthest points."""
    grid = np.arange(-1, 50.1, 0.25)
    for ids, values, places in chosen(cells, 3, 2):
        for p in places:
            z = embed_tokens([with_value(ids, values, p, v) for v in grid], model).astype(np.float64)
            width = np.sqrt(2 - 2 * (z @ z.T).min())
            steps = np.linalg.norm(np.diff(z, axis=0), axis=1)
            assert steps.max() < 0.15 * width
            assert steps.sum() < 4 * width


@pytest.fixture(scope="module")
def moves(cells, model):
    """How the embedding moves when an expressed gene is removed (key None), or gets a value near zero."""
    found = {None: [], **{value: [] for value in NEAR_ZERO}}
    for ids, values, places in chosen(cells, 10, 20):
        sequences = [(ids, values), *((np.delete(ids, p), np.delete(values, p)) for p in places)]
        for value in NEAR_ZERO:
            sequences += [with_value(ids, values, p, value) for p in places]
        z = embed_tokens(sequences, model).astype(np.float64)
        for key, part in zip(found, np.split(z[1:] - z[0], 1 + len(NEAR_ZERO))):
            found[key].append(part)
    return {key: np.concatenate(parts) for key, parts in found.items()}


@pytest.mark.parametrize("value", NEAR_ZERO)
def test_a_value_near_zero_does_what_removal_does(moves, vectors, model, value):
    removed, valued = moves[None], moves[value]
    lead = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)[2][:10]
    random = np.random.default_rng(0).normal(size=(10, model.dim))
    for directions in (lead, random):
        assert np.mean([np.corrcoef(removed @ d, valued @ d)[0, 1] for d in directions]) > 0.9
    length = np.linalg.norm(removed, axis=1)
    cosine = (removed * valued).sum(1) / (length * np.linalg.norm(valued, axis=1))
    assert (cosine * length).sum() / length.sum() > 0.9
