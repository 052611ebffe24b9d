"""The loop of a careful user of DistributedDataParallel: a batch that stays the same, a checkpoint each
few steps, and one more when the ranks agree that their end was announced."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.benchmarks.goodput import peer_model
from tests.benchmarks.goodput.records import Event, write_mark, write_step


class DdpLoop:
    """One rank's part of a group, from the state to continue from until the group ends."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        rank: int,
        world_size: int,
        wrap: Callable[[nn.Module], nn.Module],
        saved: Path | None,
    ) -> None:
        """`saved` is the file of the state to continue from; None begins."""
        self.settings, self.rank, self.world_size = settings, rank, world_size
        self._model = peer_model.new_model(preset=settings["preset"], vocab=settings["vocab"])
        self._optimizer = peer_model.new_optimizer(self._model)
        self._log = Path(settings["log"])
        self.step = 0
        if saved:
            state = torch.load(saved, weights_only=True)
            self._model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        write_mark(self._log, Event.LOADED)
        self._loss_of = wrap(peer_model.Loss(self._model, row_s=settings["row_s"]))

    def take_step(self) -> None:
        """Takes the next step; rank 0 writes it down."""
        settings, batch = self.settings, self.settings["batch"]
        number = self.step + 1
        samples = peer_model.samples_of(
            number, batch=batch, rank=self.rank, world_size=self.world_size
        )
        rows = peer_model.rows_of(samples, vocab=settings["vocab"], seq_len=settings["seq_len"])
        self._loss_of(rows).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step = number
        if self.rank == 0:
            is_hashed = number % settings["hash_every_steps"] == 0
            write_step(
                self._log,
                number=number,
                world_size=self.world_size,
                samples=range((number - 1) * batch, number * batch),
                weights=peer_model.hash_of(self._model) if is_hashed else "",
            )

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint of the step is due."""
        return self.step % self.settings["save_every_steps"] == 0

    def save(self, file: Path) -> None:
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        peer_model.save(state | {"step": self.step}, file)

    def agree(self, *, asked: int) -> int:
        """Returns the largest number that any rank is asked."""
        level = torch.tensor([asked])
        dist.all_reduce(level, dist.ReduceOp.MAX)
        return int(level)
