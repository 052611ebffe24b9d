"""A node that corrupts silently is found, left out, and the run ends with the clean run's weights,
whatever else happens then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from cluster.settings.run import RunConfig, run_storage
from cluster.stages.stage import run_stage
from cluster.stages.stage_module import StageFailedError
from jobs.run.ledger import Ledger, Line
from jobs.run.storage_retry import node_spool
from model.files.failpoints import VARIABLE
from tests.chaos.arena import Arena, Watch
from tests.cluster.fault_proxy import FaultProxy, Refused, running_proxy

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.cluster]

NUM_NODES = 3  # that carry workers


@contextmanager
def faulty_node(arena: Arena, fault: str) -> Iterator[str]:
    """Puts a node whose workers are wrong in the place of one that is not."""
    before = {*arena.cluster.node_names}
    arena.cluster.kill_node(max(before))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, fault)
        arena.cluster.add_node()
    [name] = {*arena.cluster.node_names} - before
    yield name
    arena.cluster.kill_node(name)
    arena.restore_nodes(NUM_NODES)


@pytest.mark.parametrize(
    ("fault", "what"), [("gradient:1:flip", "self_test"), ("weights:0.05:flip", "weights")]
)
def test_a_faulty_node_is_left_out_and_the_bits_are_those_of_the_clean_run(
    arena: Arena, fault: str, what: str
) -> None:
    config = arena.config(f"faulty-{what}", min_workers=2, max_workers=3)
    train = config.train.model_copy(update={"audit_every_steps": 2})
    with faulty_node(arena, fault) as name:
        audited = config.model_copy(update={"train": train})
        _, ledger = arena.run(audited, lambda watch: None, is_faulty=True)
    found = ledger.events("corruption")
    assert {(event["node"], event["what"]) for event in found} == {(name, what)}
    assert found[-1]["measure"] == "left_out"
    last = ledger.events("start")[-1]
    assert name not in [worker["node"] for worker in last["workers"]]


def test_a_node_that_answers_what_is_no_number_now_and_then_decides_nothing(arena: Arena) -> None:
    """The guard would have left out what it had computed, for good."""
    config = arena.config("faulty-nan", min_workers=2, max_workers=3)
    with faulty_node(arena, "gradient:0.03:nan") as name:
        _, ledger = arena.run(config, lambda watch: None, is_faulty=True)
    found = ledger.events("corruption")
    assert {event["node"] for event in found} == {name}
    assert found[-1]["measure"] == "left_out"
    assert not ledger.events("skip", "rollback")


FROM_THEN_ON = "gradient:170:nan_from"
"""A worker takes two or three lanes of each step: from step 50 to 85 on."""


def left_out_at_once(ledger: Ledger, name: str) -> Line:
    """Returns the event of the node that was left out when it was first wrong, in a step that
    nothing else was made of."""
    found = ledger.events("corruption")
    assert {(event["node"], event["what"], event["measure"]) for event in found} == {
        (name, "gradient", "left_out")
    }
    assert len({event["step"] for event in found}) == 1
    assert not ledger.events("skip", "rollback")
    return found[-1]


@pytest.mark.parametrize("shard", ["none", "parameters"])
def test_nothing_that_keepers_hold_from_before_is_used_once_a_node_is_left_out(
    arena: Arena, shard: str
) -> None:
    """With shards the parts of the state that a node has alone are on a second node too."""
    config = arena.config(f"faulty-kept-{shard}", min_workers=2, max_workers=3)
    scaling = config.scaling.model_copy(update={"shard": shard})
    with faulty_node(arena, FROM_THEN_ON) as name:
        sharded = config.model_copy(update={"scaling": scaling})
        _, ledger = arena.run(sharded, lambda watch: watch.ended.wait(), is_faulty=True)
    found = left_out_at_once(ledger, name)
    after = ledger.lines[ledger.lines.index(found) :]
    start = next(line for line in after if line.get("event") == "start")
    assert (start["step"], start["from_memory"]) == (found["to_step"], False)


def test_what_is_no_number_once_costs_no_restart(arena: Arena) -> None:
    config = arena.config("faulty-once", min_workers=2, max_workers=3)
    with faulty_node(arena, "gradient:170:nan_nth") as name:
        result, ledger = arena.run(config, lambda watch: None, is_faulty=True)
    [found] = ledger.events("asked_again", "corruption")  # the latter where that lane was audited
    assert found.get("differs", True)
    assert found.get("node", name) == name
    assert not ledger.events("skip", "rollback")
    assert result["restarts"] == 0


@contextmanager
def proxied(
    arena: Arena, run_id: str, s3_bucket: str, s3_server: str, patch: pytest.MonkeyPatch
) -> Iterator[tuple[RunConfig, FaultProxy]]:
    """Gives a run whose storage is behind a proxy."""
    with running_proxy(s3_server) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        uri = f"s3://{s3_bucket}/storage"
        yield arena.config(run_id, storage_uri=uri, min_workers=2, max_workers=3), proxy


def is_found(watch: Watch, config: RunConfig) -> bool:
    """Reports whether a worker was found wrong, also where the storage does not know it yet."""
    with suppress(FileNotFoundError):  # it goes once the storage has all of it
        for unsent in node_spool(run_storage(config)).glob("ledger-*"):
            if b'"event": "corruption"' in unsent.read_bytes():
                return True
    return bool(watch.ledger().events("corruption"))


def test_a_storage_that_is_full_in_the_step_of_the_fault_is_waited_for(
    arena: Arena, s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(method: str, path: str) -> Refused | None:
        return Refused(507, "XMinioStorageFull") if method in ("PUT", "POST") else None

    with (
        faulty_node(arena, FROM_THEN_ON) as name,
        proxied(arena, "faulty-full", s3_bucket, s3_server, monkeypatch) as (config, proxy),
    ):

        def inject(watch: Watch) -> None:
            watch.wait_for_step(15)
            proxy.spoil = full
            while not watch.ended.wait(0.1) and not is_found(watch, config):
                pass
            assert not watch.ended.wait(1.5 * config.scaling.hang_timeout_s), "it was to wait"
            assert not watch.ledger().events("corruption"), "the storage took it"
            proxy.spoil = None

        _, ledger = arena.run(config, inject, is_faulty=True)
    left_out_at_once(ledger, name)
    assert not ledger.events("hang")


def test_a_second_launcher_is_refused_while_the_first_asks_again_on_a_slow_storage(
    arena: Arena, s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[str] = []
    with (
        faulty_node(arena, FROM_THEN_ON) as name,
        proxied(arena, "faulty-slow", s3_bucket, s3_server, monkeypatch) as (config, proxy),
    ):

        def inject(watch: Watch) -> None:
            watch.wait_for_step(15)
            proxy.bytes_per_s = 200e3
            while not watch.ended.is_set() and not is_found(watch, config):
                with pytest.raises(StageFailedError) as refused:
                    run_stage(arena.connection, "jobs.pretrain", config)
                refusals.append(str(refused.value))
            time.sleep(5)
            proxy.bytes_per_s = None

        _, ledger = arena.run(config, inject, is_faulty=True)
    assert refusals
    assert all("is held by process" in refusal for refusal in refusals)
    left_out_at_once(ledger, name)
    assert not ledger.events("hang")


def test_a_copy_that_is_wrong_when_another_node_dies_before_the_audit_is_not_taken(
    arena: Arena,
) -> None:
    """Its keeper has the wrong state too, with a valid checksum."""
    config = arena.config("faulty-keeper", min_workers=2, max_workers=3)
    train = config.train.model_copy(update={"audit_every_steps": 80})
    with faulty_node(arena, "weights:50:one_nth") as name:

        def inject(watch: Watch) -> None:
            start = watch.wait_for_step(52)
            nodes = [worker["node"] for worker in start["workers"] if worker["node"] != name]
            arena.cluster.kill_node(nodes[0])
            watch.wait_for_step(0, after_attempt=start["attempt"])

        audited = config.model_copy(update={"train": train})
        _, ledger = arena.run(audited, inject, step_s=0.25, is_faulty=True)
    arena.restore_nodes(NUM_NODES)
    assert {event["node"] for event in ledger.events("corruption", "named")} <= {name}
    assert all(name in event["nodes"].values() for event in ledger.events("undecided"))
    assert ledger.events("undecided")
    assert "not_proven_since" not in ledger.steps[-1]
    assert not ledger.events("skip", "rollback")
