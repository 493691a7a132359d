"""The sparse autoencoder: a dictionary of concepts for cell embeddings (paper Sec. 2.2, A.3).

``u = f(a)`` are a cell's concept activations, ``a' = g(u) = u W_d + b_d`` its reconstruction; every concept's row of
``W_d`` has unit norm. Architectures differ in how ``f`` is made sparse:

- ``paper``: ReLU, and an L1 penalty on the activations in the loss;
- ``topk``: the k largest activations of each cell (Gao et al. 2024);
- ``batchtopk``: on average k activations for each cell, the largest of a batch while training; afterwards those above
  a fixed threshold, so that a cell's concepts do not depend on its batch (Bussmann et al. 2024).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from anndata import AnnData
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from scipy import sparse
from torch import Tensor, nn
from tqdm.auto import tqdm

ARCHITECTURES = ("paper", "topk", "batchtopk")


@dataclass(frozen=True)
class SAEConfig:
    """How a dictionary is made and trained. The defaults are the paper's.

    Parameters
    ----------
    sae
        Architecture: ``paper``, ``topk`` or ``batchtopk``.
    n_concepts
        Size c of the dictionary.
    batch_size, learning_rate, epochs
        Of training by Adam.
    l1
        Weight lambda_s of the L1 penalty (``paper`` only).
    k
        Active concepts of a cell (``topk``), on average (``batchtopk``).
    dead_epochs
        A concept that was silent for so many epochs is dead, and is trained to explain what the living ones leave
        (``topk`` and ``batchtopk``; the auxiliary loss of Gao et al. 2024). 0 switches this off.
    seed
        Of the start and of the order of the cells.
    """

    sae: str = "paper"
    n_concepts: int = 10_000
    batch_size: int = 1024
    learning_rate: float = 1e-6
    epochs: int = 1000
    l1: float = 5e-5
    k: int = 32
    dead_epochs: int = 10
    seed: int = 0

    def __post_init__(self):
        if self.sae not in ARCHITECTURES:
            raise ValueError(f"sae must be one of {', '.join(ARCHITECTURES)}, not {self.sae!r}")
        for name in ("n_concepts", "batch_size", "epochs", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.learning_rate > 0 or self.l1 < 0 or self.dead_epochs < 0:
            raise ValueError("learning_rate must be positive, l1 and dead_epochs must not be negative")
        if self.sae != "paper" and self.k > self.n_concepts:
            raise ValueError(f"k = {self.k} active concepts out of n_concepts = {self.n_concepts} cannot be")


class SAE(nn.Module):
    """Encoder f and decoder g.

    Parameters
    ----------
    config
        Size and architecture.
    dim
        Width d of the cell embedding.

    Attributes
    ----------
    W_e (d, c), b_e (c,), W_d (c, d), b_d (d,)
        As in the paper; rows of ``W_d`` have unit norm.
    threshold
        Activations at or below it are zero after training (``batchtopk``; else 0).
    history
        Table of training: epoch, loss, variance_explained (training cells), concepts_per_cell.
    """

    def __init__(self, config: SAEConfig, dim: int):
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        directions = F.normalize(torch.randn(config.n_concepts, dim, generator=generator), dim=1)
        self.W_d = nn.Parameter(directions)
        self.W_e = nn.Parameter(directions.T.contiguous().clone())
        self.b_e = nn.Parameter(torch.zeros(config.n_concepts))
        self.b_d = nn.Parameter(torch.zeros(dim))
        self.register_buffer("threshold", torch.zeros(()))
        self.history = pd.DataFrame()

    def pre_activations(self, a: Tensor) -> Tensor:
        """(n, c) activations before they are made sparse beyond the ReLU."""
        return F.relu((a - self.b_d) @ self.W_e + self.b_e)

    def encode(self, a: Tensor) -> Tensor:
        """Concept activations u = f(a), (n, c), of cell embeddings a (n, d)."""
        u = self.pre_activations(a)
        if self.config.sae == "topk":
            return keep_largest(u, self.config.k * len(u), per_row=True)
        if self.config.sae == "batchtopk":
            return u * (u > self.threshold)
        return u

    def decode(self, u: Tensor) -> Tensor:
        """Reconstruction a' = g(u), (n, d), of concept activations u (n, c)."""
        return u @ self.W_d + self.b_d

    def decode_sparse(self, U: sparse.csr_matrix) -> np.ndarray:
        """Reconstruction (n, d) of sparse activations (n, c), as from :meth:`activations`."""
        return U @ self.W_d.detach().numpy() + self.b_d.detach().numpy()

    def activations(self, embeddings: np.ndarray, batch_size: int = 8192) -> sparse.csr_matrix:
        """Sparse (n, c) activations of an array of cell embeddings (n, d)."""
        with torch.inference_mode():
            parts = [
                sparse.csr_matrix(
                    self.encode(torch.from_numpy(np.asarray(embeddings[i : i + batch_size], np.float32))).numpy()
                )
                for i in range(0, len(embeddings), batch_size)
            ]
        return sparse.vstack(parts, format="csr")


def keep_largest(u: Tensor, n: int, per_row: bool = False) -> Tensor:
    """Zero all but the ``n`` largest entries of u, over the whole batch or ``n / len(u)`` in each row."""
    flat = u if per_row else u.flatten()
    values, where = flat.topk(min(n // len(u) if per_row else n, flat.shape[-1]), dim=-1)
    return torch.zeros_like(flat).scatter(-1, where, values).view_as(u)


def training_loss(sae: SAE, a: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of a batch (n, d) and its activations (n, c).

    ``paper``: MSE(a, a') + l1 * mean over cells of ||u||_1, the MSE being the mean over cells and coordinates.
    Others: MSE(a, a') + 1/32 MSE(a - a', reconstruction of the rest by ``dead`` (c,) concepts alone).
    """
    config = sae.config
    u = sae.pre_activations(a)
    if config.sae == "paper":
        return F.mse_loss(sae.decode(u), a) + config.l1 * u.sum(1).mean(), u
    active = keep_largest(u, config.k * len(a), per_row=config.sae == "topk")
    rest = a - sae.decode(active)
    loss = rest.pow(2).mean()
    if dead.any():
        idle = ((a - sae.b_d) @ sae.W_e[:, dead] + sae.b_e[dead]).relu()
        idle = keep_largest(idle, min(2 * config.k, idle.shape[1]) * len(a), per_row=True)
        loss = loss + (rest.detach() - idle @ sae.W_d[dead]).pow(2).mean() / 32
    return loss, active


def train_sae(
    cells: AnnData | np.ndarray,
    config: SAEConfig | None = None,
    key: str = "X_scGPT",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
    **settings,
) -> SAE:
    """Train a dictionary on cell embeddings.

    Parameters
    ----------
    cells
        AnnData with embeddings in ``obsm[key]``; if ``obs["split"]`` is there, only its ``"train"`` cells are used.
        Or an array (n, d).
    config
        Or its fields as keywords: ``train_sae(adata, sae="batchtopk", n_concepts=512, k=12)``.
    checkpoint
        File that training is kept in every ``checkpoint_every`` epochs and goes on from, if it stopped; the result
        is the same as without a stop. It is deleted at the end.

    Returns
    -------
    SAE in evaluation mode, with its ``history``.

    Raises
    ------
    ValueError
        Settings that cannot be; embeddings that are not finite; fewer than two cells; a checkpoint of another run.
    """
    if config is not None and settings:
        raise ValueError("give a config or its fields, not both")
    config = config or SAEConfig(**settings)
    if isinstance(cells, AnnData):
        if key not in cells.obsm:
            raise ValueError(
                f"obsm has no {key!r}: run scsae_utils.embed first (obsm has: {', '.join(cells.obsm) or 'nothing'})"
            )
        train = (cells.obs["split"] == "train").to_numpy() if "split" in cells.obs else slice(None)
        cells = cells.obsm[key][train]
    data = torch.from_numpy(np.ascontiguousarray(cells, np.float32))
    if data.ndim != 2 or len(data) < 2:
        raise ValueError(f"needs a matrix of at least two cell embeddings, got shape {tuple(data.shape)}")
    if not data.isfinite().all():
        raise ValueError("cell embeddings hold NaN or infinite values")

    torch.set_flush_denormal(True)  # the optimiser's moments of silent concepts would slow every step tenfold
    sae = SAE(config, data.shape[1])
    with torch.no_grad():
        sae.b_d.copy_(geometric_median(data))
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate)
    silent = torch.zeros(config.n_concepts)  # epochs since a concept was last active
    history: list[dict] = []
    first = 0
    digest = hashlib.sha256(data.numpy()).hexdigest() if checkpoint is not None else ""
    if checkpoint is not None and Path(checkpoint).is_file():
        first, silent, history = load_checkpoint(checkpoint, sae, optimizer, digest)
    total = (data - data.mean(0)).pow(2).sum().item()
    bar = tqdm(
        range(first, config.epochs),
        initial=first,
        total=config.epochs,
        desc="training SAE",
        unit="epoch",
        disable=not progress,
    )
    for epoch in bar:
        order = torch.from_numpy(np.random.default_rng([config.seed, epoch]).permutation(len(data)))
        fired = torch.zeros(config.n_concepts, dtype=torch.bool)
        losses = error = active = 0.0
        for rows in order.split(config.batch_size):
            a = data[rows]
            loss, u = training_loss(sae, a, silent >= config.dead_epochs if config.dead_epochs else silent < 0)
            optimizer.zero_grad()
            loss.backward()
            with torch.no_grad():  # the history is of the weights that the loss is of
                fired |= (u > 0).any(0)
                losses += loss.item() * len(a)
                error += (sae.decode(u) - a).pow(2).sum().item()
                active += (u > 0).sum().item()
                if config.sae == "batchtopk":  # running mean of the smallest activation that was kept
                    smallest = u[u > 0].min() if (u > 0).any() else sae.threshold
                    sae.threshold.copy_(smallest if epoch == 0 else 0.99 * sae.threshold + 0.01 * smallest)
            step(sae, optimizer)
        silent = torch.where(fired, torch.zeros_like(silent), silent + 1)
        history.append(
            {
                "epoch": epoch + 1,
                "loss": losses / len(data),
                "variance_explained": 1 - error / total,
                "concepts_per_cell": active / len(data),
            }
        )
        bar.set_postfix(variance_explained=f"{history[-1]['variance_explained']:.3f}", refresh=False)
        if checkpoint is not None and (epoch + 1) % checkpoint_every == 0 and epoch + 1 < config.epochs:
            save_checkpoint(checkpoint, sae, optimizer, epoch + 1, silent, history, digest)
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    sae.history = pd.DataFrame(history)
    return sae.eval().requires_grad_(False)


def step(sae: SAE, optimizer: torch.optim.Optimizer) -> None:
    """One step that keeps every concept's vector on the unit sphere: the gradient along it is removed first."""
    with torch.no_grad():
        along = (sae.W_d.grad * sae.W_d).sum(1, keepdim=True)
        sae.W_d.grad -= along * sae.W_d
        optimizer.step()
        sae.W_d.copy_(F.normalize(sae.W_d, dim=1))


def geometric_median(x: Tensor, iterations: int = 50) -> Tensor:
    """Point (d,) with the least sum of distances to the rows of x (n, d) (Weiszfeld's method): the start of ``b_d``."""
    y = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - y).norm(dim=1).clamp_min(1e-8)
        y = (weight[:, None] * x).sum(0) / weight.sum()
    return y


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write safetensors whole or not at all, with JSON metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(
        {k: v.detach().contiguous() for k, v in tensors.items()}, part, {k: json.dumps(v) for k, v in metadata.items()}
    )
    part.replace(path)


def read_metadata(path: str | Path) -> dict:
    """The JSON metadata of a file from :func:`write_tensors`."""
    try:
        with safe_open(str(path), "pt") as file:
            return {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def save_sae(sae: SAE, path: str | Path) -> None:
    """Write the weights (safetensors) with configuration and training history."""
    write_tensors(path, sae.state_dict(), {"config": asdict(sae.config), "history": sae.history.to_dict("list")})


def load_sae(path: str | Path) -> SAE:
    """Open what :func:`save_sae` wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not an SAE of this package; tensors missing or of the wrong shape.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no SAE at {str(path)!r}: run chapter 02_sae (or `make book`) first")
    metadata = read_metadata(path)
    if "config" not in metadata:
        raise ValueError(f"{path} carries no SAE configuration; was it written by scsae_utils.sae.save_sae?")
    tensors = load_file(path)
    if "b_d" not in tensors:
        raise ValueError(f"{path} lacks the tensor b_d")
    try:
        sae = SAE(SAEConfig(**metadata["config"]), len(tensors["b_d"]))
        sae.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit its configuration: {error}") from error
    sae.history = pd.DataFrame(metadata.get("history", {}))
    return sae.eval().requires_grad_(False)


def save_checkpoint(
    path, sae: SAE, optimizer, epoch: int, silent: Tensor, history: list[dict], digest: str = ""
) -> None:
    """Everything that training needs to go on as if it had not stopped; ``digest`` is of the cells' embeddings."""
    state = optimizer.state_dict()["state"]
    tensors = (
        dict(sae.state_dict())
        | {f"adam.{i}.{k}": v for i, s in state.items() for k, v in s.items()}
        | {"silent": silent}
    )
    metadata = {"config": asdict(sae.config), "epoch": epoch, "history": history, "digest": digest}
    write_tensors(path, tensors, metadata)


def load_checkpoint(path, sae: SAE, optimizer, digest: str = "") -> tuple[int, Tensor, list[dict]]:
    """Put a checkpoint back; returns the epochs done, the silence of each concept and the history."""
    metadata = read_metadata(path)
    if metadata.get("config") != asdict(sae.config):
        raise ValueError(f"the checkpoint {path} is of a run with other settings: delete it to start anew")
    if metadata.get("digest") != digest:
        raise ValueError(f"the checkpoint {path} is of a run on other embeddings: delete it to start anew")
    tensors = load_file(path)
    sae.load_state_dict({k: tensors[k] for k in sae.state_dict()})
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict] = {}
    for name in (n for n in tensors if n.startswith("adam.")):
        _, i, key = name.split(".", 2)
        state.setdefault(int(i), {})[key] = tensors[name]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return metadata["epoch"], tensors["silent"], metadata["history"]
