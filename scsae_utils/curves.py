"""What genes do together: curves of deletion, groups of genes, and other ways of occlusion (paper Sec. 3.1, A.7)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from .attribution import AttributionConfig, attribute, check_embedded
from .cells import near_misses
from .embedding import cell_tokens, embed_tokens, token_ids
from .encoder import CellEncoder
from .sae import SAE


def deletion_curves(
    adata: AnnData,
    model: CellEncoder,
    sae: SAE,
    concept: int,
    cells,
    orders: dict[str, list[str]],
    n_steps: int = 20,
    progress: bool = True,
) -> pd.DataFrame:
    """Activation of a concept while genes are removed from the input, one after the other (paper Fig. 2f).

    Parameters
    ----------
    cells
        Rows of ``adata``, usually the prototypes.
    orders
        Name of a curve to the genes in the order of their removal.
    n_steps
        Points of a curve, besides the start.

    Returns
    -------
    Table: ``order``, ``n_removed``, ``cell``, ``activation`` relative to the whole cell (1 at the start). A cell
    keeps at least ``<cls>``.

    Raises
    ------
    ValueError
        If a gene is not there (names the near misses), or the concept is silent in one of the cells.
    """
    check_embedded(adata, model)
    ids, bins = token_ids(adata.var_names, model), adata.layers["bins"].tocsr()
    tokens = cell_tokens(bins[cells], ids, model)
    rows, inputs = [], []
    for order, genes in orders.items():
        unknown = [g for g in genes if g not in adata.var_names]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is not among the genes of these cells{near_misses(unknown[0], adata.var_names)}"
            )
        removed = ids[adata.var_names.get_indexer(genes)]
        for n in np.unique(np.linspace(0, len(genes), min(n_steps, len(genes)) + 1).round().astype(int)):
            for cell, (cell_ids, values) in zip(adata.obs_names[cells], tokens):
                stays = ~np.isin(cell_ids, removed[:n])
                rows.append((order, n, cell))
                inputs.append((cell_ids[stays], values[stays]))
    with torch.inference_mode():
        embeddings = torch.from_numpy(embed_tokens(inputs, model, progress=progress))
        table = pd.DataFrame(rows, columns=["order", "n_removed", "cell"])
        table["activation"] = torch.cat([sae.encode(e)[:, concept] for e in embeddings.split(8192)]).numpy()
    start = table[table["n_removed"] == 0].groupby(["order", "cell"])["activation"].first()
    if (start == 0).any():
        raise ValueError(
            f"concept {concept} is silent in {start.index[start == 0][0][1]}: choose cells that activate it"
        )
    table["activation"] /= start.loc[list(zip(table["order"], table["cell"]))].to_numpy()
    return table


def loss_without(adata: AnnData, model: CellEncoder, sae: SAE, concept: int, cells, genes: list[str]) -> float:
    """Mean share of a concept's activation that the ``cells`` (rows) lose when ``genes`` are removed together."""
    curve = deletion_curves(adata, model, sae, concept, cells, {"together": genes}, n_steps=1, progress=False)
    return float(1 - curve.loc[curve["n_removed"] > 0, "activation"].mean())


def concepts_of_gene(adata: AnnData, model: CellEncoder, sae: SAE, gene: str, progress: bool = True) -> pd.Series:
    """How much of each concept's activation rests on one gene: its token is removed from every cell that has it.

    Returns
    -------
    (c,) share of the concept's summed activation that is lost, over all cells; 0 for silent concepts.

    Raises
    ------
    ValueError
        If the gene is not in the panel, not known to the model or in no cell; names the near misses.
    """
    check_embedded(adata, model)
    ids = token_ids(adata.var_names, model)
    known = adata.var_names[ids >= 0]
    if gene not in known:
        raise ValueError(
            f"gene {gene!r} is not among the {len(known)} genes of these cells that the model knows"
            f"{near_misses(gene, known)}"
        )
    bins = adata.layers["bins"].tocsr()
    column = adata.var_names.get_loc(gene)
    cells = np.flatnonzero(bins[:, column].toarray().ravel())
    if len(cells) == 0:
        raise ValueError(f"no cell expresses {gene!r}")
    without = bins[cells].tolil()
    without[:, column] = 0
    after = embed_tokens(cell_tokens(without.tocsr(), ids, model), model, progress=progress)
    before = sae.activations(adata.obsm["X_scGPT"])
    lost = before[cells].sum(0).A1 - sae.activations(after).sum(0).A1
    total = before.sum(0).A1
    names = [f"concept_{j}" for j in range(len(total))]
    return pd.Series(np.divide(lost, total, out=np.zeros_like(lost), where=total > 0), index=names, name=gene)


def compare_occlusions(
    adata: AnnData, model: CellEncoder, sae: SAE, concept: int, config: AttributionConfig, n_prototypes: int = 5
) -> pd.DataFrame:
    """Do other ways of occlusion give the same genes? Each option of ``config`` is changed, one at a time.

    Returns
    -------
    One row for each way: ``correlation`` with the attributions of ``config`` over the genes of ``n_prototypes``
    prototypes, ``top 10 shared`` (share of the ten genes with the largest mean |attribution|), ``largest``
    |attribution|.
    """
    config = replace(config, n_prototypes=n_prototypes, insertion=False)
    options = {"absent": ("remove", "value"), "binning": ("frozen", "rebinned")}
    options["counterfactual_mean"] = ("pooled", "matched")
    ways = {"as chosen": config}
    for name, values in options.items():
        for value in set(values) - {getattr(config, name)}:
            ways[f"{name}: {value}"] = replace(config, **{name: value})
    results = {
        name: attribute(adata, model, sae, concept, way, progress=False).set_index(["cell", "gene"])["attribution"]
        for name, way in ways.items()
    }
    reference = results["as chosen"]

    def top(result: pd.Series) -> set[str]:
        return set(result.abs().groupby("gene").mean().nlargest(10).index)

    return pd.DataFrame(
        {
            name: {
                "correlation": reference.corr(result.reindex(reference.index)),
                "top 10 shared": len(top(reference) & top(result)) / len(top(reference)),
                "largest": result.abs().max(),
            }
            for name, result in results.items()
        }
    ).T
