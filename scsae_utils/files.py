"""Where a run's files lie; h5ad and parquet files written whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import anndata as ad
import pandas as pd
from anndata import AnnData
from pooch import file_hash


def run_folder(run: str | Path) -> Path:
    """The folder of a run; a relative path counts from the project's root, also in a notebook opened by hand."""
    run = Path(run)
    here = Path.cwd()
    root = next((p for p in [here, *here.parents] if (p / "notebooks").is_dir() and (p / "profiles").is_dir()), here)
    return run if run.is_absolute() else root / run


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A file to write to, which takes the place of ``path`` when it is whole, and goes after an error.

    It has another name each time, so that two processes that write ``path`` do not write into each other's.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def files_of(path: Path) -> list[Path]:
    """The files of a folder, without the records of checksums; of a file or a zarr, itself."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() and path.suffix != ".zarr" else [path]
    return [file for file in files if file.suffix != ".sha256"]


def checksum(path: Path) -> str:
    """SHA-256 of a file; of a folder such as a zarr, that of its files' names and checksums."""
    if path.is_file():
        return file_hash(str(path))
    parts = [f"{p.relative_to(path)} {file_hash(str(p))}" for p in sorted(path.rglob("*")) if p.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write(adata: AnnData, path: Path) -> None:
    """Write an h5ad whole or not at all."""
    with whole(path) as part:
        adata.write_h5ad(part, compression="gzip")


def read(path: Path, made_by: str) -> AnnData:
    """Read one of a run's h5ad files.

    Raises
    ------
    FileNotFoundError
        That says which chapter makes the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run chapter {made_by} first, or `make book`")
    return ad.read_h5ad(path)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a parquet file whole or not at all."""
    with whole(path) as part:
        table.to_parquet(part)


def read_table(path: Path, made_by: str) -> pd.DataFrame:
    """Read one of a run's parquet files; raises as :func:`read`."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run chapter {made_by} first, or `make book`")
    return pd.read_parquet(path)
