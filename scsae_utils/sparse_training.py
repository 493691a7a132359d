"""A training step of the paper's objective that costs what its few active concepts cost.

Of ten thousand concepts a cell activates a few dozen. Only the product of the encoder has to look at all of them; the
reconstruction and all gradients are sums over the active pairs of a cell and a concept. The product may be of low
precision: a bound of its error leaves *candidates*, whose activations are then computed in single precision. So the
active concepts, the loss and the gradients are those of autograd (:func:`scsae_utils.training.dense_gradients`) up to
rounding in single precision. Reading and writing weights and moments is most of what is left, so that gradient,
projection, Adam and unit norm of a concept are done while its rows are in the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from .embedding import quick_type
from .sae import SAE

DENSEST = 0.2  # share of candidates up to which the sparse step is the quicker one, at all sizes that were tried
SMALLEST = 2**16  # entries of W_e; a smaller dictionary is not worth loading compiled code
BLOCK = 64  # concepts; each block has its own partial sum, so that no result depends on the number of threads
TINY = np.finfo(np.float32).tiny

# Sums may be reordered to use vectors; NaN and infinity keep their meaning, so that diverging training shows.
kernel = njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz"})


@dataclass(frozen=True)
class Step:
    """What a training step tells of its batch.

    Parameters
    ----------
    loss
        That the gradients are of.
    squared_error
        Sum over cells and coordinates of (a - a')^2.
    fired
        (c,) mask of the concepts that are active in some cell.
    n_active
        Number of pairs of a cell and an active concept.
    """

    loss: float
    squared_error: float
    fired: Tensor
    n_active: int


def can_be_sparse(sae: SAE) -> bool:
    """Whether :func:`sparse_step` fits this dictionary, and is worth trying."""
    config, on_cpu = sae.config, sae.W_e.device.type == "cpu"
    large = sae.W_e.numel() >= SMALLEST
    return config.sae == "paper" and config.precision == "fp32" and config.train_decoder and on_cpu and large


@torch.no_grad()
def sparse_step(
    sae: SAE, optimizer: torch.optim.Adam, a: Tensor, warm: float = 1.0, dtype: torch.dtype | None = None
) -> Step | None:
    """One step of training on a batch a (n, d): gradients of :meth:`SAE.loss`, projection, Adam, unit norm.

    ``optimizer`` gives the settings and keeps moments and counts, as if it had made the step.

    Parameters
    ----------
    warm
        See :meth:`SAE.loss`.
    dtype
        Of the encoder's product; None: what is quickest here. The result does not depend on it.

    Returns
    -------
    None, and nothing was done, if more than the share ``DENSEST`` of all pairs are candidates.
    """
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    n, d = a.shape
    x = a - sae.b_d
    rough, floor = rough_product(sae, x, dtype or quick_type())
    start = np.zeros(len(floor) + 1, np.int64)
    count_candidates(rough, floor, start[1:])
    np.cumsum(start, out=start)
    if start[-1] > DENSEST * rough.size:
        return None

    W_e, b_e, W_d, b_d = (p.detach() for p in (sae.W_e.T, sae.b_e, sae.W_d, sae.b_d))
    cells, u, n_active = activate(rough, floor, start, x.numpy(), W_e.numpy(), b_e.numpy())
    error, squared, l1 = decode(a.numpy(), b_d.numpy(), W_d.numpy(), *by_cell(start, n_active, cells, u, n))
    scale, penalty = 2 / (n * d), warm * sae.config.l1 / n
    error *= np.float32(scale)

    group, moments = optimizer.param_groups[0], [adam_state(optimizer, p) for p in (sae.W_e, sae.b_e, sae.W_d)]
    (m_e, v_e), (m_b, v_b), (m_d, v_d) = moments
    beta1, beta2 = group["betas"]
    t = optimizer.state[sae.b_e]["step"].item()
    adam = (beta1, beta2, group["lr"] / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t), group["eps"])
    encoder, bias, decoder = (W_e, m_e.T, v_e.T), (b_e, m_b, v_b), (W_d, m_d, v_d)
    arrays = (tensor.numpy() for tensor in (*encoder, *bias, *decoder))
    to_b_d = update(
        start, n_active, cells, u, x.numpy(), error, np.float32(penalty), np.array(adam, np.float32), *arrays
    )
    optimizer.zero_grad()
    sae.b_d.grad = torch.from_numpy(error.sum(0) - to_b_d.sum(0))
    optimizer.step()  # b_d's: the others have no gradient
    loss = squared.sum() / (n * d) + penalty * l1.sum()
    return Step(float(loss), float(squared.sum()), torch.from_numpy(n_active > 0), int(n_active.sum()))


def rough_product(sae: SAE, x: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """``x W_e`` as (c, n) in ``dtype``, and what (c,) it reaches where the activation may be above 0; as integers.

    Rounding x and w to a unit roundoff r moves their product by at most (2 r + r^2) ||x|| ||w||, and a sum of d terms
    in single precision, be it the rough or the exact one, by d 2^-24 ||x|| ||w|| (Higham 2002, Sec. 3.1). Rounding the
    result keeps the order, so that the bound is rounded likewise. The bits of floats are ordered like integers, but
    for the negative ones, whose order :func:`ordered` turns.
    """
    r, d, W = torch.finfo(dtype).eps / 2, x.shape[1], sae.W_e.T
    bound = (2 * r + r * r + d * 2**-22) * torch.linalg.vector_norm(x, dim=1).max()
    floor = (-sae.b_e - bound * torch.linalg.vector_norm(W, dim=1)).to(dtype)
    integer = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    return (W.to(dtype) @ x.to(dtype).T).view(integer).numpy(), floor.view(integer).numpy()


def adam_state(optimizer: torch.optim.Adam, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moment of a parameter, whose step is counted; made as the optimiser makes them."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    return state["exp_avg"], state["exp_avg_sq"]


@njit(inline="always")
def ordered(bits, size):
    """Integers in the order of the floats of ``size`` bytes with these bits."""
    return bits ^ ((bits >> (8 * size - 1)) & ((1 << (8 * size - 1)) - 1))


@njit(inline="always", fastmath={"reassoc", "contract", "nsz"})
def dot(x, y):
    total = np.float32(0)
    for k in range(len(x)):
        total += x[k] * y[k]
    return total


@kernel
def count_candidates(rough, floor, count):
    """Candidates of each concept, into ``count`` (c,)."""
    for j in prange(len(rough)):
        low, total = ordered(floor[j], floor.itemsize), 0
        for i in range(rough.shape[1]):
            total += ordered(rough[j, i], rough.itemsize) >= low
        count[j] = total


@kernel
def activate(rough, floor, start, x, W_e, b_e):
    """The active cells of concept j, at ``start[j]`` and after: their numbers, their activations; and how many."""
    cells, u = np.empty(start[-1], np.int32), np.empty(start[-1], np.float32)
    n_active = np.zeros(len(rough), np.int64)
    for j in prange(len(rough)):
        low, end, at, w = ordered(floor[j], floor.itemsize), start[j], start[j], W_e[j]
        if start[j + 1] > end:
            for i in range(rough.shape[1]):
                if ordered(rough[j, i], rough.itemsize) >= low:
                    cells[end] = i
                    end += 1
            for p in range(start[j], end):
                value = dot(x[cells[p]], w) + b_e[j]
                if not value <= 0:  # NaN counts
                    cells[at], u[at] = cells[p], value
                    at += 1
            n_active[j] = at - start[j]
    return cells, u, n_active


@njit(cache=True)
def by_cell(start, n_active, cells, u, n):
    """The same pairs by cell: those of cell i lie from ``first[i]`` to ``first[i + 1]``; concepts, activations."""
    first = np.zeros(n + 1, np.int64)
    for j in range(len(n_active)):
        for p in range(start[j], start[j] + n_active[j]):
            first[cells[p] + 1] += 1
    first = np.cumsum(first)
    at, concepts, values = first[:-1].copy(), np.empty(first[-1], np.int32), np.empty(first[-1], np.float32)
    for j in range(len(n_active)):
        for p in range(start[j], start[j] + n_active[j]):
            concepts[at[cells[p]]], values[at[cells[p]]] = j, u[p]
            at[cells[p]] += 1
    return first, concepts, values


@kernel
def decode(a, b_d, W_d, first, concepts, values):
    """a' - a (n, d), and for each cell its sum of squares and of activations."""
    n, d = a.shape
    error, squared, l1 = np.empty((n, d), np.float32), np.empty(n), np.empty(n)
    for i in prange(n):
        row, total = error[i], np.float32(0)
        for k in range(d):
            row[k] = b_d[k] - a[i, k]
        for p in range(first[i], first[i + 1]):
            w, value = W_d[concepts[p]], values[p]
            for k in range(d):
                row[k] += value * w[k]
            total += value
        squared[i], l1[i] = dot(row, row), total
    return error, squared, l1


@njit(inline="always")
def flushed(x):
    """0 for a denormal number, which would slow every later step; not all threads flush them by themselves."""
    return np.float32(0) if -TINY < x < TINY else x


@njit(inline="always", fastmath={"reassoc", "contract", "nsz"})
def adam_row(w, m, v, g, adam):
    """Adam's step of a row with gradient ``g``."""
    beta1, beta2, rate, root, eps = adam[0], adam[1], adam[2], adam[3], adam[4]
    for k in range(len(w)):
        m[k] = flushed(beta1 * m[k] + (np.float32(1) - beta1) * g[k])
        v[k] = flushed(beta2 * v[k] + (np.float32(1) - beta2) * g[k] * g[k])
        w[k] -= rate * m[k] / (np.sqrt(v[k]) * root + eps)


@kernel
def update(start, n_active, cells, u, x, error, penalty, adam, W_e, m_e, v_e, b_e, m_b, v_b, W_d, m_d, v_d):
    """Gradient and step of all that belongs to each concept; returns what goes through x to b_d, a row a block.

    ``error`` (n, d) is the derivative of the loss by the reconstruction. A concept that never fired has no moments,
    and stays where it is.
    """
    c, d = W_d.shape
    n_blocks = (c + BLOCK - 1) // BLOCK
    to_b_d = np.zeros((n_blocks, d), np.float32)
    for block in prange(n_blocks):
        g_e, g_d, g_b = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(1, np.float32)
        for j in range(block * BLOCK, min(c, (block + 1) * BLOCK)):
            if n_active[j] == 0 and v_b[j] == 0 and not v_e[j].any() and not v_d[j].any():
                continue
            w_e, w_d = W_e[j], W_d[j]
            g_e[:], g_d[:], g_b[:] = 0, 0, 0
            for p in range(start[j], start[j] + n_active[j]):
                row, cell, value = error[cells[p]], x[cells[p]], u[p]
                through = dot(row, w_d) + penalty
                g_b[0] += through
                for k in range(d):
                    g_d[k] += value * row[k]
                    g_e[k] += through * cell[k]
            along = dot(g_d, w_d)
            for k in range(d):
                to_b_d[block, k] += g_b[0] * w_e[k]
                g_d[k] -= along * w_d[k]
            adam_row(w_e, m_e[j], v_e[j], g_e, adam)
            adam_row(w_d, m_d[j], v_d[j], g_d, adam)
            adam_row(b_e[j : j + 1], m_b[j : j + 1], v_b[j : j + 1], g_b, adam)
            norm = np.float32(1) / np.sqrt(dot(w_d, w_d))
            for k in range(d):
                w_d[k] *= norm
    return to_b_d
