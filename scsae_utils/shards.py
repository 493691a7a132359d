"""Long work in parts, each kept in a file of its own, whole or not at all: a stopped computation goes on from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd


class Shards:
    """The parts of one computation.

    Parameters
    ----------
    folder
        Where they are kept, as parquet; None keeps them in memory.
    settings
        All that the result depends on, of plain JSON types.

    Raises
    ------
    ValueError
        If the folder holds parts of other settings; names those that differ.
    """

    def __init__(self, folder: str | Path | None, settings: dict):
        self.folder, self.memory = None if folder is None else Path(folder), {}
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path, settings = self.folder / "settings.json", json.loads(json.dumps(settings))
        if path.is_file():
            there = json.loads(path.read_text())
            other = sorted(k for k in {*there, *settings} if there.get(k) != settings.get(k))
            if other:
                raise ValueError(
                    f"{self.folder} holds work of other settings ({', '.join(other)}): "
                    "give another folder, or delete this one"
                )
        elif any(self.folder.glob("*.parquet")):
            raise ValueError(f"{self.folder} holds parquet files of unknown origin: give another folder")
        else:
            part = path.with_name(path.name + ".part")
            part.write_text(json.dumps(settings, indent=1) + "\n")
            part.replace(path)

    def get(self, name: str, compute: Callable[[], pd.DataFrame]) -> tuple[bool, pd.DataFrame]:
        """Was the part there already, and its table; if it was not, it is computed and kept."""
        if self.folder is None:
            self.memory[name] = compute()
            return False, self.memory[name]
        path = self.folder / f"{name}.parquet"
        if path.is_file():
            return True, pd.read_parquet(path)
        table = compute()
        part = path.with_name(path.name + ".part")
        table.to_parquet(part)  # attrs are kept
        part.replace(path)
        return False, table

    def tables(self, prefix: str) -> list[pd.DataFrame]:
        """All parts whose names start with ``prefix``, by name."""
        if self.folder is None:
            return [self.memory[name] for name in sorted(self.memory) if name.startswith(prefix)]
        return [pd.read_parquet(path) for path in sorted(self.folder.glob(f"{prefix}*.parquet"))]
