"""A node that corrupts silently is found, left out, and the run ends with the clean run's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from model.files.failpoints import VARIABLE
from tests.chaos.arena import Arena

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
