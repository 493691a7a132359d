"""Extract and interpret biological concepts from single-cell foundation models (Claye et al. 2025).

The five steps of a run are here; everything else is found by module. Names are imported when first used, so that
``import scsae_utils`` costs nothing.
"""

from importlib import import_module

PUBLIC = {
    "load_cells": "cells",
    "load_model": "scgpt",
    "embed": "embedding",
    "train_sae": "training",
    "attribute": "attribution",
}
__all__ = list(PUBLIC)


def __getattr__(name: str):
    if name in PUBLIC:
        return getattr(import_module(f".{PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
