"""The panels of each dashboard, with units and explanations from the metric table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.monitoring.metric_table import (
    COUNT,
    FAST_BURN,
    METRICS,
    MONEY,
    OBJECTIVE,
    PER_S,
    PERIOD,
    RATIO,
    REQUESTS_PER_S,
    SLOW_BURN,
    TOKENS_PER_S,
    Exporter,
    Kind,
    budget_left,
    burn_rate,
    error_ratio,
)

RATE = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    about: str
    queries: Mapping[str, str]  # expressions by legend
    is_stat: bool = False
    is_stacked: bool = False
    names: tuple[str, ...] = ()  # of known series, each with its color
    thresholds: tuple[float, float] | None = None  # above them a value is doubtful, and bad
    top: float | None = None  # of the axis


@dataclass(frozen=True)
class Variable:
    """A choice above the panels among the values of a label."""

    name: str
    metric: str
    is_multi: bool = False


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    rows: dict[str, Sequence[Panel]]
    variables: tuple[Variable, ...] = ()
    annotations: tuple[str, ...] = ()  # kinds of events


def series(name: str, suffix: str = "", **labels: str) -> str:
    """Returns the series of a metric that the dashboard's variables choose. `suffix` is one of a histogram's."""
    metric = METRICS[name]
    chosen = dict(labels)
    if metric.exporter is Exporter.LAUNCHER:
        chosen["run"] = '="$run"'
    elif metric.exporter is Exporter.REPLICA or "application" in metric.labels:
        chosen["application"] = '=~"$application"'
    (full,) = [found for found in metric.series if found.endswith(suffix)]
    return full + ("{" + ",".join(f"{key}{value}" for key, value in chosen.items()) + "}" if chosen else "")


def lines(title: str, *names: str, by: str = "", op: str = "max", stacked: bool = False, **options: Any) -> Panel:
    """Returns lines for metrics, or for the values of the label `by`; of counters, their growth per second."""
    metrics = [METRICS[name] for name in names]
    grouping = f" by ({by})" if by else ""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", ")) if by else title
    queries = {}
    for metric in metrics:
        value = series(metric.name)
        is_counter = metric.kind is Kind.COUNTER
        expr = f"sum{grouping} (rate({value}[{RATE}]))" if is_counter else f"{op}{grouping} ({value})"
        queries[metric.help if len(names) > 1 else legend] = expr
    first = metrics[0]
    unit = PER_S[first.unit] if first.kind is Kind.COUNTER else first.unit
    about = ". ".join(metric.help for metric in metrics) + "."
    known = first.values if by in first.labels else ()
    return Panel(title, unit, about, queries, is_stacked=stacked, names=known, **options)


def stat(title: str, name: str) -> Panel:
    return lines(title, name, is_stat=True)


def quantiles(title: str, name: str) -> Panel:
    """Returns the quantiles of a histogram."""
    buckets = f"sum by (le) (rate({series(name, '_bucket')}[{RATE}]))"
    queries = {f"p{q}": f"histogram_quantile({q / 100}, {buckets})" for q in (50, 95, 99)}
    return Panel(title, METRICS[name].unit, f"{METRICS[name].help}.", queries)


def age(title: str, name: str, *, bad_s: float) -> Panel:
    about = f"Since: {METRICS[name].help.lower()}."
    return number(title, "s", about, f"time() - max ({series(name)})", thresholds=(bad_s / 2, bad_s))


def number(title: str, unit: str, about: str, expr: str, **options: Any) -> Panel:
    return Panel(title, unit, about, {title: expr}, is_stat=True, **options)


def _now(name: str) -> str:
    return f"max ({series(name)})"


_HEALTHY, _DROPPED = "ray_serve_deployment_replica_healthy", "raymill_data_dropped_documents"
_STEP, _TOKENS, _COST = map(_now, ("raymill_train_step", "raymill_train_tokens_seen", "raymill_cost_money"))
_BURN = "1 just uses up the budget."
_DEVICES, _USED = '=~"CPU|GPU"', '="USED"'
_RUN = Variable("run", "raymill_train_step")
_APPLICATION = Variable("application", "vllm:num_requests_running", is_multi=True)

TRAINING = Dashboard(
    "raymill-training",
    "raymill: training",
    {
        "Now": [
            stat("Running", "raymill_train_running"),
            number("Done", RATIO, "Share of the run's steps.", f"{_STEP} / {_now('raymill_train_planned_steps')}"),
            stat("Loss", "raymill_train_loss"),
            stat("Throughput", "raymill_train_tokens_per_second"),
            stat("Workers", "raymill_train_world_size"),
            stat("Goodput", "raymill_train_goodput"),
            stat("Restarts", "raymill_train_restarts"),
            stat("Steps lost", "raymill_train_lost_steps"),
            age("Age of the last step", "raymill_train_last_step_timestamp_seconds", bad_s=600),
            age("Age of the last snapshot", "raymill_train_last_snapshot_timestamp_seconds", bad_s=600),
            age("Age of the last checkpoint", "raymill_train_last_checkpoint_timestamp_seconds", bad_s=7200),
            stat("Tokens seen", "raymill_train_tokens_seen"),
        ],
        "Learning": [
            lines("Training loss", "raymill_train_loss"),
            lines("Validation loss", "raymill_train_validation_loss", by="set"),
            lines("Bits per byte", "raymill_train_validation_bits_per_byte", by="set"),
            lines("Learning rate", "raymill_train_learning_rate"),
            lines("Gradient norm", "raymill_train_grad_norm"),
            lines("Steps left out", "raymill_train_skipped_steps", "raymill_train_rollbacks"),
        ],
        "Speed": [
            lines("Throughput", "raymill_train_tokens_per_second"),
            lines("Model FLOPs utilization", "raymill_train_mfu"),
            lines("Where a step's time goes", "raymill_train_phase_seconds", by="phase", stacked=True),
            lines("Step", "raymill_train_step_seconds"),
        ],
        "Elasticity and faults": [
            lines("Workers", "raymill_train_world_size"),
            lines("Restarts", "raymill_train_restarts", "raymill_train_resizes"),
            lines("Failures", "raymill_train_failures", by="kind"),
            lines("Goodput", "raymill_train_goodput"),
        ],
        "Data": [
            lines("Source bytes read a second", "raymill_data_source_bytes", by="stage"),
            lines("Documents a second", "raymill_data_documents", by="stage"),
            lines("Tokens written a second", "raymill_data_tokens", by="stage"),
            Panel(
                "Documents left out",
                COUNT,
                f"{METRICS[_DROPPED].help}.",
                {"{{reason}}": f"max by (reason) ({series(_DROPPED)})"},
            ),
            lines("Tasks left", "raymill_data_queued_tasks", by="stage"),
            lines("Memory of a worker", "raymill_data_worker_rss_bytes", by="stage"),
        ],
    },
    (_RUN,),
    ("kill", "restart", "resize", "rollback", "checkpoint", "preemption", "promotion"),
)

SERVING = Dashboard(
    "raymill-serving",
    "raymill: serving",
    {
        "Now": [
            number(
                "Completions", REQUESTS_PER_S, "All that end.", f"sum (rate({series('raymill:http_answers')}[{RATE}]))"
            ),
            lines("Tokens generated a second", "vllm:generation_tokens", is_stat=True),
            lines("Running", "vllm:num_requests_running", op="sum", is_stat=True),
            lines("Waiting", "vllm:num_requests_waiting", op="sum", is_stat=True),
            stat("Wait of a new sequence", "raymill:predicted_queue_seconds"),
            lines("Healthy replicas", _HEALTHY, op="sum", is_stat=True),
        ],
        "Answers": [
            lines("Completions a second, by how they ended", "raymill:http_answers", by="outcome", stacked=True),
            quantiles("Time to the first token", "vllm:time_to_first_token_seconds"),
            quantiles("Time between tokens", "vllm:inter_token_latency_seconds"),
            quantiles("Time of a whole sequence", "vllm:e2e_request_latency_seconds"),
        ],
        "Engine": [
            lines("Sequences", "vllm:num_requests_running", "vllm:num_requests_waiting", op="sum"),
            lines("KV cache in use", "vllm:kv_cache_usage_perc", by="replica", top=1),
            lines("Tokens a second", "vllm:prompt_tokens", "vllm:generation_tokens"),
            lines("Sequences ended a second, by reason", "vllm:request_success", by="finished_reason"),
            lines("Wait of a new sequence", "raymill:predicted_queue_seconds", by="replica"),
            lines("Start of a replica", "raymill:replica_start_seconds", by="replica"),
        ],
        "Replicas": [
            lines("Replicas", _HEALTHY, "ray_serve_autoscaling_target_replicas", op="sum"),
            lines("Time without the coordinator", "raymill:coordinator_away_seconds", by="replica"),
        ],
    },
    (_APPLICATION,),
    ("promotion",),
)

CLUSTER = Dashboard(
    "raymill-cluster",
    "raymill: cluster",
    {
        "Nodes": [
            lines("Nodes", "ray_cluster_active_nodes", by="node_type", stacked=True),
            lines("Nodes that the autoscaler waits for", "ray_cluster_pending_nodes", by="node_type"),
            Panel(
                "CPUs and GPUs taken",
                COUNT,
                "Logical resources in use, and all there are.",
                {
                    "{{Name}} taken": f"sum by (Name) ({series('ray_resources', Name=_DEVICES, State=_USED)})",
                    "{{Name}} in all": f"sum by (Name) ({series('ray_resources', Name=_DEVICES)})",
                },
            ),
        ],
        "Load": [
            lines("CPU", "ray_node_cpu_utilization", by="ip", top=100),
            Panel(
                "Memory",
                RATIO,
                "Share of each node's memory in use.",
                {"{{ip}}": f"max by (ip) ({series('ray_node_mem_used')} / {series('ray_node_mem_total')})"},
            ),
            lines("GPU", "ray_node_gpus_utilization", by="ip, GpuIndex", top=100),
            lines("GPU memory", "ray_node_gram_used", by="ip, GpuIndex"),
            lines("Disk", "ray_node_disk_utilization_percentage", by="ip", top=100),
            lines("Network", "ray_node_network_send_speed", "ray_node_network_receive_speed", op="sum"),
            lines("Object store", "ray_object_store_memory", by="Location", op="sum"),
        ],
    },
)

COST = Dashboard(
    "raymill-cost",
    "raymill: cost",
    {
        "Cost of the run": [
            lines("Device time", "raymill_cost_device_seconds", by="device", is_stat=True),
            stat("Money", "raymill_cost_money"),
            stat("Money an hour", "raymill_cost_money_per_hour"),
            number("Money for a million tokens", MONEY, "Of the run so far.", f"{_COST} / {_TOKENS} * 1e6"),
            number(
                "Tokens a device-second",
                TOKENS_PER_S,
                "Tokens trained on, by the GPU-seconds or CPU-seconds held.",
                f"{_TOKENS} / {_now('raymill_cost_device_seconds')}",
            ),
            stat("Goodput", "raymill_train_goodput"),
            lines("Money so far", "raymill_cost_money"),
            lines("Workers paid for", "raymill_train_world_size"),
        ],
    },
    (_RUN,),
    ("resize",),
)

OBJECTIVES = Dashboard(
    "raymill-slo",
    "raymill: objective of the endpoint",
    {
        "Availability": [
            number(
                f"Answered, {PERIOD}",
                RATIO,
                f"Share of the valid completions that were answered whole; the objective is {OBJECTIVE:.1%}.",
                f"1 - {error_ratio(PERIOD)}",
            ),
            number("Error budget left", RATIO, f"Of the {PERIOD}; below 0 it is overspent.", budget_left()),
            number("Burn rate, 1 h", COUNT, _BURN, burn_rate("1h"), thresholds=(1, FAST_BURN)),
            number("Burn rate, 6 h", COUNT, _BURN, burn_rate("6h"), thresholds=(1, SLOW_BURN)),
            Panel(
                "Burn rate of the error budget",
                COUNT,
                f"{_BURN} Alerts fire where both 1 h and 5 m exceed {FAST_BURN:g}, or both 6 h and 30 m exceed "
                f"{SLOW_BURN:g}.",
                {window: burn_rate(window) for window in ("5m", "30m", "1h", "6h")},
                thresholds=(SLOW_BURN, FAST_BURN),
            ),
            Panel("Failed completions", RATIO, "Share of the valid ones.", {"failed": error_ratio(RATE)}),
        ],
    },
    annotations=("promotion",),
)

DASHBOARDS = (TRAINING, SERVING, CLUSTER, COST, OBJECTIVES)
