"""The limits of a key on a real endpoint of two replicas, which Ray Serve chooses among."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from cluster.settings.run import StorageConfig
from cluster.settings.serve import EngineConfig, ReplicaConfig, ServeConfig
from tests.serving.endpoint_parts import Endpoints, assert_error
from tests.serving.hostile_requests import MODEL
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ASKED = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 7, "ignore_eos": True}
LONG = ASKED | {"prompt": [[5, 6, 7]] * 200, "n": 8, "max_tokens": 100, "stream": True}
OFTEN = 16  # requests of which surely some would come to either replica


@pytest.fixture(scope="module")
def url(
    endpoints: Endpoints, run_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    folder = tmp_path_factory.mktemp("limits")
    (folder / "keys").write_text(
        "sk-one name=one max_requests=1\nsk-day name=day tokens_per_day=100\nsk-free name=free\n"
    )
    config = ServeConfig(
        checkpoint=str(run_checkpoint),
        model_name=MODEL,
        api_key_file=str(folder / "keys"),
        engine=EngineConfig(max_num_seqs=2),
        replicas=ReplicaConfig(min_replicas=2, max_replicas=2),
        storage=StorageConfig(uri=str(folder / "storage")),
    )
    return str(endpoints.deployed(config)["url"])


@contextlib.contextmanager
def client(url: str, name: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer sk-{name}"}, timeout=limit_s(60)
    ) as http:
        yield http


def ask(http: httpx.Client) -> httpx.Response:
    return http.post("/v1/completions", json=ASKED)


@contextlib.contextmanager
def always_one_running(url: str, name: str) -> Iterator[None]:
    """Has one long request after the other run until the end of the block, and reads them: the
    proxy cuts off who does not read."""
    is_over, has_begun = threading.Event(), threading.Event()

    def read(http: httpx.Client) -> None:
        with http.stream("POST", "/v1/completions", json=LONG) as running:
            for _ in running.iter_lines():
                has_begun.set()
                if is_over.is_set():
                    return

    def keep_reading() -> None:
        with client(url, name) as http:
            while not is_over.is_set():
                read(http)

    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(keep_reading)
        try:
            wait_until(lambda: has_begun.is_set() or reader.done())
            yield
        finally:
            is_over.set()
        reader.result()


def refused_by_all(http: httpx.Client) -> list[httpx.Response]:
    """Waits until both replicas have heard of what runs and was charged, and refuse many requests
    at once. Returns these answers."""
    answers: list[httpx.Response] = []

    def are_refused() -> bool:
        answers[:] = threads.map(ask, [http] * OFTEN)
        return all(answer.status_code == 429 for answer in answers)

    with ThreadPoolExecutor(OFTEN) as threads:
        wait_until(are_refused)
    return answers


def test_one_request_is_one_whatever_replica_it_runs_on(url: str) -> None:
    with client(url, "one") as http:
        with always_one_running(url, "one"):
            answers = refused_by_all(http)
            assert {assert_error(answer, 429)["code"] for answer in answers} == {
                "rate_limit_exceeded"
            }
            with client(url, "free") as free:
                assert ask(free).status_code == 200
        wait_until(lambda: ask(http).status_code == 200)


def test_a_day_s_tokens_are_those_of_the_endpoint(url: str) -> None:
    with client(url, "day") as http:
        answers = [ask(http) for _ in range(OFTEN)]
        num_answered = sum(answer.status_code == 200 for answer in answers)
        assert num_answered >= 10, "of 10 tokens each"
        for answer in refused_by_all(http):
            assert answer.status_code == 429, answer.text
            assert answer.json()["error"]["type"] == "tokens"
            assert int(answer.headers["Retry-After"]) > 600
