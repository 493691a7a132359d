"""Expression to bins, bins to tokens, tokens to cell embeddings (paper Sec. 2.1, METHOD "embed_data")."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
import torch
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm

from .compat import draw_like_embed_data
from .encoder import CellEncoder, find_device
from .files import whole
from .shards import Part, Shards, named_folder

BATCH_TOKENS = 8192  # larger batches are slower on a CPU: each layer's new memory has to be paged in
PADDED_TOKENS = 4096  # of a batch of cells that differ in length: the smaller it is, the less padding is computed
BLOCK_CELLS = 4096  # cells that are read, embedded and kept at a time
UMAP_CELLS = 30_000  # cells that a map is laid out by; the others are placed among them
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def token_ids(symbols, model: CellEncoder) -> np.ndarray:
    """(n_genes,) token id of each gene symbol, -1 where the model does not know it."""
    return np.array([model.vocab.get(symbol, -1) if not symbol.startswith("<") else -1 for symbol in symbols])


def known_expression(adata: AnnData, ids: np.ndarray, rows=slice(None)) -> sparse.csr_matrix:
    """Expression above zero of the genes with an id, as CSR float32 with all columns; backed cells are read here.

    Raises
    ------
    ValueError
        If values are negative or not finite.
    """
    X = sparse.csr_matrix(adata.X[rows], dtype=np.float32) @ sparse.diags((ids >= 0).astype(np.float32))
    X = sparse.csr_matrix(X)
    X.eliminate_zeros()
    X.sort_indices()
    if len(X.data) and not (np.isfinite(X.data).all() and X.data.min() > 0):
        raise ValueError("expression holds negative or non-finite values; scGPT needs counts or log1p values")
    return X


def bin_cells(
    adata: AnnData, model: CellEncoder, ties: str = "expected", seed: int = 0, rows: slice = slice(None)
) -> sparse.csr_matrix:
    """Bin every cell over the genes that the model knows.

    Parameters
    ----------
    adata
        Cells; ``X`` holds counts or log values, zeros where a gene was not seen.
    model
        Supplies the vocabulary and the number of bins.
    ties
        ``"expected"`` (deterministic) or ``"random"`` (scGPT's own draw, from ``seed`` and the cell's row).
    rows
        Only these cells.

    Returns
    -------
    (n_cells, n_genes) CSR float32; zero where a gene is not expressed or not known to the model.

    Raises
    ------
    ValueError
        If a cell expresses no gene of the vocabulary, or values are negative or not finite.
    """
    if ties not in ("expected", "random"):
        raise ValueError(f"ties must be 'expected' or 'random', not {ties!r}")
    bins = known_expression(adata, token_ids(adata.var_names, model), rows)
    refuse_empty(adata, np.flatnonzero(np.diff(bins.indptr) == 0) + rows.indices(adata.n_obs)[0])
    for i, (start, end) in enumerate(zip(bins.indptr[:-1], bins.indptr[1:]), rows.indices(adata.n_obs)[0]):
        rng = np.random.default_rng([seed, i]) if ties == "random" else None
        bins.data[start:end] = model.input_values(bins.data[start:end], rng)
    return bins


def refuse_empty(adata: AnnData, empty: np.ndarray) -> None:
    """Raise ValueError if there are rows of cells that express no known gene."""
    if len(empty):
        raise ValueError(
            f"{len(empty)} cells express no gene that the model knows "
            f"(first: {adata.obs_names[empty[0]]}): remove them before embedding"
        )


def cell_tokens(bins: sparse.csr_matrix, ids: np.ndarray, model: CellEncoder) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each cell's token ids and values, ``<cls>`` first; too long cells keep their highest bins.

    Parameters
    ----------
    bins
        (n_cells, n_genes) from :func:`bin_cells`.
    ids
        (n_genes,) from :func:`token_ids`.

    Returns
    -------
    One pair (ids (N,) int64, values (N,) float32) for each cell.
    """
    cells, most = [], model.max_tokens - 1
    for start, end in zip(bins.indptr[:-1], bins.indptr[1:]):
        columns, values = bins.indices[start:end], bins.data[start:end]
        if len(columns) > most:  # stable: among equal bins the first genes stay
            top = np.sort(np.argsort(-values, kind="stable")[:most])
            columns, values = columns[top], values[top]
        cells.append((np.r_[model.cls[0], ids[columns]], np.r_[model.cls[1], values].astype(np.float32)))
    return cells


def token_table(adata: AnnData, model: CellEncoder, cell: str) -> pd.DataFrame:
    """One cell as its tokens, highest bins first: what the model reads.

    Returns
    -------
    One row for each token that fits, ``<cls>`` first: ``gene``, ``token`` (id), ``expression`` (of ``X``), ``bin``
    (fed), ``ties`` (genes of the cell with the same expression, itself included).
    """
    row = adata[[cell]]
    ids = token_ids(adata.var_names, model)
    X = np.asarray(row.X.todense() if sparse.issparse(row.X) else row.X).ravel()
    tokens, values = cell_tokens(row.layers["bins"], ids, model)[0]
    column = {token: i for i, token in enumerate(ids)}
    columns = [column[t] for t in tokens[1:]]
    expression = pd.Series(X[columns])
    table = pd.DataFrame(
        {
            "gene": ["<cls>", *adata.var_names[columns]],
            "token": tokens,
            "expression": [np.nan, *expression],
            "bin": values,
            "ties": [0, *expression.groupby(expression).transform("size")],
        }
    )
    first, rest = table.iloc[:1], table.iloc[1:].sort_values("bin", ascending=False, kind="stable")
    return pd.concat([first, rest], ignore_index=True)


def embed_tokens(
    cells, model: CellEncoder, batch_tokens: int = PADDED_TOKENS, progress: bool = False, bar: tqdm | None = None
) -> np.ndarray:
    """Cell embeddings (n_cells, d) of token sequences, in batches of cells of similar length.

    A cell's embedding does not depend on its neighbours in the batch: padding is masked out of the attention.
    ``bar`` is a progress bar of the caller's, counted up by cell.
    """
    lengths = np.array([len(ids) for ids, _ in cells], int)
    order = np.argsort(lengths, kind="stable")[::-1]  # longest first: memory is highest at once, not at the end
    out = np.empty((len(cells), model.dim), np.float32)
    start = 0
    with (
        tqdm(total=len(cells), desc="embedding cells", unit="cell", disable=not progress) as own,
        torch.inference_mode(),
    ):
        bar = own if bar is None else bar
        while start < len(order):
            longest = lengths[order[start]]
            batch = order[start : start + max(1, batch_tokens // longest)]
            ids = np.full((len(batch), longest), model.pad[0], np.int64)
            values = np.full((len(batch), longest), model.pad[1], np.float32)
            for row, i in enumerate(batch):
                ids[row, : lengths[i]], values[row, : lengths[i]] = cells[i]
            ids, values = torch.from_numpy(ids).to(model.device), torch.from_numpy(values).to(model.device)
            keep = None
            if lengths[batch[-1]] < longest:
                keep = torch.from_numpy(np.arange(longest) < lengths[batch][:, None]).to(model.device)
            out[batch] = model(ids, values, keep).float().cpu().numpy()
            start += len(batch)
            bar.update(len(batch))
    return out


def quick_type() -> torch.dtype:
    """What a CPU multiplies quickest: bf16 where it can (AVX-512 BF16, AMX; elsewhere it is emulated), else fp32."""
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def at_precision(model: CellEncoder, precision: str = "float32", device: str | None = None) -> CellEncoder:
    """The model in a precision and on a device; itself if it is there already, else a copy.

    Parameters
    ----------
    precision
        ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float16 on a GPU, as ``embed_data`` does there; on
        a CPU bfloat16 where the processor multiplies it, else float32. Half precision is faster where the hardware
        has it; bfloat16 turns a cell embedding by less than one degree, float16 by far less.
    device
        ``"cpu"``, ``"cuda"``, ``"mps"`` or ``"auto"``, see :func:`~scsae_utils.encoder.find_device`; None: where the
        model is.

    Raises
    ------
    ValueError
        For another precision, or a device that is not there.
    """
    target = model.device if device is None else find_device(device)
    if precision == "auto":
        if target.type == "cpu":
            precision = str(quick_type()).removeprefix("torch.")
        else:
            precision = "float16"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be 'auto' or one of {', '.join(PRECISIONS)}, not {precision!r}")
    dtypes = {p.dtype for p in model.parameters()}
    if target == model.device and dtypes <= {PRECISIONS[precision]}:
        return model
    return copy.deepcopy(model).to(target, PRECISIONS[precision])


def embed(
    adata: AnnData,
    model: CellEncoder,
    ties: str = "expected",
    seed: int = 0,
    precision: str = "float32",
    device: str | None = None,
    compat: str | None = None,
    workers: int = 1,
    out: str | Path | None = None,
    batch_tokens: int = PADDED_TOKENS,
    block_cells: int | None = None,
    folder: str | Path | None = None,
    part: Part | None = None,
    progress: bool = True,
) -> AnnData:
    """Embed every cell.

    Parameters
    ----------
    adata
        Cells, as from :func:`scsae_utils.load_cells`; changed in place. Counts or log values: the bins are the same.
        Cells of a file that was opened with ``backed="r"`` are read in blocks of ``block_cells``.
    model
        From :func:`scsae_utils.load_model`, or another :class:`~scsae_utils.encoder.CellEncoder`.
    ties, seed
        See :func:`bin_cells`.
    precision, device
        See :func:`at_precision`.
    compat, workers
        ``"embed_data"``: bins and truncation as the genuine ``scgpt.tasks.embed_data`` draws them after
        ``torch.manual_seed(seed)``, on a machine with ``workers`` cores; see
        :func:`scsae_utils.compat.draw_like_embed_data`.
    out
        A ``.npy`` file that fills block by block. A stopped run goes on from the last whole block, and the embeddings
        stay on disk (memory-mapped), so that memory does not grow with the number of cells.
    batch_tokens
        Most tokens in one batch; sets speed and memory, not the result.
    block_cells
        Cells that are read, embedded and kept at a time; ``BLOCK_CELLS`` by default.
    folder
        Keep each block's embeddings below it, as :func:`scsae_utils.attribute` does its work; each model, setting and
        set of cells has a folder of its own there.
    part
        Do only this part of the blocks in ``folder``, and leave ``adata`` as it is; a call without it then collects
        them all.

    Returns
    -------
    ``adata`` with ``obsm["X_scGPT"]`` (n_cells, d) of unit length, ``layers["bins"]`` (what the model was fed; not for
    backed cells) and the settings in ``uns["scgpt"]``: ``name`` and ``model`` (name and fingerprint of the weights),
    ``ties``, ``seed``, ``precision``, ``compat``, ``workers``, ``n_genes_known``, ``n_genes``, ``n_truncated`` (cells
    with more genes than the model reads: the highest bins are kept), ``device`` (as it was asked for: what comes later
    runs there, too).

    Raises
    ------
    ValueError
        See :func:`bin_cells` and :func:`at_precision`; also if fewer than 10 genes are in the model's vocabulary, or
        ``out`` holds the embeddings of other cells or settings. All cells are checked before the first is embedded.
    """
    if part is not None and (folder is None or out is not None):
        raise ValueError("a part of the blocks needs a folder that the other parts share, and cannot fill out")
    if compat not in (None, "embed_data") or (compat and (adata.isbacked or ties != "expected")):
        raise ValueError(
            "compat must be None or 'embed_data'; the latter draws its own ties, and needs the cells in memory "
            "(adata.to_memory()), as embed_data does"
        )
    ids = token_ids(adata.var_names, model)
    if (ids >= 0).sum() < 10:
        raise ValueError(
            f"only {(ids >= 0).sum()} of {adata.n_vars} genes are in the model's vocabulary; "
            f"var_names must be gene symbols (first three: {', '.join(adata.var_names[:3])})"
        )
    fast = at_precision(model, precision, device)
    block_cells = block_cells or BLOCK_CELLS
    blocks = [slice(i, min(i + block_cells, adata.n_obs)) for i in range(0, adata.n_obs, block_cells)]
    lengths, total = check_cells(adata, ids, blocks)
    settings = {
        "name": model.name,
        "model": model.fingerprint(),
        "ties": "drawn" if compat else ties,
        "seed": seed,
        "precision": str(next((p.dtype for p in fast.parameters()), torch.float32)).removeprefix("torch."),
        "compat": compat or "",
        "workers": workers if compat else 0,
        "n_genes": adata.n_vars,
        "n_genes_known": int((ids >= 0).sum()),
        "n_truncated": int((lengths >= model.max_tokens).sum()),
    }
    names = hashlib.sha256("\n".join([*adata.obs_names, "", *adata.var_names]).encode()).hexdigest()
    state = {**settings, "batch_tokens": batch_tokens, "block": block_cells, "names": names, "total": total}
    shards = Shards(named_folder(folder, state), state, part) if folder is not None else None
    X, done = None, 0
    if out is None:
        X = np.empty((adata.n_obs, model.dim), np.float32)
    else:
        done = open_store(Path(out), (adata.n_obs, model.dim), state)
    drawn = draw_like_embed_data(adata, model, seed, workers) if compat else None
    fed = []
    with tqdm(
        total=adata.n_obs, initial=min(done * block_cells, adata.n_obs), desc="embedding cells", unit="cell",
        disable=not progress,
    ) as bar:  # fmt: skip
        for i, rows in enumerate(blocks) if shards is None else shards.mine("block", enumerate(blocks)):
            if i < done and adata.isbacked:
                continue
            bins = drawn[rows] if compat else bin_cells(adata, model, ties, seed, rows)
            if i >= done:

                def compute(bins=bins) -> pd.DataFrame:
                    return pd.DataFrame(embed_tokens(cell_tokens(bins, ids, model), fast, batch_tokens, bar=bar))

                known, table = (False, compute()) if shards is None else shards.get(f"block-{i:05d}", compute)
                block = table.to_numpy()
                bar.update(len(block) if known else 0)
                if out is None:
                    X[rows] = block
                else:
                    fill_store(Path(out), rows, block)
                    write_state(Path(out), state, i + 1)
            if not adata.isbacked:
                fed.append(bins)
    if part is not None:
        return adata
    if out is not None:
        X = close_store(Path(out))
    if fed:
        adata.layers["bins"] = sparse.vstack(fed, format="csr")
    adata.obsm["X_scGPT"], adata.uns["scgpt"] = X, {**settings, "device": device or model.device.type}
    return adata


def check_cells(adata: AnnData, ids: np.ndarray, blocks: list[slice]) -> tuple[np.ndarray, float]:
    """Number of known genes of each cell (n_cells,) and the sum of all values; raises what :func:`embed` raises."""
    if adata.isbacked and getattr(adata.X, "format", "csr") == "csc":
        raise ValueError("the file keeps its expression by gene (CSC): write it as CSR first, or load it into memory")
    lengths, total = [], 0.0
    for rows in blocks:
        X = known_expression(adata, ids, rows)
        lengths.append(np.diff(X.indptr))
        total += float(X.data.sum(dtype=np.float64))
    lengths = np.concatenate(lengths) if lengths else np.zeros(0, int)
    refuse_empty(adata, np.flatnonzero(lengths == 0))
    return lengths, total


def open_store(path: Path, shape: tuple[int, int], state: dict) -> int:
    """Make a ``.npy`` that fills block by block, or find the one that a stopped run left; how many blocks are done.

    Until it is whole it is called ``path.part``; ``path.json`` has the settings and the number of blocks.
    """
    part, note = path.with_name(path.name + ".part"), path.with_name(path.name + ".json")
    if note.is_file() and (part.is_file() or path.is_file()):
        known = json.loads(note.read_text())
        done = known.pop("blocks_done")
        if known != json.loads(json.dumps(state)):
            other = ", ".join(k for k in state if known.get(k) != state[k])
            raise ValueError(
                f"{path} holds embeddings of another run (other: {other}): delete it, or give another file"
            )
        return done
    if path.exists():
        raise ValueError(f"{path} exists and was not made by embed: give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(part, "w+", np.float32, shape)
    write_state(path, state, 0)
    return 0


def fill_store(path: Path, rows: slice, block: np.ndarray) -> None:
    """Write one block; the file is mapped no longer than that, so that its pages do not stay in memory."""
    store = np.load(path.with_name(path.name + ".part"), mmap_mode="r+")
    store[rows] = block
    store.flush()


def write_state(path: Path, state: dict, blocks_done: int) -> None:
    """Note how far ``path`` has come, whole or not at all."""
    with whole(path.with_name(path.name + ".json")) as part:
        part.write_text(json.dumps({**state, "blocks_done": blocks_done}))


def close_store(path: Path) -> np.ndarray:
    """Give the finished file its name; memory-mapped, to be read."""
    part = path.with_name(path.name + ".part")
    if part.is_file():
        part.replace(path)
    return np.load(path, mmap_mode="r")


def add_umap(adata: AnnData, seed: int = 0, max_cells: int = UMAP_CELLS) -> None:
    """UMAP of the cell embeddings, in ``obsm["X_umap"]``.

    By exact neighbours. Of more than ``max_cells`` cells, a random sample of so many is laid out, by approximate ones
    and with scanpy's settings; the others are placed among them by ``umap.UMAP.transform``, which moves none of the
    sample.
    """
    if adata.n_obs <= max_cells:
        sc.pp.neighbors(adata, use_rep="X_scGPT", n_neighbors=15, transformer="sklearn", random_state=seed)
        sc.tl.umap(adata, random_state=seed)
        return
    from umap import UMAP  # slow to import, and only needed here

    order = np.random.default_rng(seed).permutation(adata.n_obs)
    sample, rest = np.sort(order[:max_cells]), np.sort(order[max_cells:])
    X, place = adata.obsm["X_scGPT"], np.empty((adata.n_obs, 2), np.float32)
    layout = UMAP(n_neighbors=15, min_dist=0.5, random_state=seed, n_jobs=1).fit(X[sample])
    place[sample] = layout.embedding_
    for rows in np.array_split(rest, range(BLOCK_CELLS, len(rest), BLOCK_CELLS)):
        place[rows] = layout.transform(X[rows])
    adata.obsm["X_umap"] = place
