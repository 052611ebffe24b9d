"""Writes the pages of docs/reference, and what to read first into READMEs: `python -m tests.reference.make_reference`, or `make
reference`."""

from collections.abc import Callable
from pathlib import Path

from tests.reference import (
    commands_page,
    errors_page,
    http_page,
    ledger_page,
    metrics_page,
    read_first,
    settings_page,
)
from tests.repository import REPOSITORY

FOLDER = REPOSITORY / "docs" / "reference"
PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings_page.page,
    "commands.md": commands_page.page,
    "http.md": http_page.page,
    "errors.md": errors_page.page,
    "metrics.md": metrics_page.page,
    "ledger.md": ledger_page.page,
}


def written() -> dict[str, Path]:
    """Returns the pages that are there, by name."""
    return {path.name: path for path in FOLDER.glob("*.md") if path.name != "index.md"}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in written().keys() - PAGES.keys():
        (FOLDER / name).unlink()
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page().rstrip() + "\n", encoding="utf-8")
        print(f"docs/reference/{name}")
    for folder in read_first.folders():
        text = read_first.with_list(folder)
        read_first.readme(folder).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
