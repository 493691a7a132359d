"""The long work of a run in parts that are jobs of their own; the chapters then find it done.

Snakemake calls this module where it is given ``shards``; by hand: ``python -m scsae_utils.jobs --help``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .attribution import AttributionConfig
from .book import load_profile
from .cells import load_cells
from .concepts import concepts_to_attribute
from .embedding import embed
from .files import run_folder, write
from .runs import load_run
from .scgpt import load_model
from .screening import ScreeningConfig, attribute_all
from .shards import Part
from .significance import work_folder
from .stream import open_panel

CELLS = Path("shards", "cells.h5ad")  # of a run: the cells of chapter 1 before they are embedded


def write_cells(profile: dict, run: Path) -> None:
    """Load, check and choose cells and genes once, so that jobs need read their own blocks only."""
    given, model = profile["embedding"], load_model(profile["embedding"]["model"])
    names = ("cells", "label", "label_mid", "label_high", "study", "n_top_genes")
    adata = load_cells(**{name: given[name] for name in names}, genes=model.genes, aliases=model.aliases)
    write(adata, run_folder(run) / CELLS)


def embed_part(profile: dict, run: Path, part: Part) -> None:
    """Embed a part of the blocks of chapter 1."""
    given, folder = profile["embedding"], run_folder(run)
    settings = {name: given[name] for name in ("ties", "seed", "precision", "device", "block_cells")}
    adata = open_panel(folder / CELLS)
    embed(adata, load_model(given["model"]), **settings, folder=folder / "embedding", part=part, progress=False)


def attribute_part(profile: dict, run: Path, part: Part) -> None:
    """Do a part of the attributions of chapter 5b: screen, confirm, or occlude every gene exactly."""
    given, opened = profile["drivers"], load_run(run)
    chosen, _ = concepts_to_attribute(opened.concepts, given["n_concepts"], given["cell_type"])
    config = AttributionConfig(given["n_prototypes"], given["n_counterfactuals"])
    screening = ScreeningConfig(given["threshold"], given["min_prototypes"])
    inputs = (opened.cells, opened.model, opened.sae, chosen, config, given["method"], screening)
    folder = work_folder(run_folder(run) / "attribution", *inputs)
    attribute_all(*inputs, folder=folder, part=part, progress=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scsae_utils.jobs", description=__doc__.splitlines()[0])
    parser.add_argument(
        "stage",
        choices=["cells", "block", "exact", "screen", "confirm"],
        help="cells: prepare them; block: embed; exact, screen (all parts, then) confirm: attribution",
    )
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, such as runs/mini")
    parser.add_argument("--part", type=int, default=0, help="from 0 on")
    parser.add_argument("--of", type=int, default=1, help="number of parts")
    args = parser.parse_args(arguments)
    try:
        profile = load_profile(args.profile)
        if args.stage == "cells":
            write_cells(profile, args.run)
        elif args.stage == "block":
            embed_part(profile, args.run, Part(args.stage, args.part, args.of))
        else:
            attribute_part(profile, args.run, Part(args.stage, args.part, args.of))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
