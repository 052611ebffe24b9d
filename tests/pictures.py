"""The READMEs' pictures, of a finished run and of the endpoint that serves it: `make pictures` after `make demo`.

    python -m tests.pictures [RUN_FOLDER]

RUN_FOLDER is the newest demo's when left out. Each picture is small: cut to what it shows, in 64 colours.
"""

import io
import re
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cluster.serve_config import ServeConfig
from serving.app import run
from tests.serving.endpoint_parts import free_port, ray_cluster

REPOSITORY = Path(__file__).resolve().parents[1]
REPORT, XRAY = REPOSITORY / "jobs" / "report.png", REPOSITORY / "serving" / "xray.png"
WIDTH = 1000  # of the pages, in pixels
NUM_COLOURS = 64


def main() -> int:
    demos = sorted((REPOSITORY / ".raymill" / "runs").glob("demo-*"))
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else demos[-1] if demos else None
    if folder is None or not (folder / "report" / "index.html").exists():
        print("no finished run with a report; `make demo` makes one", file=sys.stderr)
        return 1
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("no Chromium; apt-get install chromium", file=sys.stderr)
        return 1
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    with sync_playwright() as playwright, ray_cluster():
        # Debian's sandbox needs a user namespace, which a container's root has not.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        picture_report(browser, folder / "report" / "index.html")
        picture_xray(browser, run(ServeConfig(checkpoint=str(checkpoint), port=free_port()))["url"])
        browser.close()
    return 0


def picture_report(browser: Browser, path: Path) -> None:
    page = browser.new_page(viewport={"width": WIDTH, "height": 1100})
    page.goto(path.as_uri())
    save(page, REPORT)


def picture_xray(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={"width": WIDTH, "height": 1150})
    page.goto(url)
    page.locator("#prompt").fill("To be, or not to be,")
    page.locator("#seed").fill("5")
    page.locator("#run").click()
    expect(page.locator("#status")).to_have_text(re.compile(r"^24 tokens, seed 5$"), timeout=60_000)
    page.get_by_role("listbox", name="Tokens").get_by_role("option").nth(8).click()
    save(page, XRAY)


def save(page: Page, path: Path) -> None:
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(NUM_COLOURS)
    image.save(path, optimize=True)
    print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
