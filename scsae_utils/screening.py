"""Attribution for many concepts: a cheap screen ranks all genes, exact occlusion confirms those that could matter.

A gene is in a concept's set if \\|attribution\\| > ``threshold`` in ``min_prototypes`` prototypes (the paper's rule).
Few genes are, so most exact passes tell that nothing happens. Here every change is estimated first (see
:mod:`scsae_utils.trajectory`), and a gene is occluded exactly, in all prototypes of the concept, where the estimates
and their error leave it a chance:

1. *Screen.* Estimate every change. Occlude exactly a random sample near the threshold, and another of all changes.
2. *Calibrate.* The first sample tells how likely an estimate of a given size is to be an effect above the threshold.
3. *Confirm.* Added up over the prototypes, that is the number of effects to be expected of a gene. Genes that come
   anywhere near ``min_prototypes`` are occluded exactly.
4. *Audit.* The second sample had no part in that choice. Where it finds an effect in a gene that was left out, the
   gene is occluded exactly too; how many such genes turn out to be in the set tells how many were missed elsewhere.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.stats import binom
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from tqdm.auto import tqdm

from .attribution import AttributionConfig, Plan, attribute, make_plan
from .embedding import BATCH_TOKENS
from .encoder import CellEncoder
from .sae import BatchTopK, Dictionary, JumpReLU, TopK
from .scgpt import ScGPT
from .shards import Part, Shards
from .trajectory import Trajectories


@dataclass(frozen=True)
class ScreeningConfig:
    """Which gene sets the screen has to find, and how it is checked.

    Parameters
    ----------
    threshold, min_prototypes
        The rule: \\|attribution\\| above the one in as many prototypes as the other (paper: 0.05 and 5).
    calibration
        Share of the changes with an estimate between a quarter and twice the threshold that are occluded exactly, to
        know the screen's error; more if there are few changes.
    chance
        A gene is occluded exactly if so many times ``min_prototypes`` effects are to be expected.
    audit
        Share of all changes that are occluded exactly to know what was missed.
    confidence
        Of the interval of the recall.
    seed
        Of both samples.
    """

    threshold: float = 0.05
    min_prototypes: int = 5
    calibration: float = 0.02
    chance: float = 0.6
    audit: float = 0.01
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self):
        if not self.threshold > 0 or self.min_prototypes < 1:
            raise ValueError("threshold must be positive and min_prototypes at least 1")
        for name in ("calibration", "chance", "audit", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")


def attribute_all(
    adata: AnnData,
    model: CellEncoder,
    sae: Dictionary,
    concepts,
    config: AttributionConfig | None = None,
    method: str = "screened",
    screening: ScreeningConfig | None = None,
    key: str = "X_scGPT",
    folder: str | Path | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
    part: Part | None = None,
    **settings,
) -> pd.DataFrame | None:
    """Attribution of every gene to many concepts (Eq. 1), screened or exact.

    Parameters
    ----------
    adata, concepts, config, folder, part
        See :func:`scsae_utils.attribution.attribute`.
    method
        ``"screened"``: the module's description; for scGPT, and frozen bins. ``"exact"``: every change.

    Returns
    -------
    The table of :func:`~scsae_utils.attribution.attribute`. Screened, ``method`` is ``exact`` for changes that were
    occluded and ``screened`` for those whose ``occluded`` is an estimate; genes that pass the rule are exact in all
    prototypes. A further column ``estimate`` is the attribution by the screen. ``attrs["screening"]`` holds the
    settings; ``n_selected`` concept-gene pairs that pass the rule, ``n_missed`` of which only a sample
    found; the ``recall``, its interval ``recall_low`` to ``recall_high``, over all concepts together; and
    ``share_exact`` of the changes. ``attrs["n_passes"]`` counts exact passes, ``attrs["n_screen_passes"]`` those of
    the screen, of which a backward pass counts as two.

    Raises
    ------
    ValueError
        As :func:`~scsae_utils.attribution.attribute`; also where the model, the dictionary or the binning cannot be
        screened.
    """
    if method == "exact":
        return attribute(adata, model, sae, concepts, config, key, folder, batch_tokens, progress, part, **settings)
    if method != "screened":
        raise ValueError(f"method must be 'screened' or 'exact', not {method!r}")
    if not isinstance(model, ScGPT):
        raise ValueError(f"the screen follows the layers of scGPT, not of {type(model).__name__}: use method='exact'")
    if type(sae).pre_activations is not Dictionary.pre_activations:
        raise ValueError(f"the screen needs a linear encoder, not {type(sae).__name__}'s: use method='exact'")
    plan = make_plan(adata, model, sae, concepts, config, key, settings)
    if plan.config.binning != "frozen":
        raise ValueError("the screen changes one gene at a time: for binning='rebinned' use method='exact'")
    screening = screening or ScreeningConfig()
    shards = Shards(folder, {"method": "screened", **asdict(screening), **plan.settings()}, part)
    total = sum(len(plan.tokens(row)[2]) * len(uses) for row, uses in plan.cells.items())
    near = min(1.0, max(screening.calibration, 200 / total))

    with tqdm(total=len(plan.cells), desc="screening cells", unit="cell", disable=not progress) as bar:
        for i, rows in shards.mine("screen", enumerate(plan.shards())):
            shards.get(f"screen-{i:05d}", lambda rows=rows: screen_cells(plan, rows, screening, near, batch_tokens))
            bar.update(len(rows))
    if part is not None and part.stage == "screen":
        return None
    parts = shards.tables("screen-", len(plan.shards()))
    n_passes, n_screen = (sum(t.attrs[name] for t in parts) for name in ("n_passes", "n_screen_passes"))
    shard = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    table = pd.concat(parts, ignore_index=True)
    table.insert(0, "shard", shard)
    del parts
    choice = choose_genes(table, screening, plan.adata.n_vars)

    todo = table[choice["confirm"] & table["exact"].isna()]
    with tqdm(total=len(todo), desc="occluding candidates", unit="gene", disable=not progress) as bar:
        for i, rows in shards.mine("confirm", todo.groupby("shard")):
            _, done = shards.get(f"confirm-{i:05d}", lambda rows=rows: confirm(plan, rows, batch_tokens))
            table.loc[rows.index, "exact"] = done["exact"].to_numpy()
            n_passes += done.attrs["n_passes"]
            bar.update(len(rows))
    if part is not None:
        return None

    report = audit(table, choice, screening, plan.adata.n_vars)
    known = table["exact"].notna()
    table["method"] = np.array(["screened", "exact"], object)[known.astype(int)]  # two texts, not one for each row
    table["occluded"] = table["exact"].fillna(table["screened"])
    table["estimate"] = 1 - table["screened"] / table["activation"]
    table = plan.finish(
        table.drop(columns=["shard", "screened", "exact", "sample"]), n_passes=n_passes, n_screen_passes=n_screen,
        screening={**asdict(screening), **report, "share_exact": float(known.mean())},
    )  # fmt: skip
    if report["recall"] < 0.99:
        warnings.warn(
            f"the screen finds about {report['recall']:.1%} of the genes that pass the rule: use method='exact', "
            "or a smaller chance",
            stacklevel=2,
        )
    return table


def screen_cells(
    plan: Plan, rows: list[int], screening: ScreeningConfig, near: float, batch_tokens: int
) -> pd.DataFrame:
    """All changes of some cells: activation after each by the screen (``screened``) and, for those drawn, ``exact``.

    ``sample`` is 1 for changes near the threshold drawn for calibration, 2 for those drawn for the audit, else 0.
    """
    parts, passes, screen_passes = [], 0, 0
    for row in rows:
        part = plan.changes(row)
        part["screened"] = screen(plan, row, part)
        size = (1 - part["screened"] / part["activation"]).abs() / screening.threshold
        draw = np.random.default_rng([screening.seed, row]).random((2, len(part)))
        part["sample"] = np.where(draw[0] < near * ((size > 0.25) & (size < 2)), 1, 0).astype(np.int8)
        part.loc[draw[1] < screening.audit, "sample"] = 2
        part["exact"] = np.float32(np.nan)
        drawn = part["sample"] > 0
        if drawn.any():
            part.loc[drawn, "exact"], n = plan.occluded(row, part[drawn], batch_tokens)
            passes += n
        parts.append(part)
        screen_passes += 1 + 3 * len(plan.cells[row])
    table = pd.concat(parts, ignore_index=True)
    table.attrs = {"n_passes": passes, "n_screen_passes": screen_passes}
    return table


def screen(plan: Plan, row: int, changes: pd.DataFrame) -> np.ndarray:
    """Estimated activation (M,) of each change's concept after the ``changes`` (M rows) of one cell."""
    model, sae, device = plan.model, plan.sae, plan.model.device
    ids, values, columns = plan.tokens(row)
    x = model.tokens(torch.as_tensor(ids, device=device)[None], torch.as_tensor(values, device=device)[None])[0]
    cell = Trajectories(model, x)
    limit = silent_below(sae, cell.embedding.detach().float().cpu())
    places = pd.Series(np.arange(1, len(ids)), columns)
    out = np.empty(len(changes), np.float32)
    for c, part in changes.groupby("concept", sort=False):
        gradients = cell.gradients(sae.W_e[:, plan.concepts[c]].detach().to(x))
        place = torch.as_tensor(places.reindex(part["gene"], fill_value=0).to_numpy(), device=device)
        tokens = torch.as_tensor(plan.ids[part["gene"]], device=device)[None]
        means = torch.as_tensor(part["counterfactual"].to_numpy(np.float32), device=device)[None]
        new, remove = model.tokens(tokens, means)[0], torch.as_tensor((part["change"] == "remove").to_numpy())
        effect = torch.zeros(len(part))
        for inserted in (False, True):
            some = (place == 0) == inserted
            if some.any():
                at = None if inserted else place[some]
                effect[some.cpu()] = cell.effects(gradients, new[some], at, remove.to(device)[some]).float().cpu()
        after = part["activation"].to_numpy() + effect.numpy()
        out[changes.index.get_indexer(part.index)] = np.where(after > limit[plan.concepts[c]], after, 0)
    return out


def silent_below(sae: Dictionary, embedding: Tensor) -> np.ndarray:
    """(c,) activation at or below which each concept of this cell (d,) counts as silent."""
    with torch.no_grad():
        if isinstance(sae, JumpReLU):
            return sae.log_threshold.exp().numpy()
        if isinstance(sae, TopK) and not isinstance(sae, BatchTopK):  # the first that is not among the k
            u = sae.pre_activations(embedding[None])[0]
            below = u.topk(sae.config.k + 1).values[-1] if sae.config.k < len(u) else u.new_zeros(())
        else:
            below = sae.threshold
    return np.broadcast_to(below.numpy(), sae.config.n_concepts)


def confirm(plan: Plan, changes: pd.DataFrame, batch_tokens: int) -> pd.DataFrame:
    """Exact activation (``exact``) after each of the ``changes``, in their order."""
    exact, passes = np.empty(len(changes), np.float32), 0
    for row, part in changes.groupby("cell"):
        exact[changes.index.get_indexer(part.index)], n = plan.occluded(row, part, batch_tokens)
        passes += n
    table = pd.DataFrame({"exact": exact})
    table.attrs["n_passes"] = passes
    return table


def choose_genes(table: pd.DataFrame, screening: ScreeningConfig, n_genes: int) -> dict:
    """What to occlude exactly.

    Returns
    -------
    For each row of the table: ``pair``, a number for its concept and gene; ``candidate``, whether the estimates leave
    the gene a chance; ``confirm``, candidates and genes in which a sample found an effect.
    """
    threshold = screening.threshold
    estimate = (1 - table["screened"] / table["activation"]).abs().to_numpy()
    exact = (1 - table["exact"] / table["activation"]).abs().to_numpy()
    sampled = (table["sample"] == 1).to_numpy()
    grid = np.linspace(0, 2 * threshold, 41)  # as if so many estimates had been right: for small samples
    chance = IsotonicRegression(out_of_bounds="clip").fit(
        np.r_[estimate[sampled], grid],
        np.r_[exact[sampled], grid] > threshold,
        np.r_[np.ones(sampled.sum()), np.full(len(grid), 0.5)],
    )
    pair = (table["concept"] * n_genes + table["gene"]).to_numpy()
    expected = np.bincount(pair, chance.predict(estimate))[pair]
    candidate = expected >= screening.chance * screening.min_prototypes
    found = np.isin(pair, pair[exact > threshold])
    return {"pair": pair, "candidate": candidate, "confirm": candidate | found}


def often(pair: np.ndarray, above: np.ndarray, screening: ScreeningConfig) -> np.ndarray:
    """(rows,) is the row's concept and gene ``above`` in ``min_prototypes`` rows?"""
    return np.bincount(pair, above)[pair] >= screening.min_prototypes


def audit(table: pd.DataFrame, choice: dict, screening: ScreeningConfig, n_genes: int) -> dict:
    """How many of the genes that pass the rule were found.

    A gene that passes has an effect in at least ``min_prototypes`` rows, each of which the audit draws with probability
    ``audit``: it finds the gene with probability q = 1 - (1 - audit)^rows or more. The number of missed genes is
    estimated by the sum of 1 / q over the found ones (Horvitz-Thompson), and bounded by the largest and smallest
    binomial totals that would give as many (Clopper-Pearson).
    """
    exact = (1 - table["exact"] / table["activation"]).abs().to_numpy()
    above, pair = exact > screening.threshold, choice["pair"]
    passes = often(pair, above, screening)
    selected = np.unique(pair[passes])
    only_sampled = np.unique(pair[passes & ~choice["candidate"]])
    drawn = np.unique(pair[above & (table["sample"] == 2).to_numpy() & passes & ~choice["candidate"]])
    q = 1 - (1 - screening.audit) ** np.bincount(pair, above)[drawn]
    smallest = 1 - (1 - screening.audit) ** screening.min_prototypes
    tail = (1 - screening.confidence) / 2
    most = largest_total(len(drawn), smallest, tail)

    def recall(missed: float) -> float:
        missed = max(0.0, missed - len(only_sampled))
        return len(selected) / (len(selected) + missed) if missed else 1.0

    return {
        "n_selected": len(selected), "n_missed": len(only_sampled), "n_audited": int((table["sample"] == 2).sum()),
        "recall": recall((1 / q).sum()), "recall_low": recall(most), "recall_high": recall(len(drawn)),
    }  # fmt: skip


def largest_total(found: int, q: float, tail: float) -> int:
    """The largest M of which, each found with probability ``q``, ``found`` or fewer are no rarer than ``tail``."""
    low, high = found, found + 1
    while binom.cdf(found, high, q) >= tail:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if binom.cdf(found, middle, q) >= tail else (low, middle)
    return low
