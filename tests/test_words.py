"""From gene lists to words: the shipped gene table, old symbols, tokens, common words, counts against chance."""

import gzip

import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact
from server import serving

from scsae_utils.words import common_words, describe, gene_table, gene_words, tokenise, without_parts, word_counts


@pytest.fixture
def source(tmp_path):
    """Ten genes: "kinase" in all, "platelet" in A and B, "actin" in A, B and C."""
    texts = ["platelet actin kinase", "platelet, actin kinase", "actin kinase"] + ["kinase of another sort"] * 7
    path = tmp_path / "texts.tsv"
    pd.DataFrame({"symbol": list("ABCDEFGHIJ"), "text": texts}).to_csv(path, sep="\t", index=False)
    return path


class TestGeneTable:
    def test_has_every_gene_once_with_a_name(self):
        table = gene_table()
        assert len(table) == 20_913 and table.index.is_unique and table["entrez"].is_unique
        assert (table["name"] != "").all()
        assert table.loc["PPBP", "entrez"] == 5473
        assert "beta-thromboglobulin" in table.loc["PPBP", "designations"].split("|")

    def test_is_plain_text(self):
        text = gene_table()["designations"]
        assert not text.str.contains("&#|\t|\n").any()

    def test_a_changed_copy_changes_nothing_else(self):
        mine = gene_table()
        mine.loc["PPBP", "name"] = "changed"
        assert gene_table().loc["PPBP", "name"] == "pro-platelet basic protein"


class TestOldNames:
    @pytest.mark.parametrize("old, current", [("IGJ", "JCHAIN"), ("AMICA1", "JAML"), ("CD79A", "CD79A")])
    def test_a_gene_is_described_under_its_present_name(self, old, current):
        assert describe([old])["current"].tolist() == [current]

    def test_a_present_name_stays_although_it_is_also_an_alias(self):
        assert "NAT1" in gene_table().loc["SLC38A3", "aliases"].split("|")
        assert describe(["NAT1"])["current"].tolist() == ["NAT1"]

    def test_an_alias_of_several_genes_is_unknown(self):
        owners = gene_table()["aliases"].str.split("|").map(lambda aliases: "ARP3" in aliases)
        assert owners.sum() > 1
        assert describe(["ARP3", "CD79A"])["current"].tolist() == ["", "CD79A"]

    def test_an_antisense_gene_is_not_its_neighbour(self):
        assert "HNRNPU-AS1" in gene_table().loc["HNRNPU", "aliases"].split("|")
        assert describe(["HNRNPU-AS1", "CD79A"])["current"].tolist() == ["", "CD79A"]


class TestDescribe:
    def test_name_and_designations(self):
        row = describe(["CD79A"]).loc["CD79A"]
        assert row["current"] == "CD79A" and row["known"]
        assert row["name"] == "CD79a molecule"
        assert row["text"].startswith("CD79a molecule|") and row["text"].endswith("surface IgM-associated protein")

    def test_an_old_name_is_found_and_kept_as_the_label(self):
        table = describe(["IGJ", "JCHAIN"])
        assert table.index.tolist() == ["IGJ", "JCHAIN"]
        assert table.loc["IGJ", "current"] == "JCHAIN" and table.loc["IGJ", "text"] == table.loc["JCHAIN", "text"]

    def test_unknown_genes_are_empty_and_reported(self, caplog):
        with caplog.at_level("INFO"):
            table = describe(["CD79A", "RP11-782C8.1"])
        assert table["known"].tolist() == [True, False]
        assert table.loc["RP11-782C8.1", ["current", "name", "designations", "text"]].tolist() == [""] * 4
        assert "1 of 2 genes have no description: RP11-782C8.1" in caplog.text

    @pytest.mark.parametrize(
        "symbols, message",
        [
            ([], "empty"),
            (["X1", "X2"], "none of the 2 genes has a description"),
            (["CD79A", "CD79A"], "more than once: CD79A"),
            ("CD79A", "not the single string"),
        ],
    )
    def test_errors(self, symbols, message):
        with pytest.raises(ValueError, match=message):
            describe(symbols)


def written(text, **options):
    return {form for _, form in tokenise(text, **options)}


class TestTokenise:
    @pytest.mark.parametrize(
        "text, words",
        [
            ("Pro-platelet basic protein", {"Pro", "platelet", "basic", "protein"}),
            ("alpha-2-macroglobulin", {"alpha", "macroglobulin"}),
            ("CD4 p53 S100A8", {"CD4", "p53", "S100A8"}),
            ("5'-nucleotidase 1 2b x", {"nucleotidase"}),
            ("the chain of an actin, with other ones", {"chain", "actin", "ones"}),
            ("Alzheimer's", {"Alzheimer"}),
            ("β-alanyl cancer‐associated", {"beta", "alanyl", "cancer", "associated"}),
            ("<b>platelet</b>", {"platelet"}),
            ("class II, factor V", {"class", "factor"}),
            ("", set()),
            ("-- -1- 12", set()),
        ],
    )
    def test_words(self, text, words):
        assert written(text, bigrams=False) == words

    @pytest.mark.parametrize(
        "text, pairs",
        [
            ("class II antigen", {"class II"}),  # not "II antigen"
            ("HLA class I", {"HLA class", "class I"}),
            ("a T cell and B-cells", {"T cell", "B-cells"}),
            ("IL-2, interleukin 2", {"IL-2"}),
            ("beta chain|alpha chain; lambda.", {"beta chain", "alpha chain"}),  # none across the sign between names
            ("member of the family", set()),  # none across a stop word
            ("alpha-2-macroglobulin", set()),
            ("the 2b-x 1", set()),
        ],
    )
    def test_pairs(self, text, pairs):
        assert written(text) - written(text, bigrams=False) == pairs

    def test_words_of_one_stem_count_as_one(self):
        keys = [{key for key, _ in tokenise(text)} for text in ("T-cell receptors", "T cell receptor")]
        assert keys[0] == keys[1] == {"cell", "receptor", "t cell", "cell receptor"}
        assert {key for key, _ in tokenise("receptors", stem=False)} == {"receptors"}


class TestGeneWords:
    def test_common_words_are_dropped_and_can_be_seen(self, source):
        genes = list("ABCDEFGHIJ")
        words = gene_words(genes, source, max_share=0.3, bigrams=False)
        assert words["A"] == {"platelet"} and words["C"] == set() and words.index.tolist() == genes
        common = common_words(genes, source, max_share=0.3, bigrams=False)
        assert common["word"].tolist() == ["kinase", "another", "sort", "actin"]
        assert common["share"].tolist() == [1.0, 0.7, 0.7, 0.3]  # "at least" this share

    def test_common_words_can_be_kept(self, source):
        assert gene_words(list("ABCDEFGHIJ"), source, max_share=0.3, keep=["Actins"], bigrams=False)["C"] == {"actin"}

    def test_the_share_is_that_of_the_described_genes_of_the_universe(self, source):
        genes = ["A", "D", "unknown"]
        assert gene_words(genes, source, max_share=0.5, bigrams=False)["A"] == set()  # each word: 1 of 2
        assert gene_words(genes, source, max_share=0.6, bigrams=False)["A"] == {"platelet", "actin"}

    def test_words_are_shown_as_they_are_mostly_written(self, tmp_path):
        texts = {"A": "T-cell receptor", "B": "T cell receptors", "C": "T cell Receptors", "D": "another"}
        pd.Series(texts, name="text").rename_axis("symbol").to_csv(tmp_path / "t.csv")
        words = gene_words(list("ABCD"), tmp_path / "t.csv", max_share=0.9)
        # each way of writing "receptor" occurs once: the one in lower case that comes last in the alphabet
        assert words["A"] == words["B"] == words["C"] == {"cell", "receptors", "T cell", "cell receptors"}

    def test_ncbi_is_the_default(self):
        words = gene_words(["PPBP", "MYL9", "RP11-782C8.1"], max_share=1)
        assert "platelet" in words["PPBP"] and "myosin" in words["MYL9"] and words["RP11-782C8.1"] == set()

    def test_old_names_are_looked_up_under_the_present_one(self, tmp_path):
        (tmp_path / "t.csv").write_text("symbol,text\nJCHAIN,joining chain\nA,x1\nB,y1\n")
        assert gene_words(["IGJ", "A", "B"], tmp_path / "t.csv", max_share=0.9)["IGJ"] == {
            "joining",
            "chain",
            "joining chain",
        }

    def test_rows_of_one_gene_are_joined_and_nan_is_a_name(self, tmp_path):
        (tmp_path / "t.tsv.gz").write_bytes(gzip.compress(b"symbol\ttext\nA\tone word\nNA\tnan\nA\ttwo\n"))
        words = gene_words(["A", "NA"], tmp_path / "t.tsv.gz", max_share=1)
        assert words["A"] == {"one", "word", "two", "one word", "word two"} and words["NA"] == {"nan"}

    def test_refseq_summaries_are_downloaded_once(self, tmp_path, monkeypatch):
        lines = [
            "#tax_id\tGeneID\tSource\tSummary",
            '9606\t5473\tRefSeq\tA "platelet-derived" growth factor. [provided by RefSeq, May 2010].',
            "10090\t5473\tRefSeq\tof the mouse",
            "9606\t973\tRefSeq\tThe B cell receptor. Sequence Note: removed 1 base",
            "9606\t999999999\tRefSeq\tunknown",
            "9606\t51155\tRefSeq\tA jupiter protein.",
            "9606\t3045\tRefSeq\tA hemoglobin.",
        ]
        names = "#tax_id\tGeneID\tSymbol\tSynonyms\n9606\t5473\tPPBP\t-\n9606\t51155\tJPT1\tARM2|HN1\n"
        names += "9606\t3045\tHBD\t-\n9606\t100187828\tHBD\t-\n"  # a gene, and a locus that has its symbol
        monkeypatch.setenv("SCSAE_CACHE", str(tmp_path))
        files = {"/gene_summary.gz": "\n".join(lines), "/gene_info.gz": names}
        with serving({name: gzip.compress(text.encode()) for name, text in files.items()}) as (url, asked):
            monkeypatch.setattr("scsae_utils.words.REFSEQ", f"{url}/gene_summary.gz")
            monkeypatch.setattr("scsae_utils.words.GENE_INFO", f"{url}/gene_info.gz")
            for _ in range(2):
                words = gene_words(["PPBP", "CD79A", "JPT1", "HN1", "HBD"], "refseq", max_share=1, bigrams=False)
        assert words["PPBP"] == {"platelet", "derived", "growth", "factor"} and words["CD79A"] == {"cell", "receptor"}
        assert words["HBD"] == {"hemoglobin"}
        assert words["JPT1"] == words["HN1"] == {"jupiter", "protein"}  # the present symbol and that of older data
        assert asked == ["/gene_summary.gz", "/gene_info.gz"]

    def test_unknown_source(self):
        with pytest.raises(FileNotFoundError, match="no gene descriptions 'go'.*'ncbi'"):
            gene_words(["A"], "go")

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("t.tsv", b"gene\ttext\nA\tb\n", "lacks the column symbol; it has gene, text"),
            ("t.csv", b"a,b\n1,2\n", "lacks the column symbol and text"),
            ("t.tsv", b"symbol\ttext\nA\tb\tc\n", "more fields than its header"),
            ("t.tsv", b"symbol\ttext\nA\tb\nA\tb\tc\n", "not a table"),
            ("t.tsv", b'symbol\ttext\nA\t"open\nB\tb\n', "not a table"),
            ("t.tsv", b"", "not a table"),
            ("t.tsv", b"\xff\xfe\x00", "not a table"),
            ("t.tsv.gz", b"plain text", "not a table"),
            ("t.tsv.gz", gzip.compress(b"symbol\ttext\nA\tb\n" * 99)[:-20], "not a table"),
            ("t.tsv", b"symbol\ttext\nX\tb\n", "none of the 1 genes has a description"),
        ],
    )
    def test_files_that_are_not_such_tables(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            gene_words(["A"], tmp_path / name)

    @pytest.mark.parametrize("share", [0, -1, 1.5, float("nan")])
    def test_max_share_is_a_share(self, source, share):
        for function in (gene_words, common_words):
            with pytest.raises(ValueError, match="max_share"):
                function(["A"], source, max_share=share)


class TestWordCounts:
    @pytest.fixture
    def words(self):
        """Ten genes: "platelet" in three, "actin" in five, "rare" in one; "none" has no words."""
        words = {g: {"other"} for g in "DEFGHIJ"} | {"A": {"platelet", "rare"}, "B": {"platelet"}, "C": {"platelet"}}
        for gene in "ABDEF":
            words[gene] = words[gene] | {"actin"}
        return pd.Series(words | {"none": set()})

    def test_counts_genes_and_expectation(self, words):
        table = word_counts(["A", "B", "D", "none"], words).set_index("word")
        assert table["count"].to_dict() == {"actin": 3, "platelet": 2, "other": 1, "rare": 1}
        assert table.loc["platelet", "genes"] == "A,B"
        assert table.loc["platelet", "expected"] == pytest.approx(3 * 3 / 10)  # 3 of 10 described genes, 3 drawn
        assert list(table.index) == ["actin", "platelet", "other", "rare"]

    def test_p_values_are_those_of_fishers_exact_test(self, words):
        table = word_counts(["A", "B", "D"], words).set_index("word")
        # platelet: 2 of the 3 chosen and 1 of the 7 others; by hand (3*7 + 1) / 120
        assert table.loc["platelet", "pvalue"] == pytest.approx(22 / 120)
        assert table.loc["platelet", "pvalue"] == pytest.approx(fisher_exact([[2, 1], [1, 6]], "greater").pvalue)
        assert table.loc["actin", "pvalue"] == pytest.approx(10 / 120)

    def test_q_values_count_every_tested_word_of_the_universe(self, words):
        table = word_counts(["A", "B", "C"], words).set_index("word")
        assert table.loc["platelet", "pvalue"] == pytest.approx(1 / 120)
        assert table.loc["platelet", "qvalue"] == pytest.approx(3 / 120)  # "other" is tested too, though no gene has it
        assert "other" not in table.index

    def test_rare_words_are_counted_and_not_tested(self, words):
        row = word_counts(["A", "B", "D"], words).set_index("word").loc["rare"]
        assert row["count"] == 1 and np.isnan(row["pvalue"]) and np.isnan(row["qvalue"])

    def test_platelet_genes_are_about_platelets(self):
        others = gene_table().index[::40]
        words = gene_words(pd.unique(np.r_[["PPBP", "PF4", "GP9", "GP1BA", "ITGA2B"], others]))
        top = word_counts(["PPBP", "PF4", "GP9", "GP1BA", "ITGA2B"], words).iloc[0]
        assert top["word"] == "platelet" and top["count"] == 5 and top["qvalue"] < 1e-6

    def test_a_word_that_a_pair_says_better_is_left_out(self):
        words = pd.Series({"A": {"class", "class II", "MHC"}, "B": {"class", "class II"}, "C": {"class", "kinase"}})
        table = word_counts(["A", "B"], words, min_genes=1)
        assert set(table["word"]) == {"class", "class II", "MHC"}
        assert set(without_parts(table)["word"]) == {"class II", "MHC"}
        assert set(without_parts(word_counts(["A", "C"], words, min_genes=1))["word"]) >= {"class", "class II"}

    @pytest.mark.parametrize(
        "genes, message",
        [
            ([], "empty"),
            (["A", "Z"], "not in the universe.*: Z"),
            (["none"], "none of the 1 genes has a word"),
            (["A", "A"], "more than once"),
        ],
    )
    def test_errors(self, words, genes, message):
        with pytest.raises(ValueError, match=message):
            word_counts(genes, words)
