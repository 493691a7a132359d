"""Embedding of cells, against the genuine scgpt.tasks.embed_data: python benchmarks/embedding.py

The network has the size and the vocabulary of the whole-human checkpoint, and random weights. The cells are real: a
sample of the immune cells that travel with celltypist, on 2,000 variable genes as in the paper. Their counts are
replaced by their ranks with ties broken once, so that both packages see the same bins and the outputs can be compared.

``embed_data`` is called as its documentation does, with its default settings; flash-attn is used if it is installed.
Each measurement runs in a process of its own, in turns. The genuine wheel is taken from this environment, or installed
beside it in ``.venv-peers/scgpt``.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import keep, versions

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers" / "scgpt"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

N_CELLS, ROUNDS, WARM_UP = 64, 2, 4
ONCE = ["float16"]  # slow on most CPUs: for the record


def main() -> None:
    import torch

    env = genuine_wheel()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    with tempfile.TemporaryDirectory() as folder:
        lengths = prepare(Path(folder))
        runs = {(device, who): [] for device in devices for who in ("genuine", "float32", "bfloat16", "float16")}
        for i in range(ROUNDS):
            for (device, who), results in runs.items():
                if i == 0 or device != "cpu" or who not in ONCE:
                    results.append(child(folder, who, device, env))
        peaks = {device: child(folder, "peak", device, env) for device in devices}
    rows = [row(device, who, results, peaks[device], lengths) for (device, who), results in runs.items()]
    figures = {"tokens_per_cell": float(np.median(lengths))}
    for device in devices:
        mark = "" if device == "cpu" else f"_{device}"
        genuine, fp32, *halves = [r for r in rows if r["device"] == device]
        half = max(halves, key=lambda r: r["cells/s"])
        first = {who: np.array(results[0]["X"]) for (d, who), results in runs.items() if d == device}
        cosine = (first[half["run"]] * first["float32"]).sum(1)
        figures |= {
            f"ratio_fp32{mark}": fp32["cells/s"] / genuine["cells/s"],
            f"ratio_half{mark}": half["cells/s"] / genuine["cells/s"],
            f"half{mark}": half["run"],
            f"max_abs_diff_fp32{mark}": float(abs(first["float32"] - first["genuine"]).max()),
            f"cosine_half{mark}": float(cosine.min()),
            f"memory_ratio{mark}": fp32["peak memory (MiB)"] / genuine["peak memory (MiB)"],
            f"memory_ratio_above_imports{mark}": fp32["above imports (MiB)"] / genuine["above imports (MiB)"],
            f"roofline_fp32{mark}": fp32["share of peak"],
            f"roofline_half{mark}": half["share of peak"],
        }
    figures = {k: v if isinstance(v, str) or "diff" in k or "cosine" in k else round(v, 3) for k, v in figures.items()}
    keep("embedding", rows, figures, versions("torch", "numpy") | {"scgpt": "0.2.4"})


def genuine_wheel() -> dict:
    """Environment for the children, in which the genuine wheel is found."""
    import genuine

    env = dict(os.environ)
    if not genuine.is_installed():
        if not PEERS.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS)]
            subprocess.run([*pip, f"scgpt=={genuine.VERSION}"], check=True)
        sys.path.append(str(PEERS))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(PEERS)]))
    return env


def prepare(folder: Path) -> np.ndarray:
    """Write the cells and the model, in scGPT's own form; return the cells' numbers of tokens."""
    import genuine
    import torch

    import scsae_utils
    from scsae_utils.scgpt import ScGPT, ScGPTConfig, save_model

    vocab = json.loads(Path(genuine.root(), "tokenizer", "default_census_vocab.json").read_text())
    for special in ("<pad>", "<cls>", "<eoc>"):
        vocab[special] = len(vocab)
    torch.manual_seed(0)
    model = ScGPT(ScGPTConfig(embsize=512, nheads=8, d_hid=512, nlayers=12), vocab)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases away from 1 and 0
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    save_model(model, folder)
    torch.save(model.state_dict(), folder / "best_model.pt")
    (folder / "model.safetensors").unlink()

    cells = scsae_utils.load_cells("celltypist", n_top_genes=2000, genes=set(vocab))
    rng = np.random.default_rng(0)
    cells = cells[rng.choice(cells.n_obs, N_CELLS, replace=False)].copy()
    cells.X = cells.layers["counts"].copy()
    for start, end in zip(cells.X.indptr[:-1], cells.X.indptr[1:]):
        order = np.lexsort([rng.random(end - start), cells.X.data[start:end]])
        cells.X.data[start + order] = np.arange(1, end - start + 1)
    del cells.layers["counts"], cells.uns
    cells.write(folder / "cells.h5ad")
    return cells.X.getnnz(axis=1) + 1


def child(folder: str, who: str, device: str, env: dict) -> dict:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", who, "--device", device, "--folder", folder]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{who} on {device} failed")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{device} {who}: {', '.join(f'{k} {v:.4g}' for k, v in result.items() if k != 'X')}", flush=True)
    return result


def row(device: str, who: str, results: list[dict], peak: dict, lengths: np.ndarray) -> dict:
    """Medians of the rounds, and the share of the throughput of the machine's matrix products."""
    names = ("embedding", "loading", "busy", "memory", "imports")
    seconds, loading, busy, memory, before = (statistics.median(r[name] for r in results) for name in names)
    out = {
        "device": device,
        "run": who,
        "cells/s": round(len(lengths) / seconds, 2),
        "cells/s, loading included": round(len(lengths) / (seconds + loading), 2),
        "cores used": round(busy, 2),  # fewer than there are threads: the machine was busy with something else
        "peak memory (MiB)": round(memory),
        "above imports (MiB)": round(memory - before),
    }
    if who != "genuine":
        rate = flops(lengths) / seconds
        out |= {"GFLOP/s": round(rate / 1e9, 1), "GFLOP/s of linear layers alone": round(peak[who] / 1e9, 1)}
        out["share of peak"] = round(rate / peak[who], 3)
    return out


def flops(lengths: np.ndarray, d: int = 512, hidden: int = 512, layers: int = 12, heads: int = 8) -> float:
    """Operations of all cells' matrix products: no padding, and of the last layer only what ``<cls>`` needs."""
    n = lengths.astype(float)
    value = 2 * n * d * d
    layer = 2 * n * (4 * d * d + 2 * d * hidden) + 4 * n * n * d
    last = 2 * (4 * d * d + 2 * d * hidden) + 4 * n * heads * d
    return float((value + (layers - 1) * layer + last).sum())


def measure(who: str, device: str, folder: Path) -> dict:
    """In the child: seconds, peak resident memory in MiB, and the embeddings."""
    import anndata
    import torch

    if who == "peak":
        return {name: linear_rate(getattr(torch, name), device) for name in ("float32", "bfloat16", "float16")}
    cells = anndata.read_h5ad(folder / "cells.h5ad")
    run = genuine_run if who == "genuine" else our_run
    call = run(who, device, folder)
    imports = resident()
    call(cells[:WARM_UP].copy())
    start, used = time.perf_counter(), time.process_time()
    X, seconds, loading = call(cells)
    busy = (time.process_time() - used) / (time.perf_counter() - start)
    times = {"embedding": seconds, "loading": loading, "busy": busy}
    return times | {"imports": imports, "memory": resident(), "X": X.tolist()}


def genuine_run(_: str, device: str, folder: Path):
    """``embed_data`` with its defaults; the time of its loop is taken apart from that of opening the model."""
    import genuine

    tasks, loop = genuine.module("scgpt.tasks.cell_emb"), []
    embeddings_of = tasks.get_batch_cell_embeddings

    def timed(*args, **kwargs):
        start = time.perf_counter()
        X = embeddings_of(*args, **kwargs)
        loop.append(time.perf_counter() - start)
        return X

    tasks.get_batch_cell_embeddings = timed

    def call(cells):
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            X = tasks.embed_data(cells, folder, gene_col="index", batch_size=64, device=device).obsm["X_scGPT"]
        return X, loop[-1], time.perf_counter() - start - loop[-1]

    return call


def our_run(precision: str, device: str, folder: Path):
    from scsae_utils.embedding import embed
    from scsae_utils.scgpt import load_model

    def call(cells):
        start = time.perf_counter()
        model = load_model(folder)
        loaded = time.perf_counter()
        X = embed(cells, model, precision=precision, device=device, progress=False).obsm["X_scGPT"]
        return X, time.perf_counter() - loaded, loaded - start

    return call


def linear_rate(dtype, device: str, tokens: int = 8192, d: int = 512) -> float:
    """Highest rate of ``linear`` alone, at the shapes of a layer: operations per second."""
    import torch

    x = torch.randn(tokens, d).to(device, dtype)
    weights = [torch.randn(n * d, d).to(device, dtype) for n in (3, 1, 1, 1)]
    best = np.inf
    with torch.inference_mode():
        for _ in range(2 if dtype == torch.float16 and device == "cpu" else 8):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(x, weight)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return 2 * tokens * d * 6 * d / best


def resident() -> float:
    """Highest resident memory of this process so far, MiB. Linux lets ``ru_maxrss`` start at that of the parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure")
    parser.add_argument("--device")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.device, args.folder)))
    else:
        main()
