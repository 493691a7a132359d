"""Expression to bins, bins to tokens, tokens to cell embeddings (paper Sec. 2.1, METHOD "embed_data")."""

from __future__ import annotations

import numpy as np
import scanpy as sc
import torch
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm

from .encoder import CellEncoder

BATCH_TOKENS = 8192  # larger batches are slower on a CPU: each layer's new memory has to be paged in


def token_ids(symbols, model: CellEncoder) -> np.ndarray:
    """(n_genes,) token id of each gene symbol, -1 where the model does not know it."""
    return np.array([model.vocab.get(symbol, -1) if not symbol.startswith("<") else -1 for symbol in symbols])


def bin_cells(adata: AnnData, model: CellEncoder, ties: str = "expected", seed: int = 0) -> sparse.csr_matrix:
    """Bin every cell over the genes that the model knows.

    Parameters
    ----------
    adata
        Cells; ``X`` holds counts or log values, zeros where a gene was not seen.
    model
        Supplies the vocabulary and the number of bins.
    ties
        ``"expected"`` (deterministic) or ``"random"`` (scGPT's own draw, from ``seed``).

    Returns
    -------
    (n_cells, n_genes) CSR float32; zero where a gene is not expressed or not known to the model.

    Raises
    ------
    ValueError
        If a cell expresses no gene of the vocabulary, or values are negative or not finite.
    """
    if ties not in ("expected", "random"):
        raise ValueError(f"ties must be 'expected' or 'random', not {ties!r}")
    rng = np.random.default_rng(seed) if ties == "random" else None
    known = sparse.diags((token_ids(adata.var_names, model) >= 0).astype(np.float32))
    bins = sparse.csr_matrix(adata.X, dtype=np.float32) @ known
    bins = sparse.csr_matrix(bins)
    bins.eliminate_zeros()
    bins.sort_indices()
    if len(bins.data) and not (np.isfinite(bins.data).all() and bins.data.min() > 0):
        raise ValueError("expression holds negative or non-finite values; scGPT needs counts or log1p values")
    lengths = np.diff(bins.indptr)
    if (lengths == 0).any():
        empty = adata.obs_names[lengths == 0]
        raise ValueError(
            f"{len(empty)} cells express no gene that the model knows (first: {empty[0]}): remove them before embedding"
        )
    for start, end in zip(bins.indptr[:-1], bins.indptr[1:]):
        bins.data[start:end] = model.input_values(bins.data[start:end], rng)
    return bins


def cell_tokens(bins: sparse.csr_matrix, ids: np.ndarray, model: CellEncoder) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each cell's token ids and values, ``<cls>`` first; too long cells keep their highest bins.

    Parameters
    ----------
    bins
        (n_cells, n_genes) from :func:`bin_cells`.
    ids
        (n_genes,) from :func:`token_ids`.

    Returns
    -------
    One pair (ids (N,) int64, values (N,) float32) for each cell.
    """
    cells, most = [], model.max_tokens - 1
    for start, end in zip(bins.indptr[:-1], bins.indptr[1:]):
        columns, values = bins.indices[start:end], bins.data[start:end]
        if len(columns) > most:  # stable: among equal bins the first genes stay
            top = np.sort(np.argsort(-values, kind="stable")[:most])
            columns, values = columns[top], values[top]
        cells.append((np.r_[model.cls[0], ids[columns]], np.r_[model.cls[1], values].astype(np.float32)))
    return cells


def embed_tokens(cells, model: CellEncoder, batch_tokens: int = BATCH_TOKENS, progress: bool = False) -> np.ndarray:
    """Cell embeddings (n_cells, d) of token sequences, in batches of cells of similar length.

    A cell's embedding does not depend on its neighbours in the batch: padding is masked out of the attention.
    """
    lengths = np.array([len(ids) for ids, _ in cells])
    order = np.argsort(lengths, kind="stable")[::-1]  # longest first: memory is highest at once, not at the end
    device = model.device
    out = np.empty((len(cells), model.dim), np.float32)
    start = 0
    with (
        tqdm(total=len(cells), desc="embedding cells", unit="cell", disable=not progress) as bar,
        torch.inference_mode(),
    ):
        while start < len(order):
            longest = lengths[order[start]]
            batch = order[start : start + max(1, batch_tokens // longest)]
            ids = np.full((len(batch), longest), model.pad[0], np.int64)
            values = np.full((len(batch), longest), model.pad[1], np.float32)
            for row, i in enumerate(batch):
                ids[row, : lengths[i]], values[row, : lengths[i]] = cells[i]
            keep = None
            if lengths[batch[-1]] < longest:
                keep = torch.from_numpy(np.arange(longest) < lengths[batch][:, None]).to(device)
            out[batch] = (
                model(torch.from_numpy(ids).to(device), torch.from_numpy(values).to(device), keep).cpu().numpy()
            )
            start += len(batch)
            bar.update(len(batch))
    return out


def embed(
    adata: AnnData,
    model: CellEncoder,
    ties: str = "expected",
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> AnnData:
    """Embed every cell with scGPT.

    Parameters
    ----------
    adata
        Cells, as from :func:`scsae_utils.load_cells`; changed in place.
    model
        From :func:`scsae_utils.load_model`.
    ties, seed
        See :func:`bin_cells`.
    batch_tokens
        Most tokens in one batch; sets speed and memory, not the result.

    Returns
    -------
    ``adata`` with ``obsm["X_scGPT"]`` (n_cells, d) of unit length, ``layers["bins"]`` (what the model was fed) and
    the settings in ``uns["scgpt"]``: ``name`` and ``model`` (name and fingerprint of the weights), ``ties``, ``seed``,
    ``n_genes_known``, ``n_genes``, ``n_truncated`` (cells with more genes than the model reads).

    Raises
    ------
    ValueError
        See :func:`bin_cells`; also if fewer than 10 genes are in the model's vocabulary.
    """
    ids = token_ids(adata.var_names, model)
    if (ids >= 0).sum() < 10:
        raise ValueError(
            f"only {(ids >= 0).sum()} of {adata.n_vars} genes are in the model's vocabulary; "
            f"var_names must be gene symbols (first three: {', '.join(adata.var_names[:3])})"
        )
    bins = bin_cells(adata, model, ties, seed)
    adata.layers["bins"] = bins
    adata.obsm["X_scGPT"] = embed_tokens(cell_tokens(bins, ids, model), model, batch_tokens, progress)
    adata.uns["scgpt"] = {
        "name": model.name,
        "model": model.fingerprint(),
        "ties": ties,
        "seed": seed,
        "n_genes": adata.n_vars,
        "n_genes_known": int((ids >= 0).sum()),
        "n_truncated": int((np.diff(bins.indptr) >= model.max_tokens).sum()),
    }
    return adata


def add_umap(adata: AnnData, seed: int = 0) -> None:
    """UMAP of the cell embeddings, in ``obsm["X_umap"]``."""
    sc.pp.neighbors(adata, use_rep="X_scGPT", n_neighbors=15, random_state=seed)
    sc.tl.umap(adata, random_state=seed)
