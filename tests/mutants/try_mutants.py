"""Changes the modules of areas.toml in one place at a time, and says which changes no test notices:
`make mutants`.

    python -m tests.mutants.try_mutants [AREA ...] [--sample N] [--seed N] [--processes N] [--write]

A survivor that survivors.toml explains is as good as killed. With `--write` the table in
tests/README.md has the areas' rows. Ends with 1 where a survivor is not explained.
"""

import argparse
import ast
import random
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.mutants.changes import Change, changes, mutated
from tests.mutants.trials import Area, Outcome, Trial
from tests.repository import REPOSITORY

HERE = Path(__file__).parent
README = REPOSITORY / "tests" / "README.md"
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"
_HEAD = "| module | mutants | tried | killed | explained | survived | day |\n" + "| --- " * 7 + "|"
_ROW = re.compile(r"^\| `([\w/.]+)` \|.*$", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """The change of this number of a file of the code, named by its path in the repository."""

    file: str
    number: int
    change: Change
    line: str  # of the source, without the spaces around it

    def trial(self, area: Area) -> Trial:
        path = REPOSITORY / self.file
        source = mutated(path.read_text(encoding="utf-8"), self.number)
        tests = area.baseline.order(str(path), self.change.function)
        return Trial(module_of(self.file), source, tests)

    def __str__(self) -> str:
        return f"{self.file}:{self.change.line}  {self.change.text}\n    {self.line}"


@dataclass
class Score:
    """How many mutants a module has, and how many of those that were tried ended in which way."""

    num_mutants: int
    outcomes: Counter[str] = field(default_factory=Counter)

    def row(self, file: str) -> str:
        tried = sum(self.outcomes.values())
        killed = self.outcomes[Outcome.KILLED] + self.outcomes[Outcome.STUCK]
        counts = [self.num_mutants, tried, killed]
        counts += [self.outcomes["explained"], self.outcomes[Outcome.SURVIVED]]
        day = datetime.now(UTC).date().isoformat()
        return f"| `{file}` | {' | '.join(str(count) for count in counts)} | {day} |"


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def known_areas() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((HERE / "areas.toml").read_text(encoding="utf-8"))


def explained() -> set[tuple[str, str, str]]:
    """Returns the survivors that are explained: file, line and change."""
    text = (HERE / "survivors.toml").read_text(encoding="utf-8")
    table: Mapping[str, list[dict[str, str]]] = tomllib.loads(text)
    return {
        (file, survivor["line"], survivor["change"])
        for file, survivors in table.items()
        for survivor in survivors
    }


def files_of(patterns: Sequence[str]) -> list[str]:
    """Returns the files of an area's modules. Raises `ValueError` where a pattern names none."""
    files: list[str] = []
    for pattern in patterns:
        found = sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob(pattern))
        if not found:
            raise ValueError(f"areas.toml: no file is called {pattern}")
        files += [name for name in found if not name.endswith("__init__.py")]
    return files


def mutants_of(file: str) -> list[Mutant]:
    source = (REPOSITORY / file).read_text(encoding="utf-8")
    lines = source.splitlines()
    return [
        Mutant(file, number, change, lines[change.line - 1].strip())
        for number, change in enumerate(changes(ast.parse(source)))
    ]


def try_area(
    name: str, *, share: float, seed: int, num_processes: int
) -> tuple[dict[str, Score], list[Mutant]]:
    """Tries a share of an area's mutants. Returns the scores by file, and the survivors that nothing
    explains."""
    files = files_of(known_areas()[name]["modules"])
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    counts = Counter(mutant.file for mutant in mutants)
    scores = {file: Score(counts[file]) for file in files if counts[file]}
    chance = random.Random(f"{name} {seed}")
    chosen = [mutant for mutant in mutants if chance.random() < share]
    if not chosen:
        return {}, []
    area = Area(known_areas()[name]["tests"], [REPOSITORY / file for file in files])
    check_control(area, files[0])
    trials = [mutant.trial(area) for mutant in chosen]
    mutants_of_trials = {id(trial): mutant for trial, mutant in zip(trials, chosen, strict=True)}
    survivors = []
    for trial, outcome in area.outcomes(trials, num_processes=num_processes):
        mutant = mutants_of_trials[id(trial)]
        word = str(outcome)
        if outcome is Outcome.SURVIVED:
            if (mutant.file, mutant.line, mutant.change.text) in explained():
                word = "explained"
            else:
                survivors.append(mutant)
        print(f"{word}: {mutant}", flush=True)
        scores[mutant.file].outcomes[word] += 1
    return scores, survivors


def check_control(area: Area, file: str) -> None:
    """Plants a module as it is. Raises `ValueError` where the tests do not pass then: they would kill
    everything."""
    path = REPOSITORY / file
    source = ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
    control = Trial(module_of(file), source, area.baseline.order(str(path), None))
    [(_, outcome)] = area.outcomes([control], num_processes=1)
    if outcome is not Outcome.SURVIVED:
        raise ValueError(f"the tests kill {file} as it is: {outcome}")


def with_rows(text: str, measured: Mapping[str, str]) -> str:
    """Returns the README with these rows in place of the files' earlier ones."""
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    known = {match[1]: match[0] for match in _ROW.finditer(table)} | dict(measured)
    lines = [known[file] for file in sorted(known) if (REPOSITORY / file).is_file()]
    return "\n".join([before + BEGIN, _HEAD, *lines, END + after])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=", ".join(known_areas()))
    parser.add_argument("--sample", type=int, default=0, help="about so many of all (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    parser.add_argument("--processes", type=int, default=2, help="at a time (default: 2)")
    parser.add_argument("--write", action="store_true", help="the table in tests/README.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.areas) - known_areas().keys():
        parser.error(f"no area {', '.join(sorted(unknown))}; there are {', '.join(known_areas())}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    names = options.areas or [*known_areas()]
    patterns = [pattern for name in names for pattern in known_areas()[name]["modules"]]
    total = sum(len(mutants_of(file)) for file in files_of(patterns))
    share = min(1.0, options.sample / total) if options.sample else 1.0
    rows: dict[str, str] = {}
    survivors: list[Mutant] = []
    for name in names:
        scores, left = try_area(
            name, share=share, seed=options.seed, num_processes=options.processes
        )
        rows |= {file: score.row(file) for file, score in scores.items()}
        survivors += left
        if options.write:
            text = README.read_text(encoding="utf-8")
            README.write_text(with_rows(text, rows), encoding="utf-8")
    print("\n".join([_HEAD, *rows.values()]))
    if survivors:
        print("No test notices these. Write one, or explain in tests/mutants/survivors.toml:")
        print("\n".join(str(mutant) for mutant in survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
