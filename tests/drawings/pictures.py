"""Makes the documents' pictures: the processes, a finished run, the pages of its endpoint, where an
answer was learned, the dashboard of a canary, the memory of a worker and of an endpoint.
`make pictures` runs it.

    python -m tests.drawings.pictures [RUN_FOLDER]

RUN_FOLDER is the newest demo's if left out; `make demo` makes one. The PNGs are small: 1000 pixels
wide, in 64 colors.
"""

import io
import re
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from cluster.local.local_cluster import free_port
from cluster.settings.serve import ServeConfig
from serving.app import run
from tests.benchmarks.bench_attempt_memory import picture_of_memory
from tests.benchmarks.bench_serving_memory import picture_of_serving_memory
from tests.drawings.canary_picture import picture_of_canary
from tests.drawings.processes_picture import PICTURE, draw
from tests.drawings.trace_picture import picture_of_trace
from tests.repository import REPOSITORY
from tests.serving.endpoint_parts import ray_cluster
from tests.serving.page_parts import say, set_settings

IMAGES = REPOSITORY / "docs" / "images"
FIGURES = ("loss", "waterfall")  # of the run's report
WIDTH = 1000
NUM_COLORS = 64


def main() -> int:
    PICTURE.write_text(draw(), encoding="utf-8")
    demos = sorted((REPOSITORY / ".raymill" / "runs").glob("demo-*"))
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else demos[-1] if demos else None
    if folder is None or not all((folder / "report" / f"{name}.png").exists() for name in FIGURES):
        print("no finished run with a report; `make demo` makes one", file=sys.stderr)
        return 1
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("no Chromium; apt-get install chromium", file=sys.stderr)
        return 1
    if shutil.which("prometheus") is None:
        print("no Prometheus; apt-get install prometheus", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        save(picture_of_canary(Path(scratch)), IMAGES / "canary.png")
    save(picture_of_memory(), IMAGES / "worker-memory.png")
    save(picture_of_serving_memory(), IMAGES / "endpoint-memory.png")
    for name in FIGURES:
        save((folder / "report" / f"{name}.png").read_bytes(), IMAGES / f"{name}.png")
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    with ray_cluster():
        url = run(ServeConfig(checkpoint=str(checkpoint), port=free_port()))["url"]
        save(picture_of_xray(url, chromium=chromium), IMAGES / "xray.png")
        save(picture_of_chat(url, chromium=chromium), IMAGES / "chat.png")
    with ray_cluster():
        save(picture_of_trace(chromium=chromium, width=WIDTH), IMAGES / "trace.png")
    return 0


def picture_of_chat(url: str, *, chromium: str) -> bytes:
    """The page to talk to the model, which here continues a text twice."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.goto(url)
        set_settings(page, max_tokens=20, temperature=0.8, seed=3)
        page.locator("#chat-settings summary").click()
        for count, text in enumerate(("ROMEO. But soft, what light", " JULIET. "), start=1):
            say(page, text)
            expect(page.locator('.answer[aria-busy="false"]')).to_have_count(count, timeout=60_000)
        picture = page.screenshot()
        browser.close()
    return picture


def picture_of_xray(url: str, *, chromium: str) -> bytes:
    with sync_playwright() as playwright:
        # Debian's sandbox needs a user namespace, which a container's root has not.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1150})
        page.goto(f"{url}/inside")
        page.locator("#prompt").fill("To be, or not to be,")
        page.locator("#seed").fill("5")
        page.locator("#run").click()
        expect(page.locator("#status")).to_have_text(
            re.compile(r"^24 tokens, seed 5$"), timeout=60_000
        )
        page.get_by_role("listbox", name="Tokens").get_by_role("option").nth(8).click()
        picture = page.screenshot()
        browser.close()
    return picture


def save(picture: bytes, path: Path) -> None:
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image = image.resize(
        (WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS
    )
    image.quantize(NUM_COLORS).save(path, optimize=True)
    print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
