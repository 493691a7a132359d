"""What the same steps give without what is to be shown: random weights, principal components, another objective."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.preprocessing import normalize

from .cells import LEVELS, UNASSIGNED
from .concepts import KINDS, add_taxonomy, concept_data, kept
from .dictionaries import METHODS, BaselineConfig, fit_baseline
from .metrics import l0, stability, surviving, type_f1, variance_explained
from .quality import principal_components, random_embedding
from .sae import ARCHITECTURES, SAE, Dictionary, SAEConfig
from .scgpt import ScGPT
from .training import train_sae, train_saes


def held_out_scores(adata: AnnData, dictionary: Dictionary, min_frequency: float, key: str = "X_scGPT") -> dict:
    """What a dictionary is worth on the cells that were held out.

    Returns
    -------
    ``variance explained``, ``concepts per cell``, ``types found`` (:func:`types_found`) and ``mean F1``
    (:func:`best_f1`, of all types) of validation cells, and ``surviving``: the share of the dictionary that
    post-processing keeps, on all cells.
    """
    concepts = concept_data(adata, dictionary, min_frequency, key)
    held_out = (adata.obs["split"] == "validation").to_numpy()
    a, U = adata.obsm[key][held_out], concepts.X[held_out]
    f1 = best_f1(concepts)
    return {
        "variance explained": variance_explained(a, dictionary.decode_sparse(U)),
        "concepts per cell": l0(U),
        "surviving": float(concepts.var["kept"].mean()),
        "types found": int((f1 > 0.8).sum()),
        "mean F1": float(f1.mean()),
    }


def paper_at(adata: AnnData, config: SAEConfig, key: str = "X_scGPT", factors=(0.3, 1, 3)) -> SAEConfig:
    """The paper's objective with the penalty that gives about ``config.k`` active concepts for a training cell.

    Between penalties of ``factors`` times ``config.l1``, the number is taken as a power of the penalty.
    """
    tries = [replace(config, sae="paper", whiten=0.0, l1=config.l1 * f) for f in factors]
    active = [sae.history["concepts_per_cell"].iloc[-1] for sae in train_saes(adata, tries, key, progress=False)]
    penalties = np.log([each.l1 for each in tries])
    return replace(
        tries[0], l1=float(np.exp(np.interp(-np.log(config.k), -np.log(np.maximum(active, 0.1)), penalties)))
    )


def compare_dictionaries(adata: AnnData, config: SAEConfig, min_frequency: float, key: str = "X_scGPT") -> pd.DataFrame:
    """Every architecture beside what it must beat; scores are of held-out cells.

    Settings are those of ``config``, but that the paper's objective, TopK and the random dictionary are not whitened.

    All aim at ``config.k`` active concepts of a cell: the paper's objective by its penalty (:func:`paper_at`), the
    references by a threshold. That of NMF leaves out parts which add up, so that it costs reconstruction.

    Returns
    -------
    One row for each architecture, then ``random dictionary`` (``train_decoder=False``), ``pca``, ``ica``, ``nmf``,
    ``raw``; columns as :func:`held_out_scores`.
    """
    configs = {
        name: replace(config, whiten=0.0 if name == "topk" else config.whiten, sae=name) for name in ARCHITECTURES
    }
    configs["paper"] = paper_at(adata, config, key)
    configs["random dictionary"] = replace(config, sae="batchtopk", whiten=0.0, train_decoder=False)
    made = dict(zip(configs, train_saes(adata, list(configs.values()), key, progress=False)))
    train = adata.obsm[key][(adata.obs["split"] == "train").to_numpy()]
    for method in METHODS:
        baseline = BaselineConfig(method, config.n_concepts, config.k, config.seed)
        made[method] = fit_baseline(train, baseline)
    return pd.DataFrame({name: held_out_scores(adata, d, min_frequency, key) for name, d in made.items()}).T


def sweep(
    adata: AnnData,
    config: SAEConfig,
    n_concepts: list[int],
    k: list[int],
    min_frequency: float,
    n_seeds: int = 2,
    key: str = "X_scGPT",
    progress: bool = True,
) -> pd.DataFrame:
    """Dictionaries of several sizes and sparsities, each from several seeds, all trained in one pass.

    Returns
    -------
    One row for each pair of ``n_concepts`` and ``k``; the scores of :func:`held_out_scores`, as means over the seeds,
    and ``stability``: mean cosine of surviving concept vectors of two seeds, matched one to one.
    """
    points = [(c, a) for c in n_concepts for a in k]
    configs = [
        replace(config, n_concepts=c, k=a, seed=config.seed + i) for c, a in points for i in range(max(2, n_seeds))
    ]
    rows = {}
    for each, sae in zip(configs, train_saes(adata, configs, key, progress=progress)):
        alive = surviving(sae.activations(adata.obsm[key]), min_frequency)
        rows.setdefault((each.n_concepts, each.k), []).append(
            (held_out_scores(adata, sae, min_frequency, key), sae.vectors[alive])
        )
    table = []
    for (size, active), seeds in rows.items():
        vectors = [v for _, v in seeds]
        alike = [stability(one, other)["matched_cosine"] for one, other in combinations(vectors, 2)]
        mean = pd.DataFrame([scores for scores, _ in seeds]).mean().to_dict()
        table.append({"n_concepts": size, "k": active} | mean | {"stability": float(np.mean(alike))})
    return pd.DataFrame(table)


def best_f1(concepts: AnnData, min_cells: int = 5) -> pd.Series:
    """How well each cell type (any level, once by name) is told by one concept: chosen on training, scored on held-out.

    For each type the surviving concept with the best F1 on training cells is taken. Types with fewer than
    ``min_cells`` held-out cells are not asked for.

    Returns
    -------
    F1 of that concept on the held-out cells, by type.
    """
    train = (concepts.obs["split"] == "train").to_numpy()
    U = kept(concepts).X
    found = {}
    for column in LEVELS.values():
        labels = concepts.obs[column].astype(str).to_numpy()
        chosen, scored = type_f1(U[train], labels[train]), type_f1(U[~train], labels[~train])
        sizes = pd.Series(labels[~train]).value_counts()
        for name in sizes.index[sizes >= min_cells].intersection(chosen.columns).difference([UNASSIGNED]):
            found[name] = float(scored.at[chosen[name].idxmax(), name]) if len(chosen) else 0.0
    return pd.Series(found, dtype=float)


def types_found(concepts: AnnData, min_f1: float = 0.8, min_cells: int = 5) -> dict[str, float]:
    """Those cell types of :func:`best_f1` whose F1 on held-out cells exceeds ``min_f1``."""
    f1 = best_f1(concepts, min_cells)
    return f1[f1 > min_f1].to_dict()


def taxonomy_nulls(
    adata: AnnData, model: ScGPT, sae: SAE, concepts: AnnData, threshold: float = 0.8, seed: int = 0
) -> pd.DataFrame:
    """The counts of the taxonomy, beside those of the same SAE on random weights and on principal components.

    Returns
    -------
    Rows ``scGPT``, ``random weights``, ``principal components`` (50, unit length); columns: number of ``concepts``
    kept, number of each kind, ``types found`` (:func:`types_found`), ``variance explained`` (all cells).
    """
    train = (adata.obs["split"] == "train").to_numpy()
    others = {
        "random weights": random_embedding(adata, model, seed),
        "principal components": normalize(principal_components(adata, fit_on=train)),
    }
    data, rows = {"scGPT": (concepts, sae)}, {}
    for name, X in others.items():
        cells = AnnData(obs=adata.obs, obsm={"X": X})
        other = train_sae(cells, sae.config, key="X", device=adata.uns["scgpt"].get("device", "cpu"), progress=False)
        data[name] = add_taxonomy(concept_data(cells, other, concepts.uns["min_frequency"], key="X"), threshold), other
    for name, (cells, dictionary) in data.items():
        kinds = kept(cells).var["kind"].value_counts()
        key = "X_scGPT" if name == "scGPT" else "X"
        rows[name] = {
            "concepts": cells.var["kept"].sum(),
            **{kind: kinds.get(kind, 0) for kind in KINDS},
            "types found": len(types_found(cells)),
            "variance explained": variance_explained(cells.obsm[key], dictionary.decode_sparse(cells.X)),
        }
    table = pd.DataFrame(rows).T
    return table.astype({c: int for c in table if c != "variance explained"})
