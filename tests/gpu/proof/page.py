"""The page of a proof on GPUs: one HTML file, which asks no server for anything."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from jobs.report.page import document, grid, pairs
from tests.gpu.proof.sections import Outcome

ON_CPUS = "CPU path, no GPU"

Rows = Sequence[Mapping[str, Any]]


def page_of(machine: Mapping[str, Any], outcomes: Sequence[Outcome], *, made: str) -> str:
    title = "raymill: proof on GPUs"
    failed = [outcome.name for outcome in outcomes if outcome.state != "passed"]
    verdict = f"Not passed: {', '.join(failed)}." if failed else "All sections passed."
    banner = (
        ""
        if machine.get("cards")
        else f"<p><strong>{ON_CPUS}</strong>: what it shows holds for CPUs.</p>\n"
    )
    summary = [
        [outcome.name, outcome.state, f"{outcome.seconds:.0f}", _code(outcome)]
        for outcome in outcomes
    ]
    body = f"""<h1>{escape(title)}</h1>
{banner}<p>{escape(verdict)}</p>
{grid("Sections", ("Section", "State", "Seconds", "Exit code"), summary)}
<h2>The machine</h2>
{pairs([("Made (UTC)", made), *_facts(machine)])}
{"".join(map(_section, outcomes))}"""
    return document(title, body)


def _code(outcome: Outcome) -> str:
    return "–" if outcome.exit_code is None else str(outcome.exit_code)


def _facts(machine: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in machine.items():
        match value:
            case list():
                text = "; ".join(map(str, value))
            case dict():
                text = ", ".join(f"{key} {of}" for key, of in value.items() if of is not None)
            case _:
                text = "" if value is None else str(value)
        if text:
            yield name, text


def _section(outcome: Outcome) -> str:
    tables = {"hashes": _hashes, "speed": _speed, "workers": _workers, "demo": _demo}
    show = tables.get(outcome.name, _nothing)
    lines = escape("\n".join(outcome.last_lines))
    return f"""<h2>{escape(outcome.title)}</h2>
<p>{escape(outcome.says)} {escape(outcome.state.capitalize())} after {outcome.seconds:.0f} s.</p>
{show(outcome.figures) if outcome.figures else ""}
<details><summary>Its last lines</summary><p>{escape(outcome.command)}</p>
<div class="scroll" role="region" aria-label="Output of {escape(outcome.name)}" tabindex="0"><pre>{lines}</pre></div></details>
"""


def _nothing(figures: Mapping[str, Any]) -> str:
    return ""


def _hashes(figures: Mapping[str, Any]) -> str:
    cells: Mapping[str, Mapping[str, str]] = figures["rows"]
    ways = [*next(iter(cells.values()), {})]
    rows = [[row, *(of_row.get(way, "") for way in ways)] for row, of_row in cells.items()]
    reasons = [(way, reason) for way, reason in figures["reasons"].items()]
    heads = ("Workers", *(_way_in_words(way) for way in ways))
    verdict = f"<p>{escape(figures['verdict'])}</p>"
    return grid("Hashes by workers", heads, rows) + verdict + (pairs(reasons) if reasons else "")


def _way_in_words(way: str) -> str:
    return way if way.isupper() or way.endswith("2") else f"raymill, {way}"


def _speed(figures: Mapping[str, Any]) -> str:
    measured = [row for row in figures["rows"] if "checks" not in row]
    rows = [[*_named(row, "preset", "contender"), *_of_row(row)] for row in measured]
    for row, cells in zip(measured, rows, strict=True):
        cells.insert(3, _ratio(row, measured, beside="plain", same="preset"))
    heads = ("Model", "Contender", "Tokens/s", "x plain", "MFU", "GB", "Weights or error")
    checks: list[tuple[str, str]] = []
    for row in figures["rows"]:
        for check, (is_good, text) in row.get("checks", {}).items():
            checks.append((check, f"{'ok' if is_good else 'WRONG'}: {text}"))
    return grid("One card", heads, rows) + (pairs(checks) if checks else "")


def _workers(figures: Mapping[str, Any]) -> str:
    measured = figures["rows"]
    rows = [[*_named(row, "workers", "contender"), *_of_row(row)] for row in measured]
    for row, cells in zip(measured, rows, strict=True):
        cells[3] = _ratio(row, measured, beside="FSDP2", same="workers")
    heads = ("Workers", "Contender", "Tokens/s", "x FSDP2", "GB", "Error")
    return grid("Several workers", heads, rows)


def _ratio(row: Mapping[str, Any], rows: Rows, *, beside: str, same: str) -> str:
    """Returns how many times as fast a row is as a contender in the same case."""
    for other in rows:
        is_it = other["contender"] == beside and other[same] == row[same]
        if is_it and "error" not in row and "error" not in other:
            return f"{row['tokens_per_s'] / other['tokens_per_s']:.2f}"
    return "–"


def _named(row: Mapping[str, Any], *names: str) -> list[str]:
    return [str(row[name]) for name in names]


def _of_row(row: Mapping[str, Any]) -> list[str]:
    if "error" in row:
        return ["–", "–", "–", row["error"]]
    mfu = row.get("mfu")
    return [
        f"{row['tokens_per_s']:,.0f}",
        "–" if mfu is None else f"{mfu:.1%}",
        f"{row['peak_bytes'] / 1e9:.2f}",
        row.get("hash", "")[:10],
    ]


def _demo(figures: Mapping[str, Any]) -> str:
    return pairs((name.replace("_", " "), str(value)) for name, value in figures.items())
