"""Bad steps are skipped, rolled back or end the run: the decisions by themselves, and in real
training by real faults."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cluster.settings.run import RunConfig
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.guards import SPIKE_WINDOW, Decision, GuardState, Verdict, decide
from model.files.checkpoint_folder import read_metadata
from tests.jobs.poisoned_runs import Faults, run_world
from tests.jobs.runs import tiny_plan


def policy(*, spike_factor: float = 0.0) -> RunConfig:
    """Sixty steps of a sequence each, which may be saved at every fifth."""
    train = {"max_skipped_steps": 2, "max_rollbacks": 2, "spike_factor": spike_factor}
    batch = {"global_batch_size": 1, "micro_batch_size": 1, "seq_len": 8, "max_tokens": 60 * 8}
    branches = {"checkpoint": {"save_every_steps": 5}, "scaling": {"max_workers": 1}}
    return RunConfig.model_validate(
        {"model": {"preset": "tiny"}, "train": train | batch} | branches
    )


POLICY = policy()


def judge(
    state: GuardState,
    step: int,
    *,
    loss: float = 3.0,
    norm: float = 1.0,
    config: RunConfig = POLICY,
) -> Decision:
    return decide(state, config, step=step, loss=loss, grad_norm=norm)


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.inf), (3.0, math.nan)]
)
def test_what_is_not_finite_is_skipped(loss: float, norm: float) -> None:
    decision = judge(GuardState(last_applied=6), 7, loss=loss, norm=norm)
    assert decision.verdict is Verdict.SKIP
    assert decision.state == GuardState(last_applied=6, skipped_in_a_row=1)
    assert judge(decision.state, 8).state == GuardState(last_applied=8)


@pytest.mark.parametrize(
    ("state", "step", "window"),
    [
        (GuardState(last_applied=12, skipped_in_a_row=2), 15, (11, 15)),
        # The state of step 10 is the present one
        (GuardState(last_applied=10, skipped_in_a_row=2), 13, (6, 13)),
        (GuardState(last_applied=3, skipped_in_a_row=2), 6, (1, 6)),  # back to fresh weights
        # Further back
        (GuardState(last_applied=10, skipped_in_a_row=2, rollbacks=((11, 15),)), 18, (6, 18)),
    ],
)
def test_a_rollback_leaves_out_the_updates_since_an_earlier_save(
    state: GuardState, step: int, window: tuple[int, int]
) -> None:
    decision = judge(state, step, loss=math.nan)
    assert decision.verdict is Verdict.ROLL_BACK
    assert decision.state.rollbacks == (*state.rollbacks, window)


@pytest.mark.parametrize(
    ("state", "step", "obstacle"),
    [
        (GuardState(skipped_in_a_row=2), 3, "no earlier state"),
        (
            GuardState(last_applied=40, skipped_in_a_row=2, rollbacks=((6, 9), (21, 25))),
            43,
            "train.max_rollbacks=2",
        ),
        (GuardState(last_applied=57, skipped_in_a_row=2), 60, "no data is left"),
    ],
)
def test_a_run_that_has_nothing_left_to_try_stops(
    state: GuardState, step: int, obstacle: str
) -> None:
    decision = judge(state, step, loss=math.nan)
    assert decision.verdict is Verdict.STOP
    assert obstacle in decision.reason
    assert "train.learning_rate" in decision.reason


def test_spikes_are_measured_against_the_steps_before() -> None:
    config = policy(spike_factor=6.0)
    state = GuardState()
    for step in range(1, SPIKE_WINDOW + 1):
        # Nothing to compare
        assert judge(state, step, loss=1e9 * (step == 1), config=config).verdict is Verdict.APPLY
        state = judge(state, step, loss=3.0 + step / 100, config=config).state
    # The median of the window is 3.325, and the median deviation from it 0.16.
    assert state.losses == tuple(3.0 + step / 100 for step in range(1, SPIKE_WINDOW + 1))
    assert judge(state, 65, loss=4.28, config=config).verdict is Verdict.APPLY
    spike = judge(state, 65, loss=4.29, config=config)
    assert spike.verdict is Verdict.SKIP
    assert spike.state.losses == state.losses
    assert judge(state, 65, loss=4.29).verdict is Verdict.APPLY  # off unless asked for


def test_what_rollbacks_left_out_is_passed_from_its_first_step_to_its_last() -> None:
    state = GuardState(last_applied=5, skipped_in_a_row=1, rollbacks=((6, 9), (10, 12)))
    assert [step for step in range(1, 15) if state.leaves_out(step)] == [*range(6, 13)]
    assert state.entering(5) == (5, state)
    for step in (6, 9, 10, 12):
        assert state.entering(step) == (13, replace(state, skipped_in_a_row=0))


def test_losses_that_hardly_differ_make_no_spike_of_the_next_one() -> None:
    config = policy(spike_factor=6.0)
    state = GuardState(last_applied=64, losses=(3.0,) * SPIKE_WINDOW)
    # The least deviation is a thousandth of the median: the bound is 3.018
    assert judge(state, 65, loss=3.017, config=config).verdict is Verdict.APPLY
    assert judge(state, 65, loss=3.019, config=config).verdict is Verdict.SKIP


def test_a_loss_at_the_bound__is_no_spike_yet() -> None:
    """A median of 4 and a median deviation of 1, which floats have exactly: the bound is 10."""
    config = policy(spike_factor=6.0)
    state = GuardState(last_applied=64, losses=(3.0, 5.0) * (SPIKE_WINDOW // 2))
    assert judge(state, 65, loss=10.0, config=config).verdict is Verdict.APPLY
    above = math.nextafter(10.0, math.inf)
    assert judge(state, 65, loss=above, config=config).verdict is Verdict.SKIP


@given(
    bad=st.sets(st.integers(1, 60), max_size=30),
    kept=st.sets(st.integers(1, 12).map(lambda n: 5 * n)),
    kills=st.lists(st.integers(1, 60), max_size=4),
)
def test_kills_and_missing_checkpoints_change_no_decision(
    bad: set[int], kept: set[int], kills: list[int]
) -> None:
    """Whatever checkpoints survive a kill, the run comes to the same updates and the same end."""

    def run(kept: set[int], kills: list[int]) -> tuple[tuple[int, ...], Verdict]:
        kills, known = list(kills), GuardState().rollbacks
        saved: dict[int, tuple[GuardState, tuple[int, ...]]] = {}
        while True:  # an attempt
            usable = [n for n in saved if not GuardState(rollbacks=known).leaves_out(n)]
            state, updates = saved[max(usable)] if usable else (GuardState(), ())
            step, state = replace(state, rollbacks=max(state.rollbacks, known, key=len)).entering(
                max(usable, default=0) + 1
            )
            while step <= 60:
                if step in kills:
                    kills.remove(step)
                    break
                decision = judge(state, step, loss=math.nan if step in bad else 3.0)
                if decision.verdict is Verdict.STOP:
                    return updates, Verdict.STOP
                if decision.verdict is Verdict.ROLL_BACK:
                    known = decision.state.rollbacks
                    break
                state = decision.state
                updates += (step,) if decision.verdict is Verdict.APPLY else ()
                if step in kept:
                    saved[step] = state, updates
                step, state = state.entering(step + 1)
            else:
                return updates, Verdict.APPLY

    assert run(kept, kills) == run(set(range(5, 61, 5)), [])


def test_the_state_survives_a_checkpoint() -> None:
    state = GuardState(7, 2, (3.25, 1 / 3), ((1, 4), (6, 9)))
    assert GuardState.from_json(asdict(state)) == state


def poisoned(*steps: int) -> Faults:
    return Faults(poisoned=frozenset((step, step % 2) for step in steps))


def outcome(plan: RunPlan) -> tuple[str, list[tuple[int, float]]]:
    """The final parameter hash and the loss column."""
    ledger = Ledger.read(plan.run)
    assert ledger.events("finish"), ledger.events()
    losses = [(line["step"], line["loss"]) for line in ledger.steps]
    assert all(math.isfinite(loss) for _, loss in losses)
    return ledger.events("checkpoint")[-1]["parameter_hash"], losses


def plan_in(folder: Path, **train: object) -> RunPlan:
    train = {"max_skipped_steps": 2, "hash_every_steps": 1, "sample_prompts": []} | train
    return tiny_plan(str(folder), num_steps=12, train=train, scaling={"max_workers": 2})


def test_a_skipped_step_changes_no_bit_of_weights_and_moments(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    run_world(plan, poisoned(12))  # the last one, whose checkpoint no newer one replaces
    ledger, checkpoints = Ledger.read(plan.run), RunCheckpoints(plan.run)
    (skip,) = ledger.events("skip")
    assert (skip["step"], skip["samples"]) == (12, [44, 48])
    assert [line["step"] for line in ledger.steps] == [*range(1, 12)]
    folder = checkpoints.fetch(checkpoints.names[-1], tmp_path)
    metadata = read_metadata(folder)
    assert metadata.parameter_hash == ledger.steps[-1]["parameter_hash"]
    assert load_file(folder / "train_state.safetensors")["step"] == 11
    assert metadata.tokens_seen == 12 * 4 * 32


def test_poison_does_the_same_at_any_world_size_and_after_any_kill(tmp_path: Path) -> None:
    """Steps 6 to 8 are bad: back to step 3, on with step 9. The same for 2 workers and for runs
    that were killed."""
    faults = poisoned(6, 7, 8, 11)
    plans = [plan_in(tmp_path / name) for name in ("alone", "two", "killed", "bare")]
    run_world(plans[0], faults)
    run_world(plans[1], faults, world_size=2)
    for dies_at in (7, 10):
        run_world(plans[2], replace(faults, dies_at=dies_at))
    run_world(plans[2], faults, world_size=2)
    run_world(plans[3], replace(faults, dies_at=9))
    # Nothing is left of it but its newest checkpoint, which is to be left out
    plans[3].run.delete("ledger.jsonl")
    run_world(plans[3], faults)
    hashes, losses = zip(*map(outcome, plans), strict=True)
    assert len(set(hashes)) == 1
    assert [step for step, _ in losses[0]] == [1, 2, 3, 9, 10, 12]
    assert losses[0] == losses[1] == losses[2]
    (rollback,) = Ledger.read(plans[0].run).events("rollback")
    assert (rollback["first"], rollback["last"], rollback["samples"]) == (4, 8, [12, 32])


def test_a_spike_is_skipped_alike_by_all(tmp_path: Path) -> None:
    step = SPIKE_WINDOW + 6
    faults = Faults(scaled=((step, 30.0),))
    settings = {"spike_factor": 8.0, "max_tokens": (step + 2) * 4 * 32}
    plans = [plan_in(tmp_path / name, **settings) for name in ("alone", "two")]
    run_world(plans[0], replace(faults, dies_at=step))
    run_world(plans[0], faults)
    run_world(plans[1], faults, world_size=2)
    assert outcome(plans[0]) == outcome(plans[1])
    (skip,) = Ledger.read(plans[0].run).events("skip")
    assert (skip["step"], "spike" in skip["reason"]) == (step, True)


def test_a_validation_loss_that_is_not_finite_is_none_in_the_checkpoint(tmp_path: Path) -> None:
    """The weights are finite, and the logits are not: the save of step 2 raised what ended the
    attempt."""
    plan = plan_in(tmp_path, learning_rate=1e30, max_tokens=2 * 4 * 32, eval_every_steps=1)
    run_world(plan)
    ledger = Ledger.read(plan.run)
    assert not math.isfinite(ledger.events("validation")[-1]["val_loss"])
    saved = ledger.events("checkpoint")[-1]
    assert (saved["step"], saved["val_loss"]) == (2, None)
    assert ledger.events("finish")


def test_weights_that_overflow_reach_no_checkpoint_and_stop_the_run_with_a_reason(
    tmp_path: Path,
) -> None:
    plan = plan_in(tmp_path, learning_rate=1e38, max_rollbacks=1)
    run_world(plan)
    ledger, checkpoints = Ledger.read(plan.run), RunCheckpoints(plan.run)
    assert not ledger.events("finish")
    assert "train.max_rollbacks=1 is used up" in ledger.events("gave_up")[-1]["reason"]
    for name in checkpoints.names:
        weights = load_file(checkpoints.fetch(name, tmp_path) / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())
