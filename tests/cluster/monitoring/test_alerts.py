"""Every alert fires when it should and only then, by promtool on the rules that Prometheus gets."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from cluster.metrics.metric_table import metrics
from cluster.monitoring.files import documents
from tests.metric_series import SERIES
from tests.prometheus import needs_prometheus, promtool
from tests.repository import REPOSITORY

MONITORING = REPOSITORY / "k8s" / "monitoring"
RULES = (MONITORING / "prometheus/rules.yaml").read_text(encoding="utf-8")
DECLARED = [rule for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule["expr"] for rule in DECLARED}
SCRAPED = yaml.safe_load((MONITORING / "prometheus/scrape.yaml").read_text(encoding="utf-8"))[
    "scrape_configs"
][0]

RUN = '{run="a"}'
DEPLOYMENT = '{application="raymill",deployment="Replica"}'
REPLICA = '{application="raymill",replica="r"}'
AWAY = f"ray_raymill_coordinator_away_seconds{REPLICA}"
OF_VERSION = '{application="raymill",replica="r",version="v"'

STORAGE_DOWN = f"ray_raymill_train_storage_down{RUN}"
TRAINS = {
    f"ray_raymill_train_running{RUN}": "1x600",
    # time() is 0 at the start, then 60 a minute
    f"ray_raymill_train_last_step_timestamp_seconds{RUN}": "0+60x600",
    f"ray_raymill_train_last_checkpoint_timestamp_seconds{RUN}": "0+60x600",
    f"ray_raymill_train_step_seconds{RUN}": "1x600",
    f"ray_raymill_train_skipped_steps{RUN}": "3x600",
    f"ray_raymill_train_rollbacks{RUN}": "1x600",
    f"ray_raymill_train_corruptions{RUN}": "1x600",
    f"ray_raymill_train_restarts{RUN}": "7x600",
}


def answers(outcome: str) -> str:
    return f'ray_raymill_http_answers_total{{outcome="{outcome}"}}'


def of_version(version: str, outcome: str) -> str:
    return f'ray_raymill_version_answers_total{{version="{version}",outcome="{outcome}"}}'


def ended(reason: str) -> str:
    return f'ray_vllm_request_success_total{OF_VERSION},finished_reason="{reason}"}}'


def ended_promotion(result: str) -> str:
    return f'ray_raymill_last_promotion{{application="raymill",replica="r",result="{result}"}}'


def node(kind: str, job: str = "raymill") -> str:
    return f'up{{job="{job}",instance="{kind}",ray_cluster="c",ray_node_type="{kind}"}}'


def times(name: str, *, quick_up_to: str) -> dict[str, str]:
    """A histogram's series of which a thousand values a minute lie under `quick_up_to`, and all
    under the next bound."""
    bounds = metrics()[name].buckets
    series = {}
    for bound in (*map(str, bounds), "+Inf"):
        count = (
            1000
            if float(bound) > float(quick_up_to)
            else 900
            if float(bound) == float(quick_up_to)
            else 0
        )
        series[f'ray_{name.replace(":", "_")}_bucket{OF_VERSION},le="{bound}"}}'] = f"0+{count}x600"
    return series


TTFT, ITL = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
QUEUE = f"ray_raymill_predicted_queue_seconds{REPLICA}"
DRAINING = f"ray_raymill_draining{REPLICA}"
STORED = f"ray_raymill_state_stored{REPLICA}"
WANTED = f"ray_serve_autoscaling_target_replicas{DEPLOYMENT}"
HEALTHY = f"ray_serve_deployment_replica_healthy{DEPLOYMENT}"
OUTCOMES = metrics()["raymill:http_answers"].values
SERVES = {
    **{answers(outcome): "0x600" for outcome in OUTCOMES},
    answers("ok"): "0+1000x600",
    answers("refused"): "0+50x600",
    **{ended(reason): "0x600" for reason in metrics()["vllm:request_success"].values},
    ended("stop"): "0+1000x600",
    **{ended_promotion(result): "0x600" for result in metrics()["raymill:last_promotion"].values},
    ended_promotion("promoted"): "1x600",
    **times(TTFT, quick_up_to="0.1"),
    **times(ITL, quick_up_to="0.025"),
    QUEUE: "2x600",
    AWAY: "0x600",
    DRAINING: "0x600",
    STORED: "1x600",
    WANTED: "2x600",
    HEALTHY: "2x600",
    node("head"): "1x600",
    node("worker"): "1x600",
}
OLD = {of_version("v", "ok"): "0+100x600", of_version("v", "invalid"): "0+1x600"}


def new_version(*, invalid: int) -> dict[str, str]:
    """The answers of a version that was promoted after 200 minutes, of which so many in a hundred
    are invalid."""
    return {
        of_version("w", "ok"): f"_x200 0+{100 - invalid}x400",
        of_version("w", "invalid"): f"_x200 0+{invalid}x400",
    }


OTHERS = {
    "kuberay_job_deployment_status": "KubeRay's operator",
    "kube_resourcequota": "kube-state-metrics",
    "kube_statefulset_status_replicas_ready": "kube-state-metrics",
}
"""Metrics that others export, and who does."""


def job(state: str, *, of: str = "a") -> str:
    labels = f'name="{of}",namespace="raymill",deployment_status="{state}"'
    return f"kuberay_job_deployment_status{{{labels}}}"


def quota(resource: str, kind: str) -> str:
    labels = f'namespace="raymill",resourcequota="raymill",resource="{resource}",type="{kind}"'
    return f"kube_resourcequota{{{labels}}}"


def redis(namespace: str) -> str:
    labels = f'namespace="{namespace}",statefulset="redis"'
    return f"kube_statefulset_status_replicas_ready{{{labels}}}"


KUBERNETES = {
    job("Running"): "1x600",
    job("Complete", of="b"): "1x600",
    job("Suspended", of="c"): "1x600",
    quota("pods", "hard"): "64x600",
    quota("pods", "used"): "20x600",
    quota("services.loadbalancers", "hard"): "0x600",
    quota("services.loadbalancers", "used"): "0x600",
    redis("raymill"): "1x600",
    redis("of-somebody-else"): "0x600",
}
FINE = TRAINS | SERVES | KUBERNETES
FAILED = answers("failed")
LAST_STEP = f"ray_raymill_train_last_step_timestamp_seconds{RUN}"
LAST_CHECKPOINT = f"ray_raymill_train_last_checkpoint_timestamp_seconds{RUN}"
RUNNING = f"ray_raymill_train_running{RUN}"
FULL = {"RaymillQueueAtItsLimit"}
ASKED = (answers("ok"), answers("refused"))

# (what happens, series unlike those of FINE with None for those that are missing, minute, alerts
# that fire)
CASES: list[tuple[str, Mapping[str, str | None], int, set[str]]] = [
    ("all is well", {}, 400, set()),
    ("no step since the first", {LAST_STEP: "1x600"}, 20, {"RaymillTrainingStalled"}),
    (
        "such a time is usual",
        {LAST_STEP: "1x600", f"ray_raymill_train_step_seconds{RUN}": "100x600"},
        20,
        set(),
    ),
    (
        "the run has ended",
        {LAST_STEP: "1x600", LAST_CHECKPOINT: "1x600", RUNNING: "1x10 0x600"},
        400,
        set(),
    ),
    ("no checkpoint since the first", {LAST_CHECKPOINT: "1x600"}, 150, {"RaymillNoCheckpoint"}),
    ("no checkpoint at all", {LAST_CHECKPOINT: None}, 150, {"RaymillNoCheckpoint"}),
    ("no checkpoint yet", {LAST_CHECKPOINT: None}, 100, set()),
    ("a full disk", {STORAGE_DOWN: "0x5 1x600"}, 30, {"RaymillStorageRefuses"}),
    ("a full disk for some minutes", {STORAGE_DOWN: "1x8 0x600"}, 30, set()),
    (
        "a step skipped",
        {f"ray_raymill_train_skipped_steps{RUN}": "0x20 1x600"},
        25,
        {"RaymillTrainingNotFinite"},
    ),
    ("long since", {f"ray_raymill_train_skipped_steps{RUN}": "0x20 1x600"}, 60, set()),
    (
        "a rollback",
        {f"ray_raymill_train_rollbacks{RUN}": "0x20 1x600"},
        25,
        {"RaymillTrainingNotFinite"},
    ),
    (
        "a worker that is wrong",
        {f"ray_raymill_train_corruptions{RUN}": "0x20 1x600"},
        25,
        {"RaymillTrainingCorruption"},
    ),
    (
        "restarts",
        {f"ray_raymill_train_restarts{RUN}": "0x20 1 2 3 4x600"},
        30,
        {"RaymillRestartLoop"},
    ),
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
        {answers("cut"): "0+20x600"},
        400,
        {"RaymillEndpointErrorBudgetFastBurn", "RaymillEndpointErrorBudgetSlowBurn"},
    ),
    ("drained", {DRAINING: "1x600"}, 40, {"RaymillEndpointDrained"}),
    (
        "drained while nobody asks",
        {DRAINING: "1x600"} | dict.fromkeys(ASKED, "0x600"),
        40,
        {"RaymillEndpointDrained"},
    ),
    ("drained for a while", {DRAINING: "0x10 1x20 0x600"}, 35, set()),
    (
        "all are refused",
        {answers("ok"): "0x600", answers("refused"): "0+9x600"},
        400,
        FULL | {"RaymillAllRefused"},
    ),
    (
        "so they are at a new endpoint",
        {answers("ok"): None, answers("refused"): "0+9x600"},
        60,
        FULL | {"RaymillAllRefused"},
    ),
    ("most are refused", {answers("refused"): "0+9000x600"}, 400, FULL),
    (
        "all were refused for a moment",
        {answers("ok"): "0+1000x300 300000x3 300000+1000x300"},
        305,
        set(),
    ),
    ("first tokens are slow", times(TTFT, quick_up_to="5.0"), 30, {"RaymillFirstTokenSlow"}),
    ("first tokens are rather slow", times(TTFT, quick_up_to="2.5"), 30, set()),
    ("tokens are slow", times(ITL, quick_up_to="0.5"), 30, {"RaymillTokensSlow"}),
    ("tokens are rather slow", times(ITL, quick_up_to="0.3"), 30, set()),
    ("a version fails", {ended("error"): "0+20x600"}, 30, {"RaymillVersionFails"}),
    ("a version fails now and then", {ended("error"): "0+5x600"}, 30, set()),
    (
        "a promotion was refused",
        {ended_promotion("refused"): "0x10 1x600"},
        11,
        {"RaymillPromotionFailed"},
    ),
    (
        "a promotion was rolled back",
        {ended_promotion("rolled_back"): "0x10 1x600"},
        11,
        {"RaymillPromotionFailed"},
    ),
    ("and the next one went well", {ended_promotion("refused"): "0x10 1x10 0x600"}, 25, set()),
    (
        "a new version refuses",
        OLD | new_version(invalid=40),
        210,
        {"RaymillRefusalsAfterPromotion"},
    ),
    ("a new version refuses a little", OLD | new_version(invalid=5), 210, set()),
    (
        "as the version before did",
        OLD | {of_version("v", "invalid"): "0+60x600"} | new_version(invalid=40),
        210,
        set(),
    ),
    (
        "a version that has long been there",
        OLD | {of_version("v", "invalid"): "0x200 0+90x400"},
        210,
        set(),
    ),
    ("the storage takes no state", {STORED: "1x10 0x600"}, 20, {"RaymillStateNotStored"}),
    ("the storage took none for a moment", {STORED: "1x10 0x3 1x600"}, 20, set()),
    ("a node does not answer", {node("worker"): "1x10 0x600"}, 20, {"RaymillTargetDown"}),
    (
        "the operator's name of the job",
        {node("worker"): None, node("worker", "raymill/raymill"): "0x600"},
        20,
        {"RaymillTargetDown"},
    ),
    ("somebody else's target", {node("worker", "other"): "0x600"}, 20, set()),
    ("a node left", {node("worker"): "1x10 _x600"}, 40, set()),
    (
        "the head does not answer",
        {node("head"): "1x10 0x600"},
        20,
        {"RaymillTargetDown", "RaymillHeadMissing"},
    ),
    ("the head is gone", {node("head"): "1x10 _x600"}, 40, {"RaymillHeadMissing"}),
    ("the head is replaced", {node("head"): "1x10 0x2 1x600"}, 20, set()),
    ("a cluster has ended", {node("head"): "1x10 _x600", node("worker"): "1x10 _x600"}, 40, set()),
    (
        "an endpoint is gone",
        dict.fromkeys((WANTED, HEALTHY, DRAINING), "1x10 _x600"),
        40,
        {"RaymillEndpointGone"},
    ),
    ("long since", dict.fromkeys((WANTED, HEALTHY, DRAINING), "1x10 _x600"), 120, set()),
    (
        "only Ray Serve's controller is gone",
        dict.fromkeys((WANTED, HEALTHY), "1x10 _x600"),
        40,
        set(),
    ),
    (
        "only the replicas are, as nobody asks",
        {WANTED: "1x10 0x600", HEALTHY: "1x10 0x600", DRAINING: "0x10 _x600"},
        40,
        set(),
    ),
    ("a sudden silence", dict.fromkeys(ASKED, "0+50x300 15000x600"), 330, {"RaymillNoTraffic"}),
    ("a short silence", dict.fromkeys(ASKED, "0+50x300 15000x10 15000+50x600"), 312, set()),
    ("the proxies are gone", dict.fromkeys(ASKED, "0+50x300 _x600"), 330, {"RaymillNoTraffic"}),
    ("silent for hours", dict.fromkeys(ASKED, "0+50x100 5000x600"), 330, set()),
    ("they failed until an hour ago", {FAILED: "0+20x340 6800x600"}, 400, set()),
    ("nobody asks", {answers(outcome): None for outcome in OUTCOMES}, 400, set()),
    (
        "a queue",
        {QUEUE: "12x600"},
        20,
        {"RaymillQueueTooLong"},
    ),
    ("the coordinator fails", {AWAY: "0x10 0+60x600"}, 20, {"RaymillCoordinatorAway"}),
    ("the coordinator is replaced", {AWAY: "0x10 15 0x600"}, 20, set()),
    ("a replica is missing", {HEALTHY: "2x10 1x600"}, 20, {"RaymillReplicaMissing"}),
    ("all replicas are missing", {HEALTHY: None}, 20, {"RaymillReplicaMissing"}),
    ("a replica was missing", {HEALTHY: "2x10 1x3 2x600"}, 20, set()),
    (
        "a job fails",
        {job("Running"): "1x10", job("Failed"): "_x11 1x600"},
        20,
        {"RaymillJobFailed"},
    ),
    ("long since", {job("Failed", of="d"): "1x600"}, 400, set()),
    ("a job waits", {job("Initializing", of="d"): "1x600"}, 40, {"RaymillJobWaits"}),
    ("a job begins", {job("Initializing", of="d"): "1x12"}, 40, set()),
    ("a full quota", {quota("pods", "used"): "20x10 64x600"}, 40, {"RaymillQuotaFull"}),
    ("a quota that was full", {quota("pods", "used"): "64x10 20x600"}, 40, set()),
    ("Redis is down", {redis("raymill"): "1x10 0x600"}, 20, {"RaymillRedisDown"}),
    ("Redis moves", {redis("raymill"): "1x10 0x2 1x600"}, 20, set()),
]


def test_rules_read_metrics_of_the_table_and_prometheus_own_alone() -> None:
    labels = {rule["target_label"] for rule in SCRAPED["relabel_configs"] if "target_label" in rule}
    assert labels >= {"ray_cluster", "ray_node_type"}
    for alert, expr in ALERTS.items():
        names = set(re.findall(r"\b(?:kube)?ray_\w+|\bkube_\w+|\bup\b", expr)) - labels
        assert names and names <= {*SERIES, *OTHERS, "up"}, alert
    assert SCRAPED["job_name"] == "raymill", "the alerts on `up` know it by this name"


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    for rule in DECLARED:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert len(rule["annotations"]["description"]) > 40, rule["alert"]


def test_the_alerts_burn_the_budget_that_the_dashboard_shows() -> None:
    panels = {
        panel["title"]: panel
        for panel in documents()["raymill-slo"]["panels"]
        if panel["type"] != "row"
    }
    burn = {
        target["legendFormat"]: target["expr"]
        for target in panels["Burn rate of the error budget"]["targets"]
    }
    for speed, factor, windows in (("Fast", "14.4", ("1h", "5m")), ("Slow", "6", ("6h", "30m"))):
        expr = ALERTS[f"RaymillEndpointErrorBudget{speed}Burn"]
        for condition, window in zip(expr.split(" and "), windows, strict=True):
            ratio, threshold = condition.split(" > ")
            assert (f"{ratio} / 0.001", threshold) == (burn[window], f"{factor} * 0.001")


def test_every_alert_is_tested_both_ways() -> None:
    assert {name for *_, fire in CASES for name in fire} == ALERTS.keys()


@needs_prometheus
@pytest.mark.parametrize("hours", [range(1), pytest.param(range(1, 24), marks=pytest.mark.more)])
def test_alerts_fire_when_they_should_and_only_then(hours: range, tmp_path: Path) -> None:
    """Within the first hour, and within later ones: each minute before is evaluated."""
    (tmp_path / "rules.yaml").write_text(RULES)
    tests = []
    for what, changes, minute, firing in CASES:
        if minute // 60 not in hours:
            continue
        series = {
            name: values for name, values in {**FINE, **changes}.items() if values is not None
        }
        expectations = [
            {
                "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": "{}", "value": int(alert in firing)}],
            }
            for alert in ALERTS
        ]
        inputs = [{"series": name, "values": values} for name, values in series.items()]
        tests.append(
            {
                "name": what,
                "interval": "1m",
                "input_series": inputs,
                "promql_expr_test": expectations,
            }
        )
    test_file = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yaml").write_text(json.dumps(test_file))
    promtool(tmp_path, "check", "rules", "rules.yaml")
    promtool(tmp_path, "test", "rules", "tests.yaml")
