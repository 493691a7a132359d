"""Is a concept real? Six lines of evidence for each, every one with its interval, its null and a verdict; and a grade.

1. ``stable``: dictionaries trained from other seeds find it again.
2. ``generalises``: its cell type, chosen on training cells, holds on held-out ones.
3. ``not_technical``: within cell types it does not follow study, depth and the like (:mod:`scsae_utils.technical`).
4. ``better``: it says more than concepts as frequent that come from no learning (:mod:`scsae_utils.nulls`).
5. ``driven``: two halves of its prototypes give the same genes, and these matter in further cells.
6. ``meaningful``: its drivers share a gene set, more clearly than random genes of like expression.

A line is ``passed``, ``failed`` or ``not testable``; the last never counts as passed. The grade counts the lines that
are passed. It sums up what was looked at, and is no proof: a grade A says that six attempts to explain the concept away
have failed, a grade D that most of them were not refuted, which may be for want of cells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import false_discovery_control

from .cells import LEVELS, UNASSIGNED
from .concepts import KINDS, READINGS, active_counts, kept, number, score_types, taxonomy, type_shares, wilson
from .enrichment import best_of_random, over_representation, random_lists
from .metrics import correlations, matching, type_f1
from .names import driver_genes
from .technical import GROUPS

LINES = ("stable", "generalises", "not_technical", "better", "driven", "meaningful")
COLUMNS = ("value", "low", "high", "q_value", "null", "verdict", "note")
GRADES = {"A": 6, "B": 5, "C": 3, "D": 0}  # lines that must be passed


@dataclass(frozen=True)
class EvidenceConfig:
    """From where on a line is passed.

    Parameters
    ----------
    min_match, min_found
        Another dictionary finds a concept again if the activations of its match have a correlation of at least
        ``min_match``, and above what 95 % of random dictionaries reach for this concept. The line is passed if this
        share ``min_found`` of the dictionaries do.
    min_kept, min_cells
        F1 on held-out cells, as a share of that on training cells; it takes ``min_cells`` active held-out cells.
    max_effect
        Largest association within cell types, between 0 and 1 (2 AUC - 1).
    min_beaten, n_alike
        Share of the ``n_alike`` most alike concepts of each null that a concept must beat.
    min_agreement
        Correlation over genes between halves of the prototypes: the lower end of its interval.
    max_q
        False discovery rate over concepts, of associations and of gene sets.
    min_lineage
        Share of one high-level type among the active cells, or F1 for a mid- or high-level type, from which a
        cross-cell-type concept counts as one of a lineage.
    """

    min_match: float = 0.7
    min_found: float = 0.6
    min_kept: float = 0.8
    min_cells: int = 5
    max_effect: float = 0.5
    min_beaten: float = 0.9
    n_alike: int = 50
    min_agreement: float = 0.5
    max_q: float = 0.05
    min_lineage: float = 0.6

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("min_cells", "n_alike"):
                if value < 1:
                    raise ValueError(f"{field.name} must be at least 1, not {value}")
            elif not 0 < value <= 1:
                raise ValueError(f"{field.name} must be above 0 and at most 1, not {value}")


def line(index, passed, testable=True, **columns) -> pd.DataFrame:
    """One line of the card for each concept of ``index``: :data:`COLUMNS`."""
    table = pd.DataFrame({name: np.nan for name in COLUMNS}, index=index)
    table["note"] = ""
    for name, values in columns.items():
        table[name] = values
    verdict = np.where(np.asarray(passed, bool), "passed", "failed")
    table["verdict"] = np.where(np.broadcast_to(testable, len(table)), verdict, "not testable")
    return table


def match(U, V) -> np.ndarray:
    """(c,) correlation of each concept's activations U (n, c) with its partner's in V (n, m), matched one to one."""
    similarity = correlations(U, V)
    out = np.zeros(U.shape[1])
    rows, columns = matching(similarity)
    out[rows] = similarity[rows, columns]
    return out


def found_again(
    concepts: AnnData, others: Iterable, random: Iterable, config: EvidenceConfig | None = None
) -> pd.DataFrame:
    """Line 1. ``value``: share of ``others`` that find the concept again, with Wilson interval; see :func:`match`.

    Parameters
    ----------
    others
        Activations (n, m) in the same cells of dictionaries from other seeds.
    random
        Those of dictionaries whose vectors were never trained. ``null`` is what 95 % of their matches of this very
        concept stay below: directions that hold much of the embedding's variance are near to some vector of any
        dictionary.
    """
    config = config or EvidenceConfig()
    real = kept(concepts)
    reached, by_chance = (np.array([match(real.X, other) for other in each]) for each in (others, random))
    if not len(reached) or not len(by_chance):
        raise ValueError("stability needs at least one other dictionary, and one random one")
    null = np.quantile(by_chance, 0.95, axis=0)
    n = (reached >= np.maximum(config.min_match, null)).sum(axis=0)
    low, high = wilson(n, np.full(len(n), len(reached)))
    value = n / len(reached)
    notes = [f"{k} of {len(reached)}; mean correlation {r:.2f}" for k, r in zip(n, reached.mean(axis=0))]
    return line(real.var_names, value >= config.min_found, value=value, low=low, high=high, null=null, note=notes)


def generalises(concepts: AnnData, threshold: float = 0.8, config: EvidenceConfig | None = None) -> pd.DataFrame:
    """Line 2. ``value``: specificity on held-out cells for the type chosen on training cells, with Wilson interval.

    ``null`` is the share of this type among held-out cells. Passed if the whole interval lies above it, and F1 keeps
    ``min_kept`` of its value on training cells.
    """
    config = config or EvidenceConfig()
    real, train = kept(concepts), (concepts.obs["split"] == "train").to_numpy()
    chosen = taxonomy(real[train], threshold)
    held_out = real[~train]
    scores = score_types(held_out, chosen)
    shares = pd.Series(np.nan, index=real.var_names)
    for level in LEVELS:
        at = chosen["level"] == level
        frequency = active_counts(held_out, level)[1] / held_out.n_obs
        shares[at] = chosen.loc[at, "main_type"].map(frequency).astype(float)
    f1, before = scores["f1"], chosen["f1"]
    passed = (scores["specificity_low"] > shares) & (f1 >= config.min_kept * before)
    notes = [f"{t}: F1 {a:.2f}, held out {b:.2f}" for t, a, b in zip(chosen["main_type"], before, f1)]
    testable = (scores["n_active"] >= config.min_cells) & f1.notna()
    values = {"value": scores["specificity"], "low": scores["specificity_low"], "high": scores["specificity_high"]}
    return line(real.var_names, passed, testable, null=shares, note=notes, **values)


def not_technical(concepts: AnnData, found: pd.DataFrame) -> pd.DataFrame:
    """Line 3, from :func:`~scsae_utils.technical.associations` of the kept concepts.

    ``value`` is the effect of the covariate with the strongest association (of those that are associated, if any).
    Passed if the concept is free of every covariate; not testable if it is associated with none, and some are
    undecided or cannot be told.
    """
    names = kept(concepts).var_names
    found = found.reset_index()
    order = found.assign(first=found["verdict"] == "associated", size=found["effect"].abs().fillna(-1)).sort_values(
        ["first", "size"], ascending=False, kind="stable"
    )
    top = order.groupby("concept").head(1).set_index("concept").sort_index()
    verdicts = found.pivot(index="concept", columns="covariate", values="verdict")
    associated, free = (verdicts == "associated").any(axis=1), (verdicts == "free").all(axis=1)
    notes = [
        "; ".join(f"{verdict}: {', '.join(row.index[row == verdict])}" for verdict in sorted(set(row) - {"free"}))
        for _, row in verdicts.iterrows()
    ]
    columns = {c: top[c].to_numpy() for c in ("low", "high", "q_value")} | {"value": top["effect"].to_numpy()}
    return line(names, free.to_numpy(), (associated | free).to_numpy(), null=0.0, note=notes, **columns)


def beaten(value, size, null_value, null_size, n_alike: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of the ``n_alike`` null concepts of the most alike size that each concept beats (ties count half).

    Returns
    -------
    The shares (c,), NaN where the concept has no value or there is no null, and how many were compared (c,).
    """
    value, null_value = np.asarray(value, float), np.asarray(null_value, float)
    there = ~np.isnan(null_value)
    null_value, null_size = null_value[there], np.log(np.maximum(np.asarray(null_size, float)[there], 1))
    n = min(n_alike, len(null_value))
    if n == 0:
        return np.full(len(value), np.nan), np.zeros(len(value), int)
    apart = np.abs(np.log(np.maximum(np.asarray(size, float), 1))[:, None] - null_size)
    alike = null_value[np.argsort(apart, axis=1, kind="stable")[:, :n]]
    share = ((alike < value[:, None]) + 0.5 * (alike == value[:, None])).mean(axis=1)
    return np.where(np.isnan(value), np.nan, share), np.full(len(value), n)


def better_than_nothing(
    concepts: AnnData, measured: pd.DataFrame, nulls: dict[str, pd.DataFrame], config: EvidenceConfig | None = None
) -> pd.DataFrame:
    """Line 4. ``value``: share of the alike concepts of the strongest null that are beaten, with Wilson interval.

    Parameters
    ----------
    measured, nulls
        Tables from :func:`~scsae_utils.nulls.measure`. Concepts of a cell type are compared by F1 on held-out cells;
        the others, which claim no type, by the largest attribution of a gene.
    """
    config = config or EvidenceConfig()
    var = kept(concepts).var
    measured = measured.reindex(var.index)
    specific = (var["kind"] != KINDS[2]).to_numpy()
    shares, sizes = {}, {}
    for name, null in nulls.items():
        columns = {}
        for column in ("f1", "strength"):
            if column in null and null[column].notna().any():
                sample = null if column == "strength" else null[null["kind"] != KINDS[2]]
                columns[column] = beaten(
                    measured[column], measured["n_cells"], sample[column], sample["n_cells"], config.n_alike
                )
            else:
                columns[column] = np.full(len(var), np.nan), np.zeros(len(var), int)
        shares[name], sizes[name] = (np.where(specific, columns["f1"][i], columns["strength"][i]) for i in (0, 1))
    shares, sizes = pd.DataFrame(shares, index=var.index), pd.DataFrame(sizes, index=var.index)
    least = shares.min(axis=1)
    strongest = shares.fillna(2).to_numpy().argmin(axis=1)
    n = sizes.to_numpy()[np.arange(len(sizes)), strongest]
    low, high = wilson(least.fillna(0) * n, n)
    notes = [
        f"by {'F1' if s else 'attribution'}; least against {shares.columns[j]}" if known else ""
        for s, j, known in zip(specific, strongest, least.notna())
    ]
    columns = {"value": least, "low": low, "high": high, "null": 0.5, "note": notes}
    return line(var.index, least >= config.min_beaten, least.notna(), **columns)


def first_prototypes(attributions: pd.DataFrame, n: int) -> pd.DataFrame:
    """The attributions in the ``n`` most active prototypes of each concept."""
    order = attributions.drop_duplicates(["concept", "cell"]).sort_values("activation", ascending=False, kind="stable")
    order = order[order.groupby("concept").cumcount() < n]
    return attributions.merge(order[["concept", "cell"]], on=["concept", "cell"])


def halves(attributions: pd.DataFrame, n_draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """Do two halves of the prototypes give the same attributions? The other half of other concepts is the null.

    Prototypes, from the most active one on, go to the halves in turn. Genes that no cell of a half expresses are left
    out.

    Returns
    -------
    By concept: ``agreement`` (Pearson correlation over genes), ``low`` and ``high`` (95 %, bootstrap over genes),
    ``other`` (median correlation with the other half of other concepts), ``n_genes``, ``strength`` (largest mean
    attribution in size).
    """
    # A large table: no more of it than is needed.
    attributions = attributions[["concept", "cell", "gene", "attribution", "activation"]]
    order = attributions.drop_duplicates(["concept", "cell"]).sort_values("activation", ascending=False, kind="stable")
    order = order.assign(half=order.groupby("concept").cumcount() % 2).set_index(["concept", "cell"])["half"]
    table = attributions.join(order, on=["concept", "cell"])
    means = table.groupby(["concept", "gene", "half"])["attribution"].mean().unstack("half").reindex(columns=[0, 1])
    rng, rows = np.random.default_rng(seed), {}
    for concept, part in means.dropna().groupby(level="concept"):
        n = len(part)
        if n < 3:
            continue
        draws = rng.multinomial(n, np.full(n, 1 / n), n_draws) / n  # weights of the genes
        draws = np.vstack([np.full(n, 1 / n), draws])
        a, b = part.to_numpy().T
        mean_a, mean_b = draws @ a, draws @ b
        covariance = draws @ (a * b) - mean_a * mean_b
        scale = np.sqrt(np.maximum((draws @ a**2 - mean_a**2) * (draws @ b**2 - mean_b**2), 0))
        r = np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 1e-15)
        low, high = np.quantile(r[1:], [0.025, 0.975])
        rows[concept] = {"agreement": r[0], "low": low, "high": high, "n_genes": n}
    out = pd.DataFrame.from_dict(rows, orient="index", columns=["agreement", "low", "high", "n_genes"])
    out = out.rename_axis("concept").reindex(sorted(attributions["concept"].unique()))
    first, second = (means[h].unstack("gene").reindex(out.index).fillna(0).to_numpy() for h in (0, 1))
    z = [(m - m.mean(1, keepdims=True)) / np.maximum(m.std(1, keepdims=True), 1e-15) for m in (first, second)]
    cross = z[0] @ z[1].T / first.shape[1]
    np.fill_diagonal(cross, np.nan)
    out["other"] = np.nanmedian(cross, axis=1) if len(out) > 1 else np.nan
    mean = table.groupby(["concept", "gene"])["attribution"].sum()
    size = mean.abs().groupby(level="concept").max() / attributions.groupby("concept")["cell"].nunique()
    out["strength"] = size.reindex(out.index)
    return out


def driven(
    concepts: AnnData, agreement: pd.DataFrame, areas: pd.DataFrame, config: EvidenceConfig | None = None
) -> pd.DataFrame:
    """Line 5. ``value``: agreement of the halves, with its interval.

    ``null``: agreement with the other half of other concepts. Passed if the interval lies above ``min_agreement`` and
    above the null, and the area under the deletion curve is smaller by attribution than in every random order.

    Parameters
    ----------
    agreement
        From :func:`halves`.
    areas
        From :func:`~scsae_utils.curves.curve_areas`, of curves in cells that the order is not from, with random orders.
    """
    config = config or EvidenceConfig()
    names = kept(concepts).var_names
    deletion = areas["deletion"].unstack("order").reindex(columns=["attribution", *areas.index.unique("order")])
    deletion = deletion.loc[:, ~deletion.columns.duplicated()]
    random = deletion.filter(regex=r"^random \d+$")
    deletion = pd.DataFrame(
        {"deletion": deletion["attribution"], "random": random.mean(axis=1), "least": random.min(axis=1)}
    )
    both = agreement.join(deletion).reindex([number(name) for name in names])
    passed = (
        (both["low"] >= config.min_agreement) & ~(both["low"] <= both["other"]) & (both["deletion"] < both["least"])
    )
    testable = both["low"].notna() & both["least"].notna()
    areas = zip(both["deletion"], both["random"], testable)
    notes = [f"deletion {a:.2f}, random {b:.2f}" if known else "" for a, b, known in areas]
    columns = {"value": both["agreement"], "low": both["low"], "high": both["high"], "null": both["other"]}
    columns = {name: values.to_numpy() for name, values in columns.items()}
    return line(names, passed.to_numpy(), testable.to_numpy(), note=notes, **columns)


def enrichment(
    drivers: pd.DataFrame, sets: dict, panel, expression, n_random: int = 200, seed: int = 0
) -> pd.DataFrame:
    """The gene set that the driving genes of each concept are richest in, against random genes of like expression.

    Parameters
    ----------
    drivers
        See :func:`~scsae_utils.names.driver_genes`; genes that hold the concept back are left out.
    sets, panel, expression
        From :func:`~scsae_utils.genesets.on_panel`; (p,) symbols; (p,) their mean expression.

    Returns
    -------
    By concept: ``best`` (q-value of the best set), ``set``, ``null`` (best q-value that 5 % of the random lists
    reach), ``p_value`` (share of the random lists that do as well, the list itself counted in), ``n_genes``.
    """
    chosen = driver_genes(drivers)
    rows = {}
    for concept, part in chosen[chosen["attribution"] > 0].groupby("concept"):
        genes = [gene for gene in part["gene"] if gene in panel]
        if len(genes) < 2:
            continue
        random = random_lists(genes, panel, n_random, expression, seed=seed)
        table = over_representation(genes, sets, panel)
        reached = best_of_random(random, sets, panel)["best"].to_numpy()
        best = table["qvalue"].min()
        rows[concept] = {
            "best": best,
            "set": table.loc[table["qvalue"].idxmin(), "set"],
            "null": np.quantile(reached, 0.05),
            "p_value": (1 + (reached <= best).sum()) / (1 + n_random),
            "n_genes": len(genes),
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["best", "set", "null", "p_value", "n_genes"])


def meaningful(concepts: AnnData, enriched: pd.DataFrame, config: EvidenceConfig | None = None) -> pd.DataFrame:
    """Line 6, from :func:`enrichment`. ``value``: q-value of the best gene set; ``null``: that of random genes.

    ``q_value`` is of the comparison with random genes, Benjamini-Hochberg over concepts. Passed if both are below
    ``max_q``.
    """
    config = config or EvidenceConfig()
    names = kept(concepts).var_names
    enriched = enriched.reindex([number(name) for name in names])
    q_value, there = np.full(len(names), np.nan), enriched["p_value"].notna().to_numpy()
    if there.any():
        q_value[there] = false_discovery_control(enriched["p_value"].to_numpy()[there])
    best = enriched["best"].to_numpy(float)
    passed = (best < config.max_q) & (q_value < config.max_q)
    columns = {"value": best, "null": enriched["null"].to_numpy(float), "q_value": q_value}
    return line(names, passed, there, note=enriched["set"].fillna("").to_numpy(), **columns)


def read_cross_types(
    concepts: AnnData, lines: dict[str, pd.DataFrame], found: pd.DataFrame, config: EvidenceConfig | None = None
) -> pd.Series:
    """What the cross-cell-type concepts are, one of :data:`~scsae_utils.concepts.READINGS`; empty for the others. Ours.

    The first that holds: ``technical`` (associated with depth, mitochondrial share, doublets or cell cycle within
    types), ``tissue or study`` (associated with one of :data:`~scsae_utils.technical.GROUPS` within types),
    ``lineage`` (one high-level type has ``min_lineage`` of the active cells, or F1 for a mid- or high-level type is as
    high), ``program`` (none of these, and the line ``meaningful`` is passed), ``unresolved``.
    """
    config = config or EvidenceConfig()
    real = kept(concepts)
    bad = found["verdict"].unstack("covariate") == "associated"
    groups = [c for c in bad if c in GROUPS]
    lineage = type_shares(real, "high").drop(columns=UNASSIGNED, errors="ignore").max(axis=1).to_numpy()
    for level in ("mid", "high"):
        f1 = type_f1(real.X, real.obs[LEVELS[level]]).drop(columns=UNASSIGNED, errors="ignore")
        lineage = np.maximum(lineage, f1.max(axis=1).to_numpy())
    cases = {
        "": (real.var["kind"] != KINDS[2]).to_numpy(),
        "technical": bad.drop(columns=groups).any(axis=1).to_numpy(),
        "tissue or study": bad[groups].any(axis=1).to_numpy(),
        "lineage": lineage >= config.min_lineage,
        "program": (lines["meaningful"]["verdict"] == "passed").to_numpy(),
    }
    return pd.Series(np.select(list(cases.values()), list(cases), READINGS[-1]), real.var_names, name="reading")


def grade(verdicts: pd.DataFrame) -> pd.DataFrame:
    """``n_passed``, ``n_testable`` and ``grade`` (:data:`GRADES`) from verdicts (concepts x lines)."""
    passed = (verdicts == "passed").sum(axis=1)
    letters = [next(g for g, least in GRADES.items() if n >= least) for n in passed]
    testable = (verdicts != "not testable").sum(axis=1)
    return pd.DataFrame({"n_passed": passed, "n_testable": testable, "grade": letters}, index=verdicts.index)


def evidence_table(
    concepts: AnnData, lines: dict[str, pd.DataFrame], found: pd.DataFrame, config: EvidenceConfig | None = None
) -> pd.DataFrame:
    """All lines and the grade, one row for each kept concept: what ``evidence.parquet`` holds.

    Columns: ``kind``, ``main_type``, ``reading`` (:func:`read_cross_types`), ``n_passed``, ``n_testable``, ``grade``,
    and for each of :data:`LINES` its :data:`COLUMNS`, as in ``stable_value``.
    """
    if set(lines) != set(LINES):
        raise ValueError(f"the card has the lines {', '.join(LINES)}; given: {', '.join(lines) or 'none'}")
    verdicts = pd.DataFrame({name: lines[name]["verdict"] for name in LINES})
    parts = [kept(concepts).var[["kind", "main_type"]].astype(str), read_cross_types(concepts, lines, found, config)]
    parts += [grade(verdicts), *(lines[name].add_prefix(f"{name}_") for name in LINES)]
    return pd.concat(parts, axis=1).rename_axis("concept")


def card(table: pd.DataFrame, concept: int) -> pd.DataFrame:
    """The evidence card of one concept: :data:`LINES` x :data:`COLUMNS`, from :func:`evidence_table`."""
    name = f"concept_{int(concept)}"
    if name not in table.index:
        raise ValueError(f"there is no evidence for concept {concept}: it was dropped, or is not there")
    return pd.DataFrame({c: [table.at[name, f"{part}_{c}"] for part in LINES] for c in COLUMNS}, index=list(LINES))
