"""A replica's metrics, under vLLM's names, so that vLLM's dashboards work, and vLLM's own metrics
beside them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Self, get_args

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from cluster.metrics.metric_export import Metrics, by_version
from cluster.metrics.metric_table import Exporter, metrics
from serving.api.key_metrics import KeyMetrics
from serving.delivery.promotion import Phase, Result
from serving.delivery.version_stats import VersionStats
from serving.delivery.versions import Versions
from serving.engine.messages import FinishReason, SequenceRequest, StepReport

ABORTED = "abort"  # a sequence whose client left, or whose engine died


class Role(StrEnum):
    """A version's part in a promotion. Dashboards compare the two."""

    STABLE = "stable"  # the one that serves after a rollback
    CANARY = "canary"  # the one that is being promoted


class ReplicaMetrics:
    """Counts sequences where vLLM counts requests: one for each prompt and each choice of a
    request."""

    def __init__(self, *, versions: Versions, replica: str, start_s: float) -> None:
        labels = {"model_name": versions.delivery.model_name, "replica": replica}
        self.exported = exported = Metrics(Exporter.REPLICA, **labels)
        exported.of("vllm:num_requests_running").set_function(lambda: versions.num_running)
        exported.of("vllm:num_requests_waiting").set_function(lambda: versions.num_waiting)
        exported.of("vllm:kv_cache_usage_perc").set_function(lambda: versions.kv_cache_usage)
        exported.of("raymill:predicted_queue_seconds").set_function(
            lambda: versions.expected_wait_s
        )
        exported.of("raymill:replica_start_seconds").set(start_s)
        exported.of("raymill:draining").set_function(lambda: versions.delivery.draining)
        for phase in Phase:
            is_now = _whether(lambda: versions.delivery.phase, phase)
            exported.of("raymill:promotion_phase", phase=phase).set_function(is_now)
        for result in get_args(Result):
            was_last = partial(_has_ended, versions, result)
            exported.of("raymill:last_promotion", result=result).set_function(was_last)
        exported.collectors.register(EngineMetrics(versions, labels))
        self._versions = versions
        self.by_key = KeyMetrics(exported)
        self.of = by_version(exported, lambda version: VersionMetrics(exported, version, versions))

    def publish(self, *, application: str) -> None:
        """Publishes, also the zeros of a version that has not answered yet: rates need a first
        value."""
        for line in self._versions.delivery.lines.values():
            for needed in line.needed:
                self.of(needed.version)
        self.exported.publish(application=application)


class VersionMetrics:
    """The metrics of one version. It observes the engine's steps."""

    def __init__(self, exported: Metrics, version: str, versions: Versions) -> None:
        self.ended = {
            reason: exported.of("vllm:request_success", version=version, finished_reason=reason)
            for reason in (*FinishReason, ABORTED)
        }
        self.chats_refused = exported.of("raymill:chats_refused", version=version)
        self.prompt_tokens = exported.of("vllm:prompt_tokens", version=version)
        self.generation_tokens = exported.of("vllm:generation_tokens", version=version)
        self.ttft_s = exported.of("vllm:time_to_first_token_seconds", version=version)
        self.itl_s = exported.of("vllm:inter_token_latency_seconds", version=version)
        self.e2e_s = exported.of("vllm:e2e_request_latency_seconds", version=version)
        self._queue_s = exported.of("vllm:request_queue_time_seconds", version=version)
        self._looked_up = exported.of("vllm:prefix_cache_queries", version=version)
        self._found = exported.of("vllm:prefix_cache_hits", version=version)
        self._step_tokens = exported.of("vllm:iteration_tokens_total", version=version)
        self._step_s = exported.of("raymill:step_seconds", version=version)
        for role in Role:
            plays = partial(_plays, versions, version, role)
            exported.of("raymill:version_role", version=version, role=role).set_function(plays)

    def admitted(self, waited_s: float) -> None:
        self._queue_s.observe(waited_s)

    def stepped(self, report: StepReport) -> None:
        if report.num_tokens == 0:  # nothing was left to do
            return
        self._step_tokens.observe(report.num_tokens, times=len(report.steps_s))
        for step_s in report.steps_s:
            self._step_s.observe(step_s)
        if report.num_looked_up:
            self._looked_up.inc(report.num_looked_up)
            self._found.inc(report.num_found)


def _whether(read: Callable[[], Any], value: str) -> Callable[[], bool]:
    """Returns what a gauge shows: whether `read` gives `value` at that moment."""
    return lambda: read() == value


def _has_ended(versions: Versions, result: str) -> bool:
    """Returns whether the last promotion of the model, or of an adapter, had this result."""
    outcomes = [line.outcome for line in versions.delivery.lines.values()]
    return any(outcome is not None and outcome.result == result for outcome in outcomes)


def _plays(versions: Versions, version: str, role: Role) -> bool:
    found = versions.delivery.stable if role is Role.STABLE else versions.delivery.canary
    return found is not None and found.version == version


class EngineMetrics(Collector):
    """The live engine's own metrics, which only vLLM has, as of the collection before. Metrics that
    the replica counts itself are left out: they are sequences here, and requests in vLLM, whose
    requests are sequences."""

    def __init__(self, versions: Versions, labels: dict[str, str]) -> None:
        self._versions = versions
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for name, kind, text, samples in self._versions.live.engine.metrics():
            if name not in metrics():
                family = Metric(name, text, kind)
                for sample_name, labels, value in samples:
                    family.add_sample(sample_name, labels | self._labels, value)
                yield family


@dataclass(frozen=True)
class SeriesFor(Collector):
    """The metrics that a client may see: none of other keys."""

    key: str | None
    whole: CollectorRegistry

    def collect(self) -> Iterator[Metric]:
        for family in self.whole.collect():
            family.samples = [
                sample
                for sample in family.samples
                if sample.labels.get("key", self.key) == self.key
            ]
            yield family


@dataclass(frozen=True)
class WatchedSteps:
    """Observes the engine's steps for the metrics of a version, and for what its promotion is
    judged by."""

    metrics: VersionMetrics
    stats: VersionStats

    def admitted(self, waited_s: float) -> None:
        self.metrics.admitted(waited_s)

    def stepped(self, report: StepReport) -> None:
        self.metrics.stepped(report)
        num_drawn = len([event for event in report.events if event.token_id is not None])
        num_steps = len(report.steps_s)
        if num_drawn and num_drawn == num_steps * report.num_tokens:  # they read no prompt
            self.stats.stepped(report.num_tokens, sum(report.steps_s), num_steps=num_steps)


@dataclass(eq=False)
class RequestTimer:
    """Times one request's sequences, each since it got in line, for the metrics and for the version
    that answers: the last of 256 prompts waits for those before it, and not for a slow engine."""

    metrics: VersionMetrics
    stats: VersionStats
    entered_s: Mapping[int, float]  # by sequence
    last_token_s: dict[int, float | None]  # of the open sequences; None before their first one
    # Tokens since `count`; and those that came together with the one before
    num_uncounted: int = 0
    num_together: int = 0

    @classmethod
    def of(
        cls,
        sequences: Sequence[SequenceRequest],
        metrics: VersionMetrics,
        stats: VersionStats,
        entered_s: Mapping[int, float],
    ) -> Self:
        return cls(metrics, stats, entered_s, {sequence.seq_id: None for sequence in sequences})

    def tokens(self, seq_id: int, now_s: float, *, num_tokens: int) -> None:
        """Times a sequence's tokens, which have come together."""
        self.num_uncounted += num_tokens
        last_s = self.last_token_s[seq_id]
        self.num_together += num_tokens - (last_s != now_s)
        if last_s is None:
            self.metrics.ttft_s.observe(now_s - self.entered_s[seq_id])
        elif last_s != now_s:
            self.metrics.itl_s.observe(now_s - last_s)
        self.last_token_s[seq_id] = now_s

    def count(self) -> None:
        """Counts the tokens that have come: a counter and a histogram take as long for one as for
        many of the same value."""
        if self.num_uncounted == 0:
            return
        self.metrics.generation_tokens.inc(self.num_uncounted)
        self.metrics.itl_s.observe(0.0, times=self.num_together)
        self.num_uncounted = self.num_together = 0

    def finished(self, seq_id: int, finish_reason: str) -> None:
        del self.last_token_s[seq_id]
        self.metrics.ended[finish_reason].inc()
        if finish_reason != ABORTED:
            since_start_s = time.monotonic() - self.entered_s[seq_id]
            self.metrics.e2e_s.observe(since_start_s)
            self.stats.sequences += 1
            self.stats.errors += finish_reason == FinishReason.ERROR

    def close(self) -> None:
        """Counts every sequence that has not finished as aborted."""
        self.count()
        for seq_id in list(self.last_token_s):
            self.finished(seq_id, ABORTED)
