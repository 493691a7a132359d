"""From notebooks to book: execute with papermill, refuse failures, render with Jupyter Book.

The Snakefile calls this module; by hand: ``python -m scsae_utils.book --help``.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RAN = "<!-- time to run -->"  # where a notebook says how long it ran
NAMED = ("cells", "model", "descriptions", "collection", "gene_sets")  # parameters that can name files
SECTIONS = {  # notebook: section of the profile
    "00_ten_cells": "ten_cells",
    "01_embedding": "embedding",
    "02_sae": "sae",
    "03_concept_taxonomy": "concept_taxonomy",
    "04_case_study": "case_study",
    "05_myeloid_concepts": "myeloid_concepts",
    "05b_drivers": "drivers",
    "06_evidence": "evidence",
    "07_atlas": "atlas",
}


def parameters(notebook: Path, tag: str = "parameters") -> dict[str, str]:
    """Names of the parameters of a notebook, with the source of their values.

    Raises
    ------
    ValueError
        If the notebook has no cell tagged ``parameters``: papermill would only warn, and use the notebook's values.
    """
    cells = json.loads(notebook.read_text())["cells"]
    tagged = [c for c in cells if tag in c.get("metadata", {}).get("tags", [])]
    if not tagged:
        raise ValueError(f"{notebook} has no cell tagged {tag!r}")
    tree = ast.parse("".join(tagged[0]["source"]))
    return {t.id: ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign) for t in node.targets}


def load_profile(path: str | Path) -> dict[str, dict]:
    """Read a profile and check that it names every parameter of every notebook, and nothing else.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; sections or parameters that are unknown or missing, each named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no profile {str(path)!r}; there are: {', '.join(map(str, sorted(ROOT.glob('profiles/*.yaml'))))}"
        )
    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"the profile {path} is not YAML: {error}") from error
    if not isinstance(profile, dict) or not all(isinstance(s, dict | None) for s in profile.values()):
        raise ValueError(f"the profile {path} does not consist of sections (name:) with parameters (name: value)")
    problems = [
        f"unknown section {s!r} (sections: {', '.join(SECTIONS.values())})"
        for s in profile
        if s not in SECTIONS.values()
    ]
    for notebook, section in SECTIONS.items():
        wanted = set(parameters(ROOT / "notebooks" / f"{notebook}.ipynb")) - {"run"}
        given = set(profile.get(section) or {})
        problems += [
            f"{section}: unknown parameter {p!r} ({notebook} has: {', '.join(sorted(wanted))})"
            for p in sorted(given - wanted, key=str)
        ]
        problems += [f"{section}: parameter {p!r} is missing" for p in sorted(wanted - given)]
        problems += [  # YAML takes a number such as 1e-6, without a point, for text
            f"{section}: {p} is the text {v!r}; write the number with a point ({float(v):f} or 1.0e-6)"
            for p, v in (profile.get(section) or {}).items()
            if isinstance(v, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", v)
        ]
    if problems:
        raise ValueError(f"the profile {path} does not fit the notebooks:\n  " + "\n  ".join(problems))
    return profile


def missing_files(profile: dict[str, dict]) -> list[str]:
    """The paths in a profile at which there is nothing. (URLs and short names are none.)"""
    named = dict.fromkeys(section.get(name) for section in profile.values() for name in NAMED)
    paths = [v for v in named if isinstance(v, str) and "://" not in v and ("/" in v or Path(v).suffix)]
    return [path for path in paths if not (ROOT / path).exists()]


def modules(name: str) -> list[str]:
    """Paths of the modules of this package that a notebook (or module) imports, directly or not: what it depends on."""
    found: set[Path] = set()
    package = Path(__file__).parent

    def visit(source: str) -> None:
        source = re.sub(r"^if TYPE_CHECKING:.*\n(?:[ ]+.*\n)+", "", source, flags=re.M)
        names = re.findall(r"^\s*from (?:scsae_utils)?\.{0,2}(\w*) import (.+)", source, re.M)
        names = [m or w for m, what in names for w in ([m] if m else re.findall(r"\w+", what))]
        for module in names:
            for path in [package / f"{module}.py", *sorted((package / module).glob("*.py"))]:
                if path not in found and path.is_file():
                    found.add(path)
                    visit(path.read_text())

    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    visit("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))
    return [f"scsae_utils/{path.relative_to(package)}" for path in sorted(found)]


def execute(notebook: Path, output: Path, values: dict) -> None:
    """Run a notebook with papermill; ``output`` appears only if every cell ran.

    Raises
    ------
    SystemExit
        With the failing cell's error; the notebook as far as it came lies beside ``output`` as ``*.failed.ipynb``.
    ValueError
        If a value is given for a parameter that the notebook does not have.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from .provenance import made_with

    unknown = set(values) - set(parameters(notebook))
    if unknown:
        raise ValueError(
            f"{notebook.name} has no parameter {', '.join(sorted(unknown))}; it has: {', '.join(parameters(notebook))}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    os.environ.pop("MPLBACKEND", None)  # another backend than the notebook's would swallow the figures
    sys.stderr.write(f"executing {notebook.name}\n")
    try:
        papermill.execute_notebook(
            notebook, failed, values, cwd=ROOT, progress_bar=sys.stderr.isatty(), log_output=False
        )
    except PapermillExecutionError as error:
        sys.exit(
            f"\n{notebook.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}\n"
            f"The notebook as far as it came: {failed}"
        )
    check_executed(failed)
    content = json.loads(failed.read_text())
    content["metadata"]["provenance"] = made_with(values)
    failed.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    failed.replace(output)


def check_executed(notebook: Path) -> None:
    """Refuse a notebook in which a cell failed or that was never executed: Jupyter Book would publish it."""
    content = json.loads(notebook.read_text())
    run = content["metadata"].get("papermill", {})
    errors = [o for c in content["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    tagged = any("papermill-error-cell-tag" in c["metadata"].get("tags", []) for c in content["cells"])
    if run.get("exception") or errors or tagged:
        sys.exit(f"{notebook} holds a failed cell ({errors[0]['ename'] if errors else 'exception'}): not published")
    if not run.get("end_time"):
        sys.exit(f"{notebook} was not executed by papermill: not published")


def alternative_text(source: str) -> str:
    """What the figures of a code cell show, for who cannot see them: the first lines of their functions' docstrings."""
    from . import plots

    texts = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        if ast.unparse(call.func).startswith("plots."):
            text = inspect.getdoc(getattr(plots, call.func.attr)).split("\n\n")[0].replace("\n", " ")
            words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            text = re.sub(r" \(Figs?\. [^)]*\)", "", text).rstrip(".")
            texts.append(f"{': '.join([text, *words])}.")
    return " ".join(texts)


def page(notebook: Path, title: str | None = None) -> dict:
    """A notebook as a page; ``title`` replaces the first heading, and is of a page one folder below the chapters.

    The cell that papermill injected is folded, or left out if it says nothing new. Figures get their alternative text,
    and the first cell says how long the notebook ran.
    """
    content = json.loads(notebook.read_text())
    seconds = content["metadata"]["papermill"].get("duration") or 0
    ran = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    for cell in content["cells"]:
        cell["source"] = "".join(cell["source"]).replace(RAN, f"; {ran} to run where these pages were made")
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            cell["metadata"]["mystnb"] = {"image": {"alt": alternative_text(cell["source"])}}
        if "hide-cell" in cell["metadata"].get("tags", []):
            cell["metadata"]["mystnb"] = {
                f"code_prompt_{act}": f"{act.capitalize()} the solution" for act in ("show", "hide")
            }
    new = set(parameters(notebook, "injected-parameters").items()) - set(parameters(notebook).items())
    for cell in content["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].append("hide-input" if new else "remove-cell")
    if title:
        first = next(c for c in content["cells"] if c["cell_type"] == "markdown")
        first["source"] = re.sub(r"^# .*", f"# {title}", "".join(first["source"]), count=1)
        for part, name in texts(content):
            part[name] = re.sub(r"\]\((?!\w+:|[#/])", "](../", "".join(part[name]))
    return content


def texts(content: dict) -> Iterator[tuple[dict, str]]:
    """Where a notebook has Markdown: its cells and outputs, each with the key of the text."""
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            yield cell, "source"
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                yield output["data"], "text/markdown"


def benchmark_table(path: Path) -> str:
    """The result of a benchmark (``benchmarks/results/NAME.json``) as Markdown: a table, its ratios, the machine."""
    result = json.loads(path.read_text())

    def shown(value) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name}: {shown(each)}" for name, each in value.items()) or "none"
        if isinstance(value, list):
            return ", ".join(map(shown, value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(shown(row.get(c, '')) for c in columns)} |" for row in result["rows"]]
    figures = ", ".join(f"`{name}` {shown(value)}" for name, value in result["figures"].items())
    about = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = f"{about.get('gpu', about['processor'])}, {about['threads']} of {about['cores']} cores"
    return "\n".join(
        [*lines, "", f"{figures}.", "", f"*{result['date']}; {machine}; Python {about['python']}, {versions}.*"]
    )


def fill_tables(text: str) -> str:
    """Put the results of benchmarks where a page says ``<!-- benchmark: NAME -->``."""
    return re.sub(
        r"^<!-- benchmark: (\w+) -->$",
        lambda found: benchmark_table(ROOT / "benchmarks" / "results" / f"{found[1]}.json"),
        text,
        flags=re.M,
    )


def without_refused(html: str) -> str:
    """A page without what a browser refuses to one that is opened from a folder.

    These are fonts (the theme draws its icons as SVG all the same), and the constants of a service on the network that
    the book does not use, which the builder defines twice.
    """
    return re.sub(r'<link rel="preload" as="font"[^>]*>\s*|<script>const THEBE_JS_URL.*?</script>\s*', "", html)


def build(run: Path) -> Path:
    """Render the book from the executed notebooks of a run; returns the folder with its ``index.html``.

    The pages are laid out as in the repository, so that launch and edit buttons lead to the notebooks there. The build
    starts from nothing each time, since an incremental one forgets earlier warnings; warnings are errors. The last
    good book stays until the new one is whole.
    """
    from .atlas import write_mentions
    from .claims import claims_page, write_claims
    from .problems import fill_messages
    from .provenance import provenance_page, write_provenance

    run = run.resolve()  # Jupyter Book reads a relative path of the contents as one inside the source
    chapters = [run / "notebooks" / f"{name}.ipynb" for name in SECTIONS]
    concepts = sorted((run / "notebooks" / "concepts").glob("concept_*.ipynb"), key=lambda p: int(p.stem.split("_")[1]))
    concepts = [path for path in concepts if not path.stem.endswith(".failed")]
    for notebook in [*chapters, *concepts]:
        if not notebook.is_file():
            sys.exit(f"{notebook} is missing: run `make book`")
        check_executed(notebook)
    with tempfile.TemporaryDirectory(dir=run, prefix=".book-") as folder:
        stage, out = Path(folder) / "source", Path(folder) / "out"
        shutil.copytree(ROOT / "book", stage / "book")
        shutil.copy(ROOT / "scsae_utils" / "data" / "scgpt-mini" / "MODEL_CARD.md", stage / "book" / "model_card.md")
        data = stage / "book" / "_extra" / "atlas" / "data"
        shutil.copytree(run / "atlas", data)
        write_mentions(run / "notebooks", data)
        (stage / "book" / "provenance.md").write_text(provenance_page(write_provenance(run, chapters)))
        (stage / "book" / "claims.md").write_text(claims_page(write_claims(run)))
        for path in (stage / "book").glob("*.md"):
            path.write_text(fill_messages(fill_tables(path.read_text())))
        toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
        (stage / "notebooks" / "concepts").mkdir(parents=True)
        for notebook in chapters:
            (stage / "notebooks" / notebook.name).write_text(json.dumps(page(notebook)))
        for notebook in concepts:
            title = f"Concept {notebook.stem.split('_')[1]}"
            (stage / "notebooks" / "concepts" / notebook.name).write_text(json.dumps(page(notebook, title)))
        if concepts:
            toc["parts"].insert(
                -1,
                {"caption": "Concept pages", "chapters": [{"file": f"notebooks/concepts/{p.stem}"} for p in concepts]},
            )
        (stage / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
        command = [
            str(Path(sys.executable).with_name("jupyter-book")),
            "build",
            str(stage),
            "--toc",
            str(stage / "_toc.yml"),
        ]
        command += ["--config", str(ROOT / "_config.yml"), "--path-output", str(out), "-W", "--keep-going", "--quiet"]
        result = subprocess.run(command, capture_output=True, text=True)
        html = out / "_build" / "html"
        if result.returncode or not (html / "index.html").is_file():
            found = [line for line in result.stderr.splitlines() if re.search(r"WARNING|ERROR|rror:", line)]
            sys.exit("\n".join(found or [result.stderr]) + "\nThe book was not rendered: warnings are errors.")
        for path in html.rglob("*.html"):
            path.write_text(without_refused(path.read_text()))
        target, old = run / "book", Path(folder) / "old"
        if target.exists():
            target.rename(old)
        html.rename(target)
    return target


def resolve_concept(run: Path, concept: int | None, gene: str | None, cell_type: str | None) -> int:
    """The number of the concept that is asked for by number, gene or cell type; checked against the run."""
    from .runs import find_concept, load_run

    needs_model = concept is None and gene is not None
    opened = load_run(run, device=None if needs_model else "cpu")  # a login machine of a cluster may have no GPU
    return find_concept(opened, concept=concept, gene=gene, cell_type=cell_type)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scsae_utils.book", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_help = "folder of the run, such as runs/mini"

    p = commands.add_parser("execute", help="execute one notebook with the parameters of a profile")
    p.add_argument("notebook", choices=SECTIONS)
    p.add_argument("--profile", type=Path, required=True)
    p.add_argument("--run", type=Path, required=True, help=run_help)
    p.add_argument("--concept", type=int, help="for 04_case_study: make the page of this concept")

    p = commands.add_parser("build", help="render the book from executed notebooks")
    p.add_argument("--run", type=Path, required=True, help=run_help)

    p = commands.add_parser("concept", help="print the number of the concept for a number, a gene or a cell type")
    p.add_argument("--run", type=Path, required=True, help=run_help)
    p.add_argument("--concept")
    p.add_argument("--gene")
    p.add_argument("--cell-type")

    args = parser.parse_args(arguments)
    try:
        if args.command == "execute":
            values = {"run": str(args.run), **load_profile(args.profile)[SECTIONS[args.notebook]]}
            output = args.run / "notebooks" / f"{args.notebook}.ipynb"
            if args.concept is not None:
                values |= {"concept": args.concept, "gene": None, "cell_type": None}
                output = args.run / "notebooks" / "concepts" / f"concept_{args.concept}.ipynb"
            execute(ROOT / "notebooks" / f"{args.notebook}.ipynb", output, values)
        elif args.command == "build":
            sys.stdout.write(f"The book: {build(args.run) / 'index.html'}\n")
        else:
            if args.concept and not args.concept.strip().isdigit():
                raise ValueError(f"CONCEPT must be a whole number, not {args.concept!r}")
            concept = int(args.concept) if args.concept else None
            sys.stdout.write(f"{resolve_concept(args.run, concept, args.gene or None, args.cell_type or None)}\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
