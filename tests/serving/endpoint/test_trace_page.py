"""Where a model learned its own answer: asked over HTTP and shown on the page, in a real Chromium,
by a model that was trained until it had learned a passage by heart."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from cluster.settings.serve import ServeConfig
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.run_plan import RunPlan
from jobs.trace.trace_run import trace
from tests.chromium import needs_chromium, running_chromium
from tests.jobs.planted_runs import BEGUN, LEARNED, learned_by_heart
from tests.serving.endpoint_parts import Endpoints
from tests.time_limits import limit_s

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

KEY = "sk-trace"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    return learned_by_heart(tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="module")
def url(endpoints: Endpoints, plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An endpoint that serves the newest checkpoint, with a key that may trace."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY} name=reader may=trace\nsk-user\n")
    newest = RunCheckpoints(plan.run).names[-1]
    config = ServeConfig(
        checkpoint=f"{plan.run.uri}/checkpoints/{newest}",
        model_name="tiny",
        api_key_file=str(keys),
        trace=plan.tokens_uri,
        storage=plan.config.storage,
    )
    return str(endpoints.deployed(config)["url"])


@pytest.fixture
def page(url: str) -> Iterator[Page]:
    with running_chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(1e3 * limit_s(20))
        expect.set_options(timeout=1e3 * limit_s(40))
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{url}/inside")
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        yield page
        assert problems == []


def asked(url: str, path: str, key: str = KEY, **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": "tiny"} | fields
    return httpx.post(f"{url}{path}", json=body, headers=headers, timeout=limit_s(60))


def test_an_answer_that_was_learned_by_heart_has_its_steps(url: str, plan: RunPlan) -> None:
    fields = {"prompt": BEGUN, "max_tokens": 24, "temperature": 0}
    answer = asked(url, "/v1/completions", **fields).json()["choices"][0]["text"]
    text = BEGUN + answer
    assert LEARNED[: len(BEGUN) + 12] in text, "the model has learned it"
    step = int(RunCheckpoints(plan.run).names[-1].split("-")[1])
    expected = trace(plan.run, text, min_tokens=12, step=step).json()["spans"]
    spans = asked(url, "/v1/trace", text=text).json()["spans"]
    assert len(spans) == len(expected) >= 1
    for span, known in zip(spans, expected, strict=True):
        assert (span["occurrences"], span["text"]) == (known["occurrences"], known["text"])
        assert (span["first_step"], span["last_step"]) == (known["first_step"], known["last_step"])
    losses = [learned["loss"] for learned in spans[0]["documents"][0]["steps"]]
    assert losses[0] > 2 * losses[-1]
    assert asked(url, "/v1/trace", key="sk-user", text=text).status_code == 403
    assert asked(url, "/v1/trace", key="sk-nobody", text=text).status_code == 401


@needs_chromium
def test_the_page_shows_where_an_answer_was_learned(page: Page, url: str) -> None:
    page.locator("#prompt").fill(BEGUN)
    page.get_by_label("New tokens").fill("24")
    page.get_by_label("Temperature").fill("0")
    expect(page.locator("#model")).to_contain_text("step")
    page.locator("#run").click()
    switch = page.get_by_role("switch", name="Mark what stands in the training data")
    expect(switch).to_be_visible()
    expect(page.locator("#trace-text")).to_be_empty()
    switch.focus()
    page.keyboard.press("Enter")
    expect(switch).to_have_attribute("aria-checked", "true")
    marked = page.locator("#trace-text button")
    expect(marked.first).to_be_visible()
    shown = asked(url, "/v1/xray", prompt=BEGUN, max_tokens=24, temperature=0).json()
    tokens = [token["id"] for token in shown["tokens"]]
    answer = asked(url, "/v1/trace", tokens=tokens).json()
    expect(page.locator("#trace-text")).to_have_text(answer["text"], use_inner_text=False)
    expect(marked).to_have_count(len(answer["spans"]))
    page.keyboard.press("Tab")
    expect(marked.first).to_be_focused()
    page.keyboard.press("Enter")
    expect(marked.first).to_have_attribute("aria-expanded", "true")
    span = answer["spans"][0]
    documents = page.locator("#trace-detail article")
    expect(documents).to_have_count(len(span["documents"]))
    for document, article in zip(span["documents"], documents.all(), strict=True):
        place = f"{document['file']}:{document['place']}"
        expect(article.locator("h3")).to_have_text(place)
        expect(article).to_contain_text(f"at {document['num_steps']} steps")
        expect(article).to_contain_text(
            f"the first {document['first_step']}, the last {document['last_step']}"
        )
        quoted = document["before"] + span["text"] + document["behind"]
        expect(article.locator("blockquote")).to_have_text(quoted, use_inner_text=False)
        expect(article.locator("mark")).to_have_text(span["text"], use_inner_text=False)
        expect(article.locator("b")).to_have_count(0)
        article.locator("summary").click()
        first = document["steps"][0]
        row = article.locator("tbody tr").first
        expect(row).to_contain_text(f"{first['step']}")
        expect(row).to_contain_text(f"{first['loss']:.3f}")
        line = Path(document["file"]).read_bytes()[document["place"] :].partition(b"\n")[0]
        assert quoted.strip() in json.loads(line)["text"]
    switch.click()
    expect(page.locator("#trace-text")).to_be_empty()
    expect(documents).to_have_count(0)
