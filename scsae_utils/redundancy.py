"""Genes that hide each other: several genes changed at once, interactions, and what a gene is to a concept.

Occluding one gene at a time misses what genes do together. With ``L(A)`` the share of a concept's activation that is
lost when the genes A are changed together, the interaction of two genes, or of all genes of a module, is

``I(A) = L(A) - sum of L(a) over the genes a in A``

Above zero, the genes stand in for each other: each one's loss is made good by the others (redundant). Below zero, they
work only together: each one's loss is already nearly that of all (synergistic). Ours; the paper occludes single genes.
"""

from __future__ import annotations

import hashlib
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scipy.stats import false_discovery_control, ttest_1samp
from tqdm.auto import tqdm

from .attribution import check_embedded
from .cells import near_misses
from .embedding import cell_tokens, embed_tokens, token_ids
from .encoder import CellEncoder
from .sae import Dictionary

MODULES = {  # gene families whose members are expressed together, as regular expressions of their symbols
    "ribosomal": r"RP[LS](A|P?\d+(A|X|L|AL|Y\d)?)",
    "mitochondrial": r"MT-.+",
    "MHC class II": r"HLA-D[MOPQR][AB]\d*|CD74",
    "immunoglobulin": r"IG[HKL][VDJ]\d.*|IGKC|IGLC\d|IGHG\d|IGHA\d|IGH[MDE]|IGLL\d|JCHAIN",
    "alarmins": r"S100A(8|9|12)",
}
TAGS = ("necessary", "redundant", "synergistic")


class Change(NamedTuple):
    """Genes of one cell that are changed together, and the concept that is looked at.

    ``columns`` are those of the genes, ``values`` the bins that they get; 0 removes the token. Genes that the cell
    does not express stay so.
    """

    concept: int
    row: int
    columns: np.ndarray
    values: np.ndarray | float = 0.0


def occlude_sets(
    bins: sparse.csr_matrix, ids: np.ndarray, model: CellEncoder, changes: list[Change], progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of cells with several genes changed at once; equal inputs are computed once.

    Parameters
    ----------
    bins, ids
        (n_cells, n_genes) and (n_genes,): see :func:`~scsae_utils.embedding.cell_tokens`.

    Returns
    -------
    (n, d) the embeddings of different inputs, and (n_changes,) which of them is that of each change.
    """
    rows = {row: i for i, row in enumerate(dict.fromkeys(change.row for change in changes))}
    cells = cell_tokens(bins[list(rows)], ids, model)
    # By token: its new value, or -1. The last place is for genes that the model does not know: their id is -1.
    new = np.full(max(ids.max(), model.cls[0]) + 2, -1.0, np.float32)
    place: dict[bytes, int] = {}
    out, where = np.empty((len(changes), model.dim), np.float32), np.empty(len(changes), int)
    with tqdm(total=len(changes), desc="occluding sets", unit="set", disable=not progress) as bar:
        for start in range(0, len(changes), 4096):
            todo = []
            for i, change in enumerate(changes[start : start + 4096], start):
                tokens = ids[change.columns]
                new[tokens] = change.values
                cell_ids, values = cells[rows[change.row]]
                changed = new[cell_ids]
                values = np.where(changed >= 0, changed, values)
                stays = changed != 0
                new[tokens] = -1
                cell = cell_ids[stays], values[stays]
                key = hashlib.blake2b(cell[0].tobytes() + cell[1].tobytes(), digest_size=16).digest()
                if key not in place:
                    place[key] = len(place)
                    todo.append(cell)
                where[i] = place[key]
            out[len(place) - len(todo) : len(place)] = embed_tokens(todo, model)
            bar.update(min(4096, len(changes) - start))
    return out[: len(place)], where


def activations_after(
    adata: AnnData,
    model: CellEncoder,
    sae: Dictionary,
    changes: list[Change],
    bins: sparse.csr_matrix | None = None,
    progress: bool = True,
) -> np.ndarray:
    """(n_changes,) activation of each change's concept after it; ``bins`` other than ``layers["bins"]`` if given."""
    check_embedded(adata, model)
    bins = adata.layers["bins"].tocsr() if bins is None else bins
    embeddings, where = occlude_sets(bins, token_ids(adata.var_names, model), model, changes, progress)
    concepts = torch.tensor([change.concept for change in changes], dtype=torch.long)
    out = np.empty(len(changes), np.float32)
    with torch.inference_mode():
        for i in range(0, len(changes), 4096):
            u = sae.encode(torch.from_numpy(embeddings[where[i : i + 4096]])).cpu()
            out[i : i + 4096] = u.gather(1, concepts[i : i + 4096, None])[:, 0].numpy()
    return out


def gene_columns(adata: AnnData, genes) -> np.ndarray:
    """Columns of ``genes`` in ``adata``; ValueError for a gene that is not there, with the near misses."""
    columns = adata.var_names.get_indexer(genes)
    if (columns < 0).any():
        gene = list(genes)[int((columns < 0).argmax())]
        raise ValueError(f"{gene!r} is not among the genes of these cells{near_misses(gene, adata.var_names)}")
    return columns


def set_losses(
    adata: AnnData,
    model: CellEncoder,
    sae: Dictionary,
    cells: dict[int, np.ndarray],
    sets: dict[int, dict],
    means: dict[int, np.ndarray] | None = None,
    absent_below: float = 1.0,
    bins: sparse.csr_matrix | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What concepts lose when sets of genes are changed together.

    Parameters
    ----------
    cells
        Concept to rows of ``adata``, usually its prototypes.
    sets
        Concept to named sets of genes.
    means
        Concept to (n_genes,) mean bins of its counterfactuals: genes get these, and those below ``absent_below``
        lose their token, as in :func:`~scsae_utils.attribution.attribute`. None: all lose it.
    bins
        Bins of the cells, (n_cells, n_genes), if others than ``layers["bins"]``: see
        :func:`~scsae_utils.significance.replicate_bins`.

    Returns
    -------
    Table: ``concept``, ``cell`` (name), ``set``, ``activation`` (before), ``occluded``, ``loss``: the share of the
    activation that is lost. Of replicates, ``loss`` is relative to the activation in the cell as it is, so that a
    concept that is faint in one replicate gives no huge shares.

    Raises
    ------
    ValueError
        If a gene is not there (names the near misses), or a concept is silent in one of its cells.
    """
    U = sae.activations(adata.obsm["X_scGPT"]).tocsc()
    changes, labels, whole = [], [], []
    for concept, rows in cells.items():
        before = U[:, concept].toarray().ravel()[rows]
        if (before == 0).any():
            silent = adata.obs_names[np.asarray(rows)[before == 0][0]]
            raise ValueError(f"concept {concept} is silent in {silent}: choose cells that activate it")
        columns = {name: gene_columns(adata, genes) for name, genes in sets[concept].items()}
        for row, activation in zip(rows, before):
            changes.append(Change(concept, row, np.array([], int)))
            labels.append((concept, adata.obs_names[row], None))
            whole.append(activation)
            for name, at in columns.items():
                new = 0.0
                if means is not None:
                    new = np.where(means[concept][at] < absent_below, 0, means[concept][at])
                changes.append(Change(concept, row, at, new))
                labels.append((concept, adata.obs_names[row], name))
                whole.append(activation)
    table = pd.DataFrame(labels, columns=["concept", "cell", "set"])
    table["occluded"] = activations_after(adata, model, sae, changes, bins, progress)
    unchanged = table["set"].isna()
    table["activation"] = table["occluded"].where(unchanged).ffill()  # the unchanged cell is its first row
    table["loss"] = (table["activation"] - table["occluded"]) / whole
    return table.loc[~unchanged, ["concept", "cell", "set", "activation", "occluded", "loss"]].reset_index(drop=True)


def module_genes(genes) -> dict[str, list[str]]:
    """The genes of each of :data:`MODULES`; modules with fewer than two of them are left out."""
    genes = pd.Index(genes)
    found = {name: list(genes[genes.str.fullmatch(pattern)]) for name, pattern in MODULES.items()}
    return {name: members for name, members in found.items() if len(members) > 1}


def pair_sets(genes: list[str]) -> dict[tuple[str, ...], list[str]]:
    """Every gene on its own and every pair, named by their genes: what :func:`interactions` needs."""
    return {names: list(names) for size in (1, 2) for names in combinations(genes, size)}


def interactions(losses: pd.DataFrame, min_interaction: float = 0.01, max_q: float = 0.05) -> pd.DataFrame:
    """Interaction of sets of genes, against its spread over the cells.

    Parameters
    ----------
    losses
        From :func:`set_losses`, sets being tuples of genes, and of each its genes on their own.
    min_interaction
        An interaction smaller than this share of the activation is none, however sure.
    max_q
        For the false discovery rate over the sets of a concept (t test over cells, Benjamini-Hochberg).

    Returns
    -------
    One row for each concept and set of two genes or more: ``loss`` (together), ``sum`` (of single losses),
    ``interaction`` (mean over cells), ``error`` (standard error), ``q_value``, ``kind``: ``"redundant"``,
    ``"synergistic"`` or empty.
    """
    rows = []
    for concept, part in losses.groupby("concept", sort=False):
        loss = part.pivot_table(index="cell", columns=part["set"].map("|".join), values="loss", aggfunc="mean")
        for names in dict.fromkeys(names for names in part["set"] if len(names) > 1):
            single = loss.reindex(columns=list(names)).sum(axis=1)  # a gene that a cell lacks costs it nothing
            each = (loss["|".join(names)] - single).dropna()
            # differences of rounding are no evidence: their spread is as small as they are
            each = each.where(each.abs() > 1e-5, 0)
            error = each.std() / np.sqrt(len(each))
            p = ttest_1samp(each, 0).pvalue if error > 0 else float(len(each) < 2 or each.mean() == 0)
            rows.append((concept, names, loss["|".join(names)].mean(), single.mean(), each.mean(), error, p))
    columns = ["concept", "set", "loss", "sum", "interaction", "error", "p_value"]
    table = pd.DataFrame(rows, columns=columns)
    table["q_value"] = table.groupby("concept")["p_value"].transform(false_discovery_control)
    sure = (table["q_value"] < max_q) & (table["interaction"].abs() >= min_interaction)
    table["kind"] = np.select([sure & (table["interaction"] > 0), sure], ["redundant", "synergistic"], "")
    return table.drop(columns="p_value")


def driver_interactions(
    adata: AnnData,
    model: CellEncoder,
    sae: Dictionary,
    cells: dict[int, np.ndarray],
    genes: dict[int, list[str]],
    means: dict[int, np.ndarray],
    min_loss: float = 0.01,
    max_q: float = 0.05,
    progress: bool = True,
) -> pd.DataFrame:
    """Interactions of all pairs of each concept's ``genes``, and of the modules that it needs.

    Parameters
    ----------
    cells, means
        See :func:`set_losses`.
    min_loss
        Modules that cost a concept less than this share of its activation are left out, since their genes would have
        to be occluded one by one; also the ``min_interaction`` of :func:`interactions`.

    Returns
    -------
    See :func:`interactions`, with ``name``: of modules the name and the number of genes, else missing.
    """
    names = {tuple(members): f"{name} ({len(members)})" for name, members in module_genes(adata.var_names).items()}
    sets = {c: pair_sets(genes.get(c, [])) | {members: list(members) for members in names} for c in cells}
    losses = set_losses(adata, model, sae, cells, sets, means, progress=progress)
    means_of_sets = losses.groupby(["concept", "set"])["loss"].mean()
    keep = means_of_sets[means_of_sets.abs() >= min_loss].index
    needed = {c: [members for members in names if (c, members) in keep] for c in cells}
    single = {c: {(g,): [g] for members in needed[c] for g in members if (g,) not in sets[c]} for c in cells}
    more = set_losses(adata, model, sae, cells, single, means, progress=progress)
    left_out = losses["set"].isin(names) & ~pd.MultiIndex.from_frame(losses[["concept", "set"]]).isin(keep)
    table = interactions(pd.concat([losses[~left_out], more]), min_loss, max_q)
    return table.assign(name=[names.get(members, np.nan) for members in table["set"]])


def tag_genes(found: pd.DataFrame, significant: set[tuple[int, str]]) -> pd.Series:
    """What each gene of :func:`interactions` is to its concept.

    ``"redundant"`` or ``"synergistic"`` if it has an interaction of that kind, of two kinds the larger; else
    ``"necessary"`` if (concept, gene) is ``significant`` on its own: nothing that was tried makes good its loss; else
    empty.

    Returns
    -------
    Series indexed by concept and gene.
    """
    long = found.explode("set").rename(columns={"set": "gene"})
    long["size"] = long["interaction"].abs().where(long["kind"] != "", -1.0)
    first = long.sort_values("size", ascending=False, kind="stable").groupby(["concept", "gene"])["kind"].first()
    alone = np.array([key in significant for key in first.index], bool)
    return first.mask((first == "") & alone, "necessary").rename("tag")
