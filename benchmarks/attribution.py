"""Attribution, against Captum's FeatureAblation: python benchmarks/attribution.py

Ways to the same numbers, on the same cells, weights and concepts: Captum, looped over concepts and prototypes as its
documentation does, around the network of the scgpt package, and around our forward pass of the same; our exhaustive
occlusion; our screened occlusion. Captum is timed on some of the prototypes, one change at a time as it does by default
and 16 at a time, and the faster one counts.

- ``mini``: the cells and the dictionary of profile mini, with scgpt-mini. The screen runs over all surviving concepts,
  the exhaustive method over some of them. ``python benchmarks/attribution.py recall`` runs it over all, for the recall
  (an hour or more; it can be stopped, and goes on where it was).
- ``whole_human``: a network of the size of the whole-human checkpoint with random weights, cells of about 500
  expressed genes, and principal components of their embeddings as concepts. A few cells, and a rule to match.
"""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from record import RESULTS, keep, versions

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers" / "captum"
SCGPT = ROOT / ".venv-peers" / "scgpt"
WORK = ROOT / "runs" / "benchmark-attribution"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import anndata as ad  # noqa: E402
import pandas as pd  # noqa: E402

import scsae_utils  # noqa: E402
from scsae_utils.attribution import attribute, gene_summary, make_plan  # noqa: E402
from scsae_utils.book import load_profile  # noqa: E402
from scsae_utils.cells import split_cells  # noqa: E402
from scsae_utils.concepts import concept_data  # noqa: E402
from scsae_utils.dictionaries import BaselineConfig, fit_baseline  # noqa: E402
from scsae_utils.embedding import BATCH_TOKENS  # noqa: E402
from scsae_utils.files import write  # noqa: E402
from scsae_utils.sae import SAEConfig, load_sae, save_sae  # noqa: E402
from scsae_utils.scgpt import ScGPT, ScGPTConfig  # noqa: E402
from scsae_utils.screening import ScreeningConfig, attribute_all  # noqa: E402
from scsae_utils.training import train_sae  # noqa: E402

N_EXHAUSTIVE = 24  # concepts of mini that are occluded exhaustively
REMOVED = -99.0  # the value that tells Captum's model that the gene is not there


def main() -> None:
    peers()
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
    keep("attribution", rows, figures, versions("torch", "numpy") | {"captum": "0.9.0", "scgpt": "0.2.4"})


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
    slower, difference = against_captum(plan, exact, n_captum, genes)
    changes, passes = len(exact), screened.attrs["n_passes"] + screened.attrs["n_screen_passes"]
    each = exact_s / changes
    rows = [
        {"way": f"Captum, {name}", "seconds per change": ratio * each, "forward passes": changes}
        for name, ratio in slower.items()
    ]
    rows += [
        {"way": "exhaustive", "seconds per change": each, "forward passes": exact.attrs["n_passes"]},
        {"way": "screened", "seconds per change": screened_s / changes, "forward passes": passes},
    ]
    theirs, ours = slower.values()
    figures = {
        "exhaustive_vs_captum": theirs,
        "screened_vs_exhaustive": exact_s / screened_s,
        "screened_vs_captum": theirs * exact_s / screened_s,
        "forward_passes_saved": exact.attrs["n_passes"] / passes,
        **agreement(screened, exact, screening),
        "exhaustive_vs_captum_our_pass": ours,
        "screened_vs_captum_our_pass": ours * exact_s / screened_s,
        "captum_max_difference": difference,
    }
    return rows, figures, exact


def networks(model) -> dict:
    """The same weights, in two implementations: what gives embeddings (B, d) for ids and values (B, N), and for which
    tokens to keep (B, N) or None."""
    import genuine

    c = model.config
    network = genuine.module("scgpt.model.model").TransformerModel(
        len(model.vocab), c.embsize, c.nheads, c.d_hid, c.nlayers, vocab=model.vocab
    )
    network.load_state_dict(model.state_dict(), strict=False)
    network.eval()

    def genuine_pass(ids, values, keep):
        padding = torch.zeros(ids.shape, dtype=torch.bool) if keep is None else ~keep
        return torch.nn.functional.normalize(network._encode(ids, values, padding)[:, 0], dim=-1)

    return {"the scgpt package's pass": genuine_pass, "our pass": model}


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


def against_captum(plan, exact: pd.DataFrame, n_prototypes: int, genes: int | None) -> tuple[dict, float]:
    """How many times as long as our exhaustive occlusion Captum takes for the same changes of the same prototypes, by
    network; and the largest difference of its attributions from ours."""
    from captum.attr import FeatureAblation

    ours, differences = [], []
    ways = networks(plan.model)
    seconds = {(name, batch): [] for name in ways for batch in (1, 16)}
    for i in range(n_prototypes):
        c = i % len(plan.concepts)
        row = int(plan.prototypes[c][i // len(plan.concepts)])
        changes = plan.changes(row).query("concept == @c").iloc[:genes]
        ids, values, columns = plan.tokens(row)
        ids, others = torch.from_numpy(ids)[None], torch.from_numpy(values)[None, len(changes) + 1 :]
        values = torch.from_numpy(values)[None, 1 : len(changes) + 1]
        removed = (changes["change"] == "remove").to_numpy()
        baselines = torch.tensor(np.where(removed, REMOVED, changes["counterfactual"]), dtype=torch.float32)[None]

        def activation(values, network, ids=ids, others=others, concept=plan.concepts[c]):
            """Of the concept, for values (n, genes) of one cell."""
            n, (_, cls) = len(values), plan.model.cls
            values = torch.cat([torch.full((n, 1), cls), values, others.expand(n, -1)], 1)
            keep = None if (values > REMOVED).all() else values > REMOVED
            return plan.sae.encode(network(ids.expand(n, -1), values, keep))[:, concept]

        _, took = timed(plan.occluded, row, changes, BATCH_TOKENS)
        ours.append(took)
        concept, cell = plan.concepts[c], plan.adata.obs_names[row]
        known = exact[(exact["concept"] == concept) & (exact["cell"] == cell)]["attribution"].to_numpy()[: len(changes)]
        for (name, batch), times in seconds.items():
            captum = FeatureAblation(partial(activation, network=ways[name]))
            with torch.no_grad():
                lost, took = timed(captum.attribute, values, baselines, perturbations_per_eval=batch)
            times.append(took)
            differences.append(np.abs(lost[0].numpy() / changes["activation"].to_numpy() - known).max())
    best = {name: min(sum(seconds[name, batch]) for batch in (1, 16)) / sum(ours) for name in ways}
    return best, float(max(differences))


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


def peers() -> None:
    """Pure Python: from this environment, or installed beside it."""
    import genuine

    missing = [] if importlib.util.find_spec("captum") else [("captum==0.9.0", PEERS)]
    if not genuine.is_installed():
        missing.append((f"scgpt=={genuine.VERSION}", SCGPT))
    for package, folder in missing:
        if not folder.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, package], check=True)
        sys.path.append(str(folder))


if __name__ == "__main__":
    main()
