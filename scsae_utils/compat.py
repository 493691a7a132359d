"""The random draws of the genuine ``scgpt.tasks.embed_data``, to get the embeddings that it gives."""

from __future__ import annotations

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse
from torch import nn
from torch.utils.data._utils.worker import _generate_state

from .scgpt import ScGPT

LOADER_BATCH = 64  # embed_data's default; which process draws for which cell depends on it


def draw_like_embed_data(adata: AnnData, model: ScGPT, seed: int = 0, workers: int = 1) -> sparse.csr_matrix:
    """Bins as ``embed_data`` draws them, with the genes that it leaves out of too long cells at zero.

    The same as ``torch.manual_seed(seed)`` before ``embed_data(...)``, on a machine with so many cores; numpy's seed
    has no effect there. ``embed_data`` first builds its network at random, then reads cells through a ``DataLoader``
    with one process for each core. Batch b of 64 cells goes to process ``b % workers``, whose generators are seeded
    from one more draw: numpy's breaks the ties of the bins, torch's chooses the tokens of a cell that is too long.

    Parameters
    ----------
    adata
        Cells in memory; ``X`` as ``embed_data`` is given it.
    model
        Its sizes set how many random numbers are drawn before the first cell.
    workers
        Cores of the machine (``len(os.sched_getaffinity(0))``). The draws depend on it.

    Returns
    -------
    (n_cells, n_genes) CSR float32, as from :func:`scsae_utils.embedding.bin_cells`.

    Raises
    ------
    ValueError
        For less than one worker, and see :func:`scsae_utils.embedding.bin_cells`.
    """
    from .embedding import known_expression, refuse_empty, token_ids

    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    bins = known_expression(adata, token_ids(adata.var_names, model))
    refuse_empty(adata, np.flatnonzero(np.diff(bins.indptr) == 0))
    base = base_seed(model, seed)
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


def base_seed(model: ScGPT, seed: int) -> int:
    """The number that seeds the loader's processes: drawn after the genuine network has had its random start."""
    config, d = model.config, model.dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding = nn.Embedding(len({*model.vocab, "<pad>", "<cls>", "<eoc>"}), d)
        nn.Linear(1, d), nn.Linear(d, d)  # of the values
        nn.TransformerEncoderLayer(d, config.nheads, config.d_hid)  # one: the others are copies
        nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 1)  # decoder of expression
        for _ in range(config.n_layers_cls - 1):
            nn.Linear(d, d)
        nn.Linear(d, 1), nn.Linear(d, d), nn.Linear(d, d, bias=False)
        nn.init.uniform_(embedding.weight, -0.1, 0.1)
        return int(torch.empty((), dtype=torch.int64).random_())
