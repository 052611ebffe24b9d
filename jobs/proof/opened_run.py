"""A run, opened to ask what became of its steps, and which of them learned tokens of its store."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cluster.output.json_result import JsonResult
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, batch_schedule, max_steps
from cluster.storage.uris import Storage
from jobs.proof.step_outcomes import Outcome, StepOutcomes
from jobs.proof.training_order import Marks, Stretch, TrainingOrder, Turn
from jobs.run.find_run import begun_ledger, data_identity, division, holes_of, last_start
from jobs.run.history import recorded_config
from jobs.run.ledger import Ledger
from jobs.tokens.holes import NO_HOLES, HoleMap
from jobs.tokens.shard_reader import Piece, read_piece
from jobs.tokens.token_store import Manifest
from raymill.errors import UserError


@dataclass(frozen=True)
class OpenedRun:
    """The records of a run."""

    run: Storage
    ledger: Ledger
    config: RunConfig
    outcomes: StepOutcomes

    @classmethod
    def open(cls, run: Storage) -> "OpenedRun":
        """Raises `UserError` for a run without a step."""
        ledger = begun_ledger(run)
        return cls(run, ledger, recorded_config(run), StepOutcomes(ledger))

    def identity(self, step: int | None = None) -> str | None:
        """Returns the identity of the token store of the last attempt, or of a step. Raises
        `UserError` for a step that was not taken."""
        if step is None:
            return data_identity(self.ledger)
        most, outcomes = max_steps(self.config), self.outcomes
        if not 1 <= step <= most:
            raise ConfigError(f"--step {step}: {self.run.uri} has steps 1 to {most}")
        identity = outcomes.identity(step)
        if outcomes.outcome(step, identity) is Outcome.NOT_TAKEN:
            raise UserError(
                f"step {step} is not taken yet: {self.run.uri} is at step {outcomes.last_step} of {most}"
            )
        return identity


@dataclass(frozen=True)
class Taken(JsonResult):
    """A time that a step takes tokens, all in one row."""

    step: int
    lane: int  # of the step, from 0
    epoch: int  # of the source, from 1
    sample: int  # of the run
    tokens: int  # that the loss counts
    outcome: Outcome


def learned_steps(taken: Iterable[Taken]) -> list[int]:
    """Returns the steps that learned what was taken, each once, in order."""
    return sorted({time.step for time in taken if time.outcome is Outcome.LEARNED})


@dataclass(frozen=True)
class Learning:
    """The part of a token store that a run has learned."""

    opened: OpenedRun
    store: Storage
    manifest: Manifest
    last_step: int  # that counts: the run's, or that of a checkpoint

    @cached_property
    def order(self) -> TrainingOrder:
        config = self.opened.config
        return TrainingOrder(
            self.manifest,
            division(last_start(self.opened.ledger, self.manifest.identity)),
            batch_schedule(config),
            seed=config.train.seed,
            window_rows=config.train.shuffle_window_rows,
        )

    @cached_property
    def holes(self) -> HoleMap:
        """What the run leaves out of the store. Raises `TokenStoreError` for a list that is
        gone."""
        holes = holes_of(self.opened.run, self.opened.config)
        is_of_store = holes.data_identity == self.manifest.identity
        return HoleMap(holes if is_of_store else NO_HOLES, self.manifest)

    def is_forgotten(self, stretch: Stretch) -> bool:
        """Reports whether all tokens of a stretch are left out."""
        return all(bool(self.holes.marks(piece).all()) for piece in self.order.pieces(stretch))

    @cached_property
    def losses(self) -> dict[int, float]:
        """The loss of each step's batch, nats per token, before its update."""
        return {line["step"]: line["loss"] for line in self.opened.ledger.steps}

    def taken(self, stretches: Iterable[Stretch]) -> list[Taken]:
        """Returns each time that a step takes tokens of the stretches, in the order of steps, lanes
        and samples."""
        order, tokens = self.order, Counter[Turn]()
        for stretch in stretches:
            rows = order.rows(stretch)
            counts = order.tokens_by_row(stretch, rows, is_counted=self._is_counted)
            for turn in order.turns(stretch.source, rows):
                tokens[turn] += counts[turn.row - rows.start]
        return [
            Taken(
                turn.step,
                turn.lane,
                turn.epoch + 1,
                turn.sample,
                tokens[turn],
                self.outcome(turn.step),
            )
            for turn in sorted(tokens)
            if tokens[turn]
        ]

    def outcome(self, step: int) -> Outcome:
        """Returns what became of a step, up to the last one that counts."""
        if step > self.last_step:
            return Outcome.NOT_TAKEN
        return self.opened.outcomes.outcome(step, self.manifest.identity)

    def num_counted(self, piece: Piece) -> int:
        """Returns how many tokens of a piece the loss counts."""
        is_counted = self._is_counted
        return int(is_counted(piece).sum()) if is_counted else piece.end - piece.start

    @property
    def _is_counted(self) -> Callable[[Piece], Marks] | None:
        """Marks the tokens of a piece that the loss counts; None where it counts all of them."""
        return None if self.manifest.chat is None and not self.holes else self._counts

    def _counts(self, piece: Piece) -> Marks:
        marks = ~self.holes.marks(piece)
        if self.manifest.chat is None:
            return marks
        dtype = self.manifest.dtype
        is_answer: Marks = np.frombuffer(read_piece(self.store, piece, dtype), dtype) >= 0
        return marks & is_answer
