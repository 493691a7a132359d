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
from .scgpt import Layer, ScGPT

FEW = 4  # fewer changes of a cell are not worth preparing what they could share
UNSTABLE = 0.9  # attention to one token above which 1 - p + r loses digits: such changes take an ordinary pass


def attention_inputs(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (..., heads, N, d / heads) of tokens (..., N, d)."""
    attention = layer.self_attn
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    return tuple(y.unflatten(-1, (attention.heads, -1)).transpose(-3, -2) for y in qkv)


def after_attention(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    """The rest of a layer: its input x and the heads' outputs y side by side, both (..., d), to its output."""
    x = x + layer.self_attn.out_proj(y)
    x = layer.norm2(x) if layer.pre_norm else layer.norm1(x)
    x = x + layer.linear2(F.relu(layer.linear1(x)))
    return x if layer.pre_norm else layer.norm2(x)


class FirstLayer:
    """scGPT's first layer for one cell, computed once.

    Parameters
    ----------
    x
        (N, d) token vectors, ``<cls>`` first.
    """

    def __init__(self, model: ScGPT, x: Tensor):
        self.layer = model.transformer_encoder["layers"][0]
        self.x = self.layer.norm1(x) if self.layer.pre_norm else x
        self.q, self.k, self.v = attention_inputs(self.layer, self.x)
        scores = self.q @ self.k.transpose(1, 2) * self.q.shape[-1] ** -0.5
        self.log_sum = scores.logsumexp(-1, keepdim=True)
        self.p = (scores - self.log_sum).exp()
        self.a = (self.p @ self.v).transpose(0, 1)  # (N, heads, d / heads)
        self.stable = self.p.amax((0, 1)) < UNSTABLE  # (N,) nobody attends to this token alone

    def output(self, positions: Tensor, new: Tensor | None) -> Tensor:
        """Output (B, N, d) with the tokens at ``positions`` (B,) replaced by ``new`` (B, d); (B, N - 1, d) if None,
        which takes them away."""
        n, heads, width = self.a.shape
        at, p = torch.arange(len(positions), device=positions.device), self.p[:, :, positions]
        if new is None:
            r, values = torch.zeros_like(p), self.v[:, positions]
        else:
            new = self.layer.norm1(new) if self.layer.pre_norm else new
            q, k, values = attention_inputs(self.layer, new)
            r = (self.q @ k.transpose(1, 2) * width**-0.5 - self.log_sum).exp()
        rest = 1 / (1 - p + r)  # (heads, N, B)
        y = self.a * rest.permute(2, 1, 0)[..., None]
        weights = torch.cat([-p * rest, r * rest]).permute(2, 1, 0)
        blocks = torch.zeros(len(positions), 2, heads, heads, width, dtype=y.dtype, device=y.device)
        blocks[:, 0, range(heads), range(heads)] = self.v[:, positions].transpose(0, 1)
        blocks[:, 1, range(heads), range(heads)] = values.transpose(0, 1)
        y = y.flatten(2).baddbmm_(weights, blocks.view(len(positions), 2 * heads, heads * width))
        if new is None:
            x = after_attention(self.layer, self.x, y)
            x[at, positions] = x[:, -1].clone()  # the order of tokens does not matter: the last one fills the gap
            return x[:, :-1].contiguous()
        scores = q @ self.k.transpose(1, 2) * width**-0.5  # the changed token's own attention, (heads, B, N)
        scores[:, at, positions] = (q * k).sum(-1) * width**-0.5
        p = scores.softmax(-1)
        own = p @ self.v + p[:, at, positions, None] * (values - self.v[:, positions])
        y[at, positions] = own.transpose(0, 1).flatten(1)
        x = self.x.repeat(len(positions), 1, 1)
        x[at, positions] = new
        return after_attention(self.layer, x, y)


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
