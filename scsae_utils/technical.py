r"""Does a concept follow how a cell was handled? Tested within cell types, since studies and depth differ between them.

Cells are compared with cells of their own stratum only: their type, and for everything but the groups themselves
also their study. In each stratum the activation of a concept and a covariate are replaced by their ranks, less the
mean; the statistic is the sum over strata of their products,

.. math:: T = \sum_s \frac{1}{(n_s + 1)^2} \sum_{i \in s} (r_i - \bar r)(q_i - \bar q).

Were the covariate dealt out at random within strata, T would have mean zero and a variance with a closed form
(Strasser and Weber 1999); its p-value is the normal one, as in van Elteren's test. The **effect** is T divided by the
largest value that it could have with these activations and covariates (the smallest, if T is negative). For a concept
that is on or off it is 2 AUC - 1: 0 if the covariate says nothing about the activation, 1 if the most active cells
are those with the highest values in every stratum.
"""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from scipy.stats import false_discovery_control, norm, rankdata

from .cells import LEVELS, UNASSIGNED

log = logging.getLogger(__name__)

DENSE = 10_000_000  # activations of cells and concepts that are ranked at a time: some arrays of 80 MB
GROUPS = ("study", "donor", "tissue", "batch")  # columns of obs that say where a cell is from
# Genes of the cell cycle from Tirosh et al. 2016 (Science 352:189), with the present symbols beside the old ones.
CELL_CYCLE = {
    "S": "MCM5 PCNA TYMS FEN1 MCM2 MCM4 RRM1 UNG GINS2 MCM6 CDCA7 DTL PRIM1 UHRF1 MLF1IP CENPU HELLS RFC2 RPA2 NASP "
    "RAD51AP1 GMNN WDR76 SLBP CCNE2 UBR7 POLD3 MSH2 ATAD2 RAD51 RRM2 CDC45 CDC6 EXO1 TIPIN DSCC1 BLM CASP8AP2 USP1 "
    "CLSPN POLA1 CHAF1B BRIP1 E2F8",
    "G2/M": "HMGB2 CDK1 NUSAP1 UBE2C BIRC5 TPX2 TOP2A NDC80 CKS2 NUF2 CKS1B MKI67 TMPO CENPF TACC3 FAM64A PIMREG SMC4 "
    "CCNB2 CKAP2L CKAP2 AURKB BUB1 KIF11 ANP32E TUBB4B GTSE1 KIF20B HJURP CDCA3 HN1 JPT1 CDC20 TTK CDC25C KIF2C "
    "RANGAP1 NCAPD2 DLGAP5 CDCA2 CDCA8 ECT2 KIF23 HMMR AURKA PSRC1 ANLN LBR CKAP5 CENPE CTCF NEK2 G2E3 GAS2L3 CBX5 "
    "CENPA",
}


def technical_covariates(adata: AnnData, min_genes: int = 5, seed: int = 0) -> tuple[pd.DataFrame, dict[str, str]]:
    """What is known of each cell beside its type, and why the rest is not known.

    ``library size`` (``obs["n_counts"]``, else the sum of ``layers["counts"]``), ``genes`` (expressed, of the panel),
    ``mitochondrial share`` (``obs["percent_mito"]``, else from the counts of the ``MT-`` genes), ``doublet score``
    (Scrublet by scanpy, each study for itself; needs raw counts of all genes, since a chosen panel tells doublets
    badly: more than 2,000 genes), ``S score`` and ``G2/M score`` of the cell cycle (scanpy; at least ``min_genes``
    genes of each on the panel).

    Returns
    -------
    Cells x covariates; and for each that is not available, the reason.
    """
    table, missing = pd.DataFrame(index=adata.obs_names), {}
    counts = adata.layers.get("counts")
    if "n_counts" in adata.obs:
        table["library size"] = adata.obs["n_counts"].astype(float)
    elif counts is not None:
        table["library size"] = np.asarray(counts.sum(axis=1), float).ravel()
    else:
        missing["library size"] = "the counts are not known"
    table["genes"] = np.asarray((adata.X > 0).sum(axis=1), float).ravel()
    mitochondrial = adata.var_names.str.upper().str.startswith("MT-")
    if "percent_mito" in adata.obs:
        table["mitochondrial share"] = adata.obs["percent_mito"].astype(float)
    elif counts is not None and mitochondrial.any():
        total = np.maximum(np.asarray(counts.sum(axis=1), float).ravel(), 1)
        table["mitochondrial share"] = np.asarray(counts[:, mitochondrial].sum(axis=1), float).ravel() / total
    else:
        missing["mitochondrial share"] = "not in the cells' table, and no mitochondrial genes with counts"
    if counts is None or (sparse.csr_matrix(counts).data % 1).any():
        missing["doublet score"] = "the counts are not known"
    elif adata.n_vars <= 2000:
        missing["doublet score"] = f"the panel has only {adata.n_vars} genes"
    else:
        cells = AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs=adata.obs[["study"]].copy())
        sc.pp.scrublet(cells, batch_key="study", threshold=1.0, random_state=seed, verbose=False)
        table["doublet score"] = cells.obs["doublet_score"].to_numpy(float)
    genes = {phase: [g for g in names.split() if g in adata.var_names] for phase, names in CELL_CYCLE.items()}
    if min(map(len, genes.values())) < min_genes:
        found = " and ".join(f"{len(names)} genes of {phase}" for phase, names in genes.items())
        missing["cell cycle"] = f"only {found} are on the panel"
    else:
        cells = AnnData(adata.X, obs=pd.DataFrame(index=adata.obs_names), var=pd.DataFrame(index=adata.var_names))
        sc.tl.score_genes_cell_cycle(cells, s_genes=genes["S"], g2m_genes=genes["G2/M"], random_state=seed)
        table["S score"], table["G2/M score"] = (cells.obs[c].to_numpy(float) for c in ("S_score", "G2M_score"))
    constant = [c for c in table if table[c].nunique() < 2]
    return table.drop(columns=constant), missing | dict.fromkeys(constant, "the same in all cells")


def within_strata(U, X: pd.DataFrame, strata, min_informative: int = 10) -> pd.DataFrame:
    """Association of concepts with covariates within strata; see the head of this module.

    Parameters
    ----------
    U
        (n, c) activations, dense or sparse.
    X
        (n, q) covariates.
    strata
        (n,) labels; cells without one (NaN) are left out.
    min_informative
        A concept that has fewer cells to compare, that is active ones with silent ones beside them in strata in which
        the covariate varies (or the other way round, whichever are fewer), is not tested.

    Returns
    -------
    Indexed by concept (0 to c - 1) and covariate: ``effect``; ``low`` and ``high``, effect -+ 1.96 standard errors
    under the null, within -1 and 1; ``p_value``; ``informative`` (number of cells to compare). NaN where nothing could
    be tested.
    """
    U = sparse.csr_matrix(U)
    codes, _ = pd.factorize(pd.Series(np.asarray(strata, object)))
    shape = U.shape[1], X.shape[1]
    score, best, worst, variance, informative = (np.zeros(shape) for _ in range(5))
    for s in range(codes.max() + 1):
        rows = np.flatnonzero(codes == s)
        n = len(rows)
        if n < 2:
            continue
        x = rankdata(X.to_numpy(float)[rows], axis=0) - (n + 1) / 2
        down, weight = np.sort(x, axis=0), (n + 1) ** -2.0
        for columns in np.array_split(np.arange(shape[0]), n * shape[0] // DENSE + 1):
            activation = U[rows][:, columns].toarray()
            u = rankdata(activation, axis=0) - (n + 1) / 2
            up = np.sort(u, axis=0).T
            score[columns] += weight * (u.T @ x)
            best[columns] += weight * (up @ down)
            worst[columns] += weight * (up @ down[::-1])
            variance[columns] += weight**2 * np.outer((u**2).sum(0), (x**2).sum(0)) / (n - 1)
            active = (activation > 0).sum(0)
            informative[columns] += np.outer(np.minimum(active, n - active), x.any(axis=0))
    largest = np.where(score >= 0, best, -worst)
    told = (informative >= min_informative) & (variance > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        effect, error = np.where(told, score / largest, np.nan), np.where(told, np.sqrt(variance) / largest, np.nan)
        p_value = np.where(told, 2 * norm.sf(np.abs(score) / np.sqrt(variance)), np.nan)
    index = pd.MultiIndex.from_product([range(shape[0]), X.columns], names=["concept", "covariate"])
    margin = norm.ppf(0.975) * error
    ends = {"low": np.maximum(effect - margin, -1), "high": np.minimum(effect + margin, 1)}
    columns = {"effect": effect, **ends, "p_value": p_value}
    columns |= {"informative": informative}
    return pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=index)


def group_association(U, group, types, min_informative: int = 10) -> pd.DataFrame:
    """Association of concepts with a label of cells, such as the study, within cell types: the strongest of its values.

    Returns
    -------
    As :func:`within_strata`, one row for each concept (0 to c - 1), with ``value`` (the label); p-values are those of
    the strongest value times the number of values that were tested (of two values, one says all).
    """
    values = pd.get_dummies(pd.Series(np.asarray(group, str))).astype(float)
    values = values.iloc[:, 1:] if values.shape[1] == 2 else values
    table = (
        within_strata(U, values, types, min_informative).rename_axis(index={"covariate": "value"}).reset_index("value")
    )
    n_tested = table["effect"].notna().groupby(level="concept").sum()
    strongest = table.assign(size=table["effect"].abs().fillna(-1)).sort_values("size", kind="stable")
    strongest = strongest.groupby(level="concept").tail(1).sort_index().drop(columns="size")
    strongest["p_value"] = (strongest["p_value"] * n_tested).clip(upper=1)
    return strongest


def associations(
    U,
    obs: pd.DataFrame,
    covariates: pd.DataFrame,
    max_effect: float = 0.5,
    max_q: float = 0.05,
    min_informative: int = 10,
) -> pd.DataFrame:
    """Every concept against every covariate, and against where its cells are from.

    Groups (:data:`GROUPS` that have two values or more) are tested within low-level types. A concept that no type
    shared by two groups can tell of is tested within mid-level types. There a difference may be one of subtypes, so an
    association is no verdict, but its absence is one.

    Returns
    -------
    Indexed by concept (0 to c - 1) and covariate: the columns of :func:`within_strata`; ``q_value``
    (Benjamini-Hochberg over concepts); ``level`` of the types; ``verdict``: ``associated`` (q below ``max_q`` and
    |effect| at least ``max_effect``), ``free`` (the whole interval is nearer to zero than that), ``undecided`` (the
    interval is too wide), ``cannot be told`` (no cells to compare, as where a type is in one study only; or, of
    groups, a difference within mid-level types).
    """
    parts = []
    labels = {level: obs[LEVELS[level]].astype(str).replace(UNASSIGNED, np.nan) for level in ("low", "mid")}
    study = obs["study"].astype(str) if "study" in obs else ""
    if covariates.shape[1]:
        parts.append(within_strata(U, covariates, labels["low"] + " | " + study, min_informative).assign(level="low"))
    for name in [g for g in GROUPS if g in obs and obs[g].nunique() > 1]:
        table = group_association(U, obs[name], labels["low"], min_informative).assign(level="low")
        coarse = group_association(U, obs[name], labels["mid"], min_informative).assign(level="mid")
        untold = table["effect"].isna()
        table[untold] = coarse[untold]
        parts.append(table.drop(columns="value").assign(covariate=name).set_index("covariate", append=True))
    if not parts:
        raise ValueError("there is nothing to test: no covariate, and no study, donor or tissue with two values")
    table = pd.concat(parts)
    table["q_value"] = np.nan
    p = table["p_value"].dropna()
    table.loc[p.index, "q_value"] = p.groupby(
        [p.index.get_level_values("covariate"), table.loc[p.index, "level"]]
    ).transform(false_discovery_control)
    large = (table["q_value"] < max_q) & (table["effect"].abs() >= max_effect)
    free = table[["low", "high"]].abs().max(axis=1) < max_effect
    coarse = table["level"] == "mid"
    cases = [table["effect"].isna() | (coarse & ~free), large, free]
    table["verdict"] = np.select(cases, ["cannot be told", "associated", "free"], "undecided")
    return table.sort_index(level="concept", sort_remaining=False, kind="stable")
