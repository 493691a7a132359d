"""What the book claims: every number in its prose, with the expression that computed it and what it was computed from.

Sentences with results are f-strings in the notebooks: ``display(Markdown(f"..."))``. Their fixed parts hold no numbers,
and what was filled in can be read back from the executed notebook.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import yaml
from pooch import file_hash

from .book import ROOT, SECTIONS, load_profile
from .files import whole
from .provenance import code_version, versions

# Digits that are names and no results: F1, bfloat16, [](../notebooks/01_embedding.ipynb), Figure 2f, (paper: 304).
NAMES = "|".join(
    [
        r"\]\([^)]*\)|`[^`]*`|\(paper:[^)]*\)|\d+ % interval",
        r"\b(?:Figures?|Figs?\.|Tables?|Eq\.|Sec\.|[Cc]hapters?)\s+\w[\w.]*",
        r"[A-Za-z][\w-]*\d[\w-]*",
    ]
)
PACKAGES = ("torch", "scanpy", "anndata", "numpy", "scikit-learn", "scsae-utils")


def sentences(source: str) -> list[ast.JoinedStr | ast.Constant]:
    """The texts that a code cell gives to ``Markdown(...)``, in order."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Markdown"]
    texts = [a for call in sorted(calls, key=lambda n: n.lineno) for a in call.args[:1]]
    return [t for t in texts if isinstance(t, ast.JoinedStr | ast.Constant)]


def typed_numbers(notebook: Path) -> list[str]:
    """Numbers that were typed into sentences with results: a fixed part of one, or prose under "What was found".

    Returns
    -------
    ``"cell id: the text around the number"`` for each; an empty list if all is well.
    """
    found, results = [], False
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = re.findall(r"^#+ (.*)", source, re.M)
            results = heading[-1] == "What was found" if heading else results
            end = source.split("# What was found")[-1]  # all of it, in a cell without the heading
            fixed = [end.split("**Now you", 1)[0]] if results else []
        else:
            parts = [v for text in sentences(source) for v in getattr(text, "values", [text])]
            fixed = [str(v.value) for v in parts if isinstance(v, ast.Constant)]
        for text in fixed:
            bare = re.sub(NAMES, lambda name: " " * len(name[0]), text)
            found += [
                f"{cell['id']}: ...{text[max(0, m.start() - 30) : m.end() + 20]}..." for m in re.finditer(r"\d+", bare)
            ]
    return found


def read_claims(notebook: Path) -> list[dict]:
    """The claims of an executed notebook.

    Returns
    -------
    One dict for each text with results: ``chapter``, ``cell`` (id), ``text`` (as rendered), ``values`` (the expression
    of each filled-in part and what it became, in order).
    """
    claims = []
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        texts = [o["data"]["text/markdown"] for o in cell["outputs"] if "text/markdown" in o.get("data", {})]
        texts = ["".join(text) for text in texts]
        for text in sentences("".join(cell["source"])):
            parts = getattr(text, "values", [])
            pattern = "".join("(.*?)" if isinstance(p, ast.FormattedValue) else re.escape(p.value) for p in parts)
            expressions = [ast.unparse(p.value) for p in parts if isinstance(p, ast.FormattedValue)]
            for shown in texts if expressions else []:
                if match := re.fullmatch(pattern, shown, re.S):
                    values = [[e, v] for e, v in zip(expressions, match.groups())]
                    chapter = notebook.stem
                    claims.append({"chapter": chapter, "cell": cell["id"], "text": shown.strip(), "values": values})
                    break
    return claims


def provenance(run: Path) -> dict:
    """The cells and the dictionary that the claims are about, the code and the packages; see :mod:`.provenance`.

    ``cells`` and ``dictionary`` are SHA-256 of the run's files; ``commit`` is of the repository, ``changed`` lists the
    files that differ from it. Both are empty where there is no repository.
    """
    profile = ROOT / "profiles" / f"{run.name}.yaml"
    files = {"cells": run / "embedded.h5ad", "dictionary": run / "sae.safetensors"}
    return {
        **{name: file_hash(str(path)) if path.is_file() else "" for name, path in files.items()},
        "profile": load_profile(profile) if profile.is_file() else {},
        **code_version(),
        "versions": {name: number for name, number in versions().items() if name in PACKAGES},
    }


def write_claims(run: Path) -> Path:
    """Collect the claims of all chapters of a run in ``claims.json``, with their provenance."""
    notebooks = [run / "notebooks" / f"{name}.ipynb" for name in SECTIONS]
    claims = [claim for notebook in notebooks for claim in read_claims(notebook)]
    path = run / "claims.json"
    with whole(path) as part:
        part.write_text(json.dumps({"provenance": provenance(run), "claims": claims}, indent=1, default=str) + "\n")
    return path


def claims_page(path: Path) -> str:
    """``claims.json`` as a page of the book, in MyST Markdown."""
    known = json.loads(path.read_text())
    about = known["provenance"]
    lines = [
        "# What this book claims",
        "",
        "Every number in the text of the chapters was computed by the run that made this book. Here they are, with the",
        "expression that gave each. The same list is in `claims.json` in the folder of the run.",
        "",
        f"- commit: `{about['commit'][:12] or 'unknown'}`"
        + (" and changes that were not committed" if about["changed"] else ""),
        f"- cells: SHA-256 `{about['cells'][:16]}`, dictionary: `{about['dictionary'][:16]}`",
        f"- versions: {', '.join(f'{k} {v}' for k, v in about['versions'].items())}",
        "",
        "````{dropdown} The profile",
        "```yaml",
        *yaml.safe_dump(about["profile"], sort_keys=False).splitlines(),
        "```",
        "````",
    ]
    for chapter in dict.fromkeys(claim["chapter"] for claim in known["claims"]):
        title = json.loads((ROOT / "notebooks" / f"{chapter}.ipynb").read_text())["cells"][0]["source"][0][2:].strip()
        lines += ["", f"## [{title}](../notebooks/{chapter}.ipynb)"]
        for claim in (c for c in known["claims"] if c["chapter"] == chapter):
            text = claim["text"].replace("](#", f"]({chapter}.ipynb#")
            text = re.sub(r"\]\((?=\w+\.ipynb)", "](../notebooks/", text)  # the page lies in another folder
            lines += ["", *(f"> {line}" for line in text.splitlines()), ""]
            shown = "; ".join(f"{code(e)} = {plain(v)}" for e, v in claim["values"])
            lines += ["```{dropdown} computed by", ":class-container: computed", "", shown, "```"]
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """Inline code of one line."""
    return f"``{' '.join(text.split())}``"


def plain(text: str) -> str:
    """A value without markup, shortened."""
    text = " ".join(re.sub(r"[`*\[\]{}|<>$]", "", text).split())
    return text if len(text) <= 80 else text[:79] + "…"
