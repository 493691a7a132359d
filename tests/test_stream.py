"""Large files: what is read in blocks is what the same cells give in memory."""

import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from conftest import perturbed
from scipy import sparse

from scsae_utils import stream
from scsae_utils.cells import load_cells
from scsae_utils.embedding import embed
from scsae_utils.scgpt import ScGPTConfig
from scsae_utils.stream import Moments, variable_genes

GENES = [f"GENE{i}" for i in range(400)]
SETTINGS = {"label": "label", "label_high": "top", "study": "donor", "n_top_genes": 60, "genes": GENES[:350] + ["NEW"]}


def counts(n_cells=300, seed=0) -> sparse.csr_matrix:
    """Counts of three types with programs of their own, genes of all frequencies, some cells and genes empty."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.4, 1, (3, len(GENES)))[np.arange(n_cells) % 3]
    X = rng.poisson(rate * rng.gamma(4, 0.25, (n_cells, 1))).astype(np.float32)
    X[[4, 5, n_cells - 1]], X[:, [7, 8]] = 0, 0
    return sparse.csr_matrix(X)


@pytest.fixture
def h5ad(tmp_path):
    """Writes counts, or other cells, as a file."""

    def write(X=None, symbols=GENES):
        X = counts() if X is None else X
        i = np.arange(X.shape[0])
        obs = pd.DataFrame({"label": i % 3, "top": "all", "donor": i * 4 // len(i)}, index=[f"cell{j}" for j in i])
        AnnData(X, obs.astype(str).astype("category"), pd.DataFrame(index=symbols)).write_h5ad(tmp_path / "large.h5ad")
        return tmp_path / "large.h5ad"

    return write


@pytest.fixture
def in_blocks(monkeypatch):
    """Reads every file in blocks of 37 cells."""
    monkeypatch.setattr(stream, "BLOCK", 37)
    monkeypatch.setattr(stream, "LARGE", 0)


def assert_same(one: AnnData, other: AnnData) -> None:
    assert (one.X != other.X).nnz == 0 and sparse.isspmatrix_csr(one.X)
    assert one.layers.keys() == other.layers.keys()
    assert all((one.layers[k] != other.layers[k]).nnz == 0 for k in one.layers)
    pd.testing.assert_frame_equal(one.obs, other.obs)
    columns = one.var.columns.intersection(other.var.columns)
    assert len(columns) in (0, 4, 5, 6)  # scanpy's; of several studies; both from scanpy
    pd.testing.assert_frame_equal(one.var[columns], other.var[columns], check_dtype=False)  # scanpy rounds one of them


class TestTheSameAsInMemory:
    def loaded(self, path, monkeypatch, **settings):
        settings = SETTINGS | settings
        whole = load_cells(path, **settings)
        monkeypatch.setattr(stream, "BLOCK", 37)
        monkeypatch.setattr(stream, "LARGE", 0)
        return whole, load_cells(path, **settings)

    @pytest.mark.parametrize("study", ["donor", None])
    def test_counts_of_several_studies_and_of_one(self, h5ad, monkeypatch, study):
        whole, blocks = self.loaded(h5ad(), monkeypatch, study=study)
        assert whole.n_obs == 297 and 60 <= whole.n_vars < 63 and "counts" in whole.layers
        assert_same(blocks, whole)

    def test_all_genes(self, h5ad, monkeypatch):
        assert_same(*self.loaded(h5ad(), monkeypatch, n_top_genes=None, genes=None))

    def test_log_values(self, h5ad, monkeypatch):
        whole, blocks = self.loaded(h5ad((counts() / 3).log1p()), monkeypatch)
        assert "counts" not in blocks.layers
        assert_same(blocks, whole)

    def test_a_dense_matrix(self, h5ad, monkeypatch):
        assert_same(*self.loaded(h5ad(counts().toarray()), monkeypatch))

    def test_shared_symbols_and_aliases(self, h5ad, monkeypatch, caplog):
        symbols = [*GENES[:380], *GENES[:19], "OLD"]
        with pytest.warns(UserWarning, match="Variable names are not unique"):
            whole, blocks = self.loaded(h5ad(symbols=symbols), monkeypatch, n_top_genes=330, aliases={"OLD": "NEW"})
        assert_same(blocks, whole)
        assert "NEW" in blocks.var_names and caplog.text.count("19 genes share a symbol") == 2

    def test_embeddings_of_a_file_that_filled_block_by_block(self, h5ad, tmp_path, in_blocks, monkeypatch):
        backed = load_cells(h5ad(), **SETTINGS, out=tmp_path / "panel.h5ad")
        assert backed.isbacked and not (tmp_path / "panel.h5ad.part").exists()
        monkeypatch.setattr(stream, "LARGE", 10**9)
        whole = load_cells(tmp_path / "large.h5ad", **SETTINGS)
        assert_same(ad.read_h5ad(tmp_path / "panel.h5ad"), whole)
        model = perturbed(ScGPTConfig(embsize=16, nheads=2, d_hid=24, nlayers=2), GENES)
        embed(backed, model, out=tmp_path / "a.npy", progress=False)
        embed(whole, model, progress=False)
        np.testing.assert_array_equal(backed.obsm["X_scGPT"], whole.obsm["X_scGPT"])
        pd.testing.assert_frame_equal(backed.obs, whole.obs)


class TestZarr:
    """What a zarr holds is read as what an h5ad does, whole and in blocks."""

    @pytest.fixture(params=["sparse", "dense"])
    def both(self, request, h5ad):
        path = h5ad(counts() if request.param == "sparse" else counts().toarray())
        ad.read_h5ad(path).write_zarr(path.with_suffix(".zarr"))
        return path, path.with_suffix(".zarr")

    @pytest.mark.parametrize("large", [10**9, 0], ids=["whole", "in blocks"])
    def test_the_same_as_an_h5ad(self, both, monkeypatch, large):
        monkeypatch.setattr(stream, "BLOCK", 37)
        monkeypatch.setattr(stream, "LARGE", large)
        of_h5ad, of_zarr = (load_cells(path, **SETTINGS) for path in both)
        assert of_zarr.n_obs == 297
        assert_same(of_zarr, of_h5ad)

    def test_it_fills_a_file_block_by_block(self, both, tmp_path, in_blocks):
        cells = load_cells(both[1], **SETTINGS, out=tmp_path / "panel.h5ad")
        assert_same(cells.to_memory(), load_cells(both[0], **SETTINGS, out=tmp_path / "other.h5ad").to_memory())


class TestVariableGenes:
    @pytest.mark.parametrize("n_batches", [1, 4])
    @pytest.mark.parametrize("n_top", [1, 100, 5000])
    def test_are_those_of_scanpy(self, n_batches, n_top):
        rng = np.random.default_rng(n_batches)
        adata = AnnData(sparse.csr_matrix(rng.poisson(rng.gamma(0.2, 1, 1500), (200, 1500)).astype(np.float32)))
        adata.obs["batch"] = pd.Categorical(rng.integers(n_batches, size=200).astype(str))
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
        key = "batch" if n_batches > 1 else None
        genuine = sc.pp.highly_variable_genes(adata, n_top_genes=n_top, batch_key=key, inplace=False)
        moments = Moments(n_batches, 1500)
        for i in range(0, 200, 64):
            moments.add(adata.X[i : i + 64], adata.obs["batch"].cat.codes.to_numpy(int)[i : i + 64])
        ours = variable_genes(moments, adata.var_names, n_top)
        pd.testing.assert_frame_equal(ours, genuine.set_axis(adata.var_names)[ours.columns], check_dtype=False)


class TestRefusals:
    @pytest.mark.parametrize(
        "cell, value, message",
        [(0, np.nan, "NaN"), (250, np.inf, "infinite"), (299, -1, "negative"), (120, 0.5, "neither counts")],
    )
    def test_a_bad_value_in_any_block(self, h5ad, in_blocks, tmp_path, cell, value, message):
        X = counts().tolil()
        X[0, 0], X[cell, 3] = 50, value  # beside counts of 50, a half is no logarithm
        path = h5ad(X.tocsr())
        for out in (None, tmp_path / "panel.h5ad"):
            with pytest.raises(ValueError, match=message):
                load_cells(path, **SETTINGS, out=out)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["large.h5ad"]

    def test_nothing_but_empty_cells(self, h5ad, in_blocks):
        with pytest.raises(ValueError, match="no cells with any expression"):
            load_cells(h5ad(sparse.csr_matrix((50, 400), dtype=np.float32)), **SETTINGS)

    def test_columns_are_checked_before_the_first_value(self, h5ad, in_blocks):
        path = h5ad(counts() * np.nan)
        with pytest.raises(ValueError, match="did you mean 'label'"):
            load_cells(path, label="Label")

    def test_a_file_by_gene_is_read_whole_and_cannot_fill_a_file(self, h5ad, in_blocks, tmp_path, caplog):
        path = h5ad(counts().tocsc())
        assert load_cells(path, **SETTINGS).n_obs == 297 and "read whole" in caplog.text
        with pytest.raises(ValueError, match="by gene"):
            load_cells(path, **SETTINGS, out=tmp_path / "panel.h5ad")

    def test_a_stop_while_the_file_fills_leaves_what_was_there(self, h5ad, in_blocks, tmp_path, monkeypatch):
        path, out = h5ad(), tmp_path / "panel.h5ad"
        load_cells(path, **SETTINGS, out=out).file.close()
        before, add = out.read_bytes(), stream.Panel.add

        def stops_at_cell_150(panel, block, obs):
            if "cell150" in obs.index:
                raise KeyboardInterrupt
            add(panel, block, obs)

        monkeypatch.setattr(stream.Panel, "add", stops_at_cell_150)
        with pytest.raises(KeyboardInterrupt):
            load_cells(path, **SETTINGS, out=out)
        assert out.read_bytes() == before and not (tmp_path / "panel.h5ad.part").exists()
        monkeypatch.undo()
        assert load_cells(path, **SETTINGS, out=out).n_obs == 297

    def test_the_file_that_is_read_is_not_written(self, h5ad, in_blocks):
        path = h5ad()
        with pytest.raises(ValueError, match="out is the file that is read"):
            load_cells(path, **SETTINGS, out=path)

    def test_damage_is_named(self, h5ad, in_blocks):
        path = h5ad()
        with h5py.File(path, "r+") as file:
            indices = file["X/indices"]
            indices[-5:] = 4000
        with pytest.raises(ValueError, match="damaged"):
            load_cells(path, **SETTINGS)
        with h5py.File(path, "r+") as file:
            file["X"].attrs["shape"] = (290, 400)
        with pytest.raises(ValueError, match="damaged: X is .290, 400., obs and var are .300, 400."):
            load_cells(path, **SETTINGS)

    def test_packaged_cells_fill_no_file(self, tmp_path):
        with pytest.raises(ValueError, match="for files"):
            load_cells("mini", out=tmp_path / "panel.h5ad")


MEASURE = """
import sys
from pathlib import Path
from scsae_utils import cells, stream

def highest():  # resident set of this process so far, in MB
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3

def grown(path, **out):
    before = highest()
    cells.load_cells(path, label="label", study="donor", n_top_genes=60, **out)
    return highest() - before

stream.BLOCK = 512
small, large, out = sys.argv[1:]
grown(small, out=out)  # what is compiled and imported
print(grown(large, out=out), grown(large))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_a_file_is_never_whole_in_memory(h5ad, tmp_path):
    """16,000 cells in 32 blocks: less grows than the matrix itself; in memory, it is there more than twice."""
    small = h5ad().rename(tmp_path / "small.h5ad")
    X = sparse.vstack([sparse.hstack([counts(1000, seed) for seed in range(10)], "csr")] * 16, "csr")
    large = h5ad(X, symbols=[f"GENE{i}" for i in range(4000)])
    command = [sys.executable, "-c", MEASURE, small, large, tmp_path / "out.h5ad"]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    in_blocks, whole = map(float, child.stdout.split())
    size = (X.data.nbytes + X.indices.nbytes) / 1e6
    assert in_blocks < size and whole > 2 * size, (in_blocks, whole, size)
