"""The x-ray page in a real Chromium, on a real endpoint: what it shows is what the endpoint
says."""

import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from cluster.settings.serve import ServeConfig
from tests.chromium import FAINT_TEXT, Watched, needs_chromium, running_chromium
from tests.serving.endpoint_parts import Endpoints
from tests.time_limits import limit_s

pytestmark = [pytest.mark.cluster, needs_chromium]

KEY = "sk-page"
PROMPT = "the quick fox"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


SIGNED = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def sign(match: re.Match[str]) -> str:
    """A control character as the page shows it."""
    return {"\n": "⏎\n", "\t": "⇥"}.get(match[0], f"\\x{ord(match[0]):02x}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as browser:
        yield browser


@pytest.fixture(
    params=[
        pytest.param(DESKTOP, id="desktop"),
        pytest.param(PHONE, id="phone", marks=pytest.mark.slow),
    ]
)
def watched(request: pytest.FixtureRequest, browser: Browser, open_url: str) -> Iterator[Watched]:
    context = browser.new_context(
        viewport=request.param, color_scheme="dark" if request.param is PHONE else "light"
    )
    watched = Watched(context.new_page(), open_url)
    watched.page.goto(f"{open_url}/inside")
    expect(watched.page.locator("#model")).to_contain_text("step 7")
    yield watched
    assert watched.problems == []
    context.close()


@pytest.fixture
def page(watched: Watched) -> Page:
    return watched.page


def ask(page: Page, *, seed: int = 5, max_tokens: int = 12) -> None:
    """By keyboard alone, from the prompt on."""
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type(PROMPT)
    for value in (str(max_tokens), "0.8", "0.95", str(seed)):
        page.keyboard.press("Tab")
        page.keyboard.press("Control+A")
        page.keyboard.type(value)
    page.keyboard.press("Tab")
    expect(page.locator("#run")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(
        re.compile(rf"^{max_tokens} tokens, seed {seed}$"), timeout=1e3 * limit_s(40)
    )
    expect(page.locator("#run")).to_be_focused()


def expected_text(url: str, **fields: Any) -> dict[str, Any]:
    asked = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": 5,
    }
    while (
        answer := httpx.post(f"{url}/v1/xray", json=asked | fields, timeout=limit_s(30))
    ).status_code == 429:
        time.sleep(0.05)  # the page's own
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_tokens_appear_with_their_probabilities_and_alternatives(page: Page, open_url: str) -> None:
    ask(page)
    answer = expected_text(open_url)
    tokens = page.get_by_role("listbox", name="Tokens").get_by_role("option")
    expect(tokens).to_have_count(len(answer["tokens"]))
    shades = tokens.evaluate_all("nodes => nodes.map(n => Number(n.style.getPropertyValue('--p')))")
    assert shades == pytest.approx([t["probability"] or 0 for t in answer["tokens"]], abs=1e-4)
    index = answer["num_prompt_tokens"] + 2
    tokens.nth(index).click()
    detail = page.locator("#detail")
    for key, steps in (("ArrowRight", 1), ("ArrowLeft", -1)):  # both ways by keyboard
        page.keyboard.press(key)
        index += steps
        expect(tokens.nth(index)).to_be_focused()
        alternatives = answer["predictions"][index - 1]["top"]
        for candidate, row in zip(
            alternatives, detail.locator("table").nth(1).locator("tbody tr").all(), strict=True
        ):
            expect(row).to_contain_text(f"{candidate['logit']:.3f}")
        expect(detail).to_contain_text(f"{answer['tokens'][index]['id']}, ")
    page.keyboard.press("Home")
    expect(detail).to_contain_text("Nothing predicts the first token.")


def test_a_map_is_drawn_for_each_layer_and_head(page: Page, open_url: str) -> None:
    ask(page)
    canvas = page.locator("#map")
    drawn = set()
    for layer in range(2):
        page.locator("#layers [role=tab]").nth(layer).click()
        answer = expected_text(open_url, layers=[layer])
        for head in range(2):
            page.locator("#heads [role=tab]").nth(head).click()
            expect(canvas).to_have_attribute("data-shows", f"{layer}/{head}")
            drawn.add(canvas.evaluate("canvas => canvas.toDataURL()"))
            row = answer["attention"][head]["rows"][-1]
            page.locator("#row").focus()
            page.keyboard.press("End")
            best = max(range(len(row)), key=row.__getitem__)
            expect(page.locator("#looks tbody tr").first).to_contain_text(f"({best + 1})")
            expect(page.locator("#looks tbody tr").first).to_contain_text(f"{row[best]:.3f}")
    assert len(drawn) == 4  # and none is another's
    page.get_by_text("As a table").click()
    expect(page.locator("#map-table tbody tr")).to_have_count(len(row))
    cells = page.locator("#map-table tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.querySelectorAll('td')].map(c => Number(c.textContent)))"
    )
    for index, weights in enumerate(cells):
        assert sum(weights) == pytest.approx(1, abs=0.0005 * len(row)) and not any(
            weights[index + 1 :]
        )


def test_tabs_and_sliders_work_by_keyboard(page: Page, open_url: str) -> None:
    ask(page)
    page.locator("#tab-attention").focus()
    for name in ("Stages", "Time", "Checkpoints", "Attention", "Stages"):
        page.keyboard.press("ArrowRight")
        tab = page.get_by_role("tab", name=name)
        expect(tab).to_be_focused()
        expect(tab).to_have_attribute("aria-selected", "true")
        expect(page.locator(f"#{tab.get_attribute('aria-controls')}")).to_be_visible()
        expect(page.locator("[id^=view-]:visible")).to_have_count(1)
    stages = page.locator("#stage-table tbody tr")
    expect(stages.filter(has_text="layer 1: attention")).to_contain_text(
        re.compile(r"\[1, 2, (\d+), \1\]")
    )
    expect(stages.filter(has_text="logits")).to_contain_text(re.compile(r"\[1, \d+, 300\]"))
    page.keyboard.press("End")
    page.locator("#step").focus()
    texts = []
    for key, step in (("End", 7), ("ArrowLeft", 3)):
        page.keyboard.press(key)
        answer = expected_text(open_url, step=step)
        shown = "".join(SIGNED.sub(sign, t["text"]) or "∅" for t in answer["tokens"])
        expect(page.locator("#step-name")).to_have_text(str(step))
        expect(page.locator("#step-text")).to_have_text(shown, use_inner_text=False)
        texts.append(answer["text"])
    assert texts[0] != texts[1]


def test_the_times_add_up_to_the_whole(page: Page) -> None:
    ask(page)
    page.locator("#tab-time").click()
    rows = page.locator("#gantt tbody tr")
    names = rows.locator("th").all_inner_texts()
    assert names == [
        "queue",
        "tokenize",
        "prefill",
        "sample",
        "decode",
        "detokenize",
        "inspect",
        "network",
    ]
    times_ms = [float(text) for text in rows.locator("td:nth-child(3)").all_inner_texts()]
    whole = re.search(r"whole ([\d.]+) ms", page.locator("#gantt-sum").inner_text())
    assert whole is not None and sum(times_ms) == pytest.approx(float(whole[1]), rel=0.05)
    # One a token where there is one a token
    assert rows.locator("svg .bar").count() >= 7 + 11 + 12 - 1
    expect(page.locator("#streamed")).to_contain_text("first token after")


def test_all_can_be_read_and_named(page: Page) -> None:
    ask(page)
    for tab in ("attention", "stages", "time", "steps"):
        page.locator(f"#tab-{tab}").click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.mouse.move(0, 0)
        page.wait_for_timeout(200)  # the tab's own transition
        assert page.evaluate(FAINT_TEXT) == []
    for control in page.locator("input:visible, textarea:visible, button:visible").all():
        assert control.evaluate("n => n.labels?.length || n.textContent.trim()"), control


def test_an_error_is_shown_and_the_next_try_works(watched: Watched) -> None:
    page = watched.page
    page.locator("#max-tokens").fill("400")  # more than the model's context
    page.locator("#run").click()
    expect(page.get_by_role("alert")).to_contain_text("maximum context length is 128 tokens")
    assert "400" in watched.problems.pop()  # Chromium's own note of it
    page.locator("#max-tokens").fill("12")
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#inside")).to_be_visible()
    expect(page.locator("#error")).to_be_empty()


def test_a_key_is_asked_for_and_kept_nowhere(
    browser: Browser,
    endpoints: Endpoints,
    open_url: str,
    open_config: ServeConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    key_file = tmp_path_factory.mktemp("keys") / "keys"
    key_file.write_text(f"{KEY}\n")
    url = endpoints.replaced(open_config.model_copy(update={"api_key_file": str(key_file)}))["url"]
    page = browser.new_context(viewport=DESKTOP).new_page()
    page.goto(f"{url}/inside")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("sk-wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("does not know that key")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    ask(page)
    expect(page.locator("#tokens [role=option]").first).to_be_visible()
    assert KEY not in page.content() and page.context.cookies() == []
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0
    page.reload()
    expect(page.get_by_label("API key")).to_be_focused()
    page.context.close()
