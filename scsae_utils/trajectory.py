"""A cheap estimate of what each change of one token does to a concept: the screen before exact occlusion.

An exact pass follows all N tokens for every change. Here each changed token is followed alone: its own stream goes
through the layers exactly, against the keys and values of the unchanged cell. In each layer it changes what every
other token gathers by attention; that is exact too, softmax included (see :mod:`scsae_utils.occlusion`). Only what
follows from there is taken to first order, from the gradient of the concept with respect to all heads' outputs. So all
changes of a cell together cost about one forward and one backward pass for each concept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .scgpt import Layer, ScGPT


@dataclass
class LayerState:
    """One layer of the unchanged cell. ``n`` tokens are computed: all N, or in the last layer ``<cls>`` alone."""

    layer: Layer
    before: Tensor  # (N, d) input
    x: Tensor  # (N, d) the same, normed first where the model does so
    q: Tensor  # (heads, n, d / heads)
    k: Tensor  # (heads, N, d / heads)
    v: Tensor
    log_sum: Tensor  # (heads, n, 1) of the exponentiated scores
    p: Tensor  # (heads, n, N) attention
    a: Tensor  # (n, d) heads' outputs side by side
    after: Tensor  # (n, d) output


def heads(x: Tensor, n: int) -> Tensor:
    """(N, d) to (n heads, N, d / n)."""
    return x.unflatten(-1, (n, -1)).transpose(0, 1)


class Trajectories:
    """One cell, run once with all that the estimates need.

    Parameters
    ----------
    x
        (N, d) token vectors, ``<cls>`` first.
    """

    def __init__(self, model: ScGPT, x: Tensor):
        self.states: list[LayerState] = []
        for layer in (layers := model.transformer_encoder["layers"]):
            n = 1 if layer is layers[-1] else len(x)
            with torch.enable_grad():  # for what follows the attention; its own derivative is written out below
                before = x.detach().requires_grad_(True)
                x = layer.norm1(before) if layer.pre_norm else before
            with torch.no_grad():
                q, k, v = layer.self_attn.inputs(x)
                q = q[:, :n] * q.shape[-1] ** -0.5
                scores = q @ k.transpose(1, 2)
                log_sum = scores.logsumexp(-1, keepdim=True)
                p = scores.sub_(log_sum).exp_()
                a = (p @ v).transpose(0, 1).flatten(1)
            with torch.enable_grad():
                after = layer.after_attention(x[:n], a.requires_grad_(True))
            self.states.append(LayerState(layer, before, x, q, k, v, log_sum, p, a, after))
            x = after
        with torch.enable_grad():
            self.embedding = F.normalize(x[0], dim=-1)

    def gradients(self, direction: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Derivative of ``embedding @ direction`` (d,) with respect to the heads' outputs of every layer.

        Returns
        -------
        For each layer G (heads, n, d / heads); its product with the own output, (heads, n, 1); the derivative with
        respect to the scores, (heads, n, N).
        """
        out = []
        (g,) = torch.autograd.grad(self.embedding, self.states[-1].after, direction, retain_graph=True)
        for state in reversed(self.states):
            n_heads, n = state.layer.self_attn.heads, len(state.after)
            from_x, G = torch.autograd.grad(state.after, (state.x, state.a), g, retain_graph=True)
            G = heads(G, n_heads)
            ga = (G * heads(state.a, n_heads)).sum(-1, keepdim=True)
            scores = (G @ state.v.transpose(1, 2)).sub_(ga).mul_(state.p)
            out.append((G, ga, scores))
            if state is self.states[0]:
                return out[::-1]
            dq = scores @ state.k * state.k.shape[-1] ** -0.5
            dk, dv = scores.transpose(1, 2) @ state.q, state.p.transpose(1, 2) @ G
            dq, dk, dv = (y.transpose(0, 1).flatten(1) for y in (dq, dk, dv))
            wq, wk, wv = state.layer.self_attn.in_proj_weight.chunk(3)
            g = from_x + dk @ wk + dv @ wv
            g[:n] += dq @ wq
            if state.layer.pre_norm:
                (g,) = torch.autograd.grad(state.x, state.before, g, retain_graph=True)

    @torch.no_grad()
    def effects(
        self, gradients: list[tuple[Tensor, Tensor, Tensor]], new: Tensor, positions: Tensor | None, remove: Tensor
    ) -> Tensor:
        """Estimated change of ``embedding @ direction`` (B,) for each change of one token.

        Parameters
        ----------
        gradients
            From :meth:`gradients`.
        new
            (B, d) token vectors.
        positions
            (B,) whose place they take; None: they are added to the cell.
        remove
            (B,) the token at this position is taken away instead.
        """
        total = new.new_zeros(len(new))
        each = torch.arange(len(new), device=new.device)
        at = positions
        if positions is not None and torch.equal(positions, each + 1):
            at = slice(1, len(new) + 1)  # every gene in its order: nothing need be gathered
        for state, (G, ga, from_scores) in zip(self.states, gradients):
            x = state.layer.norm1(new) if state.layer.pre_norm else new
            q, k, v = state.layer.self_attn.inputs(x)  # (heads, B, d / heads)
            r = (state.q @ k.transpose(1, 2)).sub_(state.log_sum).exp_()
            r[:, :, remove] = 0
            t, rest = (G @ v.transpose(1, 2)).sub_(ga).mul_(r), r.add_(1 + 1e-6)
            if positions is not None:
                rest.sub_(state.p[:, :, at])
                t.sub_(from_scores[:, :, at])
            t.div_(rest)
            last = state is self.states[-1]
            if positions is not None and not last:
                t[:, positions, each] = 0  # the token itself is what is followed
            total += t.sum((0, 1))
            if last:
                return total
            q = q * q.shape[-1] ** -0.5
            scores, own = q @ state.k.transpose(1, 2), (q * k).sum(-1)
            if positions is None:
                p = torch.cat([scores, own[..., None]], -1).softmax(-1)
                y = p[..., :-1] @ state.v + p[..., -1:] * v
            else:
                scores[:, each, positions] = own
                p = scores.softmax(-1)
                y = p @ state.v + p[:, each, positions, None] * (v - state.v[:, at])
            new = state.layer.after_attention(x, y.transpose(0, 1).flatten(1))
