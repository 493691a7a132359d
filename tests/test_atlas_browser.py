"""The atlas as a reader has it: opened from a folder, in a browser without network, by mouse, keyboard, address."""

import csv
import io
import os
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from small_atlas import HOSTILE, small_concepts, small_tables

from scsae_utils.atlas import Tables, container, write_atlas, write_mentions
from scsae_utils.book import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
AXE = Path(__file__).parent / "assets" / "axe-core" / "axe.min.js"
STYLES = files("pydata_sphinx_theme") / "theme" / "pydata_sphinx_theme" / "static" / "styles"


def make_site(folder, tables):
    """The assets, the data and one page in the colours of the book's theme, laid out like the book."""
    shutil.copytree(ROOT / "book" / "_extra", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("mathjax"))
    xy = np.random.default_rng(0).random((len(tables.numbers), 2))
    write_atlas(tables, folder / "atlas" / "data", xy=xy, n_cells=12)
    (folder / "notebooks").mkdir()
    write_mentions(folder / "notebooks", folder / "atlas" / "data")
    style = (STYLES / "pydata-sphinx-theme.css").read_text()
    (folder / "notebooks" / "07_atlas.html").write_text(
        '<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8"><title>The atlas</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        '<body><main class="bd-content" style="display:block;padding:1rem"><h1>The atlas</h1>'
        f"{container()}</main></body></html>"
    )
    return (folder / "notebooks" / "07_atlas.html").as_uri()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("site"), small_tables(60))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI must run the browser tests, and there is no Chromium")
        pytest.skip("no Chromium on this machine: the browser tests are not run")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens an address; at the end no page may have met an error, asked the network or run a label as code."""
    contexts, problems = [], []

    def open_page(address, width=1280, searchable=True):
        context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
        context.set_offline(True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "blob:")) else problems.append(r.url))
        page.goto(address)
        page.wait_for_function("!document.querySelector('#atlas').textContent.includes('is drawn on the page')")
        if searchable:
            page.wait_for_function("scsaeAtlas.list.searchable")
        return page

    yield open_page
    hacked = [page.evaluate("document.body.dataset.hacked") for c in contexts for page in c.pages]
    for context in contexts:
        context.close()
    assert not problems and not any(hacked)


def numbers(page):
    return [int(text) for text in page.locator("tbody .atlas-name b").all_inner_texts()]


def status(page):
    return page.get_by_role("status").inner_text()


def accessibility(page):
    """What axe-core finds that is serious or worse."""
    page.add_script_tag(path=AXE)
    found = page.evaluate("axe.run('#atlas', { resultTypes: ['violations'], preload: false })")["violations"]
    return [
        f"{v['id']}: {n['html'][:150]} {n['failureSummary'][:200]}"
        for v in found
        for n in v["nodes"]
        if v["impact"] in ("serious", "critical")
    ]


def test_the_list_shows_all_concepts_in_parts(site, open_page):
    page = open_page(site)
    assert status(page) == "All 65 concepts" and len(numbers(page)) == 50
    page.get_by_role("button", name="Show 15 more").click()
    assert len(numbers(page)) == 65
    assert page.evaluate("document.activeElement.querySelector('b').textContent") == "102"  # the 51st


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("LYZ", [4, 0]),  # the one that it matters more to is first
        ("lyz", [4, 0]),
        ("antigen", [0]),
        ("enriched in B", [0]),
        ("B cell: immuno", [0]),
        ("antigen CD79A", [0]),
        ("antigen GNLY", []),
        ("128", [128]),
        ("S100A9", []),  # no effect: not what the concept is about
        ("   ", None),
        (HOSTILE, [6, 0]),
        ("\\ ( [ *", []),
    ],
)
def test_search(site, open_page, query, found):
    page = open_page(site)
    page.get_by_role("searchbox").fill(query)
    if found is None:
        assert status(page) == "All 65 concepts"
        return
    assert numbers(page) == found
    assert status(page) == f"{len(found)} of 65 concepts"


def test_a_cell_type_finds_its_own_concepts_first(site, open_page):
    page = open_page(f"{site}#q=t+cell")
    assert numbers(page)[0] == 4 and page.get_by_role("searchbox").input_value() == "t cell"
    assert "cell type: T cell" in page.locator("tbody tr").last.inner_text()  # says by what it was found


def test_filters_sorting_and_their_address(site, open_page):
    page = open_page(site)
    page.get_by_label("whole-cell-type").check()
    assert numbers(page) == [0, 4]
    page.get_by_role("group", name="Grade").get_by_label("A").check()
    assert numbers(page) == [0] and status(page) == "1 of 65 concepts"
    assert page.url.endswith("#kind=whole-cell-type&grade=A")
    page.get_by_role("group", name="Grade").get_by_label("A").uncheck()
    page.get_by_role("button", name="Active in").click()
    assert page.locator("th[aria-sort=descending]").inner_text() == "Active in"
    again = open_page(page.url)
    assert numbers(again) == [0, 4] and again.get_by_label("Sort by").input_value() == "cells"
    again.get_by_role("searchbox").fill("nothing of the kind")
    again.get_by_role("button", name="Show all concepts").click()
    assert status(again) == "All 65 concepts"


def test_a_concepts_page_by_address(site, open_page):
    page = open_page(f"{site}#concept=0")
    page.wait_for_selector(".atlas-page svg")
    assert page.get_by_role("heading", level=2).inner_text() == "B cell: immunoglobulin"
    assert page.title() == "B cell: immunoglobulin · Atlas"
    assert page.evaluate("document.activeElement.tagName") == "H2"
    text = page.locator(".atlas-page").inner_text()
    for part in (
        "stable failed",
        "1 of 4",
        "driven not testable",
        "better passed",
        "make concept CONCEPT=0",
        "0.90 (0.80 to 0.95",
    ):
        assert part in text, part
    headings = page.get_by_role("heading", level=3).all_inner_texts()
    assert ", ".join(headings) == (
        "Evidence, Where it is active, In which cell types, Which genes drive it, Passengers and drivers, "
        "Words, Gene sets, Deletion curves, Best cells, Neighbours, More"
    )
    assert page.locator(".atlas-plot svg").count() >= 4
    page.locator("section", has_text="Which genes drive it").locator("summary").click()
    row = page.locator("section", has_text="Which genes drive it").get_by_role("row").nth(1).inner_text()
    assert row.split() == ["CD79A", "0.400", "0.050", "0.001", "driver", "necessary", "selected"]


def test_from_gene_to_concept_to_cell_and_back(site, open_page):
    page = open_page(f"{site}#gene=LYZ")
    page.wait_for_selector(".atlas-page svg")
    text = page.locator(".atlas-page").inner_text()
    assert "lysozyme" in text and "Drives\n1 concepts" in text and "Holds back\n1 concepts" in text
    page.get_by_role("link", name="0 · B cell: immunoglobulin").click()
    page.wait_for_selector("h2:has-text('immunoglobulin')")
    page.get_by_role("link", name="cell 1").first.click()
    page.wait_for_selector("h2:has-text('cell 1')")
    text = page.locator(".atlas-page").inner_text()
    assert "A B cell and not a T cell" in text and "because of CD79A." in text
    page.go_back()
    page.wait_for_selector("h2:has-text('immunoglobulin')")
    page.get_by_role("link", name="All concepts").click()
    assert status(page) == "All 65 concepts"


@pytest.mark.parametrize(
    "address", ["#concept=8", "#concept=x", "#concept=-1", "#gene=nope", "#cell=nope", "#concept="]
)
def test_what_is_not_there_is_said(site, open_page, address):
    page = open_page(site + address)
    assert "There is no" in page.get_by_role("alert").inner_text()
    page.get_by_role("link", name="All concepts").click()
    assert status(page) == "All 65 concepts"


def test_missing_tables_are_said(tmp_path, open_page):
    page = open_page(make_site(tmp_path, Tables(small_concepts())) + "#concept=0")
    page.wait_for_selector(".atlas-page svg")
    text = page.locator(".atlas-page").inner_text()
    for part in (
        "no evidence cards",
        "Genes were not occluded in this run",
        "This run has no words",
        "no deletion curves",
    ):
        assert part in text, part
    page.goto(page.url.split("#")[0] + "#gene=LYZ")
    assert "no gene pages" in page.get_by_role("alert").inner_text()


def test_by_keyboard_alone(site, open_page):
    page = open_page(site)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the table of concepts"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # the first header
    page.keyboard.press("Enter")
    for _ in range(5):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "atlas-name"
    page.keyboard.press("Enter")
    page.wait_for_selector(".atlas-page h2")
    number = page.url.split("=")[-1]
    page.keyboard.press("Tab")  # from the heading on
    page.go_back()
    page.wait_for_selector(".atlas-list:not([hidden])")
    assert page.evaluate("document.activeElement.querySelector('b').textContent") == number  # where one left


def test_the_map_opens_what_is_under_the_pointer(site, open_page):
    page = open_page(site)
    page.get_by_role("searchbox").fill("antigen")
    canvas = page.locator(".atlas-map canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = page.evaluate("[scsaeAtlas.index.concepts.x[0], scsaeAtlas.index.concepts.y[0]]")
    place = {"x": 14 + x * (box["width"] - 28), "y": 14 + (1 - y) * (box["height"] - 28)}
    canvas.hover(position=place)
    assert "B cell: immunoglobulin" in page.locator(".atlas-map .atlas-tip").inner_text()
    canvas.click(position=place)
    page.wait_for_selector("h2:has-text('B cell: immunoglobulin')")


def test_the_map_is_drawn_in_both_themes(site, open_page):
    page = open_page(site)
    drawn = """() => {
        const canvas = document.querySelector("canvas");
        return new Set(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).size;
    }"""
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        page.wait_for_timeout(100)
        assert page.evaluate(drawn) > 20
    page.get_by_role("button", name="Zoom in").click()
    assert page.evaluate(drawn) > 20


def test_what_is_shown_can_be_downloaded(site, open_page):
    page = open_page(f"{site}#q=LYZ")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8-sig"))))
    assert [row["concept"] for row in rows] == ["4", "0"] and rows[1]["strongest_genes"].startswith("CD79A LYZ")
    assert (
        page.evaluate("scsaeAtlas.csv(['a'], [['=1+1'], [-1.5], ['x\"y,z'], [null]])")
        == 'a\r\n\'=1+1\r\n-1.5\r\n"x""y,z"\r\n\r\n'
    )


def test_hostile_labels_stay_text(site, open_page):
    page = open_page(f"{site}#concept=6")
    page.wait_for_selector(".atlas-page svg")
    assert page.get_by_role("heading", level=2).inner_text() == HOSTILE
    page.get_by_role("link", name="All concepts").click()
    page.get_by_role("searchbox").fill("img")
    page.locator("tbody .atlas-name").first.hover()
    for what in ("gene", "cell"):
        page.evaluate(f"label => {{ location.hash = scsaeAtlas.address({{ {what}: label }}); }}", HOSTILE)
        page.wait_for_selector(f".atlas-above:text-is('{what.capitalize()}')")
        assert page.get_by_role("heading", level=2).inner_text() == HOSTILE
    assert page.locator("#atlas img").count() == 0


@pytest.mark.parametrize("address", ["", "#q=B+cell", "#concept=0", "#gene=LYZ", "#cell=cell+1"])
def test_nothing_is_wider_than_a_telephone(site, open_page, address):
    page = open_page(site + address, width=390)
    if address[1:5] in ("conc", "gene", "cell"):
        page.wait_for_selector(".atlas-page")
        page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    controls = "#atlas :is(button, select, input:not([type=checkbox]))"
    heights = page.eval_on_selector_all(controls, "all => all.map(c => c.offsetHeight).filter(h => h)")
    assert min(heights) >= 24  # large enough for a finger


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("address", ["", "#q=B+cell", "#concept=0", "#gene=LYZ", "#cell=cell+1", "#concept=8"])
def test_the_accessibility_checker_finds_nothing_serious(site, open_page, address, theme):
    page = open_page(site + address)
    page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
    if address[1:5] in ("conc", "gene", "cell"):
        page.wait_for_selector(".atlas-page")
        page.wait_for_timeout(200)
    assert accessibility(page) == []
