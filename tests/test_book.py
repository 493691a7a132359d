"""A whole small run: real cells through every notebook, the book rendered, opened in a browser with the network off."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scsae_utils import book as builder
from scsae_utils.book import ROOT, SECTIONS

PROFILE = "tests/tiny.yaml"
RUN = ROOT / "runs" / "tiny"
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
PAGES = ["book/intro", "book/method", "book/own_cells", "book/glossary", *(f"notebooks/{n}" for n in SECTIONS)]


def snakemake(*arguments, profile=PROFILE):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--max-checksum-file-size", "1000000000"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*command, *arguments, "--config", f"profile={profile}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )


def jobs(result):
    """Rules that a dry run would execute."""
    assert result.returncode == 0, result.stdout + result.stderr
    return set(re.findall(r"^rule (\w+):", result.stdout + result.stderr, re.M)) - {"all"}


@pytest.fixture(scope="session")
def run():
    """The run behind the tests; made anew where something it depends on has changed."""
    result = snakemake("book")
    assert result.returncode == 0, result.stdout + result.stderr
    return RUN


@functools.cache
def concept_number():
    from scsae_utils.runs import find_concept, load_run

    return find_concept(load_run(RUN), cell_type="T")


@pytest.fixture(scope="session")
def site(run):
    """The book with the page of one more concept."""
    page = f"runs/tiny/notebooks/concepts/concept_{concept_number()}.ipynb"
    for target in (page, "book"):
        result = snakemake(target)
        assert result.returncode == 0, result.stdout + result.stderr
    return run / "book"


def test_nothing_is_done_twice(run):
    assert jobs(snakemake("book", "--dry-run")) == set()


def test_a_changed_parameter_reruns_what_depends_on_it_and_no_more(run, tmp_path):
    def after(section, name, value):
        profile = yaml.safe_load((ROOT / PROFILE).read_text())
        profile[section][name] = value
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
        return jobs(snakemake("book", "--dry-run", profile=tmp_path / "tiny.yaml")) - {"concept_page"}

    first, embedding, sae, *later = SECTIONS.values()
    assert after("case_study", "n_random", 3) == {"case_study", "book"}
    assert after("concept_taxonomy", "threshold", 0.7) == {*later, "book"}
    assert after("embedding", "held_out", 0.3) == {embedding, sae, *later, "book"}
    assert after(first, "threshold", 0.7) == {first, "book"}


def test_every_notebook_ran_without_error(run):
    for name in SECTIONS:
        builder.check_executed(run / "notebooks" / f"{name}.ipynb")


def test_a_failed_notebook_stops_the_book_and_the_old_book_stays(run, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run / "notebooks", broken / "notebooks")
    (broken / "book").mkdir()
    (broken / "book" / "index.html").write_text("old")
    path = broken / "notebooks" / "02_sae.ipynb"
    content = json.loads(path.read_text())
    error = {"output_type": "error", "ename": "ValueError", "evalue": "x", "traceback": []}
    next(c for c in content["cells"] if c["cell_type"] == "code")["outputs"].append(error)
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="02_sae.ipynb holds a failed cell"):
        builder.build(broken)
    assert (broken / "book" / "index.html").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concept", "100000"], "there is no concept 100000: the dictionary has 0 to 63"),
        (["--concept", "x"], "must be a whole number"),
        (["--gene", "CD79Z"], "did you mean 'CD79B' or 'CD79A'"),
        (["--cell-type", "CD19 B"], "did you mean 'CD19+ B'"),
        ([], "say which concept"),
    ],
)
def test_a_concept_that_cannot_be_found_names_the_near_misses(run, arguments, message):
    command = [sys.executable, "-m", "scsae_utils.book", "concept", "--run", str(run), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_silent_concept_is_an_error_that_names_active_ones(run):
    from scsae_utils.concepts import check_concept, kept, number
    from scsae_utils.runs import load_run

    concepts = load_run(run).concepts
    silent = concepts.var_names[concepts.var["n_cells"] == 0]
    if len(silent) == 0:  # every concept is active: silence one
        concepts.var.loc["concept_0", ["n_cells", "kept"]] = [0, False]
        silent = ["concept_0"]
    with pytest.raises(ValueError, match="never activates") as error:
        check_concept(concepts, number(silent[0]))
    near = re.findall(r"\d+", str(error.value).split("active ones:")[1])
    assert {f"concept_{j}" for j in near} <= set(kept(concepts).var_names)


def test_the_concept_page_is_in_the_book_under_its_own_name(site):
    number = concept_number()
    page = (site / "notebooks" / "concepts" / f"concept_{number}.html").read_text()
    assert f"<title>Concept {number}" in page
    assert f"concepts/concept_{number}.html" in (site / "book" / "intro.html").read_text()


def test_pages_name_no_foreign_script_style_or_image(site):
    for path in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|img|link|iframe)\b[^>]*>", path.read_text()):
            target = re.search(r"\b(?:src|href)=[\"'](?:https?:)?//([^\"']+)", tag)
            assert not target or 'rel="canonical"' in tag, f"{path.name}: {tag}"


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI must run the browser tests, and there is no Chromium")
        pytest.skip("no Chromium on this machine: the browser tests are not run")
    from playwright.sync_api import sync_playwright

    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_page_opens_offline_and_fits_the_screen(site, browser, name, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    outside, errors = [], []
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else outside.append(r.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.context.set_offline(True)
    page.goto((site / f"{name}.html").as_uri(), wait_until="load")
    assert page.locator("h1").count() >= 1
    broken = page.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)")
    assert not broken
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1"), "the page scrolls sideways"
    if name == "book/method":
        page.wait_for_selector("mjx-container svg", timeout=15_000)
    if name == "notebooks/07_atlas":
        assert page.locator("#atlas tbody tr").count() >= 3
    elif name == "notebooks/00_ten_cells":  # tables only
        assert page.locator("table").count() >= 5
    elif name.startswith("notebooks/"):
        assert page.locator("img[src*='_images']").count() >= 3
    assert not outside, "the page asked for something from the network"
    assert not [e for e in errors if "THEBE" not in e]
    page.close()


def test_search_finds_a_word_without_a_server(site, browser):
    page = browser.new_page()
    page.goto((site / "search.html").as_uri() + "?q=counterfactual")
    page.wait_for_selector("#search-results li a", timeout=15_000)
    assert page.locator("#search-results li a").count() >= 2
    page.close()
