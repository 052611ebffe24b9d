"""Says at which steps a run takes a token of its store, and which tokens a step takes: arithmetic
alone, without a scan of steps.

The rows of a source lie end to end in its text. Row r has the targets r*T + 1 to r*T + T; a step
learns those tokens, and only reads the one before them. Each sample of the run is a row, in the
order of `SampleOrder`, whose inverse gives the samples of a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.settings.batch_schedule import BatchSchedule
from jobs.tokens.batch_plan import SampleOrder
from jobs.tokens.division import Division, texts_of
from jobs.tokens.shard_reader import Piece
from jobs.tokens.token_store import Manifest, Shard
from jobs.tokens.token_stream import ShardChain

Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Stretch:
    """Tokens [start, end) of the text of a source, all of its training shards end to end."""

    source: int  # of the order: the only one where sources have no weights
    start: int
    end: int


class Turn(NamedTuple):
    """A row that is taken: a sample of a step, in one of its lanes."""

    step: int
    lane: int  # of the step, from 0
    sample: int  # of the run
    source: int
    epoch: int  # of the source, from 0
    row: int  # of the source's text


class TrainingOrder:
    """The rows of a run, and the steps that take them."""

    def __init__(
        self,
        manifest: Manifest,
        division: Division,
        schedule: BatchSchedule,
        *,
        seed: int,
        window_rows: int,
    ) -> None:
        """`manifest` has all its shards, and `division` says which of them train."""
        self.schedule, self.seq_len = schedule, schedule.seq_len
        self.texts = [ShardChain(text) for text in texts_of(manifest, "train", division)]
        num_rows = tuple(text.num_rows(self.seq_len) for text in self.texts)
        self.order = SampleOrder(seed, window_rows, num_rows, manifest.weights)
        self.num_samples = schedule.samples(schedule.max_steps).stop
        # By the shard's file: the source, the piece, and its place in the source's text
        self._pieces: dict[str, list[tuple[int, Piece, int]]] = {}
        for source, text in enumerate(self.texts):
            place = 0
            for piece in text.text:
                self._pieces.setdefault(piece.shard.file, []).append((source, piece, place))
                place += piece.end - piece.start

    def stretches(self, shard: Shard, start: int, end: int) -> Iterator[Stretch]:
        """Yields where tokens [start, end) of a shard lie in the texts to train on; nothing for
        what is held out."""
        for source, piece, place in self._pieces.get(shard.file, ()):
            first, last = max(start, piece.start), min(end, piece.end)
            if first < last:
                offset = place - piece.start
                yield Stretch(source, first + offset, last + offset)

    def rows(self, stretch: Stretch) -> range:
        """Returns the rows that have a token of the stretch among their targets."""
        first = max(0, stretch.start - 1) // self.seq_len
        end = (stretch.end - 2) // self.seq_len + 1
        return range(first, max(first, min(end, self.order.num_rows[stretch.source])))

    def rows_reading(self, stretch: Stretch) -> range:
        """Returns the rows that have a token of the stretch among their inputs or targets."""
        first = max(0, stretch.start - 1) // self.seq_len
        end = (stretch.end - 1) // self.seq_len + 1
        return range(first, max(first, min(end, self.order.num_rows[stretch.source])))

    def tokens_by_row(
        self, stretch: Stretch, rows: range, *, is_counted: Callable[[Piece], Marks] | None = None
    ) -> list[int]:
        """Returns how many tokens of a stretch each of its rows teaches. `is_counted` marks the
        tokens of a piece that the loss counts, where it does not count all of them."""
        borders = np.arange(rows.start, rows.stop + 1, dtype=np.int64) * self.seq_len + 1
        borders = np.clip(borders, stretch.start, stretch.end) - stretch.start
        if is_counted is None:
            return np.diff(borders).tolist()
        marks = np.concatenate([is_counted(piece) for piece in self.pieces(stretch)])
        counted_before = np.concatenate([[0], np.cumsum(marks)])
        return np.diff(counted_before[borders]).tolist()

    def targets(self, turn: Turn) -> Stretch:
        """Returns the tokens that a row teaches."""
        first = turn.row * self.seq_len + 1
        return Stretch(turn.source, first, first + self.seq_len)

    def pieces(self, stretch: Stretch) -> Iterator[Piece]:
        """Yields the pieces of shards that hold a stretch."""
        return self.texts[stretch.source].pieces(stretch.start, stretch.end)

    def turns(self, source: int, rows: range) -> list[Turn]:
        """Returns each time that the run takes one of these rows, in the order of its samples."""
        turns: list[Turn] = []
        numbered = np.asarray(rows, dtype=np.int64)
        num_epochs = self.order.num_epochs(source, self.num_samples) if len(rows) else 0
        for epoch in range(num_epochs):
            samples = self.order.samples_of(source, numbered, epoch=epoch)
            for row, sample in zip(rows, samples.tolist(), strict=True):
                if sample < self.num_samples:
                    turns.append(self._turn(sample, source, epoch, row))
        return sorted(turns, key=lambda turn: turn.sample)

    def turns_of_step(self, step: int) -> list[Turn]:
        """Returns the rows that a step takes, lane after lane."""
        samples = self.schedule.samples(step)
        sources, rows = self.order.rows(samples)
        epochs = self.order.epochs(samples)
        columns = (samples, sources.tolist(), epochs.tolist(), rows.tolist())
        return [self._turn(*values) for values in zip(*columns, strict=True)]

    def _turn(self, sample: int, source: int, epoch: int, row: int) -> Turn:
        step = self.schedule.step_of(sample)
        in_step = sample - self.schedule.samples(step).start
        return Turn(step, in_step // self.schedule.lane_size, sample, source, epoch, row)
