"""A lease: one of many gets it, the dead lose it, a stopped holder is fenced, and outages are sat
out."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from cluster.storage.lease import Lease, LeaseHeldError, LeaseLostError
from cluster.storage.uris import Storage, open_storage
from tests.cluster.fault_proxy import Cut, FaultProxy
from tests.time_limits import limit_s

INTERVAL_S = 0.2


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest) -> str:
    if request.param == "local":
        return f"{request.getfixturevalue('tmp_path')}/run"
    request.getfixturevalue("proxy")
    return f"s3://{request.getfixturevalue('s3_bucket')}/run"


@pytest.fixture
def storage(uri: str) -> Storage:
    return open_storage(uri)


def short(storage: Storage, *, timeout_s: float = limit_s(20)) -> Lease:
    return Lease(storage, interval_s=INTERVAL_S, timeout_s=timeout_s)


@contextmanager
def holder(
    uri: str, *, timeout_s: float = limit_s(20)
) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], str]]]:
    """A process that waits for a line before it takes the lease, and a way to send it one and get
    its answer."""
    command = [
        sys.executable,
        "-m",
        "tests.cluster.lease_holder",
        uri,
        str(INTERVAL_S),
        str(timeout_s),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout

        def answer(line: str) -> str:
            assert process.stdin and process.stdout
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        try:
            assert process.stdout.readline() == "ready\n"
            yield process, answer
        finally:
            process.kill()


def stored(storage: Storage) -> dict[str, object]:
    content: dict[str, object] = json.loads(storage.read_bytes("RUNNING"))
    return content


def test_a_held_lease_is_refused_naming_its_holder_and_released_at_the_end(
    storage: Storage,
) -> None:
    with short(storage) as first:
        first.check()
        started_s = time.monotonic()
        with pytest.raises(
            LeaseHeldError,
            match=rf"/RUNNING is held by process {os.getpid()} on \S+ since 2.*; wait",
        ):
            short(storage).__enter__()
        assert time.monotonic() - started_s < limit_s(5)  # by the next beat, not by the timeout
        first.check()
        assert first.generation == 1
    assert not storage.exists("RUNNING")
    with short(storage) as second:
        second.check()


def test_one_of_many_threads_gets_it(storage: Storage) -> None:
    outcomes: list[str] = []
    all_tried, start = threading.Event(), threading.Barrier(6)

    def contend() -> None:
        start.wait()
        try:
            with short(storage) as lease:
                outcomes.append("held")
                all_tried.wait(limit_s(30))
                lease.check()
        except LeaseHeldError:
            outcomes.append("refused")
        if len(outcomes) == 6:
            all_tried.set()

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + limit_s(30)
    while len(outcomes) < 6 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    all_tried.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + ["refused"] * 5


@pytest.mark.more
def test_one_of_many_processes_takes_over_from_a_dead_one(uri: str, storage: Storage) -> None:
    with ExitStack() as stack:
        processes = [stack.enter_context(holder(uri)) for _ in range(3)]
        with holder(uri) as (victim, answer):
            assert answer("go") == "held 1"
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        assert stored(storage)["pid"] == victim.pid
        for process, _ in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.stdout.readline().strip() for process, _ in processes if process.stdout]
        assert sorted(answers) == ["held 2", "refused", "refused"]


def test_a_killed_holder_is_replaced_at_once_even_before_it_is_reaped(
    uri: str, storage: Storage
) -> None:
    with holder(uri) as (victim, answer):
        assert answer("go") == "held 1"
        victim.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        started_s = time.monotonic()
        with short(storage, timeout_s=limit_s(60)) as lease:
            assert time.monotonic() - started_s < limit_s(5)
            assert lease.generation == 2
            assert stored(storage)["generation"] == 2
            lease.check()


def test_a_stopped_holder_is_replaced_after_the_timeout_and_fenced(
    uri: str, storage: Storage
) -> None:
    timeout_s = limit_s(0.4)  # in which the holder must show itself
    with holder(uri, timeout_s=timeout_s) as (victim, answer):
        assert answer("go") == "held 1"
        assert answer("check") == "still held"
        victim.send_signal(signal.SIGSTOP)
        started_s = time.monotonic()
        with short(storage, timeout_s=timeout_s) as lease:
            assert time.monotonic() - started_s > 0.9 * timeout_s
            assert lease.generation == 2
            victim.send_signal(signal.SIGCONT)
            assert f"was taken over by process {os.getpid()} on " in answer("check")
            assert victim.stdin
            victim.stdin.close()  # it ends, and its release leaves our lease alone
            assert victim.wait(limit_s(10)) == 0
            lease.check()
            assert stored(storage)["pid"] == os.getpid()


def test_a_holder_that_wakes_after_everything_ended_does_not_go_on(storage: Storage) -> None:
    with short(storage) as lease:
        storage.delete("RUNNING")  # as the one who took it over does at its end
        with pytest.raises(LeaseLostError, match="taken over by a process that has ended since"):
            lease.check()
    assert not storage.exists("RUNNING")


def test_a_holder_that_does_not_know_yet_that_it_lost_leaves_the_other_lease_alone(
    storage: Storage,
) -> None:
    with Lease(storage, interval_s=60, timeout_s=120):
        theirs = json.dumps(stored(storage) | {"owner": "another"}).encode()
        storage.write_bytes("RUNNING", theirs)
    assert storage.read_bytes("RUNNING") == theirs


@pytest.mark.parametrize("content", [b"", b'{"owner": "x"', b"[]", b'{"unknown": 1}'])
def test_what_is_no_lease_is_watched_and_replaced(storage: Storage, content: bytes) -> None:
    storage.write_bytes("RUNNING", content)
    started_s = time.monotonic()
    with short(storage, timeout_s=limit_s(0.125)) as lease:
        assert time.monotonic() - started_s > limit_s(0.1)
        lease.check()


def test_another_process_with_the_number_of_a_dead_one_does_not_keep_its_lease(
    storage: Storage,
) -> None:
    with short(storage):
        dead = stored(storage) | {"owner": "another", "generation": 7}
    for changed, is_at_once in (
        ({"started_s": float(str(dead["started_s"])) - 60}, True),
        ({"machine": "b"}, False),
    ):
        storage.write_bytes("RUNNING", json.dumps(dead | changed).encode())
        started_s = time.monotonic()
        with short(storage, timeout_s=limit_s(0.5)) as lease:
            assert (time.monotonic() - started_s < limit_s(0.45)) == is_at_once
            assert lease.generation == 8


def test_an_outage_does_not_lose_it(proxy: FaultProxy, s3_bucket: str) -> None:
    storage = open_storage(f"s3://{s3_bucket}")
    with short(storage) as lease:
        before = stored(storage)
        proxy.down = True
        time.sleep(1.5)
        proxy.down = False
        lease.check()
        after = stored(storage)
        assert (after["owner"], after["generation"]) == (before["owner"], 1)
        assert int(str(after["beat"])) > int(str(before["beat"]))
        with pytest.raises(LeaseHeldError):
            short(storage).__enter__()
        lease.check()
    assert not storage.exists("RUNNING")


def test_an_answer_that_got_lost_is_no_other_holder(proxy: FaultProxy, s3_bucket: str) -> None:
    storage = open_storage(f"s3://{s3_bucket}")
    proxy.script = [Cut(kind="unanswered")]
    with Lease(storage, interval_s=60, timeout_s=120) as lease:
        assert (proxy.script, lease.generation) == ([], 1)
        proxy.script = [Cut(kind="unanswered")]
        lease.check()
        assert proxy.script == []
        lease.check()
    assert not storage.exists("RUNNING")


def test_times_that_cannot_work_are_refused(storage: Storage) -> None:
    with pytest.raises(ValueError, match="at least twice interval_s"):
        Lease(storage, interval_s=5, timeout_s=8)
