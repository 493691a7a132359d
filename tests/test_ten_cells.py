"""The chapter by hand: what is computed with a pencil equals what the package computes, and so do the solutions."""

import contextlib
import io
import json
import re

import pytest

from scsae_utils.book import ROOT

CELLS = json.loads((ROOT / "notebooks/00_ten_cells.ipynb").read_text())["cells"]


@pytest.fixture(scope="module")
def result():
    """The names that are left after all cells have run, and the shown sentences."""
    names, shown = {}, []
    for cell in CELLS:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()):
                exec("".join(cell["source"]), names)  # the repository's own notebook
            names["display"] = lambda what: shown.append(getattr(what, "data", ""))
    return names, "\n".join(shown)


def test_by_hand_equals_the_package(result):
    names, shown = result
    assert names["vector"] == pytest.approx(names["adata"].obsm["X_scGPT"][0], abs=1e-6)
    table = names["table"]
    for concept in (0, 1):
        assert table[f"concept {concept}, by hand"].tolist() == table[f"concept {concept}"].tolist()
    one, other = re.search(r"by hand: (\S+); `attribute`: (\S+)\.", shown).groups()
    assert one == other and 0 < float(one) < 1


def test_the_points_of_the_chapter_hold(result):
    """E differs and is not used; C and D stand in for each other."""
    names, _ = result
    assert abs(names["means"]["E"]) < 1e-6 and names["difference"]["E"] > 30
    assert names["means"][["A", "B"]].min() > 0.3
    assert max(names["both"]["C"], names["both"]["D"]) < 0.5 < names["alone"]["C"]


def test_solutions_are_folded_and_say_something(result):
    _, shown = result
    folded = [c for c in CELLS if "hide-cell" in c["metadata"].get("tags", [])]
    exercises = [
        c for c in CELLS if c["cell_type"] == "markdown" and re.search(r"^\*\*\d\.\*\*", "".join(c["source"]), re.M)
    ]
    assert len(folded) == len(exercises) == shown.count("**Solution.**") == 3
    assert "Nothing: only the order" in shown
