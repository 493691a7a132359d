"""Cells in: packaged data, labels, files of every kind of trouble, splits."""

import logging

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scsae_utils.cells import (
    HIERARCHY,
    LEVELS,
    MARKERS,
    SOURCES,
    UNASSIGNED,
    check_values,
    label_by_markers,
    load_cells,
    paper_types,
    rename,
    split_cells,
    type_table,
)


def counts(n_cells=12, n_genes=15, seed=0) -> np.ndarray:
    """Small whole numbers, each cell and gene with some."""
    X = np.random.default_rng(seed).poisson(1.0, (n_cells, n_genes)).astype(np.float32)
    X[:, 0] += 1
    return X


@pytest.fixture
def h5ad(tmp_path):
    """Writes cells as a file: ``h5ad(X)``, with columns ``label`` and ``donor`` unless told otherwise."""

    def write(X, obs=None, var=None, symbols=None, names=None):
        X = np.asarray(X) if not sparse.issparse(X) else X
        obs = {"label": ["a", "b", "c"] * 4, "donor": ["x", "y"] * 6} if obs is None else obs
        names = [f"cell{i}" for i in range(X.shape[0])] if names is None else names
        symbols = [f"GENE{i}" for i in range(X.shape[1])] if symbols is None else symbols
        adata = AnnData(X, obs=pd.DataFrame(obs, index=names), var=pd.DataFrame(var, index=symbols))
        adata.write_h5ad(tmp_path / "mine.h5ad")
        return tmp_path / "mine.h5ad"

    return write


class TestPackagedCells:
    def test_both_studies_on_their_common_genes(self, mini_cells):
        assert mini_cells.shape == (1259, 764)
        assert mini_cells.obs["study"].value_counts().to_dict() == {"pbmc68k": 700, "celltypist": 559}
        assert mini_cells.var_names.is_unique and mini_cells.obs_names.is_unique
        assert sparse.isspmatrix_csr(mini_cells.X) and (mini_cells.X.getnnz(axis=1) > 0).all()

    def test_labels_of_the_authors_are_kept(self, mini_cells):
        labels = mini_cells.obs["cell_type"][mini_cells.obs["study"] == "pbmc68k"].value_counts()
        assert labels["Dendritic"] == 240 and labels["CD4+/CD45RA+/CD25- Naive T"] == 8
        assert labels[labels > 0].sum() == 700 and UNASSIGNED not in labels[labels > 0]

    def test_levels_nest(self, mini_cells):
        obs = mini_cells.obs
        assert (obs.groupby("cell_type", observed=True)["cell_type_mid"].nunique() == 1).all()
        assert (obs.groupby("cell_type_mid", observed=True)["cell_type_high"].nunique() == 1).all()
        sizes = [obs[column].nunique() for column in LEVELS.values()]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
        assert not obs[list(LEVELS.values())].isna().to_numpy().any()

    def test_every_label_that_can_be_given_has_a_place_in_the_hierarchy(self):
        assert set(MARKERS) <= set(HIERARCHY)
        mids = {mid: high for mid, high in HIERARCHY.values()}
        assert all(mids[mid] == high for mid, high in HIERARCHY.values())

    def test_counts_are_recovered_from_the_log_values(self, mini_cells):
        pbmc = mini_cells[mini_cells.obs["study"] == "pbmc68k"]
        counts = pbmc.layers["counts"].toarray()
        assert (counts == np.rint(counts)).all() and counts.max() > 50
        again = np.log1p(counts / pbmc.obs["n_counts"].to_numpy()[:, None] * 1e4)
        np.testing.assert_allclose(again, pbmc.X.toarray(), atol=2e-3)  # the source has three decimals
        assert ((counts > 0) == (pbmc.X.toarray() > 0)).all()

    def test_log_values_are_of_counts_per_ten_thousand(self, mini_cells):
        assert (mini_cells.obs["n_counts"] >= mini_cells.layers["counts"].sum(1).A1).all()
        own = mini_cells[mini_cells.obs["study"] == "celltypist"]
        np.testing.assert_allclose(
            own.X.toarray(),
            np.log1p(own.layers["counts"].toarray() / own.obs["n_counts"].to_numpy(np.float32)[:, None] * 1e4),
            rtol=1e-4,
            atol=1e-5,
        )

    def test_a_full_panel_can_be_had(self):
        alone = load_cells("pbmc68k")
        assert alone.shape == (700, 765) and set(alone.obs["study"]) == {"pbmc68k"}

    def test_files_have_label_columns_and_packages_do_not(self):
        with pytest.raises(ValueError, match="'pbmc68k' has its own"):
            load_cells("pbmc68k", label="bulk_labels")

    def test_a_typing_error_is_named(self):
        with pytest.raises(FileNotFoundError, match="did you mean 'pbmc68k'"):
            load_cells("PBMC86k")
        with pytest.raises(FileNotFoundError, match="no file of cells"):
            load_cells("nowhere/cells.h5ad")

    def test_a_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder; cells are in"):
            load_cells(tmp_path, label="label")

    def test_type_table_counts_every_cell_once(self, mini_cells):
        table = type_table(mini_cells)
        assert table["cells"].sum() == 1259 and table["pbmc68k"].sum() == 700
        assert (table["pbmc68k"] + table["celltypist"] == table["cells"]).all()
        assert table["cell_type"].is_unique


class TestLabelsByMarkers:
    """The unlabelled sample, against genes that had no part in the labelling."""

    INDEPENDENT = [  # a gene, the type that has more of it, than which types
        ("LGALS3", "Macrophages", ["CD14+ Monocyte", "FCGR3A+ Monocyte", "T cells", "Activated B cells"]),
        ("TYROBP", "CD14+ Monocyte", ["T cells", "NK cells", "Activated B cells"]),
        ("IFITM3", "FCGR3A+ Monocyte", ["CD14+ Monocyte", "Macrophages", "Activated B cells"]),
        ("IL7R", "T cells", ["NK cells", "Macrophages", "CD14+ Monocyte", "Activated B cells"]),
        ("CCL5", "NK cells", ["T cells", "Macrophages", "CD14+ Monocyte", "Activated B cells"]),
        ("HLA-DRA", "Activated B cells", ["T cells", "NK cells", "Macrophages"]),
        ("CD74", "Migratory dendritic cells", ["T cells", "NK cells", "Macrophages", "CD14+ Monocyte"]),
    ]

    @pytest.fixture
    def labelled(self, mini_cells):
        return mini_cells[mini_cells.obs["study"] == "celltypist"]

    def test_numbers_of_cells(self, labelled):
        n = labelled.obs["cell_type"].value_counts()
        assert 150 < n["Macrophages"] < 230 and 100 < n["CD14+ Monocyte"] < 190 and 70 < n["T cells"] < 140
        assert 5 <= n["Migratory dendritic cells"] < 25 and 5 <= n["Activated B cells"] < 50
        assert 10 <= n[UNASSIGNED] < 112  # some, and less than a fifth

    @pytest.mark.parametrize("gene, cell_type, others", INDEPENDENT)
    def test_a_gene_that_was_not_used_agrees(self, labelled, gene, cell_type, others):
        assert gene not in {used for genes in MARKERS.values() for used in genes}
        values = pd.Series(labelled[:, gene].X.toarray().ravel())
        means = values.groupby(labelled.obs["cell_type"].astype(str).to_numpy()).mean()
        assert means[cell_type] > 1.2 * means[others].max()

    def test_planted_types_are_found_and_the_rest_is_left(self):
        rng = np.random.default_rng(0)
        X = rng.poisson(0.5, (90, 40)).astype(np.float32)
        X[:40, :4] += 8  # type one
        X[40:80, 4:8] += 8  # type two; ten cells are neither
        adata = AnnData(sparse.csr_matrix(np.log1p(X)))
        adata.var_names = [f"g{i}" for i in range(40)]
        table = label_by_markers(adata, {"one": ["g0", "g1", "absent"], "two": ["g4", "g5"]})
        assert (table["label"][:40] == "one").all() and (table["label"][40:80] == "two").all()
        assert (table["label"][80:] == UNASSIGNED).all()

    def test_a_type_that_hardly_a_cell_shows_is_not_given(self):
        """Division by the ninth highest score: with fewer cells that is by zero, and would beat every other type."""
        rng = np.random.default_rng(0)
        X = rng.poisson(0.5, (60, 30)).astype(np.float32)
        X[:, 20:] = 0
        X[:, :3] += 5
        X[0, 29] = 9
        adata = AnnData(sparse.csr_matrix(np.log1p(X)))
        adata.var_names = [f"g{i}" for i in range(30)]
        table = label_by_markers(adata, {"all": ["g0", "g1"], "nobody": ["g28"], "one": ["g29"]}, neighbors=3)
        assert np.isfinite(table[["all", "nobody"]].to_numpy()).all()
        assert (table["label"] == "all").all()

    def test_unmeasured_markers_are_an_error(self, labelled):
        with pytest.raises(ValueError, match="none of the markers of 'thing' is measured: NOPE"):
            label_by_markers(labelled[:50].copy(), {"thing": ["NOPE"]})


class TestValues:
    @pytest.mark.parametrize(
        "X, kind",
        [([[0, 1], [3, 200]], "counts"), ([[0, 1.5], [3, 7.2]], "log1p"), ([[0.0, 5.0], [2.0, 1e6]], "counts")],
    )
    def test_are_recognised(self, X, kind):
        assert check_values(AnnData(np.array(X, np.float32))) == kind
        assert check_values(AnnData(sparse.csr_matrix(np.array(X, np.float32)))) == kind

    @pytest.mark.parametrize(
        "X, message",
        [
            ([[0, np.nan], [1, np.inf]], "2 NaN or infinite"),
            ([[0, -1.2], [1, 2]], "negative"),
            ([[0, 1.5], [1, 300.2]], "neither counts"),
        ],
    )
    def test_are_refused(self, X, message):
        with pytest.raises(ValueError, match=message):
            check_values(AnnData(np.array(X, np.float32)))


class TestLevelsOfThePaper:
    LABELS = ["Classical monocytes", "Alveolar macrophages", "Tregs", None] * 3

    def test_table_1_is_the_papers(self):
        table = paper_types()
        assert table.index.is_unique
        assert (len(table), table["mid"].nunique(), table["high"].nunique()) == (45, 16, 10)
        assert table["cells"].sum() == 329_762 and table.at["Megakaryocytes", "cells"] == 317

    def test_it_agrees_with_the_levels_of_the_packaged_cells(self):
        high = dict(zip(paper_types()["mid"], paper_types()["high"])) | {UNASSIGNED: UNASSIGNED, "NK": "ILC"}
        assert all(high[mid] == above for mid, above in HIERARCHY.values())

    def test_cells_of_a_file_get_them(self, h5ad):
        path = h5ad(counts(), obs={"label": self.LABELS})
        obs = load_cells(path, label="label", label_mid="Table 1", label_high="Table 1").obs
        expected = [("Monocytes", "Myeloid"), ("Macrophages", "Myeloid"), ("T_CD4", "T"), (UNASSIGNED, UNASSIGNED)]
        assert list(zip(obs["cell_type_mid"], obs["cell_type_high"])) == expected * 3

    def test_one_level_of_it_and_one_of_the_file(self, h5ad):
        path = h5ad(counts(), obs={"label": self.LABELS, "mine": ["x", "y"] * 6})
        obs = load_cells(path, label="label", label_mid="mine", label_high="Table 1").obs
        assert list(obs["cell_type_mid"][:2]) == ["x", "y"]
        assert list(obs["cell_type_high"][:3]) == ["Myeloid", "Myeloid", "T"]

    def test_other_types_are_named(self, h5ad):
        path = h5ad(counts(), obs={"label": ["Treg", "Tregs"] * 6})
        with pytest.raises(ValueError, match="does not know 1 of the cell types .Treg.: .*did you mean 'Tregs'"):
            load_cells(path, label="label", label_mid="Table 1")


class TestFiles:
    def test_counts_become_log_values_and_are_kept(self, h5ad):
        X = counts()
        adata = load_cells(h5ad(X), label="label", study="donor")
        np.testing.assert_allclose(adata.X.toarray(), np.log1p(X / X.sum(1, keepdims=True) * 1e4), rtol=1e-5)
        np.testing.assert_array_equal(adata.layers["counts"].toarray(), X)
        np.testing.assert_array_equal(adata.obs["n_counts"], X.sum(1))
        assert adata.obs["study"].tolist() == ["x", "y"] * 6 and adata.obs["cell_type"].tolist() == ["a", "b", "c"] * 4

    def test_labels_cannot_be_markup_on_a_page(self, h5ad):
        obs = {"label": ["<script>x</script>", "b", "`c`"] * 4}
        adata = load_cells(h5ad(counts(), obs, names=[f"<b>{i}" for i in range(12)]), label="label")
        assert adata.obs["cell_type"].tolist() == ["‹script›x‹/script›", "b", "'c'"] * 4
        assert adata.obs_names[0] == "‹b›0"

    def test_log_values_stay(self, h5ad):
        X = np.log1p(counts() / 3)
        adata = load_cells(h5ad(X), label="label")
        np.testing.assert_array_equal(adata.X.toarray(), X)
        assert "counts" not in adata.layers and set(adata.obs["study"]) == {"mine"}

    def test_sparse_and_dense_are_the_same(self, h5ad):
        dense = load_cells(h5ad(counts()), label="label")
        other = load_cells(h5ad(sparse.csc_matrix(counts())), label="label")
        np.testing.assert_array_equal(dense.X.toarray(), other.X.toarray())
        assert sparse.isspmatrix_csr(other.X)

    def test_a_level_that_is_not_given_repeats_the_one_below(self, h5ad):
        obs = {"label": ["a", "b", "c"] * 4, "top": ["A", "B", "B"] * 4}
        adata = load_cells(h5ad(counts(), obs), label="label", label_high="top")
        assert (adata.obs["cell_type_mid"] == adata.obs["cell_type"]).all()
        assert adata.obs["cell_type_high"].tolist() == ["A", "B", "B"] * 4

    def test_cells_without_a_label_are_unassigned(self, h5ad):
        labels = pd.Categorical(["a", None, "b"] * 4)
        adata = load_cells(h5ad(counts(), {"label": labels}), label="label")
        assert adata.obs["cell_type"].tolist() == ["a", UNASSIGNED, "b"] * 4

    def test_a_wrong_label_column_names_those_that_are_there(self, h5ad):
        path = h5ad(counts())
        with pytest.raises(ValueError, match="no column 'Labels'.*it has: label, donor.*did you mean 'label'"):
            load_cells(path, label="Labels")
        with pytest.raises(ValueError, match="say which column.*label, donor"):
            load_cells(path)

    def test_ensembl_ids_are_replaced_by_symbols(self, h5ad, caplog):
        ids = [f"ENSG{i:011d}.3" for i in range(15)]
        names = [f"GENE{i}" for i in range(14)] + [None]
        adata = load_cells(h5ad(counts(), var={"feature_name": pd.Categorical(names)}, symbols=ids), label="label")
        assert adata.var_names.tolist() == names[:14] + [ids[14]]  # one without a symbol keeps its id
        assert "var['feature_name']" in caplog.text

    def test_ensembl_ids_alone_are_refused(self, h5ad):
        path = h5ad(counts(), symbols=[f"ENSMUSG{i:011d}" for i in range(15)])
        with pytest.raises(ValueError, match="Ensembl ids and var has no column of symbols"):
            load_cells(path, label="label")

    def test_of_two_genes_with_one_symbol_the_more_expressed_stays(self, h5ad, caplog):
        X = counts()
        X[:, 3], X[:, 7] = 1, 5
        symbols = [f"GENE{i}" for i in range(15)]
        symbols[7] = "GENE3"
        with pytest.warns(UserWarning, match="Variable names are not unique"):
            adata = load_cells(h5ad(X, symbols=symbols), label="label")
        assert adata.n_vars == 14 and adata.var_names.is_unique
        assert (adata[:, "GENE3"].layers["counts"].toarray() == 5).all()
        assert "1 genes share a symbol" in caplog.text

    def test_empty_cells_are_left_out_and_reported(self, h5ad, caplog):
        X = counts()
        X[[2, 5]] = 0
        with caplog.at_level(logging.WARNING):
            adata = load_cells(h5ad(X), label="label")
        assert adata.n_obs == 10 and "cell2" not in adata.obs_names and "2 empty cells" in caplog.text

    def test_nothing_but_empty_cells_is_an_error(self, h5ad):
        with pytest.raises(ValueError, match="no cells with any expression"):
            load_cells(h5ad(np.zeros((12, 15), np.float32)), label="label")

    @pytest.mark.parametrize("value, message", [(np.nan, "1 NaN"), (-1.0, "negative values")])
    def test_bad_values_are_refused(self, h5ad, value, message):
        X = counts()
        X[3, 3] = value
        with pytest.raises(ValueError, match=message):
            load_cells(h5ad(X), label="label")

    def test_cell_names_must_be_unique(self, h5ad):
        with pytest.warns(UserWarning, match="Observation names are not unique"):
            path = h5ad(counts(), names=["same"] * 2 + [f"cell{i}" for i in range(10)])
            with pytest.raises(ValueError, match="1 cell names occur more than once"):
                load_cells(path, label="label")

    def test_broken_files_are_refused(self, h5ad, tmp_path):
        whole = h5ad(counts()).read_bytes()
        for name, content in {
            "half": whole[: len(whole) // 2],
            "garbage": b"not hdf5 at all" * 99,
            "empty": b"",
        }.items():
            path = tmp_path / f"{name}.h5ad"
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"{name}.h5ad is not an .h5ad or .zarr file that anndata can read"):
                load_cells(path, label="label")

    def test_another_hdf5_file_is_refused(self, tmp_path):
        with h5py.File(tmp_path / "other.h5ad", "w") as file:
            file["numbers"] = np.arange(5)
        with pytest.raises(ValueError, match="other.h5ad"):
            load_cells(tmp_path / "other.h5ad", label="label")

    def test_a_file_without_x_is_refused(self, tmp_path):
        ad.AnnData(obs=pd.DataFrame({"label": ["a"]}, index=["c"])).write_h5ad(tmp_path / "nox.h5ad")
        with pytest.raises(ValueError, match="holds no X"):
            load_cells(tmp_path / "nox.h5ad", label="label")


class TestGenes:
    def test_n_top_genes_keeps_so_many(self):
        adata = load_cells("pbmc68k", n_top_genes=100)
        whole = load_cells("pbmc68k")
        spread = pd.Series(np.expm1(whole.X.toarray()).var(0), whole.var_names)
        assert adata.n_vars == 100 and spread[adata.var_names].median() > 2 * spread.median()
        assert (adata.X.getnnz(axis=1) > 0).all()

    def test_more_than_there_are_keeps_all(self):
        assert load_cells("pbmc68k", n_top_genes=5000).n_vars == 765

    def test_genes_are_chosen_before_the_variable_ones(self):
        keep = load_cells("pbmc68k").var_names[::3]
        assert set(load_cells("pbmc68k", genes=keep, n_top_genes=50).var_names) <= set(keep)

    def test_no_gene_in_common_is_an_error(self):
        with pytest.raises(ValueError, match="only 0 of 765 genes"):
            load_cells("pbmc68k", genes=["lyz", "nkg7"])  # symbols are spelled in capitals


class TestSplit:
    def test_holds_out_a_fifth_of_each_type_and_study(self, mini_cells):
        cells = split_cells(mini_cells.copy())
        table = cells.obs.groupby(["study", "cell_type"], observed=True)["split"].agg(
            n="size", held_out=lambda s: (s == "validation").sum()
        )
        assert ((table["held_out"] - 0.2 * table["n"]).abs() < 1).all()
        assert abs((cells.obs["split"] == "validation").mean() - 0.2) < 0.01

    def test_is_the_same_each_time_and_another_with_another_seed(self, mini_cells):
        a, b, c = (split_cells(mini_cells.copy(), seed=s).obs["split"] for s in (3, 3, 4))
        assert a.equals(b) and not a.equals(c)

    def test_leaves_the_cells_as_they_are(self, mini_cells):
        cells = split_cells(mini_cells.copy())
        assert (cells.obs_names == mini_cells.obs_names).all()
        cells.obs.index.name = "cell_type"  # a name that is also a column
        assert "split" in split_cells(cells).obs

    @pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
    def test_refuses_a_share_that_cannot_be(self, mini_cells, share):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_cells(mini_cells, share)

    def test_whole_donors_are_held_out(self, mini_cells):
        cells = mini_cells[:1000].copy()
        cells.obs["study"] = np.arange(1000) % 10
        split_cells(cells, 0.25, by="study")
        assert cells.obs.groupby("study")["split"].nunique().max() == 1
        assert (cells.obs["split"] == "validation").sum() == 300  # the first whole donors that reach the share
        assert cells.uns["split"] == {"by": "study", "share": 0.3, "seed": 0}
        cells.obs["study"] = np.where(np.arange(1000) < 990, "large", "small")
        for seed in range(4):  # whichever comes first: one is held out, and one is left
            assert split_cells(cells, 0.2, seed, by="study").obs["split"].nunique() == 2

    def test_a_column_that_cannot_split(self, mini_cells):
        cells = mini_cells[:100].copy()
        with pytest.raises(ValueError, match="no column 'donor'"):
            split_cells(cells, by="donor")
        cells.obs["study"] = "one"
        with pytest.raises(ValueError, match="all cells have the same study"):
            split_cells(cells, by="study")


def test_every_packaged_source_is_described_by_its_name():
    assert set(SOURCES) == {"mini", "pbmc68k", "celltypist"}


def test_other_symbols_of_a_gene_are_renamed_unless_two_genes_would_share_a_name():
    aliases = {"JCHAIN": "IGJ", "NEW": "OLD", "A1": "A", "A2": "A"}
    assert list(rename(pd.Index(["JCHAIN", "LYZ"]), aliases)) == ["IGJ", "LYZ"]
    assert list(rename(pd.Index(["NEW", "OLD"]), aliases)) == ["NEW", "OLD"]
    assert list(rename(pd.Index(["A1", "A2"]), aliases)) == ["A1", "A2"]
