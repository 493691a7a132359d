"""The page "What can go wrong": its messages are those of the code."""

import re

import pytest

from scsae_utils import problems
from scsae_utils.book import ROOT
from scsae_utils.cells import load_cells


def test_a_message_is_that_of_the_error(tmp_path):
    shown = problems.message("cells", "no file of cells")
    with pytest.raises(FileNotFoundError) as error:
        load_cells(tmp_path / "none.h5ad", label="x")
    assert re.fullmatch(".*".join(map(re.escape, shown.split("…"))), str(error.value))


def test_a_part_that_no_or_several_messages_have_is_an_error():
    for part in ("nothing of the kind", "…"):
        with pytest.raises(ValueError, match=r"errors of cells\.py contain"):
            problems.message("cells", part)
    with pytest.raises(ValueError, match="no module 'nonsense'"):
        problems.messages("nonsense")


def test_messages_are_text_also_where_parts_are_computed(tmp_path, monkeypatch):
    (tmp_path / "made.py").write_text(
        'raise ValueError(f"{n} cells | " + "of " + ", ".join(x))\nraise KeyError\nraise ValueError(x)\nraise\n'
    )
    monkeypatch.setattr(problems, "PACKAGE", tmp_path)
    assert problems.messages("made") == ["… cells | of …"]
    text = problems.fill_messages("| <!-- error: made: cells --> |\n<!-- errors -->")
    assert text == "| `` … cells \\| of … `` |\n**made**\n\n- `` … cells \\| of … ``\n"


def test_the_page_has_only_messages_that_there_are():
    page = (ROOT / "book" / "problems.md").read_text()
    filled = problems.fill_messages(page)  # raises if a message is gone
    assert page.count("<!-- error: ") > 30 and "<!-- error" not in filled
    for line in filled.splitlines():  # each has its advice
        assert not line.startswith("| ``") or len(re.split(r"(?<!\\)\|", line)[2].strip()) > 15
