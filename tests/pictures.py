"""Makes the README's pictures from what `make demo` left in .raymill: the run's report, and the page of an endpoint.

python -m tests.pictures, which needs a Chromium. Two small files; look at them before they are committed.
"""

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from cluster.local import free_port
from cluster.registry import publications
from cluster.storage import open_storage

STORAGE = Path(".raymill")
REPORT, XRAY = Path("jobs/pictures/report.png"), Path("serving/pictures/xray.png")
COLORS = 64  # of a picture's palette
WIDTH, HEIGHT = 1040, 1000  # pixels of the window


def main() -> int:
    published = publications(open_storage(str(STORAGE)))
    if not published or not published[-1].run_id.startswith("demo-"):
        sys.exit("error: the demo is not the last that was published here: run `make demo` first")
    with window() as page:
        page.goto((STORAGE / "runs" / published[-1].run_id / "report" / "index.html").absolute().as_uri())
        keep(page.locator("img").first.screenshot(), REPORT)
        with endpoint() as url:
            page.goto(url)
            page.locator("#seed").fill("7")
            page.locator("#run").click()
            expect(page.locator("#status")).to_contain_text("tokens, seed 7", timeout=60_000)
            keep(page.screenshot(full_page=True), XRAY)
    return 0


@contextmanager
def window() -> Iterator[Page]:
    with sync_playwright() as playwright:
        # Debian's sandbox needs a user namespace, which a container's root has not.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        browser.close()


@contextmanager
def endpoint() -> Iterator[str]:
    """The demo's model, until the context ends."""
    command = [sys.executable, "-m", "cluster.cli", "serve", "latest", "--port", str(free_port()), "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None, "it is a pipe"
    try:
        yield json.loads(server.stdout.readline())["url"]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def keep(png: bytes, path: Path) -> None:
    """With a palette, as a third of the bytes."""
    path.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLORS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    sys.exit(main())
