"""Bins and tokens, against the genuine binning; what a cell's embedding depends on, and what it must not."""

import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad
from conftest import perturbed
from scipy import sparse

from scsae_utils import embedding
from scsae_utils.embedding import at_precision, bin_cells, cell_tokens, embed, embed_tokens, token_ids, token_table
from scsae_utils.scgpt import ScGPTConfig, bin_values

GENES = [f"G{i}" for i in range(60)]


@pytest.fixture(scope="module")
def model():
    return perturbed(ScGPTConfig(embsize=16, nheads=2, d_hid=24, nlayers=2), GENES)


@pytest.fixture
def cells():
    """20 cells x 60 genes, counts with many ties, 10 to 40 genes each."""
    rng = np.random.default_rng(0)
    X = rng.geometric(0.4, (20, 60)) * (rng.random((20, 60)) < np.linspace(0.2, 0.6, 20)[:, None])
    return make(X)


def make(X, genes=GENES) -> AnnData:
    adata = AnnData(sparse.csr_matrix(np.asarray(X, np.float32)))
    adata.var_names, adata.obs_names = list(genes), [f"cell{i}" for i in range(adata.n_obs)]
    return adata


def embeddings(adata, model, **settings) -> np.ndarray:
    return embed(adata.copy(), model, progress=False, **settings).obsm["X_scGPT"]


class TestBinning:
    def test_by_hand(self):
        """Five values, edges at the quantiles 0, 1/3, 2/3, 1 (values 1, 2.33, 3.67, 5): bins 1 to 4."""
        assert bin_values(np.array([3.0, 1.0, 2.0, 5.0, 4.0]), n_bins=5).tolist() == [2, 1, 1, 4, 3]

    def test_ties_get_the_mean_of_their_draws(self):
        """Of 1, 1, 1, 9 the edges are 1, 1, 1, 9: a 1 is drawn from bins 1, 2, 3."""
        assert bin_values(np.array([1.0, 1, 1, 9]), n_bins=5).tolist() == [2, 2, 2, 4]
        drawn = [bin_values(np.array([1.0, 1, 1, 9]), 5, np.random.default_rng(i)).tolist() for i in range(200)]
        assert {bin_ for row in drawn for bin_ in row[:3]} == {1, 2, 3} and {row[3] for row in drawn} == {4}

    def test_all_equal(self):
        assert bin_values(np.full(7, 3.0)).tolist() == [25.5] * 7  # the mean of 1 to 50
        assert bin_values(np.array([0.1])).tolist() == [25.5]
        assert len(bin_values(np.array([]))) == 0

    def test_without_ties_equals_the_genuine_binning(self, genuine_module):
        genuine = genuine_module("scgpt.preprocess").binning
        rng = np.random.default_rng(0)
        for n in (1, 2, 30, 49, 50, 51, 400, 1500):
            values = rng.gamma(2, size=n)
            ours, theirs = bin_values(values), genuine(values, 51)
            inner = np.argsort(values)[1:-1]  # ends touch one edge each; a single value touches all
            np.testing.assert_array_equal(ours[inner], theirs[inner])
            if n > 1:
                assert (ours[values.argmin()], ours[values.argmax()]) == (1, 50)

    def test_with_ties_equals_the_genuine_distribution(self, genuine_module, cells):
        """Range of the genuine draws, their mean, and our own draws: all over the cells' real ties."""
        genuine = genuine_module("scgpt.preprocess").binning
        np.random.seed(0)
        for row in cells.X.toarray()[[0, 10, 19]]:
            values = row[row > 0]
            theirs = np.array([genuine(values, 51) for _ in range(2000)])
            rng = np.random.default_rng(0)
            ours = np.array([bin_values(values, 51, rng) for _ in range(2000)])
            np.testing.assert_array_equal(ours.min(0), theirs.min(0))
            np.testing.assert_array_equal(ours.max(0), theirs.max(0))
            width = theirs.max(0) - theirs.min(0) + 1
            expected = bin_values(values)
            np.testing.assert_array_less(abs(theirs.mean(0) - expected), 0.1 + 5 * width / np.sqrt(12 * 2000))
            np.testing.assert_array_equal(expected, (theirs.min(0) + theirs.max(0)) / 2)

    def test_increasing_functions_change_nothing(self, mini_cells):
        for row in (3, 900):
            log_values, counts = mini_cells.X[[row]], mini_cells.layers["counts"][[row]]
            np.testing.assert_array_equal(
                bin_values(log_values.toarray()[log_values.toarray() > 0]),
                bin_values(counts.toarray()[counts.toarray() > 0]),
            )

    def test_bins_are_ordered_and_in_range(self, mini_cells):
        values = mini_cells.X[[5]].toarray().ravel()
        values = values[values > 0]
        bins = bin_values(values)
        assert bins.min() >= 1 and bins.max() <= 50 and bins.dtype == np.float32
        order = np.argsort(values)
        assert (np.diff(bins[order]) >= 0).all()
        for value in np.unique(values):
            assert len(np.unique(bins[values == value])) == 1

    def test_each_cell_is_binned_over_the_known_genes(self, cells, model):
        more = make(np.c_[cells.X.toarray(), np.full((20, 3), 1e3)], [*GENES, "UNKNOWN", "g1", "<cls>"])
        np.testing.assert_array_equal(bin_cells(more, model).toarray()[:, :60], bin_cells(cells, model).toarray())
        assert not bin_cells(more, model).toarray()[:, 60:].any()

    def test_random_ties_follow_their_seed(self, cells, model):
        one, same, other = (bin_cells(cells, model, "random", seed).toarray() for seed in (1, 1, 2))
        assert (one == same).all() and (one != other).any()
        with pytest.raises(ValueError, match="'expected' or 'random'"):
            bin_cells(cells, model, "mean")


class TestTokens:
    def test_start_with_cls_which_carries_the_pad_value(self, cells, model):
        bins = bin_cells(cells, model)
        for row, (ids, values) in enumerate(cell_tokens(bins, token_ids(GENES, model), model)):
            assert ids[0] == model.vocab["<cls>"] and values[0] == -2
            assert [GENES[i - 3] for i in ids[1:]] == [g for g, b in zip(GENES, bins[row].toarray().ravel()) if b]
            assert (values[1:] == bins[row].data).all()

    def test_table_of_a_cell(self, model):
        """Counts 5, 1, 1: bins by quantiles; the two ones are tied."""
        cell = embed(make([[0, 5, 1, 1] + [0] * 56]), model, progress=False)
        table = token_table(cell, model, "cell0")
        assert table["gene"].tolist() == ["<cls>", "G1", "G2", "G3"]
        assert table["token"].tolist() == [1, 4, 5, 6] and table["ties"].tolist() == [0, 1, 2, 2]
        assert table["expression"].tolist()[1:] == [5, 1, 1]
        assert table["bin"].tolist() == [-2, *cell.layers["bins"].toarray()[0, 1:4]]

    def test_special_tokens_are_no_genes(self, model):
        assert token_ids(["G0", "<cls>", "<pad>", "nobody"], model).tolist() == [3, -1, -1, -1]

    def test_too_long_cells_keep_their_highest_bins(self, cells):
        short = perturbed(ScGPTConfig(16, 2, 24, 2, max_seq_len=9), GENES)
        bins = bin_cells(cells, short)
        for row, (ids, values) in enumerate(cell_tokens(bins, token_ids(GENES, short), short)):
            assert len(ids) == 9
            assert sorted(values[1:]) == sorted(bins[row].data)[-8:]
            assert (np.diff(ids[1:]) > 0).all()  # in the order of the columns

    def test_truncation_is_reported(self, cells):
        lengths = cells.X.getnnz(axis=1)
        limit = int(np.median(lengths)) + 1  # <cls> and the median number of genes
        short = perturbed(ScGPTConfig(16, 2, 24, 2, max_seq_len=limit), GENES)
        assert embed(cells, short, progress=False).uns["scgpt"]["n_truncated"] == (lengths > limit - 1).sum() > 0


class TestEmbedding:
    def test_is_of_unit_length_and_says_how_it_was_made(self, cells, model):
        adata = embed(cells, model, progress=False)
        assert adata is cells and adata.obsm["X_scGPT"].shape == (20, 16)
        np.testing.assert_allclose(np.linalg.norm(adata.obsm["X_scGPT"], axis=1), 1, rtol=1e-6)
        np.testing.assert_array_equal(adata.layers["bins"].toarray(), bin_cells(cells, model).toarray())
        settings = {"model": model.fingerprint(), "ties": "expected", "n_genes": 60, "n_genes_known": 60}
        assert settings.items() <= adata.uns["scgpt"].items() and adata.uns["scgpt"]["n_truncated"] == 0

    def test_does_not_depend_on_the_order_of_genes(self, cells, model):
        shuffled = cells[:, np.random.default_rng(1).permutation(60)].copy()
        np.testing.assert_allclose(embeddings(shuffled, model), embeddings(cells, model), atol=1e-6)

    def test_does_not_depend_on_genes_that_the_model_does_not_know(self, cells, model):
        more = make(np.c_[np.full((20, 2), 500.0), cells.X.toarray()], ["UNKNOWN", "g1", *GENES])
        np.testing.assert_array_equal(embeddings(more, model), embeddings(cells, model))

    def test_does_not_depend_on_the_other_cells(self, cells, model):
        whole = embeddings(cells, model)
        for rows in ([7], [19, 0], list(range(19, -1, -1))):
            np.testing.assert_allclose(embeddings(cells[rows], model), whole[rows], atol=1e-6)

    @pytest.mark.parametrize("batch_tokens", [1, 50, 333])
    def test_does_not_depend_on_the_size_of_batches(self, cells, model, batch_tokens):
        np.testing.assert_allclose(
            embeddings(cells, model, batch_tokens=batch_tokens), embeddings(cells, model), atol=1e-6
        )

    def test_does_not_depend_on_depth_or_the_logarithm(self, cells, model):
        other = cells.copy()
        other.X = sparse.csr_matrix(np.log1p(cells.X.toarray() * np.linspace(1, 9, 20)[:, None]))
        np.testing.assert_allclose(embeddings(other, model), embeddings(cells, model), atol=1e-6)

    def test_dense_and_sparse_expression_are_the_same(self, cells, model):
        dense = cells.copy()
        dense.X = cells.X.toarray()
        np.testing.assert_array_equal(embeddings(dense, model), embeddings(cells, model))

    def test_depends_on_the_cell(self, cells, model):
        whole = embeddings(cells, model)
        assert np.abs(whole[:, None] - whole).max(2)[~np.eye(20, dtype=bool)].min() > 1e-3

    def test_cls_alone_can_be_embedded(self, model):
        alone = [(np.array([model.vocab["<cls>"]]), np.array([-2.0], np.float32))]
        np.testing.assert_allclose(np.linalg.norm(embed_tokens(alone, model)), 1, rtol=1e-6)


class TestRefusals:
    def test_a_cell_without_known_genes_is_named(self, cells, model):
        X = cells.X.toarray()
        X[[4, 6]] = 0
        with pytest.raises(ValueError, match=r"2 cells express no gene that the model knows \(first: cell4\)"):
            embed(make(X), model, progress=False)

    @pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
    def test_values_that_cannot_be(self, cells, model, value):
        X = cells.X.toarray()
        X[3, 3] = value
        with pytest.raises(ValueError, match="negative or non-finite"):
            embed(make(X), model, progress=False)

    def test_genes_under_other_names(self, cells, model):
        cells.var_names = [f"ENSG{i:011d}" for i in range(60)]
        with pytest.raises(ValueError, match="only 0 of 60 genes.*must be gene symbols.*ENSG00000000000"):
            embed(cells, model, progress=False)

    def test_the_first_bad_cell_stops_before_any_is_embedded(self, cells, model, monkeypatch):
        X = cells.X.toarray()
        X[19] = 0
        monkeypatch.setattr(embedding, "BLOCK_CELLS", 6)
        monkeypatch.setattr(embedding, "embed_tokens", lambda *_: pytest.fail("a cell was embedded"))
        with pytest.raises(ValueError, match="first: cell19"):
            embed(make(X), model, progress=False)

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"precision": "float8"}, "precision must be 'auto' or one of float32, bfloat16, float16, not 'float8'"),
            ({"device": "cuda"}, "no device 'cuda' here; there are: cpu"),
            ({"device": "xpu"}, "no device 'xpu' here"),
            ({"compat": "scgpt"}, "compat must be None or 'embed_data'"),
            ({"compat": "embed_data", "ties": "random"}, "draws its own ties"),
            ({"compat": "embed_data", "workers": 0}, "workers must be at least 1"),
        ],
    )
    def test_settings_that_cannot_be(self, cells, model, settings, message):
        if settings.get("device") == "cuda" and torch.cuda.is_available():
            pytest.skip("there is a GPU here")
        with pytest.raises(ValueError, match=message):
            embed(cells, model, progress=False, **settings)


class TestPrecision:
    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_half_turns_embeddings_little_and_is_noted(self, cells, model, precision):
        half = embed(cells.copy(), model, precision=precision, progress=False)
        cosine = (half.obsm["X_scGPT"] * embeddings(cells, model)).sum(1)
        assert half.uns["scgpt"]["precision"] == precision and half.obsm["X_scGPT"].dtype == np.float32
        assert 0.999 < cosine.min() < 1
        assert half.uns["scgpt"]["model"] == model.fingerprint()  # the weights as they were opened
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_auto_names_what_it_chose(self, cells, model):
        chosen = embed(cells, model, precision="auto", device="auto", progress=False).uns["scgpt"]["precision"]
        assert chosen in ("float32", "bfloat16", "float16")

    def test_a_model_that_is_there_already_is_not_copied(self, model):
        assert at_precision(model, "float32", "cpu") is model
        assert at_precision(model, "bfloat16") is not model


class TestBlocks:
    @pytest.fixture
    def blocks_of_6(self, monkeypatch):
        monkeypatch.setattr(embedding, "BLOCK_CELLS", 6)

    @pytest.mark.parametrize("ties", ["expected", "random"])
    def test_do_not_matter(self, cells, model, monkeypatch, ties):
        whole = embed(cells.copy(), model, ties=ties, progress=False)
        monkeypatch.setattr(embedding, "BLOCK_CELLS", 6)
        parts = embed(cells.copy(), model, ties=ties, progress=False)
        np.testing.assert_allclose(parts.obsm["X_scGPT"], whole.obsm["X_scGPT"], atol=1e-6)
        assert (parts.layers["bins"] != whole.layers["bins"]).nnz == 0

    @pytest.mark.parametrize("dense", [False, True])
    def test_of_a_backed_file(self, cells, model, tmp_path, blocks_of_6, dense):
        expected = embeddings(cells, model)
        cells.X = cells.X.toarray() if dense else cells.X
        cells.write(tmp_path / "cells.h5ad")
        backed = embed(read_h5ad(tmp_path / "cells.h5ad", backed="r"), model, progress=False)
        np.testing.assert_array_equal(backed.obsm["X_scGPT"], expected)
        assert "bins" not in backed.layers

    def test_of_a_file_kept_by_gene_are_refused(self, cells, model, tmp_path):
        cells.X = cells.X.tocsc()
        cells.write(tmp_path / "cells.h5ad")
        with pytest.raises(ValueError, match="by gene"):
            embed(read_h5ad(tmp_path / "cells.h5ad", backed="r"), model, progress=False)

    def test_a_stopped_run_goes_on_and_ends_the_same(self, cells, model, tmp_path, blocks_of_6, monkeypatch):
        expected, out, real, done = embeddings(cells, model), tmp_path / "x.npy", embedding.embed_tokens, []

        def stops_in_the_third(*args, **kwargs):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(1)
            return real(*args, **kwargs)

        monkeypatch.setattr(embedding, "embed_tokens", stops_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            embed(cells.copy(), model, out=out, progress=False)
        assert not out.exists()
        again = []
        monkeypatch.setattr(embedding, "embed_tokens", lambda *a, **k: again.append(1) or real(*a, **k))
        finished = embed(cells.copy(), model, out=out, progress=False)
        assert len(again) == 2  # of four blocks
        np.testing.assert_array_equal(finished.obsm["X_scGPT"], expected)
        np.testing.assert_array_equal(np.load(out), expected)
        embed(cells.copy(), model, out=out, progress=False)
        assert len(again) == 2  # nothing is left to do

    def test_another_run_is_not_overwritten(self, cells, model, tmp_path):
        embed(cells.copy(), model, out=tmp_path / "x.npy", progress=False)
        before = (tmp_path / "x.npy").read_bytes()
        other = cells.copy()
        other.X = other.X * 2 + 1 * (other.X > 0)
        for adata, settings, what in [
            (cells, {"seed": 1}, "seed"),
            (cells, {"precision": "bfloat16"}, "precision"),
            (other, {}, "total"),
            (cells[:10], {}, "names"),
        ]:
            with pytest.raises(ValueError, match=f"another run .other: .*{what}"):
                embed(adata.copy(), model, out=tmp_path / "x.npy", progress=False, **settings)
        assert (tmp_path / "x.npy").read_bytes() == before
        np.save(tmp_path / "y.npy", np.ones(3))
        with pytest.raises(ValueError, match="was not made by embed"):
            embed(cells, model, out=tmp_path / "y.npy", progress=False)


class TestLikeEmbedData:
    """Against embed_data itself: see test_oracle."""

    def test_draws_follow_seed_and_processes(self, cells, model):
        many = make(np.tile(cells.X.toarray(), (8, 1)))  # three loader batches
        settings = [{}, {}, {"seed": 1}, {"workers": 2}]
        one, same, seed, workers = (embeddings(many, model, compat="embed_data", **s) for s in settings)
        assert (one == same).all() and (one != seed).any()
        np.testing.assert_array_equal(one[:64], workers[:64])  # the first process draws the first batch
        assert (one[64:128] != workers[64:128]).any()

    def test_too_long_cells_lose_random_genes(self, cells):
        short = perturbed(ScGPTConfig(16, 2, 24, 2, max_seq_len=9), GENES)
        adata = embed(cells.copy(), short, compat="embed_data", progress=False)
        assert set(adata.layers["bins"].getnnz(axis=1)) == {8}
        highest = np.sort(embed(cells.copy(), short, progress=False).layers["bins"].toarray())[:, -8:].sum(1)
        assert (adata.layers["bins"].toarray().sum(1) < highest).mean() > 0.9
        assert adata.uns["scgpt"]["compat"] == "embed_data"
