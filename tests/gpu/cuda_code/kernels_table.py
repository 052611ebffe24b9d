"""Prints what the last `make test-cuda-code` compiled, by case and GPU, and writes it into
docs/measurements/cuda-code.md.

    python -m tests.gpu.cuda_code.kernels_table
"""

import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter

from model.hardware.processor import cpu_field
from tests.gpu.cuda_code.cases import CASES
from tests.gpu.cuda_code.report import Compiled
from tests.gpu.cuda_code.targets import TARGETS
from tests.repository import REPOSITORY

FOLDER = REPOSITORY / "build" / "cuda-code"
PAGE = REPOSITORY / "docs" / "measurements" / "cuda-code.md"
BEGIN, END = "<!-- cuda-code: begin -->", "<!-- cuda-code: end -->"

_LIST = TypeAdapter(list[Compiled])


def _path(case: str) -> Path:
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', case)}.json"


def store(case: str, made: list[Compiled]) -> None:
    """Keeps what became of a case for the table."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    _path(case).write_bytes(_LIST.dump_json(made))


def stored() -> list[list[Compiled]]:
    """Returns what became of each case, by target. Raises `FileNotFoundError` for one that was not
    compiled."""
    return [_LIST.validate_json(_path(case).read_bytes()) for case in CASES]


def table(cases: Sequence[Sequence[Compiled]]) -> str:
    """Returns a row for each case. The cell of a target has kernels, configurations and the most
    registers of a thread."""
    archs = [f"sm_{arch}" for arch in TARGETS]
    head = ["computation", *archs, "sums", "most bytes spilled", "atomics", "processor s"]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line(_row(made)) for made in cases]
    return "\n".join(lines)


def _row(made: Sequence[Compiled]) -> list[str]:
    cells = [made[0].case]
    for one in made:
        cells.append(f"{len(one.kernels)} / {len(one.code)} / {one.most_registers}")
    kernels = [kernel for one in made for kernel in one.kernels]
    code = [code for one in made for code in one.code]
    cells.append(str(sum(kernel.is_reduction for kernel in kernels)))
    cells.append(str(max(one.local_bytes for one in code)))
    cells.append(str(sum(sum(one.atomics.values()) for one in code)))
    cells.append(f"{sum(one.processor_s for one in made):.0f}")
    return cells


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def origin(cases: Sequence[Sequence[Compiled]]) -> str:
    """Returns when, where and with what they were compiled."""
    day = datetime.fromtimestamp(_path(cases[0][0].case).stat().st_mtime, UTC).date()
    every = [one for made in cases for one in made]
    versions: dict[str, set[str]] = {}
    for one in every:
        for name, version in one.versions.items():
            versions.setdefault(name, set()).add(version)
    named = ", ".join(f"{name} {' and '.join(sorted(versions[name]))}" for name in versions)
    seconds = sum(one.processor_s for one in every)
    memory = max(one.memory_mib for one in every)
    others = sorted({name for one in every for name in one.others})
    return (
        f"{day}, {cpu_field('model name')}, one thread; {named}. In all {seconds:.0f} s of processor time, and as\n"
        f"much to make it again; a process took {memory:.0f} MiB at most. What the programs call besides, and what was\n"
        f"not seen: `{'`, `'.join(others)}`."
    )


def main() -> None:
    try:
        cases = stored()
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is missing: `make test-cuda-code` compiles every case first")
    text = f"{origin(cases)}\n\n{table(cases)}"
    print(text)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
