"""Which genes drive a concept: occlusion with counterfactual perturbations (paper Sec. 2.3, A.5).

For each prototype cell of a concept j and each gene i that it expresses, the gene's value is replaced by its mean in
the counterfactual cells, and the model runs again:

``l_ij = (f(phi(x))_j - f(phi(x~i))_j) / f(phi(x))_j``        (Eq. 1)

1 means that the concept falls silent without the gene, 0 that the gene does not matter, and a negative value that
the gene held the concept back. The computation is exact: one forward pass for each change of each prototype. Work goes
from cell to cell: a pass gives all concepts, so that concepts which change a cell in the same way share it.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scipy.spatial.distance import cdist
from tqdm.auto import tqdm

from .embedding import BATCH_TOKENS, cell_tokens, embed_tokens, token_ids
from .encoder import CellEncoder
from .occlusion import insert, occlude, rebinned
from .sae import Dictionary
from .shards import Part, Shards

SHARD_CELLS = 16  # prototype cells whose work is kept together


@dataclass(frozen=True)
class AttributionConfig:
    """How genes are occluded. The numbers are the paper's where it gives them.

    Parameters
    ----------
    n_prototypes
        Cells with the highest activation (paper: 20; 30 in the legend of Fig. 2e).
    n_counterfactuals
        For each prototype, at most so many nearest cells in which the concept is silent.
    counterfactual_mean
        ``"pooled"``: one mean for all prototypes, over the distinct counterfactual cells. ``"matched"``: each
        prototype has the mean of its own.
    binning
        ``"frozen"``: the gene's bin is replaced by its mean bin, all other bins stay. ``"rebinned"``: its log value
        is replaced by the mean log value and the cell is binned anew, which can move other genes' bins.
    absent
        What to do with a mean below ``absent_below``, that is, with a gene that counterfactuals hardly express:
        ``"remove"`` its token, since scGPT is fed expressed genes only, or feed the ``"value"`` as it is
        (``"frozen"`` binning only; a re-binned value above zero has a bin of 1 or more).
    absent_below
        In bins; 1 is the lowest bin of an expressed gene.
    insertion
        Also add genes that the prototype does not express but counterfactuals do (mean of ``absent_below`` or more);
        ``"frozen"`` binning only.
    counterfactual_match
        A column of ``obs``, such as the donor or the study: counterfactuals must share its value with their
        prototype. A prototype without such a cell has the nearest of all silent cells; these are counted.
    """

    n_prototypes: int = 20
    n_counterfactuals: int = 50
    counterfactual_mean: str = "pooled"
    binning: str = "frozen"
    absent: str = "remove"
    absent_below: float = 1.0
    insertion: bool = False
    counterfactual_match: str | None = None

    def __post_init__(self):
        options = {
            "counterfactual_mean": ("pooled", "matched"),
            "binning": ("frozen", "rebinned"),
            "absent": ("remove", "value"),
        }
        for name, allowed in options.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.insertion and self.binning != "frozen":
            raise ValueError("insertion needs binning='frozen': its threshold is in bins")
        if self.n_prototypes < 1 or self.n_counterfactuals < 1:
            raise ValueError("n_prototypes and n_counterfactuals must be at least 1")


def choose_prototypes(activations: np.ndarray, n: int = 20) -> np.ndarray:
    """Rows of the at most ``n`` cells with the highest activation (n_cells,) above zero, highest first.

    Raises
    ------
    ValueError
        If no cell activates the concept.
    """
    order = np.argsort(-activations, kind="stable")[:n]
    order = order[activations[order] > 0]
    if len(order) == 0:
        raise ValueError("the concept activates in none of these cells, so it has no prototypes")
    return order


def choose_counterfactuals(
    embeddings: np.ndarray, activations: np.ndarray, prototypes: np.ndarray, n: int = 50, groups=None
) -> list[np.ndarray]:
    """For each prototype the rows of the at most ``n`` nearest cells (Euclidean) in which the concept is silent.

    Parameters
    ----------
    embeddings, activations
        (n_cells, d) and (n_cells,).
    groups
        (n_cells,) labels, or None: only cells with the prototype's own label, where one of them is silent.

    Returns
    -------
    For each prototype (at most n,) rows, nearest first.

    Raises
    ------
    ValueError
        If no cell leaves the concept silent.
    """
    silent = activations == 0
    if not silent.any():
        raise ValueError("every cell activates the concept, so it has no counterfactuals")
    # Squared distances less a constant, by one product of matrices: quick, but rounded. What could be among the nearest
    # by them is measured exactly.
    squares = np.einsum("ij,ij->i", embeddings, embeddings)
    rough = squares - 2 * (embeddings[prototypes] @ embeddings.T)
    rough[:, ~silent] = np.inf
    if groups is not None:
        groups = np.asarray(groups)
        same = groups[prototypes][:, None] == groups
        rough[~same & (same & silent).any(axis=1, keepdims=True)] = np.inf
    chosen, rounding = [], 1e-4 * squares.max()
    for prototype, distances in zip(prototypes, rough):
        k = min(n, np.isfinite(distances).sum())
        near = np.flatnonzero(distances <= np.partition(distances, k - 1)[k - 1] + rounding)
        exact = cdist(embeddings[[prototype]], embeddings[near])[0]
        chosen.append(near[np.argsort(exact, kind="stable")[:k]])
    return chosen


def prototypes_and_counterfactuals(
    embeddings, activations, config: AttributionConfig, groups=None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows of prototypes (P,) and of each one's counterfactuals, P arrays; ``groups`` as above."""
    prototypes = choose_prototypes(activations, config.n_prototypes)
    return prototypes, choose_counterfactuals(embeddings, activations, prototypes, config.n_counterfactuals, groups)


class Plan:
    """What is to be occluded: for many concepts the prototypes, and what each gene is changed to.

    Parameters are those of :func:`attribute`.

    Attributes
    ----------
    cells
        Row of a prototype to the (index into ``concepts``, place among that concept's prototypes) that it has.
    unmatched
        Prototypes for which ``counterfactual_match`` found no cell.
    """

    def __init__(self, adata, model: CellEncoder, sae: Dictionary, concepts, config: AttributionConfig, key: str):
        check_embedded(adata, model, key)
        self.adata, self.model, self.sae, self.config = adata, model, sae, config
        self.concepts = np.atleast_1d(concepts).astype(int)
        if (self.concepts < 0).any() or (self.concepts >= sae.config.n_concepts).any():
            raise ValueError(f"concepts must be 0 to {sae.config.n_concepts - 1}, got {self.concepts.tolist()}")
        if len(set(self.concepts)) < len(self.concepts):
            raise ValueError("a concept is named twice")
        groups = None
        if config.counterfactual_match is not None:
            if config.counterfactual_match not in adata.obs:
                raise ValueError(
                    f"obs has no column {config.counterfactual_match!r} to match counterfactuals in; "
                    f"it has: {', '.join(adata.obs) or 'none'}"
                )
            groups = adata.obs[config.counterfactual_match].astype(str).to_numpy()
        self.ids = token_ids(adata.var_names, model)
        self.bins = adata.layers["bins"].tocsr()
        self.source = sparse.csr_matrix(adata.X) if config.binning == "rebinned" else self.bins
        self.embeddings = adata.obsm[key]
        self.activations = sae.activations(self.embeddings)[:, self.concepts].tocsc()
        self.prototypes, self.counterfactuals, self.unmatched, self.cells = [], [], 0, {}
        for c, concept in enumerate(self.concepts):
            u = self.activations[:, [c]].toarray().ravel()
            try:
                chosen, others = prototypes_and_counterfactuals(self.embeddings, u, config, groups)
            except ValueError as error:
                raise ValueError(f"concept {concept}: {error}") from error
            self.prototypes.append(chosen)
            self.counterfactuals.append(others)
            if groups is not None:
                self.unmatched += sum(groups[p] != groups[o[0]] for p, o in zip(chosen, others))
            for place, row in enumerate(chosen):
                self.cells.setdefault(int(row), []).append((c, place))
        if self.unmatched:
            warnings.warn(
                f"{self.unmatched} prototypes have no silent cell with their {config.counterfactual_match}: "
                "the nearest of all silent cells stand in",
                stacklevel=3,
            )
        if adata.uns["scgpt"].get("precision", "float32") != "float32":
            self.embed_again()
        pooled = config.counterfactual_mean == "pooled"
        self.pooled = [self.mean_of(np.unique(np.concatenate(o))) for o in self.counterfactuals] if pooled else None

    def embed_again(self) -> None:
        """Activations of the prototypes in single precision, so that rounding is not taken for an effect of genes.

        A cell in which a concept then is silent is no prototype of it any more.
        """
        rows = sorted(self.cells)
        X = embed_tokens(cell_tokens(self.bins[rows], self.ids, self.model), self.model)
        exact = self.sae.activations(X)[:, self.concepts]
        which = np.arange(self.activations.shape[0])
        which[rows] = len(which) + np.arange(len(rows))
        self.activations = sparse.vstack([self.activations.tocsr(), exact], "csr")[which].tocsc()
        for i, row in enumerate(rows):
            active = set(exact.indices[exact.indptr[i] : exact.indptr[i + 1]])
            self.cells[row] = [(c, place) for c, place in self.cells[row] if c in active]
        self.cells = {row: uses for row, uses in self.cells.items() if uses}

    def mean_of(self, rows: np.ndarray) -> np.ndarray:
        """(n_genes,) mean bin, or log value if re-binned."""
        return np.asarray(self.source[rows].mean(axis=0), np.float32).ravel()

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids and values (N,) of a cell, ``<cls>`` first, and the columns (N - 1,) of its genes."""
        ids, values = cell_tokens(self.bins[row], self.ids, self.model)[0]
        column = dict(zip(self.ids, range(len(self.ids))))  # symbols are unique, so known ids are
        return ids, values, np.array([column[i] for i in ids[1:]], int)

    def changes(self, row: int) -> pd.DataFrame:
        """All that is changed in one cell: columns of :func:`attribute` as far as they are known before a pass.

        ``concept`` is an index into ``concepts``, ``cell`` the row, ``gene`` the column; ``place`` that of the cell
        among the prototypes.
        """
        config, parts = self.config, []
        _, values, columns = self.tokens(row)
        for c, place in self.cells[row]:
            mean = self.pooled[c] if self.pooled is not None else self.mean_of(self.counterfactuals[c][place])
            genes, before, change = columns, values[1:], np.full(len(columns), "value", object)
            if config.binning == "rebinned":
                change[mean[columns] <= 0] = "remove"
            elif config.absent == "remove":
                change[mean[columns] < config.absent_below] = "remove"
            if config.insertion:
                new = np.setdiff1d(np.flatnonzero((mean >= config.absent_below) & (self.ids >= 0)), columns)
                genes, before = np.r_[genes, new], np.r_[before, np.zeros(len(new), np.float32)]
                change = np.r_[change, np.full(len(new), "insert", object)]
            parts.append(
                pd.DataFrame(
                    {"concept": c, "place": place, "cell": row, "gene": genes, "bin": before,
                     "counterfactual": mean[genes], "change": change, "activation": self.activations[row, c]}
                )
            )  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    def occluded(self, row: int, changes: pd.DataFrame, batch_tokens: int) -> tuple[np.ndarray, int]:
        """Activation after each of the ``changes`` of a cell (M,), exactly; and the number of forward passes."""
        ids, values, columns = self.tokens(row)
        value = changes["counterfactual"].where(changes["change"] != "remove", -1)
        keys, same = np.unique(np.stack([changes["gene"], value], 1), axis=0, return_inverse=True)
        genes, means = keys[:, 0].astype(int), keys[:, 1].astype(np.float32)
        place = pd.Series(np.arange(1, len(ids)), columns).reindex(genes, fill_value=0).to_numpy()
        there = place > 0
        if self.config.binning == "rebinned":
            whole = self.bins[row].indices  # the bins are those of all genes, as many as there are
            at = pd.Series(np.arange(1, len(whole) + 1), whole)[genes].to_numpy()
            log_values = self.source[row, whole].toarray().ravel()
            out = rebinned(self.model, np.r_[ids[0], self.ids[whole]], log_values, at, means.clip(0), batch_tokens)
        else:
            out = np.empty((len(genes), self.model.dim), np.float32)
            out[there] = occlude(self.model, ids, values, place[there], means[there], means[there] < 0, batch_tokens)
            out[~there] = insert(self.model, ids, values, self.ids[genes[~there]], means[~there], batch_tokens)
        with torch.inference_mode():
            u = self.sae.encode(torch.from_numpy(out))[:, self.concepts].numpy()
        return u[same.ravel(), changes["concept"]], len(genes)

    def shards(self) -> list[list[int]]:
        """Rows of the prototypes, in parts of ``SHARD_CELLS``."""
        rows = sorted(self.cells)
        return [rows[i : i + SHARD_CELLS] for i in range(0, len(rows), SHARD_CELLS)]

    @cached_property
    def digest(self) -> str:
        """Of the cells, their embeddings, the concepts and the dictionary."""
        digest = hashlib.sha256("".join([*self.adata.obs_names, *self.adata.var_names]).encode())
        weights = [tensor.cpu().numpy() for _, tensor in sorted(self.sae.state_dict().items())]
        expression = [self.bins.data, self.bins.indices, self.source.data]
        for array in (*expression, self.embeddings, self.concepts, *weights):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:16]

    def settings(self) -> dict:
        """What the result depends on, to be kept with it."""
        return {
            **asdict(self.config),
            "model": self.adata.uns["scgpt"]["model"],
            "n_genes_panel": int((self.ids >= 0).sum()),
            "n_unmatched": int(self.unmatched),
            "inputs": self.digest,
        }

    def finish(self, table: pd.DataFrame, **attrs) -> pd.DataFrame:
        """Rows in order of concepts, prototypes and genes; names for numbers; the attribution."""
        table = table.sort_values(["concept", "place"], kind="stable", ignore_index=True).drop(columns="place")
        table["concept"] = self.concepts[table["concept"]]
        for name, names in (("cell", self.adata.obs_names), ("gene", self.adata.var_names)):
            table[name] = names.to_numpy()[table[name]]
        table["attribution"] = (table["activation"] - table["occluded"]) / table["activation"]
        table.attrs = {**self.settings(), **attrs}
        return table


def attribute(
    adata: AnnData,
    model: CellEncoder,
    sae: Dictionary,
    concepts,
    config: AttributionConfig | None = None,
    key: str = "X_scGPT",
    folder: str | Path | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
    part: Part | None = None,
    **settings,
) -> pd.DataFrame | None:
    """Attribution of every gene to concepts, in every prototype, exactly (Eq. 1).

    For many concepts see :func:`scsae_utils.screening.attribute_all`.

    Parameters
    ----------
    adata
        Cells after :func:`scsae_utils.embed` with this ``model``.
    concepts
        One number or several.
    config
        Or its fields as keywords: ``attribute(adata, model, sae, 17, n_prototypes=30)``.
    folder
        Keep the work there, a file for each ``SHARD_CELLS`` prototype cells; a stopped computation goes on from it.
    part
        Do only this part of the work in ``folder``, and return None; a call without it then collects them all.

    Returns
    -------
    Table, one row for each concept, prototype and gene: ``concept``, ``cell`` (name), ``gene``, ``bin`` (before),
    ``counterfactual`` (mean bin or, re-binned, mean log value), ``change`` (``value``, ``remove`` or ``insert``),
    ``activation``, ``occluded`` (activation after), ``method`` (``exact``), ``attribution``. In ``attrs``: the
    settings, ``n_passes`` (forward passes), ``n_unmatched`` (prototypes without a cell to match).

    Raises
    ------
    ValueError
        If the cells were not embedded with this model, a concept does not exist, never activates or always does, or
        the folder holds work of other settings.
    """
    plan = make_plan(adata, model, sae, concepts, config, key, settings)
    shards = Shards(folder, {"method": "exact", **plan.settings()}, part)
    total = sum(len(plan.tokens(row)[2]) * len(uses) for row, uses in plan.cells.items())
    with tqdm(total=total, desc="occluding genes", unit="gene", disable=not progress) as bar:
        for i, rows in shards.mine("exact", enumerate(plan.shards())):

            def compute(rows=rows) -> pd.DataFrame:
                parts, passes = [], 0
                for row in rows:
                    part = plan.changes(row)
                    part["occluded"], n = plan.occluded(row, part, batch_tokens)
                    parts.append(part.assign(method="exact"))
                    passes += n
                    bar.update(int((part["change"] != "insert").sum()))
                table = pd.concat(parts, ignore_index=True)
                table.attrs["n_passes"] = passes
                return table

            known, table = shards.get(f"exact-{i:05d}", compute)
            if known:
                bar.update(int((table["change"] != "insert").sum()))
    if part is not None:
        return None
    tables = shards.tables("exact-", len(plan.shards()))
    return plan.finish(pd.concat(tables), n_passes=sum(t.attrs["n_passes"] for t in tables))


def make_plan(adata, model, sae, concepts, config: AttributionConfig | None, key: str, settings: dict) -> Plan:
    """The plan of a ``config`` or of its fields."""
    if config is not None and settings:
        raise ValueError("give a config or its fields, not both")
    return Plan(adata, model, sae, concepts, config or AttributionConfig(**settings), key)


def check_embedded(adata: AnnData, model: CellEncoder, key: str = "X_scGPT") -> None:
    """Raise ValueError unless ``adata`` was embedded with this very model."""
    if key not in adata.obsm or "bins" not in adata.layers or "scgpt" not in adata.uns:
        raise ValueError("the cells are not embedded: run scsae_utils.embed(adata, model) first")
    if adata.uns["scgpt"]["model"] != model.fingerprint():
        raise ValueError("the cells were embedded with another model: embed them again with this one")
    if adata.uns["scgpt"].get("n_genes", adata.n_vars) != adata.n_vars:
        raise ValueError("genes were left out after the cells were embedded: embed them again")


def gene_summary(attributions: pd.DataFrame, threshold: float = 0.05, min_prototypes: int = 5) -> pd.DataFrame:
    """One row for each concept and gene, and the paper's gene set.

    Returns
    -------
    Table indexed by concept and gene, most positive first: ``mean`` attribution over all prototypes (0 where the gene
    is not there to be occluded), ``std``, ``n_prototypes`` in which it was, ``n_above``: prototypes with
    |attribution| > ``threshold``, ``selected``: ``n_above >= min_prototypes`` (paper: 0.05 and 5 of 20).
    """
    n_prototypes = attributions.groupby("concept")["cell"].nunique()
    groups = (
        attributions[["concept", "gene", "cell", "attribution"]]
        .assign(above=attributions["attribution"].abs() > threshold, square=attributions["attribution"] ** 2)
        .groupby(["concept", "gene"])
    )
    table = groups.agg(
        total=("attribution", "sum"),
        square=("square", "sum"),
        n_prototypes=("cell", "nunique"),
        n_above=("above", "sum"),
    )
    n = table.index.get_level_values("concept").map(n_prototypes).to_numpy()
    table["mean"] = table.pop("total") / n
    table["std"] = np.sqrt(np.maximum(table.pop("square") / n - table["mean"] ** 2, 0))
    table["selected"] = table["n_above"] >= min_prototypes
    table = table[["mean", "std", "n_prototypes", "n_above", "selected"]]
    return table.sort_values(["concept", "mean"], ascending=[True, False], kind="stable")


def strongest_genes(summary: pd.DataFrame, n: int) -> list[str]:
    """The ``n`` genes with the largest |mean| attribution of each concept in a :func:`gene_summary`, named once."""
    order = summary["mean"].abs().sort_values(ascending=False, kind="stable")
    return list(dict.fromkeys(order.groupby("concept", sort=False).head(n).index.get_level_values("gene")))
