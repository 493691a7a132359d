"""How good ``scgpt-mini`` is: cells, measurements and the model card of ``pretrain_mini.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
from mini_cells import mini_cells, read_cells

from scsae_utils.embedding import bin_cells, cell_tokens, embed_tokens, token_ids
from scsae_utils.scgpt import ScGPT, load_model

COMMON = {  # labels of the FACS-sorted cells of Zheng 2017 and of Kang 2018, to the types that both have
    "CD19+ B": "B", "CD14+ Monocyte": "CD14 Mono", "CD56+ NK": "NK", "CD8+ Cytotoxic T": "CD8 T",
    "CD8+/CD45RA+ Naive Cytotoxic": "CD8 T", "CD4+ T Helper2": "CD4 T", "CD4+/CD45RO+ Memory": "CD4 T",
    "CD4+/CD25 T Reg": "CD4 T", "CD4+/CD45RA+/CD25- Naive T": "CD4 T", "B cells": "B", "CD14+ Monocytes": "CD14 Mono",
    "CD4 T cells": "CD4 T", "CD8 T cells": "CD8 T", "NK cells": "NK",
}  # fmt: skip
NEIGHBOURS, COMPONENTS, NEAR_ZERO = 15, 50, (0.0, 0.1, 0.3)
WAYS = {"model": "model", "pca": "components", "pca_cosine": "components, cosine", "random": "random weights"}


def column(cells: ad.AnnData, *names: str) -> np.ndarray | None:
    """The first of these columns of the cells' table that is there."""
    return next((cells.obs[n].astype(str).to_numpy() for n in names if n in cells.obs), None)


def embedding(cells: ad.AnnData, model: ScGPT, batch_tokens: int = 8192) -> np.ndarray:
    """(n, d) cell embeddings as :func:`scsae_utils.embedding.embed` makes them, without changing ``cells``."""
    return embed_tokens(
        cell_tokens(bin_cells(cells, model), token_ids(cells.var_names, model), model), model, batch_tokens
    )


def log_counts(cells: ad.AnnData) -> np.ndarray:
    """log1p of counts per 10,000, as scanpy does; values that are no counts are taken as logged already."""
    x = cells.X.toarray().astype(np.float64)
    return np.log1p(1e4 * x / np.maximum(x.sum(1, keepdims=True), 1)) if (x == np.round(x)).all() else x


def components(fit: np.ndarray, *others: np.ndarray, n: int = COMPONENTS, seed: int = 0) -> list[np.ndarray]:
    """Principal components of scaled log expression (cut at 10), fitted on the first array, of all arrays."""
    from sklearn.decomposition import PCA

    mean, spread = fit.mean(0), fit.std(0)
    used = spread > 0
    scaled = [((x[:, used] - mean[used]) / spread[used]).clip(-10, 10) for x in (fit, *others)]
    pca = PCA(min(n, *(s - 1 for s in scaled[0].shape)), random_state=seed, svd_solver="randomized").fit(scaled[0])
    return [pca.transform(s) for s in scaled]


def neighbour_labels(
    x: np.ndarray, source: np.ndarray, labels: np.ndarray, k: int, barred: Callable | None = None
) -> np.ndarray:
    """Majority label of each row's k nearest source rows (Euclidean); ``barred(rows)`` masks sources not allowed."""
    kinds, codes = np.unique(labels, return_inverse=True)
    out = np.empty(len(x), int)
    for start in range(0, len(x), 512):
        rows = np.arange(start, min(start + 512, len(x)))
        distance = (source**2).sum(1) - 2 * x[rows] @ source.T
        if barred is not None:
            distance[barred(rows)] = np.inf
        near = codes[np.argpartition(distance, k, axis=1)[:, :k]]
        out[rows] = [np.bincount(r, minlength=len(kinds)).argmax() for r in near]
    return kinds[out]


def accuracy(x: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None, k: int = NEIGHBOURS) -> float:
    """Share of cells whose k nearest others (of other groups, if given) vote for the right label."""
    groups = np.arange(len(x)) if groups is None else groups
    return float(
        (neighbour_labels(x, x, labels, k, lambda rows: groups[rows][:, None] == groups[None]) == labels).mean()
    )


def labelled(cells: ad.AnnData, model: ScGPT, most: int, seed: int) -> tuple[ad.AnnData, np.ndarray]:
    """Labelled cells over the genes that the model knows, at most ``most`` of them."""
    labels = column(cells, "cell_type", "bulk_labels")
    rows = np.flatnonzero(~np.isin(labels, ["NA", "nan", ""]))
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:most])
    cells = cells[rows, token_ids(cells.var_names, model) >= 0].copy()
    return cells, labels[rows]


def two_studies(source: ad.AnnData, target: ad.AnnData) -> tuple[ad.AnnData, ad.AnnData, np.ndarray, np.ndarray]:
    """The cells of the types that both studies have, over the genes of both, and their types."""
    common = [g for g in target.var_names if g in set(source.var_names)]
    types = [np.array([COMMON.get(t, "") for t in column(cells, "cell_type")]) for cells in (source, target)]
    a, b = (cells[t != "", common].copy() for cells, t in zip((source, target), types))
    return a, b, types[0][types[0] != ""], types[1][types[1] != ""]


def perturb(cells: ad.AnnData, model: ScGPT, n_cells: int, n_genes: int, seed: int):
    """Random expressed genes of random cells: (token ids, values, places of the genes) of each cell."""
    rng = np.random.default_rng(seed)
    cells = cells[np.sort(rng.permutation(cells.n_obs)[:n_cells])]
    for ids, values in cell_tokens(bin_cells(cells, model), token_ids(cells.var_names, model), model):
        yield ids, values, 1 + rng.permutation(len(ids) - 1)[:n_genes]


def occlusion(sets: dict[str, ad.AnnData], model: ScGPT, n_cells: int = 15, n_genes: int = 30, seed: int = 0) -> dict:
    """Does a value near zero do what removing the gene does?

    Of random expressed genes of random cells, the displacement of the embedding by a small value and by removal:
    cosine of the two, their correlation along 10 principal and 10 random directions, ratio of their lengths.
    """
    removed, valued, base = [], {v: [] for v in NEAR_ZERO}, []
    for cells in sets.values():
        for ids, values, places in perturb(cells, model, n_cells, n_genes, seed):
            sequences = [(ids, values)] + [(np.delete(ids, p), np.delete(values, p)) for p in places]
            for v in NEAR_ZERO:
                sequences += [(ids, np.where(np.arange(len(ids)) == p, np.float32(v), values)) for p in places]
            z = embed_tokens(sequences, model).astype(np.float64)
            moved = (z[1:] - z[0]).reshape(len(NEAR_ZERO) + 1, len(places), -1)
            base.append(z[0])
            removed.append(moved[0])
            for v, m in zip(NEAR_ZERO, moved[1:]):
                valued[v].append(m)
    removed, base = np.concatenate(removed), np.array(base)
    lead = np.linalg.svd(base - base.mean(0), full_matrices=False)[2][:10]
    chance = np.random.default_rng(seed).normal(size=(10, base.shape[1]))
    chance /= np.linalg.norm(chance, axis=1, keepdims=True)
    length = np.linalg.norm(removed, axis=1)
    out: dict = {"cells": len(base), "genes_in_cells": len(removed), "median_removal": float(np.median(length))}
    for v in NEAR_ZERO:
        m = np.concatenate(valued[v])
        cos = (m * removed).sum(1) / np.maximum(np.linalg.norm(m, axis=1) * length, 1e-12)
        r = {
            n: np.mean([np.corrcoef(m @ d, removed @ d)[0, 1] for d in ds])
            for n, ds in (("pc", lead), ("random", chance))
        }
        out[f"value {v:g}"] = {
            "median_cosine": float(np.median(cos)),
            "weighted_cosine": float((cos * length).sum() / length.sum()),
            "r_principal": float(r["pc"]),
            "r_random": float(r["random"]),
            "length_ratio": float(np.median(np.linalg.norm(m, axis=1) / np.maximum(length, 1e-12))),
        }
    return out


def smoothness(
    sets: dict[str, ad.AnnData], model: ScGPT, n_cells: int = 4, n_genes: int = 3, seed: int = 0, step: float = 0.25
) -> dict:
    """The path of the embedding while one gene's value goes from -1 to 50 in small steps.

    Largest step and length of the path, as shares of the path's width (largest distance between two of its points).
    """
    grid, jumps, lengths = np.arange(-1, 50 + step / 2, step, dtype=np.float32), [], []
    for cells in sets.values():
        for ids, values, places in perturb(cells, model, n_cells, n_genes, seed):
            for p in places:
                z = embed_tokens([(ids, np.where(np.arange(len(ids)) == p, v, values)) for v in grid], model).astype(
                    np.float64
                )
                width = np.sqrt(max(0, 2 - 2 * (z @ z.T).min()))
                steps = np.linalg.norm(np.diff(z, axis=0), axis=1)
                jumps.append(steps.max() / width)
                lengths.append(steps.sum() / width)
    q = {
        "paths": len(jumps),
        "step": step,
        "median_largest_step": float(np.median(jumps)),
        "largest_step": float(max(jumps)),
    }
    return q | {"median_length": float(np.median(lengths)), "longest": float(max(lengths))}


def quick(model: ScGPT, mini: dict[str, ad.AnnData], held_out: dict[str, ad.AnnData], seed: int) -> dict[str, float]:
    """A few figures during training."""
    out = {}
    for name, cells in {**held_out, "pbmc68k_reduced": mini["pbmc68k_reduced"]}.items():
        cells, labels = labelled(cells, model, 700, seed)
        out[name] = round(accuracy(embedding(cells, model), labels), 4)
    near = occlusion(mini, model, 6, 20, seed)
    return out | {
        "occlusion_r": round(near["value 0.1"]["r_principal"], 3),
        "removal": round(near["median_removal"], 4),
    }


def measure(
    model: ScGPT, held_out: dict[str, ad.AnnData], source: ad.AnnData | None, seed: int, most: int = 3000
) -> dict:
    """All figures of the card, for the model and for what it has to beat (WAYS)."""
    mini, chance, rows = mini_cells(), model.random_like(seed), []
    pbmc, common = mini["pbmc68k_reduced"], mini["celltypist_sample"].var_names

    def vectors(*sets: ad.AnnData) -> dict[str, list[np.ndarray]]:
        pca = components(*map(log_counts, sets), seed=seed)
        return {
            "model": [embedding(cells, model) for cells in sets],
            "pca": pca,
            "pca_cosine": [x / np.linalg.norm(x, axis=1, keepdims=True) for x in pca],
            "random": [embedding(cells, chance) for cells in sets],
        }

    def add(what: str, cells: int, genes: int, types: int, **figures: float) -> None:
        rows.append({"what": what, "cells": cells, "genes": genes, "types": types})
        rows[-1] |= {way: round(float(figures[way]), 4) for way in WAYS}
        rows[-1]["model / pca"] = round(figures["model"] / figures["pca"], 3)

    shared = "pbmc68k_reduced, genes shared with the CellTypist sample"
    for name, cells in {**held_out, "pbmc68k_reduced": pbmc, shared: pbmc[:, common]}.items():
        cells, labels = labelled(cells, model, most, seed)
        donors, found = column(cells, "donor"), vectors(cells)
        size = (len(labels), cells.n_vars, len(set(labels)))
        add(f"{name}: leave one cell out", *size, **{w: accuracy(x[0], labels) for w, x in found.items()})
        if donors is not None:
            add(f"{name}: leave one donor out", *size, **{w: accuracy(x[0], labels, donors) for w, x in found.items()})
    for name, target in held_out.items() if source is not None else ():
        a, b, y, truth = two_studies(*(labelled(cells, model, most, seed)[0] for cells in (source, target)))
        guess = {w: neighbour_labels(x[1], x[0], y, NEIGHBOURS) for w, x in vectors(a, b).items()}
        size, kinds = (len(truth), a.n_vars, len(set(truth))), np.unique(truth)
        add(f"{name}: labels from the sorted study", *size, **{w: (g == truth).mean() for w, g in guess.items()})
        mean = {w: np.mean([(g[truth == t] == t).mean() for t in kinds]) for w, g in guess.items()}
        add(f"{name}: the same, mean over types", *size, **mean)
    return {
        "seed": seed,
        "neighbours": NEIGHBOURS,
        "components": COMPONENTS,
        "types": rows,
        "occlusion": occlusion(mini, model, seed=seed),
        "smoothness": smoothness(mini, model, seed=seed),
    }


LIMITS = [
    "It knows blood and bone marrow: {cells} human immune cells of {studies} files of UMI counts. Other tissues and "
    "species are outside of what it saw. It is there to try the method with; it does not replace scGPT whole-human.",
    "It knows {genes} genes, by symbols of about 2016 (aliases.json leads to them); other genes are ignored.",
    "Trained with views of up to 400 genes; longer cells work but were not seen in training.",
    "It finds cell types about as well as principal components do, not better: by angle, components of the same study "
    "are ahead by up to 0.03; across studies the model is ahead when types count equally.",
    "Close types (CD4 and CD8 T cells, kinds of CD4 T cells) are not well apart, here as in principal components.",
    "The embedding still holds study, panel and depth in part. Bring cells that are to be compared to the same genes.",
    "The decoders (decoder.*, mvc_decoder.*) predict bins; they were a means of training and are not calibrated.",
    "No clinical use.",
]


def write_card(folder: Path, held_out: list[str], source: str | None, seed: int, notes: str | None) -> None:
    """Measure the model in ``folder``; write ``card.json`` and, from it, ``MODEL_CARD.md``."""
    model = load_model(folder)
    card = model.card
    card["args"] = json.loads((folder / "args.json").read_text())
    card["fingerprint"] = model.fingerprint()
    card["bytes"] = (folder / "model.safetensors").stat().st_size
    cells = {Path(p).name: read_cells(p) for p in held_out}
    card["held_out_files"] = {k: c.n_obs for k, c in cells.items()}
    card["quality"] = measure(model, cells, read_cells(source) if source else None, seed)
    trained = card["training_cells"]
    card["limits"] = [
        t.format(cells=f"{sum(trained.values()):,}", studies=len(trained), genes=f"{card['genes']:,}") for t in LIMITS
    ]
    if notes:
        card["how"] = Path(notes).read_text().strip()
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    (folder / "MODEL_CARD.md").write_text(markdown(card))


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def markdown(card: dict) -> str:
    """The model card, to be read."""
    q, a = card["quality"], card["args"]
    quality = [
        [
            r["what"],
            r["cells"],
            r["genes"],
            r["types"],
            *(f"{r[w]:.3f}" for w in (*WAYS, "model / pca")),
        ]
        for r in q["types"]
    ]
    near = [
        [
            f"{v:g}",
            *(
                f"{q['occlusion'][f'value {v:g}'][k]:.3f}"
                for k in ("r_principal", "r_random", "weighted_cosine", "length_ratio")
            ),
        ]
        for v in NEAR_ZERO
    ]
    terms = list(card["curve"][-1]["training"])
    chosen = card["curve"][:: max(1, len(card["curve"]) // 12)]
    chosen += [] if chosen[-1] is card["curve"][-1] else [card["curve"][-1]]
    curve = [[c["step"], *(f"{c[s][t]:.3f}" for t in terms for s in ("training", "held_out_cells"))] for c in chosen]
    smooth, near_q = q["smoothness"], q["occlusion"]
    parts = [
        f"# {card['name']}",
        f"A small scGPT: {a['nlayers']} layers, width {a['embsize']}, {a['nheads']} heads, feed-forward {a['d_hid']}, "
        f"{card['genes']:,} genes; {card['bytes'] / 1e6:.1f} MB in 16-bit floats. Pretrained without labels by "
        f"`tools/pretrain_mini.py` in {card['steps']:,} steps ({card['minutes']} minutes on two shared CPU cores), "
        f"seed {card['seed']}. Fingerprint `{card['fingerprint']}`.",
        "## Cells",
        table(
            ["file", "cells", "genes of the vocabulary measured", "left out (barcode seen before)"],
            [[f, n, card["genes_measured"][f], card["cells_left_out"][f]] for f, n in card["training_cells"].items()],
        ),
        f"{card['cells_for_held_out_loss']} of these cells are kept for the held-out loss. Never trained on: "
        + ", ".join(f"{k} ({n:,} cells)" for k, n in card["held_out_files"].items())
        + ", and the cells of scanpy's `pbmc68k_reduced` and CellTypist's sample.",
        "## Cell types among neighbours",
        f"Share of cells whose {q['neighbours']} nearest neighbours vote for the right type, in the embedding, in "
        f"{q['components']} principal components of the same genes (log1p of counts per 10,000, scaled; Euclidean "
        "distance, and by angle), and in the same network with random weights. Across studies, the components are "
        "fitted on the labelled study, whose cells the model was trained on without their labels.",
        table(["cells", "n", "genes", "types", *WAYS.values(), "model / components"], quality),
        "## Defined where occlusion looks",
        f"{near_q['genes_in_cells']} expressed genes of {near_q['cells']} cells of profile `mini`: how the embedding "
        f"moves when the gene's value becomes small, against removing the gene (median move "
        f"{near_q['median_removal']:.4f}). "
        "Correlation along 10 principal and 10 random directions; cosine weighted by the move; ratio of lengths.",
        table(["value", "r, principal", "r, random", "cosine", "length / removal"], near),
        f"One gene's value from -1 to 50 in steps of {smooth['step']} ({smooth['paths']} paths): largest step "
        f"{smooth['median_largest_step']:.3f} of the path's width (median; at most {smooth['largest_step']:.3f}), "
        f"length of the path {smooth['median_length']:.2f} widths (at most {smooth['longest']:.2f}).",
        "## Limits",
        "\n".join(f"- {t}" for t in card["limits"]),
        "## How it was made, and what failed",
        card.get("how", ""),
        "## Objective",
        table(["setting", "value"], [[k, v] for k, v in card["objective"].items()]),
        "Loss on training cells and on held-out cells of the same studies:",
        table(["step", *(f"{t}{s}" for t in terms for s in ("", ", held out"))], curve),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"
