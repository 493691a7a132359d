"""Gene sets: where they come from, hostile files, old symbols, ranked enrichment, the baseline, their nulls."""

import gzip

import gseapy
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.stats import false_discovery_control
from server import serving

from scsae_utils.enrichment import over_representation
from scsae_utils.genesets import gene_sets, high_against_low, on_panel, prerank, random_prerank, read_gmt


class TestSources:
    def test_the_blood_modules_are_at_hand(self):
        sets = gene_sets()
        assert len(sets) == 346
        assert {"CD79A", "CD19", "CD22"} <= set(sets["enriched in B cells (I) (M47.0)"])
        assert all(len(set(genes)) == len(genes) > 0 for genes in sets.values())

    def test_a_gmt_file_by_path_or_url(self, tmp_path, monkeypatch):
        content = b"ONE\thttp://x\tA\tB\nTWO\t\tC\tA\n"
        (tmp_path / "a.gmt").write_bytes(content)
        (tmp_path / "a.gmt.gz").write_bytes(gzip.compress(content))
        expected = {"ONE": ["A", "B"], "TWO": ["C", "A"]}
        assert gene_sets(tmp_path / "a.gmt") == gene_sets(tmp_path / "a.gmt.gz") == expected
        monkeypatch.setenv("SCSAE_CACHE", str(tmp_path / "cache"))
        with serving({"/a.gmt": content}) as (url, asked):
            assert gene_sets(f"{url}/a.gmt") == gene_sets(f"{url}/a.gmt") == expected
            monkeypatch.setitem(gene_sets.__globals__["COLLECTIONS"], "reactome", f"{url}/a.gmt")
            assert gene_sets("reactome") == expected
        assert asked == ["/a.gmt"]

    def test_an_unknown_source_is_told_what_there_is(self):
        with pytest.raises(FileNotFoundError, match="no gene sets 'kegg'.*'btm', 'reactome', 'go'"):
            gene_sets("kegg")


class TestReadGmt:
    def test_what_real_files_have(self, tmp_path, caplog):
        (tmp_path / "a.gmt").write_bytes(b"\xef\xbb\xbfONE\tx\tA,1.0\tB,-2e-3\t\tA\r\n\r\nEMPTY\tx\t\t\nTWO\t\tHLA-A\n")
        assert read_gmt(tmp_path / "a.gmt") == {"ONE": ["A", "B"], "TWO": ["HLA-A"]}
        assert "1 sets have no genes and were left out: EMPTY" in caplog.text

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"", "holds no gene set"),
            (b"\n\n", "holds no gene set"),
            (b"ONE\tx\t\n", "holds no gene set"),
            (b"<!doctype html>\n<p>Not found", "line 1 is not a name, a description and genes.*doctype"),
            (b"ONE\tx\tA\nTWO x A\n", "line 2 is not a name"),
            (b"ONE\tx\tA\nONE\tx\tB\n", "line 2: a second set 'ONE'"),
            (b"\tx\tA\n", "line 1: a set without a name"),
            (b"\x89PNG\r\n\x1a\n\xff", "no text in UTF-8"),
            (b"PK\x03\x04\x00\x00", "line 1 is not"),
        ],
    )
    def test_files_that_are_none(self, tmp_path, content, message):
        (tmp_path / "a.gmt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_gmt(tmp_path / "a.gmt")

    @pytest.mark.parametrize("content", [b"ONE\tx\tA\n", gzip.compress(b"ONE\tx\tA\n" * 99)[:-12]])
    def test_damaged_compression(self, tmp_path, content):
        (tmp_path / "a.gmt.gz").write_bytes(content)
        with pytest.raises(ValueError, match="not a GMT file"):
            read_gmt(tmp_path / "a.gmt.gz")


class TestOnPanel:
    def test_keeps_what_can_be_found(self):
        sets = {"big": ["A", "B", "C", "Z"], "small": ["A", "B", "Z", "Y"], "none": ["Z"]}
        assert on_panel(sets, ["C", "B", "A", "D"]) == {"big": ["A", "B", "C"]}
        assert set(on_panel(sets, ["C", "B", "A"], min_genes=2)) == {"big", "small"}

    def test_old_symbols_find_their_gene_on_either_side(self):
        panel = ["IGJ", "JAML", "CD79A", "CD19"]
        assert on_panel({"a": ["JCHAIN", "AMICA1", "CD79A"]}, panel) == {"a": ["IGJ", "JAML", "CD79A"]}

    def test_no_set_left(self):
        with pytest.raises(ValueError, match="none of the 1 gene sets has 3 of the 2 genes of the panel.*human"):
            on_panel({"a": ["A", "B", "C"]}, ["A", "B"])


@pytest.fixture(scope="module")
def ranking():
    """300 genes; those of set "up" are high, those of "down" low, those of "random" anywhere."""
    rng = np.random.default_rng(0)
    values = pd.Series(rng.normal(size=300), [f"G{i}" for i in range(300)])
    values.iloc[:10] += 2.5
    values.iloc[10:20] -= 2.5
    parts = {"up": values.index[:10], "down": values.index[10:20]}
    parts |= {f"random {i}": rng.choice(values.index[20:], 12, replace=False) for i in range(20)}
    return values, {name: [*genes, "elsewhere"] for name, genes in parts.items()}


class TestPrerank:
    def test_finds_both_ends(self, ranking):
        table = prerank(*ranking).set_index("set")
        assert set(table.index[:2]) == {"up", "down"} and (table["qvalue"] < 0.05).sum() == 2
        assert table.loc["up", "nes"] > 0 > table.loc["down", "nes"]
        assert table.loc["up", "size"] == 10 and set(table.loc["up", "genes"].split(",")) <= set(ranking[1]["up"])
        np.testing.assert_allclose(table["qvalue"], false_discovery_control(table["pvalue"]), rtol=1e-6)

    def test_scores_are_those_of_gseapys_default(self, ranking):
        values, sets = ranking
        ours = prerank(values, sets).set_index("set")["nes"]
        result = gseapy.prerank(values.sort_values(), sets, min_size=3, outdir=None, no_plot=True, seed=0, threads=1)
        theirs = result.res2d.set_index("Term")["NES"].astype(float)
        assert np.abs(ours - theirs[ours.index]).max() < 0.1

    def test_the_order_of_the_genes_does_not_matter(self, ranking):
        values, sets = ranking
        ties = values.round(1)
        pd.testing.assert_frame_equal(prerank(ties, sets), prerank(ties.sample(frac=1, random_state=1), sets))

    def test_shuffled_values_show_what_chance_finds(self, ranking):
        found = random_prerank(*ranking, n=20, progress=False)
        assert len(found) == 20 and (found["n_found"] > 0).mean() <= 0.2

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda v, s: (v[:10], s), "at least 15 genes"),
            (lambda v, s: (v.where(v < 2), s), "finite values"),
            (lambda v, s: (v, {"a": ["X", "Y", "Z"]}), "none of the 1 gene sets has 3 to 500 of the 300 ranked"),
            (lambda v, s: (pd.concat([v, v]), s), "more than once"),
        ],
    )
    def test_errors(self, ranking, change, message):
        with pytest.raises(ValueError, match=message):
            prerank(*change(*ranking))


class TestHighAgainstLow:
    @pytest.fixture(scope="class")
    def cells(self):
        """60 cells; gene 0 is high in the first 20, gene 1 in the others."""
        rng = np.random.default_rng(0)
        counts = rng.poisson(1.0, (60, 30)).astype(np.float32) + 0.5
        counts[:20, 0] += 20
        counts[20:, 1] += 20
        return AnnData(sparse.csr_matrix(np.log1p(counts)), var=pd.DataFrame(index=[f"G{i}" for i in range(30)]))

    def test_finds_what_goes_with_the_concept(self, cells):
        activation = np.r_[
            np.linspace(2, 1, 20), np.full(20, 0.1), np.zeros(20)
        ]  # the median of the active ones: about 0.6
        table = high_against_low(cells, activation)
        assert table.index[table["regulation"] == "up"].tolist() == ["G0"]
        assert table.index[table["regulation"] == "down"].tolist() == ["G1"]

    def test_a_concept_that_is_never_silent(self, cells):
        table = high_against_low(cells, np.r_[np.full(20, 2.0), np.full(40, 1.0)] + np.linspace(0.1, 0, 60))
        assert table.loc["G0", "regulation"] == "up"

    def test_a_concept_that_is_silent(self, cells):
        with pytest.raises(ValueError, match="group has 0 cells"):
            high_against_low(cells, np.zeros(60))


def test_b_cell_genes_are_about_b_cells():
    panel = sorted({gene for genes in gene_sets().values() for gene in genes})
    genes = ["CD79A", "CD79B", "MS4A1", "CD19", "BLK"]
    table = over_representation(genes, on_panel(gene_sets(), panel), panel)
    assert "B cells" in table.loc[0, "set"] and table.loc[0, "qvalue"] < 1e-4
