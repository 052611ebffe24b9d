"""The launcher's eye on a run: reads its ledger as it grows, as anyone could who only sees the run's storage.

What the ledger tells goes to the person who watches, to Prometheus, TensorBoard and Grafana; no worker does anything
for it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cluster.monitoring.grafana import Annotation, Annotator
from cluster.monitoring.metric_export import Metrics
from cluster.monitoring.metric_table import METRICS, Exporter
from cluster.output.progress import report_progress, say
from cluster.settings.run import max_steps
from cluster.storage.uris import StorageError
from jobs.run.ledger import Ledger, LedgerTail, Line
from jobs.run.run_plan import RunPlan
from jobs.watching.run_messages import TOLD, Patience, told
from jobs.watching.run_metrics import RunFigures, Sample

_INTERVAL_S = 2.0

_ANNOTATED = {
    "failure": "kill",
    "hang": "kill",
    "rollback": "rollback",
    "checkpoint": "checkpoint",
    "preempted": "preemption",
    "finish": "end",
}
"""Kinds of annotations, by event; the start of a further attempt is one too."""


@contextmanager
def watching(plan: RunPlan, *, snapshot_time_s: Callable[[], float | None]) -> Iterator[None]:
    """While the context lasts, by a thread. `snapshot_time_s` tells when a snapshot was last taken, in Unix time."""
    ended = threading.Event()
    before = Ledger.read(plan.run)
    patience = Patience(plan.run, plan.config.scaling, before)

    def watch() -> None:
        with _Watcher(plan, patience, snapshot_time_s, num_told=len(before.lines)) as watcher:
            while not ended.wait(_INTERVAL_S):
                watcher.look()

    thread = threading.Thread(target=watch, name="watcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Watcher:
    """`num_told` lines are of earlier launches: they count in the figures, and were said and read long ago."""

    def __init__(
        self, plan: RunPlan, patience: Patience, snapshot_time_s: Callable[[], float | None], *, num_told: int
    ) -> None:
        # It imports some tenths of a second of torch's further modules, for which no run should wait.
        from jobs.watching.tensorboard_files import TensorBoardFiles  # noqa: PLC0415

        self._plan, self._patience, self._snapshot_time_s = plan, patience, snapshot_time_s
        self._run_id = str(plan.config.run_id)
        self._tail, self._num_told = LedgerTail(plan.run), num_told
        self._figures = RunFigures(plan.config)
        self._metrics = Metrics(Exporter.LAUNCHER, run=self._run_id)
        self._curves = TensorBoardFiles(plan.run)
        self._annotator = Annotator.from_environment()
        self._world_size = 0

    def __enter__(self) -> "_Watcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.look()
        self._export(is_running=False)
        self._curves.close()
        if self._annotator is not None:
            self._annotator.close()

    def look(self) -> None:
        try:
            lines = self._tail.read()
        except StorageError:  # an outage, which the run itself tells of
            lines = []
        num_before = len(self._tail.ledger.lines) - len(lines)
        for number, line in enumerate(lines, start=num_before):
            self._figures.add(line)
            self._curves.add(line)
            if line.get("event") in TOLD and number >= self._num_told:
                say(told(line))
            if self._annotator is not None and (annotation := self._annotation(line)):
                self._annotator.add(annotation)
        with suppress(StorageError):
            if message := self._patience.message(self._tail.ledger, now_s=time.monotonic()):
                say(message)
        if last := next((line for line in reversed(lines) if "event" not in line), None):
            note = f"loss {last['loss']:.3f}, {last['tokens_per_s']:.0f} tokens/s, {last['world_size']} workers"
            total = max_steps(self._plan.config)
            report_progress("training", done=last["step"], total=total, unit="steps", note=note)
        self._export(is_running=True)
        with suppress(StorageError, OSError):  # the next launch writes them again, from the ledger
            self._curves.flush()

    def _export(self, *, is_running: bool) -> None:
        samples = [Sample("train_running", is_running), *self._figures.samples()]
        if (at_s := self._snapshot_time_s()) is not None:
            samples.append(Sample("train_last_snapshot_timestamp_seconds", at_s))
        for sample in samples:
            name = f"raymill_{sample.name}"
            own_labels = METRICS[name].labels
            self._metrics.of(name, **dict.fromkeys(own_labels, sample.label)).set(sample.value)
        self._metrics.publish()

    def _annotation(self, line: Line) -> Annotation | None:
        event = line.get("event")
        if event == "start":
            before, self._world_size = self._world_size, line["world_size"]
            if not before:
                return None
            kind = "restart" if before == self._world_size else "resize"
        elif event in _ANNOTATED:
            kind = _ANNOTATED[event]
        else:
            return None
        text = told(line) if event in TOLD else f"{event} after step {line['step']}"
        return Annotation(time_s=line["time"], kind=kind, subject=f"run:{self._run_id}", text=text)
