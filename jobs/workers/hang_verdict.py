"""Decides, from where all workers of a round stand, whether they hang, who holds the others up, and
whom to end.

A worker waits for another one if it is in a message that the other one has not begun, or if it is
one message further. Whoever waits for nobody holds the others up: it stands still in its own work,
or in a message whose other ranks are no less far, as the ends of a stopped link are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.workers.watchdog import Hang, Health, Place, own_work_deadline_s
from raymill.workers.progress import ranks_of

_STEP_FACTOR = 5  # one that gets a tenth of its time marks a pass or a bucket sooner
_CONNECTING_FACTOR = 4  # the first messages of a round connect those of up to 512 GPUs
_MAX_NAMED = 8


@dataclass(frozen=True)
class Standing:
    """Where one worker stands."""

    round: int
    place: Place
    step: int
    stood_s: float  # without a mark; 0 while it waits for storage, or prepares or ends its attempt
    usual_step_s: float | None
    is_waiting: bool  # for other workers
    # Begun and finished in this round, by the ranks that take part
    messages: dict[str, tuple[int, int]]


def verdict(
    standings: Sequence[Standing], *, hang_timeout_s: float, last: Hang | None
) -> Hang | None:
    """Returns what to do about the workers' standstill, None while it is none; `standings` are in
    the order of ranks, `last` is the verdict before."""
    usual_step_s = max(standing.usual_step_s or 0.0 for standing in standings)
    for standing in standings:
        if standing.stood_s < _bound_s(standing, usual_step_s, hang_timeout_s=hang_timeout_s):
            return None
    suspects = [rank for rank in range(len(standings)) if not _is_held_up(rank, standings)]
    suspects = suspects or [*range(len(standings))]  # each is held up by another one
    at_work = [rank for rank in suspects if not standings[rank].is_waiting]
    step = max(standing.step for standing in standings)
    is_again = last is not None and last.health is Health.BLOCKED and step <= last.step + 1
    times = last.times + 1 if is_again and last is not None else 1

    if at_work and len(at_work) < len(standings):
        health, suspects, ended = Health.STUCK, at_work, at_work
        reason = f"{_named(at_work)} stood still in its own work, and all others waited"
    elif len(suspects) == 1:
        health, ended = Health.BEHIND, suspects
        reason = f"{_named(suspects)} was furthest back, in a message that all others had behind them or waited for"
    else:
        health = Health.BLOCKED
        ended = [] if times == 1 else [suspects[-(times - 1) % len(suspects)]]
        reason = f"{_named(suspects)} stood still, none behind the others, as the ends of a stopped link do: "
        reason += (
            f"{_named(ended)} is ended, as this came {times} times in a row"
            if ended
            else "all meet again"
        )
    return Hang(
        round=standings[0].round,
        health=health,
        ranks=suspects[:_MAX_NAMED],
        ended=ended,
        step=step,
        seconds=round(min(standing.stood_s for standing in standings), 1),
        times=times if health is Health.BLOCKED else 1,
        reason=reason,
    )


def _bound_s(standing: Standing, usual_step_s: float, *, hang_timeout_s: float) -> float:
    """Returns how long a worker may stand still where it is."""
    if not standing.is_waiting:
        if standing.place is Place.STEP and usual_step_s > 0:
            return own_work_deadline_s(
                Place.STEP, usual_step_s, hang_timeout_s=hang_timeout_s, step_factor=_STEP_FACTOR
            )
        return own_work_deadline_s(standing.place, usual_step_s, hang_timeout_s=hang_timeout_s)
    is_connected = standing.place in (Place.STEP, Place.VALIDATION, Place.SAVE)
    return max(
        (1 if is_connected else _CONNECTING_FACTOR) * hang_timeout_s, _STEP_FACTOR * usual_step_s
    )


def _is_held_up(rank: int, standings: Sequence[Standing]) -> bool:
    """Reports whether the rank is in a message in which another one is not as far."""
    for name, (begun, finished) in standings[rank].messages.items():
        if begun == finished:
            continue
        for other in ranks_of(name):
            if sum(standings[other].messages.get(name, (0, 0))) < begun + finished:
                return True
    return False


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MAX_NAMED]))
    rest = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{rest}"
