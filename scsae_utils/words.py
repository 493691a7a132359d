"""From a list of genes to the words that describe them (paper Sec. 2.3, "textual gene descriptions").

Each gene's NCBI description becomes a set of words; words that a tenth of the genes share say nothing and are
dropped; what is left is counted over a list of genes. The paper shows the counts as a word cloud. A count alone
favours words that are frequent anyway, so :func:`word_counts` puts the expected count beside it, and a q-value of ours.

Descriptions are plain text from outside: who shows them as HTML has to escape them.
"""

from __future__ import annotations

import csv
import logging
import re
import unicodedata
import zlib
from collections import Counter
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, hypergeom
from wordcloud import STOPWORDS

logger = logging.getLogger(__name__)

GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "κ": "kappa", "‐": "-"}
RUN = re.compile(r"[^\W_]+(?:-[^\W_]+)*")  # letters and digits, parts joined by hyphens
LYMPHOCYTE = re.compile(r"\b([a-z]) (?=cells?\b|lymphocytes?\b)")  # "T cell" is "T-cell"
TOO_SHORT = re.compile(r"\d+[a-z]?|[^\W\d_]")  # a number, a number with one letter (2b), a single letter
OTHER_GENE = re.compile(r".*-(AS|IT|OT|DT)\d*")  # RNA genes named after their neighbour, which lists them as aliases


@lru_cache(maxsize=1)
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


@lru_cache(maxsize=1)
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


def _symbols(symbols) -> np.ndarray:
    """Check a list of gene symbols: (n,) strings, at least one, each once."""
    if isinstance(symbols, str):
        raise ValueError(f"expected a list of gene symbols, not the single string {symbols!r}")
    symbols = np.array([str(symbol) for symbol in symbols], dtype=object)
    if len(symbols) == 0:
        raise ValueError("the list of genes is empty")
    if len(set(symbols)) < len(symbols):
        twice = [symbol for symbol, n in Counter(symbols).items() if n > 1]
        raise ValueError(f"{len(twice)} gene symbols occur more than once: {_some(twice)}")
    return symbols


def _some(names, n: int = 5) -> str:
    names = list(names)
    return ", ".join(map(str, names[:n])) + (", ..." if len(names) > n else "")


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
    ``designations`` (other names, separated by ``|``), ``text`` (both; empty if unknown), ``known`` (bool). How many
    are unknown is logged.

    Raises
    ------
    ValueError
        If the list is empty, a symbol occurs twice, or no gene is known.
    """
    symbols = _symbols(symbols)
    current = [_alias_to_symbol().get(symbol, symbol) for symbol in symbols]
    table = _table()[["name", "designations"]].reindex(current).fillna("")
    table["text"] = (table["name"] + "|" + table["designations"]).str.strip("|")
    table["known"] = table["name"].ne("").to_numpy()
    table.insert(0, "current", np.where(table["known"], current, ""))
    table.index = pd.Index(symbols, name="symbol")
    _report_unknown(table.index[~table["known"]], len(table))
    return table


def _report_unknown(unknown, n: int) -> None:
    if len(unknown) == n:
        raise ValueError(f"none of the {n} genes has a description ({_some(unknown)}): are they human gene symbols?")
    if len(unknown):
        logger.info("%d of %d genes have no description: %s", len(unknown), n, _some(unknown, 10))


def _texts(symbols, source: str | Path) -> pd.Series:
    """Description of each gene, empty if unknown; index: the symbols given."""
    if source == "ncbi":
        return describe(symbols)["text"]
    symbols = _symbols(symbols)
    table = _read_texts(Path(source))
    texts = pd.Series(
        [table.get(symbol, table.get(_alias_to_symbol().get(symbol, symbol), "")) for symbol in symbols],
        pd.Index(symbols, name="symbol"),
        dtype=object,
    )
    _report_unknown(texts.index[texts == ""], len(texts))
    return texts


def _read_texts(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"no gene descriptions {str(path)!r}: give 'ncbi' or a table (columns symbol, text)")
    separator = "," if ".csv" in path.suffixes else "\t"
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path.name} is not a table of text (tab-separated, or .csv), UTF-8: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError(f"{path.name} has rows with more fields than its header: quote texts that hold the separator")
    missing = [column for column in ("symbol", "text") if column not in table]
    if missing:
        raise ValueError(f"{path.name} lacks the column {' and '.join(missing)}; it has {_some(table.columns)}")
    return table.fillna("").groupby("symbol")["text"].agg(" ".join).str.strip().to_dict()


def tokenise(text: str) -> set[str]:
    """The words of a description, in lower case.

    Hyphens separate words (``alpha-2-macroglobulin``: alpha, macroglobulin); a pair with a single letter or a number
    is kept as well, because only whole it says something (``T-cell`` and ``T cell``: cell, t-cell; ``IL-2``: il,
    il-2). Names with digits are words (``cd4``, ``p53``). Numbers, single letters and English stop words (those of
    wordcloud) are not.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    for letter, name in GREEK.items():
        text = text.replace(letter, name)
    words: set[str] = set()
    for run in RUN.findall(LYMPHOCYTE.sub(r"\1-", text)):
        parts = run.split("-")
        good = {part for part in parts if not TOO_SHORT.fullmatch(part) and part not in STOPWORDS}
        words |= good
        if len(parts) == 2 and len(good) == 1 and all(part in good or TOO_SHORT.fullmatch(part) for part in parts):
            words.add(run)
    return words


def _words_and_shares(symbols, source: str | Path) -> tuple[pd.Series, pd.Series]:
    texts = _texts(symbols, source)
    words = pd.Series([tokenise(text) for text in texts], texts.index, name="words", dtype=object)
    counts = pd.Series(Counter(word for found in words for word in found), dtype=int)
    return words, counts / (texts != "").sum()


def _check_share(max_share: float) -> None:
    if not 0 < max_share <= 1:
        raise ValueError(f"max_share is a share of the genes, above 0 and at most 1, not {max_share!r}")


def common_words(symbols, source: str | Path = "ncbi", max_share: float = 0.1) -> pd.DataFrame:
    """The words that :func:`gene_words` drops, to be looked at: none of them should matter (paper Sec. 2.3).

    The smaller and the more uniform the universe, the more words go, ``antigen`` among them in a panel of immune
    genes; name those worth keeping in ``gene_words(..., keep=...)``. Parameters and errors are those of it.

    Returns
    -------
    ``word``, ``share`` (of the described genes), most frequent first.
    """
    _check_share(max_share)
    _, shares = _words_and_shares(symbols, source)
    table = shares[shares >= max_share].rename_axis("word").reset_index(name="share")
    return table.sort_values(["share", "word"], ascending=[False, True], ignore_index=True)


def gene_words(symbols, source: str | Path = "ncbi", max_share: float = 0.1, keep=()) -> pd.Series:
    """The unique words of each gene's description, without the common ones.

    Parameters
    ----------
    symbols
        (n,) gene symbols, each once: the universe, that is all genes that were measured, not the list of interest.
    source
        ``"ncbi"``, or a table (tab-separated, or ``.csv``; also compressed) with columns ``symbol`` and ``text``.
        Several rows of a gene are joined.
    max_share
        Words in at least this share of the described genes are dropped; see :func:`common_words`.
    keep
        Words that stay although they are common.

    Returns
    -------
    (n,) sets of words, indexed by the symbols given; empty for genes without a description.

    Raises
    ------
    FileNotFoundError
        If the source is no file.
    ValueError
        If the list is empty, a symbol occurs twice, the file has no columns ``symbol`` and ``text``, or no gene has a
        description.
    """
    _check_share(max_share)
    words, shares = _words_and_shares(symbols, source)
    common = set(shares.index[shares >= max_share]) - set(keep)
    return words.map(lambda found: found - common)


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
    have it), ``genes`` (which, separated by commas), ``expected`` (mean count in a random list), ``pvalue``,
    ``qvalue``. Genes without words take no part, neither in the list nor in the universe.

    Raises
    ------
    ValueError
        If the list is empty, has genes outside of the universe, or none of its genes has a word.
    """
    genes = _symbols(genes)
    outside = [gene for gene in genes if gene not in words.index]
    if outside:
        raise ValueError(f"{len(outside)} genes are not in the universe that the words were made for: {_some(outside)}")
    described = words[words.map(len) > 0]
    chosen = [gene for gene in genes if gene in described.index]
    if not chosen:
        raise ValueError(f"none of the {len(genes)} genes has a word of its own in its description ({_some(genes)})")
    universe = pd.Series(Counter(word for found in described for word in found)).sort_index()
    owners: dict[str, list[str]] = {}
    for gene in chosen:
        for word in described[gene]:
            owners.setdefault(word, []).append(gene)
    count = universe.index.map(lambda word: len(owners.get(word, ()))).to_numpy()
    table = pd.DataFrame({"word": universe.index, "count": count})
    table["genes"] = [",".join(owners.get(word, ())) for word in universe.index]
    table["expected"] = universe.to_numpy() * len(chosen) / len(described)
    tested = (universe >= min_genes).to_numpy()
    table["pvalue"] = table["qvalue"] = np.nan
    if tested.any():
        pvalue = hypergeom.sf(count[tested] - 1, len(described), universe[tested], len(chosen)).clip(0, 1)
        table.loc[tested, "pvalue"] = pvalue
        table.loc[tested, "qvalue"] = false_discovery_control(pvalue)
    table = table[table["count"] > 0]
    return table.sort_values(["count", "pvalue", "word"], ascending=[False, True, True], ignore_index=True)
