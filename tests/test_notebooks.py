"""The notebooks: thin, parameterised, without outputs; every profile names their parameters and no others."""

import ast
import json
import re

import pytest
import yaml

from scsae_utils import book
from scsae_utils.book import ROOT, SECTIONS

NOTEBOOKS = [ROOT / "notebooks" / f"{name}.ipynb" for name in SECTIONS]


def code_cells(path):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_thin_and_clean(path):
    content = json.loads(path.read_text())
    assert content["metadata"]["language_info"]["name"] == "python"
    assert not any(c.get("outputs") or c.get("execution_count") for c in content["cells"]), "outputs are kept in git"
    for source in code_cells(path):
        assert sum(bool(line.strip()) for line in source.splitlines()) <= 30
        defined = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert not defined, f"{path.stem} defines {defined[0].name}: code belongs in a module"


def cells(path):
    """Kind, tags and source of each cell."""
    found = json.loads(path.read_text())["cells"]
    return [(c["cell_type"], c["metadata"].get("tags", []), "".join(c["source"])) for c in found]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter_teaches(path):
    """Goals, what to know before, time; terms of the glossary; exercises with solutions; takeaways; what to try."""
    first, *rest = cells(path)
    for part in ("# ", "**You will learn**\n- ", "**You need** ", "**Time**: ", book.RAN):
        assert part in first[2]
    prose = "\n".join(source for kind, _, source in cells(path) if kind == "markdown")
    assert prose.count("{term}`") >= 4 and "```{margin}" in prose

    numbers = []
    for (kind, _, source), (next_kind, tags, solution) in zip(rest, rest[1:]):
        if kind == "markdown" and (number := re.search(r"^\*\*(\d)\.\*\*", source, re.M)):
            numbers.append(int(number[1]))
            assert next_kind == "code" and "hide-cell" in tags and "**Solution.**" in solution
    assert len(numbers) >= 2 and numbers == list(range(1, len(numbers) + 1))

    sources = [source for _, _, source in rest]
    assert "](#" in next(s for s in sources[::-1] if re.search(r"^- ", s, re.M)), "takeaways lead to their sections"
    assert re.search(r"^\*\*Now you\.\*\* [^$]*[Ee]xpect", sources[-1], re.M)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_has_a_caption(path):
    """Just before it or just after it; and a function with a docstring that can be its alternative text."""
    around = cells(path)
    for i, (kind, _, source) in enumerate(around):
        drawn = re.findall(r"^\s*plots\.(?!set_style)\w+\(", source, re.M) if kind == "code" else []
        if drawn:
            assert len(drawn) == 1, "two figures in a cell would share their alternative text"
            assert any("**Figure" in text for _, _, text in around[max(i - 2, 0) : i + 3]), source
            assert len(book.alternative_text(source)) > 30


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_installs_the_project_where_it_is_not(path, monkeypatch, tmp_path):
    """On Colab there is nothing but the notebook; where the project is installed, the cell does nothing."""
    kind, tags, source = cells(path)[1]
    assert kind == "code" and tags == ["remove-cell"]
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command))
    monkeypatch.setattr("os.chdir", lambda folder: commands.append(f"cd {folder}"))
    exec(source, {})
    assert not commands
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(source, {})
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    clone, folder, install, *before = commands
    assert clone == f"git clone --quiet --depth 1 {address}"
    assert folder == f"cd {address.split('/')[-1]}" and install == "pip install --quiet --editable ."
    section = SECTIONS[path.stem]
    reads = section not in ("ten_cells", "embedding", "myeloid_concepts")  # these begin from cells
    assert before == [f"snakemake --quiet --cores 2 --omit-from {section} -- {section}"] * reads


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_defaults_are_the_mini_profile(path):
    profile = yaml.safe_load((ROOT / "profiles/mini.yaml").read_text())[SECTIONS[path.stem]]
    defaults = {name: ast.literal_eval(value) for name, value in book.parameters(path).items()}
    assert defaults.pop("run") == "runs/mini"
    assert defaults == profile


@pytest.mark.parametrize("path", [*ROOT.glob("profiles/*.yaml"), ROOT / "tests/tiny.yaml"], ids=lambda p: p.stem)
def test_every_profile_names_every_parameter(path):
    assert set(book.load_profile(path)) == set(SECTIONS.values())


def test_the_page_for_own_cells_names_all_that_depends_on_the_cells(tmp_path):
    """Its lines, put into a copy of the profile, are a profile; they set every name of a cell type or a column."""
    text = (ROOT / "book" / "own_cells.md").read_text().split("## Another model")[0]
    profile = yaml.safe_load((ROOT / "profiles/mini.yaml").read_text())
    changed = {}
    for block in re.findall(r"```yaml\n(.*?)```", text, re.S):
        for section, values in yaml.safe_load(block).items():
            changed.setdefault(section, {}).update(values)
            profile[section].update(values)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
    book.load_profile(tmp_path / "mine.yaml")
    for section, values in profile.items():
        assert {"cell_type", "types", "level", "label", "study"} & set(values) <= set(changed.get(section, {})), section


def test_files_that_a_profile_names_and_that_are_not_there():
    profile = {
        "embedding": {"cells": "data/none.h5ad", "model": "scgpt-mini"},
        "evidence": {"gene_sets": "http://127.0.0.1:9/sets.gmt"},
        "atlas": {"descriptions": "book/data.md", "collection": "go"},
        "myeloid_concepts": {"cells": None, "model": "data/none"},
    }
    assert book.missing_files(profile) == ["data/none.h5ad", "data/none"]


def test_profile_errors_name_what_is_wrong(tmp_path):
    profile = yaml.safe_load((ROOT / "profiles/mini.yaml").read_text())
    del profile["sae"]["epochs"]
    profile["sae"]["epoch"] = 3
    profile["extra"] = {}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(ValueError) as error:
        book.load_profile(tmp_path / "p.yaml")
    for part in ("unknown section 'extra'", "unknown parameter 'epoch'", "parameter 'epochs' is missing"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"mini\.yaml"):
        book.load_profile(tmp_path / "missing.yaml")


def test_a_notebook_depends_on_the_modules_it_imports_and_on_no_others():
    embedding = book.modules("01_embedding")
    assert {"scsae_utils/cells.py", "scsae_utils/scgpt.py", "scsae_utils/plots/cells.py"} <= set(embedding)
    assert not {"scsae_utils/sae.py", "scsae_utils/attribution.py", "scsae_utils/words.py"} & set(embedding)
    assert "scsae_utils/words.py" in book.modules("04_case_study")
    assert "scsae_utils/words.py" not in book.modules("05_myeloid_concepts")


def notebook(tmp_path, source, tags=("parameters",)):
    cells = [("x = 1", list(tags)), (source, [])]
    content = {
        "cells": [
            {
                "cell_type": "code",
                "id": f"c{i}",
                "metadata": {"tags": t},
                "source": s,
                "outputs": [],
                "execution_count": None,
            }
            for i, (s, t) in enumerate(cells)
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tmp_path / "in.ipynb").write_text(json.dumps(content))
    return tmp_path / "in.ipynb"


def test_a_notebook_that_fails_is_never_an_output(tmp_path):
    source = notebook(tmp_path, "raise RuntimeError(f'no good: {x}')")
    with pytest.raises(SystemExit, match="RuntimeError: no good: 7"):
        book.execute(source, tmp_path / "out.ipynb", {"x": 7})
    assert not (tmp_path / "out.ipynb").exists()
    assert (tmp_path / "out.failed.ipynb").exists()
    with pytest.raises(SystemExit, match="not published"):
        book.check_executed(tmp_path / "out.failed.ipynb")


def test_a_notebook_that_was_not_executed_is_not_published(tmp_path):
    with pytest.raises(SystemExit, match="not executed"):
        book.check_executed(notebook(tmp_path, "pass"))


def test_parameters_that_papermill_would_ignore_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no parameter y; it has: x"):
        book.execute(notebook(tmp_path, "pass"), tmp_path / "out.ipynb", {"y": 1})
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        book.execute(notebook(tmp_path, "pass", tags=()), tmp_path / "out.ipynb", {"x": 1})


def test_results_of_benchmarks_are_filled_into_pages():
    text = book.fill_tables("Before.\n<!-- benchmark: embedding_memory -->\nAfter `<!-- benchmark: x -->`.")
    result = json.loads((ROOT / "benchmarks/results/embedding_memory.json").read_text())
    lines = text.splitlines()
    assert lines[0] == "Before." and lines[-1] == "After `<!-- benchmark: x -->`."
    assert lines[1] == "| cells | memory (MiB) |"
    assert [f"| {r['cells']:,} | {r['memory (MiB)']} |" for r in result["rows"]] == lines[3:6]
    assert f"`memory_ratio` {result['figures']['memory_ratio']}" in text and result["date"] in text
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        book.fill_tables("<!-- benchmark: nothing -->")
