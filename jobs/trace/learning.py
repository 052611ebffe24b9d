"""Says at which steps a run learned tokens of its token store, up to one of its steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cluster.settings.run import RunConfig, batch_schedule
from cluster.storage.uris import Storage
from jobs.proof.step_outcomes import Outcome, StepOutcomes
from jobs.proof.training_order import Marks, TrainingOrder
from jobs.run.find_run import division, last_start
from jobs.run.ledger import Ledger
from jobs.tokens.shard_reader import Piece
from jobs.tokens.token_store import Manifest


@dataclass(frozen=True)
class Learning:
    """What a run has learned of a token store."""

    ledger: Ledger
    config: RunConfig
    outcomes: StepOutcomes  # as the ledger has them
    store: Storage
    manifest: Manifest
    last_step: int  # that counts: the run's, or that of a checkpoint

    @cached_property
    def order(self) -> TrainingOrder:
        return TrainingOrder(
            self.manifest,
            division(last_start(self.ledger, self.manifest.identity)),
            batch_schedule(self.config),
            seed=self.config.train.seed,
            window_rows=self.config.train.shuffle_window_rows,
        )

    @cached_property
    def losses(self) -> dict[int, float]:
        """The loss of each step's batch, nats per token, before its update."""
        return {line["step"]: line["loss"] for line in self.ledger.steps}

    def turns(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yields each time that a step takes tokens of a piece, in the order of steps."""
        order = self.order
        for stretch in order.stretches(*piece):
            rows = order.rows(stretch)
            counts = order.tokens_by_row(stretch, rows, is_counted=self._is_counted)
            for turn in order.turns(stretch.source, rows):
                if num_tokens := counts[turn.row - rows.start]:
                    yield {
                        "step": turn.step,
                        "lane": turn.lane,
                        "epoch": turn.epoch + 1,
                        "tokens": num_tokens,
                        "outcome": self._outcome(turn.step).value,
                    }

    def _outcome(self, step: int) -> Outcome:
        """Returns what became of a step up to the one that counts."""
        if step > self.last_step:
            return Outcome.NOT_TAKEN
        return self.outcomes.outcome(step, self.manifest.identity)

    @property
    def _is_counted(self) -> Callable[[Piece], Marks] | None:
        """Marks the tokens of a piece that the loss counts; None where it counts all of them."""
        return None if self.manifest.chat is None else self._is_answer

    def _is_answer(self, piece: Piece) -> Marks:
        dtype = self.manifest.dtype
        start, end = piece.start * dtype.itemsize, piece.end * dtype.itemsize
        content = self.store.read_bytes(piece.shard.file, start=start, end=end)
        return np.frombuffer(content, dtype) >= 0
