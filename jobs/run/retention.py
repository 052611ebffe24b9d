"""Names checkpoints, and decides from names and numbers alone which of them may be deleted."""

import re
from collections.abc import Collection, Mapping

from cluster.settings.run import CheckpointConfig

_MIN_VERIFIED = 2


def checkpoint_name(step: int, generation: int = 0) -> str:
    """Returns a name by which checkpoints sort in the order of their steps, then of their writers."""
    return f"step-{step:09d}-{generation:04d}" if generation else f"step-{step:09d}"


def is_checkpoint_name(name: str) -> bool:
    return re.fullmatch(r"step-\d{9}(-\d{4,})?", name) is not None


def step_of(name: str) -> int:
    return int(name.split("-")[1])


def superseded(
    complete: Collection[str],
    incomplete: Collection[str],
    *,
    keep: CheckpointConfig,
    verified: Collection[str],
    pinned: Collection[str] = (),
    val_losses: Mapping[str, float] | None = None,
) -> list[str]:
    """Returns the checkpoints to delete, oldest first; none before two were verified.

    Kept are the newest `keep.num_to_keep`, the `keep.keep_best` of the lowest validation loss, each
    `keep.keep_every_steps`-th step, that of step 0 with which a warm start begins, the pinned ones, and the two newest
    verified ones. The `incomplete` remains of a crash are deleted once they are older than those two.
    """
    names = sorted(complete)
    trusted = [name for name in names if name in verified][-_MIN_VERIFIED:]
    if len(trusted) < _MIN_VERIFIED:
        return []
    losses = {name: loss for name, loss in (val_losses or {}).items() if name in names}
    best = sorted(losses, key=lambda name: (losses[name], name))[: keep.keep_best]
    begun_from = {name for name in names if step_of(name) == 0}
    kept = {*names[-keep.num_to_keep :], *trusted, *best, *pinned, *begun_from}
    if keep.keep_every_steps:
        kept |= {name for name in names if step_of(name) % keep.keep_every_steps == 0}
    garbage = {name for name in incomplete if name < trusted[0] and name not in pinned}
    return sorted(({*names} | garbage) - kept)
