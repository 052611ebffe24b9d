"""Submitted jobs on a real Ray cluster that asks for a token: submitted once, followed, stopped,
resumed, and reported later."""

import io
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.cli import main
from cluster.local.local_cluster import LocalCluster
from cluster.output.job_log import LogReader, launches
from cluster.storage.uris import Storage, open_storage
from tests.jobs.corpora import number_texts
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_STEPS = 800
SETTINGS: dict[str, Any] = {
    "run_id": "demo",
    "model": {"preset": "tiny"},
    "data": {"vocab_size": 300, "val_fraction": 0.2},
    "train": {
        "max_tokens": NUM_STEPS * 8 * 32,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "seq_len": 32,
        "eval_every_steps": NUM_STEPS,
    },
    "checkpoint": {"save_every_steps": 200},
    "scaling": {"max_workers": 1},
}


@dataclass
class Done:
    code: int
    out: str
    err: str


class Person:
    """A person at a prompt in a folder, with a token or without."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._folder, self._environment = folder, environment

    def call(self, *words: str) -> Done:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
                patch.delenv(name, raising=False)
            for name, value in self._environment.items():
                patch.setenv(name, value)
            patch.chdir(self._folder)
            code = main(words)
        return Done(code, out.getvalue(), err.getvalue())

    def ask(self, *words: str, code: int = 0) -> dict[str, Any]:
        done = self.call(*words, "--json")
        assert done.code == code, done.err
        return json.loads(done.out.splitlines()[-1])


@pytest.fixture(scope="module", autouse=True)
def _handler() -> Iterator[None]:
    """The command line takes SIGTERM to itself."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    texts = number_texts(folder / "texts", num_texts=6)
    settings = SETTINGS | {"storage": {"uri": f"file://{folder}/.raymill"}}
    settings["data"] = settings["data"] | {"source": str(texts)}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(num_nodes=1, cpus_per_node=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def person(cluster: LocalCluster, folder: Path) -> Person:
    (folder / "token").write_text(cluster.token)
    return Person(folder, RAY_AUTH_TOKEN_PATH=str(folder / "token"))


@pytest.fixture(scope="module")
def run(folder: Path) -> Storage:
    return open_storage(str(folder / ".raymill/runs/demo"))


def test_a_wrong_or_missing_token_is_named_at_once_by_each_command(
    cluster: LocalCluster, folder: Path, run: Storage
) -> None:
    wrong, submit = (
        folder / "wrong",
        ["submit", "pretrain", "run.yaml", "--address", cluster.jobs_url],
    )
    wrong.write_text("not-the-token-of-this-cluster")
    cases = [
        (Person(folder), submit, f"{cluster.jobs_url} asks for a token"),
        (
            Person(folder),
            [*submit, "--token-file", "wrong"],
            "refuses the token from wrong (--token-file)",
        ),
        (
            Person(folder, RAY_AUTH_TOKEN="wrong-one"),
            submit,
            "refuses the token from RAY_AUTH_TOKEN",
        ),
        (Person(folder), [*submit, "--token-file", "nowhere"], "no token can be read from nowhere"),
    ]
    for who, words, expected in cases:
        began = time.monotonic()
        done = who.call(*words)
        assert time.monotonic() - began < limit_s(15)
        assert (done.code, done.out) == (1, "")
        assert expected in done.err
        assert sum(line.startswith("error: ") for line in done.err.splitlines()) == 1
        assert "not-the-token" not in done.err and "wrong-one" not in done.err
    assert not run.list()  # nothing was spent


def test_a_job_that_cannot_fit_is_not_submitted(
    person: Person, cluster: LocalCluster, run: Storage
) -> None:
    words = ["submit", "pretrain", "run.yaml", "--address", cluster.jobs_url]
    done = person.call(
        *words,
        "--scaling.min-workers",
        "2",
        "--scaling.max-workers",
        "2",
        "--scaling.threads-per-worker",
        "2",
    )
    assert done.code == 1
    assert "scaling.min_workers=2 workers of 2 CPUs each do not fit" in done.err
    assert "has room for 1 now" in done.err
    assert not run.list()
    done = person.call(
        "pretrain", "run.yaml", "--cluster.address", cluster.jobs_url, "--scaling.use-gpu", "true"
    )
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert done.err.startswith(
        f"error: scaling.use_gpu needs GPUs, and {cluster.jobs_url} has none now"
    )
    assert not run.list()
    assert person.ask(*words, "--dry-run")["admitted"] is True
    assert not run.list()


def test_submitted_once_stopped_resumed_and_reported_afterwards(
    person: Person, cluster: LocalCluster, folder: Path, run: Storage
) -> None:
    words = ["submit", "pretrain", "run.yaml", "--address", cluster.jobs_url]
    first = person.ask(*words)
    assert (first["new"], first["job"], first["backend"], first["where"]) == (
        True,
        "demo.1",
        "ray",
        cluster.jobs_url,
    )
    second = person.ask(*words)
    assert (second["new"], second["job"]) == (False, "demo.1")
    other = person.call("submit", "tokenize", "run.yaml", "--address", cluster.jobs_url)
    assert other.code == 1
    assert "run demo has another job, pretrain, which is " in other.err

    wait_until(lambda: "attempt 1: 1 worker" in person.call("logs", "demo").out)
    shown = person.ask("status", "demo")
    assert (shown["state"], shown["stage"], shown["exit_code"]) == ("running", "pretrain", None)
    # Without the token Ray is not asked, but the storage shows that the job's lease is held.
    stranger = Person(folder).ask("status", "demo")
    assert (stranger["state"], "asks for a token" in stranger["note"]) == ("running", True)
    assert Person(folder).call("stop", "demo").code == 1
    listed = person.ask("list")["jobs"]
    assert [(row["job"], row["stage"], row["state"]) for row in listed] == [
        ("demo.1", "pretrain", "running")
    ]

    stopped = person.ask("stop", "demo")
    assert (stopped["state"], stopped["was_live"]) == ("stopped", True)
    assert person.ask("stop", "demo")["was_live"] is False
    shown = person.ask("status", "demo", code=1)
    assert shown["state"] == "stopped"
    assert 0 < shown["step"] < NUM_STEPS
    assert "is saved at step" in person.call("logs", "demo").out

    resumed = person.ask(*words)
    assert (resumed["new"], resumed["job"]) == (True, "demo.2")
    followed = person.call("logs", "-f", "demo")
    assert followed.code == 0, followed.err
    assert f"training: {NUM_STEPS} of {NUM_STEPS} steps" in followed.out
    assert f"from step {shown['step']}" in followed.out
    assert [LogReader(run, launch).started().job for launch in launches(run)] == [
        "demo.1",
        "demo.2",
    ]

    cluster.stop()
    shown = person.ask("status", "demo")
    assert (shown["state"], shown["step"], shown["result"]["step"]) == (
        "succeeded",
        NUM_STEPS,
        NUM_STEPS,
    )
    lines = person.ask("logs", "demo", "--all")["lines"]
    assert sum(line.startswith("== pretrain on ") for line in lines) == 2
    assert [row["state"] for row in person.ask("list")["jobs"]] == ["succeeded"]
    assert cluster.token not in run.read_bytes("jobs/submitted.json").decode() + "".join(lines)
    refused = person.call(*words)
    assert refused.code == 1
    assert f"no Ray Jobs API answers at {cluster.jobs_url}" in refused.err


def test_a_local_job_has_a_cluster_of_its_own(folder: Path) -> None:
    person = Person(folder)
    words = ["submit", "pretrain", "run.yaml", "--run-id", "local", "--cluster.num-nodes", "1"]
    first = person.ask(*words)
    assert (first["new"], first["backend"], first["job"]) == (True, "local", "local.1")
    assert person.ask(*words)["new"] is False
    wait_until(lambda: "attempt 1: 1 worker" in person.call("logs", "local").out)
    assert person.ask("stop", "local")["state"] == "stopped"
    assert person.ask(*words)["job"] == "local.2"
    assert person.call("logs", "-f", "local").code == 0
    shown = person.ask("status", "local")
    assert (shown["state"], shown["step"]) == ("succeeded", NUM_STEPS)


def test_a_local_job_whose_owner_is_killed_has_ended_and_is_resumed(folder: Path) -> None:
    person = Person(folder)
    words = ["submit", "pretrain", "run.yaml", "--run-id", "orphan", "--cluster.num-nodes", "1"]
    person.ask(*words)
    wait_until(lambda: "attempt 1: 1 worker" in person.call("logs", "orphan").out)
    record = json.loads((folder / ".raymill/runs/orphan/jobs/submitted.json").read_text())
    os.kill(record["pid"], 9)
    wait_until(lambda: person.call("status", "orphan", "--json").code == 1)
    # The cluster goes with its owner. The driver has failed where it could still say so.
    assert person.ask("status", "orphan", code=1)["state"] in ("lost", "failed")
    assert person.ask(*words)["job"] == "orphan.2"
    assert person.call("logs", "-f", "orphan").code == 0


def test_a_local_job_continues_under_a_new_head(folder: Path) -> None:
    person = Person(folder)
    person.ask("submit", "pretrain", "run.yaml", "--run-id", "headless", "--cluster.num-nodes", "1")
    wait_until(lambda: "attempt 1: 1 worker" in person.call("logs", "headless").out)
    record = json.loads((folder / ".raymill/runs/headless/jobs/submitted.json").read_text())
    (head,) = psutil.Process(record["pid"]).children()
    head.kill()
    followed = person.call("logs", "-f", "headless")
    assert followed.code == 0, followed.err
    assert person.ask("status", "headless")["job"] == "headless.1"
    assert (
        sum(line.startswith("== ") for line in person.ask("logs", "headless", "--all")["lines"])
        == 2
    )
