"""Which genes drive a concept: occlusion with counterfactual perturbations (paper Sec. 2.3, A.5).

For each prototype cell of a concept j and each gene i that it expresses, the gene's value is replaced by its mean in
the counterfactual cells, and the model runs again:

``l_ij = (f(phi(x))_j - f(phi(x~i))_j) / f(phi(x))_j``        (Eq. 1)

1 means that the concept falls silent without the gene, 0 that the gene does not matter, and a negative value that
the gene held the concept back. The computation is exact: one forward pass for each gene of each prototype.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from anndata import AnnData
from scipy import sparse
from scipy.spatial.distance import cdist
from tqdm.auto import tqdm

from .embedding import BATCH_TOKENS, cell_tokens, embed_tokens, token_ids
from .encoder import CellEncoder
from .sae import SAE


@dataclass(frozen=True)
class AttributionConfig:
    """How genes are occluded. The numbers are the paper's where it gives them.

    Parameters
    ----------
    n_prototypes
        Cells with the highest activation (paper: 20; 30 in the legend of Fig. 2e).
    n_counterfactuals
        For each prototype, at most so many nearest cells in which the concept is silent.
    counterfactual_mean
        ``"pooled"``: one mean for all prototypes, over the distinct counterfactual cells. ``"matched"``: each
        prototype has the mean of its own.
    binning
        ``"frozen"``: the gene's bin is replaced by its mean bin, all other bins stay. ``"rebinned"``: its log value
        is replaced by the mean log value and the cell is binned anew, which can move other genes' bins.
    absent
        What to do with a mean below ``absent_below``, that is, with a gene that counterfactuals hardly express:
        ``"remove"`` its token, since scGPT is fed expressed genes only, or feed the ``"value"`` as it is
        (``"frozen"`` binning only; a re-binned value above zero has a bin of 1 or more).
    absent_below
        In bins; 1 is the lowest bin of an expressed gene.
    insertion
        Also add genes that the prototype does not express but counterfactuals do (mean of ``absent_below`` or more);
        ``"frozen"`` binning only.
    """

    n_prototypes: int = 20
    n_counterfactuals: int = 50
    counterfactual_mean: str = "pooled"
    binning: str = "frozen"
    absent: str = "remove"
    absent_below: float = 1.0
    insertion: bool = False

    def __post_init__(self):
        options = {
            "counterfactual_mean": ("pooled", "matched"),
            "binning": ("frozen", "rebinned"),
            "absent": ("remove", "value"),
        }
        for name, allowed in options.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.insertion and self.binning != "frozen":
            raise ValueError("insertion needs binning='frozen': its threshold is in bins")
        if self.n_prototypes < 1 or self.n_counterfactuals < 1:
            raise ValueError("n_prototypes and n_counterfactuals must be at least 1")


def choose_prototypes(activations: np.ndarray, n: int = 20) -> np.ndarray:
    """Rows of the at most ``n`` cells with the highest activation (n_cells,) above zero, highest first.

    Raises
    ------
    ValueError
        If no cell activates the concept.
    """
    order = np.argsort(-activations, kind="stable")[:n]
    order = order[activations[order] > 0]
    if len(order) == 0:
        raise ValueError("the concept activates in none of these cells, so it has no prototypes")
    return order


def choose_counterfactuals(
    embeddings: np.ndarray, activations: np.ndarray, prototypes: np.ndarray, n: int = 50
) -> np.ndarray:
    """For each prototype the rows of the at most ``n`` nearest cells (Euclidean) in which the concept is silent.

    Parameters
    ----------
    embeddings, activations
        (n_cells, d) and (n_cells,).

    Returns
    -------
    (n_prototypes, at most n) rows, nearest first.

    Raises
    ------
    ValueError
        If no cell leaves the concept silent.
    """
    silent = np.flatnonzero(activations == 0)
    if len(silent) == 0:
        raise ValueError("every cell activates the concept, so it has no counterfactuals")
    distances = cdist(embeddings[prototypes], embeddings[silent])
    return silent[np.argsort(distances, axis=1, kind="stable")[:, :n]]


@torch.inference_mode()
def occlude(
    model: CellEncoder, ids, values, positions, new_values, remove, batch_tokens: int = BATCH_TOKENS
) -> np.ndarray:
    """Embeddings of one cell with one token changed at a time.

    Parameters
    ----------
    ids, values
        (N,) the cell's tokens, ``<cls>`` first.
    positions
        (M,) which token to change, 1 to N - 1 (0 is ``<cls>``). Tokens are added by :func:`insert`.
    new_values
        (M,) binned values to put there.
    remove
        (M,) bool: take the token away instead.

    Returns
    -------
    (M, d) unit-length embeddings.
    """
    ids, values = torch.as_tensor(ids), torch.as_tensor(values)
    positions, new_values = torch.as_tensor(positions), torch.as_tensor(new_values, dtype=torch.float32)
    x = model.tokens(ids[None], values[None])[0]
    changed = model.tokens(ids[positions][None], new_values[None])[0]
    n, out = len(ids), np.empty((len(positions), model.dim), np.float32)
    everything = torch.arange(n)
    remove = np.asarray(remove, bool)
    for removing in (False, True):
        todo = np.flatnonzero(remove == removing)
        size = max(1, batch_tokens // n)
        for rows in (todo[i : i + size] for i in range(0, len(todo), size)):
            at = positions[rows]
            if removing:
                left = everything.expand(len(rows), n)[everything != at[:, None]].view(len(rows), n - 1)
                batch = x[left]
            else:
                batch = x.expand(len(rows), n, -1).clone()
                batch[torch.arange(len(rows)), at] = changed[rows]
            out[rows] = F.normalize(model.encode(batch), dim=-1).numpy()
    return out


@torch.inference_mode()
def insert(model: CellEncoder, ids, values, new_ids, new_values, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
    """Embeddings (M, d) of one cell (N tokens) with one token added at a time: ids and values (M,)."""
    x = model.tokens(torch.as_tensor(ids)[None], torch.as_tensor(values)[None])
    new = model.tokens(torch.as_tensor(new_ids)[:, None], torch.as_tensor(new_values, dtype=torch.float32)[:, None])
    size = max(1, batch_tokens // (x.shape[1] + 1))
    parts = [model.encode(torch.cat([x.expand(len(y), -1, -1), y], dim=1)) for y in new.split(size)]
    return F.normalize(torch.cat(parts), dim=-1).numpy() if parts else np.empty((0, model.dim), np.float32)


def rebinned(model: CellEncoder, ids, log_values, positions, means, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
    """Embeddings (M, d) of one cell with one gene's log value replaced and the whole cell binned anew.

    ``ids`` (N,) start with ``<cls>``; ``log_values`` (N - 1,) are those of all genes of the cell, also of those that
    the model has no room for; ``positions`` (M,) count from ``<cls>``. A mean of zero takes the gene out of the cell.
    """
    bins = np.zeros((len(positions), len(log_values)), np.float32)
    for row, position, mean in zip(bins, positions, means):
        new = log_values.copy()
        new[position - 1] = mean
        row[new > 0] = model.input_values(new[new > 0])
    return embed_tokens(cell_tokens(sparse.csr_matrix(bins), ids[1:], model), model, batch_tokens)


def attribute(
    adata: AnnData,
    model: CellEncoder,
    sae: SAE,
    concepts,
    config: AttributionConfig | None = None,
    key: str = "X_scGPT",
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
    **settings,
) -> pd.DataFrame:
    """Attribution of every gene to concepts, in every prototype (Eq. 1).

    Parameters
    ----------
    adata
        Cells after :func:`scsae_utils.embed` with this ``model``.
    concepts
        One number or several.
    config
        Or its fields as keywords: ``attribute(adata, model, sae, 17, n_prototypes=30)``.

    Returns
    -------
    Table, one row for each concept, prototype and gene: ``concept``, ``cell`` (name), ``gene``, ``bin`` (before),
    ``counterfactual`` (mean bin or, re-binned, mean log value), ``change`` (``value``, ``remove`` or ``insert``),
    ``activation``, ``occluded`` (activation after), ``attribution``. Settings in ``attrs``.

    Raises
    ------
    ValueError
        If the cells were not embedded with this model, or a concept does not exist or never activates.
    """
    if config is not None and settings:
        raise ValueError("give a config or its fields, not both")
    config = config or AttributionConfig(**settings)
    check_embedded(adata, model, key)
    concepts = np.atleast_1d(concepts).astype(int)
    if (concepts < 0).any() or (concepts >= sae.config.n_concepts).any():
        raise ValueError(f"concepts must be 0 to {sae.config.n_concepts - 1}, got {concepts.tolist()}")
    embeddings = adata.obsm[key]
    ids = token_ids(adata.var_names, model)
    bins = adata.layers["bins"].tocsr()
    U = sae.activations(embeddings)[:, concepts].toarray()
    chosen = [prototypes_and_counterfactuals(embeddings, U[:, j], config) for j in range(len(concepts))]

    parts = []
    total = sum(int(np.diff(bins.indptr)[p].sum()) for p, _ in chosen)
    with tqdm(total=total, desc="occluding genes", unit="gene", disable=not progress) as bar:
        for j, (prototypes, counterfactuals) in enumerate(chosen):
            source = adata.X if config.binning == "rebinned" else bins
            pooled = np.asarray(source[np.unique(counterfactuals)].mean(axis=0)).ravel()
            for row, own in zip(prototypes, counterfactuals):
                mean = pooled
                if config.counterfactual_mean == "matched":
                    mean = np.asarray(source[own].mean(axis=0)).ravel()
                part = occlude_cell(adata, model, bins, ids, row, mean, config, batch_tokens)
                with torch.inference_mode():
                    after = sae.encode(torch.from_numpy(part.pop("embedding")))[:, concepts[j]].numpy()
                part = pd.DataFrame(part)
                part.insert(0, "concept", concepts[j])
                part.insert(1, "cell", adata.obs_names[row])
                part["activation"] = U[row, j]
                part["occluded"] = after
                part["attribution"] = (part["activation"] - part["occluded"]) / part["activation"]
                parts.append(part)
                bar.update(int(np.diff(bins.indptr)[row]))
    table = pd.concat(parts, ignore_index=True)
    table.attrs = {**asdict(config), "model": adata.uns["scgpt"]["model"], "n_genes_panel": int((ids >= 0).sum())}
    return table


def occlude_cell(adata, model, bins, ids, row, mean, config: AttributionConfig, batch_tokens: int) -> dict:
    """Columns of :func:`attribute` for one prototype, with the (M, d) embeddings after each change."""
    cell_ids, values = cell_tokens(bins[row], ids, model)[0]
    column = {token: i for i, token in enumerate(ids)}  # duplicates cannot be: symbols are unique
    columns = np.array([column[t] for t in cell_ids[1:]], int)
    positions = np.arange(1, len(cell_ids))
    means = mean[columns].astype(np.float32)
    if config.binning == "rebinned":
        whole = bins[row].indices  # the bins are those of all genes, as many as there are
        log_values = adata.X[row].toarray() if sparse.issparse(adata.X) else np.asarray(adata.X[row])
        whole_ids = np.r_[cell_ids[0], ids[whole]]
        place = {c: i for i, c in enumerate(whole, 1)}
        places = [place[c] for c in columns]
        embedding = rebinned(model, whole_ids, log_values.ravel()[whole], places, means, batch_tokens)
        change = np.where(means > 0, "value", "remove")
    else:
        remove = (means < config.absent_below) & (config.absent == "remove")
        embedding = occlude(model, cell_ids, values, positions, means, remove, batch_tokens)
        change = np.where(remove, "remove", "value")
    before = values[1:]
    if config.insertion:
        new = np.setdiff1d(np.flatnonzero((mean >= config.absent_below) & (ids >= 0)), columns)
        embedding = np.r_[embedding, insert(model, cell_ids, values, ids[new], mean[new], batch_tokens)]
        columns, before, means = np.r_[columns, new], np.r_[before, np.zeros(len(new))], np.r_[means, mean[new]]
        change = np.r_[change, np.full(len(new), "insert")]
    genes = adata.var_names[columns]
    return {"gene": genes, "bin": before, "counterfactual": means, "change": change, "embedding": embedding}


def prototypes_and_counterfactuals(embeddings, activations, config: AttributionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows of prototypes (P,) and of each one's counterfactuals (P, n)."""
    prototypes = choose_prototypes(activations, config.n_prototypes)
    return prototypes, choose_counterfactuals(embeddings, activations, prototypes, config.n_counterfactuals)


def check_embedded(adata: AnnData, model: CellEncoder, key: str = "X_scGPT") -> None:
    """Raise ValueError unless ``adata`` was embedded with this very model."""
    if key not in adata.obsm or "bins" not in adata.layers or "scgpt" not in adata.uns:
        raise ValueError("the cells are not embedded: run scsae_utils.embed(adata, model) first")
    if adata.uns["scgpt"]["model"] != model.fingerprint():
        raise ValueError("the cells were embedded with another model: embed them again with this one")
    if adata.uns["scgpt"].get("n_genes", adata.n_vars) != adata.n_vars:
        raise ValueError("genes were left out after the cells were embedded: embed them again")


def gene_summary(attributions: pd.DataFrame, threshold: float = 0.05, min_prototypes: int = 5) -> pd.DataFrame:
    """One row for each concept and gene, and the paper's gene set.

    Returns
    -------
    Table indexed by concept and gene, most positive first: ``mean`` attribution over all prototypes (0 where the gene
    is not there to be occluded), ``std``, ``n_prototypes`` in which it was, ``n_above``: prototypes with
    |attribution| > ``threshold``, ``selected``: ``n_above >= min_prototypes`` (paper: 0.05 and 5 of 20).
    """
    n_prototypes = attributions.groupby("concept")["cell"].nunique()
    groups = attributions.assign(
        above=attributions["attribution"].abs() > threshold, square=attributions["attribution"] ** 2
    ).groupby(["concept", "gene"])
    table = groups.agg(
        total=("attribution", "sum"),
        square=("square", "sum"),
        n_prototypes=("cell", "nunique"),
        n_above=("above", "sum"),
    )
    n = table.index.get_level_values("concept").map(n_prototypes).to_numpy()
    table["mean"] = table.pop("total") / n
    table["std"] = np.sqrt(np.maximum(table.pop("square") / n - table["mean"] ** 2, 0))
    table["selected"] = table["n_above"] >= min_prototypes
    table = table[["mean", "std", "n_prototypes", "n_above", "selected"]]
    return table.sort_values(["concept", "mean"], ascending=[True, False], kind="stable")


def strongest_genes(summary: pd.DataFrame, n: int) -> list[str]:
    """The ``n`` genes with the largest |mean| attribution of each concept in a :func:`gene_summary`, named once."""
    order = summary["mean"].abs().sort_values(ascending=False, kind="stable")
    return list(dict.fromkeys(order.groupby("concept", sort=False).head(n).index.get_level_values("gene")))
