"""A whole small run: real cells through every notebook, the book rendered, opened in a browser with the network off."""

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import yaml
from bs4 import BeautifulSoup
from PIL import Image

from scsae_utils import book as builder
from scsae_utils.book import ROOT, SECTIONS
from scsae_utils.provenance import RESULTS

PROFILE = "tests/tiny.yaml"
RUN = ROOT / "runs" / "tiny"
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
AXE = Path(__file__).parent / "assets" / "axe-core" / "axe.min.js"
LOCAL = re.compile("file:|data:|blob:")


def snakemake(*arguments, profile=PROFILE, **environment):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--max-checksum-file-size", "1000000000"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*command, *arguments, "--config", f"profile={profile}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, **environment},
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


def test_the_same_again_is_the_same_byte_for_byte(run, tmp_path):
    """Every chapter once more, in another folder, and with another order of what Python keeps without one."""
    shutil.copy(ROOT / PROFILE, tmp_path / "tiny_again.yaml")
    again = ROOT / "runs" / "tiny_again"
    shutil.rmtree(again, ignore_errors=True)
    chapters = [f"runs/{again.name}/notebooks/{name}.ipynb" for name in SECTIONS]
    result = snakemake(*chapters, profile=tmp_path / "tiny_again.yaml", PYTHONHASHSEED="7")
    assert result.returncode == 0, result.stdout + result.stderr
    made = sorted(path.name for pattern in RESULTS for path in again.glob(pattern))
    assert {"embedded.h5ad", "sae.safetensors", "concepts.h5ad", "drivers.parquet", "evidence.parquet"} < set(made)
    assert not [name for name in made if (again / name).read_bytes() != (run / name).read_bytes()]
    shutil.rmtree(again)


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


def pages(site):
    """Names of all pages, such as ``notebooks/02_sae``."""
    found = (path.relative_to(site).with_suffix("") for path in sorted(site.rglob("*.html")))
    return [str(name) for name in found if not name.parts[0].startswith("_") and str(name) != "index"]  # it leads on


@pytest.fixture(scope="session")
def visits(site, browser):
    """What a reader meets on each page, opened from the folder without network: wide and light, narrow and dark."""
    found = {}
    for width, theme in ((1280, "light"), (390, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        context.set_offline(True)
        page, problems = context.new_page(), []
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)  # noqa: B023
        page.on("pageerror", lambda e: problems.append(str(e)))  # noqa: B023
        page.on("requestfailed", lambda r: problems.append(f"failed: {r.url}"))  # noqa: B023
        page.on("request", lambda r: None if LOCAL.match(r.url) else problems.append(f"asked for {r.url}"))  # noqa: B023
        for name in pages(site):
            problems.clear()
            page.goto((site / f"{name}.html").as_uri(), wait_until="load")
            figure = page.locator(".cell_output img:not(.wide-figure > img)")
            page.add_script_tag(path=AXE)
            seen = page.evaluate(
                """async () => ({
                    theme: document.documentElement.dataset.theme,
                    headings: document.querySelectorAll("h1").length,
                    wider: document.documentElement.scrollWidth - window.innerWidth,
                    broken: [...document.images].filter((i) => !(i.complete && i.naturalWidth)).map((i) => i.src),
                    nameless: [...document.images].filter((i) => !i.alt.trim()).map((i) => i.src),
                    figures: document.querySelectorAll(".cell_output img").length,
                    tables: document.querySelectorAll("table").length,
                    axe: (await axe.run(document, { resultTypes: ["violations"], preload: false })).violations
                        .filter((v) => ["serious", "critical"].includes(v.impact))
                        .flatMap((v) => v.nodes.map((n) => `${v.id}: ${n.html.slice(0, 150)} ${n.failureSummary}`)),
                })"""
            )
            picture = Image.open(io.BytesIO(figure.first.screenshot())) if figure.count() else None
            found[name, theme] = seen | {"problems": list(problems), "picture": picture}
        context.close()
    return found


def what_is_wrong(visits, key):
    return {page: seen[key] for page, seen in visits.items() if seen[key]}


def test_pages_open_offline_without_errors(site, visits):
    assert not what_is_wrong(visits, "problems")
    assert not what_is_wrong(visits, "broken")
    assert all(seen["headings"] >= 1 for (name, _), seen in visits.items() if name.startswith(("book/", "notebooks/")))
    assert {f"notebooks/{name}" for name in SECTIONS} | {"book/intro", "search"} <= {name for name, _ in visits}


def test_pages_fit_the_screen(visits):
    assert not {page: seen["wider"] for page, seen in visits.items() if seen["wider"] > 1}


def test_pages_are_accessible(visits):
    """axe-core finds nothing serious or critical, in light and in dark; every image says what it shows."""
    assert not what_is_wrong(visits, "axe")
    assert not what_is_wrong(visits, "nameless")


def test_figures_are_seen_on_their_white_paper(visits):
    for (name, theme), seen in visits.items():
        assert seen["theme"] == theme
        if name.startswith("notebooks/") and "atlas" not in name:
            assert seen["figures"] >= 3 or seen["tables"] >= 5, name  # the chapter by hand has tables only
        if seen["picture"]:
            grey = np.asarray(seen["picture"].convert("L"))
            assert np.median(grey) > 200 and (grey < 150).mean() > 0.002, f"{name}, {theme}: nothing to be seen"


def test_links_lead_somewhere(site):
    """Every link between the pages, with its anchor; and no script, style or image is another host's."""
    paths = [site / f"{name}.html" for name in pages(site)]
    trees = {path: BeautifulSoup(path.read_text(), "html.parser") for path in paths}
    anchors = {
        path: {tag[key] for key in ("id", "name") for tag in tree.find_all(attrs={key: True})}
        for path, tree in trees.items()
    }
    for path, tree in trees.items():
        for tag in tree.find_all(["a", "img", "script", "link", "source", "iframe"]):
            address = urlsplit(tag.get("href") or tag.get("src") or "")
            if address.scheme or address.netloc:
                assert tag.name == "a" or "canonical" in tag.get("rel", []), f"{path.name}: {tag}"
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            assert target.exists(), f"{path.name}: {tag}"
            if address.fragment and "=" not in address.fragment and target in anchors:  # "=": a view of the atlas
                assert unquote(address.fragment) in anchors[target], f"{path.name}: {tag}"


def test_chapters_can_be_downloaded_and_launched(site):
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    for name in SECTIONS:
        page = (site / "notebooks" / f"{name}.html").read_text()
        assert (
            f"https://colab.research.google.com/github/{address.split('com/')[1]}/blob/main/notebooks/{name}.ipynb"
            in page
        )
        assert re.search(rf"https://mybinder\.org/v2/gh/[^\"]*notebooks/{name}\.ipynb", page)
        assert (
            f"../_sources/notebooks/{name}.ipynb" in page
            and (site / "_sources" / "notebooks" / f"{name}.ipynb").is_file()
        )


def test_the_book_is_small(site):
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 40e6


def test_every_exercise_has_its_solution(run):
    for name in SECTIONS:
        cells = json.loads((run / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        asked = [
            c for c in cells if c["cell_type"] == "markdown" and re.search(r"^\*\*\d\.\*\*", "".join(c["source"]), re.M)
        ]
        folded = [c for c in cells if "hide-cell" in c["metadata"].get("tags", [])]
        shown = ["".join(o["data"].get("text/markdown", "")) for c in folded for o in c["outputs"] if "data" in o]
        shown = [text for text in shown if "**Solution.**" in text]
        assert len(asked) == len(folded) == len(shown) >= 2, name
        assert all(len(text) > 40 and "nan" not in text.split() for text in shown), name


def test_formulas_and_the_atlas_are_drawn(site, browser):
    page = browser.new_page()
    page.goto((site / "book" / "method.html").as_uri())
    page.wait_for_selector("mjx-container svg", timeout=15_000)
    page.goto((site / "notebooks" / "07_atlas.html").as_uri())
    page.wait_for_selector("#atlas tbody tr", timeout=15_000)
    assert page.locator("#atlas tbody tr").count() >= 3
    page.close()


def test_search_finds_a_word_without_a_server(site, browser):
    page = browser.new_page()
    page.goto((site / "search.html").as_uri() + "?q=counterfactual")
    page.wait_for_selector("#search-results li a", timeout=15_000)
    assert page.locator("#search-results li a").count() >= 2
    page.close()
