"""Counts how far reading and tokenizing are, for the person who watches and as Ray's metrics."""

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager

from cluster.metrics.metric_export import Metrics
from cluster.metrics.metric_table import Exporter
from cluster.output.progress import report_progress

_REPORT_INTERVAL_S = 1.0


class DataProgress(AbstractContextManager["DataProgress"]):
    """Counts what finished tasks did, and shows it as progress lines and as the metrics
    `raymill_data_*`."""

    def __init__(self, label: str, *, total_bytes: int, num_tasks: int) -> None:
        """Without `total_bytes` it shows the tasks that are done."""
        self._label, self._total_bytes, self._queued, self._num_tasks = (
            label,
            total_bytes,
            num_tasks,
            num_tasks,
        )
        self._counts: Counter[str] = Counter()
        self._peak_rss_bytes = 0
        self._started = self._reported = time.monotonic()
        self.metrics = Metrics(Exporter.DATA, stage=label)

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self._show()

    def advance(self, num_bytes: int, *, documents: int, tokens: int = 0, rss_bytes: int) -> None:
        """Counts one finished task."""
        self._queued -= 1
        self._peak_rss_bytes = max(self._peak_rss_bytes, rss_bytes)
        for name, value in (
            ("source_bytes", num_bytes),
            ("documents", documents),
            ("tokens", tokens),
        ):
            self._counts[name] += value
            self.metrics.of(f"raymill_data_{name}").inc(value)
        self.metrics.of("raymill_data_queued_tasks").set(self._queued)
        self.metrics.of("raymill_data_worker_rss_bytes").set(rss_bytes)
        if time.monotonic() - self._reported >= _REPORT_INTERVAL_S:
            self._reported = time.monotonic()
            self._show()

    def drop(self, documents: Mapping[str, int]) -> None:
        """Counts dropped documents, by reason."""
        for reason, count in documents.items():
            self.metrics.of("raymill_data_dropped_documents", reason=reason).inc(count)

    def _show(self) -> None:
        self.metrics.publish()
        megabytes = self._counts["source_bytes"] / 1e6
        seconds = max(1e-9, time.monotonic() - self._started)
        note = "".join(
            f"{self._counts[unit]:,} {unit}, "
            for unit in ("documents", "tokens")
            if self._counts[unit]
        )
        done, total, unit = float(self._num_tasks - self._queued), float(self._num_tasks), "tasks"
        if self._total_bytes:
            done, total, unit = round(megabytes, 2), round(self._total_bytes / 1e6, 2), "MB"
            note += f"{megabytes / seconds:.1f} MB/s, "
        note += f"workers up to {self._peak_rss_bytes >> 20} MiB, {self._queued} tasks queued"
        report_progress(self._label, done=done, total=total, unit=unit, note=note)
