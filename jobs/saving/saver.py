"""The savers of an attempt: one saver of the whole state, one of its shards, and one for ranks
that store nothing."""

from typing import Protocol

from model.files.checkpoint_folder import Metadata
from raymill.state.train_state import TrainState


class Saver(Protocol):
    """Stores checkpoints of one attempt while its training continues. All ranks call each method
    together."""

    wants_again: bool
    """Whether the last copy was damaged, so that the next step's state is to be saved, due or not;
    on one rank alone."""

    def save(self, metadata: Metadata, state: TrainState, *, must: bool) -> bool:
        """Copies the state, and has the copy stored. Returns whether it does: an earlier one may
        still be on its way, for which it waits with `must`.

        The ledger must hold the step already, as no checkpoint may be ahead of the ledger. Raises
        `LeaseLostError`.
        """

    def finish(self) -> None:
        """Returns once the last copy is stored. Raises `LeaseLostError`."""

    def abandon(self) -> None:
        """Starts nothing more, and does not wait for the copy that is being stored."""


class SavesNothing:
    """The saver of a rank that has the whole state, as rank 0 does, which stores it."""

    wants_again = False

    def save(self, metadata: Metadata, state: TrainState, *, must: bool) -> bool:
        return False

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass
