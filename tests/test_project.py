"""What holds the project together: versions, environments, what is and is not in the repository."""

import re
import subprocess
import tomllib
from importlib.metadata import version

import pytest
import yaml

from scsae_utils.book import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def canonical(name):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def test_every_direct_dependency_has_an_exact_version_and_it_is_installed():
    extras = PYPROJECT["project"]["optional-dependencies"]
    pinned = {canonical(name): number for name, number in CONSTRAINTS.items()}
    direct = [
        canonical(d)
        for d in [
            *PYPROJECT["project"]["dependencies"],
            *extras["test"],
            *extras["tools"],
            *extras["cluster"],
            *extras["fetch"],
        ]
    ]
    assert not set(direct) - set(pinned)
    for name in (canonical(d) for d in [*PYPROJECT["project"]["dependencies"], *extras["test"]]):
        assert version(name).split("+")[0] == pinned[name], name
    assert pinned["torch"] == "2.13.0" and pinned["jupyter-book"] == "1.0.4.post1"


def test_conda_users_get_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["--constraint constraints.txt", "--editable .[test]"]}
    python = next(d for d in conda if d.startswith("python="))
    assert PYPROJECT["project"]["requires-python"] == ">=" + python.removeprefix("python=")


def test_public_names_are_documented_in_the_readme():
    import scsae_utils

    readme = (ROOT / "README.md").read_text()
    for name in scsae_utils.PUBLIC:
        assert callable(getattr(scsae_utils, name)) and getattr(scsae_utils, name).__doc__
        assert f"{name}(" in readme
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        scsae_utils.nonsense  # noqa: B018


def test_make_without_a_concept_says_what_to_give():
    help_text = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for command in ("make book", "make test", "make concept CONCEPT=17"):
        assert command in help_text


def test_citation_and_address_are_the_same_everywhere():
    """The repository's address is set in _config.yml; where else it has to stand, it is the same."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    assert citation["repository-code"] == address
    assert citation["version"] == PYPROJECT["project"]["version"]
    page = (ROOT / "book" / "cite.md").read_text()
    for part in (citation["title"], citation["version"], address, citation["authors"][0]["name"]):
        assert f"{{{part}}}" in page
    paper = citation["references"][0]
    assert all(author["family-names"] in page for author in paper["authors"])
    assert paper["title"] == re.search(r"title += \{(.*)\},", page)[1].replace("{", "").replace("}", "")
