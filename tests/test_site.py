"""The site of the documents: its search finds each setting, command, metric and error, and no page
scrolls sideways at any width of a window."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from playwright.sync_api import Page

from cluster.cli import COMMANDS
from cluster.metrics.metric_table import metrics
from cluster.settings.leaves import leaves
from jobs.corpus.documents import Drop
from model.tables import read_table
from serving.protocol import errors
from tests.chromium import needs_chromium, running_chromium
from tests.reference.settings_page import TREES
from tests.repository import REPOSITORY

needs_sphinx = pytest.mark.skipif(
    find_spec("sphinx") is None, reason="no Sphinx here: pip install '.[docs]'"
)
pytestmark = [pytest.mark.slow, needs_chromium, needs_sphinx]

WIDTHS = (360, 768, 1024, 1440, 1920)  # a telephone, a tablet, laptops, a large screen

# What the site's own search answers to each text, as the addresses of pages, the best first.
ANSWERS = """(texts) => texts.map((text) =>
  Search._performSearch(...Search._parseQuery(text)).map((result) => result[0]))"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing of each request."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Yields the folder and the address of the site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    places = ["--builder", "dirhtml", str(REPOSITORY / "docs"), str(folder)]
    built = subprocess.run([*build, *places], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def page(site: tuple[Path, str]) -> Iterator[Page]:
    with running_chromium() as browser:
        yield browser.new_page()


def names() -> dict[str, set[str]]:
    """Returns what people look for, by the page of the reference that has it."""
    table = read_table(errors.__file__, "errors")
    codes = {str(entry.get("code", name)) for name, entry in table.items()}
    return {
        "reference/settings": {leaf.path for tree, _ in TREES.values() for leaf in leaves(tree)},
        "reference/commands": {f"raymill {command.name}" for command in COMMANDS},
        "reference/metrics": set(metrics()),
        "reference/errors": codes | {drop.value for drop in Drop},
    }


def test_the_search_finds_each_setting_command_metric_and_error(
    site: tuple[Path, str], page: Page
) -> None:
    _, url = site
    page.goto(f"{url}/search/?q=train.learning_rate")
    page.wait_for_selector("ul.search li a[href*='reference/settings']")
    for place, texts in names().items():
        asked = sorted(texts)
        found = dict(zip(asked, page.evaluate(ANSWERS, asked), strict=True))
        assert [text for text in asked if place not in found[text]] == []
    assert page.evaluate(ANSWERS, ["no_such_setting"]) == [[]]


def test_no_page_scrolls_sideways(site: tuple[Path, str], page: Page) -> None:
    folder, url = site
    addresses = sorted(path.parent.relative_to(folder) for path in folder.rglob("index.html"))
    assert len(addresses) > 50
    wide = []
    for address in addresses:
        page.goto(f"{url}/{address}/")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            needed = page.evaluate("document.documentElement.scrollWidth")
            wide += [(str(address), width, needed)] if needed > width else []
    assert wide == []
