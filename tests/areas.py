"""Runs one area of the tests after another, and writes the seconds of each into tests/README.md:
`make areas`.

    python -m tests.areas [AREA ...]

An area is a folder of tests that mirrors a folder of the code, such as `jobs/exact`. Its dearer tests
belong to `make test-more` and `make test-all`.
"""

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from model.hardware.processor import cpu_field
from tests.repository import REPOSITORY

README = REPOSITORY / "tests" / "README.md"
BEGIN, END = "<!-- areas: begin -->", "<!-- areas: end -->"
_ROW = re.compile(r"^\| `([\w/]+)` \|.*$", re.MULTILINE)
_HEAD = "| area | tests | seconds | CPU-seconds | measured |\n| --- | --- | --- | --- | --- |"
_SUMMARY = re.compile(r"(\d+) passed")


def areas() -> list[str]:
    """Returns the areas, in the order of the code's floors."""
    tests = REPOSITORY / "tests"
    names = ["raymill", "model"]
    for folder in ("cluster", "jobs", "serving"):
        rooms = [path.name for path in (REPOSITORY / folder).iterdir() if path.is_dir()]
        names += [f"{folder}/{room}" for room in sorted(rooms)]
    return [name for name in [*names, "k8s"] if any((tests / name).rglob("test_*.py"))]


def rows(text: str) -> dict[str, str]:
    """Returns the rows of the table in the README, by area."""
    table = text.partition(BEGIN)[2].partition(END)[0]
    return {match[1]: match[0] for match in _ROW.finditer(table)}


def with_rows(text: str, measured: dict[str, str]) -> str:
    """Returns the README with these rows in place of the areas' earlier ones."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    known = rows(text) | measured
    lines = [known[area] for area in areas() if area in known]
    return "\n".join([before + BEGIN, _HEAD, *lines, END + after])


def cpu_s() -> float:
    """Returns the processor time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(area: str) -> str | None:
    """Runs the area's tests, and returns its row. Where one fails, prints what pytest said and
    returns None."""
    start_s, start_cpu_s = time.monotonic(), cpu_s()
    command = ["make", "--no-print-directory", "test", f"AREA={area}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    seconds, cpu_seconds = time.monotonic() - start_s, cpu_s() - start_cpu_s
    if done.returncode != 0:
        print(f"{done.stdout}{done.stderr}\n{area} failed", file=sys.stderr, flush=True)
        return None
    passed = _SUMMARY.findall(done.stdout)
    day, processor = datetime.now(UTC).date().isoformat(), cpu_field("model name")
    machine = f"{day}, {os.cpu_count()} cores of {processor}"
    count = passed[-1] if passed else 0
    return f"| `{area}` | {count} | {seconds:.0f} | {cpu_seconds:.0f} | {machine} |"


def main(chosen: Sequence[str]) -> None:
    unknown = set(chosen) - set(areas())
    if unknown:
        sys.exit(f"no area {', '.join(sorted(unknown))}; expected some of {', '.join(areas())}")
    failed = []
    for area in chosen or areas():
        row = measure(area)
        if row is None:
            failed.append(area)
            continue
        print(row, flush=True)
        text = README.read_text(encoding="utf-8")
        README.write_text(with_rows(text, {area: row}), encoding="utf-8")
    if failed:
        sys.exit(f"tests failed in {', '.join(failed)}; the other rows are written")


if __name__ == "__main__":
    main(sys.argv[1:])
