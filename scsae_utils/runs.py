"""What a run leaves on disk, opened again; and how a concept is found in it by what it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
from anndata import AnnData

from .attribution import concepts_of_gene
from .concepts import best_concept_for_type, check_concept, kept, number
from .sae import SAE, load_sae
from .scgpt import ScGPT, load_model


@dataclass(frozen=True)
class Run:
    """A run's files, opened.

    Parameters
    ----------
    cells
        ``embedded.h5ad``: cells x genes, with embeddings.
    concepts
        ``concepts.h5ad``: cells x concepts, with taxonomy.
    sae, model
        ``sae.safetensors``, and the scGPT that the cells were embedded with.
    """

    cells: AnnData
    concepts: AnnData
    sae: SAE
    model: ScGPT


def run_folder(run: str | Path) -> Path:
    """The folder of a run; a relative path counts from the project's root, also in a notebook that was opened by hand."""
    run = Path(run)
    here = Path.cwd()
    root = next((p for p in [here, *here.parents] if (p / "notebooks").is_dir() and (p / "profiles").is_dir()), here)
    return run if run.is_absolute() else root / run


def write(adata: AnnData, path: Path) -> None:
    """Write an h5ad whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    adata.write_h5ad(part, compression="gzip")
    part.replace(path)


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


def load_run(run: str | Path) -> Run:
    """Open the run in a folder such as ``runs/mini``.

    Raises
    ------
    FileNotFoundError
        If a file is missing; says which chapter makes it.
    """
    folder = run_folder(run)
    cells = read(folder / "embedded.h5ad", "01_embedding")
    concepts = read(folder / "concepts.h5ad", "03_concept_taxonomy")
    return Run(cells, concepts, load_sae(folder / "sae.safetensors"), load_model(cells.uns["scgpt"]["name"]))


def find_concept(run: Run, concept: int | None = None, gene: str | None = None, cell_type: str | None = None) -> int:
    """Choose a concept by its number, by a gene or by a cell type; the first of the three that is given counts.

    Parameters
    ----------
    concept
        Its number; it must survive post-processing.
    gene
        The concept that loses the largest share of its activation when this gene is removed from all cells.
    cell_type
        The concept with the highest F1 of specificity and sensitivity for this type, of any level.

    Raises
    ------
    ValueError
        If nothing is given or found; names the near misses.
    """
    if concept is not None:
        return check_concept(run.concepts, concept)
    if gene is not None:
        lost = concepts_of_gene(run.cells, run.model, run.sae, gene)
        return number(lost[kept(run.concepts).var_names].idxmax())
    if cell_type is not None:
        return best_concept_for_type(run.concepts, cell_type)
    raise ValueError("say which concept: by number, gene or cell type")
