"""Every alert fires when it should and only then, by promtool on the rules that Prometheus gets."""

import re
from pathlib import Path

import yaml

from cluster.monitoring.dashboards import documents
from cluster.monitoring.files import files
from tests.metric_series import SERIES
from tests.prometheus import needs_prometheus, promtool

RULES = files()["prometheus/rules.yaml"]
ALERTS = {rule["alert"]: rule["expr"] for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"]}

RUN = '{run="a"}'
DEPLOYMENT = '{application="raymill",deployment="Replica"}'
AWAY = 'ray_raymill_coordinator_away_seconds{application="raymill",replica="r"}'

TRAINS = {
    f"ray_raymill_train_running{RUN}": "1x600",
    f"ray_raymill_train_last_step_timestamp_seconds{RUN}": "0+60x600",  # time() is 0 at the start, then 60 a minute
    f"ray_raymill_train_last_checkpoint_timestamp_seconds{RUN}": "0+60x600",
    f"ray_raymill_train_step_seconds{RUN}": "1x600",
    f"ray_raymill_train_skipped_steps{RUN}": "3x600",
    f"ray_raymill_train_rollbacks{RUN}": "1x600",
    f"ray_raymill_train_restarts{RUN}": "7x600",
}
SERVES = {
    'ray_raymill_http_answers_total{outcome="ok"}': "0+1000x600",
    'ray_raymill_http_answers_total{outcome="failed"}': "0x600",
    'ray_raymill_http_answers_total{outcome="cut"}': "0x600",
    'ray_raymill_http_answers_total{outcome="refused"}': "0+9000x600",
    'ray_raymill_http_answers_total{outcome="drained"}': "0x600",
    'ray_raymill_predicted_queue_seconds{application="raymill",replica="r"}': "2x600",
    AWAY: "0x600",
    f"ray_serve_autoscaling_target_replicas{DEPLOYMENT}": "2x600",
    f"ray_serve_deployment_replica_healthy{DEPLOYMENT}": "2x600",
}
FINE = TRAINS | SERVES
FAILED = 'ray_raymill_http_answers_total{outcome="failed"}'
DRAINED = FAILED.replace("failed", "drained")
LAST_STEP = f"ray_raymill_train_last_step_timestamp_seconds{RUN}"
LAST_CHECKPOINT = f"ray_raymill_train_last_checkpoint_timestamp_seconds{RUN}"
RUNNING = f"ray_raymill_train_running{RUN}"
HEALTHY = f"ray_serve_deployment_replica_healthy{DEPLOYMENT}"

# (what happens, series unlike those of FINE with None for those that are missing, minute, alerts that fire)
CASES: list[tuple[str, dict[str, str | None], int, set[str]]] = [
    ("all is well", {}, 400, set()),
    ("no step since the first", {LAST_STEP: "1x600"}, 20, {"RaymillTrainingStalled"}),
    ("such a time is usual", {LAST_STEP: "1x600", f"ray_raymill_train_step_seconds{RUN}": "100x600"}, 20, set()),
    ("the run has ended", {LAST_STEP: "1x600", LAST_CHECKPOINT: "1x600", RUNNING: "1x10 0x600"}, 400, set()),
    ("no checkpoint since the first", {LAST_CHECKPOINT: "1x600"}, 150, {"RaymillNoCheckpoint"}),
    ("no checkpoint at all", {LAST_CHECKPOINT: None}, 150, {"RaymillNoCheckpoint"}),
    ("no checkpoint yet", {LAST_CHECKPOINT: None}, 100, set()),
    ("a step skipped", {f"ray_raymill_train_skipped_steps{RUN}": "0x20 1x600"}, 25, {"RaymillTrainingNotFinite"}),
    ("long since", {f"ray_raymill_train_skipped_steps{RUN}": "0x20 1x600"}, 60, set()),
    ("a rollback", {f"ray_raymill_train_rollbacks{RUN}": "0x20 1x600"}, 25, {"RaymillTrainingNotFinite"}),
    ("restarts", {f"ray_raymill_train_restarts{RUN}": "0x20 1 2 3 4x600"}, 30, {"RaymillRestartLoop"}),
    ("some restarts", {f"ray_raymill_train_restarts{RUN}": "0x20 1 2 3x600"}, 30, set()),
    (
        "2% fail",
        {FAILED: "0+20x600"},
        400,
        {"RaymillEndpointErrorBudgetFastBurn", "RaymillEndpointErrorBudgetSlowBurn"},
    ),
    ("1% fail", {FAILED: "0+10x600"}, 400, {"RaymillEndpointErrorBudgetSlowBurn"}),
    ("0.3% fail", {FAILED: "0+3x600"}, 400, set()),
    (
        "streams are cut",
        {FAILED.replace("failed", "cut"): "0+20x600"},
        400,
        {"RaymillEndpointErrorBudgetFastBurn", "RaymillEndpointErrorBudgetSlowBurn"},
    ),
    ("drained", {DRAINED: "0+9000x600"}, 400, {"RaymillEndpointDrained"}),
    ("drained for a while", {DRAINED: "0+9000x20 180000x600"}, 24, set()),
    ("they failed until an hour ago", {FAILED: "0+20x340 6800x600"}, 400, set()),
    ("nobody asks", {name: None for name in SERVES if "answers" in name}, 400, set()),
    (
        "a queue",
        {'ray_raymill_predicted_queue_seconds{application="raymill",replica="r"}': "12x600"},
        20,
        {"RaymillQueueTooLong"},
    ),
    ("the coordinator fails", {AWAY: "0x10 0+60x600"}, 20, {"RaymillCoordinatorAway"}),
    ("the coordinator is replaced", {AWAY: "0x10 15 0x600"}, 20, set()),
    ("a replica is missing", {HEALTHY: "2x10 1x600"}, 20, {"RaymillReplicaMissing"}),
    ("all replicas are missing", {HEALTHY: None}, 20, {"RaymillReplicaMissing"}),
    ("a replica was missing", {HEALTHY: "2x10 1x3 2x600"}, 20, set()),
]


def test_rules_read_metrics_of_the_table_alone() -> None:
    for alert, expr in ALERTS.items():
        names = set(re.findall(r"\bray_\w+", expr))
        assert names and names <= SERIES.keys(), alert


def test_the_alerts_burn_the_budget_that_the_dashboard_shows() -> None:
    panels = {panel["title"]: panel for panel in documents()["raymill-slo"]["panels"] if panel["type"] != "row"}
    burn = {target["legendFormat"]: target["expr"] for target in panels["Burn rate of the error budget"]["targets"]}
    for speed, factor, windows in (("Fast", "14.4", ("1h", "5m")), ("Slow", "6", ("6h", "30m"))):
        expr = ALERTS[f"RaymillEndpointErrorBudget{speed}Burn"]
        for condition, window in zip(expr.split(" and "), windows, strict=True):
            ratio, threshold = condition.split(" > ")
            assert (f"{ratio} / 0.001", threshold) == (burn[window], f"{factor} * 0.001")


def test_every_alert_is_tested_both_ways() -> None:
    assert {name for *_, fire in CASES for name in fire} == ALERTS.keys()


@needs_prometheus
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    tests = []
    for what, changes, minute, firing in CASES:
        series = {name: values for name, values in (FINE | changes).items() if values is not None}
        expectations = [
            {
                "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": "{}", "value": int(alert in firing)}],
            }
            for alert in ALERTS
        ]
        inputs = [{"series": name, "values": values} for name, values in series.items()]
        tests.append({"name": what, "interval": "1m", "input_series": inputs, "promql_expr_test": expectations})
    test_file = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(test_file))
    promtool(tmp_path, "check", "rules", "rules.yaml")
    promtool(tmp_path, "test", "rules", "tests.yaml")
