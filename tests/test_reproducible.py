"""The same settings and machine give the same files, byte for byte: cells to statistics of genes, in two processes.

`make test-slurm` does the same with the notebooks, through Snakemake, and with jobs that are killed.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from scsae_utils import load_cells, load_model
from scsae_utils.book import ROOT
from scsae_utils.files import write, write_table
from scsae_utils.runs import make_run
from scsae_utils.sae import SAEConfig, save_sae
from scsae_utils.screening import ScreeningConfig, attribute_all
from scsae_utils.significance import gene_statistics


def tables(folder: Path) -> None:
    """A small run, from cells to statistics of genes, with what it leaves on disk."""
    model = load_model("scgpt-mini")
    cells = load_cells("mini", n_top_genes=200, genes=model.genes)
    cells = cells[np.random.default_rng(0).choice(cells.n_obs, 200, replace=False)].copy()
    config = SAEConfig("batchtopk", n_concepts=32, k=4, batch_size=64, learning_rate=2e-3, epochs=10, seed=0)
    run = make_run(cells, model, config, min_frequency=0.01, progress=False)
    chosen = [int(name.split("_")[1]) for name in run.concepts.var_names[run.concepts.var["kept"]]][:3]
    attributions = attribute_all(
        run.cells, model, run.sae, chosen, screening=ScreeningConfig(min_prototypes=2), n_prototypes=4, progress=False
    )
    write(run.cells, folder / "embedded.h5ad")
    write(run.concepts, folder / "concepts.h5ad")
    save_sae(run.sae, folder / "sae.safetensors")
    write_table(attributions, folder / "attributions.parquet")
    write_table(gene_statistics(attributions, min_prototypes=2).reset_index(), folder / "statistics.parquet")


def test_two_processes_write_the_same_bytes(tmp_path):
    code = "import sys, pathlib, test_reproducible as t; t.tables(pathlib.Path(sys.argv[1]))"
    for name, seed in (("one", "1"), ("two", "7")):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], env=environment, check=True)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 5 and names == sorted(path.name for path in (tmp_path / "two").iterdir())
    different = [n for n in names if (tmp_path / "one" / n).read_bytes() != (tmp_path / "two" / n).read_bytes()]
    assert not different
