"""The random draws of the genuine ``scgpt.tasks.embed_data``, to get the embeddings that it gives."""

from __future__ import annotations

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse
from torch.utils.data._utils.worker import _generate_state

from .encoder import CellEncoder

LOADER_BATCH = 64  # embed_data's default; which process draws for which cell depends on it


def draw_like_embed_data(adata: AnnData, model: CellEncoder, seed: int = 0, workers: int = 1) -> sparse.csr_matrix:
    """Bins as ``embed_data`` draws them, with the genes that it leaves out of too long cells at zero.

    ``embed_data`` reads cells through a ``DataLoader`` of as many processes as the machine has cores. Batch b of 64
    cells is drawn by process ``b % workers``, whose generators are seeded from one number of torch's global generator:
    numpy's breaks the ties of the bins, torch's chooses the tokens of a cell with more than the model reads.

    Parameters
    ----------
    seed
        That of ``torch.manual_seed`` when the loader starts, that is, after the genuine model has been built.
    workers
        Processes of the loader. The draws depend on it.

    Returns
    -------
    (n_cells, n_genes) CSR float32, as from :func:`scsae_utils.embedding.bin_cells`.
    """
    from .embedding import known_expression, refuse_empty, token_ids

    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    bins = known_expression(adata, token_ids(adata.var_names, model))
    refuse_empty(adata, np.flatnonzero(np.diff(bins.indptr) == 0))
    base = int(torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed)))
    ties = [np.random.RandomState(_generate_state(base, w)) for w in range(workers)]
    subsets = [torch.Generator().manual_seed(base + w) for w in range(workers)]
    for i, (start, end) in enumerate(zip(bins.indptr[:-1], bins.indptr[1:])):
        worker = i // LOADER_BATCH % workers
        values = model.input_values(bins.data[start:end], ties[worker])
        if len(values) > model.max_tokens - 1:
            kept = torch.randperm(len(values), generator=subsets[worker])[: model.max_tokens - 1].numpy()
            values[np.setdiff1d(np.arange(len(values)), kept)] = 0
        bins.data[start:end] = values
    bins.eliminate_zeros()
    return bins
