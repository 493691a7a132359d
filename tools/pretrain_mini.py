"""Pretrain ``scgpt-mini``, the small scGPT that travels with scsae_utils.

    OMP_NUM_THREADS=2 python tools/pretrain_mini.py --train cells/*.npz --held-out kang.npz --source zheng_facs.npz \\
        --out scsae_utils/data/scgpt-mini --work runs/scgpt-mini
    python tools/pretrain_mini.py --evaluate --held-out kang.npz --source zheng_facs.npz \\
        --out scsae_utils/data/scgpt-mini

Cell files are ``.h5ad``, or ``.npz`` with a CSR matrix of counts (``data``, ``indices``, ``indptr``, ``shape``),
``genes``, ``cells`` and optional ``obs_*`` columns. Each file counts as one study. A run that was stopped goes on
from its checkpoint when the same command is given again; ``--steps`` may then be another.

The objective
    Each cell is seen twice, as two *views*: other genes, or the same genes with the molecules shared out between the
    views by lot. Each view is binned anew, as at inference. Three terms of scGPT: masked bins are predicted from the
    gene's own output (GEP, ``decoder.*``), the other view's bins from the cell embedding (MVC, ``mvc_decoder.*``),
    and the two views of a cell attract while other cells of the study repel (CCE). One term of our own, because
    occlusion replaces values by means near zero: genes near zero must not move the embedding.
The start
    Half of each gene's embedding is its loading in an SVD of the training cells; the ReLU knees of the value encoder
    are spread over the range of the bins.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import anndata as ad
import mini_cells
import mini_quality
import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn
from tqdm.auto import tqdm

from scsae_utils.scgpt import ScGPT, ScGPTConfig, bin_values, save_model

SPECIAL = ("<pad>", "<cls>", "<eoc>")
SETTINGS = {
    "contrast": 0.15, "temperature": 0.15, "gep": 1.0, "mvc": 2.0, "near_zero": 0.15, "masked": 0.3, "lr": 1e-3,
    "view_tokens": 5000, "lengths": [48, 96, 160, 240, 400], "length_p": [0.1, 0.25, 0.35, 0.22, 0.08],
    "zeros": 24, "mini_panel": 0.5, "thinned": 0.4, "random_ties": 0.15, "svd_width": 64,
}  # fmt: skip


class Corpus:
    """Training cells over the vocabulary: counts, study and, per study, which genes were measured."""

    def __init__(self, studies: dict[str, ad.AnnData], genes: list[str], held: float, seed: int):
        place, rng = {g: i for i, g in enumerate(genes)}, np.random.default_rng(seed)
        parts, self.measured, self.names = [], [], list(studies)
        for study in studies.values():
            columns = np.array([place.get(g, -1) for g in study.var_names])
            known = columns >= 0
            move = sparse.csr_matrix(
                (np.ones(known.sum()), (np.flatnonzero(known), columns[known])), (len(columns), len(genes))
            )
            parts.append(sparse.csr_matrix(study.X) @ move)
            self.measured.append(np.isin(np.arange(len(genes)), columns))
        self.study = np.repeat(np.arange(len(parts)), [p.shape[0] for p in parts])
        self.x = sparse.csr_matrix(sparse.vstack(parts), dtype=np.float32)
        self.x.sort_indices()
        self.held = rng.random(len(self.study)) < held
        enough = np.diff(self.x.indptr) >= 60
        self.cells = [np.flatnonzero((self.study == s) & ~self.held & enough) for s in range(len(parts))]
        self.held_cells = [np.flatnonzero((self.study == s) & self.held & enough) for s in range(len(parts))]

    def svd(self, width: int, seed: int) -> np.ndarray:
        """(genes, width) loadings of the log expression, centred and scaled in each study, unit variance."""
        from sklearn.decomposition import TruncatedSVD

        total = np.asarray(self.x.sum(1))
        x = sparse.csr_matrix(self.x.multiply(1e4 / total)).log1p().toarray()
        for s in range(len(self.measured)):
            rows = self.study == s
            x[rows] -= x[rows].mean(0)
            x[rows] /= x[rows].std(0) + 0.05
        x = x[~self.held].clip(-8, 8)
        svd = TruncatedSVD(width, random_state=seed).fit(x)
        loadings = svd.components_.T * np.sqrt(svd.singular_values_)
        return (loadings / loadings.std()).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------- views
class Views:
    """Pairs of views of cells of one study, as tensors of token ids, values and targets."""

    def __init__(self, corpus: Corpus, mini: np.ndarray, n_special: int, config: ScGPTConfig, settings: dict):
        self.corpus, self.mini, self.special, self.config, self.settings = corpus, mini, n_special, config, settings

    def panels(self, measured: np.ndarray, thinned: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Two gene panels (masks): disjoint, or drawn independently of each other when the counts are thinned."""

        def some(genes: np.ndarray) -> np.ndarray:
            size = int(np.exp(rng.uniform(np.log(min(300, len(genes))), np.log(len(genes) + 1))))
            return rng.permutation(genes)[:size]

        every, mini = np.flatnonzero(measured), np.flatnonzero(measured & self.mini)
        is_mini = rng.random(2) < self.settings["mini_panel"]
        if thinned:
            chosen = [mini if m else some(every) for m in is_mini]
        elif is_mini.all():
            half = rng.permutation(mini)
            chosen = [half[: len(half) // 2], half[len(half) // 2 :]]
        elif is_mini.any():
            chosen = [mini, some(np.setdiff1d(every, mini))][:: 1 if is_mini[0] else -1]
        else:
            genes, cut = rng.permutation(every), rng.uniform(0.3, 0.7)
            chosen = [some(genes[: int(cut * len(genes))]), some(genes[int(cut * len(genes)) :])]
        masks = [np.zeros(len(measured), bool) for _ in range(2)]
        for mask, genes in zip(masks, chosen):
            mask[genes] = True
        return masks[0], masks[1]

    def view(self, genes, counts, panel, most, rng):
        """One view: up to ``most`` expressed genes of the panel, and some genes of value (nearly) zero."""
        inside = panel[genes] & (counts > 0)
        genes, counts = genes[inside], counts[inside]
        order = rng.permutation(len(genes))
        keep, rest = order[:most], order[most:]
        if len(keep) > 60 and rng.random() < 0.5:  # some of the genes knocked out, to serve as zeros
            keep, rest = np.split(order[:most], [len(keep) - rng.integers(1, 13)])
        ties = rng if rng.random() < self.settings["random_ties"] else None
        bins = bin_values(counts[keep], self.config.n_bins, ties)
        n_zeros = rng.integers(0, self.settings["zeros"] + 1)
        silent = rng.choice(np.flatnonzero(panel), 2 * n_zeros)
        zeros = np.unique(np.r_[genes[rest[: n_zeros // 2]], silent[: n_zeros - n_zeros // 2]])
        zeros = zeros[~np.isin(zeros, genes[keep])]
        near = rng.random(len(zeros)) * 0.5 * (rng.random() < 0.4)
        return np.r_[genes[keep], zeros] + self.special, np.r_[bins, near].astype(np.float32)

    def batch(self, rng: np.random.Generator, held: bool = False, n_cells: int | None = None) -> dict[str, Tensor]:
        """Views A of n cells, then views B of the same cells: ids, values, keep, and the places of the zeros."""
        s = self.settings
        cells = self.corpus.held_cells if held else self.corpus.cells
        size = np.array([len(c) for c in cells]) ** 0.75
        study = rng.choice(len(cells), p=size / size.sum())
        most = int(rng.choice(s["lengths"], p=s["length_p"]))
        n = n_cells or int(np.clip(s["view_tokens"] // most, 24, 64))
        rows = rng.choice(cells[study], min(n, len(cells[study])), replace=False)
        thinned = rng.random() < s["thinned"]
        panel = self.panels(self.corpus.measured[study], thinned, rng)
        x, pairs = self.corpus.x, ([], [])
        for row in rows:
            genes, counts = (a[x.indptr[row] : x.indptr[row + 1]] for a in (x.indices, x.data))
            first = rng.binomial(counts.astype(int), rng.uniform(0.4, 0.6)).astype(np.float32) if thinned else counts
            for v, part in enumerate((first, counts - first if thinned else counts)):
                pairs[v].append(self.view(genes, part, panel[v], most, rng))
        views = pairs[0] + pairs[1]
        length = max(len(ids) for ids, _ in views) + 1
        ids = np.zeros((len(views), length), np.int64)
        values = np.full((len(views), length), self.config.pad_value, np.float32)
        ids[:, 0] = 1  # <cls>
        for i, (t, v) in enumerate(views):
            ids[i, 1 : len(t) + 1], values[i, 1 : len(t) + 1] = t, v
        keep = ids > 0
        real = ids >= self.special
        rate = np.where(rng.random(len(views)) < 0.5, 0, rng.uniform(0.1, 2 * s["masked"] - 0.1, len(views)))
        masked = real & (rng.random(ids.shape) < rate[:, None])
        return {
            k: torch.from_numpy(v) for k, v in dict(ids=ids, values=values, keep=keep, real=real, masked=masked).items()
        }


# ------------------------------------------------------------------------------------------------------------ training
class Decoders(nn.Module):
    """scGPT's expression decoder and inner-product MVC decoder, under their own names; they predict bins / 50."""

    def __init__(self, dim: int):
        super().__init__()
        fc = nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(), nn.Linear(dim, dim), nn.LeakyReLU(), nn.Linear(dim, 1))
        self.decoder = nn.ModuleDict({"fc": fc})
        self.mvc_decoder = nn.ModuleDict({"gene2query": nn.Linear(dim, dim), "W": nn.Linear(dim, dim, bias=False)})
        nn.init.constant_(fc[4].bias, 0.5)

    def token(self, outputs: Tensor) -> Tensor:
        return self.decoder["fc"](outputs).squeeze(-1)

    def cell(self, genes: Tensor, cell: Tensor) -> Tensor:
        query = self.mvc_decoder["W"](torch.sigmoid(self.mvc_decoder["gene2query"](genes)) - 0.5)
        return 0.5 + (query @ cell.unsqueeze(-1)).squeeze(-1) / math.sqrt(cell.shape[-1])  # unscaled it diverges

    def tensors(self, scale: float) -> dict[str, Tensor]:
        """For the checkpoint: predicting bins as scGPT does, not bins / 50 (MVC: minus 25, of the query minus 0.5)."""
        last = dict.fromkeys(("decoder.fc.4.weight", "decoder.fc.4.bias"), scale)
        last["mvc_decoder.W.weight"] = scale / math.sqrt(self.mvc_decoder["W"].in_features)
        return {k: v.detach() * last.get(k, 1) for k, v in self.state_dict().items()}


def start(model: ScGPT, loadings: np.ndarray, generator: torch.Generator) -> None:
    """Set the gene embeddings to SVD loadings in half of the width and spread the knees of the value encoder."""
    n, width = loadings.shape
    with torch.no_grad():
        weight = model.encoder.embedding.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        weight[len(SPECIAL) :, :width] = torch.from_numpy(loadings)
        first = model.value_encoder.linear1
        slope = (0.05 + 0.1 * torch.rand(model.dim, generator=generator)) * torch.where(
            torch.arange(model.dim) % 3 == 0, -1.0, 1.0
        )
        knees = torch.linspace(-2, 50, model.dim)[torch.randperm(model.dim, generator=generator)]
        first.weight.copy_(slope[:, None])
        first.bias.copy_(-slope * knees)


def losses(model: ScGPT, decoders: Decoders, batch: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The four terms of the objective on one batch of view pairs."""
    ids, values, keep, real, masked = (batch[k] for k in ("ids", "values", "keep", "real", "masked"))
    n, top = len(ids) // 2, model.config.n_bins - 1
    shown = values.masked_fill(masked, float(model.config.mask_value))
    genes = model.encoder(ids)
    outputs = model.encode(genes + model.value_encoder(shown), keep, only_cls=False)
    cell, other = outputs[:, 0], torch.arange(2 * n).roll(n)
    gep = F.mse_loss(decoders.token(outputs[masked]), values[masked] / top) if masked.any() else values.sum() * 0
    mvc = F.mse_loss(decoders.cell(genes[other], cell)[real[other]], values[other][real[other]] / top)
    z = F.normalize(cell, dim=1)
    similar = (z @ z.T / settings["temperature"]).fill_diagonal_(-1e9)
    cce = F.cross_entropy(similar, other)
    rows = torch.arange(2 * n)[(~masked.any(1)) & (real & (values <= 0.5)).any(1)][: max(8, n // 4)]
    near = values.sum() * 0
    if len(rows):  # the same views without the genes near zero
        without = model(ids[rows], values[rows], keep[rows] & ~(real[rows] & (values[rows] <= 0.5)))
        apart = (1 - z[:n] @ z[:n].T).sum() / (n * (n - 1))  # relative to the distance of cells, or all would collapse
        near = (without - z[rows]).pow(2).sum(1).add(1e-6).sqrt().mean() / (2 * apart).clamp(min=1e-4).sqrt()
    return {"gep": gep, "mvc": mvc, "cce": cce, "near_zero": near}


def total_loss(parts: dict[str, Tensor], s: dict) -> Tensor:
    return (
        s["gep"] * parts["gep"]
        + s["mvc"] * parts["mvc"]
        + s["contrast"] * parts["cce"]
        + s["near_zero"] * parts["near_zero"]
    )


def rate(step: int, steps: int) -> float:
    """Learning rate as a share of the highest: up over the first tenth, then down as a cosine."""
    up = 0.1 * steps
    return (
        0.04 + 0.96 * step / up if step < up else 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - up) / (steps - up)))
    )


def train(args: argparse.Namespace, settings: dict) -> None:
    """Pretrain, or go on from the checkpoint; write the model and a card without figures of quality."""
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision(args.precision)
    out = Path(args.out)
    work = Path(args.work or out)
    work.mkdir(parents=True, exist_ok=True)
    mini = mini_cells.mini_cells()
    held_out = {Path(p).name: mini_cells.read_cells(p) for p in args.held_out}
    studies, dropped = mini_cells.read_studies(args.train, mini)
    genes, aliases = mini_cells.vocabulary(studies, mini, held_out, mini_cells.alias_table(args.aliases), args.genes)
    corpus = Corpus(studies, genes, args.held_share, args.seed)
    vocab = {s: i for i, s in enumerate([*SPECIAL, *genes])}
    config = ScGPTConfig(embsize=args.embsize, nheads=args.nheads, d_hid=args.d_hid, nlayers=args.nlayers)
    torch.manual_seed(args.seed)
    model, decoders = ScGPT(config, vocab), Decoders(args.embsize)
    start(model, corpus.svd(settings["svd_width"], args.seed), torch.Generator().manual_seed(args.seed))
    weights = [p for p in [*model.parameters(), *decoders.parameters()]]
    optimiser = torch.optim.AdamW(weights, settings["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, args.steps))
    views = Views(corpus, np.isin(genes, mini["pbmc68k_reduced"].var_names), len(SPECIAL), config, settings)
    same = json.dumps([settings, genes, args.seed, config.__dict__, sorted(studies)], sort_keys=True)
    same = hashlib.sha256(same.encode()).hexdigest()
    curve, quality, checkpoint, first, spent = [], [], work / "checkpoint.pt", 0, 0.0
    rng = np.random.default_rng(args.seed)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["same"] != same:
            raise SystemExit(
                f"{checkpoint} is from a run with other settings or cells: give another --work folder or remove it"
            )
        model.load_state_dict(state["model"])
        decoders.load_state_dict(state["decoders"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["torch_rng"])
        rng.bit_generator.state = json.loads(state["numpy_rng"])
        first, spent, curve, quality = (
            state["step"],
            state["spent"],
            json.loads(state["curve"]),
            json.loads(state["quality"]),
        )
    fixed = [views.batch(np.random.default_rng([args.seed, i]), held=True, n_cells=24) for i in range(12)]
    sums: dict[str, float] = {}
    clock = time.time() - spent
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, desc="pretraining", mininterval=10):
        parts = losses(model, decoders, views.batch(rng), settings)
        optimiser.zero_grad(set_to_none=True)
        total_loss(parts, settings).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        for k, v in parts.items():
            sums[k] = sums.get(k, 0) + v.item()
        done = step + 1
        if done % args.every == 0 or done == args.steps:
            since = done - (curve[-1]["step"] if curve else 0)
            model.eval()
            with torch.no_grad():
                held = [losses(model, decoders, b, settings) for b in fixed]
            curve.append({"step": done, "seconds": round(time.time() - clock)})
            curve[-1]["training"] = {k: round(v / since, 4) for k, v in sums.items()}
            curve[-1]["held_out_cells"] = {k: round(float(np.mean([h[k] for h in held])), 4) for k in sums}
            sums = {}
            tqdm.write(json.dumps(curve[-1]))
        if done % args.check_every == 0 and done < args.steps:
            quality.append({"step": done, **mini_quality.quick(model.eval(), mini, held_out, args.seed)})
            tqdm.write(json.dumps(quality[-1]))
        if done % args.every == 0 or done == args.steps:
            state = {"same": same, "step": done, "spent": time.time() - clock, "model": model.state_dict()}
            state |= {
                "decoders": decoders.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
            }
            state |= {"torch_rng": torch.get_rng_state(), "numpy_rng": json.dumps(rng.bit_generator.state)}
            state |= {"curve": json.dumps(curve), "quality": json.dumps(quality)}
            torch.save(state, work / "checkpoint.part")
            (work / "checkpoint.part").replace(checkpoint)
        model.train()
    save_model(model, out, decoders.tensors(config.n_bins - 1), half=True)
    (out / "aliases.json").write_text(json.dumps(dict(sorted(aliases.items())), indent=0) + "\n")
    card = {
        "name": out.name,
        "steps": args.steps,
        "seed": args.seed,
        "minutes": round((time.time() - clock) / 60),
        "genes": len(genes),
        "objective": settings,
        "training_cells": {k: int((corpus.study == i).sum()) for i, k in enumerate(corpus.names)},
        "cells_for_held_out_loss": int(corpus.held.sum()),
        "cells_left_out": dropped,
        "genes_measured": {k: int(m.sum()) for k, m in zip(corpus.names, corpus.measured)},
        "renamed_symbols": "old and new names of one gene brought to the symbol of the vocabulary; see aliases.json",
        "curve": curve,
        "quality_during_training": quality,
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", default=[], help="cell files to train on")
    parser.add_argument("--held-out", nargs="+", default=[], help="cell files of a study that is never trained on")
    parser.add_argument("--source", help="training file whose labels the held-out cells get from their neighbours")
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--work", help="folder of the checkpoint (default: --out)")
    parser.add_argument(
        "--evaluate", action="store_true", help="only measure an existing model again and rewrite its card"
    )
    parser.add_argument("--aliases", help="table (tab-separated) with columns symbol, prev_symbol, alias_symbol")
    parser.add_argument("--notes", help="Markdown file: how the model was made, for the card")
    parser.add_argument("--settings", default="{}", help="JSON: other settings of the objective")
    parser.add_argument("--precision", default="highest", choices=["highest", "high", "medium"])
    parser.add_argument(
        "--held-share", type=float, default=0.05, help="share of training cells kept for the held-out loss"
    )
    for name, value in dict(
        steps=1500, seed=0, genes=4500, embsize=128, nheads=4, d_hid=128, nlayers=4, every=50
    ).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--check-every", type=int, default=300, help="steps between measurements of quality")
    args = parser.parse_args()
    unknown = set(json.loads(args.settings)) - set(SETTINGS)
    if unknown:
        parser.error(f"unknown settings: {', '.join(sorted(unknown))}")
    if not args.evaluate:
        train(args, {**SETTINGS, **json.loads(args.settings)})
    mini_quality.write_card(Path(args.out), args.held_out, args.source, args.seed, args.notes)


if __name__ == "__main__":
    main()
