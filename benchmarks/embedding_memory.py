"""Memory of embedding cells of a backed file, against the number of cells: python benchmarks/embedding_memory.py

Cells are drawn at random, 2,000 genes with 10 % of them expressed; the network has one layer: the question is what
is kept and not what is computed. Each size runs in a process of its own; memory is that process's highest resident set
(VmHWM, Linux), less what it was after the imports.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import keep

SIZES = [5_000, 20_000, 80_000]
GENES = [f"G{i}" for i in range(2000)]


def write_cells(path: Path, n: int) -> None:
    """An h5ad of n cells, written without ever holding more than its sparse matrix."""
    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    X = sparse.random(n, len(GENES), 0.1, "csr", np.float32, 0)
    X.data = np.ceil(9 * X.data).astype(np.float32)
    AnnData(X, pd.DataFrame(index=[f"c{i}" for i in range(n)]), pd.DataFrame(index=GENES)).write(path)


def highest_resident() -> float:
    """Of this process so far, in MiB. Not ru_maxrss, which a child takes over from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(path: str) -> None:
    """In the child: embed, and print the growth of the highest resident set."""
    import anndata

    from scsae_utils.embedding import embed
    from scsae_utils.scgpt import ScGPT, ScGPTConfig

    model = ScGPT(ScGPTConfig(32, 2, 32, 1), {s: i for i, s in enumerate(["<pad>", "<cls>", *GENES])}).eval()
    adata = anndata.read_h5ad(path, backed="r")
    before = highest_resident()
    embed(adata, model, out=Path(path).with_suffix(".npy"), progress=False)
    print(json.dumps(highest_resident() - before))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        rows = []
        for n in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "cells.h5ad")
                write_cells(path, n)
                child = subprocess.run([sys.executable, __file__, path], capture_output=True, text=True, check=True)
                rows.append({"cells": n, "memory (MiB)": round(json.loads(child.stdout), 1)})
        ratio = rows[-1]["memory (MiB)"] / rows[0]["memory (MiB)"]
        keep("embedding_memory", rows, {"memory_ratio": round(ratio, 2), "cells_ratio": SIZES[-1] / SIZES[0]})
