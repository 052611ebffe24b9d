"""Compares what was signed about a training with what would be signed now."""

from collections.abc import Iterator
from typing import Any

import yaml

from jobs.run.history import CONFIG_FILE, flattened

_OF_SIGNING = {"signedOn"}
"""Fields about the signature itself, and not about the training."""


def statement_problems(signed: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns by name what of settings, materials and metadata is another than was signed."""
    problems = _settings_problems(_settings(signed), _settings(now))
    before, after = dict(_named(signed)), dict(_named(now))
    for name in [*before, *(name for name in after if name not in before)]:
        was, found = before.get(name), after.get(name)
        if was == found:
            continue
        if found is None:
            problems.append(f"{name} was signed as {_short(was)}, and is gone")
        elif was is None:
            problems.append(f"{name} was not there when the run was signed")
        else:
            problems.append(f"{name} is {_short(found)}, {_short(was)} was signed")
    return problems


def _settings(training: dict[str, Any]) -> str:
    settings = training["buildDefinition"]["externalParameters"].get(CONFIG_FILE, "")
    return str(settings)


def _settings_problems(signed: str, now: str) -> list[str]:
    """Returns which settings are others than those that were signed."""
    if signed == now:
        return []
    try:
        was, found = (dict(flattened(yaml.safe_load(text))) for text in (signed, now))
    except (yaml.YAMLError, AttributeError):
        return [f"{CONFIG_FILE} was altered since the run was signed, and is no settings now"]
    names = [*was, *(name for name in found if name not in was)]
    changed = [
        f"{name} is {found.get(name, 'gone')!r}, {was.get(name, 'nothing')!r} was signed"
        for name in names
        if was.get(name) != found.get(name)
    ]
    said = "; ".join(changed) or "in its form alone"
    return [f"{CONFIG_FILE} was altered since the run was signed: {said}"]


def _named(training: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, value) of each material, and of what is said of the run."""
    for material in training["buildDefinition"]["resolvedDependencies"]:
        yield material["name"], material["digest"]["sha256"]
    details = training["runDetails"]
    yield "the code's version", details["builder"]["version"]["code"]
    for name, value in details["metadata"].items():
        if name not in _OF_SIGNING:
            yield f"the run's {name}", str(value)


def _short(value: str | None) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 32 else text
