"""Sends a run's curves to MLflow, from its ledger: those there are, or also those to come.

Training does not depend on it: it may start late, be interrupted and continue, or run again after
the run has ended. MLflow's own client sends them (the extra `tracking`); address and
key come from its own variables: MLFLOW_TRACKING_URI, …
"""

import importlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from cluster.output.progress import say
from cluster.storage.uris import Storage, StorageError
from jobs.run.find_run import begun_ledger
from jobs.run.history import flattened, recorded_config
from jobs.run.ledger import Ledger, LedgerTail, Line
from jobs.watching.run_metrics import curve_samples
from model.tables import pip_line
from raymill.errors import UserError

_INTERVAL_S = 2.0
_MLFLOW_BATCH = 1000  # values of a request that MLflow takes
_RUN_TAG = "raymill.run_id"


class MlflowTracker:
    """A run's place in MLflow, through its REST API, or in a folder where MLFLOW_TRACKING_URI names
    one. It is found again by the run's id."""

    def __init__(self, experiment: str, run_id: str, settings: Mapping[str, str]) -> None:
        try:
            mlflow = importlib.import_module("mlflow")
        except ImportError:
            raise UserError(f"mlflow is not installed: `{pip_line('tracking')}`") from None
        self._value, self._error = mlflow.entities.Metric, mlflow.exceptions.MlflowException
        self._waiting: list[Any] = []
        with _failures(self._error):
            self._client = mlflow.MlflowClient()
            experiment_id = mlflow.set_experiment(experiment).experiment_id
            if runs := self._client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{run_id}'"):
                self._id = runs[0].info.run_id
            else:
                created = self._client.create_run(
                    experiment_id, tags={_RUN_TAG: run_id}, run_name=run_id
                )
                self._id = created.info.run_id
                self._client.log_batch(
                    self._id, params=[mlflow.entities.Param(*pair) for pair in settings.items()]
                )
            history = self._client.get_metric_history(self._id, "train/loss")
        # The last one sent earlier; -1 for none
        self.last_step = max((value.step for value in history), default=-1)
        self.place = f"{mlflow.get_tracking_uri()} experiment {experiment_id} run {self._id}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes values by the name of their curve."""
        now_ms = int(time.time() * 1000)
        self._waiting += [self._value(name, value, now_ms, step) for name, value in values.items()]
        if len(self._waiting) >= _MLFLOW_BATCH:
            self.flush()

    def flush(self) -> None:
        """Sends what was logged."""
        with _failures(self._error):
            self._client.log_batch(self._id, metrics=self._waiting)
        self._waiting.clear()

    def end(self, *, is_finished: bool) -> None:
        """Sends the rest. A run that is not finished stays open."""
        self.flush()
        with _failures(self._error):
            if is_finished:
                self._client.set_terminated(self._id)


@contextmanager
def _failures(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise UserError(f"MLflow refuses the run: {str(error).splitlines()[0]}") from None


def track(run: Storage, *, mlflow: str, follow: bool) -> dict[str, Any]:
    """Sends what an experiment of MLflow lacks, and reports the place; with `follow` until the run
    has finished.

    Each step is sent once. A step that a followed run takes again after a failure has been sent
    already: it has the same bits, unless it was rolled back to be skipped.
    """
    config = recorded_config(run)
    tracker = MlflowTracker(
        mlflow, str(config.run_id), dict(flattened(config.model_dump(mode="json")))
    )
    num_steps, last = 0, tracker.last_step
    say(f"curves of {config.run_id} go to {tracker.place}, after step {max(0, last)}")
    with suppress(KeyboardInterrupt):
        for step, values in _points(
            _growing(run) if follow else _counted(begun_ledger(run)), after=last
        ):
            tracker.log(step, values)
            num_steps, last = num_steps + 1, step
            if follow:
                tracker.flush()
    is_finished = Ledger.read(run).is_finished
    tracker.end(is_finished=is_finished)
    return {
        "sent_steps": num_steps,
        "last_step": last,
        "finished": is_finished,
        "place": tracker.place,
    }


def _counted(ledger: Ledger) -> list[Line]:
    """Returns the steps that count and their validations, in order."""
    counted = {line["step"] for line in ledger.steps}
    validations = {
        line["step"]: line for line in ledger.events("validation") if line["step"] in counted
    }
    return sorted(
        [*ledger.steps, *validations.values()], key=lambda line: (line["step"], "event" in line)
    )


def _growing(run: Storage) -> Iterator[Line]:
    """Yields lines as they are added, up to the run's end."""
    tail = LedgerTail(run)
    while not tail.ledger.is_finished:
        with suppress(StorageError):  # an outage, after which it continues
            yield from tail.read()
        time.sleep(_INTERVAL_S)


def _points(lines: Iterable[Line], *, after: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields each step with all its values: what a validation measured belongs to the step before
    it."""
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
