"""Training of sparse autoencoders: one or several in one pass over embeddings that may lie on disk (paper A.3)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from anndata import AnnData
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from .encoder import find_device
from .sae import SAE, BatchTopK, SAEConfig, make_sae, read_metadata, read_rows, write_tensors
from .sparse_training import Step, can_be_sparse, sparse_step

STRETCH = 1024  # consecutive cells that are read at once
GROUP = 65_536  # cells that are in memory and shuffled at once
SAMPLE = 4096  # cells for the start of b_d, the threshold, and the loss on held-out cells


def training_step(sae: SAE, optimizer: torch.optim.Adam, a: Tensor, dead: Tensor, warm: float = 1.0) -> Step:
    """One step on a batch a (n, d); see :meth:`SAE.loss`. Sparse where that is quicker, dense by autograd elsewhere."""
    done = sparse_step(sae, optimizer, a, warm) if can_be_sparse(sae) else None
    if done is None:
        done = dense_gradients(sae, a, dead, warm)
        step(sae, optimizer)
    return done


def dense_gradients(sae: SAE, a: Tensor, dead: Tensor, warm: float = 1.0) -> Step:
    """Fill ``.grad`` of every parameter with the gradient of :meth:`SAE.loss` for a batch a (n, d), by autograd."""
    sae.zero_grad()
    with torch.autocast(a.device.type, torch.bfloat16, enabled=sae.config.precision == "bf16"):
        loss, u, rest = sae.loss(a, dead, warm)
    loss.backward()
    on = u.detach() > 0
    return Step(loss.item(), rest.detach().pow(2).sum().item(), on.any(0), int(on.sum()))


class Rows:
    """Rows of a matrix (n, d) in memory or on disk (``np.memmap``, an h5py data set), read a piece at a time."""

    def __init__(self, data, rows: np.ndarray | None = None):
        """``rows``: numbers of those to use, rising; None: all."""
        if len(data.shape) != 2 or (len(data) if rows is None else len(rows)) < 2:
            shape = tuple(data.shape) if rows is None else (len(rows), *data.shape[1:])
            raise ValueError(f"needs a matrix of at least two cell embeddings, got shape {shape}")
        self.data, self.rows, self.dim = data, rows, data.shape[1]

    def __len__(self) -> int:
        return len(self.data) if self.rows is None else len(self.rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy (stop - start, d) in single precision."""
        if self.rows is None:
            return read_rows(self.data, start, stop)
        # consecutive rows, of which some are taken: a data set on disk has no quick access to single rows
        rows = self.rows[start:stop]
        return read_rows(self.data, rows[0], rows[-1] + 1)[rows - rows[0]]

    def survey(self) -> tuple[float, str]:
        """Sum over cells of ||a - mean(a)||^2, and a digest of the values, in one pass.

        Raises
        ------
        ValueError
            If a value is NaN or infinite, or all cells are the same.
        """
        digest, n, mean, total = hashlib.sha256(), 0, np.zeros(self.dim), 0.0
        for i in range(0, len(self), STRETCH):
            block = self.read(i, min(i + STRETCH, len(self)))
            if not np.isfinite(block).all():
                raise ValueError("cell embeddings hold NaN or infinite values")
            digest.update(block)
            block = block.astype(np.float64)
            step = block.mean(0) - mean  # Chan et al. 1979: moments of the parts put together
            total += ((block - block.mean(0)) ** 2).sum() + (step**2).sum() * n * len(block) / (n + len(block))
            n += len(block)
            mean += step * len(block) / n
        if total == 0:
            raise ValueError("all cell embeddings are the same")
        return float(total), digest.hexdigest()

    def batches(self, batch_size: int, seed) -> Iterator[Tensor]:
        """Every row once, in batches, in an order that depends on ``seed`` alone.

        Stretches of consecutive rows are taken in random order; a group of them is read and shuffled at a time. All
        rows are one group if they are few.
        """
        rng = np.random.default_rng(seed)
        starts = rng.permutation(np.arange(0, len(self), STRETCH))
        size = self.group(batch_size) // STRETCH
        for i in range(0, len(starts), size):
            rows = np.concatenate([self.read(s, min(s + STRETCH, len(self))) for s in starts[i : i + size]])
            yield from torch.from_numpy(rows[rng.permutation(len(rows))]).split(batch_size)

    def group(self, batch_size: int) -> int:
        """Rows of a group: a multiple of STRETCH, and no fewer than a batch."""
        return max(GROUP, math.ceil(batch_size / STRETCH) * STRETCH)


@dataclass
class Trainee:
    """A dictionary in training, and all that its training needs to go on."""

    sae: SAE
    optimizer: torch.optim.Optimizer
    silent: Tensor  # epochs since a concept was last active
    map: Tensor | None = None  # (d, d) of whitening: the dictionary in training is of a @ map
    history: list[dict] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)  # weights of the best epoch, with patience
    best_epoch: int = 0

    def view(self, a: Tensor) -> Tensor:
        """Embeddings a (n, d) as this dictionary is trained on them."""
        return a if self.map is None else a @ self.map

    @property
    def done(self) -> bool:
        config, epochs = self.sae.config, len(self.history)
        return epochs >= config.epochs or (config.patience > 0 and epochs - self.best_epoch >= config.patience)


def train_sae(
    cells,
    config: SAEConfig | None = None,
    key: str = "X_scGPT",
    held_out=None,
    checkpoint=None,
    progress=True,
    device=None,
    **settings,
) -> SAE:
    """Train a dictionary on cell embeddings: :func:`train_saes` with one configuration.

    Parameters
    ----------
    config
        Or its fields as keywords: ``train_sae(adata, sae="batchtopk", n_concepts=512, k=12)``.
    """
    if config is not None and settings:
        raise ValueError("give a config or its fields, not both")
    return train_saes(cells, [config or SAEConfig(**settings)], key, held_out, checkpoint, progress, device=device)[0]


@contextmanager
def without_denormals():
    """Tiny numbers count as zero: the optimiser's moments of silent concepts would slow every step tenfold."""
    before = (torch.tensor([1e-40]) * 1).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@without_denormals()
def train_saes(
    cells,
    configs: Sequence[SAEConfig],
    key: str = "X_scGPT",
    held_out=None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    checkpoint_every: float = 60,
    device: str | None = None,
) -> list[SAE]:
    """Train several dictionaries in one pass over the cells: each batch is read once and given to all.

    Each is the same as if it had been trained alone. Memory does not grow with the number of cells if these lie on
    disk. The ``paper`` architecture is trained by :func:`scsae_utils.sparse_training.sparse_step` on a CPU if the
    dictionary is large, in each batch that has few active concepts; the result is the same up to rounding.

    Parameters
    ----------
    cells
        AnnData with embeddings in ``obsm[key]``; if ``obs["split"]`` is there, its ``"train"`` cells are used, and its
        ``"validation"`` cells are ``held_out``. Or a matrix (n, d): an array, ``np.memmap`` or h5py data set.
    configs
        They may differ in all but ``batch_size`` and ``order_seed``.
    held_out
        Matrix (m, d) of cells whose loss is in the history, and is what ``patience`` watches. At most 4,096 of them
        are used, drawn at random.
    checkpoint
        File that training goes on from, if it was stopped; the result is the same as without a stop. It is deleted at
        the end.
    checkpoint_every
        Seconds between two writings of it, which come at the end of an epoch.
    device
        Of the training, see :func:`~scsae_utils.encoder.find_device`; None: the one that the cells were embedded on,
        if ``cells`` say so (``uns["scgpt"]``), else the CPU. The dictionaries come back to the CPU.

    Returns
    -------
    SAEs in evaluation mode. ``history`` has one row an epoch: epoch, loss, variance_explained, concepts_per_cell (of
    training cells, in the course of the epoch), and where cells are held out held_out_loss (MSE) and
    held_out_variance_explained (after the epoch). With ``whiten`` they are of the whitened embeddings.

    Raises
    ------
    ValueError
        Settings that cannot be; embeddings that are not finite; fewer than two cells; a checkpoint of another run.
    """
    device = find_device(device or getattr(cells, "uns", {}).get("scgpt", {}).get("device", "cpu"))
    data, held_out = rows_of(cells, key, held_out)
    batch_size, order_seed = one_pass(configs, held_out)
    total, digest = data.survey()
    sample = next(data.batches(SAMPLE, [order_seed])).to(device)
    watched = None if held_out is None else next(held_out.batches(SAMPLE, [order_seed])).to(device)
    if watched is not None:
        digest = hashlib.sha256(digest.encode() + watched.cpu().numpy().tobytes()).hexdigest()

    median = geometric_median(sample)
    trainees = [start(config, median, sample) for config in configs]
    if checkpoint is not None and Path(checkpoint).is_file():
        load_checkpoint(checkpoint, trainees, digest)
    first, n_epochs = max(len(t.history) for t in trainees), max(c.epochs for c in configs)
    written = time.monotonic()
    bar = tqdm(
        range(first, n_epochs), "training SAE", initial=first, total=n_epochs, unit="epoch", disable=not progress
    )
    for epoch in bar:
        running = [t for t in trainees if not t.done]
        if not running:
            break
        train_epoch(running, data.batches(batch_size, [order_seed, epoch]), len(data), total, device)
        if watched is not None:
            for trainee in running:
                watch(trainee, watched)
        bar.set_postfix(variance_explained=f"{running[0].history[-1]['variance_explained']:.3f}", refresh=False)
        if checkpoint is not None and time.monotonic() - written >= checkpoint_every:
            save_checkpoint(checkpoint, trainees, digest)
            written = time.monotonic()
    for trainee in trainees:
        finish(trainee, sample)
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return [t.sae for t in trainees]


def rows_of(cells, key: str, held_out) -> tuple[Rows, Rows | None]:
    """The cells to train on, and those held out."""
    if not isinstance(cells, AnnData):
        return Rows(cells), None if held_out is None else Rows(held_out)
    if key not in cells.obsm:
        raise ValueError(
            f"obsm has no {key!r}: run scsae_utils.embed first (obsm has: {', '.join(cells.obsm) or 'nothing'})"
        )
    a = cells.obsm[key]
    if "split" not in cells.obs:
        return Rows(a), None if held_out is None else Rows(held_out)
    train, rest = (np.flatnonzero(cells.obs["split"] == name) for name in ("train", "validation"))
    if held_out is None and len(rest) > 1:
        return Rows(a, train), Rows(a, rest)
    return Rows(a, train), None if held_out is None else Rows(held_out)


def one_pass(configs: Sequence[SAEConfig], held_out: Rows | None) -> tuple[int, int]:
    """The batch size and order that all configurations share, or an error."""
    if not configs:
        raise ValueError("give at least one configuration")
    shared = {(c.batch_size, c.order_seed) for c in configs}
    if len(shared) > 1:
        raise ValueError(f"one pass has one batch_size and order_seed, not {sorted(shared)}")
    if held_out is None and any(c.patience for c in configs):
        raise ValueError("patience needs held-out cells: give held_out, or obs['split'] with validation cells")
    return shared.pop()


def start(config: SAEConfig, median: Tensor, sample: Tensor) -> Trainee:
    """An untrained dictionary whose ``b_d`` is the geometric median of the embeddings, on the device of that."""
    map = whitening(sample.cpu(), config.whiten).to(sample.device) if config.whiten else None  # in double precision
    sae = make_sae(config, len(median)).to(median.device)
    with torch.no_grad():
        sae.b_d.copy_(median if map is None else median @ map)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate, fused=True)
    return Trainee(sae, optimizer, torch.zeros(config.n_concepts, device=median.device), map)


def whitening(a: Tensor, power: float, floor: float = 1e-4) -> Tensor:
    """Symmetric map (d, d) that scales directions of variance v by ``v ** (-power / 2)``, keeping the total variance.

    Variances, of the cells a (n, d), below ``floor`` times the largest count as that.
    """
    variance, directions = torch.linalg.eigh(torch.cov(a.double().T))
    scale = variance.clamp_min(floor * variance.max()) ** (-power / 2)
    scale *= (variance.sum() / (variance * scale**2).sum()).sqrt()
    return (directions * scale @ directions.T).to(a.dtype)


def train_epoch(trainees: list[Trainee], batches: Iterator[Tensor], n: int, total: float, device: torch.device) -> None:
    """One pass over the batches, of ``n`` cells in all; ``total`` is their sum of squares about the mean."""
    configs = [t.sae.config for t in trainees]
    epoch, n_batches = len(trainees[0].history), math.ceil(n / configs[0].batch_size)
    sums = np.zeros((len(trainees), 3))
    fired = [torch.zeros_like(t.silent, dtype=torch.bool) for t in trainees]
    dead = [t.silent >= (c.dead_epochs or math.inf) for t, c in zip(trainees, configs)]
    for b, a in enumerate(batches):
        a = a.to(device)
        for i, (trainee, config) in enumerate(zip(trainees, configs)):
            done = min(1.0, (epoch + (b + 1) / n_batches) / config.epochs)  # share of the training
            warm = min(1.0, done / config.warmup) if config.warmup else 1.0
            cool = min(1.0, (1 - done) / config.decay) if config.decay else 1.0
            trainee.optimizer.param_groups[0]["lr"] = config.learning_rate * warm * cool
            result = training_step(trainee.sae, trainee.optimizer, trainee.view(a), dead[i], warm)
            sums[i] += result.loss * len(a), result.squared_error, result.n_active
            fired[i] |= result.fired
    for trainee, each, (loss, error, active) in zip(trainees, fired, sums):
        trainee.silent = torch.where(each, torch.zeros_like(trainee.silent), trainee.silent + 1)
        row = {"loss": loss / n, "variance_explained": 1 - error / total, "concepts_per_cell": active / n}
        trainee.history.append({"epoch": epoch + 1} | row)


def step(sae: SAE, optimizer: torch.optim.Optimizer) -> None:
    """One step that keeps every concept's vector on the unit sphere: the gradient along it is removed first."""
    with torch.no_grad():
        if sae.config.train_decoder:
            along = (sae.W_d.grad * sae.W_d).sum(1, keepdim=True)
            sae.W_d.grad -= along * sae.W_d
        optimizer.step()
        if sae.config.train_decoder:
            sae.W_d.copy_(F.normalize(sae.W_d, dim=1))


@torch.no_grad()
def watch(trainee: Trainee, a: Tensor) -> None:
    """The loss on held-out cells a (m, d), into the history; with patience, the best weights are put aside."""
    sae, row, a = trainee.sae, trainee.history[-1], trainee.view(a)
    rest = sae.loss(a, torch.zeros_like(trainee.silent, dtype=torch.bool))[2]
    row["held_out_loss"] = rest.pow(2).mean().item()
    variance = (a - a.mean(0)).pow(2).mean().item() or math.nan
    row["held_out_variance_explained"] = 1 - row["held_out_loss"] / variance
    best = trainee.history[trainee.best_epoch - 1]["held_out_loss"] if trainee.best_epoch else math.inf
    if sae.config.patience and row["held_out_loss"] < best:
        trainee.best_epoch = row["epoch"]
        trainee.best = {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def finish(trainee: Trainee, sample: Tensor) -> None:
    """The best weights, a threshold that suits them, and the history; ``sample`` (m, d) is of the training cells."""
    sae = trainee.sae
    sae.load_state_dict(trainee.best or sae.state_dict())
    if isinstance(sae, BatchTopK):
        sae.calibrate(trainee.view(sample), sae.config.k)
    if trainee.map is not None:
        sae.map_back(trainee.map)
    sae.history = pd.DataFrame(trainee.history)
    sae.cpu().eval().requires_grad_(False)


def geometric_median(x: Tensor, iterations: int = 50) -> Tensor:
    """Point (d,) with the least sum of distances to the rows of x (n, d) (Weiszfeld's method): the start of ``b_d``."""
    y = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - y).norm(dim=1).clamp_min(1e-8)
        y = (weight[:, None] * x).sum(0) / weight.sum()
    return y


def save_checkpoint(path: str | Path, trainees: list[Trainee], digest: str = "") -> None:
    """Everything that training needs to go on as if it had not stopped; ``digest`` is of the cells' embeddings."""
    tensors, metadata = {}, {"digest": digest, "configs": [asdict(t.sae.config) for t in trainees]}
    for i, t in enumerate(trainees):
        state = t.optimizer.state_dict()["state"]
        tensors |= {f"{i}.sae.{name}": tensor for name, tensor in t.sae.state_dict().items()}
        tensors |= {f"{i}.adam.{p}.{name}": tensor for p, s in state.items() for name, tensor in s.items()}
        tensors |= {f"{i}.best.{name}": tensor for name, tensor in t.best.items()}
        tensors[f"{i}.silent"] = t.silent
    metadata |= {"history": [t.history for t in trainees], "best_epoch": [t.best_epoch for t in trainees]}
    write_tensors(path, tensors, metadata)


def load_checkpoint(path: str | Path, trainees: list[Trainee], digest: str = "") -> None:
    """Put a checkpoint back into trainees that were just started."""
    metadata = read_metadata(path)
    if metadata.get("configs") != json.loads(json.dumps([asdict(t.sae.config) for t in trainees])):
        raise ValueError(f"the checkpoint {path} is of a run with other settings: delete it to start anew")
    if metadata.get("digest") != digest:
        raise ValueError(f"the checkpoint {path} is of a run on other embeddings: delete it to start anew")
    tensors = load_file(path)
    for i, t in enumerate(trainees):
        parts: dict[str, dict[str, Tensor]] = {"sae": {}, "adam": {}, "best": {}}
        for name in (n for n in tensors if n.startswith(f"{i}.") and n != f"{i}.silent"):
            _, part, key = name.split(".", 2)
            parts[part][key] = tensors[name]
        t.sae.load_state_dict(parts["sae"])
        state: dict[int, dict] = {}
        for key, tensor in parts["adam"].items():
            p, name = key.split(".")
            state.setdefault(int(p), {})[name] = tensor
        t.optimizer.load_state_dict({"state": state, "param_groups": t.optimizer.state_dict()["param_groups"]})
        for parameter, kept in t.optimizer.state.items():  # laid out as the parameter is, which W_e has by columns
            kept |= {k: torch.empty_like(parameter).copy_(kept[k]) for k in ("exp_avg", "exp_avg_sq")}
        t.best, t.best_epoch = parts["best"], metadata["best_epoch"][i]
        t.silent, t.history = tensors[f"{i}.silent"].to(t.silent.device), metadata["history"][i]
