"""What bounds a run is told from its ledger: one made for each cause."""

from typing import Any

import pytest

from jobs.report.figures import parts
from jobs.report.why_slow import why_slow
from jobs.run.ledger import Ledger
from raymill.phases import COMPUTING

USUAL = {
    "load": 0.002,
    "forward": 0.03,
    "loss": 0.01,
    "backward": 0.05,
    "sync": 0.003,
    "update": 0.004,
    "stall": 0.001,
}


def made(
    ranks: list[dict[str, float]],
    *,
    lanes: list[float] | None = None,
    num_steps: int = 20,
    starts: dict[int, int] | None = None,
    pause_s: float = 5.0,
    mfu: float | None = None,
    finish_after_s: float = 0.0,
    validated: tuple[int, ...] = (),
    processor: list[float] | None = None,
) -> Ledger:
    """A run whose steps all look alike. `starts`: further attempts, by the step that each comes
    after, and the step that it goes on from. `validated`: the steps after which it validated.
    `processor`: the share of a processor that each rank has while it computes."""
    clock, attempt = 1000.0, 0
    lines: list[dict[str, Any]] = []
    wall_s = max(sum(seconds.values()) for seconds in ranks)
    known = {}
    if processor:
        had = zip(processor, ranks, strict=True)
        known["processor_s"] = [
            share * sum(seconds[phase] for phase in COMPUTING) for share, seconds in had
        ]

    def start(step: int) -> None:
        nonlocal attempt
        attempt += 1
        workers = [{"pid": number, "node": f"node-{number}"} for number in range(len(ranks))]
        fields = {
            "attempt": attempt,
            "world_size": len(ranks),
            "step": step,
            "checkpoint": None,
            "workers": workers,
        }
        lines.append({"event": "start", "time": clock, **fields})

    start(0)
    step, left = 0, dict(starts or {})
    while step < num_steps:
        step, clock = step + 1, clock + wall_s
        fields = {
            "world_size": len(ranks),
            "attempt": attempt,
            "wall_s": wall_s,
            "mfu": mfu,
            "seconds": ranks[0],
        }
        lines.append({"time": clock, "step": step, **fields})
        if step % 10 == 0:
            window = {"attempt": attempt, "ranks": ranks, "lanes": lanes or [4.0] * len(ranks)}
            window |= known
            lines.append({"event": "phases", "time": clock, "step": step, **window})
        if step in validated:
            lines.append({"event": "validation", "time": clock, "step": step})
        if step in left:
            step, clock = left.pop(step), clock + pause_s
            start(step)
    lines.append({"event": "finish", "time": clock + finish_after_s, "step": step})
    return Ledger(lines)


def of(**seconds: float) -> dict[str, float]:
    return USUAL | seconds


SLOW = [of(sync=0.083), of(forward=0.07, backward=0.09, sync=0.003), of(sync=0.083)]
UNEVEN = [of(forward=0.06, loss=0.02, backward=0.1, sync=0.003), of(sync=0.093)]

VALIDATING = [of(validation=0.1)]

CASES: dict[str, tuple[Ledger, str, list[str]]] = {
    "compute": (made([USUAL]), "compute", ["97% of the wall time", "unknown share", "100.0 ms"]),
    "compute on a GPU": (made([USUAL], mfu=0.41), "compute", ["41% of the peak"]),
    "a processor of its own": (made([USUAL], processor=[0.97]), "compute", ["94% of the wall"]),
    "a shared machine": (
        made([USUAL] * 2, processor=[0.3, 0.4]),
        "processor",
        ["Other programs bound the run: 61% of the wall time workers wait", "they get 35% of one"],
    ),
    "a straggler on a shared machine": (
        made(SLOW, processor=[1.0, 0.5, 1.0]),
        "straggler",
        ["after it rank 1 on node-1", "Rank 1 has 50% of a processor", "other programs"],
    ),
    "data": (made([of(load=0.1)] * 2), "data", ["51% of the wall time", "waiting for rows"]),
    "communication": (
        made([of(sync=0.06)] * 2),
        "communication",
        ["2 workers", "38% of the wall time"],
    ),
    "straggler": (
        made(SLOW),
        "straggler",
        ["after it rank 1 on node-1: it takes 1.87 times", "44% of the wall time"],
    ),
    "lanes": (
        made(UNEVEN, lanes=[4.0, 2.0]),
        "lanes",
        ["4 a step and others 2", "train.micro_batch_size"],
    ),
    "checkpoints": (made([of(checkpoint=0.05)]), "checkpoints", ["33% of the wall time"]),
    "the last checkpoint": (
        made([USUAL], finish_after_s=8.0),
        "checkpoints",
        ["80% of the wall time"],
    ),
    "snapshots": (made([of(snapshot=0.05)]), "snapshots", ["33% of the wall time"]),
    "validation": (
        made(VALIDATING, validated=(10, 20)),
        "validation",
        ["50% of the wall time", "raise train.eval_every"],
    ),
    "the last validation": (
        made(VALIDATING, validated=(20,)),
        "validation",
        ["50%", "; lower train.eval_max_tokens"],
    ),
    "restarts": (made([USUAL], starts={15: 10}), "restarts", ["1 of them", "5 steps taken again"]),
    "other": (made([of(stall=0.1)]), "other", ["50% of the wall time"]),
    "untimed, by an earlier version": (
        made([{"step": 0.1}]),
        "other",
        ["outside all phases of a step"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_cause_is_found(name: str) -> None:
    ledger, bound, said = CASES[name]
    found = why_slow(ledger)
    assert (found.fix_first or found.bound) == bound, found
    assert all(part in found.verdict for part in said), found.verdict
    assert found.verdict.endswith(".")
    assert sum(found.shares.values()) == pytest.approx(1.0, abs=1e-3)
    assert all(share >= 0 for share in found.shares.values())
    assert found.bound == max(found.shares, key=found.shares.__getitem__)
    assert found.evidence.share == found.shares[found.bound]
    assert ("Computing takes the largest part" in found.verdict) == (
        found.bound == "compute" != bound
    )


def test_the_last_validation_is_not_to_be_made_rarer() -> None:
    assert "eval_every_steps" not in why_slow(made(VALIDATING, validated=(20,))).verdict


def test_small_troubles_do_not_bound_a_run() -> None:
    """Each below a tenth: computing is what takes the time."""
    ledger = made([of(load=0.008, checkpoint=0.008, validation=0.008, sync=0.008)] * 2)
    found = why_slow(ledger)
    assert (found.bound, found.fix_first) == ("compute", None)


def test_steps_without_a_window_count_by_rank_0() -> None:
    """Before the first window, or with the run cut off, rank 0's own lines are what there is."""
    ledger = made([of(load=0.1)] * 2, num_steps=7)
    assert not ledger.events("phases")
    assert why_slow(ledger).bound == "data"


def test_the_sentence_begins_with_the_largest_part_and_says_of_which_kind_a_time_is() -> None:
    """The exchange takes a third and computing more: the sentence says both, and the figure has the
    same parts."""
    ledger = made([of(sync=0.05), of(sync=0.05, validation=0.02)])
    found = why_slow(ledger)
    assert (found.bound, found.fix_first, found.verdict.partition(";")[0]) == (
        "compute",
        "communication",
        f"Computing takes the largest part, {found.shares['compute']:.0%} of the wall time",
    )
    assert (
        f"after it the exchange between 2 workers: {found.shares['communication']:.0%} of"
        in found.verdict
    )
    assert "in the median" in found.verdict
    assert "in the mean" in found.verdict
    drawn = parts(ledger)
    assert sum(drawn.values()) == pytest.approx(1.0, abs=0.01)
    computing = [share for name, share in drawn.items() if name.startswith("computing: ")]
    assert sum(computing) == pytest.approx(found.shares["compute"], abs=1e-4)
    assert drawn["communication"] == pytest.approx(found.shares["communication"], abs=1e-4)
