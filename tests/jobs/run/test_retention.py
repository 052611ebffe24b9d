"""Retention: whatever the settings, the newest, the best, the milestones, the pinned, two verified
ones and a proven one stay."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings.run import CheckpointConfig
from cluster.storage.uris import open_storage
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name, step_of, superseded
from jobs.run.ledger import Ledger
from tests.jobs.runs import tiny_plan, train

STEPS = st.sets(st.integers(1, 60), max_size=25)


@given(st.integers(0, 10**8), st.integers(0, 9999), st.integers(0, 10**8), st.integers(0, 9999))
def test_names_are_in_the_order_of_steps_and_then_of_writers(
    a: int, g: int, b: int, h: int
) -> None:
    assert (checkpoint_name(a, g) < checkpoint_name(b, h)) == ((a, g) < (b, h))
    assert step_of(checkpoint_name(a, g)) == a


@given(
    STEPS,
    STEPS,
    st.builds(
        CheckpointConfig,
        num_to_keep=st.integers(1, 4),
        keep_best=st.integers(0, 3),
        keep_every_steps=st.none() | st.integers(1, 20),
    ),
    STEPS,
    STEPS,
    st.dictionaries(st.integers(1, 60), st.floats(0, 10)),
    st.none() | st.integers(0, 60),
)
def test_what_may_go(
    complete: set[int],
    incomplete: set[int],
    keep: CheckpointConfig,
    verified: set[int],
    pinned: set[int],
    losses: dict[int, float],
    proven_to: int | None,
) -> None:
    incomplete -= complete
    gone = [
        step_of(name)
        for name in superseded(
            {checkpoint_name(step) for step in complete},
            keep=keep,
            verified={checkpoint_name(step) for step in verified},
            pinned={checkpoint_name(step) for step in pinned},
            val_losses={checkpoint_name(step): loss for step, loss in losses.items()},
            incomplete={checkpoint_name(step) for step in incomplete},
            proven_to=proven_to,
        )
    ]
    assert gone == sorted(set(gone))
    assert set(gone) <= complete | incomplete
    left = complete - set(gone)
    trusted = sorted(complete & verified)[-2:]
    if len(trusted) < 2:
        assert gone == []
        return
    assert set(trusted) <= left
    assert set(sorted(complete)[-keep.num_to_keep :]) <= left
    assert complete & pinned <= left
    measured = sorted(complete & losses.keys(), key=lambda step: (losses[step], step))
    assert set(measured[: keep.keep_best]) <= left
    milestones = {
        step for step in complete if keep.keep_every_steps and step % keep.keep_every_steps == 0
    }
    assert milestones <= left
    proven = sorted(step for step in complete if proven_to is not None and step <= proven_to)
    assert {*proven[-1:]} <= left, "the run goes back there where a worker is wrong"
    most = keep.num_to_keep + 2 + keep.keep_best + len(complete & pinned) + len(milestones)
    most += len(proven[-1:])
    assert len(left) <= most, "everything else goes"
    assert set(gone) & incomplete == {step for step in incomplete - pinned if step < trusted[0]}


@pytest.mark.parametrize("are_served", [False, True])
def test_a_run_keeps_what_endpoints_serve(tmp_path: Path, *, are_served: bool) -> None:
    plan = tiny_plan(
        str(tmp_path), checkpoint={"save_every_steps": 1, "num_to_keep": 1, "keep_best": 0}
    )
    uris = [plan.run.child(f"checkpoints/{checkpoint_name(step, 1)}").uri for step in range(1, 9)]
    pinned = json.dumps({"pinned": uris if are_served else []}).encode()
    open_storage(str(tmp_path)).write_bytes("endpoints/e.json", pinned)
    train(plan, rank=0, world_size=1)
    saved = [line["step"] for line in Ledger.read(plan.run).events("checkpoint")]
    kept = [step_of(name) for name in RunCheckpoints(plan.run).names]
    assert kept == (saved if are_served else saved[-2:])
