"""Draws the page of a query with the documents from which its model learned the answer."""

import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from cluster.local.local_cluster import free_port
from cluster.settings.serve import ServeConfig
from jobs.run.checkpoints import RunCheckpoints
from serving.app import run
from tests.jobs.planted_runs import BEGUN, learned_by_heart

_KEY = "sk-picture"


def picture_of_trace(*, chromium: str, width: int) -> bytes:
    """Returns a PNG of an answer that a small model has learned by heart, on a Ray that runs."""
    with tempfile.TemporaryDirectory(prefix="raymill-") as folder:
        plan = learned_by_heart(Path(folder))
        keys = Path(folder, "keys")
        keys.write_text(f"{_KEY} may=trace\n")
        newest = RunCheckpoints(plan.run).names[-1]
        config = ServeConfig(
            checkpoint=f"{plan.run.uri}/checkpoints/{newest}",
            model_name="tiny",
            port=free_port(),
            api_key_file=str(keys),
            trace=plan.tokens_uri,
            storage=plan.config.storage,
        )
        url = run(config)["url"]
        with sync_playwright() as playwright:
            # Debian's sandbox needs a user namespace, which a container's root has not.
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": width, "height": 700})
            page.goto(url)
            page.get_by_label("API key").fill(_KEY)
            page.keyboard.press("Enter")
            expect(page.locator("#model")).to_contain_text("step")
            page.locator("#prompt").fill(BEGUN)
            page.get_by_label("Temperature").fill("0")
            page.locator("#run").click()
            page.locator("#trace-switch").click(timeout=120_000)
            page.locator("#trace-text button").first.click(timeout=120_000)
            page.locator("#trace-detail summary").first.click()
            page.locator("#trace").scroll_into_view_if_needed()
            page.evaluate("document.getElementById('trace').scrollIntoView()")
            picture = page.screenshot()
            browser.close()
    return picture
