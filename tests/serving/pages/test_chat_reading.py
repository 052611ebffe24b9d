"""The page to talk to the model for everybody: by keyboard alone, through a screen reader, in the
dark, on a small screen, and without motion."""

from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.chromium import FAINT_TEXT, Watched, needs_chromium
from tests.serving.page_parts import (
    PHONE,
    ServedPages,
    answers,
    expect_answers,
    say,
    set_settings,
    stored,
)

pytestmark = [pytest.mark.slow, needs_chromium]

# What a finger has to hit is at least 24 pixels wide and high (WCAG 2.5.8); of the inside's rows of
# tokens and of its pickers only what stands alone counts
SMALL_TARGETS = """[...document.querySelectorAll("button, select, a, input, textarea, summary")]
  .map(node => [node.textContent.trim() || node.id, node.getBoundingClientRect()])
  .filter(([_, {width, height}]) => width && (width < 24 || height < 24)).map(([name]) => name)"""
NUM_TITLE_LINES = """(() => {
  const link = document.querySelector("#chat-list a");
  return Math.round(link.getBoundingClientRect().height / parseFloat(getComputedStyle(link).lineHeight));
})()"""

FOCUSED = """() => {
  const node = document.activeElement;
  const style = getComputedStyle(node);
  const name = node.getAttribute("aria-label") ?? node.labels?.[0]?.firstChild.data.trim() ?? node.textContent.trim();
  return [name, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
}"""


def focus_order(page: Page, count: int) -> list[str]:
    """The names of what the next presses of Tab reach; each shows that it has the focus."""
    names = []
    for _ in range(count):
        page.keyboard.press("Tab")
        name, is_visible = page.evaluate(FOCUSED)
        assert is_visible, name
        names.append(name)
    return names


def tree_of(page: Page) -> list[tuple[str, str, dict[str, Any]]]:
    """Role, name and properties of all that a screen reader is told."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    return [
        (
            node["role"]["value"],
            node.get("name", {}).get("value", "").strip(),
            {p["name"]: p["value"].get("value") for p in node.get("properties", [])},
        )
        for node in nodes
        if not node["ignored"]
    ]


def animation_of_caret(page: Page) -> str:
    """The name of what moves at the end of an answer that grows."""
    name = """() => {
      const said = document.querySelector('.answer[aria-busy="true"] .said');
      return said && getComputedStyle(said, "::after").animationName;
    }"""
    return str(page.wait_for_function(name).json_value())


def test_all_works_by_keyboard_alone(page: Page) -> None:
    page.locator("#chat-skip").focus()
    assert page.evaluate(FOCUSED) == ["Skip to the message", True]
    assert focus_order(page, 2) == ["Inside of a query", "New conversation"]
    page.keyboard.press("Enter")
    expect(page.locator("#chat-message")).to_be_focused()
    assert focus_order(page, 4) == ["Send", "Answered by", "Beside it", "Settings"]
    page.keyboard.press("Enter")  # opens the settings
    assert focus_order(page, 2) == ["Temperature", "Most tokens"]
    page.keyboard.type("6")
    assert focus_order(page, 2) == ["Seed", "System message"]
    page.locator("#chat-message").focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect_answers(page, 1)
    assert stored(page)[0]["turns"][0]["text"] == "one\ntwo"
    expect(page.locator("#chat-message")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(FOCUSED)[0].startswith("Look inside the answer of tiny")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Inside of an answer")).to_be_focused()
    expect(page.locator("#inside")).to_be_visible()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(FOCUSED) == ["Back to the conversation", True]
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="Look inside")).to_be_focused()


def test_a_screen_reader_is_told_names_roles_and_whole_sentences(page: Page) -> None:
    set_settings(page, max_tokens=60)
    page.evaluate(
        """() => {
          window.told = [];
          const region = document.getElementById("chat-announcer");
          new MutationObserver(() => window.told.push(region.textContent)).observe(region, {childList: true});
        }"""
    )
    say(page, "fox")
    expect_answers(page, 1)
    told = page.evaluate("window.told")
    assert 1 <= len(told) < 10, "60 tokens are not 60 announcements"
    assert told[-1].endswith("ended at the limit of tokens")
    tree = tree_of(page)
    names = {(role, name) for role, name, _ in tree}
    assert {
        ("navigation", "Conversations"),
        ("main", ""),
        ("heading", "raymill chat"),
        ("log", "fox"),
        ("form", "Your turn"),
        ("textbox", "Message"),
        ("button", "Send"),
        ("button", "Stop"),
        ("combobox", "Answered by"),
        ("combobox", "Beside it"),
        ("spinbutton", "Temperature"),
        ("spinbutton", "Most tokens"),
        ("spinbutton", "Seed"),
        ("textbox", "System message"),
        ("button", "Delete fox"),
        ("region", "You"),
        ("region", "Answer of tiny"),
        ("link", "Look inside the answer of tiny to turn 1"),
    } <= names, sorted(names)
    # A log would be polite by itself, and read each token
    live = {role: told.get("live") for role, _, told in tree if role in {"log", "status"}}
    assert live == {"log": None, "status": "polite"}
    nameless = [
        role for role, name, _ in tree if role in {"button", "link", "textbox"} and not name
    ]
    assert nameless == []


def test_it_fits_a_small_screen_in_the_dark_and_without_motion(
    browser: Browser, pages: ServedPages
) -> None:
    context = browser.new_context(viewport=PHONE, color_scheme="dark", reduced_motion="reduce")
    watched = Watched(context.new_page(), pages.url)
    page = watched.page
    page.goto(pages.url)
    set_settings(page, max_tokens=None)
    say(page, "two words of a title " * 10)
    assert animation_of_caret(page) == "none"
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Copy the answer of tiny to turn 1")).to_be_visible()
    assert page.evaluate(NUM_TITLE_LINES) <= 2
    for place in ("", "Look inside"):
        if place:
            page.get_by_role("link", name=place).click()
            expect(page.locator("#chat-inside-same")).not_to_be_empty()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate(SMALL_TARGETS) == []
        assert page.evaluate(FAINT_TEXT) == []
    watched.problems.clear()  # a long answer has no x-ray
    context.close()


def test_the_caret_blinks_where_motion_is_welcome_and_light_text_can_be_read(page: Page) -> None:
    set_settings(page, max_tokens=None)
    say(page, "fox")
    assert animation_of_caret(page) == "blink"
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("stopped")
    assert page.evaluate(FAINT_TEXT) == []
