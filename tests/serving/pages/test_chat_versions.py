"""The page to talk to the model: the inside of an answer and the way back, two versions side by
side during a canary, and models that were never taught to chat."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from model.text.tokenizer import Tokenizer
from serving.delivery.promotion import Delivery, Phase, Terms
from tests.chromium import Watched, needs_chromium
from tests.serving.delivery_parts import served, version
from tests.serving.page_parts import (
    DESKTOP,
    ServedPages,
    answers,
    chat_checkpoint,
    expect_answers,
    say,
    served_pages,
    set_settings,
    stored,
)
from tests.waiting import wait_in_loop_until

pytestmark = [pytest.mark.slow, needs_chromium]


def test_the_inside_of_an_answer_is_of_that_answer_and_leads_back(
    page: Page, http: httpx.Client
) -> None:
    set_settings(page, max_tokens=10, temperature=0.9, seed=11)
    for count, text in enumerate(("fox", "dog"), start=1):
        say(page, text)
        expect_answers(page, count)
    before = page.locator(".said").all_text_contents()
    answer = stored(page)[0]["turns"][1]["answers"][0]
    answers(page).nth(1).get_by_role("link", name="Look inside").click()
    expect(page.locator("#chat-inside-same")).to_contain_text("These are the tokens of the answer")
    expect(page.locator("#inside")).to_be_visible()
    tokens = page.get_by_role("listbox", name="Tokens").get_by_role("option")
    expect(tokens).to_have_count(len(answer["promptIds"]) + len(answer["tokenIds"]))
    expect(page.locator("#prompt")).to_be_hidden()
    asked = {"model": "tiny", "prompt": answer["promptIds"], "seed": 11, "temperature": 0.9}
    xray = http.post("/v1/xray", json=asked | {"max_tokens": 10}).json()
    assert [t["id"] for t in xray["tokens"]] == answer["promptIds"] + answer["tokenIds"]
    shades = tokens.evaluate_all("nodes => nodes.map(n => Number(n.style.getPropertyValue('--p')))")
    assert shades == pytest.approx([t["probability"] or 0 for t in xray["tokens"]], abs=1e-4)
    page.locator("#layers [role=tab]").nth(1).click()
    expect(page.locator("#map")).to_have_attribute("data-shows", "1/0")

    page.go_back()
    expect(page.locator("#chat-room")).to_be_visible()
    expect(page.locator("#chat-inside")).to_be_hidden()
    assert page.locator(".said").all_text_contents() == before
    expect(answers(page).nth(1).get_by_role("link", name="Look inside")).to_be_focused()
    page.go_forward()
    expect(page.locator("#inside")).to_be_visible()
    page.reload()  # the address names the answer
    expect(page.locator("#chat-inside-same")).to_contain_text("These are the tokens of the answer")
    page.get_by_role("link", name="Back to the conversation").click()
    assert page.locator(".said").all_text_contents() == before


def test_an_old_address_of_the_x_ray_page_still_opens_it(page: Page, pages: ServedPages) -> None:
    page.goto(f"{pages.url}/?from=before#here")
    expect(page.locator("#prompt")).to_be_focused()
    assert page.url == f"{pages.url}/inside?from=before#here"


@pytest.fixture
def canary(
    pages: ServedPages, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Both versions' names, while none of the clients gets the new one by its turn."""
    new = chat_checkpoint(tmp_path_factory.mktemp("new") / "step-8", tokenizer, seed=2, step=8)
    before = pages.versions.delivery
    changes = {"phase": Phase.CANARY, "candidate": served(new, 2), "last_serial": 2, "epoch": 2}
    terms = Terms(watch_s=1000, canary_percent=0.0)

    async def adopt(state: Delivery, serials: set[int]) -> None:
        pages.versions.adopt(state, asked_at_s=1e12)
        await wait_in_loop_until(
            lambda: all(pages.versions.report()[s].status == "ready" for s in serials)
        )

    pages.run(adopt(before.having(terms=terms, **changes), {0, 2}))
    yield before.live.version, version(new)
    pages.run(adopt(before.having(epoch=3), {0}))


def test_two_versions_answer_the_same_conversation_side_by_side(
    canary: tuple[str, str], page: Page, http: httpx.Client
) -> None:
    old, new = canary
    page.reload()
    names = {"Answered by": f"tiny@{old}", "Beside it": f"tiny@{new}"}
    for label, name in names.items():
        page.get_by_label(label).select_option(name)
    expect(page.get_by_label("Beside it").locator("option:checked")).to_have_text(
        "tiny: canary, step 8"
    )
    set_settings(page, max_tokens=8)
    for text in ("fox", "dog"):
        say(page, text)
        expect_answers(page, 2 if text == "fox" else 4)
    turns = stored(page)[0]["turns"]
    for column, wanted in enumerate((old, new)):
        texts = [turn["answers"][column]["text"] for turn in turns]
        assert {turn["answers"][column]["version"] for turn in turns} == {wanted}
        messages = [
            {"role": "user", "content": "fox"},
            {"role": "assistant", "content": texts[0]},
            {"role": "user", "content": "dog"},
        ]
        asked = {"model": f"tiny@{wanted}", "messages": messages, "temperature": 0}
        answer = http.post("/v1/chat/completions", json=asked | {"max_tokens": 8})
        assert answer.headers["x-model-version"] == wanted
        assert answer.json()["choices"][0]["message"]["content"] == texts[1]
    assert turns[0]["answers"][0]["text"] != turns[0]["answers"][1]["text"]
    boxes = [answers(page).nth(index).bounding_box() for index in range(2)]
    assert boxes[0] and boxes[1] and boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]

    answers(page).nth(3).get_by_role("link", name="Look inside").click()
    expect(page.locator("#chat-inside-same")).to_contain_text("These are the tokens of the answer")
    expect(page.locator("#inside")).to_be_visible()


def test_a_version_that_is_gone_is_named_in_its_column_alone(
    page: Page, watched: Watched, pages: ServedPages
) -> None:
    gone = f"tiny@{'0' * 16}"
    page.evaluate(
        """([model]) => {
          const list = document.getElementById("chat-beside");
          list.append(new Option(model, model, true, true));
        }""",
        [gone],
    )
    set_settings(page, max_tokens=4)
    say(page, "fox")
    expect_answers(page, 2)
    expect(answers(page).nth(0)).to_contain_text("4 tokens")
    live = pages.versions.delivery.live.version
    expect(answers(page).nth(1).locator(".wrong")).to_have_text(
        f"The version '{'0' * 16}' answers no requests here now; these do: {live}."
    )
    assert "404" in watched.problems.pop()


def test_a_model_that_is_not_chat_tuned_continues_text_instead(
    browser: Browser, checkpoint: Path
) -> None:
    with served_pages(checkpoint) as base:
        context = browser.new_context(viewport=DESKTOP)
        watched = Watched(context.new_page(), base.url)
        page = watched.page
        page.goto(base.url)
        expect(page.locator("#chat-note")).to_contain_text("is not chat-tuned")
        set_settings(page, max_tokens=6)
        expect(page.get_by_label("System message")).to_be_hidden()
        expect(page.get_by_label("Text to continue")).to_be_visible()
        say(page, "the quick ")
        expect_answers(page, 1)
        page.get_by_label("Text to continue").fill(" and ")
        page.get_by_role("button", name="Continue").click()
        expect_answers(page, 2)
        texts = [turn["answers"][0]["text"] for turn in stored(page)[0]["turns"]]
        with httpx.Client(base_url=base.url, timeout=60) as http:
            for prompt, text in zip(
                ("the quick ", f"the quick {texts[0]} and "), texts, strict=True
            ):
                asked = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0}
                answer = http.post("/v1/completions", json=asked)
                assert answer.json()["choices"][0]["text"] == text, json.dumps(asked)
        page.get_by_role("link", name="Look inside").first.click()
        expect(page.locator("#chat-inside-same")).to_contain_text("These are the tokens")
        assert watched.problems == []
        context.close()
