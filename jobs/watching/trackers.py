"""Weights & Biases and MLflow, through their own clients (`pip install 'raymill[tracking]'`).

Addresses and keys come from their own variables: WANDB_API_KEY, WANDB_MODE, MLFLOW_TRACKING_URI, …
"""

import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from model.errors import UserError

_MLFLOW_BATCH = 1000  # values of a request that MLflow takes
_MLFLOW_PARAMETERS = 100
_MLFLOW_TEXT = 6000  # characters of a setting
_RUN_TAG = "raymill.run_id"


class TrackerError(UserError):
    """The tracker is not installed, cannot be reached, or refuses."""


class WandbTracker:
    """W&B, whose client sends from a process of its own and takes no step before its last one."""

    def __init__(self, project: str, run_id: str, settings: Mapping[str, str]) -> None:
        wandb = _installed("wandb")
        with _failures("W&B", wandb.errors.Error):
            self._run = wandb.init(
                project=project,
                id=run_id,
                name=run_id,
                resume="allow",
                config=dict(settings),
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
        self.last_step = self._run.step - 1  # the last one sent earlier; -1 for none
        self.place = self._run.url or self._run.dir  # where to look at it

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes values by the name of their curve; steps ascend."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Does nothing: the client sends by itself."""

    def end(self, *, is_finished: bool) -> None:
        """Sends the rest. A run that is not finished stays open where the tracker allows it."""
        self._run.finish()


class MlflowTracker:
    """MLflow, through its REST API, or in a folder where MLFLOW_TRACKING_URI names one."""

    def __init__(self, experiment: str, run_id: str, settings: Mapping[str, str]) -> None:
        mlflow = _installed("mlflow")
        self._entities = _installed("mlflow.entities")
        self._error = mlflow.exceptions.MlflowException
        self._waiting: list[Any] = []
        with _failures("MLflow", self._error):
            self._client = mlflow.MlflowClient()
            found = self._client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
            runs = self._client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{run_id}'")
            self._id = runs[0].info.run_id if runs else self._new_run(experiment_id, run_id, settings)
            history = self._client.get_metric_history(self._id, "train/loss")
        self.last_step = max((value.step for value in history), default=-1)
        self.place = f"{mlflow.get_tracking_uri()} experiment {experiment_id} run {self._id}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        self._waiting += [self._entities.Metric(name, value, now_ms, step) for name, value in values.items()]
        if len(self._waiting) >= _MLFLOW_BATCH:
            self.flush()

    def flush(self) -> None:
        """Sends what was logged."""
        with _failures("MLflow", self._error):
            for start in range(0, len(self._waiting), _MLFLOW_BATCH):
                self._client.log_batch(self._id, metrics=self._waiting[start : start + _MLFLOW_BATCH])
        self._waiting.clear()

    def end(self, *, is_finished: bool) -> None:
        self.flush()
        with _failures("MLflow", self._error):
            if is_finished:
                self._client.set_terminated(self._id)

    def _new_run(self, experiment_id: str, run_id: str, settings: Mapping[str, str]) -> str:
        created = self._client.create_run(experiment_id, tags={_RUN_TAG: run_id}, run_name=run_id)
        parameters = [self._entities.Param(name, value[:_MLFLOW_TEXT]) for name, value in settings.items()]
        for start in range(0, len(parameters), _MLFLOW_PARAMETERS):
            self._client.log_batch(created.info.run_id, params=parameters[start : start + _MLFLOW_PARAMETERS])
        return str(created.info.run_id)


Tracker = WandbTracker | MlflowTracker
"""A run's place in a tracker, which is found again by the run's id."""


def _installed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise TrackerError(f"{module} is not installed: pip install 'raymill[tracking]'") from None


@contextmanager
def _failures(name: str, kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise TrackerError(f"{name} refuses the run: {str(error).splitlines()[0]}") from None
