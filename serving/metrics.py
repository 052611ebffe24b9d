"""What a replica measures of itself, in Prometheus' text format and under vLLM's names, so its dashboards work."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.admission import predicted_wait_s
from serving.engine_client import EngineClient
from serving.loaded_version import StatsCounter
from serving.messages import FinishReason
from serving.versions import Versions

# Bucket bounds in seconds, vLLM's own.
TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
ITL_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E_BUCKETS_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

RESIDENCE_WEIGHT = 0.1  # of the latest sequence
ABORTED = "abort"  # a sequence whose client went away, or whose engine did


class ReplicaMetrics:
    """Where vLLM counts requests, these count sequences: each prompt and each choice of a request is one."""

    def __init__(
        self,
        *,
        versions: Versions,
        num_slots: int,
        model_name: str,
        replica: str,
        start_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._num_slots = num_slots
        self._residence_s = 0.0  # mean time from a sequence's first token to its end, of recent ones
        self._registry = registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "replica": replica}
        names = tuple(self._labels)

        running = Gauge("vllm:num_requests_running", "Sequences that hold KV cache blocks", names, registry=registry)
        waiting = Gauge("vllm:num_requests_waiting", "Sequences that wait for blocks", names, registry=registry)
        usage = Gauge("vllm:kv_cache_usage_perc", "Share of the blocks in use, 0 to 1", names, registry=registry)
        running.labels(**self._labels).set_function(lambda: versions.num_running)
        waiting.labels(**self._labels).set_function(lambda: versions.num_waiting)
        usage.labels(**self._labels).set_function(lambda: versions.kv_cache_usage)

        predicted = Gauge("raymill:predicted_queue_seconds", "What a new sequence waits", names, registry=registry)
        predicted.labels(**self._labels).set_function(lambda: self.predicted_wait_s(versions.live.engine))

        start = Gauge(
            "raymill:replica_start_seconds", "From its constructor to its self-test", names, registry=registry
        )
        start.labels(**self._labels).set(start_s)

        self._success = Counter(
            "vllm:request_success", "Sequences ended, by reason", (*names, "finished_reason"), registry=registry
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens admitted")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated")
        self._ttft_s = self._histogram(
            "vllm:time_to_first_token_seconds", "From admission to the first token", TTFT_BUCKETS_S
        )
        self._itl_s = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a sequence", ITL_BUCKETS_S
        )
        self._e2e_s = self._histogram(
            "vllm:e2e_request_latency_seconds", "From admission to the end of a sequence", E2E_BUCKETS_S
        )

    def predicted_wait_s(self, engine: EngineClient) -> float:
        """How long a sequence that came now would wait for a slot of `engine`."""
        return predicted_wait_s(
            num_open=engine.num_open_sequences, num_slots=self._num_slots, residence_s=self._residence_s
        )

    def start_request(self, seq_ids: list[int], *, num_prompt_tokens: int, stats: StatsCounter) -> "RequestTimer":
        """`stats` are the ones of the version that answers."""
        self._prompt_tokens.inc(num_prompt_tokens)
        return RequestTimer(self, seq_ids, stats)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def now_s(self) -> float:
        return self._clock()

    def observe_first_token(self, since_start_s: float) -> None:
        self._generation_tokens.inc()
        self._ttft_s.observe(since_start_s)

    def observe_next_token(self, since_last_s: float) -> None:
        self._generation_tokens.inc()
        self._itl_s.observe(since_last_s)

    def observe_end(self, finish_reason: str, *, since_start_s: float, since_first_token_s: float | None) -> None:
        self._success.labels(**self._labels, finished_reason=finish_reason).inc()
        if since_first_token_s is not None:
            weight = RESIDENCE_WEIGHT if self._residence_s else 1.0
            self._residence_s += weight * (since_first_token_s - self._residence_s)
        if finish_reason != ABORTED:
            self._e2e_s.observe(since_start_s)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, tuple(self._labels), registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets_s: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, tuple(self._labels), registry=self._registry, buckets=buckets_s)
        return histogram.labels(**self._labels)


class RequestTimer:
    """The times of one request's sequences, from its admission on."""

    def __init__(self, metrics: ReplicaMetrics, seq_ids: list[int], stats: StatsCounter) -> None:
        self._metrics = metrics
        self._stats = stats
        self._start_s = metrics.now_s()
        self._last_token_s: dict[int, float | None] = dict.fromkeys(seq_ids)  # of the open sequences
        self._first_token_s: dict[int, float] = {}

    def token(self, seq_id: int) -> None:
        now_s, last_s = self._metrics.now_s(), self._last_token_s[seq_id]
        if last_s is None:
            self._metrics.observe_first_token(now_s - self._start_s)
            self._first_token_s[seq_id] = now_s
        else:
            self._metrics.observe_next_token(now_s - last_s)
        self._last_token_s[seq_id] = now_s
        self._stats.token()

    def finished(self, seq_id: int, finish_reason: str) -> None:
        del self._last_token_s[seq_id]
        now_s, first_s = self._metrics.now_s(), self._first_token_s.pop(seq_id, None)
        since_start_s = now_s - self._start_s
        self._metrics.observe_end(
            finish_reason,
            since_start_s=since_start_s,
            since_first_token_s=None if first_s is None else now_s - first_s,
        )
        if finish_reason != ABORTED:
            self._stats.ended(since_start_s=since_start_s, failed=finish_reason == FinishReason.ERROR)

    def close(self) -> None:
        """Whatever has not finished is aborted."""
        for seq_id in list(self._last_token_s):
            self.finished(seq_id, ABORTED)
