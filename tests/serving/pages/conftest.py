"""One Chromium and one replica with a chat-tuned model for each file of this folder."""

from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from model.text.tokenizer import Tokenizer
from tests.chromium import Watched, running_chromium
from tests.serving.page_parts import DESKTOP, ServedPages, chat_checkpoint, served_pages
from tests.time_limits import limit_s


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPages]:
    folder = chat_checkpoint(tmp_path_factory.mktemp("chat") / "step-7", tokenizer)
    with served_pages(folder) as pages:
        yield pages


@pytest.fixture
def watched(browser: Browser, pages: ServedPages) -> Iterator[Watched]:
    context = browser.new_context(viewport=DESKTOP)
    watched = Watched(context.new_page(), pages.url)
    watched.page.goto(pages.url)
    expect(watched.page.locator("#chat-model")).to_contain_text("tiny")
    yield watched
    assert watched.problems == []
    context.close()


@pytest.fixture
def page(watched: Watched) -> Page:
    return watched.page


@pytest.fixture
def http(pages: ServedPages) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pages.url, timeout=limit_s(30)) as http:
        yield http
