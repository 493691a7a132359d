"""Hostile input, one row each: what is given, and what must happen. Either a clear error, or the right result.

Cells are read whole and in blocks; either way the file that was given stays as it is.
"""

import json
import pickle
import shutil

import anndata as ad
import h5py
import numcodecs
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from conftest import perturbed
from safetensors.torch import load_file, save_file
from scipy import sparse

from scsae_utils import embed, load_cells, load_model, train_sae
from scsae_utils.cells import UNASSIGNED
from scsae_utils.files import read, write
from scsae_utils.scgpt import ScGPTConfig, save_model

GENES = [f"GENE{i}" for i in range(15)]
N = 12
NO_CELLS = "not an .h5ad or .zarr file"
COUNTS = np.random.default_rng(0).poisson(1.0, (N, len(GENES))).astype(np.float32)
COUNTS[:, 0] += 1
LOGS = np.log1p(COUNTS / COUNTS.sum(1, keepdims=True) * 1e4)


def with_value(value, X=COUNTS):
    """X with one other value."""
    X = X.copy()
    X[3, 3] = value
    return X


def damaged(change):
    """Given as a sparse matrix, in whose file ``change`` is made."""

    def edit(path):
        with h5py.File(path, "r+") as file:
            change(file)

    return {"X": sparse.csr_matrix(COUNTS), "after": edit}


def put(name, content):
    """Another data set under a name of the file."""

    def change(file):
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = content(file) if callable(content) else content
        file[name].attrs.update(attributes)

    return change


def cut(share):
    """Keep so much of a file, as a download that stopped."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * share)])


def same_expression(cells):
    np.testing.assert_allclose(cells.X.toarray(), LOGS, rtol=1e-5)
    assert list(cells.var_names) == GENES and list(cells.obs_names) == [f"cell{i}" for i in range(N)]


def types(*expected):
    """The labels, in turn."""

    def check(cells):
        assert cells.obs["cell_type"].tolist() == list(expected) * (cells.n_obs // len(expected))

    return check


def shape(*expected):
    def check(cells):
        assert cells.shape == expected

    return check


def five_genes_or_more(cells):  # more if some are equally variable
    assert cells.n_obs == N and 5 <= cells.n_vars < len(GENES)


def left_out(*rows):
    def check(cells):
        np.testing.assert_allclose(cells.X.toarray(), np.delete(LOGS, rows, 0), rtol=1e-5)

    return check


def most_expressed_of_two(cells):
    assert cells.n_vars == len(GENES) - 1 and cells.var_names.is_unique
    more = int(COUNTS[:, 1].sum() > COUNTS[:, 0].sum())
    left = np.delete(COUNTS, 1 - more, 1)
    np.testing.assert_allclose(cells.X.toarray(), np.log1p(left / left.sum(1, keepdims=True) * 1e4), rtol=1e-5)


def dates_are_text(cells):
    assert list(cells.var_names[:3]) == ["2-Sep", "1-Mar", "SEPT1"]


EMPTY = np.where(np.isin(np.arange(N), [2, 5])[:, None], 0, COUNTS)
ALL = {"genes": GENES}
ENSEMBL = [f"ENSG{i:011d}.{i}" for i in range(15)]
PLAIN_HTML = "‹b onclick=\"x('y')\"›A & B‹/b›"
HTML = ["<b onclick=\"x('y')\">A & B</b>", "`c`", "d\ne "]

CELLS = [  # what, how the file is made and loaded, what must happen: the words of the error, or a check of the cells
    ("a file that was cut off in the middle", {"after": cut(0.5)}, NO_CELLS),
    ("a file that lacks its last bytes", {"after": cut(0.99)}, NO_CELLS),
    ("an empty file", {"after": cut(0)}, NO_CELLS),
    ("a matrix that points outside of its columns", damaged(lambda f: f["X/indices"].__setitem__(3, 999)), "damaged"),
    ("a matrix that points before its columns", damaged(lambda f: f["X/indices"].__setitem__(3, -5)), "damaged"),
    ("a matrix whose rows do not follow each other", damaged(lambda f: f["X/indptr"].__setitem__(3, 99)), "damaged"),
    ("a matrix that ends before its last row", damaged(lambda f: f["X/indptr"].__setitem__(-1, 10**6)), "damaged"),
    ("fewer values than the matrix says", damaged(put("X/data", COUNTS[COUNTS > 0][2:])), "damaged"),
    ("fewer cell names than cells", damaged(put("obs/_index", [b"a", b"b"])), NO_CELLS),
    ("an index of cells that is not there", damaged(lambda f: f["obs"].attrs.update(_index="x")), NO_CELLS),
    ("labels whose codes have no category", damaged(put("obs/label/codes", np.full(N, 77, "i1"))), NO_CELLS),
    ("counts by gene (CSC)", {"X": sparse.csc_matrix(COUNTS), "whole_only": True}, same_expression),
    ("genes of a mouse", {"symbols": [g.capitalize() for g in GENES], **ALL}, "Gene0: GENE0.*human orthologues"),
    ("some genes in other capitals", {"symbols": [*map(str.lower, GENES[:5]), *GENES[5:]], **ALL}, same_expression),
    ("genes with blanks around them", {"symbols": [f" {g} " for g in GENES], **ALL}, same_expression),
    ("Ensembl ids with versions, and symbols", {"symbols": ENSEMBL, "var": {"feature_name": GENES}}, same_expression),
    ("Ensembl ids with versions, alone", {"symbols": ENSEMBL}, "Ensembl ids and var has no column of symbols"),
    ("one negative value", {"X": with_value(-1)}, "negative values"),
    ("one value that is not a number", {"X": with_value(np.nan)}, "1 NaN or infinite"),
    ("one infinite value", {"X": with_value(np.inf)}, "1 NaN or infinite"),
    ("a count too large for single precision", {"X": with_value(1e39, COUNTS.astype(float))}, "1 NaN or infinite"),
    ("a count that no count reaches", {"X": with_value(1e30)}, "which no count reaches"),
    ("text for values", {"X": COUNTS.astype("U3")}, "not numbers"),
    ("log values where counts are usual", {"X": LOGS}, same_expression),
    ("counts where log values are usual", {"X": COUNTS}, same_expression),
    ("normalised values without a logarithm", {"X": np.expm1(LOGS)}, "neither counts .* nor log1p values"),
    ("one cell", {"X": COUNTS[:1]}, shape(1, 15)),
    ("one cell, of which variable genes are wanted", {"X": COUNTS[:1], "n_top_genes": 5}, "no 5 variable genes"),
    ("one donor of one cell", {"obs": {"label": ["a"] * N, "donor": ["x"] * (N - 1) + ["y"]}, "study": "donor",
                               "n_top_genes": 5}, five_genes_or_more),
    ("every donor of one cell", {"obs": {"label": ["a"] * N, "donor": list("abcdefghijkl")}, "study": "donor",
                                 "n_top_genes": 5}, "no 5 variable genes"),
    ("one gene", {"X": COUNTS[:, :1]}, shape(N, 1)),
    ("one gene, of a model's", {"X": COUNTS[:, :1], **ALL}, "only 1 of 1 genes"),
    ("no gene", {"X": COUNTS[:, :0]}, "no cells with any expression"),
    ("two cells without expression", {"X": EMPTY}, left_out(2, 5)),
    ("only cells without expression", {"X": COUNTS * 0}, "no cells with any expression"),
    ("two cells of one name", {"names": ["same"] * 2 + [f"c{i}" for i in range(10)]}, "1 cell names occur more"),
    ("two genes of one name", {"symbols": ["GENE0", *GENES[:1], *GENES[2:]]}, most_expressed_of_two),
    ("labels that are missing", {"obs": {"label": pd.Categorical(["a", None, "b"] * 4)}}, types("a", UNASSIGNED, "b")),
    ("labels that are blank", {"obs": {"label": ["a", "", " "] * 4}}, types("a", UNASSIGNED, UNASSIGNED)),
    ("numbers for labels", {"obs": {"label": [1, 2, 3] * 4}}, types("1", "2", "3")),
    ("labels with HTML and quotes", {"obs": {"label": HTML * 4}}, types(PLAIN_HTML, "'c'", "d e")),
    ("genes that a spreadsheet made dates", {"symbols": ["2-Sep", "1-Mar", "SEPT1", *GENES[3:]]}, dates_are_text),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "in blocks"])
@pytest.mark.parametrize("given, must", [pytest.param(*row[1:], id=row[0]) for row in CELLS])
def test_cells(given, must, blocks, tmp_path):
    given = {"X": COUNTS, "after": lambda path: None} | given
    if given.pop("whole_only", False) and blocks:
        pytest.skip("cells by gene cannot be read by cells")
    X, after, path = given.pop("X"), given.pop("after"), tmp_path / "cells.h5ad"
    names = given.pop("names", [f"cell{i}" for i in range(X.shape[0])])
    obs = pd.DataFrame(given.pop("obs", {"label": np.resize(["a", "b", "c"], X.shape[0])}), names)
    var = pd.DataFrame(given.pop("var", None), given.pop("symbols", GENES[: X.shape[1]]))
    AnnData(X, obs, var).write_h5ad(path)
    after(path)
    before = path.read_bytes()
    arguments = given | {"label": "label"} | ({"out": tmp_path / "out.h5ad"} if blocks else {})
    if callable(must):
        cells = load_cells(path, **arguments)
        must(cells.to_memory() if blocks else cells)
    else:
        with pytest.raises(ValueError, match=must):
            load_cells(path, **arguments)
        assert not (tmp_path / "out.h5ad").exists()
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore")
def test_one_cell_is_embedded_and_refused_for_training(tiny_checkpoint):
    cells = AnnData(sparse.csr_matrix(COUNTS), var=pd.DataFrame(index=GENES))
    one, both = (embed(cells[:n].copy(), tiny_checkpoint, progress=False) for n in (1, 2))
    np.testing.assert_allclose(one.obsm["X_scGPT"][0], both.obsm["X_scGPT"][0], atol=1e-5)
    with pytest.raises(ValueError, match="at least two cell embeddings"):
        train_sae(one, n_concepts=4, progress=False)


def test_a_million_cells_with_five_genes(tmp_path):
    X = sparse.csr_matrix(np.tile(COUNTS[:, :5] + 1, (10**6 // N + 1, 1))[: 10**6])
    obs = pd.DataFrame({"label": pd.Categorical(np.resize(["a", "b"], 10**6))}, pd.RangeIndex(10**6).astype(str))
    AnnData(X, obs, pd.DataFrame(index=GENES[:5])).write_h5ad(tmp_path / "cells.h5ad")
    cells = load_cells(tmp_path / "cells.h5ad", label="label")
    assert cells.shape == (10**6, 5) and cells.obs["cell_type"].value_counts().tolist() == [500_000] * 2
    with pytest.raises(ValueError, match="only 5 of 5 genes"):  # in blocks: before the values are read
        load_cells(tmp_path / "cells.h5ad", label="label", genes=GENES, out=tmp_path / "out.h5ad")


def test_a_date_is_spotted_and_told(tmp_path, caplog):
    obs, var = pd.DataFrame({"label": ["a"] * N}, map(str, range(N))), pd.DataFrame(index=["2-Sep", *GENES[1:]])
    AnnData(COUNTS, obs, var).write_h5ad(tmp_path / "a.h5ad")
    load_cells(tmp_path / "a.h5ad", label="label")
    assert "1 genes are named like dates (2-Sep)" in caplog.text


def changed(name, change):
    """args.json or vocab.json with a change."""

    def edit(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change):
    """The weights with a change."""

    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


def torch_file(make):
    """best_model.pt instead, with what ``make`` makes of the weights."""

    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(make(weights), folder / "best_model.pt")

    return edit


class Bomb:
    """Makes a file where it is opened."""

    where = None

    def __reduce__(self):
        return open, (str(Bomb.where), "w")


def pickled(path):
    """Put a pickle bomb in place of the labels of a zarr."""
    label, codec = path / "obs" / "label", numcodecs.Pickle()
    shutil.rmtree(label)
    label.mkdir()
    about = {"zarr_format": 2, "shape": [N], "chunks": [N], "dtype": "|O", "order": "C", "fill_value": 0}
    about |= {"filters": [{"id": "vlen-utf8"}], "compressor": codec.get_config()}  # text, compressed by pickling
    (label / ".zarray").write_text(json.dumps(about))
    (label / ".zattrs").write_text(json.dumps({"encoding-type": "string-array", "encoding-version": "0.2.0"}))
    (label / "0").write_bytes(codec.encode(np.array([Bomb()] * N, object)))


ZARRS = [  # what is done to a zarr, what must be said
    ("pickled labels", pickled, "not an .h5ad or .zarr file.*: Pickle.decode is disabled"),
    ("a folder without anything", lambda path: (shutil.rmtree(path), path.mkdir()), NO_CELLS),
    ("no X", lambda path: shutil.rmtree(path / "X"), "X"),
    ("half of the values", lambda path: cut(0.5)(next((path / "X" / "data").glob("0*"))), "zarr"),
    ("metadata that are no JSON", lambda path: (path / ".zgroup").write_bytes(b"{"), NO_CELLS),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "in blocks"])
@pytest.mark.parametrize("damage, must", [pytest.param(*row[1:], id=row[0]) for row in ZARRS])
def test_zarrs(damage, must, blocks, tmp_path):
    Bomb.where = tmp_path / "exploded"
    path = tmp_path / "cells.zarr"
    obs = pd.DataFrame({"label": np.resize(["a", "b", "c"], N)}, [f"cell{i}" for i in range(N)])
    with ad.settings.override(zarr_write_format=2):
        AnnData(sparse.csr_matrix(COUNTS), obs, pd.DataFrame(index=GENES)).write_zarr(path)
    (path / ".zmetadata").unlink(missing_ok=True)
    damage(path)
    with pytest.raises(ValueError, match=must):
        load_cells(path, label="label", **({"out": tmp_path / "out.h5ad"} if blocks else {}))
    assert [p.name for p in tmp_path.iterdir()] == ["cells.zarr"]


def plain_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "best_model.pt").write_bytes(pickle.dumps({"encoder.embedding.weight": Bomb()}))


EMBEDDING = "encoder.embedding.weight"
BIAS = "transformer_encoder.layers.0.norm1.bias"

CHECKPOINTS = [  # what, the change of a good folder, the words of the error (None: the same model as without)
    ("args.json that is not JSON", text("args.json", b"{"), "args.json is not JSON"),
    ("args.json that is not text", text("args.json", b"\xff\xfe\x00"), "args.json is not JSON"),
    ("args.json that is nested without end", text("args.json", b"[" * 10**5), "args.json is not JSON"),
    ("args.json that is a list", text("args.json", b"[1]"), "not a JSON object"),
    ("a width that is text", changed("args.json", lambda a: a.update(embsize="8")), "embsize must be a whole number"),
    ("a width of zero", changed("args.json", lambda a: a.update(embsize=0)), "embsize must be a whole number"),
    (
        "a width beyond all memory",
        changed("args.json", lambda a: a.update(embsize=2 * 10**9)),
        r"has embsize 8 \(args.json: 2000000000\)",
    ),
    ("no heads", changed("args.json", lambda a: a.update(nheads=0)), "nheads must be a whole number"),
    (
        "layers without end",
        changed("args.json", lambda a: a.update(nlayers=10**9)),
        r"has nlayers 1 \(args.json: 1000000000\)",
    ),
    ("bins that are not a number", changed("args.json", lambda a: a.update(n_bins=float("nan"))), "n_bins must be"),
    ("a vocabulary with a gene more", changed("vocab.json", lambda v: v.update(NEW=len(v))), r"has shape .*needs"),
    ("a vocabulary with a gene less", changed("vocab.json", lambda v: v.pop("GENE14")), r"has shape .*needs"),
    (
        "a vocabulary of text",
        changed("vocab.json", lambda v: v.update(GENE3="6")),
        "ids of the vocabulary are not 0 to",
    ),
    ("a vocabulary with an id twice", changed("vocab.json", lambda v: v.update(GENE3=5)), "ids of the vocabulary"),
    ("a vocabulary that is a list", text("vocab.json", b'["a"]'), "not a JSON object"),
    ("aliases that are numbers", text("aliases.json", b'{"a": 1}'), "from symbols to symbols"),
    ("a missing tensor", tensors(lambda t: t.pop(BIAS)), f"{BIAS}: missing"),
    ("a tensor of another shape", tensors(lambda t: t.update({EMBEDDING: torch.zeros(3, 8)})), r"has shape \(3, 8\)"),
    ("a tensor of whole numbers", tensors(lambda t: t.update({BIAS: torch.ones(8, dtype=torch.int)})), "torch.int32"),
    ("a tensor with NaN", tensors(lambda t: t.update({BIAS: torch.full((8,), torch.nan)})), "NaN or infinite values"),
    (
        "a layer too many",
        tensors(lambda t: t.update({BIAS.replace("0", "7"): t[BIAS] + 1})),
        "not in this architecture",
    ),
    ("a decoder too many", tensors(lambda t: t.update({"decoder.fc.weight": torch.zeros(3)})), None),
    ("weights that were cut off", lambda folder: cut(0.5)(folder / "model.safetensors"), "cannot be read as weights"),
    ("weights that are empty", text("model.safetensors", b""), "cannot be read as weights"),
    ("best_model.pt instead", torch_file(lambda t: t), None),
    ("best_model.pt with a number beside the tensors", torch_file(lambda t: {**t, "epoch": 3}), None),
    ("best_model.pt without names", torch_file(lambda t: list(t.values())), "no tensors by name"),
    ("a pickle bomb as best_model.pt", torch_file(lambda t: {**t, "x": Bomb()}), "more than tensors"),
    ("a plain pickle bomb as best_model.pt", plain_pickle, "more than tensors"),
]


@pytest.fixture(scope="module")
def tiny_checkpoint():
    return perturbed(ScGPTConfig(embsize=8, nheads=2, d_hid=8, nlayers=1), GENES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change, must", [pytest.param(*row[1:], id=row[0]) for row in CHECKPOINTS])
def test_checkpoints(change, must, tmp_path, tiny_checkpoint):
    folder = tmp_path / "model"
    save_model(tiny_checkpoint, folder)
    Bomb.where = tmp_path / "exploded"
    change(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if must is None:
        assert load_model(folder).fingerprint() == tiny_checkpoint.fingerprint()
    else:
        with pytest.raises(ValueError, match=must):
            load_model(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and not Bomb.where.exists()


def test_a_path_with_spaces_and_letters_of_all_alphabets(tmp_path, tiny_checkpoint):
    folder = tmp_path / "my cells — Zellen, 細胞 (100 %) 'x' #1"
    obs = pd.DataFrame({"type of cell": "τ-cell"}, [f"cell{i}" for i in range(N)])
    source = AnnData(sparse.csr_matrix(COUNTS), obs, pd.DataFrame(index=GENES))
    write(source, folder / "ein ü.h5ad")
    save_model(tiny_checkpoint, folder / "modèle")
    model = load_model(folder / "modèle")
    cells = load_cells(folder / "ein ü.h5ad", label="type of cell", genes=model.genes)
    embed(cells, model, out=folder / "emb ü.npy", progress=False)
    cells.obsm["X_scGPT"] = np.array(cells.obsm["X_scGPT"])
    write(cells, folder / "out ü.h5ad")
    again = read(folder / "out ü.h5ad", "")
    np.testing.assert_array_equal(again.obsm["X_scGPT"], cells.obsm["X_scGPT"])
    assert set(again.obs["cell_type"]) == {"τ-cell"} and set(again.obs["study"]) == {"ein ü"}
    assert load_model(again.uns["scgpt"]["name"]).fingerprint() == model.fingerprint()
    assert ad.read_h5ad(folder / "ein ü.h5ad").n_obs == N
