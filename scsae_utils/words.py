"""From a list of genes to the words that describe them (paper Sec. 2.3, "textual gene descriptions").

Each gene's NCBI description becomes a set of words; words that a tenth of the genes share say nothing and are
dropped; what is left is counted over a list of genes. The paper shows the counts as a word cloud. Ours beside it: words
of one stem are one word, shown as it is mostly written (``receptors`` and ``receptor``); pairs of words count too
(``class II``, ``T cell``); and since a count alone favours words that are frequent anyway, :func:`word_counts` puts the
expected count and a q-value beside it. No word is *enriched* without its q-value.

Descriptions are plain text from outside: who shows them as HTML has to escape them.
"""

from __future__ import annotations

import csv
import logging
import re
import unicodedata
import zlib
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import snowballstemmer
from wordcloud import STOPWORDS

from .download import local_file
from .enrichment import check_symbols, over_representation, some

logger = logging.getLogger(__name__)

# Summaries of all genes of all species by NCBI GeneID, made anew every day.
REFSEQ = "https://ftp.ncbi.nlm.nih.gov/gene/DATA/gene_summary.gz"
GENE_INFO = "https://ftp.ncbi.nlm.nih.gov/gene/DATA/GENE_INFO/Mammalia/Homo_sapiens.gene_info.gz"
HUMAN = "9606"
PROVIDED_BY = re.compile(r"\[(?:supplied|provided) by [^\]]*\]\.?|Sequence Note:.*|Publication Note:.*", re.S)

GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "κ": "kappa", "‐": "-"}
PIECE = re.compile(r"[^\W_]+")
ROMAN = re.compile(r"I{1,3}|IV|VI{0,3}|IX|XI{0,3}")  # says something at the end of a pair: class II, factor V
TOO_SHORT = re.compile(r"\d+[a-zA-Z]?|[^\W\d_]")  # a number, a number with one letter (2b), a single letter
OTHER_GENE = re.compile(r".*-(AS|IT|OT|DT)\d*")  # RNA genes named after their neighbour, which lists them as aliases
# Names that screens gave by the number: "epididymis secretory protein Li 299", "renal carcinoma antigen NY-REN-42".
SERIAL = re.compile(r"epididymis|(growth-inhibiting|proliferation-inducing) (gene|protein)|\bNY-[A-Z]+-\d")
STEMMER = snowballstemmer.stemmer("english")


@cache
def _table() -> pd.DataFrame:
    path = files("scsae_utils") / "data" / "genes.tsv.gz"
    with path.open("rb") as file:
        table = pd.read_csv(
            file,
            sep="\t",
            dtype=str,
            keep_default_na=False,
            quoting=csv.QUOTE_NONE,
            compression="gzip",
            encoding="utf-8",
        )
    return table.astype({"entrez": int}).set_index("symbol")


def gene_table() -> pd.DataFrame:
    """The human protein-coding genes of NCBI Gene, February 2016 (see ``data/README.md``).

    Returns
    -------
    (20,913 genes, indexed by ``symbol``) ``entrez`` (int), ``name``, ``designations`` and ``aliases`` (both
    separated by ``|``, possibly empty). A copy: changing it changes nothing elsewhere.
    """
    return _table().copy()


@cache
def _alias_to_symbol() -> dict[str, str]:
    """Aliases that belong to one gene only and are no gene's symbol."""
    owners: dict[str, set[str]] = {}
    for symbol, aliases in _table()["aliases"].items():
        for alias in filter(None, aliases.split("|")):
            owners.setdefault(alias, set()).add(symbol)
    current = set(_table().index)
    return {
        alias: next(iter(symbols))
        for alias, symbols in owners.items()
        if len(symbols) == 1 and alias not in current and not OTHER_GENE.fullmatch(alias)
    }


def current_symbols(symbols) -> list[str]:
    """NCBI's present symbol of each gene, where an old one leads to one gene only; the symbol itself otherwise."""
    return [_alias_to_symbol().get(symbol, symbol) for symbol in symbols]


def describe(symbols) -> pd.DataFrame:
    """NCBI's description of each gene.

    An old symbol is looked up under its present name, whatever else is in the list.

    Parameters
    ----------
    symbols
        (n,) gene symbols, each once.

    Returns
    -------
    (n genes, indexed by the symbols given) ``current`` (symbol in the gene table, empty if unknown), ``name``,
    ``designations`` (other names, separated by ``|``), ``text`` (both, without names such as "growth-inhibiting protein
    20" that screens gave by the number and that say nothing about a gene; empty if unknown), ``known`` (bool). How many
    are unknown is logged.

    Raises
    ------
    ValueError
        If the list is empty, a symbol occurs twice, or no gene is known.
    """
    symbols = check_symbols(symbols)
    current = current_symbols(symbols)
    table = _table()[["name", "designations"]].reindex(current).fillna("")
    told = table["designations"].map(lambda names: "|".join(n for n in names.split("|") if not SERIAL.search(n)))
    table["text"] = (table["name"] + "|" + told).str.strip("|")
    table["known"] = table["name"].ne("").to_numpy()
    table.insert(0, "current", np.where(table["known"], current, ""))
    table.index = pd.Index(symbols, name="symbol")
    _report_unknown(table.index[~table["known"]], len(table))
    return table


def _report_unknown(unknown, n: int) -> None:
    if len(unknown) == n:
        raise ValueError(f"none of the {n} genes has a description ({some(unknown)}): are they human gene symbols?")
    if len(unknown):
        logger.info("%d of %d genes have no description: %s", len(unknown), n, some(unknown, 10))


def _texts(symbols, source: str | Path) -> pd.Series:
    """Description of each gene, empty if unknown; index: the symbols given."""
    if source == "ncbi":
        return describe(symbols)["text"]
    symbols = check_symbols(symbols)
    table = _read_refseq(local_file(REFSEQ), local_file(GENE_INFO)) if source == "refseq" else _read_texts(source)
    texts = pd.Series(
        [table.get(symbol, table.get(current, "")) for symbol, current in zip(symbols, current_symbols(symbols))],
        pd.Index(symbols, name="symbol"),
        dtype=object,
    )
    _report_unknown(texts.index[texts == ""], len(texts))
    return texts


def _read_texts(source: str | Path) -> dict[str, str]:
    try:
        path = local_file(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no gene descriptions {str(source)!r}: give 'ncbi', 'refseq', or the path or URL of a table with columns "
            "symbol and text"
        ) from error
    table = _read_table(path, "," if ".csv" in path.suffixes else "\t", ["symbol", "text"])
    return table.fillna("").groupby("symbol")["text"].agg(" ".join).str.strip().to_dict()


def _read_refseq(path: Path, names: Path) -> dict[str, str]:
    """NCBI's summaries of human genes, without the notes on who wrote them.

    By the present symbol of ``names`` (``gene_info``), and by that of our table, which older data have.
    """
    table = _read_table(path, "\t", ["#tax_id", "GeneID", "Summary"], quoting=csv.QUOTE_NONE)
    human = table[table["#tax_id"] == HUMAN].set_index("GeneID")["Summary"]
    human = human.str.replace(PROVIDED_BY, "", regex=True).str.strip().to_dict()
    info = _read_table(names, "\t", ["GeneID", "Symbol"], quoting=csv.QUOTE_NONE)
    numbers = [*_table()["entrez"].astype(str).items(), *zip(info["Symbol"], info["GeneID"])]
    return {symbol: human[n] for symbol, n in numbers if n in human}  # of genes that share a symbol, one has a summary


def _read_table(path: Path, separator: str, columns: list[str], **options) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8", **options)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path.name} is not a table of text (tab-separated, or .csv), UTF-8: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError(f"{path.name} has rows with more fields than its header: quote texts that hold the separator")
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{path.name} lacks the column {' and '.join(missing)}; it has {some(table.columns)}")
    return table


@cache
def _stem(word: str) -> str:
    return STEMMER.stemWord(word)


def tokenise(text: str, stem: bool = True, bigrams: bool = True) -> list[tuple[str, str]]:
    """The words of a description, and pairs of words: what each counts as, and how it is written.

    Hyphens separate words, as blanks do (``alpha-2-macroglobulin``: alpha, macroglobulin). Names with digits are words
    (``CD4``, ``p53``); numbers, single letters and English stop words (those of wordcloud) are not. A pair is two words
    beside each other, or a word after a single letter (``T cell`` and ``T-cell``), before a Roman numeral (``class I``)
    or joined to a number or letter by a hyphen (``IL-2``): only whole these say something.

    Parameters
    ----------
    stem
        Count words by their English (Snowball) stem: ``receptor`` and ``receptors`` are one.
    bigrams
        Pairs of words too.

    Returns
    -------
    ``(key, written)`` in the order of the text, for example ``("t cell", "T-cell")``; a word that occurs again is there
    again.
    """
    text = unicodedata.normalize("NFKC", text)
    for letter, name in GREEK.items():
        text = text.replace(letter, name)
    pieces = list(PIECE.finditer(text))
    words = [piece[0] for piece in pieces]
    keys = [_stem(word.lower()) if stem else word.lower() for word in words]
    short = [bool(TOO_SHORT.fullmatch(word)) for word in words]
    roman = [bool(ROMAN.fullmatch(word)) for word in words]
    good = [not (s or r or w.lower() in STOPWORDS) for w, s, r in zip(words, short, roman)]
    gaps = [
        "",
        *(text[a.end() : b.start()] for a, b in zip(pieces, pieces[1:])),
        "",
    ]  # before each word, after the last
    found = [(keys[i], words[i]) for i in range(len(words)) if good[i]]
    for i in range(len(words) - 1 if bigrams else 0):
        before, gap, after = gaps[i : i + 3]
        alone = gap == "-" and before != "-" and after != "-"  # IL-2, but not the alpha-2 of alpha-2-macroglobulin
        first = good[i] or (short[i] and (alone or words[i].isupper() and not roman[i]))
        second = good[i + 1] or roman[i + 1] or (short[i + 1] and alone)
        if gap in (" ", "-") and first and second and (good[i] or good[i + 1]):
            found.append((f"{keys[i]} {keys[i + 1]}", f"{words[i]}{gap}{words[i + 1]}"))
    return found


def _words_and_shares(symbols, source, stem: bool, bigrams: bool) -> tuple[pd.Series, pd.Series]:
    """Words of each gene as they are mostly written, and the share of the described genes that have each."""
    texts = _texts(symbols, source)
    found = [set(tokenise(text, stem, bigrams)) for text in texts]
    written: dict[str, Counter] = {}
    for key, form in (pair for pairs in found for pair in pairs):
        written.setdefault(key, Counter())[form] += 1
    shown = {
        key: max(forms, key=lambda form: (forms[form], form)) for key, forms in written.items()
    }  # ties: lower case
    words = pd.Series([{shown[key] for key, _ in pairs} for pairs in found], texts.index, name="words", dtype=object)
    counts = pd.Series(Counter(word for one in words for word in one), dtype=int)
    return words, counts / (texts != "").sum()


def _check_share(max_share: float) -> None:
    if not 0 < max_share <= 1:
        raise ValueError(f"max_share is a share of the genes, above 0 and at most 1, not {max_share!r}")


def common_words(
    symbols, source: str | Path = "ncbi", max_share: float = 0.1, stem: bool = True, bigrams: bool = True
) -> pd.DataFrame:
    """The words that :func:`gene_words` drops, to be looked at: none of them should matter (paper Sec. 2.3).

    The smaller and the more uniform the universe, the more words go, ``antigen`` among them in a panel of immune
    genes; name those worth keeping in ``gene_words(..., keep=...)``. Parameters and errors are those of it.

    Returns
    -------
    ``word``, ``share`` (of the described genes), most frequent first.
    """
    _check_share(max_share)
    _, shares = _words_and_shares(symbols, source, stem, bigrams)
    table = shares[shares >= max_share].rename_axis("word").reset_index(name="share")
    return table.sort_values(["share", "word"], ascending=[False, True], ignore_index=True)


def gene_words(
    symbols, source: str | Path = "ncbi", max_share: float = 0.1, keep=(), stem: bool = True, bigrams: bool = True
) -> pd.Series:
    """The unique words of each gene's description, without the common ones.

    Parameters
    ----------
    symbols
        (n,) gene symbols, each once: the universe, that is all genes that were measured, not the list of interest.
    source
        ``"ncbi"``: names and designations, which come with the package. ``"refseq"``: the summaries of NCBI Gene,
        downloaded once (see :mod:`scsae_utils.download`). Or the path or URL of a table (tab-separated, or ``.csv``;
        also compressed) with columns ``symbol`` and ``text``. Several rows of a gene are joined.
    max_share
        Words in at least this share of the described genes are dropped; see :func:`common_words`.
    keep
        Words that stay although they are common, in any of their forms.
    stem, bigrams
        See :func:`tokenise`. The paper has neither, as far as it says.

    Returns
    -------
    (n,) sets of words, indexed by the symbols given; empty for genes without a description.

    Raises
    ------
    FileNotFoundError
        If the source is no file.
    ConnectionError
        If a download fails.
    ValueError
        If the list is empty, a symbol occurs twice, the file has no columns ``symbol`` and ``text``, a downloaded file
        has changed, or no gene has a description.
    """
    _check_share(max_share)
    words, shares = _words_and_shares(symbols, source, stem, bigrams)
    kept = {_key(word, stem) for word in keep}
    common = {word for word in shares.index[shares >= max_share] if _key(word, stem) not in kept}
    return words.map(lambda found: found - common)


def _key(word: str, stem: bool = True) -> str:
    return " ".join(_stem(part) if stem else part for part in PIECE.findall(word.lower()))


def without_parts(counts: pd.DataFrame) -> pd.DataFrame:
    """A table of :func:`word_counts` without the words that a pair says better.

    A word is left out if a pair that holds it stands for the same genes of the list: ``class`` beside ``class II``.
    """
    pairs = {(part, row.genes) for row in counts.itertuples() if " " in (key := _key(row.word)) for part in key.split()}
    drop = [(_key(row.word), row.genes) in pairs for row in counts.itertuples()]
    return counts[~np.array(drop, bool)].reset_index(drop=True)


def word_sets(words: pd.Series) -> dict[str, list[str]]:
    """Each word as the set of its genes, for the functions of :mod:`scsae_utils.enrichment`; ``words`` as above."""
    sets: dict[str, list[str]] = {}
    for gene, found in words.items():
        for word in sorted(found):
            sets.setdefault(word, []).append(gene)
    return sets


def word_counts(genes, words: pd.Series, min_genes: int = 3) -> pd.DataFrame:
    """Count the words of a list of genes (the word cloud of Fig. 2d), and compare with chance.

    The paper has the count. ``expected``, ``pvalue`` and ``qvalue`` are ours: they compare with random lists of as
    many genes of the universe (hypergeometric, one-sided; Benjamini-Hochberg over all tested words of the universe).
    Genes of one family share their words and their expression, so a small q-value can mean one family, not one
    function: look at ``genes``.

    Parameters
    ----------
    genes
        (k,) gene symbols, each once, all in the universe.
    words
        From :func:`gene_words`, for the universe.
    min_genes
        Words in fewer genes of the universe are counted but not tested (p and q are NaN): too few to say anything.

    Returns
    -------
    One row for each word of the list, most frequent first, then by p-value: ``word``, ``count`` (genes of the list that
    have it), ``size`` (genes of the universe that have it), ``genes`` (which of the list, separated by commas),
    ``expected`` (mean count in a random list), ``pvalue``, ``qvalue``. Genes without words take no part, neither in
    the list nor in the universe.

    Raises
    ------
    ValueError
        If the list is empty, has genes outside of the universe, or none of its genes has a word.
    """
    genes = check_symbols(genes)
    outside = [gene for gene in genes if gene not in words.index]
    if outside:
        raise ValueError(f"{len(outside)} genes are not in the universe that the words were made for: {some(outside)}")
    described = words[words.map(len) > 0]
    chosen = [gene for gene in genes if gene in described.index]
    if not chosen:
        raise ValueError(f"none of the {len(genes)} genes has a word of its own in its description ({some(genes)})")
    table = over_representation(chosen, word_sets(described), described.index, min_genes)
    table = table[table["count"] > 0].rename(columns={"set": "word"})
    return table.sort_values(["count", "pvalue", "word"], ascending=[False, True, True], ignore_index=True)
