"""Memory of training on a file, against the number of cells: python benchmarks/sae_memory.py

A dictionary of 1,024 concepts is trained for one epoch on random embeddings of 512 dimensions, which lie in a .npy
file (4 GB for two million cells) that is opened with ``mmap_mode="r"``, and the activations of all cells are computed.
Each size runs in a process of its own. Memory is that process's highest resident set (VmHWM, Linux), which counts the
pages of the file that are mapped. The activations are the result, and grow with the cells: 16 of them for each.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

SIZES, DIM, CONCEPTS, K = [250_000, 500_000, 1_000_000, 2_000_000], 512, 1024, 16
BLOCK = 50_000


def main() -> None:
    from record import keep

    with tempfile.TemporaryDirectory() as folder:
        needed, free = max(SIZES) * DIM * 4, shutil.disk_usage(folder).free
        if free < 1.2 * needed:
            raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free, of {needed / 1e9:.1f} GB that are needed")
        rows = []
        for n in SIZES:
            path = Path(folder, "a.npy")
            write(path, n)
            run = subprocess.run([sys.executable, __file__, path], capture_output=True, text=True, check=True)
            rows.append({"cells": n} | json.loads(run.stdout))
            print(rows[-1], flush=True)
    figures = {
        "training_peak_gib": {row["cells"]: row["training_peak_gib"] for row in rows},
        "peak_gib": {row["cells"]: row["peak_gib"] for row in rows},
        "training_memory_ratio": rows[-1]["training_peak_gib"] / rows[0]["training_peak_gib"],
        "cells_ratio": SIZES[-1] / SIZES[0],
    }
    keep("sae_memory", rows, figures)


def write(path: Path, n: int) -> None:
    """Sums of a few of 256 directions and noise, of unit length, a block at a time."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(256, DIM)).astype(np.float32)
    file = np.lib.format.open_memmap(path, "w+", np.float32, (n, DIM))
    for start in range(0, n, BLOCK):
        size = min(BLOCK, n - start)
        block = directions[rng.integers(256, size=(size, 4))].sum(1)
        block += rng.standard_normal(size=block.shape, dtype=np.float32)
        file[start : start + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
    file.flush()


def measure(path: str) -> dict:
    """In the child: train, and compute activations."""
    from scsae_utils.training import train_sae

    a, before = np.load(path, mmap_mode="r"), highest_resident()
    settings = {"n_concepts": CONCEPTS, "k": K, "batch_size": 4096, "learning_rate": 1e-3, "epochs": 1}
    sae = train_sae(a, sae="batchtopk", **settings, progress=False)
    trained = highest_resident()
    u = sae.activations(a)
    return {
        "before_gib": before,
        "training_peak_gib": trained,
        "peak_gib": highest_resident(),
        "activations_gib": (u.data.nbytes + u.indices.nbytes + u.indptr.nbytes) / 2**30,
        "variance_explained": float(sae.history["variance_explained"].iloc[-1]),
    }


def highest_resident() -> float:
    """Of this process so far, in GiB. Not ru_maxrss, which a child takes over from its parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
