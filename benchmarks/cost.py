"""What the paper's own scale costs, on two cores and on one GPU: python benchmarks/cost.py

The profile atlas: 329,762 cells, the whole-human checkpoint (12 layers, 512 wide), 10,000 concepts trained for 1,000
epochs, attribution of concepts with 20 prototypes each. Every row says how its time is known:

- "measured": the whole work was done, by benchmarks/scale.py.
- "measured rate": a rate that a benchmark measured on its machine (results/*.json), times the amount of work.
- "measured rate, scaled": such a rate for cells of other length, by the operations of the network.
- "calculated": operations over the peak of the processor (the maker's figure) times an assumed utilisation.

Run it again when a benchmark that it reads has a new result.
"""

import json
import time

import numpy as np
from embedding import flops
from record import RESULTS, keep, versions

CELLS, HELD_OUT, DIM, CONCEPTS, EPOCHS, BATCH = 329_762, 0.2, 512, 10_000, 1000, 1024
PROTOTYPES, SURVIVING = 20, 304  # concepts that the paper keeps
TOKENS = 500  # genes that a cell of the atlas may express of its 2,000 variable ones
# NVIDIA H200: dense operations a second in half precision and (without tensor cores) in single; bytes of memory.
GPU = {"half": 989e12, "single": 67e12, "memory": 141e9}
UTILISATION = {"half": 0.3, "single": 0.5}  # assumed: matrices 512 wide are small for tensor cores
SMALLER_GPU = 80e9  # bytes of memory of the other usual size


def result(name: str) -> dict:
    """The last result of another benchmark; empty if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"rows": [], "figures": {}}


def row(step: str, processor: str, seconds: float, how: str) -> dict:
    units = [("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1)]
    unit, size = next((u for u in units if seconds >= 2 * u[1]), units[-1])
    return {"step": step, "on": processor, "time": f"{seconds / size:.3g} {unit}", "how": how}


def reading() -> list[dict]:
    """What no GPU takes over: of generated cells of the size of the atlas."""
    seconds = {r["stage"]: r.get(f"seconds, {CELLS:,} cells") for r in result("scale")["rows"]}
    stages = ("check, choose genes", "bins and tokens")
    return [row(stage, "1 core", seconds[stage], "measured") for stage in stages if seconds.get(stage)]


def embedding() -> list[dict]:
    """All cells once; chapters 1 and 3 embed them again with random weights, the first one a sample only."""
    measured = result("embedding")
    length = measured["figures"]["tokens_per_cell"]
    rows = []
    for device in dict.fromkeys(r["device"] for r in measured["rows"]):
        best = max((r for r in measured["rows"] if r["device"] == device), key=lambda r: r["cells/s"])
        processor = "2 cores" if device == "cpu" else "one GPU"
        seconds = CELLS / best["cells/s"]
        rows.append(row(f"embed, {length:.0f} tokens a cell", processor, seconds, f"measured rate ({best['run']})"))
        seconds *= operations(TOKENS) / operations(length)
        rows.append(row(f"embed, {TOKENS} tokens a cell", processor, seconds, f"measured rate, scaled ({best['run']})"))
    if "one GPU" not in {r["on"] for r in rows}:
        for n in (length, TOKENS):
            seconds = CELLS * operations(n) / (GPU["half"] * UTILISATION["half"])
            rows.append(row(f"embed, {n:.0f} tokens a cell", "one GPU", seconds, "calculated (half)"))
    return rows


def operations(tokens: float) -> float:
    """Of one cell's pass through the network."""
    return flops(np.array([tokens]))


def dictionary() -> list[dict]:
    """Training with the paper's settings. Its beginning, with more active concepts, is slower."""
    measured = {r["run"]: r["cells/s"] for r in result("sae_training")["rows"]}
    passes = EPOCHS * CELLS * (1 - HELD_OUT)
    dense = 12 * DIM * CONCEPTS * passes / (GPU["single"] * UTILISATION["single"])  # two products, forward and back
    return [
        row("train, as this package does", "2 cores", passes / measured["ours"], "measured rate (single)"),
        row("train, in plain PyTorch", "2 cores", passes / measured["plain"], "measured rate (single)"),
        row("train, all concepts dense", "one GPU", dense, "calculated (single)"),
        row("train: reading the cells", "1 core", passes / reading_rate(), "measured rate (single)"),
    ]


def reading_rate(n: int = 65_536) -> float:
    """Cells that come shuffled from a file to the training, in a second of processor time."""
    import sys
    import tempfile
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scsae_utils.training import Rows

    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "a.npy"), np.random.default_rng(0).random((n, DIM), np.float32))
        rows = Rows(np.load(Path(folder, "a.npy"), mmap_mode="r"))
        times = []
        for epoch in range(4):  # the first warms up
            start = time.process_time()
            sum(len(a) for a in rows.batches(BATCH, [0, epoch]))
            times.append(time.process_time() - start)
    return n / float(np.median(times[1:]))


def attribution() -> list[dict]:
    """Every gene of every prototype, exhaustive (a pass for each change) and screened."""
    found = result("attribution")
    of_size = {r["way"]: r["seconds per change"] for r in found["rows"] if r["size"] == "whole_human"}
    saved = found["figures"].get("whole_human", found["figures"].get("mini", {}))["forward_passes_saved"]
    changes = PROTOTYPES * TOKENS
    exact = changes * operations(TOKENS)
    on_gpu = exact / (GPU["half"] * UTILISATION["half"])
    if of_size:
        on_cpu = {way: changes * of_size[way] for way in ("exhaustive", "screened")}
        how = dict.fromkeys(on_cpu, "measured rate")
    else:
        rate = next(r["GFLOP/s"] for r in result("embedding")["rows"] if r["run"] == "float32") * 1e9
        on_cpu = {"exhaustive": exact / rate, "screened": exact / rate / saved}
        how = {"exhaustive": "measured rate of embedding, scaled", "screened": "the same, over the passes saved"}
    rows = []
    for n in (SURVIVING, CONCEPTS):
        for way in ("exhaustive", "screened"):
            step, gpu = f"attribute {n:,} concepts, {way}", on_gpu / (saved if way == "screened" else 1)
            rows += [
                row(step, "2 cores", n * on_cpu[way], how[way]),
                row(step, "one GPU", n * gpu, "calculated (half)"),
            ]
    return rows


def limits() -> dict:
    """Up to what size one GPU holds the embeddings beside a dictionary in training, were they kept there."""
    state = 4 * 4 * (2 * DIM * CONCEPTS + CONCEPTS + DIM)  # weights, gradients and Adam's two moments
    batch = 6 * 4 * BATCH * CONCEPTS  # activations of a batch and what their gradients need
    held = {
        name: int((size - state - batch) / (4 * DIM)) for name, size in (("80", SMALLER_GPU), ("141", GPU["memory"]))
    }
    memory = result("sae_memory")
    return {
        "embeddings_mb": CELLS * DIM * 4 / 1e6,
        "training_state_mb": (state + batch) / 1e6,
        "cells_that_fit_gpu_of_gb": held,
        "training_from_disk_gib_at_cells": memory["figures"]["training_peak_gib"],
    }


def main() -> None:
    rows = [*reading(), *embedding(), *dictionary(), *attribution()]
    assumed = {
        "gpu": "NVIDIA H200",
        "peak_tflops": {name: GPU[name] / 1e12 for name in UTILISATION},
        "assumed_utilisation": UTILISATION,
        "tflop_per_cell": {str(n): operations(n) / 1e12 for n in (258, TOKENS, 1200)},
    }
    keep("cost", rows, assumed | limits(), versions("torch", "numpy"))


if __name__ == "__main__":
    main()
