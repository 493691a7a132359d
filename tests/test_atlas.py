"""The data of the atlas: what is in each piece, and that pieces are scripts that hold data and nothing else."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from small_atlas import GENES, HOSTILE, small_concepts, small_tables

from scsae_utils import atlas
from scsae_utils.atlas import Tables, index_data, mentions, search_data, write_atlas
from scsae_utils.atlas_pages import ROLES, cell_details, concept_details, curve_data, gene_details, nearest


def write(tables, folder, **options):
    return write_atlas(tables, folder, xy=np.random.default_rng(0).random((len(tables.numbers), 2)), **options)


def read_piece(path):
    """The value of a piece; the script must be one call with one JSON value."""
    found = re.fullmatch(r'scsaeAtlas\.data\("([\w-]+)",(.*)\);\n', path.read_text(), re.S)
    assert found[1] == path.stem
    return json.loads(found[2])


@pytest.fixture(scope="module")
def tables():
    return small_tables()


@pytest.fixture(scope="module")
def index(tables):
    xy = np.arange(2.0 * len(tables.numbers)).reshape(-1, 2)
    return index_data(tables, xy, np.arange(12), "mini")


@pytest.fixture(scope="module")
def pages(tables):
    cells, best = atlas.shown_cells(tables.concepts, 12, 3)
    return concept_details(tables, cells, best)


def test_dropped_concepts_are_not_shown(index):
    assert index["concepts"]["number"][:5] == [0, 2, 4, 6, 10]
    assert len({len(column) for column in index["concepts"].values()}) == 1


def test_the_index_has_the_concepts_metrics(index, tables):
    c = index["concepts"]
    assert c["cells"][:3] == [4, 2, 4] and c["frequency"][:2] == [0.333, 0.167]
    assert [index["mains"][m] for m in c["main"][:3]] == ["B cell", "B cell", "T cell"]
    assert (c["specificity"][1], c["sensitivity"][1]) == (1.0, 0.5)
    assert index["grades"][c["grade"][1]][0] == "B" and index["tables"][-1] == "adata"
    kinds = [index["kinds"][k][0] for k in c["kind"]]
    assert kinds[:4] == ["whole-cell-type", "sub-cell-type", "whole-cell-type", "cross-cell-type: program"]


def test_a_number_is_no_name(index):
    assert index["concepts"]["name"][:4] == ["B cell: immunoglobulin", "", "", HOSTILE]


def test_roles_of_genes(tables):
    roles = tables.effects.query("concept == 0").set_index("gene")["role"]
    assert {gene: ROLES[roles[gene]] for gene in GENES} == {
        "CD79A": "driver",
        "LYZ": "inhibitor",
        "GNLY": "passenger",
        "S100A9": "no effect",  # within twice its error
        HOSTILE: "driver",
    }


def test_the_strongest_genes_come_first(index):
    top = [index["genes"][g] for g in index["concepts"]["top"][0]]
    assert top == ["CD79A", "LYZ", HOSTILE] and index["concepts"]["drivers"][0] == 3
    assert index["concepts"]["top"][1] == []


def test_search_knows_genes_words_sets_and_types(tables):
    found = {kind: dict(zip(*pairs)) for kind, pairs in search_data(tables).items()}
    assert found["gene"]["LYZ"] == [2, 0]  # of concept 4 more than of concept 0
    assert "GNLY" not in found["gene"] and "S100A9" not in found["gene"]
    assert found["word"] == {"antigen": [0]}  # the other is in one gene, without a q-value
    assert found["set"] == {"enriched in B cells (M47)": [0]}
    assert found["type"]["B cell"][:2] == [0, 1] and 2 not in found["type"]["B cell"]
    assert set(found["type"]) == {"B cell", "T cell", "Monocyte", "B", "T", "Myeloid"}


def test_a_concepts_page(pages, index):
    page = pages[0]
    assert page["active"] == [[0, 1, 2, 3], [255, 192, 128, 64]]
    assert [[index["types"][t][0], n, of] for t, n, of in page["types"]] == [["B cell", 4, 4]]
    assert page["best"] == [[0, 4.0], [1, 3.0], [2, 2.0]]
    genes = [index["genes"].index(gene) for gene in ("CD79A", "S100A9", "LYZ", HOSTILE, "GNLY")]
    assert page["drivers"][0] == [genes[0], 0.4, 0.05, 0.001, 1, "necessary", True]
    assert [row[0] for row in page["drivers"]] == genes and page["n_tested"] == 5
    assert page["scatter"][1:] == [[3.0, 1.0, 0.1, -4.0], [0.4, 0.3, -0.2, 0.005], [1, 0, 2, 3]]
    assert page["words"] == [["antigen", 2, 0.01, "CD79A,LYZ"], [HOSTILE, 1, None, "CD79A,LYZ"]]
    assert page["auroc"] == [0.9, 0.8, 0.95, None]
    assert page["evidence"][0] == ["stable", "failed", "0.25, null 0.1; 1 of 4"]
    assert page["evidence"][2][:2] == ["not technical", "passed"]
    assert "drivers" not in pages[1] and "words" not in pages[1]


def test_neighbours_fire_together_or_have_similar_vectors(pages):
    copies = pages[5]["together"]
    assert [cosine for _, cosine in copies] == [1.0] * 5 and all(i > 5 for i, _ in copies)
    assert nearest(np.array([[1.0, 0], [1, 1], [0, -1]])) == [[[1, 0.707]], [[0, 0.707]], []]


def test_curves_are_means_and_random_orders_a_band(pages):
    one, random = pages[0]["curves"]
    assert one == {"order": "attribution", "n": [0, 1, 4], "left": [1.0, 0.1, 0.0]}
    assert (random["left"], random["low"], random["high"]) == ([1.0, 0.7, 0.0], [1.0, 0.6, 0.0], [1.0, 0.8, 0.0])
    two_cells = pd.DataFrame({"order": "a", "n": [0, 0, 2, 3], "deletion": [1.0, 1.0, 0.5, 0.1]})
    assert curve_data(two_cells) == [{"order": "a", "n": [0, 2, 3], "left": [1.0, 0.5, 0.1]}]


def test_a_genes_page(tables, index):
    page = gene_details(tables)[index["genes"].index("LYZ")]
    assert page["name"] == "lysozyme" and page["tested"] == 2
    assert page["concepts"] == [[2, 0.5, 0.1, None, 1], [0, -0.2, 0.05, 0.02, 2]]
    assert [v for _, v in page["types"]] == [2.0, 2.0, 2.0]  # LYZ is the third gene: 2 in every cell


def test_a_cells_page_has_the_nearest_cell_without_the_concept(tables, index):
    first, second, *_, last = cell_details(tables, np.arange(12))
    assert first["labels"] == ["B cell", "B cell", "B"] and first["study"] == "one"
    genes = [index["genes"].index(gene) for gene in ("CD79A", "LYZ")]
    concept_0 = next(row for row in first["concepts"] if row[0] == 0)
    assert concept_0 == [0, 4.0, 1.0, [[genes[0], 0.5], [genes[1], -0.1]], [4, "cell 4", "T cell"]]
    assert first["concepts"][-1] == [3, 1.0, 0.5]  # the least of its highest, and not attributed
    assert [row[0] for row in last["concepts"]] == [3]


def test_a_sample_of_cells_has_the_best_of_every_concept():
    concepts = small_concepts()
    cells, best = atlas.shown_cells(concepts, 8, 1)
    assert len(cells) == 8 and list(cells) == sorted(cells)
    assert [b[0] for b in best[:3]] == [0, 0, 7] and {0, 7, 11} <= set(cells)
    assert list(atlas.shown_cells(concepts, 8, 1, seed=0)[0]) == list(cells)


def test_pieces_are_scripts_that_hold_data_alone(tables, tmp_path):
    folder = tmp_path / "atlas"
    folder.mkdir()
    (folder / "old.js").write_text("old")
    sizes = write(tables, folder, n_cells=12)
    assert set(sizes) == {f"{n}.js" for n in ("index", "search", "cells", "concepts-0", "genes-0", "cells-0")}
    for path in folder.iterdir():
        read_piece(path)
        assert sizes[path.name] == path.stat().st_size
    assert read_piece(folder / "cells.js")["names"][:2] == [HOSTILE, "cell 1"]
    assert not list(tmp_path.glob(".*"))


def test_pieces_are_cut_in_parts(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "PART", 4)
    write(tables, tmp_path / "atlas", n_cells=12)
    parts = [read_piece(tmp_path / "atlas" / f"concepts-{i}.js") for i in range(4)]
    assert [len(part) for part in parts] == [4, 4, 4, 3]
    assert read_piece(tmp_path / "atlas" / "index.js")["part"] == 4


def test_concepts_alone_are_enough(tmp_path):
    write(Tables(small_concepts()), tmp_path / "atlas")
    index = read_piece(tmp_path / "atlas" / "index.js")
    assert index["tables"] == [] and index["genes"] == [] and index["grades"] == []
    assert not (tmp_path / "atlas" / "genes-0.js").exists()
    page = read_piece(tmp_path / "atlas" / "concepts-0.js")[0]
    assert set(page) == {"max", "active", "types", "together", "similar", "best"}


def test_tables_that_do_not_fit_are_errors():
    concepts = small_concepts()
    with pytest.raises(ValueError, match="the table drivers lacks the column error; it has concept, gene"):
        Tables(concepts, drivers=pd.DataFrame(columns=["concept", "gene", "attribution"]))
    with pytest.raises(ValueError, match="of other cells"):
        Tables(concepts, adata=small_tables().adata[:5])
    concepts.var["kept"] = False
    with pytest.raises(ValueError, match="no concept survives"):
        Tables(concepts)


def test_chapters_that_speak_of_a_concept(tmp_path):
    def chapter(name, text, **parameters):
        output = {"output_type": "display_data", "data": {"text/markdown": text}}
        cells = [{"cell_type": "markdown", "source": f"# Title of {name}\n"}]
        cells.append({"cell_type": "code", "source": "", "outputs": [output]})
        notebook = {"cells": cells, "metadata": {"papermill": {"parameters": parameters}}}
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(notebook))

    chapter("04_case_study", "Concept 17 and concept 3; concept 17 again; concepts 5.")
    chapter("05_myeloid_concepts", "concept 17", cells="celltypist")
    chapter("07_atlas", "concept 17")
    (tmp_path / "concepts").mkdir()
    (tmp_path / "concepts" / "concept_3.ipynb").write_text("{}")
    case = ["04_case_study", "Title of 04_case_study"]
    assert mentions(tmp_path) == {17: [case], 3: [case, ["concepts/concept_3", "Its full page"]]}
    chapter("05_myeloid_concepts", "concept 17", cells=None)
    assert [page for page, _ in mentions(tmp_path)[17]] == ["04_case_study", "05_myeloid_concepts"]
