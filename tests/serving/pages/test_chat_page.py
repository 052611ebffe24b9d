"""The page to talk to the model, in a real Chromium on a real replica: a conversation, where it is
kept, and what goes wrong."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from serving.api.access import AccessRules
from serving.api.keys import ApiKey
from tests.chromium import Watched, needs_chromium
from tests.serving.endpoint_parts import metric
from tests.serving.page_parts import (
    CONTEXT_TOKENS,
    DESKTOP,
    ServedPages,
    answers,
    expect_answers,
    say,
    served_pages,
    set_settings,
    stored,
)
from tests.waiting import wait_until

pytestmark = needs_chromium

KEY = "sk-chat-page"
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&amp;"
# The text of the answers alone, as the document has it
SAID = "nodes => nodes.map(node => node.textContent)"


def chatted(http: httpx.Client, messages: list[dict[str, str]], **fields: Any) -> str:
    asked = {"model": "tiny", "messages": messages, "temperature": 0, "seed": 5} | fields
    answer = http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_conversation_goes_on_is_kept_and_is_stopped(page: Page, http: httpx.Client) -> None:
    set_settings(page, max_tokens=12)
    page.get_by_label("System message").fill("be brief")
    say(page, EVIL)
    expect_answers(page, 1)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": EVIL}]
    first = chatted(http, messages, max_completion_tokens=12)
    said = page.locator(".said")
    assert said.evaluate_all(SAID) == [EVIL, first]
    card = http.get("/v1/models").json()["data"][0]
    expect(answers(page)).to_contain_text(f"version {card['version']}, step 7 · 12 tokens · seed 5")

    say(page, "fox")
    expect_answers(page, 2)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "fox"}]
    second = chatted(http, messages, max_completion_tokens=12)
    assert said.evaluate_all(SAID) == [EVIL, first, "fox", second]

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy the answer of tiny to turn 1").click()
    expect(page.get_by_text("Copied", exact=True)).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == first

    page.reload()
    expect_answers(page, 2)
    assert said.evaluate_all(SAID) == [EVIL, first, "fox", second]
    assert page.title() == "raymill chat", "what was written is no HTML"

    before = metric(http, "vllm:generation_tokens_total")
    set_settings(page, max_tokens=None)
    say(page, "tea")
    expect(answers(page)).to_have_count(3)
    wait_until(lambda: metric(http, "vllm:generation_tokens_total") > before + 20)
    page.keyboard.press("Escape")
    expect(answers(page).nth(2)).to_contain_text("stopped")
    wait_until(lambda: metric(http, "vllm:num_requests_running") == 0)
    generated = metric(http, "vllm:generation_tokens_total") - before
    assert 20 < generated < CONTEXT_TOKENS / 2, "the endpoint has ended the request too"
    expect(page.locator("#chat-message")).to_be_focused()
    [conversation] = stored(page)
    endings = [turn["answers"][0]["ending"] for turn in conversation["turns"]]
    assert endings == ["length", "length", "stopped"]


@pytest.mark.slow
def test_what_models_write_is_text_too(page: Page) -> None:
    """Whatever the endpoint sends: here a stream that says what a model hardly says by chance."""
    event = {"system_fingerprint": "v", "choices": [{"delta": {"content": EVIL}, "index": 0}]}
    event["choices"][0]["finish_reason"] = "stop"  # type: ignore[index]
    body = f"data: {httpx.Response(200, json=event).text}\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )
    say(page, "fox")
    expect_answers(page, 1)
    assert page.locator(".answer .said").evaluate_all(SAID) == [EVIL]
    assert page.title() == "raymill chat" and page.locator("#chat-log img").count() == 0


@pytest.mark.slow
def test_earlier_conversations_are_listed_opened_and_deleted(page: Page) -> None:
    set_settings(page, max_tokens=3)
    for text in ("the first one", "the second one"):
        page.get_by_role("button", name="New conversation").click()
        say(page, text)
        expect_answers(page, 1)
    links = page.get_by_role("navigation", name="Conversations").get_by_role("link")
    assert links.all_inner_texts() == ["the second one", "the first one"]
    expect(links.nth(0)).to_have_attribute("aria-current", "page")
    links.nth(1).click()
    expect(page.get_by_role("heading", level=2)).to_have_text("the first one")
    expect(page.locator(".asked .said")).to_have_text("the first one")
    assert {c["settings"]["maxTokens"] for c in stored(page)} == {3}

    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Delete the first one").click()
    assert len(stored(page)) == 2
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete the first one").click()
    expect(page.get_by_role("heading", level=2)).to_have_text("New conversation")
    assert [c["turns"][0]["text"] for c in stored(page)] == ["the second one"]
    page.reload()
    assert links.all_inner_texts() == ["the second one"]


@pytest.mark.slow
def test_a_conversation_that_ends_with_its_page_is_said_to_be_interrupted(page: Page) -> None:
    set_settings(page, max_tokens=None)
    say(page, "tea")
    expect(page.locator('.answer[aria-busy="true"]')).to_have_count(1)
    page.reload()
    expect(answers(page)).to_contain_text("interrupted when the page was closed")
    set_settings(page, max_tokens=4)
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_contain_text("4 tokens")


@pytest.mark.slow
def test_errors_are_the_endpoints_own_sentences_and_can_be_tried_again(watched: Watched) -> None:
    page = watched.page
    set_settings(page, max_tokens=2 * CONTEXT_TOKENS)
    say(page, "fox")
    answer = answers(page)
    expect(answer.locator(".wrong")).to_contain_text(
        f"This model's maximum context length is {CONTEXT_TOKENS} tokens"
    )
    assert "400" in watched.problems.pop()  # Chromium's own note of it
    page.context.set_offline(True)
    page.get_by_role("button", name="Try again").click()
    expect(answer.locator(".wrong")).to_contain_text("The connection to the endpoint is gone")
    page.context.set_offline(False)
    watched.problems.clear()
    set_settings(page, max_tokens=4)
    page.get_by_role("button", name="Try again").click()
    expect(answer).to_contain_text("4 tokens")
    expect(answer.locator(".wrong")).to_have_count(0)


@pytest.mark.slow
def test_what_got_no_answer_is_no_part_of_what_is_sent_later(watched: Watched) -> None:
    page = watched.page
    set_settings(page, max_tokens=2 * CONTEXT_TOKENS)
    say(page, "unheard")
    expect(answers(page).locator(".wrong")).to_have_count(1)
    watched.problems.clear()
    set_settings(page, max_tokens=4)
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "heard")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "heard"}]
    expect_answers(page, 2)


@pytest.mark.more
@pytest.mark.parametrize(
    ("path", "field", "model"),
    [("/", "#chat-beside", "#chat-model"), ("/inside", "#temperature", "#model")],
)
def test_who_has_moved_on_before_the_page_is_ready_keeps_their_place(
    browser: Browser, pages: ServedPages, path: str, field: str, model: str
) -> None:
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()

    def answered_later(route: Route) -> None:
        page.locator(field).focus()
        route.continue_()

    page.route("**/v1/models", answered_later)
    page.goto(f"{pages.url}{path}")
    expect(page.locator(model)).to_contain_text("tiny")
    expect(page.locator(field)).to_be_focused()
    context.close()


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_nowhere(browser: Browser, pages: ServedPages) -> None:
    [live] = pages.versions.delivery.needed
    rules = AccessRules((ApiKey.read(KEY),), ())
    with served_pages(Path(live.checkpoint), access=rules) as closed:
        context = browser.new_context(viewport=DESKTOP)
        page = context.new_page()
        page.goto(closed.url)
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("sk-wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#chat-key-error")).to_contain_text("See whether you have copied all")
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#chat-message")).to_be_focused()
        set_settings(page, max_tokens=4)
        say(page, "fox")
        expect_answers(page, 1)
        page.get_by_role("link", name="Look inside").click()
        expect(page.locator("#inside")).to_be_visible()  # the key came along
        assert KEY not in page.content() and context.cookies() == []
        stores = "JSON.stringify([Object.values(localStorage), Object.values(sessionStorage)])"
        assert KEY not in page.evaluate(stores)
        page.reload()
        expect(page.get_by_label("API key")).to_be_focused()
        context.close()
