"""What the same steps give where nothing was learned: dictionaries of random weights, random directions, ICA, PCA.

Each null goes through the same post-processing, taxonomy, attribution and enrichment as the real dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from sklearn.preprocessing import normalize

from .attribution import AttributionConfig
from .concepts import KINDS, add_taxonomy, attributable, concept_data, kept, number
from .controls import types_found
from .dictionaries import BaselineConfig, fill, fit_baseline
from .embedding import embed
from .encoder import CellEncoder
from .evidence import enrichment, halves, match
from .metrics import l0, variance_explained
from .sae import Dictionary
from .screening import ScreeningConfig, attribute_all
from .training import train_saes


@dataclass(frozen=True)
class Case:
    """A dictionary, with what it was made for.

    Parameters
    ----------
    cells, model
        Embedded cells, and what they were embedded with.
    dictionary
        Of these embeddings.
    """

    cells: AnnData
    model: CellEncoder
    dictionary: Dictionary

    def activations(self) -> sparse.csr_matrix:
        """(n, c) of all concepts in all cells."""
        return self.dictionary.activations(self.cells.obsm["X_scGPT"])


def random_directions(a: np.ndarray, n_concepts: int, k: int, seed: int = 0) -> Dictionary:
    """Directions at random from the mean of the embeddings a (n, d); on average ``k`` of them are active in a cell."""
    vectors = normalize(np.random.default_rng(seed).standard_normal((n_concepts, a.shape[1])))
    dictionary = Dictionary(BaselineConfig("raw", n_concepts, k, seed), a.shape[1])
    fill(dictionary, W_e=vectors.T, W_d=vectors, b_d=a.mean(0))
    dictionary.calibrate(torch.from_numpy(np.asarray(a, np.float32)), k)
    return dictionary.eval().requires_grad_(False)


def random_activations(case: Case, n: int = 20, seed: int = 0) -> Iterator[sparse.csr_matrix]:
    """Activations (n, c) in a case's cells of ``n`` dictionaries of random directions, as large and as sparse."""
    a = case.cells.obsm["X_scGPT"]
    size, k = case.dictionary.config.n_concepts, max(1, round(l0(case.activations())))
    return (random_directions(a, size, k, seed + i).activations(a) for i in range(n))


def make_cases(
    adata: AnnData, model: CellEncoder, sae: Dictionary, n_seeds: int = 3, seed: int = 0, progress: bool = True
) -> tuple[dict[str, Case], list[Dictionary]]:
    """The real dictionary and the nulls, all as sparse; and ``n_seeds`` dictionaries like the real one of other seeds.

    ``scGPT``: the dictionary that is examined. ``random weights``: the same architecture without training, in place of
    the model. ``random dictionary``: trained, but for its vectors, which stay as they were drawn. ``random
    directions``: not trained at all. ``ICA`` and ``PCA``: fitted to training cells, with as many directions; see
    :func:`~scsae_utils.dictionaries.fit_baseline`.
    """
    rng = np.random.default_rng(seed)
    seeds = [int(s) for s in rng.choice(2**31, n_seeds + 1, replace=False)]
    a = adata.obsm["X_scGPT"][(adata.obs["split"] == "train").to_numpy()]
    k, n = max(1, round(l0(sae.activations(a)))), sae.config.n_concepts
    configs = [replace(sae.config, seed=s) for s in seeds]
    *others, frozen = train_saes(adata, [*configs[:-1], replace(configs[-1], train_decoder=False)], progress=progress)
    random = model.random_like(seeds[-1])
    layers = {name: layer for name, layer in adata.layers.items() if name != "bins"}  # shared, not copied
    cells = AnnData(adata.X, obs=adata.obs, var=adata.var, layers=layers)
    embed(cells, random, progress=False)
    cases = {
        "scGPT": Case(adata, model, sae),
        "random weights": Case(cells, random, train_saes(cells, [sae.config], progress=progress)[0]),
        "random dictionary": Case(adata, model, frozen),
        "random directions": Case(adata, model, random_directions(a, n, k, seeds[-1])),
        "ICA": Case(adata, model, fit_baseline(a, BaselineConfig("ica", n, k, seeds[-1]))),
        "PCA": Case(adata, model, fit_baseline(a, BaselineConfig("pca", n, k))),
    }
    return cases, others


def measure(
    case: Case,
    min_frequency: float,
    threshold: float = 0.8,
    attributions: pd.DataFrame | None = None,
    occlusion: AttributionConfig | None = None,
    n_concepts: int | None = None,
    sets: dict | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[AnnData, pd.DataFrame]:
    """Concepts of a case, and what they reach.

    Parameters
    ----------
    attributions
        Known ones; otherwise those of a random ``n_concepts`` of the kept concepts are computed (None: of all; 0: of
        none). Compare cases with as many prototypes each.
    sets
        From :func:`~scsae_utils.genesets.on_panel`: are the genes with the strongest attributions rich in one? None:
        not asked.

    Returns
    -------
    Cells x concepts with taxonomy; and for each kept concept ``kind``, ``n_cells``, ``f1`` (held-out cells),
    ``strength`` and ``agreement`` (:func:`~scsae_utils.evidence.halves`), ``enriched`` (q-value of the best gene set);
    NaN for what was not computed.
    """
    concepts = add_taxonomy(concept_data(case.cells, case.dictionary, min_frequency), threshold)
    var = kept(concepts).var
    table = var[["kind", "n_cells"]].assign(f1=var["f1_held_out"], strength=np.nan, agreement=np.nan, enriched=np.nan)
    if attributions is None:
        some = np.array([number(name) for name in attributable(concepts).var_names], int)
        if n_concepts is not None and len(some) > n_concepts:
            some = np.sort(np.random.default_rng(seed).choice(some, n_concepts, replace=False))
        if len(some) == 0:
            return concepts, table
        occlusion = occlusion or AttributionConfig()
        screening = ScreeningConfig(min_prototypes=max(1, occlusion.n_prototypes // 4), seed=seed)  # as 5 of 20
        attributions = attribute_all(
            case.cells, case.model, case.dictionary, some, occlusion, screening=screening, progress=progress
        )
    agreement = halves(attributions, n_draws=2)
    names = [f"concept_{j}" for j in agreement.index]
    table.loc[names, ["strength", "agreement"]] = agreement[["strength", "agreement"]].to_numpy()
    if sets is not None:
        drivers = attributions.groupby(["concept", "gene"])["attribution"].sum().reset_index().assign(selected=False)
        expression = np.asarray(case.cells.X.mean(axis=0)).ravel()
        found = enrichment(drivers, sets, case.cells.var_names, expression, n_random=1, seed=seed)
        table.loc[[f"concept_{j}" for j in found.index], "enriched"] = found["best"].to_numpy(float)
    return concepts, table


def headline(
    cases: dict[str, Case],
    others: list[Dictionary],
    concepts: dict[str, AnnData],
    tables: dict[str, pd.DataFrame],
    min_match: float = 0.7,
    max_q: float = 0.05,
) -> pd.DataFrame:
    """The figures that the book is about, real and null, one column for each case.

    Parameters
    ----------
    cases, others
        From :func:`make_cases`.
    concepts, tables
        From :func:`measure`, by case.

    Returns
    -------
    Rows: ``concepts`` (kept), numbers of each kind, ``types found`` (:func:`~scsae_utils.controls.types_found`),
    ``variance explained`` (held-out cells), ``held-out F1`` (median over concepts with a type), ``real concepts found``
    (share of the concepts of scGPT that have a match there; of scGPT itself, in its other seeds, on average),
    ``attribution`` (median of the largest of a concept), ``agreement`` (median), ``gene sets`` (share of the concepts
    with one below ``max_q``).
    """
    rows, real = {}, kept(concepts["scGPT"]).X
    for name, case in cases.items():
        data, table = concepts[name], tables[name]
        held_out = (data.obs["split"] == "validation").to_numpy()
        a, kinds = data.obsm["X_scGPT"][held_out], table["kind"].value_counts()
        looked_at = table["enriched"].dropna()
        there = [replace(case, dictionary=other) for other in others] if name == "scGPT" else [case]
        rows[name] = {
            "concepts": len(table),
            **{kind: kinds.get(kind, 0) for kind in KINDS},
            "types found": len(types_found(data)),
            "variance explained": variance_explained(a, case.dictionary.decode_sparse(data.X[held_out])),
            "held-out F1": table.loc[table["kind"] != KINDS[2], "f1"].median(),
            "real concepts found": np.mean([match(real, each.activations()) >= min_match for each in there]),
            "attribution": table["strength"].median(),
            "agreement": table["agreement"].median(),
            "gene sets": (looked_at < max_q).mean() if len(looked_at) else np.nan,
        }
    return pd.DataFrame(rows)
