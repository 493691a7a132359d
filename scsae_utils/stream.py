"""Cells of a file that is too large for memory: read, checked and brought to a panel of genes a block at a time.

Three passes over the file: the first checks the values, the second takes each gene's mean and variance in each study,
the third keeps the chosen genes. The result is what the same cells give in memory, to the last bit.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from numba import njit
from scipy import sparse
from tqdm.auto import tqdm

from .cells import (
    as_csr,
    check_values,
    complete,
    describe,
    first_of_symbol,
    match_genes,
    normalise,
    rename,
)

log = logging.getLogger(__name__)

BLOCK = 4096  # cells that are in memory with all their genes
LARGE = 200_000_000  # stored values of a file from which on it is read in blocks (as CSR in memory: 1.6 GB)


def is_large(path: Path) -> bool:
    """Does the matrix ``X`` of a file hold so much that it is to be read in blocks, and can it be?"""
    try:
        with opened(path) as file:
            X = file["X"]
            by_gene = X.attrs.get("encoding-type") == "csc_matrix"
            large = (X if hasattr(X, "size") else X["data"]).size >= LARGE
    except Exception:
        return False  # the reader of small files says what is wrong
    if large and by_gene:
        log.warning("%s keeps its expression by gene (CSC), so it is read whole; CSR is read in blocks", path.name)
    return large and not by_gene


def opened(path: Path) -> AbstractContextManager:
    """The file of an h5ad, or the group of a zarr, for a ``with``."""
    try:
        return nullcontext(zarr.open_group(path, mode="r")) if path.is_dir() else h5py.File(path)
    except Exception as error:  # h5py and zarr raise whatever the bytes of others lead to
        raise ValueError(f"{path} is not an .h5ad or .zarr file that anndata can read: {error}") from error


class Blocks:
    """The cells of an open file, a block at a time.

    ``table`` is without expression; layers and the rest are not read.
    """

    def __init__(self, path: Path, file):
        self.path = path
        try:
            X = file["X"]
            self.X = X if hasattr(X, "size") else ad.io.sparse_dataset(X)
            self.table = AnnData(obs=ad.io.read_elem(file["obs"]), var=ad.io.read_elem(file["var"]))
        except Exception as error:  # as in opened
            raise ValueError(f"{path} is not an .h5ad or .zarr file with X that anndata can read: {error}") from error
        if getattr(self.X, "format", "csr") != "csr":
            raise ValueError(f"{path} keeps its expression by gene (CSC): write it as CSR to read it by cells")
        if self.X.shape != self.table.shape:
            raise ValueError(f"{path} is damaged: X is {self.X.shape}, obs and var are {self.table.shape}")

    def read(self, what: str) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        """Rows and expression of every block."""
        n = self.X.shape[0]
        with tqdm(total=n, desc=what, unit="cell") as bar:
            for start in range(0, n, BLOCK):
                rows = slice(start, min(start + BLOCK, n))
                try:
                    X = self.X[rows]
                except Exception as error:
                    raise ValueError(f"{self.path} is damaged: cells {start} to {rows.stop}: {error}") from error
                yield rows, as_csr(X, self.path)
                gc.collect()  # an AnnData refers to itself: those of earlier blocks would wait in memory
                bar.update(rows.stop - start)

    def survey(self) -> tuple[str, np.ndarray, np.ndarray]:
        """``"counts"`` or ``"log1p"``, and the sums of each cell and of each gene; refuses what cannot be."""
        kinds, largest, of_cell = set(), 0.0, np.zeros(self.X.shape[0], np.float32)
        of_gene = np.zeros(self.X.shape[1])
        for rows, X in self.read("checking values"):
            kinds.add(check_values(AnnData(X)))
            largest = max(largest, X.data.max(initial=0))
            of_cell[rows] = X.sum(1).A1
            of_gene += X.sum(0, dtype=np.float64).A1
        if "log1p" in kinds:  # in some blocks only: the largest value of all must be one of a logarithm
            check_values(AnnData(np.array([[0.5, largest]])))
        if not of_cell.any():
            raise ValueError(f"{self.path} holds no cells with any expression")
        return "log1p" if "log1p" in kinds else "counts", of_cell, of_gene


@njit(cache=True)
def add_moments(data, indices, indptr, groups, sums, squares):
    """Add each gene's values and their squares to the sums of the cell's group, cell by cell.

    In this order, and with squares in the precision of the values, the sums are those that scanpy takes of all cells.
    """
    for row in range(len(indptr) - 1):
        for j in range(indptr[row], indptr[row + 1]):
            sums[groups[row], indices[j]] += data[j]
            squares[groups[row], indices[j]] += data[j] * data[j]


class Moments:
    """Sums (groups, genes) of values and of their squares, and the number of cells of each group."""

    def __init__(self, n_groups: int, n_genes: int):
        self.sums, self.squares = np.zeros((2, n_groups, n_genes))
        self.n_cells = np.zeros(n_groups, int)

    def add(self, X: sparse.csr_matrix, groups: np.ndarray) -> None:
        """Cells with log1p values and the number of each cell's group."""
        add_moments(np.expm1(X.data), X.indices, X.indptr, groups, self.sums, self.squares)
        self.n_cells += np.bincount(groups, minlength=len(self.n_cells))


def variable_genes(moments: Moments, symbols: pd.Index, n_top: int) -> pd.DataFrame:
    """``scanpy.pp.highly_variable_genes(n_top_genes=n_top, batch_key=...)`` (flavour "seurat"), from moments.

    Groups are scanpy's batches; a single group is the same as no ``batch_key``.

    Returns
    -------
    One row for each gene: ``highly_variable``, ``means``, ``dispersions``, ``dispersions_norm``; of several groups
    the means over them, and ``highly_variable_nbatches``.
    """
    there = np.flatnonzero(moments.n_cells > 1)  # one cell has no variance
    try:
        tables = [one_group(moments, g, symbols, n_top, of_several=len(there) > 1) for g in there]
        table = pd.concat(tables)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"no {n_top} variable genes can be chosen: a study has too few cells that differ; "
            "give n_top_genes=None, or another study column"
        ) from error
    if len(tables) == 1:
        return tables[0]
    how = dict.fromkeys(("means", "dispersions", "dispersions_norm"), "mean") | {"highly_variable": "sum"}
    table = table.astype({"highly_variable": int}).groupby(level=0).agg(how)
    table["highly_variable_nbatches"] = table["highly_variable"]
    table = table.sort_values(["highly_variable_nbatches", "dispersions_norm"], ascending=False, na_position="last")
    table["highly_variable"] = np.arange(len(table)) < n_top
    return table.loc[symbols]


def one_group(moments: Moments, group: int, symbols: pd.Index, n_top: int, of_several: bool) -> pd.DataFrame:
    """The genes of one group of cells; of several groups, genes that it does not express are zero in all columns."""
    n = moments.n_cells[group]
    mean = moments.sums[group] / n
    variance = moments.squares[group] / n - mean**2
    variance *= n / (n - 1)  # unbiased
    expressed = moments.sums[group] > 0 if of_several else np.ones(len(mean), bool)
    mean, variance = mean[expressed], variance[expressed]
    mean[mean == 0] = 1e-12
    dispersion = variance / mean
    dispersion[dispersion == 0] = np.nan
    table = pd.DataFrame({"means": np.log1p(mean), "dispersions": np.log(dispersion)}, index=symbols[expressed])
    bins = pd.cut(table["means"], bins=20)
    of_bin = table.groupby(bins, observed=True)["dispersions"].agg(["mean", "std"])
    single = of_bin["std"].isna()  # one gene in the bin: its normalised dispersion is 1
    of_bin.loc[single, "std"], of_bin.loc[single, "mean"] = of_bin.loc[single, "mean"], 0
    of_gene = of_bin.loc[bins].set_index(table.index)
    table["dispersions_norm"] = (table["dispersions"] - of_gene["mean"]) / of_gene["std"]
    ranked = np.sort(table["dispersions_norm"].dropna())[::-1]
    table["highly_variable"] = table["dispersions_norm"].fillna(-np.inf) >= ranked[min(n_top, len(ranked)) - 1]
    if not of_several:
        return table
    return table.reindex(symbols, fill_value=0).astype({"highly_variable": bool})


class Panel:
    """The chosen genes of all cells: put together in memory, or in a file that appears when it is whole."""

    def __init__(self, out: str | Path | None):
        self.out, self.blocks, self.obs = None if out is None else Path(out), [], []
        self.file = None

    def __enter__(self) -> Panel:
        return self

    def __exit__(self, *error) -> None:
        if self.file:  # open still: something went wrong
            self.file.close()
            self.part.unlink()

    def add(self, block: AnnData, obs: pd.DataFrame) -> None:
        self.obs.append(obs)
        if self.out is None:
            self.blocks.append(block)
        elif len(self.obs) == 1:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.part = self.out.with_name(self.out.name + ".part")
            self.file = h5py.File(self.part, "w")
            for X in (block.X, *block.layers.values()):
                X.indptr = X.indptr.astype(np.int64)  # more values will come than 32 bits can count
            ad.io.write_elem(self.file, "/", block, dataset_kwargs={"compression": "gzip", "compression_opts": 1})
            self.file.pop("raw", None)  # of nothing; it would keep the file from being opened as backed
        else:
            for name, X in {"X": block.X, **{f"layers/{k}": v for k, v in block.layers.items()}}.items():
                ad.io.sparse_dataset(self.file[name]).append(X)

    def close(self, var: pd.DataFrame, uns: dict) -> AnnData:
        obs = pd.concat(self.obs)
        complete(obs)  # of the cells that are left
        if self.out is None:
            layers = {k: sparse.vstack([b.layers[k] for b in self.blocks], "csr") for k in self.blocks[0].layers}
            return AnnData(sparse.vstack([b.X for b in self.blocks], "csr"), obs, var, uns, layers=layers)
        for name, each in {"obs": obs, "var": var, "uns": uns}.items():
            ad.io.write_elem(self.file, name, each)
        self.file.close()
        self.part.replace(self.out)
        return open_panel(self.out)


def open_panel(path: str | Path) -> AnnData:
    """Cells of a file that :func:`~scsae_utils.load_cells` filled (``out``): ``X`` stays there, layers are not read."""
    with h5py.File(path) as file:
        tables = {name: ad.io.read_elem(file[name]) for name in ("obs", "var", "uns")}
    return AnnData(**tables, filename=path, filemode="r")


def load_blocks(
    path: Path,
    columns: dict[str, str | None],
    n_top_genes: int | None = None,
    genes=None,
    aliases: dict[str, str] | None = None,
    out: str | Path | None = None,
) -> AnnData:
    """What :func:`scsae_utils.load_cells` returns for a file; ``columns``: see :func:`~scsae_utils.cells.describe`."""
    if out is not None and Path(out).resolve() == path.resolve():
        raise ValueError(f"out is the file that is read: {path}")
    with opened(path) as file, Panel(out) as panel:
        return fill(panel, Blocks(path, file), columns, n_top_genes, genes, aliases)


def fill(panel: Panel, source: Blocks, columns, n_top_genes, genes, aliases) -> AnnData:
    """The work of :func:`load_blocks`, on open files."""
    obs, symbols = describe(source.table, source.path, columns)
    if genes is not None:  # another species' are refused before the first pass
        match_genes(rename(symbols.unique(), aliases or {}), genes)
    kind, n_counts, totals = source.survey()
    log.warning("X of %s read as %s", source.path.name, "counts" if kind == "counts" else "log1p values")
    if kind == "counts":
        obs["n_counts"] = n_counts
    complete(obs)
    unique = first_of_symbol(symbols, totals)
    names = rename(symbols[unique], aliases or {})
    names, known = (names, np.ones(len(names), bool)) if genes is None else match_genes(names, genes)
    var = pd.DataFrame(index=names[known])

    def ready(what: str) -> Iterator[tuple[np.ndarray, AnnData]]:
        """Numbers of the cells that are not empty, and these cells with log values of the known genes."""
        for rows, X in source.read(what):
            X = X[:, unique] if len(unique) < X.shape[1] else X
            some = np.flatnonzero(np.diff(X.indptr))
            if len(some) == 0:
                continue
            block = AnnData(X[some])
            block = (normalise(block) if kind == "counts" else block)[:, known].copy()
            block.var_names = var.index
            yield rows.start + some, block

    uns, chosen = {}, np.ones(len(var), bool)
    if n_top_genes is not None and n_top_genes < len(var):
        studies = obs["study"].cat.codes.to_numpy(int)
        moments = Moments(studies.max() + 1, len(var))
        for rows, block in ready("choosing genes"):
            moments.add(block.X, studies[rows])
        var = var.join(variable_genes(moments, var.index, n_top_genes))
        chosen, uns = var["highly_variable"].to_numpy(), {"hvg": {"flavor": "seurat"}}
    n_cells = 0
    for rows, block in ready("reading cells"):
        block = block[:, chosen].copy()
        some = np.flatnonzero(np.diff(block.X.indptr)) if uns else np.arange(len(rows))
        n_cells += len(rows)
        if len(some):
            panel.add(block[some].copy(), obs.iloc[rows[some]])
    if n_cells < len(obs):
        log.warning("%d empty cells were left out", len(obs) - n_cells)
    adata = panel.close(var[chosen], dict(block.uns) | uns)
    if adata.n_obs < n_cells:
        log.warning("%d cells express none of the variable genes and were left out", n_cells - adata.n_obs)
    return adata
