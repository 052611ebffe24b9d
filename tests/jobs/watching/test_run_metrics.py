"""A run's metrics and its TensorBoard file say what its ledger says."""

import math
from pathlib import Path
from typing import Any

import pytest

from cluster.metrics.metric_export import Metrics
from cluster.metrics.metric_table import Exporter, metrics
from cluster.settings.run import RunConfig
from cluster.storage.uris import Storage, open_storage
from jobs.corpus.progress import DataProgress
from jobs.report.why_slow import why_slow
from jobs.run.history import lost_steps, statistics
from jobs.run.ledger import LEDGER, Ledger, LedgerTail, Line
from jobs.watching.run_metrics import RunFigures
from jobs.watching.tensorboard_files import TensorBoardFiles
from tests.jobs.runs import tiny_plan
from tests.jobs.watching.eventful_ledger import EVENTFUL, events_of, start, step
from tests.metric_series import metrics_of, series_of

TOLD_BY_THE_WATCHER = {"raymill_train_running", "raymill_train_last_snapshot_timestamp_seconds"}


@pytest.fixture
def figures(tmp_path: Path) -> dict[tuple[str, str], float]:
    plan = tiny_plan(str(tmp_path), scaling={"max_workers": 2, "price_per_device_hour": 36.0})
    figures = RunFigures(plan.config)
    for line in EVENTFUL:
        figures.add(line)
    return {(sample.name, sample.label): sample.value for sample in figures.samples()}


def test_a_deliberate_pause_is_neither_a_failure_nor_lost_time() -> None:
    """Ctrl-C after step 5, resumed 100 s later: every reader of the ledger leaves these seconds
    out."""
    lines = [
        start(1, 100, world_size=2, after=0),
        *(step(n, 100.0 + n) for n in range(1, 6)),
        {"event": "preempted", "time": 105.5, "step": 5, "notice": "stop"},
        {"event": "checkpoint", "time": 106, "step": 5, "checkpoint": "c", "parameter_hash": "h"},
        start(2, 205.5, world_size=2, after=5),
        *(step(n, 200.0 + n) | {"attempt": 2} for n in range(6, 11)),
    ]
    ledger = Ledger(lines)
    assert (ledger.pauses, ledger.recoveries(), ledger.wall_s) == ({2: 100.0}, [], 10.0)
    (stop,) = ledger.interruptions()
    assert (stop.label, stop.pause_s, stop.seconds) == ("resume", 100.0, None)
    config = RunConfig.model_validate({"model": {"preset": "tiny"}})
    values = dict(statistics(ledger, config))
    assert values["Goodput"].startswith("100.0% ")
    assert values["Wall time"] == "10.0 s"
    assert values["Paused"] == "1 min 40 s on request, not in the wall time"
    assert values["Restarts"].startswith("0,")
    assert values["Time lost"].startswith("0.0 s")
    found = why_slow(ledger)
    assert (found.bound, found.evidence.restarts, found.shares["restarts"]) == (
        "compute",
        0,
        0.0,
    )
    figures = RunFigures(config)
    for line in lines:
        figures.add(line)
    samples = {sample.name: sample.value for sample in figures.samples()}
    assert (samples["train_goodput"], samples["train_restarts"]) == (1.0, 0)


def test_a_failure_after_a_pause_has_its_own_seconds_only() -> None:
    ledger = Ledger(
        [
            start(1, 100, world_size=2, after=0),
            step(1, 101),
            {"event": "preempted", "time": 102, "step": 1, "notice": "stop"},
            start(2, 200, world_size=2, after=1),
            step(2, 201),
            # A node that is about to go
            {"event": "preempted", "time": 202, "step": 2, "notice": "save"},
            start(3, 205, world_size=1, after=2),
            step(3, 207),
        ]
    )
    assert ledger.pauses == {2: 98}
    assert [(found.attempt, found.seconds) for found in ledger.recoveries()] == [(3, 6)]


def test_figures_agree_with_the_ledgers_other_readers(
    figures: dict[tuple[str, str], float],
) -> None:
    ledger = Ledger(EVENTFUL)
    useful_s = sum(line["wall_s"] for line in ledger.steps)
    expected: dict[tuple[str, str], float] = {
        ("train_restarts", ""): len(ledger.interruptions()),
        ("train_resizes", ""): sum(stop.is_resize for stop in ledger.interruptions()),
        ("train_lost_steps", ""): len(lost_steps(ledger)),
        ("train_goodput", ""): useful_s / (132 - 100),
        ("train_skipped_steps", ""): 1,
        ("train_rollbacks", ""): 1,
        ("train_failures", "died"): 1,
        ("train_failures", "hang"): 1,
        ("train_world_size", ""): 1,
        ("train_step", ""): 10,
        ("train_phase_seconds", "forward"): 0.75,
        ("train_last_checkpoint_timestamp_seconds", ""): 105.5,
        ("train_last_step_timestamp_seconds", ""): 132,
        ("train_validation_loss", "news"): 2.75,
        # From each start to the attempt's last line: 6 s of two workers, 9 and 2 of one.
        ("cost_device_seconds", "cpu"): 2 * 6 + 9 + 2,
        ("cost_money_per_hour", ""): 36,
        ("cost_money", ""): 0.01 * (2 * 6 + 9 + 2),
    }
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    assert math.isnan(figures["train_loss", ""])


def test_every_metric_of_a_launcher_is_exported(figures: dict[tuple[str, str], float]) -> None:
    exporter = Metrics(Exporter.LAUNCHER, run="r")
    for (name, label), value in figures.items():
        metric = metrics()[f"raymill_{name}"]
        assert bool(label) == bool(metric.labels) and (not metric.values or label in metric.values)
        exporter.of(metric.name, **dict.fromkeys(metric.labels, label)).set(value)
    exported = {f"raymill_{name}" for name, _ in figures}
    assert exported | TOLD_BY_THE_WATCHER == {
        metric.name for metric in metrics_of(Exporter.LAUNCHER)
    }


def test_every_metric_of_a_corpus_is_exported(capsys: pytest.CaptureFixture[str]) -> None:
    with DataProgress("tokenizing", total_bytes=10, num_tasks=2) as progress:
        progress.drop({"duplicate": 3})
        progress.advance(10, documents=4, tokens=5, rss_bytes=6)
        samples = [
            sample for family in progress.metrics.collectors.collect() for sample in family.samples
        ]
    values = {
        sample.name: sample.value for sample in samples if not sample.name.endswith("_created")
    }
    assert {f"ray_{name}" for name in values} == {
        name for of in metrics_of(Exporter.DATA) for name in series_of(of)
    }
    assert (
        values["raymill_data_dropped_documents_total"],
        values["raymill_data_queued_tasks"],
    ) == (3, 1)


def test_each_line_of_a_growing_ledger_is_read_once(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path))
    tail = LedgerTail(run)
    assert tail.read() == []
    whole = b'{"step": 1}\n{"step": 2}\n'
    for content, new in (
        (whole[:5], []),
        (whole[:15], [1]),
        (whole[:15], []),
        (whole + b'{"st', [2]),
    ):
        run.write_bytes(LEDGER, content)
        assert [line["step"] for line in tail.read()] == new
    assert tail.ledger.lines == Ledger.read(run).lines


def write_curves(run: Storage, lines: list[Line]) -> None:
    curves = TensorBoardFiles(run)
    for line in lines:
        curves.add(line)
    curves.close()


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_tensorboard_shows_each_step_that_counts(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if where == "disk" else f"s3://{request.getfixturevalue('s3_bucket')}/run"
    run = open_storage(root)
    run.write_bytes("tensorboard/events.out.tfevents.1.raymill", b"of an earlier launch")
    write_curves(run, EVENTFUL[:-1])
    curves: dict[str, dict[int, float]] = {}
    for event in events_of(run):
        if event.HasField("session_log"):  # what TensorBoard does with it
            for curve in curves.values():
                for number in [number for number in curve if number >= event.step]:
                    del curve[number]
        for value in event.summary.value:
            curves.setdefault(value.tag, {})[event.step] = value.simple_value
    assert curves["train/loss"] == dict.fromkeys(range(1, 8), 3.0)
    assert curves["train/phase_seconds/forward"][4] == 0.75
    assert curves["train/world_size"][3] == 2 and curves["train/world_size"][4] == 1


def test_names_of_curves(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path))
    write_curves(run, EVENTFUL)
    tags: set[Any] = {value.tag for event in events_of(run) for value in event.summary.value}
    assert {
        "train/learning_rate",
        "train/mfu",
        "train/validation_loss/val",
        "train/validation_loss/news",
    } <= tags
