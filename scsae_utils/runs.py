"""What a run leaves on disk, opened again; and how a concept is found in it by what it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anndata import AnnData

from .cells import split_cells
from .concepts import add_taxonomy, attributable, best_concept_for_type, check_concept, concept_data, number
from .curves import concepts_of_gene
from .embedding import add_umap, at_precision, embed
from .files import read, run_folder
from .sae import SAE, SAEConfig, load_sae
from .scgpt import ScGPT, load_model
from .training import train_sae


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


def model_of(cells: AnnData, device: str | None = None) -> ScGPT:
    """The scGPT that cells were embedded with, in single precision.

    On a device (:func:`~scsae_utils.encoder.find_device`); None: on the one that was asked for when they were embedded.

    Raises
    ------
    FileNotFoundError, ValueError
        See :func:`~scsae_utils.scgpt.load_model` and :func:`~scsae_utils.encoder.find_device`.
    """
    about = cells.uns["scgpt"]
    return at_precision(load_model(about["name"]), "float32", device or about.get("device", "cpu"))


def load_run(run: str | Path, device: str | None = None) -> Run:
    """Open the run in a folder such as ``runs/mini``; ``device`` of the model: see :func:`model_of`.

    Raises
    ------
    FileNotFoundError
        If a file is missing; says which chapter makes it.
    ValueError
        If the device is not there.
    """
    folder = run_folder(run)
    cells = read(folder / "embedded.h5ad", "01_embedding")
    concepts = read(folder / "concepts.h5ad", "03_concept_taxonomy")
    return Run(cells, concepts, load_sae(folder / "sae.safetensors"), model_of(cells, device))


def make_run(
    adata: AnnData,
    model: ScGPT,
    config: SAEConfig,
    min_frequency: float = 1e-4,
    threshold: float = 0.8,
    held_out: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    """Chapters 1 to 3 in one call, in memory: split, embed, UMAP, train, activations, taxonomy.

    Parameters are those of :func:`~scsae_utils.cells.split_cells`, :func:`~scsae_utils.embedding.embed`,
    :func:`~scsae_utils.sae.train_sae`, :func:`~scsae_utils.concepts.concept_data` and
    :func:`~scsae_utils.concepts.add_taxonomy`.
    """
    embed(split_cells(adata, held_out, seed), model, progress=progress)
    add_umap(adata, seed)
    sae = train_sae(adata, config, progress=progress)
    return Run(adata, add_taxonomy(concept_data(adata, sae, min_frequency), threshold), sae, model)


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
        there = attributable(run.concepts).var_names
        if len(there) == 0:
            raise ValueError("every concept that is left is active in all cells: none has anything to compare with")
        return number(concepts_of_gene(run.cells, run.model, run.sae, gene)[there].idxmax())
    if cell_type is not None:
        return best_concept_for_type(run.concepts, cell_type)
    raise ValueError("say which concept: by number, gene or cell type")
