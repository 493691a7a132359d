"""Sparse autoencoders: dictionaries of concepts for cell embeddings (paper Sec. 2.2, A.3).

``u = f(a)`` are a cell's concept activations, ``a' = g(u) = u W_d + b_d`` its reconstruction; every concept's row of
``W_d`` has unit norm. A :class:`Dictionary` is what every other module asks for; :mod:`scsae_utils.training` trains
the architectures of this module, :mod:`scsae_utils.dictionaries` has the references that they are compared with.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from scipy import sparse
from torch import Tensor, nn

from .files import whole

CALIBRATED = 4096  # cells that a threshold is set by, at most: all their activations are in memory at once


@dataclass(frozen=True)
class SAEConfig:
    """How a dictionary is made and trained. The defaults are the paper's.

    Parameters
    ----------
    sae
        Architecture: ``paper`` (:class:`SAE`), ``topk`` (:class:`TopK`), ``batchtopk`` (:class:`BatchTopK`),
        ``matryoshka`` (:class:`Matryoshka`) or ``jumprelu`` (:class:`JumpReLU`).
    n_concepts
        Size c of the dictionary.
    batch_size, learning_rate, epochs
        Of training by Adam.
    l1
        Weight lambda_s of the L1 penalty (``paper`` only).
    k
        Active concepts of a cell (``topk``), on average (``batchtopk``, ``matryoshka``), or the number that the
        penalty aims at (``jumprelu``).
    prefixes
        Shares of the dictionary, rising to 1, that must each reconstruct the cell alone (``matryoshka`` only).
    l0, bandwidth
        Weight of the penalty on the number of active concepts, and width of the window around a threshold in which
        activations move it (``jumprelu`` only).
    dead_epochs
        A concept that was silent for so many epochs is dead, and is trained to explain what the living ones leave
        (the auxiliary loss of Gao et al. 2024; all but ``paper``, which leaves the dead as they are). 0: never.
    aux
        Weight of that loss.
    warmup, decay
        Share of all steps in which the learning rate and the penalties (``l1``, ``l0``) rise from 0 at the start, and
        in which the learning rate falls to 0 at the end.
    patience
        Training stops after so many epochs without a lower loss on held-out cells, and the weights of the best epoch
        are taken. 0: it never stops early.
    whiten
        In training, directions of the embedding with variance v are scaled by ``v ** (-whiten / 2)``: 0 leaves them, 1
        makes all alike, so that concepts of small directions are not lost beside large ones. The trained dictionary
        is of the embedding as it is. Not for ``topk``, whose choice depends on the scale of concepts.
    precision
        ``fp32``, or ``bf16`` for the matrix products of training (weights and optimiser stay fp32).
    train_decoder
        False leaves the concept vectors as they were drawn, and trains the rest: a control.
    order_seed
        Of the order of the cells. It is not ``seed``, so that dictionaries of several seeds can share a pass.
    seed
        Of the start of the weights.
    """

    sae: str = "paper"
    n_concepts: int = 10_000
    batch_size: int = 1024
    learning_rate: float = 1e-6
    epochs: int = 1000
    l1: float = 5e-5
    k: int = 32
    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    l0: float = 1.0
    bandwidth: float = 0.01
    dead_epochs: int = 10
    aux: float = 1 / 32
    warmup: float = 0.0
    decay: float = 0.0
    patience: int = 0
    whiten: float = 0.0
    precision: str = "fp32"
    train_decoder: bool = True
    order_seed: int = 0
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "prefixes", tuple(self.prefixes))  # a list, when read from a file
        if self.sae not in ARCHITECTURES:
            raise ValueError(f"sae must be one of {', '.join(ARCHITECTURES)}, not {self.sae!r}")
        for name in ("n_concepts", "batch_size", "epochs", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("l1", "l0", "aux", "dead_epochs", "patience", "warmup", "decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup and decay are shares of the steps: {self.warmup} + {self.decay} is more than 1")
        if not 0 <= self.whiten <= 1 or (self.whiten and self.sae == "topk"):
            raise ValueError(f"whiten must be from 0 to 1, and 0 with topk, not {self.whiten} with {self.sae}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, not {self.precision!r}")
        if self.sae != "paper" and self.k > self.n_concepts:
            raise ValueError(f"k = {self.k} active concepts out of n_concepts = {self.n_concepts} cannot be")
        rising = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes))
        if not rising or not self.prefixes or self.prefixes[-1] != 1:
            raise ValueError(f"prefixes must be rising shares that end with 1, not {self.prefixes}")


class Dictionary(nn.Module):
    """Concept vectors, and a linear encoder whose activations count above a threshold.

    Parameters
    ----------
    config
        How it was made; has ``n_concepts``.
    dim
        Width d of the cell embedding.

    Attributes
    ----------
    W_e (d, c), b_e (c,), W_d (c, d), b_d (d,)
        As in the paper.
    threshold (c,)
        Activations of a concept at or below it are zero.
    vectors
        (c, d) array of the concept vectors, the rows of W_d.
    history
        Table of training, one row an epoch; empty where nothing was trained in epochs.
    """

    def __init__(self, config, dim: int):
        super().__init__()
        self.config = config
        self.W_d = nn.Parameter(torch.zeros(config.n_concepts, dim))
        self.W_e = nn.Parameter(torch.zeros(config.n_concepts, dim).T)  # a concept's weights lie together
        self.b_e = nn.Parameter(torch.zeros(config.n_concepts))
        self.b_d = nn.Parameter(torch.zeros(dim))
        self.register_buffer("threshold", torch.zeros(config.n_concepts))
        self.history = pd.DataFrame()

    @property
    def vectors(self) -> np.ndarray:
        return self.W_d.detach().cpu().numpy().copy()

    def pre_activations(self, a: Tensor) -> Tensor:
        """(n, c) activations before they are made sparse beyond the ReLU."""
        return F.relu((a - self.b_d) @ self.W_e + self.b_e)

    def encode(self, a: Tensor) -> Tensor:
        """Concept activations u = f(a), (n, c), of cell embeddings a (n, d)."""
        u = self.pre_activations(a)
        return u * (u > self.threshold)

    def decode(self, u: Tensor) -> Tensor:
        """Reconstruction a' = g(u), (n, d), of concept activations u (n, c)."""
        return u @ self.W_d + self.b_d

    def decode_sparse(self, U: sparse.csr_matrix) -> np.ndarray:
        """Reconstruction (n, d) of sparse activations (n, c), as from :meth:`activations`."""
        return U @ self.W_d.detach().numpy() + self.b_d.detach().numpy()

    def activations(self, embeddings, batch_size: int = 256) -> sparse.csr_matrix:
        """Sparse (n, c) activations of cell embeddings (n, d): an array, ``np.memmap`` or h5py data set.

        ``batch_size`` cells are dense at a time; so few that they stay in the cache, which is quicker.
        """
        with torch.inference_mode():
            parts = [
                sparse.csr_matrix(self.encode(torch.from_numpy(read_rows(embeddings, i, i + batch_size))).numpy())
                for i in range(0, len(embeddings), batch_size)
            ]
        return sparse.vstack(parts, format="csr")

    @torch.no_grad()
    def calibrate(self, a: Tensor, k: int) -> None:
        """Set one threshold for all so that the cells a (n, d) have ``k`` active concepts on average.

        Of more than :data:`CALIBRATED` cells, so many are drawn.
        """
        if len(a) > CALIBRATED:
            a = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(0))[:CALIBRATED]]
        u = self.pre_activations(a).flatten()
        self.threshold.zero_()
        if k * len(a) < len(u):
            self.threshold.fill_(u.topk(k * len(a) + 1).values[-1])

    @torch.no_grad()
    def map_back(self, M: Tensor) -> None:
        """From a dictionary of ``a @ M`` to that of a: the same activations but for a factor, the same reconstructions.

        Concept vectors get unit norm again; their former length goes to the activations.
        """
        back = torch.linalg.inv(M)
        vectors = self.W_d @ back
        length = vectors.norm(dim=1)
        self.W_d.copy_(vectors / length[:, None])
        self.W_e.copy_(M @ self.W_e * length)
        self.b_d.copy_(self.b_d @ back)
        for each in (self.b_e, self.threshold):
            each.mul_(length)


class SAE(Dictionary):
    """The paper's: ReLU, and an L1 penalty on the activations. The other architectures derive from it.

    Concept vectors start at random directions, and the encoder as their transpose.
    """

    def __init__(self, config: SAEConfig, dim: int):
        if type(self) is not ARCHITECTURES[config.sae]:
            raise TypeError(f"{type(self).__name__} is not {config.sae!r}: make_sae chooses the class")
        super().__init__(config, dim)
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            self.W_d.copy_(F.normalize(torch.randn(config.n_concepts, dim, generator=generator), dim=1))
            self.W_e.copy_(self.W_d.T)
        self.W_d.requires_grad_(config.train_decoder)

    def loss(self, a: Tensor, dead: Tensor, warm: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of a batch a (n, d), its activations (n, c), and what they leave unexplained (n, d).

        ``MSE(a, a') + warm * l1 * mean over cells of ||u||_1``, the MSE being the mean over cells and coordinates.

        Parameters
        ----------
        dead
            (c,) mask of the concepts to be revived; the paper revives none.
        warm
            Share of the penalty that counts, for its warm-up.
        """
        u = self.pre_activations(a)
        rest = a - self.decode(u)
        return rest.pow(2).mean() + warm * self.config.l1 * u.sum(1).mean(), u, rest

    def revival(self, a: Tensor, rest: Tensor, dead: Tensor) -> Tensor | float:
        """``aux * MSE(rest, reconstruction of it by the dead alone)``; at most 2 k of them for each cell."""
        if not dead.any():
            return 0.0
        idle = ((a - self.b_d) @ self.W_e[:, dead] + self.b_e[dead]).relu()
        idle = keep_largest(idle, min(2 * self.config.k, idle.shape[1]) * len(a), per_row=True)
        return self.config.aux * (rest.detach() - idle @ self.W_d[dead]).pow(2).mean()


class TopK(SAE):
    """The k largest activations of each cell (Gao et al. 2024)."""

    def encode(self, a: Tensor) -> Tensor:
        return self.keep(self.pre_activations(a))

    def keep(self, u: Tensor) -> Tensor:
        """The activations (n, c) that count in training."""
        return keep_largest(u, self.config.k * len(u), per_row=True)

    def loss(self, a: Tensor, dead: Tensor, warm: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """``MSE(a, a')``, and the revival of dead concepts; see :meth:`SAE.loss`."""
        u = self.keep(self.pre_activations(a))
        rest = a - self.decode(u)
        return rest.pow(2).mean() + self.revival(a, rest, dead), u, rest


class BatchTopK(TopK):
    """On average k activations for each cell: the largest of a batch in training (Bussmann et al. 2024).

    Afterwards those above one threshold, so that a cell's concepts do not depend on its batch. It is set on training
    cells, to k activations on average.
    """

    encode = Dictionary.encode

    def keep(self, u: Tensor) -> Tensor:
        return keep_largest(u, self.config.k * len(u))


class Matryoshka(BatchTopK):
    """BatchTopK in which the first concepts must also do without the later ones (Bussmann et al. 2025).

    So the first ones are general, and are not split up when the dictionary grows.
    """

    def loss(self, a: Tensor, dead: Tensor, warm: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Mean over ``prefixes`` of ``MSE(a, reconstruction by the first concepts)``, and the revival of dead ones."""
        u = self.keep(self.pre_activations(a))
        rest, start, errors = a - self.b_d, 0, []
        for end in sorted({max(1, round(share * u.shape[1])) for share in self.config.prefixes}):
            rest = rest - u[:, start:end] @ self.W_d[start:end]
            errors.append(rest.pow(2).mean())
            start = end
        return torch.stack(errors).mean() + self.revival(a, rest, dead), u, rest


class JumpReLU(SAE):
    """Activations above a threshold of their concept, which is learned (Rajamanoharan et al. 2024).

    A step has no gradient, so a threshold t gets that of a straight line of width ``bandwidth`` around it.
    """

    def __init__(self, config: SAEConfig, dim: int):
        super().__init__(config, dim)
        self.log_threshold = nn.Parameter(torch.full((config.n_concepts,), config.bandwidth).log())

    def encode(self, a: Tensor) -> Tensor:
        u = self.pre_activations(a)
        return u * (u > self.log_threshold.exp())

    @torch.no_grad()
    def map_back(self, M: Tensor) -> None:
        length = (self.W_d @ torch.linalg.inv(M)).norm(dim=1)
        super().map_back(M)
        self.log_threshold.add_(length.log())

    def loss(self, a: Tensor, dead: Tensor, warm: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """``MSE(a, a') / Var(a) + warm * l0 * (L0 / k - 1)^2`` and the revival of dead concepts; see :meth:`SAE.loss`.

        Var(a) is the mean squared distance of a coordinate from its mean over the batch, L0 the mean number of active
        concepts of a cell.
        """
        pre, t = self.pre_activations(a), self.log_threshold.exp()
        ramp = ((pre.detach() - t) / self.config.bandwidth + 0.5).clamp(0, 1)
        slope = ramp - ramp.detach()  # 0, with the gradient of the ramp
        on = (pre > t).to(pre.dtype)
        u = pre * on + t.detach() * slope
        rest = a - self.decode(u)
        n_active = (on + slope).sum(1).mean()
        scale = (a - a.mean(0)).pow(2).mean().clamp_min(1e-12)
        loss = (rest.pow(2).mean() + self.revival(a, rest, dead)) / scale
        return loss + warm * self.config.l0 * (n_active / self.config.k - 1).pow(2), u, rest


ARCHITECTURES = {"paper": SAE, "topk": TopK, "batchtopk": BatchTopK, "matryoshka": Matryoshka, "jumprelu": JumpReLU}


def make_sae(config: SAEConfig, dim: int) -> SAE:
    """An untrained dictionary of the architecture ``config.sae`` for embeddings of width ``dim``."""
    return ARCHITECTURES[config.sae](config, dim)


def read_rows(data, start: int, stop: int) -> np.ndarray:
    """A copy in single precision of some rows of a matrix in memory or on disk (``np.memmap``, h5py data set)."""
    block = np.array(data[start:stop], np.float32)
    if isinstance(data, np.memmap) and data.mode == "r":
        data._mmap.madvise(mmap.MADV_DONTNEED)  # else the pages that were read stay in this process's memory
    return block


def keep_largest(u: Tensor, n: int, per_row: bool = False) -> Tensor:
    """Zero all but the ``n`` largest entries of u, over the whole batch or ``n / len(u)`` in each row."""
    flat = u if per_row else u.flatten()
    values, where = flat.topk(min(n // len(u) if per_row else n, flat.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(flat).scatter(-1, where, values).view_as(u)


ABOUT = "about"  # all metadata in one entry: safetensors keeps several in an order that changes from run to run


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write safetensors whole or not at all, with JSON metadata."""
    tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
    with whole(path) as part:
        save_file(tensors, part, {ABOUT: json.dumps(metadata)})


def read_metadata(path: str | Path) -> dict:
    """The JSON metadata of a file from :func:`write_tensors`."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} cannot be read: its metadata are no table")
    return metadata


def save_sae(sae: Dictionary, path: str | Path) -> None:
    """Write the weights (safetensors) with configuration and training history."""
    write_tensors(path, sae.state_dict(), {"config": asdict(sae.config), "history": sae.history.to_dict("list")})


def load_sae(path: str | Path) -> SAE:
    """Open what :func:`save_sae` wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not a dictionary of this package; tensors missing or of the wrong shape.
    """
    return load_tensors(path, lambda config, dim: make_sae(SAEConfig(**config), dim))


def load_tensors(path: str | Path, make: Callable[[dict, int], Dictionary]) -> Dictionary:
    """Fill the dictionary that ``make`` gives for a configuration and a width with the weights of a file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no SAE at {str(path)!r}: run chapter 02_sae (or `make book`) first")
    metadata = read_metadata(path)
    if "config" not in metadata:
        raise ValueError(f"{path} carries no SAE configuration; was it written by scsae_utils.sae.save_sae?")
    tensors = load_file(path)
    if "b_d" not in tensors:
        raise ValueError(f"{path} lacks the tensor b_d")
    try:
        dictionary = make(metadata["config"], len(tensors["b_d"]))
        dictionary.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit its configuration: {error}") from error
    dictionary.history = pd.DataFrame(metadata.get("history", {}))
    return dictionary.eval().requires_grad_(False)
