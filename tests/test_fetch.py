"""`make fetch` with a real server on this machine: what is missing is downloaded, what is there is checked."""

import sys

import pytest
import yaml
from server import serving

from scsae_utils import fetch
from scsae_utils.book import ROOT, load_profile


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Paths of profiles lie here, and downloads are kept here."""
    monkeypatch.setattr(fetch, "ROOT", tmp_path)
    monkeypatch.setenv("SCSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def source(url):
    return {"what": "Cells", "url": url, "gigabytes": 1e-6, "by_hand": "Ask the authors."}


def go(wanted, **settings):
    said = []
    return fetch.fetch(wanted, say=said.append, **settings), "".join(said)


def test_what_is_missing_is_downloaded_once_and_then_checked(project):
    with serving({"/cells.h5ad": b"abc", "/sets.gmt": b"S\t\tA\n"}) as (url, asked):
        profile = {"embedding": {"cells": "data/cells.h5ad"}, "evidence": {"gene_sets": f"{url}/sets.gmt"}}
        wanted = fetch.items(profile, {"data/cells.h5ad": source(f"{url}/cells.h5ad")})
        well, said = go(wanted, download=False)
        assert not well and not asked and f"put it here (a link will do): {project}/data/cells.h5ad" in said
        well, said = go(wanted)
        assert well and sorted(asked) == ["/cells.h5ad", "/sets.gmt"]
        assert (project / "data" / "cells.h5ad").read_bytes() == b"abc"
        well, said = go(wanted)
        assert well and said.count("checksum as recorded") == 2 and "missing" not in said
        assert len(asked) == 2


def test_a_file_that_changed_is_not_accepted(project):
    path = project / "cells.h5ad"
    path.write_bytes(b"given by hand")
    wanted = fetch.items({"embedding": {"cells": "./cells.h5ad"}}, {})
    assert go(wanted)[0] and (project / "cells.h5ad.sha256").is_file()
    path.write_bytes(b"cut off")
    well, said = go(wanted)
    assert not well and "is not the file that it was" in said and path.read_bytes() == b"cut off"


def test_a_dead_server_and_a_full_disk_tell_how_to_go_on_by_hand(project):
    dead = fetch.item_of("data/cells.h5ad", source("http://127.0.0.1:9/cells.h5ad"))
    drive = {"what": "Model", "drive": "ID", "files": ["a"], "gigabytes": 1e9, "by_hand": "Ask the authors."}
    huge = fetch.item_of("data/model", drive)
    for item, message in ((dead, "could not download"), (huge, "there is room for")):
        well, said = go([item])
        assert not well and message in said and "by hand: Ask the authors." in said
    assert not list(project.rglob("cells.h5ad"))


def test_drive_without_gdown_says_so(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    drive = {"what": "Model", "drive": "ID", "files": ["a", "b"], "gigabytes": 0, "by_hand": "By browser."}
    (project / "model").mkdir()
    (project / "model" / "a").write_bytes(b"")
    well, said = go([fetch.item_of("model", drive)])
    assert not well and "pip install gdown" in said and f"do): {project}/model/b\n" in said
    assert "https://drive.google.com/drive/folders/ID" in said


def test_the_profile_atlas_names_what_the_paper_used():
    sources = yaml.safe_load(fetch.SOURCES.read_text())
    wanted = {item.name: item for item in fetch.items(load_profile(ROOT / "profiles" / "atlas.yaml"), sources)}
    assert {"data/atlas.h5ad", "data/scGPT_human"} < set(wanted) and set(sources) <= set(wanted)
    assert all(item.get for item in wanted.values())
    for word in ("gene_summary", "gene_info", "reactome", "c5.go.bp"):
        assert any(word in name for name in wanted), word


def test_a_profile_of_packaged_data_needs_nothing(capsys):
    fetch.main(["--profile", str(ROOT / "profiles" / "mini.yaml")])
    assert "needs no files" in capsys.readouterr().out
