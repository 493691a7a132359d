"""The chapters of the book on as many cells as the paper's atlas has: python benchmarks/chapters.py

A file like that of scale.py (329,762 generated cells, 29,335 genes) goes through the notebooks as `make book` executes
them, from cells to the page on which concepts are searched. The profile is ``atlas`` but for what would take a GPU or
say nothing of made-up cells: the network has one layer (512 wide, random weights), the dictionary is BatchTopK (36
active concepts of 10,000, as many as the paper's after its thousand epochs) and is trained for two epochs, and
attributions are of some concepts. Texts and gene sets are those that travel in packages.

Memory is the highest resident set of a chapter's largest process, the kernel, from start to end; time is on the clock,
with all cores. Files lie in runs/ and are deleted when all chapters are done; a stopped call goes on from the
last whole chapter.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CELLS, DIM, LIMIT = 329_762, 512, 8  # GiB; of the chapters up to the taxonomy
ORDER = [
    *("01_embedding", "02_sae", "03_concept_taxonomy"),
    *("05b_drivers", "06_evidence", "04_case_study", "05_myeloid_concepts", "07_atlas"),
]
FEWER = {  # than in profiles/atlas.yaml
    "sae": {"sae": "batchtopk", "learning_rate": 1e-3, "epochs": 2},
    "case_study": {"descriptions": "ncbi", "collection": "btm", "n_random_lists": 50},
    "drivers": {"n_concepts": 24, "n_replicated": 2},
    "evidence": {"n_seeds": 2, "n_null": 4, "gene_sets": "btm", "n_random": 50},
    "atlas": {"descriptions": "ncbi", "collection": "btm", "n_random": 50},
}


def prepare(n: int, folder: Path) -> Path:
    """The file of cells, the model and the profile; the path of the profile."""
    from scale import network, write_file

    from scsae_utils.scgpt import save_model

    if not (folder / "model" / "args.json").is_file():
        write_file(folder, n)
        save_model(network(DIM), folder / "model")
    profile = yaml.safe_load((ROOT / "profiles" / "atlas.yaml").read_text())
    model = str(folder / "model")
    labels = {"label": "type", "label_mid": None, "label_high": "coarse", "study": "donor"}
    profile["embedding"] |= {"cells": str(folder / "cells.h5ad"), **labels, "model": model, "precision": "float32"}
    lineage = {"types": ["coarse 0", "coarse 1"], "level": "high", "min_share": 0.2}
    profile["myeloid_concepts"] |= {"model": model, **lineage}
    for section, values in FEWER.items():
        profile[section] |= values
    for section in ("case_study", "drivers"):
        profile[section]["cell_type"] = "coarse 0"
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(profile, sort_keys=False))
    return path


def execute(chapter: str, profile: Path, run: Path) -> dict:
    """One chapter, in processes of its own: its time on the clock, and the peak of its largest process."""
    cores = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "scsae_utils.book", "execute", "--profile", str(profile), "--run", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": cores, "NUMBA_NUM_THREADS": cores}
    start = time.perf_counter()
    child = subprocess.Popen([*command, chapter], cwd=ROOT, env=environment)
    _, status, used = os.wait4(child.pid, 0)  # of the child and of what it waited for: the kernel
    if status:
        sys.exit(f"chapter {chapter} failed")
    return {
        "chapter": chapter,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "processor minutes": round((used.ru_utime + used.ru_stime) / 60, 1),
        "peak (GiB)": round(used.ru_maxrss / 2**20, 2),
    }


def main(n: int, chapters: list[str]) -> None:
    from record import keep, versions

    folder = ROOT / "runs" / f"chapters_{n}"
    folder.mkdir(parents=True, exist_ok=True)
    profile, notes = prepare(n, folder), folder / "rows.jsonl"
    rows = [json.loads(line) for line in notes.read_text().splitlines()] if notes.is_file() else []
    for chapter in [c for c in chapters if c not in {row["chapter"] for row in rows}]:
        rows.append(execute(chapter, profile, folder))
        with notes.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)
    peaks = {row["chapter"]: row["peak (GiB)"] for row in rows}
    if n != CELLS or not set(ORDER[:3]) <= set(peaks):
        return
    peak = max(peaks[c] for c in ORDER[:3])
    figures = {"cells": n, "peak_gib_to_taxonomy": peak, "limit_gib": LIMIT, "below_limit": peak < LIMIT}
    keep("chapters", rows, figures | {"peak_gib": max(peaks.values())}, versions("anndata", "scanpy", "torch", "numpy"))
    if set(peaks) == set(ORDER):
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=CELLS, help="fewer, to try it; the result is then not kept")
    parser.add_argument(
        "--chapters", nargs="+", choices=ORDER, default=ORDER, help="some; later ones need earlier ones"
    )
    arguments = parser.parse_args()
    main(arguments.cells, arguments.chapters)
