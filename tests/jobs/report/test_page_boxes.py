"""A report's and a comparison's page as Chromium lays them out: no heading is broken, and no row is
cut off."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from cluster.storage.uris import open_storage
from jobs.report.compare_runs import compare
from jobs.report.make_report import make_report
from tests.chromium import needs_chromium, running_chromium
from tests.jobs.report.eventful_run import eventful_lines, write_run

pytestmark = needs_chromium

WIDTHS = {"desktop": 1100, "phone": 360}
LINES_OF_HEADINGS = """() => [...document.querySelectorAll("thead th")].map((heading) => {
  const text = document.createRange();
  text.selectNodeContents(heading);
  return [heading.textContent, new Set([...text.getClientRects()].map((box) => box.top)).size];
})"""
CUT_TABLES = """() => [...document.querySelectorAll(".scroll")].filter((box) => {
  const last = [...box.querySelectorAll("tr")].at(-1).getBoundingClientRect();
  return last.bottom > box.getBoundingClientRect().bottom + 1;
}).map((box) => box.getAttribute("aria-label"))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The addresses of a run's report and of a comparison."""
    storage = open_storage(str(tmp_path_factory.mktemp("pages")))
    runs = [storage.child(f"runs/{name}") for name in ("first", "second")]
    measured = {"val_loss": 3.0, "val_bits_per_byte": 1.5}
    # As many rows as a run may well have
    sets = {f"text {number}": measured for number in range(4)}
    events = [
        line | {"sets": sets} if line.get("event") == "validation" else line
        for line in eventful_lines()
    ]
    for run in runs:
        write_run(run, events)
    compared = compare(*runs, storage_uri=storage.uri)
    return {"report": make_report(runs[0])["html"], "comparison": compared.html}


def opened(browser: Browser, path: str, *, width: int) -> Page:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(Path(path).as_uri())
    return page


@pytest.mark.parametrize("width", WIDTHS)
def test_no_heading_of_a_table_is_broken(
    width: str, browser: Browser, pages: dict[str, str]
) -> None:
    page = opened(browser, pages["report"], width=WIDTHS[width])
    lines = dict(page.evaluate(LINES_OF_HEADINGS))
    assert {"Step", "Event", "Time (UTC)"} <= lines.keys()
    assert {heading: count for heading, count in lines.items() if heading and count != 1} == {}


def test_the_last_row_of_final_figures_is_shown(browser: Browser, pages: dict[str, str]) -> None:
    page = opened(browser, pages["comparison"], width=WIDTHS["desktop"])
    assert page.locator(".scroll").count() == 1, "these runs have the same settings"
    assert page.evaluate(CUT_TABLES) == []


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_no_table_is_cut_off_on_paper(name: str, browser: Browser, pages: dict[str, str]) -> None:
    page = opened(browser, pages[name], width=WIDTHS["desktop"])
    page.emulate_media(media="print")
    assert page.locator(".scroll").count() > 0
    assert page.evaluate(CUT_TABLES) == []
