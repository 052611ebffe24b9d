"""What workers are told of nodes that drain, and what they make of it."""

from types import SimpleNamespace

import pytest
from ray.train import PreemptionInfo

from jobs.ray_train.callbacks import signals
from jobs.ray_train.drains import news_by_actor

NODES = {"actor 0": "a", "actor 1": "b", "actor 2": "a", "actor 3": "c"}


def test_each_worker_is_told_all_that_go_and_when_its_own_node_does() -> None:
    news = news_by_actor(NODES, {"a": 5_000, "c": 9_000, "elsewhere": 1_000})
    going = {"a": [0, 2], "c": [3]}
    assert news == {
        "actor 0": PreemptionInfo(5_000, going),
        "actor 1": PreemptionInfo(None, going),
        "actor 2": PreemptionInfo(5_000, going),
        "actor 3": PreemptionInfo(9_000, going),
    }


def test_a_node_may_drain_without_a_moment_at_which_it_goes() -> None:
    assert news_by_actor(NODES, {"b": 0})["actor 1"] == PreemptionInfo(None, {"b": [1]})


@pytest.mark.parametrize("draining", [{}, {"elsewhere": 1_000}])
def test_nobody_is_told_of_other_nodes(draining: dict[str, int]) -> None:
    assert news_by_actor(NODES, draining) == {}


@pytest.mark.parametrize(
    ("deadline_ms", "going", "sizes", "end_s", "own_end_s"),
    [
        (5_000, {"a": [0]}, [1, 2], None, 5.0),
        (5_000, {"a": [0]}, [3], None, None),  # with two it would have to start again
        (5_000, {"a": [0, 1], "c": [2]}, [1, 2], 5.0, None),
        (None, {"b": [1]}, [1, 2], None, None),
    ],
    ids=["leaves", "is needed", "all go", "stays"],
)
def test_a_worker_leaves_where_the_others_go_on_without_it(
    deadline_ms: int | None,
    going: dict[str, list[int]],
    sizes: list[int],
    end_s: float | None,
    own_end_s: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = PreemptionInfo(deadline_ms, going)
    context = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info=info))
    monkeypatch.setattr("jobs.ray_train.callbacks.get_train_context", lambda: context)
    heard = signals([0, 1, 2], sizes)
    assert (heard.drained, heard.end_s, heard.own_end_s) == (info, end_s, own_end_s)
