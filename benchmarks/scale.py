"""From a file of the atlas's size to concepts, in little memory: python benchmarks/scale.py

Cells are generated with the shape of the Cross-tissue Immune Cell Atlas: 329,762 cells of 45 types, 16 tissues and 12
donors, counts of 29,335 genes of which a cell expresses about 1,500, in an h5ad that is written in blocks. They go
through reading and checks, the choice of 2,000 genes, bins and tokens, a network of one layer, a dictionary, Table 2
and taxonomy, and UMAP of a sample with the rest projected. The embeddings of the small network are spread over 512
dimensions by random directions, so that from there on all is as wide as with the whole-human model. "Panel in memory"
is what the first chapter keeps: expression, counts and bins of the chosen genes, and the embeddings.

Each stage runs in a process of its own, with one thread. Times are processor time, so that what else the machine does
hardly matters; compilation by numba, the same for any number of cells, is in them, imports mostly are not. Memory
is the process's highest resident set (VmHWM, Linux), imports and mapped pages of files included. Files lie in
runs/scale and are deleted at the end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FOLDER = ROOT / "runs" / "scale"
SIZES = [32_976, 102_226, 329_762]
GENES, TYPES, TISSUES, DONORS = 29_335, 45, 16, 12
TOP, DIM, CONCEPTS, K = 2000, 512, 2048, 35
LIMIT = 8  # GiB
BLOCK = 4096


def profiles(rng):
    """Frequencies (GENES,) of genes, and factors (labels, GENES) by which a type, tissue or donor changes them."""
    base, factors = rng.lognormal(0, 2.6, GENES), np.ones((TYPES + TISSUES + DONORS, GENES))
    for i, factor in enumerate(factors):
        some = rng.choice(GENES, 400, replace=False)
        factor[some] = rng.lognormal(1.5 if i < TYPES else 0.5, 1, 400)
    return base, factors


def draw(base, factors, labels, depth, seed):
    """Counts of cells: ``depth`` molecules of each, drawn by the frequencies of its labels; data, indices, indptr."""
    np.random.seed(seed)
    data, indices = np.empty(depth.sum(), np.float32), np.empty(depth.sum(), np.int32)
    indptr, n = np.zeros(len(depth) + 1, np.int64), 0
    for cell in range(len(depth)):
        edge = np.cumsum(base * factors[labels[cell, 0]] * factors[labels[cell, 1]] * factors[labels[cell, 2]])
        places = np.cumsum(np.random.exponential(1, depth[cell] + 1))  # sums of exponentials: uniform, in order
        gene, last = 0, -1
        for place in places[:-1] * (edge[-1] / places[-1]):
            while edge[gene] < place:
                gene += 1
            if gene == last:
                data[n - 1] += 1
            else:
                data[n], indices[n], last = 1, gene, gene
                n += 1
        indptr[cell + 1] = n
    return data[:n], indices[:n], indptr


def gene_names() -> list[str]:
    """Symbols of human genes, and made-up names for as many as there are more."""
    from scsae_utils.words import gene_table

    symbols = list(gene_table().index[:GENES])
    return symbols + [f"G{i}" for i in range(GENES - len(symbols))]


def write_file(folder: Path, n: int) -> dict:
    """The generated h5ad; no more than a block of it is in memory."""
    import anndata as ad
    import h5py
    import numba
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(0)
    base, factors = profiles(rng)
    share, quick_draw, labels, expressed = rng.dirichlet(np.full(TYPES, 0.7)), numba.njit(draw), [], []
    with h5py.File(folder / "cells.h5ad", "w") as file:
        for start in range(0, n, BLOCK):
            size = min(BLOCK, n - start)
            of_type, tissue, donor = rng.choice(TYPES, size, p=share), rng.integers(TISSUES, size=size), None
            donor, depth = rng.integers(DONORS, size=size), rng.lognormal(np.log(4000), 0.5, size).astype(int) + 200
            labels.append(np.c_[of_type, tissue, donor])
            X = quick_draw(base, factors, labels[-1] + [0, TYPES, TYPES + TISSUES], depth, start)
            X = sparse.csr_matrix(X, shape=(size, GENES))
            expressed.append(np.diff(X.indptr))
            if start == 0:
                X.indptr = X.indptr.astype(np.int64)
                ad.io.write_elem(file, "X", X, dataset_kwargs={"compression": "gzip", "compression_opts": 1})
            else:
                ad.io.sparse_dataset(file["X"]).append(X)
        labels, expressed = np.concatenate(labels), np.concatenate(expressed)
        columns = {"type": labels[:, 0], "coarse": labels[:, 0] // 5, "tissue": labels[:, 1], "donor": labels[:, 2]}
        obs = pd.DataFrame({name: pd.Categorical([f"{name} {i}" for i in of]) for name, of in columns.items()})
        ad.io.write_elem(file, "obs", obs.set_axis([f"cell{i}" for i in range(n)]))
        ad.io.write_elem(file, "var", pd.DataFrame(index=gene_names()))
    return {
        "genes of a cell, median": float(np.median(expressed)),
        "stored values": int(expressed.sum()),
        "file (GB)": (folder / "cells.h5ad").stat().st_size / 1e9,
    }


def network(dim: int = 32):
    """scGPT of one layer, ``dim`` wide, random weights; its vocabulary is the genes of the file."""
    import torch

    from scsae_utils.scgpt import ScGPT, ScGPTConfig

    torch.manual_seed(0)
    tokens = ["<pad>", "<cls>", *gene_names()]
    return ScGPT(ScGPTConfig(dim, 2, dim, 1), {token: i for i, token in enumerate(tokens)}).eval()


def choose_genes(folder: Path, n: int) -> dict:
    from scsae_utils.cells import load_cells

    columns = {"label": "type", "label_high": "coarse", "study": "donor"}
    adata = load_cells(
        folder / "cells.h5ad", **columns, n_top_genes=TOP, genes=network().genes, out=folder / "panel.h5ad"
    )
    return {"cells": adata.n_obs, "genes": adata.n_vars}


def bins_and_tokens(folder: Path, n: int) -> dict:
    from scsae_utils.embedding import BLOCK_CELLS, bin_cells, cell_tokens, token_ids
    from scsae_utils.stream import open_panel

    adata, model, lengths = open_panel(folder / "panel.h5ad"), network(), []
    ids = token_ids(adata.var_names, model)
    for start in range(0, adata.n_obs, BLOCK_CELLS):
        bins = bin_cells(adata, model, rows=slice(start, min(start + BLOCK_CELLS, adata.n_obs)))
        lengths += [len(tokens) for tokens, _ in cell_tokens(bins, ids, model)]
    return {"tokens of a cell, median": float(np.median(lengths))}


def embed_cells(folder: Path, n: int) -> dict:
    from scsae_utils.embedding import embed
    from scsae_utils.stream import open_panel

    embed(open_panel(folder / "panel.h5ad"), network(), out=folder / "small.npy", progress=False)
    return {}


def widen(folder: Path, n: int) -> dict:
    """The embeddings, spread over DIM dimensions; not a step of the method."""
    from sklearn.preprocessing import normalize

    small = np.load(folder / "small.npy", mmap_mode="r")
    directions = np.random.default_rng(0).normal(size=(small.shape[1], DIM)).astype(np.float32)
    wide = np.lib.format.open_memmap(folder / "a.npy", "w+", np.float32, (len(small), DIM))
    mean = small.mean(0)
    for start in range(0, len(small), BLOCK):  # centred and bent: else a few directions would hold all
        wide[start : start + BLOCK] = normalize(np.tanh(4 * (small[start : start + BLOCK] - mean) @ directions))
    return {}


def embedded(folder: Path):
    """Cells with embeddings on disk, split."""
    from anndata import AnnData

    from scsae_utils.cells import split_cells
    from scsae_utils.stream import open_panel

    obs = open_panel(folder / "panel.h5ad").obs
    return split_cells(AnnData(obs=obs, obsm={"X_scGPT": np.load(folder / "a.npy", mmap_mode="r")}))


def train(folder: Path, n: int) -> dict:
    from scsae_utils.sae import save_sae
    from scsae_utils.training import train_sae

    settings = {"n_concepts": CONCEPTS, "k": K, "batch_size": 1024, "learning_rate": 1e-3, "epochs": 1}
    sae = train_sae(embedded(folder), sae="batchtopk", **settings, progress=False)
    save_sae(sae, folder / "sae.safetensors")
    return {"variance explained": float(sae.history["variance_explained"].iloc[-1])}


def concepts(folder: Path, n: int) -> dict:
    from scsae_utils.concepts import add_taxonomy, concept_data, sae_metrics
    from scsae_utils.files import write
    from scsae_utils.sae import load_sae

    sae = load_sae(folder / "sae.safetensors")
    data = concept_data(embedded(folder), sae)
    table = sae_metrics(data, sae)
    add_taxonomy(data)
    write(data, folder / "concepts.h5ad")
    return {
        "concepts per cell": float(table.at["Concepts per sample", "Validation"]),
        **data.var["kind"][data.var["kept"]].value_counts().to_dict(),
    }


def umap(folder: Path, n: int) -> dict:
    from scsae_utils.embedding import add_umap

    add_umap(embedded(folder))
    return {}


def panel_in_memory(folder: Path, n: int) -> dict:
    import anndata as ad

    from scsae_utils.embedding import bin_cells

    adata = ad.read_h5ad(folder / "panel.h5ad")
    adata.layers["bins"] = bin_cells(adata, network())
    adata.obsm["X_scGPT"] = np.load(folder / "a.npy")
    return {"values of the panel": adata.X.nnz}


STAGES = {
    "write the file": write_file,
    "check, choose genes": choose_genes,
    "bins and tokens": bins_and_tokens,
    "embed": embed_cells,
    "widen": widen,
    "train": train,
    "concepts, taxonomy": concepts,
    "umap": umap,
    "panel in memory": panel_in_memory,
}
NOT_MEASURED = ("write the file", "widen")  # what makes the data is no part of the figures


def highest_resident() -> float:
    """Of this process so far, in GiB. Not ru_maxrss, which a child takes over from its parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def measure(stage: str, folder: Path, n: int) -> None:
    """In the child: one stage, its processor time, the time on the clock, and its peak."""
    import scsae_utils  # noqa: F401

    cpu, clock = time.process_time(), time.perf_counter()
    about = STAGES[stage](folder, n)
    times = {"seconds": time.process_time() - cpu, "clock": time.perf_counter() - clock}
    print(json.dumps(times | {"peak_gib": highest_resident(), "about": about}))


def run(n: int) -> list[dict]:
    """All stages for n cells. A stopped run goes on from the last whole stage; the data are deleted at the end."""
    folder = FOLDER / str(n)
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / "rows.jsonl"
    rows = [json.loads(line) for line in notes.read_text().splitlines()] if notes.is_file() else []
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    for stage in list(STAGES)[len(rows) :]:
        command = [sys.executable, __file__, "--stage", stage, "--cells", str(n)]
        child = subprocess.run(command, capture_output=True, text=True, env=os.environ | one_thread)
        if child.returncode:
            raise SystemExit(f"{stage}, {n} cells:\n{child.stderr}")
        rows.append({"cells": n, "stage": stage, **json.loads(child.stdout.splitlines()[-1])})
        with notes.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)
    for path in folder.iterdir():
        if path != notes:
            path.unlink()
    return rows


def exponents(rows: list[dict]) -> dict[str, float]:
    """Of each stage: the slope of log(seconds) over log(cells), by least squares."""
    found = {}
    for stage in STAGES:
        n, seconds = zip(*[(row["cells"], row["seconds"]) for row in rows if row["stage"] == stage])
        found[stage] = round(float(np.polyfit(np.log(n), np.log(seconds), 1)[0]), 2)
    return found


def main(sizes: list[int]) -> None:
    from record import keep, versions

    needed, free = 40e3 * max(sizes), shutil.disk_usage(ROOT).free
    if free < needed:
        raise SystemExit(f"{ROOT} has {free / 1e9:.0f} GB free, of {needed / 1e9:.0f} GB that are needed")
    rows = [row for n in sizes for row in run(n)]
    sizes = sorted(sizes)
    measured = [row for row in rows if row["stage"] not in NOT_MEASURED]
    peak, slope = max(row["peak_gib"] for row in measured), exponents(rows)
    figures = {
        "cells": max(sizes),
        "genes": GENES,
        "peak_gib": round(peak, 2),
        "limit_gib": LIMIT,
        "below_limit": peak < LIMIT,
        "minutes_in_all": round(sum(row["seconds"] for row in measured if row["cells"] == max(sizes)) / 60, 1),
        "exponent_of_time": {stage: slope[stage] for stage in STAGES if stage not in NOT_MEASURED},
        "generated": next(row["about"] for row in rows[::-1] if row["stage"] == "write the file"),
    }
    table = []
    for stage in STAGES:
        of = {row["cells"]: row for row in rows if row["stage"] == stage}
        seconds = {f"seconds, {n:,} cells": round(of[n]["seconds"], 1) for n in sizes}
        memory = {f"GiB, {n:,} cells": round(of[n]["peak_gib"], 2) for n in sizes}
        table.append({"stage": stage} | seconds | {"exponent": slope[stage]} | memory)
    keep("scale", table, figures, versions("anndata", "scanpy", "umap-learn", "torch", "numpy"))
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=SIZES)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        measure(arguments.stage, FOLDER / str(arguments.cells[0]), arguments.cells[0])
    else:
        main(arguments.cells)
