"""Computes forward and backward passes of micro-batches, the same on whichever worker."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from cluster.settings.run import RunConfig, batch_schedule, way_to_compute
from jobs.exact.audits.silent_faults import corrupt
from jobs.exact.compute import MicroBatch, autocast, choose_operations, micro_batch, num_counted
from jobs.exact.run_state import decoder_of
from jobs.run.storage_retry import patiently
from jobs.tokens.token_stream import TokenStream
from model.decoder import Decoder
from model.files.failpoints import pause
from model.linear_cross_entropy import IGNORE_INDEX
from raymill.dropout import dropout_seed, seed_dropout
from raymill.state.train_state import TrainState
from raymill.step_timer import StepTimer
from raymill.sums.step_plan import StepPlan
from raymill.workers.progress import Progress

_MAX_PLANS = 4  # kept: a step needs its own and the next one's


class LanePasses:
    """The passes of a run's micro-batches: B sequences of T tokens each."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        rows: TokenStream,
        progress: Progress,
        *,
        eot_id: int | None,
        has_holes: bool = False,
    ) -> None:
        """`has_holes` says that the rows are of text, and that what does not count of it was
        forgotten."""
        self.config = config
        self.schedule = batch_schedule(config)
        self.is_lent_memory = way_to_compute(config) == "cpu"
        """Whether the operations write gradients into memory that is lent to them."""
        self._state = state
        self._rows = rows
        self._progress = progress
        self._eot_id = eot_id
        self._has_holes = has_holes
        self._left_out: Container[int] = ()
        self._plan_of_count = lru_cache(maxsize=_MAX_PLANS)(self.plan_of_count)
        self._loss_scale = config.train.numerics.loss_scale
        choose_operations(decoder_of(state), config, state.gathered)
        self.loss = ScaledLoss(decoder_of(state))

    def take(
        self,
        step: int,
        number: int,
        timer: StepTimer,
        *,
        loss_of: nn.Module | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Returns `scale` and the loss scale times a micro-batch's share of the batch's loss, and
        the number of tokens that it counts (2,), after its gradient went to the parameters.

        Nothing in it waits for a GPU, which computes while the next rows are read.
        """
        device = self._state.device
        with timer.phase("load"):
            batch, count = self._micro_batch(step, number)
        self._seed_dropout(step, number)
        pause("pass")
        scale *= self._loss_scale
        with timer.phase("forward"), autocast(self.config, device):
            loss: Tensor = (loss_of or self.loss)(
                batch, timer, scale=scale / self.schedule.step_tokens(step)
            )
        self._progress.end_pass(device)
        with timer.phase("backward"):
            loss.backward()
        self._progress.end_pass(device)
        figures = torch.stack([loss.detach(), loss.new_full((), count)])
        corrupt("loss", figures)
        return figures

    def scale(self, step: int, num_counted: int) -> float:
        """Returns the factor that turns the sum of a step's passes into the mean over so many
        counted tokens."""
        return self.schedule.step_tokens(step) / max(1, num_counted) / self._loss_scale

    @contextmanager
    def leaving_out(self, samples: Container[int]) -> Iterator[None]:
        """Lasts while the loss counts no token of these samples, given by their global indices: a
        step's loss is then the mean over the tokens of the others."""
        self._left_out = samples
        try:
            yield
        finally:
            self._left_out = ()

    @torch.no_grad()
    def losses_of(
        self, step: int, number: int, pieces: Sequence[tuple[int, slice]]
    ) -> list[tuple[float, int]]:
        """Returns the summed loss, in nats, of pieces of a micro-batch's rows, each given as its row
        there and its targets, with the number of tokens that it counts."""
        decoder = decoder_of(self._state)
        batch, _ = self._micro_batch(step, number)
        self._seed_dropout(step, number)
        losses: list[tuple[float, int]] = []
        with autocast(self.config, self._state.device):
            hidden = decoder(batch.inputs, positions=batch.positions, mask=batch.mask)  # (B, T, C)
            for row, span in pieces:
                # The shapes of training, for which the head may be compiled
                targets = torch.full_like(batch.targets, IGNORE_INDEX)
                targets[row, span] = batch.targets[row, span]
                losses.append((float(decoder.loss_of(hidden, targets)), num_counted(targets)))
        return losses

    def plan(self, step: int) -> StepPlan:
        """Returns who computes what in a step."""
        return self._plan_of_count(self.schedule.num_lanes(step))

    def plan_of_count(self, num_lanes: int) -> StepPlan:
        """Returns the same of a step of so many lanes."""
        k = self.config.train.micro_batches_per_lane
        return StepPlan(self._state.sharding, num_lanes, num_micro_batches=k)

    def read_ahead(self, step: int, *, also: Sequence[tuple[int, int]] = ()) -> None:
        """Has this worker's rows of a step and of the next one read, and the rows of other
        micro-batches, each given by its step and its number."""
        numbers: list[tuple[int, int]] = []
        for of_step in range(step, min(step + 1, self.schedule.max_steps) + 1):
            turns = chain.from_iterable(self.plan(of_step).turns)
            numbers += [(of_step, number) for number in turns]
        samples = [self._samples_of(*place) for place in (*numbers, *also)]
        self._rows.read_ahead(np.concatenate(samples))

    def _micro_batch(self, step: int, number: int) -> tuple[MicroBatch, int]:
        """Returns a micro-batch, and the number of tokens that its loss counts."""
        samples = self._samples_of(step, number)
        rows = patiently(lambda: self._rows.samples(samples), "tokens")
        batch = micro_batch(
            rows,
            self.config,
            self._state.device,
            eot_id=self._eot_id,
            has_holes=self._has_holes,
        )
        _, targets = rows
        left_out = [sample in self._left_out for sample in samples]
        if any(left_out):
            # Behind the mask, which tells conversations by targets that do not count
            targets = targets.masked_fill(torch.tensor(left_out)[:, None], IGNORE_INDEX)
            batch = batch._replace(targets=targets.to(self._state.device))
        return batch, num_counted(targets)

    def _seed_dropout(self, step: int, number: int) -> None:
        seed = dropout_seed(self.config.train.seed, step=step, micro_batch=number)
        seed_dropout(seed, self._state.device)

    def _samples_of(self, step: int, number: int) -> range:
        """Returns the global indices of a micro-batch's samples: those of a step follow each
        other."""
        size = self.config.train.micro_batch_size
        first = number * size
        return self.schedule.samples(step)[first : first + size]


class ScaledLoss(nn.Module):
    """The scaled loss as a forward pass, which DistributedDataParallel can wrap."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        batch: MicroBatch,
        timer: StepTimer,
        *,
        scale: float,
    ) -> Tensor:
        hidden = self.model(
            batch.inputs,
            positions=batch.positions,
            mask=batch.mask,
        )  # (B, T, C)
        with timer.phase("loss"):
            return self.model.loss_of(hidden, batch.targets, scale=scale)
