"""The start of an endpoint: what is said of it, when it is over, and when it is hopeless."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
)

from cluster.local.local_cluster import free_port
from cluster.settings.run import StorageConfig
from cluster.settings.serve import ReplicaConfig, ServeConfig
from raymill.errors import UserError
from serving.app import run
from serving.start_watch import (
    GIVEN_UP_S,
    LATE_FACTOR,
    LATE_S,
    READY_TIMEOUT_S,
    Sight,
    StartWatch,
    sight_of,
)
from tests.serving.endpoint_parts import children_with, ray_cluster
from tests.serving.serve_command import REPLICA
from tests.waiting import wait_until

URL = "http://127.0.0.1:8000"
KILLED = (
    "A replica failed to start with exception. Retrying 2 more time(s). Error:\nActorDiedError()"
)
GONE = "A replica's health check failed."
LOADING, ONE, ALL = Sight(), Sight(1), Sight(2, is_whole=True)


def told(*sights: Sight) -> list[str]:
    """What is said of them, a second apart; the start is over at the last one."""
    watch = StartWatch(URL, 2, 0.0)
    lines = [
        line for number, sight in enumerate(sights) for line in watch.look(sight, 1.0 + number)
    ]
    assert watch.is_over == sights[-1].is_whole
    return lines


def test_an_undisturbed_start__says_when_the_first_replica_answers_before_the_rest() -> None:
    assert told(LOADING, ALL) == []
    assert told(LOADING, ONE, ONE, ALL) == [
        f"1 of 2 replicas answers at {URL}; the rest is still loading",
        "2 of 2 replicas answer now",
    ]


def test_a_replica_that_dies__is_told_once_and_again_when_another_has_come() -> None:
    none_left = Sight(0, has_failed=True, message=GONE)
    one_again = Sight(1, has_failed=True, message=GONE)
    assert told(ONE, none_left, none_left, one_again, ALL)[1:] == [
        "a replica has ended before all had started: 0 of 2 replicas answer, and another one is started in its place",
        f"1 of 2 replicas answers at {URL}; the rest is still loading",
        "2 of 2 replicas answer now",
    ]
    died = Sight(1, message=KILLED)
    died_again = Sight(1, message=KILLED.replace("2", "1"))
    assert told(ONE, died, died, died_again, ALL)[1:] == [
        "a replica has ended while it loaded, as its process was killed, ran out of memory or crashed: 1 of 2 replicas "
        "answers, and another one is started in its place",
        "a replica has ended while it loaded, for the same reason: 1 of 2 replicas answers, and another one is started "
        "in its place",
        "2 of 2 replicas answer now",
    ]


def test_replicas_of_the_endpoint_before__leave_without_a_word() -> None:
    assert told(Sight(2), Sight(1), Sight(2), ALL) == []


def test_a_start_is_hopeless__once_nothing_has_started_for_a_while() -> None:
    given_up = Sight(has_failed=True, is_given_up=True, message=f"{KILLED}\nOSError: no such file.")
    watch = StartWatch(URL, 2, 0.0)
    watch.look(given_up, 1.0)
    watch.look(LOADING, 2.0)  # the moment between two replicas
    watch.look(given_up, 3.0)
    watch.look(given_up, 2.9 + GIVEN_UP_S)
    with pytest.raises(UserError, match=r"tries no more: no such file$"):
        watch.look(given_up, 3.0 + GIVEN_UP_S)


def test_replicas_that_are_late__are_not_waited_for() -> None:
    watch = StartWatch(URL, 2, 0.0)
    watch.look(ONE, 20.0)  # it took 20 s
    longest_s = LATE_S + LATE_FACTOR * 20.0
    assert watch.look(ONE, 20.0 + longest_s) == [] and not watch.is_over
    [line] = watch.look(ONE, 20.1 + longest_s)
    assert watch.is_over and "1 of 2 replicas answers" in line
    watch.look(ONE, 20.1 + longest_s + READY_TIMEOUT_S)
    with pytest.raises(UserError, match=rf"^{URL}/ready did not answer"):
        watch.look(ONE, 20.2 + longest_s + READY_TIMEOUT_S)


def test_what_ray_serve_says__is_given_up_only_where_nothing_starts_or_ends() -> None:
    def sight(status: str, **states: int) -> Sight:
        about = {"status": status, "status_trigger": "UNSPECIFIED", "message": "why"}
        deployment = DeploymentStatusOverview(replica_states=states, **about)  # type: ignore[arg-type]
        deployments = {"Replica": deployment}
        return sight_of(
            ApplicationStatusOverview(ApplicationStatus.DEPLOYING, "", 0.0, deployments)
        )

    assert sight("DEPLOY_FAILED", RUNNING=1, STARTING=1) == Sight(1, has_failed=True, message="why")
    assert not sight("DEPLOY_FAILED", STOPPING=1).is_given_up
    assert sight("DEPLOY_FAILED").is_given_up and sight("UNHEALTHY", RUNNING=2).is_given_up
    assert sight("UPDATING", STARTING=2) == Sight(message="why")
    assert sight_of(None).is_given_up
    failed = ApplicationStatusOverview(ApplicationStatus.DEPLOY_FAILED, "no import", 0.0, {})
    assert sight_of(failed) == Sight(has_failed=True, is_given_up=True, message="no import")


def statuses_until(start: "Future[Any]", url: str) -> set[int]:
    """The statuses of completions that are asked for, one after another, until the start ends."""
    statuses = set()
    with httpx.Client(base_url=url, timeout=120) as http:
        while not start.done():
            asked = {"model": "tiny", "prompt": "a", "max_tokens": 2}
            statuses.add(http.post("/v1/completions", json=asked).status_code)
    return statuses


@pytest.mark.slow
@pytest.mark.cluster
def test_a_replica_killed_before_the_last_one_has_started__costs_no_request(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ServeConfig(
        checkpoint=str(checkpoint),
        model_name="tiny",
        port=free_port(),
        replicas=ReplicaConfig(min_replicas=2, max_replicas=2),
        storage=StorageConfig(uri=str(tmp_path / "storage")),
    )
    url = f"http://127.0.0.1:{config.port}"

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    with ray_cluster(num_cpus=3), ThreadPoolExecutor(1) as threads:
        start = threads.submit(run, config)
        wait_until(lambda: len(children_with(REPLICA)) == 2)
        first, second = children_with(REPLICA)
        second.suspend()
        wait_until(is_ready)
        foreign = httpx.get(f"{url}/v1/models", headers={"Host": "rebound.example"})
        assert foreign.status_code == 421 and foreign.json()["error"]["code"] == "foreign_host"
        shown = httpx.get(f"{url}/v1/models")
        assert shown.status_code == 200 and "x-route" not in shown.headers
        first.kill()
        second.resume()
        assert statuses_until(start, url) == {200}
        assert start.result() == {"url": url, "model": "tiny"}
        said = capsys.readouterr().err
        assert "a replica has ended before all had started: 0 of 2 replicas answer" in said
        assert said.rstrip().endswith("2 of 2 replicas answer now")
