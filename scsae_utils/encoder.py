"""What embedding and attribution ask of a model, and a model whose answers are known.

Another foundation model is one class with the members of :class:`CellEncoder`. :class:`ScGPT` has them, with trained
or with random weights; :class:`PlantedEncoder` depends on the genes that it is told to, and on no others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def find_device(name: str) -> torch.device:
    """The device of a name; ``"auto"`` is the first GPU, or the CPU where there is none.

    Raises
    ------
    ValueError
        If it is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((gpu for gpu in ("cuda", "mps") if there[gpu]), "cpu")
    if not there.get(name.partition(":")[0], False):
        raise ValueError(f"there is no device {name!r} here; there are: {', '.join(d for d in there if there[d])}")
    return torch.device(name, 0) if name in ("cuda", "mps") else torch.device(name)  # as its tensors call it


@runtime_checkable
class CellEncoder(Protocol):
    """Something that turns cells into vectors and takes gradients: the function phi of the paper (Sec. 2.1).

    A cell is a set of tokens, one for each gene that it expresses, after a token that stands for the cell. A token is
    a gene and a value, and becomes a vector; from these vectors comes the embedding. Between the two steps attribution
    changes, removes and adds tokens, and gradients are taken.

    Attributes
    ----------
    name
        What the model is opened by.
    dim
        Width d of the embedding.
    vocab
        Symbol to token id; symbols that start with ``<`` are no genes.
    cls, pad
        (token id, value) of the token for the cell, and of padding.
    max_tokens
        Most tokens of a cell, that of the cell included.
    device
        Where tensors have to be.
    """

    name: str
    dim: int
    vocab: Mapping[str, int]
    cls: tuple[int, float]
    pad: tuple[int, float]
    max_tokens: int
    device: torch.device

    def fingerprint(self) -> str:
        """A short text that is different for any other weights."""
        ...

    def input_values(self, expression: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """What the model is fed for one cell's expression (N,) above zero; ``rng`` for models that draw at random."""
        ...

    def tokens(self, ids: Tensor, values: Tensor) -> Tensor:
        """Token vectors (n, N, t) of ids and values, both (n, N)."""
        ...

    def encode(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Vectors (n, d), of any length, of token vectors; ``keep`` (n, N) is False at padding."""
        ...

    def __call__(self, ids: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
        """Cell embeddings (n, d) of unit length."""
        ...


@dataclass(frozen=True)
class PlantedConcept:
    """A concept and the genes that it is made of.

    Parameters
    ----------
    genes
        The drivers.
    how
        ``"sum"``: the mean of the genes' values, each counts for itself. ``"any"``: the highest of them, so that one
        gene can stand for another (redundant). ``"all"``: the lowest of them, so that none may be missing.
    inhibitors
        Genes whose mean value is subtracted.
    """

    genes: tuple[str, ...]
    how: str = "sum"
    inhibitors: tuple[str, ...] = ()

    def __post_init__(self):
        if self.how not in ("sum", "any", "all"):
            raise ValueError(f"how must be 'sum', 'any' or 'all', not {self.how!r}")
        if not self.genes:
            raise ValueError("a planted concept needs at least one gene")


class PlantedEncoder(nn.Module):
    """A model that depends on known genes: the truth that attribution has to find.

    Coordinate j of the embedding is concept j, between 0 and ``1 / sqrt(k)`` for k concepts; the last coordinate makes
    the length one. Genes of no concept change nothing, however well they go along with the drivers.

    Parameters
    ----------
    genes
        All genes that the model can be fed, G of them.
    concepts
        The k planted concepts.

    Raises
    ------
    ValueError
        If a gene of a concept is not among ``genes``, or a symbol is there twice.
    """

    name = "planted"

    def __init__(self, genes: Sequence[str], concepts: Sequence[PlantedConcept]):
        super().__init__()
        self.vocab = {symbol: i for i, symbol in enumerate(["<pad>", "<cls>", *genes])}
        if len(self.vocab) != len(genes) + 2:
            raise ValueError("gene symbols must be unique")
        unknown = sorted({g for c in concepts for g in (*c.genes, *c.inhibitors)} - set(genes))
        if unknown:
            raise ValueError(f"planted genes that the model does not have: {', '.join(unknown)}")
        self.concepts, self.dim, self.max_tokens = tuple(concepts), len(concepts) + 1, len(self.vocab)
        self.pad, self.cls, self.top = (0, 0.0), (1, 0.0), 50.0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of the genes and the concepts."""
        return hashlib.sha256(repr((list(self.vocab), self.concepts)).encode()).hexdigest()[:16]

    def input_values(self, expression: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """scGPT's bins, so that the planted model is fed what scGPT would be."""
        from .scgpt import bin_values

        return bin_values(expression, rng=rng)

    def tokens(self, ids: Tensor, values: Tensor) -> Tensor:
        """(n, N, G + 2): the value, in the gene's own place; at most 1."""
        return F.one_hot(ids, len(self.vocab)) * (values / self.top).clamp(0, 1)[..., None]

    def encode(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(n, k + 1) of unit length."""
        values = (x if keep is None else x * keep[..., None]).sum(1)
        parts = []
        for concept in self.concepts:
            own = values[:, [self.vocab[g] for g in concept.genes]]
            part = {"sum": own.mean, "any": own.amax, "all": own.amin}[concept.how](1)
            if concept.inhibitors:
                part = part - values[:, [self.vocab[g] for g in concept.inhibitors]].mean(1)
            parts.append(part.clamp(0, 1) / len(self.concepts) ** 0.5)
        planted = torch.stack(parts, 1)
        return torch.cat([planted, (1 - planted.pow(2).sum(1, keepdim=True)).clamp_min(0).sqrt()], 1)

    def forward(self, ids: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
        """Cell embeddings (n, k + 1) of unit length, of ids and values (n, N)."""
        return self.encode(self.tokens(ids, values), keep)
