"""How a run was made: what is recorded, and that the page shows it."""

import hashlib
import json
import re

from scsae_utils import provenance


def executed(path, made_with=None):
    """A notebook as papermill and the book leave it."""
    job = {"parameters": {"seed": 0}, "start_time": "2026-01-02T03:04:05.678+00:00", "duration": 1.26}
    metadata = {"papermill": job, **({"provenance": made_with} if made_with else {})}
    path.write_text(json.dumps({"cells": [], "metadata": metadata}))
    return path


def test_files_that_parameters_name_are_hashed(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "cells.h5ad").write_bytes(b"abc")
    (tmp_path / "model" / "args.json").write_bytes(b"")
    values = {"cells": str(tmp_path / "cells.h5ad"), "model": str(tmp_path / "model"), "collection": "btm", "seed": 0}
    found = provenance.inputs({**values, "cell_type": "notebooks"})
    assert found == {
        str(tmp_path / "cells.h5ad"): "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        f"{tmp_path}/model/args.json": hashlib.sha256().hexdigest(),
    }
    packaged = provenance.inputs({"cells": "mini", "model": "scgpt-mini"})
    assert "scsae_utils/data/scgpt-mini/model.safetensors" in packaged


def test_a_download_is_hashed_where_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SCSAE_CACHE", str(tmp_path))
    url = "https://example.org/sets.gmt"
    assert provenance.inputs({"gene_sets": url}) == {}
    from pooch.utils import unique_file_name

    (tmp_path / unique_file_name(url)).write_bytes(b"abc")
    assert provenance.inputs({"gene_sets": url})[url].startswith("ba7816bf")


def test_what_is_recorded_and_shown(tmp_path):
    made_with = provenance.made_with({"model": "scgpt-mini"})
    assert made_with["versions"]["torch"].startswith("2.") and made_with["machine"]["cores"] >= 1
    other = {**made_with, "versions": {"torch": "1.0"}, "commit": "f" * 40, "changed": ["a.py"]}
    chapters = [executed(tmp_path / "01_a.ipynb", made_with), executed(tmp_path / "02_b.ipynb", other)]
    (tmp_path / "sae.safetensors").write_bytes(b"abc")
    path = provenance.write_provenance(tmp_path, [*chapters, executed(tmp_path / "03_c.ipynb")])
    about = json.loads(path.read_text())
    assert about["results"]["sae.safetensors"].startswith("ba7816bf")
    assert about["chapters"]["02_b"]["parameters"] == {"seed": 0}
    page = provenance.provenance_page(path)
    assert re.search(r"\| 02_b \| 2026-01-02 03:04:05 \| 1 \| `f{12}` and 1 changed files \|", page)
    assert "| 03_c | 2026-01-02 03:04:05 | 1 | unknown | unknown |" in page  # made before this was recorded
    assert "other versions: torch 1.0" in page and "`sae.safetensors` | `ba7816bf8f01cfea`" in page
