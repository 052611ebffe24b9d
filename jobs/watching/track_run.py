"""Sends a run's curves to Weights & Biases or MLflow, from its ledger: those there are, or also those to come.

Training does not depend on it: it may start late, be interrupted and continue, or run again after the run has ended.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from cluster.output.progress import say
from cluster.storage.uris import Storage, StorageError
from jobs.run.find_run import begun_ledger
from jobs.run.history import flattened, recorded_config
from jobs.run.ledger import Ledger, LedgerTail, Line
from jobs.watching.run_metrics import curve_samples
from jobs.watching.trackers import MlflowTracker, Tracker, WandbTracker

_INTERVAL_S = 2.0


def track(run: Storage, tracker: Tracker, *, follow: bool) -> dict[str, Any]:
    """Sends what the tracker lacks; with `follow` until the run has finished.

    Each step is sent once. A step that a followed run takes again after a failure has been sent already: it has the
    same bits, unless it was rolled back to be skipped.
    """
    num_steps, last = 0, tracker.last_step
    with suppress(KeyboardInterrupt):
        for step, values in _points(_growing(run) if follow else _counted(begun_ledger(run)), after=last):
            tracker.log(step, values)
            num_steps, last = num_steps + 1, step
            if follow:
                tracker.flush()
    is_finished = bool(Ledger.read(run).events("finish"))
    tracker.end(is_finished=is_finished)
    return {"sent_steps": num_steps, "last_step": last, "finished": is_finished, "place": tracker.place}


def _counted(ledger: Ledger) -> list[Line]:
    """Returns the steps that count and their validations, in order."""
    counted = {line["step"] for line in ledger.steps}
    validations = {line["step"]: line for line in ledger.events("validation") if line["step"] in counted}
    return sorted([*ledger.steps, *validations.values()], key=lambda line: (line["step"], "event" in line))


def _growing(run: Storage) -> Iterator[Line]:
    """Yields lines as they are added, up to the run's end."""
    tail = LedgerTail(run)
    while not tail.ledger.events("finish"):
        with suppress(StorageError):  # an outage, after which it continues
            yield from tail.read()
        time.sleep(_INTERVAL_S)


def _points(lines: Iterable[Line], *, after: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields each step with all its values: what a validation measured belongs to the step before it."""
    step, values = after, dict[str, float]()
    for line in lines:
        samples = curve_samples(line)
        if not samples or line["step"] < step or line["step"] <= after:
            continue
        if line["step"] > step and values:
            yield step, values
            values = {}
        step = line["step"]
        values |= {sample.curve: sample.value for sample in samples}
    if values:
        yield step, values


def track_by(run: Storage, *, wandb: str | None, mlflow: str | None, follow: bool) -> dict[str, Any]:
    """Is `raymill track`: sends to a project of Weights & Biases or an experiment of MLflow, and reports the place."""
    config = recorded_config(run)
    run_id, settings = str(config.run_id), dict(flattened(config.model_dump(mode="json")))
    tracker = WandbTracker(wandb, run_id, settings) if wandb else MlflowTracker(str(mlflow), run_id, settings)
    say(f"curves of {run_id} go to {tracker.place}, after step {max(0, tracker.last_step)}")
    return track(run, tracker, follow=follow)
