"""What all benchmarks share: the machine, the versions, and one JSON file for each benchmark's last result."""

import json
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scsae_utils.provenance import machine

RESULTS = Path(__file__).parent / "results"


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; a package that is not there is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def keep(name: str, rows: list[dict], figures: dict, packages: dict | None = None) -> dict:
    """Write ``results/NAME.json`` whole or not at all, and print the figures as the last line.

    Parameters
    ----------
    rows
        What was measured: the rows of a table, one for each way of doing it.
    figures
        Ratios and other figures by name.
    packages
        Versions; torch and numpy if not given.
    """
    result = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": packages or versions("torch", "numpy"),
        "rows": rows,
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    part = RESULTS / f"{name}.json.part"
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(RESULTS / f"{name}.json")
    print(json.dumps({"benchmark": name, **figures}))
    return result
