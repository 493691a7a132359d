"""The loaders, given what nobody thought of: the right result, or FileNotFoundError or ValueError with a message."""

import gzip
import json
import shutil
import string
import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from conftest import perturbed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import sparse

from scsae_utils import load_cells, load_model
from scsae_utils.book import load_profile
from scsae_utils.cells import UNASSIGNED
from scsae_utils.genesets import gene_sets
from scsae_utils.scgpt import ScGPTConfig, save_model
from scsae_utils.words import gene_words

FUZZ = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
REFUSED = (ValueError, FileNotFoundError)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=5,
)
BYTES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20)


def refusing(load):
    """The result of ``load``, or None if it refused with a message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load()
        except REFUSED as error:
            assert str(error).strip()
            return None


def corrupt(content: bytes, changes, keep: float) -> bytes:
    """Some bytes replaced, and the end cut off."""
    out = bytearray(content)
    for where, value in changes:
        out[int(where * len(out))] = value
    return bytes(out[: int(len(out) * keep)])


class TestCells:
    @FUZZ
    @given(
        X=npst.arrays(
            st.sampled_from(["f4", "f8", "i4", "u2", "?"]),
            npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
            elements=None,
            fill=st.just(0),
        ),
        layout=st.sampled_from([np.asarray, sparse.csr_matrix, sparse.csc_matrix]),
        data=st.data(),
    )
    def test_any_values_labels_and_names(self, X, layout, data, tmp_path):
        def texts(n, **options):
            return data.draw(st.lists(TEXT, min_size=n, max_size=n, **options))

        labels = data.draw(st.sampled_from(["text", "category", "number", "truth"]))
        n = len(X)
        column = {
            "text": lambda: texts(n),
            "category": lambda: pd.Categorical(data.draw(st.lists(st.none() | TEXT, min_size=n, max_size=n))),
            "number": lambda: data.draw(npst.arrays("f8", n)),
            "truth": lambda: data.draw(npst.arrays("?", n)),
        }[labels]()
        obs = pd.DataFrame({"label": column}, index=texts(n))
        obs.index.name = data.draw(st.none() | st.sampled_from(["cell", "_index", "index"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cells = AnnData(layout(X), obs, pd.DataFrame(index=texts(X.shape[1])))
            try:
                cells.write_h5ad(tmp_path / "cells.h5ad")
            except ValueError:
                return  # anndata does not write names such as "_index": there is no such file
        loaded = refusing(lambda: load_cells(tmp_path / "cells.h5ad", label="label"))
        if loaded is not None:
            assert loaded.n_obs <= n and loaded.obs_names.is_unique and loaded.var_names.is_unique
            assert np.isfinite(loaded.X.data).all() and (loaded.X.data > 0).all() and loaded.X.dtype == np.float32
            for name in [*loaded.obs["cell_type"], *loaded.var_names, *loaded.obs_names]:
                assert not set("<>`") & set(name)
            assert "" not in set(loaded.obs["cell_type"]) and loaded.obs["cell_type"].notna().all()
            if labels == "category":
                known = pd.Series(column, obs.index.str.translate(str.maketrans("<>`", "‹›'"))).notna()
                assert (loaded.obs["cell_type"][~known[loaded.obs_names].to_numpy()] == UNASSIGNED).all()

    @FUZZ
    @given(changes=BYTES, keep=st.floats(0.5, 1), blocks=st.booleans())
    def test_any_damage_to_a_file(self, changes, keep, blocks, tmp_path):
        path, bad = tmp_path / "cells.h5ad", tmp_path / "bad.h5ad"
        if not path.exists():
            X = sparse.csr_matrix(np.arange(60).reshape(6, 10) % 4)
            obs = pd.DataFrame({"label": pd.Categorical(list("aabbcc"))}, index=list("uvwxyz"))
            AnnData(X.astype("f4"), obs, pd.DataFrame(index=list("ABCDEFGHIJ"))).write_h5ad(path)
        bad.write_bytes(corrupt(path.read_bytes(), changes, keep))
        out = {"out": tmp_path / "out.h5ad"} if blocks else {}
        loaded = refusing(lambda: load_cells(bad, label="label", **out))
        if loaded is not None:
            X = loaded.to_memory().X if blocks else loaded.X
            assert np.isfinite(X.data).all() and (X.data > 0).all() and X.indices.max(initial=0) < loaded.n_vars
            if blocks:
                loaded.file.close()


class TestModel:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("model")
        save_model(perturbed(ScGPTConfig(8, 2, 8, 1), list("ABCDEFGHIJKL")), folder)
        return folder

    def load(self, folder, bad, name, content):
        shutil.copytree(folder, bad, dirs_exist_ok=True)
        (bad / name).write_bytes(content)
        return refusing(lambda: load_model(bad))

    @FUZZ
    @given(data=st.data(), value=JSON)
    def test_any_value_in_args_json(self, folder, data, value, tmp_path):
        args = json.loads((folder / "args.json").read_text())
        args[data.draw(st.sampled_from(sorted(args)))] = value
        model = self.load(folder, tmp_path / "bad", "args.json", json.dumps(args).encode())
        assert model is None or (model.config.embsize, model.config.nlayers) == (8, 1)

    @FUZZ
    @given(data=st.data(), value=JSON)
    def test_any_value_in_vocab_json(self, folder, data, value, tmp_path):
        vocab = json.loads((folder / "vocab.json").read_text())
        vocab[data.draw(st.sampled_from(sorted(vocab)) | st.text(max_size=3))] = value
        model = self.load(folder, tmp_path / "bad", "vocab.json", json.dumps(vocab).encode())
        assert model is None or sorted(model.vocab.values()) == list(range(15))

    @FUZZ
    @given(name=st.sampled_from(["args.json", "vocab.json"]), content=JSON.map(json.dumps) | st.text(max_size=20))
    def test_any_other_content(self, folder, name, content, tmp_path):
        assert self.load(folder, tmp_path / "bad", name, content.encode("utf-8", "surrogatepass")) is None

    @FUZZ
    @given(changes=BYTES, keep=st.floats(0.5, 1) | st.just(1.0))
    def test_any_damage_to_the_weights(self, folder, changes, keep, tmp_path):
        content = corrupt((folder / "model.safetensors").read_bytes(), changes, keep)
        model = self.load(folder, tmp_path / "bad", "model.safetensors", content)
        assert model is None or all(p.isfinite().all() for p in model.parameters())


LINES = st.lists(st.lists(st.text(max_size=5), max_size=4).map("\t".join), max_size=6).map("\n".join)


class TestTables:
    @FUZZ
    @given(content=LINES.map(str.encode) | st.binary(max_size=60), compressed=st.booleans(), cut=st.integers(0, 9))
    def test_any_gmt_file(self, content, compressed, cut, tmp_path):
        path = tmp_path / ("sets.gmt.gz" if compressed else "sets.gmt")
        path.write_bytes(gzip.compress(content)[: -cut or None] if compressed else content)
        sets = refusing(lambda: gene_sets(path))
        assert sets is None or all(genes and len(set(genes)) == len(genes) for genes in sets.values())

    @FUZZ
    @given(content=LINES.map(lambda t: f"symbol\ttext\n{t}".encode()) | st.binary(max_size=60),
           name=st.sampled_from(["a.tsv", "a.csv", "a.tsv.gz"]))  # fmt: skip
    def test_any_table_of_descriptions(self, content, name, tmp_path):
        (tmp_path / name).write_bytes(content)
        words = refusing(lambda: gene_words(["LYZ", "CD3E"], tmp_path / name, max_share=1))
        assert words is None or list(words.index) == ["LYZ", "CD3E"]


class TestProfile:
    @FUZZ
    @given(content=JSON.map(json.dumps) | st.text(string.printable, max_size=40) | st.binary(max_size=40).map(repr))
    def test_any_profile_is_refused(self, content, tmp_path):
        (tmp_path / "p.yaml").write_text(content)
        assert refusing(lambda: load_profile(tmp_path / "p.yaml")) is None

    @FUZZ
    @given(content=st.binary(max_size=40))
    def test_any_bytes_are_refused(self, content, tmp_path):
        (tmp_path / "p.yaml").write_bytes(content)
        assert refusing(lambda: load_profile(tmp_path / "p.yaml")) is None
