"""Long work in units, each kept in a file of its own, whole or not at all: a stopped computation goes on from them.

Several processes can share the units, on one machine or on many that see the same folder: see :class:`Part`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .files import whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass(frozen=True)
class Part:
    """One job's part of a computation: of the units of a ``stage`` each ``of``-th one, from number ``part`` on.

    Parameters
    ----------
    stage
        ``"block"`` (:func:`~scsae_utils.embedding.embed`), ``"exact"`` (:func:`~scsae_utils.attribution.attribute`),
        ``"screen"`` or ``"confirm"`` (:func:`~scsae_utils.screening.attribute_all`; no unit can be confirmed before
        all are screened).
    part, of
        ``part`` counts from 0 to ``of`` - 1.
    """

    stage: str
    part: int
    of: int

    def __post_init__(self):
        if not 0 <= self.part < self.of:
            raise ValueError(f"of {self.of} parts there is none {self.part}: they count from 0 to {self.of - 1}")


def named_folder(base: str | Path, settings) -> Path:
    """A folder below ``base`` for work with just these ``settings`` (of JSON types), so that others do not mix."""
    return Path(base) / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def locked(path: Path):
    """Hold a lock file alone. The lock of a killed process is free; a file system without locks goes without."""
    with open(path, "w") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Shards:
    """The units of one computation.

    Each that is finished is noted in ``work.log`` of the folder: name, seconds, machine, process, time. A lock keeps
    two processes from doing the same unit at the same time: the second waits, and finds it done.

    Parameters
    ----------
    folder
        Where they are kept, as parquet; None keeps them in memory.
    settings
        All that the result depends on, of plain JSON types.
    part
        What this process is to do; None: everything.

    Raises
    ------
    ValueError
        If the folder holds units of other settings; names those that differ. Also for a part without a folder.
    """

    def __init__(self, folder: str | Path | None, settings: dict, part: Part | None = None):
        self.folder, self.memory, self.part = None if folder is None else Path(folder), {}, part
        if self.folder is None:
            if part is not None:
                raise ValueError("a part needs a folder that the other parts share")
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
            with whole(path) as new:
                new.write_text(json.dumps(settings, indent=1) + "\n")

    def mine(self, stage: str, units: Iterable) -> Iterator[tuple]:
        """Those of the numbered ``units``, pairs (number, unit) of a ``stage``, that this process is to do."""
        for number, unit in units:
            if self.part is None or (self.part.stage == stage and number % self.part.of == self.part.part):
                yield number, unit

    def get(self, name: str, compute: Callable[[], pd.DataFrame]) -> tuple[bool, pd.DataFrame]:
        """Was the unit there already, and its table; if it was not, it is computed and kept."""
        if self.folder is None:
            self.memory[name] = compute()
            return False, self.memory[name]
        path = self.folder / f"{name}.parquet"
        if path.is_file():
            return True, pd.read_parquet(path)
        lock = path.with_suffix(".lock")
        with locked(lock):
            if path.is_file():  # by now
                return True, pd.read_parquet(path)
            start, table = time.perf_counter(), compute()
            with whole(path) as part:
                table.rename(columns=str).to_parquet(part)  # attrs are kept
            took, at = time.perf_counter() - start, time.strftime("%Y-%m-%d %H:%M:%S")
            with open(self.folder / "work.log", "a") as log:  # one short write: lines of several processes do not mix
                log.write(f"{name}\t{took:.1f} s\t{socket.gethostname()}\t{os.getpid()}\t{at}\n")
            lock.unlink(missing_ok=True)  # who waited for it, or comes later, finds the unit
        return False, table

    def tables(self, prefix: str, n: int | None = None) -> list[pd.DataFrame]:
        """All units whose names start with ``prefix``, by name.

        Raises
        ------
        ValueError
            If they are not ``n``.
        """
        if self.folder is None:
            return [self.memory[name] for name in sorted(self.memory) if name.startswith(prefix)]
        paths = sorted(self.folder.glob(f"{prefix}*.parquet"))
        if n is not None and len(paths) != n:
            raise ValueError(f"{self.folder} holds {len(paths)} of {n} units {prefix}*: do the missing ones first")
        return [pd.read_parquet(path) for path in paths]
