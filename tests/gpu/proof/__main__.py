"""A proof on this machine's GPUs within 15 minutes, as one page and one JSON file to send back: hashes,
tests, speed and memory beside a plain compiled loop and FSDP2, and the demo.

    python -m tests.gpu.proof [--to build/gpu-proof] [--only SECTION ...]
    python -m tests.gpu.proof --cpu                # a short form without a GPU, which says so

The exit code is 1 if a section did not pass, and 2 where there is no GPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.gpu.proof.page import ON_CPUS, page_of
from tests.gpu.proof.sections import SECTIONS, TOTAL_S, Outcome, Section, run_sections

MACHINE = Section(
    name="machine",
    title="The machine",
    says="Cards, driver and versions.",
    on_gpus=["-m", "tests.gpu.proof.machine"],
    on_cpus=["-m", "tests.gpu.proof.machine"],
    limit_s=60,
)


def write(
    folder: Path, machine: dict[str, Any], outcomes: Sequence[Outcome], *, made: str
) -> list[Path]:
    """Writes both files, and returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    page, figures = folder / "gpu-proof.html", folder / "gpu-proof.json"
    page.write_text(page_of(machine, outcomes, made=made), encoding="utf-8")
    told = {
        "made": made,
        "path": "GPUs" if machine.get("cards") else ON_CPUS,
        "machine": machine,
        "sections": [outcome.json() for outcome in outcomes],
    }
    figures.write_text(json.dumps(told, indent=1), encoding="utf-8")
    return [page, figures]


def prove(sections: Sequence[Section], folder: Path, *, patience: float, is_on_cpus: bool) -> int:
    made = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    with TemporaryDirectory(prefix="raymill-gpu-proof-") as scratch:
        [about] = run_sections(
            [MACHINE], num_gpus=0, folder=Path(scratch), patience=patience, tell=_say
        )
        machine = dict(about.figures)
        num_gpus = len(machine.get("cards", []))
        if about.state != "passed":
            print("\n".join(about.last_lines), file=sys.stderr)
            return 1
        if not num_gpus and not is_on_cpus:
            print(
                "PyTorch finds no CUDA device on this machine, and this proof is about GPUs. Install a "
                "driver and a PyTorch with CUDA, or add --cpu for its short form on CPUs.",
                file=sys.stderr,
            )
            return 2
        if is_on_cpus:
            num_gpus, machine["cards"] = 0, []
            _say(ON_CPUS)
        outcomes = run_sections(
            sections, num_gpus=num_gpus, folder=Path(scratch), patience=patience, tell=_say
        )
    for path in write(folder, machine, outcomes, made=made):
        _say(f"wrote {path}")
    return int(any(outcome.state != "passed" for outcome in outcomes))


def _say(line: str) -> None:
    print(line, flush=True)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.proof",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--to", metavar="FOLDER", type=Path, default=Path("build/gpu-proof"))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION")
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        metavar="TIMES",
        help=f"what multiplies all time limits, which are {TOTAL_S:.0f} s together",
    )
    parser.add_argument("--cpu", action="store_true", help="a short form without a GPU")
    given = parser.parse_args(words)
    chosen = [section for section in SECTIONS if section.name in given.only]
    return prove(chosen, given.to, patience=given.patience, is_on_cpus=given.cpu)


if __name__ == "__main__":
    sys.exit(main())
