"""A run's curves in MLflow, by its own client, in its folder store."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.settings.run import RunConfig, to_yaml
from cluster.storage.uris import Storage, open_storage
from jobs.run.history import CONFIG_FILE
from jobs.run.ledger import LEDGER, Ledger, Line
from jobs.watching.track_run import MlflowTracker, track
from raymill.errors import UserError
from tests.jobs.watching.eventful_ledger import EVENTFUL

LINES: list[Line] = [
    *(line for line in EVENTFUL[:-1] if line.get("event") not in ("skip", "rollback")),
    {"event": "finish", "time": 130, "step": 8},
]
"""Of a run that takes steps 4 and 5 again after a failure."""

SETTINGS = {"run_id": "eventful", "train": {"learning_rate": 0.001, "sample_prompts": ["x" * 7000]}}


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    run = open_storage(str(tmp_path)).child("runs/eventful")
    run.write_bytes(CONFIG_FILE, to_yaml(RunConfig.model_validate(SETTINGS)).encode())
    run.write_bytes(LEDGER, b"".join(json.dumps(line).encode() + b"\n" for line in LINES))
    return run


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("mlflow", reason="no MLflow here: pip install '.[tracking]'")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield mlflow.MlflowClient()


def of_run(client: Any) -> Any:
    experiment = client.get_experiment_by_name("mill")
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def curve(client: Any, name: str) -> dict[int, float]:
    history = client.get_metric_history(of_run(client).info.run_id, name)
    assert len({value.step for value in history}) == len(history), "a step was sent twice"
    return {value.step: value.value for value in history}


def test_mlflow_has_each_step_that_counts_once(run: Storage, mlflow: Any) -> None:
    ledger = Ledger.read(run)
    for sent in (len(ledger.steps), 0):  # asked again, nothing is sent twice
        result = track(run, mlflow="mill", follow=False)
        assert (result["sent_steps"], result["last_step"]) == (sent, ledger.steps[-1]["step"])
    assert curve(mlflow, "train/loss") == {line["step"]: line["loss"] for line in ledger.steps}
    validations = {line["step"]: line["val_loss"] for line in ledger.events("validation")}
    assert curve(mlflow, "train/validation_loss/val") == validations
    kept = of_run(mlflow)
    assert kept.info.run_name == "eventful" and kept.info.status == "FINISHED"
    assert (
        kept.data.params["train.learning_rate"] == "0.001"
        and len(kept.data.params["train.sample_prompts"]) == 6000
    )
    assert len(kept.data.params) > 80  # all settings


def test_a_run_is_followed_to_its_end_and_taken_up_again(run: Storage, mlflow: Any) -> None:
    whole = run.read_bytes(LEDGER)
    lines = whole.splitlines(keepends=True)
    half = b"".join(lines[: len(lines) // 2])
    run.write_bytes(LEDGER, half)
    before = track(run, mlflow="mill", follow=False)
    assert not before["finished"] and of_run(mlflow).info.status == "RUNNING"

    def grow() -> None:
        time.sleep(1)
        run.write_bytes(LEDGER, whole)

    growing = threading.Thread(target=grow)
    growing.start()
    after = track(run, mlflow="mill", follow=True)
    growing.join()
    assert after["finished"]
    steps = [line["step"] for line in Ledger.read(run).steps]
    assert sorted(curve(mlflow, "train/loss")) == steps
    assert before["sent_steps"] + after["sent_steps"] == len(steps)


def test_a_server_that_is_not_there_is_reported(
    mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow as module

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    module.set_tracking_uri("http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"MLflow refuses the run: .*127\.0\.0\.1"):
        MlflowTracker("mill", "eventful", {})
