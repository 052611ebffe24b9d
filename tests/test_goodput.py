"""The accounts of `make bench-goodput` are exact on written records, and a short trace is replayed for
real."""

from itertools import pairwise
from pathlib import Path

import pytest

from jobs.plan.spot_trace import SpotTrace, read_trace
from tests.benchmarks.bench_goodput import cut
from tests.benchmarks.goodput.accounting import Kind, account, samples_repeated_and_never
from tests.benchmarks.goodput.contenders.contract import BATCH, Settings
from tests.benchmarks.goodput.contenders.raymill import Raymill
from tests.benchmarks.goodput.contenders.restart import Restart
from tests.benchmarks.goodput.contenders.torchft import together
from tests.benchmarks.goodput.one_run import WAYS, run
from tests.benchmarks.goodput.picture import picture
from tests.benchmarks.goodput.records import Event, Mark, NodeCount, Record, Step
from tests.benchmarks.goodput.replay import lifetimes
from tests.time_limits import slowness

ROWS = 4
TRACE = SpotTrace(((0, 2), (10, 0), (15, 3), (20, 1), (25, 4)), 30)


def step(time_s: float, number: int, world_size: int) -> Step:
    return Step(
        time_s, number, world_size, tuple(range((number - 1) * ROWS, number * ROWS)), f"w{number}"
    )


def record(
    steps: list[Step], nodes: list[tuple[float, int]], *, end_s: float, marks: tuple[Mark, ...] = ()
) -> Record:
    return Record(tuple(steps), marks, tuple(NodeCount(*count) for count in nodes), end_s)


START = (Mark(6, Event.STARTED), Mark(7, Event.MET), Mark(8, Event.LOADED))


def test_every_node_second_of_a_loss_has_its_kind() -> None:
    """Rows take a second. One of two nodes is lost in the third step, and another one comes while the
    one that stayed takes that step again."""
    run = record(
        [step(2, 1, 2), step(4, 2, 2), step(12, 3, 1)],
        [(0, 2), (5, 1), (9, 2)],
        marks=START,
        end_s=13,
    )
    accounted = account(run, row_s=1.0)
    assert accounted.node_seconds == {
        Kind.USEFUL: 12,
        Kind.SLOW: 0,
        Kind.IDLE: 3,
        Kind.DETECTING: 1,
        Kind.MEETING: 1,
        Kind.LOADING: 1,
        Kind.RECOMPUTING: 4,  # a second of two nodes before the loss, and one at the end
    }
    assert accounted.there == 5 * 2 + 4 * 1 + 4 * 2
    assert accounted.goodput == 12 / 22
    assert accounted.rows == 12
    cost = accounted.dollars_per_million_tokens(row_tokens=50, price_per_node_hour=3.6)
    assert cost == pytest.approx(22 * 0.001 / (600 / 1e6))


def test_steps_that_are_taken_again_are_not_useful() -> None:
    again = [step(2, 1, 2), step(4, 2, 2), step(6, 3, 2), step(10, 2, 2), step(12, 3, 2)]
    marks = (Mark(6.5, Event.STARTED), Mark(8, Event.LOADED))
    accounted = account(record(again, [(0, 2)], marks=marks, end_s=12), row_s=1.0)
    assert (accounted.num_steps, accounted.num_again) == (3, 2)
    assert accounted.node_seconds[Kind.RECOMPUTING] == 8
    assert accounted.node_seconds[Kind.USEFUL] == 12
    assert accounted.there == 24
    assert (accounted.repeated, accounted.never) == (0, 0)
    assert accounted.weights == {1: "w1", 2: "w2", 3: "w3"}


def test_hours_without_a_node_cost_nothing_and_what_follows_does() -> None:
    """Nobody is told to have failed to train where there was nothing."""
    marks = (Mark(101, Event.STARTED), Mark(103, Event.LOADED))
    run = record(
        [step(4, 1, 1), step(107, 2, 1)], [(0, 1), (4, 0), (100, 1)], marks=marks, end_s=107
    )
    accounted = account(run, row_s=1.0)
    assert accounted.without_nodes_s == 96
    assert accounted.there == 4 + 7
    assert accounted.node_seconds[Kind.DETECTING] == 1
    assert accounted.node_seconds[Kind.USEFUL] == 8


def test_a_contender_that_never_comes_back_loses_the_rest() -> None:
    run = record([step(4, 1, 1)], [(0, 2), (6, 1)], end_s=20)
    accounted = account(run, row_s=1.0)
    assert accounted.node_seconds[Kind.DETECTING] == 14
    assert accounted.node_seconds[Kind.RECOMPUTING] == 4
    assert sum(accounted.node_seconds.values()) == 26


def test_a_group_that_met_and_took_no_step_is_not_taken_to_have_computed() -> None:
    marks = (Mark(5, Event.STARTED), Mark(6, Event.LOADED))
    accounted = account(record([step(4, 1, 1)], [(0, 1)], marks=marks, end_s=20), row_s=1.0)
    assert accounted.node_seconds[Kind.RECOMPUTING] == 4  # at most: a step of one worker
    assert accounted.node_seconds[Kind.MEETING] == 10
    assert sum(accounted.node_seconds.values()) == 20


def test_marks_of_a_worker_that_joins_beside_running_steps_cost_no_time() -> None:
    marks = (Mark(2.5, Event.STARTED), Mark(3.5, Event.LOADED))
    accounted = account(
        record([step(2, 1, 2), step(4, 2, 2)], [(0, 2)], marks=marks, end_s=4), row_s=1.0
    )
    assert accounted.goodput == 1.0


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([range(4), range(4, 8)], (0, 0)),
        ([range(4), range(3, 8)], (1, 0)),  # one sample counts twice
        ([range(4), range(5, 8)], (0, 1)),  # one is left out
        ([range(4), [9, 9, 9]], (2, 5)),
        ([], (0, 0)),
    ],
)
def test_planted_samples_are_found(samples: list, expected: tuple[int, int]) -> None:
    steps = [Step(number, number, 1, tuple(ids)) for number, ids in enumerate(samples, start=1)]
    assert samples_repeated_and_never(steps) == expected


def test_lines_of_replicas_are_one_step_and_the_same_number_later_is_another() -> None:
    def line(time_s: float, number: int, samples: list[int]) -> dict:
        shown = {"step": number, "world_size": 2, "weights": "", "samples": samples}
        return {"time": time_s} | shown

    lines = [line(1, 7, [0]), line(1.01, 7, [1]), {"time": 2, "mark": "met"}, line(9, 7, [4])]
    steps = together(lines, step_s=0.5)
    assert [(step.number, sorted(step.samples)) for step in steps] == [(7, [0, 1]), (7, [4])]


def test_nodes_of_a_trace_are_there_as_often_as_it_says_and_the_same_go_for_all() -> None:
    nodes = lifetimes(TRACE, seed=3)
    for start, end, number in TRACE.intervals():
        alive = [n for n in nodes if n.start_s <= start and (n.end_s is None or n.end_s >= end)]
        assert len(alive) == number
    assert lifetimes(TRACE, seed=3) == nodes
    assert any(lifetimes(TRACE, seed=seed) != nodes for seed in range(4, 10))


def test_a_part_of_a_trace_begins_at_its_own_zero() -> None:
    trace = SpotTrace(((0, 4), (3600, 2), (9000, 1)), 10_800)
    assert cut(trace, [0.5, 2]) == SpotTrace(((0, 4), (1800, 2)), 5400)
    assert cut(trace, [2.5, 3]) == SpotTrace(((0, 1),), 1800)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_short_trace_for_real(tmp_path: Path) -> None:
    """Two nodes, one, and two again: raymill and a plain restart train on all of them, and no sample
    is lost or counts again. On a busy machine the trace lasts longer."""
    file = tmp_path / "trace.csv"
    file.write_text("# two nodes, of which one goes\nseconds,nodes\n0,2\n12,1\n26,2\n")
    trace, row_s = read_trace(str(file)), 0.1
    settings = Settings(row_s, save_every_steps=5, has_notices=False, look_s=2.0)
    records = {}
    for kind in (Raymill, Restart):
        folder = tmp_path / kind.name
        made = run(kind, trace, WAYS["kills"], settings, folder, factor=1 / slowness(), seed=0)
        records[kind.name] = made
        accounted = account(made, row_s=row_s)
        assert (accounted.repeated, accounted.never) == (0, 0)
        assert 0 < accounted.goodput < 1
        assert {1, 2} <= {step.world_size for step in made.steps}
        assert all(len(step.samples) == BATCH for step in made.steps)
        for before, after in pairwise(made.steps):  # each row is waited for
            assert after.time_s - before.time_s > 0.99 * BATCH / after.world_size * row_s
    drawn = picture(records, title="a test", factor=1.0, row_s=row_s, row_tokens=64)
    assert drawn.startswith(b"\x89PNG")
