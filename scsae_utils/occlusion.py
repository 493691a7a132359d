"""One cell, one token changed at a time: the embedding after each change, exactly (paper Eq. 1).

scGPT's first layer is shared: of its queries, keys and values only those of the changed token differ, and what that
does to the attention of all other tokens is known without a second softmax. Token j attends with weights p to values
v; when key i changes, its weight (in units of the old sum) from p_i to r and its value from v_i to v', then

``a' = (a - p_i v_i + r v') / (1 - p_i + r)``

and r = 0 takes the token away. From the second layer on every token differs, and the pass is an ordinary one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from .embedding import BATCH_TOKENS, cell_tokens, embed_tokens
from .encoder import CellEncoder
from .scgpt import ScGPT

FEW = 4  # fewer changes of a cell are not worth preparing what they could share
UNSTABLE = 0.9  # attention to one token above which 1 - p + r loses digits: such changes take an ordinary pass


class FirstLayer:
    """scGPT's first layer for one cell, computed once.

    Parameters
    ----------
    x
        (N, d) token vectors, ``<cls>`` first.
    """

    def __init__(self, model: ScGPT, x: Tensor):
        self.layer = model.transformer_encoder["layers"][0]
        self.attention = self.layer.self_attn
        self.x = self.layer.norm1(x) if self.layer.pre_norm else x
        self.q, self.k, self.v = self.attention.inputs(self.x)
        scores = self.q @ self.k.transpose(1, 2) * self.q.shape[-1] ** -0.5
        self.log_sum = scores.logsumexp(-1, keepdim=True)
        self.p = (scores - self.log_sum).exp()
        rest = (self.x + self.attention.out_proj.bias)[:, None]
        self.a = torch.cat([self.projected(self.p @ self.v), rest], 1)  # (N, heads + 1, d)
        self.stable = self.p.amax((0, 1)) < UNSTABLE  # (N,) nobody attends to this token alone

    def projected(self, y: Tensor) -> Tensor:
        """What each head's output (heads, M, d / heads) adds to the layer's sum: (M, heads, d)."""
        weights = self.attention.out_proj.weight.unflatten(1, (self.attention.heads, -1))
        return torch.einsum("hmi,dhi->mhd", y, weights)

    def output(self, positions: Tensor, new: Tensor | None) -> Tensor:
        """Output (B, N, d) with the tokens at ``positions`` (B,) replaced by ``new`` (B, d); (B, N - 1, d) if None,
        which takes them away."""
        width = self.q.shape[-1]
        at, p = torch.arange(len(positions), device=positions.device), self.p[:, :, positions]
        if new is None:
            r, values = torch.zeros_like(p), None
        else:
            new = self.layer.norm1(new) if self.layer.pre_norm else new
            q, k, values = self.attention.inputs(new)
            r = (self.q @ k.transpose(1, 2) * width**-0.5 - self.log_sum).exp()
        rest = 1 / (1 - p + r)  # (heads, N, B)
        x = torch.cat([rest, torch.ones_like(rest[:1])]).permute(1, 2, 0) @ self.a  # (N, B, d)
        changed, weights = self.projected(self.v[:, positions]), -p * rest
        if new is not None:
            changed, weights = torch.cat([changed, self.projected(values)], 1), torch.cat([weights, r * rest])
        x = torch.baddbmm(x.transpose(0, 1), weights.permute(2, 1, 0), changed)
        if new is None:
            x[at, positions] = x[:, -1].clone()  # the order of tokens does not matter: the last one fills the gap
            return self.layer.feed_forward(x[:, :-1])
        scores = q @ self.k.transpose(1, 2) * width**-0.5  # the changed token's own attention, (heads, B, N)
        scores[:, at, positions] = (q * k).sum(-1) * width**-0.5
        p = scores.softmax(-1)
        own = p @ self.v + p[:, at, positions, None] * (values - self.v[:, positions])
        x[at, positions] = self.attention.out_proj(own.transpose(0, 1).flatten(1)).add_(new)
        return self.layer.feed_forward(x)


def encode_changed(
    model: CellEncoder,
    x: Tensor,
    positions: Tensor,
    new: Tensor | None,
    first: FirstLayer | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Tensor:
    """Vectors (B, d) of one cell's tokens x (N, d), with one of them replaced by ``new`` (B, d), or taken away."""
    n, out = len(x), torch.empty(len(positions), model.dim, dtype=x.dtype, device=x.device)
    stable = first.stable[positions] if first else torch.zeros(len(positions), dtype=torch.bool, device=x.device)
    size = max(1, batch_tokens // n)
    for rows in torch.nonzero(stable).flatten().split(size):
        if len(rows):
            y = first.output(positions[rows], None if new is None else new[rows])
            for layer in model.transformer_encoder["layers"][1:-1]:
                y = layer(y)
            out[rows] = model.transformer_encoder["layers"][-1](y, only_cls=True)[:, 0]
    every = torch.arange(n, device=x.device)
    for rows in torch.nonzero(~stable).flatten().split(size):
        if len(rows) and new is None:
            left = every.expand(len(rows), n)[every != positions[rows, None]].view(len(rows), n - 1)
            out[rows] = model.encode(x[left])
        elif len(rows):
            batch = x.repeat(len(rows), 1, 1)
            batch[torch.arange(len(rows)), positions[rows]] = new[rows]
            out[rows] = model.encode(batch)
    return out


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
    ids, values = torch.as_tensor(ids, device=model.device), torch.as_tensor(values, device=model.device)
    positions = torch.as_tensor(positions, device=model.device)
    new_values = torch.as_tensor(new_values, dtype=torch.float32, device=model.device)
    remove = torch.as_tensor(remove, device=model.device)
    x = model.tokens(ids[None], values[None])[0]
    out = torch.empty(len(positions), model.dim, dtype=x.dtype, device=x.device)
    new = model.tokens(ids[positions[~remove]][None], new_values[~remove][None])[0]
    shared = isinstance(model, ScGPT) and model.config.nlayers > 1 and len(positions) >= FEW
    first = FirstLayer(model, x) if shared else None
    out[~remove] = encode_changed(model, x, positions[~remove], new, first, batch_tokens)
    out[remove] = encode_changed(model, x, positions[remove], None, first, batch_tokens)
    return F.normalize(out.float(), dim=-1).cpu().numpy()


@torch.inference_mode()
def insert(model: CellEncoder, ids, values, new_ids, new_values, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
    """Embeddings (M, d) of one cell (N tokens) with one token added at a time: ids and values (M,)."""
    if len(new_ids) == 0:
        return np.empty((0, model.dim), np.float32)
    device = model.device
    x = model.tokens(torch.as_tensor(ids, device=device)[None], torch.as_tensor(values, device=device)[None])
    new_values = torch.as_tensor(new_values, dtype=torch.float32, device=device)
    new = model.tokens(torch.as_tensor(new_ids, device=device)[:, None], new_values[:, None])
    size = max(1, batch_tokens // (x.shape[1] + 1))
    parts = [model.encode(torch.cat([x.expand(len(y), -1, -1), y], dim=1)) for y in new.split(size)]
    return F.normalize(torch.cat(parts).float(), dim=-1).cpu().numpy()


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
