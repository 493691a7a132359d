"""Planted truth: real cells, and a model whose concepts are made of genes that we chose (ours).

Drivers are taken from groups of genes that go together in real cells; the rest of each group are passengers, which the
model does not use. A method that says what the *model* uses must find the drivers and leave the passengers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from .embedding import embed
from .encoder import PlantedConcept, PlantedEncoder
from .sae import SAE, SAEConfig

HOWS = ("sum", "sum", "any", "sum", "all")


class LeakyEncoder(PlantedEncoder):
    """A :class:`~scsae_utils.encoder.PlantedEncoder` in which every gene also leaks a little into every concept.

    The leaks are normal, with standard deviation ``leak`` for each gene at its highest value, from ``seed``: small
    effects that are those of no gene in particular, as every real model has them.
    """

    name = "leaky"

    def __init__(self, genes, concepts, leak: float = 0.01, seed: int = 0):
        super().__init__(genes, concepts)
        weights = np.random.default_rng(seed).normal(0, leak, (len(self.vocab), len(self.concepts)))
        self.leak = torch.tensor(weights, dtype=torch.float32)

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}-{float(self.leak.abs().sum()):.6g}"

    def encode(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(n, k + 1) of unit length."""
        values = (x if keep is None else x * keep[..., None]).sum(1)
        planted = super().encode(x, keep)[:, :-1] + values @ self.leak
        rest = (1 - planted.pow(2).sum(1, keepdim=True)).clamp_min(0).sqrt()
        return torch.cat([planted, rest], 1)


@dataclass(frozen=True)
class Planted:
    """Cells, a model and a dictionary whose truth is known.

    Parameters
    ----------
    cells
        Embedded with ``model``.
    sae
        Concept j is the model's j-th planted concept, where it is above a threshold.
    truth
        ``concept``, ``gene``, ``role`` (``driver`` or ``passenger``), ``how`` the drivers combine.
    """

    cells: AnnData
    model: PlantedEncoder
    sae: SAE
    truth: pd.DataFrame

    def genes(self, role: str = "driver") -> set[tuple[int, str]]:
        """Pairs (concept, gene) of a role."""
        part = self.truth[self.truth["role"] == role]
        return set(zip(part["concept"], part["gene"]))


def plant(
    adata: AnnData,
    hows: tuple[str, ...] = HOWS,
    n_drivers: int = 3,
    n_passengers: int = 5,
    n_genes: int = 200,
    active: float = 0.15,
    leak: float = 0.0,
    max_cells: int = 20_000,
    seed: int = 0,
) -> Planted:
    """Plant concepts in real cells.

    Parameters
    ----------
    adata
        Cells, as from :func:`scsae_utils.load_cells`.
    hows
        For each concept how its drivers combine: see :class:`~scsae_utils.encoder.PlantedConcept`. Those of ``"any"``
        and ``"all"`` have two drivers, the others ``n_drivers``.
    n_passengers
        Genes of each concept that go with its drivers, and that the model does not use.
    n_genes
        Genes in all, at most: the rest goes with nothing in particular.
    active
        Share of the cells in which a concept is active, at most.
    leak
        Of :class:`LeakyEncoder`; 0 for a model in which other genes do nothing at all.
    max_cells
        Of more cells, so many are taken at random.

    Raises
    ------
    ValueError
        If the cells have too few genes that are expressed in 10 to 60 % of them.
    """
    rng = np.random.default_rng(seed)
    if adata.n_obs > max_cells:
        adata = adata[np.sort(rng.permutation(adata.n_obs)[:max_cells])]
    X = adata.X.toarray() if hasattr(adata.X, "toarray") else np.asarray(adata.X)
    detected = (X > 0).mean(0)
    usable = np.flatnonzero((detected > 0.1) & (detected < 0.6))
    size = n_drivers + n_passengers
    if len(usable) < size * len(hows):
        needed = size * len(hows)
        raise ValueError(f"{len(usable)} genes are expressed in 10 to 60 % of the cells; planting needs {needed}")
    similar = np.corrcoef(X[:, usable].T)
    np.fill_diagonal(similar, -np.inf)
    concepts, rows, used = [], [], []
    for j, how in enumerate(hows):
        similar[used], similar[:, used] = -np.inf, -np.inf
        first = int(np.sort(similar, axis=1)[:, -size + 1 :].mean(axis=1).argmax())  # the tightest group that is left
        group = np.r_[first, np.argsort(-similar[first])[: size - 1]]
        used += group.tolist()
        names = list(adata.var_names[usable[rng.permutation(group)]])
        drivers = names[: n_drivers if how == "sum" else 2]
        concepts.append(PlantedConcept(tuple(drivers), how))
        rows += [(j, g, "driver" if g in drivers else "passenger", how) for g in names]
    others = rng.permutation(np.setdiff1d(usable, usable[used]))[: max(0, n_genes - len(used))]
    cells = adata[:, np.sort(np.r_[usable[used], others])].copy()
    cells = cells[np.asarray((cells.X > 0).sum(axis=1)).ravel() > 0].copy()
    genes = list(cells.var_names)
    model = LeakyEncoder(genes, concepts, leak, seed) if leak else PlantedEncoder(genes, concepts)
    embed(cells, model, progress=False)
    truth = pd.DataFrame(rows, columns=["concept", "gene", "role", "how"])
    return Planted(cells, model, planted_sae(cells.obsm["X_scGPT"], active), truth)


def planted_sae(embeddings: np.ndarray, active: float) -> SAE:
    """The dictionary that reads planted embeddings (n, k + 1): concept j is coordinate j above a threshold.

    The threshold leaves the concept active in a share ``active`` of the cells, or fewer.
    """
    k = embeddings.shape[1] - 1
    sae = SAE(SAEConfig(n_concepts=k), k + 1).requires_grad_(False)
    sae.W_e.copy_(torch.eye(k + 1)[:, :k])
    sae.W_d.copy_(torch.eye(k + 1)[:k])
    sae.b_e.copy_(-torch.from_numpy(np.quantile(embeddings[:, :k], 1 - active, axis=0).astype(np.float32)))
    return sae.eval()


def precision_recall(found: set, truth: set) -> tuple[float, float]:
    """Share of what was found that is true, and of what is true that was found; NaN where there is nothing."""
    hits = len(found & truth)
    return hits / len(found) if found else np.nan, hits / len(truth) if truth else np.nan
