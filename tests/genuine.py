"""The genuine scgpt 0.2.4, importable: an oracle for the tests, a peer for the benchmark.

Its wheel is installed with ``pip install --no-deps scgpt==0.2.4``. It does not import as it is: it wants torchtext,
which no current torch works with, and its ``__init__`` imports packages that an embedding does not need.
"""

import importlib
import importlib.metadata
import logging
import sys
import types
import warnings
from pathlib import Path

VERSION = "0.2.4"


class Vocab:
    """Stand-in for ``torchtext.vocab.Vocab``: the part of it that ``embed_data`` uses."""

    def __init__(self, vocab=None):
        self.vocab, self.ids, self.default = self, {}, None

    def __contains__(self, token):
        return token in self.ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, token):
        return self.ids[token] if self.default is None else self.ids.get(token, self.default)

    def __call__(self, tokens):
        return [self[token] for token in tokens]

    def insert_token(self, token, index):
        if token in self.ids or index != len(self):
            raise RuntimeError(f"{token!r} is there already, or {index} is not the next id")
        self.ids[token] = index

    def append_token(self, token):
        self.insert_token(token, len(self))

    def set_default_index(self, index):
        self.default = index


def is_installed() -> bool:
    """Whether the wheel is there."""
    return any(importlib.metadata.distributions(name="scgpt"))


def root() -> Path:
    """Where the package is."""
    wheel = importlib.metadata.distribution("scgpt")
    if wheel.version != VERSION:
        raise ImportError(f"the genuine scgpt has to be {VERSION}, not {wheel.version}")
    return Path(wheel.locate_file("scgpt"))


def module(name: str):
    """Import a module of the genuine scgpt, such as ``scgpt.tasks.cell_emb``, without that package's ``__init__``."""
    if "scgpt" not in sys.modules:
        for package, path in {"scgpt": root(), "scgpt.tasks": root() / "tasks"}.items():
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(path)]
        sys.modules["scgpt"].logger = logging.getLogger("scgpt")
        torchtext = types.ModuleType("torchtext")
        torchtext.vocab = types.ModuleType("torchtext.vocab")
        torchtext.vocab.Vocab = Vocab
        torchtext.vocab.vocab = lambda tokens, min_freq=1: Vocab()  # called for no tokens; they are inserted later
        sys.modules.update({"torchtext": torchtext, "torchtext.vocab": torchtext.vocab})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flash_attn is not installed")
        return importlib.import_module(name)
