"""A real Chromium for the tests of pages, where this machine has one."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.time_limits import limit_s

_CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

needs_chromium = pytest.mark.skipif(
    _CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)

# Lines of text whose contrast with what lies behind them is below 4.5, WCAG's bound.
FAINT_TEXT = """() => {
  const parse = (color) => {
    const numbers = color.match(/[-.\\d]+/g).map(Number);
    const scale = color.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map((n) => n * scale), numbers[3] ?? 1];
  };
  const luminance = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const part = rgb[i] / 255;
    return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (node) => {
    if (!node) return [255, 255, 255];
    const [r, g, b, alpha] = parse(getComputedStyle(node).backgroundColor);
    return alpha === 1 ? [r, g, b] : behind(node.parentElement).map((n, i) => n * (1 - alpha) + [r, g, b][i] * alpha);
  };
  const faint = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text || !node.checkVisibility() || node.disabled) continue;
    const [a, b] = [luminance(parse(getComputedStyle(node).color)), luminance(behind(node))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) faint.push(`${text.slice(0, 20)}: ${contrast.toFixed(2)}`);
  }
  return faint;
}"""


@contextmanager
def running_chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Debian's sandbox needs a user namespace, which a container's root has not.
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page, and all that went wrong on it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.problems: list[str] = []
        page.set_default_timeout(1e3 * limit_s(20))
        expect.set_options(timeout=1e3 * limit_s(20))
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith((url, "data:")) else self.problems.append(r.url),
        )

    def _heard(self, message: ConsoleMessage) -> None:
        """Keeps errors and warnings; the browser reports each answer 429, which the page repeats
        until it has another."""
        if message.type in {"error", "warning"} and "429 (Too Many Requests)" not in message.text:
            self.problems.append(message.text)
