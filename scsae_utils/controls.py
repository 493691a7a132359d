"""What the same steps give without what is to be shown: random weights, principal components, another objective."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from .cells import LEVELS, UNASSIGNED
from .concepts import KINDS, add_taxonomy, concept_data, kept, score_types, variance_explained
from .quality import principal_components, random_embedding
from .sae import SAE, SAEConfig
from .scgpt import ScGPT
from .training import train_sae


def compare_penalties(adata: AnnData, config: SAEConfig, min_frequency: float, penalties) -> pd.DataFrame:
    """The dictionary of ``config`` beside the paper's objective with several L1 weights, on held-out cells.

    And beside principal components of the training cells' embeddings: 10, 20 and as many as ``config.k``; a cell needs
    all of them.
    """
    held_out = (adata.obs["split"] == "validation").to_numpy()
    a = adata.obsm["X_scGPT"][held_out]
    rows = []
    for each in [config, *(replace(config, sae="paper", l1=l1) for l1 in penalties)]:
        sae = train_sae(adata, each, progress=False)
        U = sae.activations(a)
        rows.append(
            {
                "sae": each.sae,
                "l1": each.l1 if each.sae == "paper" else np.nan,
                "variance explained (held out)": variance_explained(a, sae.decode_sparse(U)),
                "concepts per cell": U.nnz / len(a),
                "kept concepts": int(concept_data(adata, sae, min_frequency).var["kept"].sum()),
            }
        )
    train = adata.obsm["X_scGPT"][~held_out]
    for n in sorted({10, 20, config.k}):
        if n < min(train.shape):
            pca = PCA(n, random_state=0).fit(train)
            explained = variance_explained(a, pca.inverse_transform(pca.transform(a)))
            rows.append(
                {"sae": "principal components", "variance explained (held out)": explained, "concepts per cell": n}
            )
    return pd.DataFrame(rows)


def types_found(concepts: AnnData, min_f1: float = 0.8, min_cells: int = 5) -> dict[str, float]:
    """Cell types (any level, once by name) that some concept finds: chosen on training cells, scored on held-out ones.

    For each type the concept with the best F1 on training cells is taken; the type counts as found if this concept's
    F1 on held-out cells exceeds ``min_f1``. Types with fewer than ``min_cells`` held-out cells are not asked for.

    Returns
    -------
    Type: held-out F1, of the types that are found.
    """
    train = (concepts.obs["split"] == "train").to_numpy()
    training, held_out = kept(concepts[train]), kept(concepts[~train])
    found = {}
    for level, column in LEVELS.items():
        sizes = held_out.obs[column].value_counts()
        for name in sizes.index[sizes >= min_cells].difference([UNASSIGNED]):
            main = pd.DataFrame({"main_type": name, "level": level}, index=training.var_names)
            best = score_types(training, main)["f1"].fillna(0).idxmax()
            f1 = score_types(held_out, main.loc[[best]])["f1"].iloc[0]
            if f1 > min_f1:
                found[str(name)] = float(f1)
    return found


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
        other = train_sae(cells, sae.config, key="X", progress=False)
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
