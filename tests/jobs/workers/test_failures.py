"""The cause of a failure, the end of hope, and the message of a run that has no workers."""

import pytest

from cluster.settings.run import ScalingConfig
from jobs.run.ledger import Line
from jobs.workers.failures import Kind, main_cause, why_give_up
from jobs.workers.placement import waiting_for

GLOO = "Traceback (most recent call last):\n  …\nRuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"
MEMORY = "Traceback (most recent call last):\n  …\nRuntimeError: not enough memory: you tried to allocate 123 bytes.\n"
UNAVAILABLE = (
    "The actor 24a72b is unavailable: The actor is temporarily unavailable: RpcError: RPC error: failed to connect to all "
    "addresses; last error: UNKNOWN: ipv4:127.0.0.1:41841: Failed to connect to remote host: Connection refused"
)
DEAD = "The actor died unexpectedly before finishing this task.\nThe actor is dead because its worker process has died."


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({0: GLOO, 1: DEAD}, (1, Kind.DIED, DEAD.splitlines()[-1])),
        ({0: GLOO, 1: MEMORY}, (1, Kind.RAISED, MEMORY.splitlines()[-1])),
        ({0: GLOO}, (0, Kind.LOST, GLOO.splitlines()[-1])),
        ({0: GLOO, 2: UNAVAILABLE}, (2, Kind.DIED, UNAVAILABLE)),
        ({2: ""}, (2, Kind.RAISED, "no reason was given")),
    ],
)
def test_the_cause_is_not_the_broken_connection_of_the_others(
    errors: dict[int, str], expected: tuple[int, Kind, str]
) -> None:
    assert main_cause(errors) == expected


START: Line = {"event": "start"}
DIED: Line = {"event": "failure", "kind": "died", "reason": "killed"}


def step(number: int) -> Line:
    return {"step": number}


def raised(reason: str) -> Line:
    return {"event": "failure", "kind": "raised", "reason": reason}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], None),
        ([START, DIED] * 2, None),
        (
            [START, DIED] * 3,
            "3 attempts in a row got no further than step 0; the last failure was: killed",
        ),
        ([DIED] * 3, "3 attempts in a row"),  # none came as far as to say that it started
        ([START] * 3, "no failure was reported"),
        # The attempt that got further does not count
        ([START, step(4), *[START, step(3), DIED] * 2], None),
        ([START, step(4), *[START, step(3), DIED] * 3], "no further than step 4"),
        ([*[START, DIED] * 2, START, step(1), DIED, START, step(2), DIED], None),
        ([*[START, DIED] * 3, {"event": "gave_up"}, START, DIED], None),  # resumed
        (
            [
                START,
                raised("no memory at 0x7f01, pid 17"),
                START,
                raised("no memory at 0x8e02, pid 41"),
            ],
            "same error twice",
        ),
        ([START, raised("one thing"), START, raised("another")], None),
        ([START, raised("one"), START, step(1), raised("one")], None),
        (
            [{"event": "failure", "kind": "user_error", "reason": "shard 3 is damaged"}],
            "shard 3 is damaged",
        ),
    ],
)
def test_when_to_give_up(lines: list[Line], expected: str | None) -> None:
    reason = why_give_up(lines, max_fruitless_attempts=3)
    assert (
        reason is None
        if expected is None
        else expected in (reason or "").replace("came twice", "twice")
    )


@pytest.mark.parametrize(
    ("nodes", "free", "expected"),
    [
        ([{"CPU": 4.0}, {"CPU": 4.0}], {"CPU": 8.0}, None),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 6.0}, None),
        (
            [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 2.0}],
            {"CPU": 4.0},
            "room for 1 on 3 nodes, 1 of them free: add nodes",
        ),
        ([{"CPU": 4.0}], {}, "room for 2 on 1 node, 0 of them free: the rest is taken"),
        ([], {}, "needs 2 workers of 2 CPUs"),
    ],
)
def test_what_a_run_without_workers_lacks(
    nodes: list[dict[str, float]], free: dict[str, float], expected: str | None
) -> None:
    scaling = ScalingConfig(min_workers=2, max_workers=3, threads_per_worker=2)
    message = waiting_for(scaling, nodes=nodes, free=free, idle_s=31.0)
    assert message is None if expected is None else expected in (message or "")
