"""Attribution, against Captum's FeatureAblation: python benchmarks/attribution.py

Three ways to the same numbers, on the same cells, model and concepts: Captum, looped over concepts and prototypes as
its documentation does; our exhaustive occlusion; our screened occlusion. Captum is timed on some of the prototypes.

- ``mini``: the cells and the dictionary of profile mini, with scgpt-mini. The screen runs over all surviving concepts,
  the exhaustive method over some of them. ``python benchmarks/attribution.py recall`` runs it over all, for the recall
  (an hour or more; it can be stopped, and goes on where it was).
- ``whole_human``: a network of the size of the whole-human checkpoint with random weights, cells of about 500
  expressed genes, and principal components of their embeddings as concepts. A few cells, and a rule to match.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from record import RESULTS, keep, versions

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers" / "captum"
WORK = ROOT / "runs" / "benchmark-attribution"
sys.path.insert(0, str(ROOT))

import anndata as ad  # noqa: E402
import pandas as pd  # noqa: E402

import scsae_utils  # noqa: E402
from scsae_utils.attribution import attribute, gene_summary, make_plan  # noqa: E402
from scsae_utils.book import load_profile  # noqa: E402
from scsae_utils.cells import split_cells  # noqa: E402
from scsae_utils.concepts import concept_data  # noqa: E402
from scsae_utils.dictionaries import BaselineConfig, fit_baseline  # noqa: E402
from scsae_utils.files import write  # noqa: E402
from scsae_utils.sae import SAEConfig, load_sae, save_sae  # noqa: E402
from scsae_utils.scgpt import ScGPT, ScGPTConfig  # noqa: E402
from scsae_utils.screening import ScreeningConfig, attribute_all  # noqa: E402
from scsae_utils.training import train_sae  # noqa: E402

N_EXHAUSTIVE = 6  # concepts of mini that are occluded exhaustively
REMOVED = -99.0  # the value that tells Captum's model that the gene is not there


def main() -> None:
    captum()
    asked = sys.argv[1:] or ["mini", "whole_human"]
    parts = {"mini": mini, "whole_human": whole_human, "recall": recall_of_all}
    if not set(asked) <= set(parts):
        raise SystemExit(f"parts are {', '.join(parts)}")
    path = RESULTS / "attribution.json"
    before = json.loads(path.read_text()) if path.is_file() else {"rows": [], "figures": {}}
    rows = [r for r in before["rows"] if r["size"] not in asked]
    figures = before["figures"]
    for name in asked:
        size = "mini" if name == "recall" else name
        new, found = parts[name]()
        rows += [{"size": name, **r} for r in new]
        figures[size] = {**(figures.get(size, {}) if name == "recall" else {}), **found}
    keep("attribution", rows, figures, versions("torch", "numpy") | {"captum": "0.9.0"})


def mini() -> tuple[list[dict], dict]:
    adata, model, sae, concepts = mini_run()
    some = np.random.default_rng(0).choice(concepts, N_EXHAUSTIVE, replace=False)
    rows, figures, _ = compare(adata, model, sae, some, ScreeningConfig(), n_captum=6)
    table, seconds = timed(attribute_all, adata, model, sae, concepts, progress=False)
    report = table.attrs["screening"]
    figures |= {
        "all_concepts": len(concepts), "all_seconds": seconds, "all_changes": len(table),
        "all_forward_passes_saved": len(table) / (table.attrs["n_passes"] + table.attrs["n_screen_passes"]),
        **{f"audit_{name}": report[name] for name in ("n_selected", "recall", "recall_low", "recall_high")},
    }  # fmt: skip
    return rows, rounded(figures)


def recall_of_all() -> tuple[list[dict], dict]:
    """Of the genes that pass the rule, over all concepts of mini: how many does the screen find?"""
    adata, model, sae, concepts = mini_run()
    exact = attribute(adata, model, sae, concepts, folder=WORK / "exact")
    screened = attribute_all(adata, model, sae, concepts, folder=WORK / "screened")
    found = agreement(screened, exact, ScreeningConfig())
    saved = exact.attrs["n_passes"] / (screened.attrs["n_passes"] + screened.attrs["n_screen_passes"])
    return [], rounded({f"all_{k}": v for k, v in found.items()} | {"all_forward_passes_saved": saved})


def whole_human() -> tuple[list[dict], dict]:
    cells = scsae_utils.load_cells("celltypist", n_top_genes=1500)
    genes = ["<pad>", "<cls>", "<eoc>", *cells.var_names]
    torch.manual_seed(0)
    model = ScGPT(ScGPTConfig(embsize=512, nheads=8, d_hid=512, nlayers=12), {g: i for i, g in enumerate(genes)})
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases away from 1 and 0
            parameter += 0.1 * torch.randn_like(parameter)
    for layer in model.transformer_encoder["layers"]:  # attention that is not the same to all
        layer.self_attn.in_proj_weight[:1024] *= 2
    lengths = np.asarray(cells.X.getnnz(axis=1))
    adata = cells[np.sort(np.argsort(abs(lengths - 500), kind="stable")[:64])].copy()
    scsae_utils.embed(adata, model, progress=False)
    sae = fit_baseline(adata.obsm["X_scGPT"], BaselineConfig("pca", n_concepts=16, k=4))
    active = sae.activations(adata.obsm["X_scGPT"]).getnnz(axis=0)
    concepts = np.argsort(abs(active - 16), kind="stable")[:2]
    rule = ScreeningConfig(threshold=0.007, min_prototypes=2)  # as many genes pass as with a trained model
    rows, figures, exact = compare(adata, model, sae, concepts, rule, n_captum=1, genes=40, n_prototypes=2)
    return rows, rounded(figures | {"genes_per_cell": float(exact.groupby(["concept", "cell"]).size().median())})


def compare(adata, model, sae, concepts, screening: ScreeningConfig, n_captum: int, genes=None, **settings):
    """The three ways, over the same concepts: rows of a table, figures, and the exhaustive attributions."""
    attribute(adata, model, sae, concepts[:1], n_prototypes=1, progress=False)  # warm up
    exact, exact_s = timed(attribute, adata, model, sae, concepts, progress=False, **settings)
    screened, screened_s = timed(
        attribute_all, adata, model, sae, concepts, screening=screening, progress=False, **settings
    )  # fmt: skip
    plan = make_plan(adata, model, sae, concepts, None, "X_scGPT", settings)
    captum_s, difference = time_captum(plan, exact, n_captum, genes)
    changes, passes = len(exact), screened.attrs["n_passes"] + screened.attrs["n_screen_passes"]
    rows = [
        {"way": "Captum FeatureAblation", "seconds per change": captum_s, "forward passes": changes},
        {"way": "exhaustive", "seconds per change": exact_s / changes, "forward passes": exact.attrs["n_passes"]},
        {"way": "screened", "seconds per change": screened_s / changes, "forward passes": passes},
    ]
    figures = {
        "exhaustive_vs_captum": captum_s * changes / exact_s,
        "screened_vs_exhaustive": exact_s / screened_s,
        "screened_vs_captum": captum_s * changes / screened_s,
        "forward_passes_saved": exact.attrs["n_passes"] / passes,
        **agreement(screened, exact, screening),
        "captum_max_difference": difference,
    }
    return rows, figures, exact


def agreement(screened: pd.DataFrame, exact: pd.DataFrame, rule: ScreeningConfig) -> dict:
    """Share of the genes that pass the rule, and of the ten with the largest \\|mean\\|, that the screen finds."""
    one, other = (gene_summary(t, rule.threshold, rule.min_prototypes) for t in (screened, exact))
    selected = other.index[other["selected"]]
    top = [set(s["mean"].abs().sort_values().groupby("concept").tail(10).index) for s in (one, other)]
    return {
        "recall": float(one.loc[selected, "selected"].mean()) if len(selected) else None,
        "selected": len(selected),
        "selected_wrongly": int((one["selected"] & ~other["selected"].reindex(one.index)).sum()),
        "top_ten_found": len(top[0] & top[1]) / len(top[1]),
    }


def time_captum(plan, exact: pd.DataFrame, n_prototypes: int, genes: int | None) -> tuple[float, float]:
    """Seconds for one change, of the faster of two batch sizes; and the largest difference from our attribution."""
    from captum.attr import FeatureAblation

    seconds, differences = {1: [], 16: []}, []
    for i in range(n_prototypes):
        c = i % len(plan.concepts)
        row = int(plan.prototypes[c][i // len(plan.concepts)])
        changes = plan.changes(row).query("concept == @c").iloc[:genes]
        ids, values, columns = plan.tokens(row)
        ids, others = torch.from_numpy(ids)[None], torch.from_numpy(values)[None, len(changes) + 1 :]
        values = torch.from_numpy(values)[None, 1 : len(changes) + 1]
        removed = (changes["change"] == "remove").to_numpy()
        baselines = np.where(removed, REMOVED, changes["counterfactual"])

        def activation(values, ids=ids, others=others, concept=plan.concepts[c]):
            """Of the concept, for values (n, genes) of one cell."""
            n, (_, cls) = len(values), plan.model.cls
            values = torch.cat([torch.full((n, 1), cls), values, others.expand(n, -1)], 1)
            keep = None if (values > REMOVED).all() else values > REMOVED
            return plan.sae.encode(plan.model(ids.expand(n, -1), values, keep))[:, concept]

        for batch, times in seconds.items():
            start = time.perf_counter()
            with torch.no_grad():
                lost = FeatureAblation(activation).attribute(
                    values, torch.tensor(baselines, dtype=torch.float32)[None], perturbations_per_eval=batch
                )
            times.append((time.perf_counter() - start) / len(changes))
        lost = lost[0].numpy() / changes["activation"].to_numpy()
        concept, cell = plan.concepts[c], plan.adata.obs_names[row]
        ours = exact[(exact["concept"] == concept) & (exact["cell"] == cell)]["attribution"].to_numpy()[: len(changes)]
        differences.append(np.abs(lost - ours).max())
    return min(statistics.median(times) for times in seconds.values()), float(max(differences))


def mini_run() -> tuple:
    """Cells, model, dictionary and surviving concepts of profile mini, made once."""
    profile = load_profile(ROOT / "profiles" / "mini.yaml")
    names = {f.name for f in fields(SAEConfig)}
    config = SAEConfig(**{k: v for k, v in profile["sae"].items() if k in names})
    model = scsae_utils.load_model(profile["embedding"]["model"])
    cells, dictionary = WORK / "embedded.h5ad", WORK / "sae.safetensors"
    if cells.is_file() and dictionary.is_file() and load_sae(dictionary).config == config:
        adata, sae = ad.read_h5ad(cells), load_sae(dictionary)
    else:
        adata = split_cells(scsae_utils.load_cells(profile["embedding"]["cells"]), profile["embedding"]["held_out"])
        scsae_utils.embed(adata, model, progress=False)
        sae = train_sae(adata, config, progress=False)
        write(adata, cells)
        save_sae(sae, dictionary)
    var = concept_data(adata, sae, profile["sae"]["min_frequency"]).var
    silent_somewhere = (var["n_cells"] < adata.n_obs).to_numpy()  # else there is no counterfactual
    return adata, model, sae, np.flatnonzero(var["kept"].to_numpy() & silent_somewhere)


def timed(function, *args, **settings) -> tuple:
    """Result and seconds."""
    start = time.perf_counter()
    result = function(*args, **settings)
    return result, time.perf_counter() - start


def rounded(figures: dict) -> dict:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}


def captum() -> None:
    """Pure Python: from this environment, or installed beside it."""
    try:
        import captum.attr  # noqa: F401
    except ImportError:
        sys.path.append(str(PEERS))
        if not PEERS.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS)]
            subprocess.run([*pip, "captum==0.9.0"], check=True)


if __name__ == "__main__":
    main()
