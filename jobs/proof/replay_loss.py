"""Takes the steps around a run's first lost worker again, by one undisturbed worker, and compares
their bits with the ledger."""

from collections.abc import Iterable

from cluster.storage.uris import Storage
from jobs.proof.replay_run import Replayed, replay
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.find_run import begun_ledger
from jobs.run.ledger import Ledger
from raymill.errors import UserError


def replay_around_loss(run: Storage) -> tuple[range, Replayed]:
    """Takes `steps_around_loss` again, and returns them with what came of them.

    Raises `UserError` for a run that lost no worker, and what `replay` raises.
    """
    ledger = begun_ledger(run)
    steps = steps_around_loss(
        ledger,
        kept_steps=map(step_of, RunCheckpoints(run).names),
        hashed_steps=(event["step"] for event in ledger.events("checkpoint")),
    )
    if steps is None:
        raise UserError(
            f"{run.uri} lost no worker between two of its steps, so there are none to take again: a "
            "kill has to come earlier, or the run has to take more steps"
        )
    return steps, replay(run, steps=steps, num_workers=1)


def steps_around_loss(
    ledger: Ledger, *, kept_steps: Iterable[int], hashed_steps: Iterable[int]
) -> range | None:
    """Returns the steps after the newest kept checkpoint before the first recovery, or after the
    run's beginning, up to the next step whose weights have a hash. Returns None where nothing was
    lost."""
    recoveries = ledger.recoveries()
    if not recoveries:
        return None
    resumed_at = recoveries[0].step
    before = max((step for step in kept_steps if step <= resumed_at), default=0)
    after = min((step for step in hashed_steps if step > resumed_at), default=None)
    return None if after is None else range(before + 1, after + 1)
