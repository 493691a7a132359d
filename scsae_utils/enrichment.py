"""Is a list of genes richer in a set of genes than chance? The test behind words and gene sets, and its nulls.

The background is always given, and is the *panel*: the genes that could have been found, because the cells have them
and the model knows them. Against all genes of the genome, any list from a panel of immune genes is about immunity.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import false_discovery_control, hypergeom


def check_symbols(symbols) -> np.ndarray:
    """Gene symbols (n,) as strings; at least one, each once.

    Raises
    ------
    ValueError
        If there is none, one occurs twice, or a single string is given in place of a list.
    """
    if isinstance(symbols, str):
        raise ValueError(f"expected a list of gene symbols, not the single string {symbols!r}")
    symbols = np.array([str(symbol) for symbol in symbols], dtype=object)
    if len(symbols) == 0:
        raise ValueError("the list of genes is empty")
    if len(set(symbols)) < len(symbols):
        twice = [symbol for symbol, n in Counter(symbols).items() if n > 1]
        raise ValueError(f"{len(twice)} gene symbols occur more than once: {some(twice)}")
    return symbols


def some(names, n: int = 5) -> str:
    """The first ``n`` names, and dots where there are more."""
    names = list(names)
    return ", ".join(map(str, names[:n])) + (", ..." if len(names) > n else "")


def over_representation(genes, sets: dict, panel, min_genes: int = 3, random=None) -> pd.DataFrame:
    """Hypergeometric test of every gene set for one list of genes (one-sided).

    p-values are those of ``gseapy.enrich``. q-values (Benjamini-Hochberg) are over every set that could have been
    found; gseapy leaves out the sets without a hit, which makes its q-values too small for short lists.

    Parameters
    ----------
    genes
        (k,) symbols, each once, all in the panel.
    sets
        Name to genes; genes outside of the panel are left out.
    panel
        (n,) the background: genes that could have been found.
    min_genes
        Sets with fewer genes in the panel are counted but not tested (p and q are NaN): too few to say anything.
    random
        (m, k) random lists, from :func:`random_lists`: adds ``p_random``.

    Returns
    -------
    One row for each set of the panel, smallest p-value first: ``set``, ``count`` (genes of the list that are in it),
    ``size`` (genes of the panel that are in it), ``genes`` (which of the list, separated by commas), ``expected`` (mean
    count of a random list), ``pvalue``, ``qvalue``; with ``random``, ``p_random``: share of the random lists that
    have as many genes in the set, the list itself counted in.

    Raises
    ------
    ValueError
        If the list is empty, has genes outside of the panel, or no set has a gene of the panel.
    """
    panel = pd.Index(check_symbols(panel))
    genes = check_symbols(genes)
    chosen = _rows(genes, panel)
    names, member = _membership(sets, panel)
    size = member.getnnz(axis=1)
    count, pvalue, qvalue = _test(chosen[None], member, min_genes)
    table = pd.DataFrame({"set": names, "count": count[:, 0], "size": size})
    among = member[:, chosen]  # columns in the order of the list
    listed = [genes[np.sort(among.indices[i:j])] if i < j else () for i, j in zip(among.indptr, among.indptr[1:])]
    table["genes"] = [",".join(found) for found in listed]
    table["expected"] = size * len(chosen) / len(panel)
    table["pvalue"], table["qvalue"] = pvalue[:, 0], qvalue[:, 0]
    if random is not None:
        hits = _counts(_lists(random, panel), member)
        table["p_random"] = (1 + (hits >= count).sum(axis=1)) / (1 + hits.shape[1])
        table.loc[table["pvalue"].isna(), "p_random"] = np.nan
    order = np.lexsort([names.astype(str), -table["count"], table["pvalue"]])
    return table.iloc[order].reset_index(drop=True)


def random_lists(genes, panel, n: int = 200, expression=None, bins: int = 10, seed: int = 0) -> np.ndarray:
    """Random lists of as many genes of the panel, alike in expression.

    Much expressed genes are found more often whatever is looked for, and share their functions (ribosome, MHC); random
    lists that are not matched would make such a list look better than it is.

    Parameters
    ----------
    genes
        (k,) symbols of the list to be matched.
    panel
        (p,) symbols.
    expression
        (p,) mean expression of each gene of the panel, or None: not matched. Genes are drawn without replacement from
        the ``bins`` quantiles of expression, as many from each as the list has there.

    Returns
    -------
    (n, k) symbols.
    """
    panel = pd.Index(check_symbols(panel))
    chosen = _rows(genes, panel)
    rng = np.random.default_rng(seed)
    level = np.zeros(len(panel), int)
    if expression is not None:
        expression = np.asarray(expression, float)
        if expression.shape != (len(panel),):
            raise ValueError(f"expression must have one value for each of {len(panel)} genes, not {expression.shape}")
        order = np.lexsort([rng.random(len(panel)), expression])  # equal values fall into bins at random
        level[order] = np.arange(len(panel)) * bins // len(panel)
    parts = []
    for i in np.unique(level[chosen]):
        members = np.flatnonzero(level == i)
        draws = rng.random((n, len(members))).argsort(axis=1)[:, : (level[chosen] == i).sum()]
        parts.append(members[draws])
    return panel.to_numpy()[np.hstack(parts)]


def best_of_random(random, sets: dict, panel, min_genes: int = 3) -> pd.DataFrame:
    """What random lists reach: one row each, with ``n_found`` (sets with q < 0.05) and ``best`` (smallest q-value).

    Parameters are those of :func:`over_representation`; a list that is no more than chance has an ``n_found`` of 0 in
    about 95 % of the rows.
    """
    panel = pd.Index(check_symbols(panel))
    _, member = _membership(sets, panel)
    _, _, qvalue = _test(_lists(random, panel), member, min_genes)
    tested = ~np.isnan(qvalue).all(axis=1)
    best = qvalue[tested].min(axis=0) if tested.any() else np.ones(len(random))
    return pd.DataFrame({"n_found": (qvalue < 0.05).sum(axis=0), "best": best})


def plain(set_name: str) -> str:
    """A gene set's name without number and collection: ``enriched in B cells (I) (M47.0)`` is ``genes of B cells``."""
    name = re.sub(r"\s*\((?:[MS]\d+(?:\.\d+)?|GO:\d+|[IVX]+)\)", "", set_name)
    if name.isupper() and "_" in name:  # MSigDB: REACTOME_MHC_CLASS_II_ANTIGEN_PRESENTATION
        name = name.split("_", 1)[1].replace("_", " ").lower()
    return re.sub("^enriched in ", "genes of ", name.strip())


def _rows(genes, panel: pd.Index) -> np.ndarray:
    genes = check_symbols(genes)
    rows = panel.get_indexer(genes)
    if (rows < 0).any():
        outside = genes[rows < 0]
        raise ValueError(f"{len(outside)} genes are not in the panel, the background of the test: {some(outside)}")
    return rows


def _lists(random, panel: pd.Index) -> np.ndarray:
    """Random lists (m, k) of symbols as rows of the panel."""
    random = np.asarray(random, dtype=object)
    rows = panel.get_indexer(random.ravel()).reshape(random.shape)
    if (rows < 0).any():
        raise ValueError(f"the random lists have genes outside of the panel: {some(random[rows < 0])}")
    return rows


def _counts(lists: np.ndarray, member: sparse.csr_matrix) -> np.ndarray:
    """Number of genes (sets, lists) that each list (m, k) has in each set."""
    drawn = np.zeros((member.shape[1], len(lists)), np.float32)
    drawn[lists.T, np.arange(len(lists))] = 1
    return (member.astype(np.float32) @ drawn).astype(int)


def _membership(sets: dict, panel: pd.Index) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Names of the sets with a gene in the panel, and (sets, panel) 1 where a gene is in a set."""
    sizes = [len(found) for found in sets.values()]
    rows = np.repeat(np.arange(len(sets)), sizes)
    columns = panel.get_indexer([gene for found in sets.values() for gene in found])
    there = columns >= 0
    member = sparse.csr_matrix((np.ones(there.sum(), int), (rows[there], columns[there])), (len(sets), len(panel)))
    member.data[:] = 1  # a gene that a set names twice counts once
    kept = member.getnnz(axis=1) > 0
    if not kept.any():
        raise ValueError(f"none of the {len(sets)} sets has a gene of the panel (first: {some(panel, 3)})")
    return np.array(list(sets), dtype=object)[kept], member[kept]


def _test(lists: np.ndarray, member: sparse.csr_matrix, min_genes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, p- and q-values (sets, lists) of lists (m, k) of columns of ``member``."""
    count = _counts(lists, member)
    size = member.getnnz(axis=1)
    tested = size >= min_genes
    pvalue, qvalue = np.full(count.shape, np.nan), np.full(count.shape, np.nan)
    if tested.any():
        p = hypergeom.sf(count[tested] - 1, member.shape[1], size[tested, None], lists.shape[1]).clip(0, 1)
        pvalue[tested], qvalue[tested] = p, false_discovery_control(p, axis=0)
    return count, pvalue, qvalue
