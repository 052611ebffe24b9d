"""What a replica measures of itself, in Prometheus' text format and under vLLM's names, so its dashboards work."""

import time
from collections.abc import Callable

from prometheus_client import generate_latest

from cluster.monitoring.metric_export import Metrics
from cluster.monitoring.metric_table import Exporter
from serving.delivery.loaded_version import StatsCounter
from serving.delivery.versions import Versions
from serving.engine.messages import FinishReason

ABORTED = "abort"  # a sequence whose client went away, or whose engine did


class ReplicaMetrics:
    """Where vLLM counts requests, these count sequences: each prompt and each choice of a request is one."""

    def __init__(
        self,
        *,
        versions: Versions,
        model_name: str,
        replica: str,
        start_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.exported = metrics = Metrics(Exporter.REPLICA, model_name=model_name, replica=replica)
        metrics.of("vllm:num_requests_running").set_function(lambda: versions.num_running)
        metrics.of("vllm:num_requests_waiting").set_function(lambda: versions.num_waiting)
        metrics.of("vllm:kv_cache_usage_perc").set_function(lambda: versions.kv_cache_usage)
        metrics.of("raymill:predicted_queue_seconds").set_function(lambda: versions.expected_wait_s)
        metrics.of("raymill:replica_start_seconds").set(start_s)
        for reason in (*FinishReason, ABORTED):
            metrics.of("vllm:request_success", finished_reason=reason)
        self._prompt_tokens = metrics.of("vllm:prompt_tokens")
        self._generation_tokens = metrics.of("vllm:generation_tokens")
        self._ttft_s = metrics.of("vllm:time_to_first_token_seconds")
        self._itl_s = metrics.of("vllm:inter_token_latency_seconds")
        self._e2e_s = metrics.of("vllm:e2e_request_latency_seconds")

    def start_request(self, seq_ids: list[int], *, num_prompt_tokens: int, stats: StatsCounter) -> "RequestTimer":
        """`stats` are the ones of the version that answers."""
        self._prompt_tokens.inc(num_prompt_tokens)
        return RequestTimer(self, seq_ids, stats)

    def render(self) -> bytes:
        return generate_latest(self.exported.collectors)

    def now_s(self) -> float:
        return self._clock()

    def observe_first_token(self, since_start_s: float) -> None:
        self._generation_tokens.inc()
        self._ttft_s.observe(since_start_s)

    def observe_next_token(self, since_last_s: float) -> None:
        self._generation_tokens.inc()
        self._itl_s.observe(since_last_s)

    def observe_end(self, finish_reason: str, *, since_start_s: float) -> None:
        self.exported.of("vllm:request_success", finished_reason=finish_reason).inc()
        if finish_reason != ABORTED:
            self._e2e_s.observe(since_start_s)


class RequestTimer:
    """The times of one request's sequences, from its admission on."""

    def __init__(self, metrics: ReplicaMetrics, seq_ids: list[int], stats: StatsCounter) -> None:
        self._metrics = metrics
        self._stats = stats
        self._start_s = metrics.now_s()
        self._last_token_s: dict[int, float | None] = dict.fromkeys(seq_ids)  # of the open sequences

    def token(self, seq_id: int) -> None:
        now_s, last_s = self._metrics.now_s(), self._last_token_s[seq_id]
        if last_s is None:
            self._metrics.observe_first_token(now_s - self._start_s)
        else:
            self._metrics.observe_next_token(now_s - last_s)
        self._last_token_s[seq_id] = now_s
        self._stats.token()

    def finished(self, seq_id: int, finish_reason: str) -> None:
        del self._last_token_s[seq_id]
        since_start_s = self._metrics.now_s() - self._start_s
        self._metrics.observe_end(finish_reason, since_start_s=since_start_s)
        if finish_reason != ABORTED:
            self._stats.ended(since_start_s=since_start_s, failed=finish_reason == FinishReason.ERROR)

    def close(self) -> None:
        """Whatever has not finished is aborted."""
        for seq_id in list(self._last_token_s):
            self.finished(seq_id, ABORTED)
