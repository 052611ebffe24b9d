"""The table of all metrics that raymill exports and its dashboards and alerts read, with units and meanings.

There are no others: `metric_export.py` refuses a name that is not here, and no panel or rule reads one.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from functools import partial
from typing import Literal, get_args


class Kind(StrEnum):
    COUNTER = "counter"  # only grows while its process lives
    GAUGE = "gauge"  # the value now
    HISTOGRAM = "histogram"


ENDS = {Kind.COUNTER: ("_total",), Kind.GAUGE: ("",), Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
"""Ends of the names by which Prometheus sees a metric."""


class Exporter(StrEnum):
    """The process that exports a metric, which reaches Prometheus through the metrics port of its Ray node."""

    LAUNCHER = "launcher"  # the driver of jobs.pretrain, from the run's ledger
    DATA = "data"  # the driver of a stage that reads a corpus
    REPLICA = "replica"  # each replica of the endpoint
    PROXY = "proxy"  # each HTTP proxy of the endpoint
    RAY = "ray"  # Ray itself: only those that dashboards and alerts read


COMMON_LABELS: dict[Exporter, tuple[str, ...]] = {
    Exporter.LAUNCHER: ("run",),
    Exporter.DATA: ("stage",),
    Exporter.REPLICA: ("model_name", "replica"),  # beside `application`, which Ray Serve knows
    Exporter.PROXY: (),
    Exporter.RAY: (),
}

# Units as Grafana spells them.
SECONDS, BYTES, RATIO, PERCENT, COUNT = "s", "bytes", "percentunit", "percent", "short"
BYTES_PER_S, COUNTS_PER_S, REQUESTS_PER_S = "Bps", "cps", "reqps"
TOKENS, TOKENS_PER_S, NATS, BITS = "suffix: tokens", "suffix: tokens/s", "suffix: nats/token", "suffix: bits/byte"
STEPS, WORKERS, NODES, REPLICAS, MONEY = (f"suffix: {name}" for name in ("steps", "workers", "nodes", "replicas", "¤"))

PER_S = {COUNT: COUNTS_PER_S, BYTES: BYTES_PER_S, TOKENS: TOKENS_PER_S}
"""The unit of a counter's growth."""


@dataclass(frozen=True)
class Metric:
    name: str  # as exported, without _total
    unit: str
    help: str
    labels: tuple[str, ...] = ()  # beside the exporter's common ones
    values: tuple[str, ...] = ()  # of its label, if they are few and known
    buckets: tuple[float, ...] = ()  # upper bounds, of a histogram
    _: KW_ONLY
    kind: Kind
    exporter: Exporter

    @property
    def all_labels(self) -> tuple[str, ...]:
        return (*COMMON_LABELS[self.exporter], *self.labels)

    @property
    def series(self) -> tuple[str, ...]:
        """The names at a Ray node's metrics port."""
        if self.exporter is Exporter.RAY:
            return (self.name,)
        return tuple(f"ray_{self.name.replace(':', '_')}{end}" for end in ENDS[self.kind])


# Bucket bounds in seconds, vLLM's own.
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_ITL_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_E2E_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


Phase = Literal[
    "load", "forward", "loss", "backward", "sync", "update", "snapshot", "checkpoint", "validation", "statistics"
]
PHASES: tuple[str, ...] = get_args(Phase)
"""Parts of a training step: `loss` is the head and its cross-entropy, with their gradient; `sync` is the part of the
exchange that is not overlapped."""
REST, UNTIMED = "stall", "step"
"""The time that no phase claims; the only phase of a step that an earlier version did not time."""
FAILURES = ("user_error", "raised", "died", "lost", "hang")
FINISH_REASONS = ("stop", "length", "error", "abort")
OUTCOMES = ("ok", "invalid", "refused", "drained", "failed", "cut", "left")

# Figures of a whole run are gauges, even those that only grow: they continue from earlier launches.
_run = partial(Metric, kind=Kind.GAUGE, exporter=Exporter.LAUNCHER)
_read = partial(Metric, kind=Kind.COUNTER, exporter=Exporter.DATA)
_reading = partial(Metric, kind=Kind.GAUGE, exporter=Exporter.DATA)
_served = partial(Metric, kind=Kind.COUNTER, exporter=Exporter.REPLICA)
_serving = partial(Metric, kind=Kind.GAUGE, exporter=Exporter.REPLICA)
_times = partial(Metric, unit=SECONDS, kind=Kind.HISTOGRAM, exporter=Exporter.REPLICA)
_ray = partial(Metric, kind=Kind.GAUGE, exporter=Exporter.RAY)

TABLE: tuple[Metric, ...] = (
    # Training
    _run("raymill_train_running", COUNT, "1 while the launcher waits for the run's end, 0 once it has ended"),
    _run("raymill_train_step", STEPS, "Optimizer steps completed"),
    _run("raymill_train_planned_steps", STEPS, "Optimizer steps of the whole run"),
    _run("raymill_train_tokens_seen", TOKENS, "Tokens trained on"),
    _run("raymill_train_loss", NATS, "Cross-entropy of the last step"),
    _run("raymill_train_learning_rate", COUNT, "Learning rate of the last step"),
    _run("raymill_train_grad_norm", COUNT, "Norm of the summed gradient before clipping"),
    _run("raymill_train_tokens_per_second", TOKENS_PER_S, "Of the last step, without validation and checkpoints"),
    _run("raymill_train_mfu", RATIO, "Model FLOPs utilization, on GPUs whose peak is known"),
    _run("raymill_train_step_seconds", SECONDS, "Wall time of the last step, of rank 0"),
    _run("raymill_train_phase_seconds", SECONDS, "Its parts, which sum to it", ("phase",), (*PHASES, REST, UNTIMED)),
    _run("raymill_train_world_size", WORKERS, "Workers of the attempt that is on"),
    _run("raymill_train_validation_loss", NATS, "Of the held-out split (val) and of each further text", ("set",)),
    _run("raymill_train_validation_bits_per_byte", BITS, "The same per byte of text", ("set",)),
    _run("raymill_train_restarts", COUNT, "Attempts after the first, but for resumes of a run that was asked to end"),
    _run("raymill_train_resizes", COUNT, "Those of them with another number of workers than the one before"),
    _run("raymill_train_failures", COUNT, "Failures of a worker group, by kind, and hangs", ("kind",), FAILURES),
    _run("raymill_train_lost_steps", STEPS, "Completed steps that were lost and taken again"),
    _run("raymill_train_skipped_steps", STEPS, "Steps whose update the guard left out, for NaN or a spike"),
    _run("raymill_train_rollbacks", COUNT, "Times that the guard went back to an earlier state"),
    _run("raymill_train_goodput", RATIO, "Share of the wall time, without deliberate pauses, in steps that count"),
    _run("raymill_train_last_step_timestamp_seconds", SECONDS, "When the last step was completed, Unix time"),
    _run("raymill_train_last_checkpoint_timestamp_seconds", SECONDS, "When the last checkpoint was stored, Unix time"),
    _run("raymill_train_last_snapshot_timestamp_seconds", SECONDS, "When a node last kept a snapshot, Unix time"),
    # Cost
    _run("raymill_cost_device_seconds", SECONDS, "GPU-seconds, or CPU-seconds, that workers held", ("device",)),
    _run("raymill_cost_money_per_hour", MONEY, "Of the workers of now, where scaling.price_per_device_hour is set"),
    _run("raymill_cost_money", MONEY, "Of the run so far, where scaling.price_per_device_hour is set"),
    # Data
    _read("raymill_data_source_bytes", BYTES, "Source bytes finished"),
    _read("raymill_data_documents", COUNT, "Documents finished, dropped ones among them"),
    _read("raymill_data_tokens", TOKENS, "Tokens written"),
    _read("raymill_data_dropped_documents", COUNT, "Documents left out, counted when that is decided", ("reason",)),
    _reading("raymill_data_queued_tasks", COUNT, "Tasks that are not finished"),
    _reading("raymill_data_worker_rss_bytes", BYTES, "Resident memory of the worker that last finished a task"),
    # Serving, under vLLM's names; where vLLM counts requests, these count sequences
    _serving("vllm:num_requests_running", COUNT, "Sequences that hold KV cache blocks"),
    _serving("vllm:num_requests_waiting", COUNT, "Sequences that wait for blocks"),
    _serving("vllm:kv_cache_usage_perc", RATIO, "Share of the blocks in use, 0 to 1"),
    _served("vllm:request_success", COUNT, "Sequences ended, by reason", ("finished_reason",), FINISH_REASONS),
    _served("vllm:prompt_tokens", TOKENS, "Prompt tokens admitted"),
    _served("vllm:generation_tokens", TOKENS, "Tokens generated"),
    _times("vllm:time_to_first_token_seconds", help="From admission to the first token", buckets=_TTFT_S),
    _times("vllm:inter_token_latency_seconds", help="Between two tokens of a sequence", buckets=_ITL_S),
    _times("vllm:e2e_request_latency_seconds", help="From admission to the end of a sequence", buckets=_E2E_S),
    _serving("raymill:predicted_queue_seconds", SECONDS, "What a new sequence waits"),
    _serving("raymill:replica_start_seconds", SECONDS, "From its constructor to its self-test"),
    _serving("raymill:coordinator_away_seconds", SECONDS, "Without a usable answer of the coordinator"),
    Metric(
        "raymill:http_answers",
        COUNT,
        "Completions as their clients saw them end: answered, invalid (4xx), refused (429), refused while the "
        "endpoint is drained, failed (5xx), cut in the middle, or left by the client",
        ("outcome",),
        OUTCOMES,
        kind=Kind.COUNTER,
        exporter=Exporter.PROXY,
    ),
    # Ray's own
    _ray("ray_node_cpu_utilization", PERCENT, "CPU of a node in use, 0 to 100", ("ip",)),
    _ray("ray_node_mem_used", BYTES, "Memory of a node in use", ("ip",)),
    _ray("ray_node_mem_total", BYTES, "Memory of a node", ("ip",)),
    _ray("ray_node_disk_utilization_percentage", PERCENT, "Disk of a node in use, 0 to 100", ("ip",)),
    _ray("ray_node_network_send_speed", BYTES_PER_S, "Bytes sent by a node", ("ip",)),
    _ray("ray_node_network_receive_speed", BYTES_PER_S, "Bytes received by a node", ("ip",)),
    _ray("ray_node_gpus_utilization", PERCENT, "Use of each GPU, 0 to 100", ("ip", "GpuIndex")),
    _ray("ray_node_gram_used", "decmbytes", "Memory of each GPU in use", ("ip", "GpuIndex")),
    _ray("ray_cluster_active_nodes", NODES, "Nodes that are alive, by type", ("node_type",)),
    _ray("ray_cluster_pending_nodes", NODES, "Nodes that the autoscaler waits for", ("node_type",)),
    _ray("ray_resources", COUNT, "Logical CPUs and GPUs, by state (USED, AVAILABLE)", ("Name", "State")),
    _ray("ray_object_store_memory", BYTES, "Memory of the object store, by location", ("Location",)),
    _ray("ray_serve_deployment_replica_healthy", REPLICAS, "Healthy replicas", ("application", "deployment")),
    _ray(
        "ray_serve_autoscaling_target_replicas",
        REPLICAS,
        "Replicas that there should be",
        ("application", "deployment"),
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in TABLE}

SERIES: dict[str, Metric] = {name: metric for metric in TABLE for name in metric.series}
"""Metrics by their names in Prometheus."""


def metrics_of(exporter: Exporter) -> Iterator[Metric]:
    return (metric for metric in TABLE if metric.exporter is exporter)
