"""Cells in: the data sets that travel in packages, or any h5ad or zarr; checked, harmonised, labelled at three levels.

Every other module expects what :func:`load_cells` returns: ``X`` log1p of counts per 10,000 (CSR), gene symbols as
``var_names``, and in ``obs`` the columns ``cell_type``, ``cell_type_mid``, ``cell_type_high`` (the three levels of the
paper's Table 1) and ``study``.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

log = logging.getLogger(__name__)

LEVELS = {"low": "cell_type", "mid": "cell_type_mid", "high": "cell_type_high"}
UNASSIGNED = "Unassigned"
# Labels and names of a file end up in pages of a book, and must not be markup there.
PLAIN = str.maketrans({"<": "‹", ">": "›", "`": "'"})
DATE = r"(?i)\d{1,2}-(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)|\d{4}-\d\d-\d\d.*"  # SEPT2 in a spreadsheet
TARGET_SUM = 1e4  # counts per cell before the logarithm
TABLE_1 = "Table 1"  # in place of a column of the mid or high level: the paper's own

# Low-level label: (mid, high), in the words of the paper's Table 1 where it has them ("Myeloid" for its "Myeloblast").
HIERARCHY = {
    "CD14+ Monocyte": ("Monocytes", "Myeloid"),
    "FCGR3A+ Monocyte": ("Monocytes", "Myeloid"),
    "Macrophages": ("Macrophages", "Myeloid"),
    "Dendritic": ("Dendritic", "Myeloid"),
    "Migratory dendritic cells": ("Dendritic", "Myeloid"),
    "CD19+ B": ("B_lymphocytes", "B"),
    "Activated B cells": ("B_lymphocytes", "B"),
    "CD4+/CD25 T Reg": ("T_CD4", "T"),
    "CD4+/CD45RA+/CD25- Naive T": ("T_CD4", "T"),
    "CD4+/CD45RO+ Memory": ("T_CD4", "T"),
    "CD8+ Cytotoxic T": ("T_CD8", "T"),
    "CD8+/CD45RA+ Naive Cytotoxic": ("T_CD8", "T"),
    "T cells": ("T_misc", "T"),
    "CD56+ NK": ("NK", "ILC"),
    "NK cells": ("NK", "ILC"),
    "CD34+": ("Progenitor", "Progenitor"),
    UNASSIGNED: (UNASSIGNED, UNASSIGNED),
}

# What the unlabelled celltypist sample is labelled by. T cells are not divided: CD4 and CD8 are hardly detected.
MARKERS = {
    "Macrophages": ["SPARC", "CHI3L1", "APOE", "LIPA", "GPNMB", "APOC1"],
    "CD14+ Monocyte": ["VCAN", "FCN1", "CD14", "THBS1", "S100A8", "S100A9", "S100A12", "CD36"],
    "FCGR3A+ Monocyte": ["FCGR3A", "VMO1", "MS4A7", "LST1", "CD300E"],
    "T cells": ["CD3D", "CD3E", "CD3G", "CD2", "TRBC2", "TRAC", "CD247", "IL32"],
    "NK cells": ["GNLY", "NKG7", "KLRD1", "KLRF1", "PRF1", "GZMB", "CST7"],
    "Activated B cells": ["MS4A1", "CD79A", "CD79B", "MIR155HG", "BANK1", "HLA-DQA1"],
    "Migratory dendritic cells": ["LAMP3", "CCR7", "CD83", "CCL19", "CCL22", "FSCN1", "IDO1"],
}


def label_by_markers(
    adata: AnnData,
    markers: dict[str, list[str]] = MARKERS,
    neighbors: int = 8,
    min_score: float = 0.4,
    max_second: float = 0.85,
    seed: int = 0,
) -> pd.DataFrame:
    """Label cells by marker genes, and leave unlabelled what the markers do not show.

    The rule: a cell's score for a type is the mean log expression of the type's markers over the cell and its nearest
    neighbours (30 principal components of 2,000 variable genes), since single cells miss many of their genes. Each
    type's scores are divided by the ninth highest one, so that types with strong and weak markers compare. The best
    type is the label, if its score is at least ``min_score`` and the second best is at most ``max_second`` of it.

    Parameters
    ----------
    adata
        Cells with log1p values in ``X``.
    markers
        Type to marker symbols; symbols that are not measured are left out.
    neighbors
        Cells that are averaged, the cell itself included.

    Returns
    -------
    Table (n_cells rows): one column of scores for each type, and ``label``.

    Raises
    ------
    ValueError
        If none of a type's markers is measured.
    """
    variable = sc.pp.highly_variable_genes(adata, n_top_genes=min(2000, adata.n_vars), inplace=False)["highly_variable"]
    space = AnnData(adata.X[:, variable.to_numpy()])
    sc.pp.pca(space, n_comps=min(30, space.n_vars - 1, space.n_obs - 1), random_state=seed)
    X = space.obsm["X_pca"]
    near = NearestNeighbors(n_neighbors=neighbors).fit(X).kneighbors_graph(X) / neighbors  # a cell is its own nearest
    scores = {}
    for cell_type, symbols in markers.items():
        found = [symbol for symbol in symbols if symbol in adata.var_names]
        if not found:
            raise ValueError(f"none of the markers of {cell_type!r} is measured: {', '.join(symbols)}")
        score = near @ np.asarray(adata[:, found].X.mean(axis=1)).ravel()
        strong = np.sort(score)[-min(9, len(score))]
        scores[cell_type] = score / strong if strong > 0 else np.zeros(len(score))  # shown by hardly a cell: no type
    table = pd.DataFrame(scores, index=adata.obs_names)
    ranked = np.sort(table.to_numpy(), axis=1)
    sure = (ranked[:, -1] >= min_score) & (ranked[:, -2] <= max_second * ranked[:, -1])
    table["label"] = np.where(sure, table.idxmax(axis=1), UNASSIGNED)
    return table


def normalise(adata: AnnData) -> AnnData:
    """Counts to log1p of counts per 10,000, in place; the counts are kept in ``layers["counts"]``."""
    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=TARGET_SUM)
    sc.pp.log1p(adata)
    return adata


def load_pbmc68k() -> AnnData:
    """``scanpy.datasets.pbmc68k_reduced()``: 700 labelled blood cells of one donor, 765 genes (Zheng et al. 2017).

    Its log values are of counts per 10,000; the counts are recovered exactly from them and each cell's total.
    """
    source = sc.datasets.pbmc68k_reduced()
    adata = AnnData(
        sparse.csr_matrix(source.raw.X, dtype=np.float32), obs=source.obs[["bulk_labels", "n_counts", "percent_mito"]]
    )
    adata.var_names = source.raw.var_names
    counts = sparse.diags(source.obs["n_counts"].to_numpy() / TARGET_SUM) @ adata.X.expm1()
    counts.data = np.rint(counts.data)
    adata.layers["counts"] = sparse.csr_matrix(counts, dtype=np.float32)
    adata.layers["counts"].sort_indices()
    adata.obs["cell_type"] = adata.obs.pop("bulk_labels").astype(str)
    adata.obs["study"] = "pbmc68k"
    return adata


def load_celltypist_sample() -> AnnData:
    """The sample that celltypist ships: 559 cells, 32,786 genes, raw counts; labelled by :func:`label_by_markers`."""
    from celltypist import samples  # slow to import, and only needed here

    table = pd.read_csv(samples.get_sample_csv(), index_col=0)
    adata = normalise(AnnData(sparse.csr_matrix(table.to_numpy(np.float32)), obs=pd.DataFrame(index=table.index)))
    adata.var_names = table.columns
    adata.obs["n_counts"] = adata.layers["counts"].sum(1).A1
    mitochondrial = adata.var_names.str.startswith("MT-")
    adata.obs["percent_mito"] = adata.layers["counts"][:, mitochondrial].sum(1).A1 / adata.obs["n_counts"]
    adata.obs["cell_type"] = label_by_markers(adata)["label"]
    adata.obs["study"] = "celltypist"
    return adata


def load_mini() -> AnnData:
    """Both packaged data sets on their common genes; with two panels the strongest concepts would be the study."""
    parts = [load_pbmc68k(), load_celltypist_sample()]
    adata = ad.concat(parts, join="inner", merge="same")
    adata.obs_names = adata.obs["study"] + ":" + adata.obs_names
    return adata


SOURCES = {"mini": load_mini, "pbmc68k": load_pbmc68k, "celltypist": load_celltypist_sample}
SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "symbol", "gene_short_name", "SYMBOL")


def near_misses(name: str, known, n: int = 3) -> str:
    """For error messages: the known names most like ``name``, without regard to case."""
    known = {str(k).casefold(): str(k) for k in known}
    close = difflib.get_close_matches(str(name).casefold(), known, n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(known[c]) for c in close)}?" if close else ""


def check_values(adata: AnnData) -> str:
    """Tell counts from log values: returns ``"counts"`` or ``"log1p"``.

    Raises
    ------
    ValueError
        If values are NaN, infinite or negative (scaled data), or neither counts nor plausible log values.
    """
    values = adata.X.data if sparse.issparse(adata.X) else np.asarray(adata.X).ravel()
    if not np.isfinite(values).all():
        raise ValueError(
            f"X holds {(~np.isfinite(values)).sum()} NaN or infinite values: remove or repair these cells first"
        )
    if len(values) and values.min() < 0:
        raise ValueError(
            "X holds negative values, so it is scaled or corrected data; scGPT needs counts or log1p values"
        )
    if (values == np.rint(values)).all():
        if values.max(initial=0) > 1e9:
            raise ValueError(f"X holds values up to {values.max():.3g}, which no count reaches: give raw counts")
        return "counts"
    if values.max() > 20:
        raise ValueError(
            "X is neither counts (not whole numbers) nor log1p values "
            f"(its maximum is {values.max():.3g}): give raw counts"
        )
    return "log1p"


def paper_types() -> pd.DataFrame:
    """The paper's Table 1: the 45 cell types of the Cross-tissue Immune Cell Atlas, in 16 mid- and 10 high-level ones.

    Returns
    -------
    By cell type: ``mid``, ``high`` ("Myeloid" for the paper's "Myeloblast") and ``cells``, their number.
    """
    return pd.read_csv(Path(__file__).with_name("data") / "cell_types.tsv", sep="\t", index_col="cell_type")


def levels_of_paper(labels: pd.Series, level: str) -> pd.Series:
    """The ``mid`` or ``high`` level of cell types of :func:`paper_types`; what has no label has none there either.

    Raises
    ------
    ValueError
        If there are labels that the table does not know; names them.
    """
    known = paper_types()[level].to_dict() | {UNASSIGNED: UNASSIGNED}
    other = [name for name in labels.unique() if name not in known]
    if other:
        raise ValueError(
            f"the paper's {TABLE_1} does not know {len(other)} of the cell types ({', '.join(other[:5])}): "
            f"give columns of obs as the mid and high level, or none{near_misses(other[0], known)}"
        )
    return labels.map(known)


def describe(adata: AnnData, path: Path, columns: dict[str, str | None]) -> tuple[pd.DataFrame, pd.Index]:
    """Labels and symbols of a file's cells and genes, checked; its expression is not looked at.

    Parameters
    ----------
    columns
        Our name of a label (``cell_type``, ``cell_type_mid``, ``cell_type_high``, ``study``) to the file's column, or
        None; for the mid and high level also :data:`TABLE_1`.
    """
    of_paper = [name for name in ("cell_type_mid", "cell_type_high") if columns[name] == TABLE_1]
    columns = columns | dict.fromkeys(of_paper)
    for column in filter(None, columns.values()):
        if column not in adata.obs:
            found = ", ".join(map(str, adata.obs.columns)) or "none"
            raise ValueError(f"obs has no column {column!r} (it has: {found}){near_misses(column, adata.obs.columns)}")
    if columns["cell_type"] is None:
        found = ", ".join(map(str, adata.obs.columns)) or "none"
        raise ValueError(f"say which column of obs holds the cell types (label=...); it has: {found}")
    symbols = adata.var_names.astype(str)
    if len(symbols) and symbols.str.match(r"ENS[A-Z]*G\d{6,}").mean() > 0.5:
        column = next((c for c in SYMBOL_COLUMNS if c in adata.var), None)
        if column is None:
            raise ValueError(
                f"genes are Ensembl ids and var has no column of symbols (looked for {', '.join(SYMBOL_COLUMNS)})"
            )
        log.warning("genes are Ensembl ids; symbols taken from var[%r]", column)
        symbols = pd.Index(adata.var[column].astype(object).where(adata.var[column].notna(), symbols).astype(str))
    symbols = symbols.str.strip().str.translate(PLAIN)
    dates = symbols[symbols.str.fullmatch(DATE)]
    if len(dates):
        log.warning(
            "%d genes are named like dates (%s): did a spreadsheet rename them?", len(dates), ", ".join(dates[:3])
        )
    obs = pd.DataFrame({new: plain_labels(adata.obs[old]) for new, old in columns.items() if old})
    for name in of_paper:
        obs[name] = levels_of_paper(obs["cell_type"], name.removeprefix("cell_type_"))
    obs.index = adata.obs_names.astype(str).str.translate(PLAIN)
    if not obs.index.is_unique:
        raise ValueError(f"{obs.index.duplicated().sum()} cell names occur more than once: make obs_names unique")
    return obs.assign(**({} if columns["study"] else {"study": path.stem.translate(PLAIN)})), symbols


def plain_labels(labels: pd.Series) -> pd.Series:
    """Labels as text on one line that is no markup; where there is none, :data:`UNASSIGNED`."""
    codes, names = pd.factorize(labels)
    plain = [" ".join(str(name).translate(PLAIN).split()) or UNASSIGNED for name in names]
    return pd.Series(np.array([*plain, UNASSIGNED], object)[codes], labels.index)  # -1, the last: missing


def as_csr(X, path: Path) -> sparse.csr_matrix:
    """Expression as float32 CSR without stored zeros; refuses a damaged matrix."""
    if X.dtype.kind not in "biuf":
        raise ValueError(f"X of {path} holds values of type {X.dtype}, not numbers")
    if sparse.issparse(X):
        try:  # indices that lead out of the matrix would crash the process, or give other values than the file's
            X.check_format(full_check=True)
        except ValueError as error:
            raise ValueError(f"{path} holds a damaged matrix: {error}") from error
    X = sparse.csr_matrix(X, dtype=np.float32)
    X.sum_duplicates()
    X.eliminate_zeros()
    return X


def first_of_symbol(symbols: pd.Index, totals: np.ndarray) -> np.ndarray:
    """Numbers of the genes that stay: of those with one symbol, the one with the highest total."""
    order = np.argsort(-totals, kind="stable")
    first = np.sort(order[~symbols[order].duplicated()])
    if len(first) < len(symbols):
        log.warning("%d genes share a symbol with a more expressed one and were left out", len(symbols) - len(first))
    return first


def complete(obs: pd.DataFrame) -> None:
    """Let a level that is missing repeat the one below it, and make labels categories; in place."""
    for below, column in zip(list(LEVELS.values()), list(LEVELS.values())[1:]):
        if column not in obs:
            obs[column] = obs[below]
    for column in [*LEVELS.values(), "study"]:
        obs[column] = pd.Categorical(obs[column].astype(str))


def match_genes(symbols: pd.Index, genes) -> tuple[pd.Index, np.ndarray]:
    """The symbols, in the capitals of ``genes`` where only these differ, and the mask of those among ``genes``.

    Raises
    ------
    ValueError
        If fewer than ten are, or if more differ by their capitals: these are another species' genes.
    """
    genes = set(genes)
    spelled = {gene.upper(): gene for gene in genes}
    known = symbols.isin(list(genes))
    other = {symbol: spelled[symbol.upper()] for symbol in symbols[~known] if symbol.upper() in spelled}
    if known.sum() < 10 or len(other) > known.sum():
        raise ValueError(
            f"only {known.sum()} of {len(symbols)} genes are among the genes to keep (first: {', '.join(symbols[:3])})"
            + "".join(
                f"; {len(other)} more would be in other capitals ({a}: {b}): bring genes of mice or rats to their "
                "human orthologues, and human symbols to their usual capitals"
                for a, b in list(other.items())[:1]
            )
        )
    symbols = rename(symbols, other)
    return symbols, symbols.isin(list(genes))


def load_file(path: Path, columns: dict[str, str | None]) -> AnnData:
    """Read and check a file of cells, whole; ``columns``: see :func:`describe`."""
    try:
        adata = ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path)
    except Exception as error:  # h5py, zarr and anndata raise whatever the bytes of others lead to
        raise ValueError(f"{path} is not an .h5ad or .zarr file that anndata can read: {error}") from error
    obs, symbols = describe(adata, path, columns)
    if adata.X is None:
        raise ValueError(f"{path} holds no X: put counts or log1p values there")
    X = as_csr(adata.X, path)
    values = check_values(AnnData(X))
    log.warning("X of %s read as %s", path.name, "counts" if values == "counts" else "log1p values")
    adata = AnnData(X, obs=obs)
    adata.var_names = symbols
    if not symbols.is_unique:
        adata = adata[:, first_of_symbol(symbols, X.sum(0, dtype=np.float64).A1)].copy()
    if values == "counts":
        adata.obs["n_counts"] = X.sum(1).A1
    empty = np.diff(adata.X.indptr) == 0
    if empty.any():
        log.warning("%d empty cells were left out", empty.sum())
        adata = adata[~empty].copy()
    if adata.n_obs == 0:
        raise ValueError(f"{path} holds no cells with any expression")
    return normalise(adata) if values == "counts" else adata


def load_cells(
    cells: str | Path = "mini",
    label: str | None = None,
    label_mid: str | None = None,
    label_high: str | None = None,
    study: str | None = None,
    n_top_genes: int | None = None,
    genes=None,
    aliases: dict[str, str] | None = None,
    out: str | Path | None = None,
) -> AnnData:
    """Load cells, checked and ready for :func:`scsae_utils.embed`.

    Parameters
    ----------
    cells
        ``"mini"`` (both packaged data sets on their common genes), ``"pbmc68k"`` or ``"celltypist"`` (one of them on
        its full panel), or the path of an h5ad or zarr with counts or log1p values and gene symbols or Ensembl ids.
    label, label_mid, label_high
        For a file: columns of ``obs`` with the cell types at the low, mid and high level. A missing level repeats the
        one below it. ``"Table 1"`` for the mid and high one: the paper's grouping (:func:`paper_types`) of the types of
        ``label``.
    study
        For a file: column of ``obs`` with the study (or donor) of each cell. Default: one study, the file's name.
    n_top_genes
        Keep this many highly variable genes, chosen within each study and combined (paper: 2,000).
    genes
        Keep only these symbols (for instance ``model.genes``) before the variable genes are chosen.
    aliases
        Other symbol to the one to use (for instance ``model.aliases``): genes are renamed before ``genes`` are chosen,
        unless the panel has the other symbol too or two genes would get one name.
    out
        For a file: an h5ad that fills block by block with the cells and the chosen genes. The cells come back with
        ``X`` in that file (``backed``) and without layers, and memory hardly grows with their number.

    Returns
    -------
    AnnData with log1p of counts per 10,000 in ``X`` (CSR), ``layers["counts"]`` where the counts are known, and
    ``cell_type``, ``cell_type_mid``, ``cell_type_high``, ``study`` in ``obs``. A large file (:data:`.stream.LARGE`) is
    read in blocks, so that only the chosen genes of all cells are in memory; the result is the same.

    Raises
    ------
    FileNotFoundError, ValueError
        Before any work: no such file, columns missing, values negative, NaN or neither counts nor logarithms, gene
        symbols not to be found, cell names not unique.
    """
    if n_top_genes is not None and not (isinstance(n_top_genes, int) and n_top_genes > 0):
        raise ValueError(f"n_top_genes must be a whole number above zero, or None, not {n_top_genes!r}")
    if cells in SOURCES:
        if label or label_mid or label_high or study or out:
            raise ValueError(f"label and study columns, and out, are for files; {cells!r} has its own")
        adata = SOURCES[cells]()
        low = adata.obs["cell_type"]
        adata.obs["cell_type_mid"] = low.map({k: v[0] for k, v in HIERARCHY.items()})
        adata.obs["cell_type_high"] = low.map({k: v[1] for k, v in HIERARCHY.items()})
    else:
        path = Path(cells)
        if not path.suffix and not path.exists():
            raise FileNotFoundError(
                f"no cells {str(cells)!r}: give one of {', '.join(SOURCES)} or a path{near_misses(cells, SOURCES)}"
            )
        if path.is_dir() and path.suffix != ".zarr":
            raise ValueError(f"{path} is a folder; cells are in an .h5ad file, or in a folder whose name ends in .zarr")
        if not path.exists():
            raise FileNotFoundError(
                f"no file of cells {str(path)!r}; give a path to an .h5ad or .zarr file or one of {', '.join(SOURCES)}"
            )
        columns = {"cell_type": label, "cell_type_mid": label_mid, "cell_type_high": label_high, "study": study}
        from . import stream  # which is made of the steps of this module

        if out is not None or stream.is_large(path):
            return stream.load_blocks(path, columns, n_top_genes, genes, aliases, out)
        adata = load_file(path, columns)
    complete(adata.obs)
    if aliases:
        adata.var_names = rename(adata.var_names, aliases)
    if genes is not None:
        adata.var_names, known = match_genes(adata.var_names, genes)
        adata = adata[:, known].copy()
    if n_top_genes is not None and n_top_genes < adata.n_vars:
        sizes = adata.obs["study"].value_counts()
        several = adata  # one cell has no variance: studies of one have no part in the choice
        if (sizes < 2).any():
            several = adata[adata.obs["study"].isin(sizes.index[sizes > 1])].copy()
        batch = "study" if (sizes > 1).sum() > 1 else None
        try:
            sc.pp.highly_variable_genes(several, n_top_genes=n_top_genes, batch_key=batch)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"no {n_top_genes} variable genes can be chosen: a study has too few cells that differ; "
                "give n_top_genes=None, or another study column"
            ) from error
        adata.var, adata.uns["hvg"] = several.var, several.uns["hvg"]
        adata = adata[:, adata.var["highly_variable"]].copy()
        empty = np.diff(adata.X.indptr) == 0
        if empty.any():
            log.warning("%d cells express none of the variable genes and were left out", empty.sum())
            adata = adata[~empty].copy()
    return adata


def rename(symbols: pd.Index, aliases: dict[str, str]) -> pd.Index:
    """Symbols by the names that ``aliases`` lead to; one that would then occur twice keeps its own."""
    new = pd.Index([aliases.get(symbol, symbol) for symbol in symbols])
    clash = new.isin(symbols) | new.duplicated(keep=False)
    out = pd.Index(np.where(clash, symbols, new))
    if (out != symbols).any():
        log.warning("%d genes renamed to the symbols that the model knows", (out != symbols).sum())
    return out


def split_cells(adata: AnnData, share: float = 0.2, seed: int = 0, by: str | None = None) -> AnnData:
    """Hold out a share of the cells for validation, once; kept in ``obs["split"]``.

    Parameters
    ----------
    by
        Column of ``obs``, such as ``"study"``: its values are held out as a whole, at random, until they make up
        ``share`` of the cells (at least one of them, and not all). None: single cells, the same share of every type
        and study.

    Returns
    -------
    ``adata`` with ``obs["split"]``: ``"train"`` or ``"validation"``, and ``uns["split"]``: what was held out.

    Raises
    ------
    ValueError
        A share outside 0 to 1; no such column; a column with one value only.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of held-out cells must lie between 0 and 1, not {share}")
    rng = np.random.default_rng(seed)
    held_out = np.zeros(adata.n_obs, bool)
    if by is None:
        for rows in adata.obs.reset_index(drop=True).groupby(["study", "cell_type"], observed=True).groups.values():
            rows = rng.permutation(np.asarray(rows))
            held_out[rows[: int(len(rows) * share + rng.random())]] = True  # rounded at random: the total is right
    elif by not in adata.obs:
        raise ValueError(f"split_by: obs has no column {by!r}{near_misses(by, adata.obs.columns)}")
    else:
        groups = adata.obs[by].astype(str)
        names = rng.permutation(np.unique(groups))
        if len(names) < 2:
            raise ValueError(f"split_by: all cells have the same {by}; split by cell instead (split_by: null)")
        for name in names[:-1]:
            held_out |= (groups == name).to_numpy()
            if held_out.mean() >= share:
                break
    adata.obs["split"] = pd.Categorical(np.where(held_out, "validation", "train"), categories=["train", "validation"])
    adata.uns["split"] = {"by": by or "cell", "share": float(held_out.mean()), "seed": seed}
    return adata


def type_table(adata: AnnData) -> pd.DataFrame:
    """The paper's Table 1: low-, mid- and high-level type with the number of cells of each study and in all."""
    levels = list(LEVELS.values())
    table = adata.obs.groupby([*levels, "study"], observed=True).size().unstack("study", fill_value=0)
    table["cells"] = table.sum(axis=1)
    table.columns.name = None
    return table.reset_index().sort_values(levels[::-1], ignore_index=True)
