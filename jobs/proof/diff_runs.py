"""Compares two runs by their ledgers: the first step where they part, and in which fields."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.output.json_result import JsonResult
from cluster.output.result_text import lines, table
from cluster.storage.uris import Storage
from jobs.run.find_run import data_identity
from jobs.run.history import recorded_config, training_differences
from jobs.run.ledger import Ledger, Line
from jobs.run.signed_lines import shown_ledger

FIELDS = (
    "samples",
    "tokens_seen",
    "lr",
    "skipped",
    "loss",
    "grad_norm",
    "parameter_hash",
    "state_hash",
)
"""The fields that hold a step's bits, in the order in which one decides the next. Time, world size
and attempt may differ."""

_SAMPLE = "sample of "
_OF_STATE: tuple[str, ...] = ("parameter_hash", "state_hash")
_OF_VALIDATION = ("val_loss", "val_bits_per_byte")

_MEASURING = {
    "train.eval_every_steps",
    "train.eval_max_tokens",
    "train.sample_prompts",
    "train.layer_statistics_every_steps",
    "train.hash_every_steps",
}
"""Settings on which no bit depends."""


@dataclass(frozen=True)
class Difference:
    """The first step where two runs differ: (a, b) by field."""

    step: int
    fields: dict[str, tuple[Any, Any]]

    def __str__(self) -> str:
        return f"step {self.step}: {_listed(self.fields)}"


def step_values(ledger: Ledger) -> dict[int, Line]:
    """Returns by step what is compared of the line that counts; the hashes also from checkpoints,
    and what a validation measured, each figure under its name."""
    values: dict[int, Line] = {}
    measured: dict[int, Line] = {}
    for line in ledger.standing.lines:
        event = line.get("event")
        if event in (None, "skip"):
            known = {name: line[name] for name in FIELDS if name in line}
            values[line["step"]] = known | {"skipped": event == "skip"}
        elif event == "checkpoint" and line["step"] in values:
            values[line["step"]] |= {name: line[name] for name in _OF_STATE if name in line}
        elif event == "validation":
            measured[line["step"]] = _measured(line)
        elif event == "rollback":
            values = {
                step: value
                for step, value in values.items()
                if not line["first"] <= step <= line["last"]
            }
    return {step: values[step] | measured.get(step, {}) for step in sorted(values)}


def _measured(validation: Line) -> Line:
    """Returns the figures of a validation, of each of its sets too, and its samples."""
    figures = {name: validation.get(name) for name in _OF_VALIDATION}
    for text, of_text in validation.get("sets", {}).items():
        figures |= {f"{name} of {text}": of_text.get(name) for name in _OF_VALIDATION}
    for sample in validation.get("samples", ()):
        figures[f"{_SAMPLE}{sample['prompt']!r}"] = sample["text"]
    return figures


def first_difference(
    a: dict[int, Line],
    b: dict[int, Line],
    *,
    steps: Sequence[int],
    is_repeated: bool = False,
) -> Difference | None:
    """Returns the first of the steps, all of which `a` has, that `b` lacks or where a field that
    holds the step's bits differs; a field that one of them lacks does not.

    Where `b` is a repetition of `a`, what was measured is compared too, and it may lack nothing
    but samples of prompts that it was not asked for.
    """
    for step in steps:
        if step not in b:
            return Difference(step, {"step": (step, None)})
        names = FIELDS if not is_repeated else [*FIELDS, *(n for n in a[step] if n not in FIELDS)]
        fields = {
            name: (a[step][name], b[step].get(name))
            for name in names
            if name in a[step] and _parts(a[step], b[step], name, is_repeated=is_repeated)
        }
        bits = {name: pair for name, pair in fields.items() if name in FIELDS}
        if fields:
            return Difference(step, bits or fields)
    return None


def _parts(a: Line, b: Line, name: str, *, is_repeated: bool) -> bool:
    """Reports whether two lines part in a field that the first one has."""
    if name in b:
        return _differ(a[name], b[name])
    return is_repeated and not name.startswith(_SAMPLE)


def _differ(a: Any, b: Any) -> bool:
    """Reports whether two values are not the same; two that are no number are."""
    return bool(a != b and not (_is_nan(a) and _is_nan(b)))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


@dataclass(frozen=True)
class Comparison(JsonResult):
    """How two runs compare; pairs are of the first and the second run."""

    verdict: str
    equal: bool
    equal_steps: int
    step: int | None  # the first where they part
    fields: dict[str, tuple[Any, Any]]  # of that step
    settings: dict[str, tuple[Any, Any]]  # that differ

    def text(self) -> str:
        """Returns it as people read it: what differs as a table, with a column for each run."""
        shown = self.json()
        tables = {name: shown.pop(name) for name in ("fields", "settings")}
        parts = ["".join(f"{line}\n" for line in lines(shown))]
        for name, pairs in tables.items():
            rows = [
                {name: key, "first run": _shown(a), "second run": _shown(b)}
                for key, (a, b) in pairs.items()
            ]
            parts.append(table((name, "first run", "second run"), rows))
        return "\n".join(part for part in parts if part)


def diff(run_a: Storage, run_b: Storage) -> Comparison:
    """Compares two runs, and the settings on which their bits depend."""
    ledgers = shown_ledger(run_a), shown_ledger(run_b)
    a, b = (step_values(ledger) for ledger in ledgers)
    steps = sorted(a.keys() & b.keys())
    parted = first_difference(a, b, steps=steps)
    differing = training_differences(recorded_config(run_a), recorded_config(run_b))
    settings = {name: pair for name, pair in differing.items() if name not in _MEASURING}
    data_a, data_b = (data_identity(ledger) for ledger in ledgers)
    if data_a != data_b:
        settings["data"] = (data_a, data_b)
    if not steps:
        verdict = "the runs have no step in common"
    else:
        verdict = f"the runs part at {parted}" if parted else f"equal for {len(steps)} steps"
    if settings:
        verdict += f"; settings that differ: {_listed(settings)}"
    return Comparison(
        verdict,
        equal=parted is None and bool(steps),
        equal_steps=steps.index(parted.step) if parted else len(steps),
        step=parted.step if parted else None,
        fields=parted.fields if parted else {},
        settings=settings,
    )


def _listed(pairs: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {_shown(a)} against {_shown(b)}" for name, (a, b) in pairs.items())


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    # Nine digits tell two fp32 numbers apart
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    return f"{text[:12]}…" if len(text) > 32 else text
