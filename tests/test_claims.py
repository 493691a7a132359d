"""Numbers in the prose: computed, found again in the executed notebook, and none of them typed."""

import json

import pytest

from scsae_utils import claims
from scsae_utils.book import ROOT, SECTIONS

SOURCE = '''
n, share = 7, 0.25
display(Markdown(f"""
There are {n} concepts, {share:.0%} of them (paper: 304) with F1 above the rest; see Figure 2f and `k=3`.
"""))
display(Markdown(f"And {'many' if n > 3 else 'few'} more."))
'''


def notebook(path, *cells, outputs=()):
    content = [
        {
            "cell_type": kind,
            "id": f"c{i}",
            "source": source,
            "metadata": {},
            "outputs": list(outputs) if kind == "code" else [],
        }
        for i, (kind, source) in enumerate(cells)
    ]
    path.write_text(json.dumps({"cells": content, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def markdown(text):
    return {"output_type": "display_data", "data": {"text/markdown": text, "text/plain": "x"}, "metadata": {}}


@pytest.mark.parametrize("name", SECTIONS)
def test_no_number_of_a_result_is_typed(name):
    assert claims.typed_numbers(ROOT / "notebooks" / f"{name}.ipynb") == []


def test_typed_numbers_are_found(tmp_path):
    path = notebook(
        tmp_path / "x.ipynb",
        ("code", SOURCE),
        ("code", 'display(Markdown(f"Of {n} concepts 12 are real."))'),
        ("code", 'display(Markdown("Accuracy is 0.91."))'),
        ("markdown", "Bins run from 1 to 50."),
        ("markdown", "## What was found\n\n- 6 types\n\n**Now you.** Set it to 0.9."),
    )
    found = claims.typed_numbers(path)
    assert [text.split(":")[0] for text in found] == ["c1", "c2", "c2", "c4"]
    assert "concepts 12 are real" in found[0] and "- 6 types" in found[3]


def test_claims_are_read_back_from_what_was_shown(tmp_path):
    shown = "\nThere are 7 concepts, 25% of them (paper: 304) with F1 above the rest; see Figure 2f and `k=3`.\n"
    path = notebook(tmp_path / "x.ipynb", ("code", SOURCE), outputs=[markdown(shown), markdown("And many more.")])
    one, other = claims.read_claims(path)
    assert one == {"chapter": "x", "cell": "c0", "text": shown.strip(), "values": [["n", "7"], ["share", "25%"]]}
    assert other["values"] == [["'many' if n > 3 else 'few'", "many"]]


def test_what_was_not_shown_is_no_claim(tmp_path):
    assert claims.read_claims(notebook(tmp_path / "x.ipynb", ("code", SOURCE), outputs=[markdown("Else.")])) == []


def test_claims_of_a_run_have_their_provenance(tmp_path):
    run = tmp_path / "mini"
    (run / "notebooks").mkdir(parents=True)
    for name in SECTIONS:
        notebook(run / "notebooks" / f"{name}.ipynb", ("code", SOURCE), outputs=[markdown("And few more.")])
    link = 'display(Markdown(f"{n} of them: see [](06_evidence.ipynb), [](../book/data.md) and [there](#what)."))'
    notebook(
        run / "notebooks/03_concept_taxonomy.ipynb",
        ("code", link),
        outputs=[markdown("8 of them: see [](06_evidence.ipynb), [](../book/data.md) and [there](#what).")],
    )
    (run / "sae.safetensors").write_bytes(b"abc")
    written = json.loads(claims.write_claims(run).read_text())
    assert [c["chapter"] for c in written["claims"]] == list(SECTIONS)
    about = written["provenance"]
    assert about["dictionary"].startswith("ba7816bf") and about["cells"] == ""  # SHA-256 of "abc"; no such file
    assert about["profile"]["sae"]["n_concepts"] > 0 and about["versions"]["torch"].startswith("2.")
    page = claims.claims_page(run / "claims.json")
    links = "[](../notebooks/06_evidence.ipynb), [](../book/data.md)"
    assert f"> 8 of them: see {links} and [there](../notebooks/03_concept_taxonomy.ipynb#what)." in page
    assert page.count("> And few more.") == len(SECTIONS) - 1 and "``'many' if n > 3 else 'few'`` = few" in page


def test_values_on_the_page_are_without_markup():
    assert claims.plain("[a](b) <b>`x`</b>|$y$") == "a(b) bx/by"
    assert len(claims.plain("x" * 500)) == 80
