"""A small atlas with all its tables, known by hand; some of its labels are hostile."""

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scsae_utils.atlas import Tables
from scsae_utils.concepts import add_taxonomy
from scsae_utils.evidence import LINES

HOSTILE = "<img src=x onerror=\"document.body.dataset.hacked='yes'\">"
GENES = ["CD79A", "GNLY", "LYZ", "S100A9", HOSTILE]


def small_concepts(n_copies: int = 10) -> AnnData:
    """12 cells (4 of each type) x (6 concepts + copies of the last): B, B in part, T, all cells, dropped, mixed.

    Numbers are 0, 2, 4 and so on, so that a number is not a place. Cell 0 has a hostile name.
    """
    columns = {
        0: [4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        2: [5, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        4: [0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0],
        6: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2],
        8: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9],
        10: [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
    } | {12 + 2 * i: [0, 0, 1, 0, 0, 2, 0, 0, 0, 3, 0, 0] for i in range(n_copies)}
    X = sparse.csr_matrix(np.array(list(columns.values()), np.float32).T)
    types = np.repeat(["B cell", "T cell", "Monocyte"], 4)
    obs = pd.DataFrame(
        {"cell_type": types, "cell_type_mid": types, "cell_type_high": np.repeat(["B", "T", "Myeloid"], 4)}
        | {"study": ["one", "two"] * 6, "split": ["train", "validation"] * 6},
        index=[HOSTILE, *(f"cell {i}" for i in range(1, 12))],
    )
    n = X.getnnz(axis=0)
    var = pd.DataFrame(
        {"n_cells": n, "frequency": n / 12, "max_activation": X.max(axis=0).toarray().ravel(), "kept": True},
        index=[f"concept_{j}" for j in columns],
    )
    var.loc["concept_8", "kept"] = False
    rng = np.random.default_rng(0)
    place = {"X_umap": rng.normal(size=(12, 2)), "X_scGPT": np.arange(12.0)[:, None]}
    return add_taxonomy(AnnData(X, obs=obs, var=var, obsm=place, varm={"vectors": rng.normal(size=(len(n), 5))}))


def small_tables(n_copies: int = 10) -> Tables:
    """Concept 0 is driven by CD79A, held back by LYZ; GNLY goes with it; S100A9 is within its error."""
    concepts = small_concepts(n_copies)
    drivers = pd.DataFrame(
        [(0, "CD79A", 0.4, 0.05, 0.001, "necessary", True), (0, "LYZ", -0.2, 0.05, 0.02, "", True)]
        + [(0, "GNLY", 0.005, 0.01, 0.9, None, False), (0, "S100A9", 0.3, 0.2, 0.3, "", False)]
        + [(0, HOSTILE, 0.1, 0.01, 0.04, "", False), (4, "LYZ", 0.5, 0.1, np.nan, "", True)],
        columns="concept gene attribution error q_value tag selected".split(),
    )
    quadrants = pd.DataFrame(
        [(0, "CD79A", 3.0, True), (0, "LYZ", 0.1, False), (0, "GNLY", -4.0, True), (0, "S100A9", 1.0, False)],
        columns="concept gene log2fc differs".split(),
    )
    attributions = pd.DataFrame(
        [(0, HOSTILE, "CD79A", 0.5), (0, HOSTILE, "LYZ", -0.1), (0, "cell 1", "CD79A", 0.3), (4, "cell 7", "LYZ", 0.6)],
        columns="concept cell gene attribution".split(),
    )
    curves = pd.DataFrame(
        [(0, order, n, left) for order, end in [("attribution", 0.1), ("random 0", 0.6), ("random 1", 0.8)]
         for n, left in [(0, 1.0), (1, end), (4, 0.0)]],
        columns="concept order n deletion".split(),
    )  # fmt: skip
    evidence = pd.DataFrame({f"{line}_verdict": "passed" for line in LINES}, index=concepts.var_names)
    evidence["stable_verdict"], evidence["driven_verdict"] = "failed", "not testable"
    evidence["stable_value"], evidence["stable_null"], evidence["stable_note"] = 0.25, 0.1, "1 of 4"
    evidence["grade"] = ["A", "B", "C", "D"] * (len(evidence) // 4) + ["D"] * (len(evidence) % 4)
    evidence["reading"] = np.where(concepts.var["kind"] == "cross-cell-type", "program", "")
    names = pd.DataFrame({"name": "", "auroc": 0.9, "auroc_low": 0.8, "auroc_high": 0.95}, index=concepts.var_names)
    names.loc["concept_0", "name"], names.loc["concept_6", "name"] = "B cell: immunoglobulin", HOSTILE
    names.loc["concept_4", "name"] = "concept 4 (sub-cell-type)"
    words = pd.DataFrame({"concept": [0, 0], "word": ["antigen", HOSTILE], "count": [2, 1], "qvalue": [0.01, np.nan]})
    sets = pd.DataFrame({"concept": [0], "set": ["enriched in B cells (M47)"], "qvalue": [0.001], "genes": ["CD79A"]})
    adata = AnnData(np.tile(np.arange(5, dtype=np.float32), (12, 1)), obs=concepts.obs, var=pd.DataFrame(index=GENES))
    words = words.assign(genes="CD79A,LYZ")
    return Tables(concepts, adata, drivers, quadrants, attributions, curves, evidence, names, words, sets)
