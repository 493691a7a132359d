"""Gene sets: where they come from, and which are enriched among a concept's genes.

``"btm"`` needs no network: the 346 blood transcription modules of Li et al. 2014 (Nat. Immunol. 15:195), from the
package ``BTM`` (MIT licence). Reactome, GO and any other collection come as GMT files, by path or URL.

The background of every test is the panel: the genes that the cells have and the model knows. A set with fewer than
three genes there cannot be tested, and small panels leave many such sets.
"""

from __future__ import annotations

import gzip
import logging
import re
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from tqdm.auto import tqdm

from .download import local_file
from .enrichment import check_symbols, some
from .expression import differential_expression
from .words import current_symbols

log = logging.getLogger(__name__)

MSIGDB = "https://data.broadinstitute.org/gsea-msigdb/msigdb/release/2024.1.Hs"  # Liberzon et al. 2015; CC BY 4.0
COLLECTIONS = {
    "reactome": f"{MSIGDB}/c2.cp.reactome.v2024.1.Hs.symbols.gmt",
    "go": f"{MSIGDB}/c5.go.bp.v2024.1.Hs.symbols.gmt",  # biological processes
}


def gene_sets(source: str | Path = "btm") -> dict[str, list[str]]:
    """A collection of gene sets.

    Parameters
    ----------
    source
        ``"btm"``, which is at hand; ``"reactome"`` or ``"go"`` (biological processes), downloaded once from MSigDB;
        or the path or URL of a GMT file (see :func:`scsae_utils.download.local_file`).

    Returns
    -------
    Name of each set to its genes, as the source has them.

    Raises
    ------
    FileNotFoundError, ConnectionError, ValueError
        If the file is not there, cannot be downloaded or has changed, or is no GMT file.
    """
    if source == "btm":
        from BTM.btm2013 import ModuleDict

        return {name: list(dict.fromkeys(genes)) for name, genes in ModuleDict.items()}
    try:
        path = local_file(COLLECTIONS.get(str(source), source))
    except FileNotFoundError as error:
        known = ", ".join(map(repr, ["btm", *COLLECTIONS]))
        raise FileNotFoundError(
            f"no gene sets {str(source)!r}: give {known}, or the path or URL of a GMT file"
        ) from error
    return read_gmt(path)


def read_gmt(path: str | Path) -> dict[str, list[str]]:
    """Read a GMT file: on each line, separated by tabs, the name of a set, its description and its genes.

    Weights after a comma (``TP53,1.0``) are cut off; sets without genes are left out, which is logged. The file may be
    compressed (``.gz``).

    Raises
    ------
    ValueError
        If it is no text in UTF-8, a line has no tab (as in a page of HTML), a name occurs twice, or there is no set.
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path.name} is not a GMT file: it is no text in UTF-8 ({error})") from error
    sets: dict[str, list[str]] = {}
    empty = []
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, *fields = (field.strip() for field in line.split("\t"))
        if not fields or "\0" in line:
            raise ValueError(
                f"{path.name} is not a GMT file: line {i} is not a name, a description and genes, separated by tabs "
                f"({line[:40]!r})"
            )
        if not name or name in sets or name in empty:
            raise ValueError(
                f"{path.name}, line {i}: " + (f"a second set {name!r}" if name else "a set without a name")
            )
        genes = list(dict.fromkeys(re.sub(r",[\d.eE+-]+$", "", gene) for gene in fields[1:] if gene))
        if genes:
            sets[name] = genes
        else:
            empty.append(name)
    if not sets:
        raise ValueError(f"{path.name} holds no gene set")
    if empty:
        log.warning("%s: %d sets have no genes and were left out: %s", path.name, len(empty), some(empty))
    return sets


def on_panel(sets: dict, panel, min_genes: int = 3) -> dict[str, list[str]]:
    """The part of each set that could be found: its genes on the panel, in the panel's own symbols.

    An old symbol finds its gene (``ATP5C1`` is ``ATP5F1C``) where NCBI's list of aliases leads to one gene only.
    Sets that keep fewer than ``min_genes`` cannot be tested and are left out; how many is logged.

    Raises
    ------
    ValueError
        If no set is left.
    """
    panel = check_symbols(panel)
    names = dict(zip(current_symbols(panel), panel)) | dict(zip(panel, panel))
    found = {}
    for name, genes in sets.items():
        there = [names.get(gene) or names.get(now) for gene, now in zip(genes, current_symbols(genes))]
        found[name] = list(dict.fromkeys(gene for gene in there if gene))
    kept = {name: genes for name, genes in found.items() if len(genes) >= min_genes}
    if not kept:
        raise ValueError(
            f"none of the {len(sets)} gene sets has {min_genes} of the {len(panel)} genes of the panel "
            f"({some(panel, 3)}): are both human gene symbols?"
        )
    log.info("%d of %d gene sets have at least %d genes of the panel", len(kept), len(sets), min_genes)
    return kept


def prerank(values: pd.Series, sets: dict, max_genes: int = 500, seed: int = 0) -> pd.DataFrame:
    """Gene set enrichment analysis of genes ranked by a signed value (Subramanian et al. 2005), by gseapy.

    p-values are those of fgsea's multilevel split (Korotkevich et al. 2021), which reaches small ones without as many
    permutations; q-values are Benjamini and Hochberg's. gseapy's default, the false discovery rate of pooled scores
    from 1,000 permutations, is slower and finds more where there is nothing. Both nulls permute genes. They take genes
    for independent, and the genes of a set are not.

    Parameters
    ----------
    values
        Signed value of each gene, by symbol, such as the mean attribution; only genes that have one, since genes that
        could not be attributed would tie at zero in the middle of the list.
    sets
        From :func:`on_panel`. Sets with more than ``max_genes`` genes among the values, or fewer than three, are left
        out.
    Returns
    -------
    One row for each set, smallest p-value first: ``set``, ``nes`` (normalised enrichment score;
    above 0: the set's genes have high values), ``pvalue``, ``qvalue``, ``size`` (genes among the values), ``genes``
    (leading edge, separated by commas).

    Raises
    ------
    ValueError
        If fewer than 15 genes have a value, a value is not finite, or no set has three of them.
    """
    import gseapy  # slow to import

    values = pd.Series(np.asarray(values, float), check_symbols(values.index))
    if len(values) < 15 or not np.isfinite(values).all():
        raise ValueError(f"a ranking needs finite values for at least 15 genes; there are {np.isfinite(values).sum()}")
    values = values.sort_index().sort_values(ascending=False, kind="stable")  # ties in a fixed order
    own = {name: [gene for gene in genes if gene in values.index] for name, genes in sets.items()}
    if not any(3 <= len(genes) <= max_genes for genes in own.values()):
        raise ValueError(f"none of the {len(sets)} gene sets has 3 to {max_genes} of the {len(values)} ranked genes")
    result = gseapy.prerank(
        rnk=values,
        gene_sets=own,
        min_size=3,
        max_size=max_genes,
        method="multilevel",
        outdir=None,
        no_plot=True,
        seed=seed,
        threads=1,
    ).res2d
    table = pd.DataFrame(
        {
            "set": result["Term"].astype(str),
            "nes": result["NES"].astype(float),
            "pvalue": result["NOM p-val"].astype(float),
            "qvalue": result["FDR q-val"].astype(float),
            "size": [len(own[name]) for name in result["Term"]],
            "genes": result["Lead_genes"].str.replace(";", ","),
        }
    )
    return table.sort_values(["pvalue", "set"], ignore_index=True)


def random_prerank(values: pd.Series, sets: dict, n: int = 50, seed: int = 0, progress: bool = True) -> pd.DataFrame:
    """What :func:`prerank` finds where there is nothing: the same values, dealt out to the genes at random.

    Returns
    -------
    One row for each of the ``n`` shuffles: ``n_found`` (sets with q < 0.05) and ``best`` (smallest q-value).
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in tqdm(range(n), desc="random rankings", disable=not progress):
        shuffled = pd.Series(rng.permutation(values.to_numpy()), values.index)
        qvalue = prerank(shuffled, sets, seed=seed + i)["qvalue"]
        rows.append({"n_found": int((qvalue < 0.05).sum()), "best": qvalue.min()})
    return pd.DataFrame(rows)


def high_against_low(adata: AnnData, activation: np.ndarray) -> pd.DataFrame:
    """Schuster's baseline (arXiv:2410.11468): genes that differ between cells of high and of low activation.

    High are the cells that activate the concept at least as much as the median of its active cells; low are those in
    which it is silent, or if fewer than ten are, the other active ones. Such genes go with the concept; nobody has
    asked the model whether it uses them.

    Parameters
    ----------
    activation
        (n_cells,) of one concept.

    Returns
    -------
    :func:`~scsae_utils.expression.differential_expression`, with its defaults but for ``regulation``: a gene is
    ``"up"`` or ``"down"`` with an adjusted p-value below 0.05 and a log2 fold change beyond 1.

    Raises
    ------
    ValueError
        If fewer than three cells are high, or low.
    """
    activation = np.asarray(activation, float).ravel()
    active = activation > 0
    high = active & (activation >= np.median(activation[active])) if active.any() else active
    low = ~active if (~active).sum() >= 10 else active & ~high
    return differential_expression(adata, high, low, min_log2fc=1.0, max_padj=0.05)
