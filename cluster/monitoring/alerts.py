"""The alerts, as rules for Prometheus: what wakes a person, and what to look at first."""

from dataclasses import dataclass
from typing import Any

from cluster.monitoring.metric_table import BUDGET, FAST_BURN, METRICS, OBJECTIVE, SLOW_BURN, error_ratio

STALLED_S = 600  # at least, and twenty times the last step
NO_CHECKPOINT_S = 7200
RESTARTS, RESTART_WINDOW = 3, "30m"
QUEUE_S = 10
DRAINED_FOR = "30m"
AWAY_S = 120  # of the coordinator, which takes seconds to restart


@dataclass(frozen=True)
class Alert:
    name: str
    expr: str
    for_: str  # how long it must hold
    severity: str  # `page` wakes a person, `ticket` waits for the morning
    summary: str
    action: str


def _of_run(name: str, modifier: str = "") -> str:
    (series,) = METRICS[f"raymill_train_{name}"].series
    return f"max by (run) ({series}{modifier})"


def _growth(name: str, window: str) -> str:
    (series,) = METRICS[f"raymill_train_{name}"].series
    return f"max by (run) (max_over_time({series}[{window}]) - min_over_time({series}[{window}]))"


def _burning(factor: float, *windows: str) -> str:
    return " and ".join(f"({error_ratio(window)}) > {factor:g} * {BUDGET}" for window in windows)


def _answers(outcome: str, window: str) -> str:
    (series,) = METRICS["raymill:http_answers"].series
    return f'sum(rate({series}{{outcome="{outcome}"}}[{window}]))'


_LAST_STEP = f"time() - {_of_run('last_step_timestamp_seconds')}"
_LAST_CHECKPOINT = f"time() - {_of_run('last_checkpoint_timestamp_seconds')}"
_RUNNING = f"{_of_run('running')} == 1"
_TARGET = "sum by (application, deployment) (ray_serve_autoscaling_target_replicas)"
_HEALTHY = "sum by (application, deployment) (ray_serve_deployment_replica_healthy)"

ALERTS = (
    Alert(
        "RaymillTrainingStalled",
        f"({_LAST_STEP} > clamp_min(20 * {_of_run('step_seconds')}, {STALLED_S})) and on (run) ({_RUNNING})",
        "2m",
        "page",
        "Run {{ $labels.run }} is running and has completed no step for {{ $value | humanizeDuration }}",
        "The job's log says what the run waits for; `raymill why-slow RUN` says what it did before.",
    ),
    Alert(
        "RaymillNoCheckpoint",
        f"({_RUNNING} and on (run) {_of_run('running', f' offset {NO_CHECKPOINT_S}s')} == 1) "
        f"unless on (run) ({_LAST_CHECKPOINT} < {NO_CHECKPOINT_S})",
        "5m",
        "page",
        f"Run {{{{ $labels.run }}}} has stored no checkpoint for {NO_CHECKPOINT_S // 3600} hours",
        "Look for storage_down and checkpoint_refused in the ledger; compare checkpoint.save_every_steps with a "
        "step's time.",
    ),
    Alert(
        "RaymillTrainingNotFinite",
        f"{_growth('skipped_steps', '15m')} > 0 or {_growth('rollbacks', '15m')} > 0",
        "0m",
        "ticket",
        "Run {{ $labels.run }} left out steps, for NaN or a spike of the loss",
        "The ledger's events skip and rollback name the steps and their samples.",
    ),
    Alert(
        "RaymillRestartLoop",
        f"{_growth('restarts', RESTART_WINDOW)} > {RESTARTS}",
        "0m",
        "page",
        f"Run {{{{ $labels.run }}}} restarted {{{{ $value }}}} times in {RESTART_WINDOW}",
        "The ledger's events failure and hang give rank and reason.",
    ),
    Alert(
        "RaymillEndpointErrorBudgetFastBurn",
        _burning(FAST_BURN, "1h", "5m"),
        "2m",
        "page",
        f"Completions fail so fast that 2% of the error budget of {OBJECTIVE:.1%} went in an hour",
        "Look at replicas and promotions on the serving dashboard; `raymill rollback` returns to the version before.",
    ),
    Alert(
        "RaymillEndpointErrorBudgetSlowBurn",
        _burning(SLOW_BURN, "6h", "30m"),
        "15m",
        "ticket",
        f"Completions fail so fast that 5% of the error budget of {OBJECTIVE:.1%} went in six hours",
        "Do as for the fast burn, with more time.",
    ),
    Alert(
        "RaymillEndpointDrained",
        f"{_answers('drained', '5m')} > 0",
        DRAINED_FOR,
        "ticket",
        f"Completions have been refused for {DRAINED_FOR}, as the endpoint is drained: {{{{ $value }}}} a second",
        "A drain lasts until it is ended, even over restarts: POST /admin/drain with drain=false ends it.",
    ),
    Alert(
        "RaymillQueueTooLong",
        f"max by (application) (ray_raymill_predicted_queue_seconds) > {QUEUE_S}",
        "5m",
        "ticket",
        "A new sequence of {{ $labels.application }} waits {{ $value | humanizeDuration }}",
        "Raise replicas.max_replicas, or find out why replicas are slow.",
    ),
    Alert(
        "RaymillCoordinatorAway",
        f"max by (application) (ray_raymill_coordinator_away_seconds) > {AWAY_S}",
        "0m",
        "ticket",
        "Replicas of {{ $labels.application }} have had no coordinator for {{ $value | humanizeDuration }}",
        "They keep serving, but nothing can be promoted or rolled back. A replica's log says why it fails.",
    ),
    Alert(
        "RaymillReplicaMissing",
        f"({_TARGET} - {_HEALTHY} > 0) or ({_TARGET} > 0 unless on (application, deployment) {_HEALTHY})",
        "5m",
        "page",
        "{{ $labels.application }}/{{ $labels.deployment }} lacks {{ $value }} replicas",
        "`kubectl get pods` or `raymill` logs say why replicas do not start: no room, or a checkpoint that fails.",
    ),
)


def rules() -> dict[str, Any]:
    """Returns the content of a rules file."""
    found = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.for_,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.action},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "raymill", "rules": found}]}
