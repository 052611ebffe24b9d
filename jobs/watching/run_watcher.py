"""The launcher's view of a run: reads its ledger as it grows, as anything could that sees only the
run's storage.

It reports what the ledger records to the terminal, Prometheus, TensorBoard and Grafana; workers do
nothing for it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import ray

from cluster.metrics.annotation import Annotation, annotator
from cluster.metrics.metric_export import Metrics
from cluster.metrics.metric_table import Exporter, metrics
from cluster.output.progress import report_progress, say
from cluster.output.result_text import counted
from cluster.settings.run import max_steps
from cluster.storage.uris import StorageError
from jobs.run.ledger import Ledger, LedgerTail, Line
from jobs.run.run_plan import RunPlan
from jobs.run.storage_retry import LEDGER_LINES, not_stored
from jobs.watching.run_metrics import RunFigures, Sample
from jobs.workers.incident_notes import INCIDENTS
from jobs.workers.placement import REPEAT_S, waiting_for
from model.tables import read_table

_INTERVAL_S = 2.0

_EVENTS: dict[str, dict[str, str]] = read_table(__file__, "run_events")


def message_of(event: Line, *, last_checkpoint: int = 0) -> str:
    """Returns the line that is logged for the event; empty where none is, as for an outage of the
    ledger, which its writer tells of. `last_checkpoint` is the step of the one that was stored
    last."""
    if event.get("what") == LEDGER_LINES:
        return ""
    fields = {
        "since": last_checkpoint,
        "reason": "unknown",
        **event,
        "reasons": "; ".join(event.get("reasons", [])),
        "team": counted(event.get("world_size", 0), "worker"),
    }
    return _EVENTS.get(event.get("event", ""), {}).get("message", "").format(**fields)


@contextmanager
def watching(plan: RunPlan, *, snapshot_time_s: Callable[[], float | None]) -> Iterator[None]:
    """Watches the run from a thread while the context lasts. `snapshot_time_s` returns the Unix
    time of the last snapshot."""
    ended, before = threading.Event(), Ledger.read(plan.run)

    def watch() -> None:
        with closing(_Watcher(plan, before, snapshot_time_s)) as watcher:
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
    """Lines that the ledger held `before` count in the figures, but were logged by an earlier
    launch."""

    def __init__(
        self, plan: RunPlan, before: Ledger, snapshot_time_s: Callable[[], float | None]
    ) -> None:
        # It imports some tenths of a second of torch's further modules, for which no run should
        # wait.
        from jobs.watching.tensorboard_files import TensorBoardFiles  # noqa: PLC0415

        self._plan, self._snapshot_time_s = plan, snapshot_time_s
        self._run_id = str(plan.config.run_id)
        self._num_before, self._num_starts = len(before.lines), len(before.world_sizes)
        # Lines when they last grew, since when, last said
        self._num_lines, self._since_s, self._said_s = -1, 0.0, 0.0
        self._tail = LedgerTail(plan.run)
        self._figures = RunFigures(plan.config)
        self._metrics = Metrics(Exporter.LAUNCHER, run=self._run_id)
        self._curves = TensorBoardFiles(plan.run)
        self._annotator = annotator()
        self._world_size = 0

    def close(self) -> None:
        self.look()
        self._export(is_running=False)
        self._curves.close()
        if self._annotator is not None:
            self._annotator.close()

    def look(self) -> None:
        lines: list[Line] = []
        with suppress(StorageError):  # an outage, which the run itself reports
            lines = self._tail.read()
        for number, line in enumerate(lines, start=len(self._tail.ledger.lines) - len(lines)):
            self._figures.add(line)
            self._curves.add(line)
            message = message_of(line, last_checkpoint=self._figures.stored.step)
            if number >= self._num_before and message:
                say(message)
            if self._annotator is not None and (annotation := self._annotation(line)):
                self._annotator.add(annotation)
        with suppress(StorageError):
            if waiting := self._waiting(self._tail.ledger, now_s=time.monotonic()):
                say(waiting)
        if last := next((line for line in reversed(lines) if "event" not in line), None):
            speed = f"{last['tokens_per_s']:.0f} tokens/s"
            workers = counted(last["world_size"], "worker")
            note = f"loss {last['loss']:.3f}, {speed}, {workers}"
            report_progress(
                "training",
                done=last["step"],
                total=max_steps(self._plan.config),
                unit="steps",
                note=note,
            )
        self._export(is_running=True)
        with suppress(StorageError, OSError):  # the next launch writes them again, from the ledger
            self._curves.flush()

    def _waiting(self, ledger: Ledger, *, now_s: float) -> str | None:
        """Returns what a run without workers or without storage waits for, at most once a minute;
        None where it trains."""
        if len(ledger.lines) != self._num_lines:
            self._num_lines, self._since_s, self._said_s = len(ledger.lines), now_s, 0.0
        idle_s = now_s - self._since_s
        if idle_s < REPEAT_S or (self._said_s and now_s - self._said_s < REPEAT_S):
            return None
        if problem := not_stored(ledger.lines):
            self._said_s = now_s
            return f"{problem}. No step for {idle_s:.0f} s; storing it is tried again and again"
        # A failure that no attempt has recorded yet is one after which none has started.
        has_started = len(ledger.world_sizes) > self._num_starts
        if has_started and not any(self._plan.run.child(INCIDENTS).list()):
            return None
        self._said_s = now_s
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return waiting_for(
            self._plan.config.scaling, nodes=nodes, free=ray.available_resources(), idle_s=idle_s
        )

    def _export(self, *, is_running: bool) -> None:
        samples = [Sample("train_running", is_running), *self._figures.samples()]
        if (at_s := self._snapshot_time_s()) is not None:
            samples.append(Sample("train_last_snapshot_timestamp_seconds", at_s))
        for sample in samples:
            name = f"raymill_{sample.name}"
            self._metrics.of(name, **dict.fromkeys(metrics()[name].labels, sample.label)).set(
                sample.value
            )
        self._metrics.publish()

    def _annotation(self, line: Line) -> Annotation | None:
        kind = _EVENTS.get(event := line.get("event", ""), {}).get("annotation")
        if event == "start":
            before, self._world_size = self._world_size, line["world_size"]
            if before:
                kind = "restart" if before == self._world_size else "resize"
        if kind is None:
            return None
        text = message_of(line) or f"{event} after step {line['step']}"
        return Annotation(time_s=line["time"], kind=kind, subject=f"run:{self._run_id}", text=text)
